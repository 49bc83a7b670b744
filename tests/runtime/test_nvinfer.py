"""Which TensorRT the provider of ONNX Runtime takes. The libraries are empty ones, made here, that the real linker loads."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.runtime import nvinfer
from deploy.runtime.nvinfer import nvinfer_missing


@pytest.fixture
def provider(tmp_path: Path) -> Path:
    """A library that was linked with libnvinfer.so.10, as `readelf -d` of the real one shows."""
    for name, source in (("libnvinfer.so.10", None), ("provider.so", "libnvinfer.so.10")):
        linked = [f"-Wl,--no-as-needed,{tmp_path / source}"] if source else []
        command = ["gcc", "-shared", f"-Wl,-soname,{name}", "-o", tmp_path / name, "-x", "c", "/dev/null", "-x", "none", *linked]
        subprocess.run(command, check=True)
    return tmp_path / "provider.so"


@pytest.mark.parametrize(
    ("installed", "beside"), [("11.4.0", "TensorRT 11.4.0 is installed"), (None, "no TensorRT is installed")]
)
def test_the_version_that_is_missing_is_named_with_what_is_there(
    provider: Path, installed: str | None, beside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvinfer, "version_of", lambda name: installed)
    assert nvinfer_missing(provider) == (f"needs libnvinfer.so.10, of TensorRT 10, and {beside}: pip install 'tensorrt>=10,<11'")


def test_a_library_that_is_loaded_is_not_missing(provider: Path) -> None:
    """As by `import tensorrt`, which loads it from where the linker does not look."""
    code = (
        "import ctypes, sys; from pathlib import Path; from deploy.runtime.nvinfer import nvinfer_missing\n"
        "ctypes.CDLL(sys.argv[1] + '/libnvinfer.so.10'); print(nvinfer_missing(Path(sys.argv[1], 'provider.so')))"
    )
    done = subprocess.run([sys.executable, "-c", code, provider.parent], capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"


def test_where_no_library_is_named_none_is_missing(tmp_path: Path) -> None:
    assert nvinfer_missing(tmp_path / "absent.so") is None
    (tmp_path / "other.so").write_bytes(b"libcudart.so.13\0libnvinfer_plugin.so.10\0")
    assert nvinfer_missing(tmp_path / "other.so") is None
