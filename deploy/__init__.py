"""From a trained PyTorch state_dict to a fast, verified GPU inference engine, and into a service."""

__version__ = "0.1.0"
