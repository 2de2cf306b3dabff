"""The stand-in Hub is good enough for huggingface_hub, and its faults do what they say."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hubstub import FOREVER, HubStub, make_certificate

WEIGHTS = bytes(range(256)) * 1200
FILES = {
    "config.json": b'{"model_type": "gpt2"}',
    "README.md": b"# A model\n",
    "model.safetensors": WEIGHTS,
    "folder/inside/notes 1.txt": b"notes",
}
URL = "/org/model/resolve/main/model.safetensors"

# Runs calls of huggingface_hub in a fresh process, because it reads its environment when it is imported.
CLIENT = """
import json, sys
from huggingface_hub import HfApi, snapshot_download
def info(**options):
    found = HfApi().model_info(**options, files_metadata=True)
    return {s.rfilename: [s.size, s.blob_id, s.lfs and s.lfs.sha256] for s in found.siblings}
def verify(**options):
    result = HfApi().verify_repo_checksums(**options)
    return [result.checked_count, list(result.mismatches), list(result.missing_paths)]
for name, options in json.loads(sys.argv[1]):
    try:
        print(json.dumps(["ok", {"info": info, "verify": verify, "download": snapshot_download}[name](**options)]))
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@dataclass
class Reply:
    """A reply that was read to its end."""

    status: int
    headers: dict[str, str]
    body: bytes


@pytest.fixture
def hub() -> Iterator[HubStub]:
    """A stand-in Hub with one repository."""
    with HubStub() as stub:
        stub.add("org/model", FILES)
        yield stub


@pytest.fixture
def client(hub: HubStub, tmp_path: Path) -> Any:
    """A function that runs calls in a process whose Hub is the stand-in."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hub")}

    def run(*calls: tuple[str, dict[str, Any]]) -> list[list[Any]]:
        command = [sys.executable, "-c", CLIENT, json.dumps(calls)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def ask(hub: HubStub, path: str = URL, method: str = "GET", **headers: str) -> Reply:
    """Make one request on a connection of its own."""
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=30)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
    finally:
        connection.close()


def read_files(folder: str) -> dict[str, bytes]:
    """All files of a folder by their relative names."""
    root = Path(folder)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- huggingface_hub against the stand-in
def test_downloads_and_verifies_a_paged_repository(hub: HubStub, client: Any) -> None:
    """A snapshot arrives whole, over several pages of the listing, and its checksums hold."""
    hub.page_size = 2
    name = {"repo_id": "org/model"}
    (_, info), (_, folder), (_, verified) = client(("info", name), ("download", name), ("verify", name))
    assert read_files(folder) == FILES
    assert Path(folder).name == hub.add("org/model", FILES)
    assert info["model.safetensors"][2] and info["config.json"][2] is None
    assert verified == [len(FILES), [], []]
    assert len(hub.asked("/api/models/org/model/tree/*")) > 2
    assert hub.bytes_served["org/model/model.safetensors"] == len(WEIGHTS)


def test_names_and_revisions(hub: HubStub, client: Any) -> None:
    """Names without an organisation, several revisions and commit ids all lead to the right files."""
    hub.add("gpt2", {"config.json": b"main"})
    sha = hub.add("gpt2", {"config.json": b"change"}, revision="refs/pr/1")
    calls = [{"repo_id": "gpt2"}, {"repo_id": "gpt2", "revision": "refs/pr/1"}, {"repo_id": "gpt2", "revision": sha}]
    folders = [folder for _, folder in client(*(("download", options) for options in calls))]
    assert [(Path(folder) / "config.json").read_bytes() for folder in folders] == [b"main", b"change", b"change"]


def test_refusals_have_their_own_errors(hub: HubStub, client: Any) -> None:
    """Missing, hidden and gated repositories and missing revisions are told apart; a token opens the gate."""
    hub.add("org/gated", FILES, gated=True, private_token="hf_good")
    hub.add("org/hidden", FILES, private_token="hf_good")
    wrong = [{"repo_id": "org/none"}, {"repo_id": "org/hidden"}, {"repo_id": "org/gated"}]
    wrong.append({"repo_id": "org/model", "revision": "none"})
    right = [{"repo_id": name, "token": "hf_good"} for name in ("org/gated", "org/hidden")]
    outcomes = [kind for kind, _ in client(*(("download", options) for options in wrong + right))]
    missing = "RepositoryNotFoundError"
    assert outcomes == [missing, missing, "GatedRepoError", "RevisionNotFoundError", "ok", "ok"]


def test_a_cut_download_resumes(hub: HubStub, client: Any) -> None:
    """After a cut the client asks for the rest; it counts in blocks of 10 MiB, and what is below a block is lost."""
    block, weights = 10 << 20, WEIGHTS * 40
    hub.add("org/large", {"model.safetensors": weights})
    hub.fault("cut", "*.safetensors", at_bytes=block + 5)
    [(_, folder)] = client(("download", {"repo_id": "org/large"}))
    assert read_files(folder) == {"model.safetensors": weights}
    first, second = hub.asked("*/model.safetensors", "GET")
    assert (first.outcome, first.sent, second.outcome) == ("cut", block + 5, "complete")
    assert second.headers["range"] == f"bytes={block}-"
    assert hub.bytes_served["org/large/model.safetensors"] == len(weights) + 5


# ---------------------------------------------------------------- the protocol by hand
def test_ranges(hub: HubStub) -> None:
    """Ranges give 206 with their place, impossible ones 416, and a stale If-Range the whole file."""
    part = ask(hub, Range="bytes=10-19")
    assert (part.status, part.body) == (206, WEIGHTS[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(WEIGHTS)}"
    assert ask(hub, Range="bytes=-5").body == WEIGHTS[-5:]
    assert ask(hub, Range="bytes=300000-").body == WEIGHTS[300000:]
    assert ask(hub, Range=f"bytes={len(WEIGHTS)}-").status == 416
    assert ask(hub, Range="bytes=10-19", If_Range='"old"').body == WEIGHTS


def test_headers_of_files(hub: HubStub) -> None:
    """HEAD names commit, size and ETag; a missing file says so and still names the commit."""
    head = ask(hub, method="HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["x-linked-size"] == head.headers["content-length"] == str(len(WEIGHTS))
    assert head.headers["etag"] == head.headers["x-linked-etag"]
    assert len(head.headers["x-repo-commit"]) == 40
    none = ask(hub, "/org/model/resolve/main/none", "HEAD")
    assert (none.status, none.headers["x-error-code"]) == (404, "EntryNotFound")
    assert none.headers["x-repo-commit"] == head.headers["x-repo-commit"]


def test_faults_of_the_content(hub: HubStub) -> None:
    """Each fault changes what it says, once, in the order of the script."""
    hub.fault("flip", "*.safetensors", at_bytes=7)
    hub.fault("length", "*.safetensors", at_bytes=3)
    hub.fault("length", "*.safetensors")
    hub.fault("ignore_range", "*.safetensors")
    flipped = WEIGHTS[:7] + bytes([WEIGHTS[7] ^ 1]) + WEIGHTS[8:]
    expected = [flipped, WEIGHTS + bytes(3), WEIGHTS[:-1], WEIGHTS]
    assert [ask(hub).body for _ in range(3)] == expected[:3]
    assert ask(hub, Range="bytes=10-").body == expected[3]
    assert ask(hub, Range="bytes=10-").body == WEIGHTS[10:]


def test_faults_of_the_head(hub: HubStub) -> None:
    """ETag, redirect and status faults, for files and for listings."""
    etag = ask(hub).headers["etag"]
    hub.fault("etag", "*.safetensors")
    hub.fault("redirect", location="http://127.0.0.1:9{path}")
    hub.fault("status", "/api/models/*", status=429, seconds=7)
    assert ask(hub).headers["etag"] != etag
    moved, limited = ask(hub), ask(hub, "/api/models/org/model")
    assert (moved.status, moved.headers["location"]) == (302, f"http://127.0.0.1:9{URL}")
    assert (limited.status, limited.headers["retry-after"]) == (429, "7")
    assert ask(hub, "/api/models/org/model").status == 200


def test_faults_that_lie_about_the_content(hub: HubStub) -> None:
    """A Content-Range that is off by one, a compressed body, a listing that is no JSON."""
    hub.fault("range", "*.safetensors")
    hub.fault("encoding", "*.safetensors")
    hub.fault("garbage", "/api/models/*")
    assert ask(hub, Range="bytes=10-19").headers["content-range"] == f"bytes 11-20/{len(WEIGHTS)}"
    packed = ask(hub, Range="bytes=10-19")
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == WEIGHTS[10:20]
    assert ask(hub, "/api/models/org/model").body == b"<html>"


def test_a_fault_may_let_requests_pass_first(hub: HubStub) -> None:
    """`skip` counts the matching requests that are answered well before."""
    hub.fault("status", "*.safetensors", skip=2)
    assert [ask(hub).status for _ in range(4)] == [200, 200, 500, 200]


def test_a_listing_may_lie(hub: HubStub) -> None:
    """What a repository says of itself passes through a function, until that is taken away."""
    hub.lie("org/model", lambda info: {**info, "sha": "f" * 40})
    assert json.loads(ask(hub, "/api/models/ORG/Model").body)["sha"] == "f" * 40
    hub.lie("org/model", None)
    assert json.loads(ask(hub, "/api/models/org/model").body)["sha"] != "f" * 40


def test_storage_at_signed_addresses(hub: HubStub) -> None:
    """LFS files are at another port, for so many requests, under an ETag of the storage's own; small ones stay."""
    with HubStub() as storage:
        hub.cdn, hub.cdn_uses = storage, 1
        moved = ask(hub)
        assert (moved.status, moved.headers["x-linked-size"]) == (302, str(len(WEIGHTS)))
        address = moved.headers["location"].removeprefix(storage.url)
        first, second = ask(storage, address, Range="bytes=5-9"), ask(storage, address)
        assert (first.status, first.body, second.status) == (206, WEIGHTS[5:10], 403)
        assert first.headers["etag"] != moved.headers["x-linked-etag"]
        assert ask(storage, "/signed/9").status == 403
        assert storage.bytes_served["org/model/model.safetensors"] == 5
        assert ask(hub, "/org/model/resolve/main/config.json").status == 200


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_https_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    """Who trusts the certificate gets the file, nobody else does."""
    certificate = make_certificate(tmp_path)
    with HubStub(certificate=certificate) as hub:
        hub.add("org/model", FILES)
        trusting = ssl.create_default_context(cafile=str(certificate[0]))
        with urllib.request.urlopen(hub.url + URL, context=trusting) as reply:
            assert reply.read() == WEIGHTS
        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(hub.url + URL)


def test_reset_and_unending_faults(hub: HubStub) -> None:
    """A fault without end hits every request until the script is cleared."""
    hub.fault("reset", "/*", times=FOREVER)
    for path in (URL, "/api/models/org/model"):
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            ask(hub, path)
    hub.clear_faults()
    assert ask(hub).body == WEIGHTS


def test_a_stall_ends_by_release_or_by_the_client(hub: HubStub) -> None:
    """A stalled reply goes on when released, and is given up when the client closes."""
    hub.fault("stall", "*.safetensors", at_bytes=10, times=2)
    for released in (True, False):
        connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=30)
        connection.request("GET", URL)
        reply = connection.getresponse()
        assert reply.read(10) == WEIGHTS[:10]
        assert hub.wait(lambda: hub.stalled == 1)
        if released:
            hub.release()
            assert reply.read() == WEIGHTS[10:]
        reply.close()
        connection.close()
        assert hub.wait(lambda: hub.stalled == 0 and hub.requests[-1].outcome != "open")
    assert [request.outcome for request in hub.requests] == ["complete", "client_closed"]


def test_a_slow_reply_goes_fast_when_released(hub: HubStub) -> None:
    """The rate holds the reply back until it is released."""
    hub.fault("rate", "*.safetensors", bytes_per_second=20)
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=30)
    connection.request("GET", URL)
    reply = connection.getresponse()
    assert reply.read(2) == WEIGHTS[:2]
    hub.release()
    assert reply.read() == WEIGHTS[2:]
    connection.close()


def test_close_ends_everything_and_start_brings_it_back(hub: HubStub) -> None:
    """A closed stand-in refuses connections, the kept-alive ones too, and comes back at the same address."""
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=30)
    connection.request("GET", URL)
    assert connection.getresponse().read() == WEIGHTS
    hub.close()
    with pytest.raises((ConnectionError, http.client.HTTPException)):
        connection.request("GET", URL)
        connection.getresponse()
    connection.close()
    with pytest.raises(ConnectionError):
        ask(hub)
    hub.start()
    assert ask(hub).body == WEIGHTS


def test_by_hand(tmp_path: Path) -> None:
    """The script prints its address and serves the folders it was given."""
    (tmp_path / "config.json").write_text("{}")
    script = str(Path(__file__).with_name("hubstub.py"))
    command = [sys.executable, script, "--port", "0", "--repo", f"org/a={tmp_path}", "--repo", f"gpt2@v1={tmp_path}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        stub = HubStub(port=int(process.stdout.readline().rsplit(":", 1)[1]))
        assert ask(stub, "/org/a/resolve/main/config.json").body == b"{}"
        assert ask(stub, "/gpt2/resolve/v1/config.json").body == b"{}"
        process.terminate()
    assert process.returncode == 0
