"""What only a GPU can tell of a build: the inspector's description, engines without weights, version-compatible engines."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ENGINE
from deploy.engine.attestation import ATTESTED
from deploy.engine.layers import engine_layers
from deploy.errors import BackendError
from deploy.models.registry import ARCHITECTURES
from deploy.runtime.load import open_session

FLAVOURS = ("tensorrt", "tensorrt-rtx")


def built(source: Artifact, out: Path, flavour: str, **options: Any) -> Artifact:
    """An engine that runs here; else the test is skipped with the reason."""
    try:
        engine = deploy.build_trt(source, out, flavour=flavour, cache=False, **options)
        deploy.load(engine).close()
    except BackendError as error:
        pytest.skip(str(error))
    return engine


def check(engine: Artifact, source: Artifact) -> None:
    x = np.random.default_rng(0).standard_normal((3, 1, 28, 28), dtype=np.float32)
    with deploy.load(engine) as session, deploy.load(source, "onnxruntime", "cpu") as expected:
        np.testing.assert_allclose(session(x), expected(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("precision", [None, "fp16"])
def test_the_inspector_tells_formats_when_it_has_shapes(lenet5: Artifact, tmp_path: Path, flavour: str, precision: Any) -> None:
    engine = built(lenet5, tmp_path / "engine", flavour, precision=precision)
    share = engine.manifest.precision_share
    assert share is not None
    assert share.coverage is not None
    assert (share.origin == "engine") == (share.coverage >= ATTESTED)
    assert share.tf32 == 0
    with open_session(engine, flavour) as session:
        description = session.information()  # type: ignore[attr-defined]
    assert "N/A due to dynamic shapes" not in description
    assert any(layer.precision == (precision or "fp32") for layer in engine_layers(description)), description


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_engine_without_weights_gets_them_and_others(lenet5: Artifact, tmp_path: Path, flavour: str) -> None:
    whole = built(lenet5, tmp_path / "whole", flavour)
    stripped = built(lenet5, tmp_path / "stripped", flavour, strip=True)
    assert stripped.manifest.engine_parity is not None
    check(stripped, lenet5)
    assert (stripped.path / ENGINE).stat().st_size < (whole.path / ENGINE).stat().st_size
    torch.manual_seed(1)
    torch.save(ARCHITECTURES["lenet5"].create().state_dict(), tmp_path / "retrained.pth")
    retrained = deploy.export(tmp_path / "retrained", arch="lenet5", weights=tmp_path / "retrained.pth")
    made = deploy.build_trt(retrained, tmp_path / "made", refit_from=stripped.path)
    assert made.manifest.engine_parity is not None
    check(made, retrained)


def test_a_version_compatible_engine_is_loaded(lenet5: Artifact, tmp_path: Path) -> None:
    check(built(lenet5, tmp_path / "engine", "tensorrt", version_compatible=True), lenet5)
