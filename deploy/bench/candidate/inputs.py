"""The inputs that candidates are timed on: the same for all, random or images, several in turns that exceed the cache together."""

from collections.abc import Mapping
from pathlib import Path

from deploy.artifact.artifact import Artifact
from deploy.artifact.tensors import Feed, TensorSpec, batch_dim, random_feed, row_count
from deploy.data.image_folder import image_feeds
from deploy.errors import BackendError, DataError
from deploy.runtime.worker.feeds import random_inputs, wanted_feeds


def make_feeds(artifact: Artifact, specs: tuple[TensorSpec, ...], dims: Mapping[str, int], data: Path | None) -> list[Feed]:
    """At least two feeds of these sizes, together larger than the cache, within the limits MOST and MOST_BYTES.

    Random feeds are the same in every process: standard normal, never zeros. data: an ImageFolder whose images are used
    instead, as many as there are. Raises BackendError when there is not enough memory, DataError when there are too few images.
    """
    try:
        if data is None:
            return random_inputs(specs, dims)
        return _images(artifact, specs, dims, data)
    except MemoryError as error:
        sizes = ", ".join(f"{name} {size}" for name, size in dims.items())
        raise BackendError(f"no memory for an input with {sizes}: {error}") from error


def _images(artifact: Artifact, specs: tuple[TensorSpec, ...], dims: Mapping[str, int], data: Path) -> list[Feed]:
    batch = batch_dim(specs)
    rows = dims[batch] if batch is not None else specs[0].concrete(dims)[0]
    wanted = min(wanted_feeds(random_feed(specs, dims)), 64)  # decoding takes time
    feeds = [feed for feed in image_feeds(artifact, data, batch_size=rows, count=rows * wanted) if row_count(feed) == rows]
    if not feeds:
        raise DataError(f"`data` {data} holds too few images for a batch of {rows}")
    return feeds if len(feeds) > 1 else feeds * 2
