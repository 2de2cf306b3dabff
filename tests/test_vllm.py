"""What only vLLM has: an engine core in a process of its own, which may die at any time, and words of its own."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
import tinymodels
from harness import Json, Server, text_of, wait_until
from hubstub import HubStub

MODEL = tinymodels.LORA_BASE
LORA, WIDE = "test/lora", "test/lora-wide"  # adapters of rank 4 and 16
GREEDY: Json = {"max_tokens": 4, "temperature": 0.0}  # so few that no near tie is among them: batches round differently
LONG = "word " * 6000  # a prefill of many seconds on a CPU


@pytest.fixture
def vllm(vllm_server: Server) -> Server:
    """The model on disk, with the deaths of earlier tests forgotten."""
    assert vllm_server.pull(MODEL)["status"] == "succeeded"
    return vllm_server


def core_of(server: Server) -> psutil.Process | None:
    """vLLM's engine core, once it has its name."""
    for child in server.children():
        with suppress(psutil.Error):  # it has just ended
            if "EngineCore" in " ".join([*child.cmdline(), child.name()]):
                return child
    return None


def kill_core(server: Server) -> None:
    """End the engine core as a lack of memory does, and wait until everything of its engine is gone."""
    engine = server.children()
    core = core_of(server)
    assert core is not None
    core.kill()
    wait_until(lambda: not any(process.is_running() for process in engine), 10, "the end of the engine's processes")


def test_vllm_is_the_first_rung(vllm: Server) -> None:
    """Nothing was refused on the way, and its own numbers are known."""
    reply = vllm.chat(MODEL, max_tokens=2)
    assert reply.headers["x-backend"] == "vllm"
    facts = vllm.client.get(f"/models/{MODEL}").json()
    assert [(rung["backend"], rung["outcome"]) for rung in facts["ladder"]] == [("vllm", "loaded")]
    assert facts["engine"]["device"] == "cpu"


def test_what_vllm_lacks_is_named(vllm: Server) -> None:
    """Its penalties count all tokens, and it has no locally typical sampling."""
    reply = vllm.chat(MODEL, max_tokens=2, typical_p=0.5, repeat_last_n=8)
    assert set(reply.headers["x-ignored-parameters"].split(", ")) == {"typical_p", "repeat_last_n"}


def test_a_core_that_is_killed_while_idle_is_replaced(vllm: Server) -> None:
    """The next request loads anew and is answered by vLLM."""
    vllm.chat(MODEL, max_tokens=2)
    kill_core(vllm)
    reply = vllm.chat(MODEL, max_tokens=2)
    assert (reply.status_code, reply.headers["x-backend"]) == (200, "vllm")


def test_a_core_that_is_killed_in_prefill_is_an_error(vllm: Server) -> None:
    """The request ends with a status of its own, and nothing of the engine is left."""
    vllm.chat(MODEL, max_tokens=1)
    core = core_of(vllm)
    assert core is not None
    computed = sum(core.cpu_times()[:2])
    with ThreadPoolExecutor(1) as pool:
        fresh = f"{time.time_ns()} {LONG}"  # nothing of it is in the prefix cache
        reply = pool.submit(vllm.chat, MODEL, fresh, max_tokens=2000, ignore_eos=True)
        wait_until(lambda: sum(core.cpu_times()[:2]) > computed + 0.2, 60, "a prefill")
        kill_core(vllm)
        assert reply.result().status_code >= 500
    assert "loads anew" in reply.result().json()["error"]


def test_a_core_that_is_killed_in_decode_ends_the_stream(vllm: Server) -> None:
    """The stream ends with an error and without `done`, and nothing of the engine is left."""
    settings: Json = {"max_tokens": 2000, "temperature": 1.0, "ignore_eos": True}
    with vllm.streaming(MODEL, "Write a long story.", **settings) as lines:
        assert text_of([next(lines) for _ in range(3)])
        kill_core(vllm)
        *_, last = lines
    assert "error" in last
    assert "done" not in last


def test_a_core_that_is_killed_while_loading_leads_to_the_next_rung(vllm: Server) -> None:
    """The load does not hang: vLLM is refused with a reason, transformers answers, and nothing of vLLM is left."""
    vllm.client.post(f"/models/{MODEL}/unload")
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(vllm.chat, MODEL, max_tokens=2)
        wait_until(lambda: core_of(vllm), 120, "an engine core")
        kill_core(vllm)
        assert reply.result().headers["x-backend"] == "transformers"
    ladder = vllm.client.get(f"/models/{MODEL}").json()["ladder"]
    assert [(rung["backend"], rung["outcome"]) for rung in ladder] == [("vllm", "refused"), ("transformers", "loaded")]
    assert ladder[0]["reason"]
    vllm.client.post(f"/models/{MODEL}/unload")  # the next load begins with vLLM again


def test_an_unsupported_architecture_leads_to_the_next_rung(vllm: Server) -> None:
    """With vLLM's own words as the reason."""
    vllm.have("test/unknown")
    error = vllm.chat("test/unknown").json()["error"]
    assert "vllm: vLLM:" in error
    assert "transformers:" in error


# -- LoRA adapters ------------------------------------------------------------


@pytest.fixture
def adapters(vllm: Server) -> Iterator[Server]:
    """A server that has no adapter and no model in memory, before and after: room for adapters is made at a load."""
    vllm.client.post(f"/models/{MODEL}/unload")
    yield vllm
    for name in (LORA, WIDE):
        vllm.client.delete(f"/models/{name}")
    vllm.client.post(f"/models/{MODEL}/unload")


def pid_of(server: Server) -> int:
    """The process that holds the base."""
    pid: int = server.client.get(f"/models/{MODEL}").json()["pid"]
    return pid


def test_adapters_of_one_base(adapters: Server) -> None:
    """Each answers in its own way under its three names, alone and at once; the base answers as it does without any.

    One that is pulled while the base is loaded has the base loaded anew only when its rank needs more room.
    """
    plain, without = adapters.answer(MODEL, **GREEDY), pid_of(adapters)
    adapters.have(LORA)
    narrow, room = adapters.answer(LORA, **GREEDY), pid_of(adapters)
    assert room != without
    assert {adapters.answer(name, **GREEDY) for name in (f"{MODEL}:lora", f"{MODEL}:{LORA}")} == {narrow}
    assert adapters.answer(MODEL, **GREEDY) == plain != narrow
    adapters.have(WIDE)
    assert adapters.answer(LORA, **GREEDY) == narrow
    assert pid_of(adapters) != room
    wide, room = adapters.answer(WIDE, **GREEDY), pid_of(adapters)
    assert len({plain, narrow, wide}) == 3
    with ThreadPoolExecutor(6) as pool:
        asked = [
            (text, pool.submit(adapters.answer, name, **GREEDY)) for name, text in ((LORA, narrow), (WIDE, wide)) * 3
        ]
        assert [answer.result() for _, answer in asked] == [text for text, _ in asked]
    assert adapters.answer(MODEL, **GREEDY) == plain
    assert pid_of(adapters) == room


def test_the_base_beside_an_adapter(adapters: Server) -> None:
    """A request of the base is not changed by one of an adapter that is computed in the same steps."""
    adapters.have(LORA)
    plain = adapters.answer(MODEL, **GREEDY)
    with adapters.streaming(LORA, max_tokens=500, ignore_eos=True, temperature=0.0) as lines:
        assert text_of([next(lines)])
        beside = adapters.answer(MODEL, **GREEDY)
        assert not next(lines)["done"]
    assert beside == plain


def test_what_is_said_of_an_adapter(adapters: Server) -> None:
    """Its base and rank; the reply names it as the client did, and the engine of its base."""
    adapters.have(LORA)
    facts = adapters.client.get(f"/models/{LORA}").json()
    assert (facts["adapter_of"], facts["adapter_rank"]) == (MODEL, 4)
    reply = adapters.chat(f"{MODEL}:lora", **GREEDY)
    assert (reply.headers["x-backend"], reply.json()["model"]) == ("vllm", f"{MODEL}:lora")
    assert adapters.client.get(f"/models/{LORA}").json()["state"] == "local"
    assert adapters.client.get(f"/models/{MODEL}").json()["state"] == "ready"
    adapters.client.delete(f"/models/{LORA}")
    assert adapters.chat(LORA).status_code == 404
    assert adapters.chat(f"{MODEL}:lora").status_code == 404
    assert adapters.chat(MODEL, **GREEDY).status_code == 200


def adapter_for(base: str) -> dict[str, bytes]:
    """The files of the narrow adapter, for another base."""
    folder = tinymodels.tiny_lora()
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    changed = json.dumps(config | {"base_model_name_or_path": base}).encode()
    return {"adapter_config.json": changed, "adapter_model.safetensors": weights}


def test_an_adapter_that_does_not_fit_costs_its_own_request_only(adapters: Server, hub: HubStub) -> None:
    """Layers that the base has not: a 400 without a path in it; the same process answers on."""
    folder = tinymodels.tiny_lora()
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["nowhere"]}
    header, tensor = (
        b'{"base_model.model.nowhere.lora_A.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    )
    weights = len(header).to_bytes(8, "little") + header + tensor
    hub.add("test/unfit", {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights})
    adapters.have("test/unfit")
    adapters.have(LORA)
    good, pid = adapters.answer(LORA, **GREEDY), pid_of(adapters)
    refused = adapters.chat("test/unfit", **GREEDY)
    assert refused.status_code == 400, refused.text
    assert "test/unfit" in refused.json()["error"] and "/snapshots/" not in refused.json()["error"]
    assert (adapters.answer(LORA, **GREEDY), pid_of(adapters)) == (good, pid)
    adapters.client.delete("/models/test/unfit")


def test_an_adapter_is_loaded_with_its_base_by_init(adapters: Server) -> None:
    """`init` loads what serves it."""
    job = adapters.pull(LORA, init=True)
    assert job["status"] == "succeeded", job
    assert adapters.client.get(f"/models/{MODEL}").json()["state"] == "ready"


def test_another_engine_refuses_an_adapter(server: Server, hub: HubStub) -> None:
    """It is named in a 400, and the base goes on."""
    hub.add("test/lora-gpt2", adapter_for("gpt2"))
    server.have("gpt2")
    server.have("test/lora-gpt2")
    refused = server.chat("test/lora-gpt2", **GREEDY)
    assert refused.status_code == 400
    assert refused.json()["error"] == "test/lora-gpt2 is a LoRA adapter, and transformers cannot apply it to gpt2."
    assert server.chat("gpt2", **GREEDY).status_code == 200


def test_an_adapter_without_its_base(server: Server, hub: HubStub) -> None:
    """It can be pulled first; asked, the 404 names what to pull."""
    hub.add("test/lora-alone", adapter_for("test/nowhere"))
    server.have("test/lora-alone")
    refused = server.chat("test/lora-alone", **GREEDY)
    assert refused.status_code == 404
    assert "Model test/nowhere not found" in refused.json()["error"]


# -- a machine without a compiler ---------------------------------------------


def test_logprobs_need_no_compiler(vllm: Server) -> None:
    """What vLLM would compile for them is not compiled on a CPU; this server has no C++ compiler (conftest)."""
    reply = vllm.chat(MODEL, logprobs=True, top_logprobs=2, **GREEDY)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-backend"] == "vllm"
    assert len(reply.json()["logprobs"]) == reply.json()["eval_count"]
