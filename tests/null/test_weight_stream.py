"""Weights through staging buffers: right rows in the right order, whatever the buffers' size, the parts and the readers' speed.

Covers host/weight_stream.py and read_into() of the tensors. Run: pytest tests/null/test_weight_stream.py
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp.host.bf16 import bf16_from_f32
from blinkimp.host.checkpoint import Checkpoint
from blinkimp.host.dummy_weights import DummyWeights
from blinkimp.host.model_config import UnsupportedModelError
from blinkimp.host.weight_stream import WeightStream
from blinkimp.host.weights import MatrixSource, Tensor, Weights
from blinkimp.ring_abi import DType, OpKind
from tests.checkpoint_support import CONFIG, random_tensors, write_checkpoint


class FakeBuffer:
    """Staging memory whose reader is done only when wait() says so: what was in it is poisoned then."""

    def __init__(self, num_bytes: int) -> None:
        self.memory: NDArray[np.uint8] = np.full(num_bytes, 0xFF, np.uint8)
        self.num_waits = 0

    def wait(self) -> None:
        self.memory[:] = 0xFF
        self.num_waits += 1


class Sink:
    """Copies consumed rows to where they belong, and keeps the order of consumption."""

    def __init__(self, source: MatrixSource) -> None:
        self.matrix = np.zeros(
            (source.out_features, source.in_features), np.uint16 if source.dtype == DType.BF16 else np.float32
        )
        self.begins: list[int] = []

    def consume(self, buffer: FakeBuffer, begin: int, rows: Weights) -> None:
        assert np.shares_memory(buffer.memory, rows)
        self.matrix[begin : begin + len(rows)] = rows
        self.begins.append(begin)


@dataclass(frozen=True)
class SlowTensor:
    """Rows that come late, the first ones last; or never."""

    name: str
    shape: tuple[int, int]
    fails_from: int = 1 << 30

    def read_rows(self, begin: int, end: int, dtype: DType) -> Weights:
        rows = np.empty((end - begin, self.shape[1]), np.float32)
        self.read_into(begin, [rows], dtype)
        return rows

    def read_into(self, begin: int, places: Sequence[Weights], dtype: DType) -> None:
        time.sleep(0.002 if begin % 3 == 0 else 0)
        for place in places:
            if begin + len(place) > self.fails_from:
                raise OSError(f"row {begin} cannot be read")
            place[...] = np.arange(begin, begin + len(place), dtype=np.float32)[:, None]
            begin += len(place)

    def view(self, dtype: DType) -> Weights | None:
        return None


def matrix_of(parts: tuple[Tensor, ...], kind: OpKind, dtype: DType) -> MatrixSource:
    return MatrixSource(parts[0].name, kind, 0, dtype, parts, interleaved=kind == OpKind.GATE_UP)


def parts_of(weights: Checkpoint | DummyWeights, kind: OpKind) -> tuple[Tensor, ...]:
    prefix, hidden = "model.layers.0", CONFIG["hidden_size"]
    if kind == OpKind.GATE_UP:
        return tuple(
            weights.tensor(f"{prefix}.mlp.{name}_proj.weight", (CONFIG["intermediate_size"], hidden))
            for name in ("gate", "up")
        )
    rows = {"q": hidden, "k": hidden // 2, "v": hidden // 2}
    return tuple(weights.tensor(f"{prefix}.self_attn.{name}_proj.weight", (num, hidden)) for name, num in rows.items())


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
@pytest.mark.parametrize("kind", [OpKind.QKV, OpKind.GATE_UP])
@pytest.mark.parametrize("buffer_rows", [1, 5, 16, 1000])
def test_rows_arrive_whatever_they_are_cut_into(
    tmp_path: Path, stored: str, dtype: DType, kind: OpKind, buffer_rows: int
) -> None:
    write_checkpoint(tmp_path, random_tensors(CONFIG, stored))
    source = matrix_of(parts_of(Checkpoint(tmp_path), kind), kind, dtype)
    row_bytes = source.num_bytes // source.out_features
    stream, sink = WeightStream([FakeBuffer(buffer_rows * row_bytes) for _ in range(3)], num_threads=3), Sink(source)
    stream.add(source, sink.consume)
    stream.finish()
    whole = [part.read_rows(0, part.shape[0], dtype) for part in source.parts]
    expected = np.concatenate(whole)
    if kind == OpKind.GATE_UP:
        expected = np.stack([part.reshape(-1, 8, source.in_features) for part in whole], axis=1).reshape(
            -1, source.in_features
        )
    np.testing.assert_array_equal(sink.matrix, expected)
    assert sink.begins == list(range(0, source.out_features, buffer_rows))


def test_dummy_weights_stream_too() -> None:
    source = matrix_of(parts_of(DummyWeights(3), OpKind.GATE_UP), OpKind.GATE_UP, DType.BF16)
    stream, sink = WeightStream([FakeBuffer(20 * 64) for _ in range(2)]), Sink(source)
    stream.add(source, sink.consume)
    stream.finish()
    np.testing.assert_array_equal(sink.matrix, source.read_rows(0, source.out_features))
    assert len(np.unique(sink.matrix)) > 100


def test_pieces_of_several_matrices_keep_their_order_and_wait_for_their_buffer() -> None:
    buffers = [FakeBuffer(4 * 40) for _ in range(3)]
    stream = WeightStream(buffers, num_threads=4)
    sources = [matrix_of((SlowTensor(f"t{i}", (30 + i, 10)),), OpKind.PROJECT, DType.F32) for i in range(3)]
    sinks = [Sink(source) for source in sources]
    for source, sink in zip(sources, sinks, strict=True):
        stream.add(source, sink.consume)
    stream.finish()
    for source, sink in zip(sources, sinks, strict=True):
        np.testing.assert_array_equal(sink.matrix[:, 0], np.arange(source.out_features, dtype=np.float32))
    assert sum(buffer.num_waits for buffer in buffers) == sum(len(sink.begins) for sink in sinks)  # W1


def test_an_error_of_a_reader_is_raised_and_ends_the_threads() -> None:
    stream = WeightStream([FakeBuffer(4 * 40) for _ in range(2)], num_threads=2)
    source = matrix_of((SlowTensor("t", (40, 10), fails_from=22),), OpKind.PROJECT, DType.F32)
    sink = Sink(source)
    with pytest.raises(OSError, match="row 20 cannot be read"):
        stream.add(source, sink.consume)
        stream.finish()
    stream.close()
    stream.close()
    assert sink.begins == list(range(0, 20, 4))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_a_checkpoint_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, random_tensors(CONFIG, "BF16"))
    source = matrix_of(parts_of(Checkpoint(tmp_path), OpKind.QKV), OpKind.QKV, DType.BF16)
    path = tmp_path / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 64)
    with pytest.raises(UnsupportedModelError, match="cut short"):
        source.read_rows(0, source.out_features)


def test_buffers_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="two or more"):
        WeightStream([FakeBuffer(64)])
    stream = WeightStream([FakeBuffer(64), FakeBuffer(64)])
    with pytest.raises(ValueError, match="expected at most 64"):
        stream.add(matrix_of((SlowTensor("t", (4, 100)),), OpKind.PROJECT, DType.F32), lambda *_: None)
    stream.finish()


def test_bf16_rounding_is_the_same_through_the_stream(tmp_path: Path) -> None:
    tensors = write_checkpoint(tmp_path)
    source = matrix_of(parts_of(Checkpoint(tmp_path), OpKind.QKV), OpKind.QKV, DType.BF16)
    expected = bf16_from_f32(tensors["model.layers.0.self_attn.q_proj.weight"])
    np.testing.assert_array_equal(source.read_rows(3, 20), expected[3:20])
