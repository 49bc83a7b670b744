import json
from typing import Any

import pytest

from deploy.errors import UsageError
from deploy.intake.model_args import parse_model_args, record_args, recorded_args


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1", -1),
        ("1e-3", 0.001),
        ("True", True),
        ("false", False),
        ("none", None),
        ("relu", "relu"),
        ("'3'", "3"),
        ("'true'", "true"),
        ("(2, 2)", (2, 2)),
        ("[1, (2, 3)]", [1, (2, 3)]),
        ("{'a': 1}", {"a": 1}),
        ("a=b", "a=b"),
        ("", ""),
        ("runs/x.y", "runs/x.y"),
    ],
)
def test_model_arguments_are_python_literals_or_strings(text: str, value: Any) -> None:
    args = parse_model_args([f"key={text}"])
    assert args == {"key": value}
    assert type(args["key"]) is type(value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["hidden"], "cannot read the model argument 'hidden'; expected NAME=VALUE"),
        (["=3"], "cannot read the model argument '=3'"),
        (["a-b=3"], "cannot read the model argument 'a-b=3'"),
        (["a=1", "a=2"], "'a' is given twice"),
        (["a=[relu, gelu]"], "its value is no Python literal"),
        (["a=(1,"], "cannot read the model argument 'a=\\(1,'"),
        (["a={[]: 1}"], "its value is no Python literal"),
        (["a={1, 2}"], "'a' is a set, which the manifest cannot record"),
        (["a=b'x'"], "'a' is a bytes"),
        (["a=1e999"], "cannot be recorded"),
        (["a={'tuple': 1}"], "'a' is a dict"),
    ],
)
def test_model_arguments_that_cannot_be_meant_or_recorded_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_model_args(texts)


def test_recorded_arguments_survive_json_with_tuples_and_lists_told_apart() -> None:
    args = {"depths": (2, (3,)), "layers": [1, (2,)], "options": {"a": (1,), "b": None}, "rate": 0.5}
    assert recorded_args(json.loads(json.dumps(record_args(args)))) == args
