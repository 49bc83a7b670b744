"""The null backend: it computes nothing and returns zeros, which leaves the cost of everything around a backend."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deploy.artifact.artifact import Artifact
from deploy.errors import BackendError
from deploy.runtime.session import Session, SessionOptions
from deploy.version import __version__


class NullSession(Session):
    """Returns zeros in the shapes of the outputs; their symbolic dimensions have the sizes of the inputs'."""

    backend = "null"

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        super().__init__(artifact, options)
        known = {dim for spec in self.inputs for dim in spec.dynamic}
        for spec in self.outputs:
            unknown = [dim for dim in spec.dynamic if dim not in known]
            if unknown:
                raise BackendError(f"null cannot know the size of {unknown[0]!r} of the output {spec}: no input has it")

    def _compute(self, feed: Mapping[str, Any]) -> Sequence[Any]:
        dims = {
            dim: size
            for spec in self.inputs
            for dim, size in zip(spec.shape, feed[spec.name].shape, strict=True)
            if isinstance(dim, str)
        }
        return [np.zeros(spec.concrete(dims), dtype=spec.dtype) for spec in self.outputs]


def version(variant: Sequence[str]) -> str:
    """The version of deploy, which is all that this backend consists of."""
    return __version__


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    return NullSession(artifact, options)
