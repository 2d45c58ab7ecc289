"""Reads data sets of Hugging Face: a folder of `save_to_disk`, Parquet files, or a folder of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shiradelta.errors import SourceError
from shiradelta.util.optional import importing
from shiradelta.util.text import brief

#: Files that `save_to_disk` writes: of several splits, of one.
_SPLITS, _SAVED = "dataset_dict.json", "state.json"
_PARQUET = ".parquet"
#: The split that is read of several.
_SPLIT = "train"


def is_dataset(path: Path) -> bool:
    """Whether a path is a Parquet file, or a folder with a data set."""
    if not path.is_dir():
        return path.suffix == _PARQUET
    return (path / _SPLITS).exists() or (path / _SAVED).exists() or bool(_parquet_files(path))


def dataset_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(where the row is, its columns) of each row.

    Raises:
        SourceError: the data set cannot be read, or has splits of which none is called "train".
        MissingDependencyError: the package datasets is not installed.
    """
    with importing(f"reading {path}"):
        import datasets
    try:
        if path.is_dir() and not _parquet_files(path):
            found = datasets.load_from_disk(str(path))
        else:
            files = _of_split(path, _parquet_files(path)) if path.is_dir() else [path]
            found = datasets.Dataset.from_parquet([str(file) for file in files])
        if isinstance(found, datasets.DatasetDict):
            found = found[_split(path, list(found))]
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SourceError(f"{path}: datasets cannot read it ({brief(str(error), 160)}); check the path") from None
    for number, row in enumerate(found, 1):
        yield f"{path}, row {number}", row


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{_PARQUET}"))


def _of_split(folder: Path, files: list[Path]) -> list[Path]:
    """The files of the split to read; their names begin with it, as in train-00000-of-00001.parquet."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(file.stem.partition("-")[0], []).append(file)
    return by_split[_split(folder, list(by_split))]


def _split(path: Path, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    if _SPLIT not in names:
        raise SourceError(
            f"{path}: has the splits {', '.join(sorted(names))} and none called {_SPLIT}; give one's own path"
        )
    return _SPLIT
