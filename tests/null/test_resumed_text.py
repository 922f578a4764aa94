"""Text of a request whose client loses its connection, or the ingress, between any two messages: the text of all ids, each piece once.

Property I5 of nic_shim/live_request.py. Run: pytest tests/null/test_resumed_text.py tests/host/test_resume.py
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blinkimp import ring_abi as abi
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.tokenizer import REPLACEMENT, IncrementalDetokenizer, Tokenizer
from blinkimp.protocol import Finish, Sampling, Submit
from tests.ingress_support import write_byte_tokenizer, write_metaspace_tokenizer
from tests.null.test_stop_strings import expected

PIECES = ["a", "b", "the", " ", "\n", "é", "日", "😀", "a\n", "\nb"]
STOPS = ["\nb", "a\nb", "é日", "bé", "😀 a", "the the"]

texts = st.lists(st.sampled_from(PIECES), max_size=20).map("".join)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """A token a byte, so that characters are split; and characters as tokens, with bytes for what is not in the vocabulary."""
    return {
        "bytes": Tokenizer(write_byte_tokenizer(tmp_path_factory.mktemp("bytes"))),
        "byte_fallback": Tokenizer(write_metaspace_tokenizer(tmp_path_factory.mktemp("metaspace"))),
    }


@dataclass
class Client:
    """What one has of a request, over all connections."""

    tokenizer: Tokenizer
    prompt_ids: list[int]
    sampling: Sampling
    ids: list[int] = field(default_factory=list)
    text: str = ""

    def submit(self) -> LiveRequest:
        """With what it has, as blinkimp/client_core.py does."""
        request = LiveRequest(Submit(1, self.prompt_ids, self.sampling, delivered_ids=list(self.ids)), None)
        request.start_detokenizer(IncrementalDetokenizer(self.tokenizer, self.prompt_ids))
        return request

    def receive(self, request: LiveRequest, max_tokens: int) -> None:
        """A frame with room for so many tokens."""
        if request.has_unsent():
            message = request.take_tokens(max_tokens)
            assert message.index == len(self.ids) and len(message.logprobs) == len(message.token_ids)
            self.ids += message.token_ids
            self.text += message.text


def say(request: LiveRequest, token: int) -> None:
    request.push_token(token, -1.0, 1)
    for _ in range(request.sampling.top_logprobs):
        request.push_top(token, -1.0)


Cut = tuple[int, int, bool]  # tokens that are said, the next frame's room, whether the connection is lost behind it


def run(client: Client, ids: list[int], cuts: list[Cut]) -> Finish:
    """A model that says `ids` to the client, which comes back after each loss."""
    request = client.submit()
    for num_said, room, is_lost in [*cuts, (len(ids), 3, False)]:
        for token in ids[len(request.output_ids) :][:num_said]:
            if not request.is_stopped:
                say(request, token)
        client.receive(request, room)
        if is_lost:
            request = client.submit()
    request.finish(abi.FINISH_LENGTH)
    while request.has_unsent():
        client.receive(request, 3)
    assert isinstance(request.end, Finish)
    return request.end


def text_of(tokenizer: Tokenizer, prompt_ids: list[int], ids: list[int]) -> str:
    """The whole characters of `ids`, by decoding all at once."""
    before = tokenizer.decode(prompt_ids)
    texts = (tokenizer.decode(prompt_ids + ids[:num]) for num in range(len(ids), -1, -1))
    return next(text for text in texts if not text.endswith(REPLACEMENT)).removeprefix(before)


@settings(deadline=None, max_examples=400)
@given(
    which=st.sampled_from(["bytes", "byte_fallback"]),
    text=texts,
    end=st.integers(0, 80),
    stops=st.lists(st.sampled_from(STOPS), max_size=2),
    num_top=st.integers(0, 1),
    cuts=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5), st.booleans()), max_size=12),
)
def test_any_cut_gives_the_text_of_all_ids(
    tokenizers: dict[str, Tokenizer], which: str, text: str, end: int, stops: list[str], num_top: int, cuts: list[Cut]
) -> None:
    tokenizer = tokenizers[which]
    prompt_ids, ids = tokenizer.encode("a").tolist(), tokenizer.encode(text).tolist()[:end]
    client = Client(tokenizer, prompt_ids, Sampling(max_tokens=1000, stop=stops, top_logprobs=num_top))
    finish = run(client, ids, cuts)
    shown, stop = expected(text_of(tokenizer, prompt_ids, ids), stops)
    assert (client.text, finish.stop) == (shown, stop)
    assert client.ids == ids if stop is None else client.ids == ids[: len(client.ids)]


def test_a_full_frame_has_the_text_of_its_ids(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["bytes"]
    client = Client(tokenizer, [5], Sampling(max_tokens=1000, stop=["yz"]))
    request = client.submit()
    ids = tokenizer.encode("x é yz").tolist()
    for token in ids[:-1]:
        say(request, token)
    shown = []
    while request.has_unsent():
        client.receive(request, 1)
        shown.append(client.text)
    assert shown == ["x", "x ", "x ", "x é", "x é ", "x é "]  # neither half a character, nor what may be a stop string
    again = client.submit()
    again.finish(abi.FINISH_LENGTH)
    client.receive(again, 1)
    assert client.text == "x é y"
