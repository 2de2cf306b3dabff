"""The server with engines that do what the prompt or the model's name says: faults on command, in real processes.

Prompts: `count N` gives N words; `slow N` gives N words, each after a hundredth of a second; `crash N` ends the process
after N words; `raise` raises inside the engine; `hang` never answers after its first word; `silent N` ends
after N words without saying that it is done; `freeze N` blocks the engine's loop for N seconds, `stall N` lets the loop
turn but shows no pulse, and `strain N` shows none either but uses the processor. `events [...]` gives these events,
in JSON as msgspec writes them, with a `Started` before them unless they have their own.
Models: fake/sleepy* can sleep, fake/sleepy-slow only when the file $STATE_DIR/go exists; fake/grumpy can sleep and does
not wake; fake/insomniac fails to sleep; fake/forest runs out of memory while another engine holds a model; fake/fails
refuses to load, fake/slow loads when the file $STATE_DIR/go exists, fake/dies ends while loading, fake/memory reports
that memory ran out, fake/hangs never becomes ready.
"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec  # noqa: E402  (after the path)
import psutil  # noqa: E402  (the same)

import app  # noqa: E402  (the same)

CONTEXT_LENGTH = 512
COUNTER = Path(os.environ["STATE_DIR"]) / "counter"


def note(what: str) -> None:
    """Write down that something happened in an engine, where a test can read it."""
    with (COUNTER.parent / "events.txt").open("a") as file:
        file.write(what + "\n")


class FakeEngine(app.Engine):
    """An engine without a model."""

    def __init__(self) -> None:
        self._pulseless_until = 0.0
        self._asleep = False

    async def prepare(self) -> None:
        """What a standby does."""
        note("prepare")

    async def load(self, spec: app.EngineSpec, phase: Callable[[str], None]) -> app.EngineInfo:
        """Load, fail, die or hang, as the model's name says."""
        note(f"load {spec.model} {spec.backend}")
        phase("imports")
        self._model = spec.model
        match spec.model:
            case "fake/fails":
                raise RuntimeError("cannot be loaded, on purpose")
            case "fake/forest" if _somebody_holds_memory():
                raise MemoryError("another model holds it")
            case "fake/memory":
                raise MemoryError("on purpose")
            case "fake/dies":
                os._exit(7)
            case "fake/hangs":
                await asyncio.Event().wait()
            case "fake/slow":
                while not (COUNTER.parent / "go").exists():  # noqa: ASYNC110  (the test is another process)
                    await asyncio.sleep(0.01)
        (COUNTER.parent / f"held-{os.getpid()}").touch()
        options = tuple(name for name in app.Sampling.__struct_fields__ if name != "typical_p")
        sleepy = spec.model.startswith(("fake/sleepy", "fake/grumpy", "fake/insomniac"))
        return app.EngineInfo(spec.quantization, CONTEXT_LENGTH, options, can_sleep=sleepy)

    async def pulse(self) -> None:
        """As long as no prompt took it away."""
        await asyncio.sleep(max(0.0, self._pulseless_until - time.monotonic()))

    async def sleep(self) -> None:
        """Nothing to give back; fake/insomniac cannot."""
        note(f"sleep {self._model}")
        if self._model == "fake/insomniac":
            raise RuntimeError("wide awake")
        while self._model == "fake/sleepy-slow" and not (COUNTER.parent / "go").exists():  # noqa: ASYNC110  (as above)
            await asyncio.sleep(0.01)
        self._asleep = True
        note(f"asleep {self._model}")

    async def wake(self) -> None:
        """Wake, but for fake/grumpy."""
        note(f"wake {self._model}")
        if self._model == "fake/grumpy":
            raise RuntimeError("does not want to")
        self._asleep = False

    async def stream(self, request: app.ChatRequest) -> AsyncGenerator[app.Event, None]:
        """Answer as the last message says."""
        prompt = request.messages[-1].content if request.messages else str(request.inputs[0])
        command, _, number = prompt.partition(" ")
        prompt_tokens = sum(len(message.content.split()) for message in request.messages)
        room = app.completion_room(prompt_tokens, CONTEXT_LENGTH, request.sampling)
        note(f"start {command}")
        if self._asleep:
            raise RuntimeError("asked while asleep")
        words = 0
        try:
            events = msgspec.json.decode(number, type=list[app.Event]) if command == "events" else []
            if not events or not isinstance(events[0], app.Started):
                yield app.Started(prompt_tokens)
            for event in events:
                yield event
            if events:
                return
            silent = command in ("freeze", "stall", "strain")
            for word in range(min(room, 1 if silent else int(number or 1))):
                yield app.Text(f"{word} ")
                words += 1
                await asyncio.sleep(0.01 if command == "slow" else 0)
            await self._end(command, float(number or 0))
            if command == "silent":
                return
            yield app.Done("stop", prompt_tokens, words, 0.001, 0.001)
        finally:
            note(f"end {command} {words}")

    async def work(self, request: app.ChatRequest) -> tuple[object, int]:
        """Count words; there is nothing else it can do."""
        if request.task != "count":
            return await super().work(request)
        return None, sum(len(message.content.split()) for message in request.messages)

    async def _end(self, command: str, seconds: float) -> None:
        match command:
            case "freeze":
                time.sleep(seconds)  # noqa: ASYNC251  (that is the fault)
            case "stall" | "strain":
                self._pulseless_until = time.monotonic() + seconds
                await asyncio.to_thread(_use_the_processor, seconds if command == "strain" else 0.0)
                await asyncio.sleep(max(0.0, self._pulseless_until - time.monotonic()))
            case "crash":
                await asyncio.sleep(0.05)  # the words before must be on their way
                os._exit(9)
            case "raise":
                raise RuntimeError("raised on purpose, with a /secret/path")
            case "hang":
                await asyncio.Event().wait()


def _somebody_holds_memory() -> bool:
    """Whether a process that loaded a model still lives."""
    holders = (int(path.name.removeprefix("held-")) for path in COUNTER.parent.glob("held-*"))
    return any(psutil.pid_exists(pid) for pid in holders)


def _use_the_processor(seconds: float) -> None:
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        sum(range(10000))


for backend in app.ENGINES:
    app.ENGINES[backend] = FakeEngine
app.CHILD_PROGRAM = __file__
app.SHUTDOWN_GRACE_SECONDS = 2.0
app.BEAT_SECONDS = 0.1  # a hang is seen at once, and HANG_SECONDS=2 is many beats

if __name__ == "__main__":
    app.main()
