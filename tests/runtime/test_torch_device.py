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


def test_a_gpu_is_known_by_its_number_whatever_thread_it_is_used_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_named(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda:0", "cuda:0", "cuda:1", "cpu"]
