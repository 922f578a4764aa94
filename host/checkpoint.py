"""Reads Hugging Face checkpoint folders: config.json, generation_config.json, model.safetensors or its sharded index.

Files are memory-mapped; a tensor is read row by row when a weight target asks for it, so a model never stands in host memory
twice. What is wrong with a folder is refused with a reason: damaged files at once, missing and unexpected tensors while building.
Called by host/program.py, nic_shim/tokenizer.py and blinkimp/cli/checks.py. Test: pytest tests/null/test_checkpoint.py
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from blinkimp.host.bf16 import bf16_from_f32, f32_from_bf16
from blinkimp.host.model_config import ModelConfig, parse_config, refusal
from blinkimp.host.weights import Weights
from blinkimp.ring_abi import DType

STORED_DTYPES: Final[dict[str, Any]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
NUM_NAMES_SHOWN: Final = 8
MAX_READ_PLACES: Final = 1024  # IOV_MAX of Linux
TIED_COPY: Final = "lm_head.weight"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refusal(str(path), "no such file", f"a Hugging Face folder with {path.name}", "Check the path") from None
    except NotADirectoryError:
        raise refusal(str(path.parent), "not a directory", "a Hugging Face folder", "Check the path") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise refusal(str(path), f"invalid JSON ({error})", "a JSON object", "Download the file again") from None
    if not isinstance(value, dict):
        raise refusal(str(path), type(value).__name__, "a JSON object", "Download the file again")
    return value


def read_model_config(folder: Path) -> ModelConfig:
    return parse_config(read_json(folder / "config.json"))


def read_eos_ids(folder: Path, vocab: int | None = None) -> tuple[int, ...]:
    """EOS ids of generation_config.json, or of config.json where that names none: an empty list names them, and there is none. Files that are
    not there name none. `vocab`: what ids are held against, where it is known."""
    value: Any = None
    for name in ("generation_config.json", "config.json"):
        if value is None and (folder / name).exists():
            value = read_json(folder / name).get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < (vocab or 1 << 32):
            raise refusal("eos_token_id", repr(token), f"an id below vocab_size ({vocab})" if vocab else "a token id")
    return tuple(dict.fromkeys(ids))


class CheckpointFile:
    """Reads a file into memory of the caller's: read calls copy from the page cache several times as fast as page faults of a mapping do,
    and let other threads run meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)

    def read_into(self, offset: int, places: Sequence[NDArray[Any]]) -> None:
        """Fills contiguous places, one after the other, from the bytes at `offset` on. Several threads may call it."""
        left = [place.data.cast("B") for place in places if place.nbytes]
        while left:
            num_bytes = os.preadv(self._fd, left[:MAX_READ_PLACES], offset)
            if num_bytes == 0:
                remedy = "It was cut short while it was read: download it again"
                raise refusal(str(self.path), f"its end at byte {offset}", "more weights there", remedy)
            offset += num_bytes
            while left and num_bytes >= len(left[0]):
                num_bytes -= len(left.pop(0))
            if num_bytes:
                left[0] = left[0][num_bytes:]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    name: str
    shape: tuple[int, ...]
    stored: str  # key of STORED_DTYPES
    data: NDArray[np.uint8]  # its bytes, in the mapped file
    file: CheckpointFile
    offset_bytes: int  # of its first byte in the file

    def view(self, dtype: DType) -> Weights | None:
        same = (self.stored, dtype) in (("BF16", DType.BF16), ("F32", DType.F32))
        # A foreign writer need not align tensors, but what reads them must not meet half an element.
        aligned = self.data.ctypes.data % np.dtype(STORED_DTYPES[self.stored]).itemsize == 0
        return self._elements() if same and aligned else None

    def read_rows(self, begin: int, end: int, dtype: DType) -> Weights:
        rows = self._elements()[begin:end]
        if self.stored == "BF16":
            return rows if dtype == DType.BF16 else f32_from_bf16(rows)
        values = rows.astype(np.float32, copy=False)
        return bf16_from_f32(values) if dtype == DType.BF16 else values

    def read_into(self, begin: int, places: Sequence[Weights], dtype: DType) -> None:
        if (self.stored, dtype) in (("BF16", DType.BF16), ("F32", DType.F32)):
            row_bytes = self.data.nbytes // max(1, self.shape[0])
            self.file.read_into(self.offset_bytes + begin * row_bytes, places)
            return
        for place in places:
            place[...] = self.read_rows(begin, begin + len(place), dtype)
            begin += len(place)

    def _elements(self) -> NDArray[Any]:
        elements: NDArray[Any] = self.data.view(STORED_DTYPES[self.stored]).reshape(self.shape)
        return elements


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, mapped. Refuses damaged and quantized files."""
    try:
        file_bytes = path.stat().st_size
    except FileNotFoundError:
        raise refusal(str(path), "no such file", "a safetensors file", "Download the missing file") from None
    if file_bytes < 8:
        raise refusal(f"{path} size", f"{file_bytes} bytes", "at least 8", "The file is truncated: download it again")
    mapped: NDArray[np.uint8] = np.memmap(path, np.uint8, mode="r")
    file = CheckpointFile(path)
    header_bytes = int.from_bytes(mapped[:8].tobytes(), "little")
    if header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
        limit = min(file_bytes - 8, MAX_HEADER_BYTES)
        remedy = "Truncated or not safetensors: download it again"
        raise refusal(f"{path} header", f"{header_bytes} bytes", f"at most {limit}", remedy)
    try:
        header = json.loads(mapped[8 : 8 + header_bytes].tobytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise refusal(
            f"{path} header", f"invalid JSON ({error})", "a safetensors header", "Download it again"
        ) from None
    if not isinstance(header, dict):
        raise refusal(f"{path} header", type(header).__name__, "a JSON object", "Download it again")
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {name: _stored_tensor(file, name, entry, mapped, 8 + header_bytes) for name, entry in entries.items()}


def _stored_tensor(
    file: CheckpointFile, name: str, entry: Any, mapped: NDArray[np.uint8], data_begin: int
) -> StoredTensor:
    where = f"{file.path.name} tensor {name}"
    data = mapped[data_begin:]
    try:
        stored, shape = entry["dtype"], tuple(int(num) for num in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
        if any(num < 0 for num in shape):
            raise ValueError("negative dimension")
    except (KeyError, TypeError, ValueError):
        raise refusal(where, repr(entry), "dtype, shape and data_offsets", "Download the file again") from None
    if stored not in STORED_DTYPES:
        raise refusal(f"{where} dtype", stored, "BF16, F16 or F32", "Use the unquantized checkpoint of this model")
    if not 0 <= begin <= end <= len(data):
        remedy = "The file is truncated: download it again"
        raise refusal(where, f"bytes {begin} to {end} of {len(data)}", "bytes inside the file", remedy)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(STORED_DTYPES[stored]).itemsize
    if end - begin != num_bytes:
        expected = f"{num_bytes} for shape {list(shape)} of {stored}"
        raise refusal(where, f"{end - begin} bytes", expected, "Download the file again")
    return StoredTensor(name, shape, stored, data[begin:end], file, data_begin + begin)


class Checkpoint:
    """The tensors of a folder, by name. `finish` refuses weights that nothing asked for: they would change what the model computes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors = self._open_sharded() if (folder / INDEX_NAME).exists() else self._open_single()
        self._used: set[str] = set()
        # A checkpoint of mixed types counts as the widest: rounding a stored f32 must be asked for.
        is_f32 = any(tensor.stored == "F32" and len(tensor.shape) > 1 for tensor in self._tensors.values())
        self.compute_dtype = DType.F32 if is_f32 else DType.BF16

    def tensor(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        found = self._tensors.get(name)
        if found is None:
            raise refusal(f"tensor {name} of {self.folder}", "nothing", f"shape {list(shape)}", self._near(name))
        if found.shape != shape:
            raise refusal(f"tensor {name} shape", list(found.shape), f"{list(shape)} by config.json")
        self._used.add(name)
        return found

    def finish(self) -> None:
        # Some exporters store what follows from the config: the rotary frequencies.
        left = {name for name in self._tensors if not name.endswith("rotary_emb.inv_freq")} - self._used
        if TIED_COPY in left:
            self._check_tied_copy()
            left.remove(TIED_COPY)
        if left:
            more = f" and {len(left) - NUM_NAMES_SHOWN} more" if len(left) > NUM_NAMES_SHOWN else ""
            shown = ", ".join(sorted(left)[:NUM_NAMES_SHOWN]) + more
            expected = "no tensors beyond the architecture's"
            raise refusal(f"tensors in {self.folder}", shown, expected, "Check architectures in config.json")

    def _check_tied_copy(self) -> None:
        """An LM head beside tie_word_embeddings may only be a copy of the embedding."""
        copy, embedding = self._tensors[TIED_COPY], self._tensors["model.embed_tokens.weight"]
        if copy.shape != embedding.shape or not np.array_equal(copy.data, embedding.data):
            expected = "none, or a copy of model.embed_tokens.weight"
            raise refusal(
                f"{TIED_COPY} with tie_word_embeddings", "other values", expected, "Set tie_word_embeddings to false"
            )

    def _near(self, name: str) -> str:
        """Names that end alike, to show a wrong prefix."""
        tail = name.split(".", 1)[-1]
        near = [other for other in self._tensors if other.endswith(tail)][:3]
        return f"Similar names present: {', '.join(near)}" if near else ""

    def _open_single(self) -> dict[str, StoredTensor]:
        path = self.folder / SINGLE_NAME
        if path.exists():
            return open_safetensors(path)
        suffixes = (".bin", ".pth", ".gguf", ".safetensors")
        other = sorted(entry.name for entry in self.folder.iterdir() if entry.suffix in suffixes)
        remedy = (
            "Convert the weights with save_pretrained(safe_serialization=True)" if other else "Download the weights"
        )
        raise refusal(f"weights in {self.folder}", other or "none", f"{SINGLE_NAME} or {INDEX_NAME}", remedy)

    def _open_sharded(self) -> dict[str, StoredTensor]:
        weight_map = read_json(self.folder / INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise refusal(
                f"{INDEX_NAME} weight_map", type(weight_map).__name__, "an object of tensor name to file name"
            )
        shards: dict[str, dict[str, StoredTensor]] = {}
        for file_name in sorted(set(weight_map.values())):
            if Path(file_name).name != file_name:
                raise refusal(f"{INDEX_NAME} shard", file_name, "the name of a file in the same folder")
            shards[file_name] = open_safetensors(self.folder / file_name)
        for name, file_name in weight_map.items():
            if name not in shards[file_name]:
                raise refusal(
                    f"tensor {name}", f"not in {file_name}", f"there by {INDEX_NAME}", "Download that shard again"
                )
        # Tensors of a shard that the index does not name count too: finish() must see them.
        found: dict[str, StoredTensor] = {}
        for shard in shards.values():
            for name, tensor in shard.items():
                self._check_same(found.setdefault(name, tensor), tensor)
        return found

    @staticmethod
    def _check_same(first: StoredTensor, other: StoredTensor) -> None:
        """Of two that differ the index means one, and transformers takes the last: the model would compute something else here than there."""
        is_same = first.stored == other.stored and first.shape == other.shape
        if first is not other and not (is_same and np.array_equal(first.data, other.data)):
            got = f"different values in {first.file.path.name} and {other.file.path.name}"
            raise refusal(f"tensor {first.name}", got, "one value", "Download all shards again, of one revision")
