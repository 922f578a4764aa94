"""Fields of OpenAI's and vLLM's APIs that are not supported, with the values that change nothing: clients send those unasked.

A field that stands here and has such a value, or null, is passed over; any other value is refused by name, as fields are that stand nowhere.
Called by nic_shim/http_fields.py, only for bodies that do not decode. Test: pytest tests/null/test_http_types.py
"""

from __future__ import annotations

from typing import Any, Final

NOTHING: Final = object()  # no value but null changes nothing

# Field -> values that mean what its absence means. NOTHING: null alone.
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    # ---- OpenAI
    "best_of": (1,),
    "suffix": ("",),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "tool_choice": ("none",),
    "function_call": ("none",),
    **dict.fromkeys(
        (
            "tools", "functions", "audio", "prediction", "reasoning_effort", "verbosity", "web_search_options", "moderation",
            "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        ),
        (NOTHING,),
    ),
    # ---- vLLM
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "early_stopping": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "detokenize": (True,),
    "bad_words": ([],),
    "return_tokens_as_token_ids": (False,),
    "include_reasoning": (True, False),
    **dict.fromkeys(
        (
            "allowed_token_ids", "prompt_logprobs", "truncate_prompt_tokens", "logits_processors", "guided_grammar",
            "guided_decoding_backend", "guided_whitespace_pattern", "chat_template", "documents", "request_id", "prompt_embeds",
            "mm_processor_kwargs", "media_io_kwargs", "kv_transfer_params", "vllm_xargs", "add_special_tokens",
        ),
        (NOTHING,),
    ),
}  # fmt: skip
# Of an assistant's message that a client sends back as it got it.
NEUTRAL_IN_MESSAGE: Final = ("annotations", "audio", "function_call", "tool_calls", "reasoning", "reasoning_content")


def without_neutral(body: Any) -> Any:
    """The body without what changes nothing."""
    if not isinstance(body, dict):
        return body
    kept = {name: value for name, value in body.items() if not _is_neutral(name, value, body)}
    messages = kept.get("messages")
    if isinstance(messages, list):
        kept["messages"] = [_plain_message(message) for message in messages]
    return kept


def _is_neutral(name: str, value: Any, body: dict[str, Any]) -> bool:
    if name not in NEUTRAL:
        return False
    if name == "best_of" and type(value) is int and value == body.get("n"):
        return True
    # 1 == True in Python: types count.
    return value is None or any(type(value) is type(known) and value == known for known in NEUTRAL[name])


def _plain_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {name: value for name, value in message.items() if name not in NEUTRAL_IN_MESSAGE or value not in (None, [])}
