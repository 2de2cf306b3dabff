"""app.py keeps its shape: its size, the order of its sections, and what each section may not touch."""

import ast
import io
import json
import os
import re
import statistics
import subprocess
import symtable
import sys
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

import app

PATH = Path(app.__file__)
SOURCE = PATH.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
Function = ast.FunctionDef | ast.AsyncFunctionDef
Control = ast.If | ast.For | ast.AsyncFor | ast.While | ast.Try | ast.TryStar | ast.With | ast.AsyncWith | ast.Match

SECTIONS = (
    "ENVIRONMENT",
    "IMPORTS",
    "CONFIGURATION",
    "NEUTRAL TYPES AND ERRORS",
    "STATE",
    "APPLICATION",
    "TEXT",
    "ENGINES",
    "ENGINE PROCESSES",
    "DIALECTS",
    "MODEL STORE",
    "MODEL LIFECYCLE",
    "GENERATION",
    "ENDPOINTS",
    "MAIN",
)
# What the server process must never import: together they cost seconds and hundreds of MiB.
ENGINE_LIBRARIES = ("torch", "transformers", "vllm", "xllamacpp", "huggingface_hub", "numpy")
# The one word of a protocol in an engine: vLLM has defaults for each use, and this is its own name for a server's.
VLLM_DEFAULTS = "UsageContext.OPENAI_API_SERVER"
# The only uses of a name from a section below: function -> the sections it may reach into, and why.
REACHES_DOWN = {
    "lifespan": {"MODEL STORE", "MODEL LIFECYCLE", "DIALECTS"},  # the application's beginning and end, by design
    "_background_pull": {"MODEL LIFECYCLE"},  # `init: true` loads the model that was just pulled
    "remember_alias": {"MODEL LIFECYCLE"},  # the same for a model that is made anew under its name
    "_pull_model": {"MODEL LIFECYCLE"},  # so is one whose files were repaired
    "_described": {"MODEL LIFECYCLE"},  # a model that is in memory in its old form is loaded anew
    "delete_model": {"MODEL LIFECYCLE"},  # a model that is in memory is unloaded before its files go
}


def banners() -> list[tuple[int, int, str]]:
    """Line, number and name of every section."""
    found = []
    for number, line in enumerate(LINES, start=1):
        if match := re.fullmatch(r"# (\d+) ([A-Z ]+) #+", line):
            found.append((number, int(match[1]), match[2]))
    return found


BANNERS = banners()


def section_of(line: int) -> str:
    """The name of the section that holds a line; empty above the first."""
    return next((name for start, _, name in reversed(BANNERS) if start <= line), "")


def functions() -> list[Function]:
    """Every function and method, nested ones as well."""
    return [node for node in ast.walk(TREE) if isinstance(node, Function)]


def length(function: Function) -> int:
    """Lines from `def` to the last one."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def depth(statements: list[ast.stmt], level: int = 0) -> int:
    """How deep control statements are nested; an `elif` is as deep as its `if`, a nested function begins anew."""
    return max((_depth_of(statement, level) for statement in statements), default=level)


def _depth_of(node: ast.stmt, level: int) -> int:
    if not isinstance(node, Control):
        return level
    chained = isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If)
    below = depth(node.orelse, level) if chained and isinstance(node, ast.If) else level
    blocks = [] if chained else [getattr(node, "orelse", [])]
    blocks += [getattr(node, "body", []), getattr(node, "finalbody", [])]
    blocks += [handler.body for handler in getattr(node, "handlers", [])]
    blocks += [case.body for case in getattr(node, "cases", [])]
    return max(below, *(depth(block, level + 1) for block in blocks))


def docstring_lines() -> set[int]:
    """The lines where a docstring begins."""
    holders = (node for node in ast.walk(TREE) if isinstance(node, Function | ast.ClassDef | ast.Module))
    return {node.body[0].lineno for node in holders if ast.get_docstring(node) is not None}


def code_tokens(*sections: str) -> Iterator[tokenize.TokenInfo]:
    """The tokens of sections, without comments and docstrings."""
    docstrings = docstring_lines()
    for token in tokenize.generate_tokens(io.StringIO(SOURCE).readline):
        is_docstring = token.type == tokenize.STRING and token.start[0] in docstrings and token.line.strip()[0] in "\"'"
        if token.type != tokenize.COMMENT and not is_docstring and section_of(token.start[0]) in sections:
            yield token


def defined_names() -> dict[str, int]:
    """Every name that the module itself binds, and the line where it does so first."""
    names: dict[str, int] = {}
    for statement in TREE.body:
        for node in [statement] if isinstance(statement, Function | ast.ClassDef) else ast.walk(statement):
            for name in _bound_by(node):
                names.setdefault(name, statement.lineno)
    return names


def _bound_by(node: ast.AST) -> list[str]:
    if isinstance(node, Function | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [alias.asname or alias.name.partition(".")[0] for alias in node.names]
    return [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []


def scopes(table: symtable.SymbolTable, path: tuple[str, ...] = ()) -> Iterator[tuple[str, symtable.SymbolTable]]:
    """Every function, class and comprehension with the name of the function or class at module level around it."""
    for child in table.get_children():
        whole = (*path, child.get_name())
        yield whole[0], child
        yield from scopes(child, whole)


def downward_uses() -> set[tuple[str, str]]:
    """Where code uses a name from a section below its own: (function or class, the section it reaches into)."""
    order = {name: index for index, name in enumerate(SECTIONS)}
    defined = defined_names()
    found = set()
    for owner, table in scopes(symtable.symtable(SOURCE, "app.py", "exec")):
        here = order[section_of(table.get_lineno())]
        for symbol in table.get_symbols():
            if symbol.is_global() and symbol.get_name() in defined:
                there = section_of(defined[symbol.get_name()])
                if there and order[there] > here:
                    found.add((owner, there))
    return found


def run_python(code: str, folder: Path) -> str:
    """The output of a fresh process that may import app, with state of its own."""
    environment = {**os.environ, "STATE_DIR": str(folder / "state"), "LOG_FILE": str(folder / "app.log")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=PATH.parent, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_size_of_the_file() -> None:
    """One file with four protocols on every engine (decision 2); near its limit the run says: delete first."""
    if len(LINES) > 8600:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(f"app.py has {len(LINES)} of 8,700 lines: delete before you add", stacklevel=1)
    assert len(LINES) <= 8700


def test_no_long_function() -> None:
    """No function has more than 60 lines."""
    assert {f"{each.name}:{each.lineno}": length(each) for each in functions() if length(each) > 60} == {}


def test_median_function() -> None:
    """Half of all functions have at most 8 lines, docstring included."""
    assert len(functions()) > 100
    assert statistics.median(length(each) for each in functions()) <= 8


def test_nesting() -> None:
    """Control statements are nested three deep at most."""
    too_deep = {f"{each.name}:{each.lineno}": depth(each.body) for each in functions() if depth(each.body) > 3}
    assert too_deep == {}
    assert depth(TREE.body) <= 3


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1", 0),
        ("if a:\n x\nelif b:\n y\nelif c:\n z", 1),
        ("if a:\n x\nelse:\n if b:\n  y\n z", 2),
        ("for a in b:\n with c:\n  try:\n   pass\n  finally:\n   while d:\n    e", 4),
        ("match a:\n case 1:\n  if b:\n   c", 2),
    ],
)
def test_depth_counts_right(code: str, expected: int) -> None:
    """The measure of `test_nesting` itself."""
    assert depth(ast.parse(code).body) == expected


def test_sections_stand_in_order() -> None:
    """The fifteen banners, each of three lines, in the order that the module's docstring announces."""
    assert [(number, name) for _, number, name in BANNERS] == list(enumerate(SECTIONS, start=1))
    for line, _, _ in BANNERS:
        assert LINES[line - 2] == LINES[line] == "#" * 79
        assert len(LINES[line - 1]) == 79
    announced = re.findall(r"(\d+) ([A-Z][A-Z ]+[A-Z])", ast.get_docstring(TREE) or "")
    assert [name for _, name in announced] == list(SECTIONS)


def test_every_section_says_what_it_may_not_do() -> None:
    """Below each banner a comment says what belongs there and what does not."""
    for line, _, name in BANNERS:
        comment = []
        for text in LINES[line + 1 :]:
            if not text.startswith("#"):
                break
            comment.append(text)
        assert comment, name
        assert name == "IMPORTS" or "May not:" in " ".join(comment), name


def test_no_global_statement() -> None:
    """State is changed by the functions that own it, not through `global`."""
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Global)] == []


def test_no_engine_library_at_module_level() -> None:
    """Engine libraries are imported inside functions only."""
    inside = {id(node) for function in functions() for node in ast.walk(function)}
    imported = set()
    for node in ast.walk(TREE):
        if id(node) not in inside and isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if id(node) not in inside and isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert "msgspec" in imported
    assert imported.isdisjoint(ENGINE_LIBRARIES)


def test_importing_app_imports_no_engine_library(tmp_path: Path) -> None:
    """`import app` in a fresh process leaves torch and its kind out."""
    code = f"import json, sys, app; print(json.dumps([name for name in {ENGINE_LIBRARIES!r} if name in sys.modules]))"
    assert json.loads(run_python(code, tmp_path)) == []


SERVE = f"""
import asyncio, json, sys
import app, uvicorn

async def ask(path):
    sent = []
    async def receive():
        return {{"type": "http.request", "body": b"", "more_body": False}}
    async def send(message):
        sent.append(message)
    scope = {{"type": "http", "asgi": {{"version": "3.0"}}, "http_version": "1.1", "method": "GET", "scheme": "http",
              "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [], "root_path": "",
              "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8005)}}
    await app.app(scope, receive, send)
    return sent[0]["status"]

async def main():
    async with app.app.router.lifespan_context(app.app):
        statuses = [await ask(path) for path in ("/diag", "/models", "/jobs", "/health/ready", "/")]
    print(json.dumps([statuses, [name for name in {ENGINE_LIBRARIES!r} if name in sys.modules]]))

asyncio.run(main())
"""


def test_a_running_server_imports_no_engine_library(tmp_path: Path) -> None:
    """Nor does the whole life of a server: start, diagnosis, lists, stop."""
    statuses, imported = json.loads(run_python(SERVE, tmp_path))
    assert statuses == [200] * 5
    assert imported == []


def test_public_names_have_docstrings() -> None:
    """Every class, and every public function or method of a public class, says in a sentence what it is for."""
    classes = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]
    holders: list[ast.Module | ast.ClassDef] = [TREE, *(each for each in classes if not each.name.startswith("_"))]
    methods = [each for holder in holders for each in holder.body if isinstance(each, Function)]
    named = [*classes, *(each for each in methods if not each.name.startswith("_"))]
    assert len(named) > 100
    assert [f"{each.name}:{each.lineno}" for each in named if ast.get_docstring(each) is None] == []


@pytest.mark.parametrize("section", ["ENGINES", "ENGINE PROCESSES"])
def test_engines_know_no_dialect(section: str) -> None:
    """What runs in a child, and the pipes to it, never name a protocol."""
    tokens = list(code_tokens(section))
    assert len(tokens) > 500
    named = [t.line for t in tokens if re.search("ollama|openai|anthropic", t.string, re.IGNORECASE)]
    assert [line.strip() for line in named if VLLM_DEFAULTS not in line] == []


@pytest.mark.parametrize("section", ["DIALECTS", "GENERATION"])
def test_dialects_and_generation_know_no_engine(section: str) -> None:
    """They name neither an engine's class nor a backend."""
    classes = {cls.__name__ for cls in app.ENGINES.values()} | {"ENGINES"}
    assert app.ENGINES.keys() == app.ENGINE_LIBRARIES.keys()
    backends = {repr(name) for name in app.ENGINES}
    tokens = list(code_tokens(section))
    assert len(tokens) > 500
    named = [t.string for t in tokens if t.string in classes or t.string.replace('"', "'") in backends]
    assert named == []


def test_the_environment_is_read_in_one_place() -> None:
    """`os.environ` and `os.getenv` stand in ENVIRONMENT and CONFIGURATION only."""
    places = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "getenvb", "putenv"}:
            places.add(section_of(node.lineno))
        assert not (isinstance(node, ast.ImportFrom) and node.module == "os"), node
    assert places == {"ENVIRONMENT", "CONFIGURATION"}


def test_sections_use_names_from_above_only() -> None:
    """A reader who goes from top to bottom meets no name before it is defined; the exceptions are listed above."""
    uses = downward_uses()
    allowed = {(owner, section) for owner, sections in REACHES_DOWN.items() for section in sections}
    assert uses - allowed == set()
    assert uses >= {(owner, "MODEL LIFECYCLE") for owner in REACHES_DOWN}, "an exception that nobody needs any more"


def test_docstring_lists_every_route() -> None:
    """The table in the module's docstring is the table of routes."""
    rows = re.findall(r"^\| ([A-Z]+) (/\S*) \|", ast.get_docstring(TREE) or "", re.MULTILINE)
    routes = [route for route in app.app.routes if isinstance(route, APIRoute)]
    served = {(verb, route.path.replace(":path", "")) for route in routes for verb in route.methods - {"HEAD"}}
    assert len(rows) > 10
    assert set(rows) == served
