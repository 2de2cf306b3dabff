"""Names: what a user may type, what it means, and that nothing else ever reaches a disk or a network."""

import functools
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import app

FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=150)
CATALOGUE = """
[models."tiny:1m"]
package = "tiny_package"
file = "tiny.gguf"
aliases = ["tiny", "Tiny-Alias:mini"]

[models."big:70b"]
repo = "org/Big-70B"
revision = "v1"
"""


@pytest.fixture
def catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A catalogue of two models."""
    (tmp_path / "models.toml").write_text(CATALOGUE, encoding="utf-8")
    yield from fresh_catalogue(tmp_path / "models.toml", monkeypatch)


def fresh_catalogue(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A catalogue that is read from this file."""
    monkeypatch.setattr(app, "MODELS_FILE", path)
    monkeypatch.setattr(app, "catalogue", functools.cache(app.catalogue.__wrapped__))
    yield


# -- Hub names ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "name", "repo", "revision", "tag"),
    [
        ("gpt2", "gpt2", "gpt2", None, None),
        ("org/repo", "org/repo", "org/repo", None, None),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None, None),
        ("org/repo@main", "org/repo", "org/repo", None, None),
        ("org/repo@refs/pr/1", "org/repo@refs/pr/1", "org/repo", "refs/pr/1", None),
        ("gpt2@" + "0a" * 20, None, "gpt2", "0a" * 20, None),
        ("org/repo:Q4_K_M", "org/repo:Q4_K_M", "org/repo", None, "Q4_K_M"),
        ("org/repo:Q4_K_M@v2", "org/repo:Q4_K_M@v2", "org/repo", "v2", "Q4_K_M"),
        ("hf.co/org/repo:Q4_K_M", "org/repo:Q4_K_M", "org/repo", None, "Q4_K_M"),
        ("huggingface.co/org/repo", "org/repo", "org/repo", None, None),
        ("https://huggingface.co/org/repo", "org/repo", "org/repo", None, None),
        ("https://hf.co/org/repo@main", "org/repo", "org/repo", None, None),
        ("hf.co/gpt2", "gpt2", "gpt2", None, None),
        ("org/repo:latest", "org/repo", "org/repo", None, None),
        ("org/repo:latest@v2", "org/repo@v2", "org/repo", "v2", None),
        ("_private/x", "_private/x", "_private/x", None, None),
        ("org/repo:" + "x" * 80, None, "org/repo", None, "x" * 80),
        ("org/_x", "org/_x", "org/_x", None, None),
        ("o/" + "x" * 96, None, "o/" + "x" * 96, None, None),
    ],
)  # fmt: skip
def test_hub_names(raw: str, name: str | None, repo: str, revision: str | None, tag: str | None) -> None:
    """Repository, revision and file tag, and one name for all spellings of the same thing."""
    source = app.resolve_name(raw)
    assert (source.name, source.repo, source.revision, source.file_tag) == (name or raw, repo, revision, tag)
    assert source.entry == app.CatalogueEntry()
    assert app.resolve_name(source.name) == source, "a resolved name means the same when it is read again"


def test_revision_beside_the_name() -> None:
    """`POST /pull` may give it in a field of its own; two that differ are a mistake."""
    assert app.resolve_name("org/repo", "v2").revision == "v2"
    assert app.resolve_name("org/repo@v1") == app.resolve_name("org/repo@v1", "v1")
    with pytest.raises(app.BadRequest, match="'revision'"):
        app.resolve_name("org/repo@v1", "v2")


@pytest.mark.parametrize(
    "raw",
    [
        "", " ", "/", ".", "..", "-", "@", ":", "@main", ":Q4", "org/", "/repo", "org//repo", "a/b/c", "org/repo@",
        "org/repo:", "org/repo@main@main", "org/repo:Q4:Q4", "org/repo:Q4/x",
        "../etc/passwd", "..", "a/..", "../a", "org/..", "org/repo@../..", "org/repo@a/../../b", "org/re..po",
        "/etc/passwd", "./repo", "~/repo", "C:\\models", "org\\repo", "file:///etc/passwd", "org/repo@/etc",
        "org/repo\0", "\0", "org/re\0po", "org/repo\n", "\norg/repo", "org/re\npo", "org/repo\r", " org/repo",
        "org/repo ", "org/re po", "org/repo\t", "оrg/repo", "org/rеpo", "org/repo\u202e", "\u202eorg/repo",
        "org/re\u202epo",
        "org/ｒepo", "org/repo\u200b", "org/repo٣", "x" * 300, "org/" + "x" * 97, "x" * 97 + "/repo", "a/" * 200,
        "org/repo@" + "x" * 201, "org/repo:" + "x" * 81,
        "http://example.org/org/repo", "https://example.org/repo", "ftp://hf.co/org/repo", "https://hf.co",
        "https://user@hf.co/org/repo", "https://hf.co/org/repo/resolve/main/x", "https://hf.co/org/repo?x=1",
        "https://hf.co.example.org/org/repo", "//hf.co/org/repo", "hf.co/", "hf.co/a/b/c",
        "org/repo--x", "org--x/repo", "org/repo.git", "org/repo.", "org/repo-", "-org/repo", ".org/repo", "org/-repo",
        "org/.repo", "$(id)", "`id`", "org/repo;id", "org/repo|id", "%2e%2e/x", "org/%00", "org/repo#x", "*", "org/*",
        "'", '"', "<b>", "{model}", "\U0001f600", "org/repo\ud800",
    ],
    ids=lambda raw: ascii(raw)[:30],
)  # fmt: skip
def test_invalid_names(raw: str) -> None:
    """Nothing that could leave the Hub's grammar: paths, URLs of others, control and look-alike characters."""
    with pytest.raises(app.InvalidModelName) as raised:
        app.resolve_name(raw)
    assert raised.value.status == 400
    with pytest.raises(app.InvalidModelName):
        app.find_model(raw)


def test_unknown_short_name() -> None:
    """`name:tag` is no Hub name: the catalogue is all that could have known it."""
    with pytest.raises(app.NotFound, match=r"nosuchmodel:7b not found.*org/repo"):
        app.resolve_name("nosuchmodel:7b")


@pytest.mark.parametrize("raw", ["org-/repo", "org./repo", "org/repo-@main", "org/repo.git@main", "org/repo.:Q4_K_M"])
def test_names_that_the_hub_refuses(raw: str) -> None:
    """The end of each part counts, not only the end of the whole name."""
    with pytest.raises(app.InvalidModelName):
        app.resolve_name(raw)


@pytest.mark.parametrize(
    "raw", ["smollm2:135m\n", " smollm2:135m", "smollm2:135m\u2003", "deepsee\u212a-r1:7b", "smollm2:135m:latest"]
)
def test_catalogue_names_are_as_strict_as_hub_names(raw: str) -> None:
    """No line break, no blank of any script, no look-alike (\u212a is the Kelvin sign), no second tag."""
    with pytest.raises(app.InvalidModelName):
        app.resolve_name(raw)


near_names = st.lists(
    st.sampled_from(
        ["org", "repo", "/", ":", "@", "..", "-", "--", ".", "_", "~", "\\", "hf.co/", "https://", "\0", "\n", " ",
         "%2e", "Q4_K_M", "latest", "main", "smollm2", "135m", "\u202e", "о", "é", "x" * 50, ".git", "K", "\u212a"]
    ),
    max_size=8,
).map("".join)  # fmt: skip


@FINE
@given(near_names | st.text(max_size=40))
@example("\ud800")
def test_any_text_is_a_source_or_refused(raw: str) -> None:
    """Never another exception, and a source only of the allowed characters, that the same name leads to again."""
    try:
        source = app.resolve_name(raw)
    except (app.InvalidModelName, app.NotFound):
        return
    assert source.name.isascii() and source.name.isprintable()
    assert ".." not in source.name and "\\" not in source.name and " " not in source.name
    if source.repo is not None:
        assert source.repo.count("/") <= 1
    assert app.resolve_name(source.name) == source


@FINE
@given(near_names | st.text(max_size=40))
def test_finding_any_text(raw: str) -> None:
    """Looking a model up has the same three ends."""
    with suppress(app.InvalidModelName, app.NotFound):
        assert isinstance(app.find_model(raw), app.ModelMeta)


parts = st.text("aZ9_.-", min_size=1, max_size=6)


@FINE
@given(parts, parts)
@example("a-", "b")
def test_every_source_is_a_name_for_the_hub(owner: str, name: str) -> None:
    """Whatever passes here also passes the check of the Hub's own client."""
    for raw in (name, f"{owner}/{name}", f"{owner}/{name}@main", f"{owner}/{name}:Q8_0"):
        try:
            repo = app.resolve_name(raw).repo
        except (app.InvalidModelName, app.NotFound):
            continue
        if repo is not None:
            try:
                validate_repo_id(repo)
            except HFValidationError as error:
                pytest.fail(str(error))


# -- the catalogue ------------------------------------------------------------


@pytest.mark.usefixtures("catalogue")
@pytest.mark.parametrize(
    "raw", ["tiny:1m", "TINY:1M", "tiny", "Tiny", "tiny:latest", "TINY:LATEST", "tiny-alias:mini", "TINY-ALIAS:MINI"]
)
def test_catalogue_names(raw: str) -> None:
    """The name, its aliases and the default tag, in any case, are one model."""
    source = app.resolve_name(raw)
    assert (source.name, source.repo, source.file_tag) == ("tiny:1m", None, None)
    assert (source.entry.package, source.entry.file) == ("tiny_package", "tiny.gguf")


@pytest.mark.usefixtures("catalogue")
def test_catalogue_entry_with_a_repository() -> None:
    """A pinned revision holds unless the caller asks for another."""
    assert app.resolve_name("big:70b") == app.ModelSource(
        "big:70b", "org/Big-70B", "v1", entry=app.CatalogueEntry(repo="org/Big-70B", revision="v1")
    )
    assert app.resolve_name("big:70b", "v2").revision == "v2"


@pytest.mark.usefixtures("catalogue")
@pytest.mark.parametrize("raw", ["tiny:2m", "tiny:", "big:7b", "big:70b:x"])
def test_names_that_the_catalogue_lacks(raw: str) -> None:
    """A wrong tag is nobody's."""
    with pytest.raises((app.NotFound, app.InvalidModelName)):
        app.resolve_name(raw)


@pytest.mark.usefixtures("catalogue")
@pytest.mark.parametrize("raw", ["big", "big:latest"])
def test_bare_names_that_the_catalogue_lacks(raw: str) -> None:
    """`big` has no default tag here, so it is a Hub name as `gpt2` is."""
    assert app.resolve_name(raw) == app.ModelSource("big", "big")


def test_no_catalogue_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """app.py alone knows the names of the Hub."""
    next(fresh_catalogue(tmp_path / "missing.toml", monkeypatch))
    assert app.resolve_name("org/repo").repo == "org/repo"
    assert app.resolve_name("gpt2").repo == "gpt2"
    with pytest.raises(app.NotFound):
        app.resolve_name("smollm2:135m")


@pytest.mark.parametrize(
    "text",
    [
        "models = [",
        "models = 5",
        '[models."a"]\nrepo = 5',
        '[models."a"]\nrepos = "org/x"',
        '[models]\na = "org/x"',
    ],
)
def test_broken_catalogue_is_said(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error in the file is a clear error of ours, not an internal one."""
    (tmp_path / "models.toml").write_text(text, encoding="utf-8")
    next(fresh_catalogue(tmp_path / "models.toml", monkeypatch))
    with pytest.raises(app.Unavailable, match=r"catalogue models\.toml .*cannot be read"):
        app.resolve_name("gpt2")


def test_unreadable_catalogue_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for a file that is no text."""
    (tmp_path / "models.toml").write_bytes(b'[models."\xff"]')
    next(fresh_catalogue(tmp_path / "models.toml", monkeypatch))
    with pytest.raises(app.Unavailable, match="catalogue"):
        app.resolve_name("gpt2")


def test_catalogue_is_read_when_first_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, not at import and not for every name."""
    file = tmp_path / "models.toml"
    next(fresh_catalogue(file, monkeypatch))
    file.write_text(CATALOGUE, encoding="utf-8")
    assert app.resolve_name("tiny").name == "tiny:1m"
    file.unlink()
    assert app.resolve_name("tiny").name == "tiny:1m"


def own_catalogue() -> dict[str, app.CatalogueEntry]:
    """The entries of the project's models.toml."""
    return dict(app.catalogue.__wrapped__().values())


def test_own_catalogue_is_sound() -> None:
    """models.toml: some forty names, each with one source, and every name and alias leads to its own entry."""
    entries = own_catalogue()
    assert len(entries) >= 40
    for name, entry in entries.items():
        assert [entry.repo, entry.package, bool(entry.parts) or None].count(None) == 2, name
        assert entry.repo is None or app.HUB_NAME.fullmatch(entry.repo), name
        assert entry.repo is not None or (entry.pip and entry.license and (entry.file or entry.folder)), name
        assert entry.file is None or entry.sha256, name
        assert entry.kind in ("", "embedding"), name
        for spelling in (name, name.upper(), *entry.aliases):
            assert app.resolve_name(spelling).name == name


def test_own_aliases_are_unique() -> None:
    """No alias is claimed twice, and none hides a name."""
    entries = own_catalogue()
    aliases = [alias.lower() for entry in entries.values() for alias in entry.aliases]
    assert len(aliases) == len(set(aliases))
    assert set(aliases).isdisjoint(name.lower() for name in entries)


@pytest.mark.parametrize(
    ("raw", "name", "repo"),
    [
        ("smollm2:135m", "smollm2:135m", None),
        ("gemma3:270m", "gemma3:270m", None),
        ("all-minilm", "all-minilm", None),
        ("all-minilm:latest", "all-minilm", None),
        ("llama3.1", "llama3.1:8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("llama3.1:latest", "llama3.1:8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("LLAMA3.1:8B", "llama3.1:8b", "meta-llama/Llama-3.1-8B-Instruct"),
        ("qwen3:0.6b", "qwen3:0.6b", "Qwen/Qwen3-0.6B"),
    ],
)
def test_well_known_names(raw: str, name: str, repo: str | None) -> None:
    """The names of the documentation."""
    source = app.resolve_name(raw)
    assert (source.name, source.repo) == (name, repo)


# -- models on disk -----------------------------------------------------------


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> dict[str, app.ModelMeta]:
    """Three models that were pulled."""
    names = ("smollm2:135m", "org/Repo", "org/repo:Q4_K_M")
    metas = {name: app.ModelMeta(name, "test", "/nowhere") for name in names}
    monkeypatch.setattr(app, "model_meta", metas)
    return metas


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("smollm2:135m", "smollm2:135m"),
        ("SmolLM2:135M", "smollm2:135m"),
        ("org/Repo", "org/Repo"),
        ("ORG/REPO", "org/Repo"),
        ("hf.co/org/repo", "org/Repo"),
        ("org/repo:q4_k_m", "org/repo:Q4_K_M"),
        ("org/repo:latest", "org/Repo"),
    ],
)
def test_find_model(raw: str, name: str, on_disk: dict[str, app.ModelMeta]) -> None:
    """Every spelling finds the model, in any case."""
    assert app.find_model(raw) is on_disk[name]


ADAPTERS = {"lab/tuned": "org/Repo", "lab/short": "smollm2:135m", "lab/alone": "org/gone"}


@pytest.fixture
def with_adapters(on_disk: dict[str, app.ModelMeta]) -> dict[str, app.ModelMeta]:
    """LoRA adapters beside them; the base of one is not on disk."""
    on_disk |= {name: app.ModelMeta(name, "test", "/nowhere", adapter_of=base) for name, base in ADAPTERS.items()}
    return on_disk


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("lab/tuned", "lab/tuned"),
        ("LAB/Tuned", "lab/tuned"),
        ("org/Repo:tuned", "lab/tuned"),
        ("ORG/repo:tuned", "lab/tuned"),
        ("org/Repo:lab/tuned", "lab/tuned"),
        ("smollm2:135m:short", "lab/short"),
        ("smollm2:135m:lab/short", "lab/short"),
        ("org/Repo", "org/Repo"),
        ("org/repo:Q4_K_M", "org/repo:Q4_K_M"),
    ],
)
def test_find_adapter(raw: str, name: str, with_adapters: dict[str, app.ModelMeta]) -> None:
    """By its own name, or behind its base; names of models mean what they mean without adapters."""
    found = app.find_model(raw)
    assert found is with_adapters[name]
    assert app.base_of(found).name == ADAPTERS.get(name, name)


@pytest.mark.usefixtures("with_adapters")
@pytest.mark.parametrize("raw", ["org/Repo:short", "org/Repo:lab", "lab/tuned:org", "smollm2:135m:tuned"])
def test_find_no_adapter(raw: str) -> None:
    """An adapter of another base, or half a name, is nothing."""
    with pytest.raises((app.NotFound, app.InvalidModelName)):
        app.find_model(raw)


def test_an_adapter_whose_base_is_not_on_disk(with_adapters: dict[str, app.ModelMeta]) -> None:
    """The adapter is found; the 404 names the base."""
    with pytest.raises(app.NotFound, match=r"^Model org/gone not found.*Use /pull"):
        app.base_of(with_adapters["lab/alone"])


@pytest.mark.usefixtures("on_disk")
@pytest.mark.parametrize("raw", ["gpt2", "org/repo@v2", "org/repo:Q8_0", "org/other", "gemma3:270m"])
def test_find_missing_model(raw: str) -> None:
    """404 with the name as it was typed, and what to do; another revision or file is another model."""
    with pytest.raises(app.NotFound, match=r"not found.*Use /pull to download") as raised:
        app.find_model(raw)
    assert f"Model {raw} " in str(raised.value)
    assert raised.value.status == 404


def test_a_hub_id_may_have_an_entry_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """`[models."Org/Repo".vllm]` needs no `repo`: the name says it, and a revision may be asked for."""
    entry = app.CatalogueEntry(vllm={"max_model_len": 512})
    monkeypatch.setattr(app, "catalogue", lambda: {"org/repo": ("Org/Repo", entry)})
    source = app.resolve_name("org/repo", "v1")
    assert (source.name, source.repo, source.revision) == ("Org/Repo", "Org/Repo", "v1")
    assert source.entry.vllm == {"max_model_len": 512}
