"""Tokenizers inside GGUF files, written as llama.cpp writes them, against transformers' classes that they were made from."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import GPT2Tokenizer, GPTNeoXTokenizer, Qwen2Tokenizer

from pjax.text.loading import load_tokenizer
from pjax.text.tokenizer import Tokenizer
from tests.budget import examples
from tests.text.folders import TEXTS

CORPUS = [
    *TEXTS,
    "the quick brown fox, the lazy dogs; it's the hedgehog's, they're THEY'RE, we'll see 1234567890 times\n\n    def f(x):\n\treturn x",
    "Übermäßig schöne Grüße aus Köln, ÀÉÎÕÜ ångström naïve café e\u0301té n\u0303, 한국어 日本語 中文字符",
    "русский текст العربية हिन्दी ελληνικά",
    "<html><body class='x'>a&amp;b</body></html> {\"json\": [1, 2.5e-3, null]} x += y**2 // z  # comment ... ??? !!! —– “quotes”",
]
MORE = [
    "  leading", "trailing   ", "\t\ttabs\n \n  mixed \r\n lines", "a\u00a0b\u3000c\u2003d", "don't DON'T don’t I'LL i'll",
    "3.14159 1,000,000 ²³ ½",
    "e\u0301 vs é, A\u030a vs Å, ｶﾞ vs ガ", "🇩🇪👩‍👩‍👧‍👦😀", "x" * 300, "ab" * 100 + " " * 50, "<|im_start|>user\nHi<|im_end|>",
    "a<tool_call>b</tool_call>",    "a<|endoftext|>b", "    four        eight spaces", "### Instruction:\nDo it.\n\n### Response:\n",
    "[PAD3] \ufffd \u200b \ufeff",
]  # fmt: skip
SPACES = ["  ", "    ", "        "]  # gpt-neox-20b has such tokens beside its vocabulary


def trained(pattern: str | None, *, is_nfc: bool) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE."""
    backend = Backend(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*([pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []), level])
    if is_nfc:
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def make(kind: str) -> Any:
    """transformers' tokenizer of a family, with the added tokens that the published ones have."""
    special = {name: AddedToken(name, special=True, normalized=False) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    if kind == "qwen2":
        vocab, merges = trained(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", is_nfc=True)  # fmt: skip  # noqa: E501
        tokenizer: Any = Qwen2Tokenizer(vocab=vocab, merges=merges)
        tokenizer.add_special_tokens({"additional_special_tokens": [special["<|im_start|>"], special["<|im_end|>"]]})
        tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<tool_call>", "</tool_call>")])
    elif kind == "gpt-2":
        vocab, merges = trained(None, is_nfc=False)
        tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
    else:
        vocab, merges = trained(None, is_nfc=True)
        tokenizer = GPTNeoXTokenizer(vocab=vocab, merges=merges)
        tokenizer.add_tokens([AddedToken(spaces, special=False, normalized=True) for spaces in SPACES])
        dolly = [AddedToken(name, special=True, normalized=False) for name in ("### End", "### Instruction:", "### Response:\n")]
        tokenizer.add_special_tokens({"additional_special_tokens": dolly})
    return tokenizer


def write(folder: Path, tokenizer: Any, kind: str | None, architecture: str, *, num_padding: int = 5) -> Path:
    """A GGUF file with tokens and types as llama.cpp's `get_vocab_base` has them, and the `gguf` package's own reading of the rest."""
    tokenizer.save_pretrained(folder)
    path = folder / "a.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens: list[str] = []
    types: list[int] = []
    for index in range(len(by_id) + num_padding):  # embeddings are often padded to a round number of rows
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        normal = gguf.TokenType.NORMAL if index in by_id else gguf.TokenType.UNUSED
        is_special = index in added and added[index].special
        types.append(gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED if index in added else normal)
    writer.add_tokenizer_model("gpt2")
    if kind is not None:
        writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


KINDS = {
    "qwen2": ("qwen2", "qwen2"),
    "qwen3": ("qwen2", "qwen3"),
    "gpt2": ("gpt-2", "gpt2"),
    "pythia": ("olmo", "gptneox"),
    "old": (None, "gptneox"),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """pjax's tokenizer from the GGUF file, and transformers'."""
    kind, architecture = KINDS[request.param]
    theirs = make(kind or "olmo")
    return load_tokenizer(write(tmp_path_factory.mktemp(request.param), theirs, kind, architecture)), theirs


def check(pair: tuple[Tokenizer, Any], text: str) -> None:
    """Equal ids, and equal text back."""
    ours, theirs = pair
    for special in (True, False):
        ids = theirs(text, add_special_tokens=special)["input_ids"]
        assert ours.encode(text, add_special_tokens=special) == ids
        assert ours.decode(ids, skip_special_tokens=special) == theirs.decode(ids, skip_special_tokens=special)


@pytest.mark.parametrize("text", [*CORPUS, *MORE])
def test_texts(pair: tuple[Tokenizer, Any], text: str) -> None:
    check(pair, text)


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    check(pair, text)


def test_shuffled_pieces(pair: tuple[Tokenizer, Any]) -> None:
    """Borders of words, spaces and tokens in every order."""
    rng = random.Random(0)
    pieces = [
        *" \n\t'1aÉ.",
        "  ",
        "\r\n",
        "'s",
        "'LL",
        "word",
        "日本",
        "e\u0301",
        "### End",
        "<tool_call>",
        "<|im_end|>",
        "    ",
        "42",
        "—",
    ]
    for _ in range(300):
        check(pair, "".join(rng.choices(pieces, k=rng.randint(1, 12))))


def test_what_it_says_of_itself(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert ours.vocab_size == len(theirs) + 5
    found = {theirs.convert_tokens_to_ids(text) for text in ("<|im_end|>", "<|endoftext|>") if text in theirs.get_vocab()}
    assert set(ours.eos_token_ids) == {theirs.eos_token_id, *found}
    assert ours.eos_token_ids[0] == theirs.eos_token_id
    assert ours.special_ids == set(theirs.all_special_ids)
