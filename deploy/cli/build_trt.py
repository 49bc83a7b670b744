"""`deploy build-trt`."""

from pathlib import Path
from typing import Any

import click

from deploy.artifact.manifest import FLAVOURS
from deploy.artifact.summary import share_text, summary
from deploy.cli.common import PATH, debug_option, fp32, open_or_newest, output_option, progress_bar
from deploy.cli.quantize import quantize_options
from deploy.errors import UsageError


@click.command("build-trt")
@click.argument("artifact", required=False)
@click.option("--fp16", is_flag=True, help="Convert to FP16 first.")
@click.option("--bf16", is_flag=True, help="Convert to bfloat16 first.")
@click.option("--fp16-io", is_flag=True, help="Inputs and outputs in FP16 too.")
@click.option("--data", type=PATH, metavar="IMAGEFOLDER", help="Real images for activation ranges and parity of the conversion.")
@click.option("--int8", is_flag=True, help="Quantize first, with --calib; with --fp16, what is not INT8 is FP16.")
@quantize_options
@click.option("--flavour", default="auto", show_default=True, metavar="F", help=f"auto, {' or '.join(FLAVOURS)}.")
@click.option(
    "--shapes",
    multiple=True,
    metavar="NAME=MIN:OPT:MAX",
    help="Range of one input's shape, such as x=1x8:4x8:9x8; the same input again begins the next profile.",
)
@click.option("--opt-level", type=int, metavar="N", help="0 (quick build) to 5 (fast engine).  [default: TensorRT's, 3]")
@click.option("--tf32", is_flag=True, help="Let FP32 arithmetic round its inputs to TF32: faster, off by about 1e-3.")
@click.option("--timing-cache", type=PATH, metavar="FILE", help="Tactic timings to read and write (tensorrt only).")
@click.option("--version-compatible", is_flag=True, help="An engine that later minor versions run too.")
@click.option("--hardware-compatible", is_flag=True, help="An engine for any GPU from Ampere on.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    metavar="CC",
    help="Compute capability to build for, such as 8.6; may be repeated (tensorrt-rtx only).",
)
@click.option(
    "--workspace", type=int, metavar="MIB", help="GPU memory that a layer may use beside its tensors at most.  [default: all]"
)
@click.option("--allow-slower", is_flag=True, help="With --int8 on a GPU: keep an engine that is slower than FP16.")
@click.option("--no-cache", is_flag=True, help="Build anew where the same engine was built before, and do not keep it.")
@click.option(
    "--preflight", is_flag=True, help="Let TensorRT's parser read the model and list all that it refuses; build nothing."
)
@output_option("build/<name>[-<precision>]-trt")
@debug_option
def command(
    artifact: str | None,
    fp16: bool,
    bf16: bool,
    fp16_io: bool,
    data: Path | None,
    int8: bool,
    calib: Path | None,
    images: int | None,
    quantization: dict[str, Any],
    eval_folder: Path | None,
    max_drop: float | None,
    flavour: str,
    shapes: tuple[str, ...],
    opt_level: int | None,
    tf32: bool,
    timing_cache: Path | None,
    version_compatible: bool,
    hardware_compatible: bool,
    targets: tuple[str, ...],
    workspace: int | None,
    allow_slower: bool,
    no_cache: bool,
    preflight: bool,
    out: Path | None,
) -> None:
    """Build a TensorRT engine from an ONNX artifact or file (the newest FP32 artifact under build/ by default).

    Without --fp16, --bf16 and --int8 the file's own precisions are built as they are.
    """
    if fp16 and bf16:
        raise UsageError("--fp16 and --bf16 exclude one another")
    from deploy.pipeline.build_trt import build_trt  # loads heavy libraries
    from deploy.pipeline.build_trt import preflight as check
    from deploy.precision.int8.quantize import QuantizeOptions

    source = open_or_newest(artifact, "FP32 ONNX artifact", fp32)
    common: dict[str, Any] = {
        "precision": "fp16" if fp16 else "bf16" if bf16 else None,
        "fp16_io": fp16_io,
        "data": data,
        "int8": int8,
        "calib": calib,
        "images": images,
        "quantization": QuantizeOptions(**quantization),
        "flavour": flavour,
        "shapes": shapes,
    }
    if preflight:
        with progress_bar() as progress:
            found = check(source, **common, progress=progress)
        click.echo(f"{source.shown}: {found.flavour} {found.version} takes all {found.nodes} nodes; {share_text(found.share)}")
        return
    with progress_bar() as progress:
        made = build_trt(
            source,
            out,
            **common,
            eval_folder=eval_folder,
            max_drop=max_drop,
            targets=targets,
            opt_level=opt_level,
            tf32=tf32,
            workspace=workspace,
            allow_slower=allow_slower,
            cache=not no_cache,
            timing_cache=timing_cache,
            version_compatible=version_compatible,
            hardware_compatible=hardware_compatible,
            progress=progress,
        )
    click.echo(summary(made))
