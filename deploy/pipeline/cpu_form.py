"""The CPU form of an INT8 artifact: written beside the signed graph, with evidence of its own, or left out with the reason."""

import logging
from collections.abc import Sequence

import msgspec

from deploy.artifact.artifact import Artifact
from deploy.artifact.manifest import CPU_ONNX, DATA, CpuEvidence, Manifest
from deploy.artifact.writer import ArtifactWriter
from deploy.errors import AccuracyError, BackendError, ParityError, PrecisionError
from deploy.evaluation.gate import Reference, worst_first
from deploy.evidence.parity import Tolerance
from deploy.pipeline.written import Case, check_cpu_form, prove_cpu_form
from deploy.precision.int8.cpu_form import CpuForm
from deploy.progress import Progress

logger = logging.getLogger(__name__)


_WRONG = (AccuracyError, BackendError, ParityError, PrecisionError)
"""What says that the file is too far off, or does not run."""


def save_cpu_form(
    writer: ArtifactWriter, manifest: Manifest, form: CpuForm, cases: Sequence[Case], progress: Progress
) -> Manifest:
    """Write the file, and compare what it holds with what it must, and without its rounding with its source.

    Returns the manifest as it is, or with the reason where the file is wrong; it is removed then.
    """
    path = writer.path / CPU_ONNX
    try:
        form.save(path)
        check_cpu_form(form, path, manifest, cases, progress)
    except _WRONG as error:
        return _left_out(writer, manifest, error)
    return manifest


def prove_and_judge(
    writer: ArtifactWriter,
    manifest: Manifest,
    cases: Sequence[Case],
    tolerance: Tolerance,
    source: Artifact,
    reference: Reference | None,
    progress: Progress,
) -> Manifest:
    """The manifest with the evidence about the file that was saved, or with the reason why it is removed.

    cases, tolerance: as for the signed graph. reference: what accuracy is compared with, if it is.
    """
    try:
        parity = prove_cpu_form(writer.describe(manifest), cases, tolerance, against=source.manifest.digest, progress=progress)
        manifest = msgspec.structs.replace(manifest, cpu_form=CpuEvidence(parity=parity))
        if reference is None:
            return manifest
        accuracies = worst_first([*manifest.accuracies, reference.check_cpu_form(writer.describe(manifest))])
        return msgspec.structs.replace(manifest, accuracy=accuracies[0], accuracies=accuracies)
    except _WRONG as error:
        return _left_out(writer, manifest, error)


def _left_out(writer: ArtifactWriter, manifest: Manifest, error: Exception) -> Manifest:
    for name in (CPU_ONNX, CPU_ONNX + DATA):
        (writer.path / name).unlink(missing_ok=True)
    reason = str(error).splitlines()[0]
    logger.warning("%s is left out: %s", CPU_ONNX, reason)
    return msgspec.structs.replace(manifest, cpu_form=CpuEvidence(left_out=reason))
