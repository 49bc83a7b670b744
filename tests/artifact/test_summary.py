"""Artifacts as text."""

import dataclasses
from typing import Any

import msgspec
import pytest

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import Accuracy, PackageTarget, PrecisionShare, Target
from deploy.artifact.summary import drop_text, kind_text, megabytes, package_text, share_text, summary


@pytest.fixture
def engine(shared_lenet5: Artifact) -> Artifact:
    """An artifact that says it is an engine built from lenet5."""
    target = Target(flavour="tensorrt-rtx", version="1.7", gpu=None, compute_capability=None, targets=["8.9"])
    return Artifact(shared_lenet5.path, msgspec.structs.replace(shared_lenet5.manifest, target=target))


def test_the_parity_of_an_engine_is_said_to_be_that_of_its_file(shared_lenet5: Artifact, engine: Artifact) -> None:
    assert "\n  parity     max abs" in summary(shared_lenet5)
    rows = summary(engine).splitlines()
    found = next(index for index, row in enumerate(rows) if row.startswith("  typed ONNX max abs"))
    assert rows[found + 1].strip() == "that is the file which the engine was built from; the engine itself has not been run"
    assert not any(row.startswith(("  parity", "  graph")) for row in rows)


@pytest.mark.parametrize("stripped", [True, False])
def test_an_engine_without_weights_is_said_to_be_one(engine: Artifact, stripped: bool) -> None:
    assert engine.manifest.target is not None
    target = msgspec.structs.replace(engine.manifest.target, stripped=stripped)
    shown = summary(dataclasses.replace(engine, manifest=msgspec.structs.replace(engine.manifest, target=target)))
    assert ("  weights    none in the engine file" in shown) == stripped


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ({"fp16": 0.75, "fp32": 0.25}, "75.0% fp16, 25.0% fp32 of the multiply-accumulates (read from the network)"),
        ({"int8": 1.0}, "100.0% int8 of the multiply-accumulates (read from the network)"),
        (
            {"fp16": 1.0, "unknown": 2},
            "100.0% fp16 of the multiply-accumulates that can be counted, those of 2 nodes cannot (read from the network)",
        ),
        ({"unknown": 1}, "unknown: the multiply-accumulates of 1 node cannot be counted (read from the network)"),
        ({}, "no multiply-accumulates: no convolution and no matrix product (read from the network)"),
    ],
)
def test_the_share_of_each_precision_is_told(engine: Artifact, shares: dict[str, float], text: str) -> None:
    share = PrecisionShare(**{"int8": 0.0, "fp16": 0.0, "bf16": 0.0, "fp32": 0.0} | shares, origin="network")
    assert share_text(share) == text
    assert f"computes   {text}" in summary(
        dataclasses.replace(engine, manifest=msgspec.structs.replace(engine.manifest, precision_share=share))
    )
    assert "computes" not in summary(engine)


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ({"tf32": 1.0, "origin": "engine", "coverage": 1.0}, "100.0% tf32 of the multiply-accumulates (attested: the engine itself tells the precision of 100.0%)"),
        (
            {"fp16": 1.0, "origin": "engine", "coverage": 0.97, "fp16_sums": 0.625},
            "100.0% fp16 of the multiply-accumulates with sums in FP16 for at least 62.5% (attested: the engine itself tells the precision of 97.0%)",
        ),
        (
            {"fp16": 1.0, "origin": "network", "coverage": 0.31, "fp16_sums": 0.0},
            "100.0% fp16 of the multiply-accumulates (read from the network, not attested: the engine itself tells the precision of 31.0%)",
        ),
    ],
)  # fmt: skip
def test_who_says_so_and_how_much_of_it_is_told_beside(shares: dict[str, Any], text: str) -> None:
    assert share_text(PrecisionShare(**{"int8": 0.0, "fp16": 0.0, "bf16": 0.0, "fp32": 0.0} | shares)) == text


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 B"), (12_345, "12.3 kB"), (87_100_000, "87.1 MB"), (2_500_000_000, "2.5 GB")]
)
def test_sizes_are_in_powers_of_ten(size: int, text: str) -> None:
    assert megabytes(size) == text


@pytest.mark.parametrize(
    ("drop", "text"),
    [
        (0.1, "0.10 points lost"),
        (12.346, "12.35 points lost"),
        (-0.1, "0.10 points gained"),
        (-3.0, "3.00 points gained"),
        (0.0, "no points lost"),
        (-0.0, "no points lost"),
        (0.004, "no points lost"),
        (-0.004, "no points lost"),
    ],
)
def test_accuracy_is_lost_or_gained(shared_lenet5: Artifact, drop: float, text: str) -> None:
    accuracy = Accuracy(
        images=1, top1=90.0 - drop, top5=99.0, parent_top1=90.0, parent_top5=99.0,
        top1_drop=drop, top1_drop_low=drop - 1, top1_drop_high=drop + 1, backend="onnxruntime",
    )  # fmt: skip
    assert drop_text(accuracy.judged) == text
    shown = summary(
        dataclasses.replace(shared_lenet5, manifest=msgspec.structs.replace(shared_lenet5.manifest, accuracy=accuracy))
    )
    assert f": {text} (95 % interval of the loss {drop - 1:.2f} to {drop + 1:.2f}; onnxruntime)" in shown
    assert "of 1 image;" in shown


def test_a_long_expression_is_a_letter_in_the_summary_and_whole_in_the_manifest(shared_lenet5: Artifact) -> None:
    pooled = "floor(floor(floor(H/2 - 1/2)/2)/2) + 1"
    outputs = [
        dataclasses.replace(shared_lenet5.manifest.outputs[0], name=name, shape=("batch", pooled.replace("H", size)))
        for name, size in (("high", "H"), ("wide", "W"), ("again", "H"))
    ]
    manifest = msgspec.structs.replace(shared_lenet5.manifest, outputs=outputs)
    shown = summary(dataclasses.replace(shared_lenet5, manifest=manifest)).splitlines()
    assert [row.split()[-1] for row in shown if row.startswith("  output ")] == ["batchxA", "batchxB", "batchxA"]
    assert manifest.to_json().count(pooled) == 2


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        (None, "accuracy   top-1 80.00 %, top-5 95.00 % of 20 images (95 % interval of top-1 58.40 to 91.93; onnxruntime)"),
        (84.2, "of 20 images; training reported 84.20 % (95 % interval of top-1 58.40 to 91.93; onnxruntime)"),
    ],
)
def test_the_accuracy_of_an_export_has_its_interval_and_what_training_reported(
    shared_lenet5: Artifact, expected: float | None, text: str
) -> None:
    accuracy = Accuracy(
        images=20, top1=80, top5=95, top1_low=58.4, top1_high=91.93, backend="onnxruntime", expected_top1=expected
    )
    assert text in summary(
        dataclasses.replace(shared_lenet5, manifest=msgspec.structs.replace(shared_lenet5.manifest, accuracy=accuracy))
    )


def test_a_package_is_said_to_be_of_its_torch_and_for_its_machine(shared_lenet5: Artifact) -> None:
    assert kind_text(shared_lenet5.manifest) == "ONNX"
    here = PackageTarget(torch="2.14.1", device="cpu", machine="x86_64", instruction_sets=["avx", "avx2"])
    there = PackageTarget(
        torch="2.11.0", device="cuda", machine="x86_64", instruction_sets=["avx"], gpu="NVIDIA H200", compute_capability="9.0"
    )
    package = msgspec.structs.replace(shared_lenet5.manifest, kind="package", package=here)
    assert kind_text(package) == "AOTInductor package of torch 2.14.1"
    assert package_text(here) == "the CPU, x86_64 with the 2 instruction sets of the manifest"
    assert package_text(there) == "NVIDIA H200 (compute capability 9.0)"
