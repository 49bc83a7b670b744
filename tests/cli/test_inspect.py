"""`deploy inspect`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.artifact.artifact import Artifact

Run = Callable[..., Any]


def test_inspect_prints_the_manifest_as_json_and_the_lineage_as_text(run: Run, folder: Path) -> None:
    assert run("export", "--arch", "mlp", "-o", "nets/net").status == 0
    assert run("convert", "nets/net", "--bf16", "-o", "nets/half").status == 0
    shown = run("inspect", "nets/half", "--json")
    assert json.loads(shown.out)["digest"] == Artifact.open("nets/half").manifest.digest
    assert shown.err == ""
    text = run("inspect", "nets/half").out
    assert "from       nets/net (fp32" in text
    assert "random: never trained" in text
    assert "SHA-256 verified" in text
