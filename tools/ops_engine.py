"""The persistent kernel's side of tools/bench_ops.py: one build of it on a GPU, its program's parts as loads, the logits that it leaves.

A part's ops run over and over in one launch, the whole program likewise, by the workers alone, over one plan; each op finds the activations that a
step left. So a part finds its code in the instruction caches, where a step's does not fit: the parts take less than the whole.
Called by tools/bench_ops.py. Test: pytest tests/null/test_ops_engine.py; what repeats leave behind: tests/host/test_op_repeats_simt.py
"""

from __future__ import annotations

import json
import mmap
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from ops_parts import PARTS, WHOLE, ops_of
from ops_timing import Clock, Figures, Settings, measure_loads
from step_rows import SHAPES, Row

from blinkimp import ring_abi as abi
from blinkimp.host.bf16 import bf16_from_f32
from blinkimp.host.memory_plan import page_bytes_of
from blinkimp.host.power import PowerSource, open_nvml
from blinkimp.ring_abi import DType
from tests.gpu.step_runner import Request, StepRunner

MAX_PROGRAM_OPS: Final = 1 << 17  # 16 MiB; half a second of the shortest ops
KV_BLOCK_BYTES: Final = 1 << 25  # of random numbers, brought into all pages piece by piece

Bits = dict[str, NDArray[np.uint32]]  # of the logits, by row
RowFigures = dict[str, dict[str, Figures]]  # by row and part


class PartLoad:
    """A part of the program, a unit of it at a time: one op, since a part's are alike; of several parts, or the whole program, all of it."""

    def __init__(self, runner: StepRunner, requests: list[Request], part: str) -> None:
        self._runner, self._requests = runner, requests
        self._ops = ops_of(part, runner.model.ops)
        self._unit_ops = 1 if part in PARTS and part != WHOLE else len(self._ops)
        self.per_step = len(self._ops) / self._unit_ops
        self.max_units = MAX_PROGRAM_OPS // self._unit_ops

    def begin(self) -> None:
        self._runner.run(
            self._requests
        )  # activations and logits as a step leaves them, and no sums of thousands of O or down

    def prepare(self, num_units: int) -> None:
        program = self._ops[np.arange(num_units * self._unit_ops) % len(self._ops)]
        self._params = self._runner.prepare(self._requests, ops=lambda _: program)

    def run(self, num_units: int) -> None:
        params = self._params.copy()
        if num_units:
            params["num_ops"] = num_units * self._unit_ops
        else:  # a launch needs an op: the model's first, the embedding
            params["ops"], params["num_ops"] = self._runner.params["ops"], 1
        self._runner.launch(params)


def requests_of(row: Row, rng: np.random.Generator, vocab: int) -> list[Request]:
    num_computed = row.context - 1 if row.phase == "decode" else 0
    batch = row.batch if row.phase == "decode" else 1
    return [Request(rng.integers(0, vocab, row.context, dtype=np.uint32), num_computed, i) for i in range(batch)]


def fill_kv_pages(runner: StepRunner, rng: np.random.Generator) -> None:
    """Normal numbers as keys and values that nobody computed: one number everywhere would cost less power."""
    context, first = runner.context, int(runner.params["kv_cache"][0])
    num_bytes = runner.sizes.num_pages * page_bytes_of(runner.config, DType.BF16)
    block = np.frombuffer(mmap.mmap(-1, min(KV_BLOCK_BYTES, num_bytes)), np.uint16)
    block[:] = bf16_from_f32(rng.standard_normal(len(block), np.float32))
    context.register_host(block.ctypes.data, block.nbytes)
    try:
        for begin in range(0, num_bytes, block.nbytes):
            context.start_upload(first + begin, block[: (num_bytes - begin) // 2], context.stream)
        context.synchronize()
    finally:
        context.unregister_host(block.ctypes.data)


def measure_row(
    runner: StepRunner, row: Row, parts: Sequence[str], settings: Settings, source: PowerSource | None, seed: int,
    clock: Clock | None = None,
) -> tuple[dict[str, Figures], NDArray[np.uint32]]:  # fmt: skip
    """(figures by part, bits of the logits)."""
    requests = requests_of(row, np.random.default_rng(seed), runner.config.vocab)
    loads = {part: PartLoad(runner, requests, part) for part in parts}
    figures = measure_loads(loads, settings, source, clock)
    runner.run(requests)
    logits = runner.logits(len(requests)).view(np.uint32).copy()
    for request in requests:
        runner.release(request.request_idx)
    return figures, logits


def measure_build(
    name: str, shape: str, cubin: bytes, num_workers: int, rows: Sequence[Row], parts: Sequence[str], settings: Settings
) -> tuple[RowFigures, Bits]:
    """All rows on one build of the kernel."""
    longest = max(row.context for row in rows)
    num_pages = max((row.batch if row.phase == "decode" else 1) * -(-row.context // abi.PAGE_TOKENS) for row in rows)
    source = open_nvml() if settings.seconds else None
    figures: RowFigures = {}
    bits: Bits = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(SHAPES[shape]))
        with StepRunner(
            Path(folder), load_format="dummy", max_context=longest, num_pages=num_pages, max_step_tokens=max(longest, 512),
            num_workers=num_workers, cubin=cubin,
        ) as runner:  # fmt: skip
            fill_kv_pages(runner, np.random.default_rng(0))
            for seed, row in enumerate(rows):
                figures[row.name], bits[row.name] = measure_row(runner, row, parts, settings, source, seed)
                said = ", ".join(f"{part} {of_part.ms:.3f}" for part, of_part in figures[row.name].items())
                print(f"{name} {row.label}: ms of {said}", file=sys.stderr, flush=True)
    return figures, bits
