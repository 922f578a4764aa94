"""device/worker.cuh, the Hopper's code, on emulated CTAs (tests/host/simt90): rings, barriers and roles through whole steps, one behind the other.

What a GPU does within microseconds, mostly in the same order, happens here in any order: a wait too few shows as wrong logits, as an arrival that
no mbarrier expects, or as a deadlock. Run: pytest tests/host/test_worker_sm90_simt.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from blinkimp.host.bf16 import bf16_from_f32, f32_from_bf16
from blinkimp.host.step_costs import Matrix, least_wide_time_ns
from tests.gpu.step_runner import Request, llama_config, write_checkpoint
from tests.host.emulated_gpu import EmulatedWorkers
from tests.support import ROOT

CONFIG = llama_config(
    hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
    vocab_size=230, max_position_embeddings=1024,
)  # fmt: skip


def reference_logits(
    tensors: dict[str, NDArray[Any]], config: dict[str, Any], tokens: NDArray[np.uint32]
) -> NDArray[np.float64]:
    """[tokens, vocab] of a Llama in float64, its matrices rounded to bf16."""
    weights = {
        name: f32_from_bf16(bf16_from_f32(values)).astype(np.float64) if values.ndim == 2 else values.astype(np.float64)
        for name, values in tensors.items()
    }
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    num = len(tokens)

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[name])

    frequency = config["rope_theta"] ** (-np.arange(0, head_dim, 2) / head_dim)
    angle = np.arange(num)[:, None] * frequency[None]
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotate(x: NDArray[np.float64]) -> NDArray[np.float64]:
        low, high = x[..., : head_dim // 2], x[..., head_dim // 2 :]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)

    hidden = weights["model.embed_tokens.weight"][tokens]
    causal = np.where(np.tril(np.ones((num, num), bool)), 0.0, -np.inf)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        x = norm(hidden, f"{prefix}.input_layernorm.weight")
        q, k, v = (
            (x @ weights[f"{prefix}.self_attn.{name}_proj.weight"].T).reshape(num, -1, head_dim) for name in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = np.repeat(k, heads // kv_heads, 1), np.repeat(v, heads // kv_heads, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(head_dim) + causal
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", scores, v).reshape(num, -1)
        hidden = hidden + mixed @ weights[f"{prefix}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{prefix}.post_attention_layernorm.weight")
        gate, up = x @ weights[f"{prefix}.mlp.gate_proj.weight"].T, x @ weights[f"{prefix}.mlp.up_proj.weight"].T
        hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{prefix}.mlp.down_proj.weight"].T
    return np.asarray(norm(hidden, "model.norm.weight") @ weights["lm_head.weight"].T)


class Script:
    """Steps of several requests, and which logits they leave where."""

    def __init__(self, workers: EmulatedWorkers, tokens: list[NDArray[np.uint32]]) -> None:
        self.workers, self.tokens = workers, tokens
        self.computed = [0] * len(tokens)
        self.plans: list[NDArray[np.uint8]] = []
        self.places: list[tuple[int, int, int, int]] = []  # (step, sampled row, request, position)

    def step(self, *shares: tuple[int, int], prefixes: Mapping[int, tuple[int, int]] = MappingProxyType({})) -> None:
        """shares: (request, rows); prefixes: of a request, whose pages it begins with, and how many tokens they hold."""
        requests = []
        for row, (idx, num_rows) in enumerate(shares):
            prefix_of = None
            if idx in prefixes:
                prefix_of, self.computed[idx] = prefixes[idx]
            end = self.computed[idx] + num_rows
            requests.append(Request(self.tokens[idx][:end], self.computed[idx], idx, prefix_of=prefix_of))
            self.places.append((len(self.plans), row, idx, end - 1))
            self.computed[idx] = end
        self.plans.append(self.workers.plan(requests))

    def decode(self, num_steps: int, requests: list[int]) -> None:
        for _ in range(num_steps):
            self.step(*((idx, 1) for idx in requests))


def make_script(workers: EmulatedWorkers, rng: np.random.Generator) -> Script:
    """Narrow and wide steps by turns, decode rows beside chunks, and requests that stop while others begin."""
    lengths = [40, 260, 70, 30, 300, 9, 90, 20]
    script = Script(workers, [rng.integers(0, workers.config.vocab, n, dtype=np.uint32) for n in lengths])
    script.step((0, 30))
    script.decode(2, [0])
    script.step((0, 1), (1, 130))  # wide
    script.decode(1, [0, 1])
    script.step((0, 1), (1, 1), (2, 60), (3, 5))  # wide by three rows
    script.step((0, 1), (1, 1), (2, 1), (3, 1), (4, 150))
    script.decode(3, [0, 1, 2, 3])
    script.step((1, 1), (2, 1), (4, 70), (5, 3), (6, 60))
    script.decode(2, [1, 2, 3, 4, 5, 6])
    script.step((1, 1), (4, 1), (6, 20), (7, 12))
    script.step((1, 64))  # exactly one row tile
    script.step((7, 8))
    return script


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, NDArray[Any]]]:
    folder = tmp_path_factory.mktemp("model")
    return folder, write_checkpoint(folder, CONFIG, np.random.default_rng(1))


def logits_of(workers: EmulatedWorkers, script: Script, seed: int) -> NDArray[np.float32]:
    """[places, vocab]; the sampled tokens are those of the largest."""
    logits, sampled = workers.run_steps(script.plans, seed)
    got = np.stack([logits[step, row] for step, row, _, _ in script.places])
    np.testing.assert_array_equal([sampled[step, row] for step, row, _, _ in script.places], got.argmax(1))
    return got


def test_steps_in_a_row(checkpoint: tuple[Path, dict[str, NDArray[Any]]], tmp_path: Path) -> None:
    folder, tensors = checkpoint
    workers = EmulatedWorkers(folder, tmp_path, num_workers=3)
    script = make_script(workers, np.random.default_rng(2))
    expected = [reference_logits(tensors, CONFIG, tokens) for tokens in script.tokens]
    wanted = np.stack([expected[idx][position] for _, _, idx, position in script.places])
    got = logits_of(workers, script, seed=0)
    errors = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
    assert errors.max() < 2e-2, f"(step, row, request, position) {script.places[int(errors.argmax())]}: {errors}"
    np.testing.assert_array_equal(logits_of(workers, script, seed=1), got)  # in another order of things: the same bits


FAMILIES = {
    "qwen2": CONFIG | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_attention_heads": 3, "head_dim": 64, "hidden_size": 192},
    "qwen3": CONFIG | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_attention_heads": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_biases_and_norms_of_heads(family: str, tmp_path: Path) -> None:
    """What Llama's epilogues leave out, against transformers; narrow and wide steps leave the same bits."""
    config = FAMILIES[family] | {"num_hidden_layers": 1}
    write_checkpoint(tmp_path, config, np.random.default_rng(3))
    workers = EmulatedWorkers(tmp_path, tmp_path, num_workers=3)
    tokens = np.random.default_rng(4).integers(0, workers.config.vocab, 150, dtype=np.uint32)
    script = Script(workers, [tokens, tokens])
    script.step((0, 70))
    script.step((0, 80), (1, 3))
    for num_rows in (40, 1, 25, 1, 80):
        script.step((1, num_rows))
    got = logits_of(workers, script, seed=0)
    np.testing.assert_array_equal(got[-1], got[1])
    expected = transformers_logits(tmp_path, tokens)
    for (_, _, _, position), logits in zip(script.places, got, strict=True):
        assert np.linalg.norm(logits - expected[position]) < 2e-2 * np.linalg.norm(expected[position])


def transformers_logits(folder: Path, tokens: NDArray[np.uint32]) -> NDArray[np.float64]:
    """[tokens, vocab], its matrices rounded to bf16, all else in float32."""
    torch = pytest.importorskip("torch", reason="transformers is the reference: pip install .[dev]")
    transformers = pytest.importorskip("transformers", reason="it is the reference: pip install .[dev]")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.to(torch.bfloat16).float())
        logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    return np.asarray(logits.double().numpy())


def test_an_op_has_more_slices_than_its_rings_hold(tmp_path: Path) -> None:
    """36 slices: a stage is filled again only when its readers gave it back. Narrow and wide steps find the rings at any stage, and those of 70 to
    150 rows have inputs in the weight ring as well."""
    config = CONFIG | {"intermediate_size": 2304, "num_hidden_layers": 2}
    tensors = write_checkpoint(tmp_path, config, np.random.default_rng(1))
    workers = EmulatedWorkers(tmp_path, tmp_path, num_workers=4)
    script = Script(workers, [np.random.default_rng(5).integers(0, workers.config.vocab, 500, dtype=np.uint32)])
    for num_rows in (40, 1, 64, 7, 100, 12, 150, 30, 70):
        script.step((0, num_rows))
    expected = reference_logits(tensors, config, script.tokens[0])
    wanted = expected[[position for _, _, _, position in script.places]]
    for seed in range(2):
        got = logits_of(workers, script, seed)
        assert (np.linalg.norm(got - wanted, axis=1) < 2e-2 * np.linalg.norm(wanted, axis=1)).all()


def test_few_rows_leave_the_bits_of_many(tmp_path: Path) -> None:
    """Up to 16 rows wgmma's operands change places. The tiles are as high as a large model's on a GPU: 48, 32 and 112 rows."""
    config = CONFIG | {"intermediate_size": 448, "num_attention_heads": 1, "head_dim": 64}
    tensors = write_checkpoint(tmp_path, config, np.random.default_rng(6))
    workers = EmulatedWorkers(tmp_path, tmp_path, num_workers=4)
    assert (workers.shape.qkv_tile_rows, workers.shape.gate_up_tile_rows) == (48, 112)
    tokens = np.random.default_rng(7).integers(0, workers.config.vocab, 90, dtype=np.uint32)
    counts = (1, 7, 8, 9, 16, 17, 32)
    script = Script(workers, [tokens] * (1 + len(counts)))
    script.step((0, 90))
    for idx in range(1, 1 + len(counts)):
        script.step((idx, 90 - counts[idx - 1]))
    for idx in range(1, 1 + len(counts)):
        script.step((idx, counts[idx - 1]))
    got = logits_of(workers, script, seed=0)
    wanted = reference_logits(tensors, config, tokens)[89]
    assert np.linalg.norm(got[0] - wanted) < 2e-2 * np.linalg.norm(wanted)
    for num_rows, logits in zip(counts, got[-len(counts) :], strict=True):
        np.testing.assert_array_equal(logits, got[0], err_msg=f"{num_rows} rows")


def test_the_host_counts_rounds_as_the_rule_does(
    checkpoint: tuple[Path, dict[str, NDArray[Any]]], tmp_path: Path
) -> None:
    workers = EmulatedWorkers(checkpoint[0], tmp_path, num_workers=3)
    rng = np.random.default_rng(8)
    for tile_rows in (32, 48, 64, 112, 128):
        for num_workers in (3, 77, 131):
            out_features, in_features = int(rng.integers(1, 500)) * 64, int(rng.integers(1, 250)) * 64
            matrix = Matrix(tile_rows, out_features, in_features)
            for rows in (65, 128, 129, 512, 513, 1024, 8192):
                expected = least_wide_time_ns(rows, matrix, num_workers)
                assert workers.wide_time_ns(matrix, rows, num_workers) == expected, (matrix, rows, num_workers)


def check_prompt(folder: Path, build_folder: Path, device: Path, num_tokens: int) -> None:
    workers = EmulatedWorkers(folder, build_folder, num_workers=2, device=device)
    script = Script(workers, [np.arange(num_tokens, dtype=np.uint32)])
    script.step((0, num_tokens))
    wanted = reference_logits(load_file(folder / "model.safetensors"), CONFIG, script.tokens[0])[num_tokens - 1]
    got = logits_of(workers, script, seed=0)[0]
    assert np.linalg.norm(got - wanted) < 2e-2 * np.linalg.norm(wanted)


def check_a_prompt(folder: Path, build_folder: Path, device: Path) -> None:
    check_prompt(folder, build_folder, device, 20)


def check_a_wide_prompt(folder: Path, build_folder: Path, device: Path) -> None:
    check_prompt(folder, build_folder, device, 70)


def test_a_wait_too_few_is_seen(checkpoint: tuple[Path, dict[str, NDArray[Any]]], tmp_path: Path) -> None:
    """The input producer without its wait for the grid: wrong logits, or a crash, as on a GPU; so in a process of its own."""
    folder, _ = checkpoint
    wait = "wait_grid<true>(params, num_barriers);\n    fence_proxy_async();"
    check_with_and_without(folder, tmp_path, "check_a_prompt", "gemm.cuh", wait, "")


def test_a_row_scale_of_another_op_is_seen(checkpoint: tuple[Path, dict[str, NDArray[Any]]], tmp_path: Path) -> None:
    """A CTA that takes for a wide step's row scales what it finds, without a look at the tags."""
    folder, _ = checkpoint
    tags = "if (one >> 32 == tag && other >> 32 == tag) break;"
    check_with_and_without(folder, tmp_path, "check_a_wide_prompt", "row_scales.cuh", tags, "break;")


def check_with_and_without(
    folder: Path, build_folder: Path, check: str, header: str, text: str, replacement: str
) -> None:
    """A check of this file passes with device/ as it is, and fails where `text` of a header was replaced."""
    for name, new_text, wanted in (("whole", text, True), ("planted", replacement, False)):
        device = shutil.copytree(ROOT / "device", build_folder / name)
        source = (device / header).read_text()
        assert source.count(text) == 1
        (device / header).write_text(source.replace(text, new_text))
        result = run_apart(check, folder, device)
        assert (result.returncode == 0) == wanted, result.stderr


def run_apart(check: str, folder: Path, device: Path) -> subprocess.CompletedProcess[str]:
    """A check of this file with the sources in `device`, in a process of its own: a planted fault may crash it."""
    call = f"{check}(Path({str(folder)!r}), Path({str(device)!r}), Path({str(device)!r}))"
    program = f"from pathlib import Path; from tests.host.test_worker_sm90_simt import {check}; {call}"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


def check_fresh_prefixes(folder: Path, build_folder: Path, device: Path) -> None:
    """A prompt, and in the same step two that begin as it does, of 44 rows and of one: what they read of its pages must be what it writes there."""
    workers = EmulatedWorkers(
        folder, build_folder, num_workers=6, device=device
    )  # as many as items of attention: some have no other before
    prompt = np.random.default_rng(9).integers(0, workers.config.vocab, 200, dtype=np.uint32)
    script = Script(workers, [prompt, prompt[:172], prompt[:129], prompt[:130]])
    script.step((0, 200), (1, 44), (2, 1), prefixes={1: (0, 128), 2: (0, 128)})
    script.step((3, 2), prefixes={3: (0, 128)})  # pages of the step before
    expected = reference_logits(load_file(folder / "model.safetensors"), CONFIG, prompt)
    for seed in range(3):
        for (_, _, idx, position), logits in zip(script.places, logits_of(workers, script, seed), strict=True):
            error = np.linalg.norm(logits - expected[position]) / np.linalg.norm(expected[position])
            assert error < 2e-2, f"seed {seed}, request {idx}, position {position}: {error}"


def test_pages_that_others_fill_in_the_same_step(
    checkpoint: tuple[Path, dict[str, NDArray[Any]]], tmp_path: Path
) -> None:
    """And pages brought before they are filled are seen: as the producer did once, which took all before a share's own rows for old."""
    is_fresh = "seq.prefix_is_fresh ? 0 : seq.position_begin / kPageTokens"
    for name, replacement, wanted in (
        ("whole", is_fresh, True),
        ("planted", "seq.position_begin / kPageTokens", False),
    ):
        device = shutil.copytree(ROOT / "device", tmp_path / name)
        source = (device / "attention_producer.cuh").read_text()
        assert source.count(is_fresh) == 1
        (device / "attention_producer.cuh").write_text(source.replace(is_fresh, replacement))
        result = run_apart("check_fresh_prefixes", checkpoint[0], device)
        assert (result.returncode == 0) == wanted, result.stderr


CHUNKS = [(200,), (64, 136), (70, 65, 65), (199, 1), (30, 1, 1, 1, 100, 67), (128, 72)]


@pytest.mark.parametrize("shape", [{}, {"head_dim": 64, "num_attention_heads": 4}], ids=["head_dim 128", "head_dim 64"])
def test_bits_do_not_depend_on_chunks_nor_on_the_rest_of_the_step(tmp_path: Path, shape: dict[str, Any]) -> None:
    """One prompt, cut in several ways, alone and beside decode rows of others: narrow, lone and wide items must give the same logits."""
    write_checkpoint(tmp_path / "model", CONFIG | shape, np.random.default_rng(3))
    workers = EmulatedWorkers(tmp_path / "model", tmp_path, num_workers=3)
    prompt = np.random.default_rng(4).integers(0, workers.config.vocab, 202, dtype=np.uint32)
    script = Script(workers, [prompt] * len(CHUNKS))
    others: list[int] = []  # whose prompts are done: decode rows beside the next ones' chunks
    for idx, chunks in enumerate(CHUNKS):
        for i, num_rows in enumerate(chunks):
            beside = [(other, 1) for other in others[-2:] if i == 0 and script.computed[other] == 200]
            script.step(*beside, (idx, num_rows))
        others.append(idx)
    script.decode(1, [idx for idx in others if script.computed[idx] == 200])
    script.decode(1, others)
    logits, _ = workers.run_steps(script.plans, seed=0)
    for position in (199, 200, 201):
        rows = [(idx, logits[step, row]) for step, row, idx, at in script.places if at == position]
        assert len(rows) == len(CHUNKS)
        for idx, row in rows:
            np.testing.assert_array_equal(row, rows[0][1], err_msg=f"position {position}, chunks {CHUNKS[idx]}")
