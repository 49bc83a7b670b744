"""The report: one file, every figure with a text, nothing from the network."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.bench.report import render
from deploy.bench.report.page import verdict
from tests.browser import CHROMIUM, browse, check_nothing_is_cut


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


def doubtful(document: dict[str, Any], batches: tuple[int, ...] = (1, 4)) -> dict[str, Any]:
    """The document as of a machine that was busy at these batch sizes."""
    changed: dict[str, Any] = json.loads(json.dumps(document))
    for row in changed["results"]:
        if row["batch"] in batches:
            verdict = "baseline" if row["verdict"] == "baseline" else "uncertain"
            row |= {"certain": False, "uncertain_because": "other programs used 0.9 of 2 cores", "verdict": verdict}
    changed["conditions"]["disturbance"].update(others_cores=0.9, fewer_threads=1)
    return changed


def test_nothing_is_the_fastest_where_other_programs_disturbed_it(document: dict[str, Any]) -> None:
    changed = doubtful(document)
    found = verdict(changed)
    assert found.startswith("At batch 1 the speed-up is uncertain, since other programs used 0.9 of 2 cores; at batch 4 ")
    assert "fast" not in found
    page = render(changed)
    warned = page.index(
        "Batches 1 and 4 are uncertain: other programs used 0.9 of 2 cores. No verdict is drawn from it. Run again"
    )
    assert warned < page.index("<h2>Speed-up")
    assert "or with --threads 1, which leaves 1 core to others" in page
    assert "on the front" not in page
    rows = changed["results"]
    assert not any(f"{row['speedup']:.2f} (" in page for row in rows)
    one = doubtful(document, (4,))
    one["results"][1] |= {"verdict": "faster", "certain": True}
    one["results"][2] |= {"verdict": "uncertain", "certain": False, "uncertain_because": "threads waited for a core"}
    assert "is fastest of what is certain" in verdict(one)


def test_what_was_not_run_and_what_may_be_wrong_comes_first(document: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(document))
    changed["interrupted"] = True
    changed["conditions"]["disturbance"]["not_measured"] = ["the waits of threads"]
    changed["skipped"] = [{"artifact": "build/net-trt", "backend": "tensorrt", "reason": "no GPU"}]
    page = render(changed)
    for text in (
        "Interrupted: this is what",
        "Not measured here: the waits of threads.",
        "Not run: build/net-trt on tensorrt: no GPU",
    ):
        assert 0 < page.index(text) < page.index("Speed-up")


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_cut_and_no_text_lies_on_another(document: dict[str, Any], tmp_path: Path, dark: bool) -> None:
    check_nothing_is_cut(render(doubtful(document, (4,))), tmp_path, dark=dark)


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
def test_it_is_drawn_by_a_browser_without_a_word_on_the_console(document: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(render(document), encoding="utf-8")
    shot = tmp_path / "shot.png"
    done = browse(tmp_path, "--window-size=1200,1600", f"--screenshot={shot}", f"file://{tmp_path / 'report.html'}", dark=False)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (1600, 1200, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
