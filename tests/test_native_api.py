"""The native API as a client sees it, on a real model: shapes, headers, errors, diagnosis."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Json, Server, text_of

MODEL = "smollm2:135m"
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z")


@pytest.fixture(scope="module", autouse=True)
def model(server: Server) -> None:
    """The starter model on disk."""
    server.have(MODEL)


def post(server: Server, path: str, body: bytes | Json, **headers: str) -> tuple[int, Json]:
    """POST raw bytes or JSON; returns status and body."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client.post(path, content=content, headers=headers)
    return response.status_code, response.json()


def test_the_command_of_the_readme_streams_an_answer_with_paris(server: Server) -> None:
    """As `curl -d` sends it: no JSON content type, no `stream` field, no options."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    response = server.client.post(
        "/chat", content=json.dumps(body), headers={"Content-Type": "application/x-www-form-urlencoded"}
    )
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert "Paris" in text_of(lines)
    assert len(lines) > 3


def test_the_shape_of_a_stream(server: Server) -> None:
    """NDJSON without blank lines; counters on the one last line only."""
    raw = server.client.post("/chat", json={"model": MODEL, "prompt": "Hi", "max_tokens": 6}).text
    assert "\n\n" not in raw
    assert raw.endswith("\n")
    lines = [json.loads(line) for line in raw.splitlines()]
    for line in lines[:-1]:
        assert set(line) == {"model", "created_at", "message", "done"}
        assert line["message"]["role"] == "assistant"
        assert line["done"] is False
    assert lines[-1]["done"] is True
    assert lines[-1]["done_reason"] == "length"
    assert lines[-1]["eval_count"] == 6


def test_the_shape_of_a_whole_reply(server: Server) -> None:
    """Ollama's fields, model as sent, a timestamp with Z, an id."""
    response = server.chat(MODEL, max_tokens=6)
    reply = response.json()
    assert set(reply) == {
        "model", "created_at", "message", "done", "done_reason", "total_duration", "load_duration",
        "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration",
    }  # fmt: skip
    assert (reply["model"], reply["done"], reply["message"]["role"]) == (MODEL, True, "assistant")
    assert ISO.fullmatch(reply["created_at"])
    assert re.fullmatch(r"req_[0-9a-f]{16}", response.headers["x-request-id"])


def test_options_inside_and_beside_mean_the_same(server: Server) -> None:
    """`options.num_predict` is `max_tokens`; what stands beside wins."""
    assert server.chat(MODEL, "Count to ten.", options={"num_predict": 3}).json()["eval_count"] == 3
    assert server.chat(MODEL, "Count to ten.", max_tokens=2, options={"num_predict": 3}).json()["eval_count"] == 2
    nulls: Json = {"max_tokens": None, "stop": None, "seed": None}
    assert server.chat(MODEL, "Count to ten.", options={"num_predict": 3}, **nulls).json()["eval_count"] == 3


def test_unknown_parameters_are_named(server: Server) -> None:
    """Nothing is silently ignored."""
    reply = server.chat(MODEL, max_tokens=2, frobnicate=1, options={"mirostat": 2, "seed": 1})
    assert reply.headers["x-ignored-parameters"] == "frobnicate, options.mirostat"


def test_header_values_cannot_be_injected(server: Server) -> None:
    """A hostile field name stays inside one header line."""
    hostile: Json = {"a\r\nX-Evil: 1": 1, "é" * 3000: 2}
    reply = server.chat(MODEL, max_tokens=2, **hostile)
    assert reply.status_code == 200
    assert "x-evil" not in reply.headers
    assert len(reply.headers["x-ignored-parameters"]) <= 1000


def test_require_gets_what_it_asks_for_or_409(server: Server) -> None:
    """X-Require never accepts something else."""
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 2, "stream": False}
    assert server.client.post("/chat", json=body, headers={"X-Require": "backend=llama.cpp"}).status_code == 200
    refused = server.client.post("/chat", json=body, headers={"X-Require": "backend=vllm"})
    assert refused.status_code == 409
    assert "backend is llama.cpp" in refused.json()["error"]
    assert server.client.post("/chat", json=body, headers={"X-Require": "vllm"}).status_code == 400
    assert server.client.post("/chat", json=body, headers={"X-Require": "colour=red"}).status_code == 409


def test_a_catalogue_default_yields_to_the_request(server: Server) -> None:
    """The starter's temperature of 0 repeats; a request's own temperature and system prompt win."""
    assert server.answer(MODEL, max_tokens=12) == server.answer(MODEL, max_tokens=12)
    hot = {server.answer(MODEL, "Tell me a story.", max_tokens=12, temperature=1.5, seed=seed) for seed in range(4)}
    assert len(hot) > 1
    turns = [
        {"role": "system", "content": "You are a very long system prompt. " * 10},
        {"role": "user", "content": "Hi"},
    ]
    counts = [
        server.client.post(
            "/chat", json={"model": MODEL, "messages": messages, "max_tokens": 1, "stream": False}
        ).json()["prompt_eval_count"]
        for messages in (turns, turns[1:])
    ]
    assert counts[0] > counts[1] + 50


def test_a_conversation_with_several_turns(server: Server) -> None:
    """Roles, content parts and null content are all read."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "My name is "}, {"type": "text", "text": "Ann."}]},
        {"role": "assistant", "content": "Hello Ann."},
        {"role": "user", "content": "What is my name?"},
    ]
    body = {"model": MODEL, "messages": messages, "max_tokens": 12, "stream": False}
    assert server.client.post("/chat", json=body).status_code == 200


BAD_BODIES: list[tuple[Any, int, str]] = [
    (b"", 400, "missing request body"),
    (b"{", 400, "not valid JSON"),
    (b"[]", 400, "must be a JSON object"),
    (b"nul\x00l", 400, "not valid JSON"),
    (b'{"model": "\xff"}', 400, "not valid JSON"),
    (b"[" * 100_000, 400, "not valid JSON"),
    ({}, 400, "Missing 'model' in payload"),
    ({"model": ""}, 400, "Missing 'model' in payload"),
    ({"model": None}, 400, "Missing 'model' in payload"),
    ({"model": 7, "prompt": "x"}, 400, "'model'"),
    ({"model": MODEL}, 400, "'messages' or 'prompt'"),
    ({"model": MODEL, "prompt": "x", "messages": []}, 400, "'messages' or 'prompt'"),
    ({"model": MODEL, "messages": []}, 400, "'messages'"),
    ({"model": MODEL, "messages": "hi"}, 400, "'messages'"),
    ({"model": MODEL, "messages": [{"role": "wizard", "content": "x"}]}, 400, "'messages.0.role'"),
    ({"model": MODEL, "messages": [{"content": "x"}]}, 400, "'messages.0.role'"),
    ({"model": MODEL, "messages": [{"role": "user", "content": 5}]}, 400, "'messages.0.content"),
    ({"model": MODEL, "prompt": "x", "stream": "yes"}, 400, "'stream'"),
    ({"model": MODEL, "prompt": "x", "temperature": "hot"}, 400, "'temperature'"),
    ({"model": MODEL, "prompt": "x", "temperature": -1}, 400, "'temperature'"),
    ({"model": MODEL, "prompt": "x", "temperature": True}, 400, "'temperature'"),
    (b'{"model": "smollm2:135m", "prompt": "x", "temperature": NaN}', 400, "'temperature'"),
    (b'{"model": "smollm2:135m", "prompt": "x", "temperature": 1e999}', 400, "'temperature'"),
    ({"model": MODEL, "prompt": "x", "top_p": 1.1}, 400, "'top_p'"),
    ({"model": MODEL, "prompt": "x", "max_tokens": 1.5}, 400, "'max_tokens'"),
    ({"model": MODEL, "prompt": "x", "max_tokens": 10**30}, 400, "'max_tokens'"),
    ({"model": MODEL, "prompt": "x", "seed": 2**80}, 400, "'seed'"),
    ({"model": MODEL, "prompt": "x", "stop": ["a"] * 17}, 400, "'stop"),
    ({"model": MODEL, "prompt": "x", "stop": [1]}, 400, "'stop"),
    ({"model": MODEL, "prompt": "x", "options": []}, 400, "'options'"),
    ({"model": MODEL, "prompt": "x", "options": {"top_k": "many"}}, 400, "'options.top_k'"),
    ({"model": MODEL, "prompt": "x", "keep_alive": "banana"}, 400, "'keep_alive'"),
    ({"model": MODEL, "prompt": "x", "keep_alive": True}, 400, "'keep_alive"),
    ({"model": "a b", "prompt": "x"}, 400, "invalid model name"),
    ({"model": "../etc/passwd", "prompt": "x"}, 400, "invalid model name"),
    ({"model": "no/such", "prompt": "x"}, 404, "/pull"),
    ({"model": "nosuch", "prompt": "x"}, 404, "Model nosuch not found"),
]


@pytest.mark.parametrize(("body", "status", "words"), BAD_BODIES, ids=lambda value: str(value)[:40])
def test_bad_input_is_a_clear_4xx_that_names_the_field(server: Server, body: Any, status: int, words: str) -> None:
    """Never 422, never a traceback, never the value."""
    got, reply = post(server, "/chat", body)
    assert got == status, reply
    assert set(reply) == {"error"}
    assert words in reply["error"]
    assert "Traceback" not in reply["error"]


def test_a_body_over_the_limit_is_413(server: Server) -> None:
    """Reading stops at MAX_BODY_BYTES, with and without an announced length."""

    def endless() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * (1024 * 1024)

    assert server.client.post("/chat", content=b" " * (33 * 1024 * 1024)).status_code == 413
    assert server.client.post("/chat", content=endless()).status_code == 413


def test_a_lone_surrogate_is_not_a_server_error(server: Server) -> None:
    """JSON can spell half a character; it must not end in a 500."""
    status, reply = post(server, "/chat", b'{"model":"smollm2:135m","stream":false,"max_tokens":1,"prompt":"\\ud800"}')
    assert status == 400, reply


def test_unknown_paths_and_verbs(server: Server) -> None:
    """404 and 405 in Ollama's words, not FastAPI's `detail`."""
    assert server.client.get("/nope").text == "404 page not found"
    wrong = server.client.get("/chat")
    assert (wrong.status_code, wrong.text) == (405, "405 method not allowed")
    assert wrong.headers["allow"] == "POST"


def test_the_models_page(server: Server) -> None:
    """What is documented of a model is there."""
    names = [model["name"] for model in server.client.get("/models").json()["models"]]
    assert MODEL in names
    facts = server.client.get("/models/SmolLM2:135M").json()
    assert facts["name"] == MODEL
    assert facts["format"] == "gguf"
    assert facts["context_length"] == 8192
    assert facts["size_bytes"] > 90_000_000
    assert re.fullmatch("[0-9a-f]{64}", facts["revision"])
    assert server.client.get("/models/no/such").status_code == 404


def test_diag_tells_the_truth(server: Server) -> None:
    """Versions, CUDA or not, devices, engines with their reasons; no secret."""
    diag = server.client.get("/diag").json()
    assert diag["versions"]["transformers"]
    assert diag["engines"]["llama.cpp"] == {"available": True, "reason": None}
    assert diag["engines"]["transformers"]["available"] is True
    assert isinstance(diag["cuda"]["available"], bool)
    assert diag["cuda"]["available"] is False or diag["devices"][0]["kind"] == "cuda"
    assert diag["settings"]["MAX_CACHE_MODELS"] == 2
    assert "HF_TOKEN" not in diag["settings"]


def test_health_root_and_docs(server: Server) -> None:
    """Live, ready, a line of text, and a page that shows every field of a body."""
    assert server.client.get("/health/live").json() == {"status": "ok"}
    assert server.client.get("/health/ready").json() == {"status": "ready"}
    assert server.client.get("/").text == "Ollama is running"
    assert server.client.head("/").status_code == 200
    schema = server.client.get("/openapi.json").json()
    body = schema["paths"]["/chat"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "messages", "prompt", "stream", "options", "keep_alive", "temperature"} <= set(body["properties"])


def test_the_server_stays_small_and_without_engine_libraries(server: Server) -> None:
    """No torch in the server process, whatever it served; see also tests/test_shape.py."""
    server.answer(MODEL, max_tokens=1)
    maps = Path(f"/proc/{server.process.pid}/maps").read_text(encoding="utf-8")
    assert "libtorch" not in maps
    assert "xllamacpp" not in maps
    assert server.client.get("/diag").json()["memory"]["server_bytes"] < 120 * 1024 * 1024


def test_strict_parameters_refuse_what_cannot_be_honoured(server: Server, tmp_path: Any) -> None:
    """STRICT_PARAMETERS=1 makes a 400 of what is otherwise named in a header."""
    with Server(tmp_path, STRICT_PARAMETERS="1") as strict:
        strict.have(MODEL)
        refused = strict.chat(MODEL, max_tokens=1, frobnicate=1)
        assert refused.status_code == 400
        assert "frobnicate" in refused.json()["error"]
        assert strict.chat(MODEL, max_tokens=1).status_code == 200


def test_plain_uvicorn_serves_the_same_app(tmp_path: Any) -> None:
    """`uvicorn app:app` works too."""
    with Server(tmp_path, runner="uvicorn") as plain:
        plain.have(MODEL)
        assert "Paris" in plain.answer(MODEL, max_tokens=16)


def test_a_request_that_never_ends_does_not_stop_others(server: Server) -> None:
    """An open half request is nobody's problem."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"POST /chat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert server.client.get("/health/live").status_code == 200
