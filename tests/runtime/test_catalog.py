"""Backends, their variants, and artifacts that are engines."""

import pytest

from deploy.artifact.artifact import Artifact
from deploy.errors import UsageError
from deploy.runtime.catalog import AUTO, BACKENDS, split_backend
from deploy.runtime.load import open_session


def test_an_unknown_backend_is_named_with_those_there_are(shared_lenet5: Artifact) -> None:
    with pytest.raises(UsageError, match=r"unknown backend 'tensorflow'; expected auto or one of onnxruntime, openvino"):
        open_session(shared_lenet5, "tensorflow")


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("int8", "eager has no variant 'int8'; expected one of fp16, bf16, channels_last, cuda_graph, tf32"),
        ("fp16,bf16", "eager:fp16,bf16: fp16 and bf16 exclude one another"),
        ("", "eager has no variant ''"),
    ],
)
def test_variants_that_cannot_be_meant_are_refused(shared_lenet5: Artifact, variant: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_session(shared_lenet5, f"eager:{variant}")


@pytest.mark.parametrize(
    ("name", "needs_gpu"),
    [
        ("onnxruntime", False),
        ("onnxruntime:cuda,tf32", True),
        ("tensorrt-rtx", True),
        ("tensorrt:cuda_graph", True),
        ("eager:fp16,channels_last", False),
        ("eager:cuda_graph", True),
        ("compile:max-autotune", False),
        ("aoti", False),
        ("aoti:cuda_graph", True),
    ],
)
def test_a_name_is_a_backend_and_its_variants_which_may_need_a_gpu(name: str, needs_gpu: bool) -> None:
    backend, variant = split_backend(name)
    assert name == ":".join(filter(None, (backend.name, ",".join(variant))))
    assert backend.needs_gpu(variant) is needs_gpu


def test_auto_takes_only_what_computes_and_runs_no_code_of_the_users() -> None:
    assert AUTO
    for name in AUTO:
        assert (BACKENDS[name].runs, BACKENDS[name].computes) == ("onnx", True)
