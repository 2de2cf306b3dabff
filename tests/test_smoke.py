"""The user's own checklist, run by scripts/smoke.sh against a real server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT, Server


def smoke(server: Server, model: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user would."""
    environment = {**os.environ, "BASE_URL": server.url, "MODEL": model, "PYTHON": sys.executable, **settings}
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "smoke.sh")], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("model", "expect"), [("smollm2:135m", "Paris"), ("gpt2", ""), ("test/smollm2", "Paris")], ids=str
)
def test_the_six_point_checklist_passes(server: Server, model: str, expect: str) -> None:
    """Diag, pull, job, chat, models and a clean log: offline with the starter, and through the Hub with safetensors."""
    settings = {"EXPECT": expect} if expect else {}
    result = smoke(server, model, LOG_FILE=str(server.log_file), **settings)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_checklist_fails_where_it_should(server: Server, tmp_path: Path) -> None:
    """A model that does not exist, or an out-of-memory line in the log, makes it fail and say where."""
    missing = smoke(server, "no/such-model")
    assert missing.returncode != 0
    assert "pull" in missing.stdout + missing.stderr
    log = tmp_path / "app.log"
    log.write_text("ERROR torch.OutOfMemoryError: CUDA out of memory\n")
    assert smoke(server, "smollm2:135m", LOG_FILE=str(log)).returncode != 0
