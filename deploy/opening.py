"""What a user may name as an artifact: a directory, or a bare `.onnx` file."""

from pathlib import Path

from deploy.artifact import Artifact


def open_artifact(path: Path | str) -> Artifact:
    """The artifact at `path`: a directory, or a bare `.onnx` file. Raises ArtifactError."""
    path = Path(path)
    if path.suffix == ".onnx" and not path.is_dir():
        from deploy.onnxfile import open_onnx  # loads onnx, which a service that embeds the runtime need not

        return open_onnx(path)
    return Artifact.open(path)
