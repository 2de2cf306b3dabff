"""Downloads, faults, kills and requests in any order: no job is lost, no wrong byte is seen, nothing is left behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import Json, wait_until
from hubstub import HubStub
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
from pulltools import (
    FINAL,
    SEGMENT,
    cache_of,
    files_in,
    folder_of,
    jobs_of,
    make_server,
    model,
    partials,
    workers,
    wrong_bytes,
)

STATUSES = {"queued", "running", "paused", *FINAL}
REPOSITORIES = {name: model(2 * SEGMENT, seed=60 + at) | {"t.json": b"{}"} for at, name in enumerate(("m/a", "m/b"))}
names = st.sampled_from(sorted(REPOSITORIES))
picks = st.integers(min_value=0, max_value=7)


class Downloads(RuleBasedStateMachine):
    """A real server, a Hub that fails, and what was acknowledged."""

    def __init__(self, stub: HubStub, folder: Path) -> None:
        super().__init__()
        self.stub = stub
        self.acknowledged: list[str] = []
        self.cancelled: set[str] = set()
        self.server = make_server(stub, folder)
        self.server.start()
        self.can_plan = "/plan" in self.server.client.get("/openapi.json").json()["paths"]

    def note(self, reply: Any, *allowed: int) -> None:
        """Remember the job that a reply acknowledges."""
        assert reply.status_code in (200, 202, *allowed), reply.text
        if reply.status_code == 202:
            self.acknowledged.append(reply.json()["id"])

    @initialize()
    def begin(self) -> None:
        """One pull is on its way."""
        self.pull("m/a")

    @rule(name=names)
    def pull(self, name: str) -> None:
        """A pull is a new job, or one that is open."""
        self.note(self.server.client.post("/pull", json={"model": name}))

    @rule(name=names)
    def verify(self, name: str) -> None:
        """What is here is checked; what is not is a 404."""
        self.note(self.server.client.post(f"/models/{name}/verify"), 404)

    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        """A job is cancelled, or had ended."""
        job_id = self.acknowledged[pick % len(self.acknowledged)]
        if self.server.client.delete(f"/jobs/{job_id}").json()["status"] == "cancelled":
            self.cancelled.add(job_id)

    @rule(pick=picks)
    def pause(self, pick: int) -> None:
        """A job is paused, or had ended."""
        job_id = self.acknowledged[pick % len(self.acknowledged)]
        assert self.server.client.post(f"/jobs/{job_id}/pause").json()["status"] in ("paused", *FINAL)

    @rule(pick=picks)
    def resume(self, pick: int) -> None:
        """A paused job goes on."""
        job_id = self.acknowledged[pick % len(self.acknowledged)]
        assert self.server.client.post(f"/jobs/{job_id}/resume").json()["status"] != "paused"

    @rule()
    def kill_and_restart(self) -> None:
        """The server is gone without a word, and comes back."""
        self.server.kill()
        self.server.start()

    @rule()
    def kill_a_worker(self) -> None:
        """A download is gone without a word; its job may fail."""
        for worker in workers(self.server)[:1]:
            with suppress(ProcessLookupError):
                worker.kill()

    @rule(
        kind=st.sampled_from(["cut", "reset", "flip", "stall", "status", "etag", "ignore_range"]), at=picks, times=picks
    )
    def fault(self, kind: Any, at: int, times: int) -> None:
        """Some of the next answers of the Hub go wrong."""
        self.stub.fault(kind, "*.safetensors", at_bytes=at * SEGMENT // 8, times=1 + times // 3, skip=times % 3)

    @rule()
    def release(self) -> None:
        """What hangs goes on."""
        self.stub.release()

    @rule()
    def go_on(self) -> None:
        """Everything that is open and not paused comes to an end."""
        self.stub.clear_faults()
        wait_until(self._all_through, 60, "the end of the jobs")

    @rule(name=names)
    def delete(self, name: str) -> None:
        """A model is taken off the disk, if it is there."""
        assert self.server.client.delete(f"/models/{name}").status_code in (200, 404, 409)

    @rule(name=names, at=st.integers(min_value=0, max_value=2 * SEGMENT))
    def damage_and_verify(self, name: str, at: int) -> None:
        """A byte on the disk changes: the check finds it, and brings that file anew."""
        self.go_on()
        path = folder_of(cache_of(self.server), name)
        found = list(path.glob("snapshots/*/model.safetensors"))
        if self.server.client.get(f"/models/{name}").status_code != 200 or not found:
            return
        with found[0].open("r+b") as file:
            byte = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), at)
        reply = self.server.client.post(f"/models/{name}/verify")
        self.note(reply)
        job = self._ended(reply.json()["id"])
        assert (job["status"], job["repaired"]) == ("succeeded", ["model.safetensors"])

    @precondition(lambda self: self.can_plan)
    @rule(name=names)
    def plan(self, name: str) -> None:
        """A plan changes nothing and fetches nothing."""
        before = sum(self.stub.bytes_served.values()) if not workers(self.server) else None
        reply = self.server.client.post("/plan", json={"model": name})
        assert reply.status_code == 200, reply.text
        assert before in (None, sum(self.stub.bytes_served.values())) or workers(self.server)

    # -- what must hold

    @invariant()
    def no_job_is_lost(self) -> None:
        """Every acknowledged job is listed with a legal status, and what was cancelled stays so."""
        statuses = {job["id"]: job["status"] for job in jobs_of(self.server)}
        assert set(self.acknowledged) == set(statuses)
        assert set(statuses.values()) <= STATUSES
        assert {statuses[job_id] for job_id in self.cancelled} <= {"cancelled"}

    @invariant()
    def no_wrong_byte_is_seen(self) -> None:
        """Every file that others can see has the digest of its name."""
        assert wrong_bytes(cache_of(self.server)) == []

    @invariant()
    def no_partial_is_an_orphan(self) -> None:
        """A repository with partial files has a job that has not succeeded, and it is the last one."""
        last: dict[str, Json] = {job["model"]: job for job in reversed(jobs_of(self.server))}
        if any(job["status"] in ("queued", "running") for job in last.values()):
            return  # its worker makes and ends partials just now
        left = {path.parents[1].name.removeprefix("models--").replace("--", "/") for path in partials(self.cache)}
        assert all(last[name]["status"] != "succeeded" for name in left)

    @property
    def cache(self) -> Path:
        """Where the files are."""
        return cache_of(self.server)

    def _all_through(self) -> bool:
        self.stub.release()
        return all(job["status"] in ("paused", *FINAL) for job in jobs_of(self.server))

    def _ended(self, job_id: str) -> Json:
        """The end of a job; one that was joined may have been paused."""
        self.server.client.post(f"/jobs/{job_id}/resume")
        return self.server.finished(job_id)

    def teardown(self) -> None:
        """After one more kill every job ends, and a last pull brings every file and leaves nothing else."""
        try:
            self.stub.clear_faults()
            self.stub.release()
            self.kill_and_restart()
            for job_id in self.acknowledged:
                assert self._ended(job_id)["status"] in FINAL
            for name, files in REPOSITORIES.items():
                job = self.server.pull(name)
                assert (job["status"], files_in(Path(job["local_path"]))) == ("succeeded", files)
            self.no_wrong_byte_is_seen()
            assert partials(self.cache) == []
            assert self.server.client.get("/partials").json()["partials"] == []
        finally:
            self.server.stop()
            self.server.client.close()


@pytest.fixture(scope="module")
def stub() -> Iterator[HubStub]:
    """A Hub with the two repositories."""
    with HubStub() as running:
        for name, files in REPOSITORIES.items():
            running.add(name, files)
        yield running


def test_whatever_happens_to_downloads(stub: HubStub, tmp_path: Path) -> None:
    """The state machine above, a few times."""
    numbers = iter(range(1000))

    class Machine(Downloads):
        """With this Hub and a folder for each run."""

        def __init__(self) -> None:
            folder = tmp_path / str(next(numbers))
            folder.mkdir()
            super().__init__(stub, folder)

    wanted = os.getenv("MACHINE_EXAMPLES")  # a long run takes other ways each time
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=int(wanted or 5), stateful_step_count=25, deadline=None, derandomize=not wanted, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        ),
    )  # fmt: skip
