#!/usr/bin/env python3
"""Writes blinkimp/ring_abi.py from device/ring_abi.h, program_abi.h and trace_abi.h, so that the layout is stated once.

The headers are data only: constants, enums and plain structs. This reads exactly that subset and refuses anything else, computes
offsets with C's rules, and checks them against the headers' own ABI_SIZE and ABI_AT lines.

Called by: a person after an edit of a header (`python tools/gen_abi.py`).
Test: pytest tests/compile/test_ring_abi.py (regenerates and compares; g++ and NVRTC compile the headers; offsets from g++)
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import operator
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADERS = tuple(ROOT / "device" / name for name in ("ring_abi.h", "program_abi.h", "trace_abi.h"))
OUTPUT = ROOT / "blinkimp" / "ring_abi.py"

# C name -> (numpy format, bytes). Alignment equals size for each of them on every platform that is supported.
SCALARS = {
    "u8": ("u1", 1),
    "u16": ("<u2", 2),
    "u32": ("<u4", 4),
    "u64": ("<u8", 8),
    "i32": ("<i4", 4),
    "f32": ("<f4", 4),
}

OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.LShift: operator.lshift,
    ast.BitOr: operator.or_,
}


class AbiError(Exception):
    """A header holds something that this generator does not understand, or a layout that disagrees with its own assertions."""


@dataclasses.dataclass
class Member:
    name: str
    type_name: str
    num_elements: int | None  # None: not an array
    offset: int = 0


@dataclasses.dataclass
class Struct:
    name: str
    members: list[Member]
    size_bytes: int = 0
    align_bytes: int = 1


@dataclasses.dataclass
class Abi:
    constants: dict[str, int] = dataclasses.field(default_factory=dict)
    constant_groups: list[tuple[str, list[str]]] = dataclasses.field(
        default_factory=list
    )  # (header name, constant names)
    enums: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    structs: dict[str, Struct] = dataclasses.field(default_factory=dict)


def camel_words(name: str) -> list[str]:
    """kMaxQueuePairs -> [Max, Queue, Pairs]; kBF16 -> [BF16]; QueuePair -> [Queue, Pair]."""
    stem = name[1:] if re.match(r"k[A-Z]", name) else name
    return re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", re.sub(r"([A-Z])([A-Z][a-z])", r"\1 \2", stem)).split()


def upper_snake(name: str) -> str:
    return "_".join(camel_words(name)).upper()


def evaluate(text: str, known: dict[str, int]) -> int:
    """The value of a constant integer expression over known names."""
    python_text = re.sub(r"\b(0x[0-9a-fA-F]+|\d+)[uUlL]+\b", r"\1", text.replace("'", "")).replace("/", "//")

    def visit(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(value)):
                return value
            case ast.Name(id=name) if name in known:
                return known[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](visit(left), visit(right))
        raise AbiError(f"cannot evaluate {text!r}: expected integers, earlier constants and + - * / << |")

    return visit(ast.parse(python_text.strip(), mode="eval").body)


def layout(struct: Struct, structs: dict[str, Struct]) -> None:
    """C's rules: each member at the next multiple of its alignment, the whole padded to the largest alignment."""
    position = 0
    for member in struct.members:
        if member.type_name in SCALARS:
            element_bytes = align_bytes = SCALARS[member.type_name][1]
        elif member.type_name in structs:
            element_bytes, align_bytes = structs[member.type_name].size_bytes, structs[member.type_name].align_bytes
        else:
            raise AbiError(
                f"{struct.name}.{member.name}: unknown type {member.type_name}; expected {', '.join(SCALARS)} or a struct"
            )
        member.offset = -(-position // align_bytes) * align_bytes
        if member.offset != position:
            raise AbiError(
                f"{struct.name}.{member.name}: {member.offset - position} bytes of implicit padding; make it explicit"
            )
        position = member.offset + element_bytes * (1 if member.num_elements is None else member.num_elements)
        struct.align_bytes = max(struct.align_bytes, align_bytes)
    struct.size_bytes = -(-position // struct.align_bytes) * struct.align_bytes
    if struct.size_bytes != position:
        raise AbiError(
            f"{struct.name}: {struct.size_bytes - position} bytes of implicit padding at its end; make it explicit"
        )


TOKEN = re.compile(
    r"""\s*(?:
      (?P<constant>constexpr\s+\w+\s+(?P<cname>k\w+)\s*=\s*(?P<cvalue>[^;]+);)
    | (?P<enum>enum\s+(?P<ename>\w+)\s*:\s*u32\s*\{(?P<ebody>[^}]*)\};)
    | (?P<struct>struct\s+(?P<sname>\w+)\s*\{(?P<sbody>[^}]*)\};)
    | ABI_SIZE\((?P<size_type>\w+),\s*(?P<size>\d+)\);
    | ABI_AT\((?P<at_type>\w+),\s*(?P<at_member>\w+),\s*(?P<at>\d+)\);
    | (?P<skip>using\s+\w+\s*=[^;]+;|namespace\s+blinkimp\s*\{|\}|$)
    )""",
    re.VERBOSE,
)


def parse_struct(name: str, body: str, known: dict[str, int]) -> Struct:
    members = []
    for declaration in filter(None, (part.strip() for part in body.split(";"))):
        found = re.fullmatch(r"(\w+)\s+(\w+)(?:\[([^\]]+)\])?", declaration)
        if not found:
            raise AbiError(f"struct {name}: cannot read {declaration!r}; expected `type name` or `type name[count]`")
        type_name, member_name, count = found.groups()
        members.append(Member(member_name, type_name, None if count is None else evaluate(count, known)))
    return Struct(name, members)


def check_assertion(abi: Abi, item: re.Match[str]) -> None:
    if item["size_type"]:
        size_bytes = abi.structs[item["size_type"]].size_bytes
        if size_bytes != int(item["size"]):
            raise AbiError(f"{item['size_type']}: computed {size_bytes} bytes, ABI_SIZE says {item['size']}")
    elif item["at_type"]:
        offsets = {member.name: member.offset for member in abi.structs[item["at_type"]].members}
        if offsets.get(item["at_member"]) != int(item["at"]):
            raise AbiError(
                f"{item['at_type']}.{item['at_member']}: computed {offsets.get(item['at_member'])}, ABI_AT says {item['at']}"
            )


def parse(headers: tuple[Path, ...] = HEADERS) -> Abi:
    abi = Abi()
    for header in headers:
        text = re.sub(r"//[^\n]*", "", header.read_text())
        text = re.sub(r"^\s*#[^\n]*$", "", text, flags=re.MULTILINE)
        names: list[str] = []
        position = 0
        while position < len(text.rstrip()):
            item = TOKEN.match(text, position)
            if item is None:
                raise AbiError(
                    f"{header.name}: cannot read {text[position : position + 80].strip()!r}; see the head of tools/gen_abi.py"
                )
            position = item.end()
            if item["constant"]:
                abi.constants[item["cname"]] = evaluate(item["cvalue"], abi.constants)
                names.append(item["cname"])
            elif item["enum"]:
                members = dict(re.findall(r"(k\w+)\s*=\s*([^,\s]+)", item["ebody"]))
                abi.enums[item["ename"]] = {key: evaluate(value, abi.constants) for key, value in members.items()}
            elif item["struct"]:
                struct = parse_struct(item["sname"], item["sbody"], abi.constants)
                layout(struct, abi.structs)
                abi.structs[struct.name] = struct
            else:
                check_assertion(abi, item)
        abi.constant_groups.append((header.name, names))
    return abi


def member_names(enum_name: str, members: dict[str, int]) -> dict[str, str]:
    """{kCompletionAck: ACK, ...}: the words that all members share (a lone member: that it shares with the enum) are dropped."""
    words = [camel_words(member) for member in members]
    others = [camel_words(enum_name)] if len(words) == 1 else words
    num_shared = 0
    while all(
        len(other) > num_shared and other[num_shared] == words[0][num_shared] for other in [*others, *words]
    ) and all(len(word) > num_shared + 1 for word in words):
        num_shared += 1
    return {member: "_".join(word[num_shared:]).upper() for member, word in zip(members, words, strict=True)}


def literal(name: str, value: int) -> str:
    return f"0x{value:X}" if "Mask" in name or "Magic" in name or value == 0xFFFFFFFF else str(value)


def render(abi: Abi) -> str:
    lines = [
        '"""The ABI in Python: constants, enums and numpy dtypes of the queue pair, the engine page, the model program and the trace.',
        "",
        "Generated by tools/gen_abi.py from device/{ring_abi,program_abi,trace_abi}.h. Do not edit: edit the headers and run it again.",
        "Meaning, units and owners of each member stand in the headers. Used by host/, nic_shim/ and the tests.",
        "Test: pytest tests/compile/test_ring_abi.py",
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "import enum",
        "from typing import Any, Final",
        "",
        "import numpy as np",
        "",
        "",
        "def _struct(size_bytes: int, members: dict[str, tuple[Any, int]]) -> np.dtype[np.void]:",
        '    """A dtype of {name: (format, offset)}; offsets are the C compiler\'s."""',
        "    formats = [member_format for member_format, _ in members.values()]",
        "    offsets = [offset for _, offset in members.values()]",
        '    return np.dtype({"names": list(members), "formats": formats, "offsets": offsets, "itemsize": size_bytes})',
    ]
    taken: set[str] = set()

    def declare(name: str) -> str:
        if name in taken:
            raise AbiError(f"two declarations become {name} in Python; rename one of them")
        taken.add(name)
        return name

    lines.append("")
    for header_name, names in abi.constant_groups:
        lines += ["", f"# ---- Constants of {header_name}"]
        lines += [f"{declare(upper_snake(name))}: Final = {literal(name, abi.constants[name])}" for name in names]
    for enum_name, members in abi.enums.items():
        lines += ["", f"# ---- {enum_name}"]
        lines += [f"{declare(upper_snake(name))}: Final = {value}" for name, value in members.items()]
        base = "IntFlag" if enum_name.endswith("Flags") else "IntEnum"
        lines += ["", "", f"class {declare(enum_name)}(enum.{base}):"]
        lines += [f"    {short} = {upper_snake(name)}" for name, short in member_names(enum_name, members).items()]
        lines.append("")
    lines += ["", "# ---- Structs"]
    for struct in abi.structs.values():
        lines.append(f"{declare(upper_snake(struct.name))}: Final = _struct(")
        lines += [f"    {struct.size_bytes},", "    {"]
        for member in struct.members:
            scalar = SCALARS.get(member.type_name)
            element = f'"{scalar[0]}"' if scalar else upper_snake(member.type_name)
            text = element if member.num_elements is None else f"({element}, ({member.num_elements},))"
            lines.append(f'        "{member.name}": ({text}, {member.offset}),')
        lines += ["    },", ")"]
    return "\n".join(lines) + "\n"


def main() -> int:
    arguments = argparse.ArgumentParser(description="Writes blinkimp/ring_abi.py from the ABI headers under device/.")
    arguments.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 when the committed file is out of date"
    )
    check = arguments.parse_args().check
    text = render(parse())
    if OUTPUT.exists() and OUTPUT.read_text() == text:
        return 0
    if check:
        print(f"{OUTPUT} differs from what the headers say; run: python tools/gen_abi.py", file=sys.stderr)
        return 1
    OUTPUT.write_text(text)
    print(f"wrote {OUTPUT.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
