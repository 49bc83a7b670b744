"""Everything in this folder needs an NVIDIA GPU, and is skipped with the reason elsewhere."""

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
THREADS_COUNT = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
"""An exception in a thread fails its test, whatever `-W` says."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="no NVIDIA GPU that CUDA can use")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(THREADS_COUNT)
            if not torch.cuda.is_available():
                item.add_marker(skip)
