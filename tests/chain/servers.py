"""A server that tests start: plain files with ranges, and S3's requests; it fails where it is told to."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from importlib.util import find_spec
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import Request, urlopen
from xml.sax.saxutils import escape

import pytest

from shiradelta.chain.objects import ObjectFiles
from shiradelta.chain.remote import RemoteStore

#: Clients of S3, those that are installed.
CLIENTS = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name}"))
    for name in ("obstore", "s3fs")
]
#: (method, key, number of the request) -> what happens: "" as it should be, or a name of `Faults`.
Faults = Callable[[str, str, int], str]


class ObjectServer:
    """Files by their keys, over HTTP as plain web servers and S3 give them.

    A fault is "503" (refused), "lost" (done, and the answer is lost), "cut" (a body ends early), "damaged" (a bit of a
    body is another one).

    Attributes:
        files: key -> bytes; for S3 the key begins with the bucket.
        faults: says what goes wrong.
        conditions: whether `If-Match` and `If-None-Match` of a PUT are looked at.
        has_conditions: whether a PUT with them is accepted.
        log: (method, key, range) of each request.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: Faults = lambda method, key, number: ""
        self.conditions = self.has_conditions = True
        self.parts: dict[str, dict[int, bytes]] = {}
        self.log: list[tuple[str, str, str]] = []
        self.lock = Lock()
        self.url = ""

    def put(self, key: str, body: bytes, match: str | None, none_match: str | None) -> int:
        """Stores a file if its conditions hold; the status."""
        if not self.has_conditions and (match or none_match):
            return 501
        with self.lock:
            found = self.files.get(key)
            if self.conditions and none_match == "*" and found is not None:
                return 412
            if self.conditions and match is not None and (found is None or match != tag(found)):
                return 412 if found is not None else 404
            self.files[key] = body
            return 200

    def listing(self, bucket: str, prefix: str) -> str:
        """The answer of ListObjectsV2, without pages and folders."""
        start = f"{bucket}/{prefix}"
        rows = [(key[len(bucket) + 1 :], body) for key, body in sorted(self.files.items()) if key.startswith(start)]
        found = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{escape(tag(body))}</ETag><Size>{len(body)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key, body in rows
        )
        return (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{escape(bucket)}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(rows)}</KeyCount>"
            f"<MaxKeys>1000000</MaxKeys><IsTruncated>false</IsTruncated>{found}</ListBucketResult>"
        )


def tag(body: bytes) -> str:
    """The ETag of a file."""
    return f'"{hashlib.md5(body).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: ObjectServer

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "aws-chunked" not in (self.headers.get("Content-Encoding") or ""):
            return raw
        found, at = b"", 0
        while size := int(raw[at : (end := raw.index(b"\r\n", at))].split(b";")[0], 16):
            found += raw[end + 2 : end + 2 + size]
            at = end + 2 + size + 2
        return found

    def _handled(self) -> None:
        where = urlsplit(self.path)
        key, query = unquote(where.path).lstrip("/"), parse_qs(where.query, keep_blank_values=True)
        body = self._body()
        with self.objects.lock:
            self.objects.log.append((self.command, key, self.headers.get("Range") or ""))
            fault = self.objects.faults(self.command, key, len(self.objects.log))
        if fault == "503":
            self._answer(503, b"")
            return
        status, answer, headers = self._done(key, query, body)
        if fault == "lost":
            self.close_connection = True
            return
        if fault == "damaged" and answer:
            answer = answer[:-1] + bytes([answer[-1] ^ 1])
        self._answer(status, answer, headers, cut=fault == "cut")

    def _done(self, key: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, headers)."""
        objects = self.objects
        if "uploads" in query or "uploadId" in query:
            return self._in_parts(key, query, body)
        if self.command == "PUT":
            status = objects.put(key, body, self.headers.get("If-Match"), self.headers.get("If-None-Match"))
            if status == 200:
                return status, b"", {"ETag": tag(body)}
            return status, _error({412: "PreconditionFailed", 404: "NoSuchKey", 501: "NotImplemented"}[status]), {}
        if self.command == "POST":  # several are removed
            keys = re.findall(r"<Key>([^<]*)</Key>", body.decode())
            for each in keys:
                objects.files.pop(f"{key.rstrip('/')}/{each}", None)
            removed = "".join(f"<Deleted><Key>{each}</Key></Deleted>" for each in keys)
            return 200, f"<DeleteResult>{removed}</DeleteResult>".encode(), {}
        if self.command == "DELETE":
            objects.files.pop(key, None)
            return 204, b"", {}
        if "list-type" in query:
            return 200, objects.listing(key.rstrip("/"), query.get("prefix", [""])[0]).encode(), {}
        found = objects.files.get(key)
        if found is None:
            return 404, _error("NoSuchKey"), {}
        headers = {"ETag": tag(found), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "Accept-Ranges": "bytes"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return 200, found, headers
        start, stop = int(part[1]), min(int(part[2] or len(found)) + 1, len(found))
        if start >= len(found):
            return 416, _error("InvalidRange"), {}
        return 206, found[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(found)}"}

    def _in_parts(self, key: str, query: dict[str, list[str]], body: bytes) -> tuple[int, bytes, dict[str, str]]:
        """An upload in parts, as S3 has it for large files: it begins, a part, its end."""
        with self.objects.lock:
            parts = self.objects.parts
            if "uploads" in query:
                upload = f"upload{len(self.objects.log)}"
                parts[upload], answer = {}, f"<UploadId>{upload}</UploadId>"
                return 200, f"<InitiateMultipartUploadResult>{answer}</InitiateMultipartUploadResult>".encode(), {}
            upload = query["uploadId"][0]
            if self.command == "PUT":
                parts[upload][int(query["partNumber"][0])] = body
                return 200, b"", {"ETag": tag(body)}
            if self.command == "DELETE":
                parts[upload].clear()
                return 204, b"", {}
            self.objects.files[key] = whole = b"".join(part for _, part in sorted(parts.pop(upload).items()))
        answer = f"<ETag>{escape(tag(whole))}</ETag>"
        return 200, f"<CompleteMultipartUploadResult>{answer}</CompleteMultipartUploadResult>".encode(), {}

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cut:
            body, self.close_connection = body[: len(body) // 2], True
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _handled  # noqa: N815 - the names that http.server calls


def _error(code: str) -> bytes:
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()


@contextmanager
def serving() -> Iterator[ObjectServer]:
    """A server of no files yet, on this machine."""
    objects = ObjectServer()
    handler = type("Handler", (_Handler,), {"objects": objects})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    objects.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield objects
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def bucket(server: ObjectServer, client: str, monkeypatch: pytest.MonkeyPatch) -> RemoteStore:
    """A store in a bucket of a server, through a client."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    if client == "s3fs":
        options = {"client_kwargs": {"endpoint_url": server.url}, "config_kwargs": {"retries": {"max_attempts": 1}}}
        return RemoteStore("s3://bucket/run", skip_instance_cache=True, **options)

    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 's3fs'", name="s3fs")

    with monkeypatch.context() as patch:
        patch.setattr("fsspec.core.url_to_fs", missing)
        store = RemoteStore("s3://bucket/run", endpoint=server.url, client_options={"allow_http": True})
    assert isinstance(store._fs, ObjectFiles)
    return store


@contextmanager
def moto_server() -> Iterator[str]:
    """The URL of moto's server, with an empty bucket.

    Raises:
        ImportError: moto is not installed.
    """
    moto: Any = import_module("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it tells of every request
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        for method, path in (("POST", "moto-api/reset"), ("PUT", "bucket")):  # it keeps its buckets in the process
            urlopen(Request(f"{url}/{path}", method=method)).close()
        yield url
    finally:
        server.stop()
