"""Pull workers that end as `kill -9` ends them, just before the n-th of their operations on files.

As a program: it has imported app once, and forks a worker for each line that it reads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec  # noqa: E402  (after the path)

import app  # noqa: E402  (the same)

EVENTS = {"open", "os.rename", "os.link", "os.symlink", "os.remove", "os.mkdir", "os.truncate", "os.rmdir"}
NEVER = 1 << 30


class Wish(msgspec.Struct):
    """An order for a worker, and before which of its operations it is killed (0: before none)."""

    order: app.Fetch
    number: int


class Crashing:
    """The program, from the side of a test; a context."""

    def __enter__(self) -> Crashing:
        pipe = subprocess.PIPE
        self._program = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._program.communicate(timeout=30)

    def run(self, order: app.Fetch, number: int) -> str:
        """Run a worker that is killed before its operation of this number: `killed` or `done`."""
        assert self._program.stdin and self._program.stdout
        self._program.stdin.write(msgspec.json.encode(Wish(order, number)) + b"\n")
        self._program.stdin.flush()
        end = int(self._program.stdout.readline())
        assert end in (0, -signal.SIGKILL), end
        return "killed" if end else "done"


class Countdown:
    """Counts operations on files below a folder, and ends this process before one of them."""

    def __init__(self, number: int, folder: str) -> None:
        self._left, self._folder = number or NEVER, folder
        self._lock = threading.Lock()

    def step(self) -> None:
        """One operation is about to happen."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit event of the interpreter."""
        if event in EVENTS and any(self._folder in str(argument) for argument in arguments):
            self.step()


def work(wish: Wish) -> None:
    """Be a worker, with small segments and writes that can break in their middle."""
    countdown, write = Countdown(wish.number, wish.order.folder), app.Partial.write

    def counted(partial: app.Partial, offset: int, data: bytes) -> None:
        write(partial, offset, data[: len(data) // 2])
        countdown.step()
        write(partial, offset, data)

    vars(app)["SEGMENT_BYTES"] = 4096
    setattr(app.Partial, "write", counted)  # noqa: B010  (mypy knows better names for this than ruff)
    sys.addaudithook(countdown.hear)
    app.Download(wish.order, lambda _: None).run()


def main() -> None:
    """Fork a worker for each line, and print how it ended."""
    for line in sys.stdin.buffer:
        child = os.fork()
        if child == 0:
            work(msgspec.json.decode(line, type=Wish))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
