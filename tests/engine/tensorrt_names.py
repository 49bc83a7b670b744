"""The names that the code uses of TensorRT's Python module, and in which versions they are.

    python tests/engine/tensorrt_names.py

downloads the wheels of VERSIONS, which only hold the bindings, and writes `tensorrt_names.txt`, a name and the versions that
have it a line: those whose symbols name it. Run it when the code uses a name that is not there yet.
"""

import ast
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = ("10.16.0.72", "11.4.0.106")
LIST = Path(__file__).with_suffix(".txt")
DEPLOY = Path(__file__).parents[2] / "deploy"

OBJECTS = {
    "engine/attestation.py": {"network", "layer", "operand", "operands", "tensor"},
    "engine/builder.py": {"builder", "config", "optimization"},
    "engine/layers.py": {"engine", "context", "inspector"},
    "engine/log.py": set(),
    "engine/network.py": {"builder", "definition", "parser", "checker", "error", "source"},
    "engine/refit.py": {"refitter", "parser"},
    "engine/timing_cache.py": {"config", "cache", "made", "others"},
    "engine/context.py": {"context", "_context", "_trt_context"},
    "engine/callbacks.py": set(),
    "engine/loaded.py": {"_engine", "_runtime", "engine", "config", "_config", "_cache", "inspector"},
}
"""By file, the variables and attributes that hold objects of TensorRT."""

RTX_ONLY = {
    "ComputeCapability", "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "WHOLE_GRAPH_CAPTURE",
    "create_runtime_cache", "cuda_graph_strategy", "deserialize", "dynamic_shapes_kernel_specialization_strategy",
    "num_compute_capabilities", "set_compute_capability", "set_runtime_cache",
}  # fmt: skip
"""What is used with the flavour tensorrt-rtx alone."""

_PYTHONS_OWN = {"__members__", "__init__", "name", "append"}


def used_names() -> set[str]:
    """Names of classes, members, methods and keyword arguments of TensorRT that the code uses."""
    names = set()
    for node in ast.walk(_parsed("engine/bindings.py")):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            names.add(node.target.id)
    for file, objects in OBJECTS.items():
        for node in ast.walk(_parsed(file)):
            if isinstance(node, ast.Attribute) and (_is_module(node.value) or _name(node.value) in objects):
                names.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _name(node.func.value) in objects:
                names |= {keyword.arg for keyword in node.keywords if keyword.arg}
            if isinstance(node, ast.ClassDef) and any(_is_module(getattr(base, "value", None)) for base in node.bases):
                names |= {
                    item.name
                    for item in node.body
                    if isinstance(item, ast.FunctionDef) and item.name[0] != "_" and _overrides(item)
                }
    return {name for name in names if name not in _PYTHONS_OWN}


def _parsed(file: str) -> ast.Module:
    return ast.parse((DEPLOY / file).read_text(encoding="utf-8"))


def _name(node: ast.AST | None) -> str | None:
    if isinstance(node, ast.Call):  # self._trt_context()
        node = node.func
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def _is_module(node: ast.AST | None) -> bool:
    """Whether `node` is the module, as `trt` or `self._trt`, or a class of it, as `trt.BuilderFlag`."""
    if _name(node) in ("trt", "_trt"):
        return True
    return isinstance(node, ast.Attribute) and _name(node.value) in ("trt", "_trt")


def _overrides(function: ast.FunctionDef) -> bool:
    """Whether TensorRT calls it: our own methods of such classes are `last` of the logger and `take` of the allocator."""
    return function.name not in ("last", "take")


def known_names() -> dict[str, set[str]]:
    """By name, the versions that have it."""
    lines = [line.split() for line in LIST.read_text(encoding="ascii").splitlines()]
    return {name: set(versions) for name, *versions in lines}


def symbols(wheel: Path) -> bytes:
    """The library in a wheel of the bindings."""
    with zipfile.ZipFile(wheel) as archive:
        (library,) = [name for name in archive.namelist() if name.endswith(".so")]
        return archive.read(library)


def holds(library: bytes, name: str) -> bool:
    """Whether `name` is a string of its own, or the end of a longer one, which linkers let it share (INT8 and UINT8)."""
    return re.search(rb"(?:\0|[A-Za-z0-9_])%s\0" % name.encode(), library) is not None


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        libraries = {}
        for version in VERSIONS:
            wanted = f"tensorrt-cu13-bindings=={version}"
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wanted]
            subprocess.run(command, check=True)
            libraries[version] = symbols(next(Path(folder).glob(f"*-{version}-*")))
    names = sorted(used_names() | {"int8_calibrator", "max_workspace_size", "execute_async_v2"})  # gone, one by one
    with LIST.open("w", encoding="ascii") as file:
        for name in names:
            file.write(" ".join([name, *(version for version in VERSIONS if holds(libraries[version], name))]) + "\n")
    sys.stdout.write(f"{LIST}: {len(names)} names\n")


if __name__ == "__main__":
    main()
