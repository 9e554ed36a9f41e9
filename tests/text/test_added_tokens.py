"""Tokens that stand beside tokenizer.json, against transformers' reading of the same folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pjax.errors import CheckpointError
from pjax.text.loading import load_tokenizer
from tests.text.folders import train, transformers_tokenizer, write_folder

SPELT = ["a<|im_end|>b", "a <|im_end|> b", "<|im_start|>user\nthe fox<|im_end|>\n", "<tool>x</tool>", "a</s>b", "<|IM_END|>"]


@pytest.fixture(scope="module")
def size() -> int:
    """Tokens of tokenizer.json."""
    return int(train(byte_level=True).get_vocab_size())


def entry(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True} | flags


def check(folder: Path) -> None:
    """transformers' ids and text."""
    ours, theirs = load_tokenizer(folder), transformers_tokenizer(folder)
    for text in SPELT:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.special_ids == {index for index, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.vocab_size == len(theirs)


def test_tokens_of_added_tokens_decoder(size: int, tmp_path: Path) -> None:
    decoder = {str(size + 1): entry("<|im_end|>"), str(size): entry("<|im_start|>"), str(size + 2): entry("<tool>", special=False)}
    names = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    folder = write_folder(tmp_path, train(byte_level=True), added_tokens_decoder=decoder, **names)
    check(folder)
    ours = load_tokenizer(folder)
    assert (ours.eos_token_ids, ours.token_to_id("<|im_start|>"), ours.token_to_id("<tool>")) == ((size + 1,), size, size + 2)
    assert ours.encode("<|im_end|>") == [size + 1]


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}], ids=str)
def test_flags_of_added_tokens(flags: dict[str, bool], size: int, tmp_path: Path) -> None:
    decoder = {str(size): entry("<|im_end|>", **flags), str(size + 1): entry("<|im_start|>")}
    names = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    check(write_folder(tmp_path, train(byte_level=True), added_tokens_decoder=decoder, **names))


def test_tokens_of_added_tokens_json(size: int, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, train(byte_level=True), eos_token="<|im_end|>")
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 1, "<tool>": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<|im_start|>"], "bos_token": "<s>"}))
    ours = load_tokenizer(folder)
    assert (ours.eos_token_ids, ours.special_ids, ours.token_to_id("<tool>")) == ((size + 1,), {0, 1, size + 1}, size)
    theirs = transformers_tokenizer(folder)
    for text in SPELT:
        if "<|im_start|>" not in text:  # which is in no list of ids: transformers makes an id of its own for it
            assert ours.encode(text) == theirs(text)["input_ids"]


def test_an_end_token_of_the_map_beside_a_null(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, train(byte_level=True), eos_token=None)
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load_tokenizer(folder).eos_token_ids == (1,)


def test_an_unknown_end_token_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "model", train(byte_level=True), eos_token="<|nothing|>", bos_token="<|start|>")
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((), None)
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "model: its bos_token is '<|start|>', which its tokenizer does not have: it is ignored",
        "model: its eos_token is '<|nothing|>', which its tokenizer does not have: it is ignored",
    ]


def test_ids_for_which_there_is_no_room_are_named(size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    decoder = {str(size + 7): entry("<|far|>"), "3": entry("<|taken|>"), str(size): entry("<|im_end|>"), str(size + 1): entry("</s>")}
    tokenizer = load_tokenizer(write_folder(tmp_path / "model", train(byte_level=True), added_tokens_decoder=decoder))
    assert tokenizer.token_to_id("<|im_end|>") == size
    assert [tokenizer.token_to_id(text) for text in ("<|far|>", "<|taken|>", "</s>")] == [None, None, 1]
    assert caplog.messages == [
        "model: these added tokens are ignored, for tokenizer.json leaves no room for their ids: "
        f"'<|taken|>' (id 3), '</s>' (id {size + 1}), '<|far|>' (id {size + 7})"
    ]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\], but must be an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": entry("a")}}, r"added_tokens_decoder has 'x': .*, but must have ids"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, r"added_tokens_decoder has '1': \{\}, but must have ids"),
        ("added_tokens.json", {"a": "1"}, r"added_tokens\.json has 'a': '1', but must have ids"),
    ],
)
def test_damaged_lists_are_named(file: str, content: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, train(byte_level=True))
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(folder)
