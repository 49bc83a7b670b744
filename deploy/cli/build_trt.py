"""`deploy build-trt`."""

from pathlib import Path
from typing import Any

import click

from deploy.artifact.summary import share_text, summary
from deploy.cli.common import debug_option, fp32, open_or_newest, output_option, progress_bar
from deploy.cli.options import options
from deploy.engine.compatibility import rtx_refusal
from deploy.engine.options import BuildOptions
from deploy.evidence.options import ToleranceOptions
from deploy.options import collect, option_names
from deploy.pipeline.build_trt import build_trt, gpu_identity
from deploy.pipeline.build_trt import preflight as check
from deploy.pipeline.build_trt_options import BuildTrtOptions
from deploy.pipeline.quantize import CalibrationOptions, GateOptions
from deploy.precision.int8.options import QuantizeOptions

_ENGINE_ONLY = (
    "allow_slower",
    "cache",
    "refit_from",
    *option_names(GateOptions),
    *option_names(BuildOptions),
    *option_names(ToleranceOptions),
)
"""Options that say nothing to the parser."""


@click.command("build-trt")
@click.argument("artifact", required=False)
@options(BuildTrtOptions, CalibrationOptions)
@options(QuantizeOptions, leave_out=("fp16", "fp8"))
@options(GateOptions, ToleranceOptions, BuildOptions)
@click.option(
    "--preflight", is_flag=True, help="Let TensorRT's parser read the model and list all that it refuses; build nothing."
)
@output_option("build/<name>[-<precision>]-trt")
@debug_option
def command(artifact: str | None, preflight: bool, out: Path | None, **given: Any) -> None:
    """Build a TensorRT engine from an ONNX artifact or file (the newest FP32 artifact under build/ by default).

    Without --fp16, --bf16, --int8 and --fp8 the file's own precisions are built as they are.
    """
    chosen = collect(QuantizeOptions, {**given, "fp8": False})  # which of the two it is, `build_trt` says
    others = {name: value for name, value in given.items() if name not in option_names(QuantizeOptions) or name == "fp8"}
    source = open_or_newest(artifact, "FP32 ONNX artifact", fp32)
    if preflight:
        parsed = {name: value for name, value in others.items() if name not in _ENGINE_ONLY}
        with progress_bar() as progress:
            found = check(source, quantization=chosen, progress=progress, **parsed)
        click.echo(f"{source.shown}: {found.flavour} {found.version} takes all {found.nodes} nodes; {share_text(found.share)}")
        return
    with progress_bar() as progress:
        made = build_trt(source, out, quantization=chosen, progress=progress, **others)
    click.echo(summary(made))
    gpu = gpu_identity() if made.manifest.target and made.manifest.target.flavour == "tensorrt-rtx" else None
    if gpu and (refusal := rtx_refusal(*gpu[:2])):
        click.echo(f"  not here   {refusal}")
