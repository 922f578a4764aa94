"""Tokens and logprobs of 64 requests on the GPU are the same bits alone, in random batches, in chunks of several sizes, behind cached prefixes,
after preemptions and after a restart: both kernels, the embedded model and the layers of Llama-3-8B.

Which cases there are, and what each proves of itself: tests/host/determinism_scenario.py. The shape of Llama-3-8B has other tiles, other splits of
attention and the large vocabulary's sampling; two of its layers with random weights say as much about bits as 32.
Run: pytest -m gpu tests/gpu/test_determinism_gpu.py -rP     (-k "embedded-hopper": the quickest; prints steps by rows of each case)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blinkimp.lab.shapes import LLAMA_3_8B_SIZES
from tests.host import determinism_scenario as scenario
from tests.host.engine_support import Stream, make_tiny_checkpoint

Options = dict[str, Any]
Asked = tuple[Path | str, Options, list[scenario.Request], list[Stream]]

NUM_REQUESTS = 64
TWO_LAYERS = LLAMA_3_8B_SIZES | {"num_hidden_layers": 2}
VOCABS = {"embedded": 4096, "llama_3_8b": TWO_LAYERS["vocab_size"]}
RUNS = [("embedded", "hopper"), ("embedded", "portable"), ("llama_3_8b", "hopper"), ("llama_3_8b", "portable")]


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def alone(request: pytest.FixtureRequest, device_options: Options, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Model, options of its engines, the requests, and what each of them brings alone."""
    name, kernel = request.param
    model: Path | str = "embedded"
    options = {**device_options, "kernel": kernel}
    if name != "embedded":
        model = make_tiny_checkpoint(tmp_path_factory.mktemp(name), config_only=True, **TWO_LAYERS)
        options["load_format"] = "dummy"  # the same random weights at every start
    requests = scenario.make_requests(NUM_REQUESTS, VOCABS[name])
    return model, options, requests, scenario.reference(model, requests, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("case", scenario.CASES)
def test_bits_are_those_of_each_request_alone(case: str, alone: Asked) -> None:
    model, options, requests, expected = alone
    scenario.run_case(case, model, requests, expected, **options)
