"""Every figure has a text, and says what it is about."""

import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np
import pytest

from deploy.bench.report import render
from deploy.bench.report.figures import front


def figures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_every_figure_is_there_and_says_in_words_what_it_shows(document: dict[str, Any]) -> None:
    found = figures(render(document))
    titles = [figure.findtext("title") for figure in found]
    assert titles == ["Batch 1", "Batch 4"] * 2 + [
        "Throughput against batch size",
        "top-1 against latency, batch 1",
        "Batch 1",
        "Batch 4",
        "lenet5 fp32, eager, batch 1",
        "lenet5 fp32, onnxruntime, batch 1",
        "lenet5-half fp16, onnxruntime, batch 1",
    ]
    assert "Billions of operations a second, and the roof of each: " in str(found[7].findtext("desc"))
    assert "Time by layer, the longest first: " in str(found[-1].findtext("desc"))
    for figure in found:
        assert figure.get("role") == "img"
        said = figure.findtext("desc")
        assert said
        assert "onnxruntime" in said or "Time by layer" in said
        numbers = [
            float(value)
            for key in ("x", "y", "cx", "cy", "x1", "y1", "width")
            for each in figure.iter()
            if (value := each.get(key))
        ]
        assert numbers
        assert all(np.isfinite(numbers))


def test_artifacts_of_one_base_name_are_told_apart(document: dict[str, Any]) -> None:
    twins = json.loads(json.dumps(document).replace(f'{half_name(document)}"', 'elsewhere/lenet5"'))
    titles = [figure.findtext("title") for figure in figures(render(twins))]
    assert "elsewhere/lenet5 fp16, onnxruntime, batch 1" in titles
    assert "lenet5 fp32, onnxruntime, batch 1" not in titles


def half_name(document: dict[str, Any]) -> str:
    return next(row["artifact"] for row in document["results"] if row["precision"] == "fp16")


def candidate(
    lost: float | None,
    p50_ms: float,
    *,
    certain: bool = True,
    chance: float | None = 0.3,
    parent: float = 98.5,
    lower: bool = False,
) -> dict[str, Any]:
    """A row that lost points of a baseline with 98.5, give or take `chance`; None: the baseline itself."""
    speedup = 1 / p50_ms
    value = parent + (lost or 0.0) * (1 if lower else -1)
    score: dict[str, Any] = {
        "metric": "m", "value": value, "unit": "%", "lower": lower, "low": None, "high": None, "parent": None, "loss": None, "loss_low": None, "loss_high": None,
    }  # fmt: skip
    if lost is not None:
        score |= {"parent": parent, "loss": lost}
    if chance is not None:
        score |= {"low": value - 5 * chance, "high": value + 5 * chance}
        if lost is not None:
            score |= {"loss_low": lost - chance, "loss_high": lost + chance}
    return {
        "score": score, "p50_ms": p50_ms, "certain": certain,
        "speedup": speedup, "speedup_low": speedup * 0.98, "speedup_high": speedup * 1.02,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("others", "on_front"),
    [
        ([candidate(-0.2, 2.0)], [0]),  # better by chance
        ([candidate(-0.4, 2.0)], [0, 1]),  # the interval of the loss shows it, that of the score would not
        ([candidate(-0.4, 2.0, chance=None)], [0]),  # without an interval nothing shows it
        ([candidate(-0.4, 2.0, lower=True)], [0, 1]),  # a loss is a loss, whichever way the metric goes
        ([candidate(-0.4, 1.01)], [1]),  # as fast, and better
        ([candidate(-0.2, 1.01)], [0]),  # as fast, and no better
        ([candidate(9.0, 0.5)], [0, 1]),  # faster and worse
        ([candidate(0.2, 0.5)], [1]),  # faster, and worse by chance alone
        ([candidate(-2.0, 0.5, certain=False)], [0]),
        ([candidate(-0.6, 2.0), candidate(-0.8, 3.0), candidate(-1.4, 4.0)], [0, 1, 3]),
        ([candidate(-0.4, 2.0, parent=99.5)], [0]),  # a loss to something else: the scores count, 97 to 100 and 98.4 to 101.4
        ([candidate(-0.4, 2.0, parent=101.5)], [0, 1]),
    ],
)
def test_the_front_respects_intervals(others: list[dict[str, Any]], on_front: list[int]) -> None:
    rows = [candidate(None, 1.0), *others]
    assert sorted(rows.index(row) for row in front(rows)) == on_front  # type: ignore[arg-type]


@pytest.mark.parametrize(("lower", "on_front"), [(False, [0]), (True, [0, 1])])
def test_less_is_better_on_the_front_where_the_metric_says_so(lower: bool, on_front: list[int]) -> None:
    rows = [candidate(None, 1.0, parent=parent, lower=lower) for parent in (40.0, 30.0)]
    rows[1] |= {"p50_ms": 2.0, "speedup_low": 0.49, "speedup_high": 0.51}
    assert sorted(rows.index(row) for row in front(rows)) == on_front  # type: ignore[arg-type]
