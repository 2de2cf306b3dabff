"""Settings: durations, bad values that end the start, what is secret, and who may listen on the network."""

import ast
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import uvicorn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

import app

ROOT = Path(app.__file__).parent
DURATION = re.compile(r"[+-]?(\d+(\.\d*)?(e[+-]?\d+)?|(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+)", re.ASCII)
NO_DURATION = "not a duration: use seconds or a form such as 5m, 1h30m, -1 for ever"
FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# One value for each setting that is more than text or a path, which it must refuse.
BAD_VALUES = {
    "MAX_CACHE_MODELS": "two",
    "MODEL_LOAD_COOLDOWN": "soon",
    "MODEL_Q4_THRESHOLD_BYTES": "14GB",
    "MAX_CONCURRENT_PULLS": "",
    "PULL_BANDWIDTH": "5MB",
    "PULL_STALL_SECONDS": "never",
    "PULL_TRIES": "some",
    "DISK_RESERVE": "1 GiB",
    "DISK_QUOTA": "half",
    "PORT": "http",
    "ALLOW_UNAUTHENTICATED": "maybe",
    "KEEP_ALIVE": "5 minutes",
    "ENGINE_THREADS": "all",
    "MAX_CONTEXT_LENGTH": "8k",
    "KV_CACHE_BYTES": "4GiB",
    "MAX_PARALLEL": "1.5",
    "MAX_SLEEPING_MODELS": "many",
    "HOST_MEMORY_RESERVE": "4GiB",
    "TENSOR_PARALLEL_SIZE": "all",
    "PIPELINE_PARALLEL_SIZE": "auto",
    "DISTRIBUTED_EXECUTOR": "slurm",
    "HANG_SECONDS": "30 seconds",
    "LOAD_TIMEOUT": "-",
    "MAX_QUEUE": "0x10",
    "QUEUE_TIMEOUT": "1h 30m",
    "MAX_BODY_BYTES": "32MiB",
    "DRAIN_SECONDS": "later",
    "STRICT_PARAMETERS": "2",
    "LOG_LEVEL": "LOUD",
    "LOG_FORMAT": "xml",
}
# Values of the right type that no server can run with.
SENSELESS_VALUES = {
    "MAX_CACHE_MODELS": "0",
    "MODEL_LOAD_COOLDOWN": "nan",
    "MODEL_Q4_THRESHOLD_BYTES": "-1",
    "MAX_CONCURRENT_PULLS": "0",
    "PULL_BANDWIDTH": "-1",
    "PULL_TRIES": "0",
    "DISK_RESERVE": "-1",
    "DISK_QUOTA": "-1",
    "PORT": "70000",
    "MAX_CONTEXT_LENGTH": "0",
    "KV_CACHE_BYTES": "0",
    "MAX_PARALLEL": "0",
    "MAX_SLEEPING_MODELS": "-1",
    "HOST_MEMORY_RESERVE": "-1",
    "TENSOR_PARALLEL_SIZE": "0",
    "PIPELINE_PARALLEL_SIZE": "0",
    "HANG_SECONDS": "-1",
    "ENGINE_THREADS": "0",
    "LOAD_TIMEOUT": "-1",
    "QUEUE_TIMEOUT": "-1",
    "MAX_QUEUE": "0",
    "MAX_BODY_BYTES": "0",
    "DRAIN_SECONDS": "-1s",
}


def start(code: str, environment: Mapping[str, str], *arguments: str) -> "subprocess.Popen[str]":
    """A fresh process with these settings and no others."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "STATE_DIR", "LOG_FILE")}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    """Its exit status, its output, and what it said on stderr."""
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def values_in_fresh_process(names: list[str], environment: Mapping[str, str]) -> dict[str, object]:
    """The values of settings as app.py reads them."""
    status, output, errors = finish(
        start(
            f"import json, app; print(json.dumps({{n: getattr(app, n) for n in {names!r}}}, default=str))", environment
        )
    )
    assert status == 0, errors
    return dict(json.loads(output))


# -- durations ----------------------------------------------------------------

units = st.sampled_from(sorted(app.DURATION_UNITS))
numbers = st.one_of(
    st.integers(0, 10**6).map(str),
    st.decimals(0, 10**6, places=3).map(str),
    st.integers(0, 99).map(lambda number: f"{number}."),
)


def limited(seconds: float) -> float:
    """More than thirty years is for ever."""
    return app.FOREVER if seconds > 1e9 else seconds


@FINE
@given(st.lists(st.tuples(numbers, units), min_size=1, max_size=4))
@example([("277777", "h")])
@example([("277778", "h")])
def test_go_durations(parts: list[tuple[str, str]]) -> None:
    """`1h30m`, `300ms`, `1.5h`: the sum of the parts, in seconds; the same with a plus."""
    text = "".join(number + unit for number, unit in parts)
    seconds = sum(float(number) * app.DURATION_UNITS[unit] for number, unit in parts)
    assert app.parse_duration(text) == pytest.approx(limited(seconds))
    assert app.parse_duration("+" + text) == pytest.approx(limited(seconds))
    assert app.parse_duration("-" + text) == (math.inf if seconds > 0 else 0)


@FINE
@given(st.integers(0, 10**12))
@example(10**9)
@example(10**9 + 1)
def test_seconds(seconds: int) -> None:
    """A plain number is seconds, as JSON number or as text; writing it down and reading it again changes nothing."""
    assert app.parse_duration(seconds) == app.parse_duration(str(seconds)) == app.parse_duration(f" {seconds}s ")
    assert app.parse_duration(seconds) == limited(seconds)
    assert app.parse_duration(seconds / 1000) == seconds / 1000


@FINE
@given(st.integers(-(10**9), -1))
def test_negative_means_forever(seconds: int) -> None:
    """As Ollama has it: any negative keep-alive time is no limit at all."""
    assert app.parse_duration(seconds) == app.FOREVER
    assert app.parse_duration(str(seconds)) == app.FOREVER


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5m", 300), ("1h30m", 5400), ("300ms", 0.3), ("1.5h", 5400), ("0", 0), ("0s", 0), ("-1", math.inf),
        ("-1s", math.inf), ("10us", 1e-5), ("10µs", 1e-5), ("10ns", 1e-8), ("5.s", 5), (" 60 ", 60), (-1, math.inf),
        (0, 0), (2.5, 2.5), ("1e3", 1000),
    ],
)  # fmt: skip
def test_known_durations(text: str | float, seconds: float) -> None:
    """The forms that clients send."""
    assert app.parse_duration(text) == pytest.approx(seconds)


@FINE
@given(st.text(st.sampled_from("0123456789.hmnsuµ+-e ")) | st.text(st.characters(max_codepoint=127)))
@example("1m-30s")
@example("m5")
@example("1e")
@example("e3")
@example("1e3s")
@example("5M")
@example(".")
@example("")
def test_garbage_is_no_duration(text: str) -> None:
    """Whatever is not of the two forms is refused in the same words, which never repeat the text."""
    if DURATION.fullmatch(text.strip()):
        return
    with pytest.raises(ValueError) as raised:
        app.parse_duration(text)
    assert str(raised.value) == NO_DURATION


@pytest.mark.parametrize("text", ["+-5m", "-+5m", "--5s", "٥s", "٥"])
def test_subtle_garbage_is_no_duration(text: str) -> None:
    """Two signs, and digits of other scripts."""
    with pytest.raises(ValueError, match=NO_DURATION):
        app.parse_duration(text)


@pytest.mark.parametrize(
    "number",
    [
        1e-05, 1e16, 1e300,
        pytest.param(10**400, id="1e400"),
    ],
)  # fmt: skip
def test_every_number_is_a_duration(number: float) -> None:
    """A JSON number is seconds however Python writes it."""
    assert app.parse_duration(number) == limited(number)
    assert app.parse_duration(-number) == app.FOREVER


def test_a_timeout_beyond_the_limit_is_not_called_negative() -> None:
    """Thirty years and more are for ever, and what may not be for ever says so."""
    with pytest.raises(ValueError) as raised:
        TypeAdapter(app.Seconds).validate_python("1e10")
    assert str(raised.value) != "it must not be negative"


# -- settings -----------------------------------------------------------------


# Imports what app.py imports once, then lets one forked process a setting import app.py itself: that is as fresh as a
# new interpreter, and twenty times as fast.
FORKS = """
import json, os, sys, tempfile
exec(open("app.py", encoding="utf-8").read().split("# 3 CONFIGURATION #")[0].split("# 2 IMPORTS #")[1])
ends = []
for name, value in json.loads(sys.argv[1]):
    said = tempfile.TemporaryFile("w+")
    child = os.fork()
    if child == 0:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        os.environ[name] = value
        status = 0
        try:
            import app
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stderr.flush()
        os._exit(status)  # at once: to take all modules apart again costs more than the import
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said.seek(0)
    ends.append([status, said.read()])
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends() -> dict[tuple[str, str], tuple[int, str]]:
    """How `import app` ends with each bad value: its exit status and what it printed."""
    pairs = [*BAD_VALUES.items(), *SENSELESS_VALUES.items(), ("PORT", "8005")]
    status, output, errors = finish(start(FORKS, {}, json.dumps(pairs)))
    assert status == 0, errors
    return {pair: (status, said) for pair, (status, said) in zip(pairs, json.loads(output), strict=True)}


def test_a_good_setting_does_not_end_the_start(ends: dict[tuple[str, str], tuple[int, str]]) -> None:
    """What the next tests see is the setting's doing."""
    assert ends["PORT", "8005"] == (0, "")


def test_every_typed_setting_is_in_the_table() -> None:
    """A new setting needs a row in BAD_VALUES."""
    tree = ast.parse(Path(app.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    read = [call.args for call in calls if isinstance(call.func, ast.Name) and call.func.id == "_read"]
    typed = {ast.unparse(name): ast.unparse(reader) for name, _, reader in read}
    assert {ast.literal_eval(name) for name, reader in typed.items() if reader not in ("str", "Path", "Words")} == set(
        BAD_VALUES
    )
    assert {ast.literal_eval(name) for name in typed} == set(app.SETTINGS)


@pytest.mark.parametrize(("name", "value"), BAD_VALUES.items())
def test_a_bad_setting_ends_the_start(name: str, value: str, ends: dict[tuple[str, str], tuple[int, str]]) -> None:
    """Exit status 78 (wrong configuration) and one line that names the setting and its value; no traceback."""
    status, said = ends[name, value]
    assert status == 78
    assert f"{name}={value!r}" in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    SENSELESS_VALUES.items(),
)
def test_a_senseless_setting_ends_the_start(
    name: str, value: str, ends: dict[tuple[str, str], tuple[int, str]]
) -> None:
    """A value that no server can run with is refused like one of the wrong type."""
    status, said = ends[name, value]
    assert status == 78
    assert name in said


def test_a_hang_is_longer_than_the_time_between_two_beats() -> None:
    """HANG_SECONDS below that calls every engine hung."""
    status, _, errors = finish(start("import app", {"HANG_SECONDS": "0.5"}))
    assert status == 78
    assert "HANG_SECONDS" in errors


def test_a_bad_setting_ends_the_command() -> None:
    """The same through the front door: `python app.py`."""
    command = "import sys, runpy; sys.argv = ['app.py']; runpy.run_path('app.py', run_name='__main__')"
    status, output, errors = finish(start(command, {"KEEP_ALIVE": "soon"}))
    assert (status, output) == (78, "")
    assert "KEEP_ALIVE='soon'" in errors


def test_defaults() -> None:
    """What a server runs with when nobody says anything."""
    expected = {
        "MAX_CACHE_MODELS": 2,
        "COOLDOWN_SECONDS": 300,
        "MODEL_Q4_THRESHOLD_BYTES": 14_000_000_000,
        "MAX_CONCURRENT_PULLS": 2,
        "PULL_BANDWIDTH": 0,
        "PULL_STALL_SECONDS": 30,
        "PULL_TRIES": 6,
        "DISK_RESERVE": 256 * 1024 * 1024,
        "DISK_QUOTA": 0,
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "HF_HOME": str(Path.home() / ".cache" / "huggingface"),
        "HF_ENDPOINT": "",
        "HF_TOKEN": "",
        "HOST": "127.0.0.1",
        "PORT": 8005,
        "ALLOW_UNAUTHENTICATED": False,
        "KEEP_ALIVE": 300,
        "ENGINE_THREADS": 0,
        "MAX_CONTEXT_LENGTH": 8192,
        "KV_CACHE_BYTES": 0,
        "MAX_PARALLEL": 8,
        "MAX_SLEEPING_MODELS": 4,
        "HOST_MEMORY_RESERVE": 4 * 1024**3,
        "STANDBY_ENGINES": ["auto"],
        "TENSOR_PARALLEL_SIZE": 0,
        "PIPELINE_PARALLEL_SIZE": 1,
        "DISTRIBUTED_EXECUTOR": "",
        "HANG_SECONDS": 30,
        "LOAD_TIMEOUT": 1800,
        "LOG_LEVEL": "INFO",
        "LOG_FORMAT": "text",
        "MAX_QUEUE": 256,
        "QUEUE_TIMEOUT": 60,
        "MAX_BODY_BYTES": 32 * 1024 * 1024,
        "DRAIN_SECONDS": 30,
        "STRICT_PARAMETERS": False,
        "MODELS_FILE": str(ROOT / "models.toml"),
    }
    assert values_in_fresh_process(list(expected), {}) == expected


def test_defaults_for_libraries() -> None:
    """What libraries read for themselves is set before any import, unless the user has said otherwise."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "0"}
    read = values_in_fresh_process(["INHERITED_ENVIRONMENT"], {"DO_NOT_TRACK": "0"})["INHERITED_ENVIRONMENT"]
    assert isinstance(read, dict)
    assert wanted.items() <= read.items()
    assert "VLLM_WORKER_MULTIPROC_METHOD" not in read  # vLLM's own choice, which depends on the device


def test_values_from_the_environment() -> None:
    """Every kind of setting is read from the environment."""
    given_values = {
        "MAX_CACHE_MODELS": "5",
        "MODEL_LOAD_COOLDOWN": "1.5",
        "KEEP_ALIVE": "-1",
        "QUEUE_TIMEOUT": "2m",
        "ENGINE_THREADS": "3",
        "ALLOW_UNAUTHENTICATED": "Yes",
        "STRICT_PARAMETERS": "",
        "LOG_LEVEL": "debug",
        "PYTORCH_ALLOC_CONF": "max_split_size_mb:64",
        "STATE_DIR": "/somewhere/else",
    }
    names = ["COOLDOWN_SECONDS" if name == "MODEL_LOAD_COOLDOWN" else name for name in given_values]
    read = values_in_fresh_process(names, given_values)
    assert list(read.values()) == [
        5, 1.5, math.inf, 120, 3, True, False, "DEBUG", "max_split_size_mb:64", "/somewhere/else",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["1", "true", "YES", " on "])
def test_switch_on(text: str) -> None:
    """The ways to say yes."""
    assert TypeAdapter(app.Flag).validate_python(text) is True


@pytest.mark.parametrize("text", ["0", "false", "No", "off", "", "  "])
def test_switch_off(text: str) -> None:
    """The ways to say no."""
    assert TypeAdapter(app.Flag).validate_python(text) is False


def test_settings_show_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """/diag shows every setting but those that hold a secret."""
    monkeypatch.setattr(app, "HF_TOKEN", "hf_verysecret")
    monkeypatch.setattr(app, "INHERITED_ENVIRONMENT", {"HF_TOKEN": "hf_verysecret"})
    monkeypatch.setitem(app.SETTINGS, "HF_TOKEN", "hf_verysecret")
    monkeypatch.setitem(app.SETTINGS, "KEEP_ALIVE", app.FOREVER)
    shown = app.public_settings()
    assert shown["PORT"] == app.PORT
    assert {"MAX_CACHE_MODELS", "KEEP_ALIVE", "STATE_DIR", "HF_HOME"} <= shown.keys()
    assert "hf_verysecret" not in json.dumps(shown, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True), ("API_KEYS", True), ("ADMIN_KEYS", True), ("AWS_SECRET_ACCESS_KEY", True),
        ("OPENAI_API_KEY", True), ("DB_PASSWORD", True), ("my_secret", True), ("KEY", True), ("DB_CREDENTIALS", True),
        ("KEEP_ALIVE", False), ("PATH", False), ("HF_HOME", False), ("MONKEY", False), ("KEYBOARD", False),
        ("TOKENIZERS_PARALLELISM", False), ("AWS_ACCESS_KEY_ID", True), ("PGPASSWORD", True), ("APIKEY", True),
    ],
)  # fmt: skip
def test_which_settings_are_secret(name: str, secret: bool) -> None:
    """A name tells whether a variable may be shown and handed to an engine."""
    assert bool(app.SECRET_SETTINGS.search(name)) is secret


# -- who may listen -----------------------------------------------------------


def test_public_binding_needs_a_word() -> None:
    """HOST=0.0.0.0 alone ends the start with status 78 and says what to do; with the word it is fine."""
    serve = "import sys, runpy; sys.argv = ['app.py']; runpy.run_path('app.py', run_name='__main__')"
    refused = start(serve, {"HOST": "0.0.0.0"})
    allowed = start("import app; app._refuse_public_binding()", {"HOST": "0.0.0.0", "ALLOW_UNAUTHENTICATED": "1"})
    status, _, errors = finish(refused)
    assert status == 78
    assert "HOST=0.0.0.0" in errors
    assert "ALLOW_UNAUTHENTICATED=1" in errors
    assert finish(allowed) == (0, "", "")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_is_always_fine(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody but this machine."""
    monkeypatch.setattr(app, "HOST", host)
    app._refuse_public_binding()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "example.org", "127.0.0.1.example.org"])
def test_any_other_host_is_refused(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also names and the empty host, which means every interface."""
    monkeypatch.setattr(app, "HOST", host)
    with pytest.raises(SystemExit) as ended:
        app._refuse_public_binding()
    assert ended.value.code == 78
    assert f"HOST={host}" in capsys.readouterr().err
    monkeypatch.setattr(app, "ALLOW_UNAUTHENTICATED", True)
    app._refuse_public_binding()


@pytest.mark.parametrize(("started", "status"), [(True, 0), (False, 1)])
def test_server_gets_the_settings(started: bool, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host, port and drain time reach uvicorn, the models to pull the application; the end tells whether it started."""
    configs: list[uvicorn.Config] = []

    def run(listener: app._Listener) -> None:
        configs.append(listener.config)
        listener.started = started

    monkeypatch.setattr(app._Listener, "run", run)
    monkeypatch.setattr(app, "configure_logging", lambda: None)
    monkeypatch.setattr(app, "_claim_state_dir", lambda: "the lock")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(app, "PORT", 4321)
    monkeypatch.setattr(app, "DRAIN_SECONDS", 7.0)
    for name in ("lock", "pull_at_start"):
        monkeypatch.setattr(app.app.state, name, None, raising=False)
    with pytest.raises(SystemExit) as ended:
        app.serve(["gpt2"])
    assert ended.value.code == status
    assert [config.app for config in configs] == [app.app]
    assert (configs[0].host, configs[0].port, configs[0].timeout_graceful_shutdown) == (app.HOST, 4321, 7)
    assert (app.app.state.lock, app.app.state.pull_at_start) == ("the lock", ["gpt2"])


def test_a_name_that_cannot_be_pulled_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 64 and one line, before anything is claimed."""
    monkeypatch.setattr(app, "_claim_state_dir", lambda: pytest.fail("too late"))
    with pytest.raises(SystemExit) as ended:
        app.serve(["gpt2", "../x"])
    assert ended.value.code == 64
    said = capsys.readouterr().err
    assert "'../x'" in said
    assert len(said.splitlines()) == 1
