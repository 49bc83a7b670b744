"""Axes of the figures."""

import xml.etree.ElementTree as ElementTree

import pytest

from deploy.bench.report.charts import WIDTH, Bar, _Log, durations, speedups


@pytest.mark.parametrize(
    ("low", "high"), [(0.05, 0.7), (31.0, 60.0), (200.0, 360.0), (990.0, 1560.0), (0.01, 1e6), (19.0, 32.0), (5.0, 5.1)]
)
def test_axes_have_enough_round_ticks_and_not_too_many(low: float, high: float) -> None:
    ticks = _Log(low, high, 0, 100).ticks()
    assert 2 <= len(ticks) <= 9
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
