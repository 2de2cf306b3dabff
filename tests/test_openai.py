"""OpenAI's dialects and rerank: what a body means, what is refused, what goes back; pure, then over HTTP."""

import asyncio
import base64
import json
import math
import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from harness import Server
from hubstub import HubStub
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app

GOLDENS = Path(__file__).with_name("goldens")
FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SECRET = "s3cret-value"
USER = {"role": "user", "content": "Hi"}
Json = dict[str, Any]
Events = tuple[app.Event, ...]


def tool(name: str = "get_weather", **fields: Any) -> Json:
    """A tool as a client declares it."""
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}, **fields}}


def parse(**fields: Any) -> app.ChatRequest:
    """Parse a chat body with a model and a message, and these fields."""
    return app.openai_chat_parse({"model": "m", "messages": [USER], **fields})


def complete(**fields: Any) -> app.ChatRequest:
    """Parse a completion's body."""
    return app.openai_completions_parse({"model": "m", "prompt": "Hi", **fields})


def embed(**fields: Any) -> app.ChatRequest:
    """Parse an embeddings body."""
    return app.openai_embeddings_parse({"model": "m", "input": "Hi", **fields})


def rerank(**fields: Any) -> app.ChatRequest:
    """Parse a rerank body."""
    return app.rerank_parse({"model": "m", "query": "q", "documents": ["a", "b", "c"], **fields})


# -- parse: what is asked -----------------------------------------------------


def test_smallest_body() -> None:
    """One piece unless a stream is asked for; what a request does not say stays unset, temperature included."""
    parsed = parse()
    assert msgspec.structs.replace(parsed, wire={}) == app.ChatRequest("m", (app.Message("user", "Hi"),), stream=False)
    assert parsed.sampling.chosen() == {}
    assert parse(stream=True).stream and not parse(stream=None).stream


def test_ids_are_made_once() -> None:
    """Stream and whole reply have the id and the time of the request; two requests have two ids."""
    one, two = parse(), parse()
    assert one.wire["head"]["id"].startswith("chatcmpl-") and one.wire["head"]["id"] != two.wire["head"]["id"]
    assert complete().wire["head"]["id"].startswith("cmpl-")
    assert rerank().wire["id"].startswith("rerank-")
    assert one.wire["head"]["model"] == "m" and type(one.wire["head"]["created"]) is int


def test_options_in_openai_words() -> None:
    """Every option of a chat completion lands in its field."""
    fields = {
        "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.25, "seed": 3, "stop": "x", "n": 2,
        "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"15": -100}, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    assert parse(**fields).sampling.chosen() == {
        "max_tokens": 7, "temperature": 0.5, "top_p": 0.25, "seed": 3, "stop": ("x",), "n": 2,
        "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {15: -100}, "logprobs": 2,
    }  # fmt: skip
    assert parse(**fields).ignored == ()


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": None}, 5),
        ({"options": {"num_predict": 4}}, 4),
        ({"options": {"num_predict": 4}, "max_completion_tokens": 6}, 6),
    ],
)
def test_longest_answer(fields: Json, tokens: int) -> None:
    """The new name wins over the old one, and both over Ollama's options."""
    assert parse(**fields).sampling.max_tokens == tokens


def test_fields_of_ollama() -> None:
    """They are no part of the protocol, and mean here what they mean there."""
    parsed = parse(options={"top_k": 3, "num_ctx": 64}, num_ctx=128, keep_alive="5m", think=True, truncate=True)
    assert parsed.sampling.chosen() == {"top_k": 3, "context_length": 128}
    assert (parsed.keep_alive, parsed.think, parsed.think_if_able, parsed.truncate) == (300, True, False, True)
    assert parsed.ignored == ()


@pytest.mark.parametrize(
    ("effort", "think"),
    [
        ("none", False), ("minimal", "low"), ("low", "low"), ("medium", "medium"), ("high", "high"), ("max", "max"),
        ("xhigh", "max"), ("ultra", "max"),
    ],
)  # fmt: skip
def test_effort(effort: str, think: bool | str) -> None:
    """Both spellings; a model that cannot think is asked all the same."""
    for fields in ({"reasoning_effort": effort}, {"reasoning": {"effort": effort}}):
        parsed = parse(**fields)
        assert (parsed.think, parsed.think_if_able) == (think, True)
    assert parse(reasoning_effort=effort, think=False).think is False
    assert parse(reasoning={"effort": None}).think is None


SCHEMA: Json = {"type": "object", "$defs": {"a": {"type": "null"}}, "properties": {"a": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize("strict", [True, False, None])
def test_response_formats(strict: bool | None) -> None:
    """A schema is passed on as it is, `strict` or not."""
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": strict}}
    parsed = parse(response_format=wanted)
    assert parsed.sampling.format == SCHEMA and parsed.ignored == ()
    assert parse(response_format={"type": "json_object"}).sampling.format == "json"
    assert parse(response_format={"type": "text"}).sampling.format is None


def test_tools_and_choice() -> None:
    """Their four forms; a named one leaves only itself."""
    tools = [tool(), tool("other", strict=True, description="d")]
    parsed = parse(tools=tools)
    assert [each["function"]["name"] for each in parsed.tools] == ["get_weather", "other"]
    assert (parsed.tool_choice, parsed.parallel_tool_calls) == ("auto", None)
    for choice in ("auto", "none", "required"):
        assert parse(tools=tools, tool_choice=choice).tool_choice == choice
    named = parse(tools=tools, tool_choice={"type": "function", "function": {"name": "other"}})
    assert [each["function"]["name"] for each in named.tools] == ["other"]
    assert named.tool_choice == "required"
    assert parse(tools=tools, parallel_tool_calls=True).parallel_tool_calls
    assert not parse(tools=tools, parallel_tool_calls=False).parallel_tool_calls


def test_history() -> None:
    """What our own replies hold may come back: null content, calls, thoughts, a tool's answer, the developer's role."""
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []}
    parsed = parse(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]},
            {**said, "reasoning": "Hm.", "reasoning_content": "Hm."},
            {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
            {"role": "assistant", "content": "Sun", "reasoning": "Oh."},
            USER,
            USER,
        ]
    )
    assert parsed.messages == (
        app.Message("developer", "Be brief."),
        app.Message("user", "Weather?"),
        app.Message("assistant", "", "Hm.", (), (app.Call("call_1", "get_weather", '{"city": "Paris"}'),)),
        app.Message("tool", "Sunny", call_id="call_1", tool_name="get_weather"),
        app.Message("assistant", "Sun", "Oh."),
        app.Message("user", "Hi"),
        app.Message("user", "Hi"),
    )
    assert parsed.ignored == ()


def test_what_has_no_effect_is_not_named() -> None:
    """But what would have one is, and so is `best_of`."""
    quiet = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
    assert parse(**dict.fromkeys(quiet, "x")).ignored == ()
    assert parse(stream=True, stream_options={"include_usage": True, "include_obfuscation": False}).ignored == ()
    assert parse(verbosity="low", prediction={"type": "content"}).ignored == ("verbosity", "prediction")
    assert complete(best_of=3, user="x").ignored == ("best_of",)
    assert embed(user="x", what=1).ignored == ("what",)
    assert rerank(rank_fields=["text"]).ignored == ("rank_fields",)


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [
        ("Hi", ("Hi",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["a", [3]], ("a", (3,))),
    ],
)
def test_texts_and_tokens(prompt: Any, inputs: Any) -> None:
    """A text, its tokens, or several."""
    for parsed, task in ((complete(prompt=prompt, n=2), "complete"), (embed(input=prompt), "embed")):
        assert (parsed.inputs, parsed.task, parsed.stream, parsed.messages) == (inputs, task, False, ())
    assert complete(prompt=prompt, n=2).width() == 2 * len(inputs)


def test_completion_options() -> None:
    """`logprobs` is a number here, and 0 asks for the tokens' own."""
    assert complete(logprobs=0).sampling.chosen() == {"logprobs": 0}
    assert complete(logprobs=5, echo=True, max_tokens=0).sampling.chosen() == {
        "logprobs": 5, "echo": True, "max_tokens": 0,
    }  # fmt: skip
    assert complete(echo=False).sampling.chosen() == {}
    assert complete(logprobs=None, options={"logprobs": True, "top_logprobs": 2}).sampling.logprobs == 2
    assert complete(options={"top_k": 1}, seed=2, suffix="end").suffix == "end"
    assert complete(stream=True, suffix=None, keep_alive=0).keep_alive == 0


def test_rerank_inputs() -> None:
    """The query first, then the documents, in both forms."""
    parsed = rerank(documents=["a", {"text": "b"}])
    assert (parsed.task, parsed.inputs, parsed.stream) == ("rerank", ("q", "a", "b"), False)


# -- parse: what is refused ---------------------------------------------------

NAMED = {"type": "function", "function": {"name": "x"}}
WRONG_CHAT: list[tuple[str, Json]] = [
    ("model", {"model": None}), ("model", {"model": 5}), ("messages", {"messages": []}), ("messages", {"messages": 5}),
    ("messages", {"messages": None}), ("messages.0.role", {"messages": [{"role": SECRET, "content": ""}]}),
    ("messages.0.content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages.0.content.0.type", {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
    ("stream", {"stream": "yes"}), ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": SECRET}}),
    ("stream_options", {"stream": True, "stream_options": SECRET}),
    ("max_completion_tokens", {"max_completion_tokens": SECRET}), ("n", {"n": 0}), ("logprobs", {"logprobs": 3}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}), ("reasoning_effort", {"reasoning_effort": SECRET}),
    ("reasoning.effort", {"reasoning": {"effort": 5}}), ("response_format", {"response_format": SECRET}),
    ("response_format.type", {"response_format": {"type": SECRET}}), ("response_format.type", {"response_format": {}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("response_format.json_schema.schema", {"response_format": {"type": "json_schema", "json_schema": {}}}),
    ("response_format.json_schema.schema",
     {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": [SECRET]}}}),
    ("tools", {"tools": [tool(), tool()]}), ("tools.0.function", {"tools": [{"type": "function"}]}),
    ("tools.0.function.name", {"tools": [tool("a b")]}), ("tools.0.type", {"tools": [{**tool(), "type": SECRET}]}),
    ("tool_choice", {"tool_choice": "required"}), ("tool_choice", {"tools": [tool()], "tool_choice": NAMED}),
    ("keep_alive", {"keep_alive": "banana"}), ("options.top_k", {"options": {"top_k": SECRET}}),
    ("messages.0.tool_calls.0.function.arguments",
     {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]}),
    ("messages.0.content.0.image_url",
     {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}]}),
]  # fmt: skip


def told(dialect: app.Dialect, body: Json) -> Json:
    """The error that a body gets, in the dialect's words."""
    with pytest.raises(app.BadRequest) as raised:
        dialect.parse(body)
    error: Json = dialect.error(raised.value)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", None)
    assert SECRET not in error["message"]
    return error


@pytest.mark.parametrize(("param", "fields"), WRONG_CHAT, ids=lambda value: str(value)[:40])
def test_wrong_chats(param: str, fields: Json) -> None:
    """Each is a 400 that names the place and never repeats the value."""
    assert told(app.OPENAI_CHAT, {"model": "m", "messages": [USER], **fields})["param"] == param


def test_no_messages_has_its_fixed_text() -> None:
    """As Ollama words it."""
    for body in ({"model": "m"}, {"model": "m", "messages": []}):
        assert told(app.OPENAI_CHAT, body)["message"] == "[] is too short - 'messages'"


@pytest.mark.parametrize(
    ("dialect", "param", "fields"),
    [
        ("OPENAI_COMPLETIONS", "model", {"model": ""}),
        ("OPENAI_COMPLETIONS", "prompt", {"prompt": None}),
        ("OPENAI_COMPLETIONS", "prompt", {"prompt": []}),
        ("OPENAI_COMPLETIONS", "prompt", {"prompt": 5}),
        ("OPENAI_COMPLETIONS", "prompt.0", {"prompt": [True]}),
        ("OPENAI_COMPLETIONS", "logprobs", {"logprobs": True}),
        ("OPENAI_COMPLETIONS", "logprobs", {"logprobs": 21}),
        ("OPENAI_COMPLETIONS", "suffix", {"suffix": 5}),
        ("OPENAI_COMPLETIONS", "echo", {"echo": "yes"}),
        ("OPENAI_COMPLETIONS", "stream_options", {"stream_options": {}}),
        ("OPENAI_EMBEDDINGS", "input", {"input": []}),
        ("OPENAI_EMBEDDINGS", "input", {"input": None}),
        ("OPENAI_EMBEDDINGS", "input.0", {"input": [None]}),
        ("OPENAI_EMBEDDINGS", "encoding_format", {"encoding_format": 5}),
        ("OPENAI_EMBEDDINGS", "dimensions", {"dimensions": 0}),
        ("RERANK", "query", {"query": None}),
        ("RERANK", "query", {"query": [SECRET]}),
        ("RERANK", "documents", {"documents": []}),
        ("RERANK", "documents", {"documents": None}),
        ("RERANK", "documents.1", {"documents": ["a", {"title": SECRET}]}),
        ("RERANK", "top_n", {"top_n": 0}),
        ("RERANK", "return_documents", {"return_documents": "yes"}),
    ],
)
def test_other_wrong_bodies(dialect: str, param: str, fields: Json) -> None:
    """The same for the other endpoints."""
    body = {"model": "m", "prompt": "Hi", "input": "Hi", "query": "q", "documents": ["a"], **fields}
    assert told(getattr(app, dialect), body)["param"] == param


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("abc'", max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=6,
)
FIELDS = sorted({*app.OpenAIChatBody.model_fields, *app.CompletionBody.model_fields, *app.EmbeddingsBody.model_fields})


@settings(FINE, max_examples=100)
@given(st.dictionaries(st.sampled_from([*FIELDS, "query", "documents", "top_n"]), json_values, max_size=4))
def test_any_body_is_a_request_or_a_bad_request(body: Json) -> None:
    """Never another exception; and what comes out can be sent to an engine as it is."""
    usual = {"model": "m", "messages": [USER], "prompt": "Hi", "input": "Hi", "query": "q", "documents": ["a"]}
    for dialect in (app.OPENAI_CHAT, app.OPENAI_COMPLETIONS, app.OPENAI_EMBEDDINGS, app.RERANK):
        for candidate in (body, {**usual, **body}):
            try:
                parsed = dialect.parse(candidate)
            except app.BadRequest as error:
                assert dialect.error(error)["error"]["param"]
            else:
                frame = msgspec.msgpack.encode(app.Generate(1, parsed))
                assert msgspec.msgpack.decode(frame, type=app.Command) == app.Generate(1, parsed)


# -- replies ------------------------------------------------------------------


def logprob(token: str, value: float, *top: app.TokenLogprob) -> app.TokenLogprob:
    """A token's log-probability."""
    return app.TokenLogprob(token, value, token.encode(), top)


LIKELY = logprob("is", -0.25, logprob("is", -0.25), logprob("at", -1.5))
HALVES = (app.TokenLogprob("\ufffd", -1.0, b"\xc3"), app.TokenLogprob("\ufffd", -0.5, b"\xa9"))
DONE = app.Done("stop", 31, 8, 0.25, 0.125, 1.5, 1.875, 16)
END = app.Done("length", 31, 3, 0.1, 0.1, last=False)


def ended(reason: Any, **changes: Any) -> app.Done:
    """The end of a reply for this reason."""
    return msgspec.structs.replace(DONE, reason=reason, **changes)


CHATS: dict[str, Events] = {
    "answer": (app.Started(31), app.Text("Par"), app.Text("is ✓\n"), DONE),
    "empty": (app.Started(31), ended("length", completion_tokens=0)),
    "thinking": (app.Started(31), app.Thinking("Let "), app.Thinking("me see."), app.Text("Paris"), DONE),
    "calls": (
        app.Started(31),
        app.Text("Looking."),
        app.ToolCall(0, "call_a", "get_weather", '{"ci'),
        app.ToolCall(0, arguments='ty":"Paris"}'),
        app.ToolCall(1, "call_b", "now"),
        app.ToolCall(2, "call_c", "get_weather"),
        app.ToolCall(2, arguments="{}"),
        ended("tool_calls"),
    ),
    "only_empty_call": (app.Started(31), app.ToolCall(0, "call_a", "now"), ended("tool_calls")),
    "logprobs": (
        app.Started(31), app.Text("Paris", (LIKELY,)), app.Text("", HALVES[:1]), app.Text("é", HALVES[1:]), DONE,
    ),
    "choices": (
        app.Started(31),
        app.Text("b", index=1),
        app.Text("a"),
        app.Thinking("hm", 1),
        END,
        app.ToolCall(0, "call_a", "now", index=1),
        app.Text("B", (LIKELY,), 1),
        ended("tool_calls", index=1, last=False),
        ended("tool_calls", index=1, completion_tokens=11),  # what the server adds: the sums
    ),
}  # fmt: skip
TEXTS: dict[str, Events] = {
    "text": (app.Started(5), app.Text("Par"), app.Text("is ✓"), DONE),
    "echo": (
        app.Started(2),
        app.Text("é is", (logprob("é", math.nan), logprob(" ", -1.0), LIKELY)),
        app.Text("", HALVES[:1]),
        app.Text("é", HALVES[1:]),
        DONE,
    ),
    "prompts": (
        app.Started(5), app.Text("b", (LIKELY,), 1), app.Text("a"), app.Text("B", (LIKELY,), 1), END,
        ended("stop", index=1),  # the end of its choice and of all
    ),
}  # fmt: skip
SCENARIOS = [
    *((app.OPENAI_CHAT, "chat", name, events) for name, events in CHATS.items()),
    *((app.OPENAI_COMPLETIONS, "completions", name, events) for name, events in TEXTS.items()),
]
BODY: Json = {"model": "smollm2:135m", "messages": [USER], "prompt": "Hi"}


def request_of(dialect: app.Dialect, **fields: Any) -> app.ChatRequest:
    """A request whose id and time are always the same."""
    request = dialect.parse({**BODY, **fields})
    head = {"id": "id-1", "created": 1735787045, "model": request.model, "system_fingerprint": "fp_1"}
    return msgspec.structs.replace(request, wire={**request.wire, "head": head})


def width_of(events: Events) -> int:
    """How many choices there are."""
    return 1 + max(getattr(event, "index", 0) for event in events)


def chunks(dialect: app.Dialect, events: Events, usage: bool = True, **fields: Any) -> list[Json]:
    """The chunks of a stream, through bytes and back, as a client reads them."""
    options = {"stream": True, "n": width_of(events), **({"stream_options": {"include_usage": True}} if usage else {})}
    feed = dialect.stream(request_of(dialect, **options, **fields))
    sent = b"".join(dialect.frame(frame) for event in events for frame in feed(event)) + dialect.end
    *parts, last, rest = sent.split(b"\n\n")
    assert (last, rest) == (b"data: [DONE]", b"")
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [json.loads(part.removeprefix(b"data: ")) for part in parts]


def whole(dialect: app.Dialect, events: Events, request: app.ChatRequest | None = None) -> Json:
    """The reply in one piece, as JSON has it."""

    async def stream() -> AsyncIterator[app.Event]:
        for event in events:
            yield event

    request = request or request_of(dialect, n=width_of(events))
    made: Json = json.loads(json.dumps(dialect.whole(request, asyncio.run(app.fold(stream()))), allow_nan=False))
    return made


def folded(parts: list[Json]) -> Json:
    """What a client makes of the chunks: the shape of a whole reply."""
    reply = {name: parts[0][name] for name in ("id", "created", "model", "system_fingerprint")}
    choices: dict[int, Json] = {}
    for part in parts:
        assert {name: part[name] for name in reply} == reply
        for choice in part["choices"]:
            _fold_choice(choices.setdefault(choice["index"], {"index": choice["index"], "logprobs": None}), choice)
    for choice in choices.values():
        if "message" in choice:
            choice["message"]["tool_calls"] = [call for _, call in sorted(choice["message"]["tool_calls"].items())]
    return {**reply, "choices": [choice for _, choice in sorted(choices.items())], "usage": parts[-1]["usage"]}


def _fold_choice(into: Json, choice: Json) -> None:
    assert into.get("finish_reason") is None, "something follows the end of a choice"
    into["finish_reason"] = choice["finish_reason"]
    if choice["logprobs"]:
        into["logprobs"] = into["logprobs"] or {}
        for name, values in choice["logprobs"].items():
            into["logprobs"][name] = (into["logprobs"].get(name) or []) + values if values is not None else None
    if "text" in choice:
        into["text"] = into.get("text", "") + choice["text"]
        return
    message = into.setdefault("message", {"content": "", "tool_calls": {}})
    for name, value in choice["delta"].items():
        if name != "tool_calls":
            message[name] = message.get(name, "") + value
    for delta in choice["delta"].get("tool_calls", []):
        _fold_call(message["tool_calls"], delta)


def _fold_call(calls: dict[int, Json], delta: Json) -> None:
    assert type(delta["index"]) is int and type(delta["function"]["arguments"]) is str
    if delta["index"] not in calls:
        assert delta["index"] == len(calls) and delta["type"] == "function"
        calls[delta["index"]] = {"id": delta["id"], "type": "function", "function": {**delta["function"]}}
        return
    assert delta.keys() == {"index", "function"} and delta["function"].keys() == {"arguments"}
    calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]


def plain(reply: Json) -> Json:
    """A whole reply without what a stream does not say."""
    choices = [{**choice} for choice in reply["choices"]]
    for choice in (each for each in choices if "message" in each):
        message = {name: value for name, value in choice["message"].items() if name not in ("refusal", "annotations")}
        choice["message"] = {
            **message,
            "content": message["content"] or "",
            "tool_calls": message.get("tool_calls", []),
        }
    return {name: value for name, value in reply.items() if name != "object"} | {"choices": choices}


@pytest.mark.parametrize(("dialect", "kind", "name", "events"), SCENARIOS, ids=lambda value: str(value)[:12])
def test_stream_folds_to_whole(dialect: app.Dialect, kind: str, name: str, events: Events) -> None:
    """Text, thoughts, calls, log-probabilities, usage and finish reason of every choice."""
    assert folded(chunks(dialect, events)) == plain(whole(dialect, events))


@pytest.mark.parametrize(("dialect", "kind", "name", "events"), SCENARIOS, ids=lambda value: str(value)[:12])
def test_goldens(dialect: app.Dialect, kind: str, name: str, events: Events) -> None:
    """Stream and whole reply are exactly as recorded."""
    for form, made in (("stream", chunks(dialect, events)), ("whole", whole(dialect, events))):
        recorded = json.loads((GOLDENS / f"openai_{kind}_{name}_{form}.json").read_text(encoding="utf-8"))
        assert made == recorded


@pytest.mark.parametrize(("dialect", "kind", "name", "events"), SCENARIOS, ids=lambda value: str(value)[:12])
def test_order_of_a_stream(dialect: app.Dialect, kind: str, name: str, events: Events) -> None:
    """Usage comes alone at the end if asked for, and else nowhere; one end for each choice; one kind of object."""
    parts, bare = chunks(dialect, events), chunks(dialect, events, usage=False)
    assert [part["usage"] for part in parts[:-1]] == [None] * len(bare) and parts[-1]["choices"] == []
    assert all("usage" not in part for part in bare)
    assert [part["choices"] for part in bare] == [part["choices"] for part in parts[:-1]]
    ends = [part["choices"][0]["index"] for part in bare if part["choices"][0]["finish_reason"]]
    assert sorted(ends) == list(range(width_of(events)))
    assert {part["object"] for part in parts} == {"chat.completion.chunk" if kind == "chat" else "text_completion"}
    if kind == "chat":
        firsts = bare[: width_of(events)]
        assert all(part["choices"][0]["delta"] == {"role": "assistant", "content": ""} for part in firsts)
        assert all("role" not in part["choices"][0]["delta"] for part in bare[width_of(events) :])


whole_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
pieces = st.one_of(
    st.builds(app.Text, whole_text),
    st.builds(app.Thinking, whole_text),
    st.builds(app.ToolCall, st.just(0), st.just(""), st.just(""), whole_text),
)


@FINE
@given(st.lists(pieces), st.sampled_from(["stop", "length", "tool_calls"]), st.integers(0, 10**6))
def test_any_stream_folds_to_its_whole(events: list[app.Event], reason: Any, tokens: int) -> None:
    """However the pieces are mixed."""
    numbered: list[app.Event] = [app.Started(tokens)]
    calls = -1
    for event in events:
        opens = isinstance(event, app.ToolCall) and (calls < 0 or len(event.arguments) % 3 == 0)
        calls += opens
        if isinstance(event, app.ToolCall):
            identity = {"id": f"call_{calls}", "name": "f"} if opens else {}
            event = msgspec.structs.replace(event, call=calls, **identity)
        numbered.append(event)
    numbered.append(ended(reason, prompt_tokens=tokens))
    one = plain(whole(app.OPENAI_CHAT, tuple(numbered)))
    streamed = folded(chunks(app.OPENAI_CHAT, tuple(numbered)))
    for reply in (one, streamed):  # a thought without a text is a delta, but no thought
        for name in ("reasoning", "reasoning_content"):
            reply["choices"][0]["message"].setdefault(name, "")
    assert streamed == one


def test_empty_arguments_come_before_the_next_call() -> None:
    """A client that closes a call when the next one begins has its `{}` by then."""
    deltas = [part["choices"][0]["delta"] for part in chunks(app.OPENAI_CHAT, CHATS["calls"], usage=False)]
    calls = [(call["index"], call["function"]["arguments"]) for each in deltas for call in each.get("tool_calls", [])]
    assert calls == [(0, '{"ci'), (0, 'ty":"Paris"}'), (1, ""), (1, "{}"), (2, ""), (2, "{}")]


def test_completion_logprobs() -> None:
    """Null for the first token of an echo; offsets count characters, also where tokens are halves of one."""
    told = whole(app.OPENAI_COMPLETIONS, TEXTS["echo"])["choices"][0]["logprobs"]
    assert told == {
        "tokens": ["é", " ", "is", "\ufffd", "\ufffd"],
        "token_logprobs": [None, -1.0, -0.25, -1.0, -0.5],
        "top_logprobs": [None, {" ": -1.0}, {"is": -0.25, "at": -1.5}, {"\ufffd": -1.0}, {"\ufffd": -0.5}],
        "text_offset": [0, 1, 2, 4, 5],
    }


VECTORS = [[3.0, 4.0, 0.0], [0.0, 0.0, 0.0]]


def result(dialect: app.Dialect, value: Any, **fields: Any) -> Json:
    """The reply to a request that gives no text."""
    request = dialect.parse({"model": "m", "input": "Hi", "query": "q", "documents": ["a", "b", "c"], **fields})
    return whole(dialect, (app.Started(7), app.Result(value), app.Done("stop", 7, 0, 0.1, 0.0)), request)


def test_embeddings() -> None:
    """In order, of length 1, cut before that; a vector of zeros stays one."""
    made = result(app.OPENAI_EMBEDDINGS, VECTORS)
    assert made["object"] == "list" and made["model"] == "m"
    assert made["data"] == [
        {"object": "embedding", "index": 0, "embedding": [0.6, 0.8, 0.0]},
        {"object": "embedding", "index": 1, "embedding": [0.0, 0.0, 0.0]},
    ]
    assert (made["usage"]["prompt_tokens"], made["usage"]["total_tokens"]) == (7, 7)
    assert result(app.OPENAI_EMBEDDINGS, VECTORS, dimensions=1)["data"][0]["embedding"] == [1.0]
    assert len(result(app.OPENAI_EMBEDDINGS, VECTORS, dimensions=9)["data"][0]["embedding"]) == 3


def test_embeddings_in_base64() -> None:
    """Little-endian 32 bit floats, as the official clients read them."""
    made = result(app.OPENAI_EMBEDDINGS, VECTORS, encoding_format="base64", dimensions=2)
    assert struct.unpack("<2f", base64.b64decode(made["data"][0]["embedding"])) == pytest.approx((0.6, 0.8))


def test_rerank() -> None:
    """The best first, as many as wanted, with their texts if asked for."""
    made = result(app.RERANK, [0.1, 0.9, 0.5])
    assert [(each["index"], each["relevance_score"]) for each in made["results"]] == [(1, 0.9), (2, 0.5), (0, 0.1)]
    assert made.keys() == {"id", "model", "results", "usage"} and made["usage"]["total_tokens"] == 7
    assert result(app.RERANK, [0.1, 0.9, 0.5], top_n=1, return_documents=True)["results"] == [
        {"index": 1, "relevance_score": 0.9, "document": {"text": "b"}}
    ]
    assert len(result(app.RERANK, [0.1, 0.9, 0.5], top_n=7)["results"]) == 3


# -- errors -------------------------------------------------------------------


class Unauthorized(app.ServerError, kind="test_unauthorized", status=401):
    """What an operator's key check may raise."""


class TooMany(app.ServerError, kind="test_too_many", status=429):
    """The same for a limit."""


@pytest.mark.parametrize(
    ("error", "kind", "param", "code"),
    [
        (app.BadRequest("Field 'messages.0.role': wrong"), "invalid_request_error", "messages.0.role", None),
        (app.BadRequest("Missing 'model' in payload"), "invalid_request_error", "model", None),
        (app.BadRequest("[] is too short - 'messages'"), "invalid_request_error", "messages", None),
        (app.BadRequest("something else 'x'"), "invalid_request_error", None, None),
        (app.ContextLengthExceeded("9 > 8"), "invalid_request_error", None, "context_length_exceeded"),
        (app.NotFound("404 page not found: GET /v1/x"), "not_found_error", None, None),
        (app.InUse("busy"), "invalid_request_error", None, None),
        (Unauthorized("key"), "authentication_error", None, None),
        (app.GatedModel("gated"), "permission_error", None, None),
        (TooMany("slow down"), "rate_limit_error", None, None),
        (app.NoCapacity("server busy"), "api_error", None, None),
        (app.EngineDied("it died"), "api_error", None, None),
    ],
)
def test_errors(error: app.ServerError, kind: str, param: str | None, code: str | None) -> None:
    """All four keys, always."""
    told = {"message": str(error), "type": kind, "param": param, "code": code}
    assert app.openai_error(error) == {"error": told}


def test_missing_model() -> None:
    """The words and the code that frameworks look for."""
    missing = app.ModelNotFound("Model a/b:c not found: not available locally. Use /pull to download.")
    missing.model = "a/b:c"
    error = app.openai_error(missing)
    text = "model 'a/b:c' not found, try pulling it first"
    assert error["error"] == {"message": text, "type": "not_found_error", "param": None, "code": "model_not_found"}


def test_an_error_that_speaks_like_a_missing_model_is_none() -> None:
    """The class of an error decides, not its words, which may have a client's own text in them."""
    error = app.openai_error(app.NotFound("Model x not found: at all"))["error"]
    assert (error["message"], error["code"]) == ("Model x not found: at all", None)


def test_error_in_a_stream_has_no_name() -> None:
    """Clients of this protocol read `data` only."""
    sent = app.OPENAI_CHAT.frame(("error", app.openai_error(app.EngineDied("it died"))))
    assert sent.startswith(b'data: {"error":{"message":"it died"')


def meta(name: str, pulled_at: str) -> app.ModelMeta:
    """A model on disk."""
    return app.ModelMeta(name, name, "", pulled_at=pulled_at)


def test_models() -> None:
    """Newest first, never null, in both protocols' forms."""
    metas = [meta("smollm2:135m", "2025-01-02T03:04:05.000000Z"), meta("Org/Name", "2025-01-02T03:04:06.000000Z")]
    assert app.models_json(metas, False) == {
        "object": "list",
        "data": [
            {"id": "Org/Name:latest", "object": "model", "created": 1735787046, "owned_by": "Org"},
            {"id": "smollm2:135m", "object": "model", "created": 1735787045, "owned_by": "library"},
        ],
    }
    theirs = app.models_json(metas, True)
    moment = "2025-01-02T03:04:06.000000Z"
    expected = {"type": "model", "id": "Org/Name:latest", "display_name": "Org/Name:latest", "created_at": moment}
    assert expected.items() <= theirs["data"][0].items()
    assert (theirs["first_id"], theirs["last_id"], theirs["has_more"]) == ("Org/Name:latest", "smollm2:135m", False)
    assert app.models_json([], False) == {"object": "list", "data": []}
    assert app.models_json([], True) == {"data": [], "has_more": False, "first_id": None, "last_id": None}


# -- over HTTP ----------------------------------------------------------------


@pytest.fixture(scope="module")
def running(hub: HubStub, hub_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with engines that say what the prompt says, for this file."""
    folder = tmp_path_factory.mktemp("openai")
    with Server(folder, fake=True, HF_ENDPOINT=hub.url, HF_HOME=str(hub_cache)) as server:
        server.have("fake/a")
        yield server


def post(server: Server, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    """Ask fake/a something."""
    return server.client.post(path, json={"model": "fake/a", **fields})


def says(events: Events) -> str:
    """The prompt that makes the engine of tests/fakeserver.py say these events."""
    return "events " + msgspec.json.encode(events).decode()


def asks(events: Events) -> list[Json]:
    """The same as a conversation."""
    return [{"role": "user", "content": says(events)}]


def received(response: httpx.Response) -> list[Json]:
    """The chunks of a stream that must succeed, but for its end."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *parts, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def anonymous(reply: Json) -> Json:
    """A reply without what is its own alone."""
    return {name: value for name, value in reply.items() if name not in ("id", "created")}


@pytest.mark.parametrize("name", CHATS)
def test_chats_over_http(running: Server, name: str) -> None:
    """From the wire in to the wire out, streamed and whole."""
    events = CHATS[name]
    asked: Json = {"messages": asks(events), "n": width_of(events)}
    one = post(running, **asked)
    assert one.status_code == 200, one.text
    assert one.headers["content-type"].startswith("application/json") and one.headers["x-backend"]
    streamed = received(post(running, **asked, stream=True, stream_options={"include_usage": True}))
    assert anonymous(folded(streamed)) == anonymous(plain(one.json()))
    assert one.json()["id"].startswith("chatcmpl-") and one.json()["model"] == "fake/a"


def test_completions_over_http(running: Server) -> None:
    """The same."""
    asked: Json = {"prompt": says(TEXTS["text"])}
    one = post(running, "/v1/completions", **asked)
    assert one.status_code == 200, one.text
    options: Json = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = received(post(running, "/v1/completions", **asked, **options))
    assert anonymous(folded(streamed)) == anonymous(plain(one.json()))


def test_count(running: Server) -> None:
    """A prompt of the engine that the other tests use as well, without usage."""
    streamed = received(post(running, messages=[{"role": "user", "content": "count 3"}], stream=True))
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in streamed) == "0 1 2 "
    assert len({part["id"] for part in streamed}) == 1


def test_error_in_a_stream(running: Server) -> None:
    """The stream says so, and ends as every stream does."""
    streamed = received(post(running, messages=[{"role": "user", "content": "raise 2"}], stream=True))
    assert streamed[-1]["error"]["type"] == "api_error" and streamed[-1].keys() == {"error"}
    assert post(running, messages=[{"role": "user", "content": "raise 2"}]).json()["error"].keys() == {
        "message", "type", "param", "code",
    }  # fmt: skip


PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/api/rerank"]


@pytest.mark.parametrize("path", PATHS)
def test_errors_over_http(running: Server, path: str) -> None:
    """A body that is none, a model that is not here, a body with nothing in it: never 422, never another shape."""
    rest = {"messages": [USER], "prompt": "x", "input": "x", "query": "x", "documents": ["x"]}
    for content in (b"", b"{", b"[]", b"{}"):
        response = running.client.post(path, content=content)
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
    response = running.client.post(path, json={"model": "fake/nowhere", **rest})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert response.json()["error"]["message"].startswith("model 'fake/nowhere' not found")


def test_what_a_model_cannot_do(running: Server) -> None:
    """A chat model gives no vectors and no ranks here."""
    for path, fields in (("/v1/embeddings", {"input": "x"}), ("/v1/rerank", {"query": "x", "documents": ["x"]})):
        response = post(running, path, **fields)
        assert response.status_code == 400 and "does not support" in response.json()["error"]["message"]


def test_too_long(running: Server) -> None:
    """The code that frameworks look for."""
    response = post(running, messages=[{"role": "user", "content": "count " * 600}])
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_ignored_fields_are_named(running: Server) -> None:
    """In the header that all dialects share."""
    response = post(running, messages=[{"role": "user", "content": "count 1"}], verbosity="low", user="me")
    assert response.headers["x-ignored-parameters"] == "verbosity"


def test_models_over_http(running: Server) -> None:
    """A list and one, whatever is in its name, in the words of the client's protocol."""
    listed = running.client.get("/v1/models").json()
    assert [each["id"] for each in listed["data"]] == ["fake/a:latest"]
    for spelled in ("fake/a", "FAKE/a", "fake%2Fa"):
        one = running.client.get(f"/v1/models/{spelled}").json()
        assert one == {**listed["data"][0], "id": spelled.replace("%2F", "/")}
    theirs = running.client.get("/v1/models", headers={"anthropic-version": "2023-06-01"}).json()
    assert (theirs["first_id"], theirs["data"][0]["type"]) == ("fake/a:latest", "model")
    one = running.client.get("/v1/models/fake/a:latest", headers={"anthropic-version": "2023-06-01"}).json()
    assert one == theirs["data"][0]


def test_missing_model_in_the_list(running: Server) -> None:
    """The same error as from the other endpoints."""
    response = running.client.get("/v1/models/fake/nowhere")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
