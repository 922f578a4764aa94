"""What makes a request one that cannot be run, in the words that clients of both ingresses read.

Ranges of single fields stand in blinkimp/protocol.py; here is what takes more than one field, or the engine, to see.
Called by nic_shim/message_handler.py, http_generate.py, http_app.py and http_protocol.py.
Test: pytest tests/host/test_http_errors.py tests/host/test_ingress_bad_messages.py
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from blinkimp.complaints import quote
from blinkimp.protocol import Error, Sampling, Submit

PromptIds = npt.NDArray[np.uint32]


class ModelLimits(Protocol):
    """What the checks need of a queue pair (nic_shim/queue_pair.py)."""

    max_context: int
    vocab_size: int


def larger_limit(name: str) -> str:
    """What to do about a limit: a configuration key of the server, and a flag of its ingress modules by the same name."""
    return f"start the server with a larger --{name.replace('_', '-')}"


def submit_problem(submit: Submit, max_prompt_chars: int) -> Error | None:
    """Why this request is refused before its prompt is tokenised, or None."""
    sampling = submit.sampling
    num_chars = len(submit.prompt) if isinstance(submit.prompt, str) else 0
    if num_chars > max_prompt_chars:
        return Error(
            submit.id,
            "prompt_too_long",
            "the prompt's text is too long",
            f"{num_chars} characters",
            f"at most {max_prompt_chars}",
            f"shorten the prompt, or {larger_limit('max_prompt_chars')}",
            final=True,
        )
    if len(submit.delivered_ids) > sampling.max_tokens:
        return Error(
            submit.id,
            "bad_message",
            "delivered_ids holds more tokens than were asked for",
            str(len(submit.delivered_ids)),
            f"at most max_tokens = {sampling.max_tokens}",
            "send the tokens of this request that have arrived, no others",
            final=True,
        )
    if sampling.min_tokens > sampling.max_tokens:
        return Error(
            submit.id,
            "bad_sampling",
            "min_tokens cannot be used",
            str(sampling.min_tokens),
            f"at most max_tokens = {sampling.max_tokens}",
            "lower min_tokens or raise max_tokens",
            final=True,
        )
    return None


def prompt_problem(
    client_id: int,
    prompt_ids: npt.NDArray[np.uint32],
    sampling: Sampling,
    limits: ModelLimits,
    delivered_ids: Sequence[int] = (),
) -> Error | None:
    """Why this prompt cannot be run, or None; the director would reject it too, less readably."""
    num_prompt_tokens = len(prompt_ids)
    if num_prompt_tokens == 0:
        return Error(
            client_id,
            "prompt_empty",
            "the prompt is empty",
            "0 tokens",
            "at least 1 token",
            "send a longer prompt",
            final=True,
        )
    if num_prompt_tokens + sampling.max_tokens > limits.max_context:
        return Error(
            client_id,
            "prompt_too_long",
            "prompt and output do not fit into the model's context",
            f"{num_prompt_tokens} prompt tokens + max_tokens {sampling.max_tokens}",
            f"at most {limits.max_context} together",
            "shorten the prompt or lower max_tokens",
            final=True,
        )
    highest = max(int(prompt_ids.max()), *delivered_ids, *sampling.stop_token_ids, *sampling.logit_bias, 0)
    if highest >= limits.vocab_size:
        return Error(
            client_id,
            "bad_token",
            "a token id of prompt, stop_token_ids, logit_bias or delivered_ids is not in the vocabulary",
            str(highest),
            f"0 to {limits.vocab_size - 1}",
            "use this model's tokenizer",
            final=True,
        )
    return None


def untokenisable(client_id: int, error: Exception) -> Error:
    return Error(
        client_id,
        "bad_prompt",
        "the prompt cannot be tokenised",
        quote(str(error)),
        "text that the model's tokenizer takes",
        "send other text, or token ids",
        final=True,
    )
