"""What the tests of several dialects share: the two ways to a reply, and recorded replies."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st

import app

GOLDENS = Path(__file__).with_name("goldens")
Json = dict[str, Any]


def streamed(dialect: app.Dialect, request: app.ChatRequest, events: Sequence[app.Event]) -> list[Json]:
    """The data of all server-sent events, through bytes and back; each event's name is its type."""
    feed = dialect.stream(request)
    sent = b"".join(dialect.frame(frame) for event in events for frame in feed(event))
    return read_events(sent.decode())


def read_events(text: str) -> list[Json]:
    """Decode a body of server-sent events whose names are their types."""
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def whole(dialect: app.Dialect, request: app.ChatRequest, events: Sequence[app.Event]) -> Json:
    """The reply in one piece."""

    async def stream() -> AsyncIterator[app.Event]:
        for event in events:
            yield event

    return dialect.whole(request, asyncio.run(app.fold(stream())))


def refusal(dialect: app.Dialect, body: Json) -> str:
    """The text of the BadRequest that a body gets."""
    with pytest.raises(app.BadRequest) as raised:
        dialect.parse(body)
    return str(raised.value)


def check_goldens(dialect: app.Dialect, request: app.ChatRequest, prefix: str, name: str) -> None:
    """A scenario's stream and whole reply are exactly as recorded, order of the fields included."""
    for form, made in (("stream", streamed), ("whole", whole)):
        recorded = json.loads((GOLDENS / f"{prefix}_{name}_{form}.json").read_text(encoding="utf-8"))
        assert json.dumps(made(dialect, request, SCENARIOS[name])) == json.dumps(recorded)


LIKELY = app.TokenLogprob("is", -0.25, b"is", (app.TokenLogprob("is", -0.25, b"is"),))
CALLS: tuple[app.Event, ...] = (
    app.ToolCall(0, "call_1", "weather"), app.ToolCall(0, arguments='{"city":'), app.ToolCall(0, arguments='"Rome"}'),
    app.ToolCall(1, "call_2", "time", "{}"),
)  # fmt: skip
SCENARIOS: dict[str, tuple[app.Event, ...]] = {
    "answer": (app.Started(31), app.Text("Par"), app.Text("is ✓\n"), app.Done("stop", 31, 8, 0.1, 0.1)),
    "thinking": (
        app.Started(31), app.Thinking("Hm"), app.Thinking("m."), app.Text("Paris"),
        app.Done("stop", 31, 9, 0.1, 0.1, total_seconds=2.2, cached_tokens=30),
    ),
    "calls": (app.Started(31), app.Text("Let me see."), *CALLS, app.Done("tool_calls", 31, 20, 0.1, 0.1)),
    "only_calls": (app.Started(31), *CALLS, app.Done("tool_calls", 31, 20, 0.1, 0.1)),
    "everything": (
        app.Started(31), app.Thinking("Hm."), app.Text(""), app.Text("So "), app.Text("be it"), *CALLS,
        app.Done("tool_calls", 31, 20, 0.1, 0.1),
    ),
    "cut": (app.Started(31), app.Text("Par"), app.Done("length", 31, 1, 0.1, 0.1)),
    "cut_thinking": (app.Started(31), app.Thinking("Hm"), app.Done("length", 31, 1, 0.1, 0.1)),
    "word": (app.Started(31), app.Text("Par"), app.Done("stop", 31, 2, 0.1, 0.1, stop_string="is")),
    "empty": (app.Started(31), app.Done("stop", 31, 1, 0.1, 0.1)),
    "logprobs": (
        app.Started(31), app.Text("is", (LIKELY,)), app.Text("", (LIKELY,)), app.Done("stop", 31, 2, 0.1, 0.1),
    ),
}  # fmt: skip


SAID = st.one_of(
    st.builds(app.Text, st.sampled_from(["", "a", "é ", "\n\n", "data: "])),
    st.builds(app.Thinking, st.sampled_from(["", "x", "\n"])),
)
WHOLE_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | WHOLE_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "a"]), inner),
    max_leaves=6,
)


def check_any_body(dialect: app.Dialect, body: Json) -> None:
    """A body is a request that can be sent to an engine as it is, or a BadRequest."""
    try:
        parsed = dialect.parse(body)
    except app.BadRequest:
        return
    frame = msgspec.msgpack.encode(app.Generate(1, parsed))
    assert msgspec.msgpack.decode(frame, type=app.Command) == app.Generate(1, parsed)
