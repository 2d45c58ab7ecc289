"""A stand-in of the Hub's HTTP interface on this machine: what huggingface_hub calls to read and to push models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

Files = dict[str, bytes]
TOKEN = "hf_secret"


def files_of(folder: Path) -> Files:
    """The files in a folder, by their paths in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Repository:
    """Commits and branches of a model's repository.

    Attributes:
        commits: commit -> files.
        refs: branch -> commit.
        messages: commit -> its message.
        private: whether only the owner of `TOKEN` sees it.
    """

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Files, message: str = "", branch: str = "main") -> str:
        """Adds files to a branch; returns the commit."""
        after = {**self.commits.get(self.refs.get(branch, ""), {}), **files}
        about = json.dumps([len(self.commits), message, sorted(after)])
        sha = hashlib.sha1(about.encode()).hexdigest()
        self.commits[sha], self.refs[branch], self.messages[sha] = after, sha, message
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch or a commit names."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class Hub:
    """The server.

    Attributes:
        url: where it listens.
        repos: `user/repo` -> its contents.
        asked: method and path of each request.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repository] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def add(self, repo: str, files: Files, **about: bool) -> str:
        """A repository with one commit, which is returned."""
        self.repos[repo] = Repository(**about)
        return self.repos[repo].commit(files)

    @contextmanager
    def running(self) -> Iterator[Hub]:
        """Answers in a thread."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class Refused(Exception):  # noqa: N818
    """A status, and the code by which huggingface_hub tells what is missing."""

    def __init__(self, status: int, code: str = "", message: str = "", **more: str) -> None:
        self.status, self.code, self.message = status, code, message
        self.about = {"error": message, "errors": [{"message": message}], **more}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{method} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers: dict[str, str] = {}
        try:
            route, found = next(
                (route, found)
                for (verb, pattern), route in ROUTES.items()
                if verb in (method, method.replace("HEAD", "GET")) and (found := re.fullmatch(pattern, path))
            )
            answer = route(self, body, *map(unquote, found.groups()))
            status, (content, headers) = 200, answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
        except StopIteration:
            status, content = 501, path.encode()
        except Refused as refused:
            status, content = refused.status, json.dumps(refused.about).encode()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(content)

    @property
    def _is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, repo: str) -> Repository:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self._is_owner):
            raise Refused(401, "RepoNotFound", "Repository not found")
        return found

    def _files(self, repo: str, revision: str) -> tuple[str, Files]:
        found = self._repo(repo)
        sha = found.resolve(revision)
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, found.commits[sha]

    def _owned(self) -> None:
        if not self._is_owner:
            raise Refused(401, "", "Invalid username or password.")

    def about(self, body: bytes, repo: str, revision: str = "main") -> Any:
        sha, files = self._files(repo, revision)
        siblings = [{"rfilename": name} for name in files]
        return {"id": repo, "sha": sha, "private": self._repo(repo).private, "siblings": siblings}

    def tree(self, body: bytes, repo: str, revision: str) -> Any:
        _, files = self._files(repo, revision)
        return [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in files.items()]

    def file(self, body: bytes, repo: str, revision: str, name: str) -> Any:
        sha, files = self._files(repo, revision)
        if self._repo(repo).gated:
            raise Refused(403, "GatedRepo", "Access to this model is restricted")
        if name not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        return files[name], {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": sha}

    def create(self, body: bytes) -> Any:
        self._owned()
        about = json.loads(body)
        repo = f"{about.get('organization') or 'user'}/{about['name']}"
        if repo in self.hub.repos:
            raise Refused(409, "", "You already created this model repo", url=f"{self.hub.url}/{repo}")
        self.hub.add(
            repo, {".gitattributes": b""}, private=about.get("visibility") == "private" or bool(about.get("private"))
        )
        return {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}

    def validate(self, body: bytes) -> Any:
        _, head, _ = json.loads(body)["content"].split("---\n", 2)
        if (license := yaml.safe_load(head).get("license", "mit")) not in ("mit", "apache-2.0"):
            raise Refused(400, "", f'"license" must be one of mit, apache-2.0, not {license}')
        return {}

    def preupload(self, body: bytes, repo: str, revision: str) -> Any:
        self._owned()
        names = [file["path"] for file in json.loads(body)["files"]]
        return {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}

    def commit(self, body: bytes, repo: str, revision: str) -> Any:
        self._owned()
        self._files(repo, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        new = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"}
        sha = self._repo(repo).commit(new, lines[0]["value"]["summary"], revision)
        return {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"}

    def branch(self, body: bytes, repo: str, branch: str) -> Any:
        self._owned()
        found = self._repo(repo)
        if branch in found.refs:
            raise Refused(409, "", "Reference already exists")
        found.refs[branch] = found.refs["main"]
        return {}


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


_REPO, _PART = "([^/]+/[^/]+)", "([^/]+)"
ROUTES: dict[tuple[str, str], Callable[..., Any]] = {
    ("GET", f"/api/models/{_REPO}"): _Handler.about,
    ("GET", f"/api/models/{_REPO}/revision/{_PART}"): _Handler.about,
    ("GET", f"/api/models/{_REPO}/tree/{_PART}"): _Handler.tree,
    ("GET", f"/{_REPO}/resolve/{_PART}/(.+)"): _Handler.file,
    ("POST", "/api/repos/create"): _Handler.create,
    ("POST", "/api/validate-yaml"): _Handler.validate,
    ("POST", f"/api/models/{_REPO}/preupload/{_PART}"): _Handler.preupload,
    ("POST", f"/api/models/{_REPO}/commit/{_PART}"): _Handler.commit,
    ("POST", f"/api/models/{_REPO}/branch/{_PART}"): _Handler.branch,
}
