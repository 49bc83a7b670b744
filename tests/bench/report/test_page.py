"""The report: one file, every figure with a text, nothing from the network."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deploy.bench.report import render
from deploy.bench.report.page import verdict

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


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
