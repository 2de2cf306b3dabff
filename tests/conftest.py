"""Fixtures that every test may use: the stand-in Hub with the small models, and servers on temporary state."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports app: its settings are read at import, and no test may touch the user's own state.
_SCRATCH = tempfile.mkdtemp(prefix="ai-server-tests-")
os.environ["STATE_DIR"] = f"{_SCRATCH}/state"
os.environ["LOG_FILE"] = f"{_SCRATCH}/app.log"
for _name in ("HF_TOKEN", "HF_ENDPOINT", "PORT", "HOST", "API_KEYS"):
    os.environ.pop(_name, None)

import tinymodels  # noqa: E402  (after the environment)
from harness import Server  # noqa: E402
from hubstub import HubStub  # noqa: E402

FAKE_MODELS = ("fake/a", "fake/b", "fake/c", "fake/fails", "fake/slow", "fake/dies", "fake/memory", "fake/hangs")


@pytest.fixture(scope="session")
def hub() -> Iterator[HubStub]:
    """The stand-in Hub with every small model of tinymodels."""
    with HubStub() as stub:
        gpt2 = tinymodels.tiny_gpt2()
        stub.add("gpt2", gpt2)
        stub.add("test/smollm2", tinymodels.smollm2_safetensors())
        stub.add("test/mixture", tinymodels.tiny_moe())
        stub.add("test/custom", tinymodels.tiny_custom_code())
        stub.add("test/unknown", tinymodels.tiny_unknown_architecture())
        stub.add("test/corrupt", tinymodels.tiny_corrupt())
        stub.add("test/pickle", tinymodels.tiny_pickle_only())
        stub.add("test/encoder-decoder", tinymodels.tiny_encoder_decoder())
        stub.add("test/gated", gpt2, gated=True)
        for name in FAKE_MODELS:
            stub.add(name, gpt2)
        yield stub


@pytest.fixture(scope="session")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One Hub cache for the whole run, so that a model is downloaded once."""
    return tmp_path_factory.mktemp("hub-cache")


@pytest.fixture(scope="session")
def server(hub: HubStub, hub_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with real engines, for tests that leave it as they found it."""
    with Server(tmp_path_factory.mktemp("server"), HF_ENDPOINT=hub.url, HF_HOME=str(hub_cache)) as running:
        yield running


@pytest.fixture
def fake_server(hub: HubStub, hub_cache: Path, tmp_path: Path) -> Iterator[Server]:
    """A fresh server whose engines do what the prompt says (tests/fakeserver.py), in real child processes."""
    with Server(tmp_path, fake=True, HF_ENDPOINT=hub.url, HF_HOME=str(hub_cache)) as running:
        yield running
