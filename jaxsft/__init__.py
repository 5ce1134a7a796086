"""Fine-tune a torchvision model in JAX and prove that it computes what PyTorch computes."""

__version__ = "0.1.0"
