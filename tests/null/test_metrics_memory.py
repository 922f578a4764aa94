"""The metrics' shared memory: slots of their own, a header that both sides must agree on, bounds as vLLM has them.

Run: pytest tests/null/test_metrics_memory.py
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from blinkimp.host import metrics_memory as mm
from blinkimp.host import shared_memory as shm

ABOUT = mm.new_about("a model", "emulated", max_batch=8, max_step_tokens=64, max_context=300, has_prefix_cache=True)


@pytest.fixture
def regions() -> Iterator[shm.EngineRegions]:
    made = shm.create_engine_regions(
        f"test-{os.getpid()}-{secrets.token_hex(3)}",
        num_queue_pairs=3, geometry=shm.QueuePairGeometry(2, 2, 4096), max_context=300, vocab_size=7, about=ABOUT,
    )  # fmt: skip
    yield made
    made.unlink()


def test_slots_are_apart_and_zero_at_first(regions: shm.EngineRegions) -> None:
    name = regions.engine_name
    with shm.open_metrics(name, writable=True) as region, shm.open_metrics(name) as reader:
        assert all(value == 0.0 for slot in mm.slots(reader) for value in slot)
        for idx, slot in enumerate(mm.slots(region)):
            assert len(slot) == mm.NUM_WORDS
            slot[0], slot[mm.NUM_WORDS - 1] = float(idx), idx + 0.5
        assert [(slot[0], slot[mm.NUM_WORDS - 1]) for slot in mm.slots(reader)] == [(0, 0.5), (1, 1.5), (2, 2.5)]
        with pytest.raises(TypeError, match="read-only"):
            mm.slots(reader)[0][0] = 1.0


def test_the_header_says_what_the_engine_is(regions: shm.EngineRegions) -> None:
    with shm.open_metrics(regions.engine_name) as region:
        assert mm.about(region) == ABOUT
        assert mm.header_words(region)["engine_id"] == regions.engine_id


def test_a_model_name_of_any_length_fits() -> None:
    header = mm.MetricsGeometry(1).header(5, mm.About(model_name="/far/away" * 1000))
    assert len(header) == mm.HEADER_BYTES


@pytest.mark.parametrize(("offset_bytes", "named"), [(0, "magic"), (8, "layout"), (24, "region size")])
def test_a_region_of_another_version_is_refused(regions: shm.EngineRegions, offset_bytes: int, named: str) -> None:
    with shm.open_metrics(regions.engine_name, writable=True) as region:
        region.buffer[offset_bytes] ^= 0xFF
    with pytest.raises(shm.SharedMemoryError, match=named):
        shm.open_metrics(regions.engine_name)


def test_an_engine_leaves_nothing_behind(regions: shm.EngineRegions) -> None:
    regions.unlink()
    assert not list(shm.SHM_DIR.glob(f"blinkimp.{regions.engine_name}.*"))
    with pytest.raises(shm.EngineNotFoundError):
        shm.open_metrics(regions.engine_name)


def test_no_two_words_share_an_index() -> None:
    names = list(mm._word_names())
    assert len(names) == len(set(names)) <= mm.NUM_WORDS
    assert [mm.word(name) for name in names] == list(range(len(names)))


def test_bounds_grow_and_fit_the_slot() -> None:
    for name in mm.HISTOGRAMS:
        for max_context in (0, 1, 4096, 1 << 40):
            bounds = mm.bounds_of(name, max_context)
            assert 0 < len(bounds) <= mm.MAX_BOUNDS
            assert list(bounds) == sorted(set(bounds))


def test_length_bounds_end_at_the_context() -> None:
    assert mm.length_bounds(300) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert mm.length_bounds(500)[-1] == 500
