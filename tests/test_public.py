"""What is public changes only on purpose: CONTRIBUTING.md, "Deprecation"."""

from __future__ import annotations

from tests.public import SNAPSHOT, surface


def test_public_names_are_those_of_the_snapshot():
    then, now = SNAPSHOT.read_text(encoding="utf-8").splitlines(), surface().splitlines()
    gone, come = sorted(set(then) - set(now)), sorted(set(now) - set(then))
    assert not gone, "no longer public; keep the old names for one release (CONTRIBUTING.md, Deprecation)"
    assert not come, "new; write the snapshot again: python -m tests.public"
