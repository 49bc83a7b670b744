"""Ranges for Nsight Systems: through torch, or the package nvtx."""

import sys
from types import ModuleType

import pytest
import torch

from deploy.engine.cuda.nvtx import annotations
from deploy.errors import BackendError


def test_ranges_of_torch_open_and_close(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", seen.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: seen.append("end"))
    with annotations()("deploy: wait"):
        assert seen == ["deploy: wait"]
    assert seen == ["deploy: wait", "end"]


def test_without_torch_the_package_nvtx_is_used_and_its_lack_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(BackendError, match="the variant nvtx needs torch, imported, or the package nvtx: pip install nvtx"):
        annotations()
    package = ModuleType("nvtx")
    package.annotate = lambda name: f"range {name}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nvtx", package)
    assert annotations()("x") == "range x"  # type: ignore[comparison-overlap]
