"""Log lines of `deploy` on standard error, as plain sentences."""

import logging

import click


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        click.echo(prefix + record.getMessage(), err=True)


def show_log() -> None:
    """Show what the toolkit logs from the level of information up. Calling it again changes nothing."""
    logger = logging.getLogger("deploy")
    logger.handlers = [_Stderr()]
    logger.setLevel(logging.INFO)
