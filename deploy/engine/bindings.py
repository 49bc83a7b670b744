"""The part of TensorRT's Python module that we use, common to 10.x, 11.x and tensorrt-rtx, typed by `tensorrt-stubs`.

Names that one of them lacks are read with `getattr`, or through `Any` if the flavour is known.
"""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import tensorrt


class Bindings(Protocol):
    """The module `tensorrt` or `tensorrt_rtx`."""

    Builder: type["tensorrt.Builder"]
    BuilderFlag: type["tensorrt.BuilderFlag"]
    DataType: type["tensorrt.DataType"]
    Dims: type["tensorrt.Dims"]
    HardwareCompatibilityLevel: type["tensorrt.HardwareCompatibilityLevel"]
    ILogger: type["tensorrt.ILogger"]
    IOutputAllocator: type["tensorrt.IOutputAllocator"]
    IProfiler: type["tensorrt.IProfiler"]
    IProgressMonitor: type["tensorrt.IProgressMonitor"]
    LayerInformationFormat: type["tensorrt.LayerInformationFormat"]
    LayerType: type["tensorrt.LayerType"]
    MemoryPoolType: type["tensorrt.MemoryPoolType"]
    NetworkDefinitionCreationFlag: type["tensorrt.NetworkDefinitionCreationFlag"]
    OnnxParser: type["tensorrt.OnnxParser"]
    OnnxParserRefitter: type["tensorrt.OnnxParserRefitter"]
    ProfilingVerbosity: type["tensorrt.ProfilingVerbosity"]
    Refitter: type["tensorrt.Refitter"]
    Runtime: type["tensorrt.Runtime"]
    TensorIOMode: type["tensorrt.TensorIOMode"]
    TensorLocation: type["tensorrt.TensorLocation"]


if TYPE_CHECKING:
    _CHECKED: Bindings = tensorrt
