"""Engines that hang or die: noticed by their signs of life, ended, named, and replaced; a long step is no hang."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import Server, text_of, wait_until
from hubstub import HubStub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app

FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def watched(hub: HubStub, hub_cache: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that calls two seconds without a sign of life a hang."""
    with Server(tmp_path, fake=True, HF_ENDPOINT=hub.url, HF_HOME=str(hub_cache), HANG_SECONDS="2") as running:
        yield running


def pid_of(server: Server, model: str) -> int:
    """The process of a loaded model."""
    pid: int = server.client.get(f"/models/{model}").json()["pid"]
    return pid


def state_of(server: Server, model: str) -> str:
    """What `GET /models` calls the model's state."""
    state: str = server.client.get(f"/models/{model}").json()["state"]
    return state


# -- hangs --------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["freeze 30", "stall 30"])
def test_an_engine_that_hangs_is_ended_and_replaced(watched: Server, fault: str) -> None:
    """Blocked loop or no pulse: what came before, one error line that says so, and a new process for the next."""
    watched.have("fake/a")
    watched.answer("fake/a", "count 1")
    hanging = pid_of(watched, "fake/a")
    watched.client.timeout = 15  # half of what the engine would hang
    lines = watched.stream("fake/a", fault)
    assert text_of(lines[:-1]) == "0 "
    assert "fake/a died" in lines[-1]["error"]
    assert "no sign of life" in lines[-1]["error"] and "HANG_SECONDS" in lines[-1]["error"]
    assert not any(line.get("done") for line in lines)
    assert not psutil.pid_exists(hanging)
    assert watched.answer("fake/a", "count 2") == "0 1 "
    assert pid_of(watched, "fake/a") != hanging
    assert "The engine of fake/a (transformers) hangs: it gave no sign of life" in watched.log()


def test_a_whole_reply_of_an_engine_that_hangs_is_a_500(watched: Server) -> None:
    """The same text with a status of its own."""
    watched.have("fake/a")
    watched.client.timeout = 15
    reply = watched.chat("fake/a", "freeze 30")
    assert reply.status_code == 500
    assert "no sign of life" in reply.json()["error"]


def test_an_engine_that_computes_is_left_alone(watched: Server) -> None:
    """Three times HANG_SECONDS without a pulse, but at work: the answer comes whole, from the same process."""
    watched.have("fake/a")
    watched.answer("fake/a", "count 1")
    pid = pid_of(watched, "fake/a")
    lines = watched.stream("fake/a", "strain 6")
    assert text_of(lines) == "0 "
    assert lines[-1]["done"] is True
    assert watched.answer("fake/a", "count 1") == "0 "
    assert pid_of(watched, "fake/a") == pid
    assert "hangs" not in watched.log()


def test_a_slow_stream_and_an_idle_engine_are_left_alone(watched: Server) -> None:
    """Neither long answers nor long silences are hangs, as long as the engine shows a pulse."""
    watched.have("fake/a")
    watched.answer("fake/a", "count 1")
    pid = pid_of(watched, "fake/a")
    assert len(watched.stream("fake/a", "slow 200")) == 201  # over two seconds
    with watched.streaming("fake/a", "hang 1") as lines:  # waits without a word, but its loop turns
        next(lines)
        assert watched.stream("fake/a", "slow 200")[-1]["done"] is True
    assert pid_of(watched, "fake/a") == pid
    assert "hangs" not in watched.log()


def test_a_hang_ends_every_stream_of_that_engine_and_no_other(watched: Server) -> None:
    """Who waits for the frozen engine hears it; who is served by another one does not."""
    watched.have("fake/a")
    watched.have("fake/b")
    watched.client.timeout = 15
    watched.answer("fake/a", "count 1")
    with watched.streaming("fake/b", "slow 300") as unharmed, watched.streaming("fake/a", "hang 1") as waiting:
        next(unharmed)
        next(waiting)
        assert "no sign of life" in watched.stream("fake/a", "freeze 30")[-1]["error"]
        assert "no sign of life" in next(waiting)["error"]
        assert list(unharmed)[-1]["done"] is True


# -- deaths -------------------------------------------------------------------


def test_three_hangs_refuse_that_model_only(watched: Server) -> None:
    """503 crash loop with Retry-After and a reason; other models answer; pulling again ends it."""
    watched.have("fake/a")
    watched.have("fake/b")
    watched.client.timeout = 15
    for _ in range(3):
        assert "no sign of life" in watched.stream("fake/a", "freeze 30")[-1]["error"]
    refused = watched.chat("fake/a", "count 1")
    assert refused.status_code == 503
    assert "fake/a died 3 times" in refused.json()["error"]
    assert int(refused.headers["retry-after"]) >= 1
    assert state_of(watched, "fake/a") == "local"
    assert watched.answer("fake/b", "count 1") == "0 "
    watched.pull("fake/a")
    assert watched.answer("fake/a", "count 1") == "0 "


@pytest.mark.parametrize(("prompt", "how"), [("crash 1", "exit status 9"), ("freeze 30", "no sign of life for")])
def test_the_error_says_how_the_engine_ended(watched: Server, prompt: str, how: str) -> None:
    """A status, a signal, or a hang: in the reply and in the log."""
    watched.have("fake/a")
    watched.client.timeout = 15
    error = watched.stream("fake/a", prompt)[-1]["error"]
    assert how in error and "Ask again" in error
    died = [line for line in watched.log().splitlines() if "The engine of fake/a (transformers) died" in line]
    assert len(died) == 1 and how in died[0]


def test_an_engine_killed_while_nobody_asks_is_forgotten(watched: Server) -> None:
    """Its death is counted and named, and nothing is left in the list."""
    watched.have("fake/a")
    watched.answer("fake/a", "count 1")
    psutil.Process(pid_of(watched, "fake/a")).kill()
    wait_until(lambda: state_of(watched, "fake/a") == "local")
    assert "died: signal SIGKILL" in watched.log()


# -- causes -------------------------------------------------------------------

VLLM_LINES = [
    (
        "(EngineCore pid=5) ERROR 11-23 [core.py:1200] torch.OutOfMemoryError: CUDA out of memory. "
        "Tried to allocate 20.00 MiB",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB",
        "out_of_memory",
    ),
    (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        "initializing the engine.",
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        "initializing the engine.",
        "out_of_memory",
    ),
    (
        "ValueError: Free memory on device cuda:0 (1.2/79.1 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 71.2 GiB).",
        "ValueError: Free memory on device cuda:0 (1.2/79.1 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 71.2 GiB).",
        "out_of_memory",
    ),
    (
        "safetensors_rust.SafetensorError: Error while deserializing header: InvalidHeaderDeserialization",
        "safetensors_rust.SafetensorError: Error while deserializing header: InvalidHeaderDeserialization",
        "bad_model_files",
    ),
    (
        "(EngineCore pid=5) ERROR 11-23 [core.py:1200] AssertionError: no such luck",
        "AssertionError: no such luck",
        "start_failed",
    ),
]
SEE_ABOVE = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'0': 1}"


def child_that_printed(lines: list[str]) -> app.ChildProcess:
    """A child whose output is known; nothing else of it exists."""
    child = app.ChildProcess.__new__(app.ChildProcess)
    child.log_tail = deque(lines, maxlen=300)
    return child


@pytest.mark.parametrize(("line", "cause", "kind"), VLLM_LINES)
def test_root_causes_of_vllm(line: str, cause: str, kind: str) -> None:
    """The last error that says something, whatever stands before and after it, and the class it belongs to."""
    around = ["INFO 11-23 starting", "ValueError: an older one", line, '  File "x.py", line 3, in <module>', SEE_ABOVE]
    assert child_that_printed(around).root_cause() == cause
    refused = app.cause_of(cause)
    assert refused.kind == kind
    assert cause in refused.message and "\n" not in refused.message


@pytest.mark.parametrize(
    "lines", [[], ["INFO fine", "loading weights: 100%"], [SEE_ABOVE], ["no Error here", "Error:"]]
)
def test_no_root_cause(lines: list[str]) -> None:
    """Nothing is made up."""
    assert child_that_printed(lines).root_cause() == ""


@FINE
@given(st.text())
def test_every_text_has_a_cause(text: str) -> None:
    """A kind that crosses the boundary, one line, not endless; whatever a library says."""
    refused = app.cause_of(f"RuntimeError: {text}")
    assert refused.kind in {"out_of_memory", "bad_model_files", "unsupported", "start_failed"}
    assert refused.message and len(refused.message) < 600 and len(refused.message.splitlines()) == 1
    assert isinstance(app.error_of(refused.kind, refused.message), app.ServerError)
