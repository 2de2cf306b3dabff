"""Files of models: headers that lie, which files to fetch, what a snapshot says about itself, and what follows."""

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import app

FINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=100)
SAME = settings(FINE, derandomize=True)  # the same examples in every run
Json = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that are written anew for every example."""
    return tmp_path_factory.mktemp("files")


# -- safetensors --------------------------------------------------------------


def tensor(start: int, end: int, shape: Any = None, dtype: str = "F32") -> Json:
    """One entry of a safetensors header."""
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def safetensors(header: Json | list[Any] | bytes | str | int | None, data: int = 0, size: int | None = None) -> bytes:
    """A file of this header and so many bytes of data; `size` lies about the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + bytes(data)


def twice(first: Json, second: Json, data: int) -> bytes:
    """A file whose header has one name two times."""
    return safetensors(f'{{"a": {json.dumps(first)}, "a": {json.dumps(second)}}}'.encode(), data)


GOOD = safetensors(
    {"__metadata__": {"format": "pt"}, "a": tensor(0, 16, [2, 2]), "b": tensor(16, 24), "c": tensor(24, 24, [0])}, 24
)


def check(content: bytes, folder: Path) -> int:
    """What check_safetensors says about a file of this content."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    return app.check_safetensors(path)


def test_good_safetensors(folder: Path) -> None:
    """The number of parameters over all tensors; scalars and empty tensors included."""
    assert check(GOOD, folder) == 6
    assert check(safetensors({"a": tensor(0, 4, [])}, 4), folder) == 1
    assert check(safetensors({"b": tensor(4, 8), "a": tensor(0, 4)}, 8), folder) == 2
    assert check(safetensors({}), folder) == 0
    assert check(safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}   ', 4), folder) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 7, b"\0" * 8, b"\xff" * 8, b"\xff" * 100, safetensors(b"{}", size=3),
        safetensors(b"{}", size=2**63),
        safetensors(b"{}", size=app.MAX_SAFETENSORS_HEADER_BYTES + 1), safetensors(b""), safetensors(b"not json"),
        safetensors(b"\xff\xfe"), safetensors(b"["), safetensors("text"),
        safetensors(5), safetensors(None), safetensors({"a": 5}), safetensors({"a": None}), safetensors({"a": {}}),
        safetensors({"a": {"data_offsets": [0, 4]}}, 4),
        safetensors({"a": {**tensor(0, 4), "data_offsets": None}}, 4),
        safetensors({"a": tensor(0, 4)}, 3), safetensors({"a": tensor(0, 4)}, 0), safetensors({"a": tensor(0, 4)}, 5),
        safetensors({}, 1), safetensors({"a": tensor(1, 5)}, 5), safetensors({"a": tensor(0, 4), "b": tensor(5, 9)}, 9),
        safetensors({"a": tensor(0, 8), "b": tensor(4, 12)}, 12),
        safetensors({"a": tensor(0, 4), "b": tensor(0, 4)}, 4),
        safetensors({"a": tensor(4, 0)}, 4), safetensors({"a": tensor(-4, 0)}, 0),
        safetensors({"a": tensor(0, 2**70)}, 4),
        safetensors({"a": tensor(0, 4), "b": tensor(8, 4), "c": tensor(4, 8)}, 8),
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,NaN]}}', 4),
        safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}', 4),
        twice(tensor(0, 4), tensor(4, 8), 8),
    ],
    ids=lambda content: f"{len(content)} bytes",
)  # fmt: skip
def test_damaged_safetensors(content: bytes, folder: Path) -> None:
    """Header too large, cut off or not JSON; gaps, overlaps, bytes too few or too many: seen before native code is."""
    with pytest.raises(app.BadModelFiles, match=r"model\.safetensors is damaged.*[Pp]ull"):
        check(content, folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (safetensors([]), "0 parameters, though the header is a list"),
        (safetensors(""), "0 parameters, though the header is a text"),
        (safetensors([1]), "IndexError"),
        (safetensors({"a": {**tensor(0, 4), "data_offsets": [0]}}, 4), "ValueError: one offset"),
        (safetensors({"a": {**tensor(0, 4), "data_offsets": [0, 4, 5]}}, 4), "ValueError: three offsets"),
        (safetensors({"a": {**tensor(0, 4), "data_offsets": [0, "4"]}}, 4), "TypeError: an offset that is text"),
        (safetensors({"a": {**tensor(0, 4), "shape": None}}, 4), "TypeError: no shape"),
        (safetensors({"a": {**tensor(0, 4), "shape": [[1]]}}, 4), "TypeError: a list within the shape"),
        (safetensors({"a": {**tensor(0, 4), "shape": ["x"]}}, 4), "TypeError: text within the shape"),
        (safetensors({"a": {**tensor(0, 4), "shape": [2.5]}}, 4), "2.5 parameters"),
        (safetensors({"a": {**tensor(0, 4), "shape": [-1]}}, 4), "-1 parameters"),
        (safetensors({"a": {**tensor(0, 4), "shape": [10**30]}}, 4), "10**30 parameters in four bytes"),
        (safetensors(b"[" * 100_000), "RecursionError"),
        (safetensors({"a": tensor(0, 4, dtype="F31")}, 4), "no such dtype"),
        (safetensors({"a": tensor(0, 4, dtype="")}, 4), "no dtype"),
        pytest.param(
            twice(tensor(0, 4), tensor(0, 4), 4),
            "the format forbids a name twice",
            marks=pytest.mark.xfail(reason="the last of two equal names is taken"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_subtly_damaged_safetensors(content: bytes, reason: str, folder: Path) -> None:
    """Headers that are JSON and still nonsense."""
    with pytest.raises(app.BadModelFiles):
        check(content, folder)


def test_limit_of_the_header(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header above the format's limit is not even read."""
    monkeypatch.setattr(app, "MAX_SAFETENSORS_HEADER_BYTES", 100)
    with pytest.raises(app.BadModelFiles, match="header is larger"):
        check(GOOD, folder)


def test_truncated_safetensors(folder: Path) -> None:
    """Cut off anywhere, or with anything behind, a file is damaged."""
    for size in range(len(GOOD)):
        with pytest.raises(app.BadModelFiles):
            check(GOOD[:size], folder)
    with pytest.raises(app.BadModelFiles):
        check(GOOD + b"\0", folder)


@SAME
@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=3))
def test_changed_bytes_in_safetensors(folder: Path, place: int, replacement: bytes) -> None:
    """Any change of up to three bytes: a number of parameters or BadModelFiles, nothing else."""
    changed = GOOD[:place] + replacement + GOOD[place + len(replacement) :]
    with suppress(app.BadModelFiles):
        assert isinstance(check(changed, folder), int)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
entries = st.fixed_dictionaries(
    {
        "data_offsets": st.lists(st.integers(-1, 9), max_size=3) | json_values,
        "shape": st.lists(st.integers(0, 3)) | json_values,
    }
)


@FINE
@given(st.dictionaries(st.text(max_size=2), entries | json_values, max_size=3) | json_values, st.integers(0, 9))
@example({"a": {"data_offsets": [0, 4], "shape": None}}, 4)
def test_any_safetensors_header(folder: Path, header: Any, data: int) -> None:
    """Any JSON at all as the header."""
    with suppress(app.BadModelFiles):
        assert isinstance(check(safetensors(header, data), folder), int)


# -- GGUF ---------------------------------------------------------------------


def text(value: bytes | str) -> bytes:
    """A GGUF string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    """A key and its value."""
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    """A GGUF array."""
    return struct.pack("<IQ", kind, count) + items


def weights(name: str, shape: tuple[int, ...], offset: int = 0, dimensions: int | None = None) -> bytes:
    """The entry of a GGUF tensor; `dimensions` lies about the length of its shape."""
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, 0, offset)


def gguf(*pairs: bytes, count: int | None = None, tensors: int = 0, magic: bytes = b"GGUF", tail: bytes = b"") -> bytes:
    """The head of a GGUF file; `count` lies about the number of pairs."""
    return magic + struct.pack("<IQQ", 3, tensors, len(pairs) if count is None else count) + b"".join(pairs) + tail


LLAMA = (
    pair("general.architecture", 8, text("llama")),
    pair("llama.context_length", 4, struct.pack("<I", 2048)),
    pair("tokenizer.ggml.tokens", 9, array(8, 3, text("<s>") + text("é") + text(""))),
    pair("tokenizer.chat_template", 8, text("{{ messages }}")),
)
GOOD_GGUF = gguf(
    *LLAMA,
    pair("general.file_type", 4, struct.pack("<I", 3)),
    tensors=2,
    tail=weights("a", (4, 8)) + weights("b", (16,), 128),
)


def read(content: bytes, folder: Path) -> Json:
    """The metadata of a file of this content."""
    path = folder / "model.gguf"
    path.write_bytes(content)
    return app.GGUFReader(path).metadata


def test_good_gguf(folder: Path) -> None:
    """Scalars and texts by name; arrays of texts are counted only."""
    assert read(GOOD_GGUF, folder) == {
        "general.architecture": "llama",
        "llama.context_length": 2048,
        "tokenizer.ggml.tokens": 3,
        "tokenizer.chat_template": "{{ messages }}",
        "general.file_type": 3,
    }
    assert read(gguf(), folder) == {}


def test_parameters_of_gguf(folder: Path) -> None:
    """The values of all tensors; one without dimensions has one value."""
    path = folder / "model.gguf"
    path.write_bytes(GOOD_GGUF)
    assert app.GGUFReader(path).parameter_count == 4 * 8 + 16
    path.write_bytes(gguf(tensors=1, tail=weights("a", ())))
    assert app.GGUFReader(path).parameter_count == 1


@pytest.mark.parametrize(
    ("kind", "raw", "value"),
    [
        (0, b"\xff", 255), (1, b"\xff", -1), (2, b"\xff\xff", 65535), (3, b"\xff\xff", -1), (4, b"\xff" * 4, 2**32 - 1),
        (5, b"\xff" * 4, -1), (6, struct.pack("<f", 0.5), 0.5), (7, b"\1", True), (7, b"\0", False),
        (8, text("é"), "é"),
        (10, b"\xff" * 8, 2**64 - 1), (11, b"\xff" * 8, -1), (12, struct.pack("<d", 0.1), 0.1),
        (9, array(4, 2, bytes(8)), (0, 0)), (9, array(12, 0), ()), (9, array(0, 2000, bytes(2000)), 2000),
        (9, array(8, 1, text("x")), 1),
        (9, array(9, 2, array(4, 1, bytes(4)) + array(8, 2, text("a") + text("b"))), 2),
        (9, array(9, 1, array(9, 1, array(0, 3, bytes(3)))), 1),
    ],
)  # fmt: skip
def test_gguf_values(kind: int, raw: bytes, value: Any, folder: Path) -> None:
    """Every type of the specification, arrays of arrays too; what follows is still read right."""
    assert read(gguf(pair("a", kind, raw), pair("b", 0, b"\7")), folder) == {"a": value, "b": 7}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"G", b"GGU", b"GGML" + bytes(20), gguf(magic=b"FUGG"), gguf(count=2**63), gguf(count=1),
        gguf(tensors=2**63),
        gguf(*LLAMA, count=5), gguf(struct.pack("<Q", 2**63) + b"key"), gguf(struct.pack("<Q", 1000) + b"key"),
        gguf(pair("a", 8, struct.pack("<Q", 2**64 - 1))), gguf(pair("a", 8, struct.pack("<Q", 100) + b"short")),
        gguf(pair("a", 8, text(b"\xff\xfe"))), gguf(text(b"\xff") + struct.pack("<I", 0) + b"\0"),
        gguf(pair("a", 13, b"\0" * 8)), gguf(pair("a", 2**32 - 1, b"")),
        gguf(pair("a", 9, array(4, 2**63))), gguf(pair("a", 9, array(8, 2**63))), gguf(pair("a", 9, array(9, 2**40))),
        gguf(pair("a", 9, array(13, 1, bytes(8)))), gguf(pair("a", 9, array(8, 3, text("x")))),
        gguf(pair("a", 9, array(12, 4, bytes(30))), pair("b", 0, b"\0")), gguf(tensors=1),
        gguf(tensors=2, tail=weights("a", (4,))), gguf(tensors=1, tail=weights("a", (4,), dimensions=2)),
        gguf(tensors=1, tail=weights("a", (4,), offset=10_000)),
        gguf(tensors=1, tail=struct.pack("<Q", 2**60) + bytes(90)),
    ],
    ids=lambda content: f"{len(content)} bytes",
)  # fmt: skip
def test_damaged_gguf(content: bytes, folder: Path) -> None:
    """Wrong magic, lying counts and lengths, unknown types, text that is none."""
    with pytest.raises(app.BadModelFiles, match=r"model\.gguf is not a sound GGUF file"):
        read(content, folder)


def test_limit_of_a_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text above any real one is not even read."""
    monkeypatch.setattr(app, "MAX_GGUF_STRING_BYTES", 10)
    with pytest.raises(app.BadModelFiles, match="text"):
        read(GOOD_GGUF, folder)


def test_truncated_gguf(folder: Path) -> None:
    """Cut off at any byte."""
    for size in range(len(GOOD_GGUF)):
        with pytest.raises(app.BadModelFiles):
            read(GOOD_GGUF[:size], folder)


def test_truncated_gguf_that_ends_with_a_list(folder: Path) -> None:
    """Also inside a list of numbers at the end."""
    content = gguf(*LLAMA, pair("scores", 9, array(12, 3, bytes(24))))
    assert read(content, folder)["scores"] == (0, 0, 0)
    for size in range(len(content)):
        with pytest.raises(app.BadModelFiles):
            read(content[:size], folder)


@pytest.mark.parametrize(
    "tail",
    [
        weights("a", (1,) * 8, dimensions=2**32 - 1),  # GGUF has four dimensions at most
        weights("a", (2**63, 2**63)),  # more values than there are bytes
        pytest.param(  # within the file, but counted from the end of the head
            weights("a", (4,), offset=40),
            marks=pytest.mark.xfail(reason="an offset is compared with the size of the file, not of its data"),
        ),
    ],
    ids=["dimensions", "shape", "offset"],
)
def test_tensors_that_cannot_be(folder: Path, tail: bytes) -> None:
    """Entries that promise more than there is."""
    with pytest.raises(app.BadModelFiles):
        read(gguf(tensors=1, tail=tail), folder)


def test_deeply_nested_gguf(folder: Path) -> None:
    """Lists in lists in lists."""
    with pytest.raises(app.BadModelFiles):
        read(gguf(pair("a", 9, array(9, 1) * 5000 + array(0, 0))), folder)


@FINE
@given(st.integers(0, len(GOOD_GGUF) - 1), st.binary(min_size=1, max_size=4))
def test_changed_bytes_in_gguf(folder: Path, place: int, replacement: bytes) -> None:
    """Any change of up to four bytes: metadata or BadModelFiles, nothing else."""
    with suppress(app.BadModelFiles):
        assert isinstance(read(GOOD_GGUF[:place] + replacement + GOOD_GGUF[place + len(replacement) :], folder), dict)


@FINE
@given(st.binary(max_size=200))
def test_any_bytes_as_gguf(folder: Path, tail: bytes) -> None:
    """Garbage behind the magic."""
    with suppress(app.BadModelFiles):
        assert isinstance(read(b"GGUF" + tail, folder), dict)


# -- which files to fetch -----------------------------------------------------


def files(*names: str) -> dict[str, int]:
    """A repository of these files."""
    return dict.fromkeys(names, 100)


SIDE = ("config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "spiece.model")


@pytest.mark.parametrize(
    ("chosen", "left"),
    [
        (SIDE, ()),
        ((), ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack")),
        ((), ("original/consolidated.00.pth", "original/params.json", "original/model.safetensors")),
        (("model-1.safetensors", "model-2.safetensors"), ("consolidated.safetensors", "sub/consolidated.safetensors")),
        ((), ("onnx/model.onnx", "onnx/config.json", "openvino/openvino_model.bin", "metal/model.bin")),
        ((), ("model-Q4_K_M.gguf",)),
        (("1_Pooling/config.json", "modules.json"), ()),
        ((), ("modeling_x.py", "setup.sh", "README.md", ".gitattributes", "a.png")),
    ],
)
def test_choose_safetensors(chosen: tuple[str, ...], left: tuple[str, ...]) -> None:
    """One copy of the weights and what belongs to them; no pickle, no other runtime, no code."""
    names = ("model.safetensors", *left, *chosen)
    assert app.choose_files(files(*names), None, False) == sorted(("model.safetensors", *chosen))


def test_code_only_when_granted() -> None:
    """Python files come with `trust_remote_code` only."""
    names = ("model.safetensors", "config.json", "modeling_x.py")
    assert app.choose_files(files(*names), None, True) == sorted(names)
    assert "modeling_x.py" not in app.choose_files(files(*names), None, False)


GGUFS = tuple(f"m-{tag}.gguf" for tag in ("F16", "IQ4_XS", "Q2_K", "Q4_0", "Q4_K_M", "Q4_K_S", "Q8_0"))
SPLIT = tuple(f"BF16/m-BF16-0000{part}-of-00003.gguf" for part in (1, 2, 3))


@pytest.mark.parametrize(
    ("names", "tag", "chosen"),
    [
        (GGUFS, None, ("m-Q4_K_M.gguf",)),
        (GGUFS, "Q8_0", ("m-Q8_0.gguf",)),
        (GGUFS, "q8_0", ("m-Q8_0.gguf",)),
        (GGUFS, "Q4_K_S", ("m-Q4_K_S.gguf",)),
        (GGUFS, "IQ4_XS", ("m-IQ4_XS.gguf",)),
        (("m-Q4_0.gguf", "m-Q8_0.gguf"), None, ("m-Q4_0.gguf",)),
        (("m-F16.gguf", "m-Q8_0.gguf"), None, ("m-Q8_0.gguf",)),
        (("m.Q4_K_M.gguf", "m.Q8_0.gguf"), None, ("m.Q4_K_M.gguf",)),
        (("model-q4_k_m.gguf",), None, ("model-q4_k_m.gguf",)),
        (("Q4_K_M/m.gguf", "Q8_0/m.gguf"), "Q8_0", ("Q8_0/m.gguf",)),
        ((*SPLIT, *GGUFS), "BF16", SPLIT),
        ((*reversed(SPLIT), "m-Q4_K_M.gguf"), "BF16", SPLIT),
        (("m-Q4_K_M.gguf", "mmproj-Q4_K_M.gguf"), "Q4_K_M", ("m-Q4_K_M.gguf", "mmproj-Q4_K_M.gguf")),
        (("m-Q4_K_M.gguf", "model.safetensors"), "Q4_K_M", ("m-Q4_K_M.gguf",)),
        (("a-Q8_0.gguf", "b-Q8_0.gguf"), "Q8_0", ("a-Q8_0.gguf",)),
        (("m-Q4_0.gguf", "m-Q4_0_4_4.gguf"), "Q4_0", ("m-Q4_0.gguf",)),
        (("m-Q4_K_M.gguf", *SIDE, "README.md"), None, ("m-Q4_K_M.gguf",)),
        (("m-Q4_K_M.GGUF",), None, ("m-Q4_K_M.GGUF",)),
    ],
)  # fmt: skip
def test_choose_gguf(names: tuple[str, ...], tag: str | None, chosen: tuple[str, ...]) -> None:
    """The file of the tag with all its parts in order; without a tag Q4_K_M, else the nearest."""
    assert tuple(app.choose_files(files(*names), tag, False)) == chosen


@pytest.mark.parametrize("names", [("model.gguf",), ("model-f16.gguf",), ("m-IQ2_XXS.gguf", "m-Q6_K.gguf")])
def test_choose_the_gguf_there_is(names: tuple[str, ...]) -> None:
    """A repository without any usual quantization still has a model."""
    assert app.choose_files(files(*names), None, False) == [names[0]]


@pytest.mark.parametrize(
    ("names", "tag"),
    [
        (GGUFS, "Q5_K_M"),
        (GGUFS, "Q4_K_MM"),
        (GGUFS, "Q"),
        (GGUFS, "K.M"),
        (("model.safetensors",), "Q4_K_M"),
        ((), "Q4_0"),
    ],
)
def test_no_such_gguf(names: tuple[str, ...], tag: str) -> None:
    """404 that names the tag and what there is; the tag is a word and no pattern."""
    with pytest.raises(app.NotFound, match=f"tagged {tag}") as raised:
        app.choose_files(files(*names), tag, False)
    assert all(name in str(raised.value) for name in names if name.endswith(".gguf"))


@pytest.mark.parametrize(
    "names",
    [
        ("pytorch_model.bin", *SIDE),
        ("model.pt",),
        ("x.pth",),
        ("x.ckpt",),
        ("original/consolidated.safetensors",),
        SIDE,
        (),
    ],
)
def test_nothing_safe_to_open(names: tuple[str, ...]) -> None:
    """Pickle only, or no weights at all."""
    with pytest.raises((app.UnsafeFormat, app.UnsupportedFormat)) as raised:
        app.choose_files(files(*names), None, True)
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    assert ("can run code" in str(raised.value)) is bool(pickles)
    assert isinstance(raised.value, app.UnsafeFormat) is bool(pickles)
    assert ("allow_pickle" in str(raised.value)) is ("pytorch_model.bin" in names)


# -- what a snapshot says -----------------------------------------------------

SOURCE = app.ModelSource("org/model", "org/model")
Snapshot = Callable[..., Path]


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """Makes a snapshot folder of a config and files."""

    def make(config: Any = None, **contents: bytes) -> Path:
        folder = tmp_path / "snapshot"
        folder.mkdir()
        if config is not None:
            (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        for name, content in contents.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return folder

    return make


def storable(meta: app.ModelMeta) -> bool:
    """Whether the facts can be read back from the store: a server that cannot does not start again."""
    return msgspec.json.decode(msgspec.json.encode(meta), type=app.ModelMeta) == meta


LLAMA_CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}


def described(path: Path) -> app.ModelMeta:
    """What describe_model says."""
    return app.describe_model(SOURCE, path, "abc123")


def test_describe_safetensors(snapshot: Snapshot) -> None:
    """Sizes and counts over all files, and the facts of config.json."""
    path = snapshot(LLAMA_CONFIG, a__safetensors=GOOD, b__safetensors=GOOD)
    meta = described(path)
    assert (meta.name, meta.source, meta.revision, meta.local_path) == ("org/model", "org/model", "abc123", str(path))
    assert (meta.format, meta.size_bytes, meta.parameter_count) == ("safetensors", 2 * len(GOOD), 12)
    assert (meta.family, meta.architecture, meta.context_length) == ("llama", "LlamaForCausalLM", 4096)
    assert not (meta.mixture_of_experts or meta.custom_code or meta.embedding or meta.stored_quantization)
    assert storable(meta)


@pytest.mark.parametrize(
    ("change", "fact", "value"),
    [
        ({"num_local_experts": 8}, "mixture_of_experts", True),
        ({"num_experts": 2}, "mixture_of_experts", True),
        ({"n_routed_experts": 64}, "mixture_of_experts", True),
        ({"moe_num_experts": 4}, "mixture_of_experts", True),
        ({"text_config": {"num_experts": 4}}, "mixture_of_experts", True),
        ({"num_experts": 1}, "mixture_of_experts", False),
        ({"num_experts": None}, "mixture_of_experts", False),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "mixture_of_experts", True),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "custom_code", True),
        ({"auto_map": {}}, "custom_code", False),
        ({"quantization_config": {"quant_method": "awq"}}, "stored_quantization", "awq"),
        ({"quantization_config": {}}, "stored_quantization", ""),
        ({"quantization_config": None}, "stored_quantization", ""),
        ({"max_position_embeddings": None, "n_positions": 1024}, "context_length", 1024),
        ({"max_position_embeddings": None}, "context_length", 0),
        ({"text_config": {"max_position_embeddings": 512}}, "context_length", 512),
        ({"architectures": None}, "architecture", ""),
        ({"architectures": []}, "architecture", ""),
    ],
)
def test_facts_of_a_config(change: Json, fact: str, value: Any, snapshot: Snapshot) -> None:
    """Mixtures of experts, custom code, weights that are quantized already, context lengths."""
    assert getattr(described(snapshot({**LLAMA_CONFIG, **change}, model__safetensors=GOOD)), fact) == value


@pytest.mark.parametrize(
    ("token", "insert"), [("<fim_prefix>", True), ("<\uff5cfim\u2581begin\uff5c>", True), ("x", False)]
)
def test_describe_what_a_tokenizer_can_fill_in(snapshot: Snapshot, token: str, insert: bool) -> None:
    """A model with the tokens for a hole in a text can fill it."""
    tokens = json.dumps({"added_tokens": [{"content": token}]}, ensure_ascii=False).encode()
    path = snapshot(LLAMA_CONFIG, model__safetensors=GOOD, tokenizer__json=tokens)
    assert ("insert" in described(path).capabilities) is insert


def test_describe_embedding_model(snapshot: Snapshot) -> None:
    """modules.json is what sentence-transformers writes."""
    assert described(snapshot(LLAMA_CONFIG, model__safetensors=GOOD, modules__json=b"[]")).embedding is True


ADAPTER_CONFIG = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "lora_alpha": 16}


def adapter_files(config: Any) -> dict[str, bytes]:
    """What a LoRA adapter has in place of a config.json and its weights."""
    text = config if isinstance(config, str) else json.dumps(config)
    return {"adapter_config__json": text.encode(), "adapter_model__safetensors": GOOD}


def test_describe_adapter(snapshot: Snapshot) -> None:
    """Its base and rank; the rest is its base's."""
    meta = described(snapshot(None, **adapter_files(ADAPTER_CONFIG)))
    assert (meta.adapter_of, meta.adapter_rank, meta.format) == ("org/base", 8, "safetensors")
    assert (meta.size_bytes, meta.parameter_count) == (len(GOOD), 6)
    assert storable(meta)


def test_a_model_with_an_adapter_beside_it_is_a_model(snapshot: Snapshot) -> None:
    """Some repositories have both; a config.json decides."""
    meta = described(snapshot(LLAMA_CONFIG, model__safetensors=GOOD, **adapter_files(ADAPTER_CONFIG)))
    assert (meta.adapter_of, meta.adapter_rank, meta.architecture) == ("", 0, "LlamaForCausalLM")


def test_choose_files_of_an_adapter() -> None:
    """Its configuration and weights, no pickle."""
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "training_args.bin", "README.md")
    assert app.choose_files(files(*names), None, False) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    "config",
    [
        "", "not json", [], {}, {"r": 8}, {"base_model_name_or_path": "org/base"}, {**ADAPTER_CONFIG, "r": "eight"},
        {**ADAPTER_CONFIG, "r": None}, {**ADAPTER_CONFIG, "r": 0},
        {**ADAPTER_CONFIG, "r": 1024}, {**ADAPTER_CONFIG, "base_model_name_or_path": None},
    ],
    ids=lambda config: str(config)[-30:],
)  # fmt: skip
def test_damaged_adapters(config: Any, snapshot: Snapshot) -> None:
    """Said at the pull."""
    with pytest.raises(app.BadModelFiles, match=r"adapter_config\.json"):
        described(snapshot(None, **adapter_files(config)))


@pytest.mark.parametrize("base", ["/home/somebody/model", "", "../base", "a/b/c"])
def test_an_adapter_of_a_base_without_a_name(base: str, snapshot: Snapshot) -> None:
    """A folder of whoever trained it is no name of the Hub: refused at the pull, never looked up."""
    with pytest.raises(app.ServerError):
        described(snapshot(None, **adapter_files({**ADAPTER_CONFIG, "base_model_name_or_path": base})))


@pytest.mark.parametrize(("ranks", "room"), [((), 0), ((1,), 8), ((8,), 8), ((4, 16), 16), ((65,), 128), ((512,), 512)])
def test_room_for_adapters(ranks: tuple[int, ...], room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest rank among a model's own adapters, as vLLM counts room."""
    names = {
        f"lab/{rank}": app.ModelMeta(f"lab/{rank}", "x", "/x", adapter_of="org/a", adapter_rank=rank) for rank in ranks
    }
    other = {"lab/other": app.ModelMeta("lab/other", "x", "/x", adapter_of="org/b", adapter_rank=256)}
    monkeypatch.setattr(app, "model_meta", names | other)
    assert app.adapter_rank(app.ModelMeta("org/a", "x", "/x")) == room


def test_describe_takes_the_entry_along(snapshot: Snapshot) -> None:
    """System prompt and options of the catalogue become the model's."""
    entry = app.CatalogueEntry(pip="x==1", system="Be brief.", options={"temperature": 0.0})
    meta = app.describe_model(app.ModelSource("tiny:1m", entry=entry), snapshot(LLAMA_CONFIG, a__safetensors=GOOD), "")
    assert (meta.source, meta.system, meta.options) == ("x==1", "Be brief.", {"temperature": 0.0})


@pytest.mark.parametrize(
    ("config", "contents"),
    [
        (None, {"model__safetensors": GOOD}),
        ("not json", {"model__safetensors": GOOD}),
        ("", {"model__safetensors": GOOD}),
        (LLAMA_CONFIG, {}),
        (LLAMA_CONFIG, {"pytorch_model__bin": b"x"}),
        (LLAMA_CONFIG, {"model__safetensors": GOOD[:-1]}),
        (LLAMA_CONFIG, {"a__safetensors": GOOD, "b__safetensors": b""}),
    ],
)
def test_damaged_snapshots(config: Any, contents: dict[str, bytes], snapshot: Snapshot) -> None:
    """No config, no weights, damaged weights: said at the pull, not at the load."""
    with pytest.raises(app.BadModelFiles):
        described(snapshot(config, **contents))


@pytest.mark.parametrize(
    "config",
    [
        [], 5, "[" * 100_000, '{"max_position_embeddings": 1e999}', *({**LLAMA_CONFIG, **change} for change in (
            {"text_config": "x"}, {"max_position_embeddings": "long"}, {"num_experts": "x"},
            {"quantization_config": "awq"}, {"model_type": "\ud800"}, {"architectures": {"a": 1}}, {"architectures": 5},
        )),
    ],
    ids=lambda config: str(config)[-30:],
)  # fmt: skip
def test_odd_configs(config: Any, snapshot: Snapshot) -> None:
    """Valid JSON of the wrong types is a damaged snapshot, not an internal error; else the facts can be stored."""
    path = snapshot(config, model__safetensors=GOOD)
    with suppress(app.BadModelFiles):
        assert storable(described(path))


def test_hostile_header_does_not_end_the_server(snapshot: Snapshot) -> None:
    """Whatever a header says, what is kept of it can be read again."""
    header = {"a": {**tensor(0, 4), "shape": [2.5]}}
    path = snapshot(LLAMA_CONFIG, model__safetensors=safetensors(header, 4))
    with suppress(app.BadModelFiles):
        assert storable(described(path))


def test_missing_shard(snapshot: Snapshot) -> None:
    """Weights of which a part is missing are said at the pull."""
    index = json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}).encode()
    path = snapshot(LLAMA_CONFIG, a__safetensors=GOOD)
    (path / "model.safetensors.index.json").write_bytes(index)
    with pytest.raises(app.BadModelFiles, match=r"^b\.safetensors of org/model is missing\. Pull the model again\.$"):
        described(path)


def test_describe_gguf_file(tmp_path: Path) -> None:
    """One file: format, family, context, template, parameters, and the quantization."""
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD_GGUF)
    meta = described(path)
    assert (meta.format, meta.local_path, meta.size_bytes) == ("gguf", str(path), len(GOOD_GGUF))
    assert (meta.family, meta.architecture, meta.context_length) == ("llama", "llama", 2048)
    assert (meta.has_chat_template, meta.embedding, meta.stored_quantization) == (True, False, "Q4_1")
    assert meta.parameter_count == 48


def test_describe_split_gguf(tmp_path: Path) -> None:
    """A split model is named by its first part and as large as all; its neighbours do not count."""
    for name in ("m-Q8_0-00001-of-00002", "m-Q8_0-00002-of-00002", "m-Q4_0-00001-of-00001", "other"):
        (tmp_path / f"{name}.gguf").write_bytes(GOOD_GGUF)
    meta = described(tmp_path / "m-Q8_0-00001-of-00002.gguf")
    assert (meta.size_bytes, meta.stored_quantization) == (2 * len(GOOD_GGUF), "Q4_1")
    assert [file.name for file in app.weight_files(meta)] == [
        "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf",
    ]  # fmt: skip
    app.check_files(meta)
    (tmp_path / "m-Q8_0-00002-of-00002.gguf").write_bytes(b"")
    with pytest.raises(app.BadModelFiles, match="00002-of-00002"):
        app.check_files(meta)


def test_describe_gguf_in_capitals(tmp_path: Path) -> None:
    """The case of the suffix does not matter."""
    (tmp_path / "M-Q8_0.GGUF").write_bytes(GOOD_GGUF)
    meta = described(tmp_path / "M-Q8_0.GGUF")
    app.check_files(meta)
    assert meta.size_bytes == len(GOOD_GGUF)


def test_files_that_are_gone(tmp_path: Path) -> None:
    """Before a load the files are checked again: damaged or gone, it is said in our words."""
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD_GGUF)
    meta = described(path)
    app.check_files(meta)
    path.unlink()
    with pytest.raises(app.BadModelFiles, match=r"is missing\. Pull the model again\.$"):
        app.check_files(meta)
    with pytest.raises(app.BadModelFiles, match=r"is missing\. Pull the model again\.$"):
        app.check_files(app.ModelMeta("m", "test", str(tmp_path / "nowhere")))


def test_safetensors_win_over_gguf(snapshot: Snapshot) -> None:
    """As in `choose_files`."""
    assert described(snapshot(LLAMA_CONFIG, a__safetensors=GOOD, b__gguf=GOOD_GGUF)).format == "safetensors"


@pytest.mark.parametrize(
    ("value", "quantization"),
    [
        (struct.pack("<II", 4, 0), "F32"), (struct.pack("<II", 4, 15), "Q4_K_M"), (struct.pack("<II", 4, 30), "IQ4_XS"),
        (struct.pack("<II", 4, 32), "BF16"), (struct.pack("<II", 4, 999), "unknown"),
        (struct.pack("<Ii", 5, -1), "unknown"), (struct.pack("<I", 8) + text("Q4_0"), "unknown"),
        (struct.pack("<I", 9) + array(4, 2, bytes(8)), None), (b"", "unknown"),
    ],
)  # fmt: skip
def test_quantization_of_gguf(value: bytes, quantization: str | None, tmp_path: Path) -> None:
    """What the file says of itself, whatever its name is; nonsense is `unknown` and no error."""
    path = tmp_path / "model-Q8_0.gguf"
    path.write_bytes(gguf(text("general.file_type") + value) if value else gguf())
    stored = described(path).stored_quantization
    assert stored == quantization if quantization else isinstance(stored, str)


def test_names_of_file_types() -> None:
    """The numbers are those of the format's own library."""
    library = pytest.importorskip("gguf")
    names = {int(member): member.name.removeprefix("ALL_").removeprefix("MOSTLY_") for member in library.LlamaFileType}
    for number, name in app.GGUF_FILE_TYPES.items():
        assert names[number].removesuffix("_MOE") == name


def test_gguf_facts(tmp_path: Path) -> None:
    """An embedding model has a pooling type; a base model no template; a file may say nothing at all."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(pair("general.architecture", 8, text("bert")), pair("bert.pooling_type", 4, bytes(4))))
    meta = described(path)
    assert (meta.embedding, meta.has_chat_template, meta.context_length) == (True, False, 0)
    path.write_bytes(gguf())
    assert (described(path).family, described(path).embedding) == ("", False)


@pytest.mark.parametrize("value", [(8, text("long")), (6, struct.pack("<f", float("nan")))])
def test_odd_gguf_facts(value: tuple[int, bytes], tmp_path: Path) -> None:
    """A context length that is no number."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(pair("general.architecture", 8, text("llama")), pair("llama.context_length", *value)))
    with suppress(app.BadModelFiles):
        assert isinstance(described(path), app.ModelMeta)


# -- what follows from the facts ----------------------------------------------


def meta_of(**facts: Any) -> app.ModelMeta:
    """A model with these facts."""
    return app.ModelMeta("m", "test", "/nowhere", **facts)


BIG, SMALL = app.MODEL_Q4_THRESHOLD_BYTES, app.MODEL_Q4_THRESHOLD_BYTES - 1


@pytest.mark.parametrize("preferred", [None, True, False])
@pytest.mark.parametrize("size", [0, SMALL, BIG])
@pytest.mark.parametrize("stored", ["", "awq"])
@pytest.mark.parametrize(("gpu", "bitsandbytes"), [*product([False, True], repeat=2)])
def test_decide_quantization(preferred: bool | None, size: int, stored: str, gpu: bool, bitsandbytes: bool) -> None:
    """What is quantized stays; then the preference; then 4-bit where GPU, library and size say so."""
    meta = meta_of(preferred_quantized=preferred, size_bytes=size, stored_quantization=stored)
    if stored or preferred is False:
        expected = "none"
    elif preferred or (gpu and bitsandbytes and size == BIG):
        expected = "4bit-nf4"
    else:
        expected = "none"
    assert app.decide_quantization(meta, gpu, bitsandbytes) == expected


def test_threshold_zero_means_never(monkeypatch: pytest.MonkeyPatch) -> None:
    """MODEL_Q4_THRESHOLD_BYTES=0 turns the automatism off."""
    monkeypatch.setattr(app, "MODEL_Q4_THRESHOLD_BYTES", 0)
    assert app.decide_quantization(meta_of(size_bytes=10**12), True, True) == "none"


def test_rungs() -> None:
    """One engine for GGUF; for safetensors the ladder in the order of the guidelines."""
    assert app.rungs(meta_of(format="gguf")) == ("llama.cpp",)
    assert app.rungs(meta_of()) == ("vllm", "transformers", "pipeline")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The engine libraries that are there; all of them unless a test takes some away."""
    names = {"torch", "transformers", "accelerate", "vllm", "xllamacpp", "bitsandbytes"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in names else None)
    monkeypatch.setattr(app, "ENGINE_PYTHON_VLLM", "")
    yield names


def refused(kind: str) -> app.Rung:
    """What the rung above said."""
    return app.Rung("transformers", "refused", "why", kind)


PLAIN: Json = {}
MIXTURE: Json = {"mixture_of_experts": True}
CUSTOM: Json = {"custom_code": True}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("backend", "facts", "quantization", "reason"),
    [
        ("vllm", PLAIN, "none", ""),
        ("vllm", MIXTURE, "none", ""),
        ("vllm", PLAIN, "4bit-nf4", ""),
        ("vllm", CUSTOM, "none", "not granted at /pull"),
        ("vllm", CUSTOM | {"trust_remote_code": True}, "none", ""),
        ("transformers", PLAIN, "none", ""),
        ("transformers", PLAIN, "4bit-nf4", ""),
        ("transformers", MIXTURE, "none", "mixture of experts"),
        ("transformers", CUSTOM, "none", "custom code"),
        ("pipeline", PLAIN, "none", "only for mixtures of experts, custom code"),
        ("pipeline", {"ladder": [refused("start_failed")]}, "none", "only for mixtures of experts, custom code"),
        ("pipeline", {"ladder": [refused("out_of_memory")]}, "none", "only for mixtures of experts, custom code"),
        ("pipeline", {"ladder": [refused("unsupported")]}, "none", ""),
        ("pipeline", MIXTURE, "none", ""),
        ("pipeline", CUSTOM, "4bit-nf4", ""),
        ("pipeline", MIXTURE | CUSTOM, "none", ""),
        ("llama.cpp", {"format": "gguf"}, "Q4_1", ""),
    ],
)
def test_cheap_refusal(backend: str, facts: Json, quantization: str, reason: str) -> None:
    """With every library there, the facts decide."""
    said = app.cheap_refusal(meta_of(**facts), backend, quantization)
    assert (reason in said) if reason else said == ""


@pytest.mark.parametrize(
    ("backend", "missing"),
    [
        ("vllm", "vllm"), ("transformers", "torch"), ("transformers", "accelerate"), ("pipeline", "transformers"),
        ("llama.cpp", "xllamacpp"),
    ],
)  # fmt: skip
def test_missing_libraries_refuse(backend: str, missing: str, installed: set[str]) -> None:
    """A rung whose library is not installed says which."""
    installed.discard(missing)
    said = app.cheap_refusal(meta_of(**MIXTURE), backend, "none")
    assert said == f"not installed ({missing} missing)"
    assert app.engine_unavailable(backend) == said


def test_missing_bitsandbytes_refuses_four_bit(installed: set[str]) -> None:
    """Asked for 4-bit, never silently served without."""
    installed.discard("bitsandbytes")
    assert "bitsandbytes is not installed" in app.cheap_refusal(meta_of(), "transformers", "4bit-nf4")
    assert app.cheap_refusal(meta_of(), "transformers", "none") == ""


def test_missing_bitsandbytes_is_nothing_to_llama_cpp(installed: set[str], tmp_path: Path) -> None:
    """A GGUF file is quantized or not, bitsandbytes has no part in it, even if 4-bit was asked for."""
    installed.discard("bitsandbytes")
    (tmp_path / "model.gguf").write_bytes(gguf())
    meta = described(tmp_path / "model.gguf")
    meta.preferred_quantized = True
    assert app.cheap_refusal(meta, "llama.cpp", app.decide_quantization(meta, False, False)) == ""


def test_vllm_of_another_interpreter(installed: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENGINE_PYTHON_VLLM counts instead of this environment's packages."""
    installed.discard("vllm")
    monkeypatch.setattr(app, "ENGINE_PYTHON_VLLM", str(tmp_path / "python"))
    assert str(tmp_path / "python") in app.engine_unavailable("vllm")
    (tmp_path / "python").touch()
    assert app.engine_unavailable("vllm") == ""
