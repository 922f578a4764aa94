"""The lock that says an engine of some name lives, and the rules for engine names.

The lock is an flock on `/dev/shm/blinkimp.<engine>.lock`, held by the host for its whole life. The kernel drops it when the host
dies, however it dies, so "is the engine of this name alive" needs no process ids and no timeouts. A supervisor holds it for as long as
it keeps an engine of that name up, and hands its descriptor down to each engine process: the lock is free when both are gone.
Used by host/shared_memory.py, host/supervisor.py, host/engine_process.py.
Test: pytest tests/null/test_shared_memory.py
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from pathlib import Path

SHM_DIR = Path("/dev/shm")
LOOK_S = 0.1  # longer than anybody who tidies up after the dead holds a lock
LOOKERS_S = 10.0  # who only looks can be told from a host, and may have been held up while it looked
_ENGINE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class SharedMemoryError(RuntimeError):
    """A region is missing, not ours, or not what ring_abi.h says it must be."""


class EngineAlreadyRunningError(SharedMemoryError):
    """A live host holds the lock of this engine name."""


class EngineNotFoundError(SharedMemoryError):
    """No region of this engine name exists."""


def check_engine_name(engine_name: str) -> str:
    if not _ENGINE_NAME.fullmatch(engine_name):
        raise SharedMemoryError(
            f"engine name {engine_name!r} cannot be used; expected 1 to 64 letters, digits, '_' or '-'; choose another engine_name"
        )
    return engine_name


class EngineLock:
    """Exclusive right to an engine name. Closing the file, or dying, gives it back."""

    def __init__(self, engine_name: str, *, inherited_fd: int | None = None) -> None:
        """`inherited_fd`: the descriptor of a parent's lock, which is then held by both."""
        self.engine_name = check_engine_name(engine_name)
        self._path = SHM_DIR / f"blinkimp.{engine_name}.lock"
        self._is_inherited = inherited_fd is not None
        self._fd: int | None = self._acquire() if inherited_fd is None else self._inherit(inherited_fd)

    @property
    def fd(self) -> int:
        """To be passed to a child process."""
        assert self._fd is not None, "only before release()"
        return self._fd

    def _inherit(self, fd: int) -> int:
        try:
            same = os.fstat(fd).st_ino == os.stat(self._path, follow_symlinks=False).st_ino
        except OSError:
            same = False
        if not same:
            raise SharedMemoryError(
                f"descriptor {fd} is not the lock of engine {self.engine_name!r}; expected an open {self._path}; "
                "start the engine by `blinkimp serve`"
            )
        os.set_inheritable(fd, False)  # a device's process must not keep the name when its host is gone
        return fd

    def _acquire(self) -> int:
        # Others hold the lock for a moment only to look (engine_is_alive, shared) or to tidy up after the dead (remove_dead_engines).
        began = time.monotonic()
        while True:
            try:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise SharedMemoryError(
                    f"cannot open {self._path}: {error.strerror}; expected a lock file of user {os.geteuid()}; "
                    "choose another engine_name or remove the file"
                ) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                patience_s = LOOKERS_S if _is_only_looked_at(fd) else LOOK_S
                os.close(fd)
                if time.monotonic() < began + patience_s:
                    time.sleep(0.005)
                    continue
                raise EngineAlreadyRunningError(
                    f"an engine named {self.engine_name!r} is running (process {holder}); "
                    "stop it, or start this one with another engine_name"
                ) from None
            # A host that ended between our open and our flock has unlinked this inode: the name is another file now.
            try:
                same = os.stat(self._path, follow_symlinks=False).st_ino == os.fstat(fd).st_ino
            except FileNotFoundError:
                same = False
            if same:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
            os.close(fd)

    def release(self) -> None:
        if self._fd is None:
            return
        if not self._is_inherited:
            # While still held: nobody can lock an inode that is about to lose its name.
            self._path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None


def _is_only_looked_at(fd: int) -> bool:
    """Nobody holds the lock alone. Closing the descriptor gives back what this takes."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def engine_is_alive(engine_name: str) -> bool:
    """Whether a live host holds this name. Only looks; never creates the lock file."""
    path = SHM_DIR / f"blinkimp.{check_engine_name(engine_name)}.lock"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
