"""blinkimp/bench/sse.py: responses and events, whatever pieces they come in.

Run: pytest tests/null/test_bench_sse.py
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blinkimp.bench.sse import EventParser, HttpError, ResponseParser

EVENTS = [b'{"a": 1}', "é😀".encode(), b"x" * 300, b"[DONE]"]


def chunked(body: bytes, sizes: list[int]) -> bytes:
    pieces, position = [], 0
    for num_bytes in [*sizes, len(body)]:
        piece = body[position : position + num_bytes]
        position += len(piece)
        if piece:
            pieces.append(b"%x\r\n%s\r\n" % (len(piece), piece))
    return b"".join([*pieces, b"0\r\n\r\n"])


@given(st.lists(st.integers(1, 40), max_size=30), st.lists(st.integers(1, 60), max_size=60))
def test_events_are_found_however_chunks_and_reads_cut_them(chunk_sizes: list[int], read_sizes: list[int]) -> None:
    body = b"".join(b"data: " + event + b"\n\n" for event in EVENTS)
    wire = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked(body, chunk_sizes)
    response, events, found, position = ResponseParser(), EventParser(), [], 0
    for num_bytes in [*read_sizes, len(wire)]:
        found += events.feed(response.feed(wire[position : position + num_bytes]))
        position += num_bytes
        if position >= len(wire):
            break
    assert found == EVENTS and response.is_done and response.keeps_alive and response.status == 200


def test_a_body_of_a_known_length_ends_there_and_the_next_response_begins() -> None:
    response = ResponseParser()
    for text in (b"abc", b""):
        response.reset()
        head = b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(text)
        assert response.feed(head + text) == text
        assert response.is_done and response.status == 404 and not response.keeps_alive


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    response = ResponseParser()
    assert response.feed(b"HTTP/1.1 200 OK\r\n\r\nabc") == b"abc" and not response.is_done
    response.finish()
    assert response.is_done


def test_events_with_crlf_comments_and_several_data_lines() -> None:
    events = EventParser()
    assert events.feed(b": ping\n\nevent: x\r\ndata: 1\r\ndata:2\r\n\r\n") == [b"1\n2"]


@pytest.mark.parametrize(
    "wire", [b"SSH-2.0\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"x" * 70000]
)
def test_what_is_no_http_is_an_error(wire: bytes) -> None:
    with pytest.raises(HttpError):
        ResponseParser().feed(wire)
