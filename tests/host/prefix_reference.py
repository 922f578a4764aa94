"""Pages and the prefix cache as device/PREFIX_CACHE.md describes them: lists of Python objects, tokens compared as tuples, no hashes.

Part of director_reference.py, which test_director_stateful.py runs beside the real director. Shares no code with device/.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from blinkimp import ring_abi as abi

ROOT_IDENTITY = 1


@dataclass(eq=False)
class CachedPage:
    identity: int
    parent: int
    salt: int
    prefix: tuple[int, ...]  # all tokens up to its end
    num_holders: int = 1


class Holder(Protocol):
    """What the pages need to know of a request."""

    tokens: list[int]  # that are known
    cache_salt: int
    num_tokens: int
    pages: list[CachedPage | None]  # None: its own, unknown to the cache
    links: list[int]  # identities of the cached pages that its full pages equal, 0 = none


@dataclass(eq=False)
class Pages:
    num_free: int
    cached: list[CachedPage] = field(default_factory=list)  # held by requests or not
    lru: list[CachedPage] = field(default_factory=list)  # held by none, oldest first
    next_identity: int = ROOT_IDENTITY + 1

    @property
    def num_available(self) -> int:
        return self.num_free + len(self.lru)

    def take(self, job: Holder, count: int) -> None:
        for _ in range(count):
            if self.num_free == 0:
                oldest = self.lru.pop(0)
                self.cached.remove(oldest)
                self.num_free += 1
            self.num_free -= 1
            job.pages.append(None)

    def release(self, job: Holder) -> None:
        for page in reversed(job.pages):
            if page is None:
                self.num_free += 1
                continue
            page.num_holders -= 1
            if page.num_holders == 0:
                self.lru.append(page)
        job.pages = []

    def same(self, job: Holder, page_idx: int) -> CachedPage | None:
        """The page with these tokens and this salt that entered the cache last."""
        prefix = tuple(job.tokens[: (page_idx + 1) * abi.PAGE_TOKENS])
        found = [page for page in self.cached if page.prefix == prefix and page.salt == job.cache_salt]
        return max(found, key=lambda page: page.identity, default=None)

    def find(self, job: Holder) -> list[CachedPage]:
        """What a waiting request can start from; at least its last token is left to compute."""
        found: list[CachedPage] = []
        for page_idx in range((job.num_tokens - 1) // abi.PAGE_TOKENS):
            page = self.same(job, page_idx)
            if page is None or page.parent != (found[-1].identity if found else ROOT_IDENTITY):
                break
            found.append(page)
        return found

    def hold(self, job: Holder, found: list[CachedPage]) -> None:
        for page in found:
            if page.num_holders == 0:
                self.lru.remove(page)
            page.num_holders += 1
        job.pages = list(found)
        job.links = [page.identity for page in found]

    def register(self, job: Holder, page_idx: int) -> None:
        """The rows of this full page are planned."""
        assert len(job.links) == page_idx
        parent = job.links[-1] if job.links else ROOT_IDENTITY
        twin = self.same(job, page_idx)
        if twin is not None and parent != 0 and twin.parent == parent:
            job.links.append(twin.identity)
        elif parent == 0:
            job.links.append(0)
        else:
            prefix = tuple(job.tokens[: (page_idx + 1) * abi.PAGE_TOKENS])
            assert len(prefix) == (page_idx + 1) * abi.PAGE_TOKENS, "its tokens are known"
            assert job.pages[page_idx] is None
            page = CachedPage(self.next_identity, parent, job.cache_salt, prefix)
            self.next_identity += 1
            self.cached.append(page)
            job.pages[page_idx] = page
            job.links.append(page.identity)
