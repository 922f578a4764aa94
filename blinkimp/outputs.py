"""Files that a command writes: looked at before the work, and written beside their names, so that a failure costs neither them nor what was there.

    check_outputs([out], inputs=[path_of_the_trace])        # before an hour of measuring
    with replacing(out) as temporary: temporary.write_bytes(found)

Invariants
I1  An output is none of the command's inputs, by whatever name: an input that is mapped would be gone under its reader.
I2  A name has the old file or the whole new one. Pipes and devices are written to as they are.

Used by blinkimp/trace, blinkimp/bench, blinkimp/lab, blinkimp/cli and host/compile_cache.py. Test: pytest tests/null/test_outputs.py
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path


class OutputError(RuntimeError):
    """A file cannot be written, or must not be."""


def check_outputs(outputs: Sequence[Path | None], inputs: Sequence[Path | None] = ()) -> None:
    """Raises OutputError where one is an input or another output (I1), or it is plain already that it cannot be written. None: not asked for."""
    taken = [path for path in inputs if path is not None]
    for path in outputs:
        if path is not None:
            _check(path, taken)
            taken.append(path)


def _check(path: Path, taken: Sequence[Path]) -> None:
    try:
        if is_special(path):
            return
        for other in taken:
            if is_same(path, other):
                raise OutputError(f"{path}: is the same file as {other}, expected one of its own; choose another name")
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); expected a file in a folder that exists and may be written to; choose another"
        ) from error


def make_folder(path: Path) -> None:
    """With those above it. Raises OutputError where it is none, or nothing can be written in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written to ({error.strerror}); expected a folder, there or to be made, with room in it; choose another"
        ) from error


def is_same(path: Path, other: Path) -> bool:
    """Links count as what they lead to. Neither needs to be there."""
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()


def is_special(path: Path) -> bool:
    """A pipe, a terminal, /dev/null: there is nothing to lose, and its name must stay what it is. Raises OSError for a folder."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path.exists() and not path.is_file()


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A file to write to, which has the name when the block ends, and is gone where it fails (I2). mode: its permissions at most.
    Raises OutputError for every OSError in the block."""
    temporary = None
    try:
        if is_special(path):
            yield path
            return
        target = path.resolve()  # a symbolic link stays one
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        if target.exists():
            mode &= stat.S_IMODE(target.stat().st_mode)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode))
        yield temporary
        temporary.replace(target)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); expected a place with room for it; make room, or choose another"
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
