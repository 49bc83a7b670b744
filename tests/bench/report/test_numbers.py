"""The tables, the lineage and the conditions of the report."""

import html
import json
import re
from typing import Any

import pytest

from deploy.artifact.artifact import Artifact
from deploy.bench.report import render


def test_lineage_and_conditions_are_told(document: dict[str, Any], half: Artifact) -> None:
    page = render(document)
    lineage = page[page.index("Lineage") :]
    assert lineage.index("<b>lenet5</b> ONNX, fp32") < lineage.index(f"<b>{half.manifest.name}</b> ONNX, fp16")
    assert "random weights" in lineage
    assert "parity: max abs" in lineage
    for word in ("processor", "governor", "load average", "versions", "git revision"):
        assert f"<dt>{word}</dt>" in lineage


@pytest.mark.parametrize(
    ("cores", "threads", "callers", "shown"),
    [(1, 1, 1, ("1 core, 1 thread<", ">1 caller<")), (2, 1, 2, ("2 cores, 1 thread<", ">2 callers<"))],
)
def test_one_is_no_plural(document: dict[str, Any], cores: int, threads: int, callers: int, shown: tuple[str, str]) -> None:
    changed = json.loads(json.dumps(document))
    changed["conditions"].update(cores=cores, threads=threads)
    for row in changed["loads"]:
        row["concurrency"] = callers
    page = render(changed)
    assert all(text in page for text in shown)


def test_the_conditions_say_what_limits_us_and_what_others_did(document: dict[str, Any]) -> None:
    page = render(document)
    assert "<dt>CPU limit</dt>" in page
    changed = json.loads(json.dumps(document))
    changed["conditions"]["cpu_limit"] = 1.5
    changed["conditions"]["disturbance"] |= {"others_cores": 0.94, "waited_share": 0.125, "cores": 2, "repeated_rounds": 3}
    page = render(changed)
    assert "<dd>1.5 cores, by control groups</dd>" in page
    assert "0.94 of 2 cores, the baseline&#x27;s threads waited for a core in 12.5% of the time; 3 rounds measured" in page
    changed["conditions"]["disturbance"] |= {"others_cores": None, "waited_share": None, "repeated_rounds": 1}
    changed["conditions"]["disturbance"] |= {"handoff_us": [0.16, 0.18], "step_ns": [9.8, 10.9]}
    assert "<dt>cores</dt><dd>10.9 ns for a step of an interpreter's loop, 0.16 us from core to core</dd>" in html.unescape(
        render(changed)
    )
    assert "<dd>not measured; 1 round measured again</dd>" in render(changed)


def test_what_matters_comes_first_and_every_cell_knows_its_column(document: dict[str, Any]) -> None:
    page = render(document)
    table = page[page.index("<h2>All figures") :]
    head = re.findall(r"<th>([^<]*)</th>", table)
    assert head[:8] == ["", "batch", "speed-up", "p50 ms", "p99", "images/s", "top-1", "error"]
    rows = re.findall(r"<tr><th scope=row>.*?</tr>", table)
    assert len(rows) == len(document["results"])
    assert all(re.findall(r'<td data-name="([^"]*)">', row) == head[1:] for row in rows)


def test_loads_and_verdicts_are_tables_and_what_was_invalid_says_why(document: dict[str, Any]) -> None:
    page = render(document)
    loads, judged = page.index("<h2>Under load"), page.index("<h2>MLPerf LoadGen")
    assert "2 callers" in page[loads:judged]
    assert "VALID" in page[judged:]
    assert "single-stream" in page[judged:]
    assert "server: performance constraints not satisfied" in page[judged:]
    without = render({**document, "loads": [], "scenarios": [], "layers": []})
    assert not {"Under load", "MLPerf LoadGen", "<h2>Layers"} & set(re.findall(r"Under load|MLPerf LoadGen|<h2>Layers", without))
