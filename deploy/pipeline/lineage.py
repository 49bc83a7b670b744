"""What every stage writes into its manifest: the parent, the versions of the tools, the images that were used."""

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deploy.artifact.manifest import Artifact, Parent, file_digest, request_digest
from deploy.artifact.tensors import TensorSpec, batch_dim, random_feed
from deploy.data.images import read_folder
from deploy.evidence.parity import PARITY_BATCHES
from deploy.precision.cpu import ONNXRUNTIME_VERSION


def parent_record(artifact: Artifact, out: Path) -> Parent:
    """`artifact` as the parent of what is written to `out`, by a path relative to it."""
    path = os.path.relpath(os.path.realpath(artifact.location), os.path.realpath(out))
    return Parent(path=path, digest=artifact.manifest.digest)


def tool_versions() -> dict[str, str]:
    """Versions of the packages that take part in making artifacts."""
    packages = ("deploy", "torch", "onnx", "onnx-ir", "onnxscript")
    return {name: version(name) for name in packages} | {"onnxruntime": ONNXRUNTIME_VERSION}


def data_digest(folder: Path, count: int) -> str:
    """SHA-256 over the `count` images of a folder that a stage uses, by class and content. Raises DataError."""
    samples = read_folder(folder).sample(count)
    return request_digest({"images": [[label, file_digest(path)] for path, label in samples]})


def random_feeds(specs: Sequence[TensorSpec], dims: Mapping[str, int]) -> list[dict[str, Any]]:
    """Random feeds at the batch sizes of `PARITY_BATCHES`; as many, of other seeds, where the batch is fixed.

    `dims` gives the size of every other symbolic dimension.
    """
    batch = batch_dim(specs)
    return [
        random_feed(specs, {**dims, batch: size} if batch else dims, seed=seed)
        for seed, size in enumerate(PARITY_BATCHES, start=1)
    ]
