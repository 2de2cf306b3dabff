"""The same promises on every engine, with real models: llama.cpp, transformers, the pipeline rung, and vLLM.

vLLM runs on the CPU, in a server of its own (tests/conftest.py); elsewhere no rung above transformers is installed.
"""

import json
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from harness import Json, Server, text_of, wait_until


@dataclass(frozen=True)
class Case:
    """One model on the engine that serves it. `speaks`: it is trained, so its words can be checked."""

    model: str
    backend: str
    speaks: bool = False
    trust: bool = False


CASES = [
    Case("smollm2:135m", "llama.cpp", speaks=True),
    Case("gemma3:270m", "llama.cpp", speaks=True),
    Case("test/smollm2", "transformers", speaks=True),
    Case("gpt2", "transformers"),
    Case("test/mixture", "pipeline"),
    Case("test/custom", "pipeline", trust=True),
    Case("test/smollm2", "vllm", speaks=True),
]
# Module scope makes pytest run all tests of one case together: each model is then loaded once, not once a test.
ANY_ENGINE = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.backend}-{case.model}", scope="module")
SPEAKING = pytest.mark.parametrize(
    "case", [case for case in CASES if case.speaks], ids=lambda case: f"{case.backend}-{case.model}", scope="module"
)
UNSTOPPED = pytest.mark.parametrize(  # without a template of its own a model may write a stop of the plain one
    "case",
    [case for case in CASES if case.model != "gemma3:270m"],
    ids=lambda case: f"{case.backend}-{case.model}",
    scope="module",
)
GREEDY: Json = {"temperature": 0.0}
SAME_ALONE_AND_TOGETHER = ("transformers", "pipeline")  # elsewhere a batch differs in last bits, and near-ties turn
CONSTRAINTS: dict[str, set[str]] = {
    "vllm": {"format", "regex", "choice", "grammar"},
    "llama.cpp": {"format", "regex", "choice", "grammar"},
    "transformers": {"format", "regex", "choice", "grammar"},
    "pipeline": {"format", "regex", "choice", "grammar"},
}


@pytest.fixture
def server_of(case: Case, request: pytest.FixtureRequest) -> Server:
    """The server where a case's engine is the first that can serve, with the case's model on its disk."""
    running: Server = request.getfixturevalue("vllm_server" if case.backend == "vllm" else "server")
    running.have(case.model, trust_remote_code=case.trust)
    return running


@ANY_ENGINE
def test_the_expected_engine_serves(server_of: Server, case: Case) -> None:
    """The contract headers, the ladder and /models agree on who serves."""
    reply = server_of.chat(case.model, max_tokens=4)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-backend"] == case.backend
    facts = server_of.client.get(f"/models/{case.model}").json()
    assert (facts["backend"], facts["state"]) == (case.backend, "ready")
    assert reply.headers["x-quantization"] == facts["quantization"]
    assert reply.headers["x-model-revision"] == facts["revision"]
    assert facts["ladder"][-1] == {"backend": case.backend, "outcome": "loaded", "reason": "", "kind": ""}
    assert facts["memory_bytes"] > 10 * 1024 * 1024


@SPEAKING
def test_a_trained_model_knows_the_capital(server_of: Server, case: Case) -> None:
    """The template is applied as the model was trained on it."""
    assert "Paris" in server_of.answer(case.model, max_tokens=24, **GREEDY)


@ANY_ENGINE
def test_the_stream_says_what_the_whole_reply_says(server_of: Server, case: Case) -> None:
    """Greedy text, counts and reason are equal."""
    settings: Json = {"max_tokens": 16, **GREEDY}
    server_of.answer(case.model, "Say something.", **settings)  # both runs below then start from the same prompt cache
    whole = server_of.chat(case.model, "Say something.", **settings).json()
    lines = server_of.stream(case.model, "Say something.", **settings)
    assert text_of(lines) == whole["message"]["content"]
    for name in ("done_reason", "prompt_eval_count", "eval_count"):
        assert lines[-1][name] == whole[name], name
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]


@ANY_ENGINE
def test_counts_and_durations_are_there(server_of: Server, case: Case) -> None:
    """Exact counts; every duration a positive integer; max_tokens ends with `length`."""
    reply = server_of.chat(case.model, "Count from one to one hundred.", max_tokens=5, temperature=0.0).json()
    assert reply["eval_count"] <= 5
    assert reply["done_reason"] in ("length", "stop")
    assert reply["prompt_eval_count"] > 3
    for name in ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"):
        assert isinstance(reply[name], int), name
        assert reply[name] > 0, name
    assert reply["total_duration"] >= reply["eval_duration"]


@ANY_ENGINE
def test_a_stop_string_is_cut_out_of_stream_and_whole(server_of: Server, case: Case) -> None:
    """Stops that lie inside a token or across two are found, and nothing of them is shown."""
    settings: Json = {"max_tokens": 24, **GREEDY}
    text = server_of.answer(case.model, **settings)
    assert len(text) >= 4
    for stop in (text[2:4], text[1:9]):
        lines = server_of.stream(case.model, stop=[stop, "never to be seen"], **settings)
        assert text_of(lines) == text[: text.index(stop)]
        assert lines[-1]["done_reason"] == "stop"
        assert server_of.answer(case.model, stop=stop, **settings) == text[: text.index(stop)]


@ANY_ENGINE
def test_a_seed_repeats_and_another_differs(server_of: Server, case: Case) -> None:
    """The same seed gives the same text, others give others."""
    settings: Json = {"max_tokens": 24, "temperature": 1.5, "top_k": 0, "top_p": 1.0}
    server_of.answer(case.model, "Tell me a story.", **settings)
    texts = [server_of.answer(case.model, "Tell me a story.", seed=seed, **settings) for seed in (7, 7, 8, 9)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


@ANY_ENGINE
def test_top_k_one_is_greedy(server_of: Server, case: Case) -> None:
    """However hot, one candidate leaves no choice."""
    greedy = server_of.answer(case.model, max_tokens=8, **GREEDY)
    assert server_of.answer(case.model, max_tokens=8, temperature=2.0, top_k=1, top_p=1.0) == greedy


@ANY_ENGINE
def test_penalties_are_honoured(server_of: Server, case: Case) -> None:
    """Each harsh penalty changes greedy text, and none is named as ignored."""
    settings: Json = {"max_tokens": 16, **GREEDY}
    plain = server_of.answer(case.model, "Repeat: a a a a a a a a", **settings)
    harsh = ({"repeat_penalty": 3.0}, {"presence_penalty": 2.0, "frequency_penalty": 2.0})
    for penalties in harsh:
        reply = server_of.chat(case.model, "Repeat: a a a a a a a a", **penalties, **settings)
        assert reply.json()["message"]["content"] != plain, penalties
        assert "x-ignored-parameters" not in reply.headers


@ANY_ENGINE
def test_a_prompt_over_the_context_is_a_400_with_both_numbers(server_of: Server, case: Case) -> None:
    """Nothing is cut silently; the same engine answers the next request."""
    context = server_of.client.post(f"/models/{case.model}/load").json()["engine"]["context_length"]
    refused = server_of.chat(case.model, "word " * (context + 10), stream=True)
    assert refused.status_code == 400
    assert str(context) in refused.json()["error"]
    assert server_of.chat(case.model, max_tokens=2).status_code == 200


@ANY_ENGINE
def test_a_smaller_context_may_be_asked_for(server_of: Server, case: Case) -> None:
    """num_ctx bounds prompt and answer together; a larger one than loaded is named as ignored."""
    prompt_tokens = server_of.chat(case.model, max_tokens=1, temperature=0.0).json()["prompt_eval_count"]
    reply = server_of.chat(case.model, "Count up.", options={"num_ctx": prompt_tokens + 3}, temperature=0.0).json()
    assert reply["prompt_eval_count"] + reply["eval_count"] <= prompt_tokens + 3
    assert server_of.chat(case.model, options={"num_ctx": 2}).status_code == 400
    large = server_of.chat(case.model, max_tokens=1, num_ctx=10**6)
    assert large.headers["x-ignored-parameters"] == "num_ctx"


@ANY_ENGINE
def test_max_tokens_zero_evaluates_the_prompt_only(server_of: Server, case: Case) -> None:
    """No text, no tokens, reason length."""
    reply = server_of.chat(case.model, max_tokens=0).json()
    assert (reply["message"]["content"], reply["eval_count"], reply["done_reason"]) == ("", 0, "length")


@ANY_ENGINE
def test_two_streams_at_once_do_not_mix(server_of: Server, case: Case) -> None:
    """Two open streams make progress together and each says what it says alone."""
    prompts = ("Tell me about cats.", "What is two plus two?")
    settings: Json = {"max_tokens": 12, **GREEDY}
    alone = [server_of.answer(case.model, prompt, **settings) for prompt in prompts]
    with (
        server_of.streaming(case.model, prompts[0], **settings) as one,
        server_of.streaming(case.model, prompts[1], **settings) as two,
    ):
        first_of_one, first_of_two = next(one), next(two)
        together = [[first_of_one, *one], [first_of_two, *two]]
    assert all([line["done"] for line in lines].index(True) == len(lines) - 1 for lines in together)
    if case.backend in SAME_ALONE_AND_TOGETHER:
        assert [text_of(lines) for lines in together] == alone


@ANY_ENGINE
def test_unicode_goes_in_and_out_whole(server_of: Server, case: Case) -> None:
    """No half characters in any chunk, whatever the prompt; stream and whole reply agree."""
    settings: Json = {"max_tokens": 24, **GREEDY}
    server_of.answer(case.model, "Repeat this: 你好 🌍 ñandú क्षि", **settings)  # as in the first test of streams
    lines = server_of.stream(case.model, "Repeat this: 你好 🌍 ñandú क्षि", **settings)
    assert text_of(lines).encode()  # no lone surrogate
    assert len(text_of(lines)) > 0
    assert server_of.answer(case.model, "Repeat this: 你好 🌍 ñandú क्षि", **settings) == text_of(lines)
    if case.speaks:  # the others write random bytes
        assert "\ufffd" not in text_of(lines[:-2])


# --- Clients that leave ----------------------------------------------------------------------------------------------


def used_seconds(engine: psutil.Process) -> float:
    """CPU time of an engine's process and all below it, in seconds."""
    return float(sum(sum(process.cpu_times()[:2]) for process in [engine, *engine.children(recursive=True)]))


def wait_until_idle(server_of: Server, model: str) -> None:
    """Wait until nobody uses the model and its engine computes no more."""
    wait_until(lambda: server_of.client.get(f"/models/{model}").json()["pins"] == 0, what="no pins")
    engine = psutil.Process(server_of.client.get(f"/models/{model}").json()["pid"])

    def idle() -> bool:
        before = used_seconds(engine)
        time.sleep(0.2)  # a measurement: how much CPU time two tenths of a second cost
        return used_seconds(engine) - before < 0.05

    wait_until(idle, 10, "an idle engine")


@ANY_ENGINE
def test_a_client_that_leaves_frees_the_engine(server_of: Server, case: Case) -> None:
    """After the disconnect the engine's processes stop computing, and the same process serves the next."""
    server_of.answer(case.model, "Hi", max_tokens=1)
    pid = server_of.client.get(f"/models/{case.model}").json()["pid"]
    endless: Json = {"max_tokens": 4000, "temperature": 1.0, "ignore_eos": True}
    with server_of.streaming(case.model, "Write a very long story about a king.", **endless) as lines:
        for _ in range(3):
            next(lines)
    wait_until_idle(server_of, case.model)
    assert server_of.chat(case.model, max_tokens=2).status_code == 200
    assert server_of.client.get(f"/models/{case.model}").json()["pid"] == pid


@ANY_ENGINE
def test_as_many_clients_as_there_are_places_leave_and_the_next_is_served(server_of: Server, case: Case) -> None:
    """No slot stays taken: seven streams are left, one of them with two answers (MAX_PARALLEL is 8)."""
    endless: Json = {"max_tokens": 400, "temperature": 1.0, "ignore_eos": True}
    with ExitStack() as clients:
        streams = [server_of.streaming(case.model, f"Story {number}.", **endless) for number in range(6)]
        streams.append(server_of.streaming(case.model, "Two stories.", n=2, **endless))
        for lines in [clients.enter_context(stream) for stream in streams]:
            next(lines)
    wait_until_idle(server_of, case.model)
    assert server_of.chat(case.model, max_tokens=2).status_code == 200


# --- Probabilities ---------------------------------------------------------------------------------------------------


def check_token(entry: Json) -> None:
    """The three fields that a token and an alternative share."""
    assert entry["logprob"] <= 0
    assert all(0 <= byte <= 255 for byte in entry["bytes"])
    assert bytes(entry["bytes"]).decode(errors="replace") == entry["token"] or "\ufffd" in entry["token"]


def check_entries(entries: list[Json], alternatives: int) -> None:
    """Every entry is well-formed, with its alternatives from likely to unlikely."""
    for entry in entries:
        assert set(entry) == {"token", "logprob", "bytes"} | ({"top_logprobs"} if alternatives else set())
        check_token(entry)
        likely = [other["logprob"] for other in entry.get("top_logprobs", [])]
        assert len(likely) <= alternatives
        assert likely == sorted(likely, reverse=True)
        for other in entry.get("top_logprobs", []):
            assert set(other) == {"token", "logprob", "bytes"}
            check_token(other)


@ANY_ENGINE
def test_logprobs_describe_every_token(server_of: Server, case: Case) -> None:
    """One entry a token; greedy takes the likeliest; the stream carries the same entries as the whole reply."""
    settings: Json = {"max_tokens": 8, "logprobs": True, "top_logprobs": 3, **GREEDY}
    server_of.answer(case.model, **settings)  # as in the first test of streams
    reply = server_of.chat(case.model, **settings)
    assert "x-ignored-parameters" not in reply.headers
    whole = reply.json()
    check_entries(whole["logprobs"], 3)
    assert whole["eval_count"] - len(whole["logprobs"]) in (0, 1)  # the end token may not be shown
    for entry in whole["logprobs"]:
        assert len(entry["top_logprobs"]) == 3
        assert entry["token"] == entry["top_logprobs"][0]["token"]
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"], abs=1e-4)
    lines = server_of.stream(case.model, **settings)
    streamed = [entry for line in lines for entry in line.get("logprobs", ())]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole["logprobs"]]
    assert [entry["logprob"] for entry in streamed] == pytest.approx(
        [entry["logprob"] for entry in whole["logprobs"]], abs=1e-2
    )


@ANY_ENGINE
@pytest.mark.parametrize("alternatives", [1, 4])
def test_as_many_alternatives_as_asked_for(server_of: Server, case: Case, alternatives: int) -> None:
    """Whatever the rank of the token that was drawn."""
    settings: Json = {"max_tokens": 12, "temperature": 1.0, "top_k": 6, "seed": 3, "ignore_eos": True}
    reply = server_of.chat(case.model, "A story.", logprobs=True, top_logprobs=alternatives, **settings).json()
    check_entries(reply["logprobs"], alternatives)
    assert {len(entry["top_logprobs"]) for entry in reply["logprobs"]} == {alternatives}


@SPEAKING
def test_the_bytes_of_the_tokens_make_the_text(server_of: Server, case: Case) -> None:
    """Joined they are the answer, with characters that lie in several tokens too."""
    reply = server_of.chat(case.model, "Repeat: 🌍 ñandú 你好", max_tokens=12, logprobs=True, **GREEDY).json()
    joined = b"".join(bytes(entry["bytes"]) for entry in reply["logprobs"]).decode(errors="ignore")
    assert joined.startswith(reply["message"]["content"].rstrip("\ufffd"))


@ANY_ENGINE
def test_logprobs_only_where_asked_for(server_of: Server, case: Case) -> None:
    """Without the field there are none; without alternatives none are named; inside options it means the same."""
    assert "logprobs" not in server_of.chat(case.model, max_tokens=2).json()
    for fields in ({"logprobs": True}, {"options": {"logprobs": True, "top_logprobs": 0}}):
        entries = server_of.chat(case.model, max_tokens=2, temperature=1.5, **fields).json()["logprobs"]
        assert entries
        check_entries(entries, 0)
    assert server_of.chat(case.model, max_tokens=2, logprobs=True, top_logprobs=21).status_code == 400


# --- Several answers -------------------------------------------------------------------------------------------------

TWO: Json = {"n": 2, "seed": 11, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_tokens": 8, "ignore_eos": True}


@UNSTOPPED
def test_two_answers_in_one_reply(server_of: Server, case: Case) -> None:
    """The message is the first choice; counts are of both together, the prompt's once; a seed repeats them.

    Not on llama.cpp: what a batch holds beside a choice changes the last bits of its numbers.
    """
    one = server_of.chat(case.model, "Tell me a story.", **{**TWO, "n": 1}).json()
    assert "choices" not in one
    replies = [server_of.chat(case.model, "Tell me a story.", **TWO).json() for _ in range(2)]
    first, second = (reply["choices"] for reply in replies)
    assert first == second or case.backend == "llama.cpp"
    assert [choice["index"] for choice in first] == [0, 1]
    assert first[0]["message"] == replies[0]["message"]
    assert first[0]["message"]["content"] != first[1]["message"]["content"]
    assert [choice["done_reason"] for choice in first] == ["length", "length"]
    assert replies[0]["eval_count"] == 16
    assert replies[0]["prompt_eval_count"] == one["prompt_eval_count"]


@UNSTOPPED
def test_two_answers_in_one_stream(server_of: Server, case: Case) -> None:
    """Each line says whose it is, each choice ends by itself, and one last line ends them all."""
    lines = server_of.stream(case.model, "Tell me a story.", **TWO)
    whole = server_of.chat(case.model, "Tell me a story.", **TWO).json()
    *lines, last = lines
    assert last["done"] is True
    assert (last["eval_count"], last["prompt_eval_count"]) == (16, whole["prompt_eval_count"])
    assert not any(line["done"] for line in lines)
    for choice in whole["choices"]:
        mine = [line for line in lines if line["index"] == choice["index"]]
        shown = "".join(line["message"]["content"] for line in mine if "message" in line)
        assert shown == choice["message"]["content"] or case.backend == "llama.cpp"
        assert [line["done_reason"] for line in mine if "done_reason" in line] == ["length"]
        assert "done_reason" in mine[-1]


@UNSTOPPED
def test_several_answers_with_logprobs_keep_them_apart(server_of: Server, case: Case) -> None:
    """Every choice has one entry a token."""
    lines = server_of.stream(case.model, "Tell me a story.", logprobs=True, **TWO)
    for index in range(2):
        entries = [entry for line in lines if line.get("index") == index for entry in line.get("logprobs", ())]
        check_entries(entries, 0)
        assert len(entries) == 8


@ANY_ENGINE
@pytest.mark.parametrize("n", [0, 17, -1, "2"])
def test_n_is_from_one_to_sixteen(server_of: Server, case: Case, n: int | str) -> None:
    """Anything else is a 400 that names it."""
    refused = server_of.chat(case.model, n=n)
    assert refused.status_code == 400
    assert "'n'" in refused.json()["error"] or " n" in refused.json()["error"]


# --- Length and bias -------------------------------------------------------------------------------------------------


@UNSTOPPED
def test_ignore_eos_gives_exactly_max_tokens(server_of: Server, case: Case) -> None:
    """The end token ends nothing."""
    reply = server_of.chat(case.model, "Count from one to one hundred.", max_tokens=40, ignore_eos=True, **GREEDY)
    assert "x-ignored-parameters" not in reply.headers
    assert (reply.json()["eval_count"], reply.json()["done_reason"]) == (40, "length")


@UNSTOPPED
def test_min_tokens_are_made(server_of: Server, case: Case) -> None:
    """The model ends no earlier; with an equal maximum the count is exact. llama.cpp has no such rule."""
    reply = server_of.chat(case.model, "Say yes.", min_tokens=40, max_tokens=40, **GREEDY)
    if case.backend == "llama.cpp":
        assert reply.headers["x-ignored-parameters"] == "min_tokens"
        return
    assert "x-ignored-parameters" not in reply.headers
    assert (reply.json()["eval_count"], reply.json()["done_reason"]) == (40, "length")
    assert server_of.chat(case.model, max_tokens=20, min_tokens=4, **GREEDY).json()["eval_count"] >= 4


@ANY_ENGINE
def test_logit_bias_decides(server_of: Server, case: Case) -> None:
    """A bias of 100 makes every token the same one; the same bias below zero makes it never that one."""
    settings: Json = {"max_tokens": 4, "logprobs": True, **GREEDY}
    reply = server_of.chat(case.model, logit_bias={"350": 100}, **settings)
    assert "x-ignored-parameters" not in reply.headers
    wanted = {entry["token"] for entry in reply.json()["logprobs"]}
    assert len(wanted) == 1
    shunned = server_of.chat(case.model, logit_bias={"350": -100}, **settings).json()["logprobs"]
    assert wanted.isdisjoint(entry["token"] for entry in shunned)


@ANY_ENGINE
@pytest.mark.parametrize("bias", [{"x": 1}, {"-1": 1}, {"5": "1"}, {"99999999": 5}], ids=str)
def test_a_bad_bias_is_refused_and_hurts_nobody(server_of: Server, case: Case, bias: Json) -> None:
    """A 400 that names the field; the same engine answers the next request."""
    server_of.chat(case.model, max_tokens=1)
    pid = server_of.client.get(f"/models/{case.model}").json()["pid"]
    refused = server_of.chat(case.model, max_tokens=2, logit_bias=bias)
    if "99999999" not in bias or refused.status_code != 200:  # such a token is never chosen: an engine may let it pass
        assert refused.status_code == 400
        assert "logit_bias" in refused.json()["error"]
    assert server_of.chat(case.model, max_tokens=2).status_code == 200
    assert server_of.client.get(f"/models/{case.model}").json()["pid"] == pid


# --- Constrained output ----------------------------------------------------------------------------------------------

CITY: Json = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Zürich 🌍"]}},
    "required": ["city"],
    "additionalProperties": False,
}
GOOD: list[tuple[str, Any, str]] = [
    ("format", CITY, r'\{\s*"city"\s*:\s*"(Paris|Zürich 🌍)"\s*\}\s*'),
    ("regex", "[0-9]{3}-[a-c]{2}", "[0-9]{3}-[a-c]{2}"),
    ("choice", ["naïve 🌍 你好"], "naïve 🌍 你好"),
    ("grammar", 'root ::= "yes" | "no"', "yes|no"),
]
BAD: list[tuple[str, Any]] = [
    ("format", {"type": "nonsense"}),
    ("format", "xml"),
    ("regex", "(unclosed"),
    ("choice", []),
    ("choice", "red"),
    ("grammar", 'root ::= ("yes" |'),
]


@ANY_ENGINE
@pytest.mark.parametrize(("field", "value", "pattern"), GOOD, ids=[field for field, *_ in GOOD])
def test_a_constraint_is_kept_or_named_as_ignored(
    server_of: Server, case: Case, field: str, value: Any, pattern: str
) -> None:
    """Stream and whole reply fit the constraint, with every character whole."""
    settings: Json = {"max_tokens": 32, field: value, **GREEDY}
    reply = server_of.chat(case.model, 'Name a city, as in {"city": "Paris"}.', **settings)
    assert reply.status_code == 200, reply.text
    if field not in CONSTRAINTS[case.backend]:
        assert reply.headers["x-ignored-parameters"] == field
        return
    assert "x-ignored-parameters" not in reply.headers
    assert re.fullmatch(pattern, reply.json()["message"]["content"])
    assert reply.json()["done_reason"] == "stop"
    assert re.fullmatch(
        pattern, text_of(server_of.stream(case.model, 'Name a city, as in {"city": "Paris"}.', **settings))
    )


@ANY_ENGINE
def test_any_json_where_no_schema_is_given(server_of: Server, case: Case) -> None:
    """`format: json` gives JSON, as far as it goes."""
    reply = server_of.chat(case.model, "A JSON object with a name.", max_tokens=48, format="json", **GREEDY)
    if "format" not in CONSTRAINTS[case.backend]:
        assert reply.headers["x-ignored-parameters"] == "format"
    elif reply.json()["done_reason"] == "stop":
        json.loads(reply.json()["message"]["content"])
    else:  # cut at max_tokens: it began as JSON does
        assert reply.json()["message"]["content"].lstrip()[0] in '{["0123456789-tfn'


@ANY_ENGINE
@pytest.mark.parametrize(("field", "value"), BAD, ids=[f"{field}-{value}" for field, value in BAD])
def test_a_bad_constraint_is_a_400_and_hurts_nobody(server_of: Server, case: Case, field: str, value: Any) -> None:
    """The text names the field, and the same process answers the next request."""
    server_of.chat(case.model, max_tokens=1)
    pid = server_of.client.get(f"/models/{case.model}").json()["pid"]
    refused = server_of.chat(case.model, max_tokens=4, **{field: value})
    if field in CONSTRAINTS[case.backend]:
        assert refused.status_code == 400, refused.text
        assert field in refused.json()["error"]
    else:  # named as ignored, or refused for its form
        assert refused.status_code == 400 or refused.headers["x-ignored-parameters"] == field
    assert server_of.chat(case.model, max_tokens=2).status_code == 200
    assert server_of.client.get(f"/models/{case.model}").json()["pid"] == pid


# --- What only some models show --------------------------------------------------------------------------------------


def test_a_base_model_without_a_template_gets_the_plain_one(server: Server) -> None:
    """gpt2 chats: roles are written out, and the model is stopped before it speaks for the user."""
    server.have("gpt2")
    reply = server.chat("gpt2", "Hello", max_tokens=4, temperature=0.0).json()
    assert reply["prompt_eval_count"] > 5
    assert reply["message"]["role"] == "assistant"


def test_custom_code_is_refused_without_the_grant_and_served_with_it(server: Server) -> None:
    """403 that names the remedy; no code runs; a pull with the grant serves at once, without a cooldown."""
    server.pull("test/custom", trust_remote_code=False)
    refused = server.chat("test/custom")
    assert refused.status_code == 403
    assert "trust_remote_code" in refused.json()["error"]
    assert server.client.get("/models/test/custom").json()["trust_remote_code"] is False
    server.pull("test/custom", trust_remote_code=True)
    assert server.chat("test/custom", max_tokens=2).headers["x-backend"] == "pipeline"


@pytest.mark.parametrize(
    ("model", "words"),
    [("test/unknown", "does not recognize this architecture"), ("test/encoder-decoder", "encoder-decoder")],
)
def test_what_no_engine_can_load_is_said_rung_by_rung(server: Server, model: str, words: str) -> None:
    """A 500 with every rung's own words."""
    server.have(model)
    error = server.chat(model).json()["error"]
    assert words in error
    assert [rung["backend"] for rung in server.client.get(f"/models/{model}").json()["ladder"]] == [
        "vllm",
        "transformers",
        "pipeline",
    ]


def test_four_bit_on_request(server: Server) -> None:
    """quantize: 4bit is honoured on the transformers and the pipeline rung, and the reply says so."""
    for model, backend in (("test/smollm2", "transformers"), ("test/mixture", "pipeline")):
        job = server.pull(model, quantize="4bit")
        assert job["preferred_quantized"] is True
        reply = server.chat(model, max_tokens=8, temperature=0.0)
        assert (reply.headers["x-backend"], reply.headers["x-quantization"]) == (backend, "4bit-nf4")
        server.pull(model)


def test_an_embedding_model_does_not_chat(server: Server) -> None:
    """A clear 400, no load."""
    server.have("all-minilm")
    refused = server.chat("all-minilm")
    assert refused.status_code == 400
    assert '"all-minilm" does not support chat' in refused.json()["error"]


def test_a_damaged_file_is_no_reason_for_another_engine(server: Server) -> None:
    """Damaged after the pull: the error names the file, and the ladder stops."""
    job = server.pull("gpt2")
    path = f"{job['local_path']}/model.safetensors"
    with open(path, "rb") as file:
        sound = file.read()
    server.client.post("/models/gpt2/unload")
    try:
        with open(path, "wb") as file:
            file.write(sound[: len(sound) // 2])
        broken = server.chat("gpt2")
        assert broken.status_code == 500
        assert "model.safetensors" in broken.json()["error"]
        assert len(server.client.get("/models/gpt2").json()["ladder"]) <= 2
    finally:
        with open(path, "wb") as file:
            file.write(sound)
    server.pull("gpt2")
    assert server.chat("gpt2", max_tokens=2).status_code == 200
