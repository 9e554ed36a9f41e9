"""Folders with a tokenizer.model and no tokenizer.json, against the sentencepiece package."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sentencepiece

from pjax.errors import CheckpointError
from pjax.text.loading import load_tokenizer
from tests.text.folders import TEXTS

SENTENCES = ["the quick brown fox, the lazy dogs and the hedgehog think that this is the end", *(text for text in TEXTS if text.strip())]


def write(folder: Path) -> Path:
    """A folder as Llama 2's, with a small model."""
    folder.mkdir(exist_ok=True)
    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 4), model_writer=file, model_type="bpe", vocab_size=460, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"legacy": True}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_ids_are_sentencepieces(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.bos_token_id) == (460, (2,), 1)
    for text in ["the fox", "a dog thinks", "é 日本", "Hello, world!", "2024"]:
        assert tokenizer.encode(text, add_special_tokens=False) == theirs.encode(text)
        assert tokenizer.decode(theirs.encode(text)) == text


@pytest.mark.parametrize("missing", ["sentencepiece", "google.protobuf"])
def test_a_missing_package_is_named(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    message = (
        rf"tokenizer\.model is a SentencePiece model without a tokenizer\.json, and {missing} is missing: "
        r"pip install 'pjax\[sentencepiece\]'"
    )
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)


def test_a_tiktoken_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 3's original tokenizer.model."""
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is a tiktoken model .*, and tiktoken is missing: pip install tiktoken"):
        load_tokenizer(tmp_path)
