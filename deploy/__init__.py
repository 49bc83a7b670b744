"""From a trained PyTorch state_dict to a fast, verified GPU inference engine, and into a service.

    artifact = deploy.export(arch="lenet5", weights="lenet5.pth")
    engine = deploy.build_trt(artifact, precision="fp16")
    with deploy.load(artifact) as session:
        logits = session(images)

Names are loaded when they are first used: `import deploy` loads neither torch nor onnx nor a backend.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deploy.api import build_trt as build_trt
    from deploy.api import convert as convert
    from deploy.api import preflight as preflight
    from deploy.api import quantize as quantize
    from deploy.api_export import export as export
    from deploy.artifact import Artifact as Artifact
    from deploy.errors import DeployError as DeployError
    from deploy.evaluation import evaluate as evaluate
    from deploy.evaluation import predict as predict
    from deploy.loading import load as load
    from deploy.opening import open_artifact as open_artifact
    from deploy.preprocess import Preprocess as Preprocess
    from deploy.runtime.batcher import Batcher as Batcher
    from deploy.runtime.batcher import BatcherOptions as BatcherOptions
    from deploy.runtime.pipeline import Pipeline as Pipeline
    from deploy.runtime.session import Session as Session

_NAMES = {
    "Artifact": "deploy.artifact",
    "Batcher": "deploy.runtime.batcher",
    "BatcherOptions": "deploy.runtime.batcher",
    "DeployError": "deploy.errors",
    "Pipeline": "deploy.runtime.pipeline",
    "Preprocess": "deploy.preprocess",
    "Session": "deploy.runtime.session",
    "build_trt": "deploy.api",
    "convert": "deploy.api",
    "evaluate": "deploy.evaluation",
    "export": "deploy.api_export",
    "load": "deploy.loading",
    "open_artifact": "deploy.opening",
    "predict": "deploy.evaluation",
    "preflight": "deploy.api",
    "quantize": "deploy.api",
}

__all__ = [
    "Artifact",
    "Batcher",
    "BatcherOptions",
    "DeployError",
    "Pipeline",
    "Preprocess",
    "Session",
    "__version__",
    "build_trt",
    "convert",
    "evaluate",
    "export",
    "load",
    "open_artifact",
    "predict",
    "preflight",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'deploy' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
