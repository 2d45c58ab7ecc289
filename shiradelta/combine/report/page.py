"""The report as one HTML file without network access or scripts, for screens of all sizes, dark mode and print."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from shiradelta.combine.interference import Interference, Meeting
from shiradelta.combine.report.data import DeltaReport
from shiradelta.combine.report.profiles import DeltaProfile
from shiradelta.combine.report.verdict import advice
from shiradelta.format.operations import OPERATIONS
from shiradelta.models.names import layer_of
from shiradelta.util.files import replacing
from shiradelta.util.html import template
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
    """Renders the whole page.  `page.html` says how it looks; here is what it says."""
    folder, found = files(__package__), report.interference
    page = template((folder / "page.html").read_text(encoding="utf-8"))
    from markupsafe import Markup  # which the template has loaded

    made = page.render(
        # functions
        letter=letter,
        outline=outline,
        percent=percent,
        shape=shape,
        # the whole
        names=", ".join(adapter.label for adapter in report.adapters),
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        warnings=found.warnings,
        deltas=_deltas(report.adapters),
        densities=_densities(report.adapters),
        layers=_layers(report),
        # pairs
        pairs=list(found.pairs),
        verdicts=_verdicts(report),
        metrics=_heat(found),
        overlap_head=list(_OVERLAP_HEAD),
        totals=[("", pair, _figures(found.total(pair))) for pair in found.pairs],
        awom=Markup(_AWOM),
        awor=Markup(_AWOR),
    )
    return made.lstrip() + "\n"


class Shade(NamedTuple):
    """A cell of a heat map.

    Attributes:
        words: the figure.
        colour: from -1 to 1.
    """

    words: str
    colour: float

    @property
    def strength(self) -> float:
        """How strong the colour is, from 0 to 1."""
        return min(abs(self.colour), 1)

    @property
    def kind(self) -> str:
        """The cell's classes in `page.css`."""
        return " ".join([*["n"] * (self.colour < 0), *["full"] * (self.strength > 0.6)])


def letter(number: int) -> str:
    """What a delta is called where its name would be too long: A to Z, then A1, B1, ..."""
    turn, index = divmod(number, len(ascii_uppercase))
    return ascii_uppercase[index] + (str(turn) if turn else "")


def outline(heights: Sequence[float]) -> str:
    """The path of a bar chart in SVG, 20 high, scaled to its highest bar; empty if there is none."""
    top = max(heights, default=0)
    if not top:
        return ""
    steps = [round(20 * (1 - height / top)) for height in heights]
    return f"M0 {steps[0]}h1" + "".join(f"V{y}h1" for y in steps[1:]) + "V20H0z"


def _verdicts(report: DeltaReport) -> list[dict[str, Any]]:
    found = []
    for pair, sentence in report.verdicts().items():
        total = report.interference.total(pair)
        alone = [nnz - total.shared for nnz in total.nnz]
        about = {"kind": advice(total)[0], "sentence": sentence, "shared": total.shared, "alone": alone}
        found.append({"pair": pair, **about})
    return found


def _deltas(adapters: Sequence[DeltaProfile]) -> list[dict[str, Any]]:
    largest = max(adapter.about["bytes"]["file"] for adapter in adapters)
    return [
        {
            "name": os.path.basename(adapter.about["file"] or adapter.label),
            "width": 100 * adapter.about["bytes"]["file"] / largest,
            "facts": [(key, brief(value)) for key, value in _facts(adapter)],
            "layers": list(adapter.layers().values()),
            "densest": percent(max(adapter.layers().values(), default=0)),
        }
        for adapter in adapters
    ]


def _facts(adapter: DeltaProfile) -> list[tuple[str, str]]:
    """What is known of a delta; the file's metadata after what was found."""
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
    return [*facts.items(), *((key, value) for key, value in about["metadata"].items() if key != "base")]


def _heat(found: Interference) -> list[dict[str, Any]]:
    """A map for each metric: layers by pairs."""
    from markupsafe import Markup

    by_pair = {pair: found.layers(pair) for pair in found.pairs}
    layers = list(dict.fromkeys(layer for meetings in by_pair.values() for layer in meetings))
    common, short = _shortened(layers)
    maps = []
    for metric in _METRICS:
        values = {
            (layer, pair): metric.value(meetings[layer]) if layer in meetings else None
            for pair, meetings in by_pair.items()
            for layer in layers
        }
        top = max((v for v in values.values() if v is not None), default=0) if metric.relative else 1
        rows = [
            (
                short[layer],
                [
                    None if v is None else Shade(metric.text(v), metric.colour(v / (top or 1)))
                    for v in (values[layer, pair] for pair in by_pair)
                ],
            )
            for layer in layers
        ]
        maps.append({"title": metric.title, "help": Markup(metric.help), "common": common, "rows": rows})
    return maps


_OVERLAP_HEAD = (
    "shared", "of the first", "of the second", "Jaccard", "by chance", "opposite signs", "cosine", "AWOM", "AWOR",
)  # fmt: skip


def _figures(m: Meeting) -> list[str]:
    """The cells of `_OVERLAP_HEAD`."""

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


def _densities(adapters: Sequence[DeltaProfile]) -> dict[str, Any]:
    """The map of densities: layers by deltas."""
    layers = list(dict.fromkeys(layer for adapter in adapters for layer in adapter.layers()))
    by_adapter = [adapter.layers() for adapter in adapters]
    top = max((d for densities in by_adapter for d in densities.values()), default=0) or 1
    common, short = _shortened(layers)
    rows = [
        (short[layer], [Shade(percent(d[layer]), d[layer] / top) if layer in d else None for d in by_adapter])
        for layer in layers
    ]
    return {"common": common, "columns": [(number,) for number in range(len(adapters))], "rows": rows}


def _shortened(layers: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(the common beginning of all names, layer -> the rest of its name)."""
    parts = zip(*(layer.split(".") for layer in layers), strict=False)
    common = ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parts)) if len(layers) > 1 else ""
    return common, {layer: layer[len(common) :].lstrip(".") or layer for layer in layers}


def _layers(report: DeltaReport) -> list[dict[str, Any]]:
    """Each layer with its tensors' profiles, and the overlaps of each pair."""
    profiles = [{p.name: p for p in adapter.profiles} for adapter in report.adapters]
    names = list(dict.fromkeys(name for pair in report.interference.pairs.values() for name in pair))
    names = names or list(profiles[0])
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_of(name), []).append(name)
    return [
        {
            "name": layer,
            "tensors": len(members),
            "profiles": [
                (_leaf(name, layer), number, profile[name])
                for name in members
                for number, profile in enumerate(profiles)
                if name in profile
            ],
            "overlaps": [
                (_leaf(name, layer), pair, _figures(meetings[name]))
                for name in members
                for pair, meetings in report.interference.pairs.items()
                if name in meetings
            ],
        }
        for layer, members in groups.items()
    ]


def _leaf(name: str, layer: str) -> str:
    """A tensor's name within its layer, short enough for a phone."""
    return name[len(layer) :].lstrip(".").removesuffix(".weight") or name
