"""Command-line options generated from the fields of option dataclasses, and errors in the words of the command line."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from deploy.errors import UsageError
from deploy.options import Described, described_fields, plain_type

PATH = click.Path(path_type=Path)

Command = Callable[..., Any]


def options(*kinds: type, leave_out: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Give a command an option for each field of these dataclasses, in order, except those of `leave_out`.

    The command receives the values as keyword arguments by the fields' names.
    """
    chosen = [
        (each, described, get_type_hints(kind)[each.name])
        for kind in kinds
        for each, described in described_fields(kind)
        if each.name not in leave_out
    ]

    def decorate(command: Command) -> Command:
        switched = {each.name: each for each, described, _ in chosen if described.switches}
        decorated = _with_switches(command, switched) if switched else command
        for each, described, hint in reversed(chosen):
            for make in reversed(_click_options(each, described, hint)):
                decorated = make(decorated)
        return decorated

    return decorate


class Numbers(click.ParamType):  # type: ignore[type-arg]  # generic in new versions of click alone
    """Numbers above 0 with commas between, such as `1,8,32`, as a tuple without repetitions."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if not isinstance(value, str):
            return tuple(value)
        try:
            numbers = tuple(dict.fromkeys(self.kind(part) for part in value.split(",")))
        except ValueError:
            numbers = (0,)
        if not all(number > 0 for number in numbers):
            self.fail(f"cannot read {value!r}; expected numbers above 0 such as 1,8,32", param, ctx)
        return numbers


class _Switch(click.Option):
    """One of the flags that choose the value of the field `of`."""

    def __init__(self, *args: Any, of: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.of = of


def _click_options(each: "Field[Any]", described: Described, hint: Any) -> list[Callable[[Command], Command]]:
    if described.switches:
        return [
            click.option(f"--{value}", f"{each.name}_{value}", cls=_Switch, of=each.name, is_flag=True, help=text)
            for value, text in described.switches.items()
        ]
    flag = described.flag or f"--{each.name.replace('_', '-')}"
    wanted = plain_type(hint)
    shown = f"{described.help}  [default: {described.default}]" if described.default else described.help
    if wanted is bool:
        if each.default is None:
            return [click.option(f"{flag}/--no-{flag[2:]}", each.name, default=None, help=shown)]
        if each.default is True:
            return [
                click.option(
                    described.flag or f"--no-{flag[2:]}", each.name, is_flag=True, flag_value=False, default=True, help=shown
                )
            ]
        return [click.option(flag, each.name, is_flag=True, help=shown)]
    if wanted == tuple[int, ...]:
        return [click.option(flag, each.name, type=Numbers(int), default=each.default, metavar=described.metavar, help=shown)]
    if get_origin(wanted) is tuple or get_origin(wanted) in (Mapping, dict):
        return [click.option(flag, each.name, multiple=True, metavar=described.metavar, help=shown)]
    default = None if each.default is MISSING else each.default
    return [
        click.option(
            flag,
            each.name,
            type=_click_type(wanted),
            default=default,
            show_default=default is not None,
            metavar=described.metavar,
            help=shown,
        )
    ]


def _click_type(wanted: Any) -> Any:
    if wanted is Path:
        return PATH
    if get_origin(wanted) is Literal:
        return click.Choice(get_args(wanted))
    return wanted if wanted in (int, float) else str


def _with_switches(command: Command, switched: Mapping[str, "Field[Any]"]) -> Command:
    """Let the command receive one value for the switches of a field. Raises UsageError for two of them, or none where one must be."""

    @functools.wraps(command)
    def chosen(**given: Any) -> Any:
        for name, each in switched.items():
            values = list(each.metadata["option"].switches)
            on = [value for value in values if given.pop(f"{name}_{value}")]
            flags = " and ".join(f"--{value}" for value in values)
            if len(on) > 1:
                raise UsageError(f"{flags} exclude one another")
            if not on and each.default is MISSING:
                raise UsageError(f"say which {name}: one of {flags}")
            given[name] = on[0] if on else each.default
        return command(**given)

    return chosen


def in_flags(message: str, command: click.Command | None) -> str:
    """`message` with each parameter of the command in backticks replaced by its flag: `` `max_drop` `` by `--max-drop`."""
    flags: dict[str, list[str]] = {}
    for parameter in command.params if command is not None else ():
        if isinstance(parameter, click.Option) and parameter.name:
            name = parameter.of if isinstance(parameter, _Switch) else parameter.name
            flags.setdefault(name, []).append(parameter.opts[-1])
    return re.sub(r"`(\w+)`", lambda match: " or ".join(flags[match[1]]) if match[1] in flags else match[0], message)
