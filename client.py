"""ai-server's command line: a plain HTTP client of the server, and `serve`, which starts it.

Start it:   ai-server serve [--pull smollm2:135m]       (or: python client.py serve)
Use it:     ai-server plan Qwen/Qwen3-0.6B; ai-server pull Qwen/Qwen3-0.6B; ai-server jobs
Elsewhere:  AI_SERVER_URL=http://box:8005 ai-server jobs

`ai-server --help` lists the commands, docs/cli.md has an example of each.
Sections, in order: ADDRESS · REQUESTS · WORDS · JOBS · PLAN · IMPORTS · COMMANDS · MAIN. A command belongs into
COMMANDS, into its group; what it shows has a section of its own above. `ai-server --help` has to be quick, so what
not every command needs is imported where it is used.
"""

import contextlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

__version__ = "0.1.0"

Json = dict[str, Any]
Quantize = Literal["auto", "4bit", "none"]

FINAL_STATUSES = ("succeeded", "failed", "cancelled")
REPLY_SECONDS = 600.0  # a plan or a pause may wait for the Hub; a reply that takes longer will not come
SILENCE_SECONDS = 60.0  # the server sends a comment every 15 s: a stream as quiet as this has lost its server
RECONNECT_SECONDS, RECONNECT_TRIES = 1.0, 60  # a restart of the server takes less
PIPE_WIDTH = 240  # columns of a table that no terminal limits
GGUF_MAGIC = b"GGUF"
NAME_WORD = r"\w(?:[\w.-]{0,94}\w)?"
NAME = re.compile(rf"(?:{NAME_WORD}/)?{NAME_WORD}(?::\w(?:[\w.-]{{0,78}}\w)?)?", re.ASCII)


class CommandError(Exception):
    """What went wrong and what to do, in words for whoever typed the command."""


class Unreachable(CommandError):
    """No server answers, or its answer broke off."""


###############################################################################
# ADDRESS #####################################################################
###############################################################################
# Where the server is, and where its state is. The environment is read here only.


def server_url() -> str:
    """AI_SERVER_URL, else http://HOST:PORT as the server reads them. Raises CommandError."""
    chosen = os.environ.get("AI_SERVER_URL", "").strip()
    url = chosen if "://" in chosen else f"http://{chosen or _listening_address()}"
    try:
        parts = urllib.parse.urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable or not url.isascii() or " " in url:
        name = "AI_SERVER_URL" if chosen else "HOST and PORT"
        raise CommandError(f"{name}: {url!r} is no address of a server. Use a form such as http://127.0.0.1:8005.")
    return url.rstrip("/")


def _listening_address() -> str:
    host = os.environ.get("HOST", "").strip() or "127.0.0.1"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # every address: this machine's own is one of them
    return f"{f'[{host}]' if ':' in host else host}:{os.environ.get('PORT', '').strip() or '8005'}"


def state_dir() -> Path:
    """The folder of the server's state, found as app.py does it."""
    if chosen := os.environ.get("STATE_DIR"):
        return Path(chosen)
    import platformdirs

    return Path(platformdirs.user_data_dir("ai-server", False))


###############################################################################
# REQUESTS ####################################################################
###############################################################################
# One JSON request, and one stream of events. May not: print.


class Reply(NamedTuple):
    """The server's answer: its status, its body, and the fields of the request that it does not know."""

    status: int
    data: Json
    ignored: str


def call(method: str, path: str, body: Json | None = None) -> Reply:
    """One request. Raises CommandError with the server's own words, or Unreachable."""
    with _opened(method, path, body, REPLY_SECONDS) as response:
        with _breaks_are_unreachable(server_url()):
            text = response.read()
        return Reply(response.status, _object(text, response.status), response.headers.get("X-Ignored-Parameters", ""))


def events(path: str) -> Iterator[tuple[str, Json]]:
    """Server-sent events by name, until the server closes the stream. Raises CommandError, or Unreachable."""
    with _opened("GET", path, None, SILENCE_SECONDS) as response:
        name = ""
        for line in _lines(response):
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, _object(value.encode(), response.status)


def _lines(response: http.client.HTTPResponse) -> Iterator[str]:
    with _breaks_are_unreachable(server_url()):
        for line in response:
            yield line.decode("utf-8", "replace").rstrip("\r\n")


@contextlib.contextmanager
def _opened(method: str, path: str, body: Json | None, seconds: float) -> Iterator[http.client.HTTPResponse]:
    url = server_url()
    request = urllib.request.Request(url + path, method=method)
    if body is not None:
        request.data = json.dumps(body).encode()
        request.add_header("Content-Type", "application/json")
    with _breaks_are_unreachable(url):
        response = _opener(url).open(request, timeout=seconds)
    with response:
        yield response


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Proxies of the environment, but none on the way to this machine."""
    here = urllib.parse.urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    return urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if here else []))


@contextlib.contextmanager
def _breaks_are_unreachable(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        with error:
            raise CommandError(_refusal(error)) from error
    except (OSError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        raise Unreachable(
            f"No server answers at {url} ({why}). Start it with `ai-server serve`, "
            "or say where it runs: AI_SERVER_URL=http://HOST:PORT."
        ) from error


def _refusal(error: urllib.error.HTTPError) -> str:
    """The server's own words; what is no server of ours says none."""
    with contextlib.suppress(ValueError, OSError, http.client.HTTPException):
        body = json.loads(error.read())
        if isinstance(body, dict) and isinstance(body.get("error"), str):
            return str(body["error"])
    return f"{error.url} answered {error.code} {error.reason}. Is this an ai-server, and as new as this command line?"


def _object(text: bytes, status: int) -> Json:
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise CommandError(f"{server_url()} answered {status} with something else than JSON. Is this an ai-server?")
    return data


def job_path(job_id: str, verb: str = "") -> str:
    """The path of a job, or of something to do with it."""
    return f"/jobs/{urllib.parse.quote(job_id, safe='', errors='replace')}{verb}"


def model_path(name: str, verb: str = "") -> str:
    """The path of a model, or of something to do with it."""
    return f"/models/{urllib.parse.quote(name, safe='/:@', errors='replace')}{verb}"


###############################################################################
# WORDS #######################################################################
###############################################################################
# Values as people read them, and the two consoles.


def clean(text: object) -> str:
    """Text without what could steer a terminal: names and messages come from elsewhere."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in str(text))


def cell(value: object) -> str:
    """A value in a table; what is not known is a dash."""
    words = {None: "-", "": "-", True: "yes", False: "no"}
    return words[value] if isinstance(value, bool | None) or value == "" else clean(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def size(value: Any) -> str:
    """Bytes in steps of a thousand, as disks and downloads are measured."""
    if not _is_number(value):
        return cell(value)
    unit, number = "B", float(value)
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(number) >= 999.5:
            unit, number = larger, number / 1000
    return f"{number:.0f} {unit}" if unit in ("B", "kB") else f"{number:.3g} {unit}"


def duration(value: Any) -> str:
    """Seconds in the two units that matter."""
    if not _is_number(value):
        return cell(value)
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"


def objects(data: Json, name: str) -> list[Json]:
    """A list of objects, whatever a server of another version has put there."""
    found = data.get(name)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def names(data: Json, name: str) -> list[str]:
    """A list of texts, in the same way."""
    found = data.get(name)
    return [str(item) for item in found] if isinstance(found, list) else []


def part(data: Json, name: str) -> Json:
    """An object inside another one; empty when it is not there."""
    found = data.get(name)
    return found if isinstance(found, dict) else {}


def say(text: str) -> None:
    """A line of the result, on stdout."""
    print(clean(text))


def warn(text: str) -> None:
    """A line about the result, on stderr."""
    print(clean(text), file=sys.stderr)


def show_json(data: Json) -> None:
    """The server's reply as it came, for other programs."""
    print(json.dumps(data, indent=2))


def console(stderr: bool = False) -> "Console":
    """A console that takes nothing in a text for markup; a pipe gets long lines rather than cut ones."""
    from rich.console import Console

    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else PIPE_WIDTH
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


def table(*columns: str, numbers: Iterable[str] = ()) -> "Table":
    """A table without lines; columns of numbers stand to the right, and nothing is cut short."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


###############################################################################
# JOBS ########################################################################
###############################################################################
# Starting a job, watching it to its end, and listing jobs.


def start_job(path: str, body: Json | None = None) -> Json:
    """Ask for a job; says which fields the server did not know."""
    reply = call("POST", path, body)
    _warn_of_ignored(reply)
    if not isinstance(reply.data.get("id"), str):
        raise CommandError(f"{server_url()} answered {reply.status} without a job. Is this an ai-server?")
    return reply.data


def _warn_of_ignored(reply: Reply) -> None:
    if reply.ignored:
        warn(f"The server does not know, and ignores: {reply.ignored}. It may be older than this command line.")


def job_states(job_id: str) -> Iterator[Json]:
    """A job at every change, to its end. A server that goes away is waited for: the job outlives it."""
    failures = 0
    while failures < RECONNECT_TRIES:
        try:
            for name, job in events(job_path(job_id, "/events")):
                failures = 0
                yield job
                if name == "done" or job.get("status") in FINAL_STATUSES:
                    return
        except Unreachable:
            pass  # as when the stream ends early: a server that stops says no more than that
        failures += 1
        if failures == 2:  # not for a moment's break
            warn(f"The server at {server_url()} is gone. Waiting for it; job {job_id} goes on when it runs again.")
        time.sleep(RECONNECT_SECONDS)
    raise CommandError(f"The server did not come back. Job {job_id} goes on when it runs: ai-server serve.")


def trouble(job: Json) -> str:
    """What keeps a job from going on, and how often it has been tried."""
    status, attempts, waiting = job.get("status"), job.get("attempts"), job.get("waiting_for")
    found = []
    if status == "paused":
        found.append(f"paused, go on with `ai-server resume {job.get('id')}`")
    if status == "queued":
        found.append("waits for its turn")
    if _is_number(waiting):
        found.append(f"next try in {duration(waiting)}")
    elif waiting:
        found.append(f"waiting for {waiting}")
    if isinstance(attempts, int) and attempts > 1:
        found.append(f"attempt {attempts}")
    return clean(", ".join(found))


def headline(job: Json) -> str:
    """The model of a job, and the file it is at."""
    file = str(job.get("file") or "").rpartition("/")[2]
    return clean(f"{job.get('model', '')}  {file}".rstrip())


def follow(job: Json) -> Json:
    """Show a job until its end and return it as it is then; Ctrl-C stops the showing only."""
    job_id = job["id"]
    try:
        show = _bar if console(stderr=True).is_interactive else _changes
        with show(job) as shown:
            for job in job_states(job_id):
                shown(job)
    except KeyboardInterrupt:
        warn(f"\nJob {job_id} goes on in the server. See it: ai-server jobs. Stop it: ai-server cancel {job_id}.")
        raise SystemExit(130) from None
    return job


@contextlib.contextmanager
def _changes(job: Json) -> Iterator[Callable[[Json], None]]:
    """For a log: a line for each file and each trouble, not for each byte."""
    last = ""

    def shown(job: Json) -> None:
        nonlocal last
        line = " · ".join(word for word in (headline(job), trouble(job)) if word)
        if line != last and job.get("status") not in FINAL_STATUSES:
            warn(line)
        last = line

    warn(f"Job {job['id']}: {job.get('model', '')}")
    yield shown


@contextlib.contextmanager
def _bar(job: Json) -> Iterator[Callable[[Json], None]]:
    """For a terminal: one line that moves."""
    with _progress() as progress:
        task = progress.add_task(total=None, **_progress_words(job))

        def shown(job: Json) -> None:
            total, done = (
                job.get(name) if _is_number(job.get(name)) else None for name in ("size_bytes", "bytes_done")
            )
            progress.update(task, total=total, completed=done, **_progress_words(job))

        shown(job)
        yield shown


def _progress() -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn

    words = ("bytes", "speed", "eta", "trouble")
    texts = [TextColumn(f"{{task.fields[{word}]}}", markup=False) for word in words]
    return Progress(TextColumn("{task.description}", markup=False), BarColumn(), *texts, console=console(stderr=True))


def _progress_words(job: Json) -> dict[str, Any]:
    speed, eta, total = job.get("speed"), job.get("eta_seconds"), job.get("size_bytes")
    done = size(job.get("bytes_done") or 0)
    return {
        "description": headline(job),
        "bytes": done if total is None else f"{done} of {size(total)}",
        "speed": f"{size(speed)}/s" if _is_number(speed) else "",
        "eta": f"{duration(eta)} left" if _is_number(eta) else "",
        "trouble": trouble(job),
    }


def finish(job: Json, done: str) -> None:
    """Say how a job ended; exit 1 unless it succeeded."""
    if job.get("status") == "succeeded":
        repaired = names(job, "repaired")
        say(f"{job.get('model')} {done}" + (f" Repaired: {', '.join(repaired)}." if repaired else ""))
        return
    if job.get("status") == "cancelled":
        raise CommandError(f"Job {job.get('id')} was cancelled.")
    raise CommandError(str(job.get("error") or f"Job {job.get('id')} failed and does not say why; the log does."))


def jobs_table(jobs: list[Json]) -> "Table":
    """Jobs, one a line."""
    made = table("ID", "MODEL", "STATUS", "DONE", "SIZE", "LEFT", "NOTE", numbers=("DONE", "SIZE", "LEFT"))
    for job in jobs:
        done = [size(job.get("bytes_done")), size(job.get("size_bytes")), duration(job.get("eta_seconds"))]
        note = job.get("error") or trouble(job)
        made.add_row(cell(job.get("id")), cell(job.get("model")), cell(job.get("status")), *done, cell(note))
    return made


def partials_table(partials: list[Json]) -> "Table":
    """What unfinished downloads have left, one file a line."""
    made = table("REPOSITORY", "FILE", "HERE", "CHANGED", "JOB", numbers=("HERE",))
    for each in partials:
        words = [cell(each.get(name)) for name in ("modified_at", "job_id")]
        made.add_row(cell(each.get("repo")), cell(str(each.get("file"))[:16]), size(each.get("bytes")), *words)
    return made


###############################################################################
# PLAN ########################################################################
###############################################################################
# What a pull would do, as the server says it.


def show_plan(plan: Json) -> None:
    """The files, the ways to serve them, and the conclusion."""
    out = console()
    out.print(" ".join(cell(plan.get(name)) for name in ("model", "revision", "license") if plan.get(name)))
    if files := objects(plan, "files"):
        out.print(files_table(files), "", sep="\n")
    if rungs := objects(plan, "rungs"):
        out.print(rungs_table(rungs), *_reasons(rungs), "", sep="\n")
    for name, text in plan_lines(plan):
        out.print(f"{name + ':':<11} {text}")


def _reasons(rungs: list[Json]) -> list[str]:
    return [f"{engine_of(rung)}: {cell(rung['reason'])}" for rung in rungs if rung.get("reason")]


def files_table(files: list[Json]) -> "Table":
    """What would be downloaded, one file a line."""
    made = table("FILE", "SIZE", "HERE", numbers=("SIZE", "HERE"))
    for file in files:
        made.add_row(cell(file.get("name")), size(file.get("size_bytes")), size(file.get("cached_bytes")))
    return made


def rungs_table(rungs: list[Json]) -> "Table":
    """The engines in the order they would be tried; eighty columns hold it, so their reasons stand below."""
    sizes = {"WEIGHTS": "weights", "KV": "kv", "EXTRA": "overhead", "TOTAL": "total", "FREE": "available"}
    made = table("ENGINE", *sizes, "DEVICE", "CONTEXT", "FITS", numbers=(*sizes, "CONTEXT"))
    for rung in rungs:
        numbers = [size(rung.get(f"{name}_bytes")) for name in sizes.values()]
        made.add_row(
            engine_of(rung), *numbers, *(cell(rung.get(name)) for name in ("device", "context_length", "fits"))
        )
    return made


def engine_of(rung: Json) -> str:
    """An engine, with its quantization where there is one."""
    quantization = rung.get("quantization")
    return cell(rung.get("backend")) + (f" {cell(quantization)}" if quantization not in (None, "", "none") else "")


def plan_lines(plan: Json) -> list[tuple[str, str]]:
    """The conclusion, by what it is about; what the server does not say is left out."""
    disk, serves = part(plan, "disk"), part(plan, "serves")
    lines = [
        ("Download", _download(plan)),
        ("Disk", _disk(disk) if disk else ""),
        ("Context", _context(plan)),
        ("Serves", ", ".join(_serving(serves)) or "nothing here serves it"),
        ("Evicts", ", ".join(names(plan, "evicts"))),
        ("Reason", str(plan.get("reason") or "")),
        ("Nearest", str(plan.get("nearest") or "")),
    ]
    return [(name, clean(text)) for name, text in lines if text]


def _download(plan: Json) -> str:
    eta, cached = plan.get("eta_seconds"), plan.get("cached_bytes")
    words = [f"{size(cached)} are here" if cached else "", f"about {duration(eta)}" if _is_number(eta) else ""]
    return ", ".join([size(plan.get("download_bytes")), *filter(None, words)])


def _disk(disk: Json) -> str:
    free, after, reserve = (size(disk.get(f"{name}_bytes")) for name in ("free", "free_after", "reserve"))
    verdict = "does NOT fit" if disk.get("fits") is False else f"{after} free afterwards"
    return f"{free} free, {verdict}, {reserve} are kept back"


def _context(plan: Json) -> str:
    context, per_thousand = plan.get("context_length"), plan.get("kv_bytes_per_1k_tokens")
    words = [f"{context} tokens" if context else "", f"{size(per_thousand)} per 1000 tokens" if per_thousand else ""]
    return ", ".join(filter(None, words))


def _serving(serves: Json) -> Iterator[str]:
    for name, before in (("backend", ""), ("quantization", "quantization "), ("context_length", "context ")):
        if serves.get(name):
            yield f"{before}{serves[name]}"


###############################################################################
# IMPORTS #####################################################################
###############################################################################
# Files of this machine under a name. There is no route for it: whoever can reach the server could read any file by one.


def check_import(path: Path, name: str) -> None:
    """A GGUF file, or a folder that transformers could load, and a name for it. Raises CommandError."""
    if NAME.fullmatch(name) is None or ".." in name or "--" in name:
        raise CommandError(
            f"--name {name!r} is no name of a model. Use letters, digits and . _ -, at most one /, "
            "and a tag after a colon if you like: mine/model:q4."
        )
    try:
        _check_folder(path) if path.is_dir() else _check_gguf(path)
    except OSError as error:
        raise CommandError(f"{error.filename or path} cannot be read: {error.strerror}.") from error


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise CommandError(f"There is no file {path}. Give a GGUF file, or a folder with config.json and safetensors.")
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise CommandError(
            f"{path} is no GGUF file: it does not begin with GGUF. Folders need config.json and safetensors."
        )


def _check_folder(path: Path) -> None:
    config = path / "config.json"
    if not config.is_file():
        raise CommandError(f"{path} has no config.json. Give a folder in the layout of transformers, or a GGUF file.")
    try:
        valid = isinstance(json.loads(config.read_bytes()), dict)
    except ValueError:
        valid = False
    if not valid:
        raise CommandError(f"{config} is not a JSON object. Copy the model's files again.")
    if not any(path.glob("*.safetensors")):
        raise CommandError(f"{path} has no .safetensors file. Convert the weights; pickle files are not imported.")


def remember_import(path: Path, name: str, license_name: str | None) -> Path:
    """Write an import down, whole or not at all; returns the file. Raises CommandError."""
    file = state_dir() / "imports.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _one_at_a_time(file.with_name("imports.lock")):
            entries = _read_imports(file)
            entries[name] = {"path": os.path.abspath(path), **({"license": license_name} if license_name else {})}
            _replace(file, json.dumps(entries, indent=2).encode())
    except OSError as error:
        raise CommandError(f"{file} cannot be written: {error.strerror}. Free the disk or set STATE_DIR.") from error
    return file


def _read_imports(file: Path) -> Json:
    try:
        entries = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise CommandError(f"{file} is not a JSON object. Repair it or move it away; nothing was changed.")
    return entries


@contextlib.contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Two imports at once would forget one of them. Windows has no flock and goes without."""
    with lock.open("a") as held:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX)
        yield


def _replace(file: Path, data: bytes) -> None:
    """The old file or the new one, whatever happens between."""
    new = file.with_name(file.name + ".new")
    new.unlink(missing_ok=True)  # left by one that was killed
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(new, file)
    if os.name != "nt":  # a folder cannot be opened there
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


###############################################################################
# COMMANDS ####################################################################
###############################################################################
# What can be typed; each a few lines.

cli = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Model = Annotated[str, typer.Argument(metavar="NAME", help="A catalogue name, or org/repo[:tag][@revision].")]
JobId = Annotated[str, typer.Argument(metavar="ID", help="A job, as `ai-server jobs` lists it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's reply as JSON.")]
Revision = Annotated[str | None, typer.Option(metavar="R", help="Branch, tag or commit on the Hub.")]
QuantizeTo = Annotated[Quantize | None, typer.Option(help="4-bit weights: by size, always, never.")]
TrustCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Fetch the repository's Python files and run them.")
]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Accept weights in pickle files.")]
MakeRoom = Annotated[bool, typer.Option("--make-room", help="Remove the models that nobody used for longest.")]
Pin = Annotated[bool, typer.Option("--pin", help="Never remove this model to make room.")]
Init = Annotated[bool, typer.Option("--init", help="Load the model when it is here.")]


def _wishes(**wishes: str | int | bool | None) -> Json:
    """Only what was asked for: everything else is the server's to decide."""
    return {name: value for name, value in wishes.items() if value not in (None, False)}


def _print_version(wanted: bool) -> None:
    if wanted:
        say(__version__)
        raise typer.Exit()


@cli.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve Hugging Face models on this machine, and ask a server for what it has.

    AI_SERVER_URL says where the server is, else HOST and PORT: http://127.0.0.1:8005.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


# -- the server ---------------------------------------------------------------


@cli.command()
def serve(
    pull: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Pull a model at the start; may be repeated.")
    ] = None,
) -> None:
    """Run the server until Ctrl-C."""
    try:
        import app
    except ModuleNotFoundError as error:
        raise CommandError(f"The server cannot start: {error}. Install ai-server: pip install .") from error

    sys.argv = ["ai-server", *(word for name in pull or () for word in ("--pull", name))]
    app.main()


# -- models -------------------------------------------------------------------


@cli.command()
def pull(
    name: Model,
    revision: Revision = None,
    quantize: QuantizeTo = None,
    trust_remote_code: TrustCode = False,
    allow_pickle: AllowPickle = False,
    make_room: MakeRoom = False,
    pin: Pin = False,
    init: Init = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Start the job and return.")] = False,
) -> None:
    """Fetch a model.

    The download is a job of the server and goes on, whatever becomes of this command.
    """
    body = _wishes(
        model=name, revision=revision, quantize=quantize, trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle, make_room=make_room, pin=pin, init=init,
    )  # fmt: skip
    job = start_job("/pull", body)
    if no_wait:
        say(job["id"])
    else:
        finish(follow(job), "is on disk.")


@cli.command()
def plan(
    name: Model,
    context: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens that must fit.")] = None,
    revision: Revision = None,
    quantize: QuantizeTo = None,
    trust_remote_code: TrustCode = False,
    allow_pickle: AllowPickle = False,
    make_room: MakeRoom = False,
    pin: Pin = False,
    init: Init = False,
    as_json: AsJson = False,
) -> None:
    """Say what a pull would do, and fetch no weights.

    What would be fetched, whether disk and memory hold it, and which engine would serve it.
    """
    body = _wishes(
        model=name, revision=revision, quantize=quantize, trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle, make_room=make_room, pin=pin, init=init, context_length=context,
    )  # fmt: skip
    reply = call("POST", "/plan", body)
    _warn_of_ignored(reply)
    (show_json if as_json else show_plan)(reply.data)


@cli.command()
def verify(name: Model) -> None:
    """Check a model's files, and repair them.

    A file that does not fit its checksum is fetched again, and no other.
    """
    job = start_job(model_path(name, "/verify"))
    finish(follow(job), "is as it should be.")


@cli.command("import")
def import_files(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A GGUF file, or a folder with config.json.")],
    name: Annotated[str, typer.Option(metavar="NAME", help="What to call it: mine/model[:tag].")],
    license_name: Annotated[str | None, typer.Option("--license", metavar="L", help="Its licence.")] = None,
    no_pull: Annotated[bool, typer.Option("--no-pull", help="Only write it down.")] = False,
) -> None:
    """Give files of this machine a name.

    The server uses them where they are. It must run on this machine with the same STATE_DIR.
    """
    check_import(path, name)
    file = remember_import(path, name, license_name)
    say(f"{name} is {os.path.abspath(path)}, written down in {file}.")
    if no_pull:
        return
    try:
        job = start_job("/pull", {"model": name})
    except Unreachable:
        say(f"No server answers at {server_url()}. When it runs: ai-server pull {name}")
        return
    finish(follow(job), "is on disk.")


# -- jobs ---------------------------------------------------------------------


@cli.command("jobs")
def list_jobs(as_json: AsJson = False) -> None:
    """List the jobs, newest first."""
    data = call("GET", "/jobs").data
    found = objects(data, "jobs")
    if as_json:
        show_json(data)
    elif found:
        console().print(jobs_table(found))
    else:
        say("No jobs.")


@cli.command()
def pause(job_id: JobId) -> None:
    """Let a job rest; what it has fetched stays."""
    _show_status(call("POST", job_path(job_id, "/pause")).data)


@cli.command()
def resume(job_id: JobId) -> None:
    """Let a paused job go on."""
    _show_status(call("POST", job_path(job_id, "/resume")).data)


@cli.command()
def cancel(job_id: JobId) -> None:
    """End a job."""
    _show_status(call("DELETE", job_path(job_id)).data)


def _show_status(job: Json) -> None:
    say(f"{job.get('id')} ({job.get('model')}) is {job.get('status')}.")


@cli.command()
def partials(
    clean_up: Annotated[bool, typer.Option("--clean", help="Remove what no job needs.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what unfinished downloads left behind."""
    data = call("DELETE" if clean_up else "GET", "/partials").data
    found = objects(data, "partials")
    if as_json:
        show_json(data)
    elif clean_up:
        say(f"Removed {cell(data.get('removed'))}, {size(data.get('bytes'))}.")
    elif found:
        console().print(partials_table(found))
        say(f"{size(data.get('bytes'))} in all. Remove what no job needs: ai-server partials --clean")
    else:
        say("No partial downloads.")


###############################################################################
# MAIN ########################################################################
###############################################################################


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run one command; exits with 0, 1 for an error, 2 for a command that makes no sense, 130 for Ctrl-C."""
    try:
        cli(args=arguments, prog_name="ai-server")
    except CommandError as error:
        warn(str(error))
        raise SystemExit(1) from error
    raise SystemExit(0)


if __name__ == "__main__":
    main()
