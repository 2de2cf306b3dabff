"""The `ollama` package, sync and async. It checks every reply against its own models."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import ollama
import pytest
import weather
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SHORT = {"num_predict": 8, "temperature": 0}
COPY = "clients-copy"


class City(BaseModel):
    """What an answer in JSON must fit."""

    name: str
    large: bool


@pytest.fixture(scope="module")
def client(base_url: str) -> ollama.Client:
    """The synchronous client."""
    return ollama.Client(host=base_url)


@pytest.fixture
async def aclient(base_url: str) -> ollama.AsyncClient:
    """The asynchronous client."""
    return ollama.AsyncClient(host=base_url)


def tagged(name: str) -> str:
    """A name as lists have it."""
    return name if ":" in name else f"{name}:latest"


def joined(chunks: Iterator[Any]) -> tuple[str, list[Any]]:
    """The text of a chat's stream, and its chunks."""
    pieces = list(chunks)
    return "".join(piece.message.content or "" for piece in pieces), pieces


# -- what is there ----------------------------------------------------------------


def test_list(client: ollama.Client, model: str) -> None:
    """Models with digest, size, time and details."""
    found = {one.model: one for one in client.list().models}
    entry = found[tagged(model)]
    assert entry.digest and len(entry.digest) == 64
    assert entry.size and entry.size > 0 and entry.modified_at and entry.modified_at.tzinfo
    assert entry.details and entry.details.format and entry.details.family and entry.details.quantization_level


def test_ps(client: ollama.Client, model: str) -> None:
    """A loaded model with the time of its end."""
    client.generate(model, keep_alive="10m")
    (entry,) = [one for one in client.ps().models if one.model == tagged(model)]
    assert entry.name == entry.model
    assert entry.expires_at and entry.expires_at.tzinfo and entry.size and entry.size > 0
    assert entry.size_vram is not None and entry.context_length and entry.context_length > 0


def test_show(client: ollama.Client, model: str, embed_model: str) -> None:
    """Capabilities and the context length, which frameworks look up here."""
    shown = client.show(model)
    assert "completion" in (shown.capabilities or [])
    assert shown.modelinfo
    assert any(name.endswith(".context_length") and value > 0 for name, value in shown.modelinfo.items())
    assert shown.details and shown.details.family
    assert "embedding" in (client.show(embed_model).capabilities or [])


# -- chat ---------------------------------------------------------------------------


def test_chat(client: ollama.Client, model: str) -> None:
    """One whole reply with all its counters."""
    reply = client.chat(model, messages=QUESTION, options=SHORT)
    assert reply.message.role == "assistant" and reply.message.content
    assert reply.done and reply.done_reason in ("stop", "length")
    for count in (reply.total_duration, reply.load_duration, reply.prompt_eval_duration, reply.eval_duration):
        assert count and count > 0
    assert reply.prompt_eval_count and 0 < (reply.eval_count or 0) <= 8


def test_chat_as_a_stream(client: ollama.Client, model: str) -> None:
    """The pieces are the whole; only the last has counters."""
    client.chat(model, messages=QUESTION, options=SHORT)  # both below begin with the same prompt cache
    whole = client.chat(model, messages=QUESTION, options=SHORT)
    text, pieces = joined(client.chat(model, messages=QUESTION, options=SHORT, stream=True))
    assert text == whole.message.content
    assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].eval_count == whole.eval_count
    assert all(piece.eval_count is None for piece in pieces[:-1])


def test_chat_with_a_history(client: ollama.Client, model: str) -> None:
    """The library's own messages can be sent back."""
    first = client.chat(model, messages=QUESTION, options=SHORT)
    messages: list[Any] = [*QUESTION, first.message, {"role": "user", "content": "And of Italy?"}]
    assert client.chat(model, messages=messages, options=SHORT).message.content


def test_chat_with_a_tool_result(client: ollama.Client, model: str) -> None:
    """A call and its result in the history, on a model that was not told of tools."""
    call = ollama.Message.ToolCall(function={"name": weather.NAME, "arguments": {"city": "Boston"}})
    messages = [
        ollama.Message(role="user", content=weather.QUESTION),
        ollama.Message(role="assistant", tool_calls=[call]),
        ollama.Message(role="tool", tool_name=weather.NAME, content=weather.RESULT),
    ]
    assert client.chat(model, messages=messages, options=SHORT).message.content


def test_chat_with_tools(client: ollama.Client, model: str) -> None:
    """A model that knows tools answers; one that does not refuses with a 400 that says so."""

    def get_weather(city: str) -> str:
        """The weather in a city.

        Args:
            city: the name of the city
        """
        return city

    asked: dict[str, Any] = {"messages": [{"role": "user", "content": weather.QUESTION}], "tools": [get_weather]}
    if "tools" in (client.show(model).capabilities or []):
        reply = client.chat(model, **asked)
        assert reply.message.content or reply.message.tool_calls
        assert all(isinstance(call.function.arguments, dict) for call in reply.message.tool_calls or [])
        return
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match="does not support tools") as caught:
            list(client.chat(model, stream=stream, **asked))
        assert caught.value.status_code == 400


def test_thinking(client: ollama.Client, model: str) -> None:
    """A model that thinks keeps its thoughts apart; one that does not refuses, unless told not to think."""
    if "thinking" in (client.show(model).capabilities or []):
        assert client.chat(model, messages=QUESTION, think=True).message.thinking
    else:
        with pytest.raises(ollama.ResponseError, match="does not support thinking") as caught:
            client.chat(model, messages=QUESTION, think=True, options=SHORT)
        assert caught.value.status_code == 400
    reply = client.chat(model, messages=QUESTION, think=False, options=SHORT)
    assert reply.message.content and not reply.message.thinking


def test_format(client: ollama.Client, model: str) -> None:
    """A schema of pydantic's, and any JSON."""
    options = {"num_predict": 200, "temperature": 0}
    messages = [
        {"role": "user", "content": "Give me an object with the key city and the name of the capital of France."}
    ]
    City.model_validate_json(
        client.chat(model, messages=messages, format=City.model_json_schema(), options=options).message.content or ""
    )
    assert json.loads(client.chat(model, messages=messages, format="json", options=options).message.content or "")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: ollama.Client, model: str, stream: bool) -> None:
    """An entry for each token, with as many alternatives as asked for."""
    reply: Any = client.chat(model, messages=QUESTION, options=SHORT, stream=stream, logprobs=True, top_logprobs=2)
    entries = [entry for piece in (reply if stream else [reply]) for entry in piece.logprobs or []]
    assert 0 < len(entries) <= 8
    for entry in entries:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


# -- generate, embed ------------------------------------------------------------------


def test_generate(client: ollama.Client, model: str) -> None:
    """Whole, streamed, raw, and with the context of the one before."""
    whole = client.generate(model, "Say hello.", options=SHORT)
    assert whole.response and whole.context and whole.done_reason
    pieces = list(client.generate(model, "Say hello.", options=SHORT, stream=True))
    assert "".join(piece.response for piece in pieces) and pieces[-1].context
    assert client.generate(model, "And again.", context=whole.context, options=SHORT).response
    raw = client.generate(model, "The capital of France is", raw=True, options=SHORT)
    assert raw.response and not raw.context
    assert client.generate(model, "Who are you?", system="You are Bob.", options=SHORT).response


def test_load_and_unload(client: ollama.Client, model: str) -> None:
    """An empty prompt loads, and with no time to stay it unloads."""
    assert client.generate(model).done_reason == "load"
    assert client.chat(model).done_reason == "load"
    assert client.generate(model, keep_alive=0).done_reason == "unload"


def test_embed(client: ollama.Client, embed_model: str) -> None:
    """One text or several, cut to fewer dimensions, and the older form."""
    (one,) = client.embed(embed_model, "x").embeddings
    two = client.embed(embed_model, ["x", "y"])
    assert len(two.embeddings) == 2 and len(two.embeddings[0]) == len(one)
    assert two.prompt_eval_count and two.total_duration
    assert len(client.embed(embed_model, "x", dimensions=8).embeddings[0]) == 8
    assert len(client.embeddings(embed_model, "x").embedding) == len(one)


def test_truncate(client: ollama.Client, embed_model: str) -> None:
    """Too long a text is cut, or refused."""
    long = "word " * 20000
    assert client.embed(embed_model, long).embeddings
    with pytest.raises(ollama.ResponseError) as caught:
        client.embed(embed_model, long, truncate=False)
    assert caught.value.status_code == 400


# -- managing models ------------------------------------------------------------------


def test_pull(client: ollama.Client, model: str) -> None:
    """Whole and with progress."""
    assert client.pull(model).status == "success"
    statuses = [piece.status for piece in client.pull(model, stream=True)]
    assert statuses[0] == "pulling manifest" and statuses[-1] == "success"


def test_copy_create_delete(client: ollama.Client, model: str) -> None:
    """A copy, a model with a system message, and their end."""
    assert client.copy(model, COPY).status == "success"
    assert tagged(COPY) in {one.model for one in client.list().models}
    assert client.delete(COPY).status == "success"
    made = client.create(COPY, from_=model, system="You are Bob.", parameters={"temperature": 0.1})
    assert made.status == "success"
    statuses = [piece.status for piece in client.create(COPY, from_=model, stream=True)]
    assert statuses[-1] == "success"
    assert client.chat(COPY, messages=QUESTION, options=SHORT).message.content
    client.delete(COPY)
    assert tagged(COPY) not in {one.model for one in client.list().models}


@pytest.mark.parametrize(
    ("call", "status"),
    [
        (lambda client: client.chat("never-installed", messages=QUESTION), 404),
        (lambda client: client.generate("never-installed", "x"), 404),
        (lambda client: client.show("never-installed"), 404),
        (lambda client: client.embed("never-installed", "x"), 404),
        (lambda client: client.delete("never-installed"), 404),
        (lambda client: client.copy("never-installed", "x"), 404),
        (lambda client: list(client.chat("never-installed", messages=QUESTION, stream=True)), 404),
        (lambda client: client.chat("a b", messages=QUESTION), 400),
    ],
    ids=["chat", "generate", "show", "embed", "delete", "copy", "stream", "name"],
)
def test_errors(client: ollama.Client, call: Callable[[ollama.Client], Any], status: int) -> None:
    """The library's own error, with the status and a text."""
    with pytest.raises(ollama.ResponseError) as caught:
        call(client)
    assert caught.value.status_code == status
    assert ("not found" if status == 404 else "invalid model name") in caught.value.error


def test_a_failed_pull(client: ollama.Client) -> None:
    """An error, whole and in mid-stream."""
    with pytest.raises(ollama.ResponseError):
        client.pull("never-installed")
    with pytest.raises(ollama.ResponseError):
        list(client.pull("never-installed", stream=True))


# -- the same, asynchronously -----------------------------------------------------------


async def gathered(stream: AsyncIterator[Any]) -> list[Any]:
    """All pieces of a stream."""
    return [piece async for piece in stream]


async def test_async_lists(aclient: ollama.AsyncClient, model: str) -> None:
    """What is there."""
    assert tagged(model) in {one.model for one in (await aclient.list()).models}
    assert (await aclient.generate(model)).done_reason == "load"
    assert tagged(model) in {one.model for one in (await aclient.ps()).models}
    assert (await aclient.show(model)).modelinfo


async def test_async_chat(aclient: ollama.AsyncClient, model: str) -> None:
    """Whole and streamed, chat and generate."""
    assert (await aclient.chat(model, messages=QUESTION, options=SHORT)).message.content
    pieces = await gathered(await aclient.chat(model, messages=QUESTION, options=SHORT, stream=True))
    assert pieces[-1].done and "".join(piece.message.content or "" for piece in pieces)
    assert (await aclient.generate(model, "Hi", options=SHORT)).response
    assert (await gathered(await aclient.generate(model, "Hi", options=SHORT, stream=True)))[-1].done


async def test_async_embed(aclient: ollama.AsyncClient, embed_model: str) -> None:
    """Vectors."""
    assert len((await aclient.embed(embed_model, ["x", "y"])).embeddings) == 2
    assert (await aclient.embeddings(embed_model, "x")).embedding


async def test_async_models(aclient: ollama.AsyncClient, model: str) -> None:
    """Pull, copy, create, delete."""
    pulled = await gathered(await aclient.pull(model, stream=True))
    assert pulled[-1].status == "success"
    assert (await aclient.copy(model, COPY)).status == "success"
    assert (await aclient.create(COPY, from_=model)).status == "success"
    assert (await aclient.delete(COPY)).status == "success"


async def test_async_errors(aclient: ollama.AsyncClient) -> None:
    """The same error class."""
    with pytest.raises(ollama.ResponseError) as caught:
        await aclient.chat("never-installed", messages=QUESTION)
    assert caught.value.status_code == 404
