"""The whole program on the GPU, by both kernels: logits against transformers, bits against batch and chunking, tokens against the CPU interpreter.

Run: pytest -m gpu tests/gpu/test_model_gpu.py -rP     (prints the measured errors)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blinkimp.host.gpu_kernel import KernelKind
from tests.gpu.step_runner import Request, StepRunner, llama_config, write_checkpoint

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": llama_config(num_key_value_heads=8),
    "llama3_1": llama_config(rope_scaling=LLAMA3_ROPE, tie_word_embeddings=True, rope_theta=500000.0),
    "mistral": llama_config(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=100),
    "qwen2": llama_config(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", num_attention_heads=6, hidden_size=384
    ),
    "qwen3": llama_config(architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=128),
}
# bf16 inputs of every product against fp32 ones. Measured on an H200: 4e-3 to 9e-3 of the logits' norm.
MAX_RELATIVE_ERROR = 2e-2


# The portable kernel differs in GEMMs, epilogues and attention: grouped heads, a window, biases, per-head norms at both head dimensions.
RUNS: list[tuple[KernelKind, str]] = [("hopper", name) for name in FAMILIES]
RUNS += [("portable", name) for name in ("llama3_1", "mistral", "qwen2", "qwen3")]


class Family:
    def __init__(self, folder: Path, config: dict[str, Any], kernel: KernelKind) -> None:
        self.folder = folder
        self.rng = np.random.default_rng()
        write_checkpoint(folder, config, self.rng)
        self.runner = StepRunner(folder, max_step_tokens=1024, kernel=kernel)

    def tokens(self, num: int) -> NDArray[np.uint32]:
        return self.rng.integers(0, self.runner.config.vocab, num, dtype=np.uint32)

    def logits_of_last(
        self, tokens: NDArray[np.uint32], chunks: list[int], request_idx: int = 0
    ) -> NDArray[np.float32]:
        """Prefills in chunks of the given ends; logits after the last token."""
        begin = 0
        for end in [*chunks, len(tokens)]:
            self.runner.run([Request(tokens[:end], begin, request_idx, sample=end == len(tokens))])
            begin = end
        logits = self.runner.logits(1)[0].copy()
        self.runner.release(request_idx)
        return logits


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Family]:
    kernel, name = request.param
    family = Family(tmp_path_factory.mktemp(name), FAMILIES[name], kernel)
    yield family
    family.runner.close()


def test_logits_agree_with_transformers(family: Family, request: pytest.FixtureRequest) -> None:
    torch = pytest.importorskip("torch", reason="transformers is the reference")
    transformers = pytest.importorskip("transformers", reason="it is the reference")
    tokens = family.tokens(300)
    errors = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            family.folder, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            for parameter in model.parameters():  # the same bf16 weights in both
                if parameter.ndim == 2:
                    parameter.copy_(parameter.to(torch.bfloat16).float())
            reference = (
                model.to(dtype)
                .cuda()(torch.from_numpy(tokens.astype(np.int64))[None].cuda())
                .logits[0]
                .double()
                .cpu()
                .numpy()
            )
        got = np.stack([family.logits_of_last(tokens[:end], []) for end in (1, 2, 63, 64, 65, 130, 257, 300)])
        expected = reference[[0, 1, 62, 63, 64, 129, 256, 299]]
        errors[name] = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        errors[f"{name} max"] = float(np.abs(got - expected).max())
    print(f"{request.node.name}: " + ", ".join(f"{name} {error:.2e}" for name, error in errors.items()))
    assert errors["float32"] < MAX_RELATIVE_ERROR


def test_chunks_do_not_change_a_bit(family: Family) -> None:
    tokens = family.tokens(700)
    whole = family.logits_of_last(tokens, [])
    for chunks in ([1], [64], [699], [100, 101, 300], [13, 77, 256, 512, 640]):
        np.testing.assert_array_equal(family.logits_of_last(tokens, chunks, request_idx=3), whole)


def test_decode_equals_prefill_bit_for_bit(family: Family) -> None:
    tokens = family.tokens(150)
    whole = family.logits_of_last(tokens, [])
    np.testing.assert_array_equal(family.logits_of_last(tokens, list(range(100, 150))), whole)


def test_batch_does_not_change_a_bit(family: Family) -> None:
    """Twenty requests in one step, decode rows and chunks mixed, against each alone."""
    runner = family.runner
    prompts = [family.tokens(int(n)) for n in family.rng.integers(1, 90, 20)]
    alone = [family.logits_of_last(prompt, []) for prompt in prompts]
    decoding = range(0, 20, 2)
    runner.run([Request(prompts[i][:-1], 0, i, sample=False) for i in decoding if len(prompts[i]) > 1])
    runner.run([Request(prompt, len(prompt) - 1 if i in decoding else 0, i) for i, prompt in enumerate(prompts)])
    together = runner.logits(20)
    for i in range(20):
        np.testing.assert_array_equal(together[i], alone[i])
        runner.release(i)


def test_greedy_sample_is_the_largest_logit(family: Family) -> None:
    runner = family.runner
    prompts = [family.tokens(5) for _ in range(8)]
    runner.run([Request(prompt, 0, i) for i, prompt in enumerate(prompts)])
    logits, sampled = runner.logits(8).astype(np.float64), runner.sampled(8)
    np.testing.assert_array_equal(sampled["token"], logits.argmax(1))
    shifted = logits - logits.max(1, keepdims=True)
    np.testing.assert_allclose(sampled["logprob"], -np.log(np.exp(shifted).sum(1)), rtol=1e-5)
    for i in range(8):
        runner.release(i)


@pytest.mark.parametrize("kernel", ["hopper", "portable"])
def test_a_context_of_32k(tmp_path: Path, kernel: KernelKind) -> None:
    """The longest context served: bits do not depend on chunks, logits agree with transformers, decode goes on from there."""
    torch = pytest.importorskip("torch", reason="transformers is the reference")
    transformers = pytest.importorskip("transformers", reason="it is the reference")
    num_tokens = 32768
    rng = np.random.default_rng()
    config = llama_config(max_position_embeddings=num_tokens, num_hidden_layers=1, rope_theta=500000.0)
    write_checkpoint(tmp_path, config, rng)
    tokens = rng.integers(0, config["vocab_size"], num_tokens, dtype=np.uint32)
    sizes = {"max_context": num_tokens, "num_pages": 600, "num_requests": 4, "max_batch": 4}
    with StepRunner(tmp_path, kernel=kernel, **sizes) as runner:
        logits = []
        for request_idx, chunk in enumerate((2048, 1999)):
            begin = 0
            while begin < num_tokens - 1:  # the last token is a decode row, over 128 splits
                end = min(begin + chunk, num_tokens - 1)
                runner.run([Request(tokens[:end], begin, request_idx, sample=False)])
                begin = end
            runner.run([Request(tokens, num_tokens - 1, request_idx)])
            logits.append(runner.logits(1)[0].copy())
            runner.release(request_idx)
    np.testing.assert_array_equal(logits[0], logits[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        ids = torch.from_numpy(tokens.astype(np.int64))[None].cuda()
        expected = model.cuda()(ids, logits_to_keep=1).logits[0, 0].double().cpu().numpy()
    error = float(np.linalg.norm(logits[0] - expected) / np.linalg.norm(expected))
    print(f"context of {num_tokens}: relative error {error:.2e}")
    assert error < MAX_RELATIVE_ERROR
