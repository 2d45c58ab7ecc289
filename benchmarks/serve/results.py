"""What was measured, as tables, as sentences and as a picture."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from shiradelta.util import plots
from shiradelta.util.text import table

#: A line of serve.csv; keys are its columns.
Row = dict[str, Any]
#: The engine a way belongs to -> the way with fused weights, and the unfused ones.
COMPARED = {
    "transformers": ("HotSwap, grouped", ("PEFT LoRA, mixed", "PEFT LoRA, grouped")),
    "vLLM": ("vLLM: HotSwap, grouped", ("vLLM: multi-LoRA, mixed",)),
}
_COLOURS = {"HotSwap": "tab:blue", "LoRA, mixed": "tab:orange", "LoRA, grouped": "tab:green", "no adapter": "tab:gray"}


def engine_of(row: Row) -> str:
    """What served the requests: a key of `COMPARED`."""
    return "vLLM" if row["way"].startswith("vLLM") else "transformers"


def read(path: Path) -> list[Row]:
    """The rows of a serve.csv, numbers as such; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as stream:
        return [{key: _number(text) for key, text in row.items()} for row in csv.DictReader(stream)]


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def table_of(rows: list[Row], adapters: int) -> str:
    """All ways with so many adapters; one with the most tokens a second among those of its engine is marked."""
    chosen = [row for row in rows if row["adapters"] == adapters]
    lines = [["way", "changes every", "tokens/s", "latency, median", "95 %", "switches", "ms a switch", ""]]
    for row in chosen:
        each = 1000 * row["switching"] / row["switches"] if row["switches"] else 0.0
        late = [f"{row[key]:.2f} s" for key in ("median_latency", "latency_95")]
        best = row in _fastest(chosen, row["every"])
        switches = [str(row["switches"]), f"{each:.1f}"] if row["switches"] else ["-", "-"]
        speed = f"{row['tokens_a_second']:.1f}"
        lines.append([row["way"], _every(row), speed, *late, *switches, "fastest" if best else ""])
    one = chosen[0]
    title = f"{adapters} adapters; {one['model']}, {one['dtype']}, {one['device']}, {one['threads']} threads,"
    title += f" {one['clock']} clock; {one['count']} requests in windows of {one['window']}, batches of {one['batch']},"
    title += f" {one['prompt']} + {one['answer']} tokens; {one['machine']}; {one['date']}, {one['commit']}"
    return f"\n{title}, seed {one['seed']}\n\n{table(lines, left=2)}"


def _every(row: Row) -> str:
    return "never" if row["every"] >= row["count"] else str(row["every"])


def _fastest(rows: list[Row], every: int) -> list[Row]:
    """One of each engine."""
    found = []
    for fused, unfused in COMPARED.values():
        some = [row for row in rows if row["every"] == every and row["way"] in (fused, *unfused)]
        if some:
            found.append(max(some, key=lambda row: float(row["tokens_a_second"])))
    return found


def verdicts(rows: list[Row]) -> list[str]:
    """Where multi-LoRA is ahead, and where HotSwap is, in tokens a second, for each engine and number of adapters."""
    said = []
    for adapters in dict.fromkeys(row["adapters"] for row in rows):
        some = [row for row in rows if row["adapters"] == adapters]
        for engine, (fused, unfused) in COMPARED.items():
            speed = {(row["way"], row["every"]): float(row["tokens_a_second"]) for row in some}
            ratios = {}
            for row in some:
                if row["way"] == fused:
                    ratios[_every(row)] = speed[fused, row["every"]] / max(speed[way, row["every"]] for way in unfused)
            if ratios:
                each = ", ".join(f"{every}: {ratio:.2f} x" for every, ratio in ratios.items())
                behind = [every for every, ratio in ratios.items() if ratio < 1]
                where = f"unfused LoRA is ahead where it changes every {', '.join(behind)}" if behind else "ahead of it"
                said.append(f"{engine}, {adapters} adapters: HotSwap against the best unfused LoRA: {each}; {where}")
    return said


def draw(rows: list[Row], path: Path) -> None:
    """Tokens a second and latencies against the number of requests between changes; a column for each count."""
    counts = list(dict.fromkeys(row["adapters"] for row in rows))
    figure = plots.new_figure(2 + 4 * len(counts), 7.5)
    panels = figure.subplots(2, len(counts), squeeze=False, sharey="row", width_ratios=[1, *[2] * (len(counts) - 1)])
    for column, count in enumerate(counts):
        some = [row for row in rows if row["adapters"] == count]
        speed, late = panels[0][column], panels[1][column]
        for way in dict.fromkeys(row["way"] for row in some):
            own = [row for row in some if row["way"] == way]
            colour = next(colour for part, colour in _COLOURS.items() if part in way)
            style = {"color": colour, "marker": "s" if engine_of(own[0]) == "vLLM" else "o", "markersize": 4}
            style["linestyle"] = "--" if engine_of(own[0]) == "vLLM" else "-"
            x = [_every(row) for row in own]
            speed.plot(x, [row["tokens_a_second"] for row in own], label=way, **style)
            late.plot(x, [row["median_latency"] for row in own], **style)
            late.plot(x, [row["latency_95"] for row in own], **{**style, "linestyle": ":", "marker": "^"})
        speed.set(title=f"{count} adapters" if count > 1 else "1 adapter")
        late.set(xlabel="requests until the adapter changes")
    panels[0][0].set(ylabel="tokens a second", ylim=(0, None))
    panels[1][0].set(
        ylabel=f"seconds until the answer ({rows[0]['clock']} clock):\nmedian, 95 % (dotted)", ylim=(0, None)
    )
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    several = {key: ", ".join(dict.fromkeys(str(row[key]) for row in rows)) for key in ("dtype", "commit", "date")}
    one = rows[0]
    what = f"{one['model']}, {several['dtype']}, {one['threads']} threads; {one['machine']}; {one['versions']}"
    figure.suptitle(f"{what}\n{several['date']}, commit {several['commit']}, seed {one['seed']}", fontsize=8)
    plots.save(figure, path)
