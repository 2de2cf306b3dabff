"""The table: rows, the machine they were measured on, and the files they go to."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
from measures import Samples

VERSIONS = ("xllamacpp", "fastapi", "uvicorn")
MARKED = re.compile(r"(<!-- bench -->).*?(<!-- /bench -->)", re.DOTALL)
HEADER = "| what | ours | peer | ratio | bar | result |\n|---|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ours: str
    peer: str = "-"
    ratio: str = "-"
    bar: str = "-"
    result: str = "-"

    def markdown(self) -> str:
        """The line."""
        return f"| {self.what} | {self.ours} | {self.peer} | {self.ratio} | {self.bar} | {self.result} |\n"


def spread(samples: Samples, form: Callable[[float], str], unit: str = "") -> str:
    """The median, and from where to where the samples go."""
    low, high = form(min(samples.values)), form(max(samples.values))
    return f"{form(samples.median)}{unit} ({low} to {high})"


def verdict(samples: Samples, met: Callable[[float], bool]) -> str:
    """Whether the median meets the bar, and whether the noise would allow the other answer as well."""
    low, high = samples.interval()
    word = "ok" if met(samples.median) else "missed"
    return word if met(low) == met(high) else f"{word}, within noise"


def machine() -> str:
    """What it was measured on, in one line."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONS)
    memory = round(psutil.virtual_memory().total / 2**30)
    cores = len(os.sched_getaffinity(0))
    return f"{processor_name()}, {cores} cores, {memory} GiB, Python {platform.python_version()}, {versions}"


def processor_name() -> str:
    """The processor's name as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


class Processors:
    """What other programs (and a hypervisor) took of the processors while we measured: the noise of the run."""

    def __init__(self) -> None:
        self._before = self._reading()

    def _reading(self) -> tuple[float, float, float]:
        """Seconds so far: of all processors, of those busy, and busy for us and the children that have ended."""
        times = psutil.cpu_times()
        total = sum(times[:8])  # without guest, which user time holds already
        own = os.times()
        return total, total - times.idle - times.iowait, sum(own[:4])

    def used_by_others(self) -> float:
        """Their share since the start, from 0 to 1. Ask when all children have ended."""
        total, busy, own = (now - then for now, then in zip(self._reading(), self._before, strict=True))
        return max(0.0, (busy - own) / total)


def block(rows: list[Row], kind: str, used_by_others: float) -> str:
    """Date, machine and table."""
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    noise = f"other programs used {used_by_others:.0%} of the processors meanwhile"
    intro = f"{today}, {kind} run: {machine()}; {noise}."
    return f"{intro}\n\n{HEADER}{''.join(row.markdown() for row in rows)}"


def write_results(path: Path, text: str) -> None:
    """Keep the latest table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# Latest benchmark\n\nMade by `make bench`; docs/performance.md says how to read it.\n\n{text}")


def update_readme(path: Path, text: str) -> None:
    """Replace what stands between the two markers. Raises SystemExit when they are missing."""
    readme = path.read_text()
    if not MARKED.search(readme):
        raise SystemExit(f"{path.name} has no <!-- bench --> and <!-- /bench --> markers")
    path.write_text(MARKED.sub(lambda found: f"{found[1]}\n{text}{found[2]}", readme))
