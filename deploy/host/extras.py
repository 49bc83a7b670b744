"""The extras of the package: the libraries that each brings, and what to say where one is missing."""

from deploy.errors import BackendError

EXTRAS: dict[str, dict[str, str]] = {
    "cpu": {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt_rtx": "tensorrt-rtx"},
    "gpu": {"onnxruntime": "onnxruntime-gpu", "tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx", "cuda": "cuda-python"},
    "pycuda": {"pycuda": "pycuda"},
    "export": {
        "torch": "torch",
        "torchvision": "torchvision",
        "onnx": "onnx",
        "onnx_ir": "onnx-ir",
        "onnxscript": "onnxscript",
        "ml_dtypes": "ml-dtypes",
        "scipy": "scipy",
    },
    "serving": {"grpc": "grpcio", "google": "protobuf", "starlette": "starlette", "uvicorn": "uvicorn"},
    "ray": {"ray": "ray"},
    "otel": {"opentelemetry": "opentelemetry-sdk", "opentelemetry.exporter": "opentelemetry-exporter-otlp-proto-http"},
    "parquet": {"pyarrow": "pyarrow"},
    "metrics": {"pycocotools": "pycocotools"},
    "loadgen": {"mlperf_loadgen": "mlcommons-loadgen"},
}
"""By extra, the modules of its libraries and the distributions that these come in: `pip install 'deploy[export]'`."""


def extra_of(module: str) -> str | None:
    """The first extra that brings a module, `onnx.helper` for example; None for a module of no extra."""
    top = module.partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if top in modules), None)


def missing(error: ImportError, what: str) -> BackendError | None:
    """What to raise for a library of an extra that is not installed, in one line; None where `error` has another cause.

    what: who needs the library, such as `deploy quantize`.
    """
    module = error.name or ""
    extra = extra_of(module)
    if extra is None:
        return None
    return BackendError(f"{what} needs {module.partition('.')[0]}, which is not installed: pip install 'deploy[{extra}]'")
