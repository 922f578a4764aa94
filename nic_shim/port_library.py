"""The C interface of the ingress side of a queue pair: device/emu/ingress_port.cpp through ctypes.

Called by nic_shim/queue_pair.py. Test: pytest tests/host/test_ingress_port.py
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from blinkimp import native


@functools.cache
def port_library() -> ctypes.CDLL:
    """The native library with the signatures of device/emu/ingress_port.cpp."""
    library = native.load()
    handle, u32, u64, i32 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int32
    pointer, u64_out = ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint64)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "bk_port_check_header": (u32, [pointer, u64, u64_out, u64_out]),
        "bk_port_open": (handle, [pointer, u64, u64]),
        "bk_port_close": (None, [handle]),
        "bk_port_heartbeat_start": (i32, [handle, u64]),
        "bk_port_heartbeat_stop": (None, [handle]),
        "bk_port_renew_lease": (None, [handle, u64]),
        "bk_port_heartbeat": (u32, [handle]),
        "bk_port_try_attach": (u32, [handle, u64]),
        "bk_port_attach_answered": (u32, [handle]),
        "bk_port_detach": (None, [handle]),
        "bk_port_state": (u32, [handle]),
        "bk_port_epoch": (u64, [handle]),
        "bk_port_try_submit": (u32, [handle, pointer]),
        "bk_port_try_load_constraint": (u32, [handle, u32, pointer, u64, u64_out]),
        "bk_port_try_cancel": (u32, [handle, u64]),
        "bk_port_try_ping": (u32, [handle, u64, u64]),
        "bk_port_ping": (u32, [handle, u64, u64, u64, u64_out, u64_out]),
        "bk_port_poll": (u32, [handle, pointer, u32]),
        "bk_port_wait": (u32, [handle, i32, u64]),
    }
    for name, (result_type, argument_types) in signatures.items():
        function = getattr(library, name)
        function.restype = result_type
        function.argtypes = argument_types
    return library
