"""The protocols as any client sees them: 47 cases over plain HTTP, against any server.

With BASE_URL (and MODEL, EMBED_MODEL; THINKING_MODEL and TOOL_MODEL where there are such) they ask that server:
`BASE_URL=http://127.0.0.1:8005 pytest tests/test_blackbox.py`. Without it they start servers of their own: one with
real engines and, for faults, one with the engine of tests/fakeserver.py.
"""

import base64
import hashlib
import json
import math
import os
import re
import struct
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import Json, Server, wait_until
from hubstub import HubStub

BASE_URL = os.environ.get("BASE_URL", "")
MODEL = os.environ.get("MODEL", "smollm2:135m")
EMBED_MODEL = os.environ.get("EMBED_MODEL", "all-minilm")
THINKING_MODEL = os.environ.get("THINKING_MODEL", MODEL if BASE_URL else "test/tools")
TOOL_MODEL = os.environ.get("TOOL_MODEL", MODEL if BASE_URL else "test/tools")
MISSING = "never-installed"
COPY = "copy-of-a-test"
GREEDY: Json = {"temperature": 0, "seed": 1}
QUESTION = "What is the capital of France?"
ASKED: list[Json] = [{"role": "user", "content": QUESTION}]
JSON_TYPE = "application/json; charset=utf-8"
COUNTERS = (
    "total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration",
)  # fmt: skip
SCHEMA: Json = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "large": {"type": "boolean"}},
    "required": ["city", "large"],
    "additionalProperties": False,
}
WEATHER: Json = {
    "name": "get_weather",
    "description": "The weather at a place",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "enum": ["Boston", "Paris"]}},
        "required": ["location"],
        "additionalProperties": False,
    },
}
TIME: Json = {
    "name": "get_time",
    "description": "The time in a zone",
    "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
}
FUNCTIONS = (WEATHER, TIME)
TOOLS: list[Json] = [{"type": "function", "function": function} for function in FUNCTIONS]
SPEED: Json = {"stream": False, "options": {"num_predict": 8, **GREEDY}}
Event = tuple[str, Any]


class Site:
    """A server and the few requests that most cases make of it."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def post(self, path: str, body: Json, **more: Any) -> httpx.Response:
        """POST a JSON body."""
        return self.client.post(path, json=body, **more)

    def ok(self, path: str, body: Json) -> Json:
        """The reply to a POST that must succeed."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        reply: Json = response.json()
        return reply

    def refused(self, path: str, body: Json, status: int = 400) -> str:
        """The text of an error in Ollama's form."""
        response = self.post(path, body)
        assert response.status_code == status, response.text
        reply = response.json()
        assert set(reply) == {"error"}, reply
        text: str = reply["error"]
        assert isinstance(text, str)
        return text

    def lines(self, path: str, body: Json) -> list[Json]:
        """The lines of a stream that must begin well."""
        with self.client.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("application/x-ndjson")
            text = "".join(response.iter_text())
        assert text.endswith("\n")
        return [json.loads(line) for line in text.removesuffix("\n").split("\n")]

    def events(self, path: str, body: Json) -> list[Event]:
        """The events of a stream of server-sent events: name and data, which is JSON but for `[DONE]`."""
        with self.client.stream("POST", path, json={"stream": True, **body}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            text = "".join(response.iter_text())
        return list(_events(text))

    def text(self, **options: Any) -> str:
        """What the model says to the usual question."""
        settings = {"num_predict": 24, **GREEDY, **options}
        reply = self.ok("/api/chat", {"model": MODEL, "messages": ASKED, "stream": False, "options": settings})
        text: str = reply["message"]["content"]
        return text

    def running(self) -> dict[str, Json]:
        """What /api/ps lists, by name."""
        return {model["name"]: model for model in self.client.get("/api/ps").json()["models"]}

    def installed(self) -> dict[str, Json]:
        """What /api/tags lists, by name."""
        return {model["name"]: model for model in self.client.get("/api/tags").json()["models"]}

    def capabilities(self, model: str) -> list[str]:
        """What /api/show says that a model can do."""
        found: list[str] = self.ok("/api/show", {"model": model}).get("capabilities", [])
        return found

    def needs(self, model: str, capability: str) -> None:
        """Skip the test when a model lacks a capability."""
        if capability not in self.capabilities(model):
            pytest.skip(f"{model} has no capability {capability!r}")

    def lacks(self, model: str, capability: str) -> None:
        """Skip the test when a model has a capability."""
        if capability in self.capabilities(model):
            pytest.skip(f"{model} has the capability {capability!r}")

    def have(self, model: str) -> None:
        """Make sure that a model is installed."""
        if self.post("/api/show", {"model": model}).status_code != 200:
            assert self.ok("/api/pull", {"model": model, "stream": False}) == {"status": "success"}


def _events(text: str) -> Iterator[Event]:
    assert text.endswith("\n\n")
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if "data" in fields:
            data = fields["data"]
            yield fields.get("event", ""), data if data == "[DONE]" else json.loads(data)


def tagged(name: str) -> str:
    """A model's name as lists have it."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def norm(vector: list[float]) -> float:
    """The length of a vector."""
    return math.sqrt(sum(value * value for value in vector))


def moment(text: str) -> datetime:
    """A time of the protocol, which must name its zone."""
    found = datetime.fromisoformat(text)
    assert found.tzinfo is not None, text
    return found


@pytest.fixture(scope="session")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """The server under test, with both models installed."""
    if BASE_URL:
        with httpx.Client(base_url=BASE_URL, timeout=300, trust_env=False) as client:
            yield prepared(Site(client))
    else:
        yield prepared(Site(request.getfixturevalue("server").client))


def prepared(site: Site) -> Site:
    """A site with its models."""
    for model in dict.fromkeys((MODEL, EMBED_MODEL, THINKING_MODEL, TOOL_MODEL)):
        site.have(model)
    return site


@pytest.fixture
def faulty(request: pytest.FixtureRequest) -> Server:
    """A server whose engines fail as told; nobody can tell a foreign one to."""
    if BASE_URL:
        pytest.skip("needs an engine that fails on command")
    server: Server = request.getfixturevalue("fake_server")
    server.have("fake/a")
    return server


# -- 1 to 5: is somebody there ------------------------------------------------


def test_01_the_root_says_that_it_runs(site: Site) -> None:
    """Command line clients look for this text; HEAD is their heartbeat."""
    reply = site.client.get("/")
    assert (reply.status_code, reply.text) == (200, "Ollama is running")
    assert reply.headers["content-type"].startswith("text/plain")
    head = site.client.head("/")
    assert (head.status_code, head.content) == (200, b"")


def test_02_the_version_is_three_numbers(site: Site) -> None:
    """Clients split it at the points and make integers."""
    reply = site.client.get("/api/version")
    assert reply.status_code == 200
    assert reply.headers["content-type"] == JSON_TYPE
    assert re.fullmatch(r"\d+\.\d+\.\d+", reply.json()["version"])
    head = site.client.head("/api/version")
    assert (head.status_code, head.content) == (200, b"")


def test_03_wrong_verbs_and_unknown_paths(site: Site) -> None:
    """405 and 404, for whatever verb."""
    for path in ("/api/show", "/api/chat", "/api/generate", "/api/pull"):
        assert site.client.get(path).status_code == 405, path
    assert site.client.post("/api/tags").status_code == 405
    nowhere = site.client.get("/nope")
    assert nowhere.status_code == 404
    assert "not found" in nowhere.text.lower()


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate", "/api/embed", "/api/show", "/api/pull"])
def test_04_no_body_and_broken_bodies(site: Site, path: str) -> None:
    """400 and a text, never a list of validation errors."""
    nothing = site.client.post(path)
    assert (nothing.status_code, nothing.json()) == (400, {"error": "missing request body"})
    for body in ("{", "nonsense", '{"model": ', "[]", '"text"'):
        broken = site.client.post(path, content=body)
        assert broken.status_code == 400, body
        assert isinstance(broken.json()["error"], str)


def test_05_no_model(site: Site) -> None:
    """The wording differs from route to route."""
    assert site.refused("/api/chat", {}) == "model is required"
    assert site.refused("/api/generate", {}, 404) == "model '' not found"


# -- 6 to 9: names ------------------------------------------------------------


def test_06_a_model_that_is_not_installed(site: Site) -> None:
    """The command line pulls on this 404."""
    for path in ("/api/generate", "/api/chat"):
        body = {"model": MISSING, "prompt": "x", "messages": ASKED} if "chat" in path else {"model": MISSING}
        assert site.refused(path, body, 404) == f"model '{MISSING}' not found"


@pytest.mark.parametrize(("path", "field"), [("/api/embed", "input"), ("/api/embeddings", "prompt")])
def test_07_an_embedding_model_that_is_not_installed(site: Site, path: str, field: str) -> None:
    """Another wording, with advice."""
    text = site.refused(path, {"model": MISSING, field: "x"}, 404)
    assert text == f'model "{MISSING}" not found, try pulling it first'


def test_08_show_finds_by_either_field(site: Site) -> None:
    """`model`, or `name` as older clients have it; the error names the tag."""
    assert site.refused("/api/show", {"model": MISSING}, 404) == f"model '{MISSING}:latest' not found"
    assert site.refused("/api/show", {}) == "model is required"
    assert site.ok("/api/show", {"name": MODEL}) == site.ok("/api/show", {"model": MODEL})


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat", "/api/show", "/api/embed", "/api/pull"])
@pytest.mark.parametrize("name", ["a b", "a//b", "-a", "a:b:c"])
def test_09_names_that_fit_no_grammar(site: Site, path: str, name: str) -> None:
    """One wording on every route."""
    body = {"model": name, "prompt": "x", "messages": ASKED, "input": "x"}
    keep = {"/api/generate": "prompt", "/api/chat": "messages", "/api/embed": "input"}.get(path)
    asked = {key: value for key, value in body.items() if key in ("model", keep)}
    assert site.refused(path, asked) == "invalid model name"


# -- 10 to 18: chat and generate ----------------------------------------------


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", None])
def test_10_the_content_type_does_not_matter(site: Site, content_type: str | None) -> None:
    """`curl -d` sends a form's type."""
    body = json.dumps({"model": MODEL, "prompt": "Hi", **SPEED})
    headers = {"Content-Type": content_type} if content_type else {}
    assert site.client.post("/api/generate", content=body, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_11_a_stream_is_the_default(site: Site, path: str) -> None:
    """Every line is an object of this model; counters and reason stand on the one last line only."""
    asked: Json = {"messages": ASKED} if path == "/api/chat" else {"prompt": QUESTION}
    lines = site.lines(path, {"model": MODEL, "options": {"num_predict": 8, **GREEDY}, **asked})
    assert len(lines) > 2
    for line in lines:
        assert line["model"] == MODEL
        moment(line["created_at"])
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    for line in lines[:-1]:
        assert not set(line) & {*COUNTERS, "done_reason", "context"}
    assert lines[-1]["done_reason"] in ("stop", "length")
    assert all(type(lines[-1][name]) is int and lines[-1][name] > 0 for name in COUNTERS)
    if path == "/api/chat":
        assert all(line["message"]["role"] == "assistant" for line in lines)
        assert lines[-1]["message"]["content"] == ""
    else:
        assert lines[-1]["response"] == ""
        assert lines[-1]["context"] and all(type(token) is int for token in lines[-1]["context"])


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_12_a_whole_reply_is_the_stream_in_one_piece(site: Site, path: str) -> None:
    """One object with the joined text and the same counts."""
    asked: Json = {"messages": ASKED} if path == "/api/chat" else {"prompt": QUESTION}
    body = {"model": MODEL, "options": {"num_predict": 8, **GREEDY}, **asked}
    site.post(path, {**body, "stream": False})  # both runs below begin with the same prompt cache
    reply = site.post(path, {**body, "stream": False})
    assert reply.headers["content-type"] == JSON_TYPE
    whole, lines = reply.json(), site.lines(path, body)

    def text(line: Json) -> str:
        said: str = line["message"]["content"] if path == "/api/chat" else line["response"]
        return said

    assert text(whole) == "".join(map(text, lines)) != ""
    assert whole["done"] is True
    for name in ("done_reason", "eval_count", "prompt_eval_count"):
        assert whole[name] == lines[-1][name], name


def test_12b_the_context_of_one_reply_continues_in_the_next(site: Site) -> None:
    """The older way to hold a conversation: numbers go out and come back in front of the next prompt."""
    first = site.ok("/api/generate", {"model": MODEL, "prompt": "My name is Ada.", **SPEED})
    second = site.ok("/api/generate", {"model": MODEL, "prompt": "Who?", "context": first["context"], **SPEED})
    alone = site.ok("/api/generate", {"model": MODEL, "prompt": "Who?", **SPEED})
    assert len(second["context"]) > len(alone["context"])
    assert second["prompt_eval_count"] > alone["prompt_eval_count"]


def test_13_an_empty_prompt_loads(site: Site) -> None:
    """One JSON object although streams are the default; no counters."""
    reply = site.post("/api/generate", {"model": MODEL})
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("application/json")
    loaded = reply.json()
    assert (loaded["model"], loaded["response"], loaded["done"], loaded["done_reason"]) == (MODEL, "", True, "load")
    moment(loaded["created_at"])
    entry = site.running()[tagged(MODEL)]
    assert entry["model"] == entry["name"]
    assert entry["digest"] == site.installed()[tagged(MODEL)]["digest"]
    assert entry["size"] > 0 and entry["size_vram"] >= 0 and entry["context_length"] > 0
    moment(entry["expires_at"])


def test_14_an_empty_prompt_with_no_time_to_stay_unloads(site: Site) -> None:
    """Also when it is not loaded any more."""
    site.ok("/api/generate", {"model": MODEL})
    for _ in range(2):
        reply = site.post("/api/generate", {"model": MODEL, "keep_alive": 0})
        assert reply.headers["content-type"].startswith("application/json")
        assert (reply.json()["done"], reply.json()["done_reason"]) == (True, "unload")
        wait_until(lambda: tagged(MODEL) not in site.running())


def test_15_a_chat_without_messages_loads_and_unloads(site: Site) -> None:
    """The same with chat's shape."""
    for fields, reason in (({}, "load"), ({"messages": []}, "load"), ({"messages": [], "keep_alive": 0}, "unload")):
        reply = site.ok("/api/chat", {"model": MODEL, **fields})
        assert reply["message"] == {"role": "assistant", "content": ""}
        assert (reply["done"], reply["done_reason"]) == (True, reason)
    wait_until(lambda: tagged(MODEL) not in site.running())


def test_16_how_long_a_model_stays(site: Site) -> None:
    """Numbers, durations, for ever; anything else is named."""

    def stays(keep_alive: Any) -> timedelta:
        site.ok("/api/generate", {"model": MODEL, "keep_alive": keep_alive})
        return moment(site.running()[tagged(MODEL)]["expires_at"]) - datetime.now(UTC)

    for forever in (-1, "-1m"):
        assert stays(forever) > timedelta(days=36500)
    for ten_minutes in ("10m", 600, 600.5, "0h10m0s"):
        assert timedelta(minutes=8) < stays(ten_minutes) < timedelta(minutes=12), ten_minutes
    assert timedelta(seconds=1) < stays(None) < timedelta(days=1)
    site.refused("/api/generate", {"model": MODEL, "keep_alive": "banana"})
    assert site.refused("/api/generate", {"model": MODEL, "keep_alive": True}) == "Unsupported type: 'bool'"


def test_17_the_longest_answer(site: Site) -> None:
    """`num_predict` ends with `length`."""
    messages = [{"role": "user", "content": "Count from one to one hundred."}]
    reply = site.ok("/api/chat", {"model": MODEL, "messages": messages, "stream": False, "options": {"num_predict": 5}})
    assert (reply["done_reason"], reply["eval_count"]) == ("length", 5)


def test_18_a_seed_repeats(site: Site) -> None:
    """The same seed, the same text, cold and hot."""
    for temperature in (0, 1.2):
        site.text(temperature=temperature)  # both runs below begin with the same prompt cache
        assert site.text(seed=7, temperature=temperature) == site.text(seed=7, temperature=temperature)


# -- 19 to 25: options ----------------------------------------------------------


def test_19_a_stop_string_is_not_shown(site: Site) -> None:
    """Neither whole nor streamed, not even its beginning."""
    text = site.text()
    stop = text[3:7]
    expected = text[: text.index(stop)]
    assert site.text(stop=[stop]) == expected
    options = {"num_predict": 24, **GREEDY, "stop": [stop]}
    lines = site.lines("/api/chat", {"model": MODEL, "messages": ASKED, "options": options})
    assert "".join(line["message"]["content"] for line in lines) == expected
    assert lines[-1]["done_reason"] == "stop"


def test_19b_unknown_options_are_ignored_and_wrong_ones_named(site: Site) -> None:
    """A wrong type is the client's fault."""
    body: Json = {"model": MODEL, "prompt": "Hi", "stream": False}
    assert site.ok("/api/generate", {**body, "options": {"nope": 1, "num_predict": 2}})["done"] is True
    assert "temperature" in site.refused("/api/generate", {**body, "options": {"temperature": "hot"}})
    assert "stop" in site.refused("/api/generate", {**body, "options": {"stop": 5}})


def test_19c_null_counts_as_absent(site: Site) -> None:
    """Everywhere, as with Go's decoder; field names match in any case."""
    nothing = dict.fromkeys(("options", "format", "keep_alive", "system", "template", "images", "think", "tools"))
    assert site.ok("/api/generate", {**nothing, "model": MODEL, "prompt": "Hi", **SPEED})["response"]
    nothing = dict.fromkeys(("options", "format", "keep_alive", "think", "tools"))
    assert site.ok("/api/chat", {**nothing, "model": MODEL, "messages": ASKED, **SPEED})["message"]["content"]
    assert site.ok("/api/chat", {"MODEL": MODEL, "Messages": ASKED, **SPEED})["message"]["content"]


def test_20_the_form_of_the_answer(site: Site) -> None:
    """JSON, a schema, no wish, nonsense."""
    question = "Give me an object with the key city and the name of the capital of France."

    def asked(form: Any, path: str = "/api/chat") -> str:
        body: Json = {"model": MODEL, "stream": False, "format": form, "options": {"num_predict": 200, **GREEDY}}
        if path == "/api/generate":
            return str(site.ok(path, {**body, "prompt": question})["response"])
        return str(site.ok(path, {**body, "messages": [{"role": "user", "content": question}]})["message"]["content"])

    for path in ("/api/chat", "/api/generate"):
        assert isinstance(json.loads(asked("json", path)), dict)
        found = json.loads(asked(SCHEMA, path))
        assert set(found) == {"city", "large"}
        assert found["city"] in ("Paris", "Rome") and isinstance(found["large"], bool)
    assert asked("") == asked(None) != ""
    for wrong in ("xml", 5, [1]):
        text = site.refused("/api/chat", {"model": MODEL, "messages": ASKED, "stream": False, "format": wrong})
        assert "format" in text


def test_21_thinking_on_a_model_that_cannot(site: Site) -> None:
    """`true` is an error, `false` never; nonsense is named for every model."""
    body: Json = {"model": MODEL, "messages": ASKED, **SPEED}
    text = site.refused("/api/chat", {**body, "think": "huge"})
    assert text == 'invalid think value: "huge" (must be "high", "medium", "low", "max", true, or false)'
    assert site.ok("/api/chat", {**body, "think": False})["message"]["content"]
    site.lacks(MODEL, "thinking")
    for think in (True, "high"):
        assert site.refused("/api/chat", {**body, "think": think}) == f'"{MODEL}" does not support thinking'
    generate = {"model": MODEL, "prompt": QUESTION, "think": True, "stream": False}
    assert site.refused("/api/generate", generate) == f'"{MODEL}" does not support thinking'


def test_22_a_thinking_model_thinks_beside_its_answer(site: Site) -> None:
    """Thoughts and answer are apart, no tags in either; without `think` it thinks, with false it does not."""
    site.needs(THINKING_MODEL, "thinking")
    options = {"num_predict": 2000, **GREEDY}
    messages = [{"role": "user", "content": "What is 17 + 5?"}]
    body: Json = {"model": THINKING_MODEL, "messages": messages, "options": options}
    for think in ({"think": True}, {}):
        message = site.ok("/api/chat", {**body, **think, "stream": False})["message"]
        assert message["thinking"] and message["content"]
        assert not re.search("</?think", message["thinking"] + message["content"])
        lines = site.lines("/api/chat", {**body, **think})
        for field in ("thinking", "content"):
            assert "".join(line["message"].get(field, "") for line in lines) == message[field]
    silent = site.ok("/api/chat", {**body, "think": False, "stream": False})["message"]
    assert "thinking" not in silent
    assert silent["content"]
    generated = site.ok("/api/generate", {"model": THINKING_MODEL, "prompt": "Hi", "stream": False, "options": options})
    assert generated["thinking"]


@pytest.mark.parametrize("path", ["/api/generate", "/api/chat"])
def test_23_log_probabilities(site: Site, path: str) -> None:
    """One entry a token: not above 0, with its bytes, its alternatives sorted and as many as asked for."""
    asked: Json = {"messages": ASKED} if path == "/api/chat" else {"prompt": QUESTION}
    body: Json = {"model": MODEL, "stream": False, "options": {"num_predict": 6, **GREEDY}, **asked}
    for number in (21, -1):
        text = site.refused(path, {**body, "logprobs": True, "top_logprobs": number})
        assert text == "top_logprobs must be between 0 and 20"
    assert "logprobs" not in site.ok(path, body)
    bare = site.ok(path, {**body, "logprobs": True})
    assert all("top_logprobs" not in token for token in bare["logprobs"])
    body |= {"logprobs": True, "top_logprobs": 3}
    whole = site.ok(path, body)
    streamed = [token for line in site.lines(path, {**body, "stream": True}) for token in line.get("logprobs", [])]
    assert len(whole["logprobs"]) in (whole["eval_count"], whole["eval_count"] - 1)  # the end of the text has no text
    assert [token["token"] for token in streamed] == [token["token"] for token in whole["logprobs"]]
    for token in whole["logprobs"]:
        assert len(token["top_logprobs"]) == 3
        ranks = [each["logprob"] for each in token["top_logprobs"]]
        assert ranks == sorted(ranks, reverse=True)
        for each in (token, *token["top_logprobs"]):
            assert each["logprob"] <= 0
            assert bytes(each["bytes"]).decode(errors="replace") == each["token"]


def test_24_a_raw_prompt_takes_no_template(site: Site) -> None:
    """Nor anything that only a template could place; its reply has no context."""
    body: Json = {"model": MODEL, "prompt": "The capital of France is", "raw": True, **SPEED}
    for field, value in (("system", "x"), ("template", "{{ .Prompt }}"), ("context", [1, 2])):
        text = site.refused("/api/generate", {**body, field: value})
        assert text == "raw mode does not support template, system, or context"
    raw = site.ok("/api/generate", body)
    assert raw["response"]
    assert "context" not in raw
    dressed = site.ok("/api/generate", {**body, "raw": False})
    assert raw["prompt_eval_count"] < dressed["prompt_eval_count"]


def test_25_a_suffix_on_a_model_that_cannot_fill_in(site: Site) -> None:
    """Said before anything is loaded."""
    site.lacks(MODEL, "insert")
    text = site.refused("/api/generate", {"model": MODEL, "prompt": "def f(", "suffix": "return 1"})
    assert text.endswith("does not support insert")


def test_25b_tools_on_a_model_that_knows_none(site: Site) -> None:
    """The same for tools."""
    site.lacks(MODEL, "tools")
    text = site.refused("/api/chat", {"model": MODEL, "messages": ASKED, "tools": TOOLS})
    assert text.endswith("does not support tools")


def test_25c_images_are_refused_where_they_are_not_seen(site: Site) -> None:
    """Bad base64 has its own words; data URIs are taken like bare base64."""
    site.lacks(MODEL, "vision")
    picture = base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
    for images in ([picture], [f"data:image/png;base64,{picture}"]):
        message = {"role": "user", "content": "What is this?", "images": images}
        assert "image" in site.refused("/api/chat", {"model": MODEL, "messages": [message]})
        assert "image" in site.refused("/api/generate", {"model": MODEL, "prompt": "What?", "images": images})
    message = {"role": "user", "content": "What is this?", "images": ["!"]}
    site.refused("/api/chat", {"model": MODEL, "messages": [message]})


# -- 26 to 31: capabilities, tools, embeddings ----------------------------------


def test_26_an_embedding_model_does_not_talk(site: Site) -> None:
    """Named as the client named it."""
    text = site.refused("/api/chat", {"model": EMBED_MODEL, "messages": ASKED})
    assert text == f'"{EMBED_MODEL}" does not support chat'
    text = site.refused("/api/generate", {"model": EMBED_MODEL, "prompt": "Hi"})
    assert text == f'"{EMBED_MODEL}" does not support generate'


def test_27_a_tool_is_called_and_its_result_answered(site: Site) -> None:
    """Whole and streamed: an object for arguments, no text, `stop`; with the result the model speaks."""
    site.needs(TOOL_MODEL, "tools")
    messages: list[Json] = [{"role": "user", "content": "What is the weather in Boston? Use the tool."}]
    body: Json = {"model": TOOL_MODEL, "messages": messages, "tools": TOOLS, "options": GREEDY, "think": False}
    whole = site.ok("/api/chat", {**body, "stream": False})
    lines = site.lines("/api/chat", body)
    streamed = [call for line in lines for call in line["message"].get("tool_calls", [])]
    for message, reason, calls in (
        (whole["message"], whole["done_reason"], whole["message"]["tool_calls"]),
        (lines[-1]["message"], lines[-1]["done_reason"], streamed),
    ):
        assert (message["content"], reason) == ("", "stop")
        assert re.fullmatch(r"call_[a-z0-9]{8}", calls[0]["id"])
        assert calls[0]["function"]["index"] == 0
        assert calls[0]["function"]["name"] == "get_weather"
        assert calls[0]["function"]["arguments"] == {"location": "Boston"}
    messages += [whole["message"], {"role": "tool", "tool_name": "get_weather", "content": "sunny, 22 degrees"}]
    assert site.ok("/api/chat", {**body, "messages": messages, "stream": False})["message"]["content"]


def test_28_two_calls_at_once_are_told_apart(site: Site) -> None:
    """Ids differ and indices count, in every protocol."""
    site.needs(TOOL_MODEL, "tools")
    text = "What is the weather in Boston, and what time is it in Paris? Call both tools at once."
    messages: list[Json] = [{"role": "user", "content": text}]
    body: Json = {"model": TOOL_MODEL, "messages": messages, "tools": TOOLS}
    native = [
        call
        for line in site.lines("/api/chat", {**body, "options": GREEDY, "think": False})
        for call in line["message"].get("tool_calls", [])
    ]
    assert [call["function"]["index"] for call in native] == [0, 1]
    assert len({call["id"] for call in native}) == 2
    assert [call["function"]["name"] for call in native] == ["get_weather", "get_time"]
    assert all(isinstance(call["function"]["arguments"], dict) for call in native)
    chunks = [data for _, data in site.events("/v1/chat/completions", {**body, **GREEDY}) if data != "[DONE]"]
    deltas = [call for chunk in chunks for choice in chunk["choices"] for call in choice["delta"].get("tool_calls", [])]
    assert [call["index"] for call in deltas if call.get("id")] == [0, 1]
    assert len({call["id"] for call in deltas if call.get("id")}) == 2
    tools = [{"name": each["name"], "input_schema": each["parameters"]} for each in FUNCTIONS]
    blocks = site.ok("/v1/messages", {**body, "tools": tools, "max_tokens": 500})["content"]
    assert len({block["id"] for block in blocks if block["type"] == "tool_use"}) == 2
    tools = [{"type": "function", **each} for each in FUNCTIONS]
    items = site.ok("/v1/responses", {"model": TOOL_MODEL, "input": text, "tools": tools})
    assert len({item["call_id"] for item in items["output"] if item["type"] == "function_call"}) == 2


def test_29_embeddings_are_unit_vectors_in_order(site: Site) -> None:
    """One text or several; nothing gives nothing; fewer dimensions are unit vectors again."""

    def embedded(texts: Any, **fields: Any) -> list[list[float]]:
        reply = site.ok("/api/embed", {"model": EMBED_MODEL, "input": texts, **fields})
        assert reply["model"] == EMBED_MODEL
        vectors: list[list[float]] = reply["embeddings"]
        return vectors

    (one,) = embedded("why is the sky blue?")
    assert norm(one) == pytest.approx(1, abs=1e-3)
    both = embedded(["why is the sky blue?", "The grass is green."])
    assert len(both) == 2
    assert sum(left * right for left, right in zip(one, both[0], strict=True)) > 0.9999
    assert sum(left * right for left, right in zip(one, both[1], strict=True)) < 0.9
    assert embedded([]) == embedded("") == []
    (cut,) = embedded("why is the sky blue?", dimensions=8)
    assert len(cut) == 8
    assert norm(cut) == pytest.approx(1, abs=1e-3)
    for wrong in ([1], 5, {"a": 1}, [["x"]]):
        assert site.refused("/api/embed", {"model": EMBED_MODEL, "input": wrong}) == "invalid input type"


def test_29b_embeddings_count_their_tokens(site: Site) -> None:
    """The sum over all inputs."""
    one = site.ok("/api/embed", {"model": EMBED_MODEL, "input": "why is the sky blue?"})
    three = site.ok("/api/embed", {"model": EMBED_MODEL, "input": ["why is the sky blue?"] * 3})
    assert three["prompt_eval_count"] == 3 * one["prompt_eval_count"] > 0
    assert one["total_duration"] > 0 and one["load_duration"] > 0


def test_30_a_text_too_long_to_embed(site: Site) -> None:
    """It is cut, unless the client forbids that."""
    body: Json = {"model": EMBED_MODEL, "input": "word " * 20000}
    assert len(site.ok("/api/embed", body)["embeddings"]) == 1
    text = site.refused("/api/embed", {**body, "truncate": False})
    assert text.startswith("the input length exceeds the context length")
    assert site.refused("/api/embed", {**body, "input": ["short", body["input"]], "truncate": False}) == text


def test_31_the_older_embeddings(site: Site) -> None:
    """One vector for one prompt."""
    vector = site.ok("/api/embeddings", {"model": EMBED_MODEL, "prompt": "x"})["embedding"]
    assert len(vector) > 8 and all(type(value) is float for value in vector)
    assert site.ok("/api/embeddings", {"model": EMBED_MODEL, "prompt": ""}) == {"embedding": []}


# -- 32 to 38: managing models ----------------------------------------------------


def test_32_the_list_of_models(site: Site) -> None:
    """Both names with a tag, a digest of 64 digits, a time with its zone, details that say something."""
    models = site.installed()
    assert tagged(MODEL) in models and tagged(EMBED_MODEL) in models
    for name, model in models.items():
        assert model["model"] == name == tagged(name)
        assert re.fullmatch(r"[0-9a-f]{64}", model["digest"])
        assert model["size"] > 0
        moment(model["modified_at"])
        details = model["details"]
        assert set(details) >= {"parent_model", "format", "family", "families", "parameter_size", "quantization_level"}
        for field in ("format", "family", "parameter_size", "quantization_level"):
            assert isinstance(details[field], str), (name, field)
    for field in ("format", "family", "parameter_size", "quantization_level"):
        assert models[tagged(MODEL)]["details"][field], field
    assert models[tagged(MODEL)]["digest"] != models[tagged(EMBED_MODEL)]["digest"]
    times = [moment(model["modified_at"]) for model in models.values()]
    assert times == sorted(times, reverse=True)
    assert site.client.head("/api/tags").status_code == 200


def test_32b_lists_of_nothing(faulty: Server) -> None:
    """Empty lists, not null."""
    assert faulty.client.request("DELETE", "/api/delete", json={"model": "fake/a"}).status_code == 200
    for path in ("/api/tags", "/api/ps"):
        assert faulty.client.get(path).json() == {"models": []}
    assert faulty.client.get("/v1/models").json() == {"object": "list", "data": []}


def test_33_what_a_model_is(site: Site) -> None:
    """The facts that clients look up: context length, capabilities, template, parameters."""
    shown = site.ok("/api/show", {"model": MODEL})
    info = shown["model_info"]
    architecture = info["general.architecture"]
    assert type(info[f"{architecture}.context_length"]) is int
    assert type(info["general.parameter_count"]) is int
    assert "completion" in shown["capabilities"]
    assert isinstance(shown["template"], str) and isinstance(shown["modelfile"], str)
    parameters = shown.get("parameters", "")
    assert parameters == parameters.strip("\n")
    assert all(re.fullmatch(r"\w+ +\S.*", line) for line in parameters.splitlines())
    details = site.installed()[tagged(MODEL)]["details"]
    assert {field: shown["details"][field] for field in ("format", "family", "quantization_level")} == {
        field: details[field] for field in ("format", "family", "quantization_level")
    }
    moment(shown["modified_at"])
    embedding = site.ok("/api/show", {"model": EMBED_MODEL})
    assert "embedding" in embedding["capabilities"] and "completion" not in embedding["capabilities"]
    assert isinstance(embedding["model_info"], dict)


def test_34_pulling_again(site: Site) -> None:
    """A stream of statuses from the manifest to success, or the last one only."""
    lines = site.lines("/api/pull", {"model": MODEL})
    assert lines[0] == {"status": "pulling manifest"}
    assert lines[-1] == {"status": "success"}
    for line in lines:
        assert isinstance(line["status"], str)
        if "digest" in line:
            assert 0 <= line.get("completed", 0) <= line["total"]
    reply = site.post("/api/pull", {"name": MODEL, "stream": False})
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.json() == {"status": "success"}


def test_35_pulling_what_does_not_exist(site: Site) -> None:
    """In a stream an error line under status 200; whole a status of its own."""
    lines = site.lines("/api/pull", {"model": MISSING})
    assert lines[0] == {"status": "pulling manifest"}
    assert set(lines[-1]) == {"error"} and isinstance(lines[-1]["error"], str)
    assert site.refused("/api/pull", {"model": MISSING, "stream": False}, 500)
    assert site.refused("/api/pull", {}) == "invalid model name"


def test_36_two_clients_pull_the_same_model(request: pytest.FixtureRequest) -> None:
    """One transfer, two ends with success."""
    if BASE_URL:
        client: httpx.Client = request.getfixturevalue("site").client
        model = MODEL
    else:
        client, model = request.getfixturevalue("fake_server").client, f"test/shared-{uuid.uuid4().hex[:8]}"
        hub: HubStub = request.getfixturevalue("hub")
        hub.add(model, request.getfixturevalue("tiny_folder"))

    def pull(_: int) -> list[Json]:
        return Site(client).lines("/api/pull", {"model": model})

    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(pull, range(2)))
    assert [lines[-1] for lines in both] == [{"status": "success"}] * 2
    if not BASE_URL:
        got = [one for one in hub.requests if one.method == "GET" and one.path.startswith(f"/{model}/")]
        assert sum(one.path.endswith("/model.safetensors") for one in got) == 1


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """The files of some small model."""
    import tinymodels

    return tinymodels.tiny_gpt2()


def test_37_copy_and_delete(site: Site) -> None:
    """A copy is a name for the same content; both replies are empty."""
    done = site.post("/api/copy", {"source": MODEL, "destination": COPY})
    assert (done.status_code, done.content) == (200, b"")
    try:
        models = site.installed()
        assert models[f"{COPY}:latest"]["digest"] == models[tagged(MODEL)]["digest"]
        assert site.ok("/api/chat", {"model": COPY, "messages": ASKED, **SPEED})["model"] == COPY
    finally:
        gone = site.client.request("DELETE", "/api/delete", json={"model": COPY})
    assert (gone.status_code, gone.content) == (200, b"")
    assert f"{COPY}:latest" not in site.installed()
    assert tagged(MODEL) in site.installed()
    again = site.client.request("DELETE", "/api/delete", json={"model": COPY})
    assert (again.status_code, again.json()) == (404, {"error": f"model '{COPY}' not found"})
    text = site.refused("/api/copy", {"source": MISSING, "destination": COPY}, 404)
    assert text == f'model "{MISSING}" not found'


def test_37b_create_makes_a_model_with_words_of_its_own(site: Site) -> None:
    """A name for another model with a system message and parameters."""
    body: Json = {"model": COPY, "from": MODEL, "system": "You are a parrot.", "parameters": {"num_predict": 3}}
    lines = site.lines("/api/create", body)
    assert lines[-1] == {"status": "success"}
    try:
        shown = site.ok("/api/show", {"model": COPY})
        assert shown["system"] == "You are a parrot."
        assert re.search(r"^num_predict +3$", shown["parameters"], re.MULTILINE)
        reply = site.ok("/api/chat", {"model": COPY, "messages": ASKED, "stream": False, "options": GREEDY})
        assert (reply["eval_count"], reply["done_reason"]) == (3, "length")
        plain = site.ok(
            "/api/chat", {"model": MODEL, "messages": ASKED, "stream": False, "options": {"num_predict": 3}}
        )
        assert reply["prompt_eval_count"] != plain["prompt_eval_count"]
    finally:
        assert site.client.request("DELETE", "/api/delete", json={"model": COPY}).status_code == 200
    assert site.refused("/api/create", {"model": COPY}) == "neither 'from' or 'files' was specified"


def test_38_blobs(site: Site) -> None:
    """Content is stored under its digest, and only there."""
    content = uuid.uuid4().bytes
    path = f"/api/blobs/sha256:{hashlib.sha256(content).hexdigest()}"
    assert site.client.head(path).status_code == 404
    wrong = site.client.post(path, content=content + b"!")
    assert wrong.status_code == 400
    assert "digest mismatch" in wrong.json()["error"]
    assert site.client.head(path).status_code == 404
    assert site.client.post(path, content=content).status_code == 201
    assert site.client.post(path, content=content).status_code == 200
    assert site.client.head(path).status_code == 200
    malformed = site.client.post("/api/blobs/sha256:short", content=content)
    assert (malformed.status_code, malformed.json()) == (400, {"error": "invalid digest format"})


# -- 39 to 43: the other protocols ----------------------------------------------


def test_39_chat_completions(site: Site) -> None:
    """Whole by default; streamed: the role first, one reason, usage alone at the end, and the end is marked."""
    body: Json = {"model": MODEL, "messages": ASKED, "max_tokens": 8, **GREEDY}
    site.ok("/v1/chat/completions", body)  # both runs below begin with the same prompt cache
    whole = site.ok("/v1/chat/completions", body)
    assert (whole["object"], whole["model"], len(whole["choices"])) == ("chat.completion", MODEL, 1)
    events = site.events("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert [data for _, data in events].count("[DONE]") == 1
    assert events[-1][1] == "[DONE]"
    chunks = [data for _, data in events[:-1]]
    assert len({(chunk["id"], chunk["object"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    *pieces, usage = chunks
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert all(not chunk.get("usage") for chunk in pieces)
    choices = [choice for chunk in pieces for choice in chunk["choices"]]
    assert [index for index, choice in enumerate(choices) if "role" in choice["delta"]] == [0]
    assert choices[0]["delta"]["role"] == "assistant"
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert (choices[-1]["delta"], choices[-1]["finish_reason"]) == ({}, whole["choices"][0]["finish_reason"])
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text == whole["choices"][0]["message"]["content"] != ""
    plain = site.events("/v1/chat/completions", body)
    assert all(data == "[DONE]" or data["choices"] for _, data in plain)


def openai_refused(site: Site, path: str, body: Json, status: int = 400) -> Json:
    """An error in OpenAI's envelope with its four fields."""
    response = site.post(path, body)
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: Json = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


def test_40_errors_of_chat_completions(site: Site) -> None:
    """OpenAI's envelope, so that its libraries raise their own classes."""
    path = "/v1/chat/completions"
    missing = openai_refused(site, path, {"model": MISSING, "messages": ASKED}, 404)
    assert missing["type"] == "not_found_error"
    assert MISSING in missing["message"] and "not found" in missing["message"]
    empty = openai_refused(site, path, {"model": MODEL, "messages": []})
    assert (empty["message"], empty["type"]) == ("[] is too short - 'messages'", "invalid_request_error")
    link = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    picture = openai_refused(site, path, {"model": MODEL, "messages": [{"role": "user", "content": [link]}]})
    assert picture["type"] == "invalid_request_error"
    for field, value in (("temperature", "hot"), ("n", -1), ("messages", "x"), ("response_format", {"type": "xml"})):
        assert openai_refused(site, path, {"model": MODEL, "messages": ASKED, field: value})["type"]
    nothing = site.client.post(path)
    assert nothing.status_code == 400 and isinstance(nothing.json()["error"]["message"], str)


def test_41_models_and_embeddings_as_openai_has_them(site: Site) -> None:
    """Ids with a colon in the path, owners, base64 of little-endian floats."""
    listed = site.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert tagged(MODEL) in {model["id"] for model in listed["data"]}
    for model in listed["data"]:
        assert model["object"] == "model" and model["owned_by"] and type(model["created"]) is int
    assert site.client.get(f"/v1/models/{MODEL}").json()["id"] == MODEL
    missing = site.client.get(f"/v1/models/{MISSING}")
    assert missing.status_code == 404
    assert set(missing.json()["error"]) == {"message", "type", "param", "code"}
    body: Json = {"model": EMBED_MODEL, "input": ["one", "two"]}
    plain = site.ok("/v1/embeddings", body)
    assert [item["index"] for item in plain["data"]] == [0, 1]
    assert plain["usage"]["prompt_tokens"] == plain["usage"]["total_tokens"] > 0
    packed = site.ok("/v1/embeddings", {**body, "encoding_format": "base64"})
    for as_text, as_list in zip(packed["data"], plain["data"], strict=True):
        data = base64.b64decode(as_text["embedding"])
        assert struct.unpack(f"<{len(as_list['embedding'])}f", data) == pytest.approx(as_list["embedding"], abs=1e-5)
    wrong = openai_refused(site, "/v1/embeddings", {**body, "encoding_format": "x"})
    assert wrong["message"] == "Invalid value for 'encoding_format' = x. Supported values: ['float', 'base64']."
    assert openai_refused(site, "/v1/embeddings", {"model": EMBED_MODEL, "input": []})["message"].endswith(
        "invalid input"
    )


def input_tokens(*usages: Json) -> int:
    """All tokens of a prompt, read from a cache or not; what a later event says counts."""
    usage: Json = {}
    for each in usages:
        usage |= {name: count for name, count in each.items() if type(count) is int}
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return sum(usage.get(name, 0) for name in names)


def test_42_messages_as_anthropic_has_them(site: Site) -> None:
    """The order of the events, and the same text whole."""
    body: Json = {"model": MODEL, "messages": ASKED, "max_tokens": 8, "temperature": 0}
    site.ok("/v1/messages", body)  # both runs below begin with the same prompt cache
    whole = site.ok("/v1/messages", body)
    assert (whole["type"], whole["role"], whole["model"]) == ("message", "assistant", MODEL)
    assert whole["id"].startswith("msg_")
    assert whole["stop_reason"] in ("end_turn", "max_tokens")
    events = [event for event in site.events("/v1/messages", body) if event[0] != "ping"]
    names = [name for name, _ in events]
    deltas = names.count("content_block_delta")
    assert names == [
        "message_start", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert all(data["type"] == name for name, data in events)
    start = events[0][1]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    text = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
    assert [{"type": "text", "text": text}] == [
        {key: block[key] for key in ("type", "text")} for block in whole["content"]
    ]
    ending = events[-2][1]
    assert input_tokens(start["usage"], ending["usage"]) == input_tokens(whole["usage"]) > 3
    assert ending["delta"]["stop_reason"] == whole["stop_reason"]
    assert ending["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


@pytest.mark.parametrize(
    ("left_out", "status", "kind"),
    [("max_tokens", 400, "invalid_request_error"), ("messages", 400, "invalid_request_error"),
     ("model", 400, "invalid_request_error"), ("", 404, "not_found_error")],
)  # fmt: skip
def test_42b_errors_of_messages(site: Site, left_out: str, status: int, kind: str) -> None:
    """Anthropic's envelope."""
    body: Json = {"model": MISSING if not left_out else MODEL, "messages": ASKED, "max_tokens": 8}
    response = site.post("/v1/messages", {key: value for key, value in body.items() if key != left_out})
    assert response.status_code == status, response.text
    reply = response.json()
    assert (reply["type"], reply["error"]["type"]) == ("error", kind)
    assert left_out in reply["error"]["message"]


def test_42c_a_tool_is_used(site: Site) -> None:
    """A forced use ends with its own reason; its input is an object, streamed as JSON in pieces."""
    tools = [{"name": WEATHER["name"], "input_schema": WEATHER["parameters"]}]
    body: Json = {"model": MODEL, "messages": ASKED, "max_tokens": 200, "temperature": 0, "tools": tools}
    body["tool_choice"] = {"type": "tool", "name": "get_weather"}
    if BASE_URL and site.post("/v1/messages", body).status_code == 400:
        pytest.skip(f"{MODEL} cannot be made to use a tool")
    whole = site.ok("/v1/messages", body)
    used = [block for block in whole["content"] if block["type"] == "tool_use"]
    assert whole["stop_reason"] == "tool_use"
    assert used[0]["name"] == "get_weather" and used[0]["id"]
    assert set(used[0]["input"]) == {"location"}
    events = site.events("/v1/messages", body)
    (start,) = [
        data["content_block"]
        for name, data in events
        if name == "content_block_start" and "input" in data["content_block"]
    ]
    assert (start["type"], start["name"], start["input"]) == ("tool_use", "get_weather", {})
    pieces = [data["delta"] for name, data in events if name == "content_block_delta"]
    text = "".join(piece["partial_json"] for piece in pieces if piece["type"] == "input_json_delta")
    assert set(json.loads(text)) == {"location"}
    assert events[-2][1]["delta"]["stop_reason"] == "tool_use"


def test_42d_tokens_are_counted_before_they_cost(site: Site) -> None:
    """The count is that of the reply to the same messages."""
    counted = site.post("/v1/messages/count_tokens", {"model": MODEL, "messages": ASKED})
    if BASE_URL and counted.status_code == 404:
        pytest.skip("this server does not count tokens")
    reply = site.ok("/v1/messages", {"model": MODEL, "messages": ASKED, "max_tokens": 1})
    assert counted.json() == {"input_tokens": input_tokens(reply["usage"])}


def test_43_responses(site: Site) -> None:
    """Contiguous numbers, the order of the events, and one text in its deltas, at its end and in the output."""
    body: Json = {"model": MODEL, "input": QUESTION, "temperature": 0}
    events = site.events("/v1/responses", body)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    names = [name for name, _ in events]
    assert all(data["type"] == name for name, data in events)
    deltas = names.count("response.output_text.delta")
    assert names == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * deltas, "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    text = "".join(data["delta"] for name, data in events if name == "response.output_text.delta")
    done = dict(events)
    assert text == done["response.output_text.done"]["text"] != ""
    final = done["response.completed"]["response"]
    assert (final["status"], final["output"][0]["content"][0]["text"]) == ("completed", text)
    assert len({data["item_id"] for _, data in events if "item_id" in data} | {final["output"][0]["id"]}) == 1
    whole = site.ok("/v1/responses", body)
    assert (whole["object"], whole["status"]) == ("response", "completed")
    assert whole["output"][0]["role"] == "assistant"


def test_43b_a_response_that_is_cut_is_incomplete(site: Site) -> None:
    """The status, the reason, and the last event say so."""
    body: Json = {"model": MODEL, "input": "Count from one to one hundred.", "max_output_tokens": 4}
    whole = site.ok("/v1/responses", body)
    if BASE_URL and whole["status"] == "completed":
        pytest.skip("this server calls every response completed")
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert site.events("/v1/responses", body)[-1][0] == "response.incomplete"


# -- 44 to 47: trouble ------------------------------------------------------------


@contextmanager
def open_stream(server: Server, text: str) -> Iterator[Iterator[str]]:
    """An open stream of a fake engine."""
    body = {"model": "fake/a", "messages": [{"role": "user", "content": text}]}
    with server.client.stream("POST", "/api/chat", json=body) as response:
        yield response.iter_lines()


def notes(server: Server) -> str:
    """What the fake engines wrote down."""
    return (server.folder / "state" / "events.txt").read_text()


@pytest.mark.parametrize(
    ("path", "kind"), [("/api/chat", ""), ("/v1/chat/completions", "api_error"), ("/v1/messages", "overloaded_error")]
)
def test_44_a_full_queue_says_so(hub: HubStub, hub_cache: Path, tmp_path: Path, path: str, kind: str) -> None:
    """503 and when to come again, in the words of each protocol."""
    if BASE_URL:
        pytest.skip("needs a server with a short queue")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub_cache), "MAX_QUEUE": "1"}
    with Server(tmp_path, fake=True, **settings) as server:
        server.have("fake/a")
        with open_stream(server, "hang") as lines:
            next(lines)
            messages = [{"role": "user", "content": "count 1"}]
            refused = server.client.post(path, json={"model": "fake/a", "messages": messages, "max_tokens": 5})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        error = refused.json()["error"]
        assert "server busy" in (error if path == "/api/chat" else error["message"])
        assert path == "/api/chat" or error["type"] == kind


def test_44b_who_leaves_in_mid_stream_makes_room(faulty: Server) -> None:
    """The engine stops, and the next one is served."""
    with open_stream(faulty, "slow 400") as lines:
        next(lines)
    wait_until(lambda: "end slow" in notes(faulty))
    assert int(re.findall(r"end slow (\d+)", notes(faulty))[0]) < 400
    with open_stream(faulty, "count 2") as lines:
        assert json.loads(list(lines)[-1])["done"] is True


def test_44c_many_who_leave_block_nobody(site: Site) -> None:
    """More than any server has slots."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Count to a thousand."}]}
    for _ in range(12):
        with site.client.stream("POST", "/api/chat", json=body) as response:
            next(response.iter_lines())
    assert site.text()


def test_45_other_origins_and_other_hosts(site: Site) -> None:
    """A page from elsewhere may not use the server of the machine it is shown on."""
    evil = site.client.get("/api/version", headers={"Origin": "http://evil.example"})
    assert evil.status_code == 403
    for origin in ("http://localhost:3000", "https://127.0.0.1", "app://obsidian.md"):
        fine = site.client.get("/api/version", headers={"Origin": origin})
        assert fine.status_code == 200
        assert fine.headers["access-control-allow-origin"] in (origin, "*")
    ask = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    ask["Access-Control-Request-Headers"] = "content-type,authorization"
    preflight = site.client.options("/api/chat", headers=ask)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] in ("http://localhost:3000", "*")
    assert "POST" in preflight.headers["access-control-allow-methods"]
    allowed = preflight.headers["access-control-allow-headers"].lower()
    assert "content-type" in allowed and "authorization" in allowed
    if site.client.base_url.host in ("127.0.0.1", "localhost", "::1"):
        assert site.client.get("/api/version", headers={"Host": "evil.example"}).status_code == 403
        assert site.client.get("/api/version", headers={"Host": "localhost"}).status_code == 200


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
def test_46_a_prompt_too_long_is_not_cut_in_silence(site: Site, path: str) -> None:
    """400 with the word context."""
    text = "word " * 300
    asked: Json = {"messages": [{"role": "user", "content": text}]} if path == "/api/chat" else {"prompt": text}
    options = {"num_ctx": 64, "num_predict": 4}
    body: Json = {"model": MODEL, "shift": False, "truncate": False, "options": options, **asked}
    assert "context" in site.refused(path, body)


def test_47_an_engine_that_dies_in_mid_stream_is_named(faulty: Server) -> None:
    """The last line is an error, none is `done`; the next request is served by a new engine."""
    with open_stream(faulty, "crash 3") as lines:
        *before, last = [json.loads(line) for line in lines]
    assert [line["done"] for line in before] == [False] * len(before)
    assert "".join(line["message"]["content"] for line in before) == "0 1 2 "
    assert set(last) == {"error"} and isinstance(last["error"], str)
    with open_stream(faulty, "count 1") as lines:
        assert json.loads(list(lines)[-1])["done"] is True


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_47b_the_other_protocols_name_it_too(faulty: Server, path: str) -> None:
    """An error event of the protocol, and no sign of a good end."""
    asked: Json = {"messages": [{"role": "user", "content": "crash 3"}], "max_tokens": 50}
    asked = {"input": "crash 3"} if path == "/v1/responses" else asked
    events = Site(faulty.client).events(path, {"model": "fake/a", **asked})
    names = [name for name, _ in events]
    data = [value for _, value in events if value != "[DONE]"]
    if path == "/v1/chat/completions":
        assert set(data[-1]) == {"error"} and isinstance(data[-1]["error"]["message"], str)
        assert all(choice["finish_reason"] is None for each in data[:-1] for choice in each["choices"])
    elif path == "/v1/responses":
        assert names[-1] in ("response.failed", "error")
        assert "response.completed" not in names
    else:
        assert (names[-1], data[-1]["type"]) == ("error", "error")
        assert isinstance(data[-1]["error"]["message"], str)
        assert "message_stop" not in names
