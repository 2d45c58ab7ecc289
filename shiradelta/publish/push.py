"""`push_to_hub`: uploads a `.shd` file with a model card to a repository of the Hub, in one commit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiradelta.errors import ArgumentError, ShiraDeltaError, TargetError
from shiradelta.format import registry
from shiradelta.io.hub import is_repo
from shiradelta.io.reader import local_source, open_delta
from shiradelta.publish.card import About, model_card
from shiradelta.signing.form import SUFFIX as SIGNATURE_SUFFIX
from shiradelta.util.arguments import BOOL, PATH, TEXT, TEXTS, checked
from shiradelta.util.optional import importing
from shiradelta.util.text import brief

_CARD = "README.md"


@dataclass(frozen=True)
class PushReport:
    """Report of `push_to_hub`.

    Attributes:
        repo: `user/repo`.
        path: what `load` and the commands take: `user/repo/file`, with the branch if one was given.
        url: the commit's page.
        commit: the commit.
        files: the files in the commit.
        warnings: warnings for the user.
    """

    repo: str
    path: str
    url: str
    commit: str
    files: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@checked(
    delta=PATH,
    repo=TEXT,
    revision=TEXT,
    message=TEXT,
    private=BOOL,
    base_model=TEXT,
    base_revision=TEXT,
    license=TEXT,
    tags=TEXTS,
    replace_card=BOOL,
)
def push_to_hub(
    delta: str | os.PathLike[str],
    repo: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    private: bool = False,
    base_model: str | None = None,
    base_revision: str | None = None,
    license: str | None = None,
    tags: str | Sequence[str] = (),
    replace_card: bool = False,
) -> PushReport:
    """Uploads a `.shd` file to the Hugging Face Hub, with a model card, and its signature if that lies beside it.

    The file is checked as a whole first.  A repository that is not there is made.  All files are in one commit: a push
    that fails changes no file.

    Args:
        delta: the file.
        repo: `user/repo`.
        name: what the file is called there; None for its own name.
        revision: a branch, which is made from the main one if it is not there; None for the main branch.
        message: of the commit.
        private: make the repository private.
        base_model: the base's id on the Hub; None for what the file's metadata say.
        base_revision: the base's commit or branch; None for what the file's metadata say of that base.
        license: an identifier such as "apache-2.0"; None for what the file's metadata say.
        tags: further tags of the card.
        replace_card: write a new card where the repository has one; it is kept otherwise.

    Raises:
        ArgumentError: the repository or the base is not named `user/repo`, or `name` does not end in `.shd`.
        FormatError: the file is damaged.
        TargetError: the Hub refuses it or does not answer, or a repository that is to be private is public.
        MissingDependencyError: huggingface_hub or jinja2 is not installed.
    """
    for what, given in (("repository", repo), ("base", base_model)):
        if given is not None and not is_repo(given):
            raise ArgumentError(f"{given}: is not the name of a {what} on the Hub; give it as user/repo")
    path = Path(local_source(delta))
    file = path.name if name is None else name
    with open_delta(path) as opened:
        opened.verify_without_base()
        if not file.endswith(registry.SUFFIX):
            raise ArgumentError(f"{file}: is no name of a delta; give name= (--name) that ends in {registry.SUFFIX}")
        about = _about(opened.metadata, repo, file, base_model, base_revision, license, tags)
        card = model_card(opened, about)
    with importing("shiradelta.push_to_hub"):
        from huggingface_hub import CommitOperationAdd, HfApi
    api: Any = HfApi(library_name="shiradelta")
    contents: dict[str, Any] = {file: path}
    signature = Path(f"{path}{SIGNATURE_SUFFIX}")
    if signature.is_file():
        contents[file + SIGNATURE_SUFFIX] = signature
    with _explained(repo):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.model_info(repo).private:
            raise TargetError(f"{repo}: is there already and is public; make it private in its settings first")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        has_card = api.file_exists(repo, _CARD, revision=revision)
        if replace_card or not has_card:
            contents[_CARD] = card.encode()
        operations = [
            CommitOperationAdd(name, os.fspath(one) if isinstance(one, Path) else one) for name, one in contents.items()
        ]
        commit = api.create_commit(repo, operations, commit_message=message or f"Add {file}", revision=revision)
    return PushReport(
        repo=repo,
        path=f"{repo}{'' if revision is None else '@' + revision.replace('/', '%2F')}/{file}",
        url=commit.commit_url,
        commit=commit.oid,
        files=tuple(contents),
        warnings=tuple(_warnings(about, kept=_CARD not in contents)),
    )


def _about(
    metadata: dict[str, str],
    repo: str,
    file: str,
    base: str | None,
    revision: str | None,
    license: str | None,
    tags: str | Sequence[str],
) -> About:
    """What the card says, from the arguments and the file's metadata."""
    recorded = metadata.get("base", "")
    if base is None and is_repo(recorded):
        base = recorded
    if revision is None and base == recorded:
        revision = metadata.get("base_revision")
    license = license or metadata.get("license")
    return About(
        repo=repo,
        file=file,
        base=base,
        base_revision=None if base is None else revision,
        license=license and license.lower(),
        tags=[tags] if isinstance(tags, str) else list(tags),
    )


def _warnings(about: About, kept: bool) -> Iterator[str]:
    if kept:
        yield f"{_CARD} is there already and was kept; --replace-card (replace_card=True) writes a new one"
        return
    if about.base is None:
        yield "the card names no base, as the file does not say its id on the Hub; give --base-model user/repo"
    if about.license is None:
        yield "the card names no licence; give --license, such as apache-2.0"


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turns the errors of huggingface_hub, and of the HTTP library beneath it, into one line."""
    from huggingface_hub import errors

    try:
        yield
    except ShiraDeltaError:
        raise
    except errors.OfflineModeIsEnabled:
        raise TargetError(f"{repo}: HF_HUB_OFFLINE is set, so nothing is pushed; unset it") from None
    except errors.HfHubHTTPError as error:
        status, why = error.response.status_code, error.server_message or brief(str(error), 200)
        remedy = "log in with `hf auth login` as a user who may write it" if status in (401, 403) else "try again later"
        raise TargetError(f"{repo}: the Hub refuses the push ({status}, {why}); {remedy}") from None
    except ValueError as error:  # such as a licence that the Hub does not know
        raise TargetError(f"{repo}: the Hub refuses the push ({brief(str(error), 200)}); correct it") from None
    except Exception as error:  # the HTTP library, and so its errors, differ between releases
        raise TargetError(f"{repo}: cannot be pushed ({brief(str(error), 200)}); check the connection") from error
