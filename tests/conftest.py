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
from harness import Server, vllm_python, why_no_vllm  # noqa: E402
from hubstub import HubStub  # noqa: E402

FAKE_MODELS = (
    "fake/a", "fake/b", "fake/c", "fake/fails", "fake/slow", "fake/dies", "fake/memory", "fake/hangs", "fake/sleepy1",
    "fake/sleepy2", "fake/sleepy3", "fake/sleepy-slow", "fake/grumpy", "fake/insomniac", "fake/forest",
)  # fmt: skip


@pytest.fixture(scope="session")
def hub() -> Iterator[HubStub]:
    """The stand-in Hub with every small model of tinymodels."""
    with HubStub() as stub:
        gpt2 = tinymodels.tiny_gpt2()
        stub.add("gpt2", gpt2)
        stub.add(tinymodels.LORA_BASE, tinymodels.smollm2_safetensors())
        stub.add("test/lora", tinymodels.tiny_lora())
        stub.add("test/lora-wide", tinymodels.tiny_lora_wide())
        stub.add("test/mixture", tinymodels.tiny_moe())
        stub.add("test/custom", tinymodels.tiny_custom_code())
        stub.add("test/unknown", tinymodels.tiny_unknown_architecture())
        stub.add("test/corrupt", tinymodels.tiny_corrupt())
        stub.add("test/pickle", tinymodels.tiny_pickle_only())
        stub.add("test/encoder-decoder", tinymodels.tiny_encoder_decoder())
        stub.add("test/tools", tinymodels.tiny_tools())
        stub.add("test/reranker", tinymodels.tiny_reranker())
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


@pytest.fixture(scope="session")
def vllm_server(hub: HubStub, hub_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A second server with real engines, whose first rung is installed; a load takes it most of a minute."""
    python = vllm_python()
    if python is None:
        pytest.skip(why_no_vllm())
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub_cache), "ENGINE_PYTHON_VLLM": str(python)}
    settings |= {"KV_CACHE_BYTES": str(512 * 1024 * 1024), "KEEP_ALIVE": "-1"}
    settings["CXX"] = "none"  # vLLM must not need a compiler on a CPU
    with Server(tmp_path_factory.mktemp("vllm"), fake=False, **settings) as running:
        running.client.timeout = 600
        yield running


@pytest.fixture
def fake_server(hub: HubStub, hub_cache: Path, tmp_path: Path) -> Iterator[Server]:
    """A fresh server whose engines do what the prompt says (tests/fakeserver.py), in real child processes."""
    with Server(tmp_path, fake=True, HF_ENDPOINT=hub.url, HF_HOME=str(hub_cache)) as running:
        yield running
