"""What the simulator raises: errors that CUDA reports itself, and broken rules, which CUDA passes over in silence."""


class RuleError(AssertionError):
    """A rule of CUDA, torch or TensorRT was broken, and a real GPU might have given wrong results without a word."""


class CudaError(Exception):
    """A call failed with the `cudaError_t` of this name, such as `cudaErrorStreamCaptureUnsupported`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name
