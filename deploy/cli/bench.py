"""`deploy bench`."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.artifact.find import BUILD
from deploy.cli.common import debug_option, device_option, progress_bar, threads_option
from deploy.cli.options import PATH
from deploy.errors import OutputError, UsageError
from deploy.runtime.catalog import AUTO, BACKENDS

if TYPE_CHECKING:
    from deploy.bench.candidate.loadgen import Scenario
    from deploy.bench.candidate.traffic import Load

STDOUT = Path("-")


@click.command("bench")
@click.argument("artifacts", nargs=-1, metavar="[ARTIFACT]...")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="B",
    help=f"{', '.join(BACKENDS)}, some with a variant (onnxruntime:cuda, eager:fp16,channels_last); may be repeated."
    f"  [default: {', '.join(AUTO)}, and for engines their flavour]",
)
@click.option("--batch", "batches", default=None, metavar="1,8,32", help="Batch sizes.  [default: 1,8,32]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=12.0,
    show_default=True,
    metavar="S",
    help="Time to spend on measuring.",
)
@click.option(
    "--shapes",
    multiple=True,
    metavar="NAME=SHAPE",
    help="Shape of an input with dynamic dimensions, such as x=1x3x224x224; its batch is that of --batch.",
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
    "--baseline", default="eager", show_default=True, metavar="B", help="What all is compared with, with a variant if any."
)
@click.option("--data", type=PATH, metavar="IMAGEFOLDER", help="Images to run on.  [default: random numbers]")
@click.option("--eval", "evaluate", type=PATH, metavar="IMAGEFOLDER", help="Measure the accuracy of every candidate on these.")
@click.option("--concurrency", default=None, metavar="1,2,4,8", help="Also measure so many callers at a time, in a closed loop.")
@click.option(
    "--rate", default=None, metavar="R,...", help="Also measure R requests a second, in an open loop with Poisson arrivals."
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
    default=None,
    metavar="Q",
    help="Of --scenario server: queries a second.  [default: half of what the baseline can]",
)
@click.option(
    "--target-ms",
    type=float,
    default=None,
    metavar="MS",
    help="Of --scenario server: what 99 % of queries must keep to.  [default: ten runs of the baseline]",
)
@click.option(
    "--logs", type=PATH, default=Path("build/loadgen"), show_default=True, metavar="DIR", help="Where LoadGen's logs go."
)
@click.option(
    "--load-seconds",
    type=float,
    default=3.0,
    show_default=True,
    metavar="S",
    help="Time of each load and scenario, for each candidate; MLPerf asks for 600.",
)
@click.option("--layers", is_flag=True, help="Also time the layers, by ONNX node and torch module.")
@click.option("--skip-missing", is_flag=True, help="List a named backend that cannot run here, and measure the rest.")
@click.option("--different-models", is_flag=True, help="Compare artifacts that do not descend from the same state_dict.")
@click.option(
    "--compare",
    nargs=2,
    type=PATH,
    metavar="OLD.json NEW.json",
    help="Measure nothing: say what became slower or faster between two --json files. Status 1 on a regression.",
)
@click.option(
    "--tolerance",
    type=float,
    default=None,
    metavar="SHARE",
    help="With --compare: share of its speed that a candidate may lose.  [default: 0.05]",
)
@device_option
@threads_option
@debug_option
def command(
    artifacts: tuple[str, ...],
    backends: tuple[str, ...],
    batches: str | None,
    shapes: tuple[str, ...],
    seconds: float,
    json_file: Path | None,
    report: Path | None,
    baseline: str,
    data: Path | None,
    evaluate: Path | None,
    concurrency: str | None,
    rate: str | None,
    scenarios: tuple[str, ...],
    target_qps: float | None,
    target_ms: float | None,
    logs: Path,
    load_seconds: float,
    layers: bool,
    skip_missing: bool,
    different_models: bool,
    compare: tuple[Path, Path] | None,
    tolerance: float | None,
    device: str,
    threads: int | None,
) -> int:
    """Time artifacts and backends, each in a process of its own and paired with eager PyTorch.

    Without arguments: all artifacts under build/ that descend from the same state_dict as the newest.
    """
    if compare is not None:
        return _compare(compare, tolerance, json_file, nothing_else=not (artifacts or backends or batches or shapes))
    if tolerance is not None:
        raise UsageError("--tolerance goes with --compare")
    from deploy.artifact.find import open_artifact
    from deploy.bench.bench import bench  # loads numpy and onnx
    from deploy.bench.options import BenchOptions, parse_backends
    from deploy.bench.plan import find_artifacts
    from deploy.bench.report.table import print_table

    options = BenchOptions(
        backends=parse_backends(backends),
        batches=_sizes(batches),
        shapes=shapes,
        seconds=seconds,
        device=device,
        threads=threads,
        baseline=baseline,
        data=data,
        evaluate=evaluate,
        loads=_loads(concurrency, rate),
        load_seconds=load_seconds,
        scenarios=_scenarios(scenarios, target_qps, target_ms),
        logs=logs,
        layers=layers,
        skip_missing=skip_missing,
        different_models=different_models,
    )
    if json_file is not None and json_file != STDOUT:
        _check_writable(json_file, "--json", ".json")
    if report is not None:
        _check_writable(report, "--report", ".html")
    found = [open_artifact(path) for path in artifacts] if artifacts else find_artifacts(BUILD)
    with progress_bar() as progress:
        result = bench(found, options, named=bool(artifacts), progress=progress)
    document = json.dumps(result.to_json(), indent=1) + "\n"
    if report is not None:
        from deploy.bench.report import render

        report.write_text(render(result.to_json()), encoding="utf-8")
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


def _loads(concurrency: str | None, rate: str | None) -> "tuple[Load, ...]":
    from deploy.bench.candidate.traffic import Load

    try:
        callers = [Load(concurrency=int(word)) for word in (concurrency or "").split(",") if word]
        rates = [Load(rate=float(word)) for word in (rate or "").split(",") if word]
    except ValueError as error:
        raise UsageError(f"--concurrency and --rate take numbers such as 1,2,4: {error}") from None
    return (*callers, *rates)


def _scenarios(texts: tuple[str, ...], target_qps: float | None, target_ms: float | None) -> "tuple[Scenario, ...]":
    from deploy.bench.candidate.loadgen import Scenario

    names = list(dict.fromkeys(word for text in texts for word in text.split(",")))
    if "server" not in names and (target_qps is not None or target_ms is not None):
        raise UsageError("--target-qps and --target-ms go with --scenario server")
    targets = {"target_qps": target_qps, "target_ms": target_ms}
    return tuple(Scenario(name=name, **(targets if name == "server" else {})) for name in names)


def _sizes(text: str | None) -> tuple[int, ...]:
    if text is None:
        return ()
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"cannot read the batch sizes {text!r}; expected numbers such as 1,8,32")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _check_writable(path: Path, option: str, suffix: str) -> None:
    """Raise before anything is measured: UsageError for what can be no FILE of results, OutputError where none can be written."""
    if path.suffix != suffix or path.is_dir():  # `--json ARTIFACT`: the name was taken for the FILE
        raise UsageError(f"{option} takes a FILE ending in {suffix}, not {path}; put artifacts before it")
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
