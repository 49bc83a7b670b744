"""Servers that pages start: each in a process of its own, stopped at the end."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np


@contextmanager
def serving(words: Sequence[str], folder: Path) -> Iterator[str]:
    """The address of the REST door of a server that is started in `folder`, and stopped at the end."""
    command = [sys.executable, "-m", "deploy", *words, "--http-port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = [json.loads(next(process.stderr)) for _ in range(3)]
        assert [line["message"] for line in lines] == ["loaded", "serving", "serving"]
        yield next(line["address"] for line in lines[1:] if line["door"] == "http")
    finally:
        process.terminate()
        process.communicate()
    assert process.returncode == 0


def check_answers(words: Sequence[str], folder: Path) -> None:
    """Serve a model of the scenes, and send a scene of them."""
    (artifact,) = words[1:]
    name, scenes = Path(artifact).name, folder / "scenes/val"
    with serving(words, folder) as address:
        if name.startswith("rangeseg"):
            feed = np.load(scenes / "ranges/0000.npz")
            given = {each: feed[each][None] for each in ("distance", "intensity")}
            inputs = [
                {"name": each, "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()} for each, x in given.items()
            ]
            task, key, body = "infer", "outputs", json.dumps({"inputs": inputs}).encode()
        else:
            task, key = ("detect", "boxes") if name.startswith("detector") else ("segment", "mask")
            body = (scenes / "images/0000.png").read_bytes()
        with urllib.request.urlopen(f"{address}/v2/models/{name}/{task}", body, timeout=30) as answer:
            assert json.load(answer)[key] is not None
