"""The ABI headers, their generated Python mirror, and what g++ and NVRTC make of them agree.

Covers device/ring_abi.h, device/program_abi.h, tools/gen_abi.py and blinkimp/ring_abi.py.
Run: pytest tests/compile/test_ring_abi.py
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from blinkimp import ring_abi
from blinkimp.host.compile import CompileError, compile_cubin
from tests.support import ROOT, load_tool

DEVICE = ROOT / "device"
gen_abi = load_tool("gen_abi")


def test_committed_mirror_is_what_the_headers_say() -> None:
    assert gen_abi.render(gen_abi.parse()) == (ROOT / "blinkimp" / "ring_abi.py").read_text(), (
        "run: python tools/gen_abi.py"
    )


def test_gxx_agrees_on_every_size_offset_and_value(tmp_path: Path) -> None:
    """A probe prints sizeof, offsetof and constants as the compiler sees them; all must equal the numpy dtypes and ints."""
    abi = gen_abi.parse()
    lines = [
        "#include <program_abi.h>",
        "#include <trace_abi.h>",
        "#include <cstdio>",
        "using namespace blinkimp;",
        "int main() {",
    ]
    for name, struct in abi.structs.items():
        lines.append(f'  std::printf("size {name} - %zu\\n", sizeof({name}));')
        lines += [
            f'  std::printf("at {name} {member.name} %zu\\n", __builtin_offsetof({name}, {member.name}));'
            for member in struct.members
        ]
    names = list(abi.constants) + [member for members in abi.enums.values() for member in members]
    lines += [f'  std::printf("value {name} - %llu\\n", static_cast<unsigned long long>({name}));' for name in names]
    probe = tmp_path / "probe.cpp"
    probe.write_text("\n".join([*lines, "}"]))
    subprocess.run(
        ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{DEVICE}", "-o", tmp_path / "probe", probe], check=True
    )
    report = subprocess.run([tmp_path / "probe"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(report) > 200
    for line in report:
        what, name, member, number = line.split()
        mirror = getattr(ring_abi, gen_abi.upper_snake(name))
        if what == "size":
            assert mirror.itemsize == int(number), line
        elif what == "at":
            assert mirror.fields[member][1] == int(number), line
        else:
            assert mirror == int(number), line


def test_dtypes_have_no_holes() -> None:
    """Padding is explicit, so the members' bytes add up to the struct."""
    for name in gen_abi.parse().structs:
        dtype: np.dtype[np.void] = getattr(ring_abi, gen_abi.upper_snake(name))
        assert dtype.fields is not None
        assert sum(member[0].itemsize for member in dtype.fields.values()) == dtype.itemsize, name


def test_nvrtc_compiles_the_headers_with_their_assertions(tmp_path: Path) -> None:
    probe = tmp_path / "probe.cu"
    probe.write_text(
        "#include <program_abi.h>\n"
        'extern "C" __global__ void probe(blinkimp::EngineParams params, unsigned* out) { *out = params.num_ops; }\n'
    )
    cubin, (function,) = compile_cubin(probe)
    assert cubin.startswith(b"\x7fELF")
    assert function.name == "probe"
    probe.write_text("#include <program_abi.h>\nusing namespace blinkimp;\nABI_AT(EngineParams, kv_cache, 0);\n")
    with pytest.raises(CompileError, match="must be at 0"):
        compile_cubin(probe)


def test_names_in_python() -> None:
    assert ring_abi.COMPLETION_TOKEN == 2
    assert ring_abi.CompletionKind(2) is ring_abi.CompletionKind.TOKEN
    assert ring_abi.FinishReason(ring_abi.FINISH_STOP_ID) is ring_abi.FinishReason.STOP_ID
    assert ring_abi.QUEUE_PAIR_MAGIC.to_bytes(8, "little") == b"BLNKQP01"
    assert ring_abi.DType(ring_abi.BF16) is ring_abi.DType.BF16


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("struct A {\n u32 a;\n u64 b;\n};", "4 bytes of implicit padding"),
        ("struct A {\n u64 a;\n u32 b;\n};", "implicit padding at its end"),
        ("struct A {\n u32 a;\n};\nABI_SIZE(A, 8);", "ABI_SIZE says 8"),
        ("struct A {\n u32 a;\n u32 b;\n};\nABI_AT(A, b, 8);", "ABI_AT says 8"),
        ("struct A {\n long a;\n};", "unknown type long"),
        ("struct A {\n u32* a;\n};", "cannot read 'u32\\* a'"),
        ("constexpr u32 kA = kUnknown;", "cannot evaluate"),
        ("inline int f() { return 1; }", "cannot read"),
    ],
)
def test_generator_refuses_what_it_does_not_understand(tmp_path: Path, text: str, complaint: str) -> None:
    header = tmp_path / "bad.h"
    header.write_text(text)
    with pytest.raises(gen_abi.AbiError, match=complaint):
        gen_abi.parse((header,))
