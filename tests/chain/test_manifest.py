"""The manifest: it comes back as it was written, and anything else is refused in one line."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shiradelta as sd
from shiradelta.chain.manifest import Manifest, _checksum, parse_manifest
from tests.chain.test_chain import Run


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    run = Run(tmp_path_factory.mktemp("run"), 3)
    run.chain.fold(0, 2)
    return run.chain.manifest


def sealed(content: Any) -> bytes:
    """JSON with the checksum of its contents."""
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != "checksum"}
        content["checksum"] = _checksum(content)
    return json.dumps(content).encode()


def page(**changes: int) -> dict[str, Any]:
    return {"first": 0, "last": 0, "bytes": 9, "sha256": "0" * 64} | changes


def refused(raw: bytes) -> str:
    with pytest.raises(sd.ChainError) as caught:
        parse_manifest(raw, "chain.json")
    assert "\n" not in str(caught.value)
    return caught.value.reason


def test_it_comes_back_as_it_was_written(manifest: Manifest):
    raw = manifest.to_json()
    assert parse_manifest(raw, "x") == manifest
    assert sealed(json.loads(raw)) != raw  # blanks are free, and do not change what it says
    assert parse_manifest(sealed(json.loads(raw)), "x") == manifest


@pytest.mark.parametrize(
    ("mistake", "change"),
    {
        "another format": lambda m: m.update(format=3),
        "the format with pages, without the key": lambda m: m.update(format=2),
        "the format with pages, and none": lambda m: m.update(format=2, pages=[]),
        "pages in the format without": lambda m: m.update(pages=[page()]),
        "a page past the head": lambda m: m.update(format=2, pages=[page(last=4)]),
        "a page that ends before it begins": lambda m: m.update(format=2, pages=[page(first=1)]),
        "a page twice": lambda m: m.update(format=2, pages=[page(), page()]),
        "pages out of order": lambda m: m.update(format=2, pages=[page(last=2), page()]),
        "format as text": lambda m: m.update(format="1"),
        "an unknown key": lambda m: m.update(more=1),
        "a missing key": lambda m: m.pop("head"),
        "an id of another form": lambda m: m.update(id="../x"),
        "a head that no anchor leads to": lambda m: m.update(head=9),
        "a head that is no whole number": lambda m: m.update(head=3.0),
        "a head that is true": lambda m: m.update(head=True),
        "another state than the tensors": lambda m: m["tensors"].pop("mask"),
        "a dtype that is unknown": lambda m: m["tensors"]["mask"].update(dtype="u7"),
        "a dtype that is unspecified": lambda m: m["tensors"]["mask"].update(dtype="unspecified"),
        "a shape that is negative": lambda m: m["tensors"]["mask"].update(shape=[-1]),
        "a shape that is too large": lambda m: m["tensors"]["mask"].update(shape=[1 << 30, 1 << 30]),
        "a fingerprint that is short": lambda m: m["tensors"]["mask"].update(fingerprint="ab"),
        "a name with a control character": lambda m: m["tensors"].update({"a\n": m["tensors"]["mask"]}),
        "no anchor": lambda m: m.update(anchors=[]),
        "two anchors of one version": lambda m: m["anchors"].append(m["anchors"][0]),
        "a file outside": lambda m: m["anchors"][0]["files"][0].update(name="../x"),
        "an absolute file": lambda m: m["anchors"][0]["files"][0].update(name="/etc/passwd"),
        "a hidden file": lambda m: m["anchors"][0]["files"][0].update(name=".shiradelta/state.json"),
        "a file twice": lambda m: m["anchors"][0]["files"].append(m["anchors"][0]["files"][0]),
        "a size that is huge": lambda m: m["steps"][0].update(bytes=1 << 60),
        "steps out of order": lambda m: m["steps"].reverse(),
        "a step twice": lambda m: m["steps"].append(m["steps"][-1]),
        "a step that leads back": lambda m: m["steps"][3].update(stop=1),
        "a step past the head": lambda m: m["steps"][3].update(stop=4),
        "steps that disagree": lambda m: m["steps"][0].update(gives="0" * 64),
        "a digest in capitals": lambda m: m["steps"][0].update(sha256="A" * 64),
        "a step that is missing": lambda m: m["steps"].pop(),
        "a list in place of an object": lambda m: m.update(tensors=[]),
        "an object in place of a list": lambda m: m.update(steps={}),
    }.items(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_agree_is_refused(manifest: Manifest, mistake: str, change: Callable[[Any], object]):
    found = json.loads(manifest.to_json())
    change(found)
    expected = "unknown_version" if mistake == "another format" else "bad_manifest"
    assert refused(sealed(found)) == expected


def test_what_is_damaged_is_refused(manifest: Manifest):
    raw = manifest.to_json()
    for damaged in (
        b"",
        b"[]",
        b"nul",
        b"\xff",
        raw[:-1],
        raw.replace(b'"head":3', b'"head":2'),  # the checksum tells
        raw.replace(b'"head":3', b'"head":3,"head":3'),
        raw.replace(b'"head":3', b'"head":NaN'),
        raw.replace(b'"head":3', b'"head":' + b"3" * 5000),
        b"[" * 100_000,
    ):
        assert refused(damaged) == "bad_manifest"


@given(st.randoms(use_true_random=False))
def test_anything_else_is_read_as_it_is_or_refused(manifest: Manifest, rng: random.Random):
    """Values are swapped, repeated, left out and replaced; what is taken is written again as the same."""
    found = json.loads(manifest.to_json())
    strange = [
        None,
        True,
        -1,
        0,
        1,
        1 << 64,
        1.5,
        "",
        "x",
        "../../x",
        "\ud800",
        [],
        {},
        [[]],
        "0" * 64,
        "model.safetensors",
    ]
    for _ in range(rng.randint(1, 3)):
        at = found
        while isinstance(at, dict | list) and at:
            key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
            inner = at[key]
            if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
                at = inner
                continue
            if rng.random() < 0.2:
                at.pop(key)
            else:
                at[key] = rng.choice(strange)
            break
    raw = sealed(found)
    try:
        parsed = parse_manifest(raw, "x")
    except sd.ChainError:
        return
    assert parse_manifest(parsed.to_json(), "x") == parsed
    for path in parsed.files():
        assert not Path(path).is_absolute()
        assert ".." not in Path(path).parts
