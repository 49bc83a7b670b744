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


def with_cpu_form(
    writer: ArtifactWriter,
    manifest: Manifest,
    form: CpuForm,
    cases: Sequence[Case],
    tolerance: Tolerance,
    source: Artifact,
    reference: Reference | None,
    progress: Progress,
) -> Manifest:
    """The manifest with the evidence about the file of `form`, which is written, unless it is too far off: then with the reason.

    cases, tolerance: as for the signed graph. reference: what accuracy is compared with, if it is.
    """
    path = writer.path / CPU_ONNX
    try:
        form.save(path)
        check_cpu_form(form.unrounded(path), manifest, cases, progress)
        parity = prove_cpu_form(writer.describe(manifest), cases, tolerance, against=source.manifest.digest, progress=progress)
        manifest = msgspec.structs.replace(manifest, cpu_form=CpuEvidence(parity=parity))
        if reference is None:
            return manifest
        accuracies = worst_first([*manifest.accuracies, reference.check_cpu_form(writer.describe(manifest))])
        return msgspec.structs.replace(manifest, accuracy=accuracies[0], accuracies=accuracies)
    except (AccuracyError, BackendError, ParityError, PrecisionError) as error:  # it is too far off, or does not run
        path.unlink()
        path.with_name(path.name + DATA).unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        logger.warning("%s is left out: %s", CPU_ONNX, reason)
        return msgspec.structs.replace(manifest, cpu_form=CpuEvidence(left_out=reason))
