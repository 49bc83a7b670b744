"""`deploy tune`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.artifact.artifact import Artifact
from deploy.tune.page import render
from tests.cli.helpers import refused
from tests.tune.conftest import images as images
from tests.tune.conftest import net as net
from tests.tune.conftest import quick as quick

Run = Callable[..., Any]


@pytest.mark.usefixtures("quick")
def test_the_result_is_said_with_every_mix_in_the_terminal_in_json_and_on_a_page(
    run: Run, net: Artifact, images: Path, tmp_path: Path
) -> None:
    """Of a network whose last unit alone may be INT8."""
    out, html = tmp_path / "out", tmp_path / "reports" / "t.html"
    words = ("tune", net.path, "--calib", images / "calib", "--eval", images / "eval", "--max-drop", 40)
    words += ("--exclude", "stem*", "--exclude", "body*", "--backend", "onnxruntime", "--threads", 1, "-o", out)
    finished = run(*words, "--json", "--report", html)
    assert finished.status == 0, finished.err
    document = json.loads(finished.out)
    assert (document["schema"], document["artifact"], document["result"]) == (2, str(out), "int8")
    (unit,) = document["units"]
    assert (unit["nodes"], unit["int8"]) == (["pool", "head/Gemm"], True)
    assert 0 < unit["floating_time"] < 1
    (point,) = document["points"]
    assert unit["gain"] == pytest.approx(1 - point["predicted"])
    shown = run(*words)  # it stands
    assert shown.status == 0
    lines = shown.out.splitlines()
    speed = r"1\.10( times as fast as floating point)? \((1\.09 to 1\.11|uncertain.*)\)"
    assert re.match(rf"{out}: int8: 1 of 1 unit in INT8, {speed} on onnxruntime, batch 1", lines[0])
    assert lines[1] == f"  because    {document['because']}"
    assert re.match(rf"  int8 \*  1 of 1 +.* ms +.* ms +{speed} +{point['damage']:.2g} +.*inside", lines[-1])
    page = html.read_text(encoding="utf-8")
    assert page == render(Artifact.open(out))
    assert page.count("<title>int8</title>") == 1
    assert "<th>head</th>" in page
    assert f"  because    {document['because']}" in run("inspect", out).out


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
