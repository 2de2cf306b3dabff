"""The command line against a server that answers as it is told, and at the end against a real one."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi.routing import APIRoute
from harness import ROOT, Server, free_port
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app
import client

Json = dict[str, Any]
JOB: Json = {"id": "job_1", "model": "org/model", "status": "running", "size_bytes": 2_000_000, "bytes_done": 500_000}
PLAN: Json = {
    "model": "org/model",
    "revision": "0123456789abcdef0123456789abcdef01234567",
    "license": "apache-2.0",
    "files": [
        {"name": "config.json", "size_bytes": 700, "cached_bytes": 700},
        {"name": "model.safetensors", "size_bytes": 1_503_300_328, "cached_bytes": 0},
    ],
    "download_bytes": 1_503_300_328,
    "cached_bytes": 700,
    "disk": {
        "free_bytes": 90_000_000_000, "free_after_bytes": 88_496_699_672, "reserve_bytes": 268_435_456, "fits": True,
    },
    "eta_seconds": 75.4,
    "context_length": 8192,
    "kv_bytes_per_1k_tokens": 114_688_000,
    "rungs": [
        {
            "backend": "vllm", "quantization": "none", "weights_bytes": 1_503_300_328, "kv_bytes": 939_524_096,
            "overhead_bytes": 700_000_000, "total_bytes": 3_142_824_424, "device": "cuda:0",
            "available_bytes": 2_000_000_000, "context_length": 8192, "fits": False, "reason": "1.1 GB short",
        },
        {"backend": "transformers", "quantization": "nf4", "total_bytes": 1_800_000_000, "device": "cpu", "fits": True},
    ],
    "serves": {"backend": "transformers", "quantization": "nf4", "context_length": 4096},
    "evicts": ["org/old", "org/older"],
    "reason": "vLLM does not fit.",
    "nearest": "org/model:Q4_K_M",
}  # fmt: skip


def sse(name: str, job: Json) -> bytes:
    """One event as the server sends it, with the comment that keeps lines open before it."""
    return b": keep-alive\n\n" + f"event: {name}\ndata: {json.dumps(job)}\n\n".encode()


class FakeServer(ThreadingHTTPServer):
    """Answers each request as it was told, and remembers what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[tuple[str, Any]] = []
        self.replies: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self.streams: defaultdict[str, list[list[bytes]]] = defaultdict(list)
        self.released = threading.Event()

    def answer(self, request: str, data: Any, status: int = 200, **headers: str) -> None:
        """Set the reply to a request such as `POST /pull`."""
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.replies[request] = (status, body, {name.replace("_", "-"): value for name, value in headers.items()})

    def job(self, request: str, *streams: list[bytes], status: int = 202, **headers: str) -> None:
        """Let a request start job_1, and each watcher get the next stream; `WAIT` in it holds until the end."""
        self.answer(request, {**JOB, "status": "queued"}, status, **headers)
        self.streams["/jobs/job_1/events"] = list(streams)


WAIT = b"WAIT"


class Handler(BaseHTTPRequestHandler):
    """One request to the fake server."""

    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Any request; what was not told is a 404 as the real server's."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append((f"{self.command} {self.path}", json.loads(body) if body else None))
        if self.path.endswith("/events"):
            return self._stream()
        missing: tuple[int, bytes, dict[str, str]] = (404, b'{"error": "Nothing here."}', {})
        return self._send(*self.server.replies.get(f"{self.command} {self.path}", missing))

    do_POST = do_DELETE = do_GET  # noqa: N815  (names that http.server looks for)

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.close_connection = True
        streams = self.server.streams[self.path]
        pieces = streams.pop(0) if streams else []
        if not pieces:
            return  # closed without a reply, as by a server that ends
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            if piece is WAIT:
                self.server.released.wait()
            else:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


class Result(NamedTuple):
    """What a command left behind."""

    code: Any
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    """A server that answers as it is told, where the command line looks for one."""
    with FakeServer() as server:
        monkeypatch.setenv("AI_SERVER_URL", server.url)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command in this process: its exit status and what it printed."""
    monkeypatch.setattr(client, "RECONNECT_SECONDS", 0.0)

    def command(*arguments: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            client.main(list(arguments))
        return Result(end.value.code, *capsys.readouterr())

    return command


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address where no server is."""
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AI_SERVER_URL", url)
    return url


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory that does not exist yet."""
    monkeypatch.setenv("STATE_DIR", str(tmp_path / "deep" / "state"))
    return tmp_path / "deep" / "state"


# -- the command itself -------------------------------------------------------


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the project's folder."""
    command, variables = [sys.executable, *arguments], {**os.environ, **environment}
    return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_without_arguments_it_prints_its_help(run: Run) -> None:
    """`ai-server` alone is no error: it lists what can be typed."""
    bare = run()
    assert (bare.code, bare.err) == (0, "")
    assert bare == run("--help")
    assert all(re.search(rf"^  {name} ", bare.out, re.MULTILINE) for name in commands())


def test_its_version_is_the_servers(run: Run) -> None:
    """Both come from one release."""
    assert run("--version") == (0, f"{app.__version__}\n", "")


def test_its_import_is_cheap() -> None:
    """Nothing that only some commands need is imported for all of them."""
    heavy = ["rich", "app", "fastapi", "uvicorn", "pydantic", "platformdirs", "msgspec", "httpx"]
    ended = python("-c", f"import client, sys; print([each for each in {heavy} if each in sys.modules])")
    assert (ended.stdout, ended.stderr) == ("[]\n", "")


def test_the_console_script_is_its_main() -> None:
    """What pip installs as `ai-server` exists, and both files are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    module, _, function = project["project"]["scripts"]["ai-server"].partition(":")
    assert getattr(sys.modules[module], function) is client.main
    assert {"app", module} <= set(project["tool"]["setuptools"]["py-modules"])


@pytest.mark.parametrize(
    "arguments", [["frob"], ["pull"], ["pull", "x", "--quantize", "8bit"], ["plan", "x", "--context", "0"]]
)
def test_a_command_that_makes_no_sense_ends_with_2(run: Run, nobody: str, arguments: list[str]) -> None:
    """And is refused before any server is asked."""
    ended = run(*arguments)
    assert ended.code == 2
    assert "Usage: ai-server" in ended.err


def commands() -> dict[str, list[str]]:
    """Every command and its options, as typer knows them."""
    import typer.main

    group: Any = typer.main.get_command(client.cli)
    return {
        name: [option for each in command.params for option in each.opts if option.startswith("--")]
        for name, command in group.commands.items()
    }


def test_every_command_and_option_is_documented() -> None:
    """docs/cli.md has a heading and an example for each command, and names each of its options there."""
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## `ai-server (\w+)[^\n]*\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert sections.keys() == commands().keys()
    for name, options in commands().items():
        assert re.search(rf"^\$ ai-server {name}\b", sections[name], re.MULTILINE), name
        assert [option for option in options if f"`{option}" not in sections[name]] == [], name


# -- the server's address, and what may come from there -----------------------


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, "http://127.0.0.1:8005"),
        ({"PORT": "9000"}, "http://127.0.0.1:9000"),
        ({"HOST": "0.0.0.0", "PORT": "1"}, "http://127.0.0.1:1"),
        ({"HOST": "::"}, "http://[::1]:8005"),
        ({"HOST": "box"}, "http://box:8005"),
        ({"AI_SERVER_URL": "https://box/ai/", "PORT": "9000"}, "https://box/ai"),
        ({"AI_SERVER_URL": " box:9000 "}, "http://box:9000"),
    ],
)
def test_where_the_server_is(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str) -> None:
    """AI_SERVER_URL, else the settings that the server itself reads."""
    for name in ("AI_SERVER_URL", "HOST", "PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert client.server_url() == url


@pytest.mark.parametrize(
    "url", ["ftp://box", "http://", "http://box:port", "http://box:99999", "file:///etc/passwd", "a b"]
)
def test_an_address_that_is_none(run: Run, monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """The message names the variable."""
    monkeypatch.setenv("AI_SERVER_URL", url)
    ended = run("jobs")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith("AI_SERVER_URL: ")


@pytest.mark.parametrize(
    "arguments", [["jobs"], ["pull", "x"], ["plan", "x"], ["verify", "x"], ["partials"], ["pause", "x"]]
)
def test_no_server_answers(run: Run, nobody: str, arguments: list[str]) -> None:
    """One line says where none is and how to start it."""
    ended = run(*arguments)
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith(f"No server answers at {nobody} ")
    assert "`ai-server serve`" in ended.err
    assert ended.err.count("\n") == 1


def test_a_proxy_is_not_asked_for_this_machine(run: Run, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the environment would look for 127.0.0.1 on itself."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    fake.answer("GET /jobs", {"jobs": []})
    assert run("jobs") == (0, "No jobs.\n", "")


def test_errors_of_the_server_are_printed_as_they_are(run: Run, fake: FakeServer) -> None:
    """With status 1, on stderr, and nothing else."""
    fake.answer("POST /pull", {"error": "The disk has [no] room: free 3 GB."}, 507)
    assert run("pull", "org/model") == (1, "", "The disk has [no] room: free 3 GB.\n")


@pytest.mark.parametrize(
    ("status", "body"), [(200, b"<html>"), (200, b"[]"), (502, b"Bad Gateway"), (500, b'{"error": 5}')]
)
def test_what_is_no_server_of_ours(run: Run, fake: FakeServer, status: int, body: bytes) -> None:
    """Something else at the address is said to be that."""
    fake.answer("GET /jobs", body, status)
    ended = run("jobs")
    assert (ended.code, ended.out) == (1, "")
    assert f"answered {status}" in ended.err
    assert "ai-server" in ended.err


def test_a_reply_that_breaks_off(run: Run, fake: FakeServer) -> None:
    """Half a body is no reply."""
    fake.answer("GET /jobs", b'{"jobs": []}', Content_Length="500", Connection="close")
    ended = run("jobs")
    assert (ended.code, ended.out) == (1, "")
    assert "No server answers" in ended.err


def test_control_characters_do_not_reach_the_terminal(run: Run, fake: FakeServer) -> None:
    """Names of files are chosen by strangers."""
    fake.answer("GET /jobs", {"jobs": [{**JOB, "model": "a\x1b]0;owned\x07b", "file": "\u202egpj.exe"}]})
    fake.answer("POST /pull", {"error": "bad \x1b[2J name"}, 400)
    listed, refused = run("jobs"), run("pull", "x")
    assert "a?]0;owned?b" in listed.out
    assert refused.err == "bad ?[2J name\n"
    assert "\x1b" not in listed.out + refused.err


# -- pull, and watching a job -------------------------------------------------


def ends(status: str = "succeeded", **fields: Any) -> list[bytes]:
    """A stream of a job that runs and ends."""
    return [sse("progress", JOB), sse("done", {**JOB, "status": status, "bytes_done": 2_000_000, **fields})]


def test_pull_waits_for_the_end(run: Run, fake: FakeServer) -> None:
    """It asks for the job, watches it and says what became of it."""
    fake.job("POST /pull", ends())
    ended = run("pull", "org/model")
    assert (ended.code, ended.out) == (0, "org/model is on disk.\n")
    assert fake.asked == [("POST /pull", {"model": "org/model"}), ("GET /jobs/job_1/events", None)]


def test_pull_joins_a_job(run: Run, fake: FakeServer) -> None:
    """200 is as good as 202."""
    fake.job("POST /pull", ends(), status=200)
    assert run("pull", "org/model").code == 0


OPTIONS: dict[tuple[str, ...], Json] = {
    ("--revision", "v2"): {"revision": "v2"},
    ("--quantize", "4bit"): {"quantize": "4bit"},
    ("--quantize", "auto"): {"quantize": "auto"},
    ("--trust-remote-code",): {"trust_remote_code": True},
    ("--allow-pickle",): {"allow_pickle": True},
    ("--make-room",): {"make_room": True},
    ("--pin",): {"pin": True},
    ("--init",): {"init": True},
}


@pytest.mark.parametrize("words", OPTIONS)
@pytest.mark.parametrize("command", ["pull", "plan"])
def test_options_become_fields(run: Run, fake: FakeServer, command: str, words: tuple[str, ...]) -> None:
    """Each option is one field of the body, and a field that nobody asked for is not sent."""
    fake.job("POST /pull", ends())
    fake.answer("POST /plan", {})
    assert run(command, "org/model", *words).code == 0
    assert fake.asked[0] == (f"POST /{command}", {"model": "org/model", **OPTIONS[words]})


def test_fields_that_the_server_ignores_are_named(run: Run, fake: FakeServer) -> None:
    """Nobody should believe in a pin that an older server has not made."""
    fake.job("POST /pull", ends(), X_Ignored_Parameters="pin")
    assert "ignores: pin." in run("pull", "org/model", "--pin").err


def test_pull_that_does_not_wait(run: Run, fake: FakeServer) -> None:
    """It prints the job's id, for other programs, and watches nothing."""
    fake.job("POST /pull", ends())
    assert run("pull", "org/model", "--no-wait") == (0, "job_1\n", "")
    assert len(fake.asked) == 1


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (
            ends("failed", error="The disk is full. Free 3 GB.", error_kind="disk_full"),
            "The disk is full. Free 3 GB.\n",
        ),
        (ends("failed"), "Job job_1 failed and does not say why; the log does.\n"),
        (ends("cancelled"), "Job job_1 was cancelled.\n"),
    ],
)
def test_pull_that_does_not_succeed(run: Run, fake: FakeServer, end: list[bytes], text: str) -> None:
    """It ends with 1 and the job's own reason on stderr."""
    fake.job("POST /pull", end)
    ended = run("pull", "org/model")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.endswith(text)


def test_a_job_outlives_its_server(run: Run, fake: FakeServer) -> None:
    """A stream that ends before the job does, or is refused, is asked for again."""
    fake.job("POST /pull", [sse("progress", JOB)], [], ends())
    ended = run("pull", "org/model")
    assert (ended.code, ended.out) == (0, "org/model is on disk.\n")
    assert [request for request, _ in fake.asked].count("GET /jobs/job_1/events") == 3


def test_patience_begins_anew_with_each_word(run: Run, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download of days may see many restarts of its server."""
    monkeypatch.setattr(client, "RECONNECT_TRIES", 2)
    fake.job("POST /pull", *[[sse("progress", JOB)] for _ in range(5)], ends())
    assert run("pull", "org/model").code == 0


def test_a_server_that_does_not_come_back(run: Run, fake: FakeServer) -> None:
    """After a while it is given up, and the job's id is told; the wait is announced once."""
    fake.job("POST /pull", [sse("progress", JOB)])
    ended = run("pull", "org/model")
    assert (ended.code, ended.out) == (1, "")
    assert "did not come back. Job job_1 goes on" in ended.err
    assert ended.err.count("Waiting for it; job job_1") == 1
    assert len(fake.asked) == 2 + client.RECONNECT_TRIES - 1


def test_a_job_that_is_gone_is_not_waited_for(run: Run, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the server while watching is an answer."""
    monkeypatch.setattr(Handler, "_stream", lambda self: self._send(404, b'{"error": "No job job_1."}', {}))
    fake.job("POST /pull")
    ended = run("pull", "org/model")
    assert ended.code == 1
    assert ended.err.endswith("No job job_1.\n")
    assert len(fake.asked) == 2


def test_ctrl_c_leaves_the_job_running(fake: FakeServer) -> None:
    """It says so with the job's id, and asks the server for nothing."""
    fake.job("POST /pull", [sse("progress", {**JOB, "file": "model.safetensors"}), WAIT])
    command = [sys.executable, str(ROOT / "client.py"), "pull", "org/model"]
    # A test run in the background has its children ignore the signal.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    pipes: Json = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": heard}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        for line in process.stderr:
            if "model.safetensors" in line:
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Job job_1 goes on in the server." in err
    assert err.endswith("ai-server cancel job_1.\n")
    assert [request for request, _ in fake.asked] == ["POST /pull", "GET /jobs/job_1/events"]


def test_a_log_gets_a_line_for_each_file(run: Run, fake: FakeServer) -> None:
    """Without a terminal there is no bar: a line for each file and each trouble, none for bytes alone."""
    states = [{**JOB, "file": "a"}, {**JOB, "file": "a", "bytes_done": 600_000}, {**JOB, "file": "b", "attempts": 2}]
    fake.job("POST /pull", [*(sse("progress", job) for job in states), *ends()[1:]])
    ended = run("pull", "org/model")
    assert ended.err.splitlines() == ["Job job_1: org/model", "org/model  a", "org/model  b · attempt 2"]


def test_a_terminal_gets_a_bar(run: Run, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bytes, speed, time left, the file, and what went wrong; brackets in names are no markup."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    last = {"file": "deep/[red]x.gguf", "speed": 250_000.0, "eta_seconds": 61, "attempts": 3, "waiting_for": 8.0}
    fake.job("POST /pull", [sse("progress", JOB), sse("done", {**JOB, **last, "status": "succeeded"})])
    ended = run("pull", "org/model")
    assert (ended.code, ended.out) == (0, "org/model is on disk.\n")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", ended.err)
    for text in (
        "org/model  [red]x.gguf",
        "500 kB of 2 MB",
        "250 kB/s",
        "1 min 01 s left",
        "next try in 8 s, attempt 3",
    ):
        assert text in plain


def test_a_bar_without_sizes(run: Run, fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that knows neither its size nor its file is shown all the same."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    bare = {"id": "job_1", "size_bytes": None, "bytes_done": "many", "speed": None}
    fake.job("POST /pull", [sse("progress", bare), sse("done", {**bare, "status": "succeeded"})])
    assert run("pull", "org/model").code == 0


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"status": "running", "attempts": 1}, ""),
        ({"status": "running", "attempts": 2, "waiting_for": None}, "attempt 2"),
        ({"status": "running", "waiting_for": "the network"}, "waiting for the network"),
        ({"status": "queued"}, "waits for its turn"),
        ({"status": "paused"}, "paused, go on with `ai-server resume job_1`"),
    ],
)
def test_what_keeps_a_job(fields: Json, text: str) -> None:
    """Tries, waits and pauses have words; a job that runs well has none."""
    assert client.trouble({"id": "job_1", **fields}) == text


# -- jobs, partials, verify ---------------------------------------------------


def test_jobs_are_listed(run: Run, fake: FakeServer) -> None:
    """One line each, in the server's order, with the reason of a failure."""
    failed = {**JOB, "id": "job_2", "status": "failed", "error": "gated [/]: ask for access first"}
    fake.answer("GET /jobs", {"jobs": [{**JOB, "eta_seconds": 3720}, failed, {"id": "job_3"}]})
    ended = run("jobs")
    assert (ended.code, ended.err) == (0, "")
    head, first, second, third = [re.split(r" {2,}", line.strip()) for line in ended.out.splitlines()]
    assert head == ["ID", "MODEL", "STATUS", "DONE", "SIZE", "LEFT", "NOTE"]
    assert first == ["job_1", "org/model", "running", "500 kB", "2 MB", "1 h 02 min", "-"]
    assert second[-1] == "gated [/]: ask for access first"
    assert third == ["job_3", "-", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("arguments", "request_line"),
    [(["jobs"], "GET /jobs"), (["plan", "x"], "POST /plan"), (["partials"], "GET /partials")],
)
def test_json_is_the_reply(run: Run, fake: FakeServer, arguments: list[str], request_line: str) -> None:
    """As the server sent it, with fields that this command line does not know."""
    reply = {"jobs": [{"id": "\x1b[2J \ud800 ü"}], "new": [1.5, None, True], "partials": "?"}
    fake.answer(request_line, reply)
    ended = run(*arguments, "--json")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out) == reply
    assert ended.out.isascii()


@pytest.mark.parametrize(
    ("command", "request_line", "status"),
    [
        ("pause", "POST /jobs/job_1/pause", "paused"),
        ("resume", "POST /jobs/job_1/resume", "running"),
        ("cancel", "DELETE /jobs/job_1", "cancelled"),
    ],
)
def test_a_job_is_told_what_to_do(run: Run, fake: FakeServer, command: str, request_line: str, status: str) -> None:
    """One request, and what the job is now."""
    fake.answer(request_line, {**JOB, "status": status})
    assert run(command, "job_1") == (0, f"job_1 (org/model) is {status}.\n", "")
    assert fake.asked == [(request_line, None)]


def test_an_id_is_one_part_of_the_path(run: Run, fake: FakeServer) -> None:
    """Whatever is typed, nothing but a job is asked for."""
    assert run("cancel", "../models/x?y\udcff") == (1, "", "Nothing here.\n")
    assert fake.asked == [("DELETE /jobs/..%2Fmodels%2Fx%3Fy%3F", None)]


def test_partials_are_listed(run: Run, fake: FakeServer) -> None:
    """One line each, and how much all of them hold."""
    each = {"repo": "org/model", "file": "0123456789abcdef" * 4, "bytes": 8_388_608, "job_id": None}
    fake.answer("GET /partials", {"partials": [each], "bytes": 8_388_608})
    ended = run("partials")
    assert (ended.code, ended.err) == (0, "")
    assert re.search(r"^org/model +0123456789abcdef +8\.39 MB +- +- *$", ended.out, re.MULTILINE)
    assert "8.39 MB in all" in ended.out
    fake.answer("GET /partials", {"partials": [], "bytes": 0})
    assert run("partials") == (0, "No partial downloads.\n", "")


def test_partials_are_cleaned(run: Run, fake: FakeServer) -> None:
    """By request only, and it says what that freed."""
    fake.answer("DELETE /partials", {"removed": 3, "bytes": 1_000_000_000})
    assert run("partials", "--clean") == (0, "Removed 3, 1 GB.\n", "")
    assert fake.asked == [("DELETE /partials", None)]


@pytest.mark.parametrize(
    ("repaired", "text"),
    [
        (["a.safetensors", "b.json"], "org/model is as it should be. Repaired: a.safetensors, b.json.\n"),
        ([], "org/model is as it should be.\n"),
        (None, "org/model is as it should be.\n"),
    ],
)
def test_verify_says_what_it_repaired(run: Run, fake: FakeServer, repaired: list[str] | None, text: str) -> None:
    """It follows the job as pull does; a name keeps its slash, tag and revision in the path."""
    request_line = "POST /models/org/model:Q4_K_M@v%201/verify"
    fake.job(request_line, ends(repaired=repaired))
    ended = run("verify", "org/model:Q4_K_M@v 1")
    assert (ended.code, ended.out) == (0, text)
    assert fake.asked == [(request_line, None), ("GET /jobs/job_1/events", None)]


# -- plan ---------------------------------------------------------------------


def test_plan_is_a_table(run: Run, fake: FakeServer) -> None:
    """Files, rungs and the conclusion, every number in words of people."""
    fake.answer("POST /plan", PLAN)
    ended = run("plan", "org/model", "--context", "8192")
    assert (ended.code, ended.err) == (0, "")
    assert fake.asked == [("POST /plan", {"model": "org/model", "context_length": 8192})]
    rows = [re.split(r" {2,}", line.strip()) for line in ended.out.splitlines()]
    assert rows[0] == [f"org/model {PLAN['revision']} apache-2.0"]
    assert ["model.safetensors", "1.5 GB", "0 B"] in rows
    assert ["vllm", "1.5 GB", "940 MB", "700 MB", "3.14 GB", "2 GB", "cuda:0", "8192", "no"] in rows
    assert ["transformers nf4", "-", "-", "-", "1.8 GB", "-", "cpu", "-", "yes"] in rows
    assert ["vllm: 1.1 GB short"] in rows
    assert dict(re.findall(r"^([A-Z]\w+): +(.*)$", ended.out, re.MULTILINE)) == {
        "Download": "1.5 GB, 700 B are here, about 1 min 15 s",
        "Disk": "90 GB free, 88.5 GB free afterwards, 268 MB are kept back",
        "Context": "8192 tokens, 115 MB per 1000 tokens",
        "Serves": "transformers, quantization nf4, context 4096",
        "Evicts": "org/old, org/older",
        "Reason": "vLLM does not fit.",
        "Nearest": "org/model:Q4_K_M",
    }


def test_plan_of_what_does_not_fit(run: Run, fake: FakeServer) -> None:
    """Neither disk nor memory: both are said."""
    fake.answer("POST /plan", {**PLAN, "serves": None, "disk": {**PLAN["disk"], "fits": False}})
    ended = run("plan", "org/model")
    assert "does NOT fit" in ended.out
    assert "nothing here serves it" in ended.out


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted({*PLAN, *PLAN["rungs"][0]})), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.fixed_dictionaries({}, optional={name: ANYTHING for name in [*PLAN, "id", "repaired", "attempts", "new"]})
)
def test_replies_of_any_shape_are_shown(capsys: pytest.CaptureFixture[str], data: Json) -> None:
    """A server of another version may leave out, add or change fields: what can be shown is."""
    client.show_plan(data)
    client.console().print(client.jobs_table([data]), client.partials_table([data]))
    with client._bar({"id": "job_1"}) as bar, client._changes({"id": "job_1"}) as changes:
        bar(data)
        changes(data)
    client.finish({**data, "status": "succeeded"}, "is on disk.")
    assert "Download:" in capsys.readouterr().out


# -- numbers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (16_060_522_240, "16.1 GB"),
        (5e15, "5e+03 TB"),
        (None, "-"),
        (True, "yes"),
        ("12", "12"),
    ],
)
def test_sizes(value: Any, text: str) -> None:
    """Three digits at most, and what is no number as it is."""
    assert client.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (90_000, "25 h 00 min"),
        (None, "-"),
        (float("inf"), "inf"),
    ],
)
def test_durations(value: Any, text: str) -> None:
    """The two largest units."""
    assert client.duration(value) == text


# -- import -------------------------------------------------------------------


def gguf(folder: Path) -> Path:
    """A file that begins as a GGUF file does."""
    path = folder / "model.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0")
    return path


def imported(state: Path) -> Json:
    """What is written down."""
    entries: Json = json.loads((state / "imports.json").read_bytes())
    return entries


def test_import_writes_a_name_down(
    run: Run, nobody: str, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path is absolute, the file is the owner's alone, and without a server it says how to go on."""
    gguf(tmp_path)
    monkeypatch.chdir(tmp_path)
    ended = run("import", "model.gguf", "--name", "mine/model:q4", "--license", "mit")
    assert (ended.code, ended.err) == (0, "")
    assert imported(state) == {"mine/model:q4": {"path": str(tmp_path / "model.gguf"), "license": "mit"}}
    assert (state / "imports.json").stat().st_mode & 0o777 == 0o600
    assert f"No server answers at {nobody}. When it runs: ai-server pull mine/model:q4" in ended.out


def test_import_starts_a_pull(run: Run, fake: FakeServer, state: Path, tmp_path: Path) -> None:
    """Where a server answers the model is ready for use at once; --no-pull leaves it alone."""
    fake.job("POST /pull", ends(model="mine"))
    assert run("import", str(gguf(tmp_path)), "--name", "mine", "--no-pull").code == 0
    assert fake.asked == []
    ended = run("import", str(gguf(tmp_path)), "--name", "mine")
    assert (ended.code, ended.out.splitlines()[-1]) == (0, "mine is on disk.")
    assert fake.asked[0] == ("POST /pull", {"model": "mine"})


def test_import_of_a_folder(run: Run, state: Path, tmp_path: Path) -> None:
    """A folder in the layout of transformers."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert run("import", str(tmp_path), "--name", "mine", "--no-pull").code == 0
    assert imported(state) == {"mine": {"path": str(tmp_path)}}


def test_imports_are_kept(run: Run, state: Path, tmp_path: Path) -> None:
    """A second name leaves the first alone; the same name is written anew; what a killed import left is no obstacle."""
    path = str(gguf(tmp_path))
    run("import", path, "--name", "a", "--no-pull")
    (state / "imports.json.new").write_text("half of")
    run("import", path, "--name", "b", "--no-pull")
    run("import", path, "--name", "a", "--license", "mit", "--no-pull")
    assert {name: entry.get("license") for name, entry in imported(state).items()} == {"a": "mit", "b": None}
    assert {file.name for file in state.iterdir()} == {"imports.json", "imports.lock"}


def test_imports_at_once(state: Path, tmp_path: Path) -> None:
    """None of them is forgotten."""
    path, words = gguf(tmp_path), [f"model{number}" for number in range(32)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: client.remember_import(path, name, None), words))
    assert sorted(imported(state)) == sorted(words)


@pytest.mark.parametrize(
    "name", ["", "a/b/c", "../x", "a..b", "a--b", "/x", "a b", "x\n", "а/б", "a:", "a:b:c", "x" * 97, "-x"]
)
def test_import_refuses_a_name(run: Run, state: Path, tmp_path: Path, name: str) -> None:
    """What no pull could ask for is not written down."""
    ended = run("import", str(gguf(tmp_path)), f"--name={name}", "--no-pull")
    assert (ended.code, ended.out) == (1, "")
    assert "is no name of a model" in ended.err
    assert not state.exists()


BAD_FOLDERS: dict[str, dict[str, bytes]] = {
    "has no config.json": {"model.safetensors": b""},
    "has no .safetensors file": {"config.json": b"{}", "pytorch_model.bin": b""},
    "is not a JSON object": {"config.json": b"\xff[", "model.safetensors": b""},
}


@pytest.mark.parametrize("text", BAD_FOLDERS)
def test_import_refuses_a_folder(run: Run, state: Path, tmp_path: Path, text: str) -> None:
    """A folder that cannot be a model is told what it lacks."""
    for name, data in BAD_FOLDERS[text].items():
        (tmp_path / name).write_bytes(data)
    ended = run("import", str(tmp_path), "--name", "mine", "--no-pull")
    assert (ended.code, ended.out) == (1, "")
    assert text in ended.err
    assert not state.exists()


def test_import_refuses_a_file(run: Run, state: Path, tmp_path: Path) -> None:
    """One that is not there, one that is something else, one that would never end."""
    other, pipe = tmp_path / "model.bin", tmp_path / "pipe"
    other.write_bytes(b"PK\x03\x04")
    os.mkfifo(pipe)
    for path, text in ((tmp_path / "none", "There is no file"), (other, "is no GGUF file"), (pipe, "There is no file")):
        ended = run("import", str(path), "--name", "mine", "--no-pull")
        assert (ended.code, ended.out) == (1, "")
        assert text in ended.err
    assert not state.exists()


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_a_damaged_list_of_imports_is_not_written_over(run: Run, state: Path, tmp_path: Path, text: str) -> None:
    """It may hold what somebody can still repair."""
    state.mkdir(parents=True)
    (state / "imports.json").write_text(text)
    ended = run("import", str(gguf(tmp_path)), "--name", "mine", "--no-pull")
    assert (ended.code, ended.out) == (1, "")
    assert "nothing was changed" in ended.err
    assert (state / "imports.json").read_text() == text


def test_an_import_that_cannot_be_written(
    run: Run, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk leaves the old list as it was, and says what to do."""
    run("import", str(gguf(tmp_path)), "--name", "a", "--no-pull")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ended = run("import", str(gguf(tmp_path)), "--name", "b", "--no-pull")
    assert (ended.code, ended.out) == (1, "")
    assert "No space left on device. Free the disk or set STATE_DIR." in ended.err
    assert list(imported(state)) == ["a"]


@pytest.mark.parametrize("chosen", ["", "relative/state", "~/state"])
def test_both_find_the_same_state(tmp_path: Path, chosen: str) -> None:
    """An import has to land where the server looks."""
    code = "import app, client; assert client.state_dir() == app.STATE_DIR, app.STATE_DIR; print(app.STATE_DIR)"
    ended = python("-c", code, STATE_DIR=chosen, HOME=str(tmp_path), LOG_FILE=str(tmp_path / "log"))
    assert ended.stderr == ""
    assert chosen in ended.stdout


# -- with the real server -----------------------------------------------------


def test_serve_passes_names_on(tmp_path: Path) -> None:
    """`--pull` is the server's own option; what the server says to it is the command's exit status."""
    environment = {"STATE_DIR": str(tmp_path), "PORT": str(free_port())}
    ended = python("client.py", "serve", "--pull", "smollm2:135m", "--pull", "a b", **environment)
    assert ended.returncode == 64
    assert ended.stderr.startswith("ai-server: --pull 'a b': invalid model name")


def test_serve_is_the_server(tmp_path: Path) -> None:
    """It answers, starts its children as app.py does, and a signal ends it with 0."""
    server = Server(tmp_path, "serve")
    server._command[1] = str(ROOT / "client.py")
    with server:
        assert server.client.get("/health/live").status_code == 200
        assert server.stop() == 0


def test_a_pull_of_the_real_server(run: Run, fake_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pull, list, and errors in the server's words."""
    monkeypatch.setenv("AI_SERVER_URL", fake_server.url)
    assert run("pull", "fake/a")[:2] == (0, "fake/a is on disk.\n")
    assert re.search(r"^job_\w+ +fake/a +succeeded ", run("jobs").out, re.MULTILINE)
    missing = run("pull", "no-such-name:tag")
    assert (missing.code, missing.out) == (1, "")
    assert missing.err == fake_server.client.post("/pull", json={"model": "no-such-name:tag"}).json()["error"] + "\n"
    assert run("cancel", "job_0").err == fake_server.client.get("/jobs/job_0").json()["error"] + "\n"


@pytest.mark.skipif(
    not any(isinstance(route, APIRoute) and route.path == "/plan" for route in app.app.routes),
    reason="this server makes no plans yet",
)
def test_plan_and_repair_of_the_real_server(run: Run, fake_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the routes of plans, checks, pauses and partial files answer is what the command line reads."""
    monkeypatch.setenv("AI_SERVER_URL", fake_server.url)
    before = run("plan", "fake/a", "--context", "64")
    assert (before.code, before.err) == (0, "")
    assert re.search(r"^model\.safetensors +\d", before.out, re.MULTILINE)
    assert run("pull", "fake/a", "--pin").err.count("ignores") == 0
    assert run("verify", "fake/a")[:2] == (0, "fake/a is as it should be.\n")
    snapshot = Path(fake_server.client.get("/models/fake/a").json()["local_path"])
    weights = (snapshot / "model.safetensors").resolve()
    weights.chmod(0o644)
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert "Repaired: model.safetensors." in run("verify", "fake/a").out
    assert run("partials") == (0, "No partial downloads.\n", "")
    assert run("partials", "--clean").out == "Removed 0, 0 B.\n"
    job = json.loads(run("jobs", "--json").out)["jobs"][0]
    assert run("pause", job["id"]).code in (0, 1)  # a job that has ended may be refused, in the server's words
