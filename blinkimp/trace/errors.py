"""Errors of this package: for the person at the terminal, so they say what, got, expected and what to do.

Raised by blinkimp/trace, shown by blinkimp/cli. Test: pytest tests/null/test_trace_file.py
"""


class TraceError(RuntimeError):
    """A trace cannot be recorded, read or compared."""
