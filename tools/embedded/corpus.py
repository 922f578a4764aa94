"""The training text: Python source files of a standard library, cleaned, without duplicates, split by file.

Who calls it: tools/train_embedded.py. Test: pytest tests/null/test_train_embedded.py

The text is taken as it is (code, comments, docstrings, the library's own tests). Left out: installed packages, what is
not UTF-8, tables of data written as code, and files that mostly repeat an earlier one (they would leak between the
splits).
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import sysconfig
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

LICENCE = "Python Software Foundation License Version 2 (PSF-2.0)"
MANIFEST_NAME = "CORPUS.json"

EXCLUDED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "data", "encoded_modules"})
# Tables and dumps under names that the measures below would pass.
EXCLUDED_FILES = frozenset({"pydoc_data/topics.py", "html/entities.py", "keyword.py", "stringprep.py"})
MIN_FILE_BYTES = 200
MAX_FILE_BYTES = 320_000
MAX_MEAN_LINE_CHARS = 72.0
MAX_NON_ASCII_FRACTION = 0.05
MIN_LETTER_FRACTION = 0.55  # of the characters that are not white space; code is near 0.75, tables of numbers near 0.3
MAX_ESCAPE_FRACTION = 0.02  # characters that start a \x.. or \u.... escape or a 0x.. number
DUPLICATE_LINES = 6  # a run of this many lines, seen before, counts as repeated
MAX_REPEATED_FRACTION = 0.5

HELD_OUT_FRACTION = 0.05  # reported once, at the end
VALIDATION_FRACTION = 0.025  # chooses the checkpoint

_ESCAPE = re.compile(r"\\x[0-9a-fA-F]{2}|\\[uU][0-9a-fA-F]{4}|\b0x[0-9a-fA-F]+")


@dataclass(frozen=True)
class SourceFile:
    path: str  # relative to the corpus, with forward slashes
    text: str

    @property
    def num_bytes(self) -> int:
        return len(self.text.encode())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def is_test(self) -> bool:
        parts = PurePosixPath(self.path).parts
        return "test" in parts or "tests" in parts or "idle_test" in parts


@dataclass(frozen=True)
class Corpus:
    name: str
    python_version: str
    licence: str
    files: list[SourceFile]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


def data_reason(path: str, text: str) -> str | None:
    """Why this file is no running text of code, or None when it is."""
    if path in EXCLUDED_FILES:
        return "listed as data"
    if not MIN_FILE_BYTES <= len(text.encode()) <= MAX_FILE_BYTES:
        return "size"
    solid = [c for c in text if not c.isspace()]
    if not solid:
        return "blank"
    if len(text) / (text.count("\n") + 1) > MAX_MEAN_LINE_CHARS:
        return "long lines"
    if sum(ord(c) > 127 for c in solid) > MAX_NON_ASCII_FRACTION * len(solid):
        return "not ASCII"
    if sum(c.isalpha() or c == "_" for c in solid) < MIN_LETTER_FRACTION * len(solid):
        return "few letters"
    if len(_ESCAPE.findall(text)) > MAX_ESCAPE_FRACTION * len(solid):
        return "escapes"
    return None


def drop_repeats(files: list[SourceFile]) -> list[SourceFile]:
    """Files in path order, without those of which more than half the lines stand in runs seen in earlier files."""
    seen: set[int] = set()
    kept = []
    for file in sorted(files, key=lambda f: f.path):
        lines = [line.strip() for line in file.text.splitlines() if line.strip()]
        runs = {hash(tuple(lines[i : i + DUPLICATE_LINES])) for i in range(max(1, len(lines) - DUPLICATE_LINES + 1))}
        if len(runs & seen) > MAX_REPEATED_FRACTION * len(runs):
            continue
        seen |= runs
        kept.append(file)
    return kept


def _clean(raw: Iterator[tuple[str, bytes]]) -> list[SourceFile]:
    files = []
    for path, content in raw:
        if EXCLUDED_FOLDERS & set(PurePosixPath(path).parts):
            continue
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            continue
        text = text.replace("\r\n", "\n")
        if "\0" not in text and data_reason(path, text) is None:
            files.append(SourceFile(path, text))
    return drop_repeats(files)


def _folder_files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if path.is_file() and not EXCLUDED_FOLDERS & set(relative.parts):
            yield relative.as_posix(), path.read_bytes()


def read_corpus(source: Path | None) -> Corpus:
    """source: a folder of .py files, an archive from pack_corpus, or None for the running interpreter's library."""
    if source is not None and source.is_file():
        with tarfile.open(source, "r:gz") as archive:
            members = {m.name: m for m in archive.getmembers() if m.isfile()}
            if MANIFEST_NAME not in members:
                raise ValueError(f"{source} holds no {MANIFEST_NAME}; write the archive with --pack-corpus")
            contents = {name: archive.extractfile(m).read() for name, m in members.items()}  # type: ignore[union-attr]
        manifest = json.loads(contents.pop(MANIFEST_NAME))
        files = _clean(iter(sorted(contents.items())))
        corpus = Corpus(manifest["name"], manifest["python_version"], manifest["licence"], files)
    else:
        folder = source or Path(sysconfig.get_path("stdlib"))
        if not folder.is_dir():
            raise FileNotFoundError(f"the corpus {folder} is neither a folder nor an archive; give --corpus PATH")
        version = platform.python_version() if source is None else "unknown"
        name = f"Python {version} standard library" if source is None else folder.name
        licence = LICENCE if source is None else "as the given folder"
        corpus = Corpus(name, version, licence, _clean(_folder_files(folder)))
    if len(corpus.files) < 20:
        raise ValueError(
            f"the corpus {source or 'of the running interpreter'} has {len(corpus.files)} usable .py files, expected at"
            " least 20; give --corpus with a standard library's folder or an archive of one"
        )
    return corpus


def pack_corpus(corpus: Corpus, path: Path) -> None:
    """Writes the cleaned files to a .tar.gz that read_corpus takes, so that another machine trains on the same text."""
    manifest = {"name": corpus.name, "python_version": corpus.python_version, "licence": corpus.licence}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        entries = [(MANIFEST_NAME, json.dumps(manifest).encode())]
        entries += [(file.path, file.text.encode()) for file in corpus.files]
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def split_files(files: list[SourceFile], seed: int) -> dict[str, list[SourceFile]]:
    """train, validation and held_out, by a hash of seed and path: a file's place does not depend on the other files."""
    splits: dict[str, list[SourceFile]] = {"train": [], "validation": [], "held_out": []}
    ordered = sorted(files, key=lambda f: hashlib.sha256(f"{seed}:{f.path}".encode()).digest())
    for file in ordered:
        digest = hashlib.sha256(f"{seed}:{file.path}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2.0**64
        if place < HELD_OUT_FRACTION:
            splits["held_out"].append(file)
        elif place < HELD_OUT_FRACTION + VALIDATION_FRACTION:
            splits["validation"].append(file)
        else:
            splits["train"].append(file)
    for name, members in splits.items():
        if not members:
            raise ValueError(f"the split left no file for {name} out of {len(files)}; give a larger corpus")
    return splits
