"""The server with engines that do what the prompt or the model's name says: faults on command, in real processes.

Prompts: `count N` gives N words; `slow N` gives N words, each after a hundredth of a second; `crash N` ends the process
after N words; `raise` raises inside the engine; `hang` never answers after its first word; `silent N` ends
after N words without saying that it is done.
Models: fake/fails refuses to load, fake/slow loads when the file $STATE_DIR/go exists, fake/dies ends while loading,
fake/memory reports that memory ran out, fake/hangs never becomes ready.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import app  # noqa: E402  (after the path)

CONTEXT_LENGTH = 512
COUNTER = Path(os.environ["STATE_DIR"]) / "counter"


def note(what: str) -> None:
    """Write down that something happened in an engine, where a test can read it."""
    with (COUNTER.parent / "events.txt").open("a") as file:
        file.write(what + "\n")


class FakeEngine:
    """An engine without a model."""

    async def load(self, spec: app.EngineSpec) -> app.EngineInfo:
        """Load, fail, die or hang, as the model's name says."""
        note(f"load {spec.model} {spec.backend}")
        match spec.model:
            case "fake/fails":
                raise RuntimeError("cannot be loaded, on purpose")
            case "fake/memory":
                raise MemoryError("on purpose")
            case "fake/dies":
                os._exit(7)
            case "fake/hangs":
                await asyncio.Event().wait()
            case "fake/slow":
                while not (COUNTER.parent / "go").exists():  # noqa: ASYNC110  (the test is another process)
                    await asyncio.sleep(0.01)
        options = tuple(name for name in app.Sampling.__struct_fields__ if name != "typical_p")
        return app.EngineInfo(spec.quantization, CONTEXT_LENGTH, options)

    async def stream(self, request: app.ChatRequest) -> AsyncGenerator[app.Event, None]:
        """Answer as the last message says."""
        command, _, number = request.messages[-1].content.partition(" ")
        prompt_tokens = sum(len(message.content.split()) for message in request.messages)
        room = app.completion_room(prompt_tokens, CONTEXT_LENGTH, request.sampling)
        note(f"start {command}")
        words = 0
        try:
            yield app.Started(prompt_tokens)
            for word in range(min(room, int(number or 1))):
                yield app.Text(f"{word} ")
                words += 1
                await asyncio.sleep(0.01 if command == "slow" else 0)
            await self._end(command)
            if command == "silent":
                return
            yield app.Done("stop", prompt_tokens, words, 0.001, 0.001)
        finally:
            note(f"end {command} {words}")

    async def _end(self, command: str) -> None:
        match command:
            case "crash":
                await asyncio.sleep(0.05)  # the words before must be on their way
                os._exit(9)
            case "raise":
                raise RuntimeError("raised on purpose, with a /secret/path")
            case "hang":
                await asyncio.Event().wait()


for backend in app.ENGINES:
    app.ENGINES[backend] = FakeEngine
app.CHILD_PROGRAM = __file__
app.SHUTDOWN_GRACE_SECONDS = 2.0

if __name__ == "__main__":
    app.main()
