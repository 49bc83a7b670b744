import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import WEIGHTS
from deploy.artifact.onnxfile import open_onnx
from deploy.errors import ArtifactError, BackendError, DeployError
from deploy.runtime.catalog import BACKENDS
from deploy.runtime.load import import_backend, open_session
from deploy.runtime.session import SessionOptions


def test_nested_outputs_come_in_the_order_of_the_manifest(pair: Artifact) -> None:
    feed = {"index": np.array([5, 7]), "x": np.random.default_rng(0).standard_normal((2, 4), dtype=np.float32)}
    with open_session(pair, "onnxruntime") as reference, open_session(pair, "eager") as session:
        expected = reference.run(feed)
        results = session.run(feed)
    assert list(results) == ["y", "total", "same", "anchors"]
    for name, result in results.items():
        np.testing.assert_allclose(result, expected[name], rtol=1e-5, atol=1e-6)


def test_writing_to_results_changes_neither_the_input_nor_the_module(pair: Artifact) -> None:
    x, index = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    with open_session(pair, "eager") as session:
        first = session.run({"x": x, "index": index})
        first["same"] += 1
        first["anchors"] += 1
        again = session.run({"x": x, "index": index})
    torch.testing.assert_close(x, torch.ones(2, 4))
    torch.testing.assert_close(again["anchors"], torch.arange(3.0))


def test_an_input_that_wants_a_gradient_may_be_an_output(pair: Artifact) -> None:
    feed = {"x": torch.ones(2, 4, requires_grad=True), "index": torch.zeros(2, dtype=torch.int64)}
    with open_session(pair, "eager") as session:
        results = session.run(feed)
    torch.testing.assert_close(results["same"], torch.ones(2, 4))
    assert not any(x.requires_grad for x in results.values())


def test_results_can_be_changed_in_place_and_want_no_gradient(shared_lenet5: Artifact) -> None:
    with open_session(shared_lenet5, "eager") as session:
        result = session(torch.zeros(1, 1, 28, 28))
    result += 1  # a tensor made in inference mode would refuse this
    assert not result.requires_grad
    assert not result.is_inference()


def test_a_derived_artifact_runs_the_module_that_it_descends_from(half: Artifact, shared_lenet5: Artifact) -> None:
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32)
    with open_session(half, "eager") as derived, open_session(shared_lenet5, "eager") as root:
        assert str(derived.inputs[0]) == "input: float32 batchx1x28x28"
        np.testing.assert_array_equal(derived(x), root(x))


def test_a_bare_onnx_file_has_no_module(tiny_onnx: Path) -> None:
    with pytest.raises(DeployError, match=r"tiny.onnx came from an ONNX file: there is no eager module"):
        open_session(open_onnx(tiny_onnx), "eager")


def test_damaged_weights_are_found(lenet5: Artifact) -> None:
    path = lenet5.path / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with open_session(lenet5, "onnxruntime"):
        pass  # which does not read them
    with pytest.raises(ArtifactError, match=r"weights.safetensors is damaged"):
        open_session(lenet5, "eager")


def test_an_error_in_the_module_is_ours(pair: Artifact) -> None:
    with open_session(pair, "eager") as session:
        session._module.linear = None  # stands for any fault in the user's code
        with pytest.raises(BackendError, match=r"eager failed to run 'pair': TypeError: .*not callable") as caught:
            session.run({"x": np.zeros((1, 4), np.float32), "index": np.zeros(1, np.int64)})
    assert isinstance(caught.value.__cause__, TypeError)


def test_another_number_of_outputs_than_the_manifest_lists_is_an_error(pair: Artifact) -> None:
    with open_session(pair, "eager") as session:
        session._module = lambda x, index: [x, index]
        with pytest.raises(BackendError, match=r"'pair' returned 2 tensors; the manifest lists y: .*, total: "):
            session.run({"x": np.zeros((1, 4), np.float32), "index": np.zeros(1, np.int64)})


def test_an_output_that_is_no_tensor_is_an_error(pair: Artifact) -> None:
    with open_session(pair, "eager") as session:
        session._module = lambda x, index: "text"
        with pytest.raises(BackendError, match=r"the module returned a str; expected tensors"):
            session.run({"x": np.zeros((1, 4), np.float32), "index": np.zeros(1, np.int64)})


def test_threads_are_set_for_the_process(shared_lenet5: Artifact) -> None:
    before = torch.get_num_threads()
    try:
        with open_session(shared_lenet5, "eager", SessionOptions(threads=before + 1)):
            assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_an_error(shared_lenet5: Artifact, device: str) -> None:
    with pytest.raises(BackendError, match=rf"no {device} here: torch .* sees 0 usable CUDA devices"):
        open_session(shared_lenet5, "eager", SessionOptions(device=device))


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_missing_torch_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    for name in ("eager", "compile"):
        monkeypatch.delitem(sys.modules, f"deploy.runtime.backends.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendError, match=rf"the backend {backend} needs torch, .*pip install 'deploy\[export\]'"):
        import_backend(BACKENDS[backend])


@pytest.mark.parametrize(
    ("variant", "dtype", "atol"),
    [("fp16", torch.float16, 1e-3), ("bf16", torch.bfloat16, 1e-2), ("fp16,channels_last", torch.float16, 1e-3)],
)
def test_half_precision_takes_and_gives_what_the_manifest_says(
    shared_lenet5: Artifact, variant: str, dtype: torch.dtype, atol: float
) -> None:
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32)
    with open_session(shared_lenet5, "eager") as reference, open_session(shared_lenet5, f"eager:{variant}") as session:
        assert {parameter.dtype for parameter in session._module.parameters()} == {dtype}
        assert session.inputs == reference.inputs
        result, expected = session(x), reference(x)
        assert result.dtype == np.float32
        assert 0 < np.abs(result - expected).max() < atol
        assert session(torch.from_numpy(x)).dtype == torch.float32


def test_integers_stay_integers_in_half_precision(pair: Artifact) -> None:
    feed = {"x": torch.randn(2, 4), "index": torch.tensor([5, 7])}
    with open_session(pair, "eager") as reference, open_session(pair, "eager:fp16") as session:
        expected, results = reference.run(feed), session.run(feed)
    for name, result in results.items():
        assert result.dtype == expected[name].dtype
        torch.testing.assert_close(result, expected[name], rtol=1e-2, atol=1e-2)


def test_channels_last_changes_how_the_module_sees_images(shared_lenet5: Artifact) -> None:
    seen: list[torch.Tensor] = []
    x = np.random.default_rng(0).standard_normal((2, 1, 28, 28), dtype=np.float32)
    with open_session(shared_lenet5, "eager") as reference, open_session(shared_lenet5, "eager:channels_last") as session:
        session._module.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
        np.testing.assert_allclose(session(x), reference(x), rtol=1e-5, atol=1e-6)
        weights = [parameter for parameter in session._module.parameters() if parameter.dim() == 4]
    assert weights
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in (*seen, *weights))
    assert seen[0].stride()[1] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_cuda_graph_needs_a_gpu(shared_lenet5: Artifact) -> None:
    with pytest.raises(BackendError, match="a CUDA graph needs an NVIDIA GPU that torch can use"):
        open_session(shared_lenet5, "eager:fp16,channels_last,cuda_graph")


def test_tf32_is_left_alone_on_the_cpu(shared_lenet5: Artifact) -> None:
    before = torch.backends.cudnn.allow_tf32
    with open_session(shared_lenet5, "eager:tf32", SessionOptions(device="cpu")):
        assert torch.backends.cudnn.allow_tf32 == before
