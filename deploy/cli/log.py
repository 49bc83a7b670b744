"""Log lines of `deploy` on standard error, as plain sentences."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from deploy.cli.options import in_flags

Write = Callable[[str], None]


def _stderr(line: str) -> None:
    click.echo(line, err=True)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.write: Write = _stderr

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        context = click.get_current_context(silent=True)
        self.write(prefix + in_flags(record.getMessage(), context.command if context else None))


_handler = _Lines()


def show_log() -> None:
    """Show what the toolkit logs from the level of information up. Calling it again changes nothing."""
    logger = logging.getLogger("deploy")
    logger.handlers = [_handler]
    logger.setLevel(logging.INFO)


@contextmanager
def logged_by(write: Write) -> Iterator[None]:
    """Has `write` put out the lines, without their line ends, in place of standard error."""
    _handler.write = write
    try:
        yield
    finally:
        _handler.write = _stderr
