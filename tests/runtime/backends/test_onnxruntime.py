import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.onnxfile import load_model, open_onnx
from deploy.artifact.tensors import ShapeRange
from deploy.errors import BackendError, UsageError
from deploy.host.cpu import adds_in_16_bits
from deploy.precision.cpu import CpuGraph
from deploy.runtime.backends.onnxruntime import count_nodes, profile_shapes, refuse_cpu_nodes, run_bound
from deploy.runtime.load import open_session
from deploy.runtime.session import SessionOptions
from tests.runtime.backends.codes import chained, exact


def test_external_data_is_read(tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight), weight.name))  # as raw bytes
    onnx.save(
        model,
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
        convert_attribute=False,
    )
    assert (tmp_path / "weights.bin").stat().st_size == 48
    x = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    with open_session(open_onnx(tiny_onnx), "onnxruntime") as inside, open_session(open_onnx(tmp_path / "model.onnx")) as outside:
        np.testing.assert_array_equal(outside(x), inside(x))


def bfloat16_file(path: Path, *, io: bool = False) -> Path:
    """y = x @ w in bfloat16; x and y are float32 unless `io`."""
    outer = TensorProto.BFLOAT16 if io else TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["x"], ["xb"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["xb", "w"], ["yb"]),
        helper.make_node("Cast", ["yb"], ["y"], to=outer),
    ]
    weight = numpy_helper.from_array(np.arange(12).reshape(4, 3).astype(ml_dtypes.bfloat16), "w")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", outer, ["batch", 4])],
        [helper.make_tensor_value_info("y", outer, ["batch", 3])],
        [weight],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_bfloat16_is_refused_with_a_remedy_and_runs_on_openvino(tmp_path: Path) -> None:
    artifact = open_onnx(bfloat16_file(tmp_path / "bf16.onnx"))
    with pytest.raises(BackendError, match=r"cannot open .*bf16.onnx: .*do not compute in bfloat16: use the openvino backend"):
        open_session(artifact, "onnxruntime")
    with open_session(artifact) as session:
        assert session.backend == "openvino"
        np.testing.assert_array_equal(session(np.ones((1, 4), np.float32)), [[18, 22, 26]])


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "null"])
def test_bfloat16_inputs_are_refused(tmp_path: Path, backend: str) -> None:
    artifact = open_onnx(bfloat16_file(tmp_path / "bf16.onnx", io=True))
    with pytest.raises(BackendError, match=r"cannot pass x: bfloat16 batchx4: numpy has no bfloat16"):
        open_session(artifact, backend)


def test_an_error_in_a_run_is_ours_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "reshape.onnx"
    text = """<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 4] x) => (float[m, 3] y) <int64[2] s = {-1, 3}> { y = Reshape(x, s) }"""
    onnx.save(onnx.parser.parse_model(text), path)
    for backend in ("onnxruntime", "openvino"):
        with open_session(open_onnx(path), backend) as session:
            assert session(np.zeros((3, 4), np.float32)).shape == (4, 3)
            with pytest.raises(BackendError, match=rf"{backend} failed to run 'reshape': .*[Rr]eshape") as caught:
                session(np.zeros((1, 4), np.float32))
            assert "\n" not in str(caught.value)
            assert caught.value.__cause__ is not None
            assert session(np.zeros((6, 4), np.float32)).shape == (8, 3)  # the session is still good


def test_threads_stop_spinning_soon_after_a_run(shared_lenet5: Artifact) -> None:
    x = np.zeros((32, 1, 28, 28), np.float32)
    with open_session(shared_lenet5, "onnxruntime", SessionOptions(threads=4)) as session:
        session(x)
        shares = []
        for _ in range(5):
            session(x)
            time.sleep(0.002)
            before, used = time.perf_counter(), time.process_time()
            time.sleep(0.02)
            shares.append((time.process_time() - used) / (time.perf_counter() - before))
    # onnxruntime's own default spins for tens of milliseconds: one to four whole cores.
    assert min(shares) < 0.3, shares


def test_threads_of_a_run_are_as_many_as_asked_for(shared_lenet5: Artifact) -> None:
    with open_session(shared_lenet5, "onnxruntime", SessionOptions(threads=3)) as session:
        assert session._session.get_session_options().intra_op_num_threads == 3  # type: ignore[attr-defined]
    with open_session(shared_lenet5, "openvino", SessionOptions(threads=1)) as session:
        assert session._compiled.get_property("INFERENCE_NUM_THREADS") == 1  # type: ignore[attr-defined]


without_gpu_wheel = pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="says what happens with the wheel for the CPU"
)


@without_gpu_wheel
@pytest.mark.parametrize(
    ("variant", "provider"),
    [("cuda", "CUDA"), ("cuda,tf32", "CUDA"), ("tensorrt", "Tensorrt")],
)
def test_a_provider_that_is_not_in_the_wheel_is_an_error_and_not_the_cpu(
    shared_lenet5: Artifact, variant: str, provider: str
) -> None:
    message = rf"needs {provider}ExecutionProvider, which the installed onnxruntime .* lacks: .*pip install 'deploy\[gpu\]'"
    with pytest.raises(BackendError, match=message):
        open_session(shared_lenet5, f"onnxruntime:{variant}")


@without_gpu_wheel
@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_did_not_load_is_an_error_and_not_the_cpu(
    shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(BackendError, match=r"onnxruntime:cuda: CUDAExecutionProvider did not load; it needs an NVIDIA driver"):
        open_session(shared_lenet5, "onnxruntime:cuda")


def test_tf32_that_cannot_be_turned_off_is_an_error(shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(UsageError, match=r"set NVIDIA_TF32_OVERRIDE=0 in the environment, or .* onnxruntime:tensorrt,tf32"):
        open_session(shared_lenet5, "onnxruntime:tensorrt")


def test_tensorrt_is_told_the_shapes_of_all_profiles() -> None:
    assert profile_shapes([]) == {}
    first = {name: ShapeRange(min=(1, 4), opt=(1, 4), max=(1, 4)) for name in ("x", "y")}
    rest = {name: ShapeRange(min=(2, 4), opt=(8, 4), max=(32, 4)) for name in ("x", "y")}
    assert profile_shapes([first, rest]) == {
        "trt_profile_min_shapes": "x:1x4,y:1x4",
        "trt_profile_opt_shapes": "x:8x4,y:8x4",
        "trt_profile_max_shapes": "x:32x4,y:32x4",
    }


def test_a_gpu_variant_does_not_run_on_the_cpu(shared_lenet5: Artifact) -> None:
    with pytest.raises(BackendError, match=r"onnxruntime:cuda runs on cuda in this version, not on cpu"):
        open_session(shared_lenet5, "onnxruntime:cuda", SessionOptions(device="cpu"))


def test_tf32_means_nothing_on_the_cpu(shared_lenet5: Artifact) -> None:
    with pytest.raises(UsageError, match="onnxruntime:tf32 means nothing on the CPU; name cuda or tensorrt with it"):
        open_session(shared_lenet5, "onnxruntime:tf32")


def cpu_session(path: Path) -> onnxruntime.InferenceSession:
    """A session that knows where its nodes run: on the CPU."""
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def text_file(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}'), path)
    return path


def test_nodes_that_compute_shapes_may_be_on_the_cpu_and_others_may_not(tmp_path: Path) -> None:
    shapes = cpu_session(text_file(tmp_path / "shapes.onnx", "g (float[n, 4] x) => (int64[2] y) { y = Shape(x) }"))
    assert count_nodes(shapes) == {"CPUExecutionProvider": 1}
    refuse_cpu_nodes(shapes, "it")
    text = "g (float[n, 4] x) => (float[n, 4] y, int64[2] z) { a = Erf(x) y = Sigmoid(a) z = Shape(a) }"
    mixed = cpu_session(text_file(tmp_path / "mixed.onnx", text))
    assert count_nodes(mixed) == {"CPUExecutionProvider": 3}
    with pytest.raises(BackendError, match=r"it: the provider has no kernel for Erf, Sigmoid, which would run on the CPU"):
        refuse_cpu_nodes(mixed, "it")


def test_tensors_are_bound_where_they_lie(pair: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    session = cpu_session(pair.onnx_path)
    feed = {"x": torch.randn(3, 4), "index": torch.tensor([5, 6, 7])}
    given: dict[str, int] = {}
    bind = onnxruntime.IOBinding.bind_input

    def bind_input(self: onnxruntime.IOBinding, name: str, *rest: object) -> None:
        given[name] = rest[-1]  # type: ignore[assignment]
        bind(self, name, *rest)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_input", bind_input)
    results = run_bound(session, feed, pair.manifest.inputs, pair.manifest.outputs, "cpu")
    assert given == {name: x.data_ptr() for name, x in feed.items()}
    with open_session(pair, "onnxruntime") as reference:
        expected = reference.run(feed)
    for result, wanted in zip(results, expected.values(), strict=True):
        assert result.dtype == wanted.dtype
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def test_bound_outputs_whose_shape_the_inputs_do_not_tell_are_the_callers(tmp_path: Path) -> None:
    text = "g (float[n, 4] x) => (float[m, 4] y, bool[n, 4] z) { o = Constant <value_float = 0.0> ()" + (
        " z = Greater(x, o) c = ReduceMax <keepdims = 0> (x, a) b = Greater(c, o) y = Compress <axis = 0> (x, b) }"
    )
    text = text.replace("{ o", "<int64[1] a = {1}> { o")
    path = text_file(tmp_path / "rows.onnx", text)
    artifact = open_onnx(path)
    session = cpu_session(path)
    for seed in range(3):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)) - 1
        rows, positive = run_bound(session, {"x": x}, artifact.manifest.inputs, artifact.manifest.outputs, "cpu")
        torch.testing.assert_close(rows, x[x.max(1).values > 0])
        assert positive.dtype == torch.bool
        torch.testing.assert_close(positive, x > 0)


HALF_ATTENTION = {
    "batch and row change places": "t = Transpose<perm = [1, 0, 2]>(h) m = MatMul(t, w)",
    "rows become columns too": "t = Transpose<perm = [1, 2, 0]>(h) m = MatMul(t, w3)",
    "after a norm": "n = LayerNormalization(h, g, g) t = Transpose<perm = [1, 0, 2]>(n) m = MatMul(t, w)",
    "of two activations": "t = Transpose<perm = [1, 0, 2]>(h) u = Transpose<perm = [1, 2, 0]>(h) m = MatMul(t, u)",
}


@pytest.mark.parametrize("body", HALF_ATTENTION.values(), ids=HALF_ATTENTION)
def test_attention_in_half_precision_does_not_end_the_process(body: str, tmp_path: Path) -> None:
    text = f"""<ir_version: 10, opset_import: ["" : 20]>
        g (float[2, 4, 3] x) => (float[A, B, C] y) <float16[3, 5] w, float16[2, 5] w3, float16[3] g>
        {{ h = Cast<to = 10>(x) {body} y = Cast<to = 1>(m) }}"""
    model = onnx.parser.parse_model(text)
    del model.graph.value_info[:]
    for name, shape in (("w", (3, 5)), ("w3", (2, 5)), ("g", (3,))):
        array = np.linspace(-1, 1, np.prod(shape)).reshape(shape).astype(np.float16)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(model, tmp_path / "net.onnx")
    code = (
        "import sys, deploy, numpy as np\n"
        "with deploy.load(sys.argv[1], backend='onnxruntime') as session:\n"
        "    np.save(sys.argv[2], session(np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 4, 3)))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "net.onnx"), str(tmp_path / "y.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    exact = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), plain, providers=["CPUExecutionProvider"])
    (expected,) = exact.run(None, {"x": np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 4, 3)})
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=5e-3)


def test_a_relu_before_codes_of_fp8_is_not_dropped(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 19]> g (float[N, 4] x) => (float[N, 4] y) <float s = {0.25}, float8e4m3fn z> {
        r = Relu(x) q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), ml_dtypes.float8_e4m3fn), "z"))
    del model.graph.value_info[:]
    onnx.save(model, tmp_path / "net.onnx")
    x = np.array([[-2.0, -0.25, 0.25, 2.0]], np.float32)
    plain = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    assert plain.run(None, {"x": x})[0].min() < 0, "it is right now: DROPS_RELU can go"
    with open_session(open_onnx(tmp_path / "net.onnx"), "onnxruntime") as session:
        np.testing.assert_array_equal(session.run({"x": x})["y"], np.maximum(x, 0))
    np.testing.assert_array_equal(CpuGraph.read(tmp_path / "net.onnx")({"x": x})["y"], np.maximum(x, 0))
    np.testing.assert_array_equal(CpuGraph(load_model(tmp_path / "net.onnx"))({"x": x})["y"], np.maximum(x, 0))


@pytest.mark.parametrize("shared", [False, True])
def test_products_of_bytes_are_added_in_32_bits_on_every_processor(shared: bool, tmp_path: Path) -> None:
    model, x = chained(shared)
    onnx.save(model, tmp_path / "chain.onnx")
    (expected,) = exact(model, x, name="x0")
    with deploy.load(tmp_path / "chain.onnx", "onnxruntime") as session:
        assert "QLinearConv" in {layer.operator for layer in session.layer_times({"x0": x}, runs=1)}
        (found,) = session.run({"x0": x}).values()
    if not (shared and adds_in_16_bits()):  # then it cannot be had, but the file opens
        np.testing.assert_allclose(found, expected, rtol=0, atol=0.02)
