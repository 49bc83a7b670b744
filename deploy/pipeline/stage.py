"""The skeleton of every stage: check the output, see whether it is up to date, make it, put it in place."""

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from deploy.artifact.artifact import Artifact, parent_record, standing
from deploy.artifact.find import BUILD, open_artifact
from deploy.artifact.manifest import Manifest, Stage, request_digest
from deploy.artifact.writer import ArtifactWriter, check_output
from deploy.errors import ArtifactError, UsageError
from deploy.host.versions import tool_versions

logger = logging.getLogger(__name__)

PathLike = Path | str


class Work(Protocol):
    """What is particular to one stage."""

    name: str
    """The stage's name in the manifest."""

    def request(self) -> Mapping[str, Any] | None:
        """Everything that the result depends on, as JSON-like values; None where that cannot be known.

        Raises what is wrong with the source or the options, before any long work.
        """

    def make(self, writer: ArtifactWriter, stage: Stage) -> Manifest:
        """Write the payload into `writer.path`, compare it with what it was made from, and describe it."""


def run_stage(work: Work, out: Path, source: Artifact | None = None) -> Artifact:
    """The artifact at `out`: the one that is there, where the same work made it from the same inputs, else made now.

    `source`: what it is made from. Raises OutputError, and what `work` raises; what was at `out` is then unchanged.
    """
    check_output(out, source)
    request = work.request()
    digest = secrets.token_hex(32) if request is None else request_digest(request)
    stage = Stage(name=work.name, request=digest)
    if request is not None and (current := standing(out, stage)) is not None:
        logger.info("%s is up to date", out)
        return current
    with ArtifactWriter(out) as writer:
        if source is not None:
            for function in source.manifest.functions:
                function.copy(source.path, writer.path)
        return writer.commit(work.make(writer, stage))


def descendant(source: Artifact, out: Path, stage: Stage, **changes: Any) -> Manifest:
    """The manifest of an artifact that is made from `source` and written to `out`, with `changes` to that of `source`."""
    inherited: dict[str, Any] = {
        "name": out.resolve().name,
        "parent": parent_record(source, out),
        "files": {},
        "accuracy": None,
        "accuracies": [],
        "cpu_form": None,
        "tuning": None,
        "tools": tool_versions(),
        "stage": stage,
    }
    return msgspec.structs.replace(source.manifest, **{**inherited, **changes})


def check_fp32(artifact: Artifact) -> None:
    """Raise UsageError unless `artifact` is an ONNX graph in FP32."""
    manifest = artifact.manifest
    if manifest.kind != "onnx":
        what = "an engine" if manifest.kind == "engine" else "an AOTInductor package"
        raise UsageError(f"{artifact.shown} is {what}; give the FP32 ONNX artifact that it descends from")
    if manifest.precision == "fp64":
        raise UsageError(f"{artifact.shown} computes in double precision; export the model in FP32 (`module.float()`)")
    if manifest.precision != "fp32":
        raise UsageError(f"{artifact.shown} is {manifest.precision} already; give the FP32 artifact that it was made from")


def check_engine_source(source: Artifact) -> None:
    """Raise UsageError if no engine can be built from `source`."""
    manifest = source.manifest
    if manifest.kind != "onnx":
        what = "an engine already" if manifest.kind == "engine" else "an AOTInductor package"
        raise UsageError(f"{source.shown} is {what}; give the ONNX artifact it was built from")
    if manifest.precision == "fp64":
        raise UsageError(
            f"{source.shown} computes in double precision, and TensorRT does not: export the model in FP32 (`module.float()`)"
        )
    outputs = {spec.name for spec in manifest.outputs}
    if both := [spec.name for spec in manifest.inputs if spec.name in outputs]:
        raise UsageError(
            f"{both[0]!r} is an input and an output of {source.shown}, and an engine needs two names: leave that output out, or"
            " give it another name behind an Identity"
        )


def fp32_source(artifact: Artifact, why: str) -> Artifact:
    """`artifact` itself where it is in FP32, else the FP32 artifact that it was made from.

    Raises ArtifactError, ending with `why` it is needed, where that is gone, has changed or was never there.
    """
    if artifact.manifest.precision == "fp32":
        return artifact
    try:
        parent = artifact.parent()
    except ArtifactError as error:
        raise ArtifactError(f"{error}\nit is needed because {why}") from error
    if parent is None or parent.manifest.precision != "fp32":
        raise ArtifactError(f"{artifact.shown} has no FP32 artifact that it was made from, and {why}")
    return parent


def open_source(artifact: Artifact | PathLike) -> Artifact:
    return artifact if isinstance(artifact, Artifact) else open_artifact(artifact)


def default_out(out: PathLike | None, source: Artifact, *suffixes: str) -> Path:
    """`out`, or `build/<name of the source>-<suffixes>` where it is None."""
    return Path(out) if out is not None else BUILD / "-".join([source.manifest.name, *suffixes])
