"""Axes of the figures."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from deploy.bench.report.charts import WIDTH, Bar, Roofed, _Axis, durations, roofs, speedups


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.05, 0.7),
        (31.0, 60.0),
        (200.0, 360.0),
        (990.0, 1560.0),
        (0.01, 1e6),
        (19.0, 32.0),
        (5.0, 5.1),
        (0.035, 0.25),
        (1.01, 4.1),
        (97.75, 98.9),
    ],
)
@pytest.mark.parametrize("even", [False, True])
def test_axes_have_enough_round_ticks_at_even_distances(low: float, high: float, even: bool) -> None:
    axis = _Axis(low, high, 0, 100, even=even)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9
    gaps = np.diff([axis(tick) for tick in ticks])
    assert gaps.max() <= 1.1 * gaps.min()
    assert np.allclose(np.diff([axis(edge) for edge in axis.edges(7)]), 100 / 7)
    assert all(low <= tick <= high for tick in ticks)
    assert all(len(f"{tick:.4g}") <= 6 for tick in ticks)


@pytest.mark.parametrize("values", [(0.5, 2.0), (1.0, 1.0), (0.001, 900.0)])
def test_bars_keep_within_the_figure_and_their_names_are_no_markup(values: tuple[float, float]) -> None:
    bars = [
        Bar(label=f"<b>{index}&", colour=index, value=value, low=value / 1.1, high=value * 1.1, note="x")
        for index, value in enumerate(values)
    ]
    for draw in (speedups, durations):
        figure = ElementTree.fromstring(draw("Batch <1>", bars))
        assert figure.findtext("title") == "Batch <1>"
        assert "<b>0&" in str(figure.findtext("desc"))
        for shape in figure.iter():
            if (x := shape.get("x")) and (width := shape.get("width")):
                assert 0 <= float(x) <= float(x) + float(width) <= WIDTH


def test_the_mark_of_each_bar_is_at_its_own_roof_and_what_is_uncertain_has_no_bar() -> None:
    bars = [Roofed(label=str(roof), colour=1, value=10.0, roof=roof, note="x") for roof in (20.0, 40.0)]
    marks = [
        float(str(each.get("x1"))) for each in ElementTree.fromstring(roofs("r", bars)).iter() if each.get("class") == "mark"
    ]
    assert (marks[1] - 10) / (marks[0] - 10) == pytest.approx(2, rel=0.01)
    known = Bar(label="a", colour=1, value=2.0, low=1.9, high=2.1, note="2.00")
    doubtful = Bar(label="b", colour=2, value=4000.0, low=20.0, high=9e5, note="uncertain", certain=False)
    drawn = [each.get("fill") for each in ElementTree.fromstring(speedups("s", [known, doubtful])).iter() if each.get("width")]
    assert drawn == ["var(--c1)"]
