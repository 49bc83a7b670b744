"""The exported ONNX file compared with the eager module."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed, TensorSpec, batch_dim
from deploy.data.image_folder import image_feeds
from deploy.errors import ExportError
from deploy.evidence.parity import Parity, Tolerance, compare
from deploy.intake.export_errors import fixed_reason, line_of
from deploy.intake.exporter import flatten_outputs
from deploy.precision.cpu import ONNXRUNTIME_VERSION
from deploy.runtime.session import Session

REAL_IMAGES = 8
"""Real images that parity is checked on, at the largest of `PARITY_BATCHES` or the model's own batch."""


class Case(NamedTuple):
    """One feed, and what the eager module makes of it, by output name. `data` is `random` or `images`."""

    data: str
    feed: Feed
    expected: Feed


def run_eager(
    module: torch.nn.Module,
    specs: Sequence[TensorSpec],
    feed: Mapping[str, np.ndarray],
    user_files: Sequence[str],
    ran: Mapping[str, np.ndarray] | None = None,
) -> Feed:
    """The eager module's outputs, flattened. `ran` is a feed that it could run, of another batch size.

    Raises ExportError, with the module's own error and its line in the user's own file, when it cannot run the input.
    """
    try:
        with torch.inference_mode():
            results = flatten_outputs(module(*(torch.from_numpy(feed[spec.name]) for spec in specs)))
    except ExportError:
        raise
    except Exception as error:  # the user's own code: any error may come
        shapes = _shapes(feed)
        reason = next(iter(str(error).strip().splitlines()), repr(error))
        line = line_of(error, user_files)
        name, where = type(module).__name__, f": {line}" if line else ""
        batch = batch_dim(specs)
        if ran is not None and batch is not None and _shapes(ran) != shapes:
            fixed, remedy = fixed_reason([batch])
            raise ExportError(
                f"{name} cannot be exported{where}: {fixed}: it runs {_shapes(ran)}, and not {shapes}: {reason}\n{remedy}"
            ) from error
        raise ExportError(
            f"{name} cannot run {shapes}{where}: {reason}\nsay what it takes with `inputs` NAME=1x3x224x224[:dtype]"
        ) from error
    return {name: tensor.numpy() for name, tensor in results.items()}


def _shapes(feed: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in feed.items())


def image_cases(artifact: Artifact, module: torch.nn.Module, folder: Path, user_files: Sequence[str]) -> Iterator[Case]:
    names = [spec.name for spec in artifact.manifest.outputs]
    for feed in image_feeds(artifact, folder, batch_size=REAL_IMAGES, count=REAL_IMAGES):
        results = run_eager(module, artifact.manifest.inputs, feed, user_files)
        case = Case("images", feed, dict(zip(names, results.values(), strict=True)))
        finite(case, fatal=True)
        yield case


def finite(case: Case, *, fatal: bool) -> bool:
    """Whether the eager outputs are finite; where not and it is `fatal`, ExportError naming the output."""
    broken = [name for name, array in case.expected.items() if not np.isfinite(array).all()]
    if broken and fatal:
        raise ExportError(
            f"the eager module itself gives NaN or infinity in output {broken[0]!r} on {case.data} input: parity cannot be checked"
            "\ncheck the weights; if the model needs real input, give some with `data` IMAGEFOLDER"
        )
    return not broken


def check_parity(session: Session, seen: Sequence[Case], tolerance: Tolerance) -> Parity:
    cases = [
        compare(
            session.run(case.feed),
            case.expected,
            tolerance,
            data=case.data,
            batch=len(next(iter(case.feed.values()))),
            what=session.name,
        )
        for case in seen
    ]
    return Parity(against="eager", by=f"onnxruntime {ONNXRUNTIME_VERSION}", tolerance=tolerance, cases=cases)
