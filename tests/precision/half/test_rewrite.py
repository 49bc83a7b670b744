"""The pass on hand-made graphs for its rules, and on exported modules of the usual families for the whole."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn
from torch.nn import functional

from deploy.artifact.tensors import TensorSpec, random_feed
from deploy.engine.log import garbage_kept
from deploy.errors import PrecisionError
from deploy.intake.exporter import export_graph
from tests.precision.conftest import cpu_graph, emulate, to_half

ir = pytest.importorskip("onnx_ir")

FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
CONV = """g (float[N, 2, 4, 4] x) => (float[N, 3, 2, 2] y)
    <float[3, 2, 3, 3] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}>
    { [conv] a = Conv(x, w) [relu] y = Relu(a) }"""


def nodes(model):
    return {node.name: node for node in model.graph.node}


def types(model):
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        tensor.name: tensor.data_type for tensor in inferred.initializer
    }


@pytest.mark.parametrize(("precision", "half"), [("fp16", FLOAT16), ("bf16", BFLOAT16)])
def test_inputs_and_outputs_stay_fp32_and_all_between_is_half(parse, precision, half):
    model, exclusions = to_half(parse(CONV), precision)
    found = types(model)
    assert (found["x"], found["y"], found["w"], found["a"]) == (FLOAT, FLOAT, half, half)
    assert [node.op_type for node in model.graph.node] == ["Cast", "Conv", "Relu", "Cast"]
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == ["x", "y"]
    assert exclusions == []


def test_with_half_io_there_are_no_casts_at_all(parse):
    model, _ = to_half(parse(CONV), "fp16", half_io=True)
    found = types(model)
    assert (found["x"], found["y"]) == (FLOAT16, FLOAT16)
    assert [node.op_type for node in model.graph.node] == ["Conv", "Relu"]


def test_symbolic_dimensions_keep_their_names(parse):
    model, _ = to_half(parse(CONV), "fp16")
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "N"


def test_the_argument_is_not_changed(parse):
    model = parse(CONV)
    before = model.SerializeToString(deterministic=True)
    to_half(model, "fp16", half_io=True)
    assert model.SerializeToString(deterministic=True) == before


def test_a_node_that_is_kept_computes_in_fp32_between_casts(parse):
    model, exclusions = to_half(parse(CONV), "fp16", keep={"conv": "asked for"})
    found = types(model)
    assert (found["w"], found["a"], found["a_fp16"]) == (FLOAT, FLOAT, FLOAT16)
    assert [(exclusion.node, exclusion.reason) for exclusion in exclusions] == [("conv", "asked for")]
    assert "x_to_fp16" not in nodes(model)


def test_an_unknown_name_to_keep_is_an_error(parse):
    with pytest.raises(PrecisionError, match="no node is named 'cnv'"):
        to_half(parse(CONV), "fp16", keep={"cnv": "typo"})


def test_there_is_one_cast_of_a_value_and_direction(parse):
    model, _ = to_half(
        parse(
            """g (float[N] x) => (float[N] y, float[N] z, float[N] h) {
                [a] h = Relu(x) [b] i = Neg(x) [f1] p = my.Foo(h) [f2] q = my.Bar(h) [f3] r = my.Baz(i) [c] y = Add(h, i)
                [f4] z = my.Out(p, q, r)
            }"""
        ),
        "fp16",
    )
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert Counter(node.input[0] for node in casts) == {"x": 1, "h_fp16": 1, "i": 1, "y_fp16": 1}
    assert list(nodes(model)["f1"].input) == list(nodes(model)["f2"].input) == ["h"]  # the output is FP32: no second Cast
    assert list(nodes(model)["c"].input) == ["h_fp16", "i"]


def test_a_weight_that_both_sorts_use_is_there_twice_and_others_once(parse):
    model, _ = to_half(
        parse("g (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 2}, float[2] v = {3, 4}> { [m] a = Mul(x, w) [k] b = Add(a, w) y = Div(b, v) }"),
        "fp16",
        keep={"k": "asked for"},
    )  # fmt: skip
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert stored == {"w": FLOAT, "w_fp16": FLOAT16, "v": FLOAT16}
    assert nodes(model)["k"].input[1] == "w"
    assert nodes(model)["m"].input[1] == "w_fp16"


@pytest.mark.parametrize(("precision", "third"), [("fp16", 0.333251953125), ("bf16", 0.333984375)])
def test_weights_are_rounded_to_nearest(parse, precision, third):
    model, _ = to_half(parse("g (float[N] x) => (float[N] y) <float[2] w = {0.33333333, 2}> { y = Mul(x, w) }"), precision)
    assert numpy_helper.to_array(model.graph.initializer[0]).astype(np.float32).tolist() == [np.float32(third), 2.0]


def test_values_that_a_subgraph_captures_are_fp32_there(parse):
    text = """g (float[N] x, bool c) => (float[N] y) <float[1] w = {3}> {
        [r] r = Relu(x) [s] s = Mul(r, w)
        [if] i = If(c) <
            then_branch = t () => (float[N] a) { a = Add(s, w) },
            else_branch = e () => (float[N] b) { [deep] d = If(c) <
                then_branch = tt () => (float[N] f) { f = Sub(s, x) }, else_branch = ee () => (float[N] h) { h = Neg(r) }> b = Neg(d) }
        >
        [n] y = Neg(i)
    }"""
    original = parse(text)
    model, exclusions = to_half(original, "fp16")
    found = types(model)
    assert (found["r"], found["s"], found["i"], found["w"], found["w_fp16"]) == (FLOAT16, FLOAT16, FLOAT, FLOAT, FLOAT16)
    assert [exclusion.node for exclusion in exclusions] == ["if"]
    run, expected = cpu_graph(model), cpu_graph(original)
    for condition in (True, False):
        feed = {"x": np.array([-1, 2, 0.25], dtype=np.float32), "c": np.array(condition)}
        np.testing.assert_array_equal(run(feed)["y"], expected(feed)["y"])  # numbers that FP16 holds


def test_a_loop_runs_in_fp32_on_what_half_nodes_made(parse):
    original = parse(
        """g (float[N] x, int64 n) => (float[N] y) {
            t = Constant<value = bool {1}>() [r] r = Relu(x)
            [loop] l = Loop(n, t, r) <body = b (int64 i, bool c, float[N] v) => (bool d, float[N] o) { d = Identity(c) o = Add(v, r) }>
            y = Neg(l)
        }"""
    )
    model, exclusions = to_half(original, "fp16")
    assert [exclusion.node for exclusion in exclusions] == ["loop"]
    feed = {"x": np.array([-1, 2.5], dtype=np.float32), "n": np.array(3)}
    np.testing.assert_array_equal(cpu_graph(model)(feed)["y"], cpu_graph(original)(feed)["y"])


def test_shapes_are_read_without_a_cast(parse):
    model, _ = to_half(
        parse("g (float[N, 2] x) => (float[M] y, int64[2] t) { a = Relu(x) t = Shape(a) s = Size(a) u = Unsqueeze(s, z) y = Reshape(a, u) }"
              .replace("{ a", "<int64[1] z = {0}> { a")),
        "fp16",
    )  # fmt: skip
    assert Counter(node.op_type for node in model.graph.node)["Cast"] == 2


def test_an_input_that_is_an_output_and_a_graph_without_floats_pass(parse):
    model, _ = to_half(parse("g (float[N] x, int64[N] i) => (float[N] x, int64[N] j) { j = Add(i, i) }"), "fp16")
    assert (types(model)["x"], len(model.graph.node)) == (FLOAT, 1)
    model, _ = to_half(parse("g (float[N] x, int64[N] i) => (float[N] x, int64[N] j) { j = Add(i, i) }"), "fp16", half_io=True)
    assert (types(model)["x"], len(model.graph.node)) == (FLOAT16, 1)


def test_an_initializer_that_is_an_output_keeps_its_name_and_type(parse):
    text = "g (float[2] x) => (float[2] y, float[2] w) <float[2] w = {1, 2}> { y = Mul(x, w) }"
    model, _ = to_half(parse(text), "fp16")
    assert types(model)["w"] == FLOAT
    model, _ = to_half(parse(text), "fp16", half_io=True)
    assert types(model)["w"] == FLOAT16
    np.testing.assert_array_equal(cpu_graph(model)({"x": np.ones(2, np.float16)})["w"], [1, 2])


def test_sequences_stay_fp32(parse):
    original = parse(
        """g (float[N, 4] x) => (float[N, 2] y) { r = Relu(x) i = Constant<value_int = 0>() k = Constant<value_int = 2>()
        [split] s = SplitToSequence<axis = 1>(r, k) [at] a = SequenceAt(s, i) y = Neg(a) }"""
    )
    model, exclusions = to_half(original, "fp16")
    assert [exclusion.node for exclusion in exclusions] == ["split", "at"]
    assert types(model)["r"] == FLOAT16
    feed = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    np.testing.assert_array_equal(cpu_graph(model)(feed)["y"], cpu_graph(original)(feed)["y"])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.Hardswish())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        return self.head(functional.max_pool2d(self.deep(x) + x, 2).mean((2, 3)))


class Segmenter(nn.Module):
    """Two inputs, two outputs, sizes taken from an input."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(2, 8, 3, 2, 1)
        self.norm = nn.GroupNorm(2, 8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, distance, intensity):
        x = torch.cat([distance, intensity], 1)
        low = functional.silu(self.norm(self.down(x)))
        logits = self.out(self.up(low))[:, :, ::2, ::2]
        return functional.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False), low


class Attention(nn.Module):
    """A transformer layer as vision transformers have it, and a mask of the lowest number that FP32 has."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=True)
        self.register_buffer("mask", torch.full((16, 16), torch.finfo(torch.float32).min).triu(1))

    def forward(self, x):
        x = self.layer(self.patches(x).flatten(2).transpose(1, 2))
        scores = (x @ x.transpose(1, 2) / 4 + self.mask).softmax(-1)
        return functional.normalize((scores @ x).mean(1))


class Text(nn.Module):
    """Integer and boolean inputs, and an epsilon below what FP16 holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids, mask):
        x = self.embedding(ids)
        x = torch.where(mask.unsqueeze(-1), x, torch.zeros(()))
        return self.head(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-10)).amax(1)


def specs(*entries):
    return [TensorSpec(name=name, dtype=dtype, shape=("batch", *shape)) for name, dtype, *shape in entries]


FAMILIES = {
    "residual": (Residual, specs(("input", "float32", 3, 16, 16)), ["logits"], set()),
    "segmenter": (
        Segmenter,
        specs(("distance", "float32", 1, 16, 16), ("intensity", "float32", 1, 16, 16)),
        ["logits", "low"],
        set(),
    ),
    "attention": (Attention, specs(("input", "float32", 3, 16, 16)), ["embedding"], {"ReduceL2"}),
    "text": (Text, specs(("ids", "int64", 6), ("mask", "bool", 6)), ["logits"], set()),
}


@pytest.fixture(scope="module")
def exported():
    made = {}

    def export(name):
        if name not in made:
            torch.manual_seed(0)
            module, inputs, outputs, _ = FAMILIES[name]
            module = module().eval()
            feed = {key: torch.from_numpy(array) for key, array in random_feed(inputs, {"batch": 2}).items()}
            made[name] = ir.to_proto(export_graph(module, inputs, feed, outputs)), inputs
        return made[name]

    return export


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_converts_to_a_valid_graph_that_agrees(exported, name, precision):
    model, inputs = exported(name)
    half, exclusions = to_half(model, precision)
    onnx.checker.check_model(half, full_check=True)
    by_name = nodes(half)
    allowed = FAMILIES[name][3] | ({"ConvTranspose", "HardSwish"} if precision == "bf16" else set())
    assert {by_name[exclusion.node].op_type for exclusion in exclusions} <= allowed
    if name in ("residual", "segmenter"):  # the others need their range-dependent exclusions
        run, expected = cpu_graph(emulate(half)), cpu_graph(model)
        for batch in (1, 3):
            feed = random_feed(inputs, {"batch": batch}, seed=batch)
            for (key, actual), reference in zip(run(feed).items(), expected(feed).values(), strict=True):
                assert np.abs(actual - reference).max() <= (2e-3 if precision == "fp16" else 2e-2) * np.abs(reference).max(), key


def test_the_file_of_a_converted_network_is_half_as_large(reference):
    model = onnx.load(reference("resnet18").onnx_path)
    half, _ = to_half(model, "fp16")
    assert half.ByteSize() < 0.51 * model.ByteSize()


def parse_with_tensorrt(model, batch=False):
    """The network, and the engine where `batch` gives the profile's sizes: TensorRT-RTX needs no GPU for either."""
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    with garbage_kept():
        builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), [parser.get_error(index).desc() for index in range(parser.num_errors)]
    if not batch:
        return None
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *((size, *tensor.shape[1:]) for size in (1, 8, 32)))
    config.add_optimization_profile(profile)
    return builder.build_serialized_network(network, config)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_tensorrt_takes_every_family_strongly_typed(exported, name, precision):
    parse_with_tensorrt(to_half(exported(name)[0], precision)[0])


@pytest.mark.parametrize("half_io", [False, True])
def test_tensorrt_builds_a_resnet_strongly_typed(reference, half_io):
    half, exclusions = to_half(onnx.load(reference("resnet18").onnx_path), "fp16", half_io=half_io)
    assert not exclusions
    plan = parse_with_tensorrt(half, batch=True)
    assert plan is not None
    assert 22_000_000 < plan.nbytes < 28_000_000  # 11.7 million weights of two bytes
