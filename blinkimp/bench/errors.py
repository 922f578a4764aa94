"""The error that the load generator raises for its user. Used by blinkimp/bench and blinkimp/cli/bench.py."""

from __future__ import annotations


class LoadError(RuntimeError):
    """A load cannot be made, or its target does not answer; the message says what, got, expected, remedy."""
