"""What a session can tell of one run beyond its outputs: time by layer, and time of its parts on a GPU."""

from dataclasses import dataclass

RUNS = 10
"""Runs that are looked at, after WARMUPS that are not."""

WARMUPS = 3


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One step of a run as the backend made it of the graph; `ms` is the median over the runs.

    name, operator: the backend's own. nodes: the ONNX nodes that it is made of. modules: the torch modules that it runs or that
    the nodes come from; "" is the model itself. A session says what it knows of these, `bench.layers` finds the rest.
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
