"""What TensorRT's runtime is told before an engine is loaded, and what is said where it cannot start."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Target
from deploy.errors import BackendError
from tests.simulator.simulated import Simulated

Make = Callable[..., Artifact]

X = np.arange(8, dtype=np.float32).reshape(2, 4)

TARGET = Target(flavour="tensorrt", version="11.4.0", gpu="Simulated GPU", compute_capability="8.9", targets=["8.9"])


@pytest.mark.parametrize("compatible", [True, False])
def test_an_engine_that_holds_its_own_runtime_may_run_it(simulated: Simulated, make: Make, compatible: bool) -> None:
    """Which it may not otherwise: a runtime refuses host code."""
    target = msgspec.structs.replace(TARGET, version_compatible=compatible)
    with deploy.load(make(target=target, host_code=compatible)) as session:
        np.testing.assert_array_equal(session(X), 2 * X)
    with pytest.raises(BackendError, match="has host code, which the runtime does not allow"):
        deploy.load(make(target=msgspec.structs.replace(target, version_compatible=False), host_code=True))


@pytest.mark.parametrize("stripped", [True, False])
def test_an_engine_without_weights_gets_those_of_its_typed_file(simulated: Simulated, make: Make, stripped: bool) -> None:
    with deploy.load(make(target=msgspec.structs.replace(TARGET, stripped=stripped), stripped=stripped)) as session:
        np.testing.assert_array_equal(session(X), 2 * X)
    assert simulated.trt.totals["refitted"] == stripped


def test_a_runtime_that_cannot_start_is_an_error_with_tensorrts_reason(
    simulated: Simulated, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(log: Any) -> SimpleNamespace:
        log.log(simulated.trt.ILogger.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(simulated.trt, "Runtime", refuse)
    with pytest.raises(BackendError, match=r"^tensorrt 11\.4\.0 cannot start: CUDA initialization failure with error: 35$"):
        deploy.load(make())
