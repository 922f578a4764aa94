"""What pyproject.toml cannot say: the native library, and symbolic links kept as links in the source distribution.

Test: python tools/check_packaging.py
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent

# One tree under three names; see README, "Directories". Link -> target, relative to the link.
LINKS = {
    "tools/editable/blinkimp": "../../blinkimp",
    "blinkimp/device": "../device",
    "blinkimp/host": "../host",
    "blinkimp/nic_shim": "../nic_shim",
}


def load_build_native() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "tools" / "build_native.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildNative(build_ext):
    """Builds blinkimp/_native.so. It is loaded with ctypes, so it has no Python ABI in its name or tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        build_native = load_build_native()
        # In editable mode setuptools copies from build_lib to the source tree afterwards.
        output = ROOT / self.build_lib / self.get_ext_filename(ext.name)
        try:
            build_native.build(output)
        except build_native.BuildError as error:
            # The package still installs: a client needs no native library, and blinkimp.native says the same when it is asked for.
            print(
                f"\nWARNING: blinkimp is installed WITHOUT its native library; serving will not work.\n{error}\n",
                file=sys.stderr,
            )

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            if (ROOT / self.build_lib / self.get_ext_filename(extension.name)).exists():
                super().copy_extensions_to_source()


class PlainWheel(bdist_wheel):
    """py3-none-linux_x86_64: any Python 3, this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class LinkedSdist(sdist):
    """The source distribution is the repository's tree: links stay links instead of becoming copies."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        behind_link = tuple(f"{link}/" for link in LINKS)
        super().make_release_tree(base_dir, [name for name in files if not name.startswith(behind_link)])
        for link, target in LINKS.items():
            path = Path(base_dir, link)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)


setup(
    ext_modules=[Extension("blinkimp._native", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlainWheel, "sdist": LinkedSdist},
)
