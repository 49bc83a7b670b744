import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from deploy.engine.cuda.capturing import capturing
from deploy.runtime.cudnn import CudnnBenchmark, FirstRuns


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


def waits(runs: FirstRuns, inputs: list[torch.Tensor], *, fails: bool = False) -> bool:
    """Whether a run in this thread waits for a capture that another thread has under way."""
    begun, over = threading.Event(), threading.Event()

    def capture() -> None:
        with capturing:
            begun.set()
            over.wait(0.2)

    with ThreadPoolExecutor(1) as pool:
        captured = pool.submit(capture)
        begun.wait()
        try:
            with runs(inputs):
                after = captured.done()
                if fails:
                    raise ValueError("the run")
        finally:
            over.set()
    return after


def test_the_first_run_of_a_layout_in_each_thread_is_kept_apart_from_captures() -> None:
    runs = FirstRuns()
    x = torch.zeros(2, 3, 4, 4)
    assert waits(runs, [x])
    assert not waits(runs, [torch.ones(2, 3, 4, 4)])
    for other in (torch.zeros(1, 3, 4, 4), x.to(memory_format=torch.channels_last)):
        assert waits(runs, [other])
        assert not waits(runs, [other])
    assert waits(runs, [x, x])
    with ThreadPoolExecutor(1) as elsewhere:  # cuDNN's plans belong to a thread
        assert [elsewhere.submit(waits, runs, [x]).result() for _ in range(2)] == [True, False]
    assert waits(FirstRuns(), [x])


def test_after_a_run_that_failed_the_next_one_is_the_first() -> None:
    runs = FirstRuns()
    x = torch.zeros(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="the run"):
            waits(runs, [x], fails=True)
    assert waits(runs, [x])
    assert not waits(runs, [x])


def test_layouts_without_end_take_no_memory_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.runtime.cudnn._LAYOUTS", 4)
    runs = FirstRuns()
    for size in range(20):
        with runs([torch.zeros(size)]):
            pass
    assert len(runs._layouts) <= 4
