"""Backends, their variants, and artifacts that are engines."""

from contextlib import nullcontext
from dataclasses import replace

import msgspec
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import CPU_ONNX, Accuracy
from deploy.errors import BackendError, UsageError
from deploy.evidence.parity import BackendParity
from deploy.runtime.catalog import AUTO, BACKENDS, auto_order, onnx_file, recorded_accuracy, refuse_wrong, size_run, split_backend
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


def int8(artifact: Artifact, *, form: bool) -> Artifact:
    """The artifact as if it were INT8, with a CPU form or without."""
    record = artifact.manifest.files["model.onnx"]
    files = artifact.manifest.files | ({CPU_ONNX: msgspec.structs.replace(record, bytes=record.bytes + 77)} if form else {})
    return Artifact(artifact.path, msgspec.structs.replace(artifact.manifest, precision="int8", files=files))


@pytest.mark.parametrize(
    ("form", "vnni", "order"),
    [
        (True, True, ("onnxruntime", "openvino")),
        (True, False, ("openvino", "onnxruntime")),
        (False, True, ("openvino", "onnxruntime")),
    ],
)
def test_auto_takes_the_backend_that_is_fast_on_int8(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch, form: bool, vnni: bool, order: tuple[str, ...]
) -> None:
    monkeypatch.setattr("deploy.runtime.catalog.has_vnni", lambda: vnni)
    assert auto_order(int8(shared_lenet5, form=form)) == order
    assert auto_order(shared_lenet5) == AUTO == ("onnxruntime", "openvino")


@pytest.mark.parametrize(
    ("backend", "variant", "vnni", "runs_form"),
    [
        ("onnxruntime", (), True, True),
        ("onnxruntime", (), False, False),
        ("onnxruntime", ("cuda",), True, False),
        ("onnxruntime", ("tensorrt",), True, False),
        ("openvino", (), True, False),
        ("null", (), True, False),
    ],
)
def test_the_cpu_form_is_for_onnxruntime_on_a_cpu_with_vnni(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch, backend: str, variant: tuple[str, ...], vnni: bool, runs_form: bool
) -> None:
    monkeypatch.setattr("deploy.runtime.catalog.has_vnni", lambda: vnni)
    artifact = int8(shared_lenet5, form=True)
    assert onnx_file(artifact, backend, variant) == artifact.path / (CPU_ONNX if runs_form else "model.onnx")
    assert onnx_file(shared_lenet5, backend, variant) == shared_lenet5.onnx_path
    name = ":".join(filter(None, (backend, ",".join(variant))))
    assert size_run(artifact, name) == shared_lenet5.size + (77 if runs_form else 0)
    assert size_run(shared_lenet5, name) == shared_lenet5.size


def test_a_file_that_is_wrong_on_a_backend_does_not_keep_the_cpu_form_from_running(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = shared_lenet5.manifest.parity
    assert parity is not None
    wrong = replace(parity, backends=[BackendParity(backend="onnxruntime", by="onnxruntime 1", cases=[], wrong="it is off")])
    for form, vnni, refused in ((True, True, False), (True, False, True), (False, True, True)):
        monkeypatch.setattr("deploy.runtime.catalog.has_vnni", lambda vnni=vnni: vnni)
        artifact = int8(shared_lenet5, form=form)
        artifact = Artifact(artifact.path, msgspec.structs.replace(artifact.manifest, parity=wrong))
        with pytest.raises(BackendError, match="it is off") if refused else nullcontext():
            refuse_wrong(artifact, "onnxruntime")


def test_the_recorded_accuracy_is_that_of_the_backend_and_the_file_it_runs(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(backend: str, file: str | None, top1: float) -> Accuracy:
        return Accuracy(images=1, top1=top1, top5=100, backend=backend, file=file)

    signed, form, other = measured("onnxruntime", None, 90), measured("onnxruntime", CPU_ONNX, 91), measured("openvino", None, 89)
    artifact = int8(shared_lenet5, form=True)
    manifest = msgspec.structs.replace(artifact.manifest, accuracy=other, accuracies=[other, signed, form])
    artifact = Artifact(artifact.path, manifest)
    for vnni, expected in ((True, form), (False, signed)):
        monkeypatch.setattr("deploy.runtime.catalog.has_vnni", lambda vnni=vnni: vnni)
        assert recorded_accuracy(artifact, "onnxruntime") == expected
        assert recorded_accuracy(artifact, "openvino") == other
        assert recorded_accuracy(artifact, "eager") == other  # the worst, for it was not judged
    assert recorded_accuracy(shared_lenet5, "onnxruntime") is None
