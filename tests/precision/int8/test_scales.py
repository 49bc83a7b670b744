"""Scales from ranges, shared and apart."""

import numpy as np
import pytest

from deploy.calibration.histogram import Histogram
from deploy.calibration.thresholds import METHODS, threshold
from deploy.precision.codes import INT8
from deploy.precision.int8.placement import Placement
from deploy.precision.int8.scales import scales_of


def placed(*tensors: str, group: tuple[str, ...] = (), joints: dict[str, str] | None = None) -> Placement:
    joints = joints or {}
    edges = {tensor: (("join" if tensor in group and joints else f"reads {tensor}", 0),) for tensor in tensors}
    return Placement(
        nodes=(), edges=edges, groups=(group,) if group else (), joints=joints, weights={}, excluded=(), left=frozenset()
    )


def test_a_tensor_by_itself_has_its_own_scale() -> None:
    assert scales_of(placed("x", "y"), {"x": 1.0, "y": 5.0}, INT8).own == {"x": INT8.scale_of(1.0), "y": INT8.scale_of(5.0)}


@pytest.mark.parametrize(("small", "shared"), [(3.0, True), (2.0, True), (1.9, False)])
def test_a_group_shares_the_scale_of_the_widest_unless_a_bit_would_be_lost(small: float, shared: bool) -> None:
    found = scales_of(placed("x", "y", group=("x", "y")), {"x": 4.0, "y": small}, INT8)
    assert found.own["y"] == INT8.scale_of(4.0 if shared else small)
    assert not found.joint


def test_a_small_branch_of_a_concat_has_the_joint_scale_there_alone() -> None:
    found = scales_of(placed("x", "y", group=("x", "y"), joints={"join": "z"}), {"x": 4.0, "y": 0.1}, INT8)
    assert found.own == {"x": INT8.scale_of(4.0), "y": INT8.scale_of(0.1)}
    assert found.joint == {"y": INT8.scale_of(4.0)}


def test_what_is_always_zero_is_said(caplog: pytest.LogCaptureFixture) -> None:
    assert scales_of(placed("x", "y"), {"x": 0.0, "y": 1.0}, INT8).own["x"] == 1.0
    assert "always 0 on the calibration data: x" in caplog.text


@pytest.mark.parametrize("zeros", [1_000, 1_000_000])
@pytest.mark.parametrize("others", [1, 8, 100])
def test_a_few_numbers_among_zeros_are_not_clipped_away(zeros: int, others: int) -> None:
    """As in a map with an impulse."""
    values = np.zeros(zeros + others, np.float32)
    values[:: zeros // others][:others] = np.linspace(1, 1.5, others)
    histogram = Histogram()
    histogram.add(values)
    for method in METHODS:
        assert threshold(histogram, method) >= 0.98 * values.max()
