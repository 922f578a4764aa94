"""The file of an ipc endpoint: whether ZeroMQ may bind there, which file it is, and what to remove at the end.

Called by nic_shim/zmq_ingress.py. Test: pytest tests/host/test_ingress_processes.py

Hazard: libzmq removes whatever has the path before it binds, an ordinary file as well as the socket of a server that runs.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Final

MAX_PATH_BYTES: Final = 107  # of sockaddr_un.sun_path, less the NUL
_KINDS: Final = {
    stat.S_IFREG: "an ordinary file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
}


def path_of(bind: str) -> str | None:
    """None: an endpoint without a file (tcp, an abstract address `ipc://@name`), or one that ZeroMQ makes up (`ipc://*`)."""
    path = bind.removeprefix("ipc://")
    return None if path in (bind, "*") or path.startswith("@") else path


def check_free(bind: str) -> None:
    """Raises OSError where binding would take a file away from somebody, or cannot succeed. The socket that a dead process left behind is
    nobody's."""
    path = path_of(bind)
    if path is None:
        return
    num_bytes = len(os.fsencode(path))
    if num_bytes > MAX_PATH_BYTES:
        raise OSError(
            f"{path} has {num_bytes} bytes; expected a path of at most {MAX_PATH_BYTES}, as sockets have; choose a shorter one"
        )
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # nothing is there, or bind() will say what is wrong with the path
        return
    if not stat.S_ISSOCK(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a device")
        raise OSError(
            f"{path} is not a socket but {kind}; expected a free path, or a socket that nobody listens on; choose another, or remove "
            "what is there"
        )
    if somebody_listens(path):
        raise OSError(
            f"{os.strerror(errno.EADDRINUSE)}; expected a free endpoint; choose another path, or stop what listens there"
        )


def file_id(bind: str) -> tuple[int, int] | None:
    """Device and inode of the endpoint's file; None where there is none."""
    path = path_of(bind)
    try:
        found = None if path is None else os.lstat(path)
    except OSError:
        return None
    return None if found is None else (found.st_dev, found.st_ino)


def somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except BlockingIOError:  # its backlog is full
            return True
        except OSError:
            return False
    return True
