"""Every figure has a text, and says what it is about."""

import json
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np

from deploy.bench.report import render


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
    assert "Billions of operations a second, under a roof of" in str(found[7].findtext("desc"))
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
