"""The `openai` package, sync and async: chat, completions, embeddings, models, responses and its error classes."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, Literal

import openai
import pytest
import weather
from pydantic import BaseModel

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
ASK_WEATHER: list[Any] = [{"role": "user", "content": weather.QUESTION}]
NAMED: Any = {"type": "function", "function": {"name": weather.NAME}}


class City(BaseModel):
    """What an answer must fit."""

    name: Literal["Paris", "Rome"]
    large: bool


@pytest.fixture(scope="module")
def client(base_url: str) -> openai.OpenAI:
    """The synchronous client; it repeats nothing, so that every failure is seen."""
    return openai.OpenAI(base_url=f"{base_url}/v1", max_retries=0)


@pytest.fixture
async def aclient(base_url: str) -> openai.AsyncOpenAI:
    """The asynchronous client."""
    return openai.AsyncOpenAI(base_url=f"{base_url}/v1", max_retries=0)


# -- chat ------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI, model: str) -> None:
    """One whole reply."""
    reply = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=8, temperature=0)
    assert reply.object == "chat.completion" and reply.model == model
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert reply.usage and reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_chat_as_a_stream(client: openai.OpenAI, model: str) -> None:
    """The chunks are the whole, the usage comes last and alone."""
    settings: Any = {"model": model, "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    client.chat.completions.create(**settings)  # both below begin with the same prompt cache
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **settings))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_the_stream_helper(client: openai.OpenAI, model: str) -> None:
    """It checks the order of the chunks and puts the reply together."""
    with client.chat.completions.stream(model=model, messages=QUESTION, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds and kinds[-1] in ("content.done", "chunk")
    assert final.choices[0].message.content


def test_content_in_parts_and_every_role(client: openai.OpenAI, model: str) -> None:
    """As newer clients send it."""
    messages: list[Any] = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "My name is"}, {"type": "text", "text": "Ada."}]},
        {"role": "user", "content": "Who am I?"},
        {"role": "assistant", "content": "Ada."},
        {"role": "user", "content": "Say it again.", "name": "ada"},
    ]
    reply = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=4)
    assert reply.usage and reply.usage.completion_tokens <= 4


def test_parse(client: openai.OpenAI, model: str) -> None:
    """A pydantic model goes out as a strict schema and comes back filled."""
    messages: list[Any] = [{"role": "user", "content": "Which city is the capital of France?"}]
    reply = client.chat.completions.parse(model=model, messages=messages, response_format=City, temperature=0)
    assert isinstance(reply.choices[0].message.parsed, City)
    with client.chat.completions.stream(model=model, messages=messages, response_format=City) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)


def test_json_object(client: openai.OpenAI, model: str) -> None:
    """Any JSON object."""
    messages: list[Any] = [{"role": "user", "content": 'Reply with the JSON object {"city": "Paris"}.'}]
    reply = client.chat.completions.create(
        model=model, messages=messages, response_format={"type": "json_object"}, max_tokens=200, temperature=0
    )
    assert isinstance(json.loads(reply.choices[0].message.content or ""), dict)


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_forced_tool_call(client: openai.OpenAI, model: str, choice: Any) -> None:
    """Every model gives a valid one; its result goes back in the library's own message."""
    settings: Any = {"model": model, "tools": weather.OPENAI, "temperature": 0, "max_tokens": 200}
    reply = client.chat.completions.create(messages=ASK_WEATHER, tool_choice=choice, **settings)
    message = reply.choices[0].message
    assert reply.choices[0].finish_reason in ("tool_calls", "stop")
    assert message.tool_calls and not message.content
    call: Any = message.tool_calls[0]
    assert call.id and call.type == "function" and call.function.name == weather.NAME
    assert json.loads(call.function.arguments) == {"city": "Boston"}
    results = [{"role": "tool", "tool_call_id": one.id, "content": weather.RESULT} for one in message.tool_calls]
    answer = client.chat.completions.create(
        messages=[*ASK_WEATHER, message, *results], tool_choice="none", **{**settings, "max_tokens": 8}
    )
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


def test_a_streamed_tool_call(client: openai.OpenAI, model: str) -> None:
    """The index begins at 0, id and name come once, the arguments are pieces of JSON; the helper agrees."""
    settings: Any = {"model": model, "tools": weather.OPENAI, "tool_choice": NAMED, "messages": ASK_WEATHER}
    settings |= {"temperature": 0, "parallel_tool_calls": False}
    chunks = list(client.chat.completions.create(stream=True, **settings))
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or []]
    assert {call.index for call in calls} == {0}
    assert [bool(call.id) for call in calls] == [True] + [False] * (len(calls) - 1)
    assert [call.function.name for call in calls if call.function and call.function.name] == [weather.NAME]
    arguments = "".join(call.function.arguments or "" for call in calls if call.function)
    assert json.loads(arguments) == {"city": "Boston"}
    with client.chat.completions.stream(**settings) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls and json.loads(message.tool_calls[0].function.arguments) == {"city": "Boston"}


def test_no_tool_call(client: openai.OpenAI, model: str) -> None:
    """`none` is heeded."""
    reply = client.chat.completions.create(
        model=model, messages=QUESTION, tools=weather.OPENAI, tool_choice="none", max_tokens=8
    )
    assert reply.choices[0].message.content and not reply.choices[0].message.tool_calls


def test_several_answers(client: openai.OpenAI, model: str) -> None:
    """`n` of them, numbered, whole and streamed."""
    settings: Any = {"model": model, "messages": QUESTION, "n": 2, "max_tokens": 4}
    assert [choice.index for choice in client.chat.completions.create(**settings).choices] == [0, 1]
    chunks = client.chat.completions.create(stream=True, **settings)
    reasons = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(reasons) == [0, 1]


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    """As many as tokens, with alternatives; absent when nobody asked."""
    settings: Any = {"model": model, "messages": QUESTION, "max_tokens": 4, "temperature": 0}
    assert client.chat.completions.create(**settings).choices[0].logprobs is None
    settings |= {"logprobs": True, "top_logprobs": 2}
    found = client.chat.completions.create(**settings).choices[0].logprobs
    assert found and found.content
    for token in found.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 2
        assert bytes(token.bytes or []).decode(errors="replace") == token.token
    chunks = client.chat.completions.create(stream=True, **settings)
    streamed = [
        token.token
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content or []
    ]
    assert streamed == [token.token for token in found.content]


def test_options_of_other_protocols_in_the_extra_body(client: openai.OpenAI, model: str) -> None:
    """What this server has beyond the protocol."""
    extra = {"options": {"top_k": 1}, "num_ctx": 512, "keep_alive": "10m", "think": False}
    reply = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=4, extra_body=extra)
    assert reply.choices[0].message.content


def test_seed_stop_and_penalties(client: openai.OpenAI, model: str) -> None:
    """The same seed, the same text; a stop string is not shown; no option is refused."""
    settings: Any = {"model": model, "messages": QUESTION, "max_tokens": 16, "seed": 7, "temperature": 0}
    settings |= {"presence_penalty": 0.1, "frequency_penalty": 0.1, "top_p": 0.9, "user": "ada", "logit_bias": {"5": 1}}
    client.chat.completions.create(**settings)
    texts = [client.chat.completions.create(**settings).choices[0].message.content or "" for _ in range(2)]
    assert texts[0] == texts[1]
    stop = texts[0][2:5]
    cut = client.chat.completions.create(stop=[stop], **settings).choices[0]
    assert (cut.message.content, cut.finish_reason) == (texts[0][: texts[0].index(stop)], "stop")


# -- completions, embeddings, models ---------------------------------------------------------


def test_completions(client: openai.OpenAI, model: str) -> None:
    """One prompt, several, token ids, the prompt echoed, streamed."""
    settings: Any = {"model": model, "max_tokens": 4, "temperature": 0}
    one = client.completions.create(prompt="The capital of France is", **settings)
    assert one.object == "text_completion" and one.choices[0].text
    two = client.completions.create(prompt=["One, two,", "A, B,"], **settings)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert client.completions.create(prompt=[504, 3575, 282, 4649, 314], **settings).choices[0].text
    echoed = client.completions.create(prompt="Hello", echo=True, **settings)
    assert echoed.choices[0].text.startswith("Hello")
    chunks = list(client.completions.create(prompt="One, two,", stream=True, **settings))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == two.choices[0].text
    scored = client.completions.create(prompt="Hello", logprobs=1, **settings).choices[0].logprobs
    assert scored and scored.tokens and len(scored.tokens) == len(scored.token_logprobs or [])


def test_embeddings(client: openai.OpenAI, embed_model: str) -> None:
    """The library asks for base64 by default; numbers give the same."""
    packed = client.embeddings.create(model=embed_model, input=["x", "y"])
    plain = client.embeddings.create(model=embed_model, input=["x", "y"], encoding_format="float")
    assert [item.index for item in packed.data] == [0, 1]
    for left, right in zip(packed.data, plain.data, strict=True):
        assert left.embedding == pytest.approx(right.embedding, abs=1e-5)
    assert packed.usage.prompt_tokens > 0
    assert len(client.embeddings.create(model=embed_model, input="x", dimensions=8).data[0].embedding) == 8
    assert client.embeddings.create(model=embed_model, input=[[101, 1060, 102]]).data[0].embedding


def test_models(client: openai.OpenAI, model: str) -> None:
    """The list, and one of them."""
    assert any(one.id.startswith(model) for one in client.models.list())
    assert client.models.retrieve(model).id == model


# -- responses ---------------------------------------------------------------------------------


def test_responses(client: openai.OpenAI, model: str) -> None:
    """Text in, text out; items as input; instructions."""
    reply = client.responses.create(model=model, input="What is the capital of France?", max_output_tokens=32)
    assert reply.output_text and reply.status in ("completed", "incomplete")
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    assert client.responses.create(model=model, input=items, instructions="Be short.", max_output_tokens=8).output_text


def test_responses_as_a_stream(client: openai.OpenAI, model: str) -> None:
    """Numbered events; the deltas are the text; the helper agrees."""
    events = list(client.responses.create(model=model, input="Say hello.", stream=True, max_output_tokens=16))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last: Any = events[-1]
    assert last.type in ("response.completed", "response.incomplete") and last.response.output_text == text
    with client.responses.stream(model=model, input="Say hello.") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text


def test_responses_with_a_tool(client: openai.OpenAI, model: str) -> None:
    """A forced call, then its result."""
    settings: Any = {"model": model, "tools": weather.RESPONSES, "temperature": 0}
    named = {"type": "function", "name": weather.NAME}
    reply = client.responses.create(input=weather.QUESTION, tool_choice=named, **settings)
    (call,) = [item for item in reply.output if item.type == "function_call"]
    assert call.name == weather.NAME and json.loads(call.arguments) == {"city": "Boston"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": weather.RESULT}
    items = [{"role": "user", "content": weather.QUESTION}, call, result]
    assert client.responses.create(input=items, tool_choice="none", max_output_tokens=16, **settings).output_text


def test_responses_parse(client: openai.OpenAI, model: str) -> None:
    """A pydantic model."""
    reply = client.responses.parse(model=model, input="Which city is the capital of France?", text_format=City)
    assert isinstance(reply.output_parsed, City)


# -- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda c, m: c.chat.completions.create(model="never-installed", messages=QUESTION), openai.NotFoundError),
        (lambda c, m: c.completions.create(model="never-installed", prompt="x"), openai.NotFoundError),
        (lambda c, m: c.embeddings.create(model="never-installed", input="x"), openai.NotFoundError),
        (lambda c, m: c.responses.create(model="never-installed", input="x"), openai.NotFoundError),
        (lambda c, m: c.models.retrieve("never-installed"), openai.NotFoundError),
        (lambda c, m: c.chat.completions.create(model=m, messages=[]), openai.BadRequestError),
        (lambda c, m: c.chat.completions.create(model=m, messages=QUESTION, temperature=-5), openai.BadRequestError),
        (lambda c, m: c.chat.completions.create(model=m, messages=QUESTION, top_logprobs=21), openai.BadRequestError),
        (lambda c, m: c.responses.create(model=m, input="x", previous_response_id="resp_1"), openai.APIStatusError),
    ],
    ids=["chat", "completions", "embeddings", "responses", "models", "empty", "range", "logprobs", "previous"],
)
def test_errors(
    client: openai.OpenAI, model: str, call: Callable[[openai.OpenAI, str], Any], error: type[openai.APIStatusError]
) -> None:
    """The library's own classes, and a message."""
    with pytest.raises(error) as caught:
        call(client, model)
    assert 400 <= caught.value.status_code < 500
    assert isinstance(caught.value.body, dict) and caught.value.body["message"]


def test_codes_that_frameworks_test(client: openai.OpenAI, model: str) -> None:
    """They look at the code, not at the words."""
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="never-installed", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    long: list[Any] = [{"role": "user", "content": "word " * 50000}]
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model=model, messages=long)
    assert too_long.value.code == "context_length_exceeded"


# -- the same, asynchronously ------------------------------------------------------------------------


async def test_async_chat(aclient: openai.AsyncOpenAI, model: str) -> None:
    """Whole, streamed, with the helper, and several at a time."""
    settings: Any = {"model": model, "messages": QUESTION, "temperature": 0}
    assert (await aclient.chat.completions.create(**settings)).choices[0].message.content
    chunks = [chunk async for chunk in await aclient.chat.completions.create(stream=True, **settings)]
    assert chunks[-1].choices[0].finish_reason
    async with aclient.chat.completions.stream(**settings) as stream:
        assert (await stream.get_final_completion()).choices
    replies = await asyncio.gather(*(aclient.chat.completions.create(**settings) for _ in range(4)))
    assert len({reply.id for reply in replies}) == 4


async def test_async_rest(aclient: openai.AsyncOpenAI, model: str, embed_model: str) -> None:
    """Completions, embeddings, models, responses, errors."""
    assert (await aclient.completions.create(model=model, prompt="x", max_tokens=2)).choices
    assert (await aclient.embeddings.create(model=embed_model, input="x")).data[0].embedding
    assert [one.id async for one in aclient.models.list()]
    events = [event async for event in await aclient.responses.create(model=model, input="Hi", stream=True)]
    assert events[-1].type == "response.completed"
    with pytest.raises(openai.NotFoundError):
        await aclient.models.retrieve("never-installed")


async def test_a_stream_that_is_closed_makes_room(aclient: openai.AsyncOpenAI, model: str) -> None:
    """More clients leave than the server has places."""
    messages: list[Any] = [{"role": "user", "content": "Count to a thousand."}]
    for _ in range(10):
        stream = await aclient.chat.completions.create(model=model, messages=messages, stream=True)
        await anext(aiter(stream))
        await stream.close()
    assert (await aclient.chat.completions.create(model=model, messages=QUESTION, max_tokens=2)).choices
