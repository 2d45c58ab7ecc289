"""What a converted file says of its base: the id and the commit on the Hub where they are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shiradelta.models.provenance import base_names, named

COMMIT = "0123456789abcdef"


def folder(path: Path, **files: dict[str, object]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    return folder(tmp_path / "hub" / "models--org--base" / "snapshots" / COMMIT)


ADAPTER = {"base_model_name_or_path": "org/base", "revision": "v1"}


def test_a_base_in_the_cache_is_known_with_its_commit(tmp_path: Path, cached: Path):
    source = folder(tmp_path / "lora", adapter_config={"base_model_name_or_path": "org/other"})
    found = named(source, cached)
    assert found == {"source": "lora", "base": "org/base", "base_revision": COMMIT}
    assert named(cached, None) == {"source": "org/base"}
    assert base_names(cached) == {"base": "org/base", "base_revision": COMMIT}


@pytest.mark.parametrize(
    ("source", "base", "name", "expected"),
    [
        ({}, {}, "model", {"base": "model"}),
        ({"adapter_config": ADAPTER}, {}, "model", {"base": "org/base"}),
        ({"adapter_config": ADAPTER}, None, "", {"base": "org/base", "base_revision": "v1"}),
        ({"adapter_config": {"base_model_name_or_path": "/home/me/base"}}, {}, "model", {"base": "model"}),
        ({"config": {"_name_or_path": "org/base"}}, {}, "base", {"base": "org/base"}),
        ({"config": {"_name_or_path": "org/base"}}, {}, "other", {"base": "other"}),
        ({"config": {"_name_or_path": "org/base"}}, None, "", {"base": "org/base"}),
        ({}, {"config": {"_name_or_path": "org/base"}}, "base", {"base": "org/base"}),
        ({}, {"config": {"_name_or_path": "org/older"}}, "base", {"base": "base"}),
        ({"config": {"_name_or_path": 5}}, {"config": []}, "base", {"base": "base"}),
    ],
)
def test_configurations_name_the_base(
    source: dict[str, dict[str, object]],
    base: dict[str, dict[str, object]] | None,
    name: str,
    expected: dict[str, str],
    tmp_path: Path,
):
    here = folder(tmp_path / "tuned", **source)
    assert named(here, base if base is None else folder(tmp_path / name, **base)) == {"source": "tuned", **expected}
