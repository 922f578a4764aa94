"""What a completion and a chat completion share before the engine: prompts to token ids, checks, choices as the engine takes them.

Called by nic_shim/http_app.py. What comes back is http_response.py's. Test: pytest tests/host/test_http_ingress.py
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
import numpy as np

from blinkimp.nic_shim.admission import PromptIds, prompt_problem, submit_problem, untokenisable
from blinkimp.nic_shim.chat_template import ChatTemplate
from blinkimp.nic_shim.compile_queue import CompileQueue
from blinkimp.nic_shim.constraint_compiler import LoadedConstraint
from blinkimp.nic_shim.engine_thread import EngineThread
from blinkimp.nic_shim.http_errors import http_error_of
from blinkimp.nic_shim.http_exchange import Exchange
from blinkimp.nic_shim.http_fields import GenerationDefaults, Prompt
from blinkimp.nic_shim.http_types import GenerationFields
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.request_metrics import Siblings
from blinkimp.nic_shim.tokenizer import IncrementalDetokenizer, Tokenizer
from blinkimp.protocol import Sampling, Submit

# What is longer is worked on on a thread, so that streams do not wait for it.
MAX_INLINE_CHARS = 4096  # of text to tokenise; token ids
MAX_INLINE_BYTES = 1 << 16  # of a body

Result = TypeVar("Result")


@dataclass
class Context:
    """What all requests need."""

    engine: EngineThread
    tokenizer: Tokenizer
    template: ChatTemplate
    defaults: GenerationDefaults
    model_names: tuple[str, ...]
    max_prompt_chars: int
    pool: ThreadPoolExecutor  # one thread: decodes bodies, tokenises and back, renders templates
    compile_queue: CompileQueue
    exchanges: dict[Exchange, None] = field(default_factory=dict)  # whose reply is under way


async def off_loop_if(is_long: bool, context: Context, work: Callable[[], Result]) -> Result:
    """What work() returns, made on the pool's thread if it takes long."""
    if is_long:
        return await asyncio.get_running_loop().run_in_executor(context.pool, work)
    return work()


async def encode_prompts(
    context: Context, prompts: Sequence[Prompt], *, add_special_tokens: bool = True
) -> list[PromptIds]:
    """Token ids of each prompt. Raises HttpError."""
    num_chars = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
    if num_chars > context.max_prompt_chars:
        submit = Submit(0, "".join(prompt for prompt in prompts if isinstance(prompt, str)))
        problem = submit_problem(submit, context.max_prompt_chars)
        assert problem is not None
        raise http_error_of(problem)

    def encode() -> list[PromptIds]:
        try:
            return [
                context.tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
                if isinstance(prompt, str)
                else np.asarray(prompt, dtype=np.uint32)
                for prompt in prompts
            ]
        except Exception as error:  # the binding raises plain Exception
            raise http_error_of(untokenisable(0, error)) from error

    return await off_loop_if(sum(map(len, prompts)) > MAX_INLINE_CHARS, context, encode)


async def texts_of(context: Context, prompts: Sequence[Prompt]) -> list[str]:
    """Each prompt as text; they are of one kind."""
    batch = [prompt for prompt in prompts if not isinstance(prompt, str)]
    if not batch:
        return [prompt for prompt in prompts if isinstance(prompt, str)]
    is_long = sum(map(len, batch)) > MAX_INLINE_CHARS
    return await off_loop_if(is_long, context, lambda: context.tokenizer.decode_batch(batch))


async def make_requests(
    context: Context,
    body: GenerationFields,
    prompts: list[PromptIds],
    sampling: Sampling,
    constraint: LoadedConstraint | None,
    exchange: Exchange,
) -> list[LiveRequest]:
    """n choices for each prompt, checked. Raises HttpError."""
    requests: list[LiveRequest] = []
    num_choices = body.n or 1
    for prompt_ids in prompts:
        if requests:
            await asyncio.sleep(0)  # some milliseconds for each prompt of many choices: streams go on in between
        siblings = Siblings(num_choices, num_choices)
        for copy_idx in range(num_choices):
            # Like vLLM: the copies of a seeded request take the seeds that follow.
            seeded = sampling
            if sampling.seed is not None and copy_idx:
                seeded = msgspec.structs.replace(sampling, seed=(sampling.seed + copy_idx) % 2**64)
            submit = Submit(
                len(requests),
                "",
                seeded,
                stream=bool(body.stream),
                priority=body.priority or 0,
                timeout_s=body.timeout,
                cache_salt=body.cache_salt or "",
                prefix_cache=body.prefix_cache is not False,
            )
            limits = context.engine.link.port
            problem = submit_problem(submit, context.max_prompt_chars) or prompt_problem(0, prompt_ids, seeded, limits)
            if problem is not None:
                raise http_error_of(problem)
            request = LiveRequest(submit, exchange)
            request.prompt_ids = prompt_ids
            request.constraint = constraint
            request.siblings = siblings
            request.start_detokenizer(IncrementalDetokenizer(context.tokenizer, prompt_ids[-16:].tolist()))
            requests.append(request)
    return requests


def new_exchange(context: Context, on_end: Callable[[], Any]) -> Exchange:
    exchange = Exchange(context.engine, on_end, context.exchanges.pop)
    context.exchanges[exchange] = None
    return exchange
