"""`deploy.verify.verify`: planted faults are found where they are, and nothing is found where there are none."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import ArtifactError, DataError, UsageError
from deploy.verify.verify import Verification, verify
from tests.verify.conftest import Change, Write, multiply

Reference = Callable[[str], Artifact]


def nodes(found: Verification) -> list[str]:
    return [layer.node for layer in found.culprits]


def test_a_copy_has_no_culprit_and_no_error(write: Write) -> None:
    found = verify(write("a.onnx"), write("b.onnx"))
    assert (nodes(found), found.beyond, found.unpaired) == ([], [], 0)
    assert {layer.cumulative.error for layer in found.layers} == {0.0}
    assert all(layer.local.floor > 0 for layer in found.layers)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        pytest.param(multiply("w1", 1.001), "stem/Conv", id="a scale"),
        pytest.param(multiply("w2", 1.01, (3, 2, 1, 1)), "body/Conv", id="one weight"),
        pytest.param(multiply("w2", -1.0, (5,)), "body/Conv", id="the sign of a channel"),
        pytest.param(multiply("b3", 1.0001), "head/Gemm", id="a bias"),
        pytest.param(multiply("w1", np.inf, (0, 0, 0, 0)), "stem/Conv", id="an infinity"),
    ],
)
def test_a_changed_weight_is_found_and_what_is_behind_it_is_a_victim(write: Write, change: Change, culprit: str) -> None:
    found = verify(write("a.onnx"), write("b.onnx", change))
    assert nodes(found) == [culprit]
    assert found.beyond == ["y"]
    order = [layer.node for layer in found.layers]
    assert [order.index(layer.node) for layer in found.victims] == list(range(order.index(culprit) + 1, len(order)))


def test_two_faults_are_both_found_in_the_order_of_the_network(write: Write) -> None:
    found = verify(write("a.onnx"), write("b.onnx", multiply("w3", 1.01), multiply("w1", 1.01)))
    assert nodes(found) == ["stem/Conv", "head/Gemm"]


def test_channels_in_other_units_that_the_readers_undo_are_no_fault(write: Write) -> None:
    factors = np.array([0.25, 4, 1, 2, 0.5, 8, 3, 0.1], dtype=np.float32)

    def rescaled(model: onnx.ModelProto) -> None:
        """Equalized, but for the skip, which takes them back by a Mul."""
        multiply("w1", factors[:, None, None, None])(model)
        multiply("w2", 1 / factors[None, :, None, None])(model)
        model.graph.initializer.append(onnx.numpy_helper.from_array(1 / factors[None, :, None, None], "back"))
        add = next(node for node in model.graph.node if node.name == "Add")
        add.input[1] = "r1_back"
        index = list(model.graph.node).index(add)
        model.graph.node.insert(index, helper.make_node("Mul", ["r1", "back"], ["r1_back"], name="back"))

    found = verify(write("a.onnx"), write("b.onnx", rescaled))
    assert (nodes(found), found.beyond) == ([], [])
    assert found.rewritten == ["c1"]
    broken = verify(write("a.onnx"), write("c.onnx", rescaled, multiply("w2", 1.5, (0,))))
    assert broken.beyond == ["y"]
    assert nodes(broken)[:1] in (["stem/Conv"], ["body/Conv"])  # the two cannot be told apart: one undoes the other


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_artifacts_of_lower_precision_are_within_the_floor(reference: Reference, tmp_path: Path, precision: str) -> None:
    source: Artifact = reference("lenet5")
    if precision == "int8":
        rng = np.random.default_rng(0)
        (tmp_path / "calib").mkdir()
        for row in range(8):
            np.savez(tmp_path / "calib" / f"{row}.npz", input=rng.standard_normal((1, 28, 28), dtype=np.float32))
        made = deploy.quantize(source, tmp_path / "made", calib=tmp_path / "calib", cpu_form=False)
    else:
        made = deploy.convert(source, tmp_path / "made", precision=precision)  # type: ignore[arg-type]
    found = verify(source, made)
    assert (nodes(found), found.beyond) == ([], [])
    assert all(layer.local.error > 0 for layer in found.layers if layer.operator in ("Conv", "Gemm"))
    model = onnx.load(made.onnx_path)
    weight = next(
        tensor for tensor in model.graph.initializer if tensor.name.startswith("conv2.weight") and len(tensor.dims) == 4
    )
    array = onnx.numpy_helper.to_array(weight).copy()
    weight.CopyFrom(onnx.numpy_helper.from_array(np.roll(array, 1, axis=0), weight.name))
    onnx.save(model, tmp_path / "broken.onnx")
    broken = verify(source, tmp_path / "broken.onnx")
    assert nodes(broken) == ["conv2/Conv"]
    assert ("--exclude 'conv2/Conv'" in broken.hints[broken.culprits[0].tensor]) == (precision == "int8")


def test_the_noise_does_not_change_sizes(tmp_path: Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 21]>
        enlarged (float[batch, 2, 6, 7] x) => (float[batch, 2, h, w] y) <float[4] s = {1, 1, 2, 2}, int64[2] last = {2, 3}> {
            [up] u = Resize(x, , s)
            [shape] all = Shape(u)
            [sizes] sizes = Gather(all, last)
            [float] f = Cast<to = 1>(sizes)
            [root] r = Sqrt(f)
            [square] q = Mul(r, r)
            [round] t = Floor(q)
            [ints] i = Cast<to = 7>(t)
            [left] l = Shape<start = 0, end = 2>(u)
            [whole] w = Concat<axis = 0>(l, i)
            [again] y = Resize<mode = "linear">(u, , , w)
        }
    """
    model = onnx.parser.parse_model(text)
    onnx.save(model, tmp_path / "a.onnx")
    next(node for node in model.graph.node if node.name == "again").attribute[0].s = b"nearest"
    model.graph.node[0].attribute.append(helper.make_attribute("mode", "linear"))
    onnx.save(model, tmp_path / "b.onnx")
    assert nodes(verify(tmp_path / "a.onnx", tmp_path / "a.onnx")) == []
    assert nodes(verify(tmp_path / "a.onnx", tmp_path / "b.onnx"))[:1] == ["up"]


def test_the_document_is_plain_json(write: Write) -> None:
    document = verify(write("a.onnx"), write("b.onnx", multiply("w1", np.inf, (0, 0, 0, 0)))).to_json()
    again = json.loads(json.dumps(document, allow_nan=False))
    assert again["culprits"][0]["local"]["error"] == "inf"
    assert [layer["node"] for layer in again["layers"]][:2] == ["stem/Conv", "stem/Relu"]


def test_artifacts_that_are_no_kin_are_refused(write: Write, reference: Reference) -> None:
    def renamed(model: onnx.ModelProto) -> None:
        for index, node in enumerate(model.graph.node):
            node.name = f"n{index}"

    with pytest.raises(UsageError, match="not of one network: the inputs are x, and input"):
        verify(write("a.onnx"), reference("lenet5"))
    with pytest.raises(UsageError, match="0 of 7 nodes have the same name and operator"):
        verify(write("a.onnx"), write("b.onnx", renamed))


def test_what_is_not_there_or_damaged_is_said_before_the_work(lenet5: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact"):
        verify(lenet5, tmp_path / "nothing")
    with pytest.raises(DataError):
        verify(lenet5, lenet5, data=tmp_path)
    data = lenet5.onnx_path.read_bytes()
    lenet5.onnx_path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="damaged"):
        verify(lenet5, lenet5)


def test_a_package_has_no_layers(package: Artifact, reference: Reference) -> None:
    with pytest.raises(UsageError, match="no layers"):
        verify(reference("lenet5"), package)
