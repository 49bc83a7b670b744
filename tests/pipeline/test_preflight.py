"""What the real parser of TensorRT-RTX makes of a graph, before an engine is built."""

from pathlib import Path

import onnx
import pytest

import deploy
from deploy.artifact.artifact import Artifact
from deploy.errors import EngineError
from deploy.pipeline import preflight


@pytest.mark.parametrize("precision", [None, "fp16", "bf16"])
def test_the_share_of_each_precision_is_read_from_the_network(shared_lenet5: Artifact, precision: str | None) -> None:
    found = deploy.preflight(shared_lenet5, precision=precision, flavour="tensorrt-rtx")  # type: ignore[arg-type]
    assert found.flavour == "tensorrt-rtx"
    assert found.nodes >= len(onnx.load(shared_lenet5.onnx_path).graph.node)
    assert getattr(found.share, precision or "fp32") == 1
    assert found.share.origin == "network"


def test_a_precision_that_the_network_does_not_have_is_an_error(shared_lenet5: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    read = preflight.network_share

    def all_in_fp32(*given: object) -> object:
        share, by_node = read(*given)  # type: ignore[arg-type]
        return share, dict.fromkeys(by_node, "fp32")

    monkeypatch.setattr(preflight, "network_share", all_in_fp32)
    with pytest.raises(EngineError, match=r"fp16 was asked for, and 0% "):
        deploy.preflight(shared_lenet5, precision="fp16", flavour="tensorrt-rtx")


def test_refused_nodes_are_named_under_the_name_that_the_user_gave(tmp_path: Path) -> None:
    text = """
        <ir_version: 10, opset_import: ["" : 20]>
        odd (float[batch, 4, 4] x) => (float[batch] y) { [one] d = Det(x) y = Relu(d) }
    """
    onnx.save(onnx.parser.parse_model(text), tmp_path / "odd.onnx")
    with pytest.raises(EngineError, match=r"refuses 1 node of .*odd\.onnx:\n  Det 'one': "):
        deploy.preflight(tmp_path / "odd.onnx", flavour="tensorrt-rtx")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.onnx"]
