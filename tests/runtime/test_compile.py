import importlib
import logging

import numpy as np
import pytest
import torch

from deploy.artifact import Artifact
from deploy.errors import BackendError
from deploy.runtime.session import open_session


def test_a_model_that_cannot_be_compiled_whole_is_an_error_and_not_eager_in_silence(shared_lenet5: Artifact) -> None:
    with open_session(shared_lenet5, "compile") as session:

        def breaks(x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x + 1

        session._module = torch.compile(breaks, fullgraph=True)
        with pytest.raises(BackendError, match="compile failed to run 'lenet5'"):
            session(np.zeros((1, 1, 28, 28), np.float32))


def test_several_inputs_and_nested_outputs(pair: Artifact) -> None:
    with open_session(pair, "eager") as reference, open_session(pair, "compile") as session:
        for batch in (1, 4, 6):
            feed = {
                "x": np.random.default_rng(batch).standard_normal((batch, 4), dtype=np.float32),
                "index": np.arange(batch, dtype=np.int64),
            }
            expected = reference.run(feed)
            for name, result in session.run(feed).items():
                np.testing.assert_allclose(result, expected[name], rtol=1e-5, atol=1e-6)


def test_a_cuda_toolkit_without_a_gpu_is_not_complained_of() -> None:
    importlib.import_module("deploy.runtime.compile")
    logger = logging.getLogger("torch.utils.cpp_extension")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == ["something else"]
