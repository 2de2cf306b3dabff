"""The `anthropic` package, sync and async: messages, streams, tools, counting, errors, models."""

from typing import Any

import anthropic
import pytest
import weather

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
NAMED: Any = {"type": "tool", "name": weather.NAME}


@pytest.fixture(scope="module")
def client(base_url: str) -> anthropic.Anthropic:
    """The synchronous client; it repeats nothing."""
    return anthropic.Anthropic(base_url=base_url, max_retries=0)


@pytest.fixture
async def aclient(base_url: str) -> anthropic.AsyncAnthropic:
    """The asynchronous client."""
    return anthropic.AsyncAnthropic(base_url=base_url, max_retries=0)


def test_a_message(client: anthropic.Anthropic, model: str) -> None:
    """One whole reply; a system text, blocks as content."""
    blocks: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Say hello."}]}]
    reply = client.messages.create(model=model, max_tokens=8, system="Be short.", messages=blocks)
    assert reply.type == "message" and reply.role == "assistant" and reply.id.startswith("msg_")
    assert reply.content[0].type == "text" and reply.content[0].text
    assert reply.stop_reason in ("end_turn", "max_tokens")
    assert reply.usage.input_tokens > 0 and 0 < reply.usage.output_tokens <= 8


def test_cut_and_stopped(client: anthropic.Anthropic, model: str) -> None:
    """The reason says which, and which word it was."""
    counting: list[Any] = [{"role": "user", "content": "Count from one to one hundred."}]
    cut = client.messages.create(model=model, max_tokens=2, messages=counting)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 2)
    stopped = client.messages.create(model=model, max_tokens=200, messages=QUESTION, stop_sequences=["a", "e", "i"])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence in ("a", "e", "i")


def test_a_stream_of_events(client: anthropic.Anthropic, model: str) -> None:
    """Raw events in order."""
    events = list(client.messages.create(model=model, max_tokens=8, messages=QUESTION, stream=True))
    kinds = [event.type for event in events if event.type != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_the_stream_helper(client: anthropic.Anthropic, model: str) -> None:
    """Text as it comes, and the message that it makes."""
    with client.messages.stream(model=model, max_tokens=8, messages=QUESTION) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert final.content[0].type == "text" and final.content[0].text == text != ""
    assert final.usage.output_tokens > 0 and final.stop_reason


@pytest.mark.parametrize("choice", [NAMED, {"type": "any"}], ids=["named", "any"])
def test_a_tool(client: anthropic.Anthropic, model: str, choice: Any) -> None:
    """A forced use, whole and streamed, and its result."""
    messages: list[Any] = [{"role": "user", "content": weather.QUESTION}]
    settings: Any = {"model": model, "max_tokens": 200, "tools": weather.ANTHROPIC}
    reply = client.messages.create(messages=messages, tool_choice=choice, **settings)
    used: Any = next(block for block in reply.content if block.type == "tool_use")
    assert (reply.stop_reason, used.name, used.input) == ("tool_use", weather.NAME, {"city": "Boston"})
    with client.messages.stream(messages=messages, tool_choice=choice, **settings) as stream:
        streamed: Any = next(block for block in stream.get_final_message().content if block.type == "tool_use")
    assert (streamed.name, streamed.input) == (weather.NAME, {"city": "Boston"})
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": weather.RESULT}]}
        for block in reply.content
        if block.type == "tool_use"
    ]
    messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": results}]
    answer = client.messages.create(messages=messages, tool_choice={"type": "none"}, **{**settings, "max_tokens": 16})
    assert answer.content[0].type == "text" and answer.content[0].text


def test_tokens_are_counted(client: anthropic.Anthropic, model: str) -> None:
    """Exactly as the reply counts them; tools count too."""
    counted = client.messages.count_tokens(model=model, messages=QUESTION, system="Be short.")
    reply = client.messages.create(model=model, max_tokens=1, messages=QUESTION, system="Be short.")
    cached = (reply.usage.cache_read_input_tokens or 0) + (reply.usage.cache_creation_input_tokens or 0)
    assert counted.input_tokens == reply.usage.input_tokens + cached
    assert client.messages.count_tokens(model=model, messages=QUESTION).input_tokens < counted.input_tokens


def test_models(client: anthropic.Anthropic, model: str) -> None:
    """The list, and one of them."""
    assert any(one.id.startswith(model) for one in client.models.list())
    assert client.models.retrieve(model).id == model


def test_errors(client: anthropic.Anthropic, model: str) -> None:
    """The library's own classes, by status, with the type in the body."""
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="never-installed", max_tokens=1, messages=QUESTION)
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError) as wrong:
        client.messages.create(model=model, max_tokens=0, messages=QUESTION)
    assert wrong.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=model, max_tokens=1, messages=[])
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="never-installed", max_tokens=1, messages=QUESTION, stream=True)


def test_what_older_clients_send(client: anthropic.Anthropic, model: str) -> None:
    """Sampling options that the library no longer names, cache marks, metadata."""
    extra: Any = {"temperature": 0, "top_p": 0.9, "top_k": 5, "metadata": {"user_id": "ada"}}
    marked: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}]}
    ]
    assert client.messages.create(model=model, max_tokens=4, messages=marked, extra_body=extra).content


async def test_async(aclient: anthropic.AsyncAnthropic, model: str) -> None:
    """Whole, streamed, counted, listed, refused."""
    settings: Any = {"model": model, "max_tokens": 4, "messages": QUESTION}
    assert (await aclient.messages.create(**settings)).content
    async with aclient.messages.stream(**settings) as stream:
        assert await stream.get_final_text()
    assert (await aclient.messages.count_tokens(model=model, messages=QUESTION)).input_tokens > 0
    assert [one.id async for one in aclient.models.list()]
    with pytest.raises(anthropic.NotFoundError):
        await aclient.messages.create(**{**settings, "model": "never-installed"})
