"""Small GGUF files for tests of the engine that reads them; the vocabulary is that of the other small models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tinymodels
from gguf import GGUFWriter, PoolingType

CONTEXT_LENGTH = 2048
SIZES = {"embedding_length": 512, "block_count": 1, "feed_forward_length": 32, "attention.head_count": 4}
FILL_IN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
# A template in the manner of Qwen 3: tools, calls, results, thinking.
TEMPLATE = r"""{%- if tools %}<|im_start|>system
# Tools
<tools>{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}
</tools>
For each call, return a JSON object within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}{%- for message in messages %}{{- '<|im_start|>' }}
{%- if message.role == 'tool' %}{{- 'user\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- else %}{{- message.role + '\n' }}
{%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}{% endif %}{{- '}\n</tool_call>' }}
{%- endfor %}{% endif %}{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""
SCRIPT = (
    "<think>", "Paris", " it is", ".", "</think>", "One moment, é🌍.", "\n<tool_call>\n", '{"name": ', '"get_weather"',
    ', "arguments": ', '{"city": "Zür', 'ich 🌍"}', "}", "\n</tool_call>\n<tool_call>\n{",
    '"name": "get_time", "arguments"', ": {}}\n</tool_call>",
)  # fmt: skip


def write(folder: Path, architecture: str = "llama", script: tuple[str, ...] = (), **facts: Any) -> Path:
    """Write one model. One with a script says it, token by token, after a line's end; all others say random things."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(folder / "model-Q8_0.gguf", architecture)
    tokenizer = json.loads((tinymodels.tiny_moe() / "tokenizer.json").read_text(encoding="utf-8"))
    numbers = tokenizer["model"]["vocab"] | {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    known = sorted(numbers, key=numbers.__getitem__)
    tokens = [*known, *FILL_IN, *(piece for piece in script if piece not in numbers)]
    for name, size in (SIZES | {"context_length": CONTEXT_LENGTH, "vocab_size": len(tokens)}).items():
        writer.add_uint32(f"{architecture}.{name}", size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 if token in numbers else 4 for token in tokens])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    )
    end = numbers[tinymodels.TURN_END]
    writer.add_eos_token_id(end)
    for place, name in enumerate(("pre", "suf", "mid")):
        writer.add_uint32(f"tokenizer.ggml.fim_{name}_token_id", tokens.index(FILL_IN[place]))
    if template := facts.pop("template", ""):
        writer.add_chat_template(template)
    if pooling := facts.pop("pooling", None):
        writer.add_pooling_type(pooling)
    successors = [numbers["Ċ"], *(tokens.index(piece) for piece in script), end]
    add_tensors(
        writer, architecture, len(tokens), list(zip(successors, successors[1:], strict=False)) if script else []
    )
    if pooling == PoolingType.RANK:
        writer.add_classifier_output_labels(["yes", "no"])
        writer.add_tensor("cls.output.weight", random_numbers(2, SIZES["embedding_length"]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model-Q8_0.gguf"


def random_numbers(*shape: int) -> Any:
    """Always the same ones."""
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32) * 0.08


def add_tensors(writer: GGUFWriter, architecture: str, vocabulary: int, pairs: list[tuple[int, int]]) -> None:
    """Random weights, or with pairs of tokens those of a model that only knows what follows each."""
    size, hidden, heads = (SIZES[name] for name in ("embedding_length", "feed_forward_length", "attention.head_count"))
    embeddings, output = random_numbers(vocabulary, size), random_numbers(vocabulary, size)
    if pairs:
        embeddings, output = np.eye(vocabulary, size, dtype=np.float32), np.zeros((vocabulary, size), np.float32)
        for this, following in pairs:
            output[following, this] = 1
    layer = {"attn_q": (size, size), "attn_k": (size, size), "attn_v": (size, size), "attn_output": (size, size)}
    layer |= {"ffn_gate": (hidden, size), "ffn_up": (hidden, size), "ffn_down": (size, hidden)}
    tensors = {"token_embd": embeddings, "output": output, "output_norm": np.ones(size, np.float32)}
    for name, shape in layer.items():
        tensors[f"blk.0.{name}"] = random_numbers(*shape) * (0 if pairs else 1)
    norms = {"attn_norm": size, "ffn_norm": size}
    norms |= {"attn_q_norm": size // heads, "attn_k_norm": size // heads} if architecture == "qwen3" else {}
    for name, length in norms.items():
        tensors[f"blk.0.{name}"] = np.ones(length, np.float32)
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
