"""What several commands share: options, progress, and the choice of an artifact that was not named."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeVar

import click

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import BUILD, artifacts_under, open_artifact
from deploy.cli.log import logged_by
from deploy.cli.options import PATH
from deploy.errors import DeployError, OutputError, UsageError
from deploy.progress import Progress, silent
from deploy.runtime.catalog import BACKENDS
from deploy.words import as_utf8, count_of

_QUIET_S = 2.0

_F = TypeVar("_F", bound=Callable[..., Any])

debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
device_option = click.option("--device", default="auto", show_default=True, metavar="D", help="auto, cpu, cuda or cuda:N.")
threads_option = click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads of one run.  [default: what the backend thinks best]"
)


def backend_option(function: _F) -> _F:
    return click.option(
        "--backend",
        default="auto",
        show_default=True,
        metavar="B",
        help=f"auto, fastest, {', '.join(BACKENDS)}; some take a variant (onnxruntime:cuda).",
    )(function)


def output_option(default: str) -> Callable[[_F], _F]:
    return click.option("-o", "out", type=PATH, metavar="DIR", help=f"Where to write.  [default: {default}]")


def open_or_newest(path: str | None, what: str, usable: Callable[[Artifact], bool]) -> Artifact:
    """The artifact at `path`, or the newest under `build/` that is `usable`, which is then named on standard error.

    Raises UsageError when nothing was named and nothing is there, ArtifactError.
    """
    if path is not None:
        return open_artifact(path)
    found = newest(usable)
    if found is None:
        raise UsageError(f"no {what} under {BUILD}/: name one, or make one with `deploy export`")
    click.echo(f"using {found.shown}", err=True)
    return found


def newest(usable: Callable[[Artifact], bool]) -> Artifact | None:
    """The newest artifact under `build/` that is `usable`; those that cannot be read are named and passed over."""
    return next(filter(usable, reversed(artifacts_under(BUILD))), None)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress callback that draws on standard error once two seconds have passed, and never where that is no terminal."""
    # What the user's own module prints goes to standard error: standard output is for results.
    with redirect_stdout(sys.stderr), _bar() as report:
        yield report


@contextmanager
def _bar() -> Iterator[Progress]:
    if not sys.stderr.isatty():
        yield silent
        return
    from rich.console import Console  # slow to import, and of use on a terminal only
    from rich.markup import escape
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    bar = Bar(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task("", total=None, count="")
    done = threading.Event()
    started = threading.Event()

    def above(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)

    def show() -> None:
        if not done.wait(_QUIET_S):
            started.set()
            bar.start()

    def report(what: str, finished: int = 0, total: int = 0, /) -> None:
        count = f"{finished}/{total}" if total else ""
        bar.update(task, description=escape(what), completed=finished, total=total or None, count=count)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        with logged_by(above):
            yield report
    finally:
        done.set()
        thread.join()
        if started.is_set():
            bar.stop()


class Failures:
    """The files that a command could not use, with the reasons: they are said, and the command ends with status 1."""

    def __init__(self) -> None:
        self._errors: list[tuple[Path, Exception]] = []

    def __enter__(self) -> "Failures":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Say them where there are no results, for an error ends the command."""
        if kind is not None and issubclass(kind, DeployError):
            self._say()

    def skip(self, path: Path, error: Exception) -> None:
        if not isinstance(error, DeployError):
            raise error
        self._errors.append((path, error))

    def to_json(self) -> list[dict[str, str]]:
        return [{"path": as_utf8(path), "error": as_utf8(str(error))} for path, error in self._errors]

    def end(self) -> None:
        """After the results: say each on standard error and end with status 1, unless there are none."""
        if self._errors:
            self._say()
            click.echo(f"{count_of(len(self._errors), 'file')} could not be used", err=True)
            raise click.exceptions.Exit(1)

    def _say(self) -> None:
        for _, error in self._errors:
            click.echo(f"error: {error}", err=True)


def fp32(found: Artifact) -> bool:
    """Whether the artifact is ONNX in FP32."""
    return found.manifest.kind == "onnx" and found.manifest.precision == "fp32"


def classifier(found: Artifact) -> bool:
    """Whether the artifact is ONNX that images can be fed to."""
    return found.manifest.kind == "onnx" and found.manifest.preprocess is not None


def check_writable(path: Path, option: str, suffix: str) -> None:
    """Raise before anything is measured: UsageError for what can be no FILE of results, OutputError where none can be written."""
    if path.suffix != suffix or path.is_dir():  # `--json ARTIFACT`: the name was taken for the FILE
        raise UsageError(f"{option} takes a FILE ending in {suffix}, not {path}; put artifacts before it")
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
