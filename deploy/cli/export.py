"""`deploy export`."""

from pathlib import Path
from typing import Literal

import click

from deploy.artifact.summary import summary
from deploy.cli.common import PATH, debug_option, output_option, progress_bar


@click.command("export")
@click.option("--arch", metavar="NAME", help="A reference architecture, torchvision:NAME or timm:NAME.")
@click.option("--model", metavar="FILE.py:FACTORY", help="Your own module: FILE.py:FACTORY or pkg.mod:FACTORY.")
@click.option("--onnx", type=PATH, metavar="FILE.onnx", help="Make an artifact of a bare ONNX file.")
@click.option("--model-arg", "model_args", multiple=True, metavar="K=V", help="Argument of the factory; may be repeated.")
@click.option("--weights", type=PATH, metavar="FILE", help=".pt, .pth, .tar or .safetensors.  [default: seeded random weights]")
@click.option("--match", type=click.Choice(["name", "order"]), default="name", show_default=True, help="How tensors are paired.")
@click.option("--allow-partial", is_flag=True, help="Load the tensors that fit, and say which did not.")
@click.option("--num-classes", type=click.IntRange(min=1), metavar="N", help="[default: read from the checkpoint's head]")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=1x3x224x224[:dtype]",
    help="An input, by position; a letter is a dynamic dimension.",
)
@click.option("--output", "outputs", multiple=True, metavar="NAME", help="Name of an output, by position.")
@click.option("--static-batch", is_flag=True, help="Keep the leading 1 as it is, instead of a dynamic batch.")
@click.option("--preprocess", metavar="NAME|FILE.json", help="imagenet, mnist, cifar10, none or a JSON file.")
@click.option("--classes", type=PATH, metavar="FILE", help="Class names, one a line.")
@click.option("--data", type=PATH, metavar="IMAGEFOLDER", help="Check parity on real images too.")
@click.option("--opset", type=int, metavar="N", help="ONNX opset.  [default: PyTorch's]")
@click.option("--rtol", type=float, metavar="X", help="Relative tolerance of parity.  [default: 1e-4]")
@click.option("--atol", type=float, metavar="X", help="Absolute tolerance of parity.  [default: 1e-5]")
@click.option("--name", metavar="NAME", help="The artifact's name.  [default: the last part of DIR]")
@output_option("build/<name>")
@debug_option
def command(
    arch: str | None,
    model: str | None,
    onnx: Path | None,
    model_args: tuple[str, ...],
    weights: Path | None,
    match: Literal["name", "order"],
    allow_partial: bool,
    num_classes: int | None,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    static_batch: bool,
    preprocess: str | None,
    classes: Path | None,
    data: Path | None,
    opset: int | None,
    rtol: float | None,
    atol: float | None,
    name: str | None,
    out: Path | None,
) -> None:
    """Turn a trained state_dict into an ONNX artifact, with parity against the eager module.

    Without --weights the net is seeded and random, and the manifest says so; nothing is downloaded.
    """
    from deploy.pipeline.export import export  # loads heavy libraries

    with progress_bar() as progress:
        artifact = export(
            out,
            arch=arch,
            model=model,
            onnx=onnx,
            model_args=model_args,
            weights=weights,
            match=match,
            allow_partial=allow_partial,
            num_classes=num_classes,
            inputs=inputs,
            outputs=outputs,
            static_batch=static_batch,
            preprocess=preprocess,
            classes=classes,
            data=data,
            opset=opset,
            rtol=rtol,
            atol=atol,
            name=name,
            progress=progress,
        )
    click.echo(summary(artifact))
