"""Builds the model program: config + tensors -> array of Op, the weights placed through a WeightTarget.

    model = load_model("path/to/checkpoint", HostTarget(), compute="auto", max_context=4096)
    model.dims -> EngineParams.dims, model.ops -> EngineParams.ops; keep `model` alive as long as the engine runs

One builder per architecture (BUILDERS), made of shared parts; a new architecture is a new builder. Both interpreters run the result.
Called by the engine's start-up (host/) and the tools. Test: pytest tests/host/test_families.py tests/null/test_checkpoint_program.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from blinkimp.host.checkpoint import Checkpoint, read_eos_ids, read_model_config
from blinkimp.host.dummy_weights import DummyWeights
from blinkimp.host.model_config import ModelConfig, refusal
from blinkimp.host.null_program import null_ops, null_tokens
from blinkimp.host.rope import rope_table
from blinkimp.host.weights import MatrixSource, PlacedMatrix, Tensor, WeightTarget
from blinkimp.ring_abi import MAX_EOS_IDS, MODEL_DIMS, OP, BufferId, DType, OpKind

Compute = Literal["auto", "f32", "bf16"]
LoadFormat = Literal["auto", "dummy", "null"]
Progress = Callable[[int, int], None]  # bytes of weights placed, bytes of weights in all


@dataclass(frozen=True)
class Model:
    """A program ready to run. `target` owns the memory that `ops` points to."""

    config: ModelConfig
    dims: NDArray[np.void]  # [1] MODEL_DIMS
    ops: NDArray[np.void]  # [num_ops] OP
    eos_ids: tuple[int, ...]
    max_context: int  # positions in the rope table
    compute: DType
    weight_bytes: int
    target: WeightTarget
    null_tokens: NDArray[np.uint32] | None = None  # of a null program: its table


class TensorProvider(Protocol):
    """Checkpoint (stored weights) or DummyWeights (made ones)."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor: ...

    def finish(self) -> None: ...


def load_model(
    path: str | Path,
    target: WeightTarget,
    *,
    compute: Compute = "auto",
    max_context: int | None = None,
    kv_dtype: DType | None = None,
    load_format: LoadFormat = "auto",
    null_step_ns: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Model:
    """Reads a Hugging Face folder, places its weights and builds the program.

    compute "auto": bf16 for BF16 and F16 checkpoints, f32 for F32 ones. kv_dtype: that of compute unless given. max_context:
    the model's max_position_embeddings unless given. load_format "dummy" needs only config.json; the weights come from a
    generator seeded with `seed`. "null": no model at all (host/null_program.py), a step each null_step_ns.
    Raises UnsupportedModelError (a ValueError) for what cannot be served.
    """
    folder = Path(path)
    config = read_model_config(folder)
    eos_ids = read_eos_ids(folder, config.vocab)
    if max_context is None:
        max_context = config.max_positions
    if not 0 < max_context <= config.max_positions:
        raise refusal("max_context", max_context, f"1 to max_position_embeddings ({config.max_positions})")
    if len(eos_ids) > MAX_EOS_IDS:
        raise refusal("number of EOS ids", len(eos_ids), f"at most {MAX_EOS_IDS}")
    if load_format == "null":
        dims = model_dims(config, DType.BF16, DType.BF16 if kv_dtype is None else kv_dtype, eos_ids)
        table = null_tokens(folder, config.vocab, eos_ids)
        return Model(config, dims, null_ops(table, null_step_ns), eos_ids, max_context, DType.BF16, 0, target, table)
    provider: Checkpoint | DummyWeights = DummyWeights(seed) if load_format == "dummy" else Checkpoint(folder)
    compute_dtype = provider.compute_dtype if compute == "auto" else DType.F32 if compute == "f32" else DType.BF16
    builder = ProgramBuilder(config, provider, target, compute_dtype, max_context, progress)
    BUILDERS[config.architecture](builder)
    provider.finish()
    dims = model_dims(config, compute_dtype, compute_dtype if kv_dtype is None else kv_dtype, eos_ids)
    return Model(config, dims, builder.ops(), eos_ids, max_context, compute_dtype, builder.placed_bytes, target)


def model_dims(config: ModelConfig, compute: DType, kv_dtype: DType, eos_ids: tuple[int, ...]) -> NDArray[np.void]:
    """[1] MODEL_DIMS."""
    dims = np.zeros(1, MODEL_DIMS)
    dims["num_layers"], dims["hidden"] = config.num_layers, config.hidden
    dims["num_heads"], dims["num_kv_heads"], dims["head_dim"] = config.num_heads, config.num_kv_heads, config.head_dim
    dims["intermediate"], dims["vocab"], dims["kv_dtype"] = config.intermediate, config.vocab, int(kv_dtype)
    dims["round_bf16"] = int(compute == DType.BF16)
    dims["norm_eps"] = config.norm_eps
    dims["attention_scale"] = config.head_dim**-0.5
    dims["num_eos_ids"] = len(eos_ids)
    dims["eos_ids"][0, : len(eos_ids)] = eos_ids
    return dims


def num_program_ops(config: ModelConfig, load_format: LoadFormat = "auto") -> int:
    """Of the program that load_model() builds: embedding, five ops a layer, LM head, sampling."""
    return 1 if load_format == "null" else 5 * config.num_layers + 3


def num_weight_elements(config: ModelConfig) -> int:
    """Elements of all matrices that an op reads; a tied LM head counts once."""
    attention = config.hidden * (2 * config.query_features + 2 * config.kv_features)
    layer = attention + 3 * config.hidden * config.intermediate
    tables = config.vocab * config.hidden * (1 if config.tied_embeddings else 2)
    return config.num_layers * layer + tables


class ProgramBuilder:
    """The parts that builders put together. Each method appends one op and places its weights."""

    def __init__(
        self,
        config: ModelConfig,
        provider: TensorProvider,
        target: WeightTarget,
        compute: DType,
        max_context: int,
        progress: Progress | None,
    ) -> None:
        self.config = config
        self.placed_bytes = 0
        self._provider, self._target, self._compute, self._progress = provider, target, compute, progress
        self._total_bytes = num_weight_elements(config) * (2 if compute == DType.BF16 else 4)
        self._ops: list[NDArray[np.void]] = []
        self._norms: dict[str, int] = {}
        self._rope = target.place_f32("rope", rope_table(config.rope, config.head_dim, max_context))

    def ops(self) -> NDArray[np.void]:
        """[num_ops] OP, with each producer of hidden states told the gain of the norm that reads it (Op.next_norm)."""
        ops = np.concatenate(self._ops)
        for idx in range(len(ops)):
            if ops[idx]["kind"] in (OpKind.EMBED, OpKind.PROJECT):
                ops[idx]["next_norm"] = next(int(op["norm"]) for op in ops[idx + 1 :] if op["norm"])
        return ops

    def embed(self, name: str) -> None:
        op = self._matrix_op(OpKind.EMBED, 0, [name], [self.config.vocab], self.config.hidden, BufferId.HIDDEN)
        self._ops.append(op)

    def qkv(self, layer: int, prefix: str, norm: str) -> None:
        config = self.config
        names = [f"{prefix}.q_proj", f"{prefix}.k_proj", f"{prefix}.v_proj"]
        rows = [config.query_features, config.kv_features, config.kv_features]
        weights = [f"{name}.weight" for name in names]
        op = self._matrix_op(OpKind.QKV, layer, weights, rows, config.hidden, BufferId.HIDDEN)
        op["norm"], op["rope"] = self._norm(norm), self._rope
        if config.qkv_bias:
            parts = [self._vector(f"{name}.bias", num) for name, num in zip(names, rows, strict=True)]
            op["bias"] = self._target.place_f32(f"{prefix}.qkv.bias", np.concatenate(parts))
        if config.qk_norm:
            for member in ("q_norm", "k_norm"):
                name = f"{prefix}.{member}.weight"
                op[member] = self._target.place_f32(name, self._vector(name, config.head_dim))
        self._ops.append(op)

    def attention(self, layer: int, window: int) -> None:
        op = np.zeros(1, OP)
        op["kind"], op["layer"], op["input"], op["window"] = OpKind.ATTENTION, layer, BufferId.QUERY, window
        op["in_features"] = op["out_features"] = self.config.query_features
        self._ops.append(op)

    def project(self, layer: int, name: str, source: BufferId, in_features: int, bias: bool) -> None:
        op = self._matrix_op(OpKind.PROJECT, layer, [f"{name}.weight"], [self.config.hidden], in_features, source)
        if bias:
            op["bias"] = self._target.place_f32(f"{name}.bias", self._vector(f"{name}.bias", self.config.hidden))
        self._ops.append(op)

    def gate_up(self, layer: int, prefix: str, norm: str) -> None:
        names = [f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"]
        rows = [self.config.intermediate] * 2
        op = self._matrix_op(OpKind.GATE_UP, layer, names, rows, self.config.hidden, BufferId.HIDDEN)
        op["norm"] = self._norm(norm)
        self._ops.append(op)

    def lm_head(self, name: str, norm: str) -> None:
        op = self._matrix_op(OpKind.LM_HEAD, 0, [name], [self.config.vocab], self.config.hidden, BufferId.HIDDEN)
        op["norm"] = self._norm(norm)
        self._ops.append(op)

    def sample(self) -> None:
        op = np.zeros(1, OP)
        op["kind"], op["input"], op["in_features"] = OpKind.SAMPLE, BufferId.LOGITS, self.config.vocab
        self._ops.append(op)

    def _matrix_op(
        self, kind: OpKind, layer: int, names: list[str], rows: list[int], in_features: int, source: BufferId
    ) -> NDArray[np.void]:
        parts = tuple(self._provider.tensor(name, (num, in_features)) for name, num in zip(names, rows, strict=True))
        matrix = MatrixSource(names[0], kind, layer, self._compute, parts, interleaved=kind == OpKind.GATE_UP)
        placed: PlacedMatrix = self._target.place_matrix(matrix)
        op = np.zeros(1, OP)
        op["kind"], op["layer"], op["input"] = kind, layer, source
        op["weight_dtype"], op["weight_layout"], op["weight"] = self._compute, placed.layout, placed.address
        op["tile_rows"], op["num_tiles"] = placed.tile_rows, placed.num_tiles
        op["in_features"], op["out_features"] = in_features, sum(rows)
        if not (kind == OpKind.LM_HEAD and self.config.tied_embeddings):
            self.placed_bytes += matrix.num_bytes
        if self._progress is not None:
            self._progress(self.placed_bytes, self._total_bytes)
        return op

    def _vector(self, name: str, num: int) -> NDArray[np.float32]:
        values: NDArray[Any] = self._provider.tensor(name, (num,)).read_rows(0, num, DType.F32)
        return values.astype(np.float32, copy=False)

    def _norm(self, name: str) -> int:
        if name not in self._norms:
            self._norms[name] = self._target.place_f32(name, self._vector(name, self.config.hidden))
        return self._norms[name]


def _layers(builder: ProgramBuilder) -> Iterator[tuple[int, str, int]]:
    for layer, window in enumerate(builder.config.windows):
        yield layer, f"model.layers.{layer}", window


def build_pre_norm_decoder(builder: ProgramBuilder) -> None:
    """Llama and the families that share its shape; biases, q/k norms and windows follow from the config."""
    config = builder.config
    builder.embed("model.embed_tokens.weight")
    for layer, prefix, window in _layers(builder):
        builder.qkv(layer, f"{prefix}.self_attn", f"{prefix}.input_layernorm.weight")
        builder.attention(layer, window)
        builder.project(
            layer, f"{prefix}.self_attn.o_proj", BufferId.ATTENTION, config.query_features, config.output_bias
        )
        builder.gate_up(layer, f"{prefix}.mlp", f"{prefix}.post_attention_layernorm.weight")
        builder.project(layer, f"{prefix}.mlp.down_proj", BufferId.ACTIVATION, config.intermediate, bias=False)
    head = "model.embed_tokens.weight" if config.tied_embeddings else "lm_head.weight"
    builder.lm_head(head, "model.norm.weight")
    builder.sample()


BUILDERS: Final[dict[str, Callable[[ProgramBuilder], None]]] = {
    "LlamaForCausalLM": build_pre_norm_decoder,
    "MistralForCausalLM": build_pre_norm_decoder,
    "Qwen2ForCausalLM": build_pre_norm_decoder,
    "Qwen3ForCausalLM": build_pre_norm_decoder,
}
