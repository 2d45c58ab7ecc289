"""Threads read a file and check its tensors: all bytes once, all tensors once, and nothing is taken that was not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import shiradelta as sd
from shiradelta import HotSwap
from shiradelta.errors import FormatError, ShiraDeltaError
from shiradelta.hotswap import checks
from shiradelta.hotswap.checks import pieces_of
from shiradelta.hotswap.fits import FitColumns, Fits, Targets
from shiradelta.hotswap.reading import PartlyRead
from tests.swapping import BACKENDS_IN_TIME, adapter, random_delta, weights

SHAPES = {"a": (40, 30), "b": (400, 300), "c": (8, 8), "d": (100, 30), "e": (300, 300), "empty": (3, 3)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    deltas = {name: random_delta(shape, np.prod(shape) // 9, 1) for name, shape in SHAPES.items()}
    deltas["empty"] = sd.TensorDelta((3, 3), [], [], "bfloat16")
    (tmp_path / "a.shd").write_bytes(adapter(deltas))
    return tmp_path / "a.shd"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_FEW", 64)
    monkeypatch.setattr("shiradelta.hotswap.torch.THREADS", 7)


def fits_of(unread: PartlyRead, chosen: list[int]) -> Fits:
    delta = sd.open_delta(unread.data)
    targets = Targets(() for _ in chosen)  # type: ignore[misc]
    return Fits(
        unread.data,
        delta,
        FitColumns(delta.table, np.array(chosen, np.int64), targets, ["bfloat16"] * len(chosen)),
        unread,
    )


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("most", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4, 5], [1], [0, 3, 5], [5], []])
def test_pieces_have_all_once(path: Path, most: int, chosen: list[int], monkeypatch: pytest.MonkeyPatch):
    read: list[tuple[int, int]] = []
    plain = PartlyRead._read
    checked: list[int] = []
    with PartlyRead(path, lambda size: np.full(size, 0xAA, np.uint8)) as unread:
        fits = fits_of(unread, chosen)
        of = fits.delta.decoder.check_of
        monkeypatch.setattr(PartlyRead, "_read", lambda file, span: (read.append(span), plain(file, span)))
        monkeypatch.setattr(
            fits.delta.decoder, "check_of", lambda numbers: lambda: (checked.extend(numbers.tolist()), of(numbers)())
        )
        pieces = pieces_of([fits], most)
        assert len(pieces) <= most
        for piece in reversed(pieces):
            piece.read()
        for piece in pieces:
            piece.check()
    assert sorted(checked) == chosen
    wanted = sorted(i for n in chosen for i in range(fits.delta.table[n].index.offset, fits.delta.table[n].values.end))
    assert sorted(i for start, stop in read for i in range(start, stop)) == wanted
    whole = np.fromfile(path, np.uint8)
    assert np.array_equal(fits.source[wanted], whole[wanted])
    if most < 50 and len(chosen) == len(SHAPES):
        assert {stop - start for start, stop in read} <= set(range(len(wanted) // most + 2)), "all are of one size"


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
def test_a_damaged_file_is_refused_wherever_the_damage_is(path: Path, backend: str):
    model = {name: weights(shape, "bfloat16") for name, shape in SHAPES.items()}
    before = {name: tensor.clone() for name, tensor in model.items()}
    data = path.read_bytes()
    with sd.open_delta(data) as delta:
        sections = [section for record in delta.table for section in (record.index, record.values) if section.stored]
    swap = HotSwap(model, backend=backend)
    for section in sections:
        between = range(section.offset + section.stored, section.end)
        for at in {section.offset, section.offset + section.stored - 1, *between[:1], *between[-1:]}:
            path.write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
            with pytest.raises(FormatError) as caught:
                swap.load("damaged", path)
            assert caught.value.reason == ("padding_not_zero" if at in between else "section_checksum")
            assert caught.value.file == str(path)
    path.write_bytes(data)
    swap.load("whole", path)
    swap.switch("whole")
    swap.revert()
    assert all(torch.equal(model[name].view(torch.int16), before[name].view(torch.int16)) for name in model)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("backend", BACKENDS_IN_TIME)
@pytest.mark.parametrize("cut", [True, False])
def test_a_file_that_is_replaced_between_its_tables_and_sections_is_refused(
    path: Path, backend: str, cut: bool, monkeypatch: pytest.MonkeyPatch
):
    model = {name: weights(shape, "bfloat16") for name, shape in SHAPES.items()}
    swap, data = HotSwap(model, backend=backend), path.read_bytes()

    class Replaced(PartlyRead):
        def __init__(self, *given: object) -> None:
            super().__init__(*given)  # type: ignore[arg-type]
            path.write_bytes(data[: len(data) // 2] if cut else data + b" ")

    monkeypatch.setattr("shiradelta.hotswap.prepare.PartlyRead", Replaced)
    with pytest.raises(ShiraDeltaError, match=r"was (cut short|written) while it was read; try again"):
        swap.load("a", path)
    assert not swap.loaded
