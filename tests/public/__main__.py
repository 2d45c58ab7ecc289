"""`python -m tests.public` writes the snapshots of what is public."""

from __future__ import annotations

from tests.public import SNAPSHOTS

for path, lines in SNAPSHOTS.items():
    path.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
