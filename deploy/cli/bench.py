"""`deploy bench`."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from deploy.artifact.artifact import Artifact
from deploy.artifact.find import BUILD, open_artifact
from deploy.bench.candidate.loadgen import Scenario
from deploy.bench.candidate.traffic import Load
from deploy.bench.options import BenchOptions, parse_backends
from deploy.cli.common import check_writable, debug_option, device_option, progress_bar, threads_option
from deploy.cli.options import PATH, Numbers, options
from deploy.errors import UsageError
from deploy.options import collect

STDOUT = Path("-")


@click.command("bench")
@click.argument("artifacts", nargs=-1, metavar="[ARTIFACT]...")
@options(BenchOptions)
@click.option(
    "--concurrency",
    type=Numbers(int),
    default=(),
    metavar="1,2,4,8",
    help="Also measure so many callers at a time, in a closed loop.",
)
@click.option(
    "--rate",
    type=Numbers(float),
    default=(),
    metavar="R,...",
    help="Also measure R requests a second, in an open loop with Poisson arrivals.",
)
@click.option(
    "--scenario",
    "scenarios",
    multiple=True,
    metavar="S,...",
    help="Also run MLPerf's LoadGen: single-stream, multi-stream, server or offline; may be repeated.",
)
@click.option(
    "--target-qps",
    type=float,
    metavar="Q",
    help="Of --scenario server: queries a second.  [default: half of what the baseline can]",
)
@click.option(
    "--target-ms",
    type=float,
    metavar="MS",
    help="Of --scenario server: what 99 % of queries must keep to.  [default: ten runs of the baseline]",
)
@click.option(
    "--json",
    "json_file",
    type=PATH,
    is_flag=False,
    flag_value=str(STDOUT),
    metavar="[FILE]",
    help="Write the results, raw samples included, to FILE (which ends in .json), or to standard output and nothing else there.",
)
@click.option("--report", type=PATH, metavar="FILE.html", help="Write the report, one file that needs no network.")
@click.option(
    "--compare",
    nargs=2,
    type=PATH,
    metavar="OLD.json NEW.json",
    help="Measure nothing: report what became slower or faster between two --json files. Status 1 on a regression.",
)
@click.option(
    "--tolerance",
    type=float,
    metavar="SHARE",
    help="With --compare: share of its speed that a candidate may lose.  [default: 0.05]",
)
@device_option
@threads_option
@debug_option
def command(
    artifacts: tuple[str, ...],
    json_file: Path | None,
    report: Path | None,
    compare: tuple[Path, Path] | None,
    tolerance: float | None,
    **given: Any,
) -> int:
    """Time artifacts and backends, each in a process of its own and paired with eager PyTorch.

    Without arguments: all artifacts under build/ that descend from the same state_dict as the newest.
    """
    if compare is not None:
        measured = artifacts or given["backends"] or given["batches"] or given["shapes"]
        return _compare(compare, tolerance, json_file, nothing_else=not measured)
    if tolerance is not None:
        raise UsageError("--tolerance needs --compare")
    if json_file is not None and json_file != STDOUT:
        check_writable(json_file, "--json", ".json")
    if report is not None:
        check_writable(report, "--report", ".html")
    return _measure(artifacts, _bench_options(given), json_file, report)


def _bench_options(given: dict[str, Any]) -> BenchOptions:
    loads = [Load(concurrency=callers) for callers in given["concurrency"]] + [Load(rate=rate) for rate in given["rate"]]
    scenarios = _scenarios(given["scenarios"], given["target_qps"], given["target_ms"])
    chosen = {**given, "backends": parse_backends(given["backends"])}
    others = {"device": given["device"], "threads": given["threads"]}
    return collect(BenchOptions, chosen, loads=tuple(loads), scenarios=scenarios, **others)


def _measure(artifacts: tuple[str, ...], options: BenchOptions, json_file: Path | None, report: Path | None) -> int:
    from deploy.bench.bench import bench  # these load onnx
    from deploy.bench.plan import find_artifacts
    from deploy.bench.report.table import print_table

    found: list[Artifact] = [open_artifact(path) for path in artifacts] if artifacts else find_artifacts(BUILD)
    with progress_bar() as progress:
        result = bench(found, options, named=bool(artifacts), progress=progress)
    document = json.dumps(result.to_json(), indent=1) + "\n"
    if report is not None:
        from deploy.bench.report import render

        report.write_text(render(result.to_json()), encoding="utf-8", errors="backslashreplace")
    if json_file == STDOUT:
        click.echo(document, nl=False)
    else:
        if json_file is not None:
            json_file.write_text(document, encoding="utf-8")
        print_table(result, sys.stdout)
    if result.interrupted:
        raise KeyboardInterrupt  # after what was measured has been written
    return 1 if result.failed else 0


def _compare(files: tuple[Path, Path], tolerance: float | None, json_file: Path | None, *, nothing_else: bool) -> int:
    if not nothing_else or json_file not in (None, STDOUT):
        raise UsageError("--compare takes the two files alone, --tolerance and --json")
    from deploy.bench.report.compare import TOLERANCE, compare_files
    from deploy.bench.report.table import print_comparison

    found = compare_files(*files, TOLERANCE if tolerance is None else tolerance)
    if json_file == STDOUT:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_comparison(found, sys.stdout)
    return 1 if found.regressions else 0


def _scenarios(texts: tuple[str, ...], target_qps: float | None, target_ms: float | None) -> tuple[Scenario, ...]:
    names = list(dict.fromkeys(word for text in texts for word in text.split(",")))
    if "server" not in names and (target_qps is not None or target_ms is not None):
        raise UsageError("--target-qps and --target-ms need --scenario server")
    targets = {"target_qps": target_qps, "target_ms": target_ms}
    return tuple(Scenario(name=name, **(targets if name == "server" else {})) for name in names)
