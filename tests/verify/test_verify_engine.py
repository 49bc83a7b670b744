"""`deploy verify` on an engine: its typed file layer by layer, and what it computes itself on a (simulated) GPU."""

from pathlib import Path

import pytest

from deploy.verify.text import text
from deploy.verify.verify import verify
from tests.simulator.artifacts import make_engine, model
from tests.simulator.plans import make_plan
from tests.simulator.simulated import Simulated

PROFILE = {"x": ((1, 4), (4, 4), (8, 4))}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The file that engines are made from, `y = 2 x`."""
    (tmp_path / "a.onnx").write_bytes(model())
    return tmp_path / "a.onnx"


def test_an_engine_is_compared_by_its_file_and_by_what_it_computes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated = Simulated(monkeypatch, library="cuda-python")
    found = verify(source, make_engine(tmp_path / "right"))
    assert isinstance(found.engine, dict)
    assert (list(found.engine), found.engine["y"].error, found.beyond) == (["y"], 0.0, [])
    wrong = make_plan(model().replace(b"\x00\x00\x00\x40", b"\x00\x00\x20\x40"), [PROFILE])  # y = 2.5 x
    found = verify(source, make_engine(tmp_path / "wrong", plan=wrong))
    assert (found.culprits, found.beyond) == ([], ["y"])
    assert isinstance(found.engine, dict)
    assert found.engine["y"].error == pytest.approx(0.25)
    assert found.outputs["y"].error == 0.0
    assert "engine     y: error 0.25" in text(found)
    assert found.to_json()["engine"]["y"]["error"] == pytest.approx(0.25)
    simulated.finish()


def test_where_an_engine_cannot_run_only_its_file_is_compared_and_that_is_said(source: Path, tmp_path: Path) -> None:
    found = verify(source, make_engine(tmp_path / "engine"))
    assert found.beyond == []
    assert isinstance(found.engine, str)
    assert "engine     not run, only its typed file: " in text(found)
