"""litellm, which reaches the server by four of its routes."""

import json
from typing import Any

import litellm
import pytest
import weather

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ROUTES = ("ollama_chat", "ollama", "openai", "anthropic")


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, base_url: str, model: str) -> dict[str, Any]:
    """The model as litellm addresses it, and where."""
    name: str = request.param
    address = f"{base_url}/v1" if name == "openai" else base_url
    return {"model": f"{name}/{model}", "api_base": address, "api_key": "any", "num_retries": 0}


@pytest.fixture
def openai_route(base_url: str, model: str) -> dict[str, Any]:
    """OpenAI's route."""
    return {"model": f"openai/{model}", "api_base": f"{base_url}/v1", "api_key": "any", "num_retries": 0}


def test_completion(route: dict[str, Any]) -> None:
    """A whole reply with its usage."""
    reply = litellm.completion(messages=QUESTION, max_tokens=8, temperature=0, **route)
    assert reply.choices[0].message.content
    assert reply.usage.completion_tokens > 0


def test_stream(route: dict[str, Any]) -> None:
    """Pieces, and a reason at the end."""
    chunks = list(litellm.completion(messages=QUESTION, max_tokens=8, temperature=0, stream=True, **route))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


async def test_async_stream(route: dict[str, Any]) -> None:
    """The same, asynchronously."""
    stream = await litellm.acompletion(messages=QUESTION, max_tokens=8, stream=True, **route)
    assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def test_missing_model(route: dict[str, Any]) -> None:
    """An error of litellm's with the status, or its general one on the older routes."""
    name = route["model"].partition("/")[0]
    with pytest.raises((litellm.NotFoundError, litellm.APIConnectionError, litellm.APIError)) as caught:
        litellm.completion(messages=QUESTION, **{**route, "model": f"{name}/never-installed"})
    assert "not found" in str(caught.value)


def test_tools(openai_route: dict[str, Any]) -> None:
    """A forced call."""
    named = {"type": "function", "function": {"name": weather.NAME}}
    reply = litellm.completion(
        messages=[{"role": "user", "content": weather.QUESTION}],
        tools=weather.OPENAI,
        tool_choice=named,
        **openai_route,
    )
    (call,) = reply.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Boston"}


def test_schema(route: dict[str, Any]) -> None:
    """A JSON schema, on the routes that have such a field."""
    if route["model"].startswith("anthropic"):
        pytest.skip("litellm makes a tool of the schema for this protocol, and names models that it does so for")
    schema = {"name": "city", "schema": weather.PARAMETERS, "strict": True}
    reply = litellm.completion(
        messages=QUESTION, response_format={"type": "json_schema", "json_schema": schema}, **route
    )
    assert json.loads(reply.choices[0].message.content) == {"city": "Boston"}


@pytest.mark.parametrize("name", ["ollama", "openai"])
def test_embedding(base_url: str, embed_model: str, name: str) -> None:
    """Vectors, with their count of tokens."""
    address = f"{base_url}/v1" if name == "openai" else base_url
    reply = litellm.embedding(model=f"{name}/{embed_model}", input=["x", "y"], api_base=address, api_key="any")
    assert len(reply.data) == 2
    assert reply.data[0]["embedding"]
