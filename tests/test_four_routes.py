"""One conversation with a tool call and its result by four protocols, whole and streamed, on every engine.

The call is forced, so that a small model makes a valid one. Then the same history goes in by each protocol: each must
render it to the same prompt, which the count of its tokens shows, and be answered with text.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from harness import Json, Server

NAME = "get_weather"
PARAMETERS: Json = {
    "type": "object",
    "properties": {"location": {"type": "string", "enum": ["Boston"]}},
    "required": ["location"],
    "additionalProperties": False,
}
FUNCTION: Json = {"name": NAME, "description": "The weather at a place", "parameters": PARAMETERS}
SYSTEM = "You answer questions about the weather."
QUESTION = "What is the weather in Boston?"
ARGUMENTS = {"location": "Boston"}
RESULT = "sunny, 22 degrees"
THANKS = "Thank you. Say it in one sentence."
CALL_ID = "call_abcdefgh"
CONTROL = ("<tool_call", "</tool_call", "<|im_", "<think", "[TOOL_CALLS", "<tool_response")
Events = list[tuple[str, Any]]


@dataclass(frozen=True)
class Answer:
    """What one reply said, in no protocol."""

    text: str
    calls: tuple[tuple[str, str, str], ...]  # id, name, arguments as JSON
    reason: str
    prompt_tokens: int


@dataclass(frozen=True)
class Route:
    """A protocol: how it forces the call, how it has the history, how its whole replies and its streams are read."""

    path: str
    force: Json
    history: Json
    whole: Callable[[Json], Answer]
    streamed: Callable[[Events], Answer]
    reason: str  # how a reply with a call ends


def events_of(text: str) -> Iterator[tuple[str, Any]]:
    """Lines of JSON, or server-sent events with their names."""
    for block in text.strip("\n").split("\n\n" if text.startswith(("data:", "event:", ":")) else "\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line.startswith(("data: ", "event: ")))
        data = fields.get("data", "" if fields or block.startswith(":") else block)
        if data and data != "[DONE]":
            yield fields.get("event", ""), json.loads(data)


# -- Ollama -----------------------------------------------------------------------


def ollama_calls(messages: list[Json]) -> tuple[tuple[str, str, str], ...]:
    """The calls of messages; arguments are objects there."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    return tuple((call["id"], call["function"]["name"], json.dumps(call["function"]["arguments"])) for call in calls)


def ollama_whole(reply: Json) -> Answer:
    """POST /api/chat, whole."""
    message = reply["message"]
    return Answer(message["content"], ollama_calls([message]), reply["done_reason"], reply["prompt_eval_count"])


def ollama_streamed(events: Events) -> Answer:
    """POST /api/chat, as lines."""
    messages = [line["message"] for _, line in events]
    last = events[-1][1]
    text = "".join(message["content"] for message in messages)
    return Answer(text, ollama_calls(messages), last["done_reason"], last["prompt_eval_count"])


OLLAMA_TOOLS = [{"type": "function", "function": FUNCTION}]
OLLAMA = Route(
    "/api/chat",
    {"tools": OLLAMA_TOOLS, "tool_choice": "required"},
    {
        "tools": OLLAMA_TOOLS,
        "tool_choice": "none",
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTION},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": CALL_ID, "function": {"name": NAME, "arguments": ARGUMENTS}}],
            },
            {"role": "tool", "tool_name": NAME, "tool_call_id": CALL_ID, "content": RESULT},
            {"role": "user", "content": THANKS},
        ],
    },
    ollama_whole,
    ollama_streamed,
    "stop",
)


# -- OpenAI: chat completions ---------------------------------------------------------


def openai_calls(calls: list[Json]) -> tuple[tuple[str, str, str], ...]:
    """Whole calls."""
    return tuple((call["id"], call["function"]["name"], call["function"]["arguments"]) for call in calls)


def openai_whole(reply: Json) -> Answer:
    """POST /v1/chat/completions, whole."""
    (choice,) = reply["choices"]
    message = choice["message"]
    calls = openai_calls(message.get("tool_calls") or [])
    return Answer(message["content"] or "", calls, choice["finish_reason"], reply["usage"]["prompt_tokens"])


def openai_streamed(events: Events) -> Answer:
    """POST /v1/chat/completions, in chunks: the pieces of a call are put together by its index."""
    calls: dict[int, Json] = {}
    text, reason, tokens = "", "", 0
    for _, chunk in events:
        tokens = (chunk.get("usage") or {}).get("prompt_tokens", tokens)
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            reason = choice["finish_reason"] or reason
            for piece in choice["delta"].get("tool_calls") or []:
                call = calls.setdefault(piece["index"], {"id": "", "function": {"name": "", "arguments": ""}})
                call["id"] += piece.get("id") or ""
                for key in ("name", "arguments"):
                    call["function"][key] += piece.get("function", {}).get(key) or ""
    return Answer(text, openai_calls([calls[index] for index in sorted(calls)]), reason, tokens)


OPENAI = Route(
    "/v1/chat/completions",
    {"tools": OLLAMA_TOOLS, "tool_choice": {"type": "function", "function": {"name": NAME}}},
    {
        "tools": OLLAMA_TOOLS,
        "tool_choice": "none",
        "messages": [
            {"role": "developer", "content": SYSTEM},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": CALL_ID, "type": "function", "function": {"name": NAME, "arguments": json.dumps(ARGUMENTS)}}
                ],
            },
            {"role": "tool", "tool_call_id": CALL_ID, "content": [{"type": "text", "text": RESULT}]},
            {"role": "user", "content": THANKS},
        ],
    },
    openai_whole,
    openai_streamed,
    "tool_calls",
)


# -- OpenAI: responses -------------------------------------------------------------------


def responses_whole(reply: Json) -> Answer:
    """POST /v1/responses, whole."""
    items = reply["output"]
    calls = [item for item in items if item["type"] == "function_call"]
    parts = [part for item in items if item["type"] == "message" for part in item["content"]]
    return Answer(
        "".join(part["text"] for part in parts),
        tuple((call["call_id"], call["name"], call["arguments"]) for call in calls),
        reply["status"],
        reply["usage"]["input_tokens"],
    )


def responses_streamed(events: Events) -> Answer:
    """POST /v1/responses, as events: what the deltas say must be what the end says."""
    final = responses_whole(events[-1][1]["response"])

    def joined(kind: str) -> str:
        return "".join(data["delta"] for name, data in events if name == kind)

    assert joined("response.output_text.delta") == final.text
    assert joined("response.function_call_arguments.delta") == "".join(call[2] for call in final.calls)
    return final


RESPONSES_TOOLS = [{"type": "function", **FUNCTION}]
RESPONSES = Route(
    "/v1/responses",
    {"tools": RESPONSES_TOOLS, "tool_choice": {"type": "function", "name": NAME}},
    {
        "tools": RESPONSES_TOOLS,
        "tool_choice": "none",
        "instructions": SYSTEM,
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
            {"type": "function_call", "call_id": CALL_ID, "name": NAME, "arguments": json.dumps(ARGUMENTS)},
            {"type": "function_call_output", "call_id": CALL_ID, "output": RESULT},
            {"type": "message", "role": "user", "content": THANKS},
        ],
    },
    responses_whole,
    responses_streamed,
    "completed",
)


# -- Anthropic -----------------------------------------------------------------------------

ANTHROPIC_INPUT = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")  # the prompt, in parts


def anthropic_whole(reply: Json) -> Answer:
    """POST /v1/messages, whole."""
    blocks = reply["content"]
    calls = [block for block in blocks if block["type"] == "tool_use"]
    return Answer(
        "".join(block["text"] for block in blocks if block["type"] == "text"),
        tuple((call["id"], call["name"], json.dumps(call["input"])) for call in calls),
        reply["stop_reason"],
        sum(reply["usage"].get(name) or 0 for name in ANTHROPIC_INPUT),
    )


def anthropic_streamed(events: Events) -> Answer:
    """POST /v1/messages, as events: blocks are put together by their index."""
    blocks: dict[int, Json] = {}
    reason = ""
    usage: Json = {}
    for name, data in events:
        if name == "message_start":
            usage = data["message"]["usage"]
        elif name == "content_block_start":
            blocks[data["index"]] = {"json": "", **data["content_block"]}
        elif name == "content_block_delta":
            block, delta = blocks[data["index"]], data["delta"]
            block["text"] = block.get("text", "") + delta.get("text", "")
            block["json"] += delta.get("partial_json", "")
        elif name == "message_delta":
            reason = data["delta"]["stop_reason"]
            usage |= {key: count for key, count in data["usage"].items() if count is not None}
    for block in blocks.values():
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["json"])
    return anthropic_whole({"content": list(blocks.values()), "stop_reason": reason, "usage": usage})


ANTHROPIC_TOOLS = [{"name": NAME, "description": FUNCTION["description"], "input_schema": PARAMETERS}]
ANTHROPIC = Route(
    "/v1/messages",
    {"tools": ANTHROPIC_TOOLS, "tool_choice": {"type": "tool", "name": NAME, "disable_parallel_tool_use": True}},
    {
        "tools": ANTHROPIC_TOOLS,
        "tool_choice": {"type": "none"},
        "system": [{"type": "text", "text": SYSTEM}],
        "messages": [
            {"role": "user", "content": QUESTION},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": CALL_ID, "name": NAME, "input": ARGUMENTS}],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": CALL_ID, "content": [{"type": "text", "text": RESULT}]},
                    {"type": "text", "text": THANKS},
                ],
            },
        ],
    },
    anthropic_whole,
    anthropic_streamed,
    "tool_use",
)


ROUTES = {route.path: route for route in (OLLAMA, OPENAI, RESPONSES, ANTHROPIC)}
ENGINES = {"llama.cpp": "smollm2:135m", "transformers": "test/smollm2", "vllm": "test/smollm2"}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> tuple[Server, str]:
    """A server and the model that this engine serves there."""
    name: str = request.param
    server: Server = request.getfixturevalue("vllm_server" if name == "vllm" else "server")
    server.have(ENGINES[name])
    return server, ENGINES[name]


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> Route:
    """One of the four."""
    return ROUTES[request.param]


def limits(route: Route, tokens: int) -> Json:
    """Always the same answer, of at most so many tokens, in the fields of the protocol."""
    if route is OLLAMA:
        return {"options": {"temperature": 0, "num_predict": tokens}}
    name = "max_output_tokens" if route is RESPONSES else "max_tokens"
    return {"temperature": 0, name: tokens}


def asked(server: Server, route: Route, body: Json, stream: bool) -> Answer:
    """One reply, whole or streamed."""
    usage: Json = {"stream_options": {"include_usage": True}} if route is OPENAI and stream else {}
    reply = server.client.post(route.path, json={**body, **usage, "stream": stream})
    assert reply.status_code == 200, reply.text
    return route.streamed(list(events_of(reply.text))) if stream else route.whole(reply.json())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_forced_call(engine: tuple[Server, str], route: Route, stream: bool) -> None:
    """Its name, its arguments, how the reply ends; no text and no marks of the model's own language beside it."""
    server, model = engine
    question = {"input": QUESTION} if route is RESPONSES else {"messages": [{"role": "user", "content": QUESTION}]}
    single: Json = {} if route is ANTHROPIC else {"parallel_tool_calls": False}
    answer = asked(server, route, {"model": model, **question, **route.force, **single, **limits(route, 200)}, stream)
    ((call_id, name, arguments),) = answer.calls
    assert call_id
    assert (name, json.loads(arguments)) == (NAME, ARGUMENTS)
    assert (answer.text, answer.reason) == ("", route.reason)


def test_the_history_is_the_same_by_every_route(engine: tuple[Server, str]) -> None:
    """The same prompt, and so the same answer, whole and streamed: text, without marks, and no further call."""
    server, model = engine
    asked(server, OLLAMA, {"model": model, **OLLAMA.history, **limits(OLLAMA, 1)}, False)  # fills the prompt cache
    answers: dict[tuple[str, bool], Answer] = {}
    for route in ROUTES.values():
        for stream in (False, True):
            answers[route.path, stream] = asked(
                server, route, {"model": model, **route.history, **limits(route, 8)}, stream
            )
    assert all(answer.text for answer in answers.values())
    assert all(answer.calls == () for answer in answers.values())
    assert not any(mark in answer.text for answer in answers.values() for mark in CONTROL)
    assert len({answer.prompt_tokens for answer in answers.values()}) == 1, {
        key: answer.prompt_tokens for key, answer in answers.items()
    }
    assert len({answer.text for answer in answers.values()}) == 1, answers
    plain = {"model": model, "messages": [{"role": "user", "content": THANKS}], **limits(OLLAMA, 1)}
    assert asked(server, OLLAMA, plain, False).prompt_tokens < answers[OLLAMA.path, False].prompt_tokens


def test_a_system_message_in_the_middle_is_not_lost(engine: tuple[Server, str]) -> None:
    """Anthropic's messages may have one too, as newer clients send it."""
    server, model = engine

    def count(*middle: Json) -> int:
        ends = {"role": "user", "content": "One."}, {"role": "user", "content": "Two."}
        body = {"model": model, "messages": [ends[0], *middle, ends[1]], **limits(ANTHROPIC, 1)}
        return asked(server, ANTHROPIC, body, False).prompt_tokens

    assert count({"role": "system", "content": "From here on be brief."}) > count() + 3
