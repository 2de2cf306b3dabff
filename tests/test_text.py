"""Pure text handling: stop strings in any chunking, and every shape that a text-generation pipeline returns."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import app

FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=150)

letters = st.text("abc\n", max_size=12)  # few letters: stops and their beginnings come up often
stop_lists = st.lists(st.text("abc\n", max_size=4), max_size=4)
cuts = st.lists(st.integers(0, 12), max_size=6)


def chunked(text: str, places: list[int]) -> list[str]:
    """The text in pieces, cut at these places."""
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def run(stops: list[str], chunks: list[str]) -> tuple[list[str], app.StopStrings]:
    """What is shown for each chunk and at the end."""
    router = app.StopStrings(stops)
    return [*(router.feed(chunk) for chunk in chunks), router.finish()], router


def cut_at_first_stop(text: str, stops: list[str]) -> str:
    """The whole text up to the earliest stop."""
    return text[: min((text.find(stop) for stop in stops if stop and stop in text), default=len(text))]


def nested(stops: list[str]) -> bool:
    """Whether a stop holds another one behind its first letter, so that the inner one is complete first."""
    return any(inner in outer[1:] for inner in stops for outer in stops if inner and inner != outer)


@FINE
@given(letters, stop_lists, cuts)
@example("aab", ["ab"], [1, 2])
@example("abab", ["abc"], [2])
def test_output_is_the_text_up_to_the_first_stop(text: str, stops: list[str], places: list[int]) -> None:
    """For any text, stops and chunking; after a hit nothing more is shown."""
    assume(not nested(stops))
    shown, router = run(stops, chunked(text, places))
    expected = cut_at_first_stop(text, stops)
    assert "".join(shown) == expected
    assert (router.hit is None) == (expected == text)
    assert router.hit is None or text[len(expected) :].startswith(router.hit)


@FINE
@given(letters, stop_lists, cuts)
@example("abc", ["abc", "b"], [2])
def test_chunking_makes_no_difference(text: str, stops: list[str], places: list[int]) -> None:
    """The same text in other pieces gives the same answer, also when one stop holds another."""
    assert "".join(run(stops, chunked(text, places))[0]) == "".join(run(stops, [text])[0])


@FINE
@given(letters, stop_lists, cuts)
def test_no_part_of_a_completed_stop_is_ever_shown(text: str, stops: list[str], places: list[int]) -> None:
    """What was shown by any moment is still right when the rest is known."""
    assume(not nested(stops))
    chunks = chunked(text, places)
    router = app.StopStrings(stops)
    shown = ""
    for chunk in chunks:
        shown += router.feed(chunk)
        assert cut_at_first_stop(text, stops).startswith(shown)


@FINE
@given(letters, stop_lists, cuts)
def test_no_more_is_held_back_than_needed(text: str, stops: list[str], places: list[int]) -> None:
    """Text that cannot be the beginning of a stop is shown at once, or streams would stutter."""
    router = app.StopStrings(stops)
    shown = taken = ""
    for chunk in chunked(text, places):
        taken += chunk
        shown += router.feed(chunk)
        if router.hit is None:
            held = taken[len(shown) :]
            assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


@FINE
@given(letters, stop_lists)
def test_nothing_follows_a_hit(text: str, stops: list[str]) -> None:
    """After a hit every further piece and the end are silent, and the hit stays."""
    router = app.StopStrings([*stops, "a"])
    router.feed("a" + text)
    hit = router.hit
    assert hit
    assert (router.feed(text), router.feed("a"), router.finish(), router.hit) == ("", "", "", hit)


def test_stop_strings_by_example() -> None:
    """The way a stream of tokens goes."""
    router = app.StopStrings(["\nUser:", "</s>"])
    assert [router.feed(piece) for piece in ("Hi", " there\n", "Us", "ers\n", "User", ": more")] == [
        "Hi", " there", "", "\nUsers", "", "",
    ]  # fmt: skip
    assert (router.hit, router.finish()) == ("\nUser:", "")


def test_empty_stops_stop_nothing() -> None:
    """An empty stop string is no stop string."""
    assert run(["", ""], ["a", "b"])[0] == ["a", "b", ""]


# -- pipeline output ----------------------------------------------------------

ANSWER = {"role": "assistant", "content": "Hello"}
TURNS = [{"role": "user", "content": "Hi"}, ANSWER]


@pytest.mark.parametrize(
    "result",
    [
        "Hello",
        ["Hello"],
        {"generated_text": "Hello"},
        [{"generated_text": "Hello"}],
        [[{"generated_text": "Hello"}]],
        [{"generated_text": "Hello"}, {"generated_text": "another sequence"}],
        [[{"generated_text": "Hello"}], [{"generated_text": "another prompt"}]],
        [{"generated_text": TURNS}],
        [[{"generated_text": TURNS}]],
        [[{"generated_text": TURNS}], [{"generated_text": [{"role": "user", "content": "x"}]}]],
        {"generated_text": [ANSWER]},
        TURNS,
        [{"generated_text": "Hello", "score": 0.5}],
    ],
)
def test_shapes_of_pipeline_output(result: Any) -> None:
    """One prompt, batches, several sequences, chats: the first answer's text."""
    assert app._extract_text_from_pipeline_result(result) == "Hello"


def test_empty_answer_is_an_answer() -> None:
    """A model may say nothing."""
    assert app._extract_text_from_pipeline_result([{"generated_text": ""}]) == ""
    assert app._extract_text_from_pipeline_result([{"generated_text": [{"role": "assistant", "content": ""}]}]) == ""


@pytest.mark.parametrize(
    "result",
    [
        None, 5, [], [[]], {}, [{}], [None], {"text": "Hello"}, [{"generated_text": None}], [{"generated_text": []}],
        [{"generated_text": [{"role": "user"}]}], [{"generated_text": [{"role": "assistant", "content": None}]}],
        [{"generated_text": [{"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]}], b"Hello",
    ],
)  # fmt: skip
def test_other_shapes_are_an_error(result: Any) -> None:
    """Never an answer that nobody gave."""
    with pytest.raises(app.EngineFailed, match="where text was expected"):
        app._extract_text_from_pipeline_result(result)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["generated_text", "content", "role", "x"]), inner, max_size=3)
    ),
    max_leaves=12,
)


@FINE
@given(json_values)
def test_any_shape_gives_text_or_engine_failed(result: Any) -> None:
    """No KeyError, no IndexError, whatever a model's own pipeline returns."""
    with suppress(app.EngineFailed):
        assert isinstance(app._extract_text_from_pipeline_result(result), str)


# -- calls that must come -----------------------------------------------------


def test_few_tokens_are_shared_out_among_the_texts_of_a_required_call() -> None:
    """So that the call ends; texts with a form of their own, and calls with room enough, stay as they are."""
    fields = {"a": {"type": "string"}, "b": {"items": [{"type": "string"}]}, "c": {"type": "string", "enum": ["x"]}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": fields}}}

    def texts(max_tokens: int | None) -> list[dict[str, object]]:
        found = app.enforced_schema([tool], False, max_tokens)["items"]["anyOf"][0]["properties"]["parameters"]
        return [found["properties"]["a"], found["properties"]["b"]["items"][0], found["properties"]["c"]]

    bounded = {"type": "string", "maxLength": 100}
    assert texts(100) == [bounded, bounded, fields["c"]]
    for roomy in (None, -1, 0, 100_000):
        assert texts(roomy) == [{"type": "string"}, {"type": "string"}, fields["c"]]


def test_half_a_surrogate_pair_in_a_call_is_no_call() -> None:
    """It could be sent to nobody: the text comes back as it was written."""
    tool = {"type": "function", "function": {"name": "f"}}
    text = '<tool_call>{"name": "f", "arguments": {"a": "\\ud83d"}}</tool_call>'
    router = app.TextRouter(app.formats_of("<tool_call>"), [tool])
    events = [*router.feed(text), *router.finish(False)]
    assert all(isinstance(event, app.Text) for event in events)
    assert "".join(event.text for event in events if isinstance(event, app.Text)) == text


def test_tools_with_definitions_of_the_same_name_keep_their_own() -> None:
    """References are moved to the root under names that no other tool has; what is no object is left out."""

    def tool(name: str, place: str, kind: str) -> dict[str, object]:
        parameters = {place: {"Item": {"type": kind}}, "properties": {"x": {"$ref": f"#/{place}/Item"}}}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    schema = app.enforced_schema([tool("a", "$defs", "integer"), tool("b", "definitions", "boolean")], False)
    calls = [each["properties"]["parameters"]["properties"]["x"]["$ref"] for each in schema["items"]["anyOf"]]
    assert [schema["$defs"][name.removeprefix("#/$defs/")]["type"] for name in calls] == ["integer", "boolean"]
    odd = {"type": "function", "function": {"name": "c", "parameters": {"$defs": None}}}
    assert "$defs" not in app.enforced_schema([odd], False)
