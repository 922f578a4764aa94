"""Traces of a running engine: recording, the file, analysis, exports, arrivals for a replay. TRACE.md describes the file and the figures.

Used by blinkimp/cli/trace.py. Test: pytest tests/host/test_trace_recorder.py tests/null/test_trace_*.py
"""
