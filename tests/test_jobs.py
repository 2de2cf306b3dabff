"""Pull jobs: what POST /pull promises, what a job shows, and that nothing acknowledged is ever lost."""

import asyncio
import json
import re
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from harness import Json, Server, free_port, wait_until
from hubstub import FOREVER, HubStub
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import app

FIELDS = {
    "id", "model", "revision", "quantize", "init", "trust_remote_code", "status", "created_at", "started_at",
    "finished_at", "error", "error_kind", "traceback", "local_path", "size_bytes", "bytes_done", "file", "speed",
    "eta_seconds", "load_phases", "preferred_quantized", "allow_pickle", "make_room", "pin", "check", "attempts",
    "waiting_for", "bytes_fetched", "fetch_seconds", "repaired", "repository",
}  # fmt: skip
STATUSES = {"queued", "running", "succeeded", "failed", "cancelled"}
FINAL = {"succeeded", "failed", "cancelled"}
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
CONFIGURATION = b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
TOKEN = "hf_canary5d1b9c"
MEBIBYTE = 1024 * 1024


# -- small repositories -------------------------------------------------------


def safetensors(header: Any, content: bytes) -> bytes:
    """A file of that form, sound or not."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def weights(size: int = 8) -> bytes:
    """Sound weights: one tensor of `size` bytes."""
    return safetensors({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}, bytes(size))


def model(**more: bytes) -> dict[str, bytes]:
    """The files of a small model that a pull accepts."""
    return {"config.json": CONFIGURATION, "model.safetensors": weights(), **more}


def gguf(extra: int = 0) -> bytes:
    """The smallest sound GGUF file, with some bytes after its head."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(extra)


class Announced(bytes):
    """A file that says in the listing that it is a petabyte."""

    def __len__(self) -> int:
        return 10**15


# -- servers ------------------------------------------------------------------


@pytest.fixture(scope="module")
def stub() -> Iterator[HubStub]:
    """A Hub of this file's own, so that its requests can be counted."""
    with HubStub() as running:
        yield running


@pytest.fixture(scope="module")
def running(stub: HubStub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for most tests here."""
    folder = tmp_path_factory.mktemp("pulls")
    with Server(folder, HF_ENDPOINT=stub.url, HF_HOME=str(folder / "hub")) as server:
        yield server


@pytest.fixture
def pulls(running: Server, stub: HubStub) -> Iterator[Server]:
    """The shared server, with every job at its end and the Hub without faults afterwards."""
    yield running
    stub.clear_faults()
    for job in jobs_of(running):
        if job["status"] not in FINAL:
            running.client.delete(f"/jobs/{job['id']}")
    stub.release()
    wait_until(lambda: not workers(running), what="the end of the workers")


def make_server(stub: HubStub, folder: Path, *arguments: str, **more: Any) -> Server:
    """A server with a Hub cache of its own."""
    return Server(folder, *arguments, **{"HF_ENDPOINT": stub.url, "HF_HOME": str(folder / "hub"), **more})


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


def kill(server: Server) -> None:
    """`kill -9`, and close the file that took its output."""
    server.kill()
    server.output.close()


def jobs_of(server: Server) -> list[Json]:
    """All jobs."""
    jobs: list[Json] = server.client.get("/jobs").json()["jobs"]
    return jobs


def job_of(server: Server, job_id: str) -> Json:
    """One job."""
    job: Json = server.client.get(f"/jobs/{job_id}").json()
    return job


def accepted(server: Server, name: str, **fields: Any) -> Json:
    """Start a pull that must be a new job."""
    response = server.client.post("/pull", json={"model": name, **fields})
    assert response.status_code == 202, response.text
    job: Json = response.json()
    return job


def workers(server: Server) -> list[psutil.Process]:
    """The server's pull workers that still live."""
    return [child for child in server.children() if is_worker(child)]


def is_worker(process: psutil.Process) -> bool:
    """Whether this is a living pull worker."""
    with suppress(psutil.Error):
        return "--worker" in process.cmdline()
    return False


def ended(processes: list[psutil.Process]) -> bool:
    """Whether none of these processes lives; one that only waits to be collected is dead."""
    return not any(alive(process) for process in processes)


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stall(stub: HubStub, repository: str, times: int = FOREVER) -> None:
    """Let downloads of a repository's weights stop before their first byte."""
    stub.fault("stall", f"/{repository}/resolve/*/*.safetensors", times=times)


def stalled(stub: HubStub, count: int = 1) -> None:
    """Wait until so many downloads hang."""
    assert stub.wait(lambda: stub.stalled == count), f"{stub.stalled} downloads hang, not {count}"


def fetched(stub: HubStub, repository: str) -> Counter[str]:
    """Which files of a repository were downloaded, and how often."""
    requests = stub.asked(f"/{repository}/resolve/*", "GET")
    return Counter(request.path.partition("/resolve/")[2].partition("/")[2] for request in requests)


Event = tuple[str, Json]


@contextmanager
def watching(server: Server, job_id: str) -> Iterator[Iterator[Event]]:
    """A job's events as they come; leaving the context closes the connection."""
    with httpx.stream("GET", f"{server.url}/jobs/{job_id}/events", timeout=60, trust_env=False) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield events_in(response)


def events_in(response: httpx.Response) -> Iterator[Event]:
    """Decode server-sent events: `event:` and `data:` lines, comments left out."""
    name = ""
    for line in response.iter_lines():
        kind, _, value = line.partition(": ")
        if kind == "event":
            name = value
        elif kind == "data":
            yield name, json.loads(value)


# -- a job from its beginning to its end --------------------------------------


def test_a_pull_is_accepted_with_the_whole_job(pulls: Server, stub: HubStub) -> None:
    """202, a Location, every documented field, and at the end path, sizes and times."""
    stub.add("jobs/first", model())
    response = pulls.client.post("/pull", json={"model": "jobs/first", "quantize": "4bit"})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert set(job) == FIELDS
    assert job["status"] in ("queued", "running")
    assert (job["model"], job["quantize"], job["preferred_quantized"]) == ("jobs/first", "4bit", True)
    assert TIME.fullmatch(job["created_at"])
    end = pulls.finished(job["id"])
    assert set(end) == FIELDS
    assert (end["status"], end["error"], end["error_kind"], end["traceback"]) == ("succeeded", None, None, None)
    assert (Path(end["local_path"]) / "model.safetensors").read_bytes() == weights()
    assert end["size_bytes"] == end["bytes_done"] >= len(weights())


def test_the_times_of_a_job_are_in_order_and_true(pulls: Server, stub: HubStub) -> None:
    """ISO 8601 with Z: created, started, finished, and all within the time of this test."""
    stub.add("jobs/times", model())
    before = datetime.now(UTC)
    end = pulls.pull("jobs/times")
    times = [end["created_at"], end["started_at"], end["finished_at"]]
    assert all(TIME.fullmatch(time) for time in times)
    moments = [datetime.fromisoformat(time) for time in times]
    in_order = [before, *moments, datetime.now(UTC)]
    assert in_order == sorted(in_order)


def test_a_job_is_listed_newest_first(pulls: Server, stub: HubStub) -> None:
    """GET /jobs begins with the newest, and an id is found under /jobs/{id}."""
    stall(stub, "jobs/order")
    stub.add("jobs/order", model())
    ids = [accepted(pulls, "jobs/order", quantize=choice)["id"] for choice in ("auto", "4bit", "none")]
    listed = jobs_of(pulls)
    assert [job["id"] for job in listed[:3]] == ids[::-1]
    assert [job["created_at"] for job in listed] == sorted((job["created_at"] for job in listed), reverse=True)
    assert job_of(pulls, ids[1])["quantize"] == "4bit"


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("DELETE", ""), ("GET", "/events")])
def test_an_unknown_job_is_a_404(pulls: Server, method: str, path: str) -> None:
    """The text names the job and where all jobs are."""
    response = pulls.client.request(method, f"/jobs/job_nosuch{path}")
    assert response.status_code == 404
    assert "job_nosuch" in response.json()["error"]
    assert "GET /jobs" in response.json()["error"]


# -- one job for equal pulls --------------------------------------------------


def test_an_equal_pull_joins_the_open_job(pulls: Server, stub: HubStub) -> None:
    """202, then 200 with the same id and Location; after the end a pull is a new job."""
    stub.add("jobs/equal", model())
    stall(stub, "jobs/equal")
    first = accepted(pulls, "jobs/equal")
    stalled(stub)
    second = pulls.client.post("/pull", json={"model": "jobs/equal", "quantize": "auto", "init": False})
    assert (second.status_code, second.json()["id"]) == (200, first["id"])
    assert second.headers["location"] == f"/jobs/{first['id']}"
    stub.clear_faults()
    stub.release()
    assert pulls.finished(first["id"])["status"] == "succeeded"
    assert accepted(pulls, "jobs/equal")["id"] != first["id"]


@pytest.mark.parametrize(
    "different", [{"revision": "v2"}, {"quantize": "4bit"}, {"trust_remote_code": True}, {"init": True}], ids=str
)
def test_another_wish_is_another_job(pulls: Server, stub: HubStub, different: Json) -> None:
    """Revision, quantization, loading and the grant of remote code each make a job of their own."""
    stub.add("jobs/wishes", model())
    stub.add("jobs/wishes", model(), revision="v2")
    stall(stub, "jobs/wishes")
    first = accepted(pulls, "jobs/wishes")
    second = accepted(pulls, "jobs/wishes", **different)
    assert first["id"] != second["id"]
    assert {name: second[name] for name in different} == different


def test_a_hundred_equal_pulls_at_once_are_one_job(pulls: Server, stub: HubStub) -> None:
    """One 202, 99 times 200, one id, and every file's bytes are served once."""
    files = model(**{"tokenizer.json": b'{"a": 1}'})
    stub.add("jobs/hundred", files)
    stall(stub, "jobs/hundred", times=1)
    with ThreadPoolExecutor(100) as threads:
        post = pulls.client.post
        replies = list(threads.map(lambda _: post("/pull", json={"model": "jobs/hundred"}), range(100)))
    assert Counter(reply.status_code for reply in replies) == {202: 1, 200: 99}
    ids = {reply.json()["id"] for reply in replies}
    assert len(ids) == 1
    stalled(stub)
    stub.release()
    assert pulls.finished(ids.pop())["status"] == "succeeded"
    assert {name: stub.bytes_served[f"jobs/hundred/{name}"] for name in files} == {
        name: len(content) for name, content in files.items()
    }


def test_no_more_pulls_run_at_once_than_allowed(pulls: Server, stub: HubStub) -> None:
    """MAX_CONCURRENT_PULLS is 2: with four jobs two are at the Hub and two are queued, and it stays so."""
    names = [f"jobs/limit{number}" for number in range(4)]
    for name in names:
        stub.add(name, model())
        stall(stub, name)
    ids = [accepted(pulls, name)["id"] for name in names]
    stalled(stub, 2)
    assert [job_of(pulls, id)["status"] for id in ids] == ["running", "running", "queued", "queued"]

    def all_through() -> bool:
        assert stub.stalled <= 2
        stub.release()
        return all(job_of(pulls, id)["status"] == "succeeded" for id in ids)

    wait_until(all_through, 60, "the end of all four pulls")


# -- cancelling ---------------------------------------------------------------


def test_a_queued_job_is_cancelled_before_it_asks_for_a_file(pulls: Server, stub: HubStub) -> None:
    """It never starts, its place in the queue is free, and pulling again works."""
    for name in ("jobs/busy0", "jobs/busy1", "jobs/waits"):
        stub.add(name, model())
        stall(stub, name)
    busy = [accepted(pulls, name)["id"] for name in ("jobs/busy0", "jobs/busy1")]
    stalled(stub, 2)
    waiting = accepted(pulls, "jobs/waits")
    assert pulls.client.delete(f"/jobs/{waiting['id']}").json()["status"] == "cancelled"
    stub.clear_faults()
    stub.release()
    assert [pulls.finished(id)["status"] for id in busy] == ["succeeded", "succeeded"]
    job = job_of(pulls, waiting["id"])
    assert (job["status"], job["started_at"]) == ("cancelled", None)
    assert TIME.fullmatch(job["finished_at"])
    assert stub.asked("/jobs/waits/resolve/*") == []
    assert pulls.pull("jobs/waits")["status"] == "succeeded"


def test_a_running_job_is_cancelled_at_once(pulls: Server, stub: HubStub) -> None:
    """The download's connection closes, no worker is left, the log says so, and pulling again works."""
    stub.add("jobs/running", model())
    stall(stub, "jobs/running", times=1)
    job = accepted(pulls, "jobs/running")
    stalled(stub)
    assert workers(pulls)
    reply = pulls.client.delete(f"/jobs/{job['id']}")
    assert (reply.status_code, reply.json()["status"]) == (200, "cancelled")
    assert TIME.fullmatch(reply.json()["finished_at"])
    gets = stub.asked("/jobs/running/resolve/*.safetensors", "GET")
    assert stub.wait(lambda: [request.outcome for request in gets] == ["client_closed"], 2)
    wait_until(lambda: not workers(pulls), 2, "the end of the worker")
    assert f"Job {job['id']} cancelled: pull jobs/running" in pulls.log()
    assert pulls.client.get("/models/jobs/running").status_code == 404
    assert pulls.pull("jobs/running")["status"] == "succeeded"
    assert job_of(pulls, job["id"])["status"] == "cancelled"


def test_a_finished_job_stays_as_it_is(pulls: Server, stub: HubStub) -> None:
    """DELETE gives 200 with the job unchanged, twice, and the model stays."""
    stub.add("jobs/over", model())
    job = pulls.pull("jobs/over")
    for _ in range(2):
        reply = pulls.client.delete(f"/jobs/{job['id']}")
        assert (reply.status_code, reply.json()) == (200, job)
    assert pulls.client.get("/models/jobs/over").status_code == 200


def test_a_worker_that_dies_fails_its_job_only(pulls: Server, stub: HubStub) -> None:
    """`kill -9` of the worker: the job says so, and the next pull works."""
    stub.add("jobs/dies", model())
    stall(stub, "jobs/dies", times=1)
    job = accepted(pulls, "jobs/dies")
    stalled(stub)
    for worker in workers(pulls):
        worker.kill()
    end = pulls.finished(job["id"])
    assert end["status"] == "failed"
    assert "pull again" in end["error"]
    assert pulls.pull("jobs/dies")["status"] == "succeeded"


# -- progress -----------------------------------------------------------------


@pytest.fixture(scope="module")
def progress(running: Server, stub: HubStub) -> list[Event]:
    """All events of one pull that comes at a known speed: a file of 32 MiB, then the rest."""
    stub.add("jobs/slow", model(**{"model.safetensors": weights(32 * MEBIBYTE)}))
    stub.fault("rate", "/jobs/slow/resolve/*.safetensors", times=FOREVER, bytes_per_second=6 * MEBIBYTE)
    with watching(running, accepted(running, "jobs/slow")["id"]) as events:
        seen = list(events)
    stub.clear_faults()
    return seen


def test_progress_grows_and_ends_with_one_done(progress: list[Event]) -> None:
    """Several steps between nothing and everything, then exactly one `done` with the final job."""
    assert {name for name, _ in progress[:-1]} == {"progress"}
    name, job = progress[-1]
    assert (name, job["status"]) == ("done", "succeeded")
    steps = [job["bytes_done"] for _, job in progress[:-1]]
    assert steps == sorted(steps)
    assert len({step for step in steps if 0 < step < 32 * MEBIBYTE}) >= 2
    assert steps[-1] > 32 * MEBIBYTE


def test_progress_has_total_speed_and_time_left(progress: list[Event]) -> None:
    """In the middle of a download the speed is plausible and the time left fits it."""
    middle = [job for _, job in progress if MEBIBYTE < job["bytes_done"] < 32 * MEBIBYTE]
    assert middle
    for job in middle:
        assert job["size_bytes"] > 32 * MEBIBYTE
        assert 0 < job["speed"] <= 48 * MEBIBYTE
        assert job["eta_seconds"] == pytest.approx((job["size_bytes"] - job["bytes_done"]) / job["speed"], rel=0.01)


def test_progress_names_a_file_of_the_repository(progress: list[Event]) -> None:
    """`file` is a name that the repository has."""
    assert {job["file"] for _, job in progress} <= {None, "config.json", "model.safetensors"}


def test_the_final_sizes_agree_with_the_progress(progress: list[Event]) -> None:
    """What was announced and fetched is what the finished job says."""
    last, final = progress[-2][1], progress[-1][1]
    assert (final["bytes_done"], final["size_bytes"]) == (last["bytes_done"], last["size_bytes"])


def test_a_finished_job_has_just_its_done_event(pulls: Server, stub: HubStub) -> None:
    """Who comes late hears the end and nothing else."""
    stub.add("jobs/late", model())
    job = pulls.pull("jobs/late")
    with watching(pulls, job["id"]) as events:
        assert list(events) == [("done", job)]


def test_a_watcher_that_leaves_disturbs_nobody(pulls: Server, stub: HubStub) -> None:
    """Two watch, one leaves: the job goes on, and the other hears the end."""
    stub.add("jobs/leaver", model())
    stall(stub, "jobs/leaver", times=1)
    job = accepted(pulls, "jobs/leaver")
    with watching(pulls, job["id"]) as stays:
        with watching(pulls, job["id"]) as leaves:
            assert next(leaves)[0] == "progress"
            stalled(stub)
        assert next(stays)[0] == "progress"
        stub.release()
        assert [name for name, _ in stays].count("done") == 1
    assert job_of(pulls, job["id"])["status"] == "succeeded"


def test_a_watcher_hears_that_the_job_was_cancelled(pulls: Server, stub: HubStub) -> None:
    """`done` with the status cancelled ends the stream."""
    stub.add("jobs/watched", model())
    stall(stub, "jobs/watched", times=1)
    job = accepted(pulls, "jobs/watched")
    stalled(stub)
    with watching(pulls, job["id"]) as events:
        assert next(events)[0] == "progress"
        pulls.client.delete(f"/jobs/{job['id']}")
        assert [(name, job["status"]) for name, job in events][-1] == ("done", "cancelled")


# -- causes -------------------------------------------------------------------

BROKEN_HEADERS: dict[str, bytes] = {
    "short": b"abc",
    "list": safetensors([1], bytes(8)),
    "shape": safetensors({"w": {"dtype": "F32", "shape": ["a", {}], "data_offsets": [0, 8]}}, bytes(8)),
    "cut": weights(64)[:-32],
}
BROKEN_CONFIGURATIONS: dict[str, bytes] = {
    "not-json": b"{",
    "list": b"[]",
    "text-config": b'{"text_config": 5}',
    "number": b'{"max_position_embeddings": "many"}',
    "architectures": b'{"architectures": 5}',
}
CAUSES: list[Any] = [
    pytest.param("cause/gated", "gated", "set HF_TOKEN", id="gated"),
    pytest.param("cause/absent", "not_found", "check the name", id="no-repository"),
    pytest.param("absent", "not_found", "check the name", id="no-repository-bare"),
    pytest.param("cause/good@v9", "not_found", "branch|tag|check", id="no-revision"),
    pytest.param("cause/gguf:Q2_K", "not_found", "It has: .*Q4_K_M", id="no-such-tag"),
    pytest.param("cause/pickle", "unsafe_format", "safetensors|another|convert", id="pickle"),
    pytest.param("cause/no-weights", "unsupported_format", "choose one with safetensors", id="no-weights"),
    pytest.param("cause/no-config", "bad_model_files", "config.json is missing.*[Pp]ull", id="no-configuration"),
    pytest.param("cause/bad-gguf", "bad_model_files", "Pull the model again", id="bad-gguf"),
    pytest.param("cause/length", "size", "Pull again", id="wrong-length"),
    pytest.param("cause/hub-503", "hub_error", "Pull again later", id="hub-503"),
    pytest.param("cause/weights-short", "bad_model_files", "Pull", id="weights-short"),
    pytest.param("cause/weights-cut", "bad_model_files", "Pull", id="weights-cut"),
    pytest.param("cause/weights-list", "bad_model_files", "Pull", id="weights-list"),
    pytest.param("cause/weights-shape", "bad_model_files", "Pull", id="weights-shape"),
    pytest.param("cause/config-not-json", "bad_model_files", "config.json", id="config-not-json"),
    pytest.param("cause/config-list", "bad_model_files", "config.json", id="config-list"),
    pytest.param("cause/config-text-config", "bad_model_files", "config.json", id="config-text"),
    pytest.param("cause/config-number", "bad_model_files", "config.json", id="config-number"),
    pytest.param("cause/config-architectures", "bad_model_files", "config.json", id="config-list2"),
]


def add_broken_repositories(stub: HubStub) -> None:
    """One repository for each cause."""
    stub.add("cause/good", model())
    stub.add("cause/gated", model(), gated=True)
    stub.add("cause/pickle", {"config.json": CONFIGURATION, "pytorch_model.bin": b"pickle"})
    stub.add("cause/no-weights", {"config.json": CONFIGURATION})
    stub.add("cause/no-config", {"model.safetensors": weights()})
    stub.add("cause/gguf", {"m-Q4_K_M.gguf": gguf(), "m-Q8_0.gguf": gguf()})
    stub.add("cause/bad-gguf", {"m-Q4_K_M.gguf": b"GGUF"})
    stub.add("cause/length", model())
    stub.fault("length", "/cause/length/resolve/*.safetensors", times=FOREVER)
    stub.add("cause/hub-503", model())
    stub.fault("status", "/api/models/cause/hub-503*", status=503, times=FOREVER)
    for name, content in BROKEN_HEADERS.items():
        stub.add(f"cause/weights-{name}", model(**{"model.safetensors": content}))
    for name, content in BROKEN_CONFIGURATIONS.items():
        stub.add(f"cause/config-{name}", model(**{"config.json": content}))


@pytest.fixture(scope="module")
def failures(running: Server, stub: HubStub) -> dict[str, Json]:
    """The finished jobs of all these causes, by the name that was pulled."""
    add_broken_repositories(stub)
    names = [case.values[0] for case in CAUSES]
    ids = {name: accepted(running, name)["id"] for name in names}
    ends = {name: running.finished(id) for name, id in ids.items()}
    stub.clear_faults()
    return ends


@pytest.mark.parametrize(("name", "kind", "remedy"), CAUSES)
def test_a_failed_pull_says_why_and_what_to_do(failures: dict[str, Json], name: str, kind: str, remedy: str) -> None:
    """The cause class, a text with a remedy, and a traceback."""
    job = failures[name]
    assert (job["status"], job["error_kind"]) == ("failed", kind), job
    assert re.search(remedy, job["error"]), job["error"]
    assert "Traceback (most recent call last)" in job["traceback"]
    assert TIME.fullmatch(job["finished_at"])
    assert job["local_path"] is None


def test_failed_pulls_leave_no_model(failures: dict[str, Json], running: Server) -> None:
    """Nothing that failed is listed, and the log has each failure."""
    names = {entry["name"] for entry in running.client.get("/models").json()["models"]}
    assert not names & set(failures)
    log = running.log()
    assert all(f"Job {job['id']} failed: pull {job['model']}" in log for job in failures.values())


def test_what_the_disk_cannot_hold_is_refused_at_once(pulls: Server, stub: HubStub) -> None:
    """507 with the figures, no job, and not a byte of a file."""
    stub.add("cause/huge", model(**{"model.safetensors": Announced(b"x")}))
    before = len(jobs_of(pulls))
    response = pulls.client.post("/pull", json={"model": "cause/huge"})
    assert response.status_code == 507, response.text
    assert re.search(r"needs 1000\.0 TB.* on the disk: free some space", response.json()["error"])
    assert fetched(stub, "cause/huge") == {}
    assert len(jobs_of(pulls)) == before


def test_a_pickle_is_never_asked_for(failures: dict[str, Json], stub: HubStub) -> None:
    """Not even the head of it."""
    assert failures["cause/pickle"]["status"] == "failed"
    assert stub.asked("/cause/pickle/resolve/*") == []


def test_a_hub_that_goes_away_is_offline(pulls: Server, stub: HubStub) -> None:
    """Down at the start, and down in the middle of a file; when it is back, pulling again works."""
    stub.add("jobs/offline", model())
    stall(stub, "jobs/offline", times=1)
    middle = accepted(pulls, "jobs/offline")
    stalled(stub)
    stub.close()
    try:
        ends = [pulls.pull("jobs/offline-2"), pulls.finished(middle["id"])]
    finally:
        stub.start()
    for end in ends:
        assert (end["status"], end["error_kind"]) == ("failed", "offline"), end
        assert "Check the network and pull again" in end["error"]
        assert "Traceback" in end["traceback"]
    assert pulls.pull("jobs/offline")["status"] == "succeeded"


# -- the Hub's token ----------------------------------------------------------


def test_the_token_goes_to_the_hub_and_nowhere_else(stub: HubStub, tmp_path: Path) -> None:
    """Not into a job, a reply, a file or an engine's environment, nor to the host that a download is redirected to."""
    stub.add("fake/token", model(), gated=True, private_token=TOKEN)
    stub.add("token/gated", model(), gated=True)
    with HubStub() as elsewhere:
        elsewhere.add("fake/token", model())
        stub.fault("redirect", "/fake/token/resolve/*.safetensors", location=elsewhere.url + "{path}", times=FOREVER)
        with make_server(stub, tmp_path, fake=True, HF_TOKEN=TOKEN, LOG_LEVEL="DEBUG") as server:
            assert server.pull("fake/token", init=True)["status"] == "succeeded"
            assert server.pull("token/gated")["error_kind"] == "gated"
            pid = server.client.get("/models/fake/token").json()["pid"]
            replies = [server.client.get(path).text for path in ("/jobs", "/models", "/diag")]
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        stub.clear_faults()
        assert elsewhere.bytes_served["fake/token/model.safetensors"] == len(weights())
        assert not any("authorization" in request.headers for request in elsewhere.requests)
    assert {request.headers["authorization"] for request in stub.asked("*fake/token*")} == {f"Bearer {TOKEN}"}
    assert not any(TOKEN in reply for reply in replies)
    assert b"HF_HUB_OFFLINE=1" in environment
    assert TOKEN.encode() not in environment
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"app.log", "state.db", "output.txt"} <= {path.name for path in files}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


# -- which files --------------------------------------------------------------


def test_only_safe_files_are_fetched_and_code_only_when_granted(pulls: Server, stub: HubStub) -> None:
    """safetensors and side files; never .bin, other runtimes or duplicates; .py files with the grant only."""
    extra = {
        "pytorch_model.bin": b"pickle", "tokenizer.json": b"{}", "merges.txt": b"m", "chat_template.jinja": b"t",
        "modeling_new.py": b"raise SystemExit", "README.md": b"#", "onnx/model.onnx": b"o", "training_args.bin": b"p",
        "original/consolidated.safetensors": weights(16), "flax_model.msgpack": b"f", ".gitattributes": b"g",
    }  # fmt: skip
    stub.add("files/choice", model(**extra))
    assert pulls.pull("files/choice")["status"] == "succeeded"
    plain = {"config.json", "model.safetensors", "tokenizer.json", "merges.txt", "chat_template.jinja"}
    assert fetched(stub, "files/choice") == dict.fromkeys(plain, 1)
    assert pulls.pull("files/choice", trust_remote_code=True)["status"] == "succeeded"
    assert fetched(stub, "files/choice") == dict.fromkeys(plain | {"modeling_new.py"}, 1)
    assert stub.asked("/files/choice/resolve/*.bin") == []


def test_a_tag_fetches_exactly_that_gguf_file(pulls: Server, stub: HubStub) -> None:
    """hf.co/org/repo:Q4_K_M is one file, and the model's path is that file."""
    stub.add("files/gguf", {f"m-{tag}.gguf": gguf(8) for tag in ("Q4_K_M", "Q4_K_S", "Q8_0")} | {"README.md": b"#"})
    job = pulls.pull("hf.co/files/gguf:Q4_K_M")
    assert (job["status"], job["model"]) == ("succeeded", "files/gguf:Q4_K_M")
    assert Path(job["local_path"]).name == "m-Q4_K_M.gguf"
    assert fetched(stub, "files/gguf") == {"m-Q4_K_M.gguf": 1}
    assert job["size_bytes"] == len(gguf(8))


def test_a_split_gguf_counts_all_its_parts(pulls: Server, stub: HubStub) -> None:
    """All parts of the chosen quantization are fetched and counted."""
    parts = {f"m-Q4_K_M-0000{number}-of-00002.gguf": gguf(number) for number in (1, 2)}
    stub.add("files/split", {**parts, "m-Q8_0.gguf": gguf()})
    job = pulls.pull("files/split:Q4_K_M")
    assert job["status"] == "succeeded"
    assert fetched(stub, "files/split") == dict.fromkeys(parts, 1)
    assert job["size_bytes"] == sum(len(part) for part in parts.values())


def test_a_tag_is_not_the_beginning_of_another(pulls: Server, stub: HubStub) -> None:
    """Asked for Q4_K, a repository with Q4_K_M and Q4_K_S only has no such file."""
    stub.add("files/prefix", {f"m-{tag}.gguf": gguf() for tag in ("Q4_K_M", "Q4_K_S")})
    job = pulls.pull("files/prefix:Q4_K")
    assert (job["status"], job["error_kind"]) == ("failed", "not_found")


# -- at the start, and with a load --------------------------------------------


def test_pull_at_the_start(stub: HubStub, tmp_path: Path) -> None:
    """`--pull NAME` twice: two jobs that succeed by themselves."""
    for name in ("start/one", "start/two"):
        stub.add(name, model())
    with make_server(stub, tmp_path, "--pull", "start/one", "--pull", "start/two") as server:
        ends = [server.finished(job["id"]) for job in jobs_of(server)]
    assert {(end["model"], end["status"]) for end in ends} == {("start/two", "succeeded"), ("start/one", "succeeded")}


def test_pull_at_the_start_without_a_hub(stub: HubStub, tmp_path: Path) -> None:
    """The server serves all the same, and the job says that nothing listens there."""
    with make_server(stub, tmp_path, "--pull", "start/one", HF_ENDPOINT=f"http://127.0.0.1:{free_port()}") as server:
        (job,) = jobs_of(server)
        assert server.finished(job["id"])["error_kind"] == "offline"


@pytest.mark.parametrize("name", ["nosuch:tag", "../x"])
def test_a_bad_name_at_the_start_is_said_in_a_line(stub: HubStub, tmp_path: Path, name: str) -> None:
    """`--pull` with a name that cannot be: the name is in the message, and there is no traceback."""
    server = make_server(stub, tmp_path, "--pull", name)
    server.start(ready=False)
    status = server.process.wait(timeout=30)
    server.output.close()
    output = (tmp_path / "output.txt").read_text()
    assert status not in (0, None)
    assert name in output or "invalid model name" in output
    assert "Traceback" not in output


def test_init_loads_the_model_after_the_download(stub: HubStub, tmp_path: Path) -> None:
    """A pull with init ends with the model in memory; one that cannot load fails, and stays on disk."""
    for name in ("fake/a", "fake/fails"):
        stub.add(name, model())
    with make_server(stub, tmp_path, fake=True) as server:
        assert server.pull("fake/a", init=True)["status"] == "succeeded"
        assert server.client.get("/models/fake/a").json()["loaded"] is True
        job = server.pull("fake/fails", init=True)
        assert (job["status"], job["error_kind"]) == ("failed", "no_backend")
        assert "on purpose" in job["error"]
        assert "Traceback" in job["traceback"]
        assert (Path(job["local_path"]) / "model.safetensors").exists()
        entry = server.client.get("/models/fake/fails").json()
        assert (entry["loaded"], entry["state"]) == (False, "local")


# -- bad input ----------------------------------------------------------------


def refused(server: Server, stub: HubStub, status: int, **request: Any) -> str:
    """A pull that must be refused before the Hub is asked; returns the text."""
    before, jobs = len(stub.requests), len(jobs_of(server))
    response = server.client.post("/pull", **request)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    assert (len(stub.requests), len(jobs_of(server))) == (before, jobs)
    text: str = response.json()["error"]
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize("body", [{}, {"model": None}, {"model": ""}, {"name": "gpt2"}], ids=str)
def test_a_missing_model_is_said_in_the_documented_words(pulls: Server, stub: HubStub, body: Json) -> None:
    """The exact text of the guidelines."""
    assert refused(pulls, stub, 400, json=body) == "Missing 'model' in payload"


BAD_FIELDS: list[tuple[str, Any]] = [
    ("model", 5), ("model", True), ("model", ["a"]), ("model", "x" * 600), ("revision", 5), ("revision", ""),
    ("revision", "../x"), ("revision", "a b"), ("revision", "x\n"), ("revision", "-x"), ("quantize", "8bit"),
    ("quantize", 4), ("quantize", True), ("init", "yes"), ("init", 1), ("trust_remote_code", "true"),
    ("trust_remote_code", 0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_wrong_type_names_the_field(pulls: Server, stub: HubStub, field: str, value: Any) -> None:
    """400, never 422, and the value is not repeated."""
    text = refused(pulls, stub, 400, json={"model": "bad/input", field: value})
    assert f"'{field}'" in text


def test_a_revision_with_dots_is_refused_like_one_in_the_name(pulls: Server, stub: HubStub) -> None:
    """git knows no such revision."""
    assert refused(pulls, stub, 400, json={"model": "bad/input@a/../b"})
    assert "revision" in refused(pulls, stub, 400, json={"model": "bad/input", "revision": "a/../b"})


def test_two_revisions_at_once_are_refused(pulls: Server, stub: HubStub) -> None:
    """The name says v1, the field v2: neither may be guessed."""
    assert "revision" in refused(pulls, stub, 400, json={"model": "bad/input@v1", "revision": "v2"})


def test_an_unknown_field_is_named(pulls: Server, stub: HubStub) -> None:
    """A misspelled `quantize` must not pass in silence."""
    stub.add("jobs/misspelled", model())
    response = pulls.client.post("/pull", json={"model": "jobs/misspelled", "quantise": "4bit"})
    assert "quantise" in response.headers.get("x-ignored-parameters", "")


@pytest.mark.parametrize(
    "name",
    [
        "../x", "a/b/c", "org/..", "org/repo@", "org//repo", "org/repo ", "-org/x", "org/re--po", "a\0b", " ", "/org",
        "org/", "org/repo.git", "http://evil/x", "file:///etc/passwd", "C:\\x", "org/repo:a:b", "org/repo\n", "é/x",
        "org/repo@../x", "org/repo@a b", "org\\repo", "org/repo?x=1", "org/repo#x", "org/%2e%2e",
    ],
)  # fmt: skip
def test_an_invalid_name_is_refused_before_anything_is_looked_up(pulls: Server, stub: HubStub, name: str) -> None:
    """400 with what a name looks like."""
    assert "invalid model name" in refused(pulls, stub, 400, json={"model": name})


def test_an_unknown_short_name_is_a_404(pulls: Server, stub: HubStub) -> None:
    """A name with a tag is not a Hub id, so the catalogue is all there is."""
    assert "nosuch:tag" in refused(pulls, stub, 404, json={"model": "nosuch:tag"})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "missing request body"),
        (b"  \n", "missing request body"),
        (b"{", "not valid JSON"),
        (b'{"model": "a/b"}x', "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["a/b"]', "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"a/b"', "must be a JSON object"),
    ],
)
def test_a_body_that_is_no_object_is_refused(pulls: Server, stub: HubStub, body: bytes, words: str) -> None:
    """400 that says what is wrong with it."""
    assert words in refused(pulls, stub, 400, content=body)


def test_the_content_type_does_not_matter(pulls: Server, stub: HubStub) -> None:
    """`curl -d` says that it sends a form."""
    stub.add("jobs/form", model())
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = pulls.client.post("/pull", content=b'{"model": "jobs/form"}', headers=headers)
    assert response.status_code == 202


# -- over a restart -----------------------------------------------------------


@pytest.mark.parametrize("how", ["kill -9", "SIGTERM"])
def test_open_jobs_go_on_after_a_restart(stub: HubStub, tmp_path: Path, how: str) -> None:
    """A running and a queued job outlive the server: no child is left, and both end under their ids by themselves."""
    for name in ("restart/one", "restart/two"):
        stub.add(name, model())
        stall(stub, name)
    with started(make_server(stub, tmp_path, MAX_CONCURRENT_PULLS="1")) as server:
        before = [accepted(server, name) for name in ("restart/one", "restart/two")]
        stalled(stub)
        first_start = job_of(server, before[0]["id"])["started_at"]
        assert [job["status"] for job in jobs_of(server)] == ["queued", "running"]
        children = server.children()
        assert children
        if how == "SIGTERM":
            assert server.stop() == 0
            assert ended(children)
        else:
            kill(server)
            wait_until(lambda: ended(children), 2, "the end of the worker")
        stub.clear_faults()
        server.start()
        assert {job["id"] for job in jobs_of(server)} == {job["id"] for job in before}
        ends = [server.finished(job["id"]) for job in before]
        server.stop()
    assert [end["status"] for end in ends] == ["succeeded", "succeeded"]
    assert [end["created_at"] for end in ends] == [job["created_at"] for job in before]
    assert ends[0]["started_at"] == first_start


def test_a_watcher_does_not_hold_up_the_shutdown(stub: HubStub, tmp_path: Path) -> None:
    """SIGTERM with a job that hangs and somebody who watches: the stream ends in good order."""
    stub.add("restart/watched", model())
    stall(stub, "restart/watched")
    with started(make_server(stub, tmp_path, DRAIN_SECONDS="2")) as server:
        job = accepted(server, "restart/watched")
        stalled(stub)
        with watching(server, job["id"]) as events:
            assert next(events)[0] == "progress"
            assert jobs_of(server)  # the watcher has had its turn, and waits
            assert server.stop() == 0
            with suppress(httpx.RemoteProtocolError):
                list(events)
    output = (tmp_path / "output.txt").read_text()
    assert "graceful shutdown exceeded" not in output
    assert "Traceback" not in output


def test_every_acknowledged_pull_survives_a_kill_in_a_burst(stub: HubStub, tmp_path: Path) -> None:
    """`kill -9` while pulls are coming in: whatever was answered with 202 is there after the restart."""
    stub.add("restart/burst", model())
    stub.fault("stall", "/restart/burst*/resolve/*", at_bytes=-1, times=FOREVER)
    acknowledged: list[str] = []
    enough = threading.Event()
    with started(make_server(stub, tmp_path, MAX_CONCURRENT_PULLS="1")) as server:

        def post(number: int) -> None:
            with suppress(httpx.TransportError):
                body = {"model": "restart/burst", "revision": f"r{number}"}
                reply = httpx.post(f"{server.url}/pull", json=body, timeout=30, trust_env=False)
                assert reply.status_code == 202
                acknowledged.append(reply.json()["id"])
            if len(acknowledged) >= 20:
                enough.set()

        with ThreadPoolExecutor(8) as threads:
            replies = [threads.submit(post, number) for number in range(200)]
            assert enough.wait(60)
            kill(server)
        for reply in replies:
            reply.result()
        assert 20 <= len(acknowledged) < 200
        server.start()
        statuses = {job["id"]: job["status"] for job in jobs_of(server)}
        server.stop()
    stub.clear_faults()
    assert set(acknowledged) <= set(statuses)
    assert set(statuses.values()) <= {"queued", "running", "failed"}  # the Hub has no such revisions


class JobsOverRestarts(RuleBasedStateMachine):
    """Pulls, cancels, kills and restarts in any order: no acknowledged job is ever lost."""

    def __init__(self, stub: HubStub, folder: Path) -> None:
        super().__init__()
        self.stub = stub
        self.acknowledged: list[str] = []
        self.cancelled: set[str] = set()
        self.fresh = True  # nothing has happened since the last start
        stub.fault("stall", "/machine/?/resolve/*", at_bytes=-1, times=FOREVER)
        self.server = make_server(stub, folder, MAX_CONCURRENT_PULLS="1")
        self.server.start()

    @initialize()
    def begin(self) -> None:
        """One pull runs and one is queued."""
        self.pull("machine/a", "auto")
        self.pull("machine/b", "auto")

    @rule(name=st.sampled_from(["machine/a", "machine/b"]), quantize=st.sampled_from(["auto", "4bit", "none"]))
    def pull(self, name: str, quantize: str) -> None:
        """A pull is acknowledged: as a new job, or as one that is known and open."""
        response = self.server.client.post("/pull", json={"model": name, "quantize": quantize})
        assert response.status_code in (200, 202)
        job_id: str = response.json()["id"]
        assert (job_id in self.acknowledged) == (response.status_code == 200)
        assert job_id not in self.cancelled
        self.acknowledged += [job_id] if response.status_code == 202 else []
        self.fresh = False

    @rule(pick=st.integers(min_value=0, max_value=5))
    def cancel(self, pick: int) -> None:
        """A job is cancelled, or had ended."""
        job_id = self.acknowledged[pick % len(self.acknowledged)]
        if self.server.client.delete(f"/jobs/{job_id}").json()["status"] == "cancelled":
            self.cancelled.add(job_id)
        self.fresh = False

    @precondition(lambda self: not self.fresh)
    @rule()
    def kill_and_restart(self) -> None:
        """The server is gone without a word, and comes back."""
        kill(self.server)
        self.server.start()
        self.fresh = True

    @rule(to_the_end=st.booleans())
    def go_on(self, to_the_end: bool) -> None:
        """The pull that hangs at the Hub goes on: to its end, or just so far as it comes."""
        before = self.open_jobs()
        wait_until(lambda: self.stub.stalled or not self.open_jobs(), what="a pull at the Hub")
        self.stub.release()
        if before and to_the_end:
            wait_until(lambda: self.open_jobs() < before, what="the end of a job")
        self.fresh = False

    def open_jobs(self) -> int:
        """How many jobs are not at their end."""
        return sum(job["status"] not in FINAL for job in jobs_of(self.server))

    @invariant()
    def nothing_is_lost(self) -> None:
        """Every acknowledged job is listed with a legal status, and what was cancelled stays so."""
        statuses = {job["id"]: job["status"] for job in jobs_of(self.server)}
        assert set(self.acknowledged) == set(statuses)
        assert set(statuses.values()) <= STATUSES
        assert {statuses[job_id] for job_id in self.cancelled} <= {"cancelled"}

    def teardown(self) -> None:
        """After one more kill all open jobs end."""
        self.stub.clear_faults()
        try:
            self.kill_and_restart()
            for job_id in self.acknowledged:
                expected = "cancelled" if job_id in self.cancelled else "succeeded"
                assert self.server.finished(job_id)["status"] == expected
        finally:
            self.server.stop()
            self.server.client.close()


def test_no_job_is_lost_whatever_happens(stub: HubStub, tmp_path: Path) -> None:
    """The state machine above, a few times."""
    for name in ("machine/a", "machine/b"):
        stub.add(name, model())
    numbers = iter(range(1000))

    class Machine(JobsOverRestarts):
        """With this Hub and a folder for each run."""

        def __init__(self) -> None:
            folder = tmp_path / str(next(numbers))
            folder.mkdir()
            super().__init__(stub, folder)

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=3, stateful_step_count=8, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        ),
    )  # fmt: skip


# -- races, in this process with the store's thread held up -------------------


class HeldStore(app.Store):
    """A store whose writes wait until they are let through, and may be told to fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.gate = threading.Event()
        self.gate.set()
        self.full = False

    def hold(self) -> None:
        """From now on every write waits."""
        self.gate.clear()
        self._thread.submit(self.gate.wait)

    async def save_job(self, job: app.Job) -> None:
        """Save, or fail as a full disk does, in either case only when the gate is open."""
        if self.full:
            await asyncio.to_thread(self.gate.wait)
            raise app.DiskFull("The disk is full, on purpose.")
        await super().save_job(job)


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldStore]:
    """The application's job functions on a state of their own, with pulls that hang until they are cancelled."""
    store = HeldStore(tmp_path / "state.db")

    async def hang(_: app.Job) -> app.ModelMeta:
        return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

    monkeypatch.setattr(app, "store", store)
    monkeypatch.setattr(app, "jobs", {})
    monkeypatch.setattr(app, "job_tasks", {})
    monkeypatch.setattr(app, "job_changed", app.Signal())
    monkeypatch.setattr(app, "download_semaphore", asyncio.Semaphore(1))
    for name in [name for name, value in vars(app).items() if isinstance(value, asyncio.Lock)]:
        monkeypatch.setattr(app, name, asyncio.Lock())  # a lock belongs to the loop that first waited for it
    monkeypatch.setattr(app, "_pull_model", hang)
    phase, app.app.state.phase = app.app.state.phase, "ready"
    yield store
    app.app.state.phase = phase
    store.gate.set()
    asyncio.run(store.close())


async def turns(count: int = 20) -> None:
    """Let everything that can go on go on."""
    for _ in range(count):
        await asyncio.sleep(0)


async def settled(*, status: str, job: app.Job) -> None:
    """Wait until a job has a status."""
    async with asyncio.timeout(10):
        while job.status != status:
            await app.job_changed.next().wait()


async def stored(store: app.Store) -> dict[str, str]:
    """The statuses that a restart would find."""
    jobs, _ = await store.load()
    return {job.id: job.status for job in jobs}


def test_an_equal_pull_is_not_acknowledged_before_the_job_is_durable(held: HeldStore) -> None:
    """The second of two equal pulls must wait for the first one's write, too."""

    async def scenario() -> bool:
        held.hold()
        first, second = (asyncio.create_task(app.open_job(app.job_of(app.PullBody(model="race/a")))) for _ in range(2))
        await turns()
        early = first.done() or second.done()
        held.gate.set()
        jobs = await asyncio.gather(first, second)
        await app.stop_job(jobs[0][0].id, "cancelled")
        return early

    assert asyncio.run(scenario()) is False


def test_an_equal_pull_fails_with_the_one_it_joined(held: HeldStore) -> None:
    """When the disk is full no pull may be acknowledged, equal ones neither."""

    async def scenario() -> list[object]:
        held.full = True
        held.gate.clear()
        pulls = [asyncio.create_task(app.open_job(app.job_of(app.PullBody(model="race/a")))) for _ in range(3)]
        await turns()
        held.gate.set()
        return await asyncio.gather(*pulls, return_exceptions=True)

    assert [type(outcome) for outcome in asyncio.run(scenario())] == [app.DiskFull] * 3
    assert app.jobs == {}


def test_a_job_that_starts_while_it_is_cancelled_stays_cancelled(held: HeldStore) -> None:
    """The download place comes free between the DELETE and its write: the job ends as cancelled, here and on disk."""

    async def scenario() -> tuple[str, str, bool]:
        await app.download_semaphore.acquire()
        job, _ = await app.open_job(app.job_of(app.PullBody(model="race/b")))
        await turns()
        held.hold()
        cancel = asyncio.create_task(app.stop_job(job.id, "cancelled"))
        await turns()
        app.download_semaphore.release()
        await turns()
        held.gate.set()
        await cancel
        await turns()
        return job.status, (await stored(held))[job.id], job.id in app.job_tasks

    assert asyncio.run(scenario()) == ("cancelled", "cancelled", False)


def test_a_cancel_that_cannot_be_written_is_no_half_cancel(held: HeldStore) -> None:
    """A full disk: after the error the job either goes on and says so, or is at its end without a download."""

    async def scenario() -> tuple[bool, bool]:
        job, _ = await app.open_job(app.job_of(app.PullBody(model="race/c")))
        await settled(status="running", job=job)
        held.full = True
        with suppress(app.ServerError):
            await app.stop_job(job.id, "cancelled")
        outcome = job.status in FINAL, job.id in app.job_tasks
        held.full = False
        for task in list(app.job_tasks.values()):
            task.cancel()
        await turns()
        return outcome

    final, downloading = asyncio.run(scenario())
    assert final != downloading


def test_a_watcher_misses_nothing_right_after_an_event(held: HeldStore) -> None:
    """The signal to stop comes when an event has just gone out: the stream ends all the same."""

    async def scenario() -> list[bytes]:
        job, _ = await app.open_job(app.job_of(app.PullBody(model="race/e")))
        await settled(status="running", job=job)
        await stored(held)
        events = app.watch_job(job)
        await anext(events)
        app.app.state.phase = "stopping"
        app.job_changed.fire()
        async with asyncio.timeout(2):
            rest = [event async for event in events]
        await app.stop_job(job.id, "cancelled")
        return rest

    assert asyncio.run(scenario()) == []


def test_a_watcher_hears_the_end_even_if_it_cannot_be_written(held: HeldStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that fails while the disk is full: `done` comes all the same."""
    go = asyncio.Event()

    async def fail(_: app.Job) -> app.ModelMeta:
        await go.wait()
        raise app.HubFailed("on purpose")

    monkeypatch.setattr(app, "_pull_model", fail)

    async def scenario() -> list[bytes]:
        job, _ = await app.open_job(app.job_of(app.PullBody(model="race/d")))
        await settled(status="running", job=job)
        await stored(held)  # now nothing is on its way that could wake the watcher
        events = app.watch_job(job)
        seen = [await anext(events)]
        held.full = True
        go.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(2):
                seen += [event async for event in events]
        return seen

    assert asyncio.run(scenario())[-1].startswith(b"event: done")
