"""Imports go down only, room by room, without circles; heavy libraries are loaded where they are needed and nowhere else."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.artifact.artifact import Artifact

ROOT = Path(__file__).parents[1]

# Lowest first: a file imports from its own room and from the floors below, never from a room beside it.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "options", "progress", "version", "words", "host"),
    ("evidence",),
    ("artifact",),
    ("data", "intake", "engine"),
    ("precision", "runtime"),
    ("evaluation",),
    ("pipeline", "bench", "serving", "finetune", "verify", "tune"),
    ("cli", "", "__main__"),
)
FLOOR = {room: index for index, rooms in enumerate(FLOORS) for room in rooms}
GROUND_LIBRARIES = {"numpy", "PIL"}
NO_DEPLOY = ("models", "calibration")
BESIDE = {"": {"version"}, "__main__": {"cli"}, "host": {"errors", "version"}, "tune": {"pipeline"}}
"""Of rooms on one floor, who may import whom."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "deploy").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def room_of(name: str) -> str:
    room = name.partition(".")[0]
    assert room in FLOOR, f"deploy.{name} is in no room: give its folder a place in FLOORS"
    return room


def sources() -> list[Path]:
    files = [path for path in sorted((ROOT / "deploy").rglob("*.py")) if not set(NO_DEPLOY) & set(path.parts)]
    assert len(files) > 100
    return files


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or set(NO_DEPLOY) & set(path.parts), f"{path}: relative import"
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
    room = room_of(name)
    for imported in imports(path):
        target = ours(imported)
        if target is None:
            continue
        other = target.partition(".")[0]
        if other == "models":
            assert room in ("intake", "finetune"), f"{name} imports {imported}: only the intake builds modules"
        elif other == "calibration":
            statistics = name.startswith("precision.int8.") and "imagefolder" not in imported
            reads_folders = room in ("data", "evaluation")
            assert statistics or reads_folders, f"{name} imports {imported}: only data and evaluation read images"
        elif other != room and other not in BESIDE.get(room, set()):
            assert FLOOR[room_of(target)] < FLOOR[room], f"{name} (floor {FLOOR[room]}) imports {imported} (floor {FLOOR[other]})"


def test_no_file_imports_itself_in_a_circle() -> None:
    arrows = {
        module_name(path): {
            target for name in imports(path) if (target := ours(name)) and target.partition(".")[0] not in NO_DEPLOY
        }
        for path in sources()
    }
    assert list(circles(arrows)) == []


def circles(arrows: Mapping[str, set[str]]) -> Iterator[tuple[str, ...]]:
    """A path from a module back to itself, for the first module of each circle."""
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if name in path:
            yield (*path[path.index(name) :], name)
            return
        if name in done:
            return
        for target in sorted(arrows.get(name, ())):
            yield from walk(target, (*path, name))
        done.add(name)

    for name in sorted(arrows):
        yield from walk(name, ())


def test_a_circle_is_found() -> None:
    assert list(circles({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == [("b", "c", "b")]


@pytest.mark.parametrize(
    "path", [path for path in sources() if FLOOR[room_of(module_name(path))] <= FLOOR["evidence"]], ids=module_name
)
def test_the_ground_uses_the_standard_library_numpy_and_pillow_only(path: Path) -> None:
    others = {name.partition(".")[0] for name in imports(path)} - sys.stdlib_module_names - GROUND_LIBRARIES - {"deploy"}
    assert not others


@pytest.mark.parametrize("folder", NO_DEPLOY)
def test_models_and_calibration_import_neither_deploy_nor_one_another(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        assert not {name.partition(".")[0] for name in imports(path)} & {"deploy", *NO_DEPLOY}


@pytest.mark.parametrize("statement", ["import deploy", "from deploy.cli import cli"])
def test_importing_loads_no_heavy_library(statement: str) -> None:
    code = f"{statement}; import sys; print(*sorted({{'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt_rtx', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "ml_dtypes", "sympy", "click", "rich")
MAKERS = tuple(
    f"deploy.{room}" for room in ("bench", "calibration", "data", "finetune", "intake", "models", "pipeline", "precision")
)
"""What makes and judges artifacts: a service that runs them needs none of it."""


@pytest.mark.parametrize(
    "use",
    [
        pytest.param("deploy.load(PATH)(X)", id="load"),
        pytest.param("deploy.load(PATH, backend='fastest')(X)", id="fastest"),
        pytest.param("deploy.Batcher(deploy.load(PATH)).run({'input': X})", id="batcher"),
        pytest.param("list(deploy.load(PATH).stream([{'input': X}]))", id="stream"),
        pytest.param("import deploy.engine.rebuild, deploy.runtime.backends.tensorrt", id="engines"),
        pytest.param("import deploy.runtime.doctor", id="doctor"),
    ],
)
def test_running_an_artifact_loads_nothing_that_makes_one(shared_lenet5: Artifact, use: str) -> None:
    code = f"""
import sys, deploy, numpy
PATH, X = {str(shared_lenet5.path)!r}, numpy.zeros((1, 1, 28, 28), numpy.float32)
{use}
print(*sorted(name for name in sys.modules if name in {HEAVY} or name.startswith({MAKERS})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_bare_onnx_file_without_onnx_names_the_extra(tiny_onnx: Path) -> None:
    code = f"""
import sys, deploy
sys.modules["onnx"] = None
try:
    deploy.load({str(tiny_onnx)!r})
except deploy.DeployError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"the bare ONNX file {tiny_onnx} needs onnx, which is not installed: pip install 'deploy[export]'\n"


def test_the_runtime_loads_no_torch_and_none_of_the_intake() -> None:
    code = (
        "import sys, deploy.runtime.backends.onnxruntime, deploy.runtime.backends.openvino, deploy.runtime.backends.null;"
        "print(*[name for name in sys.modules if name in ('torch', 'onnx') or name.startswith(('deploy.models', 'deploy.calibration'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.fixture
def built(tmp_path: Path, run: Callable[..., Any]) -> Path:
    """A folder with an artifact, an engine and an INT8 artifact of it, as three commands make them."""
    feeds = tmp_path / "feeds"
    feeds.mkdir()
    np.savez(feeds / "0.npz", input=np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32))
    for arguments in (
        ("export", "--arch", "lenet5", "-o", tmp_path / "net"),
        ("build-trt", tmp_path / "net", "--fp16", "-o", tmp_path / "engine"),
        ("quantize", tmp_path / "net", "--calib", feeds, "-o", tmp_path / "int8"),
    ):
        assert run(*arguments).status == 0
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build-trt", "net", "--fp16", "-o", "engine"], "engine is up to date"),
        (["build-trt", "net", "--fp16", "-o", "another"], "the same engine was made before"),
        (["quantize", "net", "--calib", "feeds", "-o", "int8"], "int8 is up to date"),
        (["quantize", "net", "--calib", "feeds", "-o", "another"], "the same quantized artifact was made before"),
    ],
)
def test_what_is_up_to_date_or_in_the_cache_is_found_without_a_heavy_library(
    built: Path, arguments: list[str], message: str
) -> None:
    code = (
        "import sys; from deploy.cli import main; sys.argv = ['deploy', *sys.argv[1:]]\n"
        "try: main()\n"
        "finally: print('loaded', *sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'openvino', 'sympy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=built, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert message in done.stderr
    assert done.stdout.splitlines()[-1] == "loaded"


def main() -> None:
    """Print the rooms, floors and arrows, and the largest files."""
    lines = {module_name(path): path.read_text(encoding="utf-8").count("\n") for path in sources()}
    arrows = {
        (room_of(module_name(path)), room_of(target))
        for path in sources()
        for name in imports(path)
        if (target := ours(name)) is not None and target.partition(".")[0] not in NO_DEPLOY
    }
    between = {(room, other) for room, other in arrows if room != other}
    up = {(room, other) for room, other in between if FLOOR[room] < FLOOR[other]}
    sys.stdout.write(f"{len(FLOOR)} rooms on {len(FLOORS)} floors, {len(between)} arrows between rooms, {len(up)} of them up\n")
    for name, count in sorted(lines.items(), key=lambda item: -item[1])[:5]:
        sys.stdout.write(f"{count} lines  {name}\n")


if __name__ == "__main__":
    main()
