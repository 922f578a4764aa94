"""An emulated device that stands still while a test does what must not be overtaken, on a machine however slow or fast.

Used by tests/host/determinism_scenario.py, engine_scenarios.py, server_support.py, test_engine.py, test_cpu_orchestrator.py,
test_null_program.py, test_recovery.py, test_sampling_engine.py, test_zmq_cancel.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from blinkimp.host.emulated_device import EmulatedDevice
from blinkimp.host.engine import Engine
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


@contextlib.contextmanager
def held(engine: Engine) -> Iterator[None]:
    """An emulated device stands still meanwhile: of what is submitted nothing ends before all of it is there. A GPU goes on."""
    device = engine.device
    with standing_still(device.pid) if isinstance(device, EmulatedDevice) else contextlib.nullcontext():
        yield
