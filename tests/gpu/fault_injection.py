"""A real fault in a running kernel: the first op of its program becomes one that no interpreter knows. The kernel records it and traps.

    break_program(engine.device)            in this process
    environment(folder)                     PYTHONPATH of a server whose engine host does so at SIGUSR1

Used by tests/gpu/test_recovery_gpu.py.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import numpy as np
from cuda.bindings import driver

from blinkimp.host.gpu_device import GpuDevice
from blinkimp.host.gpu_driver import check

BROKEN_KIND = 77
SLACK_BYTES = 4096  # what the driver may add to an allocation

SITECUSTOMIZE = """\
import sys
if "blinkimp.host.engine_process" in sys.orig_argv:
    from tests.gpu.fault_injection import install
    install()
"""


def break_program(device: GpuDevice) -> None:
    """Finds the ops in device memory by what they are, and changes the first one's kind. Workers fetch each op anew in each step."""
    context, model = device._context, device._model
    assert model is not None, "only after start()"
    context.make_current()
    copy = np.zeros_like(model.ops)
    for address in list(context._allocations):
        _, num_bytes = check(driver.cuMemGetAddressRange(address), "cuMemGetAddressRange")
        if not model.ops.nbytes <= num_bytes < model.ops.nbytes + SLACK_BYTES:
            continue
        context.download(address, copy)
        if copy.tobytes() == model.ops.tobytes():
            copy["kind"][0] = BROKEN_KIND
            context.upload(address, copy)
            return
    raise AssertionError(f"no allocation of {model.ops.nbytes} bytes holds the program's ops")


def install() -> None:
    signal.signal(signal.SIGUSR1, _on_signal)


def _on_signal(number: int, frame: FrameType | None) -> None:
    devices = [one for one in gc.get_objects() if type(one) is GpuDevice]
    print(f"breaking the program of {len(devices)} devices", file=sys.stderr, flush=True)
    for device in devices:
        break_program(device)


def environment(folder: Path) -> str:
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
