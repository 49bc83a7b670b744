"""The arguments of a model factory: parsed from text, and written to the manifest and read back."""

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.errors import UsageError
from deploy.words import a_type

_TUPLE = "tuple"
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def parse_model_args(texts: Sequence[str]) -> dict[str, Any]:
    """`["depths=(2, 2)", "act=relu", "bias=false"]` -> `{"depths": (2, 2), "act": "relu", "bias": False}`.

    A value is a Python literal (a number, a quoted string, a tuple, a list, a dict), or true, false or none in any case;
    anything else is a string. Raises UsageError for a text without `=`, for an invalid or repeated name, and for a value
    that begins like a tuple, list, dict or quoted string and is not one.
    """
    args: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"cannot read the model argument {text!r}; expected NAME=VALUE")
        if name in args:
            raise UsageError(f"the model argument {name!r} is given twice")
        if value.lower() in _WORDS:
            args[name] = _WORDS[value.lower()]
            continue
        try:
            args[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError) as error:
            if value.startswith(("(", "[", "{", "'", '"')):
                raise UsageError(
                    f"cannot read the model argument {text!r}: its value is no Python literal (strings within one need quotes)"
                ) from error
            args[name] = value
    record_args(args)
    return args


def record_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """`args` as JSON for the manifest, with tuples marked. Raises UsageError for a value that JSON cannot hold."""
    recorded = {name: _to_json(value, name) for name, value in args.items()}
    try:
        json.dumps(recorded, allow_nan=False)
    except ValueError as error:
        raise UsageError(f"a model argument cannot be recorded: {error}") from error
    return recorded


def recorded_args(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `record_args` wrote to the manifest."""
    return {name: _from_json(value) for name, value in recorded.items()}


def _to_json(value: Any, name: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return {_TUPLE: [_to_json(item, name) for item in value]}
    if isinstance(value, list):
        return [_to_json(item, name) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value) and list(value) != [_TUPLE]:
        return {key: _to_json(item, name) for key, item in value.items()}
    raise UsageError(
        f"the model argument {name!r} is {a_type(value)}, which the manifest cannot record: expected numbers, strings,"
        " booleans, None, and tuples, lists or dicts of them"
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        if list(value) == [_TUPLE]:
            return tuple(_from_json(item) for item in value[_TUPLE])
        return {key: _from_json(item) for key, item in value.items()}
    return value
