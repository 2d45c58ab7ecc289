"""Downloads what a path names on the Hub into the Hub's cache, whose files are never written to.

The only module that reads from the Hub, by huggingface_hub: tokens, cache and offline mode are its own.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shiradelta.errors import ShiraDeltaError, SourceError, UnreachableError
from shiradelta.format import registry
from shiradelta.io.hub import HubPath, Path_, hub_path
from shiradelta.util.optional import importing, require
from shiradelta.util.text import brief

#: Names in a message.
_NAMED = 8
_WEIGHTS = ".safetensors"
#: Weights that are read where there are no safetensors.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
#: Weights in formats that are not read, and what is no part of a model.
_OTHERS = (".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel", registry.SUFFIX)
#: Files that list a model's components, which are in folders of their own.
_LISTS = ("model_index.json", "modules.json")


def local_delta(path: Path_, beside: Sequence[str] = ()) -> Path:
    """The path of a `.shd` file; one that is on the Hub is downloaded first.

    Args:
        path: a local path, or what `hub_path` takes for one on the Hub; without a file, the only one in the repository.
        beside: suffixes of further files that belong to it, such as ".sig", if they are there.

    Raises:
        SourceError: it is not on the Hub, cannot be downloaded, or it is unclear which of several files is meant.
        MissingDependencyError: huggingface_hub is not installed.
    """
    named = hub_path(path)
    if named is None:
        return Path(path)
    hub = _Hub(named)
    file = named.file
    if not file.endswith(registry.SUFFIX):
        file = _only_delta(named, hub.files())
    found = hub.download(file)
    for suffix in beside:
        with suppress(ShiraDeltaError):
            hub.download(file + suffix)
    return found


def local_model(path: Path_, *, pickles: bool = False) -> Path:
    """The path of a model, an adapter, or a file of weights; what is on the Hub is downloaded first.

    Args:
        path: a local path, or what `hub_path` takes for one on the Hub.
        pickles: whether weights may be pickles where there are no safetensors.

    Raises:
        SourceError: it is not on the Hub, or cannot be downloaded.
        MissingDependencyError: huggingface_hub is not installed.
    """
    named = hub_path(path)
    if named is None:
        return Path(path)
    hub = _Hub(named)
    files = hub.files()
    if named.file in files:
        folder = named.file.rpartition("/")[0]
        chosen = [named.file, *(file for file in _directly_in(folder, files) if file.endswith(".json"))]
    else:
        chosen = _model_files(_within(named, files), named.file, pickles)
    return hub.snapshot(chosen) / named.file


def _within(named: HubPath, files: Sequence[str]) -> list[str]:
    """The files in the folder that a path names."""
    inside = [file for file in files if not named.file or file.startswith(f"{named.file}/")]
    if not inside:
        raise SourceError(f"{named}: {named.repo} has no such file or folder; it has {_listed(files)}")
    return inside


def _listed(files: Sequence[str]) -> str:
    shown = ", ".join(files[:_NAMED])
    return (f"{shown} and {len(files) - _NAMED} more" if len(files) > _NAMED else shown) or "no files"


def _only_delta(named: HubPath, files: Sequence[str]) -> str:
    """The only `.shd` file in what a path names."""
    if named.file in files:
        return named.file
    found = [file for file in _within(named, files) if file.endswith(registry.SUFFIX)]
    if len(found) == 1:
        return found[0]
    if found:
        example = f"{named.repo}{'@' + named.revision if named.revision else ''}/{found[0]}"
        raise SourceError(f"{named}: has several .shd files ({_listed(found)}); give one of them, such as {example}")
    raise SourceError(
        f"{named}: has no .shd file (it has {_listed(files)}); `shiradelta convert {named}` makes one of a fine-tune"
    )


def _directly_in(folder: str, files: Sequence[str]) -> list[str]:
    return [file for file in files if file.rpartition("/")[0] == folder]


def _model_files(files: Sequence[str], folder: str, pickles: bool) -> list[str]:
    """The files of one model: one format, one variant, and no other models in its subfolders."""
    kept = [file for file in files if not file.endswith(_OTHERS) and not file.rpartition("/")[2].startswith(".")]
    has_list = any(f"{folder}/{name}".lstrip("/") in kept for name in _LISTS)
    ends = (_WEIGHTS, *_PICKLES)
    here = _directly_in(folder, kept)
    if not has_list and any(file.endswith(ends) for file in here):
        kept = here
    elif "model_index.json" in [file.rpartition("/")[2] for file in here]:  # a checkpoint of all components beside them
        kept = [file for file in kept if file not in here or not file.endswith(ends)]
    if any(file.endswith(_WEIGHTS) for file in kept) or not pickles:
        kept = [file for file in kept if not file.endswith(_PICKLES)]
    plain = {file for file in kept if file.endswith(_WEIGHTS)}
    kept = [file for file in kept if not (".fp16." in file and file.replace(".fp16.", ".") in plain)]
    if any(file.rpartition("/")[2].startswith("model") for file in plain):
        kept = [file for file in kept if not file.rpartition("/")[2].startswith("consolidated")]
    return kept


class _Hub:
    """The repository that a path names, on the Hub or in its cache.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
    """

    def __init__(self, named: HubPath) -> None:
        purpose = f"{named}: no such file or folder here; reading it from the Hub"
        require("huggingface_hub", purpose)
        with importing(purpose):
            from huggingface_hub import HfApi
        self.named = named
        self._api: Any = HfApi(library_name="shiradelta")
        self._cached: Path | None = None

    def files(self) -> list[str]:
        """The repository's files; those in the cache where the Hub is not asked, or does not answer."""
        named = self.named
        try:
            with _explained(named):
                about = self._api.model_info(named.repo, revision=named.revision)
                return sorted(file.rfilename for file in about.siblings or ())
        except UnreachableError:
            self._cached = self._in_cache()
            if self._cached is None:
                raise
            inside = (file for file in self._cached.rglob("*") if not file.is_dir())
            return sorted(file.relative_to(self._cached).as_posix() for file in inside)

    def _in_cache(self) -> Path | None:
        """The revision's folder in the cache."""
        from huggingface_hub import constants, scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        named = self.named
        with suppress(CacheNotFound):
            for repo in scan_cache_dir(constants.HF_HUB_CACHE).repos:
                if repo.repo_type == "model" and repo.repo_id == named.repo:
                    for revision in repo.revisions:
                        if (named.revision or "main") in {revision.commit_hash, *revision.refs}:
                            return Path(revision.snapshot_path)
        return None

    def download(self, file: str) -> Path:
        """Downloads one file, unless the cache has it."""
        from huggingface_hub import errors

        named = self.named
        if self._cached is not None:
            return self._cached / file
        with _explained(named):
            try:
                return Path(self._api.hf_hub_download(named.repo, file, revision=named.revision))
            except errors.EntryNotFoundError as error:
                if isinstance(error, errors.LocalEntryNotFoundError):
                    raise
        raise SourceError(f"{named}: {named.repo} has no file {file}; it has {_listed(self.files())}")

    def snapshot(self, files: Sequence[str]) -> Path:
        """Downloads files, unless the cache has them, and returns the folder that they are in."""
        named = self.named
        if self._cached is not None:
            return self._cached
        with _explained(named):
            patterns = [glob.escape(file) for file in files]
            return Path(self._api.snapshot_download(named.repo, revision=named.revision, allow_patterns=patterns))


@contextmanager
def _explained(named: HubPath) -> Iterator[None]:
    """Turns the errors of huggingface_hub, and of the HTTP library beneath it, into one line."""
    try:
        yield
    except ShiraDeltaError:
        raise
    except Exception as error:  # the HTTP library, and so its errors, differ between releases
        raise _explain(error, named) from error


def _explain(error: Exception, named: HubPath) -> SourceError:
    from huggingface_hub import errors

    cause: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__  # it was asked for, and is not in the cache either
    if isinstance(cause, errors.GatedRepoError):
        return SourceError(
            f"{named}: {named.repo} is gated; accept its terms on its page, and log in with `hf auth login`"
        )
    if isinstance(cause, errors.RepositoryNotFoundError | errors.HFValidationError):
        return SourceError(
            f"{named}: no such file or folder here, and the Hub has no repository {named.repo}; check the name, or log"
            " in with `hf auth login` if it is private"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return SourceError(
            f"{named}: {named.repo} has no revision {named.revision!r}; give a branch, a tag or a commit of it"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        why = cause.server_message or brief(str(cause), 200)
        return SourceError(f"{named}: the Hub refuses it ({cause.response.status_code}, {why}); try again later")
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return UnreachableError(
            f"{named}: no such file or folder here, nor in the Hub's cache, and HF_HUB_OFFLINE is set; check the path,"
            " or unset it"
        )
    return UnreachableError(
        f"{named}: no such file or folder here, and it cannot be had from the Hub ({brief(str(cause), 200)}); check the"
        " path and the connection"
    )
