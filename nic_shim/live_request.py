"""One unfinished request in an ingress: its prompt, what the engine has answered, what the client has not got yet.

Made by nic_shim/message_handler.py and nic_shim/http_generate.py, filled by nic_shim/engine_link.py, emptied by nic_shim/sessions.py and
nic_shim/engine_thread.py. Test: pytest tests/host/test_zmq_ingress.py tests/null/test_resumed_text.py

Invariants
I1  output_ids holds every output token once, in order, whatever number of submissions it took.
I2  A request has one end: `end` is set once, and nothing is added after it.
I3  Memory: 4 bytes a prompt token, 4 + 4 bytes an output token (12 more for each alternative), and the text that is not sent;
    max_tokens bounds it.
I4  A token is whole once its alternatives are there: only then it is detokenised, counted and sent.
I5  Messages up to an id have all the text that the ids up to it complete, and no more, wherever they are cut: to a client that resumes
    there (delivered_ids) nothing of that is owed, and what was held back comes once.
"""

from __future__ import annotations

import hashlib
import secrets
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.constraint_compiler import LoadedConstraint
from blinkimp.nic_shim.queue_pair import sampling_record
from blinkimp.nic_shim.request_metrics import Siblings
from blinkimp.nic_shim.stop_strings import StopMatcher
from blinkimp.nic_shim.tokenizer import IncrementalDetokenizer
from blinkimp.protocol import Error, ErrorCode, Finish, Sampling, Submit, Tokens

FINISH_REASONS = {reason.value: reason.name.lower() for reason in abi.FinishReason}
NO_DEADLINE: Final = sys.maxsize
SMALLEST = 1e-30  # of what must not become 0 as a 32-bit float: there 0 is an error, or off


class LiveRequest:
    """State of one request. `session` is whatever the transport needs to find the client again."""

    def __init__(self, submit: Submit, session: Any) -> None:
        sampling = submit.sampling
        self.session = session
        self.client_id = submit.id
        self.stream = submit.stream
        self.wants_text = submit.detokenize or bool(sampling.stop)  # stop strings are looked for in the text
        self.shows_text = submit.detokenize
        self.sampling: Sampling = sampling
        self.seed = sampling.seed if sampling.seed is not None else secrets.randbits(64)
        self.priority = submit.priority
        self.timeout_s = submit.timeout_s
        self.cache_salt = cache_salt_word(submit.cache_salt)
        self.uses_prefix_cache = submit.prefix_cache
        self.prompt_ids: npt.NDArray[np.uint32] = np.zeros(0, dtype=np.uint32)
        self.constraint: LoadedConstraint | None = None
        self.detokenizer: IncrementalDetokenizer | None = None
        self.cancelled = False  # the client does not want it any more
        self.end: Finish | Error | None = None
        # ---- In the engine (nic_shim/engine_link.py)
        self.ring_id = 0  # request_id on the ring, another for each submission; 0 = not on the ring
        self.num_resumed = 0  # output tokens that the current submission carries in its prompt
        self.num_crashes = 0  # nic_shim/crash_suspects.py, as the next two
        self.num_crashes_alone = 0
        self.crash_position = 0  # output tokens at the last crash
        # ---- Output
        self.output_ids = array("I", submit.delivered_ids)
        self.num_sent = len(submit.delivered_ids)
        self.unsent_logprobs = array("f")
        self.unsent_top: list[list[tuple[int, float]]] = []
        self.unsent_text: list[str] = []  # where text is shown: of each whole token, often "", and what finish() let go
        self.stop_matcher = StopMatcher(sampling.stop) if sampling.stop else None
        self._num_top = sampling.top_logprobs
        self.num_top_missing = 0  # alternatives of the last token that have not arrived (I4)
        # ---- Times
        self.received_ns = time.monotonic_ns()
        self.accepted_ns = 0  # device clock, as the next two
        self.started_ns = 0
        self.first_token_ns = 0
        self.last_token_ns = 0  # device clock; of this life, 0 before its first token
        self.first_seen_ns = 0  # this machine's clock, as received_ns and the next
        self.ended_ns = 0
        self.num_cached_tokens = 0
        # ---- For who counts (nic_shim/request_metrics.py)
        self.siblings: Siblings | None = None
        self.observer: Callable[[LiveRequest], None] | None = None  # called once, when `end` is set

    @property
    def max_tokens(self) -> int:
        return self.sampling.max_tokens

    def start_detokenizer(self, detokenizer: IncrementalDetokenizer) -> None:
        """Takes it up where the client stands: text of what was delivered is not sent twice, half a character is kept."""
        self.detokenizer = detokenizer
        for position, token in enumerate(self.output_ids):
            self._match_stops(detokenizer.push(token), position)

    # ---- For the ring ----------------------------------------------------------------------------------------------
    def ring_prompt(self) -> npt.NDArray[np.uint32]:
        """Prompt and the output so far: what the engine goes on from."""
        if not self.output_ids:
            return self.prompt_ids
        return np.concatenate([self.prompt_ids, np.frombuffer(self.output_ids, dtype=np.uint32)])

    def ring_sampling(self) -> npt.NDArray[np.void]:
        """The same in each life: the engine counts output positions from num_prior_outputs on."""
        sampling = self.sampling
        return sampling_record(
            temperature=sampling.temperature,
            top_p=max(sampling.top_p, SMALLEST),
            min_p=sampling.min_p,
            top_k=sampling.top_k,
            seed=self.seed,
            ignore_eos=sampling.ignore_eos,
            min_tokens=sampling.min_tokens,
            repetition_penalty=max(sampling.repetition_penalty, SMALLEST),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            num_top_logprobs=sampling.top_logprobs,
        )

    def ring_options(self) -> dict[str, Any]:
        """What else the queue pair's try_submit() is told."""
        return {
            "stop_ids": self.sampling.stop_token_ids,
            "max_tokens": self.max_tokens - len(self.output_ids),
            "logit_bias": self.sampling.logit_bias,
            "num_prior_outputs": len(self.output_ids),
            "flags": 0 if self.uses_prefix_cache else int(abi.REQUEST_NO_PREFIX_CACHE),
            "priority": self.priority,
            "timeout_ns": self.remaining_ns(),
            "cache_salt": self.cache_salt,
            "constraint_state": self._constraint_state(),
        }

    def _constraint_state(self) -> int:
        """Where the automaton stands behind the output so far."""
        state = 0
        if self.constraint is not None:
            for token in self.output_ids:
                following = self.constraint.table.next_state(state, token)
                state = state if following is None else following  # a token that delivered_ids made up
        return state

    @property
    def deadline_ns(self) -> int:
        return deadline_ns_of(self.received_ns, self.timeout_s)

    def remaining_ns(self) -> int:
        """Of its time, for the engine to watch over: at least 1 where there is a deadline, 0 where there is none."""
        return 0 if self.timeout_s is None else max(1, self.deadline_ns - time.monotonic_ns())

    def is_overdue(self) -> bool:
        return time.monotonic_ns() > self.deadline_ns

    def reason_to_stop(self, eos_ids: frozenset[int]) -> int:
        """The FinishReason that the tokens so far call for, or 0: a FINISH may have been lost with an engine."""
        if self.is_stopped:
            return abi.FINISH_STOP_ID
        if self.output_ids:
            last = self.output_ids[-1]
            if last in eos_ids and not self.sampling.ignore_eos:
                return abi.FINISH_EOS
            if last in self.sampling.stop_token_ids:
                return abi.FINISH_STOP_ID
        return abi.FINISH_LENGTH if len(self.output_ids) >= self.max_tokens else 0

    # ---- Output ----------------------------------------------------------------------------------------------------
    def push_token(self, token: int, logprob: float, device_ns: int) -> bool:
        """True where it completes a stop string."""
        if not self.output_ids:
            self.first_token_ns = device_ns
        self.output_ids.append(token)
        self.unsent_logprobs.append(logprob)
        if self._num_top:
            self.unsent_top.append([])
            self.num_top_missing = self._num_top
        elif self.detokenizer is not None:
            piece = self.detokenizer.push(token)
            if self.stop_matcher is None:
                if self.shows_text:
                    self.unsent_text.append(piece)
            else:
                self._push_text(piece)
                return self.is_stopped
        return False

    def push_top(self, token: int, logprob: float) -> bool:
        """One alternative of the last token. False where none is expected."""
        if not self.num_top_missing:
            return False
        self.unsent_top[-1].append((token, logprob))
        self.num_top_missing -= 1
        if not self.num_top_missing and self.detokenizer is not None:
            self._push_text(self.detokenizer.push(self.output_ids[-1]))
        return True

    def drop_partial(self) -> None:
        """The engine is gone and with it the rest of the last token's alternatives: the token is sampled again (I4)."""
        if self.num_top_missing:
            self.output_ids.pop()
            self.unsent_logprobs.pop()
            self.unsent_top.pop()
            self.num_top_missing = 0

    def _push_text(self, piece: str) -> None:
        piece = self._match_stops(piece, len(self.output_ids) - 1)
        if self.shows_text:
            self.unsent_text.append(piece)

    def _match_stops(self, piece: str, position: int) -> str:
        """What of `piece`, which came with the output token at `position`, may be shown."""
        if self.stop_matcher is None or position < self.sampling.min_tokens:
            return piece
        return self.stop_matcher.push(piece)

    @property
    def is_stopped(self) -> bool:
        """A stop string was found: whatever the engine goes on to say is not output any more."""
        return self.stop_matcher is not None and self.stop_matcher.matched is not None

    def finish(self, reason: int, device_ns: int = 0) -> None:
        """The end. reason: a FinishReason; of no account where a stop string was found."""
        if self.detokenizer is not None and not self.is_stopped:
            tail = self._match_stops(self.detokenizer.finish(), len(self.output_ids))
            if self.stop_matcher is not None:
                tail += self.stop_matcher.finish()
            if tail and self.shows_text:
                self.unsent_text.append(tail)
        stop: str | int | None = self.stop_matcher.matched if self.stop_matcher is not None else None
        if stop is None and reason == abi.FINISH_STOP_ID:
            stop = self.output_ids[-1]
        self.ended_ns = time.monotonic_ns()
        self.end = Finish(
            id=self.client_id,
            reason="stop" if isinstance(stop, str) else FINISH_REASONS.get(reason, f"unknown_{reason}"),
            num_prompt_tokens=len(self.prompt_ids),
            num_output_tokens=len(self.output_ids),
            seed=self.seed,
            accepted_ns=self.accepted_ns,
            first_token_ns=self.first_token_ns,
            finished_ns=device_ns,
            ingress_ns=self.ended_ns - self.received_ns,
            started_ns=self.started_ns,
            num_cached_tokens=self.num_cached_tokens,
            stop=stop,
        )
        if self.observer is not None:
            self.observer(self)

    def fail(self, code: ErrorCode, what: str, got: str, expected: str, remedy: str) -> None:
        self.fail_with(Error(self.client_id, code, what, got, expected, remedy, final=True))

    def fail_with(self, error: Error) -> None:
        self.ended_ns = time.monotonic_ns()
        self.end = error
        if self.observer is not None:
            self.observer(self)

    @property
    def num_whole(self) -> int:
        """Output tokens that can be sent (I4)."""
        return len(self.output_ids) - (1 if self.num_top_missing else 0)

    def has_unsent(self) -> bool:
        """Whether take_tokens() would give something now."""
        if not self.stream and self.end is None:
            return False
        return self.num_sent < self.num_whole or bool(self.unsent_text)

    def take_tokens(self, max_tokens: int) -> Tokens:
        """What the client has not got, max_tokens of it at most, each with its text (I5)."""
        first, num_whole, logprobs = self.num_sent, self.num_whole, self.unsent_logprobs
        if num_whole - first <= max_tokens and num_whole - first == len(logprobs):  # all there is, as a rule
            self.num_sent = num_whole
            texts = self.unsent_text
            message = Tokens(
                self.client_id,
                first,
                self.output_ids[first:].tolist(),
                logprobs.tolist(),
                texts[0] if len(texts) == 1 else "".join(texts),
                self.unsent_top,
            )
            self.unsent_logprobs, self.unsent_top = array("f"), []
            texts.clear()
            return message
        last = min(num_whole, first + max_tokens)
        num_taken = last - first
        num_pieces = len(self.unsent_text) if last == num_whole else num_taken  # with the last id, what finish() let go
        message = Tokens(
            id=self.client_id,
            index=first,
            token_ids=self.output_ids[first:last].tolist(),
            logprobs=logprobs[:num_taken].tolist(),
            text="".join(self.unsent_text[:num_pieces]),
        )
        del logprobs[:num_taken]
        if self.unsent_top:
            message.top = self.unsent_top[:num_taken]
            del self.unsent_top[:num_taken]
        del self.unsent_text[:num_pieces]
        self.num_sent = last
        return message


def deadline_ns_of(received_ns: int, timeout_s: float | None) -> int:
    """On this machine's clock, or NO_DEADLINE."""
    return NO_DEADLINE if timeout_s is None else received_ns + int(timeout_s * 1e9)


def cache_salt_word(salt: str) -> int:
    """The ring's 64-bit word for a salt; no salt is 0, and no salt becomes 0."""
    if not salt:
        return 0
    return int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little") or 1
