"""Top-1 in INT8, ours and the peers', on the same images: EfficientNet-Lite0 and nets trained on Fashion-MNIST.

    python benchmarks/train_fashion.py --data /usr/share/datasets/fashion-mnist
    python benchmarks/int8_accuracy.py [--photos IMAGEFOLDER] [--fashion build/fashion] [--peers PYTHON] [CASE]...

Every tool calibrates on the same images (at most 512), and every result runs on ONNX Runtime's CPU provider, on the same eval
images. PHOTOS holds 1,000 photographs, one in each folder, the folders being the ImageNet classes in order (those of the
public repository EliSchwartz/imagenet-sample-images, say): 200 to calibrate on, 800 to evaluate. Goals: default settings
lose at most 0.5 point, and are nowhere worse than the best peer beyond the 95 % interval of the paired difference;
`rescaled` is `mobilenet_v1` with its channels multiplied by 2^-4 to 2^4 without changing the function: per-tensor weights
recover to within 1 point of per-channel ones.

The results keep, for each tool, which images it gained and lost against FP32: a later run can be paired with them.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from bench_harness import (
    Goal,
    add_peers,
    bullets,
    check_peers,
    conditions_here,
    conditions_line,
    make_parser,
    markdown,
    our_command,
    pack,
    peer_command,
    publish,
    run,
    unpack,
)
from lite0 import PREPROCESS, weights
from torch import nn
from train_fashion import NETS, Net

import deploy
from deploy.artifact.artifact import Artifact
from deploy.calibration.imagefolder import Sample, batches, scan
from deploy.models import registry
from deploy.precision.int8.options import METHOD

IMAGES = 512
PHOTOS_CALIB = 200
FP32 = "fp32"
LITE0 = "efficientnet-lite0"
RESCALED = "rescaled"
OURS: dict[str, tuple[str, ...]] = {
    f"deploy {method}": ("--method", method) for method in ("max", "percentile", "mse", "entropy")
}
UNEQUALIZED = "deploy per-tensor, no equalization"
PER_TENSOR_DEFAULT = "deploy per-tensor"
PER_TENSOR: dict[str, tuple[str, ...]] = {
    PER_TENSOR_DEFAULT: ("--per-tensor",),
    UNEQUALIZED: ("--per-tensor", "--no-equalize"),
}
DEFAULT = f"deploy {METHOD}"
PEERS = (
    "onnxruntime-minmax",
    "onnxruntime-entropy",
    "onnxruntime-percentile",
    "modelopt-max",
    "modelopt-entropy",
    "nncf",
    "nncf-mixed",
)
PLAIN = "onnxruntime-minmax-tensor"
GOAL_DROP, GOAL_PER_TENSOR = 0.5, 1.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One net with its images. Labels of `eval` are the model's classes."""

    name: str
    artifact: Artifact
    calib: Path
    eval: tuple[Sample, ...]


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Accuracy of `a` less that of `b` in points, with the ends of its 95 % interval.

    Both are changes against FP32 by image: 1 for one that is now classified right, -1 for one that is now wrong, else 0.
    For matched pairs, Wald's interval with half an image added to each of the four cells: Agresti & Min 2005, "Simple
    improved confidence intervals for comparing matched proportions", Statistics in Medicine 24(5).
    """
    gained, lost, count = int((a > b).sum()), int((a < b).sum()), len(a) + 2
    centre = (gained - lost) / count
    half = 1.96 * np.sqrt(gained + lost + 1 - (gained - lost) ** 2 / count) / count
    return 100 * (gained - lost) / len(a), 100 * (centre - half), 100 * (centre + half)


def score(model: Path, feeds: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Whether each image is classified right, (N,) bool."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: images})[0].argmax(1) == labels for images, labels in feeds])


def rescale(module: nn.Module, seed: int = 0) -> None:
    """Multiply the channels between convolutions by powers of two, in place, without changing the function.

    For nets whose layers follow one another with nothing but ReLU, max(0, x), between them: s max(0, x) = max(0, s x).
    """
    generator = np.random.default_rng(seed)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.BatchNorm2d)]
    with torch.no_grad():
        for norm, after in zip(layers[1::2], layers[2::2], strict=False):
            assert isinstance(norm, nn.BatchNorm2d)
            assert isinstance(after, nn.Conv2d)
            factor = torch.from_numpy(2.0 ** generator.integers(-4, 5, norm.num_features)).float()
            norm.weight *= factor
            norm.bias *= factor
            after.weight /= factor[:, None, None, None] if after.groups > 1 else factor[None, :, None, None]


def fashion_case(name: str, cache: Path, work: Path) -> Case:
    net: Net = NETS["mobilenet_v1" if name == RESCALED else name]
    options = net.export_options(cache, "mobilenet_v1" if name == RESCALED else name)
    if not options["weights"].exists():
        sys.exit(f"no weights at {options['weights']}: run benchmarks/train_fashion.py first")
    if name == RESCALED:
        module = registry.create(net.arch, num_classes=options["num_classes"], **net.args)
        module.load_state_dict(torch.load(options["weights"], weights_only=True))
        rescale(module)
        options["weights"] = work / "rescaled.pth"
        torch.save(module.state_dict(), options["weights"])
    artifact = deploy.export(work / FP32, **options)
    return Case(name=name, artifact=artifact, calib=cache / "calib", eval=scan(cache / "eval").samples)


def photos_case(photos: Path, nets: Path, work: Path) -> Case:
    if not weights(nets).exists():
        sys.exit(f"no weights at {weights(nets)}: `make peers` installs them, or name their folder with --nets")
    samples = scan(photos).samples
    if len(samples) != 1000 or len({label for _, label in samples}) != 1000:
        sys.exit(f"{photos} must hold 1,000 folders, the ImageNet classes in order, with one photograph each")
    order = np.random.default_rng(0).permutation(1000)
    for index in order[:PHOTOS_CALIB]:
        path, label = samples[index]
        (work / "calib" / f"{label:03}").mkdir(parents=True)
        os.symlink(path.absolute(), work / "calib" / f"{label:03}" / path.name)
    preprocess = work / "preprocess.json"
    preprocess.write_text(json.dumps(PREPROCESS), encoding="utf-8")
    artifact = deploy.export(
        work / FP32,
        model=f"{Path(__file__).with_name('lite0.py')}:lite0",
        model_args={"nets": str(nets.absolute())},
        weights=weights(nets),
        inputs=["input=1x3x224x224"],
        outputs=["logits"],
        preprocess=str(preprocess),
    )
    return Case(
        name=LITE0,
        artifact=artifact,
        calib=work / "calib",
        eval=tuple(samples[index] for index in sorted(order[PHOTOS_CALIB:])),
    )


def measure(
    case: Case, ours: dict[str, tuple[str, ...]], tools: Sequence[str], peers: Path, work: Path
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Whether each eval image is classified right, by tool, `fp32` first; and the tools that refused to write a file, with the reason."""
    preprocess = case.artifact.manifest.preprocess
    assert preprocess is not None
    feeds = list(batches(case.eval, preprocess.open, 32))
    calib = scan(case.calib)
    samples = calib.sample(min(IMAGES, len(calib.samples)))
    refused: dict[str, str] = {}
    right = {FP32: score(case.artifact.onnx_path, feeds)}
    print(f"{case.name}: fp32 {100 * right[FP32].mean():.2f} %", flush=True)
    for tool in (*ours, *tools):
        out = work / "out"
        out.mkdir()
        if tool in ours:
            made = out / "int8" / "model.onnx"
            command = our_command(case.artifact.location, case.calib, len(samples), made.parent, *ours[tool])
        else:
            made = out / "int8.onnx"
            command = peer_command(peers, tool, case.artifact.onnx_path, samples, preprocess.to_json(), made)
        # If plain quantization breaks the net, our own parity check refuses to write the file: that is a result too.
        done = run(command, work / "cache", may_fail=tool == UNEQUALIZED)
        if done.status == 0:
            right[tool] = score(made, feeds)
            print(f"{case.name}: {tool} {100 * right[tool].mean():.2f} %", flush=True)
        elif "nothing was written" not in done.output:
            sys.exit(f"{' '.join(command)} failed:\n{done.output}")
        else:
            refused[tool] = done.output.strip().splitlines()[0]
            print(f"{case.name}: {tool} refused: {refused[tool]}", flush=True)
        shutil.rmtree(out)
    return right, refused


def summary(right: Mapping[str, np.ndarray], refused: Mapping[str, str]) -> dict[str, Any]:
    """Top-1 by tool, the images that each gained and lost against FP32 (see `pack`), and the tools that refused to write a file."""
    fp32 = right[FP32]
    return {
        "images": len(fp32),
        "top1": {tool: 100 * float(flags.mean()) for tool, flags in right.items()},
        "gained": {tool: pack(flags & ~fp32) for tool, flags in right.items()},
        "lost": {tool: pack(fp32 & ~flags) for tool, flags in right.items()},
        "refused": dict(refused),
    }


def changes(case: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """By tool, the change of each image against FP32, as `difference` takes it, (N,) int8."""
    count = case["images"]
    return {
        tool: unpack(case["gained"][tool], count).astype(np.int8) - unpack(case["lost"][tool], count).astype(np.int8)
        for tool in case["top1"]
    }


def points(values: Sequence[float]) -> str:
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*values)


def table(case: Mapping[str, Any]) -> str:
    rows = []
    changed = changes(case)
    for tool, top1 in case["top1"].items():
        against_fp32, against_ours = "", ""
        if tool != FP32:
            against_fp32 = points(difference(changed[tool], changed[FP32]))
            if DEFAULT in changed and tool != DEFAULT:
                against_ours = points(difference(changed[DEFAULT], changed[tool]))
        rows.append([tool + (" (default)" if tool == DEFAULT else ""), f"{top1:.2f} %", against_fp32, against_ours])
    return markdown(["", "top-1", "against FP32", "our default against it"], rows)


def goals(name: str, case: Mapping[str, Any]) -> list[object]:
    """The figures beside their goals, and the tools that refused to write a file."""
    changed, top1 = changes(case), case["top1"]
    lines: list[object] = []
    if DEFAULT in changed:
        drop = difference(changed[DEFAULT], changed[FP32])
        whole, value = drop[1] >= -GOAL_DROP, drop[0] >= -GOAL_DROP
        met = "met" if whole else "met by the value, not by the whole interval" if value else "NOT met"
        lines.append(f"{points(drop)} points against FP32 (goal: at most {GOAL_DROP} lost): {met}")
        if rivals := [tool for tool in top1 if tool in PEERS]:
            best = max(rivals, key=lambda tool: top1[tool])
            ahead = difference(changed[DEFAULT], changed[best])
            text = f"{points(ahead)} points against the best peer, {best} (goal: not worse beyond the interval)"
            lines.append(Goal(text=text, met=ahead[2] >= 0))
        if name == RESCALED and PER_TENSOR_DEFAULT in top1:
            behind = top1[DEFAULT] - top1[PER_TENSOR_DEFAULT]
            text = f"per-tensor {behind:.2f} points behind per-channel (goal: at most {GOAL_PER_TENSOR:g})"
            lines.append(Goal(text=text, met=behind <= GOAL_PER_TENSOR))
    return lines + [f"{tool}: refused, no file written: {why}" for tool, why in case["refused"].items()]


def section(name: str, case: Mapping[str, Any]) -> str:
    return f"\n## {name}: {case['images']:,} images\n\n{table(case)}\n{bullets(goals(name, case))}"


def report(document: Mapping[str, Any]) -> str:
    sections = "".join(section(name, case) for name, case in document["cases"].items())
    intervals = "Points with 95 % intervals of the paired difference on the same images. All on ONNX Runtime's CPU provider."
    return f"# Top-1 in INT8\n{sections}\n{intervals}\n{conditions_line(document['conditions'])}"


def measure_case(name: str, options: argparse.Namespace, peers: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if name == LITE0:
            case = photos_case(options.photos, options.nets or peers.parents[1] / "nets", work)
        else:
            case = fashion_case(name, options.fashion, work)
        ours = {} if options.only == "peers" else OURS | (PER_TENSOR if name == RESCALED else {})
        tools = () if options.only == "ours" else (*PEERS, *((PLAIN,) if name == RESCALED else ()))
        return summary(*measure(case, ours, tools, peers, work))


def main() -> None:
    names = (*NETS, RESCALED, LITE0)
    parser = make_parser(__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument("--photos", type=Path, help="ImageFolder of 1,000 ImageNet photographs")
    parser.add_argument("--fashion", type=Path, default=Path("build/fashion"), help="of train_fashion.py (default: %(default)s)")
    parser.add_argument(
        "--nets", type=Path, help="folder of the EfficientNet-Lite0 packages (default: nets beside the peers' bin)"
    )
    parser.add_argument("--only", choices=("ours", "peers"), help="leave the others out")
    add_peers(parser)
    options = parser.parse_args()
    if unknown := [name for name in options.cases if name not in names]:
        parser.error(f"unknown case {', '.join(unknown)}; expected {', '.join(names)}")
    peers = check_peers(options.peers)
    document: dict[str, Any] = {"conditions": conditions_here(), "cases": {}}
    for name in options.cases or names:
        if name == LITE0 and options.photos is None:
            print(f"{LITE0}: left out because it needs --photos")
            continue
        document["cases"][name] = measure_case(name, options, peers)
        print(section(name, document["cases"][name]), flush=True)
    publish("-".join(["int8-accuracy", *options.cases]), document, report(document), options.results)


if __name__ == "__main__":
    main()
