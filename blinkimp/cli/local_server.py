"""A server of one's own for the length of a command: `blinkimp serve` as a child, on a private socket, quiet unless something is wrong.

    with server_for(options) as endpoint: ...      endpoint of --connect, or of a child that ends with the block

Model, device and memory are those of the environment and the configuration file. What a server is to the world (addresses, keys, captures,
queue pairs) is not: those are for a server that stays, and its own client would have no key, or its port another server.

Called by blinkimp/cli/generate.py and chat.py. Test: pytest tests/null/test_cli_arguments.py tests/host/test_cli.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from blinkimp.cli import ranges
from blinkimp.cli.client_keys import add_key_flags
from blinkimp.cli.options import add_config_flags, config_of
from blinkimp.cli.terminal import ends_in_order, undisturbed
from blinkimp.config import keys
from blinkimp.host.child_process import ChildProcess

END_TIMEOUT_S: Final = 15.0  # from SIGTERM to the child's end; it has nothing left to drain
POLL_S: Final = 0.02
# Whatever the environment and the file say. Beside these bind and engine_name, which are other ones each time.
OWN_SETTINGS: Final = {
    "http": "",
    "metrics": "",
    "curve_key": "",
    "curve_clients": "",
    "api_key_file": "",
    "capture_arrivals": "",
    "num_ingress": 1,
    "num_queue_pairs": 1,
}


class LocalServerError(RuntimeError):
    """The server of this command could not start."""


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--connect",
        metavar="ENDPOINT",
        help="use the server that runs there, such as tcp://127.0.0.1:5555 (default: start one)",
    )
    add_key_flags(parser)
    parser.add_argument(
        "--timeout",
        type=ranges.duration(above=True),
        default=30.0,
        metavar="S",
        help="how long the server may be silent (default %(default)g)",
    )
    add_config_flags(parser, without=("bind", "engine_name", *OWN_SETTINGS))


@contextlib.contextmanager
def server_for(options: argparse.Namespace) -> Iterator[str]:
    """Yields an endpoint where a server answers or is about to."""
    if options.connect is not None:
        yield options.connect
        return
    # A folder of mode 0700: nobody else can connect.
    with ends_in_order():
        folder = tempfile.TemporaryDirectory(prefix="blinkimp-")
        child: ChildProcess | None = None
        try:
            socket_path = Path(folder.name) / "ingress"
            child = ChildProcess("the local server", "blinkimp", ["serve", *serve_arguments(options, socket_path)])
            wait_until_bound(child, socket_path)
            yield f"ipc://{socket_path}"
        finally:
            # A child that this process leaves behind is killed, and its shared memory stays.
            with undisturbed():
                if child is not None:
                    child.end(END_TIMEOUT_S)
                folder.cleanup()


def serve_arguments(options: argparse.Namespace, socket_path: Path) -> list[str]:
    """Flags of `blinkimp serve` for the same settings; nothing is logged below warnings unless --log-level asks for it."""
    config_of(options, **OWN_SETTINGS)  # a bad value is reported here, by this command
    given = {name: value for name, value in vars(options).items() if name in keys()}
    if "log_level" not in given and "BLINKIMP_LOG_LEVEL" not in os.environ:
        given["log_level"] = "warning"
    given |= {"engine_name": f"local-{os.getpid()}", "bind": f"ipc://{socket_path}", **OWN_SETTINGS}
    arguments = [f"{keys()[name].flag}={value}" for name, value in given.items()]
    return arguments if options.config is None else ["--config", str(options.config), *arguments]


def wait_until_bound(child: ChildProcess, socket_path: Path) -> None:
    """Until the ingress listens: loading a model takes as long as it takes, and the child shows its progress."""
    while not socket_path.exists():
        if child.wait(POLL_S):
            raise LocalServerError(
                f"{child.describe_exit()} before it served; its messages stand above; try `blinkimp doctor`"
            )
