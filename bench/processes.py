"""The processes of a measurement: our server, the peer, the load client and a busy neighbour."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlsplit

import psutil
from load_client import Order, Result

ROOT = Path(__file__).resolve().parent.parent
MODEL = "smollm2:135m"
# Settings that would make two machines' figures differ for no reason of the machine's.
OWN_SETTINGS = ("ENGINE_THREADS", "MAX_CONTEXT_LENGTH", "MAX_PARALLEL", "MODELS_FILE", "LOG_LEVEL", "LOG_FORMAT")


class Child:
    """A process that ends with the `with` block.

    It gets a session of its own, as separate programs have: Linux divides a core between sessions before it divides a
    session's part between processes (autogroup), so a neighbour and a server in one session would compete otherwise.
    """

    def __init__(self, command: list[str], environment: dict[str, str] | None = None, **rest: Any) -> None:
        kept = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command, env=kept | (environment or {}), cwd=ROOT, text=True, start_new_session=True, **rest
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ask the process to end, insist after a while, and wait for it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Talker(Child):
    """A process of ours that speaks in JSON lines."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, str(ROOT / "bench" / script), *arguments]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(self) -> Any:
        """The next line. Raises RuntimeError when the process ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with status {self.process.wait()}")
        return json.loads(line)

    def write(self, value: Any) -> None:
        """Send one line."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()


class LoadClient(Talker):
    """The client process; both sides of every comparison are asked by the same one."""

    def __init__(self) -> None:
        super().__init__("load_client.py")

    def carry_out(self, order: Order) -> Result:
        """Send one order and wait for its result."""
        self.write(order)
        return cast(Result, self.read())


class OurServer(Child):
    """`python app.py` on a port and a state directory of its own."""

    name = "through ai-server"

    def __init__(self, **settings: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="ai-server-bench-")
        self.port = free_port()
        environment = {"HOST": "127.0.0.1", "PORT": str(self.port), "KEEP_ALIVE": "-1", **scratch(self._directory.name)}
        environment |= settings
        super().__init__([sys.executable, "app.py"], environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.ready_seconds = self._wait_until_ready()

    def close(self) -> None:
        """End the server and remove what it wrote."""
        super().close()
        self._directory.cleanup()

    def _wait_until_ready(self) -> float:
        """Seconds from the start of the process to the first 200 of /health/ready."""
        deadline = self.began + 60
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"app.py ended with status {self.process.returncode}")
            if answers_200(self.port, "/health/ready"):
                return time.monotonic() - self.began
            time.sleep(0.003)
        raise RuntimeError("app.py was not ready after 60 s")

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """One plain request to the server, outside of what is measured."""
        payload = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", payload, method=method)
        with urllib.request.urlopen(request, timeout=120) as response:
            return json.load(response)

    def pull(self) -> Any:
        """Pull and load the model; returns its entry of /models."""
        self.finish(self.call("POST", "/pull", {"model": MODEL, "init": True}))
        return self.call("GET", f"/models/{MODEL}")

    def finish(self, job: Any) -> Any:
        """Wait for a job's end, and return it as it is then."""
        while job["status"] in ("queued", "running"):
            time.sleep(0.02)
            job = self.call("GET", f"/jobs/{job['id']}")
        if job["status"] != "succeeded":
            raise RuntimeError(f"the pull of {job['model']} ended as {job['status']}: {job['error']}")
        return job

    @property
    def engine_pid(self) -> int:
        """The child process that computes."""
        return int(self.call("GET", f"/models/{MODEL}")["pid"])

    def resident_bytes(self) -> int:
        """Resident memory of the server process alone."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def order(self, prompts: list[str], tokens: int) -> Order:
        """The load client's order for `prompts`."""
        bodies = [{"model": MODEL, **question(prompt), **sampling(tokens)} for prompt in prompts]
        return make_order(f"http://127.0.0.1:{self.port}", "/chat", {}, bodies)


class Peer(Talker):
    """The xllamacpp server without us, see peer_server.py."""

    def __init__(self, entry: Any, threads: str) -> None:
        self.name = "llama.cpp directly" if threads == "same" else "llama.cpp directly, all cores"
        super().__init__("peer_server.py", MODEL, entry["local_path"], str(entry["context_length"]), threads)
        started = self.read()
        self._address, self._key = started["address"], started["key"]

    @property
    def engine_pid(self) -> int:
        """The process that computes."""
        return self.process.pid

    def order(self, prompts: list[str], tokens: int) -> Order:
        """The load client's order for `prompts`."""
        bodies = [{**question(prompt), **sampling(tokens), "stream": True} for prompt in prompts]
        return make_order(self._address, "/v1/chat/completions", {"Authorization": f"Bearer {self._key}"}, bodies)


class Neighbour(Child):
    """Another program that wants one whole core; asleep until it is woken."""

    LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    for _ in range(10**6): pass"

    def __init__(self) -> None:
        super().__init__([sys.executable, "-c", self.LOOP])
        os.sched_setaffinity(self.process.pid, {max(os.sched_getaffinity(0))})
        self.sleep()

    def sleep(self) -> None:
        """Want nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Want the core."""
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """A stopped process cannot end: wake it first."""
        self.process.kill()
        super().close()


Side = OurServer | Peer


def question(prompt: str) -> dict[str, Any]:
    """The messages of one prompt; the empty system message is what the catalogue gives this model."""
    return {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": prompt}]}


def sampling(tokens: int) -> dict[str, Any]:
    """The same sampling on both sides: greedy, with every option said, so that no default can differ."""
    return {"max_tokens": tokens, "temperature": 0, "top_k": 40, "top_p": 0.9, "min_p": 0.0}


def make_order(address: str, path: str, headers: dict[str, str], bodies: list[dict[str, Any]]) -> Order:
    """An order that stays to the end."""
    url = urlsplit(address)
    assert url.hostname is not None and url.port is not None
    return {
        "host": url.hostname,
        "port": url.port,
        "path": path,
        "headers": headers,
        "bodies": bodies,
        "leave_after": 0,
        "seconds": 0,
    }


def scratch(directory: str) -> dict[str, str]:
    """Settings that keep a server's files in one directory."""
    return {"STATE_DIR": directory, "HF_HOME": f"{directory}/hub", "LOG_FILE": f"{directory}/app.log"}


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers_200(port: int, path: str) -> bool:
    """Whether a GET is answered with 200 now."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False
