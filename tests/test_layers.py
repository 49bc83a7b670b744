"""Imports go down only, and heavy libraries are loaded where they are needed and nowhere else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.artifact.manifest import Artifact

ROOT = Path(__file__).parents[1]

# Lowest first. A module belongs to the layer whose longest entry is its name or a package above it.
LAYERS = (
    (
        "ground",
        {
            "host",
            "evidence",
            "host.cache",
            "errors",
            "host.cpu",
            "artifact.tensors",
            "artifact.preprocess",
            "evidence.parity",
            "evidence.timing",
            "progress",
        },
    ),
    (
        "contracts",
        {
            "artifact",
            "artifact.manifest",
            "artifact.writer",
            "artifact.summary",
            "runtime.arrays",
            "runtime.profiling",
            "engine.cuda",
            "runtime.session",
            "runtime.batching.queue",
            "runtime.batching.batcher",
            "runtime.batching.pipeline",
            "runtime",
        },
    ),
    (
        "intake",
        {
            "artifact.find",
            "artifact.onnxfile",
            "precision.macs",
            "intake.checkpoint",
            "intake.fit",
            "intake.build",
            "intake.recipe",
            "intake.userfile",
            "intake.timm",
            "intake.torchvision",
        },
    ),
    (
        "workers",
        {
            "intake.export_errors",
            "intake.exporter",
            "precision",
            "engine",
            "intake",
            "runtime.backends",
            "runtime.backends.onnxruntime",
            "engine.context",
            "runtime.backends.tensorrt",
            "runtime.backends.tensorrt_rtx",
            "runtime.backends.openvino",
            "runtime.backends.eager",
            "runtime.backends.compile",
            "runtime.backends.null",
        },
    ),
    (
        "compositions",
        {
            "data.images",
            "data.calibration_set",
            "runtime.fastest",
            "evaluation.evaluate",
            "pipeline",
            "data",
            "evaluation",
            "bench",
            "runtime.doctor",
            "runtime.worker",
        },
    ),
    ("doors", {"pipeline.stage", "serving", "pipeline.api_export", "cli", "", "__main__"}),
)
GROUND_LIBRARIES = {"numpy", "PIL"}
# Doors may ask for the version and the lazy public names of the package itself.
PACKAGE_ITSELF = {"pipeline.stage", "pipeline.api_export", "cli", "", "__main__"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "deploy").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer(name: str) -> int:
    def length(index: int) -> int:
        return max(
            (len(entry) for entry in LAYERS[index][1] if name == entry or (entry and name.startswith(entry + "."))), default=-1
        )

    best = max(range(len(LAYERS)), key=length)
    assert length(best) >= 0, f"deploy.{name} has no layer: give it one in LAYERS"
    return best


def sources() -> list[Path]:
    files = [path for path in sorted((ROOT / "deploy").rglob("*.py")) if not {"models", "calibration"} & set(path.parts)]
    assert len(files) > 30
    return files


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or {"models", "calibration"} & set(path.parts), f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.level == 0 else set()
    return found


def ours(name: str) -> str | None:
    """The module of deploy that an imported name is in, without the leading `deploy.`; None for other packages."""
    if name.partition(".")[0] != "deploy":
        return None
    parts = name.split(".")[1:]
    while parts:
        base = ROOT / "deploy" / Path(*parts)
        if base.with_suffix(".py").is_file() or (base / "__init__.py").is_file():
            return ".".join(parts)
        parts.pop()
    return ""


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_go_down_only(path: Path) -> None:
    name = module_name(path)
    for imported in imports(path):
        target = ours(imported)
        if target is None or (target == "" and name.partition(".")[0] in PACKAGE_ITSELF):
            continue
        if target.partition(".")[0] == "models":
            assert layer(name) == 2, f"{name} imports {imported}: only the intake builds modules"
        elif target.partition(".")[0] == "calibration":
            statistics = name.startswith("precision.int8.") and "imagefolder" not in imported
            assert statistics or layer(name) == 4, f"{name} imports {imported}: only compositions read images"
        else:
            assert layer(target) <= layer(name), (
                f"{name} ({LAYERS[layer(name)][0]}) imports {imported} ({LAYERS[layer(target)][0]})"
            )


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_ground_uses_the_standard_library_numpy_and_pillow_only(path: Path) -> None:
    if layer(module_name(path)) == 0:
        others = {name.partition(".")[0] for name in imports(path)} - sys.stdlib_module_names - GROUND_LIBRARIES - {"deploy"}
        assert not others


@pytest.mark.parametrize("folder", ["models", "calibration"])
def test_models_and_calibration_import_neither_deploy_nor_one_another(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        assert not {name.partition(".")[0] for name in imports(path)} & {"deploy", "models", "calibration"}


@pytest.mark.parametrize("statement", ["import deploy", "from deploy.cli import cli"])
def test_importing_loads_no_heavy_library(statement: str) -> None:
    code = f"{statement}; import sys; print(*sorted({{'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt_rtx', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_loading_an_artifact_loads_neither_torch_nor_onnx(shared_lenet5: Artifact) -> None:
    code = f"import sys, deploy; deploy.load({str(shared_lenet5.path)!r}); print(*sorted({{'torch', 'onnx', 'click', 'rich'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_runtime_loads_no_torch_and_none_of_the_intake() -> None:
    code = (
        "import sys, deploy.runtime.backends.onnxruntime, deploy.runtime.backends.openvino, deploy.runtime.backends.null;"
        "print(*[name for name in sys.modules if name in ('torch', 'onnx') or name.startswith(('deploy.models', 'deploy.calibration'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
