"""Downloads under every fault that the stand-in Hub knows: nothing is lost, nothing wrong is shown, nothing twice."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from crashing import Crashing
from harness import Json, Server, free_port, wait_until
from hubstub import FOREVER, Fault, HubStub, git_blob_id, make_certificate, make_snapshot
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pulltools import (
    CONFIGURATION,
    MEBIBYTE,
    SEGMENT,
    accepted,
    cache_of,
    failed,
    files_in,
    folder_of,
    job_of,
    jobs_of,
    make_server,
    model,
    partials,
    ranges,
    served,
    settle,
    stalled,
    started,
    succeeded,
    tree,
    weights,
    workers,
    wrong_bytes,
)

import app

TOKEN = "hf_canary7f3a9e"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def stub() -> Iterator[HubStub]:
    """A Hub of this file's own, so that its bytes can be counted."""
    with HubStub() as running:
        yield running


@pytest.fixture(scope="module")
def running(stub: HubStub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for most tests here; it has a token."""
    with make_server(stub, tmp_path_factory.mktemp("pulls"), HF_TOKEN=TOKEN, LOG_LEVEL="DEBUG") as server:
        yield server


@pytest.fixture
def pulls(running: Server, stub: HubStub) -> Iterator[Server]:
    """The shared server; afterwards every job is at its end and every file that can be seen is right."""
    yield running
    settle(running, stub)
    assert wrong_bytes(cache_of(running)) == []


@pytest.fixture
def elsewhere() -> Iterator[HubStub]:
    """A second Hub on another port."""
    with HubStub() as running:
        yield running


def right(server: Server, job: Json, files: dict[str, bytes]) -> None:
    """See that a pull brought just these files, whole, and that nothing is left of its way."""
    assert job["status"] == "succeeded", job
    assert files_in(Path(job["local_path"])) == files
    assert [
        path for path in partials(cache_of(server)) if path.is_relative_to(Path(job["local_path"]).parents[1])
    ] == []


def absent(server: Server, repository: str) -> None:
    """See that nobody can see a file of a repository."""
    assert server.client.get(f"/models/{repository}").status_code == 404
    assert tree(folder_of(cache_of(server), repository) / "snapshots") == set()


# -- P1 and P2: names and revisions -------------------------------------------

NAMES = [
    "../x", "a/b/c", "/x", "a\\b", "a\0b", "org/x\n", "o\u0440g/x", "org/\u202ex", "a--b", "org/" + "x" * 97,
    "n" * 300 + "/x", "CON/..", "http://127.0.0.1/x", "file:///x", "org/..", "org/x@../../x", "org/x@-x",
]  # fmt: skip


def test_p1_no_odd_name_reaches_the_hub_or_the_disk(pulls: Server, stub: HubStub) -> None:
    """Each is a 400; the Hub hears nothing, and no file or folder is made."""
    before, asked = tree(pulls.folder), len(stub.requests)
    replies = {name: pulls.client.post("/pull", json={"model": name}) for name in NAMES}
    assert {name: reply.status_code for name, reply in replies.items()} == dict.fromkeys(NAMES, 400)
    assert (tree(pulls.folder), len(stub.requests)) == (before, asked)


@pytest.mark.parametrize("revision", ["../../x", "-x", "r" * 300, "a..b", "x\n", "\u0440"])
def test_p2_no_odd_revision_reaches_the_hub(pulls: Server, stub: HubStub, revision: str) -> None:
    """400 that names the field."""
    asked = len(stub.requests)
    reply = pulls.client.post("/pull", json={"model": "org/x", "revision": revision})
    assert (reply.status_code, len(stub.requests)) == (400, asked)
    assert "revision" in reply.json()["error"]


def test_p2_a_body_cannot_choose_where_to_ask(pulls: Server, stub: HubStub, elsewhere: HubStub) -> None:
    """Another endpoint, address, token or folder in the body is named as ignored, and not used."""
    stub.add("p2/body", model())
    fields = {"endpoint": elsewhere.url, "url": elsewhere.url, "token": "hf_other", "cache_dir": "/elsewhere"}
    reply = pulls.client.post("/pull", json={"model": "p2/body", **fields})
    assert set(fields) <= set(reply.headers["x-ignored-parameters"].replace(",", " ").split())
    right(pulls, pulls.finished(reply.json()["id"]), model())
    assert elsewhere.requests == []
    assert {request.headers.get("authorization") for request in stub.asked("*p2/body*")} == {f"Bearer {TOKEN}"}


# -- P3: listings that lie ----------------------------------------------------


def named(*names: str) -> Change:
    """A listing with these names too."""
    return lambda info: {**info, "siblings": [*info["siblings"], *(listed(name) for name in names)]}


def listed(name: str, **more: Any) -> Json:
    """The entry of a file in a listing."""
    return {"rfilename": name, "size": 1, "blobId": "a" * 40, **more}


LIES: dict[str, tuple[str, Change]] = {
    "upwards": ("unsafe_filename", named("../../e.json")),
    "upwards inside": ("unsafe_filename", named("a/../../e.json")),
    "absolute": ("unsafe_filename", named("/abs.json")),
    "drive": ("unsafe_filename", named("C:\\x.json")),
    "stream": ("unsafe_filename", named("x.json:y")),
    "null": ("unsafe_filename", named("a\0b.json")),
    "line": ("unsafe_filename", named("a\nb.json")),
    "surrogate": ("bad_hub_reply", named("a\ud800.json")),
    "empty": ("unsafe_filename", named("")),
    "dot": ("unsafe_filename", named("a/./b.json")),
    "twins": ("unsafe_filename", named("Config.json")),
    "same twice": ("unsafe_filename", named("a.json", "a.json")),
    "long part": ("unsafe_filename", named("x" * 295 + ".json")),
    "long path": ("unsafe_filename", named("/".join(["deep"] * 1000) + "/x.json")),
    "file and folder": ("unsafe_filename", named("config.json/x.json")),
    "many": ("too_many_files", named(*(f"{number}.json" for number in range(100_000)))),
    "no digest": ("bad_hub_reply", lambda info: {**info, "siblings": [listed("config.json", blobId=None)]}),
    "odd digest": ("bad_hub_reply", lambda info: {**info, "siblings": [listed("config.json", blobId="../" * 14)]}),
    "negative": ("bad_hub_reply", lambda info: {**info, "siblings": [listed("config.json", size=-1)]}),
    "endless": ("bad_hub_reply", lambda info: {**info, "siblings": [listed("config.json", size=10**30)]}),
    "text": ("bad_hub_reply", lambda info: {**info, "siblings": [listed("config.json", size="many")]}),
    "no commit": ("bad_hub_reply", lambda info: {**info, "sha": "main"}),
    "upward commit": ("bad_hub_reply", lambda info: {**info, "sha": "../" * 13 + "x"}),
    "no object": ("bad_hub_reply", lambda _: ["a"]),
    "another name": ("bad_hub_reply", lambda info: {**info, "id": "../../x"}),
    "archive": ("unsupported_format", lambda info: {**info, "siblings": [listed("model.zip")]}),
    "nothing": ("unsupported_format", lambda info: {**info, "siblings": []}),
}


@pytest.mark.parametrize("lie", LIES)
def test_p3_a_listing_that_lies_brings_nothing(pulls: Server, stub: HubStub, lie: str) -> None:
    """The job says why, no file is asked for, and nothing appears anywhere."""
    (kind, change), repository = LIES[lie], f"p3/{lie.replace(' ', '-')}"
    stub.add(repository, model())
    stub.lie(repository, change)
    before = {name for name in tree(pulls.folder) if not name.startswith("state/")}
    assert failed(pulls, repository)["error_kind"] == kind
    assert stub.asked(f"/{repository}/resolve/*") == []
    assert {name for name in tree(pulls.folder) if not name.startswith("state/")} == before


# -- P4: redirects and the token ----------------------------------------------


def test_p4_the_token_does_not_follow_a_file_to_another_port(pulls: Server, stub: HubStub, elsewhere: HubStub) -> None:
    """The Hub gets it at every request, who is redirected to never does."""
    for hub in (stub, elsewhere):
        hub.add("p4/file", model(SEGMENT))
    stub.fault("redirect", "/p4/file/resolve/*", times=FOREVER, location=elsewhere.url + "{path}")
    right(pulls, succeeded(pulls, "p4/file"), model(SEGMENT))
    assert {request.headers.get("authorization") for request in stub.asked("/p4/*")} == {f"Bearer {TOKEN}"}
    assert elsewhere.requests
    assert not any("authorization" in request.headers for request in elsewhere.requests)


def test_p4_the_token_does_not_follow_a_listing_to_another_port(
    pulls: Server, stub: HubStub, elsewhere: HubStub
) -> None:
    """The same for the question what a repository has."""
    for hub in (stub, elsewhere):
        hub.add("p4/listing", model())
    stub.fault("redirect", "/api/models/p4/listing*", times=FOREVER, location=elsewhere.url + "{path}")
    assert pulls.pull("p4/listing")["status"] in ("succeeded", "failed")
    assert elsewhere.requests
    assert not any("authorization" in request.headers for request in elsewhere.requests)


def test_p4_the_token_comes_back_with_the_hub(pulls: Server, stub: HubStub) -> None:
    """A redirect within the Hub, as for a model that was renamed, keeps the token."""
    stub.add("p4/new", model(), private_token=TOKEN)
    stub.add("p4/old", model())
    stub.lie("p4/old", lambda info: {**info, "id": "p4/new"})
    right(pulls, succeeded(pulls, "p4/old"), model())
    files = stub.asked("/p4/new/resolve/*")
    assert files and {request.headers.get("authorization") for request in files} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "//", "http://[x/"])
def test_p4_a_redirect_to_nowhere_is_refused(pulls: Server, stub: HubStub, location: str) -> None:
    """Other schemes and addresses that are none: the pull fails at once, and the file does not appear."""
    stub.add("p4/nowhere", model())
    stub.fault("redirect", "model.safetensors", times=FOREVER, location=location)
    job = failed(pulls, "p4/nowhere")
    assert (job["error_kind"], job["attempts"]) == ("bad_redirect", 0)
    absent(pulls, "p4/nowhere")


@pytest.mark.parametrize("path", ["*.safetensors", "/api/models/p4/loop*"])
def test_p4_a_circle_of_redirects_ends(pulls: Server, stub: HubStub, path: str) -> None:
    """For files and for listings: refused after a few hops."""
    stub.add("p4/loop", model())
    stub.fault("redirect", path, times=FOREVER, location="{path}")
    assert failed(pulls, "p4/loop")["error_kind"] == "bad_redirect"
    assert len(stub.asked("*p4/loop*")) <= 100
    absent(pulls, "p4/loop")


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubStub, Path]]:
    """A Hub that speaks https, and its certificate, which nobody trusts by himself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    certificate = make_certificate(tmp_path_factory.mktemp("certificate"))
    with HubStub(certificate=certificate) as hub:
        hub.add("p4/secure", model())
        yield hub, certificate[0]


def test_p4_https_never_becomes_http(secure: tuple[HubStub, Path], elsewhere: HubStub, tmp_path: Path) -> None:
    """A Hub whose certificate is trusted redirects to http: refused, and the other end hears nothing."""
    hub, certificate = secure
    elsewhere.add("p4/secure", model())
    hub.fault("redirect", "model.safetensors", times=FOREVER, location=elsewhere.url + "{path}")
    with make_server(hub, tmp_path, HF_TOKEN=TOKEN, SSL_CERT_FILE=str(certificate)) as server:
        assert failed(server, "p4/secure")["error_kind"] == "bad_redirect"
        assert elsewhere.requests == []
        hub.clear_faults()
        right(server, succeeded(server, "p4/secure"), model())


def test_p4_storage_with_signed_addresses(pulls: Server, stub: HubStub, elsewhere: HubStub) -> None:
    """Large files are elsewhere, at addresses that soon expire: no token goes there, and no byte is fetched twice."""
    files = model(9 * SEGMENT)
    stub.add("p4/signed", files)
    stub.cdn, stub.cdn_uses = elsewhere, 5
    job = succeeded(pulls, "p4/signed")
    right(pulls, job, files)
    assert job["attempts"] == 0
    assert served(elsewhere, "p4/signed") == {"model.safetensors": len(files["model.safetensors"])}
    assert not any("authorization" in request.headers for request in elsewhere.requests)
    assert {request.status for request in elsewhere.requests} == {206, 403}


def test_p4_a_storage_that_refuses_for_good_fails_the_pull(pulls: Server, stub: HubStub, elsewhere: HubStub) -> None:
    """An address that is never good is no licence that is missing: the pull ends, and says another thing."""
    stub.add("p4/expired", model())
    stub.cdn, stub.cdn_uses = elsewhere, 0
    assert failed(pulls, "p4/expired")["error_kind"] == "hub_error"
    absent(pulls, "p4/expired")


# -- P5: cuts -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_p5_five_cuts_in_a_row_cost_nothing(pulls: Server, stub: HubStub, kind: str) -> None:
    """Each new request begins just where the last one ended; a reset may lose what was on its way, a cut nothing."""
    repository, files = f"p5/{kind}", model(MEBIBYTE)
    stub.add(repository, files)
    size, piece = len(files["model.safetensors"]), 100_000
    for _ in range(5):
        stub.fault(kind, f"/{repository}/resolve/*.safetensors", at_bytes=piece)  # type: ignore[arg-type]
    job = succeeded(pulls, repository)
    right(pulls, job, files)
    assert (job["attempts"], job["waiting_for"]) == (5, "")
    begins = [first for first, _ in ranges(stub, repository)]
    assert begins == [number * piece for number in range(6)] or kind == "reset"
    assert begins == sorted(begins)
    assert size <= served(stub, repository)["model.safetensors"] <= size + (5 * piece if kind == "reset" else 0)


def test_p5_five_cuts_of_large_files_cost_less_than_two_percent(pulls: Server, stub: HubStub) -> None:
    """Four connections, cut anywhere: the bytes are served once."""
    files = model(16 * SEGMENT - 200, seed=1)  # the last segment is no tiny one
    stub.add("p5/large", files)
    for number in range(5):
        stub.fault("cut", "/p5/large/resolve/*.safetensors", at_bytes=SEGMENT // 3, skip=number)
    job = succeeded(pulls, "p5/large")
    right(pulls, job, files)
    size = len(files["model.safetensors"])
    assert size <= served(stub, "p5/large")["model.safetensors"] <= 1.02 * size
    assert job["attempts"] == 5


def test_p5_a_hub_that_is_away_for_a_moment(stub: HubStub, tmp_path: Path) -> None:
    """It goes in the middle of a pull and comes back at the same address: the job goes on where it was."""
    files = model(4 * SEGMENT, seed=2)
    with HubStub() as hub, make_server(hub, tmp_path, PULL_TRIES="6") as server:
        hub.add("p5/away", files)
        hub.fault("stall", "*.safetensors", at_bytes=SEGMENT // 2, times=4)
        job_id = accepted(server, "p5/away")
        stalled(hub, 4)
        hub.close()
        wait_until(lambda: job_of(server, job_id)["waiting_for"], what="a try that fails")
        hub.start()
        right(server, server.finished(job_id), files)
        assert served(hub, "p5/away")["model.safetensors"] <= 1.02 * len(files["model.safetensors"])


# -- P6: the server dies ------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> dict[str, bytes]:
    """A model of 200 MiB."""
    return model(200 * MEBIBYTE, seed=3)


def test_p6_a_killed_server_goes_on_by_itself_and_fetches_8_mib_again_at_most(
    large: dict[str, bytes], tmp_path: Path
) -> None:
    """`kill -9` at 50 % of 200 MiB: within 5 s of the restart the same job asks for what is missing, and no more."""
    with HubStub() as hub, started(make_server(hub, tmp_path)) as server:
        hub.add("p6/large", large)
        hub.fault("stall", "*.safetensors", at_bytes=SEGMENT // 2, times=4, skip=50)
        job_id = accepted(server, "p6/large")
        stalled(hub, 4)
        server.kill()
        assert hub.wait(lambda: hub.stalled == 0), "the worker lives on without its server"
        before = len(hub.requests)
        server.start()
        assert hub.wait(lambda: len(hub.requests) > before, 5), "the job does not go on by itself"
        job = server.finished(job_id)
        right(server, job, large)
        again = served(hub, "p6/large")["model.safetensors"] - len(large["model.safetensors"])
        assert 0 <= again <= 8 * MEBIBYTE
        assert min(first for first, _ in ranges(hub, "p6/large")[54:]) >= 50 * SEGMENT - 8 * MEBIBYTE


# -- P7: answers that change --------------------------------------------------


@pytest.mark.parametrize("kind", ["etag", "ignore_range", "range", "encoding", "status"])
def test_p7_an_answer_that_does_not_fit_is_not_mixed_in(pulls: Server, stub: HubStub, kind: str) -> None:
    """Another ETag, all instead of a part, a wrong place, a compression, 416: in the end the file is right."""
    repository, files = f"p7/{kind}", model(4 * SEGMENT, seed=4)
    stub.add(repository, files)
    stub.fault(kind, f"/{repository}/resolve/*.safetensors", skip=2, status=416)  # type: ignore[arg-type]
    right(pulls, succeeded(pulls, repository), files)


def test_p7_a_hub_that_knows_no_ranges(pulls: Server, stub: HubStub) -> None:
    """It always sends the whole file: one connection takes it, and the others do not."""
    files = model(4 * SEGMENT, seed=5)
    stub.add("p7/never", files)
    stub.fault("ignore_range", "*.safetensors", times=FOREVER)
    right(pulls, succeeded(pulls, "p7/never"), files)
    whole = [one for one in stub.asked("/p7/never/resolve/*.safetensors") if one.outcome == "complete"]
    assert sum(one.sent == len(files["model.safetensors"]) for one in whole) == 1


def test_p7_parts_that_come_after_the_whole_do_not_hurt(pulls: Server, stub: HubStub) -> None:
    """Three connections wait for their parts while a fourth is sent everything: late bytes change nothing."""
    files = model(4 * SEGMENT, seed=6)
    stub.add("p7/late", files)
    stub.fault("stall", "/p7/late/resolve/*.safetensors", times=3, at_bytes=0)
    stub.fault("ignore_range", "/p7/late/resolve/*.safetensors", times=FOREVER)
    job_id = accepted(pulls, "p7/late")
    path = folder_of(cache_of(pulls), "p7/late") / "blobs" / digest_name(files["model.safetensors"])
    wait_until(path.exists, what="the whole file")
    stub.release()
    right(pulls, pulls.finished(job_id), files)


@pytest.mark.parametrize("kind", ["range", "status"])
def test_p7_an_answer_that_never_fits_fails_the_pull(pulls: Server, stub: HubStub, kind: str) -> None:
    """Always the wrong place, always 416: failed for the size; nothing can be seen."""
    repository = f"p7/never-{kind}"
    stub.add(repository, model())
    stub.fault(kind, f"/{repository}/resolve/*.safetensors", status=416, times=FOREVER)  # type: ignore[arg-type]
    assert failed(pulls, repository)["error_kind"] == "size"
    absent(pulls, repository)


def test_p7_a_file_that_changes_all_the_time_fails_the_pull(pulls: Server, stub: HubStub) -> None:
    """Every other answer has another ETag: it begins anew a few times, then the job says `checksum`."""
    stub.add("p7/restless", model(9 * SEGMENT))
    for number in range(20):
        stub.fault("etag", "/p7/restless/resolve/*.safetensors", skip=number)
    job = failed(pulls, "p7/restless")
    assert (job["error_kind"], "changed" in job["error"]) == ("checksum", True)
    absent(pulls, "p7/restless")


# -- P8: silence --------------------------------------------------------------


def test_p8_silence_ends_and_slowness_does_not(pulls: Server, stub: HubStub) -> None:
    """Nothing for PULL_STALL_SECONDS, PULL_TRIES times: `stalled`; a few bytes all the time: a whole file."""
    for name in ("p8/silent", "p8/slow"):
        stub.add(name, model(30_000))
    stub.fault("stall", "/p8/silent/resolve/*.safetensors", times=FOREVER, at_bytes=0)
    stub.fault("rate", "/p8/slow/resolve/*.safetensors", times=FOREVER, bytes_per_second=10_240)
    slow, silent = accepted(pulls, "p8/slow"), accepted(pulls, "p8/silent")
    job = pulls.finished(silent)
    assert (job["status"], job["error_kind"], job["attempts"]) == ("failed", "stalled", 1)
    assert len(stub.asked("/p8/silent/resolve/*.safetensors")) == 2
    assert "1 s" in job["error"]
    absent(pulls, "p8/silent")
    right(pulls, pulls.finished(slow), model(30_000))
    assert len(stub.asked("/p8/slow/resolve/*.safetensors")) == 1


def test_p8_a_stall_is_survived(pulls: Server, stub: HubStub) -> None:
    """One silence in the middle of a segment: the next try goes on at the same byte."""
    stub.add("p8/once", model(SEGMENT // 2))
    stub.fault("stall", "/p8/once/resolve/*.safetensors", at_bytes=SEGMENT // 4)
    job = succeeded(pulls, "p8/once")
    right(pulls, job, model(SEGMENT // 2))
    assert job["attempts"] == 1
    assert [first for first, _ in ranges(stub, "p8/once")] == [0, SEGMENT // 4]


def test_p8_defaults() -> None:
    """Without a setting: 30 s of silence, 6 tries, waits of 0.5 s up to 8 s, four connections of 2 MiB each."""
    assert (app.PULL_STALL_SECONDS, app.PULL_TRIES) == (30, 6)
    assert (app.RETRY_SECONDS, app.LONGEST_RETRY_SECONDS) == (0.5, 8.0)
    assert app.CONNECTIONS * app.SEGMENT_BYTES <= 8 * MEBIBYTE
    problem = app.HubFailed("on purpose")
    assert [app.retry_delay(failures, problem) for failures in range(1, 6)] == [0.5, 1, 2, 4, 8]
    with pytest.raises(app.HubFailed):
        app.retry_delay(6, problem)


# -- P9: wrong bytes ----------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_p9_a_flipped_byte_is_never_shown(pulls: Server, stub: HubStub, name: str) -> None:
    """The file is fetched anew a few times; then the job says `checksum`, and the next pull fetches it again."""
    repository, files = f"p9/flip-{name.partition('.')[0]}", model(1000)
    stub.add(repository, files)
    fault = stub.fault("flip", f"/{repository}/resolve/*/{name}", at_bytes=5, times=FOREVER)
    job = failed(pulls, repository)
    assert (job["error_kind"], name in job["error"]) == ("checksum", True)
    assert fault.used == app.PULL_ROUNDS
    absent(pulls, repository)
    assert list(folder_of(cache_of(pulls), repository).glob(f"blobs/{digest_name(files[name])}*")) == []
    stub.clear_faults()
    right(pulls, succeeded(pulls, repository), files)


def digest_name(content: bytes) -> str:
    """How a blob of this content begins: large files are named by sha256, small ones by git's id."""
    return hashlib.sha256(content).hexdigest() if content != CONFIGURATION else git_blob_id(content)


def test_p9_one_flipped_byte_costs_one_more_fetch(pulls: Server, stub: HubStub) -> None:
    """A byte that was wrong once: the file alone begins anew, and the job succeeds."""
    files = model(3 * SEGMENT, seed=7) | {"tokenizer.json": b"{}"}
    stub.add("p9/once", files)
    stub.fault("flip", "/p9/once/resolve/*.safetensors", at_bytes=9)
    right(pulls, succeeded(pulls, "p9/once"), files)
    sizes = {name: len(content) for name, content in files.items()}
    sizes["model.safetensors"] *= 2
    assert served(stub, "p9/once") == sizes


WRONG_LENGTHS: dict[str, tuple[Json, Change | None]] = {
    "short": ({"kind": "length", "at_bytes": -3}, None),
    "long": ({"kind": "length", "at_bytes": 3}, None),
    "compressed": ({"kind": "encoding"}, None),
    "announced short": ({}, lambda info: resized(info, -5)),
    "announced long": ({}, lambda info: resized(info, 5)),
}


def resized(info: dict[str, Any], by: int) -> dict[str, Any]:
    """A listing in which the weights have another size."""
    for one in info["siblings"]:
        if one["rfilename"].endswith(".safetensors"):
            one["size"] += by
            one["lfs"]["size"] += by
    return info


@pytest.mark.parametrize("how", WRONG_LENGTHS)
def test_p9_a_wrong_length_is_never_shown(pulls: Server, stub: HubStub, how: str) -> None:
    """`size`, no file in the cache, no byte beyond what was announced; the next pull brings the file."""
    repository, files = f"p9/{how.replace(' ', '-')}", model(1000)
    fault, lie = WRONG_LENGTHS[how]
    stub.add(repository, files)
    if fault:
        stub.fault(Fault(path=f"/{repository}/resolve/*.safetensors", times=FOREVER, **fault))
    stub.lie(repository, lie)
    assert failed(pulls, repository)["error_kind"] == "size"
    absent(pulls, repository)
    stub.clear_faults()
    stub.lie(repository, None)
    right(pulls, succeeded(pulls, repository), files)


# -- P10: a full disk ---------------------------------------------------------


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """A mount that is gone afterwards; skips the test where we may not mount."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_p10_what_cannot_fit_is_refused_before_the_first_byte(pulls: Server, stub: HubStub) -> None:
    """507 that names the figures; no job, no file asked for."""
    stub.add("p10/huge", model())
    stub.lie("p10/huge", lambda info: resized(info, 2**50))
    jobs = len(jobs_of(pulls))
    reply = pulls.client.post("/pull", json={"model": "p10/huge"})
    assert reply.status_code == 507
    assert "needs 1125.9 TB" in reply.json()["error"]
    assert len(jobs_of(pulls)) == jobs
    assert stub.asked("/p10/huge/resolve/*") == []


def test_p10_a_disk_that_fills_ends_the_pull_and_nothing_else(stub: HubStub, tmp_path: Path) -> None:
    """A tmpfs of 64 MB for cache and state: `disk_full`, the partial is gone, a loaded model still answers."""
    files = model(40 * MEBIBYTE, seed=8)
    stub.add("fake/a", model())
    stub.add("p10/fills", files)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64m", "tmpfs") as disk:
        settings = {"STATE_DIR": str(disk / "state"), "HF_HOME": str(disk / "hub")}
        with make_server(stub, tmp_path, fake=True, **settings) as server:
            succeeded(server, "fake/a", init=True)
            stub.fault("stall", "/p10/fills/resolve/*.safetensors", at_bytes=SEGMENT // 2, times=4)
            job_id = accepted(server, "p10/fills")
            stalled(stub, 4)
            fill(disk / "ballast")
            assert server.answer("fake/a", "say 3")
            stub.release()
            job = server.finished(job_id)
            assert (job["status"], job["error_kind"]) == ("failed", "disk_full")
            assert partials(disk / "hub" / "hub") == []
            assert server.answer("fake/a", "say 3")
            (disk / "ballast").unlink()
            right(server, succeeded(server, "p10/fills"), files)
            assert server.client.get("/health/ready").status_code == 200


def fill(path: Path) -> None:
    """Write until nothing more fits."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(65536)):
                pass
        except OSError:
            return


# -- P11: equal pulls ---------------------------------------------------------


def test_p11_a_hundred_pulls_in_three_spellings_fetch_every_byte_once(pulls: Server, stub: HubStub) -> None:
    """One job: 202 once, 200 for the others; another revision is another job, and fetches nothing again."""
    files = model(3 * SEGMENT, seed=9)
    stub.add("p11/Model", files)
    stub.add("p11/Model", files, revision="v2")
    stub.fault("stall", "/p11/Model/resolve/*/config.json", at_bytes=0)
    spellings = ["p11/Model", "P11/model", "hf.co/p11/Model"]
    with ThreadPoolExecutor(100) as threads:
        post = pulls.client.post
        replies = list(threads.map(lambda number: post("/pull", json={"model": spellings[number % 3]}), range(100)))
        other = post("/pull", json={"model": "p11/Model", "revision": "v2"})
    assert Counter(reply.status_code for reply in replies) == {202: 1, 200: 99}
    (job_id,) = {reply.json()["id"] for reply in replies}
    assert (other.status_code, other.json()["id"] == job_id) == (202, False)
    stalled(stub)
    stub.release()
    right(pulls, pulls.finished(job_id), files)
    assert pulls.finished(other.json()["id"])["status"] == "succeeded"
    assert served(stub, "p11/Model") == {name: len(content) for name, content in files.items()}


# -- P12: cancelling ----------------------------------------------------------


def test_p12_a_cancel_at_a_third_closes_the_connection(pulls: Server, stub: HubStub) -> None:
    """`cancelled` within 2 s, the Hub sees the connections close, and the next pull goes on where this one was."""
    files = model(10 * SEGMENT, seed=10)
    stub.add("p12/third", files)
    stub.fault("stall", "/p12/third/resolve/*.safetensors", at_bytes=SEGMENT // 2, skip=3, times=4)
    job_id = accepted(pulls, "p12/third")
    stalled(stub, 4)
    began = time.monotonic()
    assert pulls.client.delete(f"/jobs/{job_id}").json()["status"] == "cancelled"
    assert time.monotonic() - began < 2
    hung = [one for one in stub.asked("/p12/third/resolve/*.safetensors") if one.outcome != "complete"]
    assert stub.wait(lambda: {one.outcome for one in hung} == {"client_closed"}, 2)
    assert workers(pulls) == []
    absent(pulls, "p12/third")
    right(pulls, succeeded(pulls, "p12/third"), files)
    assert served(stub, "p12/third")["model.safetensors"] <= len(files["model.safetensors"]) + 4 * SEGMENT // 2


def test_p12_a_cancel_at_the_very_end_is_one_or_the_other(pulls: Server, stub: HubStub) -> None:
    """The last bytes and the DELETE at the same time: cancelled without a model, or succeeded with it."""
    stub.add("p12/end", model(1000))
    for pause in (0.0, 0.05):
        stub.fault("stall", "/p12/end/resolve/*.safetensors", at_bytes=900)
        job_id = accepted(pulls, "p12/end")
        assert stub.wait(lambda: stub.stalled)
        stub.release()
        threading.Event().wait(pause)  # how far it came is open; what it says must be true
        status = pulls.client.delete(f"/jobs/{job_id}").json()["status"]
        listed = pulls.client.get("/models/p12/end").status_code
        assert (status, listed) in (("cancelled", 404), ("succeeded", 200))
        assert job_of(pulls, job_id)["status"] == status
        right(pulls, succeeded(pulls, "p12/end"), model(1000))
        assert pulls.client.delete("/models/p12/end").status_code == 200


def test_p12_a_cancel_while_it_waits_for_the_hub(pulls: Server, stub: HubStub) -> None:
    """The wait after a 429 ends with the job."""
    stub.add("p12/waits", model())
    stub.fault("status", "/api/models/p12/waits*", status=429, seconds=60, times=FOREVER)
    job_id = accepted(pulls, "p12/waits")
    wait_until(lambda: job_of(pulls, job_id)["waiting_for"], what="the wait")
    assert pulls.client.delete(f"/jobs/{job_id}").json()["status"] == "cancelled"


def test_a_paused_job_keeps_what_it_has_over_a_restart(stub: HubStub, tmp_path: Path) -> None:
    """Paused, killed, started: still paused, nothing is asked for; resumed, it fetches what is missing, no more."""
    files = model(6 * SEGMENT, seed=11)
    stub.add("p12/pause", files)
    stub.fault("stall", "/p12/pause/resolve/*.safetensors", at_bytes=SEGMENT // 2, skip=2, times=4)
    with started(make_server(stub, tmp_path)) as server:
        job_id = accepted(server, "p12/pause")
        stalled(stub, 4)
        assert server.client.post(f"/jobs/{job_id}/pause").json()["status"] == "paused"
        assert stub.wait(lambda: stub.stalled == 0)
        server.kill()
        asked = len(stub.requests)
        server.start()
        assert job_of(server, job_id)["status"] == "paused"
        assert {row["job_id"] for row in server.client.get("/partials").json()["partials"]} == {job_id}
        assert server.client.delete("/partials").json()["removed"] == 0
        assert len(stub.requests) == asked
        assert server.client.post(f"/jobs/{job_id}/resume").json()["status"] in ("queued", "running")
        right(server, server.finished(job_id), files)
    assert served(stub, "p12/pause")["model.safetensors"] <= len(files["model.safetensors"]) + 4 * SEGMENT // 2


def test_a_pull_of_a_paused_model_lets_it_go_on(pulls: Server, stub: HubStub) -> None:
    """An equal pull is the same job, and means that it is wanted now."""
    stub.add("p12/again", model())
    stub.fault("stall", "/p12/again/resolve/*.safetensors")
    job_id = accepted(pulls, "p12/again")
    stalled(stub)
    pulls.client.post(f"/jobs/{job_id}/pause")
    reply = pulls.client.post("/pull", json={"model": "p12/again"})
    assert (reply.status_code, reply.json()["id"]) == (200, job_id)
    right(pulls, pulls.finished(job_id), model())


# -- P13: refusals ------------------------------------------------------------

REFUSALS = [(401, "unauthorized"), (403, "gated"), (404, "not_found"), (418, "hub_refused")]


@pytest.mark.parametrize(("status", "kind"), REFUSALS)
@pytest.mark.parametrize("path", ["/api/models/p13/refused*", "/p13/refused/resolve/*.safetensors"])
def test_p13_a_refusal_is_told_apart_and_not_repeated(
    pulls: Server, stub: HubStub, path: str, status: int, kind: str
) -> None:
    """For listings and for files; the text says what to do, and has no token."""
    stub.add("p13/refused", model())
    fault = stub.fault("status", path, status=status, times=FOREVER)
    job = failed(pulls, "p13/refused")
    assert (job["error_kind"], job["attempts"]) == (kind, 0)
    assert fault.used <= 2
    assert TOKEN not in json.dumps(job)
    absent(pulls, "p13/refused")


@pytest.mark.parametrize("path", ["/api/models/p13/list*", "/p13/file/resolve/*.safetensors"])
def test_p13_the_hub_says_how_long_to_wait(pulls: Server, stub: HubStub, path: str) -> None:
    """429 with Retry-After 7: the job says what it waits for, and needs 7 s at least."""
    repository, times = ("p13/list", 2) if "api" in path else ("p13/file", 1)  # a listing is asked for before the job
    stub.add(repository, model())
    fault = stub.fault("status", path, status=429, seconds=7, times=times)
    began = time.monotonic()
    job_id = accepted(pulls, repository)
    assert "429" in wait_until(lambda: job_of(pulls, job_id)["waiting_for"], what="the wait")
    job = pulls.finished(job_id)
    assert time.monotonic() - began >= 7
    assert (fault.used, job["attempts"], job["waiting_for"]) == (times, 1, "")
    right(pulls, job, model())


def test_p13_errors_of_the_hub_pass(stub: HubStub, tmp_path: Path) -> None:
    """500 three times, then an answer; for a listing 500 and what is no JSON. All tries are counted."""
    stub.add("p13/passes", model())
    stub.fault("garbage", "/api/models/p13/passes*", times=2)  # the first is for the question before the job
    stub.fault("status", "/api/models/p13/passes*", status=500)
    stub.fault("status", "/p13/passes/resolve/*.safetensors", status=500, times=3)
    with make_server(stub, tmp_path, PULL_TRIES="6") as server:
        job = succeeded(server, "p13/passes")
        right(server, job, model())
        assert (job["attempts"], job["waiting_for"]) == (5, "")


def test_p13_errors_of_the_hub_that_stay(pulls: Server, stub: HubStub) -> None:
    """`hub_error` for 5xx, `bad_hub_reply` for what is no listing, after PULL_TRIES."""
    stub.add("p13/stays", model())
    for kind, fault in (("hub_error", "status"), ("bad_hub_reply", "garbage")):
        stub.fault(fault, "/api/models/p13/stays*", times=FOREVER)  # type: ignore[arg-type]
        job = failed(pulls, "p13/stays")
        assert (job["error_kind"], job["attempts"]) == (kind, 1)
        stub.clear_faults()


def test_p13_a_certificate_that_nobody_knows(secure: tuple[HubStub, Path], tmp_path: Path) -> None:
    """`tls_error`, and no request with a token was sent."""
    hub, _ = secure
    asked = len(hub.requests)
    with make_server(hub, tmp_path, HF_TOKEN=TOKEN) as server:
        job = failed(server, "p4/secure")
    assert (job["error_kind"], TOKEN in json.dumps(job)) == ("tls_error", False)
    assert len(hub.requests) == asked


def test_p13_a_storage_with_a_certificate_that_nobody_knows(
    pulls: Server, stub: HubStub, secure: tuple[HubStub, Path]
) -> None:
    """The same for where a file is."""
    stub.add("p4/secure", model())
    stub.fault("redirect", "model.safetensors", times=FOREVER, location=secure[0].url + "{path}")
    assert failed(pulls, "p4/secure")["error_kind"] == "tls_error"
    absent(pulls, "p4/secure")


@pytest.mark.parametrize("endpoint", ["http://hub.invalid", "http://127.0.0.1:{port}"])
def test_p13_a_hub_that_is_not_there(stub: HubStub, tmp_path: Path, endpoint: str) -> None:
    """A name that nobody knows, a port where nobody listens: `offline`, and the server serves on."""
    with make_server(stub, tmp_path, HF_ENDPOINT=endpoint.format(port=free_port())) as server:
        assert failed(server, "p13/nowhere")["error_kind"] == "offline"
        assert server.client.get("/health/ready").status_code == 200


# -- P14: a cache that cannot be written --------------------------------------


def test_p14_a_cache_that_becomes_read_only(stub: HubStub, tmp_path: Path) -> None:
    """A loaded model answers on, a pull fails as `read_only`; written again, the pull works."""
    stub.add("fake/a", model())
    stub.add("p14/more", model())
    (tmp_path / "hub").mkdir()
    with (
        mounted(tmp_path / "hub", "-t", "tmpfs", "-o", "size=64m", "tmpfs") as disk,
        make_server(stub, tmp_path, fake=True) as server,
    ):
        succeeded(server, "fake/a", init=True)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert failed(server, "p14/more")["error_kind"] == "read_only"
        assert server.answer("fake/a", "say 3")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        right(server, succeeded(server, "p14/more"), model())


def test_p14_a_newer_revision_does_not_disturb_who_answers(stub: HubStub, tmp_path: Path) -> None:
    """Pull and delete while the model streams: the stream goes to its end, and the delete is a 409."""
    stub.add("fake/b", model(seed=1))
    with make_server(stub, tmp_path, fake=True) as server:
        succeeded(server, "fake/b", init=True)
        stub.add("fake/b", model(seed=2))
        with server.streaming("fake/b", "slow 1000") as lines:
            next(lines)
            succeeded(server, "fake/b")
            assert server.client.delete("/models/fake/b").status_code == 409
            words = [next(lines)["message"]["content"] for _ in range(300)]  # it goes on, for longer than all that took
        assert "".join(words).split() == [str(number) for number in range(1, len("".join(words).split()) + 1)]


# -- P15: killed at any point -------------------------------------------------

CRASH_FILES = {
    **model(3 * 4096 - 300, seed=20), "tokenizer.json": b'{"a": 1}', "folder/notes.txt": b"", "merges.txt": b'{"a": 1}',
}  # fmt: skip


@pytest.fixture(scope="module")
def crash_order(stub: HubStub, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], app.Fetch]:
    """A function that makes a worker's order: five files, of which two are equal and one is empty."""
    commit = stub.add("p15/crash", CRASH_FILES)
    entries = {file.path: file for file in make_snapshot(CRASH_FILES).files.values()}
    files = [app.RemoteFile(name, entry.size, entry.etag) for name, entry in entries.items()]

    def make() -> app.Fetch:
        folder = tmp_path_factory.mktemp("crash") / "hub" / "models--p15--crash"
        return app.Fetch("p15/crash", commit, files, str(folder), stub.url, reference="main")

    return make


@pytest.fixture(scope="module")
def crashing() -> Iterator[Crashing]:
    """Workers that can be killed at an operation."""
    with Crashing() as program:
        yield program


def holds(order: app.Fetch) -> None:
    """See that nobody can see a wrong byte, and that a reference leads to whole snapshots only."""
    folder = Path(order.folder)
    assert wrong_bytes(folder.parent) == []
    if (folder / "refs" / "main").exists():
        assert (folder / "refs" / "main").read_text() == order.revision
        assert files_in(folder / "snapshots" / order.revision) == CRASH_FILES


def ends_well(crashing: Crashing, order: app.Fetch) -> None:
    """See that a last worker completes what the others left, and leaves nothing of its way."""
    assert crashing.run(order, 0) == "done"
    folder = Path(order.folder)
    holds(order)
    assert files_in(folder / "snapshots" / order.revision) == CRASH_FILES
    assert list(folder.glob("blobs/*.incomplete")) == []
    assert tree(folder / "refs") == {"main"}  # anything else there makes other tools take the cache for damaged


def test_p15_killed_before_every_single_operation(crashing: Crashing, crash_order: Callable[[], app.Fetch]) -> None:
    """`kill -9` before the n-th operation on files, for n = 1, 2, 3 until a worker gets through: always all is well."""
    for number in itertools.count(1):
        order = crash_order()
        end = crashing.run(order, number)
        holds(order)
        ends_well(crashing, order)
        if end == "done":
            break
    assert number > 40


@settings(
    max_examples=100, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(numbers=st.lists(st.integers(min_value=1, max_value=60), min_size=2, max_size=6))
def test_p15_killed_several_times(crashing: Crashing, crash_order: Callable[[], app.Fetch], numbers: list[int]) -> None:
    """One worker after the other is killed at a random point of what the ones before it have left."""
    order = crash_order()
    for number in numbers:
        crashing.run(order, number)
        holds(order)
    ends_well(crashing, order)


def test_p15_a_power_cut_costs_what_was_not_synced(
    crash_order: Callable[[], app.Fetch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After another start of the machine only synced segments count: the others may be zeros on the disk."""
    folder = Path(crash_order().folder)
    content = weights(5 * app.SEGMENT_BYTES)
    folder.mkdir(parents=True)
    partial = app.Partial(folder, app.RemoteFile("w", len(content), hashlib.sha256(content).hexdigest()))
    assert list(partial.open()) == [0, 1, 2, 3, 4, 5]
    partial.mark(0, 1)
    partial.sync()
    partial.mark(1, 1)
    partial.close()
    assert list(app.partial_states(partial.path, len(content))) == [2, 1, 0, 0, 0, 0]
    monkeypatch.setattr(app, "_boot_mark", lambda: b"anotherb")
    assert list(app.partial_states(partial.path, len(content))) == [2, 0, 0, 0, 0, 0]


# -- M1 to M3: what is not fetched, and what is not run ------------------------


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pth"])
def test_m1_a_pickle_alone_is_refused_and_never_asked_for(pulls: Server, stub: HubStub, name: str) -> None:
    """`unsafe_format` that names the file; no byte of the repository is fetched."""
    repository = f"m1/{name.partition('.')[2]}"
    stub.add(repository, {"config.json": CONFIGURATION, name: b"\x80\x04."})
    job = failed(pulls, repository)
    assert (job["error_kind"], name in job["error"]) == ("unsafe_format", True)
    assert stub.asked(f"/{repository}/resolve/*") == []


def test_m1_beside_safetensors_a_pickle_is_left_where_it_is(pulls: Server, stub: HubStub) -> None:
    """With both, and even with the grant, `.bin` is not asked for."""
    stub.add("m1/both", model() | {"pytorch_model.bin": b"\x80\x04.", "optimizer.pt": b"\x80\x04."})
    right(pulls, succeeded(pulls, "m1/both", allow_pickle=True), model())
    assert [one for one in stub.asked("/m1/both/resolve/*") if not one.path.endswith((".json", ".safetensors"))] == []


def test_m1_a_granted_pickle_is_fetched_and_verified_as_any_file(pulls: Server, stub: HubStub) -> None:
    """With `allow_pickle` the weights come, other pickles do not, and a flipped byte is found all the same."""
    stub.add("m1/granted", {"config.json": CONFIGURATION, "pytorch_model.bin": b"\x80\x04.", "training.bin": b"\x80."})
    stub.fault("flip", "/m1/granted/resolve/*.bin")
    job = succeeded(pulls, "m1/granted", allow_pickle=True)
    right(pulls, job, {"config.json": CONFIGURATION, "pytorch_model.bin": b"\x80\x04."})
    assert pulls.client.get("/models/m1/granted").json()["allow_pickle"] is True


def test_m2_no_code_is_fetched_whoever_names_it(pulls: Server, stub: HubStub) -> None:
    """Configuration, tokenizer, processor and pipelines name code: none of it is asked for without the grant."""
    code = {"auto_map": {"AutoModel": "canary.A", "AutoTokenizer": ["canary.A", None], "AutoProcessor": "canary.A"}}
    config = {
        **json.loads(CONFIGURATION),
        **code,
        "trust_remote_code": True,
        "text_config": {"trust_remote_code": True},
    }
    config |= {"_attn_implementation_internal": "org/kernel", "custom_pipelines": {"a": {"impl": "canary.A"}}}
    sides = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    files = model() | {"config.json": json.dumps(config).encode()}
    files |= {name: json.dumps(code).encode() for name in sides}
    stub.add("m2/canary", {**files, "canary.py": b"raise SystemExit", "sub/canary.py": b"raise SystemExit"})
    right(pulls, succeeded(pulls, "m2/canary"), files)
    assert [one.path for one in stub.asked() if "canary.py" in one.path or "org/kernel" in one.path] == []
    assert pulls.client.get("/models/m2/canary").json()["trust_remote_code"] is False


def test_m3_a_grant_is_for_one_commit(pulls: Server, stub: HubStub) -> None:
    """The code that was granted stays, whatever the branch becomes; only another pull changes it."""
    first = stub.add("m3/code", model() | {"modeling.py": b"first"})
    job = succeeded(pulls, "m3/code", trust_remote_code=True)
    second = stub.add("m3/code", model() | {"modeling.py": b"second"})
    entry = pulls.client.get("/models/m3/code").json()
    assert (entry["trust_remote_code"], entry["revision"]) == (True, first)
    assert (Path(job["local_path"]) / "modeling.py").read_bytes() == b"first"
    path = Path(succeeded(pulls, "m3/code")["local_path"])
    entry = pulls.client.get("/models/m3/code").json()
    assert (entry["trust_remote_code"], entry["revision"]) == (False, second)
    assert (path.name, (path / "modeling.py").exists()) == (second, False)


# -- files of all kinds -------------------------------------------------------


def test_files_of_every_shape(pulls: Server, stub: HubStub) -> None:
    """Empty ones, the same one twice, deep folders, names of 255 bytes, of spaces and signs, and a thousand of them."""
    odd = {"empty.txt": b"", "again.json": b'{"a": 1}', "a/again.json": b'{"a": 1}', "a/b/c/d/e/f.json": b"deep"}
    odd |= {
        "x" * 250 + ".json": b"long",
        "\u00e9" * 125 + ".json": b"bytes",
        "a b%20#?&+.json": b"signs",
        "-.json": b"-",
    }
    odd |= {f"many/{number}.json": str(number).encode() for number in range(1000)}
    files = model(seed=30) | odd
    stub.add("shapes/all", files)
    right(pulls, succeeded(pulls, "shapes/all"), files)
    once = {digest: len(content) for content in files.values() for digest in [hashlib.sha256(content).digest()]}
    assert sum(served(stub, "shapes/all").values()) == sum(once.values())


def test_two_revisions_share_what_is_equal(pulls: Server, stub: HubStub) -> None:
    """The second fetches only what is new; deleting one leaves the other whole."""
    stub.add("shared/model", model(seed=31), revision="v1")
    changed = model(seed=31) | {"tokenizer.json": b"{}"}
    stub.add("shared/model", changed, revision="v2")
    succeeded(pulls, "shared/model@v1")
    job = succeeded(pulls, "shared/model@v2")
    assert served(stub, "shared/model") == {name: len(content) for name, content in changed.items()}
    assert pulls.client.delete("/models/shared/model@v1").status_code == 200
    right(pulls, job, changed)
    assert pulls.client.delete("/models/shared/model@v2").status_code == 200
    assert [path for path in folder_of(cache_of(pulls), "shared/model").rglob("*") if path.is_file()] == []


# -- other tools --------------------------------------------------------------

TOOLS = """
import json, sys
from huggingface_hub import hf_hub_download, scan_cache_dir, snapshot_download
repo, offline = sys.argv[1], sys.argv[2] == "offline"
folder = snapshot_download(repo, local_files_only=offline)
one = hf_hub_download(repo, "model.safetensors", local_files_only=offline)
print(json.dumps([folder, one, [str(warning) for warning in scan_cache_dir().warnings]]))
"""


def other_tool(server: Server, repository: str, how: str) -> Any:
    """What huggingface_hub finds, or fetches, in a process of its own with the same HF_HOME."""
    names = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_DISABLE_XET", "PATH")
    environment = {name: value for name, value in server._environment.items() if name in names}
    command = [sys.executable, "-c", TOOLS, repository, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_other_tools_find_what_was_pulled(pulls: Server, stub: HubStub) -> None:
    """huggingface_hub without a network returns the very folder, and sees nothing wrong with the cache."""
    stub.add("tools/ours", model(SEGMENT))
    job = succeeded(pulls, "tools/ours")
    folder, file, warnings = other_tool(pulls, "tools/ours", "offline")
    assert (folder, file) == (job["local_path"], job["local_path"] + "/model.safetensors")
    assert [warning for warning in warnings if "tools--ours" in warning] == []


def test_what_other_tools_fetched_is_not_fetched_again_but_hashed(pulls: Server, stub: HubStub) -> None:
    """A right file costs no byte, a damaged one is replaced; both were put there by huggingface_hub."""
    files = model(SEGMENT, seed=32) | {"tokenizer.json": b"{}"}
    stub.add("tools/theirs", files)
    _, path, _ = other_tool(pulls, "tools/theirs", "online")
    before = served(stub, "tools/theirs")
    flip(Path(path), 1000)
    job = succeeded(pulls, "tools/theirs")
    right(pulls, job, files)
    size = len(files["model.safetensors"])
    assert job["bytes_fetched"] == size
    assert served(stub, "tools/theirs") == {**before, "model.safetensors": before["model.safetensors"] + size}


# -- verify -------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    """Change a byte of a file, and neither its size nor its times."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def shorten(path: Path, at: int) -> None:
    """Cut a file off."""
    os.truncate(path, at)


def remove(path: Path, _: int) -> None:
    """Take away a file and what shows it."""
    path.resolve().unlink()
    path.unlink()


@pytest.mark.parametrize("damage", [flip, shorten, remove])
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_verify_fetches_the_damaged_file_and_no_other(
    pulls: Server, stub: HubStub, damage: Callable[[Path, int], None], name: str
) -> None:
    """A flipped byte, a short file, a missing one: the job names it as repaired; a sound model costs no byte."""
    repository, files = (
        f"verify/{damage.__name__}-{name[:5]}",
        model(SEGMENT, seed=33) | {"tokenizer.json": b'{"b": 2}'},
    )
    stub.add(repository, files)
    path = Path(succeeded(pulls, repository)["local_path"])
    sound = pulls.client.post(f"/models/{repository}/verify")
    assert sound.status_code == 202
    assert pulls.finished(sound.json()["id"])["repaired"] == []
    before = served(stub, repository)
    damage(path / name, 3)
    job = pulls.finished(pulls.client.post(f"/models/{repository}/verify").json()["id"])
    right(pulls, job, files)
    assert job["repaired"] == [name]
    assert served(stub, repository) == {**before, name: 2 * before[name]}


# -- room ---------------------------------------------------------------------


def test_room_is_made_only_when_it_is_asked_for(stub: HubStub, tmp_path: Path) -> None:
    """DISK_QUOTA for two models: the third is a 507; with `make_room` the one that was not used for longest goes."""
    for number in range(4):
        stub.add(f"room/m{number}", model(MEBIBYTE, seed=40 + number))
    stub.add("room/huge", model(4 * MEBIBYTE, seed=44))
    with make_server(stub, tmp_path, DISK_QUOTA=str(5 * MEBIBYTE // 2)) as server:
        for number in range(2):
            succeeded(server, f"room/m{number}")
        assert server.client.post("/models/room/m0/pin", json={}).json()["pinned"] is True
        refusal = server.client.post("/pull", json={"model": "room/m2"})
        assert (refusal.status_code, "make_room" in refusal.json()["error"]) == (507, True)
        assert server.client.post("/pull", json={"model": "room/huge", "make_room": True}).status_code == 507
        assert names(server) == {"room/m0", "room/m1"}, "models were deleted for what cannot fit all the same"
        succeeded(server, "room/m2", make_room=True)
        assert names(server) == {"room/m0", "room/m2"}
        assert server.client.post("/models/room/m0/pin", json={"pinned": False}).json()["pinned"] is False
        succeeded(server, "room/m3", make_room=True, pin=True)
        assert names(server) == {"room/m2", "room/m3"}
        assert server.client.get("/models/room/m3").json()["pinned"] is True


def test_what_is_here_is_verified_on_a_full_disk(stub: HubStub, tmp_path: Path) -> None:
    """A disk below its reserve refuses what is new, and nothing that needs no room."""
    stub.add("room/here", model())
    stub.add("room/new", model(seed=1))
    with make_server(stub, tmp_path) as server:
        succeeded(server, "room/here")
    with make_server(stub, tmp_path, DISK_RESERVE=str(2**60)) as server:
        assert server.client.post("/pull", json={"model": "room/new"}).status_code == 507
        succeeded(server, "room/here")
        job = server.finished(server.client.post("/models/room/here/verify").json()["id"])
        assert job["status"] == "succeeded", job


def names(server: Server) -> set[str]:
    """The models on disk."""
    return {entry["name"] for entry in server.client.get("/models").json()["models"]}


def test_the_bandwidth_is_shared_and_never_exceeded(stub: HubStub, tmp_path: Path) -> None:
    """Two pulls at once under PULL_BANDWIDTH: all their bytes take at least as long as the limit says."""
    limit, files = 2 * MEBIBYTE, [model(5 * MEBIBYTE // 2, seed=seed) for seed in (45, 46)]
    for number in range(2):
        stub.add(f"room/slow{number}", files[number])
    with make_server(stub, tmp_path, PULL_BANDWIDTH=str(limit)) as server:
        ids = [accepted(server, f"room/slow{number}") for number in range(2)]
        assert stub.wait(lambda: served(stub, "room/slow0") or served(stub, "room/slow1"))
        began = time.monotonic()
        for number, job_id in enumerate(ids):
            right(server, server.finished(job_id), files[number])
        assert time.monotonic() - began >= 5 * MEBIBYTE / limit * 0.8


# -- what is left, and what is secret -----------------------------------------


def test_partials_are_listed_and_cleaned(stub: HubStub, tmp_path: Path) -> None:
    """What a cancelled job has left is an orphan; what an open one needs stays, also under a name of the catalogue."""
    catalogue = tmp_path / "models.toml"
    catalogue.write_text('[models."shop:1b"]\nrepo = "left/Catalogue"\n')
    for name in ("left/orphan", "left/Catalogue"):
        stub.add(name, model(3 * SEGMENT, seed=50))
        stub.fault("stall", f"/{name}/resolve/*.safetensors", skip=1, times=FOREVER)
    with make_server(stub, tmp_path, MODELS_FILE=str(catalogue)) as server:
        gone = accepted(server, "left/orphan")
        stalled(stub, 3)
        wait_until(lambda: server.client.get("/partials").json()["bytes"] >= SEGMENT, what="a segment on the disk")
        server.client.delete(f"/jobs/{gone}")
        stays = accepted(server, "shop:1b")
        stalled(stub, 3)
        rows = server.client.get("/partials").json()["partials"]
        assert {row["repo"]: row["job_id"] for row in rows} == {"left/orphan": None, "left/Catalogue": stays}
        assert sum(row["bytes"] for row in rows if row["repo"] == "left/orphan") >= SEGMENT
        left = [row for row in server.client.get("/partials").json()["partials"] if row["repo"] == "left/orphan"]
        assert server.client.delete("/partials").json() == {
            "removed": len(left),  # the segments of the weights, and the whole files that no snapshot has
            "bytes": sum(row["bytes"] for row in left),
        }
        stub.clear_faults()
        stub.release()
        right(server, server.finished(stays), model(3 * SEGMENT, seed=50))
        assert server.client.get("/partials").json() == {"partials": [], "bytes": 0}


def test_the_token_is_nowhere_but_at_the_hub(stub: HubStub, tmp_path: Path) -> None:
    """Not in a child's environment or command line, not in the log, the jobs, the models or the state."""
    stub.add("secret/model", model(), private_token=TOKEN)
    with make_server(stub, tmp_path, HF_TOKEN=TOKEN, LOG_LEVEL="DEBUG") as server:
        stub.fault("stall", "/secret/model/resolve/*.safetensors")
        stub.fault("status", "/secret/model/resolve/*.safetensors", status=500)
        job_id = accepted(server, "secret/model")
        stalled(stub)
        (worker,) = workers(server)
        seen = json.dumps([worker.environ(), worker.cmdline()])
        stub.release()
        job = server.finished(job_id)
        assert job["status"] == "succeeded", job
        stub.fault("status", "/api/models/secret/model*", status=403, times=FOREVER)
        seen += json.dumps([failed(server, "secret/model"), job, server.client.get("/models").json()])
        seen += json.dumps(server.client.get("/diag").json())
    stub.clear_faults()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert TOKEN not in seen
    assert TOKEN.encode() not in written
