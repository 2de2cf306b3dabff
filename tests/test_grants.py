"""What must be asked for by name: pickled weights, a repository's own code, and files of the operator's."""

import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tinymodels
from harness import Server
from hubstub import HubStub


@pytest.fixture(scope="module")
def stub() -> Iterator[HubStub]:
    """A Hub of this file's own."""
    with HubStub() as running:
        yield running


@pytest.fixture(scope="module")
def granting(stub: HubStub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with real engines and an empty cache."""
    folder = tmp_path_factory.mktemp("grants")
    with Server(folder, HF_ENDPOINT=stub.url, HF_HOME=str(folder / "hub"), ENGINE_PYTHON_VLLM="") as server:
        yield server


class Canary:
    """Unpickled by a careless loader, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "it ran")


# -- pickle -------------------------------------------------------------------


def test_pickled_weights_are_served_when_they_are_granted(granting: Server, stub: HubStub) -> None:
    """Refused and not asked for without the grant; with it transformers answers, and says that it is a pickle."""
    stub.add("grant/pickle", tinymodels.tiny_pickle_only())
    refused = granting.pull("grant/pickle")
    assert (refused["status"], refused["error_kind"]) == ("failed", "unsafe_format")
    assert "allow_pickle" in refused["error"]
    assert stub.asked("/grant/pickle/resolve/*") == []
    assert granting.pull("grant/pickle", allow_pickle=True)["status"] == "succeeded"
    reply = granting.client.post(
        "/chat", json={"model": "grant/pickle", "prompt": "a", "max_tokens": 2, "stream": False}
    )
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-backend"] == "transformers"
    model = granting.client.get("/models/grant/pickle").json()
    assert (model["format"], model["allow_pickle"]) == ("pickle", True)


def test_a_granted_pickle_still_runs_no_code(granting: Server, stub: HubStub, tmp_path: Path) -> None:
    """`weights_only` refuses what is not a tensor: the load fails, and nothing ran."""
    folder = tmp_path / "model"
    shutil.copytree(tinymodels.tiny_pickle_only(), folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Canary(tmp_path / "canary")}))
    stub.add("grant/canary", folder)
    assert granting.pull("grant/canary", allow_pickle=True)["status"] == "succeeded"
    reply = granting.client.post("/chat", json={"model": "grant/canary", "prompt": "a", "stream": False})
    assert reply.status_code >= 400, reply.text
    assert not (tmp_path / "canary").exists()


def test_safetensors_win_over_a_granted_pickle(granting: Server, stub: HubStub) -> None:
    """Where both are, the pickle is not even asked for."""
    folder = tinymodels.tiny_gpt2()
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    stub.add("grant/both", {**files, "pytorch_model.bin": b"x"})
    assert granting.pull("grant/both", allow_pickle=True)["status"] == "succeeded"
    assert stub.asked("/grant/both/resolve/*/pytorch_model.bin") == []
    assert granting.client.get("/models/grant/both").json()["format"] == "safetensors"


# -- code ---------------------------------------------------------------------


def test_a_grant_of_code_is_for_one_commit(granting: Server, stub: HubStub) -> None:
    """It is shown with the commit, and a later pull without it takes it back."""
    commit = stub.add("grant/code", tinymodels.tiny_custom_code())
    granting.pull("grant/code", trust_remote_code=True)
    model = granting.client.get("/models/grant/code").json()
    assert (model["trusted_commit"], model["revision"]) == (commit, commit)
    granting.pull("grant/code")
    assert granting.client.get("/models/grant/code").json()["trusted_commit"] is None


# -- the operator's own files -------------------------------------------------


def register(server: Server, **entries: Path) -> None:
    """What `ai-server import` writes."""
    path = server.folder / "state" / "imports.json"
    path.write_text(json.dumps({name.replace("__", "/"): {"path": str(file)} for name, file in entries.items()}))


def test_an_imported_folder_is_used_where_it_lies(granting: Server, tmp_path: Path) -> None:
    """Pulled by its name, answered by transformers, deleted without its files; no route takes a path."""
    folder = tmp_path / "own"
    shutil.copytree(tinymodels.tiny_gpt2(), folder)
    assert granting.client.post("/pull", json={"model": str(folder)}).status_code == 400
    register(granting, my__own=folder)
    job = granting.pull("my/own")
    assert (job["status"], job["local_path"]) == ("succeeded", str(folder)), job
    reply = granting.client.post("/chat", json={"model": "my/own", "prompt": "a", "max_tokens": 2, "stream": False})
    assert (reply.status_code, reply.headers["x-backend"]) == (200, "transformers")
    assert granting.client.delete("/models/my/own").status_code == 200
    assert (folder / "model.safetensors").exists()


def test_an_imported_file_that_is_gone_is_said(granting: Server, tmp_path: Path) -> None:
    """The job names the file and the remedy."""
    register(granting, gone=tmp_path / "gone.gguf")
    job = granting.pull("gone")
    assert (job["status"], job["error_kind"]) == ("failed", "not_found")
    assert "gone.gguf" in job["error"]
    assert "import" in job["error"]


def test_imports_that_cannot_be_read_are_said(granting: Server) -> None:
    """503 with the file's name, and no traceback; other names still work once it is right."""
    path = granting.folder / "state" / "imports.json"
    path.write_text("{")
    reply = granting.client.post("/pull", json={"model": "grant/any"})
    assert reply.status_code == 503, reply.text
    assert "imports.json" in reply.json()["error"]
    path.unlink()
    assert granting.client.post("/pull", json={"model": "nosuch:tag"}).status_code == 404
