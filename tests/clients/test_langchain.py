"""LangChain's own integration tests, for its Ollama and OpenAI packages: chat models and embeddings.

A test that fails because a model of 135 million parameters cannot do what it asks is in WEAK, with the reason; when
such a test passes all the same, the run fails, so that the list stays true.
"""

import os
from typing import Any

import pytest
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from langchain_tests.integration_tests import ChatModelIntegrationTests, EmbeddingsIntegrationTests

BASE_URL = os.environ.get("BASE_URL", "").rstrip("/")
MODEL = os.environ.get("MODEL", "smollm2:135m")
EMBED_MODEL = os.environ.get("EMBED_MODEL", "all-minilm")
NO_TOOLS = "the model's template knows no tools, and this test does not force a call"
WEAK = {
    ("TestChatOpenAI", "test_tool_message_histories_string_content"): NO_TOOLS,
    ("TestChatOpenAI", "test_tool_message_histories_list_content"): NO_TOOLS,
    ("TestChatOpenAI", "test_tool_message_error_status"): NO_TOOLS,
    ("TestChatOpenAI", "test_agent_loop"): NO_TOOLS,
    ("TestChatOpenAI", "test_structured_output_optional_param"): "the model repeats itself inside a text to the limit",
}


@pytest.fixture(autouse=True)
def weak_model(request: pytest.FixtureRequest) -> None:
    """Expect the failures that are the model's."""
    if reason := WEAK.get((request.cls.__name__, request.node.originalname)):
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))


class TestChatOllama(ChatModelIntegrationTests):
    """The native route. LangChain cannot force a call there, so a model without tools is asked for none."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        """The class under test."""
        return ChatOllama

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """Short answers, always the same."""
        return {"model": MODEL, "base_url": BASE_URL, "temperature": 0, "seed": 1, "num_predict": 512}

    @property
    def has_tool_calling(self) -> bool:
        """Not on this route with this model."""
        return False

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        """A schema that the server enforces."""
        return {"method": "json_schema"}

    @property
    def supports_json_mode(self) -> bool:
        """Any JSON: which keys it has is up to the model, and a small one forgets them."""
        return False


class TestChatOpenAI(ChatModelIntegrationTests):
    """OpenAI's route, where calls can be forced."""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        """The class under test."""
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        """Always the same answers; LangChain asks for usage in streams only of OpenAI itself unless it is told to."""
        return {
            "model": MODEL,
            "base_url": f"{BASE_URL}/v1",
            "seed": 1,
            "max_tokens": 512,
            "temperature": 0,
            "stream_usage": True,
        }

    @property
    def structured_output_kwargs(self) -> dict[str, Any]:
        """A schema that the server enforces."""
        return {"method": "json_schema"}


class TestOllamaEmbeddings(EmbeddingsIntegrationTests):
    """POST /api/embed."""

    @property
    def embeddings_class(self) -> type[Embeddings]:
        """The class under test."""
        return OllamaEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        """Which model, where."""
        return {"model": EMBED_MODEL, "base_url": BASE_URL}


class TestOpenAIEmbeddings(EmbeddingsIntegrationTests):
    """POST /v1/embeddings, with texts: the token ids that LangChain sends by default are of OpenAI's vocabulary."""

    @property
    def embeddings_class(self) -> type[Embeddings]:
        """The class under test."""
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        """Which model, where."""
        return {"model": EMBED_MODEL, "base_url": f"{BASE_URL}/v1", "check_embedding_ctx_length": False}
