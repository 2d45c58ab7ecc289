"""The report: its data against dense arrays, its page in a real browser, its words on a terminal."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

import shiradelta
from shiradelta import TensorDelta
from shiradelta.cli import main
from shiradelta.combine.interference import Meeting
from shiradelta.combine.report import DeltaReport, report
from shiradelta.combine.report.page import Shade, letter, outline, render
from shiradelta.combine.report.profiles import _Counts
from shiradelta.combine.report.verdict import advice, verdict
from shiradelta.errors import DeltaError, TargetError
from shiradelta.util.html import template

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MODULES = {"attn.q.weight": (64, 64), "mlp.up.weight": (160, 64), "norm.weight": (64,)}
HOSTILE = "<script>document.title='owned'</script>&\"'.3.weight"


def write(path: Path, seed: int, layers: int = 12, **metadata: str) -> Path:
    generator = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for module, shape in MODULES.items():
            chosen = generator.random(np.prod(shape)) < 0.02 * (seed + 1)
            chosen[layer] = True  # so that there is something to see everywhere
            positions = np.flatnonzero(chosen)
            values = generator.standard_normal(positions.size)
            tensors[f"model.layers.{layer}.{module}"] = TensorDelta(shape, positions, values)
    tensors[HOSTILE] = TensorDelta((9,), [seed, 5], [1.0, -1.0])
    shiradelta.save_delta(path, tensors, values="int8", metadata={"base": "a-base", **metadata})
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, float]:
    folder = tmp_path_factory.mktemp("report")
    notes = ("<img src=x onerror=alert(1)>", "x" * 400, "plain")
    return {
        write(folder / f"{name}.shd", seed, note=notes[seed]): 1.0 for seed, name in enumerate(("style", "task", "law"))
    }


@pytest.fixture(scope="module")
def page_file(files: dict[Path, float]) -> Path:
    return next(iter(files)).parent / "report.html"


@pytest.fixture(scope="module")
def reported(files: dict[Path, float], page_file: Path) -> DeltaReport:
    """What is reported of the files, and its page is written."""
    return report(files, page_file)


def test_few_nonzeros_of_a_huge_shape_take_little_time():
    """A file may hold thousands of such tensors."""
    few, many = _Counts(1 << 28, 9), _Counts(1 << 28, 1 << 20)
    assert few.axis(1).densest_tenth == 0
    few.add(np.arange(9) << 24)
    assert few.axis(1).densest_tenth == 1
    assert few._counts.size <= 1 << 12 < many._counts.size <= 1 << 20


@pytest.mark.slow
def test_profiles_are_those_of_dense_arrays(files: dict[Path, float], reported: DeltaReport):
    for adapter, file in zip(reported.adapters, files, strict=True):
        with shiradelta.open_delta(file) as delta:
            assert adapter.about["digest"] == delta.digest
            for profile in adapter.profiles:
                tensor = delta[profile.name]
                listed = np.zeros(tensor.numel, bool)
                listed[tensor.positions()] = True
                listed = listed.reshape(tensor.shape if len(tensor.shape) > 1 else (1, -1))
                assert profile.density == listed.mean()
                assert profile.largest == np.abs(tensor.values()).max()
                for axis, counts, across in (
                    (profile.rows, listed.sum(1), listed.shape[1]),
                    (profile.columns, listed.sum(0), listed.shape[0]),
                ):
                    tenth = -(-counts.size // 10)
                    assert axis.densest_tenth == pytest.approx(np.sort(counts)[::-1][:tenth].sum() / counts.sum())
                    assert len(axis.density) == min(counts.size, 40)
                    if counts.size == 160:  # parts of equal width
                        assert axis.density == pytest.approx((counts.reshape(40, 4).sum(1) / (4 * across)).tolist())
    names = [profile.name for profile in reported.adapters[0].profiles]
    assert names.index("model.layers.2.norm.weight") < names.index("model.layers.10.norm.weight")


def test_json_has_everything_and_is_json(reported: DeltaReport):
    data = json.loads(json.dumps(reported.as_dict()))
    assert [delta["label"] for delta in data["deltas"]] == ["style", "task", "law"]
    assert len(data["pairs"]) == 3
    pair = data["pairs"][0]
    assert pair["total"]["shared"] == sum(tensor["shared"] for tensor in pair["tensors"].values())
    assert pair["total"]["shared"] == sum(layer["shared"] for layer in pair["layers"].values())
    assert len(pair["layers"]) == 13
    assert pair["verdict"].startswith("style and task share")


class Tags(HTMLParser):
    """Which tags and attributes there are, and whether they close."""

    VOID = frozenset(("meta", "input", "path"))

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.attributes: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in self.VOID or self.open.pop() == tag


@pytest.mark.usefixtures("reported")
def test_the_page_loads_nothing_and_runs_nothing(page_file: Path):
    tags = Tags()
    tags.feed(page_file.read_text())
    assert tags.open == []
    assert not tags.seen & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    assert not tags.attributes & {"src", "href", "srcset", "action"}
    assert not any(name.startswith("on") for name in tags.attributes)
    assert not re.search(r"url\(|@import", page_file.read_text())


@pytest.mark.slow
@pytest.mark.usefixtures("reported")
def test_the_same_files_give_the_same_page(files: dict[Path, float], page_file: Path):
    assert render(report(files)) == page_file.read_text()


def test_one_delta_alone(files: dict[Path, float], tmp_path: Path):
    one = {next(iter(files)): 1.0}
    html = render(report(one))
    assert "Each by itself" in html
    assert "Together" not in html
    with pytest.raises(DeltaError, match="needs two"):
        report(one, png=tmp_path / "x.png")
    with pytest.raises(DeltaError, match="nothing to report"):
        report({})


def test_set_tensors_and_empty_ones(tmp_path: Path):
    def setting(*at: int) -> dict[str, TensorDelta]:
        empty = TensorDelta((0, 3), [], [])
        return {"w": TensorDelta((9,), list(at), np.ones(len(at), np.uint16), dtype="bfloat16", op="set"), "e": empty}

    for name, at in (("a", (1, 3)), ("b", (3,))):
        shiradelta.save_delta(tmp_path / f"{name}.shd", setting(*at))
    html = render(report({tmp_path / "a.shd": 1.0, tmp_path / "b.shd": 1.0}))
    assert "1 of these are set by one of them, so they cannot be fused" in html
    assert "1 only, since whole values are set" in html


def test_what_cannot_be_written_leaves_no_trace(files: dict[Path, float], tmp_path: Path):
    for target in ({"out": tmp_path / "no" / "x.html"}, {"png": tmp_path / "no" / "x.png"}):
        with pytest.raises(TargetError, match="cannot be written"):
            report(files, **target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_files_of_another_kind_are_not_replaced(files: dict[Path, float], tmp_path: Path):
    """Such as the first of them, where somebody forgot to name the page."""
    first = next(iter(files))
    before = first.read_bytes()
    for target in ({"out": first}, {"png": first}, {"out": tmp_path}):
        with pytest.raises(TargetError, match="is there and is not a"):
            report(files, **target)
    assert first.read_bytes() == before
    for _ in range(2):
        report(files, out=tmp_path / "x.html")


def harmful(tmp_path: Path) -> list[Path]:
    """Files with markup, a formula, a length, metadata under the names of facts."""
    names = [tmp_path / name for name in ("<b>a.shd", "$\\bad$.shd", "n" * 200 + ".shd")]
    for number, name in enumerate(names):
        change = TensorDelta((40, 40), [1, 2], [0.5, 1 + number])
        metadata = {"size": "<script>", "license": "x" * 100_000}
        shiradelta.save_delta(name, {r"<i>$\bad$.0.w": change}, metadata)
    return names


def test_names_and_metadata_that_mean_harm(tmp_path: Path):
    """The page is as ever."""
    page = render(report(dict.fromkeys(harmful(tmp_path), 1.0)))
    assert len(page) < 100_000
    assert "x... (100,000 characters)" in page
    assert not {"script", "i"} & set(re.findall(r"<(\w+)>", page.partition("</style>")[2].replace("<i>Sparse", "")))
    assert page.index("bits per nonzero") < page.index("&lt;script&gt;")


@pytest.mark.slow
def test_a_picture_of_names_that_mean_harm(tmp_path: Path):
    image = pytest.importorskip("matplotlib.image")
    report(dict.fromkeys(harmful(tmp_path), 1.0), png=tmp_path / "heat.png")
    assert image.imread(tmp_path / "heat.png").shape[0] > 100


@pytest.mark.slow
def test_heat_map_as_png(files: dict[Path, float], tmp_path: Path):
    image = pytest.importorskip("matplotlib.image")
    report(files, png=tmp_path / "heat.png")
    pixels = image.imread(tmp_path / "heat.png")
    assert pixels.shape[0] > 300
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50


def test_pieces():
    assert [letter(number) for number in (0, 25, 26)] == ["A", "Z", "A1"]
    assert outline([0, 2, 1]) == "M0 20h1V0h1V10h1V20H0z"
    assert outline([]) == outline([0, 0]) == ""
    assert (Shade("x", -0.7).kind, Shade("x", -0.7).strength) == ("n full", 0.7)
    assert (Shade("x", 3).kind, Shade("x", 3).strength) == ("full", 1)


def test_values_in_a_template_are_escaped():
    from markupsafe import Markup

    page = template("{{ name }} {{ style }} {{ number }}")
    assert page.render(name="<b>\x1b", style=Markup("<i>"), number=7) == r"&lt;b&gt;\x1b <i> 7"
    with pytest.raises(Exception, match="'style' is undefined"):
        page.render(name="", number=7)


@pytest.mark.parametrize(
    ("shared", "opposed", "cosine", "level"),
    [(0, 0, 0.0, "free"), (2, 1, 0.0, "free"), (50, 25, 0.02, "try"), (50, 1, 0.6, "try"), (50, 49, -0.6, "conflict")],
)
def test_advice(shared: int, opposed: int, cosine: float, level: str):
    total = Meeting((100, 200), shared, 1.0, 0, opposed, cosine, (1.0, 1.0))
    assert advice(total)[0] == level
    sentence = verdict("a", "b", total)
    assert sentence.endswith(f"{advice(total)[1]}.")
    assert f"{shared}% of their weights" in sentence or not shared


@pytest.mark.slow
def test_command_line(files: dict[Path, float], tmp_path: Path):
    arguments = ["report", *map(str, files), "-o", str(tmp_path / "r.html"), "--png", str(tmp_path / "h.png")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert "style and law share" in result.stdout
    assert f"{tmp_path / 'r.html'}: written" in result.stdout
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    turned = [f"{file}:{strength}" for file, strength in zip(files, (1, -0.5, 2), strict=True)]
    for command in (["report"], ["fuse", "-o", str(tmp_path / "x.shd")]):
        result = CliRunner().invoke(main, [*command, turned[0], str(next(iter(files)))])
        assert (result.exit_code, "given twice" in result.stderr) == (2, True)
    data = json.loads(CliRunner().invoke(main, ["report", *turned, "--json"]).stdout)
    plain = report(files).interference
    assert data["deltas"][1]["strength"] == -0.5
    assert data["pairs"][0]["total"]["cosine"] == pytest.approx(-(plain.total((0, 1)).cosine or 0))


# ------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright and a Chromium of the system")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs a Chromium: none is installed on this system")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        yield browser
        browser.close()


def opened(browser: Browser, file: Path, width: int, **options: Any) -> Page:
    """The page, offline; anything that it says to the console, or asks of a network, fails the test."""
    context = browser.new_context(viewport={"width": width, "height": 844}, offline=True, **options)
    page = context.new_page()

    def fail(what: object) -> None:
        raise AssertionError(what)

    page.on("console", lambda message: fail(message.text))
    page.on("pageerror", fail)
    page.on("dialog", fail)
    page.on("request", lambda request: request.url.startswith("file:") or fail(request.url))
    page.goto(file.as_uri())
    return page


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_it_fits_and_its_figures_are_right(
    browser: Browser, reported: DeltaReport, page_file: Path, width: int
):
    page = opened(browser, page_file, width, is_mobile=width < 500)
    found = reported.interference
    assert "owned" not in page.title()
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll table')
        && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside) == []
    smallest = (
        "Math.min(...[...document.querySelectorAll('td, dd, p')].map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert page.evaluate(smallest) >= 12

    for sentence in reported.verdicts().values():
        assert page.get_by_text(sentence).is_visible()
    for title, figure in (
        ("Cosine", lambda m: f"{m.cosine:z.3f}"),
        ("AWOR", lambda m: f"{m.awor:.3f}"),
        ("AWOM", lambda m: f"{m.awom:.3g}"),
    ):
        page.get_by_text(title, exact=True).and_(page.locator("label")).click()
        panes = page.locator(".pane:visible")
        assert panes.count() == 1
        row = panes.locator("tbody tr").nth(10).locator("td").all_inner_texts()
        assert row == [figure(found.layers(pair)[f"model.layers.{9}"]) for pair in found.pairs]
    coloured = page.locator(".pane:visible td").nth(3)
    assert "rgba" in coloured.evaluate("e => getComputedStyle(e).backgroundColor")
    spark = page.locator("details svg.spark").first.bounding_box()
    assert spark is not None
    assert spark["width"] > 40
    assert spark["height"] > 8


@pytest.mark.slow
@pytest.mark.usefixtures("reported")
def test_in_a_browser_it_can_be_dark(browser: Browser, page_file: Path):
    shades = []
    for scheme in ("light", "dark"):
        page = opened(browser, page_file, 390, color_scheme=scheme)
        colours = [page.evaluate(f"getComputedStyle(document.body).{key}") for key in ("backgroundColor", "color")]
        shades.append([sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours])
    (light_ground, light_ink), (dark_ground, dark_ink) = shades
    assert light_ground > 600 > 200 > light_ink
    assert dark_ground < 200 < 600 < dark_ink


@pytest.mark.parametrize(("old", "new"), [("Report", "DeltaReport"), ("Adapter", "DeltaProfile")])
def test_old_names_are_taken_with_a_warning(old: str, new: str):
    with pytest.warns(DeprecationWarning, match=f"{old} is deprecated; use {new}"):
        assert getattr(import_module("shiradelta.combine.report"), old).__name__ == new
