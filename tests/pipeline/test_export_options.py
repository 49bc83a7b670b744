"""What to export must be said once, and options that cannot be meant are refused before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest

from deploy.errors import UsageError
from deploy.pipeline.export_options import ExportOptions

NET: dict[str, Any] = {"arch": "mlp"}
BARE: dict[str, Any] = {"onnx": Path("net.onnx")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of `arch`, `model` and `onnx`"),
        ({"arch": "mlp", "model": "net.py:Net"}, "one of `arch`, `model` and `onnx`"),
        ({**BARE, "arch": "mlp"}, "`onnx` takes the graph as it is; leave out `arch`"),
        ({**BARE, "opset": 20, "model_args": {"width": 3}}, "leave out `model_args`, `opset`"),
        ({**NET, "name": "a/b"}, "`name` must be a plain name, not 'a/b'"),
        ({**BARE, "name": ".."}, "`name` must be a plain name"),
        ({**NET, "match": "shape", "weights": Path("w.pth")}, "`match` must be name or order, not 'shape'"),
        ({**NET, "outputs": ("a", "")}, "`outputs` has an empty name"),
        ({**NET, "match": "order"}, "give one with `weights`"),
        ({**NET, "allow_partial": True}, "give one with `weights`"),
        ({**NET, "num_classes": 0}, "`num_classes` must be 1 or more, not 0"),
        ({**NET, "opset": 17}, "`opset` must be 18 to 25, not 17"),
        ({**NET, "expect_top1": 84.2}, "`expect_top1` needs `eval_folder`"),
        ({**BARE, "expect_top1": 84.2}, "`expect_top1` needs `eval_folder`"),
        ({**NET, "opset": 26}, "`opset` must be 18 to 25, not 26"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ExportOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {**BARE, "preprocess": "imagenet", "classes": Path("classes.txt"), "name": "net"},
        {**BARE, "eval_folder": Path("photos"), "expect_top1": 84.2},
        {**BARE, "inputs": ("x=Nx4",)},
        {**NET, "match": "order", "allow_partial": True, "weights": Path("w.pth")},
        {"model": "net.py:Net", "opset": 18, "num_classes": 1},
        {**NET, "opset": 25},
    ],
)
def test_options_that_go_together_are_taken(options: dict[str, Any]) -> None:
    taken = ExportOptions(**options)
    assert {name: getattr(taken, name) for name in options} == options


@pytest.mark.parametrize("given", [{"name": "a\udce9"}, {"outputs": ("a\udce9",)}, {"inputs": ("a\udce9=1x3x4x4",)}])
def test_names_that_are_not_utf8_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"the name a\\xe9.* is not UTF-8"):
        ExportOptions(arch="lenet5", **given)
