"""Stop strings across any cut of the text, against a plain search of the whole.

Run: pytest tests/null/test_stop_strings.py
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from blinkimp.nic_shim.stop_strings import StopMatcher

letters = st.text(alphabet="ab\n", max_size=12)


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By the whole text: the string that is complete first, of those the one that begins first."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(deadline=None, max_examples=500)
@given(st.lists(letters, max_size=12), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=4))
def test_any_cut_of_the_text_gives_the_same(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown: list[str] = []
    for piece in pieces:
        shown.append(matcher.push(piece))
        text_so_far, found = expected("".join(pieces), stops)
        assert text_so_far.startswith("".join(shown)), "nothing of a stop string is shown"
    shown.append(matcher.finish())
    assert ("".join(shown), matcher.matched) == (text_so_far, found) if pieces else matcher.matched is None


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hello.\n") == "Hello."
    assert matcher.push("x") == "\nx"
    assert matcher.push("\n\nUse") == ""
    assert matcher.push("d") == "\n\nUsed"
    assert matcher.push("\n\nUser") == ""
    assert matcher.push(": hi") == "" and matcher.matched == "\n\nUser:"
    assert matcher.push("more") == "" and matcher.finish() == ""
