"""Weights from a checkpoint to a device, as fast as the page cache gives them: threads fill staging buffers while others are on their way.

    stream = WeightStream(buffers)
    stream.add(source, consume)     consume(buffer, first_row, rows) once rows stand in a buffer, in order, on the calling thread
    stream.finish()                 everything has been consumed

Invariants:
  W1  a buffer is filled only after its wait() returned: the device has read what consume() started on it.
  W2  at most len(buffers) pieces are under way, so a load needs that much host memory, whatever the model's size.
  W3  pieces are consumed in the order in which they were added; an error of a reading thread is raised by the call that would consume its piece.
Called by host/gpu_weights.py, tools/bench_load.py. Test: pytest tests/null/test_weight_stream.py
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from blinkimp.host.weights import MatrixSource, Weights
from blinkimp.ring_abi import DType

# A thread copies 5 to 8 GB/s from the page cache: more than these are for slow pages, not for bandwidth.
MAX_THREADS: Final = 12
MIN_TASK_BYTES: Final = 1 << 20  # of one thread's share of a piece


class Buffer(Protocol):
    """Staging memory of one piece."""

    @property
    def memory(self) -> NDArray[np.uint8]: ...

    def wait(self) -> None:
        """Until nobody reads it any more (W1)."""


Consume = Callable[[Any, int, Weights], None]


@dataclass(frozen=True)
class _Piece:
    buffer: Buffer
    begin: int
    rows: Weights
    reads: list[Future[None]]
    consume: Consume


class WeightStream:
    """One loading of a model. One thread calls it."""

    def __init__(self, buffers: Sequence[Buffer], num_threads: int | None = None) -> None:
        if len(buffers) < 2 or len({buffer.memory.nbytes for buffer in buffers}) != 1:
            raise ValueError(f"staging buffers: got {len(buffers)}, expected two or more of one size")
        self.num_threads = num_threads or max(2, min(MAX_THREADS, len(os.sched_getaffinity(0))))
        self._threads = ThreadPoolExecutor(self.num_threads, "weights")
        self._free = deque(buffers)
        self._pieces: deque[_Piece] = deque()
        self._buffer_bytes = buffers[0].memory.nbytes

    def add(self, source: MatrixSource, consume: Consume) -> None:
        """All rows of a matrix. Returns when they are read or being read; what came before them is consumed by and by."""
        item_dtype = np.dtype(np.uint16 if source.dtype == DType.BF16 else np.float32)
        row_bytes = source.in_features * item_dtype.itemsize
        piece_rows = self._buffer_bytes // row_bytes
        if piece_rows == 0:
            raise ValueError(f"{source.name}: a row has {row_bytes} bytes, expected at most {self._buffer_bytes}")
        for begin in range(0, source.out_features, piece_rows):
            num_rows = min(piece_rows, source.out_features - begin)
            if not self._free:
                self._consume_oldest()
            buffer = self._free.popleft()
            buffer.wait()
            rows = buffer.memory[: num_rows * row_bytes].view(item_dtype).reshape(num_rows, source.in_features)
            task_rows = max(-(-num_rows // self.num_threads), -(-MIN_TASK_BYTES // row_bytes))
            reads = [
                self._threads.submit(source.read_into, begin + low, rows[low : low + task_rows])
                for low in range(0, num_rows, task_rows)
            ]
            self._pieces.append(_Piece(buffer, begin, rows, reads, consume))

    def finish(self) -> None:
        """Returns once everything has been consumed; the threads end, here or in close()."""
        while self._pieces:
            self._consume_oldest()
        self.close()

    def close(self) -> None:
        """Drops what has not been consumed and ends the threads. Idempotent."""
        self._threads.shutdown(cancel_futures=True)
        self._pieces.clear()

    def _consume_oldest(self) -> None:
        piece = self._pieces.popleft()
        for read in piece.reads:
            read.result()  # W3
        piece.consume(piece.buffer, piece.begin, piece.rows)
        self._free.append(piece.buffer)
