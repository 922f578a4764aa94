"""CURVE for the ZeroMQ ingress: its own key pair, and the list of clients that may connect.

    python -m blinkimp.nic_shim.curve FOLDER NAME       makes FOLDER/NAME.key (secret, mode 600) and FOLDER/NAME.pub

Key files hold one Z85 text of 40 characters; the allow-list is a text file with one public key a line, `#` begins a comment.
Called by nic_shim/zmq_ingress.py; clients use client_security(). Test: pytest tests/host/test_curve.py
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, Final

import zmq
from zmq.auth.thread import ThreadAuthenticator

from blinkimp.transport import Security

_Z85: Final = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


class CurveError(ValueError):
    """Keys cannot be used; the message says what, got, expected, remedy."""


class _AllowList:
    """What pyzmq asks for each connection."""

    def __init__(self, keys: frozenset[bytes]) -> None:
        self._keys = keys

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self._keys


class CurveServer:
    """The server's side. start() before the socket binds, stop() when it is closed."""

    def __init__(self, secret_key_file: Path, allow_list_file: Path) -> None:
        self._secret = read_secret(secret_key_file)
        self._public = zmq.curve_public(self._secret)
        lines = _read(allow_list_file).splitlines()
        keys = [line.split(b"#")[0].strip() if not _Z85.fullmatch(line.strip()) else line.strip() for line in lines]
        self._allowed = frozenset(_checked(key, allow_list_file) for key in keys if key)
        if not self._allowed:
            raise CurveError(f"{allow_list_file} allows nobody; expected one public key a line; add the clients' keys")
        self._authenticator: ThreadAuthenticator | None = None

    def start(self, context: zmq.Context[Any]) -> None:
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=_AllowList(self._allowed))

    def secure(self, socket: zmq.Socket[Any]) -> None:
        socket.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self._public)
        socket.setsockopt(zmq.CURVE_SERVER, 1)

    def stop(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None


def client_security(server_public_key: Path | str, client_secret_key: Path | str) -> Security:
    """For Client(security=...) and AsyncClient(security=...): the server's NAME.pub, one's own NAME.key."""
    server_public_key, client_secret_key = Path(server_public_key), Path(client_secret_key)
    server = _checked(_read(server_public_key).strip(), server_public_key)
    secret = read_secret(client_secret_key)

    def secure(socket: zmq.Socket[Any]) -> None:
        socket.setsockopt(zmq.CURVE_SERVERKEY, server)
        socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret))

    return secure


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Writes NAME.key and NAME.pub, makes the folder (its owner's only) where there is none; never over existing ones."""
    public, secret = zmq.curve_keypair()
    paths = (folder / f"{name}.key", folder / f"{name}.pub")
    for path, content, mode in zip(paths, (secret, public), (0o600, 0o644), strict=True):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise CurveError(
                f"{path} cannot be made: {error.strerror}; expected a new file in a folder that may be written to; choose another"
            ) from None
        with os.fdopen(descriptor, "wb") as file:
            file.write(content + b"\n")
    return paths


def read_secret(path: Path) -> bytes:
    content = _checked(_read(path).strip(), path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise CurveError(
            f"{path} has mode {mode:o}, expected 600: others on this machine could read it; run `chmod 600 {path}`"
        )
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CurveError(
            f"{path} cannot be read: {error.strerror}; expected a key file; make one with {__name__}"
        ) from None


def _checked(key: bytes, path: Path) -> bytes:
    if not _Z85.fullmatch(key):
        raise CurveError(
            f"{path}: got {len(key)} characters that are no key, expected a Z85 text of 40; make keys with {__name__}"
        )
    return key


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python -m blinkimp.nic_shim.curve FOLDER NAME", file=sys.stderr)
        return 2
    try:
        secret, public = make_keys(Path(sys.argv[1]), sys.argv[2])
    except CurveError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{secret}: keep it; {public}: give it to the other side")
    return 0


if __name__ == "__main__":
    sys.exit(main())
