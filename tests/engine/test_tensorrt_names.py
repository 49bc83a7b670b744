"""Every name that is used of TensorRT is in 10.16 and 11.4, as the symbols of their bindings tell, and in tensorrt-rtx."""

import importlib.util
import types
from pathlib import Path

import pytest
import tensorrt_rtx


@pytest.fixture(scope="module")
def names() -> types.ModuleType:
    path = Path(__file__).with_name("tensorrt_names.py")
    spec = importlib.util.spec_from_file_location("tensorrt_names", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_names_that_the_code_uses_are_found(names: types.ModuleType) -> None:
    used = names.used_names()
    assert len(used) > 90
    some = {"Builder", "STRONGLY_TYPED", "execute_async_v3", "set_tensor_address", "ignore_mismatch", "phase_start", "TF32"}
    assert (
        some | {"combine", "set_output_allocator", "report_layer_time", "supports_model_v2", "create_execution_context"} <= used
    )


def test_each_name_is_in_every_version(names: types.ModuleType) -> None:
    known = names.known_names()
    used = names.used_names()
    assert not used - known.keys(), "run tests/engine/tensorrt_names.py"
    missing = {name: set(names.VERSIONS) - known[name] for name in used - names.RTX_ONLY}
    assert not {name: versions for name, versions in missing.items() if versions}


def test_the_list_tells_versions_apart(names: types.ModuleType) -> None:
    known = names.known_names()
    assert known["int8_calibrator"] == {"10.16.0.72"}
    assert known["max_workspace_size"] == known["execute_async_v2"] == set()
    assert not names.RTX_ONLY - {"deserialize"} & {name for name, versions in known.items() if versions}


def test_each_name_is_in_tensorrt_rtx(names: types.ModuleType) -> None:
    library = next(Path(tensorrt_rtx.__file__).parents[1].glob("tensorrt_rtx_bindings/*.so")).read_bytes()
    assert not {name for name in names.used_names() if not names.holds(library, name)}
