"""POST /v1/responses: what a body means, the order of events, and one reply in two forms."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from dialecttools import (
    CALLS,
    LIKELY,
    SAID,
    SCENARIOS,
    VALUES,
    Json,
    check_any_body,
    check_goldens,
    read_events,
    streamed,
    whole,
)
from dialecttools import refusal as refused
from harness import Server
from hypothesis import given
from hypothesis import strategies as st

import app

PNG = "data:image/png;base64,aGVsbG8="
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "null"}}}


def parse(given_input: Any = "Hi", **fields: Any) -> app.ChatRequest:
    """Parse a body with a model and an input."""
    return app.RESPONSES.parse({"model": "m", "input": given_input, **fields})


def refusal(given_input: Any = "Hi", **fields: Any) -> str:
    """The text of the BadRequest that these fields get."""
    return refused(app.RESPONSES, {"model": "m", "input": given_input, **fields})


# -- parse --------------------------------------------------------------------


def test_smallest_body() -> None:
    """A text is a turn of the user; replies are whole unless the body says otherwise."""
    request = parse()
    assert request.messages == (app.Message("user", "Hi"),)
    assert (request.stream, request.sampling, request.think, request.ignored) == (False, app.Sampling(), None, ())
    assert parse(stream=True).stream


def test_items() -> None:
    """All kinds of items; what the assistant thought, said and called in a row is one turn."""
    request = parse(
        [
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": "Weather "}, {"type": "input_text", "text": "here?"},
                {"type": "input_image", "image_url": PNG, "detail": "auto"},
            ]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
                {"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []},
            ]},
            {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"a":1}'},
            {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}", "status": "completed"},
            {"type": "function_call_output", "call_id": "c2", "output": "noon"},
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sun"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "So."}]},
            {"role": "assistant", "content": "Sun."},
            {"role": "assistant", "content": "Really."},
        ],
        instructions="You are kind.",
    )  # fmt: skip
    calls = (app.Call("c1", "weather", '{"a": 1}'), app.Call("c2", "time", "{}"))
    assert request.messages == (
        app.Message("system", "You are kind."),
        app.Message("developer", "Be brief."),
        app.Message("user", "Weather here?", images=("aGVsbG8=",)),
        app.Message("assistant", "Let me see.", "Hm.", calls=calls),
        app.Message("tool", "noon", call_id="c2", tool_name="time"),
        app.Message("tool", "sun", call_id="c1", tool_name="weather"),
        app.Message("assistant", "Sun.", "So."),
        app.Message("assistant", "Really."),
    )
    assert request.ignored == (), "our own replies come back without complaint"


def test_options() -> None:
    """OpenAI's words, and ours beside them."""
    request = parse(
        max_output_tokens=5, temperature=0.5, top_p=0.25, top_logprobs=3, truncation="auto", keep_alive="5m",
        options={"top_k": 3}, user="u", metadata={"a": "b"}, store=True, service_tier="auto", prompt_cache_key="k",
        stream_options={"include_obfuscation": False}, parallel_tool_calls=False,
    )  # fmt: skip
    expected = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.25, "logprobs": 3, "top_k": 3}
    assert request.sampling.chosen() == expected
    assert (request.truncate, request.keep_alive, request.parallel_tool_calls) == (True, 300.0, False)
    assert request.ignored == ()


@pytest.mark.parametrize(
    ("effort", "think"),
    [("none", False), ("minimal", "low"), ("low", "low"), ("high", "high"), ("xhigh", "max"), ("max", "max")],
)
def test_effort(effort: str, think: Any) -> None:
    """How hard to think is asked of models that can, and of no other."""
    request = parse(reasoning={"effort": effort, "summary": "auto"})
    assert (request.think, request.think_if_able) == (think, True)


def test_shapes() -> None:
    """`text.format` in its three forms."""
    assert parse(text={"format": {"type": "text"}, "verbosity": None}).sampling.format is None
    assert parse(text={"format": {"type": "json_object"}}).sampling.format == "json"
    form = {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}
    assert parse(text={"format": form}).sampling.format == SCHEMA


def test_fields_that_stand_at_the_wrong_place_are_named() -> None:
    """An effort in `text` or a format in `reasoning` does nothing, and the reply says so."""
    request = parse(text={"effort": "high"}, reasoning={"format": {"type": "json_object"}})
    assert (request.think, request.sampling.format) == (None, None)
    assert sorted(request.ignored) == ["reasoning.format", "text.effort"]


def test_logprobs_and_includes() -> None:
    """They are asked for in a list of things to include; what is not known there is named."""
    request = parse(include=["message.output_text.logprobs", "reasoning.encrypted_content"])
    assert request.sampling.logprobs == 0
    assert request.ignored == ("include.reasoning.encrypted_content",)
    assert parse(include=["message.output_text.logprobs"], top_logprobs=2).sampling.logprobs == 2
    assert parse(moderation={"model": "m"}).ignored == ("moderation",)


def test_tools() -> None:
    """The flat form of tools and of the choice among them; the reply shows them as they were given."""
    other = {"type": "function", "name": "time", "description": "The time.", "strict": True}
    function = {"name": "weather", "parameters": {"type": "object"}}
    request = parse(tools=[TOOL, other], tool_choice="auto")
    assert [tool["function"]["name"] for tool in request.tools] == ["weather", "time"]
    assert request.tools[0] == {"type": "function", "function": function}
    named = parse(tools=[TOOL, other], tool_choice={"type": "function", "name": "weather"})
    assert (named.tools, named.tool_choice) == ((request.tools[0],), "required")
    told = whole(app.RESPONSES, named, SCENARIOS["empty"])
    assert told["tools"] == [
        {**TOOL, "description": None, "strict": None}, {**other, "parameters": None},
    ]  # fmt: skip
    assert told["tool_choice"] == {"type": "function", "name": "weather"}
    assert parse(tools=[TOOL], tool_choice="none").tool_choice == "none"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": None}, "'input'"),
        ({"input": ""}, "'input'"),
        ({"input": []}, "'input'"),
        ({"input": 5}, "'input'"),
        ({"model": None}, "'model'"),
        ({"previous_response_id": "resp_1"}, "'previous_response_id'"),
        ({"conversation": "conv_1"}, "'conversation'"),
        ({"conversation": {"id": "conv_1"}}, "'conversation"),
        ({"background": True}, "'background'"),
        ({"prompt": {"id": "p"}}, "'prompt'"),
        ({"options": {"n": 2}}, "'n'"),
        ({"max_output_tokens": 0}, "'max_output_tokens'"),
        ({"top_logprobs": 21}, "'top_logprobs'"),
        ({"truncation": "middle"}, "'truncation'"),
        ({"reasoning": {"effort": "extreme"}}, "'reasoning.effort'"),
        ({"text": {"format": {"type": "xml"}}}, "'text.format.type'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "'text.format.schema"),
        ({"tools": [{"type": "web_search"}]}, "'tools.0': 'web_search' is not supported"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "'custom' is not supported"),
        ({"tools": [TOOL, TOOL]}, "'tools'"),
        ({"tool_choice": "required"}, "'tool_choice'"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "'tool_choice'"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "'web_search'"),
        ({"input": [{"role": "robot", "content": "x"}]}, "'input.0.role'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "'input.0.type'"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "'input.0.content.0.type'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/y.png"}]}]},
            "'input.0.content.0.image_url'",
        ),
        ({"input": [{"type": "function_call", "name": "x"}]}, "'input.0'"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "'input.0'"),
        (
            {"input": [{"type": "function_call", "call_id": "x", "name": "x", "arguments": "["}]},
            "'input.0.function.arg",
        ),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "x"}] * 2}, "'input.1'"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "?"}] * 2}, "'input.1': a call needs"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, "'input.0'"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "'input.0'"),
    ],
)
def test_refusals(fields: Json, words: str) -> None:
    """A 400 that names the place."""
    assert words in refused(app.RESPONSES, {"model": "m", "input": "Hi", **fields})


KINDS = ["message", "function_call", "function_call_output", "reasoning"]


@given(
    st.dictionaries(st.sampled_from([*app.ResponsesBody.model_fields, "metadata", "unknown"]), VALUES, max_size=4),
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(app.ItemBody.model_fields, VALUES) | {"type": st.sampled_from(KINDS)}
    ),
)
def test_any_body(body: Json, item: Json) -> None:
    """Never another exception than a BadRequest."""
    check_any_body(app.RESPONSES, {"model": "m", "input": "x", **body})
    check_any_body(app.RESPONSES, {"model": "m", "input": [item]})


# -- replies ------------------------------------------------------------------

REQUEST = parse(metadata={"a": "b"}, max_output_tokens=50)
REQUEST = msgspec.structs.replace(REQUEST, wire={**REQUEST.wire, "stem": "5eed", "created": 1700000000})


def folded(events: Sequence[Json]) -> Json:
    """What a client makes of a stream that looks at the deltas alone; every part must fit its done events."""
    items: list[Json] = []
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"])
        elif "output_index" in event:
            item = items[event["output_index"]]
            assert event.get("item_id", item["id"]) == item["id"]
            fold_into(item, kind, event)
    last: Json = events[-1]["response"]
    assert last["output"] == items
    assert events[-1]["type"] == f"response.{last['status']}"
    return last


def fold_into(item: Json, kind: str, event: Json) -> None:
    """One event of an item."""
    content: Json = next(iter(item.get("content", [])), {})
    match kind:
        case "content_part.added":
            item["content"].append(event["part"])
        case "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        case "output_text.delta" | "reasoning_text.delta":
            content["text"] += event["delta"]
            content.get("logprobs", []).extend(event.get("logprobs", []))
        case "output_text.done" | "reasoning_text.done":
            assert (event["text"], event.get("logprobs")) == (content["text"], content.get("logprobs"))
        case "function_call_arguments.done":
            assert (event["arguments"], event["name"]) == (item["arguments"], item["name"])
        case "content_part.done":
            assert event["part"] == content
        case "output_item.done":
            item["status"] = event["item"]["status"]
            assert event["item"] == item
        case _:
            raise AssertionError(kind)


@pytest.mark.parametrize("name", SCENARIOS)
def test_stream_folds_to_whole(name: str) -> None:
    """Text, thoughts, calls, counts, status, ids: all the same both ways."""
    events = streamed(app.RESPONSES, REQUEST, SCENARIOS[name])
    assert folded(events) == whole(app.RESPONSES, REQUEST, SCENARIOS[name])


PIECES = SAID | st.builds(
    lambda call, text: app.ToolCall(call, f"c{call}", "f", text), st.integers(0, 1), st.just("[]")
)


@given(st.lists(PIECES, max_size=8), st.sampled_from(["stop", "length", "tool_calls"]))
def test_any_events_make_a_sound_stream(pieces: list[app.Event], reason: Any) -> None:
    """However the kinds of pieces are mixed, the deltas fit the done events, and the text is that of the whole."""
    events = (app.Started(3), *pieces, app.Done(reason, 3, 4, 0.1, 0.1))
    last, one = folded(streamed(app.RESPONSES, REQUEST, events)), whole(app.RESPONSES, REQUEST, events)
    assert last | {"output": 0} == one | {"output": 0}
    assert (text_of(last), text_of(last, "reasoning")) == (text_of(one), text_of(one, "reasoning"))


def text_of(response: Json, kind: str = "message") -> str:
    """All text of the items of one kind."""
    return "".join(part["text"] for item in response["output"] if item["type"] == kind for part in item["content"])


@pytest.mark.parametrize("name", ["everything", "cut"])
def test_goldens(name: str) -> None:
    """Exactly as recorded, order of the fields included."""
    check_goldens(app.RESPONSES, REQUEST, "responses", name)


def test_order_of_events() -> None:
    """The order that OpenAI's clients expect."""
    kinds = [
        event["type"].removeprefix("response.") for event in streamed(app.RESPONSES, REQUEST, SCENARIOS["thinking"])
    ]
    assert kinds == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done", "completed",
    ]  # fmt: skip


def test_cut_short() -> None:
    """A reply that hit its limit says so in its status, its reason, its last item and its last event."""
    events = streamed(app.RESPONSES, REQUEST, SCENARIOS["cut"])
    last = events[-1]["response"]
    assert events[-1]["type"] == "response.incomplete"
    assert (last["status"], last["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (last["output"][0]["status"], last["completed_at"]) == ("incomplete", None)


def test_counts_and_echo() -> None:
    """The counts, and what the reply says of its request."""
    one = whole(app.RESPONSES, REQUEST, SCENARIOS["thinking"])
    assert one["usage"] == {
        "input_tokens": 31, "output_tokens": 9, "total_tokens": 40, "output_tokens_details": {"reasoning_tokens": 0},
        "input_tokens_details": {"cached_tokens": 30, "cache_write_tokens": 0},
    }  # fmt: skip
    assert (one["completed_at"] - one["created_at"], one["metadata"], one["max_output_tokens"]) == (2, {"a": "b"}, 50)
    assert whole(app.RESPONSES, parse(store=True), SCENARIOS["answer"])["store"] is False, "nothing is kept"
    needed = (
        "presence_penalty frequency_penalty top_logprobs truncation store background service_tier max_output_tokens "
        "max_tool_calls prompt_cache_key safety_identifier previous_response_id reasoning text usage instructions"
    )
    assert set(needed.split()) <= one.keys()


def test_logprobs() -> None:
    """One entry a token, in the text and in its deltas."""
    one = whole(app.RESPONSES, REQUEST, SCENARIOS["logprobs"])
    entry = app.logprobs_json([LIKELY])[0]
    assert one["output"][0]["content"][0]["logprobs"] == [entry, entry]


def test_errors() -> None:
    """OpenAI's envelope; in a stream an event of the type `error` with the same words at both places."""
    error = app.RESPONSES.error(app.NotFound("Model x not found."))
    assert error["error"].keys() == {"message", "type", "param", "code"}
    (event,) = read_events(app.RESPONSES.frame(("error", error)).decode())
    assert (event["type"], event["message"], event["error"]) == ("error", "Model x not found.", error["error"])


# -- over HTTP ----------------------------------------------------------------


def test_over_http(fake_server: Server) -> None:
    """A whole reply, a stream, a call, a failure in mid-stream, an unknown model."""
    fake_server.have("fake/a")
    post = fake_server.client.post

    def ask(text: str, **fields: Any) -> Any:
        return post("/v1/responses", json={"model": "fake/a", "input": text, **fields})

    one = ask("count 3")
    assert (one.status_code, text_of(one.json()), one.json()["usage"]["output_tokens"]) == (200, "0 1 2 ", 3)
    stream = ask("count 3", stream=True)
    assert stream.headers["content-type"].startswith("text/event-stream")
    last = folded(read_events(stream.text))
    assert text_of(last) == "0 1 2 "
    assert re.fullmatch("resp_[0-9a-f]{32}", last["id"])
    told = msgspec.json.encode([*CALLS, app.Done("tool_calls", 2, 3, 0.1, 0.1)]).decode()
    assert [item["name"] for item in ask(f"events {told}").json()["output"]] == ["weather", "time"]
    broken = read_events(ask("raise 2", stream=True).text)
    assert (broken[-1]["type"], broken[-2]["type"]) == ("error", "response.output_text.delta")
    missing = post("/v1/responses", json={"model": "fake/none", "input": "x"})
    assert (missing.status_code, missing.json()["error"].keys()) == (404, {"message", "type", "param", "code"})
    assert ask("x", previous_response_id="resp_1").status_code == 400
