"""Predictions for any number of files into one file, which an interrupted run continues."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import open_artifact
from deploy.data.sources import check_sources, paths_of
from deploy.evaluation.batch import Item, Predictor, Row, check_artifact
from deploy.evaluation.many_options import BatchOptions
from deploy.evaluation.results import Kind
from deploy.evaluation.rows import Run
from deploy.words import as_utf8

Rows = Callable[[Artifact, BatchOptions, Iterator[Item]], Iterator[list[Row]]]
"""What computes the rows of items, in order."""

_ASKED: dict[Kind, Callable[[BatchOptions], dict[str, Any]]] = {
    "classify": lambda options: {"top": options.top},
    "segment": lambda options: {},
    "detect": lambda options: {"min_score": options.min_score},
    "raw": lambda options: {"raw": True},
}
"""The options that decide on what stands in the rows."""

Report = Callable[[int, int], None]
"""Called with the number of rows that there are, and of the errors among them."""


def rows_here(artifact: Artifact, options: BatchOptions, items: Iterator[Item]) -> Iterator[list[Row]]:
    """The rows, computed in this process."""
    with Predictor(artifact, options) as predictor:
        yield from predictor.rows(items)


def predict_many(
    artifact: Artifact | Path | str,
    sources: Sequence[str],
    out: Path | str,
    options: BatchOptions | None = None,
    *,
    rows: Rows = rows_here,
    report: Report = lambda rows, errors: None,
) -> tuple[int, int]:
    """Write a row for each image of `sources` to `out`, `.jsonl` or `.parquet`, as it is computed; how many rows, and errors among them.

    sources: as `deploy.data.sources.paths_of` has them. A file that cannot be used is a row with its error. Run again with the same
    arguments, it goes on where it was interrupted; where it was finished, it does nothing. rows: computes them.
    Raises DataError and UsageError for what cannot be done at all, OutputError for a file of something else, and BackendError.
    """
    artifact = artifact if isinstance(artifact, Artifact) else open_artifact(artifact)
    options = options or BatchOptions()
    reader = check_artifact(artifact, options)
    check_sources(sources)
    request = {
        "artifact": artifact.manifest.digest,
        "backend": options.backend,
        **_ASKED[reader.kind](options),
        "sources": [as_utf8(source) for source in sources],
        "folder": as_utf8(os.getcwd()),
    }
    run = Run(Path(out), request, reader)
    if run.finished is not None:
        return run.finished["rows"], run.finished["errors"]
    finished = False
    try:
        items = run.left(paths_of(sources))
        first = next(items, None)  # what does not fit the rows that are there is said before a session is opened
        if first is not None:
            for made in rows(artifact, options, _again(first, items)):
                if made:
                    run.write(made)
                    report(run.file.rows, run.file.errors)
        finished = True
    finally:
        if not finished:
            run.file.close(finished=False)
    run.finish()
    return run.file.rows, run.file.errors


def _again(first: Item, items: Iterator[Item]) -> Iterator[Item]:
    yield first
    yield from items
