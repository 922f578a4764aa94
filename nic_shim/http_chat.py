"""/v1/chat/completions: the shape of its replies, and messages as a chat template takes them.

Called by nic_shim/http_app.py. Test: pytest tests/host/test_http_ingress.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec

from blinkimp.nic_shim.chunk_template import IDS_MARK, TEXT_MARK, ChunkTemplate
from blinkimp.nic_shim.http_logprobs import chat_logprobs
from blinkimp.nic_shim.http_response import Choice, finish_name, merged, reply_pieces
from blinkimp.nic_shim.http_types import (
    ChatChoice,
    ChatChunk,
    ChatMessage,
    ChatReply,
    ChatRequest,
    ChunkChoice,
    Delta,
    ReplyMessage,
    Usage,
)
from blinkimp.nic_shim.token_bytes import TokenBytes
from blinkimp.protocol import Finish, Tokens

_encoder = msgspec.json.Encoder()


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Plain maps; parts of text are joined by newlines, and OpenAI's `developer` is what templates call `system`."""
    plain = []
    for message in messages:
        content = message.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content or [])
        entry = {"role": "system" if message.role == "developer" else message.role, "content": text}
        if message.name is not None:
            entry["name"] = message.name
        plain.append(entry)
    return plain


class ChatShape:
    """Builds the replies of one request."""

    def __init__(
        self, request_id: str, model: str, body: ChatRequest, names: TokenBytes, *, echo: str, prompt_ids: list[int]
    ) -> None:
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._model = model
        self._body = body
        self._names = names
        self._echo = echo
        self._prompt_ids = prompt_ids
        options = body.stream_options
        self._usage_field = None if options is not None and options.include_usage else msgspec.UNSET
        self._templates: dict[int, ChunkTemplate] = {}  # by choice; only without log-probabilities

    def needs_scores(self) -> bool:
        return False

    def take_scores(self, scores: list[Tokens]) -> None:
        raise AssertionError(
            "called though needs_scores() is False: a chat completion shows no log-probabilities of its prompt"
        )

    def opening(self, choice_idx: int) -> bytes | None:
        choice = ChunkChoice(index=choice_idx, delta=Delta(role="assistant", content=self._echo))
        chunk = self._bare_chunk([choice], None)
        if self._body.return_token_ids:
            chunk.prompt_token_ids = self._prompt_ids
        return _encoder.encode(chunk)

    def chunk(self, choice_idx: int, messages: list[Tokens | Finish], usage: Usage | None) -> bytes:
        tokens, finish = merged(messages)
        if tokens is not None and finish is None and usage is None and not self._body.logprobs:
            template = self._templates.get(choice_idx)
            if template is None:
                marks = Tokens(0, 0, IDS_MARK, [], TEXT_MARK)
                template = self._templates[choice_idx] = ChunkTemplate(self._encoded(choice_idx, marks, None, None))
            return template.fill(tokens.text, tokens.token_ids)
        return self._encoded(choice_idx, tokens, finish, usage)

    def _encoded(self, choice_idx: int, tokens: Tokens | None, finish: Finish | None, usage: Usage | None) -> bytes:
        choice = ChunkChoice(index=choice_idx, delta=Delta())
        if tokens is not None:
            choice.delta.content = tokens.text
            if self._body.logprobs:
                choice.logprobs = chat_logprobs(tokens, self._names, self._body.top_logprobs or 0)
        if self._body.return_token_ids:
            choice.token_ids = tokens.token_ids if tokens is not None else []
        if finish is not None:
            choice.finish_reason, choice.stop_reason = finish_name(finish), finish.stop
        return _encoder.encode(self._bare_chunk([choice], usage))

    def usage_chunk(self, usage: Usage) -> bytes:
        return _encoder.encode(self._bare_chunk([], usage))

    def whole(self, choices: list[Choice], usage: Usage) -> Iterator[bytes]:
        reply = ChatReply(id=self._id, created=self._created, model=self._model, choices=[], usage=usage)
        if self._body.return_token_ids:
            reply.prompt_token_ids = self._prompt_ids
        return reply_pieces(reply, map(self._whole_choice, range(len(choices)), choices))

    def _whole_choice(self, choice_idx: int, choice: Choice) -> ChatChoice:
        tokens, finish = merged(choice.messages)
        one = ChatChoice(index=choice_idx, message=ReplyMessage("assistant", self._echo))
        if tokens is not None:
            one.message.content += tokens.text
            if self._body.logprobs:
                one.logprobs = chat_logprobs(tokens, self._names, self._body.top_logprobs or 0)
        if self._body.return_token_ids:
            one.token_ids = tokens.token_ids if tokens is not None else []
        if finish is not None:
            one.finish_reason, one.stop_reason = finish_name(finish), finish.stop
        return one

    def _bare_chunk(self, choices: list[ChunkChoice], usage: Usage | None) -> ChatChunk:
        chunk = ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices)
        chunk.usage = usage if usage is not None else self._usage_field
        return chunk
