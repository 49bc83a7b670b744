"""INT8 calibration of ResNet-34 at 224, whole process from ImageFolder to written file: ours and the peers.

    python benchmarks/int8_calibration.py [--photos IMAGEFOLDER] [--rounds 3] [--peers PYTHON]

All take the same images, ours with entropy (bias correction and parity included) into an empty cache. The tools take
turns; after the timed rounds each runs once more to be weighed (peak of the PSS summed over its processes), ours with
1,024 images too. Without --photos the images are made; the weights are random: neither changes the time. Goals: 3 times
faster than ModelOpt entropy, 5 times than ONNX Runtime Entropy; 1.1 GB, within 5 % with eight times the images.
"""

import argparse
import itertools
import os
import shutil
import statistics
import tempfile
from pathlib import Path

from common import add_peers, check_peers, make_photos, markdown, our_command, peer_command, run, verdict, write_results

import deploy
from deploy.bench.conditions import conditions
from deploy.calibration.imagefolder import scan
from deploy.host.cpu import usable_cores

IMAGES, MANY = 128, 1024
TOOLS = ("onnxruntime-minmax", "onnxruntime-entropy", "modelopt-max", "modelopt-entropy", "nncf")
GOALS = {"modelopt-entropy": 3.0, "onnxruntime-entropy": 5.0}
GOAL_BYTES, GOAL_GROWTH = 1.1e9, 0.05


def collect(photos: Path, folder: Path) -> None:
    """MANY links to the images of `photos`, class by class; where there are fewer they are used again."""
    samples = scan(photos).samples
    for index, (path, label) in enumerate(itertools.islice(itertools.cycle(samples), MANY)):
        link = folder / f"{label:04}" / f"{index:05}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path.absolute(), link)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="ImageFolder of photographs (default: images are made)")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds (default: %(default)s)")
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=TOOLS, help="peers (default: all)")
    add_peers(parser)
    options = parser.parse_args()
    peers = check_peers(options.peers)
    document = {
        "conditions": conditions(threads=usable_cores(), device="cpu"),
        "images": IMAGES,
        "photos": options.photos is not None,
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        folder = work / "images"
        if options.photos is None:
            make_photos(folder, MANY)
        else:
            collect(options.photos, folder)
        artifact = deploy.export(work / "resnet34", arch="resnet34")
        assert artifact.manifest.preprocess is not None
        samples = scan(folder).sample(IMAGES)

        def once(tool: str, images: int = IMAGES, weigh: bool = False) -> float:
            """Seconds of one run, or its peak in bytes."""
            out, cache = work / "out", work / "cache"
            out.mkdir()
            if tool == "deploy":
                command = our_command(artifact.location, folder, images, out / "int8", "--method", "entropy")
            else:
                command = peer_command(
                    peers, tool, artifact.onnx_path, samples, artifact.manifest.preprocess.to_json(), out / "int8.onnx"
                )
            done = run(command, cache, weigh=weigh)
            shutil.rmtree(out)
            shutil.rmtree(cache, ignore_errors=True)
            return done.seconds if done.peak is None else done.peak

        tools = ("deploy", *options.tools)
        seconds: dict[str, list[float]] = {tool: [] for tool in tools}
        for turn in range(options.rounds):
            for tool in tools[turn % len(tools) :] + tools[: turn % len(tools)]:
                seconds[tool].append(once(tool))
                print(f"round {turn + 1}: {tool:22} {seconds[tool][-1]:6.1f} s", flush=True)
        peaks: dict[str, float] = {}
        for tool in tools:
            peaks[tool] = once(tool, weigh=True)
            print(f"weighed: {tool:22} {peaks[tool] / 1e9:6.2f} GB", flush=True)
        many = once("deploy", images=MANY, weigh=True)
        many_seconds = once("deploy", images=MANY)
    medians = {tool: statistics.median(values) for tool, values in seconds.items()}
    # Of the rounds, not of the medians: what slows a round slows all of it.
    ratios = {tool: statistics.median(b / a for a, b in zip(seconds["deploy"], seconds[tool], strict=True)) for tool in tools}
    rows = [
        [tool, f"{medians[tool]:.1f} s", f"{ratios[tool]:.2f}", f"{peaks[tool] / 1e9:.2f} GB"] for tool in tools
    ]  # fmt: skip
    rows.append([f"deploy, {MANY:,} images", f"{many_seconds:.1f} s", "-", f"{many / 1e9:.2f} GB"])
    growth = many / peaks["deploy"] - 1
    lines = [
        verdict(f"{ratios[tool]:.2f} times faster than {tool} (goal: at least {goal:g})", ratios[tool] >= goal)
        for tool, goal in GOALS.items()
        if tool in ratios
    ]
    lines.append(
        verdict(f"peak {peaks['deploy'] / 1e9:.2f} GB (goal: at most {GOAL_BYTES / 1e9:g})", peaks["deploy"] <= GOAL_BYTES)
    )
    lines.append(verdict(f"{growth:+.1%} memory with {MANY:,} images (goal: within {GOAL_GROWTH:.0%})", growth <= GOAL_GROWTH))
    found = document["conditions"]
    text = (
        f"# INT8 calibration of ResNet-34 at 224: {IMAGES} images, ImageFolder to written file\n\n"
        + markdown(["tool", "median of the rounds", "times ours", "peak PSS"], rows)
        + "\n"
        + "".join(f"- {line}\n" for line in lines)
        + f"\n{found['cpu']}, {found['threads']} threads, load average {found['load_average'][0]} before; {found['time']}.\n"
    )
    print(text)
    results = {"seconds": seconds, "ratios": ratios, "peak_bytes": peaks, "peak_bytes_many": many, "seconds_many": many_seconds}
    write_results("int8-calibration", {**document, **results}, text)


if __name__ == "__main__":
    main()
