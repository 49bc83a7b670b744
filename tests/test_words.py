import codecs
import os
from pathlib import Path

import pytest

from deploy.models import errors
from deploy.words import a_type, as_utf8, count_of, did_you_mean, is_utf8, printable, show_bytes

codecs.register_error("show_bytes", show_bytes)


@pytest.mark.parametrize(("count", "text"), [(0, "0 threads"), (1, "1 thread"), (2, "2 threads"), (1000, "1,000 threads")])
def test_a_count_agrees_with_its_noun(count: int, text: str) -> None:
    assert count_of(count, "thread") == text
    assert count_of(count, "class") == text.replace("threads", "classes").replace("thread", "class")


@pytest.mark.parametrize(
    ("value", "text"), [(3, "an int"), ([], "a list"), (OSError(), "an OSError"), (ValueError(), "a ValueError")]
)
def test_a_type_has_its_article(value: object, text: str) -> None:
    assert a_type(value) == text


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("lenet", ["lenet5", "mlp"], "; did you mean 'lenet5'?"),
        ("conv", ["conv1", "conv2", "conv1"], "; did you mean 'conv2' or 'conv1'?"),
        ("conv", ["conv1", "conv2", "conv3", "conv4"], "; did you mean 'conv4' or 'conv3' or 'conv2'?"),
        ("quantum", ["lenet5", "mlp"], ""),
        ("lenet", [], ""),
    ],
)
def test_near_names_are_suggested_here_and_in_models(name: str, known: list[str], hint: str) -> None:
    assert did_you_mean(name, known) == hint
    assert errors.did_you_mean(name, known) == hint


@pytest.mark.parametrize(
    ("name", "text"),
    [(b"caf\xc3\xa9.png", "café.png"), (b"caf\xe9.png", r"caf\xe9.png"), (b"\xff\xfe", r"\xff\xfe"), (b"a b", "a b")],
)
def test_a_path_is_printed_whatever_its_bytes(name: bytes, text: str) -> None:
    path = os.fsdecode(name)
    assert printable(path) == printable(Path(path)) == as_utf8(path) == text
    assert path.encode("utf-8", "show_bytes").decode() == text


def test_a_name_of_several_lines_is_printed_on_one() -> None:
    assert printable("a\nb\t\x1b[1m\udce9.png") == r"a\nb\t\x1b[1m\xe9.png"
    assert as_utf8("a\nb\udce9.png") == "a\nb\\xe9.png"


def test_a_stream_of_another_encoding_shows_what_it_cannot_hold() -> None:
    assert "é图\udce9".encode("latin-1", "show_bytes") == b"\xe9\\u56fe\\xe9"


@pytest.mark.parametrize(
    ("name", "utf8"), [(b"plain", True), ("ümläut/图".encode(), True), (b"caf\xe9", False), (b"a\xff/b", False)]
)
def test_paths_that_are_not_utf8_are_told(name: bytes, utf8: bool) -> None:
    assert is_utf8(os.fsdecode(name)) is utf8
    assert is_utf8(Path(os.fsdecode(name))) is utf8
