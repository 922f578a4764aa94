"""Stop strings: text that ends a request, found across token boundaries, of which no character is ever given out.

Called by nic_shim/live_request.py with each piece of text. Test: pytest tests/null/test_stop_strings.py

Invariants
I1  Text given out, joined, is the output up to the stop string that is complete first (of those that end at the same place the
    one that begins first), or all of it. How the text is cut into pieces makes no difference.
I2  What is held back is the longest end of the text that a stop string could begin with, never more.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """The stop strings of one request, and the text that may still become one of them."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.matched: str | None = None  # the string that was found; nothing is given out after it

    def push(self, piece: str) -> str:
        """The text that is safe to give out now."""
        if self.matched is not None or not piece:
            return ""
        text = self._held + piece
        found = min(
            ((start + len(stop), start, stop) for stop in self._stop_strings if (start := text.find(stop)) >= 0),
            default=None,
        )
        if found is not None:
            _, start, self.matched = found
            self._held = ""
            return text[:start]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def finish(self) -> str:
        """The output has ended otherwise: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of a stop string."""
        longest = 0
        for stop in self._stop_strings:
            for num_chars in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:num_chars]):
                    longest = num_chars
                    break
        return longest
