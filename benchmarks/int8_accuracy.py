"""Top-1 in INT8, ours and the peers', on the same images: EfficientNet-Lite0 and nets trained on Fashion-MNIST.

    python benchmarks/train_fashion.py --data /usr/share/datasets/fashion-mnist
    python benchmarks/int8_accuracy.py [--photos IMAGEFOLDER] [--fashion build/fashion] [--peers PYTHON] [CASE]...

Every tool calibrates on the same images (at most 512), each result runs on ONNX Runtime's CPU provider, on the same eval
images. PHOTOS holds 1,000 photographs, one in each folder, the folders being the ImageNet classes in order (those of the
public repository EliSchwartz/imagenet-sample-images, say): 200 to calibrate on, 800 to evaluate. Goals: default settings
lose at most 0.5 point, and are nowhere worse than the best peer beyond the 95 % interval of the paired difference;
`rescaled` is `mobilenet_v1` with its channels multiplied by 2^-4 to 2^4 without changing the function: per-tensor weights
recover to within 1 point of per-channel ones.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import add_peers, check_peers, markdown, our_command, peer_command, run, verdict, write_results
from lite0 import PREPROCESS, weights
from torch import nn
from train_fashion import NETS, Net

import deploy
from deploy.artifact.artifact import Artifact
from deploy.bench.conditions import conditions
from deploy.calibration.imagefolder import Sample, batches, scan
from deploy.host.cpu import usable_cores
from deploy.models import registry
from deploy.precision.int8.options import METHOD

IMAGES = 512
PHOTOS_CALIB = 200
RESCALED = "rescaled"
OURS: dict[str, tuple[str, ...]] = {
    f"deploy {method}": ("--method", method) for method in ("max", "percentile", "mse", "entropy")
}
UNEQUALIZED = "deploy per-tensor, no equalization"
PER_TENSOR: dict[str, tuple[str, ...]] = {
    "deploy per-tensor": ("--per-tensor",),
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
    """Accuracy of `a` less that of `b` (per image: right or not) in points, with the ends of its 95 % interval.

    For matched pairs, Wald's interval with half an image added to each of the four cells: Agresti & Min 2005, "Simple
    improved confidence intervals for comparing matched proportions", Statistics in Medicine 24(5).
    """
    gained, lost, count = int((a & ~b).sum()), int((b & ~a).sum()), len(a) + 2
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
    artifact = deploy.export(work / "fp32", **options)
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
        work / "fp32",
        model=f"{Path(__file__).with_name('lite0.py')}:lite0",
        model_args={"nets": str(nets.absolute())},
        weights=weights(nets),
        inputs=["input=1x3x224x224"],
        outputs=["logits"],
        preprocess=str(preprocess),
    )
    return Case(
        name="efficientnet-lite0",
        artifact=artifact,
        calib=work / "calib",
        eval=tuple(samples[index] for index in sorted(order[PHOTOS_CALIB:])),
    )


def measure(
    case: Case, ours: dict[str, tuple[str, ...]], tools: Sequence[str], peers: Path, work: Path
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Whether each eval image is classified right, by tool, `fp32` first; and what refused to write a file, with its reason."""
    preprocess = case.artifact.manifest.preprocess
    assert preprocess is not None
    feeds = list(batches(case.eval, preprocess.open, 32))
    calib = scan(case.calib)
    samples = calib.sample(min(IMAGES, len(calib.samples)))
    refused: dict[str, str] = {}
    right = {"fp32": score(case.artifact.onnx_path, feeds)}
    print(f"{case.name}: fp32 {100 * right['fp32'].mean():.2f} %", flush=True)
    for tool in (*ours, *tools):
        out = work / "out"
        out.mkdir()
        if tool in ours:
            made = out / "int8" / "model.onnx"
            command = our_command(case.artifact.location, case.calib, len(samples), made.parent, *ours[tool])
        else:
            made = out / "int8.onnx"
            command = peer_command(peers, tool, case.artifact.onnx_path, samples, preprocess.to_json(), made)
        # Where plain quantization collapses our own parity check refuses to write the file: that is a result.
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


def table(right: dict[str, np.ndarray]) -> str:
    rows = []
    default = right.get(DEFAULT)
    for tool, found in right.items():
        against_fp32, against_ours = "", ""
        if tool != "fp32":
            against_fp32 = "{:+.2f} ({:+.2f} to {:+.2f})".format(*difference(found, right["fp32"]))
            if default is not None and tool != DEFAULT:
                against_ours = "{:+.2f} ({:+.2f} to {:+.2f})".format(*difference(default, found))
        rows.append([tool + (" (default)" if tool == DEFAULT else ""), f"{100 * found.mean():.2f} %", against_fp32, against_ours])
    return markdown(["", "top-1", "against FP32", "our default against it"], rows)


def goals(name: str, right: dict[str, np.ndarray], tools: Sequence[str]) -> list[str]:
    if DEFAULT not in right:
        return []
    drop, low, high = difference(right["fp32"], right[DEFAULT])
    met = "met" if high <= GOAL_DROP else "met by the value, not by the whole interval" if drop <= GOAL_DROP else "NOT met"
    lines = [f"loses {drop:.2f} points ({low:.2f} to {high:.2f}; goal: at most {GOAL_DROP}): {met}"]
    rivals = [tool for tool in tools if tool != PLAIN]
    if rivals:
        best = max(rivals, key=lambda tool: right[tool].mean())
        ahead, low, high = difference(right[DEFAULT], right[best])
        lines.append(
            verdict(
                f"{ahead:+.2f} points ({low:+.2f} to {high:+.2f}) against the best peer, {best} (goal: not worse beyond the interval)",
                high >= 0,
            )
        )
    if name == RESCALED and "deploy per-tensor" in right:
        behind = 100 * (right[DEFAULT].mean() - right["deploy per-tensor"].mean())
        lines.append(
            verdict(
                f"per-tensor {behind:.2f} points behind per-channel (goal: at most {GOAL_PER_TENSOR:g})",
                behind <= GOAL_PER_TENSOR,
            )
        )
    return lines


def summary(right: dict[str, np.ndarray]) -> dict[str, Any]:
    """Top-1 by tool, and the images that FP32 and the tool do not agree on as (index, right in FP32)."""
    top1 = {tool: 100 * float(found.mean()) for tool, found in right.items()}
    fp32 = right["fp32"]
    flips = {tool: [[int(i), bool(fp32[i])] for i in np.flatnonzero(found != fp32)] for tool, found in right.items()}
    return {"images": len(fp32), "top1": top1, "flips": flips}


def main() -> None:
    names = (*NETS, RESCALED, "efficientnet-lite0")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    document: dict[str, Any] = {"conditions": conditions(threads=usable_cores(), device="cpu"), "cases": {}}
    found = document["conditions"]
    text = "# Top-1 in INT8\n"
    for name in options.cases or names:
        if name == "efficientnet-lite0" and options.photos is None:
            print("efficientnet-lite0: left out, for it needs --photos")
            continue
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            if name == "efficientnet-lite0":
                case = photos_case(options.photos, options.nets or peers.parents[1] / "nets", work)
            else:
                case = fashion_case(name, options.fashion, work)
            ours = {} if options.only == "peers" else OURS | (PER_TENSOR if name == RESCALED else {})
            tools = () if options.only == "ours" else (*PEERS, *((PLAIN,) if name == RESCALED else ()))
            right, refused = measure(case, ours, tools, peers, work)
        lines = goals(name, right, tools) + [f"{tool}: refused, no file written: {why}" for tool, why in refused.items()]
        part = f"\n## {name}: {len(right['fp32']):,} images\n\n{table(right)}\n" + "".join(f"- {line}\n" for line in lines)
        print(part, flush=True)
        text += part
        document["cases"][name] = {**summary(right), "refused": refused}
    text += "\nPoints with 95 % intervals of the paired difference on the same images. All on ONNX Runtime's CPU provider.\n"
    versions = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
    text += f"{found['cpu']}; {versions}; {found['time']}.\n"
    write_results("-".join(["int8-accuracy", *options.cases]), document, text)


if __name__ == "__main__":
    main()
