"""Numbers and bytes that are likely to be wrong: around powers of two, around the limits of their words, and anything.

Used by tests/host/ring_fuzzer.py.
"""

from __future__ import annotations

import random
import struct

SMALL = (0, 1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 511, 512, 4095, 4096, 0x7FFF, 0xFFFF, 0x10000)
EDGES = (1 << 31, (1 << 32) - 1, (1 << 32) - 64, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 64, (1 << 64) - 1)
REALS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    2.0,
    -2.0,
    2.0000002,
    1e-45,
    1e-38,
    3.4e38,
    float("inf"),
    float("-inf"),
    float("nan"),
)


class WrongValues:
    """Drawn from `rng`, so that a seed repeats them."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def number(self) -> int:
        """An integer; the caller cuts it to the width of its word."""
        rng = self._rng
        match rng.randrange(4):
            case 0:
                return rng.choice(EDGES) + rng.choice((-1, 0, 0, 1))
            case 1:
                return rng.getrandbits(64)
            case _:
                return rng.choice(SMALL) + rng.choice((-1, 0, 0, 1))

    def real(self) -> float:
        return self._rng.choice(REALS)

    def bent(self, raw: bytes) -> bytes:
        """A few bits, bytes or words of it changed; now and then its end is cut off."""
        rng = self._rng
        data = bytearray(raw)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    data[at] = rng.randrange(256)
                case _:
                    data[at // 4 * 4 : at // 4 * 4 + 4] = struct.pack("<I", self.number() % (1 << 32))
        return bytes(data[: len(raw)]) if rng.random() < 0.8 else bytes(data[: rng.randint(1, len(raw))])
