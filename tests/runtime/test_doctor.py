import onnxruntime
import pytest

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


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="needs the wheel for the CPU")
def test_a_provider_that_is_not_in_the_wheel_is_named_even_where_there_is_no_gpu() -> None:
    entry = backends()["onnxruntime:cuda"]
    assert not entry["available"]
    assert "needs CUDAExecutionProvider" in str(entry["reason"])
    assert "deploy[gpu]" in str(entry["reason"])
