"""Pages: files of the rows of earlier steps, which the manifest names by their digests (spec/CHAIN.md, 2.1).

So publishing a step writes the rows of the newest ones only, however many there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

from shiradelta.chain.fields import fields, parsed, sequence
from shiradelta.chain.rows import Page, Step, in_order, parse_step
from shiradelta.chain.stores import Store
from shiradelta.errors import ChainError
from shiradelta.util.regular_file import open_regular

#: The most bytes of a page that are read.
LARGEST_PAGE = 64 << 20
#: Steps of a page that is written, and the newest steps that stay in the manifest.
PAGE_STEPS, NEWEST = 128, 32


class Pages:
    """The pages of a chain; each is read once.

    Args:
        store: where they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._read: dict[str, tuple[Step, ...]] = {}

    @property
    def name(self) -> str:
        """What to call the chain in messages."""
        return self._store.name

    def steps(self, pages: Iterable[Page]) -> list[Step]:
        """The steps of some pages.

        Raises:
            ChainError: a page is missing, damaged, or was not made to the format.
        """
        found: list[Step] = []
        for page in pages:
            if page.sha256 not in self._read:
                self._read[page.sha256] = self._parsed(page)
            found += self._read[page.sha256]
        return found

    def _parsed(self, page: Page) -> tuple[Step, ...]:
        where = f"{self.name}/{page.path}"
        try:
            if page.bytes > LARGEST_PAGE:
                raise ValueError(f"it has more than {LARGEST_PAGE >> 20} MiB")
            with open_regular(self._store.fetched(page.path, page.bytes, page.sha256)) as stream:
                (rows,) = fields(parsed(stream.read(LARGEST_PAGE)), {"steps": sequence})
            steps = tuple(map(parse_step, rows))
            if not steps or not in_order(steps) or (steps[0].start, steps[-1].start) != (page.first, page.last):
                raise ValueError("its steps are not those that the manifest says")
        except (ValueError, RecursionError) as error:
            raise ChainError("bad_manifest", where, str(error)[:200] or type(error).__name__) from None
        return steps

    def filled(self, pages: Sequence[Page], steps: Sequence[Step]) -> tuple[tuple[Page, ...], tuple[Step, ...]]:
        """Writes pages of the first steps where there are many; (all pages, the steps that the manifest lists).

        Args:
            pages: what is there.
            steps: the steps that are in none of them, in order.
        """
        found, at = list(pages), 0
        while len(steps) - at >= PAGE_STEPS + NEWEST:
            found.append(self._put(tuple(steps[at : at + PAGE_STEPS])))
            at += PAGE_STEPS
        return tuple(sorted(found, key=page_key)), tuple(steps[at:])

    def _put(self, steps: tuple[Step, ...]) -> Page:
        raw = json.dumps({"steps": [vars(step) for step in steps]}, separators=(",", ":")).encode()
        page = Page(steps[0].start, steps[-1].start, len(raw), hashlib.sha256(raw).hexdigest())
        with self._store.writing(page.path) as stream:
            stream.write(raw)
        self._read[page.sha256] = steps
        return page


def page_key(page: Page) -> tuple[int, int, str]:
    """Sorts pages."""
    return page.first, page.last, page.sha256
