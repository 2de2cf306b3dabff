"""The same promises on every engine, with real models: llama.cpp, transformers, and the pipeline rung."""

import time
from dataclasses import dataclass

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
]
# Module scope makes pytest run all tests of one case together: each model is then loaded once, not once a test.
ANY_ENGINE = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.backend}-{case.model}", scope="module")
SPEAKING = pytest.mark.parametrize(
    "case", [case for case in CASES if case.speaks], ids=lambda case: f"{case.backend}-{case.model}", scope="module"
)
GREEDY: Json = {"temperature": 0.0}


@pytest.fixture(scope="module", autouse=True)
def models(server: Server) -> None:
    """Every model of this file on disk."""
    for case in CASES:
        server.have(case.model, trust_remote_code=case.trust)


@ANY_ENGINE
def test_the_expected_engine_serves(server: Server, case: Case) -> None:
    """The contract headers, the ladder and /models agree on who serves."""
    reply = server.chat(case.model, max_tokens=4)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-backend"] == case.backend
    facts = server.client.get(f"/models/{case.model}").json()
    assert (facts["backend"], facts["state"]) == (case.backend, "ready")
    assert reply.headers["x-quantization"] == facts["quantization"]
    assert reply.headers["x-model-revision"] == facts["revision"]
    assert facts["ladder"][-1] == {"backend": case.backend, "outcome": "loaded", "reason": "", "kind": ""}
    assert facts["memory_bytes"] > 10 * 1024 * 1024


@SPEAKING
def test_a_trained_model_knows_the_capital(server: Server, case: Case) -> None:
    """The template is applied as the model was trained on it."""
    assert "Paris" in server.answer(case.model, max_tokens=24, **GREEDY)


@ANY_ENGINE
def test_the_stream_says_what_the_whole_reply_says(server: Server, case: Case) -> None:
    """Greedy text, counts and reason are equal."""
    settings: Json = {"max_tokens": 16, **GREEDY}
    server.answer(case.model, "Say something.", **settings)  # both runs below then start from the same prompt cache
    whole = server.chat(case.model, "Say something.", **settings).json()
    lines = server.stream(case.model, "Say something.", **settings)
    assert text_of(lines) == whole["message"]["content"]
    for name in ("done_reason", "prompt_eval_count", "eval_count"):
        assert lines[-1][name] == whole[name], name
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]


@ANY_ENGINE
def test_counts_and_durations_are_there(server: Server, case: Case) -> None:
    """Exact counts; every duration a positive integer; max_tokens ends with `length`."""
    reply = server.chat(case.model, "Count from one to one hundred.", max_tokens=5, temperature=0.0).json()
    assert reply["eval_count"] <= 5
    assert reply["done_reason"] in ("length", "stop")
    assert reply["prompt_eval_count"] > 3
    for name in ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration"):
        assert isinstance(reply[name], int), name
        assert reply[name] > 0, name
    assert reply["total_duration"] >= reply["eval_duration"]


@ANY_ENGINE
def test_a_stop_string_is_cut_out_of_stream_and_whole(server: Server, case: Case) -> None:
    """Stops that lie inside a token or across two are found, and nothing of them is shown."""
    settings: Json = {"max_tokens": 24, **GREEDY}
    text = server.answer(case.model, **settings)
    assert len(text) >= 4
    stop = text[2:4]
    lines = server.stream(case.model, stop=[stop, "never to be seen"], **settings)
    assert text_of(lines) == text[: text.index(stop)]
    assert lines[-1]["done_reason"] == "stop"
    assert server.answer(case.model, stop=stop, **settings) == text[: text.index(stop)]


@ANY_ENGINE
def test_a_seed_repeats_and_another_differs(server: Server, case: Case) -> None:
    """The same seed gives the same text, others give others."""
    settings: Json = {"max_tokens": 24, "temperature": 1.5, "top_k": 0, "top_p": 1.0}
    server.answer(case.model, "Tell me a story.", **settings)
    texts = [server.answer(case.model, "Tell me a story.", seed=seed, **settings) for seed in (7, 7, 8, 9)]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


@ANY_ENGINE
def test_top_k_one_is_greedy(server: Server, case: Case) -> None:
    """However hot, one candidate leaves no choice."""
    greedy = server.answer(case.model, max_tokens=8, **GREEDY)
    assert server.answer(case.model, max_tokens=8, temperature=2.0, top_k=1, top_p=1.0) == greedy


@ANY_ENGINE
def test_a_repeat_penalty_is_honoured(server: Server, case: Case) -> None:
    """A harsh penalty changes greedy text, and it is not named as ignored."""
    plain = server.answer(case.model, "Repeat: a a a a a a a a", max_tokens=24, **GREEDY)
    reply = server.chat(
        case.model, "Repeat: a a a a a a a a", max_tokens=24, repeat_penalty=3.0, repeat_last_n=-1, **GREEDY
    )
    assert reply.json()["message"]["content"] != plain
    assert "x-ignored-parameters" not in reply.headers


@ANY_ENGINE
def test_a_prompt_over_the_context_is_a_400_with_both_numbers(server: Server, case: Case) -> None:
    """Nothing is cut silently; the same engine answers the next request."""
    context = server.client.post(f"/models/{case.model}/load").json()["engine"]["context_length"]
    refused = server.chat(case.model, "word " * (context + 10), stream=True)
    assert refused.status_code == 400
    assert str(context) in refused.json()["error"]
    assert server.chat(case.model, max_tokens=2).status_code == 200


@ANY_ENGINE
def test_a_smaller_context_may_be_asked_for(server: Server, case: Case) -> None:
    """num_ctx bounds prompt and answer together; a larger one than loaded is named as ignored."""
    prompt_tokens = server.chat(case.model, max_tokens=1, temperature=0.0).json()["prompt_eval_count"]
    reply = server.chat(case.model, "Count up.", options={"num_ctx": prompt_tokens + 3}, temperature=0.0).json()
    assert reply["prompt_eval_count"] + reply["eval_count"] <= prompt_tokens + 3
    assert server.chat(case.model, options={"num_ctx": 2}).status_code == 400
    large = server.chat(case.model, max_tokens=1, num_ctx=10**6)
    assert large.headers["x-ignored-parameters"] == "num_ctx"


@ANY_ENGINE
def test_max_tokens_zero_evaluates_the_prompt_only(server: Server, case: Case) -> None:
    """No text, no tokens, reason length."""
    reply = server.chat(case.model, max_tokens=0).json()
    assert (reply["message"]["content"], reply["eval_count"], reply["done_reason"]) == ("", 0, "length")


@ANY_ENGINE
def test_two_streams_at_once_do_not_mix(server: Server, case: Case) -> None:
    """Two open streams make progress together and each says what it says alone."""
    prompts = ("Tell me about cats.", "What is two plus two?")
    settings: Json = {"max_tokens": 12, **GREEDY}
    alone = [server.answer(case.model, prompt, **settings) for prompt in prompts]
    with (
        server.streaming(case.model, prompts[0], **settings) as one,
        server.streaming(case.model, prompts[1], **settings) as two,
    ):
        first_of_one, first_of_two = next(one), next(two)
        together = [text_of([first_of_one, *one]), text_of([first_of_two, *two])]
    if case.backend != "llama.cpp":  # its batches differ in the last bits of a number, and near-ties may turn
        assert together == alone
    assert all(isinstance(text, str) for text in together)


@ANY_ENGINE
def test_unicode_goes_in_and_out_whole(server: Server, case: Case) -> None:
    """No half characters in any chunk, whatever the prompt."""
    lines = server.stream(case.model, "Repeat this: 你好 🌍 ñandú क्षि", max_tokens=24, temperature=0.0)
    whole = server.answer(case.model, "Repeat this: 你好 🌍 ñandú क्षि", max_tokens=24, temperature=0.0)
    assert text_of(lines).encode()  # no lone surrogate
    assert len(text_of(lines)) > 0
    assert len(whole) > 0


@pytest.mark.parametrize("model", ["smollm2:135m", "test/smollm2"])
def test_a_client_that_leaves_frees_the_engine(server: Server, model: str) -> None:
    """After the disconnect the engine's processes stop computing."""
    prompt = "Write a very long story about a king and his three sons."
    server.answer(model, "Hi", max_tokens=1)
    engine = psutil.Process(server.client.get(f"/models/{model}").json()["pid"])
    with server.streaming(model, prompt, max_tokens=4000, temperature=1.0, stop=["\x00"]) as lines:
        for _ in range(3):
            next(lines)
    wait_until(lambda: server.client.get(f"/models/{model}").json()["pins"] == 0)

    def idle() -> bool:
        before = sum(engine.cpu_times()[:2])
        time.sleep(0.2)  # a measurement: how much CPU time two tenths of a second cost
        return sum(engine.cpu_times()[:2]) - before < 0.05

    wait_until(idle, 10, "an idle engine")


def test_a_base_model_without_a_template_gets_the_plain_one(server: Server) -> None:
    """gpt2 chats: roles are written out, and the model is stopped before it speaks for the user."""
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
