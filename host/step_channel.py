"""The emulated device's place of a driver when the host schedules: a memfd that host and device process share (orchestrator_channel.h).

    channel = StepChannel.create(sizes)          host; StepChannel.open(fd) in the device's process
    thread = start_loop(channel, params, ahead=False)

Called by host/emulated_device.py and host/emulated_process.py. Test: pytest tests/host/test_cpu_orchestrator.py
"""

from __future__ import annotations

import mmap
import os
from typing import Any, Self

import numpy as np

from blinkimp import ring_abi as abi
from blinkimp.host.cpu_orchestrator import OrchestratorThread, library
from blinkimp.host.memory_plan import EngineSizes


class StepChannel:
    """One mapping of it; `fd` stays open until close()."""

    def __init__(self, fd: int, num_bytes: int, max_batch: int) -> None:
        self.fd = fd
        self._mapping = mmap.mmap(fd, num_bytes)
        self.address = int(np.frombuffer(self._mapping, np.uint8).ctypes.data)
        params = _params_of(max_batch)
        self.sampled_address = self.address + int(library().bk_step_channel_sampled_offset())
        self.top_logprobs_address = self.address + int(
            library().bk_step_channel_top_logprobs_offset(params.ctypes.data)
        )

    @classmethod
    def create(cls, sizes: EngineSizes) -> Self:
        num_bytes = int(library().bk_step_channel_bytes(_params_of(sizes.max_batch).ctypes.data))
        fd = os.memfd_create("blinkimp-steps", os.MFD_CLOEXEC)
        os.ftruncate(fd, num_bytes)
        return cls(fd, num_bytes, sizes.max_batch)

    @classmethod
    def open(cls, fd: int, sizes: EngineSizes) -> Self:
        """In a process that inherited the descriptor."""
        return cls(fd, os.fstat(fd).st_size, sizes.max_batch)

    def close_descriptor(self) -> None:
        """The mapping stays."""
        os.close(self.fd)

    def run_device(self, params: np.ndarray[Any, Any]) -> int:
        """The device's side: as bk_emulated_device_run, but a step only when the host says so."""
        return int(library().bk_step_device_run(params.ctypes.data, self.address))

    def start_loop(self, params: np.ndarray[Any, Any], *, ahead: bool) -> OrchestratorThread:
        """The host's side; `params` as DirectorMemory.params() made them."""

        def loop(abandoned_address: int) -> int:
            return int(
                library().bk_orchestrate_emulated(params.ctypes.data, self.address, int(ahead), abandoned_address)
            )

        return OrchestratorThread(loop)


def _params_of(max_batch: int) -> np.ndarray[Any, Any]:
    """All that the layout depends on."""
    params = np.zeros(1, abi.ENGINE_PARAMS)
    params["max_batch"] = max_batch
    return params
