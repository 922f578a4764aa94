#!/usr/bin/env python3
"""Prints the lines of code per folder, and how they changed since the previous commit, so that growth is seen.

Called by: .ci/run. Standard library only; outside a git repository it counts the files it finds.
Test: pytest tests/null/test_lint.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("blinkimp", "device", "host", "nic_shim", "tests", "tools")
SUFFIXES = (".py", ".h", ".cuh", ".cu", ".cpp")


def source_files() -> list[Path]:
    """Each source file once: the links between the folders are not followed."""
    files = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            inside_link = any(
                parent.is_symlink() for parent in path.parents if parent != ROOT and ROOT in parent.parents
            )
            if path.suffix in SUFFIXES and path.is_file() and not inside_link and "build" not in path.parts:
                files.append(path)
    return files


def changed_lines() -> Counter[str]:
    """Folder -> lines added minus lines removed by the last commit; empty where git cannot say (a shallow clone, an sdist)."""
    result = subprocess.run(
        ["git", "-C", str(ROOT), "diff", "--numstat", "HEAD~1", "HEAD"], check=False, capture_output=True, text=True
    )
    changes: Counter[str] = Counter()
    for line in result.stdout.splitlines() if result.returncode == 0 else []:
        added, removed, name = line.split("\t")
        if name.endswith(SUFFIXES) and added != "-":
            changes[name.split("/")[0]] += int(added) - int(removed)
    return changes


def main() -> int:
    lines: Counter[str] = Counter()
    num_files: Counter[str] = Counter()
    for path in source_files():
        folder = path.relative_to(ROOT).parts[0]
        lines[folder] += len(path.read_text().splitlines())
        num_files[folder] += 1
    changes = changed_lines()
    print(f"{'folder':<10} {'files':>6} {'lines':>8} {'last commit':>12}")
    for folder in FOLDERS:
        print(f"{folder:<10} {num_files[folder]:>6} {lines[folder]:>8} {changes[folder]:>+12}")
    print(f"{'total':<10} {num_files.total():>6} {lines.total():>8} {changes.total():>+12}")
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
