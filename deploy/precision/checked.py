"""That a prepared graph, brought to another opset, folded or equalized, still computes what its file computes."""

from collections.abc import Sequence

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed, row_count
from deploy.errors import PrecisionError
from deploy.evidence.parity import TOLERANCES, judge
from deploy.precision.cpu import CpuGraph


def check_prepared(artifact: Artifact, results: Sequence[tuple[Feed, Feed]]) -> list[Feed]:
    """Compare the outputs of a prepared graph with those of the file of `artifact`, by feed, within the tolerance of FP32.

    Returns those of the file. Raises PrecisionError.
    """
    run = CpuGraph.read(artifact.onnx_path)
    expected = []
    for feed, outputs in results:
        expected.append(run(feed))
        _, wrong = judge(outputs, expected[-1], TOLERANCES["fp32"], data="the given", batch=row_count(feed))
        if wrong:
            raise PrecisionError(
                f"{artifact.shown} computes something else once the graph is of a newer opset, folded and equalized: {wrong}; newer"
                " opsets define some operators in another way (Upsample, Resize): export it with a newer one"
            )
    return expected
