"""State that cannot be written, disks that fill, signals and kills: said at once, nothing lost, nothing left."""

import asyncio
import errno
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness import Json, Server, wait_until
from hubstub import FOREVER, HubStub

import app

FINAL = {"succeeded", "failed", "cancelled"}
CONFIGURATION = b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
HEADER = b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
MODEL = {"config.json": CONFIGURATION, "model.safetensors": struct.pack("<Q", len(HEADER)) + HEADER + bytes(8)}
MEBIBYTE = 1024 * 1024


# -- servers, disks, processes ------------------------------------------------


@pytest.fixture(scope="module")
def stub() -> Iterator[HubStub]:
    """A Hub with a few small models."""
    with HubStub() as running:
        for name in ("fake/a", "fake/b", "state/one", "state/two"):
            running.add(name, MODEL)
        yield running


@pytest.fixture(autouse=True)
def no_faults(stub: HubStub) -> Iterator[None]:
    """Every test begins with a sound Hub."""
    yield
    stub.clear_faults()
    stub.release()


def make_server(stub: HubStub, folder: Path, *arguments: str, **more: Any) -> Server:
    """A server in a folder of its own, which is made if need be."""
    folder.mkdir(exist_ok=True)
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


def output_of(server: Server) -> str:
    """What the process printed."""
    return (server.folder / "output.txt").read_text()


def refuses_to_start(server: Server) -> int:
    """Start a server that must end by itself within 5 s without ever listening; returns its exit status."""
    server.start(ready=False)
    heard = []

    def over() -> bool:
        heard.append(listens(server.port))
        return server.process.poll() is not None

    try:
        wait_until(over, 5, "the end of a server that cannot start")
    finally:
        server.process.kill()
        server.process.wait()
        server.output.close()
        server.client.close()
    assert not any(heard)
    return server.process.returncode


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that only waits to be collected is dead."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def none_left(processes: list[psutil.Process]) -> None:
    """The documented limit: two seconds after the server's end nothing of it runs."""
    wait_until(lambda: not any(alive(process) for process in processes), 2, "the end of all children")


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A small disk in memory; skips the test where that is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip(f"mounting a small disk is refused here: {result.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


def fill(disk: Path, leave: int = 0) -> None:
    """Use up a disk but for `leave` bytes, in the file `filler`."""
    descriptor = os.open(disk / "filler", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        while shutil.disk_usage(disk).free > leave:
            os.write(descriptor, bytes(min(MEBIBYTE, shutil.disk_usage(disk).free - leave)))
    except OSError as error:
        assert error.errno == errno.ENOSPC
    finally:
        os.close(descriptor)
    assert shutil.disk_usage(disk).free <= leave


def free(disk: Path) -> None:
    """Give the space back."""
    (disk / "filler").unlink()


def job_of(server: Server, job_id: str) -> Json:
    """One job."""
    job: Json = server.client.get(f"/jobs/{job_id}").json()
    return job


def integrity(server: Server) -> str:
    """What SQLite says about the state of a server that is gone."""
    with closing(sqlite3.connect(server.folder / "state" / "state.db")) as database:
        answer: str = database.execute("PRAGMA integrity_check").fetchone()[0]
        return answer


# -- a state directory that cannot be used ------------------------------------


def test_an_unwritable_state_dir_is_said_at_once(stub: HubStub, tmp_path: Path) -> None:
    """Below a regular file not even root can write: 73 within 5 s, a line with the setting and the folder, no port."""
    (tmp_path / "file").write_text("in the way")
    state = tmp_path / "file" / "state"
    server = make_server(stub, tmp_path, STATE_DIR=str(state))
    assert refuses_to_start(server) == 73
    assert f"STATE_DIR {state} cannot be written" in output_of(server)
    assert "Traceback" not in output_of(server)


def test_a_second_server_on_the_same_state_is_refused(stub: HubStub, tmp_path: Path) -> None:
    """75, one line that names STATE_DIR, never listens, and the first goes on undisturbed."""
    with make_server(stub, tmp_path / "first") as first:
        state = str(tmp_path / "first" / "state")
        second = make_server(stub, tmp_path / "second", STATE_DIR=state)
        assert refuses_to_start(second) == 75
        assert f"STATE_DIR {state}" in output_of(second)
        assert "Traceback" not in output_of(second)
        assert first.pull("state/one")["status"] == "succeeded"


def test_a_killed_server_leaves_no_lock(stub: HubStub, tmp_path: Path) -> None:
    """After `kill -9`, with a model loaded, another server takes the same state at once."""
    with started(make_server(stub, tmp_path / "first", fake=True)) as first:
        first.have("fake/a")
        assert first.answer("fake/a", "count 1") == "0 "
        kill(first)
        with make_server(stub, tmp_path / "second", STATE_DIR=str(tmp_path / "first" / "state")) as second:
            assert second.client.get("/models/fake/a").status_code == 200


def damage(file: Path, start: int) -> None:
    """Overwrite a file with noise from `start` on."""
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(b"noise" * 2000)


def aside(server: Server) -> list[str]:
    """What the server set aside of a damaged state, by kind of file."""
    found = (server.folder / "state").glob("*corrupt*")
    return sorted(re.sub(r"\d{8}T\d{6}", "TIME", path.name) for path in found)


@pytest.mark.parametrize("start", [pytest.param(0, id="the-head"), pytest.param(4096, id="a-table")])
def test_a_damaged_state_is_set_aside(stub: HubStub, tmp_path: Path, start: int) -> None:
    """The server starts anew, says so, and keeps the damaged file."""
    with started(make_server(stub, tmp_path)) as server:
        server.pull("state/one")
        server.stop()
        damage(tmp_path / "state" / "state.db", start)
        server.start()
        assert server.client.get("/jobs").json() == {"jobs": []}
        assert aside(server) == ["state.db.corrupt-TIME"]
        assert "is damaged" in server.log()
        assert server.pull("state/one")["status"] == "succeeded"
        server.stop()
    assert integrity(server) == "ok"


def test_a_taken_port_is_said(stub: HubStub, tmp_path: Path) -> None:
    """The process ends with an error that says which address is in use."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        server = make_server(stub, tmp_path, PORT=port)
        server.start(ready=False)
        assert server.process.wait(timeout=30) != 0
        server.output.close()
    assert "address already in use" in output_of(server)
    assert port in output_of(server)


@pytest.mark.parametrize("value", ["0", "500ms"])
def test_every_drain_time_starts(stub: HubStub, tmp_path: Path, value: str) -> None:
    """Seconds or a form such as 500ms; nothing is open, so the end comes at once."""
    with started(make_server(stub, tmp_path, DRAIN_SECONDS=value)) as server:
        assert server.stop() == 0


# -- a full disk --------------------------------------------------------------


def test_a_disk_that_fills_while_serving_is_said_and_survived(stub: HubStub, tmp_path: Path, disk: Path) -> None:
    """507 for a pull and never a 202; chat and reading go on; with space again a pull works."""
    with make_server(stub, tmp_path, fake=True, STATE_DIR=str(disk / "state")) as server:
        server.have("fake/a")
        assert server.answer("fake/a", "count 2") == "0 1 "
        fill(disk)
        for number in range(5):
            reply = server.client.post("/pull", json={"model": "state/one", "revision": f"r{number}"})
            assert (reply.status_code, "disk" in reply.json()["error"]) == (507, True)
        assert server.answer("fake/a", "count 2") == "0 1 "
        paths = ("/", "/jobs", "/models", "/models/fake/a", "/diag", "/health/live", "/health/ready")
        assert {path: server.client.get(path).status_code for path in paths} == dict.fromkeys(paths, 200)
        assert len(server.client.get("/jobs").json()["jobs"]) == 1
        free(disk)
        assert server.pull("state/one")["status"] == "succeeded"


def test_no_equal_pull_is_acknowledged_on_a_full_disk(stub: HubStub, tmp_path: Path, disk: Path) -> None:
    """A hundred equal pulls at once: none may be told that there is a job."""
    with make_server(stub, tmp_path, STATE_DIR=str(disk / "state")) as server:
        server.pull("state/one")
        fill(disk)
        with ThreadPoolExecutor(50) as threads:
            post = server.client.post
            replies = list(threads.map(lambda _: post("/pull", json={"model": "state/two"}), range(100)))
        assert Counter(reply.status_code for reply in replies) == {507: 100}
        assert len(server.client.get("/jobs").json()["jobs"]) == 1


def test_a_cold_model_is_served_on_a_full_disk(stub: HubStub, tmp_path: Path, disk: Path) -> None:
    """Loading needs no state: a figure that cannot be kept is no reason to refuse an answer."""
    with make_server(stub, tmp_path, fake=True, STATE_DIR=str(disk / "state")) as server:
        server.have("fake/a")
        server.have("fake/b")
        assert server.answer("fake/a", "count 1") == "0 "
        fill(disk)
        assert server.chat("fake/b", "count 2").status_code == 200


def test_a_cancel_on_a_full_disk_is_no_half_cancel(stub: HubStub, tmp_path: Path, disk: Path) -> None:
    """Cancelling frees space, so it must work; at least the job may not say one thing and do another."""
    stub.fault("stall", "/state/two/resolve/*.safetensors", times=FOREVER)
    with make_server(stub, tmp_path, STATE_DIR=str(disk / "state")) as server:
        job = server.client.post("/pull", json={"model": "state/two"}).json()
        assert stub.wait(lambda: stub.stalled)
        fill(disk)
        server.client.delete(f"/jobs/{job['id']}")
        finished = job_of(server, job["id"])["status"] in FINAL
        assert finished == (not [child for child in server.children() if alive(child)])


def test_a_watcher_hears_the_end_on_a_full_disk(stub: HubStub, tmp_path: Path, disk: Path) -> None:
    """A job that ends while the disk is full still sends its `done` event."""
    stub.fault("stall", "/state/two/resolve/*.safetensors", times=FOREVER)
    with make_server(stub, tmp_path, STATE_DIR=str(disk / "state")) as server:
        job = server.client.post("/pull", json={"model": "state/two"}).json()
        assert stub.wait(lambda: stub.stalled)
        with server.client.stream("GET", f"/jobs/{job['id']}/events", timeout=5) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: progress"
            fill(disk)
            stub.release()
            assert "event: done" in lines


def test_a_job_cut_short_by_a_full_disk_runs_again_after_a_restart(stub: HubStub, tmp_path: Path, disk: Path) -> None:
    """Its end could not be written, so it is open at the next start, and then succeeds by itself."""
    stub.fault("stall", "/state/two/resolve/*.safetensors", times=1)
    with started(make_server(stub, tmp_path, STATE_DIR=str(disk / "state"))) as server:
        job = server.client.post("/pull", json={"model": "state/two"}).json()
        assert stub.wait(lambda: stub.stalled)
        fill(disk)
        stub.release()
        assert server.finished(job["id"])["error_kind"] == "disk_full"
        server.stop()
        free(disk)
        server.start()
        assert server.finished(job["id"])["status"] == "succeeded"
        assert server.stop() == 0


@pytest.mark.parametrize(
    "leave",
    [
        pytest.param(0, id="nothing-left"),
        pytest.param(8192, id="room-for-the-probe"),
        pytest.param(40960, id="room-for-an-empty-database"),
    ],
)
def test_a_full_disk_at_the_start_is_said_at_once(stub: HubStub, tmp_path: Path, disk: Path, leave: int) -> None:
    """With no room, or too little for the database: 73, never a port, and one line with STATE_DIR and the reason."""
    fill(disk, leave)
    server = make_server(stub, tmp_path, STATE_DIR=str(disk / "state"))
    assert refuses_to_start(server) == 73
    output = output_of(server)
    assert f"STATE_DIR {disk / 'state'}" in output
    assert any(words in output for words in ("No space left", "is full"))
    assert "Traceback" not in output


def test_a_refused_start_leaves_no_probe(stub: HubStub, tmp_path: Path, disk: Path) -> None:
    """Whoever frees the disk finds nothing but the lock."""
    fill(disk)
    refuses_to_start(make_server(stub, tmp_path, STATE_DIR=str(disk / "state")))
    assert [path.name for path in (disk / "state").iterdir()] == ["lock"]


def test_a_disk_that_fills_during_a_download_fails_the_job(stub: HubStub, tmp_path: Path) -> None:
    """The Hub's cache is on a disk that fills up in the middle of a file: disk_full with a remedy, then it works."""
    stub.fault("stall", "/state/one/resolve/*.safetensors", times=1)
    with (
        mounted(tmp_path / "cache", "280m") as cache,
        make_server(stub, tmp_path, HF_HOME=str(cache), DISK_RESERVE="0") as server,
    ):
        job = server.client.post("/pull", json={"model": "state/one"}).json()
        assert stub.wait(lambda: stub.stalled)
        fill(cache)
        stub.release()
        end = server.finished(job["id"])
        assert (end["status"], end["error_kind"]) == ("failed", "disk_full"), end
        assert "free some space and pull again" in end["error"]
        assert "No space left on device" in end["traceback"]
        free(cache)
        assert server.pull("state/one")["status"] == "succeeded"


@pytest.mark.parametrize("where", ["missing/folder/app.log", "/dev/full"])
def test_an_unwritable_log_is_a_warning(stub: HubStub, tmp_path: Path, where: str) -> None:
    """The server runs without its log file and says so."""
    with make_server(stub, tmp_path, LOG_FILE=str(tmp_path / where)) as server:
        assert server.pull("state/one")["status"] == "succeeded"
        output = output_of(server)
    assert "No space left" in output if where == "/dev/full" else f"{where} cannot be written" in output
    assert "Ready: version" in output


# -- models that went away ----------------------------------------------------


def test_a_model_whose_files_are_gone_is_dropped(stub: HubStub, tmp_path: Path) -> None:
    """A warning at the start, a 404 that names /pull, and the other models stay; pulling brings it back."""
    with started(make_server(stub, tmp_path, fake=True)) as server:
        server.have("fake/b")
        path = Path(server.pull("fake/a")["local_path"])
        server.stop()
        shutil.rmtree(path)
        server.start()
        assert "WARNING ai-server: The files of fake/a are gone" in server.log()
        assert "The files of fake/b are gone" not in server.log()
        assert [model["name"] for model in server.client.get("/models").json()["models"]] == ["fake/b"]
        reply = server.chat("fake/a")
        assert (reply.status_code, "/pull" in reply.json()["error"]) == (404, True)
        assert server.pull("fake/a")["status"] == "succeeded"
        assert server.answer("fake/a", "count 1") == "0 "
        assert server.stop() == 0


# -- ends ---------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_server_in_good_order(stub: HubStub, tmp_path: Path, number: signal.Signals) -> None:
    """With an idle loaded engine: exit status 0, no child left, no traceback, and the port is free."""
    with started(make_server(stub, tmp_path, fake=True)) as server:
        server.have("fake/a")
        assert server.answer("fake/a", "count 1") == "0 "
        children = server.children()
        assert children
        server.process.send_signal(number)
        assert server.process.wait(timeout=60) == 0
        assert not any(alive(child) for child in children)
        assert not listens(server.port)
        assert "Unloaded fake/a" in server.log()
    assert "Traceback" not in output_of(server)


def test_a_signal_during_a_load_ends_the_load(stub: HubStub, tmp_path: Path) -> None:
    """SIGTERM while a model loads that never would: the request is answered or cut, no child is left."""
    stub.add("fake/hangs", MODEL)
    with started(make_server(stub, tmp_path, fake=True, DRAIN_SECONDS="0")) as server, ThreadPoolExecutor(1) as threads:
        server.have("fake/hangs")
        reply = threads.submit(server.chat, "fake/hangs")
        events = server.folder / "state" / "events.txt"
        wait_until(lambda: events.exists() and "load fake/hangs" in events.read_text())
        children = server.children()
        assert children
        assert server.stop() == 0
        assert not any(alive(child) for child in children)
        with suppress(Exception):
            assert reply.result(timeout=10).status_code >= 500


def test_a_kill_takes_every_child_along(stub: HubStub, tmp_path: Path) -> None:
    """`kill -9` with a loaded engine, an open stream and a running pull; then the same port and state work at once."""
    stub.fault("stall", "/state/one/resolve/*.safetensors", times=1)
    with started(make_server(stub, tmp_path, fake=True)) as server:
        server.have("fake/a")
        server.client.post("/pull", json={"model": "state/one"})
        assert stub.wait(lambda: stub.stalled)
        with suppress(OSError, RuntimeError), server.streaming("fake/a", "slow 100000") as lines:
            assert next(lines)["done"] is False
            children = server.children()
            kill(server)
            none_left(children)
        assert len(children) == 2
        assert integrity(server) == "ok"
        server.start()
        assert server.answer("fake/a", "count 3") == "0 1 2 "
        (job,) = [job for job in server.client.get("/jobs").json()["jobs"] if job["model"] == "state/one"]
        assert server.finished(job["id"])["status"] == "succeeded"
        assert server.stop() == 0


# -- the store ----------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Iterator[app.Store]:
    """A store of its own."""
    made = app.Store(tmp_path / "state.db")
    yield made
    asyncio.run(made.close())


@pytest.mark.parametrize(("setting", "value"), [("journal_mode", "wal"), ("synchronous", 2), ("mmap_size", 0)])
def test_the_store_asks_sqlite_for_durability(store: app.Store, setting: str, value: object) -> None:
    """As its own connection sees it: WAL, full sync (2), no memory map."""

    async def scenario() -> object:
        await store.save_job(app.Job("job_1", "a/b"))
        return (await store._run(f"PRAGMA {setting}"))[0][0]

    assert asyncio.run(scenario()) == value


def test_what_the_store_was_given_comes_back(tmp_path: Path) -> None:
    """Jobs and models, in full, by another store on the same file; a second write of a job replaces the first."""
    older = app.Job("job_1", "a/b", status="running", created_at="2026-01-01T00:00:00Z", traceback="line\nline")
    newer = app.Job("job_0", "a/c", created_at="2026-01-02T00:00:00Z", preferred_quantized=True)
    meta = app.ModelMeta("a/b", "a/b", "/somewhere", ladder=[app.Rung("vllm", "refused", "not installed")])

    async def scenario() -> tuple[list[app.Job], list[app.ModelMeta]]:
        store = app.Store(tmp_path / "state.db")
        for job in (newer, older):
            await store.save_job(job)
        older.status = "succeeded"
        await store.save_job(older)
        await store.save_model(meta)
        await store.close()
        again = app.Store(tmp_path / "state.db")
        found = await again.load()
        await again.close()
        return found

    assert asyncio.run(scenario()) == ([older, newer], [meta])


def test_a_deleted_model_is_gone_from_the_store(store: app.Store) -> None:
    """And only that one."""

    async def scenario() -> list[str]:
        for name in ("a/b", "a/c"):
            await store.save_model(app.ModelMeta(name, name, "/somewhere"))
        await store.delete_model("a/b")
        return [meta.name for meta in (await store.load())[1]]

    assert asyncio.run(scenario()) == ["a/c"]


def test_a_store_that_cannot_be_opened_is_unavailable(tmp_path: Path) -> None:
    """The error says that the state cannot be written, with a status of its own."""
    store = app.Store(tmp_path / "missing" / "state.db")
    with pytest.raises(app.Unavailable, match="cannot be written"):
        asyncio.run(store.save_job(app.Job("job_1", "a/b")))
    asyncio.run(store.close())
