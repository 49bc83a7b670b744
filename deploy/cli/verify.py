"""`deploy verify`."""

import json
from pathlib import Path

import click

from deploy.cli.common import check_writable, debug_option, json_option, progress_bar
from deploy.cli.options import PATH


@click.command("verify")
@click.argument("a")
@click.argument("b")
@click.option(
    "--eager", is_flag=True, help="Take A's tensors from its PyTorch module, whose code is run, not from its ONNX file."
)
@click.option("--data", type=PATH, metavar="FOLDER", help="Real input: an ImageFolder or .npz feeds.  [default: random numbers]")
@click.option(
    "--reproduce", type=PATH, metavar="DIR", help="Write the smallest file that shows the first culprit, with its input."
)
@click.option("--report", type=PATH, metavar="FILE.html", help="Write a page with the errors along the depth of the network.")
@json_option
@debug_option
def command(a: str, b: str, eager: bool, data: Path | None, reproduce: Path | None, report: Path | None, as_json: bool) -> None:
    """Find the layer on which artifact B parts from artifact A.

    Both must come from one export: FP32 and FP16, FP32 and INT8, and so on; of an engine, the file that it was built from, and its
    own outputs where it can run. Each layer of B is run as it is (cumulative) and fed A's own tensors (local), and judged against
    what rounding at random in B's formats does to A's layers. Exit status 1 where an output parts beyond that.
    """
    if report is not None:
        check_writable(report, "--report", ".html")
    from deploy.verify.page import page
    from deploy.verify.text import text
    from deploy.verify.verify import verify

    with progress_bar() as progress:
        found = verify(a, b, data=data, reproduce=reproduce, eager=eager, progress=progress)
    if report is not None:
        page(found, report)
    click.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False) if as_json else text(found))
    if found.beyond:
        raise click.exceptions.Exit(1)
