"""The `blinkimp` command: serve, generate, chat, doctor, tune, compile, bench, top, trace, lab.

Each subcommand is a module of its own with `add_parser()` and `run()`; it is imported only when its name is given, so that `--help`
answers at once. Test: pytest tests/null/test_cli_arguments.py tests/host/test_cli.py
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Sequence

from blinkimp import __version__
from blinkimp.cli.options import HelpFormatter, Parser
from blinkimp.cli.user_text import NotUtf8Error

COMMANDS = {
    "serve": "load a model and serve it to clients",
    "generate": "complete a prompt and stream the completion to the terminal",
    "chat": "talk to a model in the terminal",
    "doctor": "check this machine, and say what to do about each problem",
    "tune": "change limits of a running engine's schedule",
    "compile": "compile the GPU kernels for a model ahead of time",
    "bench": "put load on a server, this one's or any OpenAI-compatible one, and measure it",
    "top": "watch a running engine: batch, pages, tokens a second, queue pairs",
    "trace": "record what a running engine does, and see where the time goes",
    "lab": "sweeps over loads, interference on the host's CPU, and reports of both",
}

DESCRIPTION = """\
LLM serving without a CPU on the path of a token: one persistent CUDA kernel polls queues in shared memory, schedules,
batches, runs the model and samples. Without a GPU the same scheduler and model run on an emulated device.

commands:
"""

EPILOG = """\
where to start:
  blinkimp generate 'def read_file(path):'       complete a prompt with the embedded model; nothing to download
  blinkimp serve                                 serve the embedded model on tcp://127.0.0.1:5555
  blinkimp generate --connect tcp://127.0.0.1:5555 'import os'
  blinkimp serve --model ~/models/Qwen3-4B       serve a Hugging Face checkpoint (Llama, Mistral, Qwen2, Qwen3)
  blinkimp doctor                                something does not work? this looks for the reason

`blinkimp COMMAND --help` explains a command, what happens when it runs, and where to go next.
"""


# What `serve` calls that which other servers, vLLM first, have under another name.
OUR_NAMES = {
    "--port": "--http HOST:PORT",
    "--host": "--http HOST:PORT",
    "--api-key": "--api-key-file FILE, or BLINKIMP_API_KEY",
    "--max-model-len": "--max-context N",
    "--max-num-seqs": "--max-batch N",
    "--max-num-batched-tokens": "--max-step-tokens N",
    "--gpu-memory-utilization": "--kv-memory-fraction F",
}


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser. The options of the subcommand `only` are filled in, of the others just the names (None: of all)."""
    listing = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="blinkimp",
        description=DESCRIPTION + listing,
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        usage="blinkimp COMMAND [options]",
    )
    parser.add_argument("--version", action="version", version=f"blinkimp {__version__}")
    # The list of commands stands in the description, with a line each.
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS, prog="blinkimp")
    for name, summary in COMMANDS.items():
        if only in (None, name):
            importlib.import_module(f"blinkimp.cli.{name}").add_parser(subparsers, summary)
        else:
            subparsers.add_parser(name)
    return parser


def complaint(command: str | None, unknown: Sequence[str]) -> str:
    """About arguments that nobody knows, without the values of flags: one may be a secret."""
    shown, remedies, is_value = [], [], False
    for argument in unknown:
        flag = argument.partition("=")[0]
        if argument.startswith("-"):
            shown.append(flag)
            if command == "serve" and flag in OUR_NAMES:
                remedies.append(f"instead of {flag}: {OUR_NAMES[flag]}")
        elif not is_value:
            shown.append(argument)
            if command == "serve":
                remedies.append(f"a model is given as --model {argument}")
        is_value = argument.startswith("-") and "=" not in argument
    text = f"unrecognized arguments: {' '.join(shown)}"
    return "; ".join([text, *remedies, f"see `blinkimp {command or ''} --help`".replace("  ", " ")])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((argument for argument in arguments if argument in COMMANDS), "")
    parser = build_parser(only=command)
    if not arguments:
        parser.print_help()
        return 2
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(complaint(options.command, unknown))
    if options.command is None:
        parser.error(f"expected a command: {', '.join(COMMANDS)}")
    try:
        if (
            signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        ):  # as it was while modules were loaded (blinkimp/__main__.py)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status: int = importlib.import_module(f"blinkimp.cli.{options.command}").run(options)
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is told here; when Python ends, it would be a traceback
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `blinkimp generate ... | head`
        give_up_stdout()
        sys.stderr.close()
        return 141
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and stdout_is_broken():
            give_up_stdout()
            print(
                f"blinkimp {options.command}: stdout: cannot be written ({error.strerror}); expected room for the output; "
                "make some, or send it elsewhere",
                file=sys.stderr,
            )
            return 1
        # Errors of this package are written for the user; anything else is a defect and keeps its traceback.
        if not type(error).__module__.startswith("blinkimp."):
            raise
        print(f"blinkimp {options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, NotUtf8Error) else 1
    return status


def stdout_is_broken() -> bool:
    """A line more could not be written either: the error does not say what it was of."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def give_up_stdout() -> None:
    """Python flushes it when it ends: into nothing, for it was told already that it cannot be written."""
    with contextlib.suppress(OSError):  # one that a test has put in its place has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
