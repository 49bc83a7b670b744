"""`deploy convert`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.artifact.artifact import Artifact

Run = Callable[..., Any]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_newest_fp32_artifact_is_converted_into_a_folder_named_after_both(run: Run, folder: Path, precision: str) -> None:
    assert run("export", "--arch", "mlp").status == 0
    for _ in range(2):  # the second time, the newest artifact is no longer in FP32
        finished = run("convert", f"--{precision}")
        assert finished.status == 0, finished.err
        assert "using build/mlp\n" in finished.err
        assert finished.out.startswith(f"build/mlp-{precision}: ONNX, {precision}")
    assert Artifact.open(f"build/mlp-{precision}").root().manifest == Artifact.open("build/mlp").manifest


def test_options_of_the_conversion_arrive(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "lenet5").status == 0
    assert run("convert", "build/lenet5", "--fp16", "--fp16-io", "-o", "small").status == 0
    assert [str(spec) for spec in Artifact.open("small").manifest.inputs] == ["input: float16 batchx1x28x28"]
    refused = run("convert", "build/lenet5", "--bf16", "--fp16-io", "-o", "other")
    assert (refused.status, "--fp16-io needs" in refused.err) == (2, True), refused.err
    assert not Path("other").exists()
