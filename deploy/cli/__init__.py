"""The command `deploy`: every command parses, calls the public function of the same name, and prints.

Only click is imported here, and a command's own module when it is called, so that `--help` answers at once.
"""

import codecs
import importlib
import io
import os
import signal
import sys

import click

from deploy.errors import DeployError
from deploy.version import __version__
from deploy.words import did_you_mean, show_bytes

# Name -> module of deploy.cli and what --help says; the module's `command` is the click command.
_COMMANDS = {
    "doctor": ("doctor", "Show what this machine can do: GPUs, driver, backends."),
    "export": ("export", "Turn a state_dict into an ONNX artifact, checked against eager."),
    "convert": ("convert", "Turn an ONNX artifact into half precision."),
    "quantize": ("quantize", "Turn an ONNX artifact into INT8, calibrated on images."),
    "build-trt": ("build_trt", "Build a TensorRT engine from an ONNX artifact."),
    "build-aoti": ("build_aoti", "Compile the module of an export with torch's AOTInductor."),
    "verify": ("verify", "Find the layer on which two artifacts of one network part."),
    "tune": ("tune", "Find the fastest mix of INT8 and floating point, certified."),
    "inspect": ("inspect", "Show what an artifact is, where it comes from, its evidence."),
    "eval": ("eval", "Measure top-1 and top-5 accuracy on an ImageFolder."),
    "predict": ("predict", "Show class names and probabilities of images."),
    "serve": ("serve", "Serve artifacts over the Open Inference Protocol, REST and gRPC."),
    "export-triton": ("export_triton", "Write artifacts as a model repository of Triton."),
    "bench": ("bench", "Time artifacts and backends, paired with eager PyTorch."),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f"deploy.cli.{_COMMANDS[cmd_name][0]}")
        importlib.import_module("deploy.cli.log").show_log()
        command: click.Command = module.command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in _COMMANDS and not args[0].startswith("-"):
            hint = did_you_mean(args[0], _COMMANDS) or f"; expected one of {', '.join(_COMMANDS)}"
            raise click.UsageError(f"No such command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="deploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """From a trained PyTorch state_dict to a fast, verified GPU inference engine.

    \b
    deploy export --arch resnet34 --weights weights.pth
    deploy build-trt --fp16
    deploy bench
    """


def main() -> None:
    """Run the command line and end the process: 0 done, 1 the work or a gate failed, 2 wrong usage, 130 interrupted."""
    args = sys.argv[1:]
    codecs.register_error("show_bytes", show_bytes)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="show_bytes")  # a path may be of any bytes
    debug = "--debug" in args
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status = cli.main(args, prog_name="deploy", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except click.exceptions.Exit as exit_:
        status = exit_.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        status = 130
    except BrokenPipeError:  # the reader has seen enough (`deploy ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except DeployError as error:
        if debug:
            _print_traceback()
        click.echo(f"error: {_in_flags(str(error), args)}", err=True)
        status = error.exit_status
    except ImportError as error:
        if debug:
            _print_traceback()
        status = _report_import(error, args)
    except OSError as error:  # a full disk, a folder that is gone
        if debug:
            _print_traceback()
        where = f" ({error.filename})" if error.filename else ""
        click.echo(f"error: {error.strerror or error}{where}", err=True)
        status = 1
    except Exception as error:  # a bug of ours: said in one line too
        if debug:
            _print_traceback()
        click.echo(f"error: {type(error).__name__}: {error}\nthis is a bug in deploy; --debug shows where", err=True)
        status = 1
    sys.exit(status)


def _in_flags(message: str, args: list[str]) -> str:
    """`message` with the names of parameters as the command that was called spells them."""
    from deploy.cli.options import in_flags

    command = next((arg for arg in args if arg in _COMMANDS), None)
    return in_flags(message, cli.get_command(click.Context(cli), command) if command and isinstance(cli, click.Group) else None)


def _report_import(error: ImportError, args: list[str]) -> int:
    """Say which extra brings the library that is missing; the exit status."""
    from deploy.host.extras import missing

    command = next((arg for arg in args if not arg.startswith("-")), "")
    known = missing(error, f"deploy {command}".strip())
    click.echo(f"error: {known}" if known else f"error: {error}\nthis is a bug in deploy; --debug shows where", err=True)
    return 1


def _terminate(number: int, frame: object) -> None:
    """End as after an error, so that what is half written is removed."""
    sys.exit(128 + number)


def _print_traceback() -> None:
    import traceback  # slow to import, and of use for --debug alone

    traceback.print_exc()
