import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from deploy.host.extras import EXTRAS
from deploy.runtime import doctor


def backends() -> dict[str, dict[str, object]]:
    return {entry["name"]: entry for entry in doctor.examine()["backends"]}


@pytest.fixture
def gpu_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if onnxruntime-gpu were installed."""
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)


@pytest.mark.usefixtures("gpu_wheel")
def test_what_is_installed_still_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "list_gpus", lambda: ([], "no driver"))
    monkeypatch.setattr(doctor, "has_gpu", lambda: False)
    for name in ("onnxruntime:cuda", "onnxruntime:tensorrt", "tensorrt-rtx"):
        assert backends()[name] == {"name": name, "available": False, "reason": "runs on an NVIDIA GPU: no driver"}
    assert backends()["onnxruntime"]["available"]


@pytest.mark.usefixtures("gpu_wheel")
def test_with_a_gpu_the_providers_of_the_wheel_are_available(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = {"name": "a GPU", "compute_capability": "9.0", "memory_mib": 1, "driver": "580"}
    monkeypatch.setattr(doctor, "list_gpus", lambda: ([gpu], None))
    for name in ("onnxruntime:cuda", "onnxruntime:tensorrt"):
        assert backends()[name] == {"name": name, "available": True, "version": onnxruntime.__version__}


@pytest.mark.usefixtures("gpu_wheel")
def test_a_provider_that_was_linked_with_another_tensorrt_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "provider.so").write_bytes(b"\0libnvinfer.so.10\0")
    monkeypatch.setattr("deploy.runtime.backends.onnxruntime._TENSORRT_PROVIDER", tmp_path / "provider.so")
    found = backends()
    reason = str(found["onnxruntime:tensorrt"]["reason"])
    assert reason.startswith("onnxruntime:tensorrt needs libnvinfer.so.10, of TensorRT 10, and ")
    assert "libnvinfer" not in str(found["onnxruntime:cuda"])


@pytest.mark.parametrize(("capabilities", "refused"), [(["9.0"], True), (["8.9"], False), (["9.0", "12.0"], False)])
def test_a_gpu_that_tensorrt_rtx_does_not_run_on_is_named(
    capabilities: list[str], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [{"name": "NVIDIA X", "compute_capability": each, "memory_mib": 1, "driver": "580"} for each in capabilities]
    monkeypatch.setattr(doctor, "list_gpus", lambda: (gpus, None))
    report = doctor.examine()
    (backend,) = [entry for entry in report["backends"] if entry["name"] == "tensorrt-rtx"]
    (flavour,) = [entry for entry in report["flavours"] if entry["name"] == "tensorrt-rtx"]
    assert flavour["available"]  # it builds there, for other GPUs
    refusal = "TensorRT-RTX does not run on NVIDIA X (compute capability 9.0)"
    assert (refusal in backend.get("reason", "")) == (refusal in flavour.get("note", "")) == refused
    assert backend["available"] != refused


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="needs the wheel for the CPU")
def test_a_provider_that_is_not_in_the_wheel_is_named_even_where_there_is_no_gpu() -> None:
    entry = backends()["onnxruntime:cuda"]
    assert not entry["available"]
    assert "needs CUDAExecutionProvider" in str(entry["reason"])
    assert "deploy[gpu]" in str(entry["reason"])


BLOCKED = """
import sys
for name in {names}:
    sys.modules[name] = None
sys.argv = ["deploy", "doctor", *{options}]
from deploy.cli import main
main()
"""


def doctor_without(names: list[str], *options: str) -> str:
    """What `deploy doctor` prints where these modules cannot be imported."""
    code = BLOCKED.format(names=names, options=options)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_it_needs_no_library_of_any_extra() -> None:
    every = sorted({module for modules in EXTRAS.values() for module in modules} - {"google"})  # which others share
    report = json.loads(doctor_without(every, "--json"))
    assert [extra["name"] for extra in report["extras"]] == list(EXTRAS)
    assert not any(extra["available"] for extra in report["extras"])
    assert not any(
        library["version"] for extra in report["extras"] for library in extra["libraries"] if library["name"] != "protobuf"
    )
    assert [entry["name"] for entry in report["backends"] if entry["available"]] == ["null"]
    reasons = {entry["name"]: entry["reason"] for entry in report["backends"] if not entry["available"]}
    assert all("pip install 'deploy[" in reason for reason in reasons.values()), reasons
    assert "deploy[export]" in reasons["eager"]
    assert "deploy[export]" in reasons["compile"]
    assert report["torch"]["version"] is None
    text = doctor_without(every)
    for extra in EXTRAS:
        (line,) = [line for line in text.splitlines() if line.startswith(f"extra     {extra} ")]
        assert f"pip install 'deploy[{extra}]'" in line
    assert "torch     missing: " in text


@pytest.mark.parametrize("blocked", [["torch"], ["grpc", "ray"]])
def test_what_is_there_is_listed_beside_what_is_missing(blocked: list[str]) -> None:
    report = json.loads(doctor_without(blocked, "--json"))
    for extra in report["extras"]:
        modules = EXTRAS[extra["name"]]
        for (module, name), library in zip(modules.items(), extra["libraries"], strict=True):
            assert library["name"] == name
            if module in blocked:
                assert library["version"] is None
        assert extra["available"] == all(library["version"] for library in extra["libraries"])
        assert extra["install"] == f"pip install 'deploy[{extra['name']}]'"
    assert any(entry["available"] for entry in report["backends"] if entry["name"] == "onnxruntime")


def test_what_packages_are_built_with_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    report = doctor.examine()
    assert report["compiler"] is None
    assert "`deploy build-aoti` needs a C++ compiler, and there is none: install g++" in report["compiler_missing"]
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setattr(doctor, "is_static", lambda compiler: True)
    report = doctor.examine()
    assert report["compiler"] == shutil.which("g++")
    assert report["compiler_missing"].startswith("`deploy build-aoti` cannot use it: it puts a copy of the C++ library into")
