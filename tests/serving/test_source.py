"""NAME=PATH@VERSION as it is read."""

from pathlib import Path

import pytest

from deploy.errors import UsageError
from deploy.serving.source import ModelSource


@pytest.mark.parametrize(("text", "message"), [("a b=x", "cannot be the name"), ("n=x@0", "version must be a number from 1")])
def test_names_of_models_are_checked(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ModelSource.parse(text)


def test_names_and_versions_are_read() -> None:
    assert ModelSource.parse("net=build/some@host/net@12") == ModelSource(
        name="net", path=Path("build/some@host/net"), version="12"
    )
    assert ModelSource.parse("net=build/some@host").version == "1"
