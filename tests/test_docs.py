"""The documents say what app.py does: settings, routes, fields, sections, error kinds, names of functions, links."""

import ast
import os
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parent.parent
README = "README.md"
API = "docs/api.md"
CONFIGURATION = "docs/configuration.md"
DECISIONS = "docs/decisions.md"
OPERATIONS = "docs/operations.md"
RELIABILITY = "docs/reliability.md"
STRUCTURE = "docs/structure.md"
GUIDELINES = ".github/instructions/coder-guidelines.instructions.md"
SHORT_GUIDELINES = ".github/copilot-instructions.md"
PAGES = [
    README,
    "CHANGELOG.md",
    GUIDELINES,
    SHORT_GUIDELINES,
    *(f"docs/{page.name}" for page in ROOT.glob("docs/*.md")),
]

TESTS = sorted(ROOT.glob("tests/test_*.py"))

ROUTE = re.compile(r"\b(GET|POST|PUT|PATCH|DELETE) (/[^\s`|]*)")
BANNER = re.compile(r"^# (\d+) ([A-Z][A-Z ]*[A-Z]) #+$", re.MULTILINE)

# What belongs to one machine or one way of working. Written in halves, so that this file does not contain it.
FORBIDDEN = [
    first + second
    for first, second in [
        ("/wo", "rk/"),
        ("/ro", "ot/"),
        ("sha", "red/reference"),
        ("sha", "red/design"),
        ("issues res", "olved"),
        ("issues sh", "ow"),
        ("py", "pi.org"),
        ("python", "hosted.org"),
        ("download.py", "torch.org"),
    ]
]


@cache
def read(name: str) -> str:
    """The text of one of the project's files."""
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def program() -> ast.Module:
    """app.py as a syntax tree."""
    return ast.parse(read("app.py"))


@cache
def server_module() -> ModuleType:
    """app.py imported, with a state directory of its own in case something writes."""
    os.environ.setdefault("STATE_DIR", str(Path(tempfile.gettempdir()) / "ai-server-test-docs"))
    import app

    return app


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next heading of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    found = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{level}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"there is no heading {heading!r}"
    return found[1]


def table_rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row below a head; pipes inside cells are not expected."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and not set(line) <= set("|-: "):
            yield cells


def code_names(text: str) -> set[str]:
    """Everything between backticks."""
    return set(re.findall(r"`([^`\n]+)`", text))


# --- Settings --------------------------------------------------------------------------------------------------------


def settings_in_program(source: ast.Module) -> dict[str, str | None]:
    """Each setting and its default where that is a literal text: os.getenv, os.environ.get, os.environ.setdefault."""
    found: dict[str, str | None] = {}
    for node in ast.walk(source):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "os.getenv",
            "os.environ.get",
            "os.environ.setdefault",
        }:
            name, *rest = [argument.value if isinstance(argument, ast.Constant) else None for argument in node.args]
            assert isinstance(name, str), f"line {node.lineno}: the name of a setting must be a literal"
            default = rest[0] if rest else None
            found.setdefault(name, default if isinstance(default, str) and default else None)
    return found


def settings_in_document(text: str) -> dict[str, str]:
    """Name and default of each row whose first cell is one name in capitals."""
    rows = [row for row in table_rows(text) if re.fullmatch(r"`[A-Z][A-Z0-9_]+`", row[0])]
    names = [row[0].strip("`") for row in rows]
    assert len(names) == len(set(names)), "a setting has two rows"
    return {row[0].strip("`"): row[1].strip("`") for row in rows}


def documented_settings(page: str) -> dict[str, str]:
    """The settings of the server that a page describes, without those of the scripts."""
    text = read(page)
    if page == GUIDELINES:
        return settings_in_document(section(text, "## Environment variables"))
    return settings_in_document(text.replace(section(text, "## Of the scripts"), ""))


def test_settings_are_found_in_a_program() -> None:
    source = 'os.getenv("A", "1"); _read("B", os.getenv("B", ""), int); os.environ.setdefault("C", "x"); getenv("D")'
    assert settings_in_program(ast.parse(source)) == {"A": "1", "B": None, "C": "x"}


@pytest.mark.parametrize("page", [CONFIGURATION, GUIDELINES])
def test_every_setting_is_documented_and_no_other(page: str) -> None:
    assert documented_settings(page).keys() == settings_in_program(program()).keys()


@pytest.mark.parametrize("page", [CONFIGURATION, GUIDELINES])
def test_defaults_are_those_of_the_program(page: str) -> None:
    documented = documented_settings(page)
    literal = {name: default for name, default in settings_in_program(program()).items() if default is not None}
    assert {name: documented[name] for name in literal} == literal


def test_computed_defaults_are_those_of_the_program() -> None:
    assert documented_settings(CONFIGURATION)["MAX_BODY_BYTES"] == str(server_module().MAX_BODY_BYTES)


def test_settings_of_the_scripts_exist() -> None:
    sources = "".join(read(f"scripts/{path.name}") for path in ROOT.glob("scripts/*.sh")) + read("Makefile")
    documented = settings_in_document(section(read(CONFIGURATION), "## Of the scripts"))
    missing = [name for name in documented if not re.search(rf"\b{name}\b", sources)]
    assert documented and not missing


# --- Routes and fields -----------------------------------------------------------------------------------------------


def routes_in_program() -> set[str]:
    """Every `METHOD /path` of the application but HEAD, which is told with the other methods of its path."""
    routes = [route for route in server_module().app.routes if isinstance(route, APIRoute)]
    pairs = {(method, re.sub(r":\w+}", "}", route.path)) for route in routes for method in route.methods}
    return {f"{method} {path}" for method, path in pairs if method != "HEAD"}


def routes_in_table(text: str) -> set[str]:
    """Every route that begins a table row."""
    return {" ".join(found.groups()) for row in table_rows(text) if (found := ROUTE.fullmatch(row[0].strip("`")))}


def test_routes_in_the_readme() -> None:
    assert routes_in_table(read(README)) == routes_in_program()


def test_routes_in_the_module_docstring() -> None:
    assert routes_in_table(server_module().__doc__ or "") == routes_in_program()


def test_routes_in_the_api_page() -> None:
    headings = re.findall(r"^### `(.+)`$", read(API), re.MULTILINE)
    assert set(headings) == routes_in_program()
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("page", PAGES)
def test_routes_named_anywhere_exist(page: str) -> None:
    """A route in backticks may have example values where the application has parameters."""
    patterns = [re.sub(r"{\w+}", "[^ ]+", route) for route in routes_in_program()]
    named = [name for name in code_names(read(page)) if ROUTE.fullmatch(name)]
    assert [name for name in named if not any(re.fullmatch(pattern, name) for pattern in patterns)] == []


def bodies() -> dict[str, type[BaseModel]]:
    """The models of all bodies that endpoints read, by name; parts of bodies are not among them."""
    named = {name: value for name, value in vars(server_module()).items() if name.endswith("Body")}
    found = {name: value for name, value in named.items() if hasattr(value, "model_fields")}
    whole = {name for name, value in found.items() if {"model", "destination"} & value.model_fields.keys()}
    return {name: found[name] for name in sorted(whole | {"SamplingBody", "MessageBody"})}


@pytest.mark.parametrize("name", bodies())
def test_body_fields_are_in_the_api_page(name: str) -> None:
    fields = {field.alias or name for name, field in bodies()[name].model_fields.items()}
    assert fields - code_names(read(API)) == set()


def test_job_fields_are_in_the_api_page_and_the_guidelines() -> None:
    fields = set(server_module().Job.__struct_fields__)
    for page in (API, GUIDELINES):
        assert fields - set(re.findall(r'"(\w+)":', read(page))) == set(), page


def test_model_fields_are_in_the_api_page() -> None:
    assert set(server_module().ModelMeta.__struct_fields__) - code_names(section(read(API), "## Models")) == set()


def test_headers_are_in_the_api_page() -> None:
    headers = {name for name in re.findall(r"\bx-[a-z-]+\b|\bX-[A-Za-z-]+\b", read("app.py")) if name.count("-")}
    documented = {name.lower() for name in re.findall(r"X-[A-Za-z-]+", read(API))}
    assert {
        name.lower() for name in headers if name.lower() not in ("x-ndjson", "x-linked-etag", "x-error-code")
    } == documented


# --- Sections and functions ------------------------------------------------------------------------------------------


def banners_in_table(page: str) -> list[tuple[str, str]]:
    """Number and name of each section that a page lists, in its order."""
    rows = [row for row in table_rows(read(page)) if len(row) > 1 and row[0].isdigit() and row[1].isupper()]
    return [(row[0], row[1]) for row in rows]


@pytest.mark.parametrize("page", [GUIDELINES, STRUCTURE])
def test_sections_are_the_banners(page: str) -> None:
    assert banners_in_table(page) == BANNER.findall(read("app.py"))


@pytest.mark.parametrize("page", PAGES)
def test_functions_named_exist(page: str) -> None:
    """A name with parentheses, in backticks, is a function or method of app.py, or of a library by its full name."""
    known = {node.name for node in ast.walk(program()) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    libraries = {"pipeline"}  # of transformers
    named = {name[:-2] for name in code_names(read(page)) if re.fullmatch(r"\w+\(\)", name)}
    assert named - known - libraries == set()


# --- Errors and dependencies -----------------------------------------------------------------------------------------


def test_error_kinds_and_their_statuses() -> None:
    known = server_module().ERRORS_BY_KIND.items()
    errors = {kind: each for kind, each in known if not kind.startswith("test_")}  # other tests make some
    errors["internal_error"] = server_module().ServerError
    rows = list(table_rows(section(read(OPERATIONS), "## Errors")))
    documented = {found[1]: row[1] for row in rows if (found := re.fullmatch(r"`(\w+)`\*?", row[0]))}
    assert documented == {kind: str(error.status) for kind, error in errors.items()}


def test_every_dependency_has_its_line() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[<>=\[ ;]", requirement, maxsplit=1)[0] for group in groups for requirement in group}
    rows = table_rows(section(read(DECISIONS), "## Dependencies"))
    assert {row[0].strip("`") for row in rows if row[0].startswith("`")} == names


# --- Texts -----------------------------------------------------------------------------------------------------------


def project_files() -> list[str]:
    """Every file that is, or may become, part of the repository."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def forbidden_in(text: str) -> list[str]:
    """The forbidden words that a text contains."""
    return [word for word in FORBIDDEN if word in text]


def test_forbidden_words_are_noticed() -> None:
    for word in FORBIDDEN:
        assert forbidden_in(f"see {word}x") == [word]


def test_no_file_names_one_machine() -> None:
    found = {}
    for name in project_files():
        with (ROOT / name).open("rb") as file:
            words = forbidden_in(file.read().decode(errors="ignore"))
        if words:
            found[name] = words
    assert found == {}


def slug(heading: str) -> str:
    """The anchor that a heading gets: lower case, without punctuation, with hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """The anchors of a page; lines inside code are not headings."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page: str) -> None:
    broken = []
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", read(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    assert broken == []


def test_every_document_is_linked_from_the_readme() -> None:
    assert {page for page in PAGES if page.startswith("docs/") and f"]({page})" not in read(README)} == set()


def test_tests_named_in_the_reliability_page_exist() -> None:
    functions = set(re.findall(r"^def (test_\w+)", "".join(read(f"tests/{path.name}") for path in TESTS), re.MULTILINE))
    named = {name for name in code_names(read(RELIABILITY)) if re.fullmatch(r"test_\w+", name)}
    assert named and named - functions == set()


def test_changelog_begins_with_this_version() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == server_module().__version__
    assert tomllib.loads(read("pyproject.toml"))["project"]["version"] == server_module().__version__


def make_targets(text: str) -> set[str]:
    """What follows `make` in code: whole lines of blocks, with settings before them, and words between backticks."""
    code = "\n".join([*re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL), *code_names(text)])
    return set(re.findall(r"^(?:[A-Z_]+=\S+ )*make ([a-z]+)", code, re.MULTILINE))


def test_make_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    assert make_targets(read(README)) >= {"run", "test", "bench"}
    for page in PAGES:
        assert make_targets(read(page)) <= targets, page


def test_guidelines_apply_to_every_file() -> None:
    assert read(GUIDELINES).startswith("---\napplyTo: '**'\n---\n")
