"""What is written down of one request while a load runs: a few moments and counts, no text.

Filled by the backends, read by blinkimp/bench/metrics.py. Test: pytest tests/null/test_bench_metrics.py
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Record:
    """One request. Times are time.monotonic_ns() of this process; 0: it did not come to that."""

    idx: int
    input_len: int
    output_len: int  # asked for
    intended_ns: int  # when it was meant to be sent; in a closed loop, when its place became free
    sent_ns: int = 0
    ended_ns: int = 0
    chunk_ns: list[int] = field(default_factory=list)  # arrival of each piece of output
    chunk_tokens: list[int] = field(default_factory=list)  # its tokens; a text protocol does not tell, and counts 1
    num_output_tokens: int = 0  # as the server reports it at the end; else the sum of chunk_tokens
    error: str = ""
    token_ids: list[int] | None = None  # output, where a replay compares it and the protocol tells
    is_cut: bool = False  # given up by the client, not by the server: its waiting so far is a lower bound

    def add_chunk(self, now_ns: int, num_tokens: int) -> None:
        self.chunk_ns.append(now_ns)
        self.chunk_tokens.append(num_tokens)

    def end(self, now_ns: int, *, num_output_tokens: int = 0, error: str = "") -> None:
        """At the last word about the request. The first end counts: a load that is given up ends what its backend may end later."""
        if self.is_ended:
            return
        self.ended_ns, self.error = now_ns, error
        self.num_output_tokens = num_output_tokens or sum(self.chunk_tokens)
        if not error and not self.chunk_ns:
            self.error = "ended without output"

    @property
    def is_ended(self) -> bool:
        return self.ended_ns != 0

    @property
    def is_complete(self) -> bool:
        return self.is_ended and not self.error
