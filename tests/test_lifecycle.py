"""Loading, the LRU, the cooldown, deaths and cleanup, with engines that fail on command in real processes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from harness import Json, Server, text_of, wait_until
from hubstub import HubStub


def events(server: Server) -> list[str]:
    """What happened inside the fake engines so far."""
    path = server.folder / "state" / "events.txt"
    return path.read_text().splitlines() if path.exists() else []


def loaded(server: Server) -> list[str]:
    """The models in memory, by name."""
    models: list[Json] = server.client.get("/models").json()["models"]
    return [model["name"] for model in models if model["loaded"]]


def engine_pids(server: Server) -> list[int]:
    """The processes of the server's engines."""
    return [child.pid for child in server.children()]


def test_the_first_request_loads_and_the_second_does_not(fake_server: Server) -> None:
    """One load for two requests; load_duration shows which one paid."""
    fake_server.have("fake/a")
    assert fake_server.answer("fake/a", "count 3") == "0 1 2 "
    assert fake_server.answer("fake/a", "count 2") == "0 1 "
    assert [event for event in events(fake_server) if event.startswith("load")] == ["load fake/a transformers"]
    assert "Loading fake/a with transformers" in fake_server.log()
    assert "✓ Model loaded: fake/a (backend=transformers" in fake_server.log()


def test_a_hundred_first_requests_cause_one_load(fake_server: Server) -> None:
    """Single flight: all wait for the same load and all are answered."""
    fake_server.have("fake/slow")
    with ThreadPoolExecutor(100) as threads:
        answers = [threads.submit(fake_server.answer, "fake/slow", "count 1") for _ in range(100)]
        wait_until(lambda: "load fake/slow transformers" in events(fake_server))
        (fake_server.folder / "state" / "go").touch()
        assert [answer.result() for answer in answers] == ["0 "] * 100
    assert events(fake_server).count("load fake/slow transformers") == 1


def test_a_hundred_requests_share_one_failed_load(fake_server: Server) -> None:
    """When the load fails, all hear the same refusal, and later ones the cooldown."""
    fake_server.have("fake/fails")
    with ThreadPoolExecutor(20) as threads:
        replies = list(threads.map(lambda _: fake_server.chat("fake/fails"), range(100)))
    assert {reply.status_code for reply in replies} == {500, 503}
    assert events(fake_server).count("load fake/fails transformers") == 1


def test_a_failed_load_lists_every_rung_and_starts_a_cooldown(fake_server: Server) -> None:
    """500 with each rung's reason, then 503 with Retry-After; pulling again ends the cooldown."""
    fake_server.have("fake/fails")
    failure = fake_server.chat("fake/fails")
    assert failure.status_code == 500
    error = failure.json()["error"]
    assert error.startswith("No inference backend available: ")
    assert all(rung in error for rung in ("vllm: ", "transformers: ", "pipeline: ", "on purpose"))
    second = fake_server.chat("fake/fails")
    assert second.status_code == 503
    assert "in cooldown" in second.json()["error"]
    assert 290 <= int(second.headers["retry-after"]) <= 300
    ladder = fake_server.client.get("/models/fake/fails").json()["ladder"]
    assert [rung["backend"] for rung in ladder] == ["vllm", "transformers", "pipeline"]
    assert {rung["outcome"] for rung in ladder} == {"refused"}
    fake_server.pull("fake/fails")
    assert fake_server.chat("fake/fails").status_code == 500
    assert "Loading fake/fails failed" in fake_server.log()


def test_the_cooldown_ends_by_itself(hub: HubStub, hub_cache: Path, tmp_path: Path) -> None:
    """After MODEL_LOAD_COOLDOWN the model is tried again."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub_cache), "MODEL_LOAD_COOLDOWN": "0.2"}
    with Server(tmp_path, fake=True, **settings) as server:
        server.have("fake/fails")
        assert server.chat("fake/fails").status_code == 500
        wait_until(lambda: server.chat("fake/fails").status_code == 500)
        assert events(server).count("load fake/fails transformers") == 2


@pytest.mark.parametrize(("model", "kind"), [("fake/memory", "out_of_memory"), ("fake/dies", "start_failed")])
def test_the_ladder_keeps_the_cause_of_a_refusal(fake_server: Server, model: str, kind: str) -> None:
    """Out of memory and a process that ends while loading are told apart, and no process is left."""
    fake_server.have(model)
    assert fake_server.chat(model).status_code == 500
    ladder = fake_server.client.get(f"/models/{model}").json()["ladder"]
    assert {rung["backend"]: rung["kind"] for rung in ladder}["transformers"] == kind
    assert engine_pids(fake_server) == []


def test_a_load_that_never_ends_is_ended_for_all_who_wait(hub: HubStub, hub_cache: Path, tmp_path: Path) -> None:
    """After LOAD_TIMEOUT the process is gone and the reply says so."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub_cache), "LOAD_TIMEOUT": "1500ms"}
    with Server(tmp_path, fake=True, **settings) as server:
        server.have("fake/hangs")
        with ThreadPoolExecutor(2) as threads:
            replies = list(threads.map(lambda _: server.chat("fake/hangs"), range(2)))
        assert {reply.status_code for reply in replies} == {500}
        assert "LOAD_TIMEOUT" in replies[0].json()["error"]
        assert engine_pids(server) == []


def test_the_least_recently_used_idle_model_is_evicted(fake_server: Server) -> None:
    """With two places a third model pushes out the one used longest ago, and its process is gone with its memory."""
    for name in ("fake/a", "fake/b", "fake/c"):
        fake_server.have(name)
    fake_server.answer("fake/a", "count 1")
    fake_server.answer("fake/b", "count 1")
    fake_server.answer("fake/a", "count 1")
    pid_of_b = fake_server.client.get("/models/fake/b").json()["pid"]
    fake_server.answer("fake/c", "count 1")
    assert loaded(fake_server) == ["fake/a", "fake/c"]
    assert not psutil.pid_exists(pid_of_b)
    reclaim = fake_server.client.get("/models/fake/b").json()["last_reclaim"]
    assert reclaim["held_bytes"] > 10 * 1024 * 1024
    assert reclaim["leaked_bytes"] == 0


def test_an_eviction_is_logged(hub: HubStub, hub_cache: Path, tmp_path: Path) -> None:
    """With the words of the coder guidelines, which scripts may rely on."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub_cache), "MAX_CACHE_MODELS": "1"}
    with Server(tmp_path, fake=True, **settings) as server:
        for name in ("fake/a", "fake/b"):
            server.have(name)
            server.answer(name, "count 1")
        assert "Evicted fake/a from cache (LRU)" in server.log()


def test_eviction_never_touches_a_model_in_use(fake_server: Server) -> None:
    """Two streams hold both places: the third model waits, both streams stay whole, then it is served."""
    for name in ("fake/a", "fake/b", "fake/c"):
        fake_server.have(name)
    with ThreadPoolExecutor(3) as threads:
        streams = [threads.submit(fake_server.stream, name, "slow 150") for name in ("fake/a", "fake/b")]
        wait_until(lambda: events(fake_server).count("start slow") == 2)
        third = threads.submit(fake_server.answer, "fake/c", "count 1")
        for stream in streams:
            lines = stream.result()
            assert text_of(lines) == "".join(f"{word} " for word in range(150))
            assert lines[-1]["done"] is True
        assert third.result() == "0 "
    finished = [event for event in events(fake_server) if event == "end slow 150"]
    assert len(finished) == 2


def test_a_place_that_never_comes_free_is_an_honest_503(hub: HubStub, hub_cache: Path, tmp_path: Path) -> None:
    """After QUEUE_TIMEOUT the waiting request hears 503 with Retry-After; nothing was evicted."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub_cache), "MAX_CACHE_MODELS": "1", "QUEUE_TIMEOUT": "300ms"}
    with Server(tmp_path, fake=True, **settings) as server:
        server.have("fake/a")
        server.have("fake/b")
        with server.streaming("fake/a", "hang 1") as lines:
            next(lines)
            refused = server.chat("fake/b")
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert loaded(server) == ["fake/a"]
        wait_until(lambda: server.chat("fake/b", "count 1").status_code == 200)


def test_unload_and_delete_refuse_while_a_stream_is_open(fake_server: Server) -> None:
    """409 while somebody listens; afterwards both work and the process is gone."""
    fake_server.have("fake/a")
    with fake_server.streaming("fake/a", "hang 1") as lines:
        next(lines)
        assert fake_server.client.post("/models/fake/a/unload").status_code == 409
        assert fake_server.client.delete("/models/fake/a").status_code == 409
        assert fake_server.client.get("/models/fake/a").json()["pins"] == 1
    wait_until(lambda: fake_server.client.post("/models/fake/a/unload").status_code == 200)
    assert engine_pids(fake_server) == []
    assert fake_server.client.delete("/models/fake/a").status_code == 200
    assert fake_server.client.get("/models/fake/a").status_code == 404


def test_load_and_unload_on_request(fake_server: Server) -> None:
    """POST .../load and .../unload; unloading what is not loaded is fine."""
    fake_server.have("fake/a")
    assert fake_server.client.post("/models/fake/a/unload").json()["loaded"] is False
    assert fake_server.client.post("/models/fake/a/load").json()["state"] == "ready"
    assert fake_server.client.post("/models/fake/a/unload").json()["state"] == "local"
    assert fake_server.client.post("/models/fake/nothing/load").status_code == 404


def test_keep_alive_zero_unloads_after_the_reply_and_negative_never(fake_server: Server) -> None:
    """The last request's keep_alive counts."""
    fake_server.have("fake/a")
    fake_server.answer("fake/a", "count 1", keep_alive=-1)
    assert fake_server.client.get("/models/fake/a").json()["expires_at"] is None
    fake_server.answer("fake/a", "count 1", keep_alive="10m")
    assert fake_server.client.get("/models/fake/a").json()["expires_at"] is not None
    fake_server.answer("fake/a", "count 1", keep_alive=0)
    wait_until(lambda: loaded(fake_server) == [])


def test_a_client_that_leaves_stops_the_engine(fake_server: Server) -> None:
    """The engine ends within 200 ms of the disconnect: a step here is 10 ms, so at most some 20 words more."""
    fake_server.have("fake/a")
    with fake_server.streaming("fake/a", "slow 500") as lines:
        seen = [next(lines) for _ in range(5)]
    ended = wait_until(lambda: [event for event in events(fake_server) if event.startswith("end slow")])
    assert int(ended[0].split()[-1]) <= len(seen) + 25
    wait_until(lambda: fake_server.client.get("/models/fake/a").json()["pins"] == 0)


def test_a_client_that_leaves_a_whole_reply_stops_the_engine_too(fake_server: Server) -> None:
    """Nobody reads the reply, so nobody computes it."""
    fake_server.have("fake/a")
    fake_server.answer("fake/a", "count 1")
    with pytest.raises(Exception, match="timed out"):
        fake_server.client.post("/chat", timeout=0.3, json={"model": "fake/a", "prompt": "slow 500", "stream": False})
    ended = wait_until(lambda: [event for event in events(fake_server) if event.startswith("end slow")])
    assert int(ended[0].split()[-1]) < 100


def test_a_client_that_leaves_during_a_load_is_forgotten_and_the_load_goes_on(fake_server: Server) -> None:
    """The load serves the next one; the request that left is never started."""
    fake_server.have("fake/slow")
    with pytest.raises(Exception, match="timed out"):
        fake_server.client.post("/chat", timeout=0.5, json={"model": "fake/slow", "prompt": "count 7", "stream": False})
    (fake_server.folder / "state" / "go").touch()
    assert fake_server.answer("fake/slow", "count 1") == "0 "
    assert "start count" in events(fake_server)
    assert "end count 7" not in events(fake_server)
    assert events(fake_server).count("load fake/slow transformers") == 1


def test_an_engine_that_dies_ends_the_stream_with_an_error_and_is_loaded_again(fake_server: Server) -> None:
    """The words before, then one error line, no done; the next request is answered by a new process."""
    fake_server.have("fake/a")
    lines = fake_server.stream("fake/a", "crash 3")
    assert "".join(line["message"]["content"] for line in lines[:-1]) == "0 1 2 "
    assert "died" in lines[-1]["error"]
    assert not any(line.get("done") for line in lines)
    assert fake_server.answer("fake/a", "count 1") == "0 "


def test_an_engine_killed_in_mid_stream_is_noticed_within_a_second(fake_server: Server) -> None:
    """`kill -9` on the engine: the client's error line comes at once."""
    fake_server.have("fake/a")
    with fake_server.streaming("fake/a", "hang 1") as lines:
        next(lines)
        psutil.Process(fake_server.client.get("/models/fake/a").json()["pid"]).kill()
        killed = time.monotonic()
        assert "SIGKILL" in next(lines)["error"]
        assert time.monotonic() - killed < 1  # a promise of the design, not a matter of speed
    assert fake_server.answer("fake/a", "count 1") == "0 "


def test_an_engine_killed_while_idle_is_replaced_without_an_error(fake_server: Server) -> None:
    """Nobody was waiting, so nobody hears of it."""
    fake_server.have("fake/a")
    fake_server.answer("fake/a", "count 1")
    psutil.Process(fake_server.client.get("/models/fake/a").json()["pid"]).kill()
    wait_until(lambda: loaded(fake_server) == [])
    assert fake_server.answer("fake/a", "count 1") == "0 "


def test_three_deaths_in_five_minutes_refuse_that_model_only(fake_server: Server) -> None:
    """503 with Retry-After for the model that keeps dying; others are served; pulling again ends it."""
    fake_server.have("fake/a")
    fake_server.have("fake/b")
    for _ in range(3):
        assert "died" in fake_server.stream("fake/a", "crash 1")[-1]["error"]
    refused = fake_server.chat("fake/a", "count 1")
    assert refused.status_code == 503
    assert "died 3 times" in refused.json()["error"]
    assert int(refused.headers["retry-after"]) >= 1
    assert fake_server.answer("fake/b", "count 1") == "0 "
    fake_server.pull("fake/a")
    assert fake_server.answer("fake/a", "count 1") == "0 "


def test_an_exception_in_the_engine_costs_one_request_and_leaks_nothing(fake_server: Server) -> None:
    """The reply has a fixed text, the log the traceback; the same process answers the next request."""
    fake_server.have("fake/a")
    fake_server.answer("fake/a", "count 1")
    pid = fake_server.client.get("/models/fake/a").json()["pid"]
    failed = fake_server.stream("fake/a", "raise 1")[-1]["error"]
    assert "/secret/path" not in failed
    assert "/secret/path" in fake_server.log()
    assert fake_server.answer("fake/a", "count 1") == "0 "
    assert fake_server.client.get("/models/fake/a").json()["pid"] == pid


def test_an_engine_that_ends_without_done_is_an_error_not_a_wait(fake_server: Server) -> None:
    """Every stream has one end: the words, then an error line; the same process answers the next request."""
    fake_server.have("fake/a")
    lines = fake_server.stream("fake/a", "silent 2")
    assert text_of(lines[:-1]) == "0 1 "
    assert "without an answer" in lines[-1]["error"]
    assert fake_server.chat("fake/a", "silent 2").status_code == 500
    assert fake_server.answer("fake/a", "count 1") == "0 "


def test_a_model_pulled_again_with_another_preference_is_loaded_anew(fake_server: Server) -> None:
    """The open stream goes on with the old engine; the next request gets the new quantization."""
    fake_server.have("fake/a")
    with fake_server.streaming("fake/a", "hang 1") as lines:
        next(lines)
        old = fake_server.client.get("/models/fake/a").json()["pid"]
        fake_server.pull("fake/a", quantize="4bit")
        assert fake_server.client.get("/models/fake/a").json()["pid"] == old
    wait_until(lambda: not psutil.pid_exists(old))
    assert fake_server.chat("fake/a", "count 1").headers["x-quantization"] == "4bit-nf4"
    fake_server.pull("fake/a", quantize="4bit")
    assert loaded(fake_server) == ["fake/a"], "an equal pull leaves the engine where it is"
    assert fake_server.client.get("/models/fake/a").json()["ladder"][-1]["outcome"] == "loaded"


def test_a_model_pulled_again_during_its_load_is_served_as_pulled_last(fake_server: Server) -> None:
    """The load that was under way is replaced, and what is stored is the newer pull, also after `kill -9`."""
    fake_server.have("fake/slow")
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(fake_server.chat, "fake/slow", "count 1")
        wait_until(lambda: "load fake/slow transformers" in events(fake_server))
        fake_server.pull("fake/slow", quantize="4bit")
        (fake_server.folder / "state" / "go").touch()
        assert reply.result().headers["x-quantization"] == "4bit-nf4"
    fake_server.kill()
    fake_server.start()
    assert fake_server.client.get("/models/fake/slow").json()["preferred_quantized"] is True


def test_a_full_queue_is_refused_at_once(hub: HubStub, hub_cache: Path, tmp_path: Path) -> None:
    """MAX_QUEUE requests are inside: the next one hears 503 with Retry-After."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub_cache), "MAX_QUEUE": "2"}
    with Server(tmp_path, fake=True, **settings) as server:
        server.have("fake/a")
        with server.streaming("fake/a", "hang 1") as one, server.streaming("fake/a", "hang 1") as two:
            next(one), next(two)
            refused = server.chat("fake/a", "count 1")
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert "server busy" in refused.json()["error"]
        wait_until(lambda: server.chat("fake/a", "count 1").status_code == 200)


def test_sigterm_lets_streams_finish_and_leaves_no_process(fake_server: Server) -> None:
    """A stream that is open at SIGTERM arrives whole; then the server ends with 0 and its engines are gone."""
    fake_server.have("fake/a")
    with fake_server.streaming("fake/a", "slow 60") as lines:
        seen = [next(lines)]
        pids = engine_pids(fake_server)
        fake_server.process.terminate()
        seen += list(lines)
    assert text_of(seen) == "".join(f"{word} " for word in range(60))
    assert fake_server.process.wait(timeout=20) == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_loads_of_two_models_are_one_at_a_time(fake_server: Server) -> None:
    """The second load starts when the first is through."""
    fake_server.have("fake/slow")
    fake_server.have("fake/a")
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(fake_server.answer, "fake/slow", "count 1")
        wait_until(lambda: "load fake/slow transformers" in events(fake_server))
        other = threads.submit(fake_server.answer, "fake/a", "count 1")
        wait_until(lambda: fake_server.client.get("/models/fake/a").json()["state"] == "loading")
        assert "load fake/a transformers" not in events(fake_server)
        (fake_server.folder / "state" / "go").touch()
        assert (slow.result(), other.result()) == ("0 ", "0 ")


def test_many_clients_on_more_models_than_places_are_all_served(fake_server: Server) -> None:
    """Three models, two places, 30 clients: nobody fails and nobody starves."""
    names = ("fake/a", "fake/b", "fake/c")
    for name in names:
        fake_server.have(name)
    barrier = threading.Barrier(30)

    def client(number: int) -> int:
        barrier.wait()
        return sum(fake_server.answer(names[(number + turn) % 3], "count 2") == "0 1 " for turn in range(3))

    with ThreadPoolExecutor(30) as threads:
        assert sum(threads.map(client, range(30))) == 90
    assert len(loaded(fake_server)) <= 2
