"""The emulated device's process: loads a model into host memory and runs the director and the CPU interpreter until told to stop.

Started by host/emulated_device.py as `python -m blinkimp.host.emulated_process`, with an Order in JSON on stdin. While it loads
it writes events, one JSON object a line, to stdout; from then on it speaks only through the engine page, as a GPU does.
Exit status: 0 stopped in order, 2 could not start (an "error" event says why), 3 a fault is recorded on the engine page.
Test: pytest tests/host/test_engine.py
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

from blinkimp import native
from blinkimp import ring_abi as abi
from blinkimp.host.host_memory import DeviceMemory, fill_sizes
from blinkimp.host.memory_plan import EngineSizes, plan_bytes_of, prefix_cache_bytes_of
from blinkimp.host.parking import PARKED_LOOK_S, Doorbell
from blinkimp.host.program import Model, load_model
from blinkimp.host.sampling_memory import sampling_table_bytes
from blinkimp.host.shared_memory import Region, open_engine_page, open_queue_pair, open_trace
from blinkimp.host.step_channel import StepChannel
from blinkimp.host.trace_memory import fill_trace
from blinkimp.host.weights import HostTarget
from blinkimp.ring_abi import DType

# Longest sleep of an idle director between two looks at its rings. A wake-up costs up to 25 us of CPU time on a virtual machine, so
# half a millisecond keeps an idle engine below 5 % of one CPU, and the first request of a quiet time waits a quarter on average.
IDLE_SLEEP_NS: Final = 500_000
EXIT_STOPPED, EXIT_NOT_STARTED, EXIT_FAULTED = 0, 2, 3
_RUN_NO_THREADS: Final = 2  # bk_emulated_device_run
_RUN_PARKED: Final = 3


class Order(msgspec.Struct, frozen=True):
    """What the host wants run."""

    engine_name: str
    model_folder: str
    load_format: Literal["auto", "dummy", "null"]
    compute: int  # DType
    kv_dtype: int  # DType
    sizes: EngineSizes
    num_threads: int
    ingress_timeout_ns: int
    spin_budget_ns: int
    parked_after_ns: int = 0
    has_trace: bool = False
    null_step_ns: int = 0
    channel_fd: int = -1  # of the StepChannel through which the host launches each step; -1: the director is here


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the host hears before the director runs."""

    stage: str = ""
    done: int = 0
    total: int = 0
    error: str = ""
    dims: bytes = b""  # stage "loaded", for a host that schedules: MODEL_DIMS, and the ops of the program
    num_ops: int = 0


def library() -> ctypes.CDLL:
    """The native library with the signatures of device/emu/emulated_device.cpp."""
    loaded = native.load()
    loaded.bk_emulated_workspace_bytes.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64)]
    loaded.bk_emulated_workspace_bytes.restype = None
    loaded.bk_emulated_device_check.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64]
    loaded.bk_emulated_device_check.restype = ctypes.c_int
    loaded.bk_emulated_device_run.argtypes = [ctypes.c_void_p]
    loaded.bk_emulated_device_run.restype = ctypes.c_int
    return loaded


def workspace_bytes(params: np.ndarray[Any, Any]) -> list[int]:
    """Bytes of each of the CPU interpreter's workspaces; of `params` only counts and dims are read."""
    num_bytes = (ctypes.c_uint64 * abi.NUM_WORKSPACES)()
    library().bk_emulated_workspace_bytes(params.ctypes.data, num_bytes)
    return list(num_bytes)


def build_params(
    order: Order, model: Model, memory: DeviceMemory, engine_page: Region, queue_pairs: list[Region]
) -> np.ndarray[Any, Any]:
    """EngineParams over freshly allocated memory."""
    params = np.zeros(1, dtype=abi.ENGINE_PARAMS)
    sizes = order.sizes
    fill_sizes(params, sizes, model.dims, order.num_threads)
    params["num_ops"] = len(model.ops)
    params["idle_sleep_ns"] = IDLE_SLEEP_NS
    params["ingress_timeout_ns"] = order.ingress_timeout_ns
    params["spin_budget_ns"] = order.spin_budget_ns
    params["parked_after_ns"] = order.parked_after_ns
    params["engine_page"] = engine_page.address
    params["queue_pairs"][0, : len(queue_pairs)] = [region.address for region in queue_pairs]
    params["director_state"] = memory.allocate(abi.DIRECTOR_STATE_BYTES)
    params["requests"] = memory.allocate(abi.REQUEST_BYTES * sizes.num_requests)
    params["tokens"] = memory.allocate(4 * sizes.num_requests * sizes.max_context)
    params["page_tables"] = memory.allocate(4 * sizes.num_requests * sizes.max_pages_per_request)
    params["free_pages"] = memory.allocate(4 * sizes.num_pages)
    params["page_owners"] = memory.allocate(4 * sizes.num_pages)
    if sizes.prefix_cache_enabled:
        params["prefix_cache"] = memory.allocate(prefix_cache_bytes_of(sizes))
    params["plans"] = [memory.allocate(plan_bytes_of(sizes)) for _ in range(2)]
    params["sampled"] = memory.allocate(abi.SAMPLE_RESULT.itemsize * 2 * sizes.max_batch)
    for name, num_bytes in sampling_table_bytes(sizes, int(model.dims["vocab"][0])).items():
        params[name] = memory.allocate(num_bytes)
    params["ops"] = memory.keep(model.ops)
    params["kv_cache"] = memory.allocate(kv_bytes(model, sizes))
    params["workspaces"] = [memory.allocate(num_bytes) if num_bytes else 0 for num_bytes in workspace_bytes(params)]
    params["grid_words"] = memory.allocate(abi.GRID_WORDS_BYTES)
    return params


def kv_bytes(model: Model, sizes: EngineSizes) -> int:
    dims = model.dims[0]
    item_bytes = 2 if int(dims["kv_dtype"]) == DType.BF16 else 4
    page_elements = int(dims["num_layers"]) * int(dims["num_kv_heads"]) * 2 * abi.PAGE_TOKENS * int(dims["head_dim"])
    return sizes.num_pages * page_elements * item_bytes


def run(order: Order, emit: Callable[[Event], None]) -> int:
    model = load_model(
        Path(order.model_folder),
        HostTarget(),
        compute="f32" if order.compute == DType.F32 else "bf16",
        max_context=order.sizes.max_context,
        kv_dtype=DType(order.kv_dtype),
        load_format=order.load_format,
        null_step_ns=order.null_step_ns,
        progress=lambda done, total: emit(Event(stage="weights", done=done, total=total)),
    )
    memory = DeviceMemory()
    engine_page = open_engine_page(order.engine_name, writable=True)
    queue_pairs = [open_queue_pair(order.engine_name, idx) for idx in range(order.sizes.num_queue_pairs)]
    params = build_params(order, model, memory, engine_page, queue_pairs)
    if order.has_trace:
        trace = open_trace(order.engine_name, writable=True)
        fill_trace(trace, trace.address, params)
    check_params(params)
    emit(Event(stage="loaded", dims=model.dims.tobytes(), num_ops=len(model.ops)))
    if order.channel_fd >= 0:
        return exit_status(StepChannel.open(order.channel_fd, order.sizes).run_device(params), params)
    # The GIL is free inside; the director reads COMMAND_STOP from the engine page.
    doorbell = Doorbell(engine_page, queue_pairs)
    while (outcome := library().bk_emulated_device_run(params.ctypes.data)) == _RUN_PARKED:
        while not doorbell.rings():
            time.sleep(PARKED_LOOK_S)
    return exit_status(outcome, params)


def exit_status(outcome: int, params: np.ndarray[Any, Any]) -> int:
    """Of what bk_emulated_device_run or bk_step_device_run returned."""
    if outcome == _RUN_NO_THREADS:
        num_threads = int(params["num_workers"][0])
        raise RuntimeError(f"the system refused {num_threads} worker threads; lower num_threads, or raise `ulimit -u`")
    return EXIT_FAULTED if outcome else EXIT_STOPPED


def check_params(params: np.ndarray[Any, Any]) -> None:
    """Raises unless the CPU interpreter can run this program."""
    message = ctypes.create_string_buffer(512)
    if library().bk_emulated_device_check(params.ctypes.data, message, len(message)):
        raise RuntimeError(f"the CPU interpreter cannot run this program: {message.value.decode()}")


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the host, which drains first
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=Order)
    # Events keep a descriptor of their own: whatever else prints goes to stderr.
    events_fd = os.dup(1)
    os.dup2(2, 1)

    def emit(event: Event) -> None:
        os.write(events_fd, msgspec.json.encode(event) + b"\n")

    try:
        return run(order, emit)
    except Exception as error:
        emit(Event(error=f"{type(error).__name__}: {error}"))
        return EXIT_NOT_STARTED


if __name__ == "__main__":
    sys.exit(main())
