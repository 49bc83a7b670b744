import pytest
import torch

from deploy.errors import BackendError
from deploy.runtime.torch_device import device_named


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_auto_is_the_cpu_where_there_is_no_gpu_and_a_named_gpu_is_an_error() -> None:
    assert (device_named("auto"), device_named("cpu")) == ("cpu", "cpu")
    for device in ("cuda", "cuda:3"):
        with pytest.raises(BackendError, match=rf"no {device} here: torch .* sees 0 usable CUDA devices"):
            device_named(device)
