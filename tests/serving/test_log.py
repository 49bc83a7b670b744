"""Lines of the log."""

import json
import logging
import sys

from deploy.serving.log import JsonLines


def test_a_record_is_one_line_of_json_with_what_was_added_to_it() -> None:
    record = logging.LogRecord("deploy.serving", logging.INFO, "x.py", 1, "loaded %s", ("net",), None)
    record.model, record.version = "net", "1"
    line = JsonLines().format(record)
    assert "\n" not in line
    document = json.loads(line)
    assert document.pop("time").endswith("Z")
    assert document == {"level": "info", "message": "loaded net", "model": "net", "version": "1"}


def test_a_traceback_stays_on_the_line_and_any_value_can_be_logged() -> None:
    try:
        raise ZeroDivisionError("a bug")
    except ZeroDivisionError:
        record = logging.LogRecord("deploy.serving", logging.ERROR, "x.py", 1, "bug", (), sys.exc_info())
    record.thing = {1, 2}
    line = JsonLines().format(record)
    assert "\n" not in line
    assert "ZeroDivisionError: a bug" in json.loads(line)["traceback"]
    assert json.loads(line)["thing"] == "{1, 2}"
