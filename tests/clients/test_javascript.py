"""The official JavaScript packages, run on node; scripts/test-clients.sh installs them where npm is there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "js"
NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.skipif(not (FOLDER / "node_modules").exists(), reason="the packages are not installed: npm ci")
@pytest.mark.parametrize("script", ["ollama.mjs", "openai.mjs"])
def test_javascript(base_url: str, model: str, embed_model: str, script: str) -> None:
    """Every check of the script holds."""
    environment = {**os.environ, "BASE_URL": base_url, "MODEL": model, "EMBED_MODEL": embed_model}
    done = subprocess.run(
        [str(NODE), script], cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"after {done.stdout.splitlines()[-1:]}: {done.stderr}"
    expected = re.findall(r'^await check\("(.*?)"', (FOLDER / script).read_text(encoding="utf-8"), re.MULTILINE)
    assert done.stdout.splitlines() == [f"ok {name}" for name in expected]
