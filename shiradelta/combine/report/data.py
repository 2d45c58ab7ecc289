"""The data of a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shiradelta.combine.interference import Interference
from shiradelta.combine.report.profiles import DeltaProfile
from shiradelta.combine.report.verdict import verdict


@dataclass(frozen=True)
class DeltaReport:
    """Report of `report`: profiles and interference.

    Attributes:
        adapters: the profile of each delta.
        interference: how much each pair of deltas overlaps.
    """

    adapters: tuple[DeltaProfile, ...]
    interference: Interference

    def verdicts(self) -> dict[tuple[int, int], str]:
        """Pair -> a sentence on what to expect from using both."""
        labels = self.interference.labels
        return {
            (i, j): verdict(labels[i], labels[j], self.interference.total((i, j))) for i, j in self.interference.pairs
        }

    def as_dict(self) -> dict[str, Any]:
        """All data, as JSON shows it."""
        found, labels = self.interference, self.interference.labels
        pairs = [
            {
                "deltas": [labels[i], labels[j]],
                "verdict": sentence,
                "total": found.total((i, j)).as_dict(),
                "layers": {layer: meeting.as_dict() for layer, meeting in found.layers((i, j)).items()},
                "tensors": {name: meeting.as_dict() for name, meeting in found.pairs[i, j].items()},
            }
            for (i, j), sentence in self.verdicts().items()
        ]
        return {
            "deltas": [adapter.as_dict() for adapter in self.adapters],
            "pairs": pairs,
            "warnings": list(found.warnings),
        }
