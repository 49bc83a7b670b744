import functools
import importlib
import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError, UsageError
from deploy.runtime.load import open_session
from deploy.runtime.session import SessionOptions


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


def test_every_shape_is_compiled_for_itself_however_many_there_are(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[list[object]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append([dim for x in inputs for dim in x.shape])
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    batches = range(2, 13)  # more than torch compiles for one function
    with open_session(shared_lenet5, "compile", SessionOptions(device="cpu")) as session:
        for batch in (*batches, *batches):
            assert session(np.zeros((batch, 1, 28, 28), np.float32)).shape == (batch, 10)
    assert len(compiled) == len(batches)
    assert {type(dim) for shape in compiled for dim in shape} == {int}


def test_a_cuda_toolkit_without_a_gpu_is_not_complained_of() -> None:
    importlib.import_module("deploy.runtime.backends.compile")
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


def test_a_mode_and_half_precision_compile_and_run(shared_lenet5: Artifact) -> None:
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32)
    options = SessionOptions(device="cpu")
    with open_session(shared_lenet5, "eager", options) as reference:
        expected = reference(x)
    with open_session(shared_lenet5, "compile:reduce-overhead,bf16", options) as session:
        result = session(x)
    assert result.dtype == np.float32
    assert 0 < np.abs(result - expected).max() < 1e-2


def test_modes_exclude_one_another(shared_lenet5: Artifact) -> None:
    with pytest.raises(UsageError, match="reduce-overhead and max-autotune exclude one another"):
        open_session(shared_lenet5, "compile:reduce-overhead,max-autotune")
    with pytest.raises(UsageError, match="compile has no variant 'cuda_graph'"):
        open_session(shared_lenet5, "compile:cuda_graph")


@pytest.mark.parametrize(
    ("mode", "cloned"), [("reduce-overhead", True), ("max-autotune", True), ("max-autotune-no-cudagraphs", False)]
)
def test_outputs_that_the_next_run_writes_over_are_copied(shared_lenet5: Artifact, mode: str, cloned: bool) -> None:
    buffer = torch.zeros(1, 10)
    with open_session(shared_lenet5, f"compile:{mode}", SessionOptions(device="cpu")) as session:
        session._module = lambda x: buffer.add_(1)  # as a replayed graph does
        first = session(torch.zeros(1, 1, 28, 28))
        session(torch.zeros(1, 1, 28, 28))
    assert first[0, 0] == (1 if cloned else 2)


@pytest.fixture
def threads_put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_sessions_on_one_class_do_not_use_up_the_compilations_of_one_another(
    shared_lenet5: Artifact, threads_put_back: None
) -> None:
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32)
    with torch._dynamo.config.patch(recompile_limit=2), open_session(shared_lenet5, "eager") as eager:
        for threads in (1, 2, 3, 4):  # which compiled code depends on
            with open_session(shared_lenet5, "compile", SessionOptions(threads=threads)) as session:
                np.testing.assert_allclose(session(x), eager(x), rtol=1e-3, atol=1e-5)
