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
    top1: float, p50_ms: float, spread: float = 0.02, images: int | None = 1000, certain: bool = True
) -> dict[str, Any]:
    speedup = 1 / p50_ms
    return {
        "top1": top1, "p50_ms": p50_ms, "top1_images": images, "certain": certain,
        "speedup": speedup, "speedup_low": speedup * (1 - spread), "speedup_high": speedup * (1 + spread),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("others", "on_front"),
    [
        ([candidate(98.6, 2.0)], [0]),  # one image better is chance
        ([candidate(98.9, 2.0)], [0]),  # five
        ([candidate(99.1, 2.0)], [0, 1]),  # six
        ([candidate(99.1, 2.0, images=None)], [0]),  # of how many images is not known
        ([candidate(99.1, 1.01)], [1]),  # as fast, and better
        ([candidate(98.6, 1.01)], [0]),  # as fast, and no better
        ([candidate(90.0, 0.5)], [0, 1]),  # faster and worse
        ([candidate(98.3, 0.5)], [1]),  # faster, and worse by chance alone
        ([candidate(99.9, 0.5, certain=False)], [0]),
        ([candidate(99.2, 2.0), candidate(99.4, 3.0), candidate(99.9, 4.0)], [0, 1, 3]),
    ],
)
def test_the_front_respects_intervals(others: list[dict[str, Any]], on_front: list[int]) -> None:
    rows = [candidate(98.5, 1.0), *others]
    assert sorted(rows.index(row) for row in front(rows)) == on_front  # type: ignore[arg-type]
