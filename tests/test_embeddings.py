"""Vectors and rankings by real models: one batch or many, cut or refused, in every protocol's form."""

import base64
import math
import struct
from typing import Any

import pytest
from harness import Server

MODEL = "all-minilm"
TEXTS = ["why is the sky blue?", "Rayleigh scattering makes the sky blue", "cheese is made of milk"]
Vector = list[float]


@pytest.fixture(scope="module")
def embedder(server: Server) -> Server:
    """The server with the embedding model and the cross-encoder on disk."""
    server.have(MODEL)
    server.have("test/reranker")
    return server


def vectors(server: Server, inputs: Any, **fields: Any) -> list[Vector]:
    """What /v1/embeddings answers, in the order of the inputs."""
    reply = server.client.post("/v1/embeddings", json={"model": MODEL, "input": inputs, **fields})
    assert reply.status_code == 200, reply.text
    data = reply.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return [entry["embedding"] for entry in data]


def cosine(one: Vector, other: Vector) -> float:
    """How alike two vectors are."""
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)


def test_vectors_are_of_unit_length_and_mean_something(embedder: Server) -> None:
    """384 numbers; a text is nearer to its answer than to another subject."""
    sky, scattering, cheese = vectors(embedder, TEXTS)
    assert all(len(each) == 384 and abs(math.hypot(*each) - 1) < 1e-5 for each in (sky, scattering, cheese))
    assert cosine(sky, scattering) > 0.6 > 0.2 > cosine(sky, cheese)


def test_a_batch_changes_no_vector(embedder: Server) -> None:
    """The same text alone and between long ones, in a batch of 40."""
    alone = vectors(embedder, TEXTS[0])[0]
    batch = vectors(embedder, ["long " * 60, *TEXTS, "x"] * 8)
    assert all(cosine(alone, batch[at]) > 0.9999 for at in range(1, 40, 5))


def test_dimensions_cut_and_keep_unit_length(embedder: Server) -> None:
    """The first numbers, scaled."""
    whole, cut = vectors(embedder, TEXTS[0])[0], vectors(embedder, TEXTS[0], dimensions=8)[0]
    assert len(cut) == 8
    assert abs(math.hypot(*cut) - 1) < 1e-5
    assert cosine(whole[:8], cut) > 0.9999


def test_base64_is_the_same_vector(embedder: Server) -> None:
    """Little-endian 32-bit floats, which OpenAI's clients ask for by default."""
    reply = embedder.client.post("/v1/embeddings", json={"model": MODEL, "input": "x", "encoding_format": "base64"})
    raw = base64.b64decode(reply.json()["data"][0]["embedding"])
    assert cosine(list(struct.unpack("<384f", raw)), vectors(embedder, "x")[0]) > 0.9999


def test_tokens_are_counted_over_all_inputs(embedder: Server) -> None:
    """With the two that begin and end an input."""
    for inputs, tokens in ((TEXTS[0], 8), ([TEXTS[0]] * 3, 24)):
        reply = embedder.client.post("/v1/embeddings", json={"model": MODEL, "input": inputs}).json()
        assert reply["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_token_ids_are_an_input(embedder: Server) -> None:
    """They are this model's own; the special ones add nothing."""
    ids = [101, 2339, 2003, 1996, 3712, 2630, 1029, 102]
    assert cosine(vectors(embedder, ids)[0], vectors(embedder, TEXTS[0])[0]) > 0.9999
    assert len(vectors(embedder, [ids, ids])) == 2


def test_an_input_that_is_too_long_is_refused_with_both_numbers(embedder: Server) -> None:
    """The model takes 256 tokens; nothing is cut behind anybody's back."""
    reply = embedder.client.post("/v1/embeddings", json={"model": MODEL, "input": ["x", "word " * 300]})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert "302 tokens" in error["message"] and "256" in error["message"]
    assert error["code"] == "context_length_exceeded"


def test_a_cross_encoder_ranks(embedder: Server) -> None:
    """Best first, each with the index it was given under."""
    body = {"model": "test/reranker", "query": TEXTS[0], "documents": TEXTS[1:], "return_documents": True}
    reply = embedder.client.post("/v1/rerank", json=body)
    assert reply.status_code == 200, reply.text
    results = reply.json()["results"]
    scores = [each["relevance_score"] for each in results]
    assert sorted(scores, reverse=True) == scores
    assert sorted(each["index"] for each in results) == [0, 1]
    assert len(embedder.client.post("/v1/rerank", json={**body, "top_n": 1}).json()["results"]) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    ],
)
def test_an_embedding_model_does_nothing_else(embedder: Server, path: str, body: dict[str, Any]) -> None:
    """400 that says what it cannot do, and no load."""
    reply = embedder.client.post(path, json={"model": MODEL, **body})
    assert reply.status_code == 400
    assert "does not support" in reply.json()["error"]["message"]


def test_a_chat_model_makes_no_vectors(embedder: Server) -> None:
    """The same, the other way round."""
    embedder.have("smollm2:135m")
    reply = embedder.client.post("/v1/embeddings", json={"model": "smollm2:135m", "input": "x"})
    assert reply.status_code == 400
    assert "does not support embeddings" in reply.json()["error"]["message"]
