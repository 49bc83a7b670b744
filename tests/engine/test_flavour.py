"""Which flavour of TensorRT is loaded, and what is said of one that is not there."""

import os

import pytest

from deploy.engine.flavour import load_flavour
from deploy.errors import BackendError, UsageError


def test_flavours_that_are_unknown_or_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown flavour 'tensorrt-lite'"):
        load_flavour("tensorrt-lite")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"tensorrt-rtx is not installed: pip install 'deploy\[cpu\]'"):
        load_flavour("tensorrt-rtx")


def test_auto_is_tensorrt_rtx_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.engine.cuda.driver.has_gpu", lambda: False)
    assert load_flavour("auto").name == "tensorrt-rtx"


def test_stubs_alone_do_not_pass_for_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", type(os)("tensorrt"))
    monkeypatch.setattr("deploy.engine.cuda.driver.has_gpu", lambda: True)
    with pytest.raises(BackendError, match=r"tensorrt is not installed: .*without the library, as of stubs"):
        load_flavour("tensorrt")
    assert load_flavour("auto").name == "tensorrt-rtx"
