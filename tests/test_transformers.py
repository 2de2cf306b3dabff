"""The transformers engine alone, in a process of its own: templates, thinking, constraints, completion, counting."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import tinymodels
from harness import ROOT

import app

PROGRAM = """
import asyncio, json, sys
import msgspec
import app as server  # the module: its attribute `app` is the application

async def main():
    engine = server.ENGINES[sys.argv[1]]()
    await engine.load(server.EngineSpec(sys.argv[1], "m", sys.argv[2], trust_remote_code=True), lambda name: None)
    for line in iter(sys.stdin.readline, ""):
        request = msgspec.json.decode(line, type=server.ChatRequest)
        stream = engine.stream if request.task in ("chat", "complete") else engine.answer
        try:
            answer = msgspec.msgpack.encode([event async for event in stream(request)])
        except server.ServerError as error:
            answer = msgspec.msgpack.encode(str(error))
        print(answer.hex(), flush=True)

if __name__ == "__main__":
    asyncio.run(main())
"""
Told = list[app.Event]
SEVEN: dict[str, Any] = {"type": "object", "properties": {"x": {"const": 7}}, "required": ["x"]}
WEATHER: dict[str, Any] = {"name": "weather", "parameters": SEVEN}
TOOLS = ({"type": "function", "function": WEATHER},)
HELLO = (app.Message("user", "hello"),)
GREEDY = app.Sampling(temperature=0.0, max_tokens=60)


class Engine:
    """One loaded model: requests in, events or the text of an error out."""

    def __init__(self, backend: str, model: Path, folder: Path) -> None:
        program = folder / "engine_program.py"
        program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}", encoding="utf-8")
        command = [sys.executable, str(program), backend, str(model)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, stderr=subprocess.DEVNULL)

    def ask(self, sampling: app.Sampling = GREEDY, **fields: Any) -> Told:
        """The events of a request that must succeed."""
        answer = self._ask(sampling, fields)
        return msgspec.convert(answer, Told, strict=False) if isinstance(answer, list) else pytest.fail(str(answer))

    def error(self, sampling: app.Sampling = GREEDY, **fields: Any) -> str:
        """The text of the error of a request that must fail."""
        answer = self._ask(sampling, fields)
        assert isinstance(answer, str)
        return answer

    def _ask(self, sampling: app.Sampling, fields: dict[str, Any]) -> Any:
        request = app.ChatRequest("m", sampling=sampling, **fields)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(request).decode() + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if re.fullmatch(r"[0-9a-f]+\n", line):
                return msgspec.msgpack.decode(bytes.fromhex(line))
        return pytest.fail("the engine ended")


def running(backend: str, model: Path, folder: Path) -> Iterator[Engine]:
    """An engine for the tests of this file."""
    engine = Engine(backend, model, folder)
    yield engine
    engine.process.kill()
    engine.process.wait()
    for stream in (engine.process.stdin, engine.process.stdout):
        if stream is not None:
            stream.close()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The model that thinks `ab` and says `so`."""
    yield from running("transformers", tinymodels.tiny_chain(), tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The model that is called whole."""
    yield from running("pipeline", tinymodels.tiny_whole(), tmp_path_factory.mktemp("whole"))


def said(events: Told) -> str:
    """All text, thinking too."""
    return "".join(event.text for event in events if isinstance(event, app.Text | app.Thinking))


def answered(events: Told) -> str:
    """What is left of the text without thinking, which ends as the model of this file ends it."""
    text = said([event for event in events if not isinstance(event, app.Thinking)])
    return text.removeprefix("<think>").removeprefix("ab</think>")


def done(events: Told) -> app.Done:
    """The last event."""
    assert isinstance(events[-1], app.Done)
    return events[-1]


def with_(**options: Any) -> app.Sampling:
    """Greedy, with more options."""
    return msgspec.structs.replace(GREEDY, **options)


SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"format": SEVEN}, r'\{\s*"x"\s*:\s*7\s*\}'),
    ({"regex": "[0-9]{3}-x"}, "[0-9]{3}-x"),
    ({"choice": ("naïve 🌍 你好",)}, "naïve 🌍 你好"),
    ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
]


@pytest.mark.parametrize("think", [None, True, False], ids=str)
@pytest.mark.parametrize(("shape", "pattern"), SHAPES, ids=lambda value: str(value)[:9])
def test_a_constraint_begins_after_thinking(chain: Engine, shape: dict[str, Any], pattern: str, think: bool) -> None:
    """Whether the prompt opens the thinking, the model does, or it may not; the end token ends even an ignored end."""
    events = chain.ask(with_(**shape, ignore_eos=True, min_tokens=50), messages=HELLO, think=think)
    assert re.fullmatch(pattern, answered(events)), events
    assert done(events).reason == "stop"
    thought = re.search("ab", said(events)) is not None
    assert thought == (think is not False)


def test_without_a_constraint_the_model_says_what_it_wants(chain: Engine) -> None:
    """The end token is not shown, nor when it is ignored; all else is."""
    assert answered(chain.ask(messages=HELLO)) == "so"
    assert "<|endoftext|>" not in said(chain.ask(with_(ignore_eos=True, max_tokens=12), messages=HELLO))


def test_json_without_a_schema(chain: Engine) -> None:
    """An object, also under sampling, and never a special token, or one of the vocabulary's padding."""
    for seed in range(4):
        sampling = with_(format="json", temperature=3.0, seed=seed, max_tokens=100)
        events = chain.ask(sampling, messages=HELLO, think=False)
        assert answered(events).startswith("{")
        assert "<|" not in answered(events)
        if done(events).reason == "stop":
            json.loads(answered(events))


BAD: list[dict[str, Any]] = [
    {"format": {"type": "nonsense"}},
    {"regex": "(unclosed"},
    {"grammar": 'root ::= ("yes" |'},
    {"format": {"enum": [f"{number} and {number * number}" for number in range(100_000)]}},  # slow
    {"format": json.loads('{"items":' * 400 + "{}" + "}" * 400)},  # deep
]


@pytest.mark.parametrize("shape", BAD, ids=["format", "regex", "grammar", "slow", "deep"])
def test_a_constraint_that_cannot_be_compiled(chain: Engine, shape: dict[str, Any]) -> None:
    """The error names the field; the next request is served by the same process, also with a constraint."""
    if "items" not in str(shape):
        assert chain.error(with_(**shape), messages=HELLO).startswith(f"Field '{next(iter(shape))}': ")
    else:
        chain._ask(with_(**shape), {"messages": HELLO, "think": False})
    again = chain.ask(with_(regex="[5-6]"), messages=HELLO, think=False)
    assert answered(again) in ("5", "6")


def test_compiled_constraints_are_kept(chain: Engine) -> None:
    """The second time nobody has to compile: not even the process that does it is needed."""
    shape = with_(regex="once[0-3]more")
    first = chain.ask(shape, messages=HELLO, think=False)
    workers = psutil.Process(chain.process.pid).children()
    [worker] = [each for each in workers if "spawn_main" in " ".join(each.cmdline())]
    worker.suspend()
    try:
        assert said(chain.ask(shape, messages=HELLO, think=False)) == said(first)
    finally:
        worker.resume()


def test_a_required_call_is_one(chain: Engine) -> None:
    """Enforced by a grammar, after the thinking; bad parameters are the tools' fault."""
    reply = chain.ask(messages=HELLO, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    calls = [event for event in reply if isinstance(event, app.ToolCall)]
    assert [call.name for call in calls if call.name] == ["weather"]
    assert json.loads("".join(call.arguments for call in calls)) == {"x": 7}
    assert done(reply).reason == "tool_calls"
    bad = ({"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}},)
    assert "'tools'" in chain.error(messages=HELLO, tools=bad, tool_choice="required")


def test_templates_get_tools_history_and_the_wish_to_think(chain: Engine) -> None:
    """What the template writes is counted exactly."""

    def count(**fields: Any) -> int:
        return done(chain.ask(task="count", messages=HELLO, **fields)).prompt_tokens

    plain = count()
    assert count(think=True) == plain + 1
    assert count(think=False) == count(tools=()) == plain
    assert count(tools=TOOLS) > plain + 1
    call = app.Message("assistant", calls=(app.Call("1", "weather", '{"x": 7}'),))
    turns = (*HELLO, call, app.Message("tool", "12", call_id="1"))
    rendered = chain.ask(task="complete", inputs=("helloweather(7)12<|assistant|>",), sampling=with_(max_tokens=0))
    assert done(chain.ask(task="count", messages=turns)).prompt_tokens == done(rendered).prompt_tokens


def test_completion_has_no_template(chain: Engine) -> None:
    """Text and token ids give the same; the prompt is echoed with its probabilities, the first of which is unknown."""
    events = chain.ask(with_(echo=True, logprobs=2, max_tokens=1), task="complete", inputs=("says",))
    first = events[1]
    assert isinstance(first, app.Text)
    assert first.text == "says"
    assert said(events) == "sayso"
    assert b"".join(entry.data for entry in first.logprobs) == b"says"
    assert str(first.logprobs[0].logprob) == "nan"
    assert all(entry.logprob <= 0 and len(entry.top) == 2 for entry in first.logprobs[1:])
    ids = chain.ask(task="tokenize", inputs=("says",))[1]
    assert isinstance(ids, app.Result)
    assert len(first.logprobs) == len(ids.value) == done(events).prompt_tokens
    same = chain.ask(with_(echo=True, max_tokens=1), task="complete", inputs=(tuple(ids.value),))
    assert said(same) == "sayso"
    assert said(chain.ask(with_(echo=True, max_tokens=0), task="complete", inputs=("says",))) == "says"
    assert done(chain.ask(task="complete", inputs=("",))).prompt_tokens == 1
    assert "vocabulary" in chain.error(task="complete", inputs=((3, 10**6),))


def test_a_hole_is_filled_in(chain: Engine) -> None:
    """The two texts stand between the model's tokens for it; echo shows the first alone."""
    events = chain.ask(with_(echo=True, max_tokens=0), task="complete", inputs=("a",), suffix="b")
    assert (said(events), done(events).prompt_tokens) == ("a", 5)


def test_tokens_of_a_text_and_back(chain: Engine) -> None:
    """Exactly, with special tokens in the text too."""
    text = "Héllo <think> 🌍"
    ids = chain.ask(task="tokenize", inputs=(text,))[1]
    assert isinstance(ids, app.Result)
    back = chain.ask(task="detokenize", inputs=(tuple(ids.value),))[1]
    assert isinstance(back, app.Result)
    assert back.value == text
    assert "vocabulary" in chain.error(task="detokenize", inputs=((-1,),))
    assert "embed" in chain.error(task="embed", inputs=("a",))


def test_the_stop_string_is_named(chain: Engine) -> None:
    """The one that ended the reply, and none where the model ended it."""
    assert done(chain.ask(with_(stop=("nope", "o")), messages=HELLO, think=False)).stop_string == "o"
    assert done(chain.ask(with_(stop=("nope",)), messages=HELLO, think=False)).stop_string == ""


def test_a_model_that_is_called_whole(whole: Engine) -> None:
    """Text, counts, stops and lengths are as elsewhere."""
    events = whole.ask(task="complete", inputs=("x y z",))
    assert (said(events), done(events).completion_tokens, done(events).reason) == ("zzzzzz", 6, "stop")
    short = done(whole.ask(with_(max_tokens=3), task="complete", inputs=("x y z",)))
    assert (short.completion_tokens, short.reason) == (3, "length")
    stopped = whole.ask(with_(stop=("zz",), logprobs=2), task="complete", inputs=("x y z",))
    assert (said(stopped), done(stopped).stop_string) == ("", "zz")
