"""What several test files share: the repository's root, how long they wait for what must come, and scripts under tools/ loaded as modules."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

ROOT = Path(__file__).resolve().parents[1]
# How long a test waits for what must come. No assertion about speed: only a test that fails waits this long, on a machine however slow.
PATIENCE_S = 180.0

Test = TypeVar("Test", bound=Callable[..., None])


def undisturbed(test: Test) -> Test:
    """For a test that must read a clock: it passes when one of five runs does. A noisy machine spoils some, a defect all of them."""

    @functools.wraps(test)
    def repeat(*arguments: Any, **fixtures: Any) -> None:
        for attempt in range(5):
            try:
                return test(*arguments, **fixtures)
            except AssertionError:
                if attempt == 4:
                    raise

    return cast(Test, repeat)


def python_path() -> str:
    """PYTHONPATH for a child process that is to import this tree, with whatever else this process was given."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """A disk that is full, for this process: a write beyond so many bytes of any file fails with an OSError."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def load_tool(name: str) -> ModuleType:
    """tools/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def blocks_kept_by(action: Callable[[], object], num_calls: int) -> int:
    """Python's memory blocks, of any size, that so many calls leave behind. Free lists count: a process pays for what they hold. The least
    of three attempts: a thread of another test may allocate meanwhile."""
    kept = []
    for _ in range(3):
        gc.collect()  # empties the free lists
        gc.disable()
        try:
            for _ in range(10):
                action()
            before = sys.getallocatedblocks()
            for _ in range(num_calls):
                action()
            kept.append(sys.getallocatedblocks() - before)
        finally:
            gc.enable()
    return min(kept)


def hear_signals() -> None:
    """preexec_fn of a process that a test sends signals: under nohup, or behind a shell's &, it would inherit that they are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
