"""torchvision <-> Flax: names and layouts (`names`), files (`checkpoints`), the commands (`python -m convert`)."""
