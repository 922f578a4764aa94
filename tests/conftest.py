"""Before any test: an environment without the settings of whoever runs them, an up-to-date native library, and hypothesis without deadlines
and chance. GPU tests are skipped, with the reason, where no GPU can be used.

The library is built from the tree under test (tools/build_native.py does nothing when it is current), unless
BLINKIMP_NATIVE_LIBRARY names another build. Run: pytest (everything but gpu), pytest -m gpu (on a GPU machine),
pytest --hypothesis-profile explore (examples of hypothesis that no run has tried yet).
"""

from __future__ import annotations

import importlib.util
import os
import warnings

import pytest

from tests.support import load_tool

build_error: str | None = None  # why the native library could not be built; tests that need it fail with this


# What the tests are run with; whatever else begins with BLINKIMP_ is a setting of whoever runs them.
OUR_VARIABLES = frozenset({"BLINKIMP_NATIVE_LIBRARY", "BLINKIMP_CACHE_DIR", "BLINKIMP_TEST_SEED"})
TERMINAL_VARIABLES = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")


def leave_settings_outside() -> None:
    """Programs that the tests start inherit the environment: their output is read as text, and their servers are this machine's."""
    for name in [*TERMINAL_VARIABLES, *(key for key in os.environ if key.startswith("BLINKIMP_"))]:
        if name not in OUR_VARIABLES:
            os.environ.pop(name, None)
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"


def pytest_configure() -> None:
    global build_error
    leave_settings_outside()
    if importlib.util.find_spec("hypothesis"):  # a GPU machine may lack it; no test there needs it
        from hypothesis import HealthCheck, settings

        # How long an example takes, or takes to draw, is the machine's business. Each run takes the same examples: a new one that fails
        # is found by who looks for it, not by who runs the tests of an unchanged tree.
        checks = [HealthCheck.too_slow]
        settings.register_profile("any-machine", deadline=None, suppress_health_check=checks, derandomize=True)
        settings.register_profile("explore", deadline=None, suppress_health_check=checks, derandomize=False)
        settings.load_profile("any-machine")
    if os.environ.get("BLINKIMP_NATIVE_LIBRARY"):
        return
    build_native = load_tool("build_native")
    try:
        build_native.build()
    except build_native.BuildError as error:
        build_error = str(error)


def pytest_report_header() -> str | None:
    return f"native library NOT built: {build_error}" if build_error else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Otherwise a library left from an older build would be tested in place of the broken sources.
    if build_error and item.path.parent.name in ("host", "gpu"):
        pytest.fail(f"the native library could not be built: {build_error}", pytrace=False)


def gpu_missing_reason() -> str | None:
    """Why GPU tests cannot run here, or None when they can."""
    try:
        from cuda.bindings import driver

        (error,) = driver.cuInit(0)
        if error != driver.CUresult.CUDA_SUCCESS:
            return f"no usable CUDA GPU: cuInit returned {error.name}"
        error, num_devices = driver.cuDeviceGetCount()
    except Exception as error:  # cuda.bindings raises RuntimeError or a subclass of it when libcuda.so is missing
        return f"no usable CUDA GPU: {type(error).__name__}: {error}"
    return None if num_devices else "no usable CUDA GPU: the driver reports 0 devices"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if item.path.parent.name == "gpu"]
    if not gpu_items:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = gpu_missing_reason()
    for item in gpu_items:
        item.add_marker(pytest.mark.gpu)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
