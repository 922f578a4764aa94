"""Several completions side by side over ZeroMQ, with async and await.

    python tools/examples/async_streams.py tcp://127.0.0.1:5555 'import os' 'def main():'

Test: pytest tests/host/test_examples.py
"""

from __future__ import annotations

import asyncio
import sys

from blinkimp.async_client import AsyncClient


async def stream(client: AsyncClient, prompt: str) -> str:
    """One completion; its text pieces arrive as the server makes them."""
    pieces = []
    async for chunk in client.submit(prompt, max_tokens=24, temperature=0.0, stop=["\n\n"]):
        pieces.append(chunk.text)
    return "".join(pieces)


async def main(endpoint: str, prompts: list[str]) -> None:
    async with AsyncClient(endpoint) as client:
        texts = await asyncio.gather(*(stream(client, prompt) for prompt in prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt!r} -> {text!r}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: async_streams.py ENDPOINT PROMPT...")
    asyncio.run(main(sys.argv[1], sys.argv[2:]))
