"""Predictions on a Ray cluster: Ray Data hands blocks of paths to actors, each with an open session of its own.

Ray places and restarts the actors, and computes again what was lost with a node. The artifact and the files are read from the same
paths on every node.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

try:
    import pyarrow
    import ray
    import ray.data
except ImportError as error:  # Ray without its extra `data` lacks one of several libraries: all come with ours
    raise ImportError(str(error), name="ray") from error

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.errors import BackendError
from deploy.evaluation.batch import Item, Predictor, Row
from deploy.evaluation.many_options import ActorOptions, BatchOptions

_SCHEMA = pyarrow.schema({"path": pyarrow.binary(), "start": pyarrow.int64()})
_RESULT = pyarrow.schema({"row": pyarrow.binary()})
"""A `Row` in MessagePack."""


class _Actor:
    """What Ray runs: an open session, and rows of a block of paths."""

    def __init__(self, path: str, options: BatchOptions) -> None:
        self._predictor = Predictor(open_artifact(path), options)

    def __call__(self, block: Any) -> Any:
        items = (
            Item(path=Path(path.decode("utf-8", "surrogateescape")), start=start)
            for path, start in zip(block["path"].to_pylist(), block["start"].to_pylist(), strict=True)
        )
        rows = itertools.chain.from_iterable(self._predictor.rows(items))
        return pyarrow.table({"row": [msgspec.msgpack.encode(row) for row in rows]}, schema=_RESULT)


def rows_on_ray(artifact: Artifact, options: BatchOptions, items: Iterator[Item], on: ActorOptions) -> Iterator[list[Row]]:
    """The rows of all items, in order, computed on the cluster. Raises BackendError."""
    if options.threads is None and on.actor_cpus >= 1:
        options = replace(options, threads=int(on.actor_cpus), workers=options.workers or max(1, int(on.actor_cpus)))
    began = not ray.is_initialized()
    try:
        if began:
            ray.init(address=on.address, configure_logging=False, log_to_driver=False)
        for table in _tables(artifact, options, items, on):
            yield [msgspec.msgpack.decode(row, type=Row) for row in table["row"].to_pylist()]
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        raise BackendError(f"predicting on Ray failed: {' '.join(str(error).split())[-500:]}") from error
    finally:
        if began:
            ray.shutdown()


def _tables(artifact: Artifact, options: BatchOptions, items: Iterator[Item], on: ActorOptions) -> Iterator[Any]:
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True  # so that a run can be continued by counting
    context.enable_progress_bars = False
    context.max_errored_blocks = 0
    blocks = []
    # Paths alone, block by block, are put into Ray's memory: this process holds no list of them.
    while part := list(itertools.islice(items, options.batch_size)):
        table = pyarrow.table(
            {
                "path": [str(item.path).encode("utf-8", "surrogateescape") for item in part],
                "start": [item.start for item in part],
            },
            schema=_SCHEMA,
        )
        blocks.append(ray.put(table))
    found = ray.data.from_arrow_refs(blocks).map_batches(
        _Actor,
        fn_constructor_args=(str(artifact.path.resolve()), options),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=on.actors),
        num_cpus=on.actor_cpus,
        num_gpus=on.actor_gpus,
    )
    yield from found.iter_batches(batch_size=None, batch_format="pyarrow")
