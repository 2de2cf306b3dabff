"""What every client is told: where the server is and which models it has (scripts/test-clients.sh sets both up)."""

import os
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
BASE_URL = os.environ.get("BASE_URL", "").rstrip("/")

for _name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
    os.environ[_name] = "any"  # the libraries want one, the server does not
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for a table when imported
os.environ["LANGSMITH_TRACING"] = "false"


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to run without a server."""
    if not BASE_URL and config.inipath and config.inipath.parent == HERE:
        raise pytest.UsageError("BASE_URL is not set: use scripts/test-clients.sh, or name a running server")


@pytest.fixture(scope="session")
def base_url() -> str:
    """The address of the server."""
    return BASE_URL


@pytest.fixture(scope="session")
def model() -> str:
    """A model that chats."""
    return os.environ.get("MODEL", "smollm2:135m")


@pytest.fixture(scope="session")
def embed_model() -> str:
    """A model that embeds."""
    return os.environ.get("EMBED_MODEL", "all-minilm")
