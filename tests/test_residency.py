"""What stays in memory: sleep, waking, standbys, memory that runs out, and the arithmetic behind it."""

import asyncio
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest
from harness import Json, Server, wait_until
from hubstub import HubStub
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import app

FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NO_ROOM = str(2**60)
Start = Callable[..., Server]


@pytest.fixture
def start(hub: HubStub, hub_cache: Path, tmp_path: Path) -> Iterator[Start]:
    """A function that starts a server of fake engines with one place for models, and these settings."""
    with ExitStack() as servers:

        def begin(**chosen: str) -> Server:
            basis = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub_cache), "MAX_CACHE_MODELS": "1"}
            # What the machine has beside is not this test's matter; 2 ** 60 in one of them is.
            basis |= {"HOST_MEMORY_RESERVE": "0"} | chosen
            return servers.enter_context(Server(tmp_path, fake=True, **basis))

        yield begin


def events(server: Server) -> list[str]:
    """What happened inside the fake engines so far."""
    path = server.folder / "state" / "events.txt"
    return path.read_text().splitlines() if path.exists() else []


def shown(server: Server, model: str) -> Json:
    """A model as `GET /models/{name}` shows it."""
    model_shown: Json = server.client.get(f"/models/{model}").json()
    return model_shown


def states(server: Server) -> dict[str, str]:
    """The states of all models, from the list."""
    return {model["name"]: model["state"] for model in server.client.get("/models").json()["models"]}


def use(server: Server, *models: str) -> list[int]:
    """Ask these models, one after the other; the processes that answered."""
    pids = []
    for model in models:
        server.have(model)
        assert server.answer(model, "count 1") == "0 "
        pids.append(shown(server, model)["pid"])
    return pids


# -- sleep --------------------------------------------------------------------


def test_the_model_that_makes_room_sleeps_and_wakes(start: Start) -> None:
    """One place, two models that take turns: each keeps its process, loads once, and wakes when it is asked."""
    server = start()
    first, second = use(server, "fake/sleepy1", "fake/sleepy2")
    assert states(server) == {"fake/sleepy1": "asleep", "fake/sleepy2": "ready"}
    assert shown(server, "fake/sleepy1")["loaded"] is True
    assert use(server, "fake/sleepy1", "fake/sleepy2", "fake/sleepy1") == [first, second, first]
    assert states(server) == {"fake/sleepy1": "ready", "fake/sleepy2": "asleep"}
    assert [event for event in events(server) if event.startswith("load")] == [
        "load fake/sleepy1 transformers", "load fake/sleepy2 transformers",
    ]  # fmt: skip
    assert [event for event in events(server) if event.startswith("wake")] == [
        "wake fake/sleepy1", "wake fake/sleepy2", "wake fake/sleepy1",
    ]  # fmt: skip
    assert shown(server, "fake/sleepy2")["last_reclaim"]["held_bytes"] > 0
    assert "Woke fake/sleepy1 in" in server.log()
    assert "Put to sleep fake/sleepy2" in server.log()


def test_a_model_that_cannot_sleep_is_stopped(start: Start) -> None:
    """Its place is wanted, so its process goes."""
    server = start()
    (pid,) = use(server, "fake/a")
    use(server, "fake/sleepy1")
    assert states(server) == {"fake/a": "local", "fake/sleepy1": "ready"}
    assert not psutil.pid_exists(pid)


def test_one_that_fails_to_sleep_is_stopped(start: Start) -> None:
    """The next model is not kept waiting by it, and the log says why."""
    server = start()
    (pid,) = use(server, "fake/insomniac")
    use(server, "fake/a")
    assert states(server) == {"fake/a": "ready", "fake/insomniac": "local"}
    assert not psutil.pid_exists(pid)
    assert "fake/insomniac cannot sleep and is stopped: fake/insomniac did not sleep: wide awake" in server.log()


def test_the_older_sleeper_is_stopped(start: Start) -> None:
    """With room for one that sleeps, the one that slept before is stopped."""
    server = start(MAX_SLEEPING_MODELS="1")
    first, second, _ = use(server, "fake/sleepy1", "fake/sleepy2", "fake/sleepy3")
    assert states(server) == {"fake/sleepy1": "local", "fake/sleepy2": "asleep", "fake/sleepy3": "ready"}
    assert not psutil.pid_exists(first)
    assert psutil.pid_exists(second)


@pytest.mark.parametrize("setting", [{"MAX_SLEEPING_MODELS": "0"}, {"HOST_MEMORY_RESERVE": NO_ROOM}])
def test_where_nobody_may_sleep_models_are_stopped(start: Start, setting: dict[str, str]) -> None:
    """No sleepers allowed, or no host memory to spare for them."""
    server = start(**setting)
    (first,) = use(server, "fake/sleepy1")
    use(server, "fake/sleepy2")
    assert states(server) == {"fake/sleepy1": "local", "fake/sleepy2": "ready"}
    assert not psutil.pid_exists(first)
    assert not any(event.startswith("sleep") for event in events(server))


def test_the_end_of_keep_alive_is_sleep(start: Start) -> None:
    """Nobody asks: the device is given back, the process stays, and the next request wakes it."""
    server = start()
    server.have("fake/sleepy1")
    assert server.answer("fake/sleepy1", "count 1", keep_alive=0) == "0 "
    wait_until(lambda: states(server)["fake/sleepy1"] == "asleep")
    pid = shown(server, "fake/sleepy1")["pid"]
    assert use(server, "fake/sleepy1") == [pid]
    assert events(server).count("load fake/sleepy1 transformers") == 1


def test_sleep_on_request(start: Start) -> None:
    """Asleep, still asleep when asked twice, awake by a load; one that cannot is stopped; absent and unknown ones."""
    server = start()
    (pid,) = use(server, "fake/sleepy1")
    for _ in range(2):
        reply = server.client.post("/models/fake/sleepy1/sleep")
        assert (reply.status_code, reply.json()["state"], reply.json()["pid"]) == (200, "asleep", pid)
    assert events(server).count("sleep fake/sleepy1") == 1
    assert server.client.post("/models/fake/sleepy1/load").json()["state"] == "ready"
    assert "wake fake/sleepy1" in events(server)
    use(server, "fake/a")
    assert server.client.post("/models/fake/a/sleep").json()["state"] == "local"
    assert server.client.post("/models/fake/a/sleep").status_code == 200
    assert server.client.post("/models/fake/nothing/sleep").status_code == 404


def test_a_model_in_use_does_not_sleep(start: Start) -> None:
    """409, as for unload; afterwards it can."""
    server = start()
    server.have("fake/sleepy1")
    with server.streaming("fake/sleepy1", "hang 1") as lines:
        next(lines)
        assert server.client.post("/models/fake/sleepy1/sleep").status_code == 409
    wait_until(lambda: server.client.post("/models/fake/sleepy1/sleep").status_code == 200)


def test_unload_ends_a_sleeper(start: Start) -> None:
    """Unload means out of memory, host memory too."""
    server = start()
    (pid,) = use(server, "fake/sleepy1")
    server.client.post("/models/fake/sleepy1/sleep")
    assert server.client.post("/models/fake/sleepy1/unload").json()["state"] == "local"
    assert not psutil.pid_exists(pid)
    assert use(server, "fake/sleepy1") != [pid]


def test_a_sleeping_model_can_be_deleted(start: Start) -> None:
    """Its process goes with its files."""
    server = start()
    (pid,) = use(server, "fake/sleepy1")
    server.client.post("/models/fake/sleepy1/sleep")
    assert server.client.delete("/models/fake/sleepy1").status_code == 200
    assert server.client.get("/models/fake/sleepy1").status_code == 404
    assert not psutil.pid_exists(pid)


def test_a_sleeping_model_that_dies_is_forgotten(start: Start) -> None:
    """Nobody was waiting: the next request loads it anew and hears nothing of it."""
    server = start()
    (pid,) = use(server, "fake/sleepy1")
    server.client.post("/models/fake/sleepy1/sleep")
    psutil.Process(pid).kill()
    wait_until(lambda: states(server)["fake/sleepy1"] == "local")
    assert use(server, "fake/sleepy1") != [pid]


def test_a_model_that_does_not_wake_is_loaded_anew(start: Start) -> None:
    """The one who wakes it hears why, its process is gone, and the next request is served."""
    server = start()
    (pid,) = use(server, "fake/grumpy")
    server.client.post("/models/fake/grumpy/sleep")
    failed = server.chat("fake/grumpy", "count 1")
    assert failed.status_code == 500
    assert failed.json()["error"] == "fake/grumpy did not wake: does not want to"
    assert not psutil.pid_exists(pid)
    assert states(server) == {"fake/grumpy": "local"}
    assert use(server, "fake/grumpy") != [pid]
    assert events(server).count("load fake/grumpy transformers") == 2


def test_a_hundred_requests_wake_a_model_once(start: Start) -> None:
    """Single flight, as for a load."""
    server = start()
    use(server, "fake/sleepy1")
    server.client.post("/models/fake/sleepy1/sleep")
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda _: server.answer("fake/sleepy1", "count 1"), range(100)))
    assert answers == ["0 "] * 100
    assert events(server).count("wake fake/sleepy1") == 1


def test_a_request_while_the_model_falls_asleep_waits_and_wakes_it(start: Start) -> None:
    """The engine is never asked between the order to sleep and the order to wake."""
    server = start()
    server.have("fake/sleepy-slow")
    server.client.post("/models/fake/sleepy-slow/load")
    with ThreadPoolExecutor(2) as threads:
        sleeping = threads.submit(server.client.post, "/models/fake/sleepy-slow/sleep")
        wait_until(lambda: "sleep fake/sleepy-slow" in events(server))
        answer = threads.submit(server.answer, "fake/sleepy-slow", "count 1")
        wait_until(lambda: answer.done() or states(server)["fake/sleepy-slow"] == "loading")
        (server.folder / "state" / "go").touch()
        assert sleeping.result().status_code == 200
        assert answer.result() == "0 "
    told = [event for event in events(server) if event.startswith(("asleep", "wake", "start"))]
    assert told == ["asleep fake/sleepy-slow", "wake fake/sleepy-slow", "start count"]


def test_pulling_a_sleeping_model_again_ends_it(start: Start) -> None:
    """With other grants or files its engine is of no use, asleep or not."""
    server = start()
    use(server, "fake/sleepy1")
    server.client.post("/models/fake/sleepy1/sleep")
    server.pull("fake/sleepy1", quantize="none")
    wait_until(lambda: states(server)["fake/sleepy1"] == "local", 5)


def test_a_sleeping_model_that_was_pulled_again_is_loaded_anew(start: Start) -> None:
    """Never an answer by the old engine."""
    server = start()
    (pid,) = use(server, "fake/sleepy1")
    server.client.post("/models/fake/sleepy1/sleep")
    server.pull("fake/sleepy1", quantize="none")
    assert use(server, "fake/sleepy1") != [pid]
    assert events(server).count("load fake/sleepy1 transformers") == 2


def test_a_stop_ends_sleepers(start: Start) -> None:
    """SIGTERM leaves no process, asleep or not."""
    server = start()
    pids = use(server, "fake/sleepy1", "fake/sleepy2")
    assert server.stop() == 0
    assert not any(psutil.pid_exists(pid) for pid in pids)


# -- standbys -----------------------------------------------------------------


def standbys(server: Server) -> Json:
    """What `GET /diag` says of them."""
    waiting: Json = server.client.get("/diag").json()["standbys"]
    return waiting


def test_a_standby_is_used_and_followed_by_another(start: Start) -> None:
    """Imported before it is needed: the load takes that very process, and a new one waits soon after."""
    server = start(STANDBY_ENGINES="transformers")
    wait_until(lambda: standbys(server) == {"transformers": "ready"})
    assert events(server) == ["prepare"]
    (standby,) = server.children()
    assert use(server, "fake/a") == [standby.pid]
    wait_until(lambda: standbys(server) == {"transformers": "ready"})
    (follower,) = {child.pid for child in server.children()} - {standby.pid}
    assert use(server, "fake/b") == [follower]
    assert events(server).count("load fake/b transformers") == 1


def test_a_standby_that_is_killed_does_not_hinder_a_load(start: Start) -> None:
    """A new process takes its place, and nobody hears of it."""
    server = start(STANDBY_ENGINES="transformers")
    wait_until(lambda: standbys(server) == {"transformers": "ready"})
    (standby,) = server.children()
    standby.kill()
    (pid,) = use(server, "fake/a")
    assert pid != standby.pid
    wait_until(lambda: standbys(server) == {"transformers": "ready"})


@pytest.mark.parametrize("engines", ["", "vllm", "nonsense"])
def test_no_standby(start: Start, engines: str) -> None:
    """None wanted, or of an engine that is not here: loads go as ever."""
    server = start(STANDBY_ENGINES=engines)
    use(server, "fake/a")
    assert standbys(server) == {}
    assert "prepare" not in events(server)


def test_no_standby_without_memory_to_spare(start: Start) -> None:
    """A process that only waits is the last one to get memory."""
    server = start(STANDBY_ENGINES="transformers", HOST_MEMORY_RESERVE=NO_ROOM)
    use(server, "fake/a")
    assert standbys(server) == {}
    assert "prepare" not in events(server)


def test_automatic_standbys_follow_the_models(start: Start) -> None:
    """`auto` waits for the first engine of a model that is on disk and not in memory."""
    server = start(STANDBY_ENGINES="auto")
    assert standbys(server) == {}
    server.have("fake/a")
    wait_until(lambda: standbys(server) == {"transformers": "ready"})
    assert server.stop() == 0


def test_an_interpreter_that_does_not_start_is_a_refusal(start: Start, tmp_path: Path) -> None:
    """ENGINE_PYTHON_VLLM names a file that is no program: the ladder says so and goes on."""
    (tmp_path / "python").touch()
    server = start(ENGINE_PYTHON_VLLM=str(tmp_path / "python"))
    use(server, "fake/a")
    assert [rung["backend"] for rung in shown(server, "fake/a")["ladder"]] == ["vllm", "transformers"]


def test_a_standby_that_does_not_start_is_no_end_of_standbys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever hindered one, others are still made."""

    async def scenario() -> bool:
        tried = asyncio.Event()

        async def spawn(*_: object) -> app.ChildProcess:
            tried.set()
            raise app.StartFailed("not executable")

        monkeypatch.setattr(app.ChildProcess, "spawn", spawn)
        keeping = asyncio.create_task(app.keep_standbys())
        await asyncio.wait_for(tried.wait(), 10)
        ended, _ = await asyncio.wait([keeping], timeout=0.1)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
        return bool(ended)

    monkeypatch.setattr(app, "HOST_MEMORY_RESERVE", 0)
    monkeypatch.setattr(app, "STANDBY_ENGINES", ("vllm",))
    monkeypatch.setattr(app, "engine_unavailable", lambda _: "")
    assert asyncio.run(scenario()) is False


def test_a_stop_ends_standbys(start: Start) -> None:
    """SIGTERM leaves no process that only waited."""
    server = start(STANDBY_ENGINES="transformers")
    wait_until(lambda: standbys(server) == {"transformers": "ready"})
    (standby,) = server.children()
    assert server.stop() == 0
    assert not psutil.pid_exists(standby.pid)


# -- memory that runs out -----------------------------------------------------


def test_idle_models_go_when_a_load_runs_out_of_memory(start: Start) -> None:
    """All that is idle, asleep or not, then one more try, and the model is served."""
    server = start(MAX_CACHE_MODELS="3")
    pids = use(server, "fake/sleepy1", "fake/a")
    server.client.post("/models/fake/sleepy1/sleep")
    use(server, "fake/forest")
    assert states(server) == {"fake/a": "local", "fake/forest": "ready", "fake/sleepy1": "local"}
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert events(server).count("load fake/forest transformers") == 2
    assert [rung["outcome"] for rung in shown(server, "fake/forest")["ladder"]] == ["refused", "loaded"]
    assert "fake/forest does not fit: all idle models go" in server.log()


def test_memory_that_models_in_use_hold_stays_theirs(start: Start) -> None:
    """Nothing is idle: the load fails with its cause, once, and the stream goes on."""
    server = start(MAX_CACHE_MODELS="3")
    server.have("fake/a")
    server.have("fake/forest")
    with server.streaming("fake/a", "hang 1") as lines:
        next(lines)
        pid = shown(server, "fake/a")["pid"]
        failed = server.chat("fake/forest", "count 1")
        assert failed.status_code == 500
        assert "not enough memory" in failed.json()["error"]
        assert (states(server)["fake/a"], shown(server, "fake/a")["pid"]) == ("ready", pid)
    ladder = {rung["backend"]: rung["kind"] for rung in shown(server, "fake/forest")["ladder"]}
    assert ladder["transformers"] == "out_of_memory"
    assert events(server).count("load fake/forest transformers") == 1
    assert "in cooldown" in server.chat("fake/forest", "count 1").json()["error"]


# -- the names of one engine --------------------------------------------------


def copied(server: Server, model: str) -> None:
    """Give a model the name `other` as well."""
    server.have(model)
    copy = server.client.post("/api/copy", json={"source": model, "destination": "other"})
    assert copy.status_code == 200, copy.text


def listed(server: Server) -> list[str]:
    """The names in the list of what is in memory."""
    return [model["name"] for model in server.client.get("/api/ps").json()["models"]]


def test_an_alias_is_loading_while_its_base_is(start: Start) -> None:
    """Both names show the one load under way, and then the one engine; the list of what is in memory has it once."""
    server = start()
    copied(server, "fake/slow")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.answer, "other", "count 1")
        wait_until(lambda: states(server) == {"fake/slow": "loading", "other": "loading"})
        assert listed(server) == ["fake/slow:latest"]
        (server.folder / "state" / "go").touch()
        assert answer.result() == "0 "
    assert states(server) == {"fake/slow": "ready", "other": "ready"}
    assert listed(server) == ["fake/slow:latest"]


def test_an_alias_waits_while_its_base_does(start: Start) -> None:
    """A load that failed is the failure of both names, and both say for how long."""
    server = start()
    copied(server, "fake/fails")
    assert server.chat("other", "count 1").status_code == 500
    assert shown(server, "fake/fails")["cooldown_seconds"] and shown(server, "other")["cooldown_seconds"]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the engines that were taken away: of a base, which has an adapter and an alias, and no others."""
    gone = list[str]()

    async def retire(engine: Any) -> None:
        gone.append(engine.spec.model)

    metas = (
        app.ModelMeta("lab/base", "x", "/base"), app.ModelMeta("lab/alias", "x", "/base", parent="lab/base"),
        app.ModelMeta("lab/lora", "x", "/lora", adapter_of="lab/base"),
        app.ModelMeta("lab/alone", "x", "/alone", adapter_of="lab/nowhere"),
    )  # fmt: skip
    monkeypatch.setattr(app, "model_meta", {meta.name: meta for meta in metas})
    monkeypatch.setattr(app, "model_cache", OrderedDict({"lab/base": engine("lab/base")}))
    monkeypatch.setattr(app, "retire_engine", retire)
    monkeypatch.setattr(app, "_expire_when_idle", lambda name: gone.append(name) if name in app.model_cache else None)
    return gone


UNLOADS = [("lab/base", ["lab/base"]), ("lab/alias", ["lab/base"]), ("lab/lora", []), ("lab/alone", [])]


@pytest.mark.parametrize(("name", "expected"), UNLOADS)
def test_unloading_an_adapter_leaves_its_base(name: str, expected: list[str], left: list[str]) -> None:
    """An alias's engine is its base's, an adapter has none, and one whose base is gone is no error."""
    asyncio.run(app.unload_model(name, app.retire_engine))
    assert left == expected


@pytest.mark.parametrize(("name", "expected"), UNLOADS)
def test_no_keep_alive_for_an_adapter_leaves_its_base(name: str, expected: list[str], left: list[str]) -> None:
    """The same for the empty request that unloads a model."""

    async def ask() -> list[app.Event]:
        return [event async for event in app.generate(app.ChatRequest(name, task="unload"))]

    assert [type(event) for event in asyncio.run(ask())] == [app.Started, app.Done]
    assert left == expected


# -- the order of leaving -----------------------------------------------------


def engine(name: str, asleep: bool = False, pins: int = 0) -> Any:
    """What the choice of a victim looks at."""
    return SimpleNamespace(spec=SimpleNamespace(model=name, quantization="none"), asleep=asleep, pins=pins)


ENGINES = st.lists(st.tuples(st.booleans(), st.integers(0, 1), st.none() | st.integers(0, 100)), max_size=6)


@FINE
@given(ENGINES, st.integers(-50, 150), st.booleans())
def test_who_leaves(drawn: list[tuple[bool, int, int | None]], missing: int, crowded: bool) -> None:
    """Never one in use; one that is enough, else the oldest idle one; sleepers last, and never for a place."""
    names = [f"m{number}" for number in range(len(drawn))]
    facts = dict(zip(names, drawn, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        engines = [engine(name, asleep, pins) for name, (asleep, pins, _) in facts.items()]
        patch.setattr(app, "model_cache", OrderedDict(zip(names, engines, strict=True)))
        metas = {name: app.ModelMeta(name, "test", "/", memory_bytes=memory) for name, (_, _, memory) in facts.items()}
        patch.setattr(app, "model_meta", metas)
        victim = app._choose_victim(missing, crowded)
    idle = [name for name in names if not facts[name][0] and not facts[name][1]]
    sleepers = [name for name in names if facts[name][0] and not facts[name][1]]
    enough = [name for name in idle if (facts[name][2] or 0) >= missing]
    expected = [*enough, *idle, *([] if crowded else sleepers)]
    assert (victim and victim.spec.model) == (expected[0] if expected else None)


def test_waking_a_model_never_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short memory is, the model for which room is made is not the one that makes room."""
    dropped: list[str] = []

    async def drop(one: Any) -> None:
        dropped.append(one.spec.model)
        del app.model_cache[one.spec.model]

    async def scenario() -> None:
        sleeper, other = engine("m", asleep=True), engine("other", asleep=True)
        sleeper.wake = lambda: asyncio.sleep(0)
        monkeypatch.setattr(app, "model_cache", OrderedDict({"m": sleeper, "other": other}))
        with suppress(app.NoCapacity):  # an honest answer where so little is free
            await asyncio.wait_for(app._wake(sleeper), 10)

    metas = {name: app.ModelMeta(name, "test", "/", memory_bytes=100) for name in ("m", "other")}
    monkeypatch.setattr(app, "model_meta", metas)
    monkeypatch.setattr(app, "free_bytes", lambda: 0)
    monkeypatch.setattr(app, "QUEUE_TIMEOUT", 0.1)
    monkeypatch.setattr(app, "_drop_engine", drop)
    asyncio.run(scenario())
    assert "m" not in dropped


# -- the arithmetic -----------------------------------------------------------

GIBIBYTE = 1024**3


def gpus(count: int, total: int, free: int) -> list[Json]:
    """Equal devices."""
    return [{"index": index, "total_bytes": total, "free_bytes": free, "used_bytes": 0} for index in range(count)]


COUNTS, TOTALS = st.integers(1, 8), st.integers(4 * GIBIBYTE, 200 * GIBIBYTE)
WEIGHTS, SHARES = st.integers(0, 400 * GIBIBYTE), st.floats(0, 1)


@FINE
@given(WEIGHTS, COUNTS, TOTALS, SHARES, st.integers(1, 4))
def test_kv_cache_bytes(weights: int, count: int, total: int, share: float, places: int) -> None:
    """It fits beside the weights into what is free, leaves the other places theirs, and is never nothing."""
    free = int(total * share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "MAX_CACHE_MODELS", places)
        patch.setattr(app, "KV_CACHE_BYTES", 0)
        cache, of_device = app.kv_cache_bytes(weights, gpus(count, total, free))
    taken = weights // count + app.ENGINE_OVERHEAD_BYTES
    assert cache >= app.SMALLEST_KV_CACHE_BYTES
    assert 0 < of_device <= 0.95
    if free >= taken + app.SMALLEST_KV_CACHE_BYTES:
        assert cache + taken <= free
    if cache > GIBIBYTE:
        assert cache + taken <= 0.9 * total / places
    if cache + taken <= 0.95 * total:
        assert of_device * total == pytest.approx(cache + taken)


@FINE
@given(WEIGHTS, st.integers(0, 8), TOTALS, st.integers(1, 2**40))
def test_a_cache_that_was_asked_for_is_taken(weights: int, count: int, total: int, asked: int) -> None:
    """KV_CACHE_BYTES is never corrected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "KV_CACHE_BYTES", asked)
        assert app.kv_cache_bytes(weights, gpus(count, total, total))[0] == asked


def test_kv_cache_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gibibyte, whatever the weights."""
    monkeypatch.setattr(app, "KV_CACHE_BYTES", 0)
    assert app.kv_cache_bytes(10**12, [])[0] == GIBIBYTE


@FINE
@given(WEIGHTS, st.integers(0, 8), TOTALS)
def test_tensor_parallel_size(weights: int, count: int, total: int) -> None:
    """The smallest power of two of devices that holds the weights, or as many as there are; one without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "TENSOR_PARALLEL_SIZE", 0)
        size = app.tensor_parallel_size(weights, gpus(count, total, total))
    sizes = [power for power in (1, 2, 4, 8) if power <= max(1, count)]
    fitting = [power for power in sizes if weights / power + 2 * app.ENGINE_OVERHEAD_BYTES <= 0.9 * total]
    assert size == (fitting[0] if fitting else sizes[-1])


@given(st.integers(1, 16), WEIGHTS, st.integers(0, 8))
def test_tensor_parallel_size_that_was_asked_for(asked: int, weights: int, count: int) -> None:
    """Other nodes may have the devices that this one lacks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "TENSOR_PARALLEL_SIZE", asked)
        assert app.tensor_parallel_size(weights, gpus(count, 80 * GIBIBYTE, 0)) == asked


@given(st.integers(0, 10**12))
def test_weight_bytes(size: int) -> None:
    """Four bits are less than half of sixteen, and more than a quarter."""
    meta = app.ModelMeta("m", "test", "/", size_bytes=size)
    assert app.weight_bytes(meta, "none") == size
    assert size // 4 <= app.weight_bytes(meta, "4bit-nf4") <= size // 2


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_prediction_is_what_the_engine_will_reserve(pipeline: int) -> None:
    """Weights once, cache and overhead on every device that the engine gets."""

    @FINE
    @given(WEIGHTS, COUNTS, TOTALS, st.sampled_from(["none", "4bit-nf4"]))
    def check(size: int, count: int, total: int, quantization: str) -> None:
        assume(count >= 2 * pipeline)
        meta = app.ModelMeta("m", "test", "/", size_bytes=size)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(app, "PIPELINE_PARALLEL_SIZE", pipeline)
            patch.setattr(app, "gpu_devices", lambda: gpus(count, total, total))
            spec = app._engine_spec(meta, "vllm", quantization)
            predicted = sum(app.memory_needs(meta, "vllm", quantization))
        used = min(count, spec.tensor_parallel * spec.pipeline_parallel)
        each = spec.kv_cache_bytes + app.ENGINE_OVERHEAD_BYTES
        assert predicted == app.weight_bytes(meta, quantization) + used * each

    check()


@FINE
@given(
    WEIGHTS, st.integers(0, 10**6), st.integers(1, 10**7), st.sampled_from(["transformers", "pipeline", "llama.cpp"])
)
def test_prediction_without_a_reserved_cache(size: int, per_token: int, context: int, backend: str) -> None:
    """Weights, one context of cache (llama.cpp: two) and some room; what a load on the same engine has shown wins."""
    meta = app.ModelMeta("m", "test", "/", size_bytes=size, kv_bytes_per_token=per_token, context_length=context)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "gpu_devices", lambda: [])
        patch.setattr(app, "_cpu_has_bfloat16", lambda: True)
        predicted = sum(app.memory_needs(meta, backend, "none"))
        cache = per_token * min(context, app.MAX_CONTEXT_LENGTH)
        assert predicted - app.CPU_OVERHEAD_BYTES[backend] == size + (2 if backend == "llama.cpp" else 1) * cache
        meta.memory_bytes, meta.last_backend = size + 10**12, backend
        grows = 0 if backend == "llama.cpp" else cache  # what it had then was before the first token
        assert sum(app.memory_needs(meta, backend, "none")) == size + 10**12 + grows
        assert sum(app.memory_needs(meta, "vllm", "none")) < 10**12 + size


def test_a_prediction_never_counts_on_weights_that_were_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU transformers maps its files: after a load less is resident than a request will need."""
    monkeypatch.setattr(app, "gpu_devices", lambda: [])
    meta = app.ModelMeta("m", "test", "/", size_bytes=10**10)
    fresh = sum(app.memory_needs(meta, "transformers", "none"))
    meta.memory_bytes, meta.last_backend = 10**9, "transformers"
    assert sum(app.memory_needs(meta, "transformers", "none")) == fresh


# -- what a pull leaves true --------------------------------------------------


def test_another_vllm_table_needs_another_load() -> None:
    """vLLM reads its arguments once, so a pull that brings others outdates the engine."""
    metas = [app.ModelMeta("m", "test", "/", vllm=table) for table in ({}, {"max_num_seqs": 4})]
    assert app._load_facts(metas[0]) != app._load_facts(metas[1])


def test_an_equal_pull_keeps_what_loads_showed(start: Start) -> None:
    """The prediction of the next load still knows the last one."""
    server = start()
    use(server, "fake/a")
    before = shown(server, "fake/a")
    assert before["last_backend"] == "transformers" and "imports" in before["load_phases"]
    server.pull("fake/a")
    after = shown(server, "fake/a")
    figures = ("memory_bytes", "load_seconds", "last_backend", "load_phases")
    assert {name: after[name] for name in figures} == {name: before[name] for name in figures}


def test_a_job_shows_the_phases_of_its_load(start: Start) -> None:
    """With `init` the job has what the model has; without, nothing."""
    server = start()
    assert server.pull("fake/a")["load_phases"] == {}
    job = server.pull("fake/b", init=True)
    assert job["load_phases"].keys() >= {"imports"}
    assert job["load_phases"] == shown(server, "fake/b")["load_phases"]


def test_other_programs_on_the_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what they hold; processes that this one started are its own, and without a driver nobody is named."""
    ours = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    users = [SimpleNamespace(pid=pid, usedGpuMemory=size) for pid, size in ((ours.pid, 1), (os.getppid(), 3 * 2**30))]
    monkeypatch.setattr(app, "gpu_devices", lambda: [{}])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", lambda _: users)
    said = app.foreign_gpu_users()
    ours.communicate()
    assert f"(pid {os.getppid()}) 3072 MiB on device 0" in said
    assert f"(pid {ours.pid})" not in said
    monkeypatch.setattr(app, "gpu_devices", list)
    assert app.foreign_gpu_users() == ""
