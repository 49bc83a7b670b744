"""Which library CUDA is reached through, and what is said where there is none. The libraries are real; the GPU is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deploy
from deploy.artifact.artifact import Artifact
from deploy.engine import cuda
from deploy.engine.cuda import DeviceMemoryError
from deploy.errors import BackendError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


EMBEDDED = """
import sys
for name in ("torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime"):
    sys.modules[name] = None  # as if they were not installed
import deploy
import deploy.runtime.backends.tensorrt
deploy.runtime.backends.tensorrt.has_gpu = lambda: True  # a driver that is there and cannot be used
try:
    deploy.load(sys.argv[1])
except deploy.DeployError as error:
    print(type(error).__name__, error)
"""


@no_gpu
def test_each_library_says_what_is_missing() -> None:
    with pytest.raises(BackendError) as caught:
        cuda.open_device()
    message = str(caught.value)
    assert message.startswith("no library can use GPU 0 here: cuda-python: CUDA failed: CUDA driver version is insufficient")
    assert "pycuda: No module named 'pycuda'" in message or "pycuda: CUDA cannot start" in message


@no_gpu
def test_an_engine_is_opened_without_torch_or_onnx_up_to_the_missing_gpu(lenet5: Artifact, tmp_path: Path) -> None:
    engine = deploy.build_trt(lenet5, tmp_path / "engine", flavour="tensorrt-rtx")
    command = [sys.executable, "-c", EMBEDDED, str(engine.location)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BackendError no library can use GPU 0 here: cuda-python: CUDA failed")


def test_memory_errors_tell_needed_free_and_total_in_one_line() -> None:
    error = DeviceMemoryError(3 << 30, 100 << 20, 80 << 30)
    assert str(error) == "out of GPU memory: 3,072 MiB needed, 100 MiB of 81,920 MiB free"
