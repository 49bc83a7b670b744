"""`deploy doctor`."""

import json
import shutil
from collections.abc import Callable
from typing import Any

Run = Callable[..., Any]


def test_doctor_names_every_backend_and_what_is_missing(run: Run) -> None:
    report = json.loads(run("doctor", "--json").out)
    backends = {entry["name"]: entry for entry in report["backends"]}
    variants = {"onnxruntime:cuda", "onnxruntime:tensorrt"}
    assert set(backends) == {"onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "aoti", "eager", "compile", "null"} | variants
    assert backends["openvino"]["available"]
    for name in ("tensorrt", "tensorrt-rtx", *variants):
        if not backends[name]["available"]:
            assert "deploy[gpu]" in backends[name]["reason"] or "NVIDIA GPU" in backends[name]["reason"]
    flavours = {entry["name"]: entry for entry in report["flavours"]}
    assert flavours["tensorrt-rtx"]["available"]
    if not flavours["tensorrt"]["available"]:
        assert "deploy[gpu]" in flavours["tensorrt"]["reason"] or "GPU" in flavours["tensorrt"]["reason"]
    assert backends["aoti"]["version"] == backends["eager"]["version"]
    assert (report["compiler"], report["compiler_missing"]) == (shutil.which("g++"), None)
    text = run("doctor").out
    assert f"\nC++       {shutil.which('g++')}\n" in text
    assert "openvino" in text
    assert "tensorrt-rtx" in text
