"""What `deploy.export` costs over the bare ONNX exporter and the inference that parity needs, for `resnet34` at 224.

    python benchmarks/export_overhead.py [--rounds 3]

Bare: build the module, torch.onnx.export, save, and run eager and ONNX Runtime at the three batch sizes of parity.
Ours: `deploy.export` to an artifact, with the weights, hashes and manifest. The two take turns in one process after one
round to warm up; the ratio is that of the medians. Goal: at most 1.2.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from bench_harness import (
    Goal,
    bullets,
    conditions_here,
    conditions_line,
    exit_status,
    in_turns,
    make_parser,
    markdown,
    publish,
    seconds_of,
)

import deploy
from deploy.evidence.parity import PARITY_BATCHES
from deploy.models.registry import ARCHITECTURES

GOAL = 1.2


def bare(folder: Path) -> None:
    module = ARCHITECTURES["resnet34"].create().eval()
    batch = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        module,
        (torch.randn(2, 3, 224, 224),),
        dynamo=True,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    assert program is not None
    program.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    for size in PARITY_BATCHES:
        x = torch.randn(size, 3, 224, 224)
        with torch.inference_mode():
            module(x)
        session.run(None, {"input": x.numpy()})


def ours(folder: Path) -> None:
    deploy.export(folder / "artifact", arch="resnet34")


def timed(work: Callable[[Path], None]) -> Callable[[], float]:
    """Runs `work` in a new folder; returns its seconds."""

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return seconds_of(lambda: work(Path(folder)))

    return run


def goals(document: Mapping[str, Any]) -> list[Goal]:
    medians = {name: statistics.median(values) for name, values in document["seconds"].items()}
    ratio = medians["ours"] / medians["bare"]
    return [Goal(text=f"{ratio:.2f} times as long as the bare exporter (goal: at most {GOAL:g})", met=ratio <= GOAL)]


def report(document: Mapping[str, Any]) -> str:
    rows = [
        [name, f"{statistics.median(values):.2f} s", ", ".join(f"{value:.2f}" for value in values)]
        for name, values in document["seconds"].items()
    ]
    table = markdown(["", "median", "rounds"], rows)
    return f"# Export of ResNet-34 at 224\n\n{table}\n{bullets(goals(document))}\n{conditions_line(document['conditions'])}"


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="rounds after the first (default: %(default)s)")
    options = parser.parse_args()
    sides = {"bare": timed(bare), "ours": timed(ours)}
    document = {"conditions": conditions_here(), "seconds": in_turns(sides, options.rounds, warm_up=1)}
    publish("export-overhead", document, report(document), options.results)
    return exit_status(goals(document))


if __name__ == "__main__":
    sys.exit(main())
