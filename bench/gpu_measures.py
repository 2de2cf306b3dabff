"""What the GPU benchmark measures on a running server. Each function returns one record for the results."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gpu_client import Load, Order
from gpu_servers import Json, OurServer, PeerServer, Server, gpu_used, used_when_settled
from processes import ROOT, Child

CLIENTS = 4  # processes of the client, at most
LOAD_LIMIT = 240.0  # seconds for one round of requests
WARM_TOKENS = 16
SHORT = "Count from one to nine."  # shorter than a block of vLLM's prefix cache: every answer computes the same


class Client(Child):
    """One process of the client."""

    def __init__(self, order: Order) -> None:
        self._order = order
        super().__init__(
            [sys.executable, str(ROOT / "bench" / "gpu_client.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def prepare(self) -> None:
        """Hand the order over and wait until its requests are made."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(self._order) + "\n")
        self.process.stdin.flush()
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError("a process of the client did not start")

    def begin(self) -> None:
        """Now."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def result(self) -> Load:
        """What came back."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # it comes in time: the client gives up by itself
        if not line:
            raise RuntimeError("a process of the client ended without a result")
        load: Load = json.loads(line)
        return load

    def close(self) -> None:
        """End the process."""
        try:
            super().close()
        except BrokenPipeError:
            self.process.wait()


def client_count(streams: int) -> int:
    """Processes for so many connections: the client must not be the limit, and the server needs the cores."""
    return max(1, min(CLIENTS, (os.cpu_count() or 1) // 4, streams))


def requests_each(streams: int) -> int:
    """Requests of one connection: few, but at least twelve in all."""
    return -(-12 // streams) if streams <= 4 else 3 if streams <= 64 else 2


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so large a share of all does not exceed; -1 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else -1.0


class Prompts:
    """Texts of a known length. Each number of streams has texts of its own, the same for both servers."""

    def __init__(self, package: Path, model: str) -> None:
        path = package / f"{model.rstrip('2')}.prompts.json"
        self._texts: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else ordinary_texts()

    def take(self, streams: int, count: int) -> list[str]:
        """The first `count` texts for so many streams; powers of two do not share any."""
        return [self._texts[(4 * streams + index) % len(self._texts)] for index in range(count)]


def ordinary_texts() -> list[str]:
    """Questions for a real model, all of them different."""
    return [f"{number}. Tell me a long story about the year {1000 + number} in France." for number in range(4096)]


# ---------------------------------------------------------------- many streams
def carry_out(server: Server, texts: list[list[str]], tokens: int) -> tuple[list[Load], dict[str, float]]:
    """Send the texts, one list for each connection; returns what each client saw, and cores used by the server."""
    count = client_count(len(texts))
    bodies = [[json.dumps(server.body(text, tokens)) for text in each] for each in texts]
    with ExitStack() as stack:
        clients = []
        for number in range(count):
            part = bodies[number::count]
            order: Order = {"port": server.port, "path": server.path, "connections": part, "limit": LOAD_LIMIT}
            clients.append(stack.enter_context(Client(order)))
        for client in clients:
            client.prepare()
        before = server.processor_readings()
        for client in clients:
            client.begin()
        loads = [client.result() for client in clients]
        seconds = max(load["ended"] for load in loads) - min(load["began"] for load in loads)
        return loads, cores(before, server.processor_readings(), seconds)


def cores(
    before: dict[int, tuple[str, float]], after: dict[int, tuple[str, float]], seconds: float
) -> dict[str, float]:
    """Cores used by each role; a process that is new counts from its beginning."""
    used: Counter[str] = Counter()
    for pid, (role, now) in after.items():
        used[role] += now - before.get(pid, (role, 0.0))[1]  # type: ignore[assignment]
    return {role: round(each / seconds, 2) for role, each in used.items() if each / seconds >= 0.005}


def throughput(server: Server, prompts: Prompts, streams: int, tokens: int, each: int = 0) -> Json:
    """Closed loop: so many connections at once, each sending its requests one after the other."""
    each = each or requests_each(streams)
    texts = prompts.take(streams, streams * (each + 1))
    carry_out(server, [[text] for text in texts[:streams]], WARM_TOKENS)
    rest = texts[streams:]
    loads, used = carry_out(server, [rest[number::streams] for number in range(streams)], tokens)
    return {"kind": "throughput", "side": server.recorded, "model": server.model, "streams": streams} | figures(
        loads, used
    )


def figures(loads: list[Load], used: dict[str, float]) -> Json:
    """One record of all clients' results."""
    seconds = max(load["ended"] for load in loads) - min(load["began"] for load in loads)
    first = [value for load in loads for value in load["first"]]
    gaps = [value for load in loads for value in load["gaps"]]
    per_token = [value for load in loads for value in load["per_token"]]
    prompt_tokens = [value for load in loads for value in load["prompt_tokens"]]
    tokens = sum(load["tokens"] for load in loads)
    return {
        "requests": sum(load["requests"] for load in loads),
        "failed": sum(load["failed"] for load in loads),
        "error": next((load["error"] for load in loads if load["error"]), ""),
        "seconds": seconds,
        "tokens": tokens,
        "prompt_tokens": [min(prompt_tokens, default=0), max(prompt_tokens, default=0)],
        "tokens_per_second": tokens / seconds,
        "first_p50": percentile(first, 0.5),
        "first_p99": percentile(first, 0.99),
        "gap_p50": percentile(gaps, 0.5),
        "gap_p99": percentile(gaps, 0.99),
        "per_token_p50": percentile(per_token, 0.5),
        "cores": used,
        "client_cores": round(sum(load["cpu_seconds"] for load in loads) / seconds, 2),
    }


# ---------------------------------------------------------------- loads
def our_load(server: OurServer, which: str, prompts: Prompts, backend: str = "vllm") -> Json:
    """From the order to load to its answer, and to the first text of a first chat after it.

    Raises RuntimeError when another engine than `backend` took the model: its figures would mean something else.
    """
    standby, began = server.standby(), time.monotonic()
    described = server.load()
    seconds = time.monotonic() - began
    if described.get("backend") != backend:
        raise RuntimeError(f"loaded by {described.get('backend')}, not {backend}: {described.get('ladder')}")
    answer = server.ask(prompts.take(0, 1)[0], WARM_TOKENS)
    return {
        "kind": "load",
        "side": "ours",
        "model": server.model,
        "which": which,
        "standby": standby,
        "seconds": seconds,
        "first_token_seconds": seconds + answer.first_seconds,
        "phases": described.get("load_phases") or {},
        "server_ready_seconds": server.ready_seconds,
        "backend": answer.headers.get("x-backend", ""),
        "ignored": answer.headers.get("x-ignored-parameters", ""),
    }


def peer_load(server: PeerServer, which: str, prompts: Prompts) -> Json:
    """From the start of the process to the first 200 of /health, and to the first text of a first chat after it."""
    answer = server.ask(prompts.take(0, 1)[0], WARM_TOKENS)
    return {
        "kind": "load",
        "side": server.recorded,
        "model": server.model,
        "which": which,
        "standby": "",
        "seconds": server.ready_seconds,
        "first_token_seconds": server.ready_seconds + answer.first_seconds,
        "phases": {},
    }


class Memory:
    """GPU memory over the life of a server."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.points: dict[str, int | None] = {}
        self.free_seconds = 0.0

    def note(self, when: str) -> None:
        """How much is in use now."""
        self.points[when] = gpu_used()

    def stopped(self) -> None:
        """How much is left of it now that the server is gone, and how long that took from the order to stop."""
        before = self._server.gpu_before
        self.points["before"] = before
        self.points["stopped"], waited = used_when_settled(before)
        self.free_seconds = self._server.stop_seconds + waited

    def record(self) -> Json:
        """What was noted."""
        named = {"side": self._server.recorded, "model": self._server.model, "label": self._server.label}
        return {"kind": "memory", **named, "points": self.points, "free_seconds": self.free_seconds}


# ---------------------------------------------------------------- sleep, swap
def timed_call(server: OurServer, path: str) -> float:
    """Seconds until a POST is answered."""
    began = time.monotonic()
    server.call("POST", path)
    return time.monotonic() - began


def sleep_and_wake(server: OurServer, number: int, question: str = SHORT) -> Json:
    """Put the model to sleep, wake it by an order to load, put it to sleep again, and wake it by a chat."""
    model = server.model
    before, control = server.ask(question, 64).text, server.ask(question, 64).text
    awake = [gpu_used(), server.resident_bytes()]
    slept = timed_call(server, f"/models/{model}/sleep")
    asleep = [gpu_used(), server.resident_bytes()]
    state = str(server.call("GET", f"/models/{model}").get("state"))
    woke = timed_call(server, f"/models/{model}/load")
    after_wake = server.ask(question, 64).text
    slept_again = timed_call(server, f"/models/{model}/sleep")
    chat = server.ask(question, 64)
    return {
        "kind": "sleep",
        "model": model,
        "number": number,
        "sleep_seconds": slept,
        "sleep_again_seconds": slept_again,
        "wake_seconds": woke,
        "chat_first_seconds": chat.first_seconds,
        "state": state,
        "same": {"awake": control == before, "load": after_wake == before, "chat": chat.text == before},
        "text": before[:80],
        "gpu": {"awake": awake[0], "asleep": asleep[0]},
        "resident": {"awake": awake[1], "asleep": asleep[1]},
    }


def swap_chats(server: OurServer, names: tuple[str, str], rounds: int) -> list[Json]:
    """Chats with two models in turn, where there is place for one: each has to wake, and the other to make room."""
    chats: list[Json] = []
    for number in range(2 * rounds):
        name = names[number % 2]
        answer = server.ask(SHORT, 32, name, LOAD_LIMIT)
        chats.append({"model": name, "first_seconds": answer.first_seconds, "text": answer.text, "gpu": gpu_used()})
    return chats


def idle_processors(server: Server, seconds: float = 3.0) -> float:
    """Cores that the server uses while nobody asks for anything."""
    before = sum(value for _, value in server.processor_readings().values())
    time.sleep(seconds)
    return round((sum(value for _, value in server.processor_readings().values()) - before) / seconds, 3)


def single(server: Server, question: str, tokens: int) -> Json:
    """One answer: its text and its speed."""
    answer = server.ask(question, tokens)
    speed: Any = (answer.tokens - 1) / (answer.seconds - answer.first_seconds) if answer.tokens > 1 else None
    return {"text": answer.text, "tokens": answer.tokens, "speed": speed, "backend": answer.headers.get("x-backend")}
