"""Log-probabilities as OpenAI's two APIs show them.

Called by nic_shim/http_completions.py and nic_shim/http_chat.py. Test: pytest tests/null/test_http_logprobs.py
"""

from __future__ import annotations

from blinkimp.nic_shim.http_types import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from blinkimp.nic_shim.token_bytes import TokenBytes
from blinkimp.protocol import Tokens

MIN_LOGPROB = -9999.0  # JSON has no infinity; vLLM's stand-in


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB) if logprob == logprob else MIN_LOGPROB


def chat_logprobs(tokens: Tokens, names: TokenBytes, num_top: int) -> ChatLogprobs:
    """choices[].logprobs of a chat completion, for the tokens of one message."""
    content = []
    for position, (token, logprob) in enumerate(zip(tokens.token_ids, tokens.logprobs, strict=True)):
        top = [
            TopLogprob(names.text(other), _finite(value), list(names.shown(other)))
            for other, value in (tokens.top[position][:num_top] if tokens.top else ())
        ]
        content.append(TokenLogprob(names.text(token), _finite(logprob), list(names.shown(token)), top))
    return ChatLogprobs(content)


def completion_logprobs(tokens: Tokens, names: TokenBytes, num_top: int, text_offset: int) -> CompletionLogprobs:
    """choices[].logprobs of a completion. text_offset: where the first token's text begins in the choice's text."""
    texts = [names.text(token) for token in tokens.token_ids]
    top: list[dict[str, float] | None] | None = None
    if num_top:
        top = []
        for position, (text, logprob) in enumerate(zip(texts, tokens.logprobs, strict=True)):
            alternatives = {
                names.text(other): _finite(value) for other, value in reversed(tokens.top[position][:num_top])
            }
            # Likeliest first; the chosen token is among them, as OpenAI has it. (Unequal tokens may share a text: the likelier stays.)
            ordered = dict(reversed(alternatives.items()))
            ordered.setdefault(text, _finite(logprob))
            top.append(ordered)
    offsets = []
    for text in texts:
        offsets.append(text_offset)
        text_offset += len(text)
    return CompletionLogprobs(texts, [_finite(value) for value in tokens.logprobs], top, offsets)


def prompt_logprobs(first: int, rest: Tokens, names: TokenBytes, num_top: int) -> CompletionLogprobs:
    """Of a prompt's tokens. rest: those from the second on; the first follows nothing, so it has none."""
    text = names.text(first)
    shown = completion_logprobs(rest, names, num_top, len(text))
    shown.tokens.insert(0, text)
    shown.token_logprobs.insert(0, None)
    shown.text_offset.insert(0, 0)
    if shown.top_logprobs is not None:
        shown.top_logprobs.insert(0, None)
    return shown


def joined(first: CompletionLogprobs, then: CompletionLogprobs | None) -> CompletionLogprobs:
    """A prompt's and its output's."""
    if then is None:
        return first
    top = None if first.top_logprobs is None else first.top_logprobs + (then.top_logprobs or [])
    return CompletionLogprobs(
        first.tokens + then.tokens,
        first.token_logprobs + then.token_logprobs,
        top,
        first.text_offset + then.text_offset,
    )
