"""The document of a benchmark."""

import pytest

from deploy.bench.plan import Skipped
from deploy.bench.rows import SCHEMA, BenchResult, verdict_of
from deploy.evidence.timing import Ratio


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.01, 1.2, "faster"), (0.8, 0.99, "slower"), (0.9, 1.1, "no difference"), (1.0, 1.5, "no difference"), (0.5, 1.0, "no difference")],
)  # fmt: skip
def test_a_difference_is_one_only_where_the_interval_leaves_1_out(low: float, high: float, verdict: str) -> None:
    assert verdict_of(Ratio(value=(low + high) / 2, low=low, high=high)) == verdict


def test_what_broke_is_listed_with_what_was_skipped_and_only_the_former_is_a_failure() -> None:
    skipped, broken = (Skipped(artifact="net", backend=name, reason="why") for name in ("tensorrt", "openvino"))
    assert not BenchResult(conditions={}, results=(), skipped=(skipped,)).failed
    result = BenchResult(conditions={}, results=(), skipped=(skipped,), failures=(broken,))
    assert result.failed
    document = result.to_json()
    assert document["schema"] == SCHEMA
    assert [entry["backend"] for entry in document["skipped"]] == ["tensorrt", "openvino"]
