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


def block(rows: list[Row], quick: bool, load_before: float) -> str:
    """Date, machine and table."""
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    kind = "quick run" if quick else "full run"
    intro = f"{today}, {kind}: {machine()}; load average before the run {load_before:.1f}."
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
