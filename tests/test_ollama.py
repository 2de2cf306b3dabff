"""Ollama's API: what its bodies mean, its words, its lines; and its routes on a server with fake engines."""

import asyncio
import hashlib
import json
import math
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from harness import Json, Server
from hypothesis import given
from hypothesis import strategies as st
from test_dialects import FINE, json_values

import app

GOLDENS = Path(__file__).with_name("goldens")
MESSAGES = [{"role": "User", "content": "Hi"}]
AT = "2025-01-02T03:04:05.678901Z"
DONE = app.Done("stop", 31, 8, 0.25, 0.125, load_seconds=1.5, total_seconds=1.875)
TOKEN = app.TokenLogprob("Par", -0.25, b"Par", (app.TokenLogprob("Par", -0.25, b"Par"),))
PNG = "iVBORw0KGgo="


def chat(**fields: Any) -> app.ChatRequest:
    """Parse a body of /api/chat."""
    return app.OLLAMA_CHAT.parse({"model": "m", "messages": MESSAGES, **fields})


def generate(**fields: Any) -> app.ChatRequest:
    """Parse a body of /api/generate."""
    return app.OLLAMA_GENERATE.parse({"model": "m", "prompt": "Hi", **fields})


def refusal(dialect: app.Dialect, body: Json) -> str:
    """The text that a wrong body gets."""
    with pytest.raises(app.ServerError) as raised:
        dialect.parse(body)
    assert raised.value.status in (400, 403, 404)
    return str(dialect.error(raised.value)["error"])


# -- what is asked ------------------------------------------------------------


def test_a_chat() -> None:
    """It streams unless told not to; roles in any case; names of fields too; unknown ones are named."""
    assert chat() == app.ChatRequest("m", (app.Message("user", "Hi"),))
    assert app.OLLAMA_CHAT.parse({"Model": "m", "MESSAGES": MESSAGES, "Stream": False}).stream is False
    assert chat(shift=True, options={"mirostat": 1, "num_gpu": 1, "num_thread": 2}).ignored == (
        "shift", "options.mirostat",
    )  # fmt: skip
    assert app.OLLAMA_CHAT.parse({"name": " m ", "messages": MESSAGES}).model == "m"


def test_options_with_fractions() -> None:
    """Integers lose theirs, as in Ollama; numbers keep it."""
    chosen = chat(options={"num_predict": 5.9, "top_k": 7.0, "seed": 1.5, "temperature": 0.5, "stop": "x"}).sampling
    assert chosen == app.Sampling(max_tokens=5, top_k=7, seed=1, temperature=0.5, stop=("x",))


@pytest.mark.parametrize(("field", "empty"), [("messages", []), ("messages", None), ("prompt", ""), ("prompt", None)])
def test_nothing_to_answer(field: str, empty: Any) -> None:
    """Loads, or with a keep_alive of 0 unloads; the reply is one piece although streams are the default."""
    dialect = app.OLLAMA_CHAT if field == "messages" else app.OLLAMA_GENERATE
    for alive, task in ((None, "load"), (5, "load"), ("5m", "load"), (0, "unload"), ("0s", "unload"), (-1, "load")):
        parsed = dialect.parse({"model": "m", field: empty, "keep_alive": alive})
        assert (parsed.task, parsed.stream) == (task, False)
        whole = said_whole(dialect, parsed, (app.Started(0), app.Done(parsed.task, 0, 0, 0, 0, 1.0, 1.0)))  # type: ignore[arg-type]
        said = {"message": {"role": "assistant", "content": ""}} if field == "messages" else {"response": ""}
        assert whole == {"model": "m", "created_at": "", **said, "done": True, "done_reason": task}


@pytest.mark.parametrize(
    ("value", "seconds"), [("300", 300), (1.5, 1.5), ("1h30m", 5400), (-1, math.inf), ("-1m", math.inf), ("0", 0)]
)
def test_keep_alive(value: Any, seconds: float) -> None:
    """In all its forms, digits in a text included."""
    assert chat(keep_alive=value).keep_alive == generate(keep_alive=value).keep_alive == seconds


def test_generate_is_a_conversation() -> None:
    """The system prompt, what the context holds, the prompt with its images."""
    plain = generate(system="Be brief.", images=[PNG])
    assert plain.messages == (app.Message("system", "Be brief."), app.Message("user", "Hi", images=(PNG,)))
    assert (plain.task, plain.stream, plain.inputs) == ("chat", True, ())
    first = said_whole(app.OLLAMA_GENERATE, plain, (app.Started(1), app.Text("Ho"), DONE))
    assert all(type(number) is int for number in first["context"])
    texts = [message.content for message in generate(context=first["context"], prompt="And?").messages]
    assert texts == ["Be brief.", "Hi", "Ho", "And?"]
    texts = [message.content for message in generate(context=first["context"], system="", prompt="And?").messages]
    assert texts == ["Be brief.", "Hi", "Ho", "And?"]  # clients send an empty one for none


@pytest.mark.parametrize("context", [[1, 2, 3], [300], [-1], list(b"turns:"), list(b"turns:[[5]]"), list(b'turns:{"')])
def test_a_context_of_somebody_else(context: list[int]) -> None:
    """Token ids of Ollama's cannot be continued here; that is said."""
    assert "'context'" in refusal(app.OLLAMA_GENERATE, {"model": "m", "prompt": "Hi", "context": context})


def test_generate_completes_a_text() -> None:
    """With raw as it is; with a suffix in the middle; raw gives no context."""
    raw = generate(raw=True)
    assert (raw.task, raw.inputs, raw.messages) == ("complete", ("Hi",), ())
    assert "context" not in said_whole(app.OLLAMA_GENERATE, raw, (app.Started(1), app.Text("Ho"), DONE))
    middle = generate(suffix="end")
    assert (middle.task, middle.inputs, middle.suffix) == ("complete", ("Hi",), "end")


@pytest.mark.parametrize(
    ("template", "system", "text"),
    [
        ("{{ .Prompt }}", "S", "Hi"),
        ("{{ if .System }}<s>{{ .System }}</s>{{ end }}<u>{{ .Prompt }}</u>{{ .Response }}<end>", "S",
         "<s>S</s><u>Hi</u>"),
        ("{{ if .System }}<s>{{ .System }}</s>{{ end }}<u>{{ .Prompt }}</u>{{ .Response }}<end>", None, "<u>Hi</u>"),
        ("{{- if .System }}a{{ else }}b{{ end -}}  \n{{.Prompt}}", None, "bHi"),
        ("{{ if .Prompt }}{{ if .System }}x{{ end }}{{ .Prompt }}{{ end }}!", None, "Hi!"),
    ],
)  # fmt: skip
def test_simple_templates(template: str, system: str | None, text: str) -> None:
    """Ollama's older templates are written out; what follows the response is not."""
    parsed = generate(template=template, system=system)
    assert (parsed.task, parsed.inputs) == ("complete", (text,))


@pytest.mark.parametrize(
    ("field", "form", "dimensions"), [("a", 0, None), (["a", "b"], 8, 8), (["a"], -1, None), (["a"], 3.0, 3)]
)
def test_embed(field: Any, form: Any, dimensions: int | None) -> None:
    """One text or several, cut to fit unless that is not wanted."""
    parsed = app.OLLAMA_EMBED.parse({"model": "m", "input": field, "dimensions": form})
    assert (parsed.task, parsed.stream, parsed.truncate) == ("embed", False, True)
    assert (parsed.inputs, parsed.dimensions) == (tuple(field), dimensions)
    assert app.OLLAMA_EMBED.parse({"model": "m", "input": "a", "truncate": False}).truncate is False


@pytest.mark.parametrize("value", [None, "", []])
def test_nothing_to_embed(value: Any) -> None:
    """Only loads."""
    parsed = app.OLLAMA_EMBED.parse({"model": "m", "input": value})
    assert parsed.task == "load"
    done = (app.Started(0), app.Done("load", 0, 0, 0, 0))
    assert said_whole(app.OLLAMA_EMBED, parsed, done) == {"model": "m", "embeddings": []}
    parsed = app.OLLAMA_EMBEDDINGS.parse({"model": "m", "prompt": ""})
    assert said_whole(app.OLLAMA_EMBEDDINGS, parsed, done) == {"embedding": []}


def test_vectors() -> None:
    """Unit length and cut to size in the newer form, as the model made them in the older one."""
    events = (app.Started(4), app.Result([[3.0, 4.0, 12.0], [0.0, 0.0, 0.0]]), DONE)
    reply = said_whole(app.OLLAMA_EMBED, app.OLLAMA_EMBED.parse({"model": "m", "input": ["a", "b"]}), events)
    assert reply["embeddings"] == [[3 / 13, 4 / 13, 12 / 13], [0, 0, 0]]
    assert (reply["prompt_eval_count"], reply["total_duration"], reply["load_duration"]) == (31, 1875000000, 1500000000)
    cut = app.OLLAMA_EMBED.parse({"model": "m", "input": ["a", "b"], "dimensions": 2})
    assert said_whole(app.OLLAMA_EMBED, cut, events)["embeddings"][0] == [0.6, 0.8]
    old = app.OLLAMA_EMBEDDINGS.parse({"model": "m", "prompt": "a"})
    assert said_whole(app.OLLAMA_EMBEDDINGS, old, events) == {"embedding": [3, 4, 12]}


def test_tokens() -> None:
    """There and back."""
    for field in ("prompt", "input"):
        assert app.OLLAMA_TOKENIZE.parse({"model": "m", field: "Hi"}).inputs == ("Hi",)
    parsed = app.OLLAMA_TOKENIZE.parse({"model": "m", "prompt": ""})
    assert (parsed.task, parsed.inputs) == ("tokenize", ("",))
    assert said_whole(app.OLLAMA_TOKENIZE, parsed, (app.Started(0), app.Result([1, 2]), DONE)) == {"tokens": [1, 2]}
    parsed = app.OLLAMA_DETOKENIZE.parse({"model": "m", "tokens": [1, 2]})
    assert (parsed.task, parsed.inputs) == ("detokenize", ((1, 2),))
    assert said_whole(app.OLLAMA_DETOKENIZE, parsed, (app.Started(0), app.Result("Hi"), DONE)) == {"text": "Hi"}


# -- what is refused ----------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "fields", "text"),
    [
        (app.OLLAMA_CHAT, {"model": None}, "model is required"),
        (app.OLLAMA_GENERATE, {"model": None}, "model '' not found"),
        (app.OLLAMA_EMBED, {"model": None}, 'model "" not found, try pulling it first'),
        (app.OLLAMA_EMBEDDINGS, {"model": ""}, "model is required"),
        (app.OLLAMA_CHAT, {"top_logprobs": 21}, "top_logprobs must be between 0 and 20"),
        (app.OLLAMA_GENERATE, {"top_logprobs": -1, "model": ""}, "top_logprobs must be between 0 and 20"),
        (app.OLLAMA_CHAT, {"keep_alive": True}, "Unsupported type: 'bool'"),
        (app.OLLAMA_CHAT, {"think": "huge"},
         'invalid think value: "huge" (must be "high", "medium", "low", "max", true, or false)'),
        (app.OLLAMA_CHAT, {"format": "xml"}, 'invalid format: "xml"; expected "json" or a valid JSON Schema object'),
        (app.OLLAMA_GENERATE, {"prompt": "x", "raw": True, "system": "x"},
         "raw mode does not support template, system, or context"),
        (app.OLLAMA_EMBED, {"input": 0}, "invalid input type"),
        (app.OLLAMA_EMBED, {"input": [1]}, "invalid input type"),
        (app.OLLAMA_EMBED, {"input": {"a": 1}}, "invalid input type"),
        (app.OLLAMA_CHAT, {"model": "gpt-oss:120b-cloud"}, "ollama cloud is disabled: remote model is unavailable"),
    ],
)  # fmt: skip
def test_refusals_in_ollamas_words(dialect: app.Dialect, fields: Json, text: str) -> None:
    """Its clients look for some of them."""
    assert refusal(dialect, {"model": "m", **fields}) == text


@pytest.mark.parametrize(
    ("field", "dialect", "fields"),
    [
        ("options.temperature", app.OLLAMA_CHAT, {"options": {"temperature": "hot"}}),
        ("options.num_ctx", app.OLLAMA_CHAT, {"options": {"num_ctx": "big"}}),
        ("options", app.OLLAMA_CHAT, {"options": [1]}),
        ("keep_alive", app.OLLAMA_CHAT, {"keep_alive": "banana"}),
        ("messages.0.tool_calls.0.function.arguments", app.OLLAMA_CHAT,
         {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}]}),
        ("messages.0.images.0", app.OLLAMA_CHAT, {"messages": [{"role": "user", "images": ["?"]}]}),
        ("images.1", app.OLLAMA_GENERATE, {"images": [PNG, "?"]}),
        ("template", app.OLLAMA_GENERATE, {"prompt": "x", "template": "{{ range .Messages }}{{ end }}"}),
        ("template", app.OLLAMA_GENERATE, {"prompt": "x", "template": "{{ end }}"}),
        ("context", app.OLLAMA_GENERATE, {"prompt": "x", "template": "{{ .Prompt }}", "context": list(b"turns:[]")}),
        ("images", app.OLLAMA_GENERATE, {"prompt": "x", "raw": True, "images": [PNG]}),
        ("messages", app.OLLAMA_GENERATE, {"messages": MESSAGES}),
        ("tokens.0", app.OLLAMA_DETOKENIZE, {"tokens": ["x"]}),
        ("dimensions", app.OLLAMA_EMBED, {"input": "x", "dimensions": "8"}),
    ],
)  # fmt: skip
def test_refusals_name_the_field(field: str, dialect: app.Dialect, fields: Json) -> None:
    """What is wrong, and where."""
    assert f"'{field}" in refusal(dialect, {"model": "m", **fields})


def test_missing_models() -> None:
    """The words differ from route to route, and a wrong name has one text everywhere."""
    missing = app.ModelNotFound("...")
    missing.model = "X{}"
    assert app.OLLAMA_CHAT.error(missing) == {"error": "model 'X{}' not found"}
    assert app.OLLAMA_EMBED.error(missing) == {"error": 'model "X{}" not found, try pulling it first'}
    assert isinstance(missing, app.NotFound) and (missing.kind, missing.status) == ("not_found", 404)
    assert type(app.error_of("not_found", "x")) is app.NotFound
    assert app.OLLAMA_CHAT.error(app.InvalidModelName("...")) == {"error": "invalid model name"}
    told = app.BadRequest('"m" does not support chat')
    assert app.OLLAMA_GENERATE.error(told) == {"error": '"m" does not support generate'}


fields = st.sampled_from([*app.GenerateBody.model_fields, *app.TextsBody.model_fields, "name", "Model", "x"])
DIALECTS = {
    "chat": app.OLLAMA_CHAT, "generate": app.OLLAMA_GENERATE, "embed": app.OLLAMA_EMBED,
    "embeddings": app.OLLAMA_EMBEDDINGS, "tokenize": app.OLLAMA_TOKENIZE, "detokenize": app.OLLAMA_DETOKENIZE,
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
@FINE
@given(st.dictionaries(fields, json_values, max_size=5))
def test_any_body_is_a_request_or_a_refusal(name: str, body: Json) -> None:
    """Never another exception; what comes out can be sent to an engine."""
    try:
        parsed = DIALECTS[name].parse({"model": "m", **body})
    except (app.BadRequest, app.NotFound):
        return
    frame = msgspec.msgpack.encode(app.Generate(1, parsed))
    assert msgspec.msgpack.decode(frame, type=app.Command) == app.Generate(1, parsed)


# -- replies ------------------------------------------------------------------

EVENTS: dict[str, tuple[app.Event, ...]] = {
    "answer": (app.Started(31), app.Thinking("Hm"), app.Thinking("m."), app.Text("Par", (TOKEN,)),
               app.Text("is ✓"), DONE),
    "calls": (
        app.Started(31), app.ToolCall(0, "call_a", "f"), app.ToolCall(0, arguments='{"b": 1,'),
        app.ToolCall(0, arguments=' "a": 2}'), app.ToolCall(1, "call_b", "g", "{}"),
        msgspec.structs.replace(DONE, reason="tool_calls"),
    ),
    "cut": (app.Started(8192), app.Text("x"), app.Done("length", 8192, 1, 0.5, 0.25, 0.0, 1.0)),
}  # fmt: skip


def said_lines(dialect: app.Dialect, request: app.ChatRequest, events: tuple[app.Event, ...]) -> list[Json]:
    """The stream's lines as a client reads them."""
    feed = dialect.stream(request)
    return [json.loads(dialect.frame(frame)) for event in events for frame in feed(event)]


def said_whole(dialect: app.Dialect, request: app.ChatRequest, events: tuple[app.Event, ...]) -> Json:
    """The reply in one piece."""

    async def stream() -> AsyncIterator[app.Event]:
        for event in events:
            yield event

    return dialect.whole(request, asyncio.run(app.fold(stream())))


def folded(lines: list[Json]) -> Json:
    """What a client makes of a stream: texts, calls and log-probabilities joined, the last line for the rest."""
    whole: Json = json.loads(json.dumps(lines[-1]))
    for part in (whole, *([whole["message"]] if "message" in whole else [])):
        source = [line["message"] if part is not whole else line for line in lines]
        for name in ("response", "content", "thinking"):
            if any(name in line for line in source):
                part[name] = "".join(line.get(name, "") for line in source)
        for name in ("tool_calls", "logprobs"):
            if found := [one for line in source for one in line.get(name, [])]:
                part[name] = found
    return whole


@pytest.mark.parametrize("route", ["chat", "generate"])
@pytest.mark.parametrize("name", EVENTS)
def test_folding_the_stream_equals_the_whole_reply(route: str, name: str) -> None:
    """In text, thinking, calls, counts, durations and reason; the goldens pin both."""
    dialect, request = DIALECTS[route], msgspec.structs.replace(chat(), model="m:1b", created_at=AT)
    lines, whole = said_lines(dialect, request, EVENTS[name]), said_whole(dialect, request, EVENTS[name])
    assert folded(lines) == whole
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert all("done_reason" not in line and "eval_count" not in line for line in lines[:-1])
    golden = json.loads((GOLDENS / f"ollama_{route}_{name}.json").read_text(encoding="utf-8"))
    assert {"stream": lines, "whole": whole} == golden


def test_several_answers() -> None:
    """Each line and each choice is in the form of its route."""
    request = msgspec.structs.replace(generate(options={"n": 2}), created_at=AT)
    events = (app.Started(1), app.Text("a"), app.Done("stop", 1, 1, 0, 0, last=False), app.Text("b", index=1),
              msgspec.structs.replace(DONE, index=1))  # fmt: skip
    assert [line["response"] for line in said_lines(app.OLLAMA_GENERATE, request, events)] == ["a", "", "b", ""]
    choices = said_whole(app.OLLAMA_GENERATE, request, events)["choices"]
    assert [(choice["index"], choice["response"], choice["done_reason"]) for choice in choices] == [
        (0, "a", "stop"), (1, "b", "stop"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shown"),
    [("m", "m:latest"), ("smollm2:135m", "smollm2:135m"), ("hf.co/a/b", "hf.co/a/b:latest"), ("a/b:Q4", "a/b:Q4"),
     ("a/b@v1", "a/b:latest@v1")],
)  # fmt: skip
def test_shown_names(name: str, shown: str) -> None:
    """Always with a tag, and what is shown is found again."""
    assert app.tagged(name) == shown
    assert app.resolve_name(shown).name == app.resolve_name(name).name


# -- routes -------------------------------------------------------------------


def told(server: Server, verb: str, path: str, **body: Any) -> tuple[int, Any]:
    """Status and body of one request."""
    response = server.client.request(verb, f"/api/{path}", json=body or None)
    kind = response.headers.get("content-type", "")
    if kind == "application/x-ndjson":
        return response.status_code, [json.loads(line) for line in response.text.splitlines()]
    return response.status_code, response.json() if kind.startswith("application/json") else response.text


def test_a_model_from_pull_to_delete(fake_server: Server) -> None:
    """What the command line does: show, pull, list, run, ps, copy, delete."""
    assert told(fake_server, "GET", "tags") == (200, {"models": []})
    assert told(fake_server, "POST", "show", model="fake/a") == (404, {"error": "model 'fake/a:latest' not found"})
    status, lines = told(fake_server, "POST", "pull", model="fake/a")
    assert (status, lines[0], lines[-1]) == (200, {"status": "pulling manifest"}, {"status": "success"})
    last = [line for line in lines if "digest" in line][-1]
    assert last["completed"] == last["total"] > 0
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", last["digest"]) and last["status"] == f"pulling {last['digest'][7:19]}"
    assert told(fake_server, "POST", "pull", name="fake/a", stream=False) == (200, {"status": "success"})
    (model,) = told(fake_server, "GET", "tags")[1]["models"]
    assert model["name"] == model["model"] == "fake/a:latest"
    assert re.fullmatch(r"[0-9a-f]{64}", model["digest"]) and model["size"] > 0
    assert all(model["details"][name] for name in ("format", "family", "parameter_size", "quantization_level"))
    shown = told(fake_server, "POST", "show", model="FAKE/A:latest")[1]
    assert shown["details"] == model["details"] and "completion" in shown["capabilities"]
    assert shown["model_info"]["general.architecture"] == "gpt2" and shown["model_info"]["gpt2.context_length"] > 0
    status, lines = told(
        fake_server, "POST", "chat", model="fake/a:latest", messages=[{"role": "user", "content": "count 3"}]
    )
    assert "".join(line["message"]["content"] for line in lines) == "0 1 2 " and lines[0]["model"] == "fake/a:latest"
    (running,) = told(fake_server, "GET", "ps")[1]["models"]
    assert (running["name"], running["digest"], running["state"]) == ("fake/a:latest", model["digest"], "ready")
    assert running["context_length"] == 512 and running["size"] > 0 == running["size_vram"]
    assert told(fake_server, "POST", "copy", source="fake/a", destination="B:x1") == (200, "")
    assert told(fake_server, "POST", "copy", source="fake/a", destination="fake/a") == (200, "")
    digests = {each["name"]: each["digest"] for each in told(fake_server, "GET", "tags")[1]["models"]}
    assert digests == {"fake/a:latest": model["digest"], "B:x1": model["digest"]}
    assert told(fake_server, "DELETE", "delete", model="fake/a") == (200, "")
    assert told(fake_server, "DELETE", "delete", model="fake/a") == (404, {"error": "model 'fake/a' not found"})
    reply = told(fake_server, "POST", "generate", model="b:X1", prompt="count 2", stream=False)[1]
    assert (reply["response"], reply["model"]) == ("0 1 ", "b:X1")
    assert told(fake_server, "DELETE", "models/B:x1") == (200, "")
    assert told(fake_server, "GET", "tags") == (200, {"models": []})


def test_load_and_unload(fake_server: Server) -> None:
    """By an empty prompt, in JSON; for ever is more than a hundred years; the model is gone soon after."""
    fake_server.have("fake/a")
    status, reply = told(fake_server, "POST", "generate", model="fake/a", keep_alive=-1)
    assert (status, reply["done_reason"], reply["response"]) == (200, "load", "")
    (running,) = told(fake_server, "GET", "ps")[1]["models"]
    assert int(running["expires_at"][:4]) > 2130
    status, reply = told(fake_server, "POST", "chat", model="fake/a", keep_alive=0)
    assert (status, reply["done_reason"]) == (200, "unload")
    for _ in range(200):
        if told(fake_server, "GET", "ps") == (200, {"models": []}):
            return
    raise AssertionError("it is still there")


def test_an_alias_with_its_own_ways(fake_server: Server) -> None:
    """Its system prompt, messages and parameters are used, and its parent's engine."""
    fake_server.have("fake/a")
    ways = {"system": "one two three", "messages": [{"role": "user", "content": "four"}]}
    parameters = {"num_predict": 2.0, "stop": ["9", "8"]}
    status, lines = told(
        fake_server, "POST", "create", **{"model": "mine", "from": "fake/a", "parameters": parameters, **ways}
    )
    assert (status, lines[-1]) == (200, {"status": "success"})
    body: Json = {"model": "Mine", "messages": [{"role": "user", "content": "count 5"}], "stream": False}
    reply = told(fake_server, "POST", "chat", **body)[1]
    assert (reply["message"]["content"], reply["prompt_eval_count"]) == ("0 1 ", 6)
    assert list(fake_server.client.get("/diag").json()["loaded"]) == ["fake/a"]
    shown = told(fake_server, "POST", "show", model="mine")[1]
    assert shown["system"] == "one two three" and shown["messages"] == ways["messages"]
    assert [line.split(maxsplit=1) for line in shown["parameters"].splitlines()] == [
        ["num_predict", "2"], ["stop", '"9"'], ["stop", '"8"'],
    ]  # fmt: skip
    assert shown["details"]["parent_model"] == "fake/a:latest" and "FROM fake/a:latest" in shown["modelfile"]
    models = told(fake_server, "GET", "tags")[1]["models"]
    assert models[0]["name"] == "mine:latest" and models[0]["digest"] != models[1]["digest"]
    status, _ = told(fake_server, "POST", "create", **{"model": "mine", "from": "mine", "system": "", "stream": False})
    assert status == 200
    assert told(fake_server, "POST", "chat", **body)[1]["prompt_eval_count"] == 3
    for body, text in (
        ({"model": "other"}, "neither 'from' or 'files' was specified"),
        ({"model": "a b", "from": "fake/a"}, "invalid model name"),
        ({"from": "fake/a"}, "invalid model name"),
        ({"model": "other", "from": "fake/a", "quantize": "q4"}, "'quantize'"),
        ({"model": "other", "from": "fake/a", "template": "{{ .Prompt }}"}, "'template'"),
        ({"model": "other", "files": {"m.gguf": "sha256:0"}}, "invalid digest format"),
        ({"model": "other", "files": {"m.gguf": "sha256:" + "0" * 64}}, "was not uploaded"),
    ):
        status, reply = told(fake_server, "POST", "create", **body)
        assert status == 400 and text in reply["error"], reply
    assert told(fake_server, "POST", "create", **{"model": "fake/a", "from": "fake/a", "system": "x"})[0] == 409
    assert told(fake_server, "POST", "create", **{"model": "other", "from": "gone"})[0] == 404


def test_uploaded_files(fake_server: Server, tmp_path: Path) -> None:
    """Checked by their digest, kept once; what is no GGUF file makes no model."""
    digest = "sha256:" + hashlib.sha256(b"no model").hexdigest()
    client, path = fake_server.client, f"/api/blobs/{digest}"
    assert [client.head(path).status_code, client.head("/api/blobs/x").status_code] == [404, 400]
    wrong = client.post(path, content=b"other")
    assert (wrong.status_code, wrong.json()["error"][:30]) == (400, 'digest mismatch, expected "sha')
    assert [client.post(path, content=b"no model").status_code for _ in range(2)] == [201, 200]
    assert client.head(path).status_code == 200
    status, reply = told(fake_server, "POST", "create", model="up", files={"m.gguf": digest})
    assert status == 400 and "'files'" in reply["error"]
    assert [file.name for file in (tmp_path / "state" / "blobs").iterdir()] == [digest[7:]]


def test_an_uploaded_model(fake_server: Server) -> None:
    """Runs, is listed, and its file goes with its last name."""
    source = app.resolve_name("smollm2:135m")
    data = app._packaged_files(source)[0].read_bytes()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    assert fake_server.client.post(f"/api/blobs/{digest}", content=data).status_code == 201
    created = {"model": "up:q4", "files": {"m.gguf": digest}, "stream": False}
    assert told(fake_server, "POST", "create", **created) == (200, {"status": "success"})
    shown = told(fake_server, "POST", "show", model="up:q4")[1]
    assert shown["details"]["quantization_level"] == "Q4_1" and "{%" in shown["template"]
    assert shown["model_info"]["tokenizer.ggml.tokens"] == [] and shown["model_info"]["llama.context_length"] == 8192
    assert told(fake_server, "POST", "generate", model="up:q4", prompt="count 1", stream=False)[1]["response"] == "0 "
    told(fake_server, "POST", "copy", source="up:q4", destination="again")
    assert told(fake_server, "DELETE", "delete", model="up:q4")[0] == 200
    assert fake_server.client.head(f"/api/blobs/{digest}").status_code == 200
    assert told(fake_server, "DELETE", "delete", model="again")[0] == 200
    assert fake_server.client.head(f"/api/blobs/{digest}").status_code == 404


def test_pulls_that_fail(fake_server: Server) -> None:
    """An unknown model is a last line of a stream, or a 500, as in Ollama; a wrong name is refused before."""
    for name in ("nosuch/model", "nosuch:7b"):
        status, lines = told(fake_server, "POST", "pull", model=name)
        assert (status, lines[0]) == (200, {"status": "pulling manifest"})
        assert lines[-1]["error"].startswith("pull model manifest: file does not exist")
        status, reply = told(fake_server, "POST", "pull", model=name, stream=False)
        assert status == 500 and reply["error"].startswith("pull model manifest: file does not exist")
    assert told(fake_server, "POST", "pull", model="a b") == (400, {"error": "invalid model name"})
    assert told(fake_server, "POST", "pull", insecure=True) == (400, {"error": "invalid model name"})
    assert told(fake_server, "POST", "pull", model="test/gated", stream=False)[0] == 403


def test_a_pull_goes_on_without_its_client(fake_server: Server) -> None:
    """The job is the server's."""
    with fake_server.client.stream("POST", "/api/pull", json={"model": "fake/b"}) as response:
        assert next(response.iter_lines()) == '{"status":"pulling manifest"}'
    (job,) = fake_server.client.get("/jobs").json()["jobs"]
    assert fake_server.finished(job["id"])["status"] == "succeeded"


@pytest.mark.parametrize(
    ("verb", "path", "body", "status", "reply"),
    [
        ("POST", "generate", {"model": "N", "prompt": "x"}, 404, {"error": "model 'N' not found"}),
        ("POST", "chat", {"model": "N"}, 404, {"error": "model 'N' not found"}),
        ("POST", "embed", {"model": "N", "input": "x"}, 404, {"error": 'model "N" not found, try pulling it first'}),
        ("POST", "show", {"name": "N"}, 404, {"error": "model 'N:latest' not found"}),
        ("POST", "show", {"x": 1}, 400, {"error": "model is required"}),
        ("POST", "show", {"model": "a b"}, 400, {"error": "invalid model name"}),
        ("POST", "chat", {"model": "a b"}, 400, {"error": "invalid model name"}),
        ("DELETE", "delete", {"x": 1}, 400, {"error": "model is required"}),
        ("POST", "copy", {"source": "N", "destination": "x"}, 404, {"error": 'model "N" not found'}),
        ("POST", "copy", {"source": "N", "destination": "x y"}, 400, {"error": 'destination "x y" is invalid'}),
        ("POST", "push", {"x": 1}, 400, {"error": "model is required"}),
        ("POST", "me", {}, 401, {"error": "unauthorized", "signin_url": ""}),
        ("POST", "signout", {}, 200, {}),
        ("POST", "experimental/web_search", {}, 403, {"error": "ollama cloud is disabled: web search is unavailable"}),
        ("GET", "experimental/model-recommendations", {}, 200, {"recommendations": []}),
        ("GET", "status", {}, 200, {"cloud": {"disabled": True, "source": "env"}}),
        ("GET", "version", {}, 200, {"version": app.OLLAMA_VERSION}),
        ("GET", "show", {}, 405, "405 method not allowed"),
        ("GET", "nope", {}, 404, "404 page not found"),
    ],
)  # fmt: skip
def test_fixed_replies(server: Server, verb: str, path: str, body: Json, status: int, reply: Any) -> None:
    """Status and words as clients know them."""
    assert told(server, verb, path, **body) == (status, reply)


def test_liveness(server: Server) -> None:
    """By GET and HEAD."""
    assert server.client.get("/").text == "Ollama is running"
    for path in ("/", "/api/version", "/api/tags"):
        response = server.client.head(path)
        assert (response.status_code, response.content) == (200, b"")
    missing = server.client.post("/api/chat")
    assert (missing.status_code, missing.json()) == (400, {"error": "missing request body"})


@pytest.mark.parametrize("text", ['{"a": 1e999}', '{"a": "\\ud83d"}', '{"a": NaN}', "[" * 100_000])
def test_arguments_that_no_reply_can_hold_are_empty(text: str) -> None:
    """An engine's own parser may pass them on."""
    assert app.native_call(0, app.Call("c", "f", text))["function"]["arguments"] == {}


@pytest.mark.parametrize("name", ["m:cloud", "m:7b-CLOUD"])
def test_a_name_of_the_cloud_is_refused(name: str) -> None:
    """And a long name is not read letter by letter over and over."""
    with pytest.raises(app.CloudDisabled):
        chat(model=name)
    assert chat(model="cloud:7b").model == "cloud:7b"


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("a  {{- .Prompt -}}  b {{ .Response }} c", "aHib "),
        ("{{if .System}}S{{ .System }}{{else}}no{{end}} {{.Prompt}}", "no Hi"),
    ],
)
def test_white_space_and_conditions_of_a_go_template(template: str, prompt: str) -> None:
    """A dash takes the white space beside it."""
    assert generate(template=template).inputs == (prompt,)


def test_a_model_made_with_options_of_every_kind_answers(fake_server: Server) -> None:
    """A bias of tokens is kept, and how many choices a reply has stays the request's to say."""
    fake_server.have("fake/a")
    ways = {"parameters": {"logit_bias": {"5": 1}, "n": 4, "format": "json"}, "stream": False}
    made = fake_server.client.post("/api/create", json={"model": "mine", "from": "fake/a", **ways})
    assert made.status_code == 200, made.text
    asked = {"model": "mine", "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "count 2"}]}
    for _ in range(2):
        said = fake_server.client.post("/v1/messages", json=asked).text
        assert said.count("event: message_stop") == 1
        fake_server.stop()
        fake_server.start()
    both = fake_server.client.post("/chat", json={"model": "mine", "prompt": "count 1", "regex": "a", "stream": False})
    assert both.status_code == 200, both.text
