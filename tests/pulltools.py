"""What the tests of downloads share: small repositories, servers with caches of their own, and what must hold."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from harness import Json, Server, wait_until
from hubstub import HubStub, git_blob_id

CONFIGURATION = b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
PARTIAL_SUFFIX = ".ai-server.incomplete"
MEBIBYTE = 1024 * 1024
SEGMENT = 2 * MEBIBYTE
FINAL = ("succeeded", "failed", "cancelled")


# -- small repositories -------------------------------------------------------


@functools.lru_cache(maxsize=64)
def weights(size: int = 8, seed: int = 0) -> bytes:
    """Sound weights: one tensor of `size` bytes, which are random."""
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + random.Random(seed).randbytes(size)


def model(size: int = 8, seed: int = 0) -> dict[str, bytes]:
    """The files of a small model that a pull accepts."""
    return {"config.json": CONFIGURATION, "model.safetensors": weights(size, seed)}


# -- servers ------------------------------------------------------------------


def make_server(stub: HubStub, folder: Path, *arguments: str, fake: bool = False, **more: Any) -> Server:
    """A server with a Hub cache of its own, which gives up soon."""
    quick = {"PULL_STALL_SECONDS": "1", "PULL_TRIES": "2", "DISK_RESERVE": "0"}
    settings = {"HF_ENDPOINT": stub.url, "HF_HOME": str(folder / "hub"), **quick, **more}
    return Server(folder, *arguments, fake=fake, **settings)


@contextmanager
def started(server: Server) -> Iterator[Server]:
    """A server that the test itself stops, kills or starts again; nothing of it is left afterwards."""
    server.start()
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()
        server.output.close()
        server.client.close()


def cache_of(server: Server) -> Path:
    """The folder of the Hub's cache that a server fills."""
    return Path(server._environment["HF_HOME"]) / "hub"


def accepted(server: Server, name: str, **fields: Any) -> str:
    """Start a pull that must be a new job; returns its id."""
    response = server.client.post("/pull", json={"model": name, **fields})
    assert response.status_code == 202, response.text
    job_id: str = response.json()["id"]
    return job_id


def job_of(server: Server, job_id: str) -> Json:
    """One job."""
    job: Json = server.client.get(f"/jobs/{job_id}").json()
    return job


def jobs_of(server: Server) -> list[Json]:
    """All jobs."""
    jobs: list[Json] = server.client.get("/jobs").json()["jobs"]
    return jobs


def succeeded(server: Server, name: str, **fields: Any) -> Json:
    """Pull a model, which must work; returns the job."""
    job = server.pull(name, **fields)
    assert job["status"] == "succeeded", job
    return job


def failed(server: Server, name: str, **fields: Any) -> Json:
    """Pull a model, which must fail; returns the job."""
    job = server.pull(name, **fields)
    assert job["status"] == "failed", job
    return job


def settle(server: Server, stub: HubStub) -> None:
    """End what a test left behind, for the next one."""
    stub.clear_faults()
    stub.cdn = None
    for job in jobs_of(server):
        if job["status"] not in FINAL:
            server.client.delete(f"/jobs/{job['id']}")
    stub.release()
    wait_until(lambda: not workers(server), what="the end of the workers")


def workers(server: Server) -> list[psutil.Process]:
    """The server's pull workers that still live."""
    return [child for child in server.children() if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    """Whether this is a living pull worker."""
    with suppress(psutil.Error):
        return "--worker" in process.cmdline()
    return False


# -- the stand-in -------------------------------------------------------------


def stalled(stub: HubStub, count: int = 1) -> None:
    """Wait until so many downloads hang."""
    assert stub.wait(lambda: stub.stalled == count), f"{stub.stalled} downloads hang, not {count}"


def served(stub: HubStub, repository: str) -> dict[str, int]:
    """How many bytes of each file of a repository went over the wire."""
    sizes = dict(stub.bytes_served)
    return {
        name.removeprefix(f"{repository}/"): size for name, size in sizes.items() if name.startswith(f"{repository}/")
    }


def ranges(stub: HubStub, repository: str, name: str = "model.safetensors") -> list[tuple[int, int]]:
    """The ranges of a file that were asked for, in order: first byte and the one after the last."""
    found = []
    for request in stub.asked(f"/{repository}/resolve/*/{name}", "GET"):
        first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
        found.append((int(first), int(last) + 1))
    return found


# -- what must hold of a cache ------------------------------------------------


def folder_of(cache: Path, repository: str) -> Path:
    """Where a repository is in the cache."""
    return cache / ("models--" + repository.replace("/", "--"))


def digest_of(path: Path) -> str:
    """The digest of a blob, of the kind that it is named by: sha256, or git's id; its name if it went just now."""
    try:
        facts = path.stat()
        return _digest_at(path, facts.st_ino, facts.st_mtime_ns, facts.st_size)
    except FileNotFoundError:
        return path.name


@functools.lru_cache(maxsize=10_000)
def _digest_at(path: Path, *_: int) -> str:
    content = path.read_bytes()
    return hashlib.sha256(content).hexdigest() if len(path.name) == 64 else git_blob_id(content)


def wrong_bytes(cache: Path) -> list[str]:
    """Every file that others can see and that has not the digest of its name; none is what is promised."""
    blobs = (path for path in cache.glob("models--*/blobs/*") if not path.name.endswith(".incomplete"))
    wrong = [str(path) for path in blobs if digest_of(path) != path.name]
    links = (path for path in cache.glob("models--*/snapshots/*/**/*") if not path.is_dir())
    return wrong + [str(path) for path in links if not path.is_symlink() or not path.exists()]


def partials(cache: Path) -> list[Path]:
    """Files that are not complete."""
    return sorted(cache.glob(f"models--*/blobs/*{PARTIAL_SUFFIX}"))


def files_in(folder: Path) -> dict[str, bytes]:
    """All files of a folder, by their relative names."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tree(folder: Path) -> set[str]:
    """Everything that is in a folder, by name."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
