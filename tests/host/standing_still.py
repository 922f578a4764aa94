"""An emulated device that stands still while a test does what must not be overtaken, on a machine however slow or fast.

Used by tests/host/test_null_program.py, test_sampling_engine.py, test_zmq_cancel.py, server_support.py, test_recovery.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from tests.host.engine_support import process_state, wait_for
from tests.support import PATIENCE_S


@contextlib.contextmanager
def standing_still(pid: int | None) -> Iterator[None]:
    """No step begins or ends meanwhile. The process may be dead in the end."""
    assert pid, "no process: a GPU cannot be stopped, and kill() would take 0 for the tests' own group"
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_for(lambda: process_state(pid) == "T", PATIENCE_S, "it stands still")
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
