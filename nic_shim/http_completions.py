"""/v1/completions: the shape of its replies.

Called by nic_shim/http_app.py. Test: pytest tests/host/test_http_ingress.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import msgspec

from blinkimp.nic_shim.chunk_template import IDS_MARK, TEXT_MARK, ChunkTemplate
from blinkimp.nic_shim.http_logprobs import completion_logprobs, joined, prompt_logprobs
from blinkimp.nic_shim.http_response import Choice, finish_name, merged, reply_pieces
from blinkimp.nic_shim.http_types import (
    CompletionChoice,
    CompletionChunk,
    CompletionLogprobs,
    CompletionReply,
    CompletionRequest,
    Usage,
)
from blinkimp.nic_shim.token_bytes import TokenBytes
from blinkimp.protocol import Finish, Tokens

_encoder = msgspec.json.Encoder()


class CompletionShape:
    """Builds the replies of one request. echoes, prompt_ids: of each prompt; its n choices share them."""

    def __init__(
        self,
        request_id: str,
        model: str,
        body: CompletionRequest,
        names: TokenBytes,
        *,
        echoes: Sequence[str],
        prompt_ids: Sequence[list[int]],
    ) -> None:
        self._id = f"cmpl-{request_id}"
        self._created = int(time.time())
        self._model = model
        self._body = body
        self._names = names
        self._echoes = echoes
        self._prompt_ids = prompt_ids
        self._num_choices = body.n or 1  # of each prompt
        self._num_chars = [0] * (len(echoes) * self._num_choices)  # of each choice's text so far
        options = body.stream_options
        self._usage_field = None if options is not None and options.include_usage else msgspec.UNSET
        self._templates: dict[int, ChunkTemplate] = {}  # by choice; only without log-probabilities
        self._scores: list[CompletionLogprobs] = []  # of each prompt, with echo and log-probabilities
        self._discards_output = body.max_tokens == 0

    def needs_scores(self) -> bool:
        return bool(self._body.echo) and self._body.logprobs is not None

    def take_scores(self, scores: list[Tokens]) -> None:
        num_top = self._body.logprobs or 0
        for ids, rest in zip(self._prompt_ids, scores, strict=True):
            self._scores.append(prompt_logprobs(ids[0], rest, self._names, num_top))
        num_chars = [sum(map(len, shown.tokens)) for shown in self._scores]
        self._num_chars = [num_chars[idx // self._num_choices] for idx in range(len(self._num_chars))]

    def opening(self, choice_idx: int) -> bytes | None:
        """With echo a stream begins with the prompt."""
        prompt_idx = choice_idx // self._num_choices
        if not (self._echoes[prompt_idx] or self._body.return_token_ids or self._scores):
            return None
        choice = CompletionChoice(index=choice_idx, text=self._echoes[prompt_idx])
        if self._scores:
            choice.logprobs = self._scores[prompt_idx]
        if self._body.return_token_ids:
            choice.prompt_token_ids = self._prompt_ids[prompt_idx]
            choice.token_ids = []
        return self._chunk([choice], None)

    def chunk(self, choice_idx: int, messages: list[Tokens | Finish], usage: Usage | None) -> bytes:
        tokens, finish = merged(messages)
        is_usual = finish is None and usage is None and self._body.logprobs is None and not self._discards_output
        if tokens is not None and is_usual:
            return self._template(choice_idx).fill(tokens.text, tokens.token_ids)
        return self._chunk([self._choice(choice_idx, tokens, finish)], usage)

    def _template(self, choice_idx: int) -> ChunkTemplate:
        template = self._templates.get(choice_idx)
        if template is None:
            choice = self._choice(choice_idx, Tokens(0, 0, IDS_MARK, [], TEXT_MARK), None)
            template = self._templates[choice_idx] = ChunkTemplate(self._chunk([choice], None))
        return template

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._chunk([], usage)

    def whole(self, choices: list[Choice], usage: Usage) -> Iterator[bytes]:
        reply = CompletionReply(id=self._id, created=self._created, model=self._model, choices=[], usage=usage)
        return reply_pieces(reply, map(self._whole_choice, range(len(choices)), choices))

    def _whole_choice(self, choice_idx: int, choice: Choice) -> CompletionChoice:
        tokens, finish = merged(choice.messages)
        one = self._choice(choice_idx, tokens, finish)
        one.text = self._echoes[choice.prompt_idx] + one.text
        if self._scores:
            one.logprobs = joined(self._scores[choice.prompt_idx], one.logprobs)
        if self._body.return_token_ids:
            one.prompt_token_ids = self._prompt_ids[choice.prompt_idx]
        return one

    def _choice(self, choice_idx: int, tokens: Tokens | None, finish: Finish | None) -> CompletionChoice:
        choice = CompletionChoice(index=choice_idx, text="")
        if self._discards_output:
            tokens = None
        if tokens is not None:
            choice.text = tokens.text
            if self._body.logprobs is not None:
                offset = self._num_chars[choice_idx]
                choice.logprobs = completion_logprobs(tokens, self._names, self._body.logprobs, offset)
                self._num_chars[choice_idx] = offset + sum(map(len, choice.logprobs.tokens))
        if self._body.return_token_ids:
            choice.token_ids = tokens.token_ids if tokens is not None else []
        if finish is not None:
            choice.finish_reason, choice.stop_reason = finish_name(finish), finish.stop
            if self._discards_output and choice.finish_reason == "stop":  # by the token that nobody asked for
                choice.finish_reason, choice.stop_reason = "length", None
        return choice

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None) -> bytes:
        chunk = CompletionChunk(id=self._id, created=self._created, model=self._model, choices=choices)
        chunk.usage = usage if usage is not None else self._usage_field
        return _encoder.encode(chunk)
