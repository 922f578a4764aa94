"""Checkpoint folders: what is read, and that every damaged or foreign one is refused with what, got, expected and the supported list.

Run: pytest tests/null/test_checkpoint.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from blinkimp.host.checkpoint import Checkpoint, open_safetensors, read_eos_ids, read_model_config
from blinkimp.host.model_config import SUPPORTED, UnsupportedModelError
from blinkimp.host.program import load_model
from blinkimp.host.weights import HostTarget
from blinkimp.ring_abi import DType
from tests.checkpoint_support import (
    CONFIG,
    random_tensors,
    safetensors_bytes,
    tensor_shapes,
    write_checkpoint,
    write_config,
)


def refused(folder: Path, *parts: str) -> None:
    """load_model refuses the folder, and the message holds all parts and the supported list."""
    with pytest.raises(UnsupportedModelError) as caught:
        load_model(folder, HostTarget())
    message = str(caught.value)
    assert message.endswith(SUPPORTED)
    for part in ("got ", "expected ", *parts):
        assert part in message, message


@pytest.mark.parametrize("num_shards", [0, 3])
def test_tensors_are_read_as_stored(tmp_path: Path, num_shards: int) -> None:
    tensors = write_checkpoint(tmp_path, num_shards=num_shards)
    checkpoint = Checkpoint(tmp_path)
    for name, value in tensors.items():
        stored = checkpoint.tensor(name, value.shape)
        assert np.array_equal(stored.read_rows(0, value.shape[0], DType.F32), value)
        assert np.array_equal(stored.read_rows(3, 7, DType.F32), value[3:7])
    checkpoint.finish()


@pytest.mark.parametrize(("dtype", "expected"), [("F32", DType.F32), ("F16", DType.BF16), ("BF16", DType.BF16)])
def test_compute_follows_the_stored_type(tmp_path: Path, dtype: str, expected: DType) -> None:
    write_checkpoint(tmp_path, random_tensors(CONFIG, dtype))
    assert load_model(tmp_path, HostTarget()).compute == expected
    assert load_model(tmp_path, HostTarget(), compute="f32").compute == DType.F32


def test_the_mapped_file_is_not_copied(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    view = Checkpoint(tmp_path).tensor("lm_head.weight", (40, 32)).view(DType.F32)
    assert view is not None and not view.flags.owndata and not view.flags.writeable
    assert Checkpoint(tmp_path).tensor("lm_head.weight", (40, 32)).view(DType.BF16) is None


def test_the_safetensors_package_writes_what_we_read(tmp_path: Path) -> None:
    """An independent writer of the format."""
    from safetensors.numpy import save_file

    tensors = random_tensors(CONFIG)
    save_file(tensors, tmp_path / "model.safetensors")
    read = open_safetensors(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in read.items()} == tensor_shapes(CONFIG)
    assert all(np.array_equal(read[name].read_rows(0, len(value), DType.F32), value) for name, value in tensors.items())


# ---- Refusals ------------------------------------------------------------------------------------------------------
def test_missing_folder_config_and_weights(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such file", "config.json", "Check the path")
    write_config(tmp_path, CONFIG)
    refused(tmp_path, "got none", "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "pytorch_model.bin", "save_pretrained(safe_serialization=True)")
    refused(tmp_path / "config.json", "not a directory")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "invalid JSON", "Download the file again")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "got list", "a JSON object")


def test_missing_tensor_names_what_is_near(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["layers.1.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    write_checkpoint(tmp_path, tensors)
    refused(
        tmp_path,
        "model.layers.1.mlp.up_proj.weight",
        "got nothing",
        "shape [48, 32]",
        "Similar names present: layers.1.mlp.up_proj",
    )


def test_wrong_shape(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((32, 32), np.float32)
    write_checkpoint(tmp_path, tensors)
    refused(tmp_path, "model.layers.0.self_attn.k_proj.weight shape", "got [32, 32]", "expected [16, 32]")


def test_unexpected_tensors(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = np.zeros((4, 32), np.float32)
    write_checkpoint(tmp_path, tensors)
    refused(tmp_path, "got model.layers.0.self_attn.q_proj.lora_A.weight", "no tensors beyond the architecture's")


def test_derived_tensors_are_no_surprise(tmp_path: Path) -> None:
    """Old exporters store the rotary frequencies, some a copy of a tied embedding; a differing copy contradicts the config."""
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = random_tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_checkpoint(tmp_path, tensors, tie_word_embeddings=True)
    load_model(tmp_path, HostTarget())
    tensors["lm_head.weight"][0, 0] += 1
    write_checkpoint(tmp_path, tensors, tie_word_embeddings=True)
    refused(tmp_path, "lm_head.weight with tie_word_embeddings", "got other values", "Set tie_word_embeddings to false")


def test_quantized_tensors(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    tensors["lm_head.weight"] = np.zeros((40, 32), np.int8)
    write_checkpoint(tmp_path, tensors)
    refused(tmp_path, "lm_head.weight dtype", "got I8", "BF16, F16 or F32")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_file(tmp_path: Path, kept: int) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(tmp_path, "runcated")


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (b"not json", "invalid JSON"),
        (b"[]", "a JSON object"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "dtype, shape and data_offsets"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "expected 8 for shape [2] of F32"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}', "bytes inside the file"),
        (b'{"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}', "dtype, shape and data_offsets"),
    ],
)
def test_damaged_header(tmp_path: Path, header: bytes, part: str) -> None:
    write_config(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(tmp_path, part)


def test_missing_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00003.safetensors", "no such file", "Download the missing file")


def test_index_that_disagrees_with_its_shards(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_shards=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"]["lm_head.weight"] = files[files.index(index["weight_map"]["lm_head.weight"]) - 1]
    path.write_text(json.dumps(index))
    refused(tmp_path, "tensor lm_head.weight: got not in model-0000", "there by model.safetensors.index.json")
    path.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    refused(tmp_path, "got ../elsewhere.safetensors", "a file in the same folder")
    path.write_text(json.dumps({"weight_map": []}))
    refused(tmp_path, "weight_map", "got list")


def test_a_shard_tensor_outside_the_index_is_seen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, num_shards=2)
    first = tmp_path / "model-00001-of-00002.safetensors"
    tensors = dict(list(random_tensors(CONFIG).items())[::2])
    first.write_bytes(safetensors_bytes({**tensors, "adapter.weight": np.zeros((2, 2), np.float32)}))
    refused(tmp_path, "got adapter.weight")


def test_a_tensor_in_two_shards_must_be_the_same_in_both(tmp_path: Path) -> None:
    """The index names one of them, transformers takes the last."""
    tensors = write_checkpoint(tmp_path, num_shards=2)
    name, value = next(iter(tensors.items()))
    in_last = dict(list(tensors.items())[1::2])
    last = tmp_path / "model-00002-of-00002.safetensors"
    last.write_bytes(safetensors_bytes({**in_last, name: value}))
    Checkpoint(tmp_path)
    for other in (np.zeros_like(value), value[:-1]):
        last.write_bytes(safetensors_bytes({**in_last, name: other}))
        refused(
            tmp_path,
            f"tensor {name}: got different values in model-00001-of-00002.safetensors and model-00002",
            "one value",
        )


# ---- EOS ids -------------------------------------------------------------------------------------------------------
def test_eos_ids(tmp_path: Path) -> None:
    write_config(tmp_path, CONFIG)
    assert read_eos_ids(tmp_path, 40) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert read_eos_ids(tmp_path, 40) == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert read_eos_ids(tmp_path, 40) == (2,)
    write_config(tmp_path, {**CONFIG, "eos_token_id": None})
    assert read_eos_ids(tmp_path, 40) == ()


@pytest.mark.parametrize("value", [40, -1, "2", True, [1, 2.5]])
def test_bad_eos_ids(tmp_path: Path, value: object) -> None:
    write_config(tmp_path, {**CONFIG, "eos_token_id": value})
    with pytest.raises(UnsupportedModelError, match="eos_token_id"):
        read_eos_ids(tmp_path, 40)


def test_too_many_eos_ids(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, eos_token_id=list(range(9)))
    refused(tmp_path, "number of EOS ids", "got 9", "at most 8")


def test_config_is_read_from_the_folder(tmp_path: Path) -> None:
    write_config(tmp_path, CONFIG)
    assert read_model_config(tmp_path).hidden == 32
