"""What only vLLM has: an engine core in a process of its own, which may die at any time, and words of its own."""

import asyncio
import json
import math
import re
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import tinymodels
from harness import Json, Server, text_of, vllm_python, wait_until, why_no_vllm
from hubstub import HubStub
from msgspec.structs import replace

import app
from app import Call, ChatRequest, Message, Sampling

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


# -- one engine, asked without HTTP -------------------------------------------

T = TypeVar("T")


class Direct:
    """A model in a child of its own, and the loop that hears it."""

    def __init__(self, folder: Path, model: str, **facts: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        spec = app.EngineSpec("vllm", model, str(folder), kv_cache_bytes=256 * 1024 * 1024, memory_share=0.3, **facts)
        self.engine = self.run(self._start(spec))

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(300)

    async def _start(self, spec: app.EngineSpec) -> app.EngineProcess:
        child = await app.ChildProcess.spawn("--engine", app._child_environment(1), str(vllm_python()))
        engine = app.EngineProcess(spec, "", lambda _: None)
        await engine.start(child)
        return engine

    def reply(self, **fields: Any) -> app.Reply:
        """One request's whole reply."""
        return self.run(app.fold(self.engine.stream(ChatRequest(self.engine.spec.model, **fields))))

    def said(self, **fields: Any) -> app.Choice:
        """The only answer of one request."""
        (choice,) = self.reply(**fields).choices
        return choice

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        found: list[int] = self.reply(task="tokenize", inputs=(text,)).result
        return found

    def stop(self) -> None:
        """End the child and the loop."""
        self.run(self.engine.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def thinker() -> Iterator[Direct]:
    """The random model whose template knows tools and thinking."""
    if vllm_python() is None:
        pytest.skip(why_no_vllm())
    direct = Direct(tinymodels.tiny_thinker(), "test/thinker")
    yield direct
    direct.stop()


def user(text: str) -> Message:
    """A user's turn."""
    return Message("user", text)


ASKED = (user("the dog"),)
TOOL: Json = {
    "type": "function",
    "function": {
        "name": "light",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}, "room": {"enum": ["hall", "attic"]}},
            "required": ["on", "room"],
            "additionalProperties": False,
        },
    },
}
CALLED: Json = {"tools": (TOOL,), "tool_choice": "required"}
SHORT = Sampling(max_tokens=8, temperature=0.0)
START, TURN = "<|im_start|>", "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
HISTORY = (
    *ASKED,
    Message("assistant", thinking="hm", calls=(Call("c1", "light", '{"on": true}'),)),
    Message("tool", "done", call_id="c1", tool_name="light"),
)
RENDERED = (
    f"{START}user\nthe dog<|im_end|>\n{START}assistant\n<think>hm</think>"
    f'<tool_call>light:{{"on": true}}</tool_call><|im_end|>\n{START}tool\ndone<|im_end|>\n{START}assistant\n'
)


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({}, TURN),
        ({"tools": (TOOL,)}, "[light]" + TURN),
        ({"think": True}, TURN + "<think>\n"),
        ({"think": "high"}, TURN + "<think>\n"),
        ({"think": False}, TURN + "<think>\n\n</think>\n\n"),
        ({"messages": HISTORY, "tools": (TOOL,)}, "[light]" + RENDERED),
    ],
    ids=["plain", "tools", "think", "level", "no thinking", "history"],
)
def test_what_a_template_is_given(thinker: Direct, fields: Json, prompt: str) -> None:
    """Tools, thinking, calls and results are rendered; what is counted is what a reply counts."""
    fields = {"messages": ASKED, **fields}
    counted = thinker.reply(task="count", **fields)
    assert counted.done.prompt_tokens == len(thinker.ids(prompt))
    assert thinker.reply(sampling=SHORT, **fields).done.prompt_tokens == counted.done.prompt_tokens


def check_calls(choice: app.Choice) -> None:
    """Nothing but valid calls."""
    assert choice.reason == "tool_calls"
    assert not choice.text.strip()
    for call in choice.calls:
        arguments = json.loads(call.arguments)
        assert (call.name, set(arguments)) == ("light", {"on", "room"})
        assert isinstance(arguments["on"], bool) and arguments["room"] in ("hall", "attic")


@pytest.mark.parametrize("think", [None, True, False])
def test_a_required_call_is_made(thinker: Direct, think: bool | None) -> None:
    """Even by a random model, after its thinking where it thinks, and one call alone where more are not wanted."""
    wanted = {"</think>": 60.0, "<think>": 40.0, "]": 20.0}  # it comes to an end as soon as it may
    bias = {thinker.ids(text)[0]: weight for text, weight in wanted.items()}
    sampling = Sampling(max_tokens=300, temperature=0.0, logit_bias=bias)
    settings: Json = {"messages": ASKED, "sampling": sampling, "think": think, **CALLED}
    choice = thinker.said(parallel_tool_calls=False, **settings)
    check_calls(choice)
    assert len(choice.calls) == 1
    choice = thinker.said(parallel_tool_calls=True, **settings)
    check_calls(choice)
    assert choice.calls


FORMS: list[tuple[Json, str]] = [
    (
        {"format": TOOL["function"]["parameters"]},
        r'\{\s*"on"\s*:\s*(true|false)\s*,\s*"room"\s*:\s*"(hall|attic)"\s*\}',
    ),
    ({"regex": "[0-9]{3}-[a-c]{2}"}, "[0-9]{3}-[a-c]{2}"),
    ({"choice": ("naïve 🌍", "b")}, "naïve 🌍|b"),
    ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
]


@pytest.mark.parametrize("think", [None, True, False])
@pytest.mark.parametrize(("form", "pattern"), FORMS, ids=["format", "regex", "choice", "grammar"])
def test_a_form_begins_after_the_thinking(thinker: Direct, form: Json, pattern: str, think: bool | None) -> None:
    """Where it thinks the model is free until the end of that; the answer alone has the form."""
    sampling = Sampling(max_tokens=120, temperature=0.0, **form)
    if think is None:  # nothing of a form but free text has an x in it: the model begins to think by itself
        begun = {thinker.ids("<think>")[0]: 30.0, thinker.ids("</think>")[0]: 60.0}
        sampling = replace(sampling, logit_bias=begun)
    if think is True:
        sampling = replace(sampling, logit_bias={thinker.ids("</think>")[0]: 3.0})
    reply = thinker.reply(messages=ASKED, sampling=sampling, think=think)
    (choice,) = reply.choices
    assert choice.reason == "stop", choice
    assert re.fullmatch(pattern, choice.text.strip()), choice
    assert "think>" not in choice.thinking
    alone = len(thinker.ids(choice.text))
    assert (reply.done.completion_tokens > alone + 1) == (think is not False), (reply, alone)


def test_a_model_that_may_think_need_not(thinker: Direct) -> None:
    """It keeps to the form from the first token on."""
    bias = {thinker.ids("<think>")[0]: -100.0}
    sampling = Sampling(max_tokens=20, temperature=0.0, choice=("yes", "no"), logit_bias=bias)
    assert thinker.said(messages=ASKED, sampling=sampling).text in ("yes", "no")


def test_a_schema_with_more_than_a_grammar_can_say(thinker: Direct) -> None:
    """What a grammar has no means for is left out, as on other engines; the rest of the schema holds."""
    link = {"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083}
    schema = {"type": "object", "properties": {"link": link}, "required": ["link"], "additionalProperties": False}
    choice = thinker.said(messages=ASKED, think=False, sampling=Sampling(max_tokens=40, temperature=0.0, format=schema))
    assert re.match(r'\{\s*"link"', choice.text)


@pytest.mark.parametrize(
    "form",
    [{"format": {"type": "nonsense"}}, {"regex": "(unclosed"}, {"grammar": "root ::= ("}],
    ids=["format", "regex", "grammar"],
)
@pytest.mark.parametrize("think", [True, False])
def test_a_bad_form_after_thinking_is_refused(thinker: Direct, form: Json, think: bool) -> None:
    """As one without thinking is, and the engine goes on."""
    with pytest.raises(app.BadRequest, match=next(iter(form))):
        thinker.reply(messages=ASKED, think=think, sampling=Sampling(max_tokens=8, **form))
    assert thinker.reply(messages=ASKED, sampling=SHORT).done.completion_tokens > 0


def test_end_tokens_do_not_leak(thinker: Direct) -> None:
    """The text shows tags to who takes them out, and never the token that ended it, nor its own with `ignore_eos`."""
    end = thinker.ids("<|im_end|>")[0]
    for ignore in (False, True):
        sampling = Sampling(max_tokens=4, temperature=0.0, logit_bias={end: 100.0}, ignore_eos=ignore)
        reply = thinker.reply(messages=ASKED, sampling=sampling)
        assert reply.choices[0].text == ""
        assert reply.done.reason == ("length" if ignore else "stop")


# -- raw text -----------------------------------------------------------------


def test_a_raw_prompt_as_text_or_tokens(thinker: Direct) -> None:
    """No template, nothing taken out; both ways are the same; several prompts are answered apart."""
    prompt, ids = "the quick brown", tuple(thinker.ids("the quick brown"))
    text, tokens = (thinker.reply(task="complete", inputs=(one,), sampling=SHORT) for one in (prompt, ids))
    assert text.choices == tokens.choices and text.choices[0].text
    assert text.done.prompt_tokens == len(ids)
    both = thinker.reply(task="complete", inputs=(prompt, "What is"), sampling=SHORT)
    assert [choice.text for choice in both.choices] == [
        thinker.said(task="complete", inputs=(one,), sampling=SHORT).text for one in (prompt, "What is")
    ]


def test_tokens_that_there_are_not(thinker: Direct) -> None:
    """Refused, and the engine goes on."""
    with pytest.raises(app.BadRequest):
        thinker.reply(task="complete", inputs=((10**6,),), sampling=SHORT)
    assert thinker.said(task="complete", inputs=("the",), sampling=SHORT).text


@pytest.mark.parametrize("given", ["text", "ids"])
@pytest.mark.parametrize("room", [0, 4])
def test_an_echo_is_scored(thinker: Direct, given: str, room: int) -> None:
    """The prompt comes first, one entry a token: the first has no probability, the others are those of the model."""
    prompt = "the quick 🌍 fox"
    inputs = (prompt if given == "text" else tuple(thinker.ids(prompt)),)
    sampling = Sampling(max_tokens=room, temperature=0.0, echo=True, logprobs=2)
    (choice,) = (reply := thinker.reply(task="complete", inputs=inputs, sampling=sampling)).choices
    plain = thinker.said(task="complete", inputs=inputs, sampling=Sampling(max_tokens=room, temperature=0.0))
    assert choice.text == prompt + plain.text
    scored = choice.logprobs[: len(thinker.ids(prompt))]
    assert len(choice.logprobs) == len(scored) + room
    assert b"".join(entry.data for entry in scored).decode() == prompt
    unknown, *known = (entry.logprob for entry in scored)
    assert math.isnan(unknown) and all(-100 < logprob <= 0 for logprob in known)
    assert [len(entry.top) for entry in scored] == [0] + [2] * len(known)
    assert (reply.done.completion_tokens, reply.done.reason) == (room, "length")


@pytest.mark.parametrize("room", [0, 4])
def test_an_echo_without_scores(thinker: Direct, room: int) -> None:
    """The text alone."""
    sampling = Sampling(max_tokens=room, temperature=0.0, echo=True)
    choice = thinker.said(task="complete", inputs=("the dog",), sampling=sampling)
    plain = thinker.said(task="complete", inputs=("the dog",), sampling=Sampling(max_tokens=room, temperature=0.0))
    assert choice.text == "the dog" + plain.text
    assert choice.logprobs == []


def test_a_suffix_is_put_where_the_model_wants_it(thinker: Direct) -> None:
    """Between the tokens for filling in the middle."""
    reply = thinker.reply(task="complete", inputs=("the {} dog",), suffix=" in the {0} sun", sampling=SHORT)
    wanted = "<|fim_prefix|>the {} dog<|fim_suffix|> in the {0} sun<|fim_middle|>"
    assert reply.done.prompt_tokens == len(thinker.ids(wanted))
    same = thinker.reply(task="complete", inputs=(wanted,), sampling=SHORT)
    assert reply.choices == same.choices


def test_no_tokens_for_a_suffix() -> None:
    """A 400 that names the field."""
    with pytest.raises(app.BadRequest, match="'suffix'"):
        app.infill({"a": 1}, "b", "c")


def test_tokens_make_the_text_again(thinker: Direct) -> None:
    """Every character, and the special ones by their names."""
    text = "naïve 🌍 <think> 你好\n<|im_end|>"
    ids = thinker.ids(text)
    back = thinker.reply(task="detokenize", inputs=(tuple(ids),))
    assert (back.result, back.done.prompt_tokens) == (text, len(ids))


def test_what_the_engine_cannot_do_is_refused(thinker: Direct) -> None:
    """With the task's name."""
    with pytest.raises(app.BadRequest, match="embed"):
        thinker.reply(task="embed", inputs=("a",))


def test_the_stop_string_is_named(thinker: Direct) -> None:
    """The one that ended the reply, and none where nothing did."""
    sampling = Sampling(max_tokens=24, temperature=0.0)
    free = thinker.said(task="complete", inputs=("the dog",), sampling=sampling)
    stop = free.text[2:4]
    cut = replace(sampling, stop=("never to be seen", stop))
    choice = thinker.said(task="complete", inputs=("the dog",), sampling=cut)
    assert (choice.text, choice.stop_string) == (free.text[: free.text.index(stop)], stop)
    assert free.stop_string == ""
