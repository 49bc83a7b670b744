"""The server's log: lines of JSON on standard error."""

import json
import logging
import time
from typing import Any


class JsonLines(logging.Formatter):
    """A log record as one line of JSON."""

    _plain = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in self._plain and not key.startswith("_")}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_as_json(*more: str) -> None:
    """Send the records of the server, of its libraries and of the loggers in `more` to standard error as lines of JSON."""
    libraries = ("uvicorn", "asyncio", "opentelemetry", *more)
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    for name in ("deploy", *libraries):
        logging.getLogger(name).handlers = [handler]
        logging.getLogger(name).propagate = False
    logging.getLogger("deploy").setLevel(logging.INFO)
    for name in libraries:
        logging.getLogger(name).setLevel(logging.WARNING)
