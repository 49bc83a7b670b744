"""The report: one file, every figure with a text, nothing from the network."""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.artifact.artifact import Artifact
from deploy.bench.bench import bench
from deploy.bench.candidate.loadgen import Scenario
from deploy.bench.candidate.traffic import Load
from deploy.bench.options import BenchOptions
from deploy.bench.report import render
from deploy.bench.report.charts import _Log
from deploy.bench.report.page import verdict

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def document(shared_lenet5: Artifact, half: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("loadgen")
    options = BenchOptions(
        backends=("onnxruntime", "null"), batches=(1, 4), seconds=0.6, layers=True, load_seconds=0.2, logs=folder,
        loads=(Load(concurrency=2),), scenarios=(Scenario(name="single-stream"), Scenario(name="server", target_qps=500, target_ms=0.001)),
    )  # fmt: skip
    found: dict[str, Any] = json.loads(json.dumps(bench([shared_lenet5, half], options).to_json()))
    for index, row in enumerate(found["results"]):
        row["top1"], row["top5"], row["accuracy_from"] = 98.0 + 0.1 * (index % 3), 100.0, "measured"
    return found


def figures(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_every_figure_is_there_and_says_in_words_what_it_shows(document: dict[str, Any]) -> None:
    found = figures(render(document))
    titles = [figure.findtext("title") for figure in found]
    assert titles == ["Batch 1", "Batch 4"] * 2 + [
        "Throughput against batch size",
        "Accuracy against latency, batch 1",
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


@pytest.mark.parametrize(
    ("low", "high"), [(0.05, 0.7), (31.0, 60.0), (200.0, 360.0), (990.0, 1560.0), (0.01, 1e6), (19.0, 32.0), (5.0, 5.1)]
)
def test_axes_have_enough_round_ticks_and_not_too_many(low: float, high: float) -> None:
    ticks = _Log(low, high, 0, 100).ticks()
    assert 2 <= len(ticks) <= 9
    assert all(low <= tick <= high for tick in ticks)
    assert all(len(f"{tick:.4g}") <= 6 for tick in ticks)


def test_nothing_is_fetched_and_no_script_is_run(document: dict[str, Any]) -> None:
    page = render(document)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(" not in page
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    assert len(page) < 300_000


def test_names_are_text_and_never_markup(document: dict[str, Any]) -> None:
    evil = json.loads(json.dumps(document).replace(document["results"][0]["artifact"], "build/<b>net&"))
    page = render(evil)
    assert "<b>net" not in page
    assert "&lt;b&gt;net&amp;" in page


def test_the_verdict_is_one_sentence_about_the_ends(document: dict[str, Any]) -> None:
    text = verdict(document)
    assert text.startswith("At batch 1 ")
    assert "; at batch 4 " in text
    assert text.count(".") - len(re.findall(r"\d\.\d", text)) == 1
    for row in document["results"]:
        assert row["verdict"] in ("baseline", "faster", "slower", "no difference")
    slow = json.loads(json.dumps(document))
    for row in slow["results"]:
        row["verdict"] = "baseline" if row["verdict"] == "baseline" else "slower"
    assert verdict(slow) == "At batch 1 nothing is faster than eager PyTorch; at batch 4 nothing is faster than eager PyTorch."
    slow["results"] = [row for row in slow["results"] if row["verdict"] == "baseline"]
    slow.update(loads=[], scenarios=[], layers=[])
    assert verdict(slow) == "Nothing was measured beside eager PyTorch."
    assert render(slow)


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
    [(1, 1, 1, ("1 core, 1 thread<", "<td>1 caller<")), (2, 1, 2, ("2 cores, 1 thread<", "<td>2 callers<"))],
)
def test_one_is_no_plural(document: dict[str, Any], cores: int, threads: int, callers: int, shown: tuple[str, str]) -> None:
    changed = json.loads(json.dumps(document))
    changed["conditions"].update(cores=cores, threads=threads)
    for row in changed["loads"]:
        row["concurrency"] = callers
    page = render(changed)
    assert all(text in page for text in shown)


def test_artifacts_of_one_base_name_are_told_apart(document: dict[str, Any]) -> None:
    twins = json.loads(json.dumps(document).replace(f'{half_name(document)}"', 'elsewhere/lenet5"'))
    titles = [figure.findtext("title") for figure in figures(render(twins))]
    assert "elsewhere/lenet5 fp16, onnxruntime, batch 1" in titles
    assert "lenet5 fp32, onnxruntime, batch 1" not in titles


def half_name(document: dict[str, Any]) -> str:
    return next(row["artifact"] for row in document["results"] if row["precision"] == "fp16")


def test_loads_and_verdicts_are_tables_and_what_was_invalid_says_why(document: dict[str, Any]) -> None:
    page = render(document)
    loads, judged = page.index("<h2>Under load"), page.index("<h2>MLPerf LoadGen")
    assert "2 callers" in page[loads:judged]
    assert "VALID" in page[judged:]
    assert "single-stream" in page[judged:]
    assert "server: performance constraints not satisfied" in page[judged:]
    without = render({**document, "loads": [], "scenarios": [], "layers": []})
    assert not {"Under load", "MLPerf LoadGen", "<h2>Layers"} & set(re.findall(r"Under load|MLPerf LoadGen|<h2>Layers", without))


def test_what_was_not_run_and_what_may_be_wrong_comes_first(document: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(document))
    changed["interrupted"] = True
    changed["conditions"]["load_average"] = [50.0, 1.0, 1.0]
    changed["skipped"] = [{"artifact": "build/net-trt", "backend": "tensorrt", "reason": "no GPU"}]
    page = render(changed)
    for text in ("Interrupted: this is what", "The machine was busy", "Not run: build/net-trt on tensorrt: no GPU"):
        assert 0 < page.index(text) < page.index("Speed-up")


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_it_is_drawn_by_a_browser_without_a_word_on_the_console(
    document: dict[str, Any], tmp_path: Path, width: int, dark: bool
) -> None:
    (tmp_path / "report.html").write_text(render(document), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1600",
        f"--screenshot={tmp_path / 'shot.png'}", f"file://{tmp_path / 'report.html'}",
    ]  # fmt: skip
    if dark:
        command.insert(1, "--force-dark-mode")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    with Image.open(tmp_path / "shot.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (1600, width, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
