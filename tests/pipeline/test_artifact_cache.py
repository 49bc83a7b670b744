"""Engines and INT8 artifacts that are kept between runs."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import deploy
from deploy.artifact import onnxfile
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE
from deploy.engine import builder
from deploy.pipeline import artifact_cache


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "deploy" / "engines"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was built in truth, by the name that errors would have."""
    calls: list[str] = []
    build: Callable[..., Any] = builder.build_engine

    def counting(*args: Any, shown: str | None = None, **options: Any) -> Any:
        calls.append(shown or "")
        return build(*args, shown=shown, **options)

    monkeypatch.setattr("deploy.pipeline.build_trt.build_engine", counting)
    return calls


def test_the_second_build_is_a_copy(lenet5: Artifact, tmp_path: Path, built: list[str], cache: Path) -> None:
    first = deploy.build_trt(lenet5, tmp_path / "first", precision="fp16")
    second = deploy.build_trt(lenet5, tmp_path / "elsewhere" / "second", precision="fp16")
    assert len(built) == 1
    assert len(list(cache.iterdir())) == 1
    second.verify()
    assert second.manifest.name == "second"
    assert second.root() == lenet5
    assert (second.path / ENGINE).read_bytes() == (first.path / ENGINE).read_bytes()
    for field in ("precision", "parity", "precision_share", "target", "profiles", "exclusions", "tools", "files", "stage"):
        assert getattr(second.manifest, field) == getattr(first.manifest, field)
    assert deploy.build_trt(lenet5, tmp_path / "first", precision="fp16") == first  # stands, and is not copied over


def test_what_would_be_another_engine_is_built(lenet5: Artifact, tmp_path: Path, built: list[str]) -> None:
    different: list[dict[str, Any]] = [
        {},
        {"precision": "fp16"},
        {"tf32": True},
        {"opt_level": 1},
        {"workspace": 64},
        {"targets": ["8.9"]},
        {"shapes": ["input=1x1x28x28:4x1x28x28:8x1x28x28"]},
    ]
    for options in different:
        deploy.build_trt(lenet5, tmp_path / "engine", **options)
    assert len(built) == len(different)
    for options in different:
        deploy.build_trt(lenet5, tmp_path / "engine", **options)
    assert len(built) == len(different)
    deploy.build_trt(lenet5, tmp_path / "anew", cache=False)
    assert len(built) == len(different) + 1


def test_the_same_file_elsewhere_is_the_same_engine_with_its_own_lineage(
    lenet5: Artifact, tiny_onnx: Path, tmp_path: Path, built: list[str]
) -> None:
    first = deploy.build_trt(tiny_onnx, tmp_path / "first", precision="fp16")
    copy = tmp_path / "renamed.onnx"
    copy.write_bytes(tiny_onnx.read_bytes())
    second = deploy.build_trt(copy, tmp_path / "second", precision="fp16")
    assert len(built) == 1
    source = deploy.open_artifact(copy)
    assert second.manifest.parent is not None
    assert second.manifest.parent.digest == source.manifest.digest
    assert second.manifest.parity is not None
    assert first.manifest.parity is not None
    assert second.manifest.parity.against == source.manifest.digest
    assert second.manifest.parity.cases == first.manifest.parity.cases
    model = onnx.load(tiny_onnx)
    model.graph.initializer[0].float_data[:] = [0.5] * 12
    onnx.save(model, copy)
    deploy.build_trt(copy, tmp_path / "third", precision="fp16")
    assert len(built) == 2


def test_a_kept_engine_that_is_damaged_is_built_again(
    lenet5: Artifact, tmp_path: Path, built: list[str], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deploy.build_trt(lenet5, tmp_path / "first")
    (kept,) = cache.iterdir()
    (kept / ENGINE).write_bytes(b"cut short")
    with caplog.at_level(logging.WARNING, "deploy"):
        second = deploy.build_trt(lenet5, tmp_path / "second")
    second.verify()
    assert len(built) == 2
    assert "a kept engine is damaged, and is made again" in caplog.text
    Artifact.open(kept).verify()


@pytest.mark.parametrize("left", [0, 1])
def test_an_engine_that_another_process_removes_meanwhile_is_built(
    lenet5: Artifact, tmp_path: Path, built: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """`left`: files that were copied before the rest was gone."""
    deploy.build_trt(lenet5, tmp_path / "first")
    real = artifact_cache._duplicate
    copied: list[Path] = []

    def trimmed(source: Path, target: Path) -> None:
        if len(copied) == left:
            shutil.rmtree(source.parent, ignore_errors=True)
        copied.append(source)
        real(source, target)

    monkeypatch.setattr(artifact_cache, "_duplicate", trimmed)
    second = deploy.build_trt(lenet5, tmp_path / "second")
    second.verify()
    assert len(built) == 2


def test_a_cache_that_cannot_be_written_is_a_warning(
    lenet5: Artifact, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("no folder")
    with caplog.at_level(logging.WARNING, "deploy"):
        deploy.build_trt(lenet5, tmp_path / "engine").verify()
    assert "the engine cannot be kept" in caplog.text


def test_an_int8_artifact_is_copied_for_the_same_file_and_feeds_alone(
    lenet5: Artifact, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    for name in ("feeds", "others"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "0.npz", input=rng.standard_normal((2, 1, 28, 28), dtype=np.float32))
    first = deploy.quantize(lenet5, tmp_path / "first", calib=tmp_path / "feeds")
    with caplog.at_level(logging.INFO, "deploy"):
        second = deploy.quantize(lenet5, tmp_path / "second", calib=tmp_path / "feeds")
        other = deploy.quantize(lenet5, tmp_path / "other", calib=tmp_path / "others")
    assert caplog.text.count("the same quantized artifact was made before") == 1
    assert second.manifest.files == first.manifest.files != other.manifest.files
    assert (second.manifest.name, second.root()) == ("second", lenet5)
    assert second.manifest.calibration == first.manifest.calibration
    assert second.manifest.parity == first.manifest.parity


def test_a_copy_of_an_artifact_with_weights_beside_its_graph_can_be_used(
    lenet5: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnx refuses such a file with a second name: a hard link."""
    monkeypatch.setattr(onnxfile, "EXTERNAL_DATA_BYTES", 1000)
    (tmp_path / "feeds").mkdir()
    feed = np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32)
    np.savez(tmp_path / "feeds" / "0.npz", input=feed)
    made = [deploy.quantize(lenet5, tmp_path / name, calib=tmp_path / "feeds") for name in ("first", "second")]
    for artifact in made:
        assert "model.onnx.data" in artifact.manifest.files
        deploy.build_trt(artifact, tmp_path / "engine").verify()
        with deploy.load(artifact.path) as session:
            assert session.run({"input": feed})["logits"].shape == (2, 10)
