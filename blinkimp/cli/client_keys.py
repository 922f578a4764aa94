"""`--server-key` and `--client-key`: CURVE for the commands that are clients of a ZeroMQ server.

Called by blinkimp/cli/local_server.py (generate, chat) and bench.py (bench, lab sweep). Test: pytest tests/host/test_curve.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blinkimp.transport import Security


class ClientKeyError(ValueError):
    """The flags do not go together."""


def add_key_flags(parser: Any) -> None:
    """parser: or a group of one."""
    parser.add_argument(
        "--server-key", type=Path, metavar="FILE", help="CURVE, with --connect: the server's public key, NAME.pub"
    )
    parser.add_argument(
        "--client-key",
        type=Path,
        metavar="FILE",
        help="and one's own secret key, NAME.key; `python -m blinkimp.nic_shim.curve FOLDER NAME` makes both",
    )


def security_of(options: argparse.Namespace) -> Security | None:
    """None where no key is given. Raises ClientKeyError, or CurveError for a file that holds no key."""
    given = {"--server-key": options.server_key, "--client-key": options.client_key}
    if not any(given.values()):
        return None
    missing = [flag for flag, path in given.items() if path is None]
    missing += ["--connect"] if options.connect is None else []
    if missing:
        raise ClientKeyError(
            f"{' and '.join(missing)}: got nothing, expected a value, because a CURVE key is given; a client of an encrypted "
            "server needs --connect, --server-key and --client-key"
        )
    from blinkimp.nic_shim.curve import client_security

    return client_security(options.server_key, options.client_key)
