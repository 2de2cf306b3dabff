"""The two servers of the GPU benchmark, each in a session of its own, and what can be read of them from outside."""

import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import psutil
import pynvml
from gpu_client import CONTENT, COUNTED, PROMPT_COUNTED
from processes import OWN_SETTINGS, free_port

T = TypeVar("T")
Json = dict[str, Any]
Flags = dict[str, str | int | float | bool]
READY_SECONDS = 90.0  # the limit of each wait
LOAD_SECONDS = 420.0
ANSWER_SECONDS = 180.0
STANDBY_BEGINS_SECONDS = 5.0
STANDBY_SECONDS = 90.0
STOP_SECONDS = 45.0
MEMORY_SECONDS = 10.0
POLL_SECONDS = 0.02
MEBIBYTE = 1024 * 1024
PACKAGE = "bench_models"


class Refused(RuntimeError):
    """A server answered with another status than 200 or 202."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"status {status}: {text[:600]}")
        self.status = status


@dataclass(frozen=True)
class Options:
    """What the command line says about servers."""

    out: Path
    models: Path
    program: str
    peer_module: str
    peer_arguments: tuple[str, ...]
    utilization: float
    kv_gib: float
    flags: Flags
    peer_stats: bool = False

    def flags_of(self, model: str) -> Flags:
        """The settings of vLLM that both servers get for a model."""
        kv_gib = self.kv_gib or KV_GIB.get(model.rstrip("2"), 4)
        fixed: Flags = {
            "max_model_len": 8192,
            "max_num_seqs": 512,
            "kv_cache_memory_bytes": int(kv_gib * 1024**3),
            "gpu_memory_utilization": self.utilization,
        }
        return fixed | self.flags


PEER_WITH_STATISTICS = "peer, statistics on"
KV_GIB: dict[str, float] = {"l8b": 40, "q05": 8, "tiny": 0.25, "real": 4}


# ---------------------------------------------------------------- what can be read from outside
def gpu_names() -> list[str]:
    """The names of the GPUs; empty without one."""
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    except pynvml.NVMLError:
        return []


def gpu_used() -> int | None:
    """Bytes in use on all GPUs, whoever uses them; None without one."""
    if not gpu_names():
        return None
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return sum(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used) for handle in handles)


def gpu_driver() -> str:
    """The driver's version."""
    return str(pynvml.nvmlSystemGetDriverVersion()) if gpu_names() else "none"


def used_when_settled(before: int | None) -> tuple[int | None, float]:
    """Memory in use once it is back to what it was, or after a while; and how long that took."""
    began = time.monotonic()
    while time.monotonic() - began < MEMORY_SECONDS:
        used = gpu_used()
        if used is None or before is None or used <= before + 64 * MEBIBYTE:
            break
        time.sleep(0.1)
    return gpu_used(), time.monotonic() - began


def processor_seconds(process: psutil.Process) -> float:
    """What a process has used so far."""
    with suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


def wait_for(what: str, limit: float, look: Callable[[], T | None], alive: Callable[[], None]) -> T:
    """Poll until there is something. Raises TimeoutError, or what `alive` raises."""
    deadline = time.monotonic() + limit
    while (found := look()) is None:
        alive()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: nothing after {limit:.0f} s")
        time.sleep(POLL_SECONDS)
    return found


# ---------------------------------------------------------------- one streamed answer
@dataclass
class Answer:
    """A streamed answer to one client."""

    first_seconds: float = -1.0
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def text(self) -> str:
        """All pieces of text, put together; both servers' events are JSON, one a line."""
        lines = [line.removeprefix(b"data: ") for line in self.body.splitlines()]
        events = [json.loads(line) for line in lines if line.startswith(b"{")]
        choices = [
            event["choices"][0]["delta"] if event.get("choices") else event.get("message", {}) for event in events
        ]
        return "".join(choice.get("content") or "" for choice in choices)

    @property
    def tokens(self) -> int:
        """Tokens of the answer, as the server counts them."""
        found = COUNTED.findall(self.body)
        return int(found[-1]) if found else 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, as the server counts them."""
        found = PROMPT_COUNTED.findall(self.body)
        return int(found[-1]) if found else 0


def streamed(port: int, path: str, body: str, limit: float = ANSWER_SECONDS) -> Answer:
    """Ask once, noting when the first text comes. Raises Refused."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit)
    answer, began = Answer(), time.monotonic()
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        while data := response.read1(65536):
            answer.body += data
            if answer.first_seconds < 0 and CONTENT.search(answer.body):
                answer.first_seconds = time.monotonic() - began
    finally:
        connection.close()
    if response.status != 200 or answer.first_seconds < 0 or not answer.tokens:
        raise Refused(response.status, answer.body.decode(errors="replace"))
    answer.seconds = time.monotonic() - began
    answer.headers = {name.lower(): value for name, value in response.getheaders()}
    return answer


# ---------------------------------------------------------------- servers
class Server:
    """A server process; leaving the `with` block ends it and everything it started."""

    side: ClassVar[str]
    path: ClassVar[str]

    def __init__(self, options: Options, model: str, label: str) -> None:
        self.options = options
        self.model = model
        self.label = label
        self.log = options.out / f"{self.side}-{label}.log"
        self.port = free_port()
        self.gpu_before: int | None = None
        self.stop_seconds = 0.0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- what differs
    @property
    def recorded(self) -> str:
        """What the results call it."""
        return self.side

    def command(self) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """What is set beside the inherited environment."""
        raise NotImplementedError

    def is_ready(self) -> bool | None:
        """True when it takes requests."""
        raise NotImplementedError

    def body(self, prompt: str, tokens: int) -> Json:
        """The body of one request."""
        raise NotImplementedError

    def role(self, process: psutil.Process, depth: int) -> str:
        """What a process of the tree does."""
        raise NotImplementedError

    # -- life
    def start(self) -> None:
        """Start the process and wait until it takes requests; one that does not is ended."""
        kept = {name: value for name, value in os.environ.items() if name not in OWN_SETTINGS}
        self.gpu_before = gpu_used()
        self.began = time.monotonic()
        with self.log.open("ab") as log:
            log.write(f"\n==== {' '.join(self.command())}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                self.command(),
                env=kept | self.environment(), cwd=self.options.out, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            limit = READY_SECONDS if self.side == "ours" else LOAD_SECONDS
            wait_for(f"{self.side} ready", limit, self.is_ready, self.check_alive)
        except BaseException:
            self.stop()
            raise
        self.ready_seconds = time.monotonic() - self.began

    def check_alive(self) -> None:
        """Raises RuntimeError when the process has ended."""
        if self.process.poll() is not None:
            raise RuntimeError(f"{self.side}: the server ended with status {self.process.returncode}")

    def stop(self) -> None:
        """Ask the server to end, insist after a while, and end what it left behind."""
        began, members = time.monotonic(), [process for process, _ in self.tree()]
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stop_seconds = time.monotonic() - began
        _, left = psutil.wait_procs([each for each in members if each.pid != self.process.pid], timeout=5)
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def log_tail(self, lines: int = 25) -> str:
        """The end of what it printed since its last start."""
        with suppress(OSError):
            printed = self.log.read_text(errors="replace").rpartition("\n==== ")[2]
            return "\n".join(printed.splitlines()[-lines:])[-4000:]
        return ""

    # -- requests
    def call(self, method: str, path: str, body: Any = None, limit: float = ANSWER_SECONDS) -> Any:
        """One plain request. Raises Refused."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=limit)
        try:
            payload = None if body is None else json.dumps(body)
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        finally:
            connection.close()
        if response.status not in (200, 202):
            raise Refused(response.status, text)
        return json.loads(text) if text else None

    def answers(self, path: str) -> bool | None:
        """True when a GET is answered with 200, None otherwise: for `wait_for`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        with suppress(OSError, http.client.HTTPException):
            connection.request("GET", path)
            return connection.getresponse().status == 200 or None
        return None

    def ask(self, prompt: str, tokens: int, model: str = "", limit: float = ANSWER_SECONDS) -> Answer:
        """One streamed answer."""
        body = self.body(prompt, tokens) | ({"model": model} if model else {})
        return streamed(self.port, self.path, json.dumps(body), limit)

    # -- its processes
    def tree(self) -> list[tuple[psutil.Process, int]]:
        """Every process of the server, with its distance from the first."""
        with suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            depths = {root.pid: 0}
            for each in root.children(recursive=True):
                with suppress(psutil.Error):
                    depths[each.pid] = depths.get(each.ppid(), 0) + 1
            return [(psutil.Process(pid), depth) for pid, depth in depths.items() if psutil.pid_exists(pid)]
        return []

    def processor_readings(self) -> dict[int, tuple[str, float]]:
        """Role and processor seconds so far of every process."""
        readings = {}
        for process, depth in self.tree():
            with suppress(psutil.Error):
                readings[process.pid] = (self.role(process, depth), processor_seconds(process))
        return readings

    def resident_bytes(self) -> int:
        """Resident memory of all its processes."""
        total = 0
        for process, _ in self.tree():
            with suppress(psutil.Error):
                total += process.memory_info().rss
        return total


def engine_core(process: psutil.Process) -> bool:
    """Whether this is the process where vLLM schedules and computes; it names itself so."""
    return "EngineCore" in " ".join([process.name(), *process.cmdline()])


def is_tracker(process: psutil.Process) -> bool:
    """Python's own helper of multiprocessing."""
    return "resource_tracker" in " ".join(process.cmdline())


class OurServer(Server):
    """`python app.py`, with a catalogue that knows the models of the benchmark; it can be started again."""

    side = "ours"
    path = "/chat"

    def __init__(self, options: Options, model: str, label: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(options, model, label)
        self.known = False  # whether a model was pulled: a restart finds it again
        self._state = tempfile.TemporaryDirectory(prefix="ai-server-gpu-")
        self.catalogue = options.out / f"catalogue-{label}.toml"
        self.catalogue.write_text("\n".join(self.entry(name) for name in names or (model,)))

    def entry(self, name: str) -> str:
        """One entry of the catalogue: where the files are, and the settings of vLLM for them."""
        flags = self.options.flags_of(name)
        values = "".join(f"{key} = {json.dumps(value)}\n" for key, value in flags.items())
        return f'[models."{name}"]\npackage = "{PACKAGE}"\nfolder = "{name}"\n\n[models."{name}".vllm]\n{values}'

    def command(self) -> list[str]:
        """The server of this repository, or a stand-in."""
        return [sys.executable, self.options.program]

    def environment(self) -> dict[str, str]:
        """A state of its own, one place for models, and no limit that a benchmark would meet."""
        paths = [str(self.options.models), os.environ.get("PYTHONPATH", "")]
        return {
            "HOST": "127.0.0.1",
            "PORT": str(self.port),
            "STATE_DIR": self._state.name,
            "HF_HOME": f"{self._state.name}/hub",
            "LOG_FILE": f"{self._state.name}/app.log",
            "LOG_LEVEL": os.environ.get("LOG_LEVEL", "DEBUG"),
            "MODELS_FILE": str(self.catalogue),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "MAX_CACHE_MODELS": "1",
            "KEEP_ALIVE": "-1",
            "MAX_QUEUE": "4096",
            "MODEL_LOAD_COOLDOWN": "0",
            "LOAD_TIMEOUT": str(int(LOAD_SECONDS)),
        }

    def is_ready(self) -> bool | None:
        """The server alone; models come later."""
        return self.answers("/health/ready")

    def body(self, prompt: str, tokens: int) -> Json:
        """One request in the native form."""
        options = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return {"model": self.model, "prompt": prompt, "stream": True, "options": options}

    def role(self, process: psutil.Process, depth: int) -> str:
        """The server, the child that holds an engine, and what that has started."""
        if depth == 0:
            return "server"
        if is_tracker(process):
            return "helper"
        return "engine core" if engine_core(process) or depth > 1 else "child"

    def pull(self, name: str, quantize: str = "none") -> None:
        """Make a model known. Raises RuntimeError with the job's error."""
        job = self.call("POST", "/pull", {"model": name, "quantize": quantize})

        def ended() -> Json | None:
            found: Json = self.call("GET", f"/jobs/{job['id']}")
            return found if found["status"] not in ("queued", "running") else None

        last = wait_for(f"the pull of {name}", ANSWER_SECONDS, ended, self.check_alive)
        if last["status"] != "succeeded":
            raise RuntimeError(f"the pull of {name} {last['status']}: {last['error']}")
        self.known = True

    def load(self, name: str = "") -> Json:
        """Load a model and return its description."""
        described: Json = self.call("POST", f"/models/{name or self.model}/load", limit=LOAD_SECONDS)
        return described

    def standby(self) -> str:
        """What the server says of a child that waits for a model to load; empty when it says nothing."""
        return str((self.call("GET", "/diag").get("standbys") or {}).get("vllm", ""))

    def wait_for_standby(self) -> str:
        """Wait until the child in waiting is ready, if this server has such; returns the last state."""
        with suppress(TimeoutError):
            wait_for("standby", STANDBY_BEGINS_SECONDS, lambda: self.standby() or None, self.check_alive)
            wait_for("standby", STANDBY_SECONDS, lambda: self.standby() == "ready" or None, self.check_alive)
        return self.standby()


class PeerServer(Server):
    """vLLM's own server with the same settings."""

    side = "peer"
    path = "/v1/chat/completions"

    @property
    def recorded(self) -> str:
        """Ours never keeps vLLM's statistics; a peer that does is another peer."""
        return PEER_WITH_STATISTICS if self.options.peer_stats else self.side

    def command(self) -> list[str]:
        """The module, so that it works where the console script is missing."""
        python = os.environ.get("ENGINE_PYTHON_VLLM") or sys.executable
        flags = self.options.flags_of(self.model)
        if gpu_names():
            flags = {"enable_sleep_mode": True} | flags  # as ours has it there
        folder = str(self.options.models / PACKAGE / self.model)
        fixed = ["--model", folder, "--served-model-name", self.model, "--host", "127.0.0.1", "--port", str(self.port)]
        quiet = ["--disable-uvicorn-access-log"]  # ours has neither this log nor vLLM's statistics
        if not self.options.peer_stats:
            quiet.append("--disable-log-stats")
        return [python, "-m", self.options.peer_module, *fixed, *quiet, *arguments(flags), *self.options.peer_arguments]

    def environment(self) -> dict[str, str]:
        """Nothing of its own."""
        return {}

    def is_ready(self) -> bool | None:
        """Ready means loaded."""
        return self.answers("/health")

    def body(self, prompt: str, tokens: int) -> Json:
        """One request in OpenAI's form."""
        counted = {"stream": True, "stream_options": {"include_usage": True}}
        sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        return {"model": self.model, "messages": [{"role": "user", "content": prompt}], **counted, **sampling}

    def role(self, process: psutil.Process, depth: int) -> str:
        """The API server and the engine core."""
        if depth == 0:
            return "server"
        return "engine core" if engine_core(process) or not is_tracker(process) else "helper"


def arguments(flags: Flags) -> list[str]:
    """Settings in the form of the command line: `--max-model-len 8192`, `--enable-x`, `--no-enable-x`."""
    words: list[str] = []
    for name, value in flags.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words
