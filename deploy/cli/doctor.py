"""`deploy doctor`."""

import json

import click

from deploy.cli.common import debug_option, json_option


@click.command("doctor")
@json_option
@debug_option
def command(as_json: bool) -> None:
    """Show what this machine can do: GPUs, driver, CUDA, each backend with its version or what is missing."""
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
    lines.append(f"torch     {torch['version']}, built for CUDA {torch['cuda']}: {cuda}")
    for title, key in (("backend", "backends"), ("builder", "flavours"), ("optional", "optional")):
        for entry in report[key]:
            state = entry["version"] if entry["available"] else f"missing: {entry['reason']}"
            lines.append(f"{title:<9} {entry['name']:<20} {state}")
    click.echo("\n".join(lines))
