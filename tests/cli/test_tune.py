"""`deploy tune`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.artifact.artifact import Artifact
from deploy.tune.page import render
from deploy.tune.text import text
from tests.cli.helpers import refused
from tests.tune.conftest import images as images
from tests.tune.conftest import net as net
from tests.tune.conftest import quick as quick

Run = Callable[..., Any]


@pytest.mark.usefixtures("quick")
def test_the_result_is_said_with_every_mix_in_the_terminal_in_json_and_on_a_page(
    run: Run, net: Artifact, images: Path, tmp_path: Path
) -> None:
    out, html = tmp_path / "out", tmp_path / "reports" / "t.html"
    words = ("tune", net.path, "--calib", images / "calib", "--eval", images / "eval", "--max-drop", 40, "--minutes", 1e-6)
    words += ("--backend", "onnxruntime", "--threads", 1, "-o", out, "--json", "--report", html)
    finished = run(*words)
    assert finished.status == 0, finished.err
    document = json.loads(finished.out)
    assert (document["schema"], document["artifact"], document["stopped"]) == (1, str(out), "minutes")
    assert document["result"] in [point["name"] for point in document["points"]]
    made = Artifact.open(out)
    shown = text(made)
    lines = shown.splitlines()
    assert re.match(rf"{out}: (int8|mix 1): \d of 3 units in INT8, 1\.\d0 times as fast as floating point", lines[0])
    assert lines[1] == f"  because    {document['because']}"
    assert "time ran out (--minutes)" in lines[2]
    rows = [line.split() for line in lines if line.startswith(("  fp32", "  int8", "  mix"))]
    assert len(rows) == 1 + len(document["points"])
    assert sum(" * " in line for line in lines) == 1
    page = html.read_text(encoding="utf-8")
    assert page == render(made)
    assert page.count("<title>int8</title>") == 1
    assert all(f"<th>{name}</th>" in page for name in ("stem", "body", "head"))
    assert "not measured" in page
    finished = run("inspect", out)
    assert f"  because    {document['because']}" in finished.out


def test_what_is_missing_or_wrong_is_said_in_a_line(run: Run, net: Artifact, images: Path, tmp_path: Path) -> None:
    calib, judged = ("--calib", images / "calib"), ("--eval", images / "eval")
    refused(run("tune", net.path, *judged), 2, "say which images to calibrate on: --calib IMAGEFOLDER")
    refused(run("tune", net.path, *calib), 2, "say which images the loss is measured on: --eval IMAGEFOLDER")
    refused(
        run("tune", net.path, *calib, *judged, "--max-drop", 0),
        2,
        "no number of images can show",
        "--max-drop must be more than 0",
    )
    refused(run("tune", net.path, *calib, *judged, "--backend", "eager"), 2, "mixes cannot be measured on eager")
    refused(run("tune", net.path, *calib, *judged, "--metric", "sqnr", "--max-drop", 1), 2, "the limit is --min-sqnr")
    refused(run("tune", net.path, *calib, "--eval", tmp_path / "nowhere"), 1, "nowhere")
