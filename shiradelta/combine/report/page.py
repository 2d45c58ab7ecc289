"""The report as one HTML file without network access or scripts, for screens of all sizes, dark mode and print."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from shiradelta.combine.interference import Meeting
from shiradelta.combine.report.data import DeltaReport
from shiradelta.combine.report.markup import badge, bars, cell, letter, table, tabs, text
from shiradelta.combine.report.profiles import Axis, DeltaProfile, TensorProfile
from shiradelta.combine.report.verdict import advice
from shiradelta.format.operations import OPERATIONS
from shiradelta.models.names import layer_of
from shiradelta.util.files import replacing
from shiradelta.util.text import brief, percent, shape, size

#: The first bytes of the file.
START = b"<!doctype html>"


class Metric(NamedTuple):
    """One figure of the heat map.

    Attributes:
        title: the tab's title.
        value: the figure of an overlap.
        text: formats the figure for people.
        colour: maps the figure to a colour, from -1 to 1.
        help: what the figure means.
        relative: whether `colour` takes the figure as a share of the map's largest one, as it has no scale of its own.
    """

    title: str
    value: Callable[[Meeting], float | None]
    text: Callable[[float], str]
    colour: Callable[[float], float]
    help: str
    relative: bool = False


_AWOM = "The spectral norm of A<sub>1</sub><sup>T</sup>A<sub>2</sub>: the most that the two interact on any input."
_AWOR = "The share of elements of A<sub>1</sub><sup>T</sup>A<sub>2</sub> that are zero; the more, the more orthogonal."

_METRICS = (
    Metric(
        "Shared",
        lambda m: m.shared / min(m.nnz) if min(m.nnz) else None,
        percent,
        lambda v: v**0.5,
        "Weights that both change, as a share of the weights that the smaller delta changes.",
    ),
    Metric(
        "Opposite signs",
        lambda m: m.opposed_share,
        percent,
        lambda v: 2 * v - 1,
        "Shared weights that the two move in opposite directions. Unrelated deltas have about half: pale.",
    ),
    Metric(
        "Cosine",
        lambda m: m.cosine,
        lambda v: f"{v:z.3f}",
        lambda v: v,
        "Cosine between the changes as vectors. 0: unrelated; 1: the same change; below 0: they undo each other.",
    ),
    Metric(
        "AWOM",
        lambda m: m.awom,
        lambda v: f"{v:.3g}",
        lambda v: v,
        f"{_AWOM} Colours are relative to the largest.",
        relative=True,
    ),
    Metric(
        "AWOR",
        lambda m: m.awor,
        lambda v: f"{v:.3f}",
        lambda v: 1 - v,
        _AWOR,
    ),
)


def write(path: Path, report: DeltaReport) -> None:
    """Writes the file.

    Raises:
        TargetError: the file cannot be written.
    """
    with replacing(path) as stream:
        stream.write(render(report).encode())


def render(report: DeltaReport) -> str:
    """Renders the whole page."""
    names = ", ".join(text(adapter.label) for adapter in report.adapters)
    warnings = "".join(f'<p class="warning">{text(warning)}</p>' for warning in report.interference.warnings)
    sections = [_adapters(report.adapters)]
    if report.interference.pairs:
        sections = [_verdicts(report), *sections, _heat(report), _pairs(report)]
    sections += [_densities(report.adapters), _tensors(report)]
    style = (files(__package__) / "page.css").read_text(encoding="utf-8")
    return f"""{START.decode()}
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{names}: shiradelta report</title>
<style>{style}</style>
<header><p class="dim">shiradelta report</p><h1>{names}</h1>{warnings}</header>
{"".join(sections)}
<footer class="dim">Shares count listed weights. AWOM and AWOR are those of <i>Sparse High Rank Adapters</i>
(arXiv:2406.13175). The figures of the weights tell how much two deltas overlap, not how much a task will lose: try it.
</footer>
</html>
"""


def _verdicts(report: DeltaReport) -> str:
    cards = []
    for (i, j), sentence in report.verdicts().items():
        total = report.interference.total((i, j))
        alone = [nnz - total.shared for nnz in total.nnz]
        both = f'<i class="both" style="flex:{total.shared}"></i>' if total.shared else ""
        picture = (
            f'<div class="bar"><i style="--n:{i};flex:{alone[0]}"></i>{both}'
            f'<i style="--n:{j};flex:{alone[1]}"></i></div>'
        )
        counts = f"{alone[0]:,} in {letter(i)} alone, {total.shared:,} in both, {alone[1]:,} in {letter(j)} alone"
        cards.append(
            f'<div class="card {advice(total)[0]}">{badge(i)} {badge(j)} {text(sentence)}{picture}'
            f'<div class="dim"><small>{counts}</small></div></div>'
        )
    return f'<h2>Together</h2><div class="grid">{"".join(cards)}</div>'


def _adapters(adapters: Sequence[DeltaProfile]) -> str:
    largest_file = max(adapter.about["bytes"]["file"] for adapter in adapters)
    return f"""<h2>Each by itself</h2><div class="grid">{
        "".join(_adapter(number, adapter, largest_file) for number, adapter in enumerate(adapters))
    }</div>"""


def _adapter(number: int, adapter: DeltaProfile, largest_file: int) -> str:
    about = adapter.about
    codecs = sorted({f"{t['index_codec']} + {t['value_codec']}" for t in about["tensors"] if t["nnz"]})
    fingerprints = sum(t["base_fingerprint"] is not None for t in about["tensors"])
    any_strength = all(OPERATIONS[op].has_strength for op in adapter.ops)
    facts = {
        "size": f"{size(about['bytes']['file'])}, {about['bits_per_nonzero']:.2f} bits per nonzero"
        f" (entropy of the positions {about['entropy']:.2f})",
        "weights": f"{about['nnz']:,} of {adapter.numel:,} in {len(adapter.profiles)} tensors"
        f" ({percent(about['nnz'] / max(adapter.numel, 1))})",
        "stored as": ", ".join(codecs) or "-",
        "operation": ", ".join(f"{op} ({count})" for op, count in adapter.ops.items()) or "-",
        "strength": f"{adapter.strength:g} here; " + ("any" if any_strength else "1 only, since whole values are set"),
        "largest change": "-" if adapter.largest is None else f"{adapter.largest:.3g}",
        "base": about["metadata"].get("base", "not named")
        + f"; fingerprints for {fingerprints} of {len(adapter.profiles)} tensors",
        "digest": about["digest"][:16] + "...",
    }
    others = [(key, value) for key, value in about["metadata"].items() if key != "base"]
    name = os.path.basename(about["file"] or adapter.label)
    rows = "".join(f"<dt>{text(key)}</dt><dd>{text(brief(value))}</dd>" for key, value in [*facts.items(), *others])
    layers = adapter.layers()
    return (
        f'<div class="card"><h3>{badge(number)} {text(name)}</h3>'
        f'<div class="size" style="--n:{number};width:{100 * about["bytes"]["file"] / largest_file:.1f}%"></div>'
        f"<dl>{rows}</dl>{bars(list(layers.values()), number, 'layers')}"
        f'<small class="dim">density of each of {len(layers)} layers, up to {percent(max(layers.values(), default=0))}'
        "</small></div>"
    )


def _heat(report: DeltaReport) -> str:
    found = report.interference
    by_pair = {pair: found.layers(pair) for pair in found.pairs}
    layers = list(dict.fromkeys(layer for meetings in by_pair.values() for layer in meetings))
    common, short = _shortened(layers)
    head = [text(common) or "layer", *(f"{badge(i)} {badge(j)}" for i, j in found.pairs)]
    panes = {}
    for metric in _METRICS:
        values = {
            (layer, pair): metric.value(meetings[layer]) if layer in meetings else None
            for pair, meetings in by_pair.items()
            for layer in layers
        }
        top = max((v for v in values.values() if v is not None), default=0) if metric.relative else 1
        rows = [
            [text(short[layer])]
            + [
                cell(v, "" if v is None else metric.text(v), 0 if v is None else metric.colour(v / (top or 1)))
                for v in (values[layer, pair] for pair in by_pair)
            ]
            for layer in layers
        ]
        panes[metric.title] = f'<p class="dim">{metric.help}</p>{table(head, rows, "heat")}'
    return f"<h2>Layer by layer</h2>{tabs('metric', panes)}"


def _pairs(report: DeltaReport) -> str:
    found = report.interference
    rows = [[f"{badge(i)} {badge(j)}", *_meeting_cells(found.total((i, j)))] for i, j in found.pairs]
    notes = f'<p class="dim">AWOM: {_AWOM}</p><p class="dim">AWOR: {_AWOR}</p>'
    return f"<h2>Every pair</h2>{notes}{table(['', *_MEETING_HEAD], rows)}"


_MEETING_HEAD = (
    "shared", "of the first", "of the second", "Jaccard", "by chance", "opposite signs", "cosine", "AWOM", "AWOR",
)  # fmt: skip


def _meeting_cells(m: Meeting) -> list[str]:
    def figure(value: float | None, form: Callable[[float], str]) -> str:
        return "-" if value is None else form(value)

    return [
        f"{m.shared:,}",
        percent(m.shares[0]),
        percent(m.shares[1]),
        percent(m.jaccard),
        f"{m.chance:,.0f}",
        figure(m.opposed_share, percent),
        figure(m.cosine, lambda v: f"{v:z.3f}"),
        figure(m.awom, lambda v: f"{v:.3g}"),
        figure(m.awor, lambda v: f"{v:.3f}{' (sampled)' * m.estimated}"),
    ]


def _densities(adapters: Sequence[DeltaProfile]) -> str:
    layers = list(dict.fromkeys(layer for adapter in adapters for layer in adapter.layers()))
    by_adapter = [adapter.layers() for adapter in adapters]
    top = max((d for densities in by_adapter for d in densities.values()), default=0) or 1
    common, short = _shortened(layers)
    head = [text(common) or "layer", *(badge(n) for n in range(len(adapters)))]
    rows = [
        [text(short[layer])] + [cell(d.get(layer), percent(d.get(layer, 0)), d.get(layer, 0) / top) for d in by_adapter]
        for layer in layers
    ]
    return (
        '<h2>Density</h2><p class="dim">The share of each layer\'s weights that change, in the tensors listed.</p>'
        + table(head, rows, "heat")
    )


def _shortened(layers: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(the common beginning of all names, layer -> the rest of its name)."""
    parts = zip(*(layer.split(".") for layer in layers), strict=False)
    common = ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts)) if len(layers) > 1 else ""
    return common, {layer: layer[len(common) :].lstrip(".") or layer for layer in layers}


def _tensors(report: DeltaReport) -> str:
    """A closed section for each layer: its tensors' profiles, and the overlap of each pair."""
    profiles = [{p.name: p for p in adapter.profiles} for adapter in report.adapters]
    names = list(dict.fromkeys(name for pair in report.interference.pairs.values() for name in pair))
    names = names or list(profiles[0])
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_of(name), []).append(name)
    drawers = []
    for layer, members in groups.items():
        own = [
            _profile_row(_leaf(name, layer), number, adapter[name])
            for name in members
            for number, adapter in enumerate(profiles)
            if name in adapter
        ]
        met = [
            [f"{text(_leaf(name, layer))} {badge(i)} {badge(j)}", *_meeting_cells(meetings[name])]
            for name in members
            for (i, j), meetings in report.interference.pairs.items()
            if name in meetings
        ]
        drawers.append(
            f"<details><summary>{text(layer)} <small class=dim>{len(members)} tensors</small></summary>"
            + table(_PROFILE_HEAD, own)
            + (table(["", *_MEETING_HEAD], met) if met else "")
            + "</details>"
        )
    return (
        '<h2>Tensor by tensor</h2><p class="dim">Over rows and columns: the density of each part, from first to'
        " last, and the share of the nonzeros in the densest tenth: 10% if all are alike.</p>" + "".join(drawers)
    )


_PROFILE_HEAD = ("", "density", "over rows", "over columns", "nonzeros", "largest", "shape", "operation")


def _profile_row(leaf: str, number: int, p: TensorProfile) -> list[str]:
    return [
        f"{text(leaf)} {badge(number)}",
        percent(p.density),
        _axis(p.rows, number),
        _axis(p.columns, number),
        f"{p.nnz:,}",
        "-" if p.largest is None else f"{p.largest:.3g}",
        shape(p.shape),
        p.op,
    ]


def _axis(axis: Axis, number: int) -> str:
    return f"{bars(axis.density, number)} {percent(axis.densest_tenth)}" if axis.density else "-"


def _leaf(name: str, layer: str) -> str:
    """A tensor's name within its layer, short enough for a phone."""
    return name[len(layer) :].lstrip(".").removesuffix(".weight") or name
