"""The contract of the passes: conditions are checked around every call, and a clone is never touched."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import PassResult, PostconditionError, PreconditionError

from deploy.precision.codes import INT8
from deploy.precision.half.emulate import EMULATED, Emulate
from deploy.precision.half.rewrite import ToHalf
from deploy.precision.int8.equalize import Equalize
from deploy.precision.int8.folding import FOLDED, FoldBatchNorm
from deploy.precision.int8.placement import Selection, place
from deploy.precision.int8.rewrite import CONSTANT_SCALES, ToCodes
from deploy.precision.passes import CONSTANTS, INLINED, NAMED, VALID, Condition, PrecisionPass, opset_from
from deploy.precision.prepare import Prepare

FUNCTION = '<domain: "my", opset_import: ["": 20]> double (a) => (b) { b = Add(a, a) }'
NET = """g (float[2, 3, 8, 8] x) => (float[2, 4, 8, 8] y) {
    a = Conv(x, w) n = BatchNormalization(a, s, t, m, v) r = Relu(n) c = Constant<value_float = 2.0>() u = Mul(r, c) y = Conv(u, w2)
}"""


def net(parse) -> ir.Model:
    proto = parse(NET, 19)
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3, 1, 1), "w2": (4, 4, 1, 1), "s": (4,), "t": (4,), "m": (4,), "v": (4,)}
    for name, shape in shapes.items():
        array = rng.uniform(0.5, 1.5, shape).astype(np.float32) * (10 if name == "w" else 1)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


def stages(parse) -> list[tuple[str, ir.Model, PrecisionPass]]:
    """Every pass with a model that it changes."""
    rows = []
    model = net(parse)
    rows.append(("prepare", model, Prepare(opset=20)))
    prepared = Prepare()(model.clone()).model
    rows.append(("fold", prepared, FoldBatchNorm()))
    rows.append(("half", prepared, ToHalf("fp16")))
    rows.append(("half with inputs and outputs", prepared, ToHalf("fp16", half_io=True)))
    folded = FoldBatchNorm()(prepared.clone()).model
    pair = parse(
        "g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) <float[2, 2, 1, 1] w = {1, 2, 30, 40}, float[2, 2, 1, 1] v = {1, 2, 3, 4}>"
        " { a = Conv(x, w) b = Relu(a) y = Conv(b, v) }"
    )
    rows.append(("equalize", Prepare()(ir.from_proto(pair)).model, Equalize()))
    placement = place(folded, Selection())
    rows.append(
        ("int8", folded, ToCodes(placement, dict.fromkeys(placement.edges, 0.1), INT8, bias={"Conv_0": np.ones(4, np.float32)}))
    )
    half = ToHalf("fp16", half_io=True)(prepared.clone()).model
    rows.append(("emulate", half, Emulate()))
    return rows


PASSES = ["prepare", "fold", "half", "half with inputs and outputs", "equalize", "int8", "emulate"]


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_works_in_place_says_that_it_changed_something_and_leaves_a_clone_alone(parse, name):
    model, change = next((model, change) for stage, model, change in stages(parse) if stage == name)
    other = model.clone()
    before = serialized(other)
    result = change(model)
    assert result.model is model
    assert result.modified
    assert serialized(model) != before
    assert serialized(other) == before


@pytest.mark.parametrize("name", ["prepare", "fold", "equalize"])
def test_a_pass_that_has_nothing_left_to_do_says_so(parse, name):
    model, change = next((model, change) for stage, model, change in stages(parse) if stage == name)
    change(model)
    before = serialized(model)
    assert not change(model).modified
    assert serialized(model) == before


@pytest.mark.parametrize(
    ("condition", "text", "violation"),
    [
        (INLINED, f"g (float[N] x) => (float[N] y) {{ y = my.double(x) }} {FUNCTION}", "my:double is left"),
        (NAMED, "g (float[N] x) => (float[N] y) { [a] a = Relu(x) [a] y = Relu(a) }", "2 nodes are called 'a'"),
        (NAMED, "g (float[N] x) => (float[N] y) { [a] a = Relu(x) y = Relu(a) }", "1 nodes have none"),
        (CONSTANTS, "g (float[N] x) => (float[N] y) { [k] c = Constant<value_float = 2.0>() y = Mul(x, c) }", "'k' is a Constant"),
        (CONSTANTS, "g (float[N] x, float w = {2}) => (float[N] y) { y = Mul(x, w) }", "'w' is an input as well"),
        (VALID, "g (float[N] x, int64[N] i) => (float[N] y) { [m] y = Mul(x, i) }", "m"),
        (opset_from(21), "g (float[N] x) => (float[N] y) { y = Relu(x) }", "opset 20"),
        (EMULATED, "g (float16[N] x) => (float16[N] y) { [r] y = Relu(x) }", "'x', an input of 'r', is FLOAT16"),
        (CONSTANT_SCALES, "g (float[N] x, float s) => (int8[N] y) <int8 z = {0}> { [q] y = QuantizeLinear(x, s, z) }", "'q' is not a constant"),
        (CONSTANT_SCALES, "g (float[N] x) => (int8[N] y) <float s = {0}, int8 z = {0}> { [q] y = QuantizeLinear(x, s, z) }", "'q' is not"),
        (
            FOLDED,
            "g (float[1, 1, 2, 2] x) => (float[1, 1, 2, 2] y) <float[1, 1, 1, 1] w = {1}, float[1] o = {1}>"
            " { [c] a = Conv(x, w) [n] y = BatchNormalization(a, o, o, o, o) }",
            "'n' can be folded into 'c'",
        ),
    ],
)  # fmt: skip
def test_every_condition_is_really_checked(parse, condition: Condition, text: str, violation: str):
    model = ir.from_proto(parse(text))
    assert violation in condition.violation(model)

    class Needs(PrecisionPass):
        needs = (condition,)

        def call(self, model: ir.Model) -> PassResult:
            pytest.fail("ran all the same")

    class Leaves(PrecisionPass):
        leaves = (condition,)

        def call(self, model: ir.Model) -> PassResult:
            return PassResult(model, False)

    with pytest.raises(PreconditionError, match=f"the pass Needs needs that {condition.name}: "):
        Needs()(model)
    with pytest.raises(PostconditionError, match=f"the pass Leaves must ensure that {condition.name}: "):
        Leaves()(model)


@pytest.mark.parametrize(
    "change", [FoldBatchNorm(), Equalize(), ToHalf("fp16"), Emulate()], ids=lambda change: type(change).__name__
)
def test_a_graph_that_is_not_prepared_is_an_error_of_ours(parse, change):
    model = ir.from_proto(parse("g (float[N] x) => (float[N] y) { c = Constant<value_float = 2.0>() y = Mul(x, c) }"))
    with pytest.raises(PreconditionError, match=f"the pass {type(change).__name__} needs that "):
        change(model)


def test_a_graph_of_an_older_opset_than_the_format_needs_is_an_error_of_ours(parse):
    model = Prepare()(ir.from_proto(parse("g (float[N] x) => (float[N] y) { y = Relu(x) }", 18))).model
    with pytest.raises(PreconditionError, match="the pass ToHalf needs that the opset is 22 or later: the graph uses opset 18"):
        ToHalf("bf16")(model)
