"""Which backend live tensors get: by name, by device, and by what can be had."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from shiradelta.errors import ArgumentError, MissingDependencyError, ShiraDeltaError
from shiradelta.hotswap.choose import LIVE_BACKENDS, DeviceBackend, new_backend
from shiradelta.hotswap.numpy import NumpyBackend
from tests.swapping import DEVICE, why_not


@pytest.mark.parametrize("name", [name for name, row in LIVE_BACKENDS.items() if why_not(row) is None])
def test_a_backend_is_had_by_its_name(name: str):
    assert new_backend(name, DEVICE).name == name


@pytest.mark.parametrize("name", [name for name, row in LIVE_BACKENDS.items() if not row.works_on("cuda:0")])
def test_a_backend_that_does_not_work_on_a_device_is_refused(name: str):
    with pytest.raises(ArgumentError, match=f"backend '{name}' does not work on cuda:0.* take auto, triton, torch"):
        new_backend(name, "cuda:0")


def test_triton_works_on_gpus_and_in_its_interpreter(monkeypatch: pytest.MonkeyPatch):
    works_on = LIVE_BACKENDS["triton"].works_on
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [works_on(device) for device in ("cuda:1", "cpu", "mps")] == [True, True, False]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert [works_on(device) for device in ("cuda:1", "cpu", "mps")] == [True, False, False]
    with pytest.raises(ArgumentError, match="backend 'triton' does not work on cpu"):
        new_backend("triton", "cpu")


def test_an_unknown_name_is_refused_with_all_that_are_known():
    with pytest.raises(ArgumentError, match=", ".join(["auto", *LIVE_BACKENDS])):
        new_backend("tpu", "cpu")


def test_what_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingDependencyError, match="backend 'triton' needs triton"):
        new_backend("triton", "cuda:0")


@pytest.fixture
def first() -> Iterator[DeviceBackend]:
    """A backend that cannot be had."""

    def check() -> None:
        raise ShiraDeltaError("no such machine here")

    row = DeviceBackend("toy", lambda _: True, lambda _: True, check, lambda _: NumpyBackend())
    yield LIVE_BACKENDS.add(row)
    LIVE_BACKENDS.remove("toy")


def test_auto_passes_over_what_cannot_be_had(first: DeviceBackend):
    with pytest.raises(ShiraDeltaError, match="no such machine here"):
        new_backend("toy", "cpu")
    assert new_backend("auto", "cpu").name in LIVE_BACKENDS


def test_parts_have_the_devices_that_they_are_on():
    """A model of which every tensor is in parts, as one that is split over GPUs, has no other tensor to tell."""
    from types import SimpleNamespace

    from shiradelta.hotswap.devices import devices_of

    parts = [SimpleNamespace(device=f"cuda:{i}", leaves=lambda: iter(())) for i in range(2)]
    whole = SimpleNamespace(device="meta", leaves=lambda: iter((part, ()) for part in parts))
    elsewhere = SimpleNamespace(device="meta", leaves=lambda: iter(()))
    assert devices_of([whole, elsewhere]) == ["cuda:0", "cuda:1"]
    assert devices_of([elsewhere]) == ["cpu"]
