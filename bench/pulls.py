"""Pulls: the same bytes from a Hub on loopback by us, by curl, and by the Hub's own client.

The Hub is tests/hubstub.py in a process of its own. Each round runs all of them, one after the other, into an empty
folder; the disk is synchronised before each, outside of what is measured.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from measures import Samples
from processes import ROOT, Child, OurServer
from report import Row, spread, verdict

MEBIBYTE = 1024 * 1024
REPOSITORY = "bench/pull"
FILES = 5
CONFIGURATION = b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
SNAPSHOT = f"from huggingface_hub import snapshot_download; snapshot_download({REPOSITORY!r})"


class Hub(Child):
    """The stand-in Hub with one repository of random weights."""

    def __init__(self, folder: Path, size: int) -> None:
        (folder / "config.json").write_bytes(CONFIGURATION)
        for number in range(FILES):
            header = json.dumps({"w": {"dtype": "U8", "shape": [size // FILES], "data_offsets": [0, size // FILES]}})
            content = struct.pack("<Q", len(header)) + header.encode() + os.urandom(size // FILES)
            (folder / f"model-{number}.safetensors").write_bytes(content)
        command = [
            sys.executable,
            str(ROOT / "tests" / "hubstub.py"),
            "--port",
            "0",
            "--repo",
            f"{REPOSITORY}={folder}",
        ]
        super().__init__(command, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split()[-1]
        with urllib.request.urlopen(f"{self.url}/api/models/{REPOSITORY}") as reply:  # it hashes the files once
            self.commit = json.load(reply)["sha"]


def by_curl(hub: Hub, folder: Path) -> None:
    """The files one after the other, with nothing checked."""
    address = f"{hub.url}/{REPOSITORY}/resolve/{hub.commit}"
    files = [part for n in range(FILES) for part in ("-o", str(folder / str(n)), f"{address}/model-{n}.safetensors")]
    subprocess.run(["curl", "--silent", "--show-error", "--fail", *files], check=True)


def by_hub_client(hub: Hub, folder: Path) -> None:
    """`snapshot_download`, which checks sizes."""
    settings = {"HF_HOME": str(folder), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    subprocess.run([sys.executable, "-c", SNAPSHOT], check=True, env={**os.environ, **settings, **quiet})


def seconds_of(fetch: Callable[[Hub, Path], None], hub: Hub, folder: Path) -> float:
    """How long a peer takes into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    began = time.monotonic()
    fetch(hub, folder)
    return time.monotonic() - began


def ours(hub: Hub) -> tuple[float, float, int]:
    """Seconds of the transfer and of the whole job, and the peak of the worker's memory in bytes."""
    with OurServer(HF_ENDPOINT=hub.url) as server:
        os.sync()
        began, peak = time.monotonic(), 0
        job = server.call("POST", "/pull", {"model": REPOSITORY})
        while job["status"] in ("queued", "running"):
            peak = max(peak, worker_bytes(server.process.pid))
            time.sleep(0.1)  # who looks more often takes processor time from what is measured
            job = server.call("GET", f"/jobs/{job['id']}")
        server.finish(job)
        return job["fetch_seconds"], time.monotonic() - began, peak


def worker_bytes(server: int) -> int:
    """What the pull worker of a server has in memory."""
    most = 0
    for child in psutil.Process(server).children():
        with suppress(psutil.Error):  # it ended meanwhile
            most = max(most, child.memory_info().rss if "--worker" in child.cmdline() else 0)
    return most


def pull_rows(rounds: int, size: int) -> list[Row]:
    """The rows of the table."""
    transfer, whole, curl, client = (Samples() for _ in range(4))
    to_curl, to_client, peak = Samples(), Samples(), 0
    with tempfile.TemporaryDirectory(prefix="ai-server-bench-") as scratch:
        source, target = Path(scratch, "source"), Path(scratch, "target")
        source.mkdir()
        with Hub(source, size) as hub:
            for _ in range(rounds):
                ours_fetch, ours_whole, memory = ours(hub)
                by_peer = [seconds_of(fetch, hub, target) for fetch in (by_curl, by_hub_client)]
                for samples, took in zip(
                    (transfer, whole, curl, client), (ours_fetch, ours_whole, *by_peer), strict=True
                ):
                    samples.add(size / MEBIBYTE / took)
                to_curl.add(by_peer[0] / ours_fetch)
                to_client.add(by_peer[1] / ours_whole)
                peak = max(peak, memory)
    what = f"verified pull, {size // MEBIBYTE} MiB in {FILES} files"
    return [
        Row(
            f"{what}, transfer", spread(transfer, rounded, " MiB/s"), spread(curl, rounded, " MiB/s") + " curl",
            spread(to_curl, hundredths), ">= 0.8", verdict(to_curl, lambda v: v >= 0.8),
        ),
        Row(
            f"{what}, from the request to the end", spread(whole, rounded, " MiB/s"),
            spread(client, rounded, " MiB/s") + " snapshot_download",
            spread(to_client, hundredths), ">= 1", verdict(to_client, lambda v: v >= 1),
        ),
        Row("the pull worker's memory, peak", f"{peak / MEBIBYTE:.0f} MiB"),
    ]  # fmt: skip


def rounded(value: float) -> str:
    """No decimals."""
    return f"{value:.0f}"


def hundredths(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}"
