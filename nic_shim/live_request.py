"""One unfinished request in an ingress: its prompt, what the engine has answered, what the client has not got yet.

Made by nic_shim/message_handler.py, filled by nic_shim/engine_link.py, emptied by nic_shim/sessions.py.
Test: pytest tests/host/test_zmq_ingress.py

Invariants
I1  output_ids holds every output token once, in order, whatever number of submissions it took.
I2  A request has one end: `end` is set once, and nothing is added after it.
I3  Memory: 4 bytes a prompt token, 4 + 4 bytes an output token, and the text that is not sent; max_tokens bounds it.
"""

from __future__ import annotations

import secrets
import time
from array import array
from typing import Any

import numpy as np
import numpy.typing as npt

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.queue_pair import sampling_record
from blinkimp.nic_shim.tokenizer import IncrementalDetokenizer
from blinkimp.protocol import Error, ErrorCode, Finish, Sampling, Submit, Tokens

FINISH_REASONS = {reason.value: reason.name.lower() for reason in abi.FinishReason}
_SEED_STEP = 0x9E3779B97F4A7C15  # odd: another key for each number of tokens that a request resumes with


class LiveRequest:
    """State of one request. `session` is whatever the transport needs to find the client again."""

    def __init__(self, submit: Submit, session: Any) -> None:
        self.session = session
        self.client_id = submit.id
        self.stream = submit.stream
        self.wants_text = submit.detokenize
        self.sampling: Sampling = submit.sampling
        self.seed = submit.sampling.seed if submit.sampling.seed is not None else secrets.randbits(64)
        self.prompt_ids: npt.NDArray[np.uint32] = np.zeros(0, dtype=np.uint32)
        self.detokenizer: IncrementalDetokenizer | None = None
        self.cancelled = False  # the client does not want it any more
        self.end: Finish | Error | None = None
        # ---- In the engine (nic_shim/engine_link.py)
        self.ring_id = 0  # request_id on the ring, another for each submission; 0 = not on the ring
        self.num_resumed = 0  # output tokens that the current submission carries in its prompt
        # ---- Output
        self.output_ids = array("I", submit.delivered_ids)
        self.num_sent = len(submit.delivered_ids)
        self.unsent_logprobs = array("f")
        self.unsent_text: list[str] = []
        # ---- Times
        self.received_ns = time.monotonic_ns()
        self.accepted_ns = 0  # device clock
        self.first_token_ns = 0  # device clock

    @property
    def max_tokens(self) -> int:
        return self.sampling.max_tokens

    def start_detokenizer(self, detokenizer: IncrementalDetokenizer) -> None:
        """Takes it up where the client stands: text of what was delivered is not sent twice, half a character is kept."""
        self.detokenizer = detokenizer
        for token in self.output_ids:
            detokenizer.push(token)

    # ---- For the ring ----------------------------------------------------------------------------------------------
    def ring_prompt(self) -> npt.NDArray[np.uint32]:
        """Prompt and the output so far: what the engine goes on from."""
        if not self.output_ids:
            return self.prompt_ids
        return np.concatenate([self.prompt_ids, np.frombuffer(self.output_ids, dtype=np.uint32)])

    def ring_sampling(self) -> npt.NDArray[np.void]:
        """The engine counts output positions from the submission, so a resumed request gets a key of its own (I1 of PROTOCOL.md)."""
        sampling = self.sampling
        return sampling_record(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
            seed=(self.seed + _SEED_STEP * len(self.output_ids)) % 2**64,
            ignore_eos=sampling.ignore_eos,
        )

    def reason_to_stop(self, eos_ids: frozenset[int]) -> int:
        """The FinishReason that the tokens so far call for, or 0: a FINISH may have been lost with an engine."""
        if self.output_ids:
            last = self.output_ids[-1]
            if last in eos_ids and not self.sampling.ignore_eos:
                return abi.FINISH_EOS
            if last in self.sampling.stop_token_ids:
                return abi.FINISH_STOP_ID
        return abi.FINISH_LENGTH if len(self.output_ids) >= self.max_tokens else 0

    # ---- Output ----------------------------------------------------------------------------------------------------
    def push_token(self, token: int, logprob: float, device_ns: int) -> None:
        if not self.output_ids:
            self.first_token_ns = device_ns
        self.output_ids.append(token)
        self.unsent_logprobs.append(logprob)
        if self.detokenizer is not None:
            piece = self.detokenizer.push(token)
            if piece:
                self.unsent_text.append(piece)

    def finish(self, reason: int, device_ns: int = 0) -> None:
        if self.detokenizer is not None and (tail := self.detokenizer.finish()):
            self.unsent_text.append(tail)
        self.end = Finish(
            id=self.client_id,
            reason=FINISH_REASONS.get(reason, f"unknown_{reason}"),
            num_prompt_tokens=len(self.prompt_ids),
            num_output_tokens=len(self.output_ids),
            seed=self.seed,
            accepted_ns=self.accepted_ns,
            first_token_ns=self.first_token_ns,
            finished_ns=device_ns,
            ingress_ns=time.monotonic_ns() - self.received_ns,
        )

    def fail(self, code: ErrorCode, what: str, got: str, expected: str, remedy: str) -> None:
        self.end = Error(self.client_id, code, what, got, expected, remedy, final=True)

    def has_unsent(self) -> bool:
        """Whether take_tokens() would give something now."""
        if not self.stream and self.end is None:
            return False
        return self.num_sent < len(self.output_ids) or bool(self.unsent_text)

    def take_tokens(self, max_tokens: int) -> Tokens:
        """What the client has not got, max_tokens of it at most; text goes with the last of it."""
        first = self.num_sent
        last = min(len(self.output_ids), first + max_tokens)
        num_taken = last - first
        whole = last == len(self.output_ids)
        message = Tokens(
            id=self.client_id,
            index=first,
            token_ids=self.output_ids[first:last].tolist(),
            logprobs=self.unsent_logprobs[:num_taken].tolist(),
            text="".join(self.unsent_text) if whole else "",
        )
        del self.unsent_logprobs[:num_taken]
        if whole:
            self.unsent_text.clear()
        self.num_sent = last
        return message
