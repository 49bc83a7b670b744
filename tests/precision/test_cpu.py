import gc
import subprocess
import sys

import ml_dtypes  # noqa: F401  (numpy knows bfloat16 by it)
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from deploy.artifact.onnxfile import save_model
from deploy.errors import BackendError, PrecisionError
from deploy.precision.cpu import CpuGraph
from tests.precision.conftest import cpu_graph, to_half

MODEL = "g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }"


def test_outputs_come_by_name(parse):
    found = cpu_graph(parse(MODEL))({"x": np.eye(2, dtype=np.float32)})
    assert found["y"].tolist() == [[1, 2], [3, 4]]


def test_a_graph_that_onnxruntime_lacks_an_operator_for_is_an_error_with_its_name(parse):
    with pytest.raises(PrecisionError, match="does not know node 'odd': it is operator Foo of domain my;"):
        cpu_graph(parse("g (float[N] x) => (float[N] y) { [known] a = com.microsoft.QuickGelu(x) [odd] y = my.Foo(a) }"))


def test_a_graph_that_onnxruntime_cannot_load_for_another_reason_is_an_error_that_says_it(parse):
    with pytest.raises(PrecisionError, match=r"cannot load the graph: .*QuickGelu"):
        cpu_graph(parse("g (float[N] x, float[N] z) => (float[N] y) { y = com.microsoft.QuickGelu(x, z) }"))


def serialized(model):
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_inner_tensors_are_outputs_on_request_and_the_model_stays_as_it_is(parse):
    model = ir.from_proto(parse("g (float[N] x) => (float[N] y) { a = Neg(x) b = Exp(a) y = Neg(b) }"))
    before = serialized(model)
    found = CpuGraph(model, also=["a"])({"x": np.ones(2, dtype=np.float32)})
    assert list(found) == ["y", "a"]
    assert found["a"].tolist() == [-1, -1]
    assert serialized(model) == before


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64"])
def test_large_weights_of_every_dtype_are_read_where_they_lie(dtype):
    weight = np.arange(4096).reshape(2, 2048).astype(dtype)
    tensor = onnx.numpy_helper.from_array(weight, "w")
    node = onnx.helper.make_node("Cast", ["w"], ["y"], to=onnx.TensorProto.DOUBLE)
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.DOUBLE, (2, 2048))
    graph = onnx.helper.make_graph([node], "g", [], [output], [tensor])
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10))
    before = serialized(model)
    run = CpuGraph(model)
    assert serialized(model) == before
    del model, graph, tensor
    gc.collect()
    assert run({})["y"].tolist() == weight.astype(np.float64).tolist()


@pytest.mark.parametrize("size", [3, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_in_a_file_beside_are_read_from_it_at_any_offset(tmp_path, dtype, size):
    """Packed densely, so that a weight may begin anywhere; the small one is a shape."""
    weight = (np.arange(size) % 100).astype(dtype)
    tensors = [onnx.numpy_helper.from_array(np.array([7], np.int8), "odd"), onnx.numpy_helper.from_array(weight, "w")]
    tensors.append(onnx.numpy_helper.from_array(np.array([1, -1], np.int64), "shape"))
    nodes = [onnx.helper.make_node("Cast", ["w"], ["f"], to=1), onnx.helper.make_node("Reshape", ["f", "shape"], ["y"])]
    output = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, (1, size))
    graph = onnx.helper.make_graph(nodes, "g", [], [output], tensors)
    model = ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10))
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    loaded = ir.load(tmp_path / "m.onnx")
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert CpuGraph(loaded)({})["y"].tolist() == [weight.astype(np.float32).tolist()]


def test_weights_over_the_limit_go_into_a_file_beside(parse, tmp_path):
    model, _ = to_half(parse(MODEL), "fp16")
    save_model(ir.from_proto(model), tmp_path / "small.onnx")
    save_model(ir.from_proto(model), tmp_path / "large.onnx", external_over=7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data", "small.onnx"]
    assert onnx.load(tmp_path / "large.onnx").graph.initializer[0].raw_data == model.graph.initializer[0].raw_data
    assert model.graph.initializer[0].raw_data  # as it was


def test_without_onnxruntime_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "deploy.precision.cpu")
    with pytest.raises(BackendError, match=r"needs onnxruntime, which is not installed: pip install 'deploy\[cpu\]'"):
        import deploy.precision.cpu  # noqa: F401


@pytest.mark.parametrize("size", [2, 4096])
def test_a_weight_that_nothing_reads_is_no_obstacle(parse, size):
    model = parse(MODEL)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(size, np.float32), "unused"))
    found = cpu_graph(model)({"x": np.eye(2, dtype=np.float32)})
    assert found["y"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("opened", ["CpuGraph.read(path)", "CpuGraph(load_model(path))"])
def test_attention_in_half_precision_does_not_end_the_process(opened, tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 20]> g (float[2, 4, 3] x) => (float[A, B, C] y)
        { h = Cast<to = 10>(x) t = Transpose<perm = [1, 0, 2]>(h) m = MatMul(t, w) y = Cast<to = 1>(m) }"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((3, 5), np.float16), "w"))
    onnx.save(model, tmp_path / "net.onnx")
    code = f"""import sys; from pathlib import Path; import numpy as np
from deploy.artifact.onnxfile import load_model; from deploy.precision.cpu import CpuGraph
path = Path(sys.argv[1]); print({opened}({{"x": np.ones((2, 4, 3), np.float32)}})["y"].sum())"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "net.onnx"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "120.0\n"), done.stderr


@pytest.mark.parametrize("rows", [1, 7])
def test_a_small_output_that_is_kept_does_not_keep_the_memory_of_its_session(rows):
    code = f"""
from pathlib import Path
import numpy as np, onnx_ir as ir
from deploy.precision.cpu import CpuGraph

def held():
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in rollup if line.startswith("Pss_Anon:")) << 10

text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4096] x, int64[2] r) => (float[N, 1] y)'
graph = CpuGraph(ir.from_onnx_text(text + "{{ wide = Tile(x, r) y = ReduceMax <axes = [1]> (wide) }}"))
x = np.ones(({rows}, 4096), np.float32)
graph(dict(x=x, r=np.array([1, 1])))
before = held()
kept = graph(dict(x=x, r=np.array([1, 8192 // {rows}])))["y"]
del graph
print(held() - before, kept.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    left, kept = map(int, done.stdout.split())
    assert kept < 100
    assert left < 32 << 20  # the run has 128 MiB
