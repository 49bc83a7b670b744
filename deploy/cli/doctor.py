"""`deploy doctor`."""

import json
from typing import Any

import click

from deploy.cli.common import debug_option, json_option


@click.command("doctor")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """Show what this machine can do: GPUs, driver, CUDA, and the version of each backend and extra, or what is missing."""
    from deploy.runtime.doctor import examine  # loads every backend

    report = examine()
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    torch = report["torch"]
    lines = [
        f"deploy {report['deploy']}, Python {report['python']}, {report['platform']}",
        f"CPU       {report['cpu']}, {report['cores']} cores",
    ]
    lines += [
        f"GPU       {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_mib'] or '?'} MiB, driver {gpu['driver']}"
        for gpu in report["gpus"]
    ] or [f"GPU       none: {report['gpus_missing']}"]
    cuda = "CUDA works" if torch["cuda_available"] else "CUDA cannot be used here"
    if torch["version"] is None:
        lines.append(f"torch     missing: {torch['reason']}")
    else:
        lines.append(f"torch     {torch['version']}, built for CUDA {torch['cuda']}: {cuda}")
    lines.append(f"C++       {': '.join(filter(None, (report['compiler'] or 'none', report['compiler_missing'])))}")
    for title, key in (("backend", "backends"), ("builder", "flavours"), ("optional", "optional")):
        for entry in report[key]:
            state = (
                "; ".join(filter(None, (entry["version"], entry.get("note"))))
                if entry["available"]
                else f"missing: {entry['reason']}"
            )
            lines.append(f"{title:<9} {entry['name']:<20} {state}")
    lines += [f"{'extra':<9} {extra['name']:<20} {_libraries(extra)}" for extra in report["extras"]]
    click.echo("\n".join(lines))


def _libraries(extra: dict[str, Any]) -> str:
    """The libraries of an extra with their versions, and those that are missing with the pip command."""
    there = [f"{library['name']} {library['version']}" for library in extra["libraries"] if library["version"] is not None]
    missing = [library["name"] for library in extra["libraries"] if library["version"] is None]
    parts = [", ".join(there)] * bool(there)
    parts += [f"missing: {', '.join(missing)}: {extra['install']}"] * bool(missing)
    return "; ".join(parts)
