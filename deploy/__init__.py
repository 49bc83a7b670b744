"""From a trained PyTorch state_dict to a fast, verified GPU inference engine, and into a service.

    artifact = deploy.export(arch="lenet5", weights="lenet5.pth")
    engine = deploy.build_trt(artifact, precision="fp16")
    with deploy.load(artifact) as session:
        logits = session(images)

Names are loaded when they are first used: `import deploy` loads neither torch nor onnx nor a backend.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from deploy.version import __version__

if TYPE_CHECKING:
    from deploy import finetune as finetune
    from deploy.artifact.artifact import Artifact as Artifact
    from deploy.artifact.find import open_artifact as open_artifact
    from deploy.artifact.preprocess import Preprocess as Preprocess
    from deploy.errors import DeployError as DeployError
    from deploy.evaluation.evaluate import evaluate as evaluate
    from deploy.evaluation.predict import predict as predict
    from deploy.pipeline.build_aoti import build_aoti as build_aoti
    from deploy.pipeline.build_trt import build_trt as build_trt
    from deploy.pipeline.build_trt import preflight as preflight
    from deploy.pipeline.convert import convert as convert
    from deploy.pipeline.export import export as export
    from deploy.pipeline.quantize import quantize as quantize
    from deploy.runtime.batching.batcher import Batcher as Batcher
    from deploy.runtime.batching.batcher import BatcherOptions as BatcherOptions
    from deploy.runtime.batching.pipeline import Pipeline as Pipeline
    from deploy.runtime.load import load as load
    from deploy.runtime.session import Session as Session

# ONNX Runtime sends usage statistics, and keeps a device id, unless this is set when it is imported. Who wants that sets it to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_NAMES = {
    "Artifact": "deploy.artifact.artifact",
    "Batcher": "deploy.runtime.batching.batcher",
    "BatcherOptions": "deploy.runtime.batching.batcher",
    "DeployError": "deploy.errors",
    "Pipeline": "deploy.runtime.batching.pipeline",
    "Preprocess": "deploy.artifact.preprocess",
    "Session": "deploy.runtime.session",
    "build_aoti": "deploy.pipeline.build_aoti",
    "build_trt": "deploy.pipeline.build_trt",
    "convert": "deploy.pipeline.convert",
    "evaluate": "deploy.evaluation.evaluate",
    "export": "deploy.pipeline.export",
    "finetune": "deploy.finetune",
    "load": "deploy.runtime.load",
    "open_artifact": "deploy.artifact.find",
    "predict": "deploy.evaluation.predict",
    "preflight": "deploy.pipeline.build_trt",
    "quantize": "deploy.pipeline.quantize",
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
    "build_aoti",
    "build_trt",
    "convert",
    "evaluate",
    "export",
    "finetune",
    "load",
    "open_artifact",
    "predict",
    "preflight",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'deploy' has no attribute {name!r}")
    try:
        module = importlib.import_module(_NAMES[name])
    except ImportError as error:
        from deploy.host.extras import missing

        raise missing(error, f"deploy.{name}") or error from error
    value = module if module.__name__ == f"deploy.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
