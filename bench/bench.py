"""The benchmark: prints one Markdown table and keeps it in bench/results/latest.md.

Usage: .venv/bin/python bench/bench.py [--quick] [--update-readme]. docs/performance.md says how to read the table.
"""

import argparse
import sys

from measures import (
    FULL,
    MANY,
    QUICK,
    Plan,
    Prompts,
    Samples,
    Versus,
    beside_neighbour,
    departures,
    first_tokens,
    starts,
    throughput,
    warm,
)
from processes import ROOT, LoadClient, OurServer, Peer, Side
from pulls import pull_rows
from report import Processors, Row, block, spread, update_readme, verdict, write_results

MEBIBYTE = 1024 * 1024


def seconds(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}"


def milliseconds(value: float) -> str:
    """Whole milliseconds."""
    return f"{value * 1000:.0f}"


def tenths(value: float) -> str:
    """One decimal."""
    return f"{value:.1f}"


def named(streams: int) -> str:
    """`1 stream`, `8 streams`."""
    return f"{streams} stream{'s' if streams > 1 else ''}"


def progress(text: str) -> None:
    """Say on stderr what is being measured."""
    print(f"  {text} ...", file=sys.stderr, flush=True)


def start_rows(plan: Plan) -> list[Row]:
    """Import, ready."""
    progress("import and start")
    imports, ready = starts(plan)
    return [
        Row("`import app`", spread(imports, seconds, " s"), bar="< 0.5 s", result=verdict(imports, lambda v: v < 0.5)),
        Row("start to ready", spread(ready, seconds, " s"), bar="< 1 s", result=verdict(ready, lambda v: v < 1)),
    ]


def memory_row(what: str, resident: int) -> Row:
    """The server process alone, without its engines."""
    result = verdict(Samples([resident / MEBIBYTE]), lambda v: v < 120)
    return Row(what, f"{resident / MEBIBYTE:.0f} MiB", bar="< 120 MiB", result=result)


def throughput_row(streams: int, measured: Versus) -> Row:
    """Tokens a second through us and directly."""
    return Row(
        f"llama.cpp, {named(streams)}, output",
        spread(measured.ours, tenths, " tok/s"),
        spread(measured.peer, tenths, " tok/s") + " directly",
        spread(measured.ratios, seconds),
        ">= 0.97",
        verdict(measured.ratios, lambda v: v >= 0.97),
    )


def first_token_row(streams: int, measured: Versus) -> Row:
    """Time to the first token through us and directly; the ratio column holds the difference."""
    low, high = measured.differences.interval()
    return Row(
        f"llama.cpp, {named(streams)}, first token, p50",
        f"{tenths(measured.ours.median * 1000)} ms",
        f"{tenths(measured.peer.median * 1000)} ms directly",
        f"{measured.differences.median * 1000:+.1f} ms ({low * 1000:+.1f} to {high * 1000:+.1f})",
        "<= +3 ms",
        verdict(measured.differences, lambda v: v <= 0.003),
    )


def departure_row(streams: int, ours: Samples, peer: Samples) -> Row:
    """From the clients' leaving to an engine that computes no more."""
    return Row(
        f"client leaves, {named(streams)}: engine idle after",
        spread(ours, milliseconds, " ms"),
        spread(peer, milliseconds, " ms") + " directly",
        bar="<= 200 ms",
        result=verdict(ours, lambda v: v <= 0.2),
    )


def comparison_rows(client: LoadClient, sides: tuple[Side, Side], plan: Plan, prompts: Prompts) -> list[Row]:
    """Us against the same server directly."""
    rows = []
    for side in sides:
        warm(client, side)
    for streams in (1, MANY):
        progress(f"llama.cpp through us and directly, {named(streams)}")
        rows.append(throughput_row(streams, throughput(client, sides, plan, streams, prompts)))
        rows.append(first_token_row(streams, first_tokens(client, sides, plan, streams, prompts)))
    for streams in (1, MANY):
        progress(f"clients that leave, {named(streams)}")
        ours, peer = (departures(client, side, plan, streams, prompts) for side in sides)
        rows.append(departure_row(streams, ours, peer))
    return rows


def neighbour_row(what: str, measured: Versus, peer: str, bar: float) -> Row:
    """Tokens a second beside a busy neighbour."""
    return Row(
        f"busy neighbour on one core, {what}",
        spread(measured.ours, tenths, " tok/s"),
        spread(measured.peer, tenths, " tok/s") + f" {peer}",
        spread(measured.ratios, seconds),
        f">= {bar:g}",
        verdict(measured.ratios, lambda v: v >= bar),
    )


def neighbour_rows(client: LoadClient, server: OurServer, peer: Peer, plan: Plan, prompts: Prompts) -> list[Row]:
    """Us beside a busy neighbour."""
    progress("a busy neighbour")
    warm(client, server)
    measured = beside_neighbour(client, server, peer, plan, prompts)
    return [
        neighbour_row("1 stream", measured.one, "ours, quiet", 0.6),
        neighbour_row(named(MANY), measured.many, "ours, quiet", 0.6),
        neighbour_row("1 stream", measured.all_cores, "llama.cpp directly, its default threads, same neighbour", 5),
    ]


def measure(plan: Plan) -> list[Row]:
    """All rows, in the order of the table."""
    rows, prompts = start_rows(plan), Prompts()
    with LoadClient() as client, OurServer() as server:
        rows.append(memory_row("server process, ready", server.resident_bytes()))
        entry = server.pull()
        client.carry_out(server.order(["What is the capital of France?"], 16))
        rows.append(memory_row("server process, after a chat", server.resident_bytes()))
        with Peer(entry, "same") as peer:
            rows += comparison_rows(client, (server, peer), plan, prompts)
        with Peer(entry, "all") as peer:
            rows += neighbour_rows(client, server, peer, plan, prompts)
        rows.append(memory_row("server process, after all of this", server.resident_bytes()))
    progress("a download from a Hub on loopback, and its peers")
    return rows + pull_rows(rounds=plan.rounds, size=plan.pulled_bytes)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="Measure ai-server against its peers on this machine.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds: under 2 minutes")
    parser.add_argument("--update-readme", action="store_true", help="replace the table in README.md")
    options = parser.parse_args()
    processors = Processors()
    rows = measure(QUICK if options.quick else FULL)
    text = block(rows, "quick" if options.quick else "full", processors.used_by_others())
    print(text)
    write_results(ROOT / "bench" / "results" / "latest.md", text)
    if options.update_readme:
        update_readme(ROOT / "README.md", text)


if __name__ == "__main__":
    main()
