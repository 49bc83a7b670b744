"""Reference architectures in plain torch. Imports neither `deploy` nor `calibration`."""

from .errors import ModelError
from .registry import ARCHITECTURES, Architecture, create

__all__ = ["ARCHITECTURES", "Architecture", "ModelError", "create"]
