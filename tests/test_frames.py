"""Frames between the server and its children, what a child may know, and how it ends."""

import asyncio
import io
import itertools
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

import msgspec
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app

ROOT = Path(app.__file__).parent
T = TypeVar("T")
FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SPEC = app.EngineSpec("llama.cpp", "m", "/nowhere/m.gguf", "Q4_1", True, 3, 2048, 4, "{{ messages }}")
REQUEST = app.ChatRequest(
    "m",
    (app.Message("user", "Hi ✓ \0 \U0001f600"),),
    app.Sampling(max_tokens=0, temperature=0.0, seed=-(2**63), stop=("", "\n"), top_p=1),
    stream=False,
    keep_alive=math.inf,
    require=(("backend", "vllm"),),
    ignored=("x",),
    created_at="2025-01-02T03:04:05Z",
)
COMMANDS: list[app.Command] = [
    app.Order("prepare", "vllm"),
    app.Load(SPEC),
    app.Load(app.EngineSpec("vllm", "m", "/nowhere", overrides={"max_num_seqs": 4, "x": [1, None]}, executor="ray")),
    app.Generate(2**40, REQUEST),
    app.Generate(1, app.ChatRequest("m", ())),
    app.Generate(3, app.ChatRequest("m", (), app.Sampling(logit_bias={15: -1.5}, choice=("a", "b"), format={"a": 1}))),
    app.Abort(7),
    app.Order("sleep", "vllm"),
    app.Fetch("org/repo", "f" * 40, [app.RemoteFile("a.json", 2, "0" * 40)], "folder", "https://hub", "token"),
    app.Limit(1000),
]
REPORTS: list[app.Report] = [
    app.Loaded(app.EngineInfo("none", 8192, ("seed",), 10**12, "float32", "cuda:0")),
    app.Loaded(app.EngineInfo("none", 1, can_sleep=True)),
    app.Phase("weights", 1.5),
    app.Obeyed(),
    app.Obeyed("RuntimeError: why"),
    app.Beat(0.0),
    app.Beat(1e9),
    app.Refused("unsupported", "why", "Traceback"),
    app.Events(
        [
            (1, app.Started(3, app.ServedBy("b", "q", "r", ("x",)))),
            (1, app.Text("é")),
            (1, app.Text("", (app.TokenLogprob("\ufffd", -1.5, b"\xe2\0", (app.TokenLogprob("a", 0, b"a"),)),), 15)),
            (2, app.Done("length", 3, 4, 0.1, 0.2, 0.3, 0.4, 5, 6, last=False)),
        ]
    ),
    app.Events([]),
    app.Refused("bad_request", "why", id=1),
    app.Progress(1, 2**50, "model.safetensors"),
    app.Fetched(["model.safetensors"]),
]


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a scenario; one that hangs fails after half a minute."""
    return asyncio.run(asyncio.wait_for(work, 30))


# -- frames -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "union"), [(COMMANDS, app.Command), (REPORTS, app.Report)], ids=["command", "report"]
)
def test_every_frame_survives(frames: list[msgspec.Struct], union: UnionType) -> None:
    """Each command and report comes out as it went in, by its tag, also with defaults and odd values."""
    decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(union)
    assert {type(frame) for frame in frames} == set(get_args(union)), "a new frame needs a sample here"
    for frame in frames:
        back = decoder.decode(msgspec.msgpack.encode(frame))
        assert (type(back), back) == (type(frame), frame)


@FINE
@given(st.lists(st.tuples(st.integers(0, 2**63), st.text(st.characters(exclude_categories=["Cs"])))))
def test_events_survive(items: list[tuple[int, str]]) -> None:
    """Any text, many streams in one frame, in order."""
    frame = app.Events([(id, app.Text(text)) for id, text in items])
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(frame), type=app.Report) == frame


def drain(descriptor: int, into: bytearray) -> None:
    """Read a pipe to its end."""
    with os.fdopen(descriptor, "rb") as file:
        into += file.read()


def frames_in(data: bytes) -> list[app.Report]:
    """The reports in a stream of frames; fails on anything between them."""
    decoder, found = msgspec.msgpack.Decoder(app.Report), []
    while data:
        (size,) = struct.unpack(">I", data[:4])
        found.append(decoder.decode(data[4 : 4 + size]))
        data = data[4 + size :]
    return found


@pytest.mark.parametrize("piece", [2**30, 1000])
def test_frames_larger_than_the_pipe(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame arrives whole, and the next one behind it, also where the pipe takes a piece at a time."""
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:piece]))
    reader, writer = os.pipe()
    received = bytearray()
    thread = threading.Thread(target=drain, args=(reader, received))
    thread.start()
    large = app.Events([(1, app.Text("x" * 1_000_000))])
    app.write_frame(writer, large)
    app.write_frame(writer, app.Refused("k", "m", id=1))
    os.close(writer)
    thread.join()
    assert frames_in(bytes(received)) == [large, app.Refused("k", "m", id=1)]


def frame_of(command: app.Command) -> bytes:
    """A command as it goes through the pipe."""
    payload = msgspec.msgpack.encode(command)
    return struct.pack(">I", len(payload)) + payload


@pytest.mark.parametrize("piece", [2**30, 3])
@pytest.mark.parametrize("rest", [b"", b"\0\0", frame_of(app.Load(SPEC))[:20], b"\0\0\0\1\xc1"])
def test_reading_commands_to_the_end(rest: bytes, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command in order, however the pipe cuts them; when it closes, even within a frame, the group ends."""
    taken: list[app.Command] = []
    ended: list[bool] = []
    pipe = {0: io.BytesIO(b"".join(map(frame_of, COMMANDS)) + rest)}
    monkeypatch.setattr(os, "read", lambda descriptor, size: pipe[descriptor].read(min(size, piece)))
    monkeypatch.setattr(app, "end_process_group", lambda: ended.append(True))
    with suppress(msgspec.DecodeError):  # the real one ends the process before this is raised
        app.read_commands(taken.append)
    assert taken == COMMANDS
    assert ended == [True]


# -- the child's side ---------------------------------------------------------


class FakeEngine(app.Engine):
    """An engine whose answers are written in the request's first message."""

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.orders: list[str] = []
        self.waiting = asyncio.Event()
        self.lively = asyncio.Event()
        self.lively.set()

    async def prepare(self) -> None:
        """Note it, with the thread: a process that is forked later has no other at work."""
        self.orders.append(f"prepare on the loop: {threading.current_thread() is threading.main_thread()}")

    async def load(self, spec: app.EngineSpec, phase: Callable[[str], None]) -> app.EngineInfo:
        """Load, or fail as the model's name says."""
        phase("imports")
        if spec.model == "broken":
            raise ValueError("no such luck")
        return app.EngineInfo("none", 100)

    async def pulse(self) -> None:
        """Wait while there is none."""
        await self.lively.wait()

    async def sleep(self) -> None:
        """Note it."""
        self.orders.append("sleep")

    async def wake(self) -> None:
        """Fail."""
        raise RuntimeError("will not\nand more lines")

    async def stream(self, request: app.ChatRequest) -> AsyncGenerator[app.Event, None]:
        """One word a step; then `raise`, `refuse`, `hang`, or the end."""
        words = request.messages[0].content.split()
        try:
            yield app.Started(len(words))
            for word in words:
                if word == "raise":
                    raise KeyError("secret detail")
                if word == "refuse":
                    raise app.ContextLengthExceeded("too long")
                if word == "hang":
                    self.waiting.set()
                    await asyncio.Event().wait()
                yield app.Text(word)
            yield app.Done("stop", len(words), len(words), 0.0, 0.0)
        finally:
            self.closed.append(request.messages[0].content)


def is_heart(task: "asyncio.Task[None]") -> bool:
    """Whether this task of a host beats for ever."""
    return getattr(task.get_coro(), "__name__", "") == "_beat"


async def stop(tasks: "set[asyncio.Task[None]]") -> None:
    """Cancel tasks and wait for their end."""
    for task in (ending := list(tasks)):
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


def without_beats(reports: list[app.Report]) -> list[app.Report]:
    """What was reported beside the signs of life."""
    return [report for report in reports if not isinstance(report, app.Beat)]


async def host_reports(*commands: app.Command) -> tuple[list[app.Report], FakeEngine]:
    """What an EngineHost with the fake engine writes for these commands; an Abort waits until its stream hangs."""
    reader, writer = os.pipe()
    engine = FakeEngine()
    host = app.EngineHost(writer, engine)
    for command in commands:
        if isinstance(command, app.Abort):
            await engine.waiting.wait()
        host.take(command)
    while busy := {task for task in host._background if not is_heart(task)}:
        await asyncio.wait(busy)
        await asyncio.sleep(0)  # one turn of the loop, in which the outbox is sent
    await stop(host._background)
    os.close(writer)
    received = bytearray()
    drain(reader, received)
    return frames_in(bytes(received)), engine


def generate(id: int, text: str) -> app.Generate:
    """A request of one message."""
    return app.Generate(id, app.ChatRequest("m", (app.Message("user", text),)))


def of_id(reports: list[app.Report], id: int) -> list[Any]:
    """What one request got, in order."""
    found: list[Any] = []
    for report in reports:
        if isinstance(report, app.Events):
            found += [event for owner, event in report.items if owner == id]
        elif isinstance(report, app.Refused) and report.id == id:
            found.append(report)
    return found


def test_host_answers() -> None:
    """A load and a request: the engine's events under the request's id, those of one turn in one frame."""
    reports, engine = run(host_reports(app.Load(SPEC), generate(5, "a b")))
    phase, loaded = without_beats(reports)[:2]
    assert isinstance(phase, app.Phase) and phase.name == "imports" and 0 <= phase.seconds < 30
    assert loaded == app.Loaded(app.EngineInfo("none", 100))
    assert of_id(reports, 5) == [
        app.Started(2), app.Text("a"), app.Text("b"), app.Done("stop", 2, 2, 0.0, 0.0),
    ]  # fmt: skip
    assert len(without_beats(reports)) == 3
    assert engine.closed == ["a b"]


def test_host_obeys() -> None:
    """Each order is answered, with one line of why it failed where it did; imports run on the loop's own thread."""
    orders = (app.Order("prepare", "vllm"), app.Order("sleep", "vllm"), app.Order("wake", "vllm"))
    reports, engine = run(host_reports(*orders))
    assert sorted(reports, key=repr) == [app.Obeyed(), app.Obeyed(), app.Obeyed("will not")]
    assert sorted(engine.orders) == ["prepare on the loop: True", "sleep"]


def test_host_without_an_engine_ignores_what_needs_one() -> None:
    """A child that has loaded nothing has nothing to abort."""

    async def scenario() -> set[Any]:
        host = app.EngineHost(-1)
        host.take(app.Abort(1))
        return set(host._background)

    assert run(scenario()) == set()


def test_host_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life come by themselves; without a pulse they say for how long, and a pulse ends that."""
    monkeypatch.setattr(app, "BEAT_SECONDS", 0.01)

    async def scenario() -> list[float]:
        beats: asyncio.Queue[float] = asyncio.Queue()
        engine = FakeEngine()
        host = app.EngineHost(-1, engine)

        def hear(report: app.Report) -> None:
            if isinstance(report, app.Beat):
                beats.put_nowait(report.silent_seconds)

        monkeypatch.setattr(host, "_send", hear)
        host.take(app.Load(SPEC))
        lively = await beats.get()
        engine.lively.clear()
        silent = [seconds for _ in range(5) if (seconds := await beats.get()) > 0]
        engine.lively.set()
        while await beats.get() > 0:
            pass
        await stop(host._background)
        return [lively, *silent]

    lively, *silent = run(scenario())
    assert lively == 0
    assert len(silent) >= 3 and silent == sorted(silent)


def test_host_keeps_streams_apart() -> None:
    """Several requests at a time; one that fails costs the others nothing."""
    reports, _ = run(host_reports(generate(1, "a raise"), generate(2, "b refuse"), generate(3, "c")))
    text, failed = of_id(reports, 1)[1:]
    assert (text, failed.kind) == (app.Text("a"), "engine_failed")
    assert "secret detail" not in failed.message
    assert "KeyError: 'secret detail'" in failed.traceback
    text, failed = of_id(reports, 2)[1:]
    assert (text, failed.kind, failed.message) == (app.Text("b"), "context_length_exceeded", "too long")
    assert of_id(reports, 3)[1:] == [app.Text("c"), app.Done("stop", 1, 1, 0.0, 0.0)]


def test_host_aborts() -> None:
    """An aborted request closes the engine's stream and says nothing more; an unknown id is nobody's."""
    reports, engine = run(host_reports(generate(1, "a hang b"), app.Abort(1), app.Abort(99)))
    assert of_id(reports, 1) == [app.Started(3), app.Text("a")]
    assert engine.closed == ["a hang b"]


def test_host_reports_a_failed_load() -> None:
    """With the cause, its kind and the traceback."""
    reports, _ = run(host_reports(app.Load(msgspec.structs.replace(SPEC, model="broken"))))
    _, refused = reports
    assert isinstance(refused, app.Refused)
    assert (refused.kind, refused.message) == ("start_failed", "ValueError: no such luck")
    assert "Traceback" in refused.traceback


class SpyCondition(threading.Condition):
    """A condition that tells when somebody begins to wait."""

    def __init__(self, arrived: threading.Semaphore) -> None:
        super().__init__()
        self._arrived = arrived

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        """Tell, then wait."""
        self._arrived.release()
        return super().wait_for(predicate, timeout)


def run_through_gate(workers: int, steps: int) -> list[int]:
    """The order in which threads that arrive one after the other compute their steps."""
    gate, arrived = app.StepGate(), threading.Semaphore(0)
    gate._turn = SpyCondition(arrived)
    order: list[int] = []
    inside = threading.Lock()

    def work(number: int) -> None:
        with gate:
            for step in range(steps):
                assert inside.acquire(blocking=False), "two threads compute at a time"
                order.append(number)
                inside.release()
                if step < steps - 1:
                    gate.hand_over()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    with gate:
        arrived.acquire()
        for thread in threads:
            thread.start()
            arrived.acquire()  # until this one waits at the gate
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return order


@pytest.mark.parametrize(("workers", "steps"), [(1, 5), (2, 1), (3, 20), (8, 5)])
def test_gate_is_fair(workers: int, steps: int) -> None:
    """A step each, in order of arrival, one at a time: nobody waits longer than one round."""
    assert run_through_gate(workers, steps) == list(range(workers)) * steps


def test_gate_opens_after_an_error() -> None:
    """A generation that fails hands over like any other."""
    gate = app.StepGate()
    with pytest.raises(ZeroDivisionError), gate:
        raise ZeroDivisionError
    with gate:
        gate.hand_over()


# -- the server's side --------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "API_KEYS", "ADMIN_KEYS", "API_KEY", "MY_SECRET", "AWS_SECRET_ACCESS_KEY",
        "DB_PASSWORD", "SOME_CREDENTIALS", "hf_token", "Api_Keys",
    ],
)  # fmt: skip
def test_engine_gets_no_secret(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine may run foreign code, a pull worker has its token from its order: no secret is in an environment."""
    monkeypatch.setattr(app, "INHERITED_ENVIRONMENT", {name: "secret", "PATH": "/bin", "KEEP_ALIVE": "5m"})
    child = app._child_environment(3)
    assert name not in child
    assert "secret" not in child.values()
    assert (child["PATH"], child["KEEP_ALIVE"]) == ("/bin", "5m")


def test_engine_gets_no_hub() -> None:
    """It works on local paths, offline, with the compute threads that it was given."""
    child = app._child_environment(3)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        assert child[name] == "1"
    assert (child["OMP_NUM_THREADS"], child["MKL_NUM_THREADS"]) == ("3", "3")


async def next_report(child: app.ChildProcess) -> app.Report:
    """The child's next frame."""
    async for report in child.reports():
        return report
    raise AssertionError("the child ended without a report: " + "\n".join(child.log_tail))


async def life_of_an_engine() -> tuple[app.Report, dict[str, str], int, list[app.Report], bool]:
    """Spawn `python app.py --engine`, ask for an engine that does not exist, look at it, close its stdin."""
    child = await app.ChildProcess.spawn("--engine", app._child_environment(2))
    try:
        child.send(app.Load(msgspec.structs.replace(SPEC, backend="nonsense")))
        refused = await next_report(child)
        environment = psutil.Process(child.process.pid).environ()
        own_group = os.getpgid(child.process.pid) == child.process.pid
        assert child.memory_bytes() > 2**20
        assert child.process.stdin is not None
        child.process.stdin.close()
        rest = [report async for report in child.reports()]
        status = await asyncio.wait_for(child.process.wait(), 2)
    finally:
        await child.stop()
    assert child.memory_bytes() == 0
    with pytest.raises(app.EngineDied):
        child.send(app.Abort(1))
    return refused, environment, status, rest, own_group


def test_life_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real child answers in frames, has no secret, and is gone within 2 s when its stdin closes."""
    inherited = {**os.environ, "HF_TOKEN": "hf_secret", "API_KEYS": "key_secret", "X_SECRET": "x_secret"}
    monkeypatch.setattr(app, "INHERITED_ENVIRONMENT", inherited)
    refused, environment, status, rest, own_group = run(life_of_an_engine())
    assert isinstance(refused, app.Refused)
    assert refused.message == "KeyError: 'nonsense'"
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert [value for value in environment.values() if value.endswith("_secret")] == []
    assert own_group
    assert status == -signal.SIGKILL  # its whole group ends with it
    assert rest == []


def run_python(code: str, **pipes: Any) -> "subprocess.Popen[bytes]":
    """A fresh process in a session of its own that may import app."""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True, **pipes
    )


TAKES_ITS_GROUP_ALONG = """
import subprocess, sys, app
subprocess.Popen(["sleep", "600"])
print("ready", flush=True)
app.read_commands(print)
"""


def test_a_child_takes_its_group_along() -> None:
    """What an engine started ends with it: the pipe that both hold comes to its end."""
    process = run_python(TAKES_ITS_GROUP_ALONG, stdin=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.stdin.close()
    reader = threading.Thread(target=process.stdout.read, daemon=True)
    reader.start()
    try:
        assert process.wait(timeout=10) == -signal.SIGKILL
        reader.join(timeout=10)
        assert not reader.is_alive(), "something of its group still lives"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        reader.join()
        process.stdout.close()


PRINTS = """
import os, sys, app
output = app.claim_stdout()
print("a library prints")
sys.stdout.flush()
os.write(1, b"native code prints\\n")
app.write_frame(output, app.Refused("kind", "first", id=1))
os.system("echo a program prints")
print("again", flush=True)
app.write_frame(output, app.Refused("kind", "second", id=2))
"""


def test_printing_does_not_disturb_frames() -> None:
    """Whatever prints to stdout prints to stderr; the pipe has frames and nothing else."""
    output, errors = run_python(PRINTS, stderr=subprocess.PIPE).communicate(timeout=60)
    assert frames_in(output) == [app.Refused("kind", "first", id=1), app.Refused("kind", "second", id=2)]
    assert errors.split(b"\n")[:-1] == [b"a library prints", b"native code prints", b"a program prints", b"again"]


def test_stderr_is_kept() -> None:
    """The last lines of what a child prints are there to explain its death; a line without end does not stop it."""

    async def tail(code: str) -> list[str]:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdin=pipe, stdout=pipe, stderr=pipe, limit=65536
        )
        child = app.ChildProcess(process)
        assert [report async for report in child.reports()] == []
        await child.stop()
        return list(child.log_tail)

    lines = run(tail("import sys; [print(n, file=sys.stderr) for n in range(400)]"))
    assert lines == [str(number) for number in range(100, 400)]
    code = "import sys; sys.stderr.write('first\\n' + 'x' * 1_000_000 + '\\n'); sys.stderr.flush(); sys.stdout.close()"
    assert run(tail(code))[0] == "first"


# -- one loaded model ---------------------------------------------------------


class FakeChild:
    """The pipes of a child that does nothing."""

    def __init__(self) -> None:
        self.sent: list[app.Command] = []
        self.process = type("Process", (), {"pid": 4321})()

    def send(self, command: app.Command) -> None:
        """Keep what was sent."""
        self.sent.append(command)

    def generated(self) -> list[app.Generate]:
        """The requests among it."""
        return [command for command in self.sent if isinstance(command, app.Generate)]


def engine_with(child: FakeChild, monkeypatch: pytest.MonkeyPatch) -> app.EngineProcess:
    """An engine process around it, which runs."""
    monkeypatch.setattr(app, "_gpu_used_bytes", lambda: 0)
    engine = app.EngineProcess(SPEC, "abc", lambda _: None)
    monkeypatch.setattr(engine, "_child", child, raising=False)
    engine.alive = True
    return engine


def test_streams_of_one_engine_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request gets its own events; leaving early aborts it in the child, an ended one needs no abort."""

    async def scenario() -> None:
        child = FakeChild()
        engine = engine_with(child, monkeypatch)
        first, second = engine.stream(REQUEST), engine.stream(REQUEST)
        waiting = [asyncio.ensure_future(anext(stream)) for stream in (first, second)]
        await asyncio.sleep(0)
        a, b = (command.id for command in child.sent if isinstance(command, app.Generate))
        done = app.Done("stop", 1, 1, 0.0, 0.0)
        engine._deliver(app.Events([(b, app.Text("b")), (a, app.Text("a")), (b, done), (999, app.Text("nobody"))]))
        assert await asyncio.gather(*waiting) == [app.Text("a"), app.Text("b")]
        assert [event async for event in second] == [done]
        await first.aclose()
        assert child.sent[2:] == [app.Abort(a)]
        assert engine._mailboxes == {}

    run(scenario())


def test_errors_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed in the child is raised here as what it was, and only in the stream it belongs to."""

    async def scenario() -> None:
        child = FakeChild()
        engine = engine_with(child, monkeypatch)
        stream = engine.stream(REQUEST)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        (sent,) = child.sent
        assert isinstance(sent, app.Generate)
        engine._deliver(app.Refused("engine_failed", "of another", id=sent.id + 1))
        engine._deliver(app.Refused("context_length_exceeded", "too long", id=sent.id))
        with pytest.raises(app.ContextLengthExceeded, match="too long"):
            await waiting
        assert engine._mailboxes == {}

    run(scenario())


def test_a_failed_request_needs_no_abort(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended in the child is not ended again."""

    async def scenario() -> None:
        child = FakeChild()
        engine = engine_with(child, monkeypatch)
        waiting = asyncio.ensure_future(anext(engine.stream(REQUEST)))
        await asyncio.sleep(0)
        engine._deliver(app.Refused("engine_failed", "why", id=child.generated()[0].id))
        with pytest.raises(app.EngineFailed):
            await waiting
        assert len(child.sent) == 1

    run(scenario())


THREE = msgspec.structs.replace(REQUEST, sampling=app.Sampling(n=3, seed=7))


def test_choices_of_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a request of its own to the child, with a seed of its own; one beginning, one end with all tokens."""

    async def scenario() -> None:
        child = FakeChild()
        engine = engine_with(child, monkeypatch)
        stream = engine.stream(THREE)
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        asked = child.generated()
        assert [command.request.sampling.seed for command in asked] == [7, 8, 9]
        a, b, c = (command.id for command in asked)
        begun: list[tuple[int, app.Event]] = [(id, app.Started(3)) for id in (b, a, c)]
        words: list[tuple[int, app.Event]] = [(c, app.Text("z")), (a, app.Text("x"))]
        ends: list[tuple[int, app.Event]] = [
            (c, app.Done("length", 3, 4, 0.1, 0.5)), (a, app.Done("stop", 3, 2, 0.1, 0.2)),
            (b, app.Done("stop", 3, 1, 0.1, 0.1)),
        ]  # fmt: skip
        engine._deliver(app.Events([*begun, *words, *ends]))
        events = [await waiting, *[event async for event in stream]]
        assert events == [
            app.Started(3), app.Text("z", (), 2), app.Text("x", (), 0),
            app.Done("length", 3, 4, 0.1, 0.5, index=2, last=False),
            app.Done("stop", 3, 2, 0.1, 0.2, index=0, last=False),
            app.Done("stop", 3, 1, 0.1, 0.1, index=1, last=False),
            app.Done("stop", 3, 7, 0.1, 0.5, index=1, last=True),
        ]  # fmt: skip
        assert len(child.sent) == 3 and engine._mailboxes == {}

    run(scenario())


def test_a_choice_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody hears the rest of the answer, so nobody computes it."""

    async def scenario() -> None:
        child = FakeChild()
        engine = engine_with(child, monkeypatch)
        waiting = asyncio.ensure_future(anext(engine.stream(THREE)))
        await asyncio.sleep(0)
        a, b, c = (command.id for command in child.generated())
        engine._deliver(app.Refused("bad_request", "why", id=b))
        with pytest.raises(app.BadRequest, match="why"):
            await waiting
        assert {app.Abort(a), app.Abort(c)} <= set(child.sent[3:])
        assert engine._mailboxes == {}

    run(scenario())


@pytest.mark.parametrize("seed", [None, -1, -5])
def test_a_random_seed_stays_random(seed: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a seed that was given counts up."""

    async def scenario() -> None:
        child = FakeChild()
        request = msgspec.structs.replace(REQUEST, sampling=app.Sampling(n=3, seed=seed))
        waiting = asyncio.ensure_future(anext(engine_with(child, monkeypatch).stream(request)))
        await asyncio.sleep(0)
        assert [command.request.sampling.seed for command in child.generated()] == [seed] * 3
        waiting.cancel()
        await asyncio.wait([waiting])

    run(scenario())


# -- mailboxes ----------------------------------------------------------------

one_logprob = st.builds(app.TokenLogprob, st.text(max_size=2), st.floats(-99, 0), st.binary(max_size=2))
text_event = st.builds(
    app.Text, st.text(max_size=6000), st.lists(one_logprob, max_size=2).map(tuple), st.integers(0, 2)
)


@FINE
@given(st.lists(st.none() | text_event))
def test_a_mailbox_loses_and_mixes_nothing(script: list[app.Text | None]) -> None:
    """Texts put in any pieces and read at any times (None) are the same text, choice by choice, with all logprobs."""

    async def scenario() -> list[app.Text]:
        box, read, there = app.Mailbox(), list[app.Text](), 0
        for step in [*script, None]:
            if step is not None:
                box.put_nowait(step)
                there += 1
            while step is None and not box.empty():
                event = await box.get()
                assert isinstance(event, app.Text)
                read.append(event)
        assert len(read) <= there
        return read

    put, read = [step for step in script if step is not None], run(scenario())
    for index in range(3):
        mine, theirs = ([one for one in events if one.index == index] for events in (put, read))
        assert "".join(one.text for one in mine) == "".join(one.text for one in theirs)
        assert [each for one in mine for each in one.logprobs] == [each for one in theirs for each in one.logprobs]


def test_a_mailbox_keeps_the_order_of_everything() -> None:
    """Only neighbours of the same choice grow together; ends and errors stay where they are."""
    end, error = app.Done("stop", 1, 1, 0.0, 0.0), app.EngineFailed("x")
    long = app.Text("x" * app.Mailbox.LONGEST_MERGE)

    async def scenario() -> list[app.Event | app.ServerError]:
        box = app.Mailbox()
        for item in (app.Started(1), app.Text("a"), app.Text("b"), app.Text("c", (), 1), app.Text("d"), end, long,
                     app.Text("e"), error):  # fmt: skip
            box.put_nowait(item)
        return [await box.get() for _ in range(8)]

    assert run(scenario()) == [
        app.Started(1), app.Text("ab"), app.Text("c", (), 1), app.Text("d"), end, long, app.Text("e"), error,
    ]  # fmt: skip


def test_a_reader_that_waits_is_woken() -> None:
    """The first event reaches it at once, and the next one is not lost."""

    async def scenario() -> None:
        box = app.Mailbox()
        waiting = asyncio.ensure_future(box.get())
        await asyncio.sleep(0)
        box.put_nowait(app.Text("a"))
        box.put_nowait(app.Text("b"))
        assert await waiting == app.Text("ab")
        waiting = asyncio.ensure_future(box.get())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        box.put_nowait(app.Text("c"))  # nobody reads: no error
        assert await box.get() == app.Text("c")

    run(scenario())


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("bad_model_files", app.BadModelFiles),
        ("unsupported", app.RungRefused),
        ("remote_code_disabled", app.RemoteCodeNotGranted),
        ("no such kind", app.EngineFailed),
    ],
)
def test_a_refused_load(kind: str, error: type[app.ServerError], monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's cause comes out as an error of its class, with the traceback for the log."""

    async def scenario() -> None:
        async def reports() -> AsyncGenerator[app.Report, None]:
            yield app.Phase("imports", 1.0)
            yield app.Refused(kind, "why", "Traceback ...")

        engine = engine_with(FakeChild(), monkeypatch)
        with pytest.raises(error, match="why") as raised:
            await engine._load(reports())
        assert type(raised.value) is error
        assert (raised.value.details, engine.phases) == ("Traceback ...", {"imports": 1.0})

    run(scenario())


@pytest.mark.parametrize("seconds", [0.0, 300.0, app.LONGEST_SECONDS, math.inf])
def test_keep_alive_of_an_engine(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned it has no end; when the last request is through the time runs, and it can always be shown."""

    async def scenario() -> None:
        engine = engine_with(FakeChild(), monkeypatch)
        monkeypatch.setattr(app, "model_cache", {"m": engine})
        expired = asyncio.Event()
        engine.pin(seconds)
        engine.pin(seconds)
        engine.unpin(lambda _: expired.set())
        assert (engine.pins, engine.expires_at) == (1, None)
        engine.unpin(lambda _: expired.set())
        assert (engine.pins, engine.expires_at is None) == (0, seconds == math.inf)
        assert json.dumps(app.describe(app.ModelMeta("m", "test", "/nowhere")))
        if seconds == 0:
            await expired.wait()
        assert engine._expiry is not None or seconds == math.inf
        if engine._expiry is not None:
            engine._expiry.cancel()

    run(scenario())


def test_a_new_request_stops_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle model that is used again does not expire."""

    async def scenario() -> None:
        engine = engine_with(FakeChild(), monkeypatch)
        expired: list[app.EngineProcess] = []
        engine.pin(0)
        engine.unpin(expired.append)
        engine.pin(None)
        for _ in itertools.repeat(None, 5):
            await asyncio.sleep(0)
        assert expired == []
        assert (engine.pins, engine.expires_at, engine.keep_alive) == (1, None, app.KEEP_ALIVE)

    run(scenario())


def test_an_order_that_is_answered_too_late_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waited has given up; the engine's other reports still arrive."""
    monkeypatch.setattr(app, "LOAD_TIMEOUT", 0.01)

    async def scenario() -> None:
        engine = engine_with(FakeChild(), monkeypatch)
        with pytest.raises(app.EngineFailed, match="did not wake"):
            await engine.wake()
        engine._deliver(app.Obeyed())
        engine._deliver(app.Beat(5.0))
        assert engine._lively_at < time.monotonic()

    run(scenario())
