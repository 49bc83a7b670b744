"""Options are described once: the command line and the Python functions have those of the dataclasses, with their defaults."""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

import click
import pytest
from click.testing import CliRunner

import deploy
from deploy.cli.options import in_flags, options
from deploy.cli.tune import NOT_HERE
from deploy.engine.options import BuildOptions
from deploy.errors import UsageError
from deploy.evidence.options import ToleranceOptions
from deploy.options import described_fields, option
from deploy.pipeline.build_aoti import BuildAotiOptions
from deploy.pipeline.build_trt_options import BuildTrtOptions
from deploy.pipeline.export_options import ExportOptions
from deploy.pipeline.quantize import CalibrationOptions, CpuFormOptions, GateOptions
from deploy.precision.formats import ConvertOptions
from deploy.precision.int8.options import QuantizeOptions
from deploy.tune.options import TuneOptions
from deploy.tune.tune import tune


@dataclass(frozen=True, kw_only=True)
class Sample:
    shade: Literal["light", "dark"] | None = option(None, switches={"light": "Light.", "dark": "Dark."})
    width: int = option(3, "Width.", metavar="MM")
    share: float | None = option(None, "Share.", default="all")
    folder: Path | None = option(None, "Where.", flag="--in")
    side: Literal["left", "right"] = option("left", "Side.")
    names: tuple[str, ...] = option((), "A name.", flag="--name")
    loud: bool = option(False, "Loud.")
    cache: bool = option(True, "Leave the cache out.")
    smooth: bool | None = option(None, "Smooth.")


def received(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    @click.command()
    @options(Sample)
    def command(**given: Any) -> None:
        found.update(given)

    result = CliRunner().invoke(command, arguments, catch_exceptions=False, standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return found


def test_without_arguments_a_command_gets_the_defaults_of_the_dataclass() -> None:
    assert received() == {each.name: each.default for each in fields(Sample)}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--dark"], {"shade": "dark"}),
        (["--width", "5", "--share", "0.5"], {"width": 5, "share": 0.5}),
        (["--in", "a/b"], {"folder": Path("a/b")}),
        (["--side", "right"], {"side": "right"}),
        (["--name", "a", "--name", "b"], {"names": ("a", "b")}),
        (["--loud", "--no-cache"], {"loud": True, "cache": False}),
        (["--smooth"], {"smooth": True}),
        (["--no-smooth"], {"smooth": False}),
    ],
)
def test_what_is_typed_arrives_under_the_fields_name(arguments: list[str], expected: Mapping[str, Any]) -> None:
    assert received(*arguments) == {**received(), **expected}


def test_switches_of_one_field_exclude_one_another() -> None:
    with pytest.raises(UsageError, match="--light and --dark exclude one another"):
        received("--light", "--dark")


@pytest.mark.parametrize("arguments", [["--width", "wide"], ["--side", "up"], ["--cache"]])
def test_what_cannot_be_meant_is_clicks_own_error(arguments: list[str]) -> None:
    with pytest.raises(click.UsageError):
        received(*arguments)


def test_messages_get_the_flags_of_the_command() -> None:
    @click.command()
    @options(Sample)
    def command(**given: Any) -> None: ...

    message = "`folder` and `names` need `shade`; `cache` is off, and `unknown` is not an option"
    assert (
        in_flags(message, command) == "--in and --name need --light or --dark; --no-cache is off, and `unknown` is not an option"
    )
    assert in_flags(message, None) == message


FUNCTIONS: list[tuple[Callable[..., Any], tuple[type, ...], set[str]]] = [
    (deploy.export, (ExportOptions, ToleranceOptions), set()),
    (deploy.convert, (ConvertOptions, ToleranceOptions), set()),
    (deploy.quantize, (CalibrationOptions, QuantizeOptions, CpuFormOptions, GateOptions, ToleranceOptions), set()),
    (deploy.build_aoti, (BuildAotiOptions, ToleranceOptions), set()),
    (deploy.build_trt, (BuildTrtOptions, BuildOptions, CalibrationOptions, GateOptions, ToleranceOptions), {"quantization"}),
    (tune, (CalibrationOptions, TuneOptions, QuantizeOptions), {"device", "threads"}),
]
"""Public functions, the dataclasses that their options are in, and parameters that the command line spells out."""

NOT_OPTIONS = {"artifact", "out", "progress"}
LEFT_OUT = {"tune": NOT_HERE}
"""Options of QuantizeOptions that a function does without, or describes itself."""


def described_of(function: Callable[..., Any], *kinds: type) -> dict[str, Any]:
    """The options of these dataclasses that the function has, by name."""
    left = LEFT_OUT.get(function.__name__, ())
    return {
        each.name: each
        for kind in kinds
        for each, _ in described_fields(kind)
        if kind is not QuantizeOptions or each.name not in left
    }


@pytest.mark.parametrize(("function", "kinds", "more"), FUNCTIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_public_function_has_the_options_with_their_defaults(
    function: Callable[..., Any], kinds: tuple[type, ...], more: set[str]
) -> None:
    parameters = inspect.signature(function).parameters
    described = described_of(function, *kinds)
    assert set(parameters) - NOT_OPTIONS - more == set(described)
    for name, each in described.items():
        given = parameters[name].default
        own = each.default_factory() if each.default_factory is not MISSING else each.default
        if given is inspect.Parameter.empty:
            assert own in (MISSING, None), f"{name} must be given, and has the default {own!r} on the command line"
        else:
            assert given == own or (given == () and not own), (
                f"{name} is {given!r} in {function.__name__} and {own!r} in the dataclass"
            )
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize(("function", "kinds", "more"), FUNCTIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_public_function_takes_the_types_of_the_fields(
    function: Callable[..., Any], kinds: tuple[type, ...], more: set[str]
) -> None:
    taken = get_type_hints(function)
    for kind in kinds:
        hints = get_type_hints(kind)
        for each in described_of(function, kind).values():
            wanted = str(hints[each.name]).replace("pathlib.Path | None", "pathlib.Path | str | None")
            wanted = wanted.replace("tuple[str, ...]", "collections.abc.Sequence[str]")
            assert wanted in str(taken[each.name]) or wanted.replace(" | None", "") in str(taken[each.name]), each.name


@pytest.mark.parametrize("name", ["export", "convert", "quantize", "build-aoti", "build-trt"])
def test_every_option_is_in_the_help_with_its_text(name: str, run: Callable[..., Any]) -> None:
    kinds = next(kinds for function, kinds, _ in FUNCTIONS if function.__name__ == name.replace("-", "_"))
    shown = re.sub(r"\s+", " ", run(name, "--help").out)
    for kind in kinds:
        for each, described in described_fields(kind):
            for text in described.switches.values() if described.switches else [described.help]:
                assert text in shown, each.name
