"""What the real parser of TensorRT-RTX takes and refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.artifact.tensors import ShapeRange
from deploy.engine.builder import BuildOptions, build_engine
from deploy.engine.flavour import Flavour
from deploy.engine.network import parse_network
from deploy.errors import EngineError
from tests.engine.graphs import MIXED, SHAPES, build, save

REFUSED = """
    <ir_version: 10, opset_import: ["" : 20]>
    refused (float[batch, 12, 16] x) => (float[batch, 3, 5, 5] y, float[batch, 3, 5, 5] z)
    <int64[2] image = {5, 5}, int64[2] block = {2, 2}> {
        [first_fold] y = Col2Im(x, image, block)
        a = Neg(x)
        [second_fold] z = Col2Im(a, image, block)
    }
"""


# Between nodes that are taken: two of operators that TensorRT lacks, and two of one that nobody knows.
REFUSED_OF_ALL_SORTS = """
    <ir_version: 10, opset_import: ["" : 20, "com.acme" : 1]>
    refused (float[batch, 12, 16] x) => (float[batch, 3, 5, 5] y, float[batch, 12, 16] v)
    <int64[2] image = {5, 5}, int64[2] block = {2, 2}> {
        r = Relu(x)
        [fold] y = Col2Im(r, image, block)
        [first_odd] t = com.acme.Swirl(r)
        s = Neg(t)
        [second_odd] u = com.acme.Swirl(s)
        [det] w = Det(r)
        v = Add(u, w)
    }
"""


def test_every_refused_node_is_listed_by_name_with_a_remedy(rtx: Flavour, tmp_path: Path) -> None:
    path = save(REFUSED, tmp_path / "refused.onnx")
    shapes = ShapeRange(min=(1, 12, 16), opt=(1, 12, 16), max=(1, 12, 16))
    with pytest.raises(EngineError) as caught:
        build(rtx, path, {"x": shapes})
    text = str(caught.value)
    assert "refuses 2 nodes" in text
    assert "Col2Im 'first_fold'" in text
    assert "Col2Im 'second_fold'" in text
    assert "transposed convolution" in text


def test_refused_nodes_of_all_sorts_are_listed_in_one_run(rtx: Flavour, tmp_path: Path) -> None:
    path = save(REFUSED_OF_ALL_SORTS, tmp_path / "refused.onnx")
    with pytest.raises(EngineError) as caught:
        parse_network(rtx, path)
    first, *lines = str(caught.value).splitlines()
    assert "refuses 4 nodes" in first
    assert sorted(line.split(":")[0].strip() for line in lines) == [
        "Col2Im 'fold'", "Det 'det'", "Swirl 'first_odd'", "Swirl 'second_odd'",
    ]  # fmt: skip
    assert all("; " in line for line in lines)  # the remedy


def test_an_operator_that_tensorrt_does_not_know_is_named_with_its_domain(rtx: Flavour, tmp_path: Path) -> None:
    graph = """
        <ir_version: 10, opset_import: ["" : 20, "com.acme" : 1]>
        swirls (float[batch, 3, 8, 8] x) => (float[batch, 3, 8, 8] y) { a = Relu(x) [odd] y = com.acme.Swirl(a) }
    """
    with pytest.raises(EngineError) as caught:
        build_engine(rtx, save(graph, tmp_path / "swirls.onnx"), [SHAPES], BuildOptions(), shown="their file")
    first, second = str(caught.value).splitlines()
    assert first.endswith("refuses 1 node of their file:")
    assert second.startswith("  Swirl 'odd': operator Swirl of domain com.acme is not known to tensorrt-rtx; replace it")


def test_a_file_that_is_no_onnx_is_an_error(rtx: Flavour, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot parse .*bad\.onnx"):
        build(rtx, tmp_path / "bad.onnx")


COLLECTION_WHILE_TENSORRT_LOGS = """
import gc
import sys
import threading
from pathlib import Path

from deploy.engine import network
from deploy.engine.flavour import load_flavour

make_logger = network.make_logger


def collecting(trt):
    log = make_logger(trt)

    class Collecting(type(log)):
        def log(self, severity, message):
            if gc.isenabled():  # what Python does on its own, only not as seldom
                gc.collect()
            super().log(severity, message)

    return Collecting()


rtx = load_flavour("tensorrt-rtx")
garbage = []
garbage += [garbage, network.parse_network(rtx, Path(sys.argv[1]))]  # a cycle, as a traceback makes one
gc.disable()
del garbage
network.make_logger = collecting
gc.enable()
network.parse_network(rtx, Path(sys.argv[1]))
assert gc.isenabled()
print("done")
"""


def test_garbage_that_holds_an_older_builder_is_not_collected_while_tensorrt_logs(rtx: Flavour, tmp_path: Path) -> None:
    path = save(MIXED.format(t="float16", code=10), tmp_path / "model.onnx")
    command = [sys.executable, "-c", COLLECTION_WHILE_TENSORRT_LOGS, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "done\n", done.stderr
