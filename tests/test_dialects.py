"""The native dialect: what a body means, what is refused and how, and what goes back over the wire."""

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import h11
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

import app

GOLDENS = Path(__file__).with_name("goldens")
FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SECRET = "s3cret-value"
USER = {"role": "user", "content": "Hi"}
Json = dict[str, Any]


def parse(**fields: Any) -> app.ChatRequest:
    """Parse a body with a model and a prompt, and these fields."""
    return app.native_parse({"model": "m", "prompt": "Hi", **fields})


def refusal(body: Json) -> str:
    """The text of the BadRequest that a body gets."""
    with pytest.raises(app.BadRequest) as raised:
        app.native_parse(body)
    assert raised.value.status == 400
    return str(raised.value)


def golden(name: str) -> Any:
    """A recorded reply: written by hand from the interface's description, compared field by field."""
    return json.loads((GOLDENS / name).read_text(encoding="utf-8"))


# -- parse: what is asked -----------------------------------------------------


def test_smallest_bodies() -> None:
    """A prompt is one user turn; replies are streamed unless the body says otherwise."""
    expected = app.ChatRequest("m", (app.Message("user", "Hi"),), app.Sampling(), stream=True)
    assert app.native_parse({"model": "m", "prompt": "Hi"}) == expected
    assert app.native_parse({"model": "m", "messages": [USER]}) == expected


def test_conversation() -> None:
    """All roles, in order, with their texts; content may be missing or null."""
    roles = ("system", "developer", "user", "assistant", "tool")
    turns: list[Json] = [{"role": role, "content": role} for role in roles]
    turns += [{"role": "assistant", "content": None}, {"role": "assistant"}]
    parsed = app.native_parse({"model": "m", "messages": turns})
    assert parsed.messages == (
        *(app.Message(role, role) for role in roles),
        app.Message("assistant", ""),
        app.Message("assistant", ""),
    )


def test_content_parts() -> None:
    """Content as a list of text parts is their texts, joined."""
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "world"}]
    parsed = app.native_parse({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert parsed.messages[0].content == "Hello, world"


def test_every_option_beside_or_inside() -> None:
    """Each option means the same in `options` and beside it, and lands in the field of its name."""
    options = {
        "max_tokens": 5, "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "typical_p": 0.75, "seed": 9,
        "stop": ["a", "b"], "repeat_penalty": 1.5, "repeat_last_n": 32, "presence_penalty": -1.5,
        "frequency_penalty": 2, "num_ctx": 512, "min_tokens": 3, "ignore_eos": True, "logprobs": True,
        "top_logprobs": 4, "logit_bias": {"15": -2.5, "0": 100}, "n": 2,
    }  # fmt: skip
    inside, beside = parse(options=options), parse(**options)
    assert inside == beside
    expected: Json = {**options, "stop": ("a", "b"), "context_length": 512}
    expected |= {"logprobs": 4, "logit_bias": {15: -2.5, 0: 100}}
    del expected["num_ctx"], expected["top_logprobs"]
    assert inside.sampling.chosen() == expected
    others = {*SHAPES, "echo"}  # echo is a field of completions only
    assert {*expected, *others} == set(app.Sampling.__struct_fields__), "a new option needs a value here"
    assert inside.ignored == ()


SCHEMA: Json = {"type": "object", "properties": {"a": {"type": "null"}}}
SHAPES: dict[str, tuple[Any, Any]] = {  # as it is asked, and as it is meant; one at a time
    "format": (SCHEMA, SCHEMA),
    "regex": ("null", "null"),
    "choice": (["yes", "null"], ("yes", "null")),
    "grammar": ('root ::= "a"', 'root ::= "a"'),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_beside_or_inside(name: str) -> None:
    """What an answer should look like means the same in both places, and `shape` tells which was asked for."""
    asked, meant = SHAPES[name]
    inside, beside = parse(options={name: asked}), parse(**{name: asked})
    assert inside == beside
    assert inside.sampling.chosen() == {name: meant}
    assert inside.sampling.shape() == name
    assert parse().sampling.shape() == ""


def test_the_formats_of_ollama() -> None:
    """`json` for any object; an empty text is what clients send that want none."""
    assert parse(format="json").sampling.format == "json"
    assert parse(format="") == parse() == parse(options={"format": ""})


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(SHAPES, 2)])
def test_two_shapes_exclude_each_other(first: str, second: str) -> None:
    """Never one of them in silence, wherever the two stand."""
    for body in (
        {first: SHAPES[first][0], second: SHAPES[second][0]},
        {first: SHAPES[first][0], "options": {second: SHAPES[second][0]}},
        {second: SHAPES[second][0], "options": {first: SHAPES[first][0]}},
    ):
        text = refusal({"model": "m", "prompt": "Hi", **body})
        assert f"'{first}'" in text and f"'{second}'" in text


@pytest.mark.parametrize(
    ("fields", "alternatives"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 3}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"top_logprobs": 3}, 3),
        ({"top_logprobs": 0}, 0),
        ({"logprobs": True, "options": {"top_logprobs": 2}}, 2),
        ({"logprobs": False, "options": {"logprobs": True}}, None),
    ],
)
def test_logprobs_asked_for(fields: Json, alternatives: int | None) -> None:
    """How many alternatives a token names: none at all without `logprobs`, and `top_logprobs` alone asks for both."""
    assert parse(**fields).sampling.logprobs == alternatives


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"num_predict": 5}, "max_tokens", 5),
        ({"options": {"num_predict": 5}}, "max_tokens", 5),
        ({"num_predict": -1}, "max_tokens", -1),
        ({"max_tokens": 0}, "max_tokens", 0),
        ({"num_ctx": 1}, "context_length", 1),
        ({"stop": "x"}, "stop", ("x",)),
        ({"stop": []}, "stop", ()),
        ({"temperature": 0}, "temperature", 0),
        ({"temperature": 0, "options": {"temperature": 1}}, "temperature", 0),
        ({"options": {"temperature": 1, "top_k": 2}, "temperature": None}, "temperature", 1),
        ({"num_predict": 5, "options": {"num_predict": 9}}, "max_tokens", 5),
        ({"max_tokens": 5, "options": {"num_predict": 9}}, "max_tokens", 5),
        ({"max_tokens": 5, "num_predict": 9}, "max_tokens", 5),
        ({"options": {"max_tokens": 5, "num_predict": 9}}, "max_tokens", 5),
        ({"num_predict": 5, "options": {"max_tokens": 9}}, "max_tokens", 5),
    ],
)
def test_aliases_and_precedence(fields: Json, name: str, value: object) -> None:
    """Fields beside `options` win; `max_tokens` wins over its alias at the same place."""
    assert parse(**fields).sampling.chosen()[name] == value


@pytest.mark.parametrize("name", ["stream", "options", "keep_alive", *app.SamplingBody.model_fields])
def test_null_is_absent(name: str) -> None:
    """Clients send null for what they do not set."""
    assert parse(**{name: None}) == parse()
    if name in app.SamplingBody.model_fields:
        assert parse(options={name: None}) == parse()


def test_null_messages_and_prompt() -> None:
    """The one that is not null counts."""
    assert app.native_parse({"model": "m", "messages": [USER], "prompt": None}).messages[0].content == "Hi"
    assert parse(messages=None).messages[0].content == "Hi"


@pytest.mark.parametrize(("value", "streams"), [(True, True), (False, False), (None, True)])
def test_stream(value: bool | None, streams: bool) -> None:
    """Only `false` asks for one piece."""
    assert parse(stream=value).stream is streams


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5m", 300), ("1h30m", 5400), (0, 0), ("0", 0), (-1, math.inf), ("-1", math.inf), ("-1m", math.inf),
        (300, 300), (1.5, 1.5), ("300ms", 0.3),
    ],
)  # fmt: skip
def test_keep_alive(value: str | float, seconds: float) -> None:
    """Seconds or Go's form; negative means for ever."""
    assert parse(keep_alive=value).keep_alive == pytest.approx(seconds)


def test_unknown_fields_are_listed() -> None:
    """What nobody reads is named, with its place, and never stops a request."""
    parsed = app.native_parse(
        {
            "model": "m",
            "messages": [{**USER, "audio": [1], "none": []}, {**USER, "weight": "x", "audio": [1]}],
            "template": "x",
            "Think": True,
            "options": {"mirostat": 1, "temperature": 1},
        }
    )
    assert sorted(parsed.ignored) == ["Think", "messages.audio", "messages.weight", "options.mirostat", "template"]
    assert parsed.sampling.temperature == 1
    assert parse(template=None).ignored == ()


def test_unknown_fields_of_parts_are_listed() -> None:
    """Also deep inside."""
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}, "note": ""}
    parsed = app.native_parse({"model": "m", "messages": [{"role": "user", "content": [part]}]})
    assert parsed.ignored == ("messages.content.cache_control",)


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "two\r\nX-Evil: 1",
        "ünïcödé",
        "x" * 5000,
        "null \0",
        "tab \x0b",
        "\x7f",
    ],
    ids=ascii,
)
def test_unknown_field_names_make_a_sound_header(name: str) -> None:
    """A client chooses these names: no line break, no control character, no megabytes."""
    served = app.ServedBy("b", "q", "r", parse(**{name: 1}).ignored)
    value = app.contract_headers(served)["X-Ignored-Parameters"]
    assert len(value) <= 1000 and value.isprintable()
    h11.Response(status_code=200, headers=[("X-Ignored-Parameters", value)])  # raises on an illegal value


# -- parse: what is refused ---------------------------------------------------

TOO_MUCH = 2**31 + 1
WRONG: list[tuple[str, Any]] = [
    ("max_tokens", SECRET), ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", -3), ("max_tokens", TOO_MUCH),
    ("num_predict", SECRET), ("num_predict", []), ("num_predict", -3),
    ("temperature", SECRET), ("temperature", True), ("temperature", -0.1), ("temperature", 100.1),
    ("temperature", math.nan), ("temperature", math.inf), ("temperature", {SECRET: 1}),
    ("top_p", SECRET), ("top_p", 1.1), ("top_p", -0.1), ("top_p", False),
    ("top_k", SECRET), ("top_k", 1.5), ("top_k", -2), ("top_k", TOO_MUCH),
    ("min_p", SECRET), ("min_p", 1.1), ("typical_p", [SECRET]), ("typical_p", -1),
    ("seed", SECRET), ("seed", 0.5), ("seed", 2**63), ("seed", -(2**63) - 1),
    ("stop", 5), ("stop", [5]), ("stop", {SECRET: 1}), ("stop", [SECRET] * 17), ("stop", ["x" * 257]), ("stop", [None]),
    ("repeat_penalty", SECRET), ("repeat_penalty", 0), ("repeat_penalty", 101),
    ("repeat_last_n", SECRET), ("repeat_last_n", -2),
    ("presence_penalty", SECRET), ("presence_penalty", 2.1), ("frequency_penalty", SECRET), ("frequency_penalty", -2.1),
    ("num_ctx", SECRET), ("num_ctx", 0), ("num_ctx", 1.5),
    ("min_tokens", SECRET), ("min_tokens", -1), ("min_tokens", TOO_MUCH),
    ("ignore_eos", SECRET), ("ignore_eos", 1), ("logprobs", 3), ("logprobs", SECRET),
    ("top_logprobs", True), ("top_logprobs", -1), ("top_logprobs", 21),
    ("logit_bias", SECRET), ("logit_bias", {"a": 1.0}), ("logit_bias", {"-1": 1.0}), ("logit_bias", {"1": SECRET}),
    ("logit_bias", {"1": 100.5}), ("logit_bias", {str(token): 0 for token in range(1025)}),
    ("n", SECRET), ("n", 0), ("n", 17), ("n", 1.5),
    ("format", SECRET), ("format", True), ("format", [SECRET]),
    ("regex", ""), ("regex", 5), ("regex", "x" * 65537), ("grammar", ""), ("grammar", {SECRET: 1}),
    ("choice", SECRET), ("choice", []), ("choice", [""]), ("choice", [5]), ("choice", ["x" * 4097]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(value)[:20])
def test_wrong_options(name: str, value: Any) -> None:
    """Each wrong type and range is a 400 that names the field and never repeats the value, inside `options` or not."""
    for body, place in (({name: value}, name), ({"options": {name: value}}, f"options.{name}")):
        text = refusal({"model": "m", "prompt": "Hi", **body})
        assert text.startswith(f"Field '{place}")
        assert SECRET not in text
        assert "\n" not in text and len(text) < 300


def test_a_wrong_key_is_not_repeated() -> None:
    """Keys come from the body as values do."""
    assert SECRET not in refusal({"model": "m", "prompt": "Hi", "logit_bias": {SECRET: 1.0}})


def test_every_option_has_a_wrong_value() -> None:
    """A new option needs rows in WRONG."""
    assert {name for name, _ in WRONG} == set(app.SamplingBody.model_fields)


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("'model'", {"prompt": "Hi"}),
        ("'model'", {"model": None, "prompt": "Hi"}),
        ("'model'", {"model": "", "prompt": "Hi"}),
        ("'model'", {"model": 5, "prompt": "Hi"}),
        ("'model'", {"model": [SECRET], "prompt": "Hi"}),
        ("'model'", {"model": "x" * 513, "prompt": "Hi"}),
        ("'messages'", {"model": "m"}),
        ("'messages'", {"model": "m", "messages": None, "prompt": None}),
        ("'messages'", {"model": "m", "messages": [USER], "prompt": "Hi"}),
        ("'messages'", {"model": "m", "messages": []}),
        ("'messages'", {"model": "m", "messages": SECRET}),
        ("'messages'", {"model": "m", "messages": {SECRET: 1}}),
        ("'messages.0'", {"model": "m", "messages": [SECRET]}),
        ("'messages.1'", {"model": "m", "messages": [USER, None]}),
        ("'messages.0.role'", {"model": "m", "messages": [{"content": SECRET}]}),
        ("'messages.0.role'", {"model": "m", "messages": [{"role": SECRET, "content": "x"}]}),
        ("'messages.0.role'", {"model": "m", "messages": [{"role": None, "content": "x"}]}),
        ("'messages.0.content", {"model": "m", "messages": [{"role": "user", "content": 5}]}),
        ("'messages.0.content", {"model": "m", "messages": [{"role": "user", "content": {SECRET: 1}}]}),
        ("'messages.0.content", {"model": "m", "messages": [{"role": "user", "content": [SECRET]}]}),
        (
            "'messages.0.content",
            {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "url": SECRET}]}]},
        ),
        ("'prompt'", {"model": "m", "prompt": 5}),
        ("'prompt'", {"model": "m", "prompt": [SECRET]}),
        ("'stream'", {"model": "m", "prompt": "Hi", "stream": SECRET}),
        ("'stream'", {"model": "m", "prompt": "Hi", "stream": 1}),
        ("'options'", {"model": "m", "prompt": "Hi", "options": SECRET}),
        ("'options'", {"model": "m", "prompt": "Hi", "options": [SECRET]}),
        ("'keep_alive", {"model": "m", "prompt": "Hi", "keep_alive": True}),
        ("'keep_alive", {"model": "m", "prompt": "Hi", "keep_alive": [SECRET]}),
        ("'keep_alive", {"model": "m", "prompt": "Hi", "keep_alive": ""}),
        ("'keep_alive", {"model": "m", "prompt": "Hi", "keep_alive": "5 minutes"}),
        ("'keep_alive", {"model": "m", "prompt": "Hi", "keep_alive": math.nan}),
        ("'keep_alive", {"model": "m", "prompt": "Hi", "keep_alive": SECRET}),
    ],
)
def test_wrong_bodies(field: str, body: Json) -> None:
    """The same for everything beside the options."""
    text = refusal(body)
    assert field in text
    assert SECRET not in text
    assert "\n" not in text and len(text) < 300


def test_missing_model_has_its_fixed_text() -> None:
    """Clients look for it."""
    assert refusal({"prompt": "Hi"}) == "Missing 'model' in payload"
    assert refusal({"messages": [USER], "model": None}) == "Missing 'model' in payload"


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"stop": ["x" * 257]}, "256"),
        ({"stop": ["x"] * 17}, "16"),
        ({"stop": [5]}, "stop.0"),
        (
            {
                "prompt": None,
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            },
            "content.0.image_url",
        ),
    ],
)
def test_refusal_states_the_rule(fields: Json, rule: str) -> None:
    """Not `should be a valid string` for a list that is too long."""
    assert rule in refusal({"model": "m", "prompt": "Hi", **fields})


def test_one_long_stop_is_refused() -> None:
    """One text has the same limit as a list of one."""
    refusal({"model": "m", "prompt": "Hi", "stop": "x" * 257})


ESCAPED = b'{"model": "m", "prompt": "a \\ud800 b"}'


@pytest.mark.parametrize(
    "body",
    [
        ESCAPED,
        b'{"model": "m", "messages": [{"role": "user", "content": "\\udfff"}]}',
        b'{"model": "m", "prompt": "Hi", "stop": ["\\ud800"]}',
        b'{"model": "m", "prompt": "Hi", "\\ud800": 1}',
        b'{"model": "m", "prompt": "\xed\xa0\x80"}',
        ESCAPED.decode().encode("utf-16"),
    ],
)
def test_half_characters_are_refused(body: bytes) -> None:
    """A lone surrogate, however it is spelled: no engine can read it, so it ends here and not in a frame."""

    async def receive() -> Json:
        return {"type": "http.request", "body": body, "more_body": False}

    request = Request({"type": "http", "method": "POST", "path": "/chat", "headers": []}, receive)
    with pytest.raises(app.BadRequest):
        app.native_parse(asyncio.run(app.read_json(request)))


whole_text = st.text(st.characters(exclude_categories=["Cs"]))  # without half characters
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | whole_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from([*app.ChatBody.model_fields, "unknown"])


@settings(FINE, max_examples=150)
@given(
    st.dictionaries(fields, json_values, max_size=5),
    st.dictionaries(st.sampled_from(["role", "content", "x"]), json_values),
)
def test_any_body_is_a_request_or_a_bad_request(body: Json, message: Json) -> None:
    """Never another exception; and what comes out can be sent to an engine as it is."""
    for candidate in (body, {"model": "m", **body}, {"model": "m", "messages": [message]}):
        try:
            parsed = app.native_parse(candidate)
        except app.BadRequest as error:
            assert "'" in str(error)
        else:
            frame = msgspec.msgpack.encode(app.Generate(1, parsed))
            assert msgspec.msgpack.decode(frame, type=app.Command) == app.Generate(1, parsed)


# -- pull bodies --------------------------------------------------------------


def test_pull_body() -> None:
    """Its fields and defaults."""
    assert app.validated(app.PullBody, {"model": "gpt2", "revision": None}).model_dump() == {
        "model": "gpt2", "revision": None, "quantize": "auto", "init": False, "trust_remote_code": False,
        "allow_pickle": False, "make_room": False, "pin": False,
    }  # fmt: skip
    full = {"model": "a/b", "revision": "refs/pr/1", "quantize": "4bit", "init": True, "trust_remote_code": True}
    full |= {"allow_pickle": True, "make_room": True, "pin": True}
    assert app.validated(app.PullBody, full).model_dump() == full


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 5), ("revision", 5), ("revision", ""), ("revision", "../main"), ("revision", "a b"),
        ("revision", "main\n"), ("revision", "x" * 201), ("quantize", "8bit"), ("quantize", 4), ("init", "yes"),
        ("init", 1), ("trust_remote_code", "true"), ("revision", "a/../../b"), ("revision", "a/./b"),
        ("revision", "mаin"),
    ],
)  # fmt: skip
def test_wrong_pull_bodies(name: str, value: Any) -> None:
    """A 400 that names the field."""
    with pytest.raises(app.BadRequest, match=f"Field '{name}'"):
        app.validated(app.PullBody, {"model": "gpt2", name: value})


# -- replies ------------------------------------------------------------------

REQUEST = app.ChatRequest("smollm2:135m", (app.Message("user", "Hi"),), created_at="2025-01-02T03:04:05.678901Z")
DONE = app.Done("stop", 31, 8, 0.25, 0.125, load_seconds=1.5, total_seconds=1.875)
LIKELY = app.TokenLogprob("is", -0.25, b"is", (app.TokenLogprob("is", -0.25, b"is"),))
HALF = app.TokenLogprob("\ufffd", -1.5, b"\xe2")
EVENTS: dict[str, tuple[app.Event, ...]] = {
    "answer": (app.Started(31), app.Text("Par"), app.Text("is ✓\n"), DONE),
    "empty": (app.Started(8192), app.Done("length", 8192, 0, 0.0, 0.0)),
}


def lines(request: app.ChatRequest, events: tuple[app.Event, ...]) -> list[Json]:
    """The stream's lines, through bytes and back, as a client reads them."""
    feed = app.NATIVE.stream(request)
    sent = b"".join(app.NATIVE.frame(frame) for event in events for frame in feed(event))
    assert sent.endswith(b"\n")
    return [json.loads(line) for line in sent.splitlines()]


def whole(request: app.ChatRequest, events: tuple[app.Event, ...]) -> Json:
    """The reply in one piece."""

    async def stream() -> AsyncIterator[app.Event]:
        for event in events:
            yield event

    return app.NATIVE.whole(request, asyncio.run(app.fold(stream())))


@pytest.mark.parametrize("name", EVENTS)
def test_goldens(name: str) -> None:
    """Stream and whole reply are exactly as recorded, order of the fields included."""
    assert json.dumps(lines(REQUEST, EVENTS[name])) == json.dumps(golden(f"native_{name}_stream.json"))
    assert json.dumps(whole(REQUEST, EVENTS[name])) == json.dumps(golden(f"native_{name}_whole.json"))


def test_wire_bytes() -> None:
    """One object a line, UTF-8 as it is, no blanks."""
    feed = app.NATIVE.stream(REQUEST)
    (frame,) = feed(app.Text("é\n"))
    assert (
        app.NATIVE.frame(frame)
        == (
            '{"model":"smollm2:135m","created_at":"2025-01-02T03:04:05.678901Z",'
            '"message":{"role":"assistant","content":"é\\n"},"done":false}\n'
        ).encode()
    )
    assert app.NATIVE.media_type == "application/x-ndjson"


@FINE
@given(
    st.lists(whole_text),
    st.sampled_from(["stop", "length"]),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.floats(0, 10**6),
)
def test_stream_folds_to_whole(texts: list[str], reason: Any, prompt: int, completion: int, seconds: float) -> None:
    """Text, counts, durations and reason are the same both ways; one end line, and it is the last."""
    done = app.Done(reason, prompt, completion, seconds, seconds / 2, seconds / 3, seconds * 2)
    events: tuple[app.Event, ...] = (app.Started(prompt), *(app.Text(text) for text in texts), done)
    streamed, one = lines(REQUEST, events), whole(REQUEST, events)
    assert [line["done"] for line in streamed] == [False] * len(texts) + [True]
    assert "".join(line["message"]["content"] for line in streamed) == one["message"]["content"] == "".join(texts)
    assert {**streamed[-1], "message": one["message"]} == one
    assert (one["done_reason"], one["prompt_eval_count"], one["eval_count"]) == (reason, prompt, completion)
    durations = [value for name, value in one.items() if name.endswith("_duration")]
    assert len(durations) == 4
    assert all(type(value) is int and value >= 1 for value in durations)


def logprob(one: app.TokenLogprob) -> Json:
    """A token's log-probability as a client sees it; the alternatives have none of their own."""
    return {"token": one.token, "logprob": one.logprob, "bytes": list(one.data)}


def test_logprobs_in_both_forms() -> None:
    """One entry a token, with the bytes of half a character; the stream's entries together are the whole reply's."""
    events = (app.Started(3), app.Text("Paris", (LIKELY,)), app.Text("", (HALF,)), DONE)
    streamed, one = lines(REQUEST, events), whole(REQUEST, events)
    expected = [
        logprob(LIKELY) | {"top_logprobs": [logprob(LIKELY.top[0])]},
        logprob(HALF),
    ]
    assert one["logprobs"] == expected
    assert [entry for line in streamed for entry in line.get("logprobs", [])] == expected
    assert "logprobs" not in streamed[-1] and "logprobs" not in whole(REQUEST, EVENTS["answer"])


SEVERAL = msgspec.structs.replace(REQUEST, sampling=app.Sampling(n=2))


def test_choices_in_both_forms() -> None:
    """Each line names its choice, each choice has its end, the stream has one, with the counts of both."""
    events: tuple[app.Event, ...] = (
        app.Started(31), app.Text("b", index=1), app.Text("a"), app.Done("length", 31, 3, 0.1, 0.1, last=False),
        app.Text("B", (LIKELY,), 1), msgspec.structs.replace(DONE, index=1),
    )  # fmt: skip
    streamed, one = lines(SEVERAL, events), whole(SEVERAL, events)
    told = [(line["index"], line["message"]["content"], line["done"], line.get("done_reason")) for line in streamed]
    assert told == [
        (1, "b", False, None), (0, "a", False, None), (0, "", False, "length"), (1, "B", False, None),
        (1, "", True, "stop"),
    ]  # fmt: skip
    assert (streamed[-1]["eval_count"], one["eval_count"]) == (8, 8)
    assert (one["message"]["content"], one["done_reason"]) == ("a", "length")
    assert one["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "a"}, "done_reason": "length"},
        {"index": 1, "message": {"role": "assistant", "content": "bB"}, "done_reason": "stop"},
    ]


def test_one_choice_has_no_number() -> None:
    """Replies to requests that asked for one answer are as they always were."""
    one_choice = msgspec.structs.replace(REQUEST, sampling=app.Sampling(n=1))
    assert lines(one_choice, EVENTS["answer"]) == lines(REQUEST, EVENTS["answer"])
    assert whole(one_choice, EVENTS["answer"]) == whole(REQUEST, EVENTS["answer"])
    assert "choices" not in whole(REQUEST, EVENTS["answer"])


@FINE
@given(st.lists(st.tuples(st.integers(0, 2), whole_text)))
def test_choices_fold_to_their_texts(pieces: list[tuple[int, str]]) -> None:
    """However the pieces of three answers are mixed, each answer is whole, with and without a text."""
    request = msgspec.structs.replace(REQUEST, sampling=app.Sampling(n=3))
    ends = [app.Done("stop", 1, 1, 0.0, 0.0, index=index, last=index == 2) for index in range(3)]
    events: tuple[app.Event, ...] = (app.Started(1), *(app.Text(text, (), index) for index, text in pieces), *ends)
    texts = ["".join(text for owner, text in pieces if owner == index) for index in range(3)]
    streamed, one = lines(request, events), whole(request, events)
    assert [choice["message"]["content"] for choice in one["choices"]] == texts
    for index in range(3):
        assert "".join(line["message"]["content"] for line in streamed if line["index"] == index) == texts[index]
    assert [line["done"] for line in streamed].count(True) == 1


def test_error_shape() -> None:
    """The same object as a body and as the last line of a stream."""
    assert app.NATIVE.error(app.NotFound("Model x not found.")) == {"error": "Model x not found."}


@FINE
@given(st.none() | st.text("abc", min_size=1), st.dictionaries(whole_text, whole_text))
def test_server_sent_events(event: str | None, data: dict[str, str]) -> None:
    """One event: its name, one line of data whatever the data holds, and an empty line."""
    sent = app.sse((event, data))
    *head, payload = sent.removesuffix(b"\n\n").split(b"\n")
    assert sent.endswith(b"\n\n")
    assert head == ([f"event: {event}".encode()] if event else [])
    assert json.loads(payload.removeprefix(b"data: ")) == data


@pytest.mark.parametrize("field", ["tools", "format"])
def test_a_number_that_no_engine_can_be_told_is_refused(field: str) -> None:
    """Inside what has no types of its own; the field is named."""
    schema = {"type": "object", "maxProperties": 2**70}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert f"'{field}'" in refusal({"model": "m", "prompt": "x", field: [tool] if field == "tools" else schema})
