"""`deploy build-trt`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.artifact.artifact import Artifact
from tests.cli.helpers import refused

Run = Callable[..., Any]


def test_preflight_reads_the_model_and_builds_nothing(run: Run, folder: Path) -> None:
    run("export", "--arch", "lenet5")
    before = sorted(Path("build").iterdir())
    for options, share in (((), "100.0% fp32"), (("--fp16",), "100.0% fp16")):
        checked = run("build-trt", "--preflight", *options)
        assert checked.status == 0, checked.err
        assert re.fullmatch(
            rf"build/lenet5: tensorrt-rtx \S+ takes all \d+ nodes; {share} of the multiply-accumulates \(read from the network\)\n",
            checked.out,
        )
    assert sorted(Path("build").iterdir()) == before


def test_profiles_and_targets_of_the_command_line_are_shown(run: Run, folder: Path) -> None:
    run("export", "--arch", "lenet5")
    shapes = ("1x1x28x28:1x1x28x28:4x1x28x28", "8x1x28x28:16x1x28x28:64x1x28x28")
    options = [word for each in shapes for word in ("--shapes", f"input={each}")]
    built = run("build-trt", *options, "--target", "8.6", "--target", "8.9", "--workspace", "64")
    assert built.status == 0, built.err
    for each in shapes:
        assert f"shapes     input {each}\n" in built.out
    assert "built for  compute capability 8.6, 8.9\n" in built.out
    again = run("build-trt", *options, "--target", "8.6", "--target", "8.9", "--workspace", "64", "-o", "again", "--debug")
    assert "the same engine was made before: copied from" in again.err
    anew = run(
        "build-trt", *options, "--target", "8.6", "--target", "8.9", "--workspace", "64", "-o", "anew", "--no-cache", "--debug"
    )
    assert anew.status == 0, anew.err
    assert "copied from" not in anew.err


@pytest.mark.parametrize(("capability", "said"), [("9.0", True), ("8.9", False)])
def test_a_gpu_that_tensorrt_rtx_does_not_run_on_is_named_in_the_summary(
    run: Run, lenet5: Artifact, capability: str, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.cli.build_trt.gpu_identity", lambda: ["NVIDIA X", capability, "580"])
    built = run("build-trt", lenet5.path, "--flavour", "tensorrt-rtx", "-o", tmp_path / "out")
    assert built.status == 0, built.err
    line = "not here   TensorRT-RTX does not run on NVIDIA X (compute capability 9.0), but on 7.5, 8.0, 8.6, 8.9 and from 12.0 on"
    assert (line in built.out) == said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "sm89"), "compute capabilities such as 8.6"),
        (("--workspace", "0"), "--workspace must be 1 MiB or more"),
        (("--allow-slower",), "--allow-slower needs --int8"),
        (("--timing-cache", "timings"), "tensorrt-rtx times nothing while building"),
        (("--flavour", "tensorrt", "--target", "8.6"), "tensorrt"),
    ],
)
def test_build_options_that_cannot_be_meant(
    run: Run, lenet5: Artifact, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run("build-trt", lenet5.path, *options, "-o", tmp_path / "out")
    refused(done, 1 if "--flavour" in options else 2, message)
    assert not (tmp_path / "out").exists()
