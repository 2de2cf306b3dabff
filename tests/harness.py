"""A real server process on a free port with state of its own, and the few requests that most tests make."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parent.parent
VLLM_ENVIRONMENT = ROOT / ".venv-vllm"  # made by scripts/install.sh --vllm
Json = dict[str, Any]


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def vllm_python() -> Path | None:
    """An interpreter with vLLM: $ENGINE_PYTHON_VLLM, or the one that scripts/install.sh made; None without either."""
    if chosen := os.environ.get("ENGINE_PYTHON_VLLM"):
        return Path(chosen)
    installed = (VLLM_ENVIRONMENT / ".installed-vllm").exists()
    return VLLM_ENVIRONMENT / "bin" / "python" if installed else None


def why_no_vllm() -> str:
    """Why the tests of vLLM are skipped, in the words of scripts/install.sh."""
    reason = VLLM_ENVIRONMENT / "why-not.txt"
    return f"no vLLM here: {reason.read_text().strip()}" if reason.exists() else "no vLLM: scripts/install.sh --vllm"


def wait_until(condition: Callable[[], Any], seconds: float = 30, what: str = "the condition") -> Any:
    """Poll until `condition` is true and return its value; fails the test with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} was not met within {seconds} s")
        time.sleep(0.01)
    return value


class Server:
    """`python app.py` (or the fake-engine variant) as a child of the test."""

    def __init__(
        self, folder: Path, *arguments: str, fake: bool = False, runner: str = "python", **settings: str
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = folder / "app.log"
        self._program = ROOT / ("tests/fakeserver.py" if fake else "app.py")
        self._command = [sys.executable, str(self._program), *arguments]
        if runner == "uvicorn":
            self._command = [sys.executable, "-m", "uvicorn", "app:app", "--port", str(self.port)]
        self._environment = {
            **os.environ,
            "STATE_DIR": str(folder / "state"),
            "LOG_FILE": str(self.log_file),
            "PORT": str(self.port),
            "HF_HUB_DISABLE_XET": "1",
            "PULL_TRIES": "3",
            "ENGINE_PYTHON_VLLM": str(folder / "no-vllm"),  # only a test that asks for vLLM gets it, on GPUs too
            "STANDBY_ENGINES": "",  # nor a process that only waits: the machine may have two cores
            **settings,
        }
        self.client = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()
        self.client.close()

    def start(self, ready: bool = True) -> None:
        """Start the process; with `ready`, wait until it takes requests."""
        self.output = (self.folder / "output.txt").open("ab")
        self.process = subprocess.Popen(
            self._command,
            env=self._environment, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output, cwd=ROOT,
        )  # fmt: skip
        if not ready:
            return
        try:
            wait_until(self.ready, what=f"readiness ({self.folder / 'output.txt'})")
        except BaseException:
            self.kill()  # nobody else will: a context that was not entered is not left
            raise

    def ready(self) -> bool:
        """Whether requests are welcome."""
        assert self.process.poll() is None, (self.folder / "output.txt").read_text()
        try:
            return self.client.get("/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int:
        """End the process in good order; returns its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            self.output.close()
        return status

    def kill(self) -> None:
        """End the process as `kill -9` does."""
        self.process.kill()
        self.process.wait()
        self.output.close()

    def children(self) -> list[psutil.Process]:
        """The engine and worker processes of the server."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def log(self) -> str:
        """What the server logged so far."""
        return self.log_file.read_text(encoding="utf-8")

    # -- requests ---------------------------------------------------------

    def pull(self, model: str, **fields: Any) -> Json:
        """Pull a model and wait for the job's end; returns the job."""
        response = self.client.post("/pull", json={"model": model, **fields})
        assert response.status_code in (200, 202), response.text
        return self.finished(response.json()["id"])

    def finished(self, job_id: str) -> Json:
        """The job once it is at its end."""

        def ended() -> Json | None:
            job: Json = self.client.get(f"/jobs/{job_id}").json()
            return job if job["status"] in ("succeeded", "failed", "cancelled") else None

        result: Json = wait_until(ended, 120, f"the end of {job_id}")
        return result

    def have(self, model: str, **fields: Any) -> None:
        """Make sure that a model is on disk."""
        if self.client.get(f"/models/{model}").status_code != 200:
            job = self.pull(model, **fields)
            assert job["status"] == "succeeded", job

    def chat(self, model: str, text: str = "What is the capital of France?", **fields: Any) -> httpx.Response:
        """One whole reply."""
        messages = [{"role": "user", "content": text}]
        return self.client.post("/chat", json={"model": model, "messages": messages, "stream": False, **fields})

    def answer(self, model: str, text: str = "What is the capital of France?", **fields: Any) -> str:
        """The text of one whole reply that must succeed."""
        response = self.chat(model, text, **fields)
        assert response.status_code == 200, response.text
        content: str = response.json()["message"]["content"]
        return content

    @contextmanager
    def streaming(self, model: str, text: str = "What is the capital of France?", **fields: Any) -> Iterator["Lines"]:
        """An open stream; leaving the context closes the connection."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        with self.client.stream("POST", "/chat", json=body) as response:
            yield Lines(response)

    def stream(self, model: str, text: str = "What is the capital of France?", **fields: Any) -> list[Json]:
        """All lines of one stream."""
        with self.streaming(model, text, **fields) as lines:
            assert lines.response.status_code == 200, lines.response.read()
            return list(lines)


class Lines:
    """The lines of a stream, decoded one by one as they come."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[Json]:
        return self

    def __next__(self) -> Json:
        value: Json = json.loads(next(self._lines))
        return value


def text_of(lines: list[Json]) -> str:
    """The text of a native stream."""
    return "".join(line["message"]["content"] for line in lines)
