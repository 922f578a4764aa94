"""A GPU that only keeps time: what tests/gpu/step_runner.py wants of a GpuContext, in host memory, where an op takes as long as a table says.

    gpu = FakeGpu()
    runner = fake_runner(gpu, num_layers=2)      a StepRunner on it: real plans, real parameters, a real program, no kernel
    runner.run(requests); gpu.launches[-1]       kinds of the ops that ran; gpu.now_ns() has moved on
    gpu.read()                                   as of a PowerSource: gpu.busy_w while ops run, gpu.idle_w else
Used by tests/null/test_step_runner.py, tests/null/test_ops_engine.py and tests/null/test_bench_ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.gpu_memory import allocate_engine
from blinkimp.host.memory_plan import EngineSizes
from blinkimp.host.model_config import parse_config
from blinkimp.host.power import Reading
from blinkimp.host.program import model_dims
from blinkimp.ring_abi import BufferId, DType, OpKind
from tests.gpu.step_runner import StepRunner, llama_config

PLAN_WORD, ARRIVALS_WORD = 0, 32  # grid words of device/worker_memory.cuh
OP_NS = {
    OpKind.EMBED: 3_000,
    OpKind.QKV: 20_000,
    OpKind.ATTENTION: 50_000,
    OpKind.PROJECT: 10_000,
    OpKind.GATE_UP: 60_000,
    OpKind.LM_HEAD: 200_000,
    OpKind.SAMPLE: 5_000,
}
MAX_BATCH, NUM_PAGES = 8, 64


def program(num_layers: int) -> NDArray[np.void]:
    """The ops of a model, with nothing but their kinds and inputs."""
    layer = [
        (OpKind.QKV, BufferId.HIDDEN),
        (OpKind.ATTENTION, BufferId.QUERY),
        (OpKind.PROJECT, BufferId.ATTENTION),
        (OpKind.GATE_UP, BufferId.HIDDEN),
        (OpKind.PROJECT, BufferId.ACTIVATION),
    ]
    steps = [(OpKind.EMBED, 0), *layer * num_layers, (OpKind.LM_HEAD, BufferId.HIDDEN), (OpKind.SAMPLE, 0)]
    ops = np.zeros(len(steps), abi.OP)
    ops["kind"], ops["input"] = [int(kind) for kind, _ in steps], [int(source) for _, source in steps]
    return ops


@dataclass
class FakeGpu:
    """Clock, power source and context in one."""

    name, driver = "fake", "1.0"
    launch_ns: int = 40_000
    slow_after_s: float = 1e9  # of work without a pause: ops then take twice as long
    idle_w: float = 100.0
    busy_w: float = 500.0
    memory: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    registered: dict[int, int] = field(default_factory=dict)
    launches: list[NDArray[np.uint32]] = field(default_factory=list)
    slept_s: list[float] = field(default_factory=list)
    stream: None = None
    _now_ns: int = 0
    _busy_ns: int = 0
    _unpaused_ns: int = 0

    # ---- Clock and power ---------------------------------------------------------------------------------------------
    def now_ns(self) -> int:
        return self._now_ns

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self._now_ns += int(seconds * 1e9)
        self._unpaused_ns = 0

    def read(self) -> Reading:
        idle_ns = self._now_ns - self._busy_ns
        return Reading(self.busy_w, (self.idle_w * idle_ns + self.busy_w * self._busy_ns) / 1e9, 1500, 3201)

    # ---- Memory ------------------------------------------------------------------------------------------------------
    def allocate(self, num_bytes: int, what: str, *, zero: bool = False) -> int:
        address = (len(self.memory) + 1) << 32
        self.memory[address] = np.full(num_bytes, 0 if zero else 0xFF, np.uint8)
        return address

    def free(self, address: int) -> None:
        self.memory[address] = np.zeros(0, np.uint8)

    def _place(self, address: int, num_bytes: int) -> NDArray[np.uint8]:
        base = address >> 32 << 32
        memory = self.memory[base]
        assert address - base + num_bytes <= len(memory), (
            f"{num_bytes} bytes from {address - base} on, of {len(memory)}"
        )
        return memory[address - base : address - base + num_bytes]

    def view(self, address: int, dtype: Any, count: int) -> NDArray[Any]:
        return self._place(address, count * np.dtype(dtype).itemsize).view(dtype)

    def upload(self, address: int, values: NDArray[Any]) -> None:
        contiguous = np.ascontiguousarray(values)
        self._place(address, contiguous.nbytes)[:] = np.frombuffer(contiguous.tobytes(), np.uint8)

    def download(self, address: int, values: NDArray[Any]) -> None:
        values.view(np.uint8).reshape(-1)[:] = self._place(address, values.nbytes)

    def register_host(self, address: int, num_bytes: int) -> int:
        self.registered[address] = num_bytes
        return address

    def unregister_host(self, address: int) -> None:
        del self.registered[address]

    def start_upload(self, address: int, values: NDArray[Any], stream: Any) -> None:
        assert values.ctypes.data in self.registered and values.nbytes <= self.registered[values.ctypes.data]
        self.upload(address, values)

    # ---- Launches ----------------------------------------------------------------------------------------------------
    def launch(
        self, function: Any, num_blocks: int, num_threads: int, arguments: Sequence[Any], *, shared_memory_bytes: int, cooperative: bool
    ) -> None:  # fmt: skip
        (params,) = arguments
        words = self.view(int(params["grid_words"][0]), np.uint32, abi.GRID_WORDS_BYTES // 4)
        assert (words[PLAN_WORD], words[ARRIVALS_WORD]) == (2, 0), "the grid's words are those of the launch before"
        assert cooperative and num_blocks == params["num_workers"][0]
        kinds = self.view(int(params["ops"][0]), abi.OP, int(params["num_ops"][0]))["kind"].copy()
        assert len(kinds), "the kernel would run what lies where the first op should"
        words[ARRIVALS_WORD] = len(kinds) * num_blocks
        self.launches.append(kinds)
        of_kind = np.zeros(max(OP_NS) + 1, np.int64)
        of_kind[[int(kind) for kind in OP_NS]] = list(OP_NS.values())
        self._work(of_kind[kinds])
        self._now_ns += self.launch_ns

    def _work(self, op_ns: NDArray[np.int64]) -> None:
        ends_ns = self._unpaused_ns + np.cumsum(op_ns)
        busy_ns = int(np.where(ends_ns > self.slow_after_s * 1e9, 2 * op_ns, op_ns).sum())
        self._unpaused_ns += int(op_ns.sum())
        self._busy_ns += busy_ns
        self._now_ns += busy_ns

    def synchronize(self, stream: Any = None) -> None: ...
    def close(self) -> None: ...


def fake_runner(gpu: FakeGpu, num_layers: int = 2, **changes: Any) -> StepRunner:
    """A StepRunner of a small model on it."""
    runner: Any = StepRunner.__new__(StepRunner)
    runner.context = gpu
    runner.config = parse_config(llama_config(num_hidden_layers=num_layers, vocab_size=50))
    runner.num_workers = 3
    runner.shape = SimpleNamespace(num_threads=384, shared_memory_bytes=1024, kind="hopper")
    dims = model_dims(runner.config, DType.BF16, DType.BF16, ())
    runner.model = SimpleNamespace(ops=program(num_layers), dims=dims)
    sizes = {
        "num_queue_pairs": 0, "num_requests": MAX_BATCH, "max_requests_per_queue_pair": MAX_BATCH, "max_batch": MAX_BATCH, "max_step_tokens": 512,
        "prefill_chunk_tokens": 512, "max_context": 512, "max_pages_per_request": 8, "num_pages": NUM_PAGES,
    }  # fmt: skip
    runner.sizes = EngineSizes(**(sizes | changes))
    runner.params = allocate_engine(runner.context, runner.config, runner.sizes, dims, runner.model.ops)
    runner.params["num_workers"] = runner.num_workers
    runner.page, runner.function = np.zeros(4096, np.uint8), None
    runner.page_tables = np.zeros((MAX_BATCH, runner.sizes.max_pages_per_request), np.uint32)
    runner.free_pages, runner.num_pages_of = list(range(runner.sizes.num_pages)), np.zeros(MAX_BATCH, int)
    runner.num_shared_of = np.zeros(MAX_BATCH, int)
    runner.requests = np.zeros((MAX_BATCH, abi.REQUEST_BYTES), np.uint8)
    return runner  # type: ignore[no-any-return]
