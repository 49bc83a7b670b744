"""The times of one run: of its layers, and of its parts on a GPU."""

from dataclasses import dataclass

RUNS = 10
"""The number of runs that are measured, after WARMUPS that are not."""

WARMUPS = 3


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One step of a run, as the backend compiled the graph; `ms` is the median over the runs.

    name, operator: as the backend calls them. nodes: the ONNX nodes that were fused into it. modules: the torch modules that it
    runs or that the nodes come from; "" is the model itself. A session fills in what it knows; the benchmark adds the rest.
    """

    name: str
    operator: str
    ms: float
    nodes: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DeviceTimes:
    """Medians in milliseconds by CUDA events: the computation, and the copies of inputs to and outputs from the GPU."""

    gpu_ms: float
    h2d_ms: float
    d2h_ms: float
