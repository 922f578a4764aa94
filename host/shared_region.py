"""One object of POSIX shared memory: made complete before its name exists, opened only where it is this user's own.

Called by host/shared_memory.py. Test: pytest tests/null/test_shared_memory.py
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import stat
from typing import Any, Self

import numpy as np

from blinkimp.host.engine_lock import SHM_DIR, EngineNotFoundError, SharedMemoryError


class Region:
    """One mapped shared memory object. `.buffer` is a memoryview of all of it, `.address` where it lies in this process."""

    def __init__(self, name: str, mapping: mmap.mmap, *, writable: bool) -> None:
        self.name = name
        self.region_bytes = len(mapping)
        self.writable = writable
        self._mapping: mmap.mmap | None = mapping
        self.buffer = memoryview(mapping)
        self.address = int(np.frombuffer(mapping, dtype=np.uint8).ctypes.data)

    def view(self, dtype: np.dtype[Any], offset_bytes: int = 0) -> np.ndarray[Any, Any]:
        """A one-element array over `dtype` at `offset_bytes`; reads and writes go straight to the shared memory."""
        return np.frombuffer(self.buffer, dtype=dtype, count=1, offset=offset_bytes)

    def close(self) -> None:
        """Unmaps, or, where an array still looks at it, leaves that to the array's end."""
        if self._mapping is None:
            return
        mapping, self._mapping = self._mapping, None
        with contextlib.suppress(BufferError):  # an array is alive; the mapping goes with the last of them
            self.buffer.release()
            mapping.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def create_region(name: str, region_bytes: int, header: np.ndarray[Any, Any]) -> Region:
    temporary = SHM_DIR / f"{name}.new-{os.getpid()}-{secrets.token_hex(4)}"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            # Reserves the memory now: a full /dev/shm would otherwise kill whoever first touches a page (SIGBUS).
            os.posix_fallocate(fd, 0, region_bytes)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            free = os.statvfs(SHM_DIR)
            raise SharedMemoryError(
                f"{SHM_DIR} is full: {name} needs {region_bytes} bytes, {free.f_bavail * free.f_frsize} are free; "
                "give the container more (--shm-size), or lower num_queue_pairs, arena_bytes or num_completions"
            ) from error
        mapping = mmap.mmap(fd, region_bytes)
        header_bytes = header.tobytes()
        mapping[: len(header_bytes)] = header_bytes
        os.rename(temporary, SHM_DIR / name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    return Region(name, mapping, writable=True)


def open_region(name: str, least_bytes: int, *, writable: bool) -> Region:
    path = SHM_DIR / name
    try:
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise EngineNotFoundError(
            f"{path} does not exist; expected an engine of that name to run; start `blinkimp serve`"
        ) from None
    except OSError as error:
        raise SharedMemoryError(
            f"cannot open {path}: {error.strerror}; expected a file of user {os.geteuid()}; run as the engine's user"
        ) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise SharedMemoryError(
                f"{path} has owner {status.st_uid} and mode {stat.filemode(status.st_mode)}; "
                f"expected owner {os.geteuid()} and mode -rw-------; it was not made by an engine of this user: remove it"
            )
        if status.st_size < least_bytes:
            raise SharedMemoryError(
                f"{path} has {status.st_size} bytes, expected at least {least_bytes}; restart the engine"
            )
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        mapping = mmap.mmap(fd, status.st_size, flags=mmap.MAP_SHARED, prot=protection)
    finally:
        os.close(fd)
    return Region(name, mapping, writable=writable)
