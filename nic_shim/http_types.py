"""Bodies of the HTTP API: OpenAI's requests and replies as msgspec types. The OpenAPI document is generated from them.

A field that is not here is refused by name. `None` counts as absent, as OpenAI's clients send it.
Called by nic_shim/http_*.py. Test: pytest tests/null/test_http_types.py
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blinkimp.protocol import (
    U32,
    CacheSalt,
    LogitBias,
    MaxTokens,
    MinP,
    NumTopLogprobs,
    Penalty,
    Priority,
    RepetitionPenalty,
    StopString,
    StopStrings,
    StopTokenIds,
    Temperature,
    TimeoutS,
    TopP,
)

MAX_CHOICES = 128
MAX_PROMPTS = 256

TopK = Annotated[int, Meta(ge=-1, le=2**32 - 1)]  # vLLM's clients send -1 for off
NumChoices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    name: str = ""
    description: str | None = None
    schema: dict[str, Any]
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's name for what the guided_* fields say; one of them."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


class GenerationFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What completions and chat completions have in common."""

    model: str | None = None
    max_tokens: MaxTokens | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Meta(ge=-(2**63))] | None = None  # a negative one counts as its two's complement
    stop: StopString | StopStrings | None = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: U32 | None = None
    n: NumChoices | None = None
    user: str | None = None  # for the log
    priority: Priority | None = None  # lower runs first
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: CacheSalt | None = None
    prefix_cache: bool | None = None  # false: neither uses the prefix cache nor fills it
    timeout: TimeoutS | None = None  # seconds; then the request ends with finish_reason "timeout"
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None


class CompletionRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    max_tokens: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None  # 0: with echo, the prompt and nothing else
    prompt: str | list[str | U32 | list[U32]]
    echo: bool | None = None
    logprobs: NumTopLogprobs | None = None


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None  # as assistants' messages come back from OpenAI's client


class ChatRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: MaxTokens | None = None  # OpenAI's newer name of max_tokens
    logprobs: bool | None = None
    top_logprobs: NumTopLogprobs | None = None
    echo: bool | None = None  # the last message in front of the reply, where the reply goes on with it
    add_generation_prompt: bool | None = None  # default true
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the checkpoint's template


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[U32]


# ---- Replies ----------------------------------------------------------------------------------------------------------
class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int  # that the prefix cache had


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None  # stop, length, timeout, abort
    stop_reason: int | str | None = None  # the stop string or stop token id
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class CompletionReply(msgspec.Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]


class ReplyMessage(msgspec.Struct):
    role: str
    content: str
    refusal: str | None = None


class Delta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatReply(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class CompletionChunk(msgspec.Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class TokenizeReply(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeReply(msgspec.Struct):
    prompt: str


class Model(msgspec.Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "blinkimp"
    root: str
    max_model_len: int
    vocab_size: int  # not OpenAI's nor vLLM's: prompts of token ids need it


class ModelList(msgspec.Struct, kw_only=True):
    object: str = "list"
    data: list[Model]


class ServerStatus(msgspec.Struct):
    status: str  # ok, starting, draining, engine_lost, engine_faulted


class ServerVersion(msgspec.Struct):
    version: str


class ErrorBody(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(msgspec.Struct):
    error: ErrorBody
