"""A request that goes on behind tokens its client has already is the request it was: sampled, penalised, constrained. Emulated device.

Run: pytest tests/host/test_resume.py
"""

from __future__ import annotations

from typing import Any

import pytest

from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from blinkimp.protocol import Error, Finish, Tokens
from tests.host.engine_support import running_engine
from tests.http_support import EMBEDDED
from tests.ingress_support import RawClient
from tests.support import PATIENCE_S


def ask(
    client: RawClient, request_id: int, sampling: dict[str, Any], delivered_ids: list[int]
) -> tuple[list[int], str, str]:
    """Ids and text that are new, and the reason of the end."""
    message = {
        "type": "submit",
        "id": request_id,
        "prompt": "x = ",
        "sampling": sampling,
        "delivered_ids": delivered_ids,
    }
    client.send_message(message)
    messages = client.receive_until(lambda one: isinstance(one, Finish | Error))
    ids = [token for one in messages if isinstance(one, Tokens) for token in one.token_ids]
    text = "".join(one.text for one in messages if isinstance(one, Tokens))
    end = messages[-1]
    assert isinstance(end, Finish), end
    assert end.num_output_tokens == len(delivered_ids) + len(ids)
    return ids, text, end.reason


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {
            "temperature": 1.0,
            "top_p": 0.9,
            "presence_penalty": 1.5,
            "frequency_penalty": 0.5,
            "repetition_penalty": 1.2,
        },
        {"temperature": 1.0, "constraint": {"kind": "regex", "value": "[0-9]{12}-[a-f]{12}"}},
        {"temperature": 1.0, "min_tokens": 20, "top_logprobs": 3},
    ],
)
def test_output_behind_delivered_ids_is_what_it_would_have_been(sampling: dict[str, Any]) -> None:
    sampling = {"max_tokens": 24, "seed": 11, **sampling}
    with running_engine("embedded", constraint_slots=2) as engine:
        ingress = ZmqIngress(engine.config.engine_name, 0, "tcp://127.0.0.1:*", Tokenizer(EMBEDDED))
        endpoint = ingress.start()
        try:
            with RawClient(endpoint) as client:
                ids, text, reason = ask(client, 1, sampling, [])
                for num_delivered in (1, len(ids) // 2, len(ids) - 1):
                    rest, rest_text, rest_reason = ask(client, 1, sampling, ids[:num_delivered])
                    assert rest == ids[num_delivered:] and rest_reason == reason
                    assert text.endswith(rest_text)
        finally:
            ingress.stop()
            assert ingress.join(PATIENCE_S)
