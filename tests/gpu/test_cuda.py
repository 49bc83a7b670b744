"""Eager sessions and engine builds on a GPU."""

from pathlib import Path

import numpy as np
import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.engine.flavour import load_flavour
from deploy.errors import BackendError


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_cuda_tensors_stay_on_the_gpu_and_agree_with_the_cpu(lenet5: Artifact, backend: str) -> None:
    x = torch.randn(5, 1, 28, 28)
    with deploy.load(lenet5, backend="onnxruntime", device="cpu") as cpu, deploy.load(lenet5, backend, "cuda") as gpu:
        result = gpu(x.cuda())
        assert result.device.type == "cuda"
        np.testing.assert_allclose(result.cpu().numpy(), cpu(x.numpy()), rtol=1e-3, atol=1e-4)
        assert isinstance(gpu(x.numpy()), np.ndarray)


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_tensorrt_builds_an_engine_for_this_gpu(lenet5: Artifact, tmp_path: Path, precision: str | None) -> None:
    try:
        load_flavour("tensorrt")
    except BackendError as error:
        pytest.skip(str(error))
    engine = deploy.build_trt(lenet5, tmp_path / "engine", precision=precision, flavour="tensorrt")  # type: ignore[arg-type]
    target = engine.manifest.target
    assert target is not None
    assert target.gpu == torch.cuda.get_device_name()
    assert engine.manifest.precision_share is not None
    assert getattr(engine.manifest.precision_share, precision or "fp32") == 1
