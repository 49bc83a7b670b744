"""What TensorRT's runtime is told before an engine is loaded, and what is said where it cannot start."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Target
from deploy.errors import BackendError

Make = Callable[..., Artifact]

TARGET = Target(flavour="tensorrt", version="11.4.0", gpu="Fake GPU", compute_capability="8.9", targets=["8.9"])


@pytest.mark.parametrize("compatible", [True, False])
def test_an_engine_that_holds_its_own_runtime_may_run_it(
    trt: Any, make: Make, compatible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trt.Runtime
    runtimes: list[Any] = []

    class Runtime:
        """As the real one, which loads a version-compatible engine only if it may run the code in it."""

        engine_host_code_allowed = False

        def __init__(self, log: Any) -> None:
            self._log = log
            self._load = made(log).deserialize_cuda_engine
            runtimes.append(self)

        def deserialize_cuda_engine(self, plan: bytes) -> Any:
            if compatible and not self.engine_host_code_allowed:
                self._log.log(1, "Using an engine plan file with host code is not allowed")
                return None
            return self._load(plan)

    monkeypatch.setattr(trt, "Runtime", Runtime)
    deploy.load(make(target=msgspec.structs.replace(TARGET, version_compatible=compatible))).close()
    assert [runtime.engine_host_code_allowed for runtime in runtimes] == [compatible]


@pytest.mark.parametrize("stripped", [True, False])
def test_an_engine_without_weights_gets_those_of_its_typed_file(
    trt: Any, gpu: Any, make: Make, stripped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def refit_from_file(model: str) -> bool:
        gpu.check_active()
        assert not trt.engines[-1].contexts  # a context made before would compute with what was there
        read.append(model)
        return True

    refitter = SimpleNamespace(get_missing_weights=list, refit_cuda_engine=lambda: True)
    monkeypatch.setattr(trt, "Refitter", lambda engine, log: refitter, raising=False)
    parser = SimpleNamespace(refit_from_file=refit_from_file)
    monkeypatch.setattr(trt, "OnnxParserRefitter", lambda refitter, log: parser, raising=False)
    engine = make(target=msgspec.structs.replace(TARGET, stripped=stripped))
    deploy.load(engine).close()
    assert read == [str(engine.onnx_path)] * stripped


def test_a_runtime_that_cannot_start_is_an_error_with_tensorrts_reason(
    trt: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(log: Any) -> SimpleNamespace:
        log.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(trt, "Runtime", refuse)
    with pytest.raises(BackendError, match=r"^tensorrt 11\.4\.0 cannot start: CUDA initialization failure with error: 35$"):
        deploy.load(make())
