"""The report for a terminal."""

from __future__ import annotations

from shiradelta.combine.report.data import DeltaReport
from shiradelta.errors import printable
from shiradelta.util.text import percent, size, table


def summary(report: DeltaReport, width: int | None = None) -> str:
    """A table of the deltas, a table of the pairs, and the verdicts, for a terminal of so many columns."""
    rows = [["delta", "tensors", "nonzeros", "density", "size", "bits/nonzero"]]
    for adapter in report.adapters:
        about = adapter.about
        density, bits = percent(about["nnz"] / max(adapter.numel, 1)), f"{about['bits_per_nonzero']:.2f}"
        file_size = size(about["bytes"]["file"])
        rows.append([adapter.label, str(len(adapter.profiles)), f"{about['nnz']:,}", density, file_size, bits])
    parts = [table(rows, width=width)]
    found = report.interference
    if found.pairs:
        rows = [["pair", "shared", "of either", "by chance", "opposite", "cosine", "AWOM", "AWOR"]]
        for pair in found.pairs:
            m = found.total(pair)
            rows.append(
                [
                    found.title(pair),
                    f"{m.shared:,}",
                    " / ".join(map(percent, m.shares)),
                    f"{m.chance:,.0f}",
                    "-" if m.opposed_share is None else percent(m.opposed_share),
                    "-" if m.cosine is None else f"{m.cosine:z.3f}",
                    "-" if m.awom is None else f"{m.awom:.3g}",
                    "-" if m.awor is None else f"{m.awor:.3f}",
                ]
            )
        parts += [table(rows, width=width), "\n".join(map(printable, report.verdicts().values()))]
    return "\n\n".join(parts)
