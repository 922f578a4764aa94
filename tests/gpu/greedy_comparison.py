"""Two engines of one model, asked the same greedily: where they differ, and by how much the two best tokens differ there.

Floating-point sums in another order may swap two tokens of nearly equal probability, and nothing else. After a difference both go
on from the first engine's tokens, so one near-tie does not hide what follows. Used by tests/gpu/test_engine_gpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from blinkimp.nic_shim.queue_pair import sampling_record
from tests.host.engine_support import PortClient

NUM_DRAWS = 24  # of one token out of two nearly equally likely ones: neither is missed but once in 2^23


@dataclass(frozen=True)
class Difference:
    """One position at which the engines chose differently."""

    prompt_idx: int
    position: int  # of the output
    tokens: tuple[int, int]  # the first engine's, the second's
    margins: tuple[float, float]  # nats between the two best tokens, as either engine sees them
    have_same_best_two: bool

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt_idx}, output {self.position}: {self.tokens[0]} against {self.tokens[1]}, "
            f"margin of the two best {self.margins[0]:.4f} and {self.margins[1]:.4f} nats"
        )


@dataclass(frozen=True)
class Comparison:
    num_tokens: int
    differences: list[Difference]
    logprob_errors: list[float]  # of each token that both chose

    @property
    def share_equal(self) -> float:
        return 1 - len(self.differences) / self.num_tokens


def best_two(client: PortClient, prompt: list[int]) -> dict[int, float]:
    """The two likeliest next tokens and their logprobs: draws that are so hot that both come up."""
    ids = [
        client.submit(prompt, 1, sampling_record(temperature=100.0, top_k=2, seed=seed, ignore_eos=True))
        for seed in range(NUM_DRAWS)
    ]
    client.wait_all(60)
    streams = [client.streams[request_id] for request_id in ids]
    return {stream.tokens[0]: stream.logprobs[0] for stream in streams}


def compare_greedy(first: PortClient, second: PortClient, prompts: list[list[int]], num_output: int) -> Comparison:
    ids = [first.submit(prompt, num_output) for prompt in prompts]
    first.wait_all(120)
    expected = [first.streams[request_id] for request_id in ids]
    differences: list[Difference] = []
    errors: list[float] = []
    begins = dict.fromkeys(range(len(prompts)), 0)  # prompt -> output position from which the second has to go on
    while begins:
        asked = {
            i: second.submit(prompts[i] + expected[i].tokens[:begin], num_output - begin) for i, begin in begins.items()
        }
        second.wait_all(120)
        for i, request_id in asked.items():
            got, begin = second.streams[request_id], begins.pop(i)
            for k, token in enumerate(got.tokens):
                if token != expected[i].tokens[begin + k]:
                    differences.append(_examine(first, second, i, prompts[i], expected[i].tokens, begin + k, token))
                    if begin + k + 1 < num_output:
                        begins[i] = begin + k + 1
                    break
                errors.append(abs(got.logprobs[k] - expected[i].logprobs[begin + k]))
    return Comparison(len(prompts) * num_output, differences, errors)


def _examine(
    first: PortClient,
    second: PortClient,
    prompt_idx: int,
    prompt: list[int],
    expected: list[int],
    position: int,
    got: int,
) -> Difference:
    seen = [best_two(client, prompt + expected[:position]) for client in (first, second)]
    margins = tuple(max(two.values()) - min(two.values()) if len(two) == 2 else float("inf") for two in seen)
    chosen = {expected[position], got}
    return Difference(
        prompt_idx,
        position,
        (expected[position], got),
        (margins[0], margins[1]),
        all(set(two) == chosen for two in seen),
    )
