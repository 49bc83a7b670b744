"""Weights that are put into an engine when it is loaded. A fake stands for the refitter: it needs an engine, and so a GPU."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tensorrt_rtx

from deploy.engine.refit import refit
from deploy.errors import BackendError


class Refitting:
    """As the modules `tensorrt` and `tensorrt_rtx`, whose calls are noted."""

    def __init__(self, *, refittable: bool = True, reads: bool = True, missing: tuple[str, ...] = (), takes: bool = True) -> None:
        self.refittable, self.reads, self.missing, self.takes = refittable, reads, missing, takes
        self.calls: list[str] = []

    def Refitter(self, engine: Any, logger: Any) -> Any:
        if not self.refittable:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(get_missing_weights=lambda: list(self.missing), refit_cuda_engine=self.refit_cuda_engine)

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        error = SimpleNamespace(desc=lambda: "conv.weight has another count")
        return SimpleNamespace(refit_from_file=self.refit_from_file, num_errors=1, get_error=lambda index: error)

    def refit_from_file(self, model: str) -> bool:
        self.calls.append(f"read {Path(model).name}")
        return self.reads

    def refit_cuda_engine(self) -> bool:
        self.calls.append("refit")
        return self.takes


LOG = SimpleNamespace(last=lambda: "the log says why")


def test_the_weights_of_the_file_are_read_and_put_in() -> None:
    fake: Any = Refitting()
    refit(fake, fake, Path("build/model.onnx"), LOG, "the engine")
    assert fake.calls == ["read model.onnx", "refit"]


@pytest.mark.parametrize(
    ("fake", "message"),
    [
        (Refitting(refittable=False), "the engine takes no weights: the log says why"),
        (Refitting(reads=False), "the engine does not take the weights of model.onnx: conv.weight has another count"),
        (Refitting(missing=("conv.weight", "fc.bias")), "model.onnx lacks weights that the engine needs: conv.weight, fc.bias"),
        (Refitting(takes=False), "the engine does not take the weights of model.onnx: the log says why"),
    ],
)
def test_weights_that_do_not_fit_are_an_error(fake: Any, message: str) -> None:
    with pytest.raises(BackendError, match=f"^{message}$"):
        refit(fake, fake, Path("build/model.onnx"), LOG, "the engine")
    assert "refit" not in fake.calls or not fake.takes


def test_what_is_called_is_there() -> None:
    for kind, names in ((tensorrt_rtx.Refitter, ("get_missing_weights", "refit_cuda_engine")),
                        (tensorrt_rtx.OnnxParserRefitter, ("refit_from_file", "num_errors", "get_error"))):  # fmt: skip
        assert all(hasattr(kind, name) for name in names)
    assert "engine: tensorrt_rtx_bindings.tensorrt_rtx.ICudaEngine, logger" in str(inspect.getdoc(tensorrt_rtx.Refitter.__init__))
