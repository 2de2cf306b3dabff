"""POST /plan: what a model would take, told from heads and configurations, and held against what real loads take."""

import asyncio
import functools
import hashlib
import importlib.util
import json
import math
import shutil
import struct
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hubstub
import msgspec
import pytest
import tinygguf
import tinymodels
from harness import Server
from hubstub import HubStub

import app

Json = dict[str, Any]
PLANS = Path(__file__).with_name("plans")
GIBIBYTE, KIBI = 1024**3, 1024
MOST = 2 * 1024 * 1024  # what a plan may fetch, in bytes
# A token in the cache at 16 bits: 2 (keys and values) x layers x heads that are kept x size of a head x 2 bytes, for
# layers that keep all; the same for layers that keep a window of tokens; and that window.
CACHES = {
    "Llama-3.1-8B": (2 * 32 * 8 * 128 * 2, 0, 0),
    "Llama-3.3-70B": (2 * 80 * 8 * 128 * 2, 0, 0),
    "Qwen2.5-0.5B": (2 * 24 * 2 * 64 * 2, 0, 0),  # it names a window and says that it is not used
    "Qwen3-30B-A3B": (2 * 48 * 4 * 128 * 2, 0, 0),
    "Mistral-7B": (0, 2 * 32 * 8 * 128 * 2, 4096),
    "Gemma-3-4b": (2 * 5 * 4 * 256 * 2, 2 * 29 * 4 * 256 * 2, 1024),  # every sixth of 34 layers; heads as of its class
    "Phi-3-mini": (0, 2 * 32 * 32 * 96 * 2, 2047),
    "DeepSeek-V2-Lite": (27 * (512 + 64) * 2, 0, 0),  # one latent vector for keys and values of all heads
    "gpt-oss-20b": (2 * 12 * 8 * 64 * 2, 2 * 12 * 8 * 64 * 2, 128),
    "SmolLM2-135M": (2 * 30 * 3 * 64 * 2, 0, 0),
}


@functools.cache
def fixture(name: str) -> Json:
    """The configuration of a well-known model, and the names and shapes of its tensors."""
    read: Json = json.loads((PLANS / f"{name}.json").read_text(encoding="utf-8"))
    return read


def write_repository(name: str, folder: Path) -> Path:
    """The repository of a well-known model, with true headers and holes where the weights would be."""
    facts = fixture(name)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(facts["config"]))
    (folder / "tokenizer_config.json").write_text("{}")
    rows = [(pattern.format(at), *rest) for count, pattern, *rest in facts["tensors"] for at in range(count)]
    count = facts["shards"]
    for shard in range(count):
        name = f"model-{shard + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        write_shard(folder / name, rows[shard * len(rows) // count : (shard + 1) * len(rows) // count])
    return folder


def write_shard(path: Path, rows: list[Any]) -> None:
    """One file of weights that are all holes."""
    header, end = Json(), 0
    for name, dtype, shape in rows:
        size = math.prod(shape) * (1 if dtype == "U8" else 2)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """A stand-in Hub for this process, whose files are not hashed: they are large, and nobody may fetch them."""
    from huggingface_hub import constants

    named = lambda source: hashlib.sha256(str(source).encode()).hexdigest()  # noqa: E731
    monkeypatch.setattr(hubstub, "sha256_of", named)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("model_meta", "jobs", "listings"):
        monkeypatch.setattr(app, name, {})
    monkeypatch.setattr(app, "model_cache", OrderedDict())
    with HubStub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine without a GPU, with 16-bit arithmetic, every engine, no bitsandbytes, 64 GiB free, a vast disk."""
    monkeypatch.setattr(app, "engine_unavailable", lambda _backend: "")
    monkeypatch.setattr(app, "_cpu_has_bfloat16", lambda: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=2**50))
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    return free(monkeypatch, 64 * GIBIBYTE)


def free(monkeypatch: pytest.MonkeyPatch, size: int, gpu: int = 0) -> pytest.MonkeyPatch:
    """So much memory is free, of a host or of so many bytes of one GPU."""
    device = {"index": 0, "total_bytes": gpu, "free_bytes": size, "used_bytes": gpu - size}
    monkeypatch.setattr(app, "gpu_devices", lambda: [device] if gpu else [])
    monkeypatch.setattr(app, "free_bytes", lambda: size)
    return monkeypatch


def plan(model: str, **fields: Any) -> Json:
    """What the server would answer."""
    return asyncio.run(app.plan_model(app.PlanBody(model=model, **fields)))


def rung(planned: Json, backend: str) -> Json:
    """What a plan says of one engine."""
    found: Json = next(each for each in planned["rungs"] if each["backend"] == backend)
    return found


# -- ten well-known models ----------------------------------------------------


@pytest.mark.parametrize("name", CACHES)
def test_well_known(name: str, stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights within 1 % of the exact sum, the cache by its formula, and under 2 MiB fetched, none of it weights."""
    facts, (whole, windowed, window) = fixture(name), CACHES[name]
    stub.add(facts["repo"], folder := write_repository(name, tmp_path / "repository"))
    planned = plan(facts["repo"])
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert {file["name"]: file["size_bytes"] for file in planned["files"]} == sizes
    assert planned["download_bytes"] == sum(sizes.values())
    assert planned["cached_bytes"] == 0
    assert all(each["weights_bytes"] == pytest.approx(facts["total_bytes"], rel=0.01) for each in planned["rungs"])
    assert planned["kv_bytes_per_1k_tokens"] == KIBI * whole + min(KIBI, window or KIBI) * windowed
    longest = min(facts["config"].get("max_position_embeddings", 131072), app.MAX_CONTEXT_LENGTH)
    assert planned["context_length"] == longest
    assert rung(planned, "transformers")["kv_bytes"] == longest * whole + min(longest, window) * windowed
    for each in planned["rungs"]:
        parts = each["weights_bytes"], each["kv_bytes"], each["overhead_bytes"]
        assert sum(parts) == each["total_bytes"]
    assert sum(request.sent for request in stub.requests) < MOST
    weights = [size for path, size in stub.bytes_served.items() if path.endswith(".safetensors")]
    assert sum(weights) < MOST / 2


def test_which_engine_serves(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first rung that takes the architecture and has the memory; the others say why not."""
    for name in ("Llama-3.1-8B", "Qwen3-30B-A3B", "DeepSeek-V2-Lite"):
        stub.add(fixture(name)["repo"], write_repository(name, tmp_path / name))
    planned = plan("meta-llama/Llama-3.1-8B")
    assert planned["serves"] == {"backend": "vllm", "quantization": "none", "context_length": 8192}
    assert (planned["reason"], planned["nearest"], planned["evicts"]) == ("", None, [])
    machine.setattr(app, "engine_unavailable", lambda backend: "not installed" if backend == "vllm" else "")
    free(machine, 90 * GIBIBYTE)
    assert plan("meta-llama/Llama-3.1-8B")["serves"]["backend"] == "transformers"
    assert plan("Qwen/Qwen3-30B-A3B")["serves"]["backend"] == "pipeline"
    refused = plan("deepseek-ai/DeepSeek-V2-Lite")
    assert refused["serves"] is None
    assert "trust_remote_code" in refused["reason"]
    granted = plan("deepseek-ai/DeepSeek-V2-Lite", trust_remote_code=True)
    assert granted["serves"]["backend"] == "pipeline"
    assert "an estimate" in granted["reason"]


def test_what_would_fit_instead(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """4-bit weights where they help, else a shorter context that then does fit, else how much must become free."""
    stub.add("org/model", write_repository("Llama-3.1-8B", tmp_path / "repository"))
    machine.setattr(app, "engine_unavailable", lambda backend: "not installed" if backend == "vllm" else "")
    free(machine, 17 * GIBIBYTE)
    planned = plan("org/model", context_length=32768)
    assert planned["serves"] is None
    assert "bytes are needed" in planned["reason"]
    shorter = json.loads(planned["nearest"])["context_length"]
    assert plan("org/model", context_length=shorter)["serves"]["context_length"] == shorter
    assert plan("org/model", context_length=shorter + 1)["serves"] is None
    free(machine, 8 * GIBIBYTE)
    planned = plan("org/model")
    missing = rung(planned, "transformers")["total_bytes"] - 8 * GIBIBYTE
    assert planned["nearest"] == f"free {missing} bytes of memory"
    machine.setattr(app, "engine_unavailable", lambda _backend: "")
    free(machine, 16 * GIBIBYTE, gpu=16 * GIBIBYTE)
    machine.setattr(app, "MODEL_Q4_THRESHOLD_BYTES", 0)
    assert plan("org/model")["nearest"] == '{"quantize": "4bit"}'
    assert plan("org/model", quantize="4bit")["serves"]["quantization"] == "4bit-nf4"


def test_a_context_that_nobody_has(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Longer than the model knows, or than the reserved cache holds: not served, and the longest is named."""
    stub.add("org/model", write_repository("SmolLM2-135M", tmp_path / "repository"))
    planned = plan("org/model", context_length=10_000)
    assert planned["serves"] is None
    assert "the longest context here is 8192" in planned["reason"]
    assert planned["nearest"] == '{"context_length": 8192}'
    machine.setattr(app, "KV_CACHE_BYTES", 1000 * 23040)
    assert rung(plan("org/model"), "vllm")["context_length"] == 1000


def test_a_machine_without_fast_16_bits(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Weights and cache are then twice as large as the files say."""
    stub.add("org/model", write_repository("SmolLM2-135M", tmp_path / "repository"))
    machine.setattr(app, "_cpu_has_bfloat16", lambda: False)
    planned = plan("org/model")
    assert rung(planned, "transformers")["weights_bytes"] == pytest.approx(2 * 269030016, rel=0.01)
    assert planned["kv_bytes_per_1k_tokens"] == 2 * 23040 * KIBI


# -- GGUF ---------------------------------------------------------------------


def gguf_repository(folder: Path, sizes: dict[str, int], **facts: Any) -> Path:
    """Files of one model in several sizes: a true head, and a hole behind it."""
    head = tinygguf.write(folder / "made", **facts).read_bytes()
    (folder / "made" / "model-Q8_0.gguf").unlink()
    for name, size in sizes.items():
        path = folder / "made" / name
        path.write_bytes(head)
        with path.open("r+b") as file:
            file.truncate(size)
    return folder / "made"


SIZES = {"m-Q4_K_M.gguf": 5 * GIBIBYTE, "m-Q2_K.gguf": 3 * GIBIBYTE, "m-Q8_0.gguf": 9 * GIBIBYTE}


def test_gguf(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One layer of four heads with 128 values each; two contexts of 2,048 tokens; the weights are the file's."""
    stub.add("org/model", gguf_repository(tmp_path, SIZES))
    planned = plan("org/model")
    (only,) = planned["rungs"]
    assert [file["name"] for file in planned["files"]] == ["m-Q4_K_M.gguf"]
    assert only["weights_bytes"] == 5 * GIBIBYTE
    assert only["kv_bytes"] == 2 * 2048 * (2 * 1 * 4 * 128 * 2)
    assert planned["serves"] == {"backend": "llama.cpp", "quantization": "unknown", "context_length": 2048}
    assert sum(request.sent for request in stub.requests) < MOST


def test_a_smaller_file(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the usual file does not fit, another one of the repository does."""
    stub.add("org/model", gguf_repository(tmp_path, SIZES))
    free(machine, 4 * GIBIBYTE)
    planned = plan("org/model")
    assert (planned["serves"], planned["nearest"]) == (None, "org/model:Q2_K")
    assert plan(planned["nearest"])["serves"]["backend"] == "llama.cpp"


def test_gguf_with_a_long_list_of_tokens(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What stands before the tokens is enough, and not more than the first part is fetched."""
    machine.setattr(app, "GGUF_HEAD_BYTES", 1024)
    stub.add("org/model", gguf_repository(tmp_path, SIZES))
    assert rung(plan("org/model"), "llama.cpp")["context_length"] == 2048
    assert sum(stub.bytes_served.values()) == 1024


def cache_of(**facts: Any) -> tuple[int, int, int]:
    """What is read of the head of a GGUF file: a token in layers that keep all, in the others, and their window."""
    meta = app.ModelMeta("m", "test", "/", family=facts.pop("family", "llama"))
    head = {f"{meta.family}.{name.replace('__', '.')}": value for name, value in facts.items()}
    app._describe_gguf_cache(meta, head)
    return meta.kv_bytes_per_token, meta.kv_window_bytes_per_token, meta.kv_window


def test_caches_of_gguf_families() -> None:
    """Heads that differ by layer, windows by a pattern or by llama.cpp's own table, latent vectors, encoders, lies."""
    usual: Json = {"block_count": 4, "embedding_length": 256, "attention__head_count": 8}
    assert cache_of(**usual) == (2 * 4 * 8 * 32 * 2, 0, 0)
    assert cache_of(**usual, attention__head_count_kv=2) == (2 * 4 * 2 * 32 * 2, 0, 0)
    assert cache_of(**usual, attention__head_count_kv=(0, 2, 0, 4)) == (2 * 6 * 32 * 2, 0, 0)
    sizes = {"attention__key_length": 96, "attention__value_length": 64}
    assert cache_of(**usual, **sizes) == (4 * 8 * (96 + 64) * 2, 0, 0)
    window = {"attention__sliding_window": 100}
    assert cache_of(**usual, **window) == (2 * 4 * 8 * 32 * 2, 0, 0)  # llama.cpp uses none in this family
    assert cache_of(**usual, **window, family="gemma2") == (2 * 2 * 8 * 32 * 2, 2 * 2 * 8 * 32 * 2, 100)
    pattern = {"attention__sliding_window_pattern": (True, True, True, False)}
    assert cache_of(**usual, **window, **pattern) == (2 * 1 * 8 * 32 * 2, 2 * 3 * 8 * 32 * 2, 100)
    latent = {"attention__key_length": 576, "attention__value_length": 512, "attention__key_length_mla": 192}
    assert cache_of(**usual | {"attention__head_count_kv": 1}, **latent) == (4 * 576 * 2, 0, 0)
    assert cache_of(**usual, attention__causal=False) == (0, 0, 0)
    assert cache_of(block_count=2**40, embedding_length=-1, attention__head_count_kv=("x", 2.5)) == (0, 0, 0)


def config_cache(**fields: Any) -> tuple[int, int, int]:
    """The same of a config.json with four layers of eight heads that have 32 values each."""
    meta = app.ModelMeta("m", "test", "/")
    usual = {"num_hidden_layers": 4, "num_attention_heads": 8, "hidden_size": 256}
    app._describe_cache(meta, usual | fields)
    return meta.kv_bytes_per_token, meta.kv_window_bytes_per_token, meta.kv_window


def test_caches_of_hybrids_and_old_names() -> None:
    """Layers without attention keep nothing; older configurations have other names for the same."""
    layer = 2 * 8 * 32 * 2
    assert config_cache(layer_types=["linear_attention", "full_attention", "mamba", "conv"]) == (layer, 0, 0)
    assert config_cache(layers_block_type=["mamba", "attention", "mamba", "attention"]) == (2 * layer, 0, 0)
    assert config_cache(hybrid_override_pattern="M-M*") == (layer, 0, 0)
    assert config_cache(full_attention_interval=4) == (layer, 0, 0)
    assert config_cache(attn_layer_period=2) == (2 * layer, 0, 0)
    assert config_cache(sliding_window=64, sliding_window_pattern="LLLG") == (layer, 3 * layer, 64)
    assert config_cache(multi_query=True) == (4 * 2 * 32 * 2, 0, 0)
    meta = app.ModelMeta("m", "test", "/")
    app._describe_cache(meta, {"n_layer": 12, "n_head": 12, "n_embd": 768})
    assert meta.kv_bytes_per_token == 2 * 12 * 12 * 64 * 2
    with pytest.raises(app.BadModelFiles):
        config_cache(num_hidden_layers=10**18)


# -- disk, time, eviction, what is here ---------------------------------------


def test_disk_and_time(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The mean speed of downloads worth counting; a disk that is too small, with what is missing."""
    stub.add("org/model", write_repository("SmolLM2-135M", tmp_path / "repository"))
    planned = plan("org/model")
    needed = planned["download_bytes"]
    assert planned["eta_seconds"] is None
    assert planned["disk"]["free_bytes"] - planned["disk"]["free_after_bytes"] == needed
    past = [(90 * 2**20, 3.0), (10 * 2**20, 2.0), (7 * 2**20, 0.001)]
    for number, (size, seconds) in enumerate(past):
        app.jobs[str(number)] = app.Job(str(number), "x", status="succeeded", bytes_fetched=size, fetch_seconds=seconds)
    assert plan("org/model")["eta_seconds"] == pytest.approx(needed / (20 * 2**20))
    usage = SimpleNamespace(free=app.DISK_RESERVE + needed - 5)
    machine.setattr(shutil, "disk_usage", lambda _path: usage)
    planned = plan("org/model")
    assert (planned["disk"]["fits"], planned["serves"]) == (False, None)
    assert planned["nearest"] == "free 5 bytes of the disk"
    assert "make_room" in planned["reason"]
    usage.free += 5
    assert plan("org/model")["disk"]["fits"]
    machine.setattr(app, "DISK_QUOTA", needed - 7)
    assert plan("org/model")["nearest"] == "free 7 bytes of the disk"
    usage.free = 0
    app.model_meta["org/here"] = app.describe_model(app.ModelSource("org/here"), tmp_path / "repository", "0" * 40)
    assert plan("org/here")["disk"]["fits"]


def engine(name: str, held: int, pins: int = 0, asleep: bool = False) -> None:
    """A stand-in for an engine in memory."""
    app.model_meta[name] = app.ModelMeta(name, "test", "/", memory_bytes=held)
    spec = SimpleNamespace(model=name, quantization="none")
    stand_in: Any = SimpleNamespace(spec=spec, pins=pins, asleep=asleep)
    app.model_cache[name] = stand_in


def test_evictions(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smallest step that is enough, as the load itself chooses; models in use stay."""
    stub.add("org/model", write_repository("Llama-3.1-8B", tmp_path / "repository"))
    machine.setattr(app, "MAX_CACHE_MODELS", 5)
    machine.setattr(app, "engine_unavailable", lambda backend: "not installed" if backend == "vllm" else "")
    for name, held, pins in (("small", 1, 0), ("busy", 40, 1), ("large", 12, 0), ("other", 2, 0)):
        engine(name, held * GIBIBYTE, pins)
    free(machine, 9 * GIBIBYTE)
    assert plan("org/model")["evicts"] == ["large"]
    free(machine, 4 * GIBIBYTE)
    planned = plan("org/model")
    assert planned["evicts"] == ["small", "large"]
    assert rung(planned, "transformers")["available_bytes"] == 19 * GIBIBYTE
    free(machine, 1 * GIBIBYTE)
    assert plan("org/model")["serves"] is None
    free(machine, 64 * GIBIBYTE)
    assert plan("org/model")["evicts"] == []
    machine.setattr(app, "MAX_CACHE_MODELS", 4)
    assert plan("org/model")["evicts"] == ["small"]


def test_what_is_here_already(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Files in the Hub's cache count as fetched."""
    sha = stub.add("org/model", folder := write_repository("SmolLM2-135M", tmp_path / "repository"))
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / sha
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(folder)
    planned = plan("org/model")
    assert (planned["download_bytes"], planned["eta_seconds"]) == (0, 0.0)
    assert planned["cached_bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_a_model_on_disk_needs_no_network(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pulled models and those of packages are planned from their files; the last load's figure wins."""
    folder = write_repository("SmolLM2-135M", tmp_path / "repository")
    meta = app.describe_model(app.ModelSource("org/here", "org/here"), folder, "0" * 40)
    app.model_meta["org/here"] = meta
    machine.setattr(app, "engine_unavailable", lambda backend: "not installed" if backend == "vllm" else "")
    planned = plan("org/here")
    assert planned["download_bytes"] == 0
    assert planned["serves"]["backend"] == "transformers"
    total = rung(planned, "transformers")["total_bytes"]
    assert total == sum(app.memory_needs(meta, "transformers", "none"))
    meta.memory_bytes, meta.last_backend = 5 * GIBIBYTE, "transformers"
    assert rung(plan("org/here"), "transformers")["total_bytes"] == 5 * GIBIBYTE + 8192 * 23040
    assert sum(app.memory_needs(meta, "transformers", "none")) == 5 * GIBIBYTE + 8192 * 23040
    assert plan("smollm2:135m")["serves"]["backend"] == "llama.cpp"
    assert not stub.requests


def test_names_that_are_only_here(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An alias is its model; an adapter that is not here yet names its base; a licence is what the Hub says."""
    folder = write_repository("SmolLM2-135M", tmp_path / "repository")
    app.model_meta["org/here"] = app.describe_model(app.ModelSource("org/here", "org/here"), folder, "0" * 40)
    app.model_meta["pirate:v2"] = msgspec.structs.replace(
        app.model_meta["org/here"], name="pirate:v2", parent="org/here"
    )
    assert plan("pirate:v2")["model"] == "org/here"
    stub.add("org/adapter", tinymodels.tiny_lora())
    assert "plan that" in plan("org/adapter")["reason"]
    described = hubstub.model_info
    machine.setattr(hubstub, "model_info", lambda *facts: described(*facts) | {"tags": ["x", "license:mit"]})
    stub.add("org/model", folder)
    assert plan("org/model")["license"] == "mit"


# -- what is refused ----------------------------------------------------------


def refusal(model: str, **fields: Any) -> app.ServerError:
    """The error that a plan ends with."""
    with pytest.raises(app.ServerError) as caught:
        plan(model, **fields)
    return caught.value


def test_refusals_of_the_hub(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unknown, gated, pickled only, without weights, cut off, offline: each with its own kind."""
    repository = write_repository("SmolLM2-135M", tmp_path / "repository")
    stub.add("org/gated", repository, gated=True)
    stub.add("org/pickle", {"config.json": b"{}", "pytorch_model.bin": b"x" * 100})
    stub.add("org/empty", {"README.md": b"nothing"})
    stub.add("org/model", repository)
    assert refusal("org/none").kind == "not_found"
    assert refusal("org/model", revision="none").kind == "not_found"
    assert refusal("org/model:Q4_0").kind == "not_found"
    assert refusal("org/gated").kind == "gated"
    assert refusal("org/pickle").kind == "unsafe_format"
    assert plan("org/pickle", allow_pickle=True)["rungs"][1]["weights_bytes"] == 100
    assert refusal("org/empty").kind == "unsupported_format"
    stub.fault("status", "config.json", status=429, seconds=7)
    limited = refusal("org/model")
    assert (limited.kind, limited.retry_after) == ("rate_limited", 7)
    stub.fault("cut", "model.safetensors", at_bytes=100)
    assert refusal("org/model").status in range(400, 600)
    stub.close()
    assert refusal("org/model").kind == "offline"
    assert not list(tmp_path.glob("hub/**/*.safetensors"))


def test_a_hub_without_ranges(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that answers with the whole file is left after its head."""
    stub.add("org/model", write_repository("SmolLM2-135M", tmp_path / "repository"))
    stub.fault("ignore_range", times=hubstub.FOREVER)
    planned = plan("org/model")
    assert rung(planned, "transformers")["weights_bytes"] == pytest.approx(269030016, rel=0.01)
    assert sum(stub.bytes_served.values()) < 269030016 / 4


def test_a_hub_that_sends_nothing(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A plan ends, however long the Hub is silent."""
    stub.add("org/model", write_repository("SmolLM2-135M", tmp_path / "repository"))
    stub.fault("stall", "model.safetensors", at_bytes=10)
    machine.setattr(app, "PULL_STALL_SECONDS", 0.2)
    assert refusal("org/model").kind == "stalled"


GOOD_CONFIG = json.dumps({"model_type": "llama", "num_hidden_layers": 2}).encode()


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{oops", "model.safetensors": struct.pack("<Q", 2) + b"{}"},
        {"model.safetensors": struct.pack("<Q", 2) + b"{}"},
        {"config.json": GOOD_CONFIG, "model.safetensors": struct.pack("<Q", 10 * GIBIBYTE) + b"{}"},
        {"config.json": GOOD_CONFIG, "model.safetensors": struct.pack("<Q", 2**63) + b"{}"},
        {"config.json": GOOD_CONFIG, "model.safetensors": b""},
        {"config.json": b'{"num_hidden_layers": "many"}', "model.safetensors": struct.pack("<Q", 2) + b"{}"},
        {"m-Q4_0.gguf": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60)},
        {"m-Q4_0.gguf": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(2**21)},
        {"m-Q4_0.gguf": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**50)},
        {"m-Q4_0.gguf": b"LGUF" + bytes(2**21)},
    ],
    ids=[
        "no JSON",
        "no config",
        "10 GB of header",
        "2**63",
        "empty",
        "text for a number",
        "pairs",
        "zeros",
        "text",
        "magic",
    ],
)
def test_files_that_lie(files: dict[str, bytes], stub: HubStub, machine: pytest.MonkeyPatch) -> None:
    """An answer that names the repository and what to do, and never more bytes than a head has."""
    machine.setattr(app, "GGUF_HEAD_BYTES", 64 * 1024)
    stub.add("org/model", files)
    error = refusal("org/model")
    assert (error.kind, error.status) == ("bad_model_files", 500)
    assert "org/model on the Hub" in str(error)
    assert "Pull" not in str(error)
    assert sum(stub.bytes_served.values()) < 2 * MOST


def test_a_10_gb_header_in_a_file_that_has_it(stub: HubStub, machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The header is not fetched, though the file is large enough for it."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 10 * GIBIBYTE))
        file.truncate(20 * GIBIBYTE)
    (tmp_path / "config.json").write_bytes(GOOD_CONFIG)
    stub.add("org/model", tmp_path)
    assert refusal("org/model").kind == "bad_model_files"
    assert sum(stub.bytes_served.values()) < MOST


# -- the route ----------------------------------------------------------------


def test_route(fake_server: Server) -> None:
    """Fields are checked, unknown ones named, and a plan brings nothing onto the disk."""
    answer = fake_server.client.post("/plan", json={"model": "gpt2", "colour": "red"})
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Ignored-Parameters"] == "colour"
    assert answer.json()["files"]
    assert fake_server.client.get("/models").json()["models"] == []
    assert fake_server.client.get("/jobs").json()["jobs"] == []
    wrong = fake_server.client.post("/plan", json={"model": "gpt2", "context_length": 0})
    assert (wrong.status_code, "context_length" in wrong.text) == (400, True)
    assert fake_server.client.post("/plan", json={"model": "no/such"}).status_code == 404


# -- against real loads -------------------------------------------------------


def peak_bytes(server: Server) -> int:
    """The sum of the highest resident sizes (VmHWM) that the kernel has seen of each process below the server."""
    found = 0
    for process in server.children():
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        found += next(int(line.split()[1]) * KIBI for line in status.splitlines() if line.startswith("VmHWM"))
    return found


def check_against_a_load(server: Server, model: str, backend: str, ask: Any, **fields: Any) -> None:
    """The plan before the load is within 15 % of the peak after one long request."""
    server.have(model)
    planned = server.client.post("/plan", json={"model": model, **fields}).json()
    assert planned["serves"]["backend"] == backend, planned
    total = rung(planned, backend)["total_bytes"]
    answer = ask(server)
    assert answer.status_code == 200, answer.text
    peak = peak_bytes(server)
    server.client.post(f"/models/{model}/unload")
    print(f"\n{backend}: planned {total / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, {total / peak - 1:+.1%}")
    assert total == pytest.approx(peak, rel=0.15)


def long_chat(model: str, words: int) -> Any:
    """A conversation of about so many tokens, and a short answer."""
    text = "the quick brown fox jumps over the lazy dog and " * (words // 10)
    return lambda server: server.chat(model, text, options={"num_predict": 4})


@pytest.fixture
def alone(server: Server) -> Server:
    """The server with real engines and no model in memory."""
    for model in server.client.get("/models").json()["models"]:
        if model["loaded"]:
            assert server.client.post(f"/models/{model['name']}/unload").status_code == 200
    return server


linux_only = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


@linux_only
def test_peak_of_llama_cpp(alone: Server) -> None:
    """The cache is reserved whole, so a short prompt shows it as well as a long one."""
    check_against_a_load(alone, "smollm2:135m", "llama.cpp", long_chat("smollm2:135m", 500))


@linux_only
def test_peak_of_transformers(alone: Server) -> None:
    """A prompt of some 6,000 tokens."""
    fields = {"context_length": 6050}
    check_against_a_load(alone, tinymodels.LORA_BASE, "transformers", long_chat(tinymodels.LORA_BASE, 6000), **fields)


@linux_only
def test_peak_of_sentence_transformers(alone: Server) -> None:
    """A batch of 32 inputs as long as its window."""
    body = {"model": "all-minilm", "input": ["word " * 200] * 32}
    check_against_a_load(
        alone, "all-minilm", "sentence-transformers", lambda server: server.client.post("/v1/embeddings", json=body)
    )


@linux_only
def test_peak_of_vllm(vllm_server: Server) -> None:
    """Server, engine core and worker of vLLM's CPU build together."""
    for model in vllm_server.client.get("/models").json()["models"]:
        vllm_server.client.post(f"/models/{model['name']}/unload")
    check_against_a_load(vllm_server, tinymodels.LORA_BASE, "vllm", long_chat(tinymodels.LORA_BASE, 6000))
