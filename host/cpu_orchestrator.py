"""The host schedules (orchestrator = cpu, cpu-ahead): the director on a thread of this process, each step a launch on the device.

    memory = DirectorMemory()
    params = memory.params(launch, dims, num_ops, num_workers, sampled_address, top_logprobs_address)
    thread = OrchestratorThread(lambda abandoned: emulated_loop(params, channel_address, ahead=False, abandoned=abandoned))

It stands for the servers whose CPU is on the path of every token, with everything else as it is: same director, same workers, same queue
pairs. The loop is native (device/emu/orchestrator.h); Python only starts it. Why, how and what it costs: host/ORCHESTRATOR.md.
Called by host/emulated_device.py and host/gpu_orchestrator.py. Test: pytest tests/host/test_cpu_orchestrator.py
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np

from blinkimp import native
from blinkimp import ring_abi as abi
from blinkimp.host.device_protocol import DeviceError, Launch
from blinkimp.host.host_memory import DeviceMemory, fill_sizes
from blinkimp.host.memory_plan import plan_bytes_of, prefix_cache_bytes_of
from blinkimp.host.sampling_memory import sampling_table_bytes
from blinkimp.host.trace_memory import fill_trace

_log = logging.getLogger(__name__)

OrchestratorKind = Literal["gpu", "cpu", "cpu-ahead"]

# Longest sleep of an idle director between two looks at its rings, after it has spun for a while.
IDLE_SLEEP_NS: Final = 50_000
END_STOPPED, END_FAULTED, END_LOST = 0, 1, 2  # OrchestratorEnd of device/emu/orchestrator.h
END_RAISED: Final = -1


def check_combination(kind: OrchestratorKind, launch: Launch) -> None:
    """Raises DeviceError for what a host that schedules cannot do."""
    if kind != "gpu" and launch.parked_after_ns:
        raise DeviceError(
            f"park_after_s is {launch.parked_after_ns / 1e9:g}, expected 0 with orchestrator={kind}: between steps no kernel is on the device that "
            "could leave it; set park_after_s to 0, or orchestrator to gpu"
        )


class DirectorMemory:
    """The director's tables in memory of this process."""

    def __init__(self) -> None:
        self._memory = DeviceMemory()

    def params(
        self,
        launch: Launch,
        dims: np.ndarray[Any, Any],
        num_ops: int,
        num_workers: int,
        sampled_address: int,
        top_logprobs_address: int,
    ) -> np.ndarray[Any, Any]:
        """[1] ENGINE_PARAMS of the director. What only workers read is 0; what they say stands at the two addresses."""
        sizes, regions = launch.sizes, launch.regions
        params = np.zeros(1, dtype=abi.ENGINE_PARAMS)
        fill_sizes(params, sizes, dims, num_workers)
        params["num_ops"] = num_ops
        params["idle_sleep_ns"] = IDLE_SLEEP_NS
        params["ingress_timeout_ns"] = launch.ingress_timeout_ns
        params["spin_budget_ns"] = launch.spin_budget_ns
        params["engine_page"] = regions.engine_page.address
        params["queue_pairs"][0, : len(regions.queue_pairs)] = [region.address for region in regions.queue_pairs]
        tables = {
            "director_state": abi.DIRECTOR_STATE_BYTES,
            "requests": abi.REQUEST_BYTES * sizes.num_requests,
            "tokens": 4 * sizes.num_requests * sizes.max_context,
            "page_tables": 4 * sizes.num_requests * sizes.max_pages_per_request,
            "free_pages": 4 * sizes.num_pages,
            "page_owners": 4 * sizes.num_pages,
            # The counts are the workers'; the director only asks whether there are any. Untouched memory costs nothing.
            **sampling_table_bytes(sizes, int(dims["vocab"][0])),
        }
        if sizes.prefix_cache_enabled:
            tables["prefix_cache"] = prefix_cache_bytes_of(sizes)
        for name, num_bytes in tables.items():
            params[name] = self._memory.allocate(num_bytes)
        params["plans"] = [self._memory.allocate(plan_bytes_of(sizes)) for _ in range(2)]
        params["sampled"], params["top_logprobs"] = sampled_address, top_logprobs_address
        if regions.trace is not None:
            fill_trace(regions.trace, regions.trace.address, params)
        return params


class OrchestratorThread:
    """Runs a native loop, which returns an END_*, until the engine stops. `loop` gets the address of the word that ends it at once."""

    def __init__(self, loop: Callable[[int], int]) -> None:
        self._loop = loop
        self._abandoned = np.zeros(1, np.uint32)
        self._end: int | None = None
        self._thread = threading.Thread(target=self._run, name="blinkimp-orchestrator", daemon=True)
        self._thread.start()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> int | None:
        """END_*, or None while it runs."""
        return self._end

    def abandon(self) -> None:
        """The device is dead: the loop must not wait for it any longer."""
        self._abandoned[0] = 1

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._end = self._loop(int(self._abandoned.ctypes.data))
        except Exception:
            self._end = END_RAISED
            _log.exception("the scheduling thread could not run")


def library() -> ctypes.CDLL:
    """The native library with the signatures of device/emu/orchestrator_*.cpp."""
    loaded = native.load()
    address, size = ctypes.c_void_p, ctypes.c_uint64
    loaded.bk_step_channel_bytes.argtypes, loaded.bk_step_channel_bytes.restype = [address], size
    loaded.bk_step_channel_sampled_offset.argtypes, loaded.bk_step_channel_sampled_offset.restype = [], size
    loaded.bk_step_channel_top_logprobs_offset.argtypes = [address]
    loaded.bk_step_channel_top_logprobs_offset.restype = size
    loaded.bk_step_device_run.argtypes, loaded.bk_step_device_run.restype = [address, address], ctypes.c_int
    loaded.bk_orchestrate_emulated.argtypes = [address, address, ctypes.c_uint32, address]
    loaded.bk_orchestrate_emulated.restype = ctypes.c_int
    loaded.bk_update_batch_bytes.argtypes, loaded.bk_update_batch_bytes.restype = [], size
    loaded.bk_orchestrate_cuda.argtypes = [address, address, ctypes.c_char_p, size]
    loaded.bk_orchestrate_cuda.restype = ctypes.c_int
    return loaded
