"""Which backend an artifact is opened with, and why others cannot run it."""

import sys

import onnx
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import ONNX
from deploy.artifact.onnxfile import open_onnx
from deploy.errors import ArtifactError, BackendError
from deploy.runtime.catalog import BACKENDS
from deploy.runtime.load import import_backend, load, open_session
from deploy.runtime.session import SessionOptions

ON_THE_CPU = [name for name, backend in BACKENDS.items() if backend.runs in ("onnx", "module")]


@pytest.mark.parametrize("backend", ON_THE_CPU)
def test_a_damaged_file_is_found_before_it_is_used(lenet5: Artifact, backend: str) -> None:
    path = lenet5.path / ONNX
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model.onnx is damaged"):
        open_session(lenet5, backend)


@pytest.mark.parametrize("backend", [name for name in ON_THE_CPU if name not in ("eager", "compile")])
def test_a_cpu_backend_refuses_a_gpu(shared_lenet5: Artifact, backend: str) -> None:
    with pytest.raises(BackendError, match=f"{backend} runs on cpu in this version, not on cuda:0"):
        open_session(shared_lenet5, backend, SessionOptions(device="cuda:0"))


@pytest.mark.parametrize("backend", [name for name in ON_THE_CPU if name != "openvino"])
def test_a_precision_that_the_file_does_not_have_is_refused(shared_lenet5: Artifact, backend: str) -> None:
    with pytest.raises(BackendError, match=r"not in bf16; make such a file with `deploy convert --bf16`"):
        open_session(shared_lenet5, backend, SessionOptions(compute="bf16"))


def test_engines_and_the_backends_that_run_them_must_fit_one_another(shared_lenet5: Artifact, engine: Artifact) -> None:
    with pytest.raises(BackendError, match=r"lenet5 is no engine; build one with `deploy build-trt .* --flavour tensorrt`"):
        open_session(shared_lenet5, "tensorrt")
    with pytest.raises(BackendError, match="is a tensorrt-rtx engine: open it with the backend tensorrt-rtx"):
        open_session(engine, "tensorrt")


def test_auto_says_why_each_backend_cannot_run_the_artifact(tmp_path_factory: pytest.TempPathFactory) -> None:

    path = tmp_path_factory.mktemp("foreign") / "foreign.onnx"
    text = """<ir_version: 10, opset_import: ["" : 20, "mine" : 1]> g (float[n] x) => (float[n] y) { y = mine.Unheard(x) }"""
    onnx.save(onnx.parser.parse_model(text), path)
    with pytest.raises(BackendError, match=r"no backend can run .*onnxruntime: .*Unheard.*openvino: .*Unheard") as caught:
        open_session(open_onnx(path))
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deploy.runtime.backends.onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"the backend onnxruntime needs onnxruntime, .*pip install 'deploy\[cpu\]'"):
        import_backend(BACKENDS["onnxruntime"])


def test_auto_goes_on_to_the_next_backend_where_a_library_is_missing(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "deploy.runtime.backends.onnxruntime", raising=False)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with open_session(shared_lenet5) as session:
        assert session.backend == "openvino"


def test_auto_takes_onnxruntime_first(shared_lenet5: Artifact) -> None:
    with open_session(shared_lenet5) as session:
        assert session.backend == "onnxruntime"


@pytest.mark.parametrize("backend", ["auto", "tensorrt-rtx", "aoti", *ON_THE_CPU])
def test_an_engine_is_refused_with_one_reason_and_a_remedy(engine: Artifact, backend: str) -> None:
    with pytest.raises(BackendError) as caught:
        open_session(engine, backend)
    message = str(caught.value)
    assert message.count("is a tensorrt-rtx engine") == 1
    assert "NVIDIA GPU" in message
    assert f"run the ONNX artifact that it was built from ({engine.path.with_name('lenet5')})" in message


@pytest.mark.parametrize("backend", ["tensorrt-rtx", "fastest", *ON_THE_CPU])
def test_a_package_is_refused_with_one_reason_and_a_remedy(package: Artifact, backend: str) -> None:
    with pytest.raises(BackendError) as caught:
        load(package, backend)
    message = str(caught.value)
    assert "is an AOTInductor package: it runs with the backend aoti; run the ONNX artifact that it was built from (" in message
    assert "\n" not in message


def test_auto_runs_a_package_with_aoti_and_aoti_nothing_else(package: Artifact, shared_lenet5: Artifact) -> None:
    with load(package) as session:
        assert session.backend == "aoti"
    with pytest.raises(BackendError, match=r"lenet5 is no AOTInductor package; build one with `deploy build-aoti .*lenet5`"):
        load(shared_lenet5, "aoti")
