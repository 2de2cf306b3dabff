"""The neutral values: folding events, the tree of errors, the room a completion has."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import app

FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
END = app.Done("stop", 3, 2, 0.1, 0.2)
ERRORS = {each for each in vars(app).values() if isinstance(each, type) and issubclass(each, app.ServerError)}
# Without the one that shares its kind with the class above it.
ALL_ERRORS = sorted(ERRORS - {app.ServerError, app.ModelNotFound}, key=lambda error: error.__name__)


def folded(*events: app.Event) -> app.Reply:
    """The reply that these events make."""

    async def stream() -> AsyncIterator[app.Event]:
        for event in events:
            yield event

    return asyncio.run(app.fold(stream()))


# -- fold ---------------------------------------------------------------------


def test_fold_joins_texts_in_order() -> None:
    """All texts, the end event with its counts, and nothing of the beginning."""
    reply = folded(app.Started(3), app.Text("Hel"), app.Text(""), app.Text("lo"), END)
    assert reply == app.Reply([app.Choice("Hello")], END)


def test_fold_of_nothing_has_counts_of_zero() -> None:
    """What never came is not made up."""
    assert folded(app.Started(3), app.Text("a")).choices == [app.Choice("a")]
    assert folded() == app.Reply([], app.Done("stop", 0, 0, 0.0, 0.0))


def test_fold_passes_errors_on() -> None:
    """An error in the stream is an error of the whole reply."""

    async def stream() -> AsyncIterator[app.Event]:
        yield app.Text("half an ans")
        raise app.EngineDied("gone")

    with pytest.raises(app.EngineDied, match="gone"):
        asyncio.run(app.fold(stream()))


@FINE
@given(st.lists(st.text()))
def test_fold_loses_nothing(texts: Sequence[str]) -> None:
    """However the text is cut, the reply is the same."""
    assert folded(*map(app.Text, texts), END).choices[0].text == "".join(texts)


# -- errors -------------------------------------------------------------------


def test_every_error_is_known() -> None:
    """The tree has the errors that the interface promises, each with its status."""
    statuses = {error.kind: error.status for error in ALL_ERRORS}
    assert statuses.items() >= {
        "bad_request": 400, "invalid_model": 400, "context_length_exceeded": 400, "unsafe_format": 400,
        "remote_code_disabled": 403, "gated": 403, "not_found": 404, "in_use": 409, "requirement_not_met": 409,
        "body_too_large": 413, "no_backend": 500, "bad_model_files": 500, "engine_failed": 500, "engine_died": 500,
        "unsupported": 500, "hub_error": 502, "cooldown": 503, "capacity": 503, "crash_loop": 503, "unavailable": 503,
        "offline": 503, "load_timeout": 504, "disk_full": 507,
    }.items()  # fmt: skip


@pytest.mark.parametrize("error", ALL_ERRORS, ids=lambda error: error.__name__)
def test_error_class(error: type[app.ServerError]) -> None:
    """An HTTP error status, a kind of its own in snake case, and a line of the table that says what it is."""
    assert 400 <= error.status <= 599
    assert error.kind == error.kind.lower() and error.kind.replace("_", "").isalpha()
    assert [other for other in ALL_ERRORS if other.kind == error.kind] == [error]
    source = Path(app.__file__).read_text(encoding="utf-8")
    assert re.search(rf'^{error.__name__} = _error\("{error.__name__}", "{error.kind}".*\)  # \w', source, re.MULTILINE)


@pytest.mark.parametrize("error", ALL_ERRORS, ids=lambda error: error.__name__)
def test_error_crosses_a_process_boundary(error: type[app.ServerError]) -> None:
    """Kind and text are all that travels; the same class comes out."""
    back = app.error_of(error("what happened").kind, "what happened")
    assert type(back) is error
    assert (str(back), back.retry_after, back.details) == ("what happened", None, "")


def test_internal_error_crosses_a_process_boundary() -> None:
    """`pull_problem` uses the kind of the root class as well."""
    assert app.error_of(app.ServerError.kind, "x").kind == "internal_error"


def test_unknown_kind_is_an_engine_failure() -> None:
    """A child that is newer or older than this server still gets its text through."""
    back = app.error_of("no such kind", "text")
    assert type(back) is app.EngineFailed
    assert str(back) == "text"


def test_errors_are_runtime_errors() -> None:
    """Internal failures are RuntimeErrors, as the guidelines have it."""
    assert issubclass(app.ServerError, RuntimeError)
    assert app.NoCapacity("full", retry_after=3).retry_after == 3


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (app.BadModelFiles("x"), "bad_model_files"),
        (app.RungRefused("x"), "unsupported"),
        (MemoryError("x"), "out_of_memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("x"), "out_of_memory"),
        (ImportError("No module named 'x'"), "unsupported"),
        (type("SafetensorError", (Exception,), {})("x"), "bad_model_files"),
        (RuntimeError("size mismatch for a.weight"), "bad_model_files"),
        (ValueError("Unrecognized configuration class <X>"), "unsupported"),
        (ValueError("Transformers does not recognize this architecture"), "unsupported"),
        (RuntimeError("boom\nsecond line"), "start_failed"),
        (RuntimeError(""), "start_failed"),
    ],
)
def test_cause_of_a_failed_load(error: Exception, kind: str) -> None:
    """Whatever a library raises becomes a kind that crosses the boundary as itself, one line, and the traceback."""
    refused = app.refusal_of(error)
    assert refused.kind == kind
    assert refused.message.strip() and "\n" not in refused.message
    assert type(error).__name__ in refused.traceback
    assert app.error_of(kind, "x").kind == kind


# -- the rest -----------------------------------------------------------------


@FINE
@given(st.integers(0, 100), st.integers(1, 100), st.none() | st.integers(-2, 200), st.none() | st.integers(1, 200))
def test_completion_room(prompt: int, context: int, asked: int | None, window: int | None) -> None:
    """What was asked for as far as the context reaches; a prompt that does not fit is refused with both numbers."""
    sampling = app.Sampling(max_tokens=asked, context_length=window)
    limit = min(context, context if window is None else window)
    if prompt > limit:
        with pytest.raises(app.ContextLengthExceeded, match=rf"\b{prompt}\b.*\b{limit}\b"):
            app.completion_room(prompt, context, sampling)
        return
    room = app.completion_room(prompt, context, sampling)
    assert 0 <= room <= limit - prompt
    assert room == (limit - prompt if asked is None or asked < 0 else min(asked, limit - prompt))


def test_sampling_tells_what_was_chosen() -> None:
    """Zero is a choice, None is not."""
    assert app.Sampling().chosen() == {}
    assert app.Sampling(temperature=0.0, max_tokens=0, stop=()).chosen() == {
        "temperature": 0.0,
        "max_tokens": 0,
        "stop": (),
    }


def test_now_is_iso_with_z() -> None:
    """Times are UTC and sort as text; every one has microseconds, so that all are equally long."""
    stamp = app.now_iso()
    assert len(stamp) == len("2025-01-01T00:00:00.000000Z")
    assert datetime.fromisoformat(stamp).tzinfo == UTC
    assert stamp.endswith("Z")


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_request_with_instructions_gets_no_others(role: str) -> None:
    """What a developer says is the system's: a model's own system prompt is for conversations without one."""
    meta = app.ModelMeta("m", "local", "/m", system="Be kind.")
    own, user = app.Message(role, "Be brief."), app.Message("user", "Hi")
    assert app._with_defaults(app.ChatRequest("m", (own, user)), meta).messages == (own, user)
    assert app._with_defaults(app.ChatRequest("m", (user,)), meta).messages == (app.Message("system", "Be kind."), user)
