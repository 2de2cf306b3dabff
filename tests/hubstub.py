"""A stand-in for the Hugging Face Hub: it serves local folders by the Hub's protocol, and fails on demand.

Point ``HF_ENDPOINT`` at ``HubStub().url`` (with ``HF_HUB_DISABLE_XET=1``, both before huggingface_hub is imported).
By hand: ``python tests/hubstub.py --port 0 --repo org/name=FOLDER`` prints its address and serves until interrupted.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import json
import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")
LFS_BYTES = 10_000_000
CHUNK_BYTES = 1 << 20
FOREVER = -1

Kind = Literal[
    "cut", "reset", "stall", "flip", "length", "ignore_range", "range", "encoding", "garbage", "etag", "redirect",
    "status", "rate",
]  # fmt: skip
Outcome = Literal["open", "complete", "cut", "client_closed"]
BODY_KINDS = frozenset(
    {"cut", "reset", "stall", "flip", "length", "ignore_range", "range", "encoding", "garbage", "rate"}
)
Lie = Callable[[dict[str, Any]], object]  # takes the listing as it should be, returns what is sent


# ---------------------------------------------------------------- what tests handle
@dataclass
class Fault:
    """One scripted fault; the first live fault that matches a request is used, one per request.

    ``path``: a glob without leading slash is matched with the file's path in its repository, one with a leading slash
    with the path of the URL (``/api/models/*``: listings; ``/*``: everything). ``times``: uses left, or FOREVER;
    ``skip``: so many matching requests go through first.
    ``at_bytes`` counts bytes of this response's body: cut, reset and stall after that many (stall at -1: before the
    headers), flip that byte, length: that many more (or fewer: negative; 0 means one fewer) than the file has.
    range: a Content-Range that is one byte off; encoding: a compressed body; garbage: a listing that is no JSON.
    """

    kind: Kind
    path: str = "*"
    times: int = 1
    at_bytes: int = 0
    status: int = 500
    seconds: int = 1  # Retry-After of a 429 or 503
    bytes_per_second: int = 64_000  # rate
    location: str = ""  # redirect; "{path}" stands for the path and query of the request
    code: str = ""  # X-Error-Code of a status
    method: str = "*"  # GET, HEAD or * (faults of the body only ever hit GET)
    skip: int = 0
    used: int = 0

    def matches(self, method: str, url_path: str, file_path: str | None) -> bool:
        """Say whether this fault is live and meant for such a request."""
        before_head = self.kind == "stall" and self.at_bytes < 0
        if self.times == 0 or self.method not in ("*", method):
            return False
        if method != "GET" and self.kind in BODY_KINDS and not before_head:
            return False
        subject = url_path if self.path.startswith("/") else file_path
        return subject is not None and fnmatchcase(subject, self.path)

    def use(self) -> None:
        """Count one use."""
        self.used += 1
        self.times -= 1 if self.times > 0 else 0


@dataclass
class Request:
    """One request as the stand-in saw it; header names are in lower case, ``sent`` counts bytes of the body."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    sent: int = 0
    outcome: Outcome = "open"


# ---------------------------------------------------------------- repositories
@dataclass(frozen=True)
class HubFile:
    """A file of a repository, with the identifiers that the Hub gives it."""

    path: str
    size: int
    blob_id: str
    sha256: str | None
    source: Path | bytes

    @property
    def etag(self) -> str:
        """The name of the blob in the client's cache: sha256 for large files, git's blob id for the rest."""
        return self.sha256 or self.blob_id

    def open(self) -> BinaryIO:
        """Open the content for reading."""
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")

    def as_sibling(self, blobs: bool) -> dict[str, Any]:
        """The entry of this file in a model's ``siblings``."""
        if not blobs:
            return {"rfilename": self.path}
        lfs = {"sha256": self.sha256, "size": self.size, "pointerSize": len(self.pointer())}
        extra = {"lfs": lfs} if self.sha256 else {}
        return {"rfilename": self.path, "size": self.size, "blobId": self.blob_id, **extra}

    def as_entry(self) -> dict[str, Any]:
        """The entry of this file in a tree."""
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer())}
        extra = {"lfs": lfs} if self.sha256 else {}
        return {"type": "file", "path": self.path, "size": self.size, "oid": self.blob_id, **extra}

    def pointer(self) -> bytes:
        """The small file that git keeps in place of a large one."""
        return lfs_pointer(self.sha256 or "", self.size)


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit."""

    sha: str
    files: dict[str, HubFile]

    def entries(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """List files and folders below ``folder`` as the tree route does."""
        prefix = f"{folder}/" if folder else ""
        files = [file for file in self.files.values() if file.path.startswith(prefix)]
        parents = {str(parent) for file in files for parent in PurePosixPath(file.path).parents}
        folders = sorted(parent for parent in parents if parent != "." and parent.startswith(prefix))
        listed = [folder_entry(path) for path in folders] + [file.as_entry() for file in files]
        return [entry for entry in listed if recursive or "/" not in entry["path"][len(prefix) :]]


@dataclass
class Repository:
    """A repository: commits by branch or tag, and who may read it."""

    repo_id: str
    lie: Lie | None = None
    revisions: dict[str, Snapshot] = field(default_factory=dict)
    commits: dict[str, Snapshot] = field(default_factory=dict)
    gated: bool = False
    private_token: str | None = None

    def hidden_from(self, token: str) -> bool:
        """A private repository does not exist for those without its token."""
        return self.private_token is not None and not self.gated and token != self.private_token

    def closed_to(self, token: str) -> bool:
        """A gated repository shows its listing to all, and its files to the holder of the token (if there is one)."""
        return self.gated and (self.private_token is None or token != self.private_token)


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text of a git LFS pointer file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def folder_entry(path: str) -> dict[str, Any]:
    """The entry of a folder in a tree."""
    return {"type": "directory", "path": path, "size": 0, "oid": git_blob_id(path.encode())}


def git_blob_id(content: bytes) -> str:
    """The id that git gives to a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256_of(source: Path | bytes) -> str:
    """Hash some content."""
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    state = source.stat()
    return sha256_of_file(source, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def sha256_of_file(path: Path, _size: int, _changed_ns: int) -> str:
    """Hash a file once for each state of it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def make_file(path: str, source: Path | bytes) -> HubFile:
    """Describe one file; large ones and weights are LFS files, as on the Hub."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if path.endswith(LFS_SUFFIXES) or size >= LFS_BYTES:
        sha256 = sha256_of(source)
        return HubFile(path, size, git_blob_id(lfs_pointer(sha256, size)), sha256, source)
    content = source if isinstance(source, bytes) else source.read_bytes()
    return HubFile(path, size, git_blob_id(content), None, source)


def make_snapshot(source: Path | Mapping[str, bytes]) -> Snapshot:
    """Describe a folder (or files given by name); the commit id depends on the content only."""
    if isinstance(source, Path):
        skipped = {".git", ".cache", "__pycache__"}
        found = (p for p in source.rglob("*") if p.is_file() and not skipped & set(p.relative_to(source).parts))
        contents: Mapping[str, Path | bytes] = {p.relative_to(source).as_posix(): p for p in found}
    else:
        contents = source
    files = {path: make_file(path, contents[path]) for path in sorted(contents)}
    listing = "".join(f"{file.path}\0{file.etag}\n" for file in files.values())
    return Snapshot(hashlib.sha1(listing.encode()).hexdigest(), files)


# ---------------------------------------------------------------- requests and replies
class HubError(Exception):
    """An error reply with the Hub's error code."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass(frozen=True)
class Target:
    """What a request asks for."""

    route: str
    repo_id: str
    revision: str
    path: str
    query: dict[str, list[str]]

    def flag(self, name: str) -> bool:
        """Read a yes-or-no parameter."""
        return self.query.get(name, [""])[-1].lower() in ("true", "1")


@dataclass
class Signed:
    """A file at an address of its own, as the Hub's storage serves it, good for some requests."""

    file: HubFile
    key: str
    uses: int


REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
ROUTES = {
    "signed": re.compile(r"/signed/(?P<repo>[0-9]+)"),
    "tree": re.compile(rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?"),
    "info": re.compile(rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?"),
    "file": re.compile(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}


def parse_target(raw: str) -> Target | None:
    """Find the route of a request; None when the stand-in has no such route."""
    url = urlsplit(raw)
    for route, pattern in ROUTES.items():
        if match := pattern.fullmatch(url.path):
            part = {name: unquote(value or "") for name, value in match.groupdict().items()}
            revision = part.get("revision") or "main"
            return Target(route, part["repo"], revision, part.get("path", ""), parse_qs(url.query))
    return None


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """Turn a Range header into (start, end); None means the whole file."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header.strip())
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    end = min(size, int(last) + 1) if last else size
    if int(first) >= end:
        raise HubError(416, "", "Range not satisfiable", {"Content-Range": f"bytes */{size}"})
    return int(first), end


class Gate:
    """Something a reply waits at: opened by ``HubStub.release``, or left when the client goes away."""

    def __init__(self, stalling: bool) -> None:
        self.stalling = stalling
        self.opened = threading.Event()
        self._reader, self._writer = socket.socketpair()

    def open(self) -> None:
        """Let the reply go on."""
        self.opened.set()
        self._writer.send(b"x")

    def wait(self, connection: socket.socket) -> bool:
        """Wait without polling; True when opened, False when the client has closed its connection."""
        ready, _, _ = select.select([self._reader, connection], [], [])
        if self._reader in ready:
            return True
        if connection.recv(1, socket.MSG_PEEK):  # a pipelined request: the client is still there
            select.select([self._reader], [], [])
            return True
        return False

    def close(self) -> None:
        """Free the sockets."""
        self._reader.close()
        self._writer.close()


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    record: Request

    def do_GET(self) -> None:
        """Answer a GET."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer a HEAD."""
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent: tests read ``HubStub.requests``."""

    # -- routing
    def _answer(self) -> None:
        hub = self.server.hub
        target = parse_target(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.record = hub._remember(Request(self.command, self.path, headers))
        fault = hub._take_fault(self.command, urlsplit(self.path).path, target)
        try:
            self._dispatch(target, fault)
            hub._settle(self.record, "complete")
        except ConnectionError:
            self.close_connection = True
            hub._settle(self.record, "client_closed")

    def _dispatch(self, target: Target | None, fault: Fault | None) -> None:
        try:
            if fault and fault.kind == "stall" and fault.at_bytes < 0:
                self._wait_at_gate()
                fault = None
            if fault and fault.kind == "status":
                raise scripted_error(fault)
            self._serve(target, fault)
        except HubError as error:
            self._send_json({"error": str(error)}, None, error.status, error.headers)

    def _serve(self, target: Target | None, fault: Fault | None) -> None:
        if target is None:
            raise HubError(404, "", "The stand-in Hub has no such route")
        if target.route == "signed":
            self._serve_signed(self.server.hub._signature(target.repo_id), fault)
            return
        repository, snapshot = self.server.hub._find(target, self._token())
        if target.route == "file":
            self._serve_file(repository, snapshot, target, fault)
        elif fault and fault.kind == "redirect":
            self._send_head(302, {"Location": fault.location.replace("{path}", self.path), "Content-Length": "0"})
        elif target.route == "info":
            info = model_info(repository, snapshot, target.flag("blobs"))
            self._send_json(repository.lie(info) if repository.lie else info, fault)
        else:
            self._serve_tree(snapshot, target, fault)

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ").strip()

    def _serve_tree(self, snapshot: Snapshot, target: Target, fault: Fault | None) -> None:
        hub = self.server.hub
        entries = snapshot.entries(target.path, target.flag("recursive"))
        if target.path and not entries:
            raise HubError(404, "EntryNotFound", f"{target.path} does not exist", {"X-Repo-Commit": snapshot.sha})
        start = int(target.query.get("cursor", ["0"])[-1])
        end = start + hub.page_size
        headers = {}
        if end < len(entries):
            path = urlsplit(self.path).path
            recursive = str(target.flag("recursive")).lower()
            headers["Link"] = f'<{hub.url}{path}?recursive={recursive}&cursor={end}>; rel="next"'
        self._send_json(entries[start:end], fault, headers=headers)

    def _serve_file(self, repository: Repository, snapshot: Snapshot, target: Target, fault: Fault | None) -> None:
        commit = {"X-Repo-Commit": snapshot.sha}
        if repository.closed_to(self._token()):
            raise HubError(403, "GatedRepo", f"Access to model {repository.repo_id} is restricted", commit)
        if target.path not in snapshot.files:
            raise HubError(404, "EntryNotFound", f"{target.path} does not exist", commit)
        file = snapshot.files[target.path]
        key = f"{repository.repo_id}/{file.path}"
        headers = commit | file_headers(file, changed=fault is not None and fault.kind == "etag")
        if fault and fault.kind == "redirect":
            location = fault.location.replace("{path}", self.path)
            self._send_head(302, headers | {"Location": location, "Content-Length": "0"})
        elif self.server.hub.cdn is not None and file.sha256:
            location = self.server.hub.cdn._sign(file, key, self.server.hub.cdn_uses)
            self._send_head(302, headers | {"Location": location, "Content-Length": "0"})
        else:
            self._send_content(file, headers, fault, key)

    def _serve_signed(self, signed: Signed, fault: Fault | None) -> None:
        """Serve a file as the Hub's storage does: with an ETag of its own, and no word of the repository."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{signed.file.blob_id[:32]}"'
        self._send_content(signed.file, headers, fault, signed.key)

    # -- sending
    def _send_json(
        self, value: Any, fault: Fault | None, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        content = b"<html>" if fault and fault.kind == "garbage" else json.dumps(value).encode()
        all_headers = {"Content-Type": "application/json; charset=utf-8", **(headers or {})}
        self._send_content(HubFile("", len(content), "", None, content), all_headers, fault, "", status)

    def _send_head(self, status: int, headers: Mapping[str, str]) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send_content(
        self, file: HubFile, headers: Mapping[str, str], fault: Fault | None, key: str, status: int = 200
    ) -> None:
        part = self._wanted_range(file, headers, fault) if key else None
        start, end = part or (0, file.size)
        extra = (fault.at_bytes or -1) if fault and fault.kind == "length" else 0
        extra = max(extra, start - end)
        if fault and fault.kind == "encoding":
            self._send_compressed(file, headers, key, start, end)
            return
        off = 1 if fault and fault.kind == "range" else 0
        ranged = {"Content-Range": f"bytes {start + off}-{end - 1 + off}/{file.size}"} if part else {}
        self._send_head(206 if part else status, {**headers, **ranged, "Content-Length": str(end - start + extra)})
        if self.command == "HEAD":
            return
        with file.open() as stream:
            stream.seek(start)
            self._send_body(Body(self, stream, key), end - start + min(0, extra), fault)
            self.wfile.write(bytes(max(0, extra)))

    def _send_compressed(self, file: HubFile, headers: Mapping[str, str], key: str, start: int, end: int) -> None:
        with file.open() as stream:
            stream.seek(start)
            content = gzip.compress(stream.read(end - start))
        ranged = {"Content-Range": f"bytes {start}-{end - 1}/{file.size}", "Content-Encoding": "gzip"}
        self._send_head(206, {**headers, **ranged, "Content-Length": str(len(content))})
        if self.command != "HEAD":
            Body(self, io.BytesIO(content), key).send(len(content))

    def _wanted_range(self, file: HubFile, headers: Mapping[str, str], fault: Fault | None) -> tuple[int, int] | None:
        stale = self.headers.get("If-Range", headers["ETag"]) != headers["ETag"]
        if stale or self.command == "HEAD" or (fault and fault.kind == "ignore_range"):
            return None
        return parse_range(self.headers.get("Range", ""), file.size)

    def _send_body(self, body: Body, count: int, fault: Fault | None) -> None:
        at = max(0, min(fault.at_bytes, count)) if fault else 0
        if fault is None or fault.kind not in ("cut", "reset", "stall", "flip", "rate"):
            body.send(count)
        elif fault.kind == "rate":
            self._send_slowly(body, count, fault.bytes_per_second)
        elif fault.kind == "flip":
            at = max(0, min(at, count - 1))
            body.send(at)
            body.send(1, flip=True)
            body.send(count - at - 1)
        else:
            body.send(at)
            self._interrupt(fault)
            body.send(count - at)

    def _interrupt(self, fault: Fault) -> None:
        if fault.kind == "stall":
            self._wait_at_gate()
            return
        self.server.hub._settle(self.record, "cut")
        close_now(self.connection, hard=fault.kind == "reset")
        raise ConnectionAbortedError("cut by the script")

    def _wait_at_gate(self) -> None:
        gate = self.server.hub._enter_gate(stalling=True)
        try:
            if not gate.wait(self.connection):
                raise ConnectionAbortedError("the client has gone")
        finally:
            self.server.hub._leave_gate(gate)

    def _send_slowly(self, body: Body, count: int, bytes_per_second: int) -> None:
        gate = self.server.hub._enter_gate(stalling=False)
        step = max(1, bytes_per_second // 20)
        try:
            while count > 0 and not gate.opened.wait(step / bytes_per_second):
                body.send(min(step, count))
                count -= step
            body.send(count)
        finally:
            self.server.hub._leave_gate(gate)


class Body:
    """Copies bytes of an open file to a client, and counts them."""

    def __init__(self, handler: Handler, stream: BinaryIO, key: str) -> None:
        self.handler, self.stream, self.key = handler, stream, key

    def send(self, count: int, flip: bool = False) -> None:
        """Send the next ``count`` bytes, with the first one changed when ``flip`` is set."""
        while count > 0 and (chunk := self.stream.read(min(count, CHUNK_BYTES))):
            if flip:
                chunk = bytes([chunk[0] ^ 1]) + chunk[1:]
            self.handler.wfile.write(chunk)
            self.handler.server.hub._count(self.handler.record, self.key, len(chunk))
            count -= len(chunk)


def close_now(connection: socket.socket, hard: bool) -> None:
    """End a connection in the middle of a reply: orderly, or with a reset (which may drop bytes on their way)."""
    if not hard:
        connection.shutdown(socket.SHUT_RDWR)
        return
    raw = socket.socket(fileno=connection.detach())
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def scripted_error(fault: Fault) -> HubError:
    """The error reply of a ``status`` fault."""
    headers = {"Retry-After": str(fault.seconds)} if fault.status in (429, 503) else {}
    return HubError(fault.status, fault.code, f"Scripted error {fault.status}", headers)


def file_headers(file: HubFile, changed: bool) -> dict[str, str]:
    """The headers that describe a file, whatever part of it is sent."""
    etag = file.etag[::-1] if changed else file.etag
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", "ETag": f'"{etag}"'}
    if file.sha256:
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{etag}"'}
    return headers


def model_info(repository: Repository, snapshot: Snapshot, blobs: bool) -> dict[str, Any]:
    """The reply of the model route."""
    return {
        "id": repository.repo_id,
        "modelId": repository.repo_id,
        "sha": snapshot.sha,
        "private": repository.private_token is not None and not repository.gated,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "tags": [],
        "siblings": [file.as_sibling(blobs) for file in snapshot.files.values()],
    }


class Server(ThreadingHTTPServer):
    """The listening socket and its open connections."""

    request_queue_size = 128

    def __init__(self, hub: HubStub, port: int, tls: ssl.SSLContext | None = None) -> None:
        self.hub, self.tls = hub, tls
        self.connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", port), Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection and remember it."""
        connection, address = super().get_request()
        if self.tls:  # the handshake waits for the connection's own thread
            connection = self.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection and close it."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet about connections that a client or a fault has ended."""
        if not isinstance(sys.exception(), (ConnectionError, ssl.SSLError)):
            super().handle_error(request, client_address)

    def drop_connections(self) -> None:
        """End every open connection, kept-alive ones too."""
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                self.connections.discard(connection)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody trusts, and its key; needs the openssl command."""
    certificate, key = folder / "hub.pem", folder / "hub.key"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    command = [*make.split(), "-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


# ---------------------------------------------------------------- the stand-in
class HubStub:
    """A stand-in Hub on a loopback port; use it as a context manager.

    ``requests`` holds what was asked, ``bytes_served`` the bytes handed out for each ``repo/path``
    (handed to the network: a client that goes away may have read less). ``certificate`` and its key make it https.
    With ``cdn``, another stand-in, LFS files are there, at signed addresses that are good for ``cdn_uses`` requests.
    """

    def __init__(self, port: int = 0, page_size: int = 1000, certificate: tuple[Path, Path] | None = None) -> None:
        self.page_size = page_size
        self.cdn: HubStub | None = None
        self.cdn_uses = FOREVER
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if certificate else None
        if self._tls and certificate:
            self._tls.load_cert_chain(*certificate)
        self._signatures: list[Signed] = []
        self.requests: list[Request] = []
        self.bytes_served: Counter[str] = Counter()
        self._port = port
        self._repositories: dict[str, Repository] = {}
        self._faults: list[Fault] = []
        self._gates: set[Gate] = set()
        self._changed = threading.Condition()
        self._server: Server | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def start(self) -> Self:
        """Listen, and answer in background threads."""
        self._server = Server(self, self._port, self._tls)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True, name="hubstub").start()
        return self

    def close(self) -> None:
        """Stop listening and end every connection; ``start`` brings the same address back."""
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        server.server_close()
        server.drop_connections()
        self.release()

    @property
    def stalled(self) -> int:
        """How many replies are stalled just now."""
        with self._changed:
            return sum(gate.stalling for gate in self._gates)

    @property
    def url(self) -> str:
        """The address for HF_ENDPOINT."""
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self._port}"

    def add(
        self,
        repo_id: str,
        source: Path | str | Mapping[str, bytes],
        revision: str = "main",
        gated: bool = False,
        private_token: str | None = None,
    ) -> str:
        """Serve a folder (or files given by name) as a revision of a repository, and return its commit id.

        ``private_token`` alone hides the repository from others; with ``gated`` it opens the gate.
        """
        snapshot = make_snapshot(Path(source) if isinstance(source, str) else source)
        with self._changed:
            repository = self._repositories.setdefault(repo_id, Repository(repo_id))
            repository.gated, repository.private_token = gated, private_token
            repository.revisions[revision] = repository.commits[snapshot.sha] = snapshot
        return snapshot.sha

    def lie(self, repo_id: str, lie: Lie | None) -> None:
        """Let a repository's listing pass through a function before it is sent; None ends that."""
        with self._changed:
            self._repositories[repo_id].lie = lie

    def fault(self, kind: Kind | Fault, path: str = "*", **options: Any) -> Fault:
        """Add a fault to the end of the script: ``fault("cut", "*.safetensors", at_bytes=100)``."""
        fault = kind if isinstance(kind, Fault) else Fault(kind, path, **options)
        with self._changed:
            self._faults.append(fault)
        return fault

    def clear_faults(self) -> None:
        """Forget the script."""
        with self._changed:
            self._faults.clear()

    def release(self) -> None:
        """Let every stalled reply go on and every slow one go fast."""
        with self._changed:
            for gate in self._gates:
                gate.open()

    def wait(self, condition: Callable[[], object], seconds: float = 30) -> bool:
        """Wait until a condition on this object holds, such as ``lambda: hub.stalled``; False when it never did."""
        with self._changed:
            return bool(self._changed.wait_for(condition, seconds))

    def asked(self, path: str = "*", method: str = "*") -> list[Request]:
        """The requests so far whose URL path matches a glob."""
        wanted = (r for r in list(self.requests) if method in ("*", r.method))
        return [r for r in wanted if fnmatchcase(unquote(urlsplit(r.path).path), path)]

    # -- for the handler
    def _find(self, target: Target, token: str) -> tuple[Repository, Snapshot]:
        with self._changed:
            same = (known for known in self._repositories if known.lower() == target.repo_id.lower())
            repository = self._repositories.get(next(same, ""))
            if repository is None or repository.hidden_from(token):
                raise HubError(404, "RepoNotFound", "Repository not found")
            snapshot = repository.revisions.get(target.revision) or repository.commits.get(target.revision)
        if snapshot is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {target.revision}")
        return repository, snapshot

    def _take_fault(self, method: str, url_path: str, target: Target | None) -> Fault | None:
        file_path = target.path if target and target.route == "file" else None
        with self._changed:
            for fault in self._faults:
                if not fault.matches(method, unquote(url_path), file_path):
                    continue
                if not fault.skip:
                    fault.use()
                    return fault
                fault.skip -= 1
            return None

    def _sign(self, file: HubFile, key: str, uses: int) -> str:
        with self._changed:
            self._signatures.append(Signed(file, key, uses))
            return f"{self.url}/signed/{len(self._signatures) - 1}"

    def _signature(self, number: str) -> Signed:
        with self._changed:
            known = len(self._signatures) > int(number)
            if not known or self._signatures[int(number)].uses == 0:
                raise HubError(403, "", "The signature has expired")
            signed = self._signatures[int(number)]
            signed.uses -= 1 if signed.uses > 0 else 0
            return signed

    def _remember(self, request: Request) -> Request:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
        return request

    def _settle(self, request: Request, outcome: Outcome) -> None:
        with self._changed:
            request.outcome = outcome if request.outcome == "open" else request.outcome
            self._changed.notify_all()

    def _count(self, request: Request, key: str, sent: int) -> None:
        with self._changed:
            request.sent += sent
            if key:
                self.bytes_served[key] += sent
            self._changed.notify_all()

    def _enter_gate(self, stalling: bool) -> Gate:
        gate = Gate(stalling)
        with self._changed:
            self._gates.add(gate)
            self._changed.notify_all()
        return gate

    def _leave_gate(self, gate: Gate) -> None:
        with self._changed:
            self._gates.discard(gate)
            self._changed.notify_all()
        gate.close()


# ---------------------------------------------------------------- by hand
def read_arguments(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve folders as repositories of a stand-in Hugging Face Hub.")
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1 (default: a free one)")
    parser.add_argument("--repo", action="append", default=[], metavar="NAME[@REVISION]=FOLDER", help="may be repeated")
    parser.add_argument("--gated", action="append", default=[], metavar="NAME", help="make a repository gated")
    return parser.parse_args(list(arguments) if arguments is not None else None)


def main() -> None:
    """Serve until interrupted or terminated."""
    arguments = read_arguments()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with HubStub(arguments.port) as hub:
        for item in arguments.repo:
            name, _, folder = item.partition("=")
            repo_id, _, revision = name.partition("@")
            if not Path(folder).is_dir():
                raise SystemExit(f"--repo {item}: no such folder")
            hub.add(repo_id, Path(folder), revision or "main", gated=repo_id in arguments.gated)
        print(hub.url, flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
