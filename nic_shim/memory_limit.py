"""The end of an ingress that has grown too large: better that process than the machine; what ran there goes on in the next one.

    limit = MemoryLimit(max_bytes)      one for each process, checked many times a second: it keeps nothing of a look
    limit.check()                       raises MemoryError

Called by nic_shim/zmq_ingress.py and nic_shim/engine_thread.py. Test: pytest tests/null/test_memory_limit.py
"""

from __future__ import annotations

import mmap
import os
from typing import Final

_STATM_BYTES: Final = 256  # more than its seven numbers take


class MemoryLimit:
    """Of this process's resident memory, shared pages included."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)  # each read is of the moment

    def resident_bytes(self) -> int:
        return int(os.pread(self._statm, _STATM_BYTES, 0).split()[1]) * mmap.PAGESIZE

    def check(self) -> None:
        resident_bytes = self.resident_bytes()
        if resident_bytes > self.max_bytes:
            raise MemoryError(
                f"the ingress uses {resident_bytes} bytes, expected at most {self.max_bytes}; it ends, to be started anew; "
                "find the client that floods it, or raise --max-memory-bytes"
            )

    def close(self) -> None:
        os.close(self._statm)
