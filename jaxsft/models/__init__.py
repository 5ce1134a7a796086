"""Models in torch's numerics, a file a family; `jaxsft.models.families` lists them all."""
