"""POST /v1/messages: what a body means, the order of events, and one reply in two forms."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from dialecttools import (
    CALLS,
    SAID,
    SCENARIOS,
    VALUES,
    Json,
    check_any_body,
    check_goldens,
    read_events,
    refusal,
    streamed,
    whole,
)
from harness import Server
from hypothesis import given
from hypothesis import strategies as st

import app

CACHED = {"type": "ephemeral"}
USER = {"role": "user", "content": "Hi"}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGVsbG8="}}
TOOL = {"name": "weather", "description": "Looks up.", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Rome"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "sun"}


def parse(*messages: Json, **fields: Any) -> app.ChatRequest:
    """Parse a body with a model, max_tokens and messages."""
    return app.ANTHROPIC.parse({"model": "m", "max_tokens": 9, "messages": list(messages or [USER]), **fields})


# -- parse --------------------------------------------------------------------


def test_smallest_body() -> None:
    """Replies are whole unless the body says otherwise; nobody who did not ask for thoughts gets any."""
    request = parse()
    assert request.messages == (app.Message("user", "Hi"),)
    assert (request.stream, request.sampling, request.think) == (False, app.Sampling(max_tokens=9), False)
    assert (request.task, request.ignored, request.parallel_tool_calls) == ("chat", (), None)
    assert parse(stream=True).stream


def test_conversation() -> None:
    """All kinds of blocks, a text for a list of one, and answers of tools before what the user says with them."""
    request = parse(
        {"role": "user", "content": [{"type": "text", "text": "Look: ", "cache_control": CACHED}, IMAGE]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": "x"},
            {"type": "redacted_thinking", "data": "y"},
            {"type": "text", "text": "Let me see.", "citations": None},
            {**USE, "caller": {"type": "direct"}},
            {"type": "tool_use", "id": "toolu_2", "name": "time", "input": {}},
        ]},
        {"role": "user", "content": [
            {"type": "text", "text": "And?"},
            {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "noon"}, IMAGE]},
            {**RESULT, "is_error": False},
        ]},
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "Sun"},
        system=[{"type": "text", "text": "You are kind.", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "Be true."}],
    )  # fmt: skip
    calls = (app.Call("toolu_1", "weather", '{"city": "Rome"}'), app.Call("toolu_2", "time", "{}"))
    assert request.messages == (
        app.Message("system", "You are kind.\nBe true."),
        app.Message("user", "Look: ", images=("aGVsbG8=",)),
        app.Message("assistant", "Let me see.", "Hm.", calls=calls),
        app.Message("tool", "noon", images=("aGVsbG8=",), call_id="toolu_2", tool_name="time"),
        app.Message("tool", "sun", call_id="toolu_1", tool_name="weather"),
        app.Message("user", "And?"),
        app.Message("system", "Be brief."),
        app.Message("assistant", "Sun"),
    )
    assert request.ignored == ()
    assert parse(system="You are kind.").messages[0] == app.Message("system", "You are kind.")


def test_options() -> None:
    """Anthropic's words, and fields that mean nothing here."""
    request = parse(
        stop_sequences=["a", "b"], temperature=0.5, top_p=0.25, top_k=3, metadata={"user_id": "u"}, keep_alive="5m",
        service_tier="auto", cache_control={"type": "ephemeral"},
    )  # fmt: skip
    expected = {"max_tokens": 9, "stop": ("a", "b"), "temperature": 0.5, "top_p": 0.25, "top_k": 3}
    assert request.sampling.chosen() == expected
    assert (request.keep_alive, request.ignored) == (300.0, ())
    assert parse(container="c").ignored == ("container",)
    schema = {"type": "object"}
    form = {"type": "json_schema", "schema": schema}
    both = parse(output_config={"format": form, "effort": "low"})
    assert (both.sampling.format, both.ignored) == (schema, ())
    assert parse(output_config={"format": {"type": "json_object"}}).sampling.format == "json"


@pytest.mark.parametrize(
    ("fields", "think"),
    [
        ({}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, True),
        ({"thinking": {"type": "adaptive", "display": "summarized"}}, True),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}}, "high"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "xhigh"}}, "max"),
        ({"output_config": {"effort": "high"}}, False),
    ],
)
def test_thinking(fields: Json, think: Any) -> None:
    """It is asked of models that can, and of no other."""
    request = parse(**fields)
    assert (request.think, request.think_if_able) == (think, True)


def test_tools() -> None:
    """Their form, and the choice among them."""
    custom = {"type": "custom", "name": "time", "input_schema": {}, "cache_control": {"type": "ephemeral"}}
    request = parse(tools=[TOOL, custom])
    function = {"name": "weather", "description": "Looks up.", "parameters": {"type": "object"}}
    assert request.tools[0] == {"type": "function", "function": function}
    assert request.tools[1] == {"type": "function", "function": {"name": "time", "parameters": {}}}
    assert (request.tool_choice, request.ignored) == ("auto", ())
    assert parse(tools=[TOOL], tool_choice={"type": "any"}).tool_choice == "required"
    assert parse(tools=[TOOL], tool_choice={"type": "none"}).tool_choice == "none"
    serial = parse(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert (serial.tool_choice, serial.parallel_tool_calls) == ("auto", False)
    named = parse(tools=[TOOL, custom], tool_choice={"type": "tool", "name": "time"})
    assert (named.tools, named.tool_choice) == ((request.tools[1],), "required")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": None}, "model is required"),
        ({"max_tokens": None}, "max_tokens is required and must be positive"),
        ({"max_tokens": 0}, "max_tokens is required and must be positive"),
        ({"max_tokens": -1}, "max_tokens is required and must be positive"),
        ({"messages": None}, "messages is required"),
        ({"messages": []}, "messages is required"),
        ({"n": 2}, "'n'"),
        ({"thinking": {"type": "maybe"}}, "'thinking.type'"),
        ({"system": 5}, "'system'"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "'output_config.format.schema'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305' is not supported"),
        ({"tools": [TOOL, TOOL]}, "'tools'"),
        ({"tool_choice": {"type": "any"}}, "'tool_choice'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "'tool_choice'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "'tool_choice'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "'messages.0.role'"),
        ({"messages": [USER, {"role": "user", "content": ""}]}, "'messages.1.content'"),
        ({"messages": [{"role": "user", "content": []}]}, "'messages.0.content'"),
        ({"messages": [{"role": "user"}]}, "'messages.0.content'"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'messages.0.content.0.type'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'messages.0.content.0.source'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
            "'messages.0.content.0.source'",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"file_id": "x"}}]}]},
            "'messages.0.content.0.source'",
        ),
        ({"messages": [{"role": "assistant", "content": [USE, USE]}]}, "'messages.0.content.1'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]}, "messages.0.content.0'"),
        ({"messages": [{"role": "assistant", "content": [{**USE, "name": "?"}] * 2}]}, "content.1': a call needs"),
        ({"messages": [USER, {"role": "user", "content": [RESULT]}]}, "'messages.1.content.0'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "'messages.0.content.0'"),
        (
            {"messages": [{"role": "assistant", "content": [USE]},
                          {"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}]},
            "'messages.1.content.0.content.0.source'",
        ),
    ],
)  # fmt: skip
def test_refusals(fields: Json, words: str) -> None:
    """Ollama's words where it has some; else a 400 that names the place."""
    assert words in refusal(app.ANTHROPIC, {"model": "m", "max_tokens": 9, "messages": [USER], **fields})


def test_counting() -> None:
    """It needs no max_tokens, sees what the model would see, and its reply is one number."""
    body = {"model": "m", "messages": [USER], "system": "Be kind.", "tools": [TOOL], "stream": True}
    request = app.ANTHROPIC_COUNT.parse(body)
    assert (request.task, request.stream, len(request.messages), len(request.tools)) == ("count", False, 2, 1)
    events = (app.Started(31), app.Done("stop", 31, 0, 0.0, 0.0))
    assert whole(app.ANTHROPIC_COUNT, request, events) == {"input_tokens": 31}


KINDS = ["text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking"]


@given(
    st.dictionaries(st.sampled_from([*app.AnthropicBody.model_fields, "metadata", "unknown"]), VALUES, max_size=4),
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(app.BlockBody.model_fields, VALUES) | {"type": st.sampled_from(KINDS)}
    ),
)
def test_any_body(body: Json, item: Json) -> None:
    """Never another exception than a BadRequest."""
    check_any_body(app.ANTHROPIC, {"model": "m", "max_tokens": 1, "messages": [USER], **body})
    check_any_body(app.ANTHROPIC, {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [item]}]})


# -- replies ------------------------------------------------------------------

REQUEST = msgspec.structs.replace(parse(), wire={"id": "msg_5eed"})


def folded(events: Sequence[Json]) -> Json:
    """What Anthropic's own client makes of a stream."""
    message: Json = events[0]["message"]
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    arguments, open_block = "", False
    for event in events[2:]:
        kind, delta = event["type"], event.get("delta", {})
        block = message["content"][-1] if message["content"] else {}
        assert (
            event.get("index", 0) == len(message["content"]) - (kind != "content_block_start") or "index" not in event
        )
        if kind == "content_block_start":
            assert not open_block
            message["content"].append(event["content_block"])
            arguments = ""
        elif delta.get("type") == "input_json_delta":
            arguments += delta["partial_json"]
        elif kind == "content_block_delta":
            field = delta["type"].removesuffix("_delta")
            block[field] += delta[field]
        elif kind == "content_block_stop" and arguments:
            block["input"] = json.loads(arguments)
        elif kind == "message_delta":
            message.update(delta)
            message["usage"].update(event["usage"])
        open_block = kind.startswith("content_block") and kind != "content_block_stop"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    return message


@pytest.mark.parametrize("name", SCENARIOS)
def test_stream_folds_to_whole(name: str) -> None:
    """Text, thoughts, calls, counts, stop reason: all the same both ways."""
    events = streamed(app.ANTHROPIC, REQUEST, SCENARIOS[name])
    assert folded(events) == whole(app.ANTHROPIC, REQUEST, SCENARIOS[name])


PIECES = SAID | st.builds(lambda call: app.ToolCall(call, f"c{call}", "f", "{}"), st.integers(0, 9))


@given(st.lists(PIECES, max_size=8, unique_by=lambda piece: getattr(piece, "call", object())))
def test_any_events_make_a_sound_stream(pieces: list[app.Event]) -> None:
    """However the kinds of pieces are mixed, blocks open and close one after the other, and the text is the whole's."""
    events = (app.Started(3), *pieces, app.Done("stop", 3, 4, 0.1, 0.1))
    last, one = folded(streamed(app.ANTHROPIC, REQUEST, events)), whole(app.ANTHROPIC, REQUEST, events)
    assert last | {"content": 0} == one | {"content": 0}
    for field in ("text", "thinking"):
        texts = ["".join(block.get(field, "") for block in each["content"]) for each in (last, one)]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", ["everything", "word"])
def test_goldens(name: str) -> None:
    """Exactly as recorded, order of the fields included."""
    check_goldens(app.ANTHROPIC, REQUEST, "anthropic", name)


@pytest.mark.parametrize(
    ("name", "reason", "word"),
    [
        ("answer", "end_turn", None), ("cut", "max_tokens", None), ("word", "stop_sequence", "is"),
        ("calls", "tool_use", None),
    ],
)  # fmt: skip
def test_stop_reasons(name: str, reason: str, word: str | None) -> None:
    """Why it ended, and which word ended it."""
    one = whole(app.ANTHROPIC, REQUEST, SCENARIOS[name])
    assert (one["stop_reason"], one["stop_sequence"]) == (reason, word)


def test_counts() -> None:
    """What came from a cache is counted apart; all official fields are there."""
    one = whole(app.ANTHROPIC, REQUEST, SCENARIOS["thinking"])
    usage = one["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (1, 30, 9)
    absent = ("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use", "service_tier")
    assert {name: usage[name] for name in absent} == dict.fromkeys(absent)
    assert {name: one[name] for name in ("container", "stop_details")} == {"container": None, "stop_details": None}
    start = streamed(app.ANTHROPIC, REQUEST, SCENARIOS["thinking"])[0]["message"]
    assert (start["content"], start["stop_reason"], start["usage"]["input_tokens"]) == ([], None, 31)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (app.BadRequest, "invalid_request_error"), (app.ContextLengthExceeded, "invalid_request_error"),
        (app.GatedModel, "permission_error"), (app.NotFound, "not_found_error"),
        (app.BodyTooLarge, "request_too_large"),
        (app.NoCapacity, "overloaded_error"), (app.LoadTimeout, "timeout_error"), (app.EngineFailed, "api_error"),
        (app.RequirementNotMet, "conflict_error"), (app.DiskFull, "api_error"),
    ],
)  # fmt: skip
def test_errors(error: type[app.ServerError], kind: str) -> None:
    """Anthropic's envelope, with a type by status."""
    told = app.ANTHROPIC.error(error("Words."))
    assert (told["type"], told["error"]) == ("error", {"type": kind, "message": "Words."})
    assert told["request_id"] is None  # a header has it


# -- over HTTP ----------------------------------------------------------------


def test_over_http(fake_server: Server) -> None:
    """A whole reply, a stream, a call, a count, a failure in mid-stream, an unknown model, a body that is no JSON."""
    fake_server.have("fake/a")
    post = fake_server.client.post

    def ask(text: str, path: str = "", **fields: Any) -> Any:
        body = {"model": "fake/a", "max_tokens": 20, "messages": [{"role": "user", "content": text}], **fields}
        return post(f"/v1/messages{path}", json=body, headers={"x-api-key": "any", "anthropic-version": "2023-06-01"})

    one = ask("count 3")
    assert (one.status_code, one.json()["content"][0]["text"], one.json()["usage"]["output_tokens"]) == (
        200,
        "0 1 2 ",
        3,
    )
    stream = ask("count 3", stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    last = folded(read_events(stream.text))
    assert (last["content"][0]["text"], last["stop_reason"]) == ("0 1 2 ", "end_turn")
    told = msgspec.json.encode([*CALLS, app.Done("tool_calls", 2, 3, 0.1, 0.1)]).decode()
    called = ask(f"events {told}").json()
    assert ([block["name"] for block in called["content"]], called["stop_reason"]) == (["weather", "time"], "tool_use")
    assert ask("one two three", "/count_tokens", system="Be kind.").json() == {"input_tokens": 5}
    broken = read_events(ask("raise 2", stream=True).text)
    assert (broken[-1]["type"], broken[-1]["error"]["type"]) == ("error", "api_error")
    missing = ask("x", model="fake/none")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert ask("x", max_tokens=None).status_code == 400
    wrong = post("/v1/messages", content=b"{")
    assert (wrong.status_code, wrong.json()["type"]) == (400, "error")
