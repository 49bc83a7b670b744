"""How the weights of a checkpoint are paired with those of a module."""

from typing import Literal

Match = Literal["name", "order"]
"""By the names of the tensors, or in their order where names say nothing."""
