import pytest
import torch

from deploy.runtime.cudnn import CudnnBenchmark


@pytest.mark.parametrize("before", [False, True])
def test_the_search_is_on_until_the_last_has_released_it(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    setting = CudnnBenchmark()
    setting.hold()
    setting.hold()
    setting.release()
    assert torch.backends.cudnn.benchmark
    setting.release()
    assert torch.backends.cudnn.benchmark == before
