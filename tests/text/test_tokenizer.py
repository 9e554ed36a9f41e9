"""Tokenizers against what is known of the demo model, against transformers, and against damaged files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers, processors

from pjax.errors import CheckpointError, InvalidRequestError, UnsupportedError
from pjax.text.gguf_tokenizer import load_gguf_tokenizer
from pjax.text.loading import load_tokenizer
from pjax.text.tokenizer import Tokenizer
from tests.budget import examples
from tests.text.folders import TEXTS, train, transformers_tokenizer, write_folder


def write_gguf(path: Path, fields: dict[str, Any]) -> Path:
    """A .gguf file with these `tokenizer.` fields; arrays of floats, ints and strings alike."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields.items():
        add: Any = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
        add(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_fields(**changes: Any) -> dict[str, Any]:
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ab", "abc"]
    fields = {
        "ggml.model": "gpt2",
        "ggml.tokens": tokens,
        "ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "ggml.merges": ["1 2", "a b"],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
    }
    return {key: value for key, value in (fields | changes).items() if value is not None}


def spelt(tokenizer: Tokenizer, text: str) -> list[str | None]:
    return [tokenizer.id_to_token(i) for i in tokenizer.encode(text, add_special_tokens=False)]


# --- the demo model


def test_the_demo_tokenizer_is_what_its_file_says(demo: Tokenizer) -> None:
    assert demo.vocab_size == 49152
    assert [demo.id_to_token(i) for i in range(3)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert demo.id_to_token(demo.vocab_size) is None
    assert (demo.bos_token_id, demo.eos_token_ids) == (1, (2, 0)), (
        "<|im_end|>, which the file names, and <|endoftext|>, which llama.cpp finds"
    )
    assert demo.special_ids == frozenset(range(17))


def test_the_demo_tokenizer_splits_words_and_digits(demo: Tokenizer) -> None:
    assert spelt(demo, "2024") == ["2", "0", "2", "4"]
    assert spelt(demo, " 42 cats") == ["Ġ", "4", "2", "Ġcats"]
    assert spelt(demo, "the cat's") == ["the", "Ġcat", "'s"]
    assert demo.encode("Hi") == demo.encode("Hi", add_special_tokens=False), "add_bos_token is false"


def test_special_tokens_in_a_text_are_special(demo: Tokenizer) -> None:
    ids = demo.encode("<|im_start|>user\nHi<|im_end|>\n")
    assert ids[0] == 1 and ids.count(2) == 1
    assert demo.decode(ids) == "user\nHi\n"
    assert demo.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize("text", TEXTS)
def test_round_trips(demo: Tokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text)) == text


@given(st.text(st.characters(exclude_categories=("Cc", "Cn", "Co", "Cs")), max_size=60))  # the vocabulary lacks some bytes of the rest
@settings(max_examples=examples(60), deadline=None)
def test_round_trips_of_any_text(demo: Tokenizer, text: str) -> None:
    assert demo.decode(demo.encode(text), skip_special_tokens=False) == text


def test_text_that_utf8_cannot_encode_is_refused(demo: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="must be a str that UTF-8 can encode"):
        demo.encode("a\ud800b")


def test_loading_needs_no_large_library(demo_gguf: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, train(byte_level=True))
    code = f"""
import sys
from pjax.text.loading import load_tokenizer
load_tokenizer({str(demo_gguf)!r}), load_tokenizer({str(folder)!r})
print(sorted({{"jax", "torch", "transformers", "gguf"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- chat templates


@pytest.mark.parametrize("byte_level", [True, False])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}])
def test_folders_read_as_in_transformers(tmp_path: Path, byte_level: bool, flags: dict[str, bool]) -> None:
    backend = train(byte_level=byte_level)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    backend.add_tokens([AddedToken("<extra>", special=False)])
    backend.enable_truncation(4)
    folder = write_folder(tmp_path, backend, **flags)
    ours, theirs = load_tokenizer(folder), transformers_tokenizer(folder)
    for text in [*TEXTS, "x</s> y<s>z", "a<extra>b"]:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, add_special_tokens=special) == ids
            assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert ours.vocab_size == len(theirs)


def test_a_folder_as_opt_is_published(tmp_path: Path) -> None:
    """Files of a slow tokenizer only, and a begin token that only tokenizer_config.json asks for."""
    state = json.loads(train(byte_level=True).to_str())["model"]
    first = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    vocab = first | {token: index + 4 for token, index in state["vocab"].items() if token not in first}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(merge) for merge in state["merges"])]))
    end = {"content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "__type": "AddedToken"}
    names = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end | {"content": "<pad>"}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    settings = {"add_prefix_space": False, "add_bos_token": True, "errors": "replace", "tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | settings))
    ours, theirs = load_tokenizer(tmp_path), transformers_tokenizer(tmp_path)
    for text in [*TEXTS, "a</s> b"]:
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs(text, add_special_tokens=special)["input_ids"]
    assert ours.encode("the fox")[0] == 2 == ours.bos_token_id
    assert ours.eos_token_ids == (2,)


def test_the_legacy_map_of_special_tokens_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, train(byte_level=True), bos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<s>", "unk_token": {"content": "</s>"}}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.special_tokens == {"eos_token": "</s>", "unk_token": "</s>"}
    assert tokenizer.bos_token_id is None


def test_folders_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)


# --- GGUF


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("default", ["12", "3", "4", "a", "'", "s", "Ġ", "Ġ", "Ġ", "x"]),
        ("smollm", ["1", "2", "3", "4", "a", "'", "s", "Ġ", "Ġ", "Ġ", "x"]),
        ("llama-bpe", ["12", "3", "4", "a", "'", "s", "Ġ", "Ġ", "Ġ", "x"]),
        ("qwen2", ["1", "2", "3", "4", "a", "'", "s", "Ġ", "Ġ", "Ġ", "x"]),
    ],
)
def test_the_kinds_of_words(tmp_path: Path, kind: str, words: list[str]) -> None:
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "a.gguf", byte_level_fields(**{"ggml.pre": kind})))
    assert spelt(tokenizer, "1234a's   x") == words
    # Llama 3 takes whole words without merging; it and no other byte-level kind begins with BOS unless told not to.
    assert spelt(tokenizer, "abc") == (["abc"] if kind == "llama-bpe" else ["ab", "c"])
    assert (tokenizer.encode("x")[0] == 0) == (kind == "llama-bpe")
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS if kind != "qwen2" or "\u0301" not in text)


@pytest.mark.parametrize(("kind", "groups"), [("default", ["1234"]), ("llama-bpe", ["123", "4"]), ("qwen2", ["1", "2", "3", "4"])])
def test_the_groups_of_digits(tmp_path: Path, kind: str, groups: list[str]) -> None:
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "a.gguf", byte_level_fields(**{"ggml.pre": kind})))
    assert [word for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("1234")] == groups


@pytest.mark.parametrize("text", ["<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"])
@pytest.mark.parametrize("kind", [1, 3])  # llama.cpp takes a normal token of such a text for a control token
def test_ends_of_turns_of_a_gguf_are_found_by_their_text(text: str, kind: int, tmp_path: Path) -> None:
    fields = byte_level_fields()
    fields["ggml.tokens"], fields["ggml.token_type"] = [*fields["ggml.tokens"], text], [*fields["ggml.token_type"], kind]
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "a.gguf", fields))
    end = len(fields["ggml.tokens"]) - 1
    assert tokenizer.eos_token_ids == (1, end)
    assert tokenizer.special_ids == {0, 1, end}
    assert tokenizer.encode(f"a{text}b", add_special_tokens=False) == [*tokenizer.encode("a", False), end, *tokenizer.encode("b", False)]
    assert tokenizer.decode(tokenizer.encode(f"a{text}b")) == "ab"


def test_flags_and_types_of_a_gguf(tmp_path: Path) -> None:
    fields = byte_level_fields(**{"ggml.add_bos_token": True, "ggml.add_eos_token": True, "ggml.eot_token_id": 258})
    fields["ggml.token_type"][-1] = 4  # "abc" is defined by the user
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "a.gguf", fields))
    assert spelt(tokenizer, "xabcx</s>") == ["x", "abc", "x", "</s>"]
    assert tokenizer.encode("a")[0] == 0 and tokenizer.encode("a")[-1] == 1 and len(tokenizer.encode("a")) == 3
    assert tokenizer.eos_token_ids == (1, 258)
    assert tokenizer.special_ids == {0, 1}
    assert tokenizer.chat_template is None


def test_a_llama_gguf_reads_as_its_folder(tmp_path: Path) -> None:
    """Merges come from scores; the folder's come from training."""
    backend = train(byte_level=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    assert all(token is not None for token in tokens)
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    fields = {"ggml.model": "llama", "ggml.tokens": tokens, "ggml.token_type": types, "ggml.scores": scores}
    ours = load_gguf_tokenizer(write_gguf(tmp_path / "a.gguf", fields))
    theirs = transformers_tokenizer(write_folder(tmp_path / "hf", backend, unk_token="<unk>"))
    assert (ours.bos_token_id, ours.eos_token_ids, ours.special_ids) == (1, (2,), frozenset({0, 1, 2}))
    for text in [*TEXTS, "the end of the fox", "a</s> b"]:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert spelt(ours, "é") == ["▁", "<0xC3>", "<0xA9>"]
    plain = load_gguf_tokenizer(write_gguf(tmp_path / "b.gguf", fields | {"ggml.add_space_prefix": False, "ggml.add_bos_token": False}))
    assert plain.id_to_token(plain.encode("the")[0]) in ("th", "the", "t")
    assert plain.decode(plain.encode(" the")) == " the"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ggml.model": "bert"}, UnsupportedError, "'bert'; supported: gpt2, llama"),
        ({"ggml.pre": "tekken"}, UnsupportedError, "'tekken'; supported: default, .*smollm.*qwen2"),
        ({"ggml.tokens": None}, CheckpointError, r"tokenizer\.ggml\.tokens is None, but must be an array"),
        ({"ggml.merges": None}, CheckpointError, r"tokenizer\.ggml\.merges is None"),
        ({"ggml.merges": ["a none"]}, CheckpointError, "do not fit together"),
        ({"ggml.merges": ["ab"]}, CheckpointError, "do not fit together"),
        ({"ggml.token_type": [1, 1]}, CheckpointError, r"token_type has 2 entries, but there are 261 tokens"),
        ({"ggml.bos_token_id": "a"}, CheckpointError, r"bos_token_id is 'a', but must be a token id"),
    ],
)
def test_what_a_gguf_lacks_is_named(tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", byte_level_fields(**changes))
    with pytest.raises(error, match=message):
        load_gguf_tokenizer(path)


@pytest.mark.parametrize("beyond", [261, 999, 4294967295])  # the last is llama.cpp's "none"
def test_ids_of_a_gguf_beyond_its_vocabulary_are_dropped(beyond: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("bos", "eos", "eot", "eom", "unknown", "padding")
    tokenizer = load_gguf_tokenizer(write_gguf(tmp_path / "a.gguf", byte_level_fields(**{f"ggml.{n}_token_id": beyond for n in names})))
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id, tokenizer.special_tokens) == ((), None, {})
    ignored = [f"a.gguf: tokenizer.ggml.{n}_token_id is {beyond}, which is ignored: token ids are in [0, 261)" for n in names]
    assert sorted(caplog.messages) == sorted(ignored)


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "a.gguf", byte_level_fields()).read_bytes()
    load_gguf_tokenizer(tmp_path / "a.gguf")
    part = tmp_path / "part.gguf"
    for size in [0, 3, 10, *range(24, len(whole) - 64, 97)]:
        part.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="damaged or truncated"):
            load_gguf_tokenizer(part)
