"""The measurements: what is timed, in which order, and how many times."""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from statistics import median

import psutil
from load_client import Result
from processes import ROOT, LoadClient, Neighbour, OurServer, Peer, Side

MANY = 8  # streams at once, next to 1
IDLE_SECONDS = 0.15  # an engine that has used no processor time for so long is idle
POLL_SECONDS = 0.01
SUBJECTS = (
    "a lighthouse keeper", "a river", "a clockmaker", "a mountain village",
    "an old ship", "a winter garden", "a lost map", "a blacksmith",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """How much of everything; the full plan fits in 8 minutes on two cores, the quick one in 2."""

    starts: int
    rounds: int
    singles: int  # single streams in each round
    tokens: int
    probes: int  # pairs of first tokens with 1 stream
    many_probes: int  # the same with MANY
    departures: int
    neighbour_rounds: int
    neighbour_seconds: float  # a peer that crawls is cut off after this time
    pulled_bytes: int  # in five files


FULL = Plan(5, 5, 3, 128, 60, 14, 8, 3, 10, 2**30)
QUICK = Plan(5, 3, 2, 48, 24, 5, 3, 2, 5, 2**28)


@dataclass
class Samples:
    """Figures of the same kind, one a round."""

    values: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """One more."""
        self.values.append(value)

    @property
    def median(self) -> float:
        """The one in the middle."""
        return median(self.values)

    def interval(self) -> tuple[float, float]:
        """Where the true median lies with some 95 % (order statistics); all there is when the samples are few."""
        ordered, half = sorted(self.values), 0.98 * len(self.values) ** 0.5
        low = max(0, round(len(ordered) / 2 - half))
        return ordered[low], ordered[len(ordered) - 1 - low]


@dataclass
class Versus:
    """Two sides of a comparison, measured in turn; `ratios` and `differences` are those of each round."""

    ours: Samples = field(default_factory=Samples)
    peer: Samples = field(default_factory=Samples)

    @property
    def ratios(self) -> Samples:
        """Ours by the peer's, round by round: what drifts hits both."""
        return Samples([a / b for a, b in zip(self.ours.values, self.peer.values, strict=True)])

    @property
    def differences(self) -> Samples:
        """Ours less the peer's, round by round."""
        return Samples([a - b for a, b in zip(self.ours.values, self.peer.values, strict=True)])


class Prompts:
    """Prompts that run long. A number in front makes each one new, so that no server has it in its cache."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def fresh(self, streams: int) -> list[str]:
        """Prompts that nobody has seen; distinct for each stream."""
        number = next(self._numbers)
        return [f"{number}. Write a very long story about {subject}." for subject in SUBJECTS[:streams]]


def import_seconds() -> float:
    """`import app` in a fresh process, without the start of the interpreter."""
    code = "import time; began = time.perf_counter(); import app; print(time.perf_counter() - began)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def starts(plan: Plan) -> tuple[Samples, Samples]:
    """Import times, and times from the start of the process to ready."""
    imports = Samples([import_seconds() for _ in range(plan.starts)])
    ready = Samples()
    for _ in range(plan.starts):
        with OurServer() as server:
            ready.add(server.ready_seconds)
    return imports, ready


def rate(result: Result) -> float:
    """Output tokens a second of all streams together, from the first connection to the last byte."""
    tokens = sum(stream["tokens"] for stream in result["streams"])
    return max(1, tokens) / max(stream["last"] for stream in result["streams"])


def first_token(result: Result) -> float:
    """Seconds to the first token, the median of the streams."""
    return median(stream["first"] for stream in result["streams"])


def warm(client: LoadClient, side: Side) -> None:
    """One short run, so that nothing is done for the first time while it is measured."""
    client.carry_out(side.order([f"Name {subject}." for subject in SUBJECTS], 4))


def in_turn(rounds: int, sides: tuple[Side, Side]) -> Iterator[tuple[int, tuple[Side, Side]]]:
    """The sides in the order A B, B A, A B, ...: neither is always the one that comes first."""
    for number in range(rounds):
        yield number, sides if number % 2 == 0 else (sides[1], sides[0])


def throughput(client: LoadClient, sides: tuple[Side, Side], plan: Plan, streams: int, prompts: Prompts) -> Versus:
    """Tokens a second, ours against the peer, new prompts in each round and the same for both."""
    measured = Versus()
    for _, order in in_turn(plan.rounds * (plan.singles if streams == 1 else 1), sides):
        texts = prompts.fresh(streams)
        for side in order:
            samples = measured.ours if side is sides[0] else measured.peer
            samples.add(rate(client.carry_out(side.order(texts, plan.tokens))))
    return measured


def first_tokens(client: LoadClient, sides: tuple[Side, Side], plan: Plan, streams: int, prompts: Prompts) -> Versus:
    """Seconds to the first token.

    One stream repeats its prompt, so that both sides have it cached, and what is left is the way there. Several
    streams get new prompts, because which slot's cache a request meets would depend on the order of arrival.
    """
    measured, same = Versus(), prompts.fresh(streams)
    for side in sides:
        client.carry_out(side.order(same, 1))
    for _, order in in_turn(plan.probes if streams == 1 else plan.many_probes, sides):
        texts = same if streams == 1 else prompts.fresh(streams)
        for side in order:
            samples = measured.ours if side is sides[0] else measured.peer
            samples.add(first_token(client.carry_out(side.order(texts, 1))))
    return measured


def processor_seconds(process: psutil.Process) -> float:
    """Processor time that the process has used so far; it counts in steps of 10 ms."""
    times = process.cpu_times()
    return float(times.user + times.system)


def seconds_until_idle(process: psutil.Process, since: float) -> float:
    """How long after `since` the process went on computing."""
    used, grew = processor_seconds(process), since
    while (now := time.monotonic()) < max(grew, since) + IDLE_SECONDS:
        time.sleep(POLL_SECONDS)
        if (latest := processor_seconds(process)) > used:
            used, grew = latest, time.monotonic()
        if now > since + 10:
            raise RuntimeError("the engine was still busy 10 s after the client had left")
    return grew - since


def departures(client: LoadClient, side: Side, plan: Plan, streams: int, prompts: Prompts) -> Samples:
    """Seconds from the moment when all clients leave in mid-stream to an idle engine."""
    engine, seconds = psutil.Process(side.engine_pid), Samples()
    for _ in range(plan.departures):
        order = side.order(prompts.fresh(streams), 1000)
        order["leave_after"] = 16
        seconds.add(seconds_until_idle(engine, client.carry_out(order)["left"]))
    return seconds


@dataclass
class UnderLoad:
    """Tokens a second with a busy neighbour: against our own quiet figure, and against a peer on every core."""

    one: Versus = field(default_factory=Versus)
    many: Versus = field(default_factory=Versus)
    all_cores: Versus = field(default_factory=Versus)


def beside_neighbour(client: LoadClient, server: OurServer, peer: Peer, plan: Plan, prompts: Prompts) -> UnderLoad:
    """Quiet and busy in turn; the neighbour is stopped in between."""
    measured = UnderLoad()
    with Neighbour() as neighbour:
        for _ in range(plan.neighbour_rounds):
            for streams, pair in ((1, measured.one), (MANY, measured.many)):
                texts = prompts.fresh(streams)
                pair.peer.add(rate(client.carry_out(server.order(texts, plan.tokens))))
                neighbour.wake()
                texts = prompts.fresh(streams)
                pair.ours.add(rate(client.carry_out(server.order(texts, plan.tokens))))
                if streams == 1:
                    order = peer.order(texts, plan.tokens)
                    order["seconds"] = plan.neighbour_seconds
                    measured.all_cores.peer.add(rate(client.carry_out(order)))
                neighbour.sleep()
    measured.all_cores.ours = measured.one.ours
    return measured
