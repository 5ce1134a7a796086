"""Models in torch's numerics; `jaxsft.models.resnet` holds the table of architectures."""
