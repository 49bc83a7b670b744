"""What to export and how. Imports none of the libraries that do it."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from deploy.artifact.preprocess import PRESETS
from deploy.errors import UsageError
from deploy.intake.options import Match
from deploy.options import option
from deploy.words import is_utf8, printable


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export and how. Exactly one of `arch`, `model` and `onnx`.

    model_args: keyword arguments of the factory.
    inputs, outputs: by position. With `onnx`, NAME=SHAPE of inputs whose rank the file does not say.
    opset: 18 to 25.
    """

    arch: str | None = option(None, "A reference architecture, torchvision:NAME or timm:NAME.", metavar="NAME")
    model: str | None = option(None, "Your own module: FILE.py:FACTORY or pkg.mod:FACTORY.", metavar="FILE.py:FACTORY")
    onnx: Path | None = option(None, "Make an artifact of a bare ONNX file.", metavar="FILE.onnx")
    model_args: Mapping[str, Any] = option({}, "Argument of the factory; may be repeated.", flag="--model-arg", metavar="K=V")
    weights: Path | None = option(
        None, ".pt, .pth, .bin, .safetensors, .npz, or an index of shards.", metavar="FILE", default="seeded random weights"
    )
    match: Match = option("name", "How tensors are paired.")
    allow_partial: bool = option(False, "Load the tensors that fit, and say which did not.")
    num_classes: int | None = option(None, "Classes of the head.", metavar="N", default="read from the checkpoint's head")
    inputs: tuple[str, ...] = option(
        (),
        "An input, by position; a letter is a dynamic dimension.",
        flag="--input",
        metavar="NAME=1x3x224x224[:dtype[LOW,HIGH]]",
    )
    outputs: tuple[str, ...] = option((), "Name of an output, by position.", flag="--output", metavar="NAME")
    static_batch: bool = option(False, "Keep the leading 1 as it is, instead of a dynamic batch.")
    preprocess: str | None = option(
        None,
        f"How an image becomes the input: {', '.join(PRESETS)}, a JSON file, or a function of yours, which goes into the artifact;"
        " of several inputs, INPUT=NAME,INPUT=NAME.",
        metavar="NAME|FILE.json|FILE.py:FUNCTION",
    )
    exif_orientation: bool = option(
        False, "First turn images upright by their EXIF orientation.", default="left as stored, as by torchvision's ImageFolder"
    )
    decode: str | None = option(
        None,
        "How a detector's outputs become boxes: yolo, ssd, or a function of yours, which goes into the artifact.",
        metavar="yolo|ssd|FILE.py:FUNCTION",
    )
    classes: Path | None = option(None, "Class names, one a line.", metavar="FILE")
    data: Path | None = option(None, "Check parity on real input too: an ImageFolder, or a folder of .npz feeds.", metavar="DIR")
    eval_folder: Path | None = option(
        None, "Measure accuracy on it, and keep it in the manifest.", flag="--eval", metavar="IMAGEFOLDER"
    )
    expect_top1: float | None = option(
        None,
        "Fail where this top-1, which training reported, is above the 95 % interval of that on --eval.",
        metavar="PERCENT",
    )
    opset: int | None = option(None, "ONNX opset.", metavar="N", default="PyTorch's")
    name: str | None = option(None, "The artifact's name.", metavar="NAME", default="the last part of DIR")

    def __post_init__(self) -> None:
        if self.name is not None and (self.name in ("", ".", "..") or Path(self.name).name != self.name):
            raise UsageError(
                f"`name` must be a plain name, not {self.name!r}: it is also the name of the folder and of the served model"
            )
        odd = next((text for text in (self.name or "", *self.inputs, *self.outputs) if not is_utf8(text)), None)
        if odd is not None:
            raise UsageError(f"the name {printable(odd)} is not UTF-8, and ONNX and manifests hold nothing else")
        if "" in self.outputs:
            raise UsageError("`outputs` has an empty name: an output needs one")
        if self.expect_top1 is not None and self.eval_folder is None:
            raise UsageError("`expect_top1` needs `eval_folder`, the images that accuracy is measured on")
        if self.onnx is not None:
            self._check_bare()
        elif (self.arch is None) == (self.model is None):
            raise UsageError("name what to export: one of `arch`, `model` and `onnx`")
        if self.match not in get_args(Match):
            raise UsageError(f"`match` must be name or order, not {self.match!r}")
        if self.weights is None and (self.allow_partial or self.match != "name"):
            raise UsageError("`match` and `allow_partial` say how to load a checkpoint: give one with `weights`")
        if self.num_classes is not None and self.num_classes < 1:
            raise UsageError(f"`num_classes` must be 1 or more, not {self.num_classes}")
        if self.opset is not None and not 18 <= self.opset <= 25:
            raise UsageError(f"`opset` must be 18 to 25, not {self.opset}")

    def _check_bare(self) -> None:
        """Raise UsageError for what says how to make a graph, where there is one already."""
        taken = (
            "onnx",
            "inputs",
            "preprocess",
            "exif_orientation",
            "decode",
            "classes",
            "data",
            "eval_folder",
            "expect_top1",
            "name",
        )
        unfit = [
            f"`{each.name}`" for each in fields(self) if each.name not in taken and getattr(self, each.name) != _default(each)
        ]
        if unfit:
            raise UsageError(f"`onnx` takes the graph as it is; leave out {', '.join(unfit)}")


def _default(each: "Field[Any]") -> Any:
    return each.default_factory() if each.default_factory is not MISSING else each.default
