"""Command-line flags: one per configuration key, and the sampling parameters of a request.

Called by the subcommands. Test: pytest tests/null/test_cli_arguments.py
"""

from __future__ import annotations

import argparse
import math
import textwrap
from pathlib import Path
from typing import Any

from blinkimp.config import Config, keys, load_config

# What nearly everyone sets; the rest is listed under its own heading.
METAVARS = {
    "max_requests_per_s": "N",
    "max_outstanding": "N",
    "max_prompt_chars": "N",
    "capture_arrivals": "DIR",
    "http": "HOST:PORT",
    "metrics": "HOST:PORT",
}
COMMON_KEYS = ("model", "device", "bind", "http", "engine_name", "max_batch", "max_context", "log_level")


class Parser(argparse.ArgumentParser):
    """Of the command, its subcommands and their parts: a flag counts only as it is written out. The start of another one, such as vLLM's
    --api-key KEY, would be taken for --api-key-file, and the key for a file's name."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "allow_abbrev": False})


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Paragraphs are as wide as the terminal, lines that begin with a space stay as they are; an option's default stands beside it."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        filled = (part if "\n " in part else textwrap.fill(" ".join(part.split()), width) for part in paragraphs)
        return "\n\n".join(filled) + "\n"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        takes_value = bool(action.option_strings) and action.nargs != 0
        if not text or not takes_value or "(default" in text or default in (None, "", [], argparse.SUPPRESS, math.inf):
            return text
        return f"{text} (default %(default)s)"


def new_part(parts: Any, name: str, summary: str, examples: str) -> argparse.ArgumentParser:
    """The parser of one part of a command, such as `trace record`. examples: one a line."""
    lines = "".join(f"  {line}\n" for line in examples.strip().splitlines())
    part: argparse.ArgumentParser = parts.add_parser(
        name, help=summary, description=summary, epilog=f"examples:\n{lines}", formatter_class=HelpFormatter
    )
    return part


def new_parser(subparsers: Any, command: str, summary: str, epilog: str, *, usage: str) -> argparse.ArgumentParser:
    """The parser of one subcommand: a short usage line, the summary, the options, and a text that teaches."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        command,
        help=summary,
        description=summary,
        epilog=epilog,
        usage=f"blinkimp {command} {usage}",
        formatter_class=HelpFormatter,
    )
    return parser


def add_config_flags(parser: argparse.ArgumentParser, *, without: tuple[str, ...] = ()) -> None:
    """--config and one flag per key of Config but `without`. Values are read and checked by load_config()."""
    common = parser.add_argument_group("engine")
    other = parser.add_argument_group("engine, further settings (0 or `auto`: chosen from the model and the device)")
    common.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file of settings; see the README, Configuration"
    )
    for name, key in keys().items():
        if name in without:
            continue
        value = str(key.default).lower() if isinstance(key.default, bool) else key.default  # as TOML writes it
        default = "default empty" if value == "" else f"default {value}"
        group = common if name in COMMON_KEYS else other
        metavar = "|".join(key.choices) or METAVARS.get(name, name.rpartition("_")[2].upper())
        metavar = "true|false" if isinstance(key.default, bool) else metavar
        text = f"{key.description.replace('`', '')} ({default})".replace("%", "%%")
        group.add_argument(key.flag, dest=name, metavar=metavar, default=argparse.SUPPRESS, help=text)


def config_of(options: argparse.Namespace, **overrides: object) -> Config:
    """The configuration of a parsed command line; `overrides` count as flags. Raises ConfigError."""
    given = {name: value for name, value in vars(options).items() if name in keys()}
    return load_config({**given, **overrides}, path=options.config)


def add_engine_name_flag(parser: argparse.ArgumentParser) -> None:
    """Of commands that look at an engine that runs."""
    parser.add_argument("--engine-name", metavar="NAME", help="of the engine, as configured (blinkimp)")


def engine_name_of(options: argparse.Namespace) -> str:
    """The flag, else what the environment and the configuration file say."""
    return load_config({"engine_name": options.engine_name} if options.engine_name else {}).engine_name


def add_sampling_flags(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help="output tokens at most (default %(default)s)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 is greedy: the likeliest token (default %(default)s)",
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens; 0 is off (default)"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens up to this mass; 1 is off"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="only tokens this likely against the likeliest"
    )
    group.add_argument(
        "--seed", type=int, default=None, metavar="N", help="the same seed gives the same tokens; drawn when absent"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens, whatever the model says")


def sampling_of(options: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields of blinkimp.protocol.Sampling, as Client.submit() takes them."""
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "max_tokens", "ignore_eos")
    return {name: getattr(options, name) for name in names}
