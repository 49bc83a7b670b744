"""`deploy inspect`."""

import click

from deploy.artifact.artifact import Artifact
from deploy.artifact.summary import megabytes, preprocess_text, summary
from deploy.cli.common import debug_option, json_option, open_or_newest
from deploy.errors import ArtifactError


@click.command("inspect")
@click.argument("artifact", required=False)
@json_option
@debug_option
def command(artifact: str | None, as_json: bool) -> None:
    """Show what an artifact is, where it came from and its evidence, and verify its hashes."""
    opened = open_or_newest(artifact, "artifact", lambda _: True)
    opened.verify()
    if as_json:
        click.echo(opened.manifest.to_json(), nl=False)
        return
    click.echo(summary(opened))
    manifest = opened.manifest
    rows = [("digest", manifest.digest)]
    if manifest.created:
        rows.append(("made", f"{manifest.created} by {manifest.stage.name}"))
    rows += _origin(opened)
    for name, preprocess in ((manifest.image, manifest.preprocess), *manifest.other_images.items()):
        if preprocess:
            rows.append(("images", (f"{name}: " if name else "") + preprocess_text(preprocess)))
    if manifest.decode:
        rows.append(("boxes", f"decoded by {manifest.decode}"))
    if manifest.classes:
        more = f" ... {manifest.classes[-1]}" if len(manifest.classes) > 5 else ""
        rows.append(("classes", f"{len(manifest.classes)}: {', '.join(manifest.classes[:5])}{more}"))
    rows += [("file", f"{name}, {megabytes(record.bytes)}, SHA-256 verified") for name, record in manifest.files.items()]
    rows.append(("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items()) or "unknown"))
    click.echo("\n".join(f"  {name:<10} {text}" for name, text in rows))


def _origin(artifact: Artifact) -> list[tuple[str, str]]:
    """The parents, back to the weights; or the reason why a parent cannot be used."""
    rows: list[tuple[str, str]] = []
    current: Artifact = artifact
    try:
        while (parent := current.parent()) is not None:
            rows.append(("from", f"{parent.shown} ({parent.manifest.precision}, {parent.manifest.digest[:12]})"))
            current = parent
    except ArtifactError as error:
        rows.append(("from", f"{error}"))
    source = artifact.manifest.source
    if source.factory is None:
        rows.append(("model", "a bare ONNX file"))
        return rows
    args = ", ".join(f"{key}={value!r}" for key, value in source.args.items())
    rows.append(("model", f"{source.factory}({args})"))
    rows += [("", f"{file.path}, SHA-256 {file.sha256[:12]}") for file in source.files]
    rows.append(("weights", "random: never trained" if source.random else f"{source.weights} ({source.state_dict[:12]})"))
    return rows
