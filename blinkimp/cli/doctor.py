"""`blinkimp doctor`: looks at everything that blinkimp needs on this machine, and says what to do about each problem.

Called by blinkimp/cli/__init__.py; the checks themselves are in blinkimp/cli/checks.py. Test: pytest tests/host/test_cli.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape

from blinkimp.cli.checks import Finding, Verdict, all_checks
from blinkimp.cli.options import add_config_flags, config_of, new_parser
from blinkimp.cli.terminal import set_up_logging, stderr_console
from blinkimp.config import ConfigError

EPILOG = """\
examples:
  blinkimp doctor                      everything, with the settings that `blinkimp serve` would use
  blinkimp doctor --device gpu         a machine without a usable GPU fails
  blinkimp doctor --json               for a program

what happens: each check prints ok, warn (works, but not as well as it could) or FAIL, and what to do. The last one starts an engine and
measures the round trip of a ping through a queue pair. Exit status 0 without a FAIL, else 1.
"""
STYLES = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def add_parser(subparsers: Any, summary: str) -> None:
    parser = new_parser(subparsers, "doctor", summary, EPILOG, usage="[options]")
    parser.add_argument("--json", action="store_true", help="one JSON array of findings on stdout")
    add_config_flags(parser, without=("bind", "engine_name"))


def show(console: Console, finding: Finding) -> None:
    word = finding.verdict.name if finding.verdict is Verdict.FAIL else finding.verdict.name.lower()
    style = STYLES[finding.verdict]
    console.print(f"[{style}]{word:<4}[/] {finding.what:<18} {escape(finding.found)}", soft_wrap=True)
    if finding.remedy:
        console.print(f"{'':<23} -> {escape(finding.remedy)}", soft_wrap=True)


def checks_of(options: argparse.Namespace) -> list[tuple[str, Callable[[], Finding]]]:
    """All of them; where the settings are none, one that says so: the others would look at another engine than was asked for."""
    try:
        config = config_of(options)
    except ConfigError as error:
        wrong = Finding("settings", Verdict.FAIL, str(error), "correct it; everything else is looked at then")
        return [("settings", lambda: wrong)]
    set_up_logging("error" if "log_level" not in vars(options) else config.log_level)
    return all_checks(config)


def run(options: argparse.Namespace) -> int:
    console, findings = Console(highlight=False), []
    for what, check in checks_of(options):
        with stderr_console.status(what):
            finding = check()
        findings.append(finding)
        if not options.json:
            show(console, finding)
    if options.json:
        print(msgspec.json.encode(findings).decode())
    return 1 if any(finding.verdict is Verdict.FAIL for finding in findings) else 0
