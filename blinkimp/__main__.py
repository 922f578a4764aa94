"""The `blinkimp` command, also as `python -m blinkimp`. Test: pytest tests/host/test_cli.py"""

import signal
import sys


def main() -> int:
    die_quietly()
    from blinkimp.cli import main as run

    try:
        return run()
    finally:
        die_quietly()


def die_quietly() -> None:
    """Ctrl-C while modules are loaded, or after the command, ends the process without a word: there is nothing to be ended in order."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
