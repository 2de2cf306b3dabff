"""The vLLM rung on a CPU: `make test-vllm` makes the environment of its own that this needs (.venv-vllm)."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import ROOT, Json, Server, text_of, wait_until
from hubstub import HubStub

PYTHON = Path(os.environ.get("ENGINE_PYTHON_VLLM") or ROOT / ".venv-vllm" / "bin" / "python")
MODEL = "test/smollm2"
GREEDY: Json = {"temperature": 0.0}

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no environment with vLLM: make test-vllm makes one")


@pytest.fixture(scope="module")
def vllm(hub: HubStub, hub_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose first rung is installed, with one model loaded."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub_cache), "ENGINE_PYTHON_VLLM": str(PYTHON)}
    settings["KV_CACHE_BYTES"] = str(512 * 1024 * 1024)
    with Server(tmp_path_factory.mktemp("vllm"), fake=False, **settings) as running:
        running.client.timeout = 600
        running.have(MODEL)
        yield running


def test_vllm_is_the_first_rung(vllm: Server) -> None:
    """It answers, and nothing was refused on the way."""
    reply = vllm.chat(MODEL, max_tokens=8, **GREEDY)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-backend"] == "vllm"
    ladder = vllm.client.get(f"/models/{MODEL}").json()["ladder"]
    assert [(rung["backend"], rung["outcome"]) for rung in ladder] == [("vllm", "loaded")]


def test_stream_and_whole_are_equal(vllm: Server) -> None:
    """Text, counts and reason."""
    settings: Json = {"max_tokens": 16, **GREEDY}
    whole = vllm.chat(MODEL, "Say something.", **settings).json()
    lines = vllm.stream(MODEL, "Say something.", **settings)
    assert text_of(lines) == whole["message"]["content"]
    for name in ("done_reason", "prompt_eval_count", "eval_count"):
        assert lines[-1][name] == whole[name], name


def test_stops_seeds_and_ignored_options(vllm: Server) -> None:
    """Stop strings are cut, seeds repeat, what vLLM lacks is named."""
    text = vllm.answer(MODEL, max_tokens=24, **GREEDY)
    assert vllm.answer(MODEL, max_tokens=24, stop=text[2:4], **GREEDY) == text[: text.index(text[2:4])]
    hot: Json = {"max_tokens": 16, "temperature": 1.5}
    assert vllm.answer(MODEL, "A story.", seed=7, **hot) == vllm.answer(MODEL, "A story.", seed=7, **hot)
    reply = vllm.chat(MODEL, max_tokens=2, typical_p=0.5)
    assert reply.headers["x-ignored-parameters"] == "typical_p"


def test_a_prompt_over_the_context_is_a_400(vllm: Server) -> None:
    """With both numbers; the engine goes on."""
    context = vllm.client.get(f"/models/{MODEL}").json()["engine"]["context_length"]
    refused = vllm.chat(MODEL, "word " * (context + 10))
    assert refused.status_code == 400
    assert str(context) in refused.json()["error"]
    assert vllm.chat(MODEL, max_tokens=2).status_code == 200


def test_a_core_that_is_killed_ends_the_stream_and_nothing_is_left(vllm: Server) -> None:
    """vLLM's engine core is a process of its own: when it dies the stream says so, and its relatives go with it."""
    with vllm.streaming(MODEL, "Write a long story.", max_tokens=2000, temperature=1.0) as lines:
        next(lines)
        pids = [child.pid for child in vllm.children()]
        core = next(child for child in vllm.children() if "EngineCore" in " ".join(child.cmdline() + [child.name()]))
        core.kill()
        last = [line for line in lines][-1]
        assert "error" in last
        assert "done" not in last
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 10, "the end of the engine's processes")


def test_an_unsupported_architecture_leads_to_the_next_rung(vllm: Server) -> None:
    """With vLLM's own words as the reason."""
    vllm.have("test/unknown")
    ladder_error = vllm.chat("test/unknown").json()["error"]
    assert "vllm: vLLM:" in ladder_error
    assert "transformers:" in ladder_error
