"""What a review of downloads, room, deletes and imports found; each test fails where the defect is."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import tinygguf
from harness import ROOT, Json, Server, wait_until
from hubstub import FOREVER, HubStub, make_certificate
from pulltools import (
    CONFIGURATION,
    MEBIBYTE,
    SEGMENT,
    accepted,
    cache_of,
    failed,
    folder_of,
    job_of,
    make_server,
    model,
    partials,
    settle,
    stalled,
    started,
    succeeded,
    weights,
    wrong_bytes,
)

import app


@pytest.fixture(scope="module")
def stub() -> Iterator[HubStub]:
    """One Hub for all."""
    with HubStub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pulls(stub: HubStub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with a cache of its own."""
    with make_server(stub, tmp_path_factory.mktemp("review")) as server:
        yield server


@pytest.fixture(scope="module")
def patient(stub: HubStub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that gives silent connections more time than a test takes."""
    with make_server(stub, tmp_path_factory.mktemp("patient"), PULL_STALL_SECONDS="60") as server:
        yield server


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves the script empty and no job open."""
    yield
    for name in {"pulls", "patient"} & set(request.fixturenames):
        settle(request.getfixturevalue(name), request.getfixturevalue("stub"))


def ends(server: Server, job_id: str, seconds: float = 20) -> Json:
    """A job at its end, or as it is after so long."""
    try:
        ended: Json = wait_until(
            lambda: (job := job_of(server, job_id))["status"] in ("succeeded", "failed", "cancelled") and job, seconds
        )
        return ended
    except AssertionError:
        return job_of(server, job_id)


# ---- imports
def test_import_without_a_licence(stub: HubStub, tmp_path: Path) -> None:
    """An import without --license does not take every model of the server away."""
    stub.add("r/imp", model())
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, data in model(8, 5).items():
        (folder / name).write_bytes(data)
    with make_server(stub, tmp_path) as server:
        succeeded(server, "r/imp")
        environment = server._environment | {"AI_SERVER_URL": server.url}
        command = [sys.executable, str(ROOT / "client.py"), "import", str(folder), "--name", "mine/folder"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_deleting_an_import_whose_entry_is_gone(stub: HubStub, tmp_path: Path) -> None:
    """Files that the operator has imported are never deleted."""
    folders = [tmp_path / "a", tmp_path / "b"]
    (tmp_path / "state").mkdir()
    for number, folder in enumerate(folders):
        folder.mkdir()
        for name, data in model(8, number).items():
            (folder / name).write_bytes(data)
    entries = tmp_path / "state" / "imports.json"
    entries.write_text(json.dumps({f"mine/{folder.name}": {"path": str(folder)} for folder in folders}))
    with make_server(stub, tmp_path) as server:
        for folder in folders:
            succeeded(server, f"mine/{folder.name}")
        entries.write_text("{}")
        server.client.delete("/models/mine/a")
        assert (folders[0] / "model.safetensors").exists()


# ---- the question to the Hub
@pytest.mark.parametrize("header", ["1.5", "soon"])
def test_a_retry_after_that_is_no_number(pulls: Server, stub: HubStub, header: str) -> None:
    """A Retry-After in another form ends or repeats the question; it does not hang for ever."""
    name = f"r/retry{len(header)}"
    stub.add(name, model())
    fault = stub.fault("status", f"/api/models/{name}*", status=429)
    fault.seconds = header  # type: ignore[assignment]
    job = ends(pulls, accepted(pulls, name), 15)
    assert job["status"] == "succeeded", job


def test_a_listing_that_is_deep(pulls: Server, stub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON that is nested very deeply fails the pull; it does not hang for ever."""
    stub.add("r/deep", model())
    dumps = json.dumps
    monkeypatch.setattr("hubstub.json.dumps", lambda value: "[" * 200_000 if "siblings" in value else dumps(value))
    job_id = pulls.client.post("/pull", content=b'{"model": "r/deep"}').json()["id"]
    assert ends(pulls, job_id, 10)["status"] == "failed"


# ---- deletes
def begun(server: Server, stub: HubStub, name: str) -> str:
    """Start a pull of 12 MiB and wait until all of it but the last segments is here."""
    stub.fault("stall", "model.safetensors", at_bytes=1000, skip=4, times=FOREVER)
    job_id = accepted(server, name)
    assert stub.wait(lambda: stub.stalled >= 1)
    return job_id


@pytest.mark.parametrize("pause", [False, True])
def test_deleting_one_revision_spares_what_another_job_fetches(patient: Server, stub: HubStub, pause: bool) -> None:
    """A job keeps what it has when the only model of its repository is deleted."""
    name = f"r/two{pause}"
    stub.add(name, model(8, 1), revision="v1")
    stub.add(name, model(6 * SEGMENT, 7))
    succeeded(patient, f"{name}@v1")
    job_id = begun(patient, stub, name)
    if pause:
        patient.client.post(f"/jobs/{job_id}/pause")
    before = [path.name[:8] for path in partials(cache_of(patient)) if name.replace("/", "--") in str(path)]
    assert patient.client.delete(f"/models/{name}@v1").status_code == 200
    after = [path.name[:8] for path in partials(cache_of(patient)) if name.replace("/", "--") in str(path)]
    stub.clear_faults()
    stub.release()
    if pause:
        patient.client.post(f"/jobs/{job_id}/resume")
    job = ends(patient, job_id)
    assert (before, job["status"], job["error"]) == (after, "succeeded", None)


def test_an_old_revision_goes_with_its_model(pulls: Server, stub: HubStub) -> None:
    """A model that was pulled anew and then deleted leaves no weights behind."""
    stub.add("r/renewed", model(SEGMENT, 1))
    succeeded(pulls, "r/renewed")
    stub.add("r/renewed", model(SEGMENT, 2))
    succeeded(pulls, "r/renewed")
    pulls.client.delete("/models/r/renewed")
    left = [path for path in cache_of(pulls).glob("models--r--renewed/**/*") if path.is_file()]
    assert sum(path.stat().st_size for path in left) < SEGMENT, left


def test_a_cancelled_pull_is_listed_whole(pulls: Server, stub: HubStub) -> None:
    """Whole files of a pull that was cancelled are listed, and cleaned."""
    stub.add("r/shards", {**model(SEGMENT), "model-2.safetensors": weights(2 * SEGMENT, 9)})
    stub.fault("stall", "model-2.safetensors", at_bytes=1000, times=FOREVER)
    job_id = accepted(pulls, "r/shards")
    digest = hashlib.sha256(weights(SEGMENT)).hexdigest()
    blobs = folder_of(cache_of(pulls), "r/shards") / "blobs"
    wait_until((blobs / digest).exists)
    pulls.client.delete(f"/jobs/{job_id}")
    listed = pulls.client.get("/partials").json()
    cleaned = pulls.client.delete("/partials").json()
    left = {path.name[:8]: path.stat().st_size for path in blobs.iterdir()}
    assert not left, (listed, cleaned, left)


# ---- partials
def test_partials_of_a_renamed_repository(patient: Server, stub: HubStub) -> None:
    """The Hub answers with another name (a repository that was renamed): its partials belong to the job."""
    files = model(6 * SEGMENT, 11)
    stub.add("new/name", files)
    stub.add("oldname", files)
    stub.lie("oldname", lambda info: {**info, "id": "new/name", "modelId": "new/name"})
    job_id = begun(patient, stub, "oldname")
    rows = [row for row in patient.client.get("/partials").json()["partials"] if row["repo"] == "new/name"]
    patient.client.delete("/partials")
    stub.clear_faults()
    stub.release()
    job = ends(patient, job_id)
    assert (rows[0]["job_id"], job["status"], job["error"]) == (job_id, "succeeded", None)


def test_bytes_fetched_are_fetched(pulls: Server, stub: HubStub) -> None:
    """A verify of sound files has fetched nothing."""
    stub.add("r/fetched", model(20 * MEBIBYTE, 12))
    succeeded(pulls, "r/fetched")
    job = pulls.finished(pulls.client.post("/models/r/fetched/verify").json()["id"])
    assert job["bytes_fetched"] == 0, (job["bytes_fetched"], job["fetch_seconds"])


# ---- verify
def test_verify_of_an_alias_whose_model_is_gone(pulls: Server, stub: HubStub) -> None:
    """An alias that outlived its model is verified at its model's repository."""
    stub.add("r/parent", model())
    succeeded(pulls, "r/parent")
    pulls.client.post("/api/copy", json={"source": "r/parent", "destination": "nick"})
    pulls.client.delete("/models/r/parent")
    job = pulls.finished(pulls.client.post("/models/nick/verify").json()["id"])
    assert job["status"] == "succeeded", job["error"]


def test_verify_does_not_go_back(pulls: Server, stub: HubStub) -> None:
    """A verify that ends after a newer pull leaves the newer revision in place."""
    stub.add("r/back", model(SEGMENT, 1))
    succeeded(pulls, "r/back")
    folder = folder_of(cache_of(pulls), "r/back")
    next(folder.glob("snapshots/*/model.safetensors")).resolve().unlink()
    stub.fault("stall", "model.safetensors", at_bytes=10, times=1)
    job_id = pulls.client.post("/models/r/back/verify").json()["id"]
    stalled(stub)
    pulls.client.post(f"/jobs/{job_id}/pause")
    newer = stub.add("r/back", model(SEGMENT, 2))
    succeeded(pulls, "r/back")
    pulls.client.post(f"/jobs/{job_id}/resume")
    pulls.finished(job_id)
    assert pulls.client.get("/models/r/back").json()["revision"] == newer


def gguf(folder: Path, seed: int) -> bytes:
    """A sound GGUF file."""
    return tinygguf.write(folder, template=str(seed)).read_bytes()


def test_what_others_fetched_is_hashed_beside_a_known_model(pulls: Server, stub: HubStub, tmp_path: Path) -> None:
    """A file of another program is hashed though another file of the commit is known."""
    sound, other = gguf(tmp_path, 1), gguf(tmp_path, 2)
    sha = stub.add("r/quants", {"m-Q4_K_M.gguf": sound, "m-Q8_0.gguf": other + bytes(64)})
    succeeded(pulls, "r/quants:Q4_K_M")
    folder = folder_of(cache_of(pulls), "r/quants")
    digest = hashlib.sha256(other + bytes(64)).hexdigest()
    (folder / "blobs" / digest).write_bytes(other + bytes(63) + b"X")
    (folder / "snapshots" / sha / "m-Q8_0.gguf").symlink_to(f"../../blobs/{digest}")
    succeeded(pulls, "r/quants:Q8_0")
    assert [path for path in wrong_bytes(cache_of(pulls)) if "quants" in path] == []


def test_deleting_a_file_spares_another_revision(pulls: Server, stub: HubStub, tmp_path: Path) -> None:
    """Two revisions share a file: deleting the model of one leaves the other's whole."""
    q4, q8 = gguf(tmp_path, 3), gguf(tmp_path, 4)
    stub.add("r/shared", {"m-Q4_K_M.gguf": q4}, revision="v1")
    stub.add("r/shared", {"m-Q4_K_M.gguf": q4, "m-Q8_0.gguf": q8})
    for name in ("r/shared:Q4_K_M@v1", "r/shared:Q4_K_M", "r/shared:Q8_0"):
        succeeded(pulls, name)
    pulls.client.delete("/models/r/shared:Q4_K_M")
    path = Path(pulls.client.get("/models/r/shared:Q4_K_M@v1").json()["local_path"])
    assert path.exists(), "its file is gone"


def test_make_room_spares_an_upload(stub: HubStub, tmp_path: Path) -> None:
    """A model that was uploaded, and that nobody could fetch again, is not deleted to make room."""
    stub.add("r/big", model(3 * MEBIBYTE, 3))
    with make_server(stub, tmp_path, DISK_QUOTA=str(3 * MEBIBYTE + 4096)) as server:
        upload(server, gguf(tmp_path, 5), "mine")
        assert server.client.post("/pull", json={"model": "r/big", "make_room": True}).status_code == 507
        assert server.client.get("/models/mine").status_code == 200


# ---- jobs
def paused_job() -> app.Job:
    """A paused job that only this process knows."""
    job = app.jobs["job_review"] = app.Job("job_review", "org/repo", status="paused")
    return job


def test_a_job_that_is_cancelled_while_it_resumes_stays_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who cancels while a resume is being written down hears `cancelled`, and nothing starts afterwards."""

    async def scene() -> tuple[str, int]:
        job, written = paused_job(), asyncio.Event()

        async def save(_: app.Job) -> None:
            await written.wait()

        monkeypatch.setattr(app.store, "save_job", save)
        both = [
            asyncio.create_task(work(job.id))
            for work in (app.resume_job, functools.partial(app.stop_job, status="cancelled"))
        ]
        await asyncio.sleep(0)
        written.set()
        assert [told.status for told in await asyncio.gather(*both)]
        return job.status, len(app.job_tasks)

    monkeypatch.setattr(app, "jobs", {})
    monkeypatch.setattr(app, "job_tasks", {})
    assert asyncio.run(scene()) == ("cancelled", 0)


def test_a_resume_that_cannot_be_written_leaves_the_job_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it is `queued` for ever: no task runs it, and no resume or pull starts one."""

    async def full(_: app.Job) -> None:
        raise app.DiskFull("full")

    async def scene() -> str:
        job = paused_job()
        with pytest.raises(app.DiskFull):
            await app.resume_job(job.id)
        return job.status

    monkeypatch.setattr(app, "jobs", {})
    monkeypatch.setattr(app.store, "save_job", full)
    assert asyncio.run(scene()) == "paused"


def test_a_pin_on_an_open_pull_is_kept(patient: Server, stub: HubStub) -> None:
    """A second pull that says more than the open one is not answered by one that does less."""
    stub.add("r/wishes", model(6 * SEGMENT, 4))
    begun(patient, stub, "r/wishes")
    reply = patient.client.post("/pull", json={"model": "r/wishes", "pin": True, "make_room": True})
    assert (reply.json()["pin"], reply.json()["make_room"]) == (True, True)


# ---- what a hostile or unlucky Hub does
def test_a_proxy_that_is_not_for_this_host(stub: HubStub, tmp_path: Path) -> None:
    """NO_PROXY holds for the files as for the listing."""
    stub.add("r/proxy", model())
    proxies: Json = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    with make_server(stub, tmp_path, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1", **proxies) as server:
        succeeded(server, "r/proxy")


def test_a_shape_of_very_many_dimensions_is_refused_before_it_is_multiplied(tmp_path: Path) -> None:
    """Its product takes the interpreter for seconds (1 MB) to days (100 MB), and no other thread runs meanwhile."""
    path = tmp_path / "model.safetensors"
    header = json.dumps({"w": {"dtype": "U8", "shape": [2**62] * 1000, "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(app.BadModelFiles, match="length"):
        app.check_safetensors(path)


def test_a_stop_does_not_wait_for_a_plan(patient: Server, stub: HubStub, tmp_path: Path) -> None:
    """A plan whose question hangs ends with the server; here it may hang for a minute, and a stop may take 20 s."""
    stub.add("r/plan", model())
    with started(make_server(stub, tmp_path, PULL_STALL_SECONDS="60", DRAIN_SECONDS="1")) as server:
        stub.fault("stall", "config.json", at_bytes=-1, times=FOREVER)
        asking = threading.Thread(target=ask_for_a_plan, args=(server, "r/plan"))
        asking.start()
        assert stub.wait(lambda: stub.stalled >= 1)
        server.process.terminate()
        server.process.wait(timeout=20)
        asking.join()


def ask_for_a_plan(server: Server, name: str) -> None:
    """Ask, and do not mind that nobody answers."""
    with suppress(httpx.HTTPError):
        httpx.post(f"{server.url}/plan", json={"model": name}, timeout=90, trust_env=False)


def test_a_listing_stays_on_https(stub: HubStub, tmp_path: Path) -> None:
    """The digests come with the listing: it does not go down to http, as the files do not."""
    certificate = make_certificate(tmp_path)
    stub.add("r/tls", model())
    with HubStub(certificate=certificate) as hub:
        hub.fault("redirect", "/api/models/r/tls*", times=FOREVER, location=stub.url + "{path}")
        hub.add("r/tls", model())
        with make_server(hub, tmp_path, SSL_CERT_FILE=str(certificate[0])) as server:
            assert failed(server, "r/tls")["error_kind"] == "bad_redirect"


def test_a_partial_that_is_published_while_it_is_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that goes between the scan and the look at it is left out; GET /partials is no 500."""
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "glob", lambda _folder, _pattern: iter([blobs / ("gone" + app.PARTIAL_SUFFIX)]))
    assert app.list_partials() == []


def test_a_verify_promises_no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a verify hashes 40 GB that are here, another pull is not refused for them."""
    checking = app.Job("job_review", "org/repo", status="running", check=True, size_bytes=40 * 10**9)
    monkeypatch.setattr(app, "jobs", {checking.id: checking})
    assert app.promised_bytes(app.Job("job_other", "org/other")) == 0


def test_weights_in_a_subfolder_are_refused_before_they_are_fetched(pulls: Server, stub: HubStub) -> None:
    """No engine serves them, and the plan says so: the pull says it too, before the bytes come."""
    stub.add("r/folder", {"config.json": CONFIGURATION, "unet/model.safetensors": weights(SEGMENT, 3)})
    failed(pulls, "r/folder")
    assert stub.bytes_served["r/folder/unet/model.safetensors"] == 0


# ---- room
def upload(server: Server, data: bytes, name: str) -> None:
    """Make a model of an uploaded file."""
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    assert server.client.post(f"/api/blobs/{digest}", content=data).status_code == 201
    reply = server.client.post("/api/create", json={"model": name, "files": {"m.gguf": digest}, "stream": False})
    assert reply.status_code == 200, reply.text


def test_quota_holds_for_two_pulls_at_once(stub: HubStub, tmp_path: Path) -> None:
    """Two pulls that fit one by one, but not together, do not both pass."""
    for letter in "ab":
        stub.add(f"r/quota-{letter}", model(3 * MEBIBYTE, ord(letter)))
    with make_server(stub, tmp_path, DISK_QUOTA=str(4 * MEBIBYTE)) as server:
        with ThreadPoolExecutor(2) as threads:
            replies = list(threads.map(lambda one: server.client.post("/pull", json={"model": f"r/quota-{one}"}), "ab"))
        ended = [server.finished(reply.json()["id"])["status"] for reply in replies if reply.status_code == 202]
        assert ended.count("succeeded") == 1, (ended, [reply.status_code for reply in replies])


def test_make_room_for_a_gated_model_deletes_nothing(stub: HubStub, tmp_path: Path) -> None:
    """A pull that the Hub will refuse deletes no model before it hears that."""
    stub.add("r/victim", model(2 * MEBIBYTE, 1))
    stub.add("r/gated", model(2 * MEBIBYTE, 2), gated=True)
    with make_server(stub, tmp_path, DISK_QUOTA=str(3 * MEBIBYTE)) as server:
        succeeded(server, "r/victim")
        job = failed(server, "r/gated", make_room=True)
        assert job["error_kind"] == "gated"
        assert server.client.get("/models/r/victim").status_code == 200


def test_the_hubs_own_client_stays_out_of_the_server(stub: HubStub) -> None:
    """It takes its lock in every forked child: one forked while a thread held it never started, nor did its server."""
    stub.add("r/asked", model())
    code = (
        "import app; from huggingface_hub.utils import _http\n"
        "print(len(app._list_repository('r/asked', None).files), _http._GLOBAL_CLIENT)"
    )
    environment = {**os.environ, "HF_ENDPOINT": stub.url}
    told = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.split() == ["2", "None"], told.stderr
