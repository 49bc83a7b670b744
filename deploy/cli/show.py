"""Artifacts as text."""

from deploy.artifact import Artifact, Manifest
from deploy.parity import Parity

_LISTED = 10


def summary(artifact: Artifact) -> str:
    """What an artifact is and its evidence, a line each."""
    manifest = artifact.manifest
    kind = f"{manifest.target.flavour} {manifest.target.version} engine" if manifest.target else "ONNX"
    lines = [f"{artifact.shown}: {kind}, {manifest.precision}, {megabytes(artifact.size)}"]
    lines += [_row("input", str(spec)) for spec in manifest.inputs]
    lines += [_row("output", str(spec)) for spec in manifest.outputs]
    for profile in manifest.profiles:
        if manifest.target:
            lines += [_row("shapes", f"{name} {shapes}") for name, shapes in profile.items()]
    if manifest.target:
        built_for = manifest.target.gpu or f"compute capability {', '.join(manifest.target.targets)}"
        lines.append(_row("built for", built_for))
    if manifest.parity:
        if manifest.target:
            lines.append(_row("typed ONNX", parity_text(manifest.parity)))
            lines.append(_row("", "that is the file which the engine was built from; the engine itself has not been run"))
        else:
            lines.append(_row("parity", parity_text(manifest.parity)))
    elif manifest.parent is None and manifest.source.factory is None:
        lines.append(_row("parity", "none: a bare ONNX file has nothing to be compared with"))
    if share := share_text(manifest):
        lines.append(_row("computes", share))
    lines += exclusions_text(manifest)
    return "\n".join(lines)


def parity_text(parity: Parity) -> str:
    worst = parity.worst
    random = [str(case.batch) for case in parity.cases if case.data == "random"]
    images = sum(case.batch for case in parity.cases if case.data == "images")
    seen = [f"random batches {', '.join(random)}"] * bool(random) + [f"{images} images"] * bool(images)
    against = "eager" if parity.against == "eager" else "its parent"
    return (
        f"max abs {worst.max_abs:.2g}, max rel {worst.max_rel:.2g}, cosine {worst.cosine:.6f} against {against}"
        f" on {' and '.join(seen)} ({parity.by})"
    )


def share_text(manifest: Manifest) -> str:
    """The share of multiply-accumulates by precision; empty where it was not read."""
    share = manifest.precision_share
    if share is None:
        return ""
    parts = [f"{getattr(share, name):.1%} {name}" for name in ("int8", "fp16", "bf16", "fp32") if getattr(share, name) > 0]
    if not parts:
        return f"no multiply-accumulates: no convolution and no matrix product (read from the {share.origin})"
    return f"{', '.join(parts)} of the multiply-accumulates (read from the {share.origin})"


def exclusions_text(manifest: Manifest) -> list[str]:
    """The nodes that stayed in FP32, at most ten of them, a line each."""
    exclusions = manifest.exclusions
    lines = [_row("in FP32", f"{exclusion.node}: {exclusion.reason}") for exclusion in exclusions[:_LISTED]]
    if len(exclusions) > _LISTED:
        lines.append(_row("", f"and {len(exclusions) - _LISTED} more nodes: deploy inspect --json lists all"))
    return lines


def megabytes(size: int) -> str:
    """Bytes in units of 10^3, 10^6 or 10^9, to three digits."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"


def _row(name: str, text: str) -> str:
    return f"  {name:<10} {text}"
