"""Operations, bytes and the roof."""

from deploy.artifact.artifact import Artifact
from deploy.bench.roofline import Peak, Work, attainable, count_work, measure_peak


def test_work_is_counted_from_the_graph(shared_lenet5: Artifact) -> None:
    one, eight = (count_work(shared_lenet5, {"batch": batch}) for batch in (1, 8))
    assert one is not None
    assert eight is not None
    assert eight.operations == 8 * one.operations > 0
    ends = 4 * (28 * 28 + 10)
    assert eight.nbytes - one.nbytes == 7 * ends
    weights = sum(tensor.nbytes for tensor in _weights(shared_lenet5))
    assert one.nbytes - ends >= weights


def test_the_work_of_a_package_is_that_of_its_export(package: Artifact) -> None:
    assert count_work(package, {"batch": 3}) == count_work(package.root(), {"batch": 3}) is not None


def _weights(artifact: Artifact) -> list[object]:
    import onnx

    return [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(artifact.onnx_path).graph.initializer]


def test_the_roof_is_the_peak_or_what_memory_allows() -> None:
    peak = Peak(flops=100e9, bytes_per_s=10e9)
    assert attainable(Work(operations=10**9, nbytes=10**6), peak) == 100e9
    assert attainable(Work(operations=10**6, nbytes=10**6), peak) == 10e9
    assert attainable(Work(operations=0, nbytes=10), peak) == 0


def test_the_peak_is_plausible() -> None:
    found = measure_peak()
    assert 1e9 < found.flops < 1e15
    assert 1e8 < found.bytes_per_s < 1e13
