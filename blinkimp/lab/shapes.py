"""The published shape that figures are given for, as in its config.json: tools, tests and the lab take it with changes of their own.

    LLAMA_3_8B | {"max_position_embeddings": 65536}

Data only, without imports that a machine with a GPU may lack. Called by blinkimp/lab/shape_model.py, tools/step_rows.py, tools/bench_load.py and
tests. Test: pytest tests/null/test_step_rows.py tests/null/test_evidence_plan.py
"""

from __future__ import annotations

from typing import Any, Final

LLAMA_3_8B_SIZES: Final[dict[str, int]] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LLAMA_3_8B: Final[dict[str, Any]] = LLAMA_3_8B_SIZES | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",  # its name in transformers 5; the one below is older
    "torch_dtype": "bfloat16",
}
