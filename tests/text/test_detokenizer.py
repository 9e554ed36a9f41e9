"""Text in pieces: together they are the one-shot text, up to the first stop string."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from pjax.params import SamplingParams
from pjax.text.detokenizer import BROKEN, Detokenizer
from pjax.text.loading import load_tokenizer
from pjax.text.tokenizer import Tokenizer
from tests.budget import examples

TEXT = "Grüße, 你好 👩‍👩‍👧 <b>x</b>\n\n  ok 😀😀."


def bytes_tokenizer(*, fallback: bool) -> Tokenizer:
    """Every byte is a token, ids as the bytes, and 256 is special: byte-level, or as SentencePiece
    falls back to bytes for what is not ASCII."""
    if fallback:
        spellings = ["▁" if i == 32 else chr(i) if 32 < i < 127 else f"<0x{i:02X}>" for i in range(256)]
        decoder: Any = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        to_byte = {}
        for char in pre_tokenizers.ByteLevel.alphabet():
            printable = 33 <= ord(char) <= 126 or 161 <= ord(char) <= 172 or 174 <= ord(char) <= 255
            to_byte[char] = ord(char) if printable else -1
        rest = iter(sorted(set(range(256)) - set(to_byte.values())))  # GPT-2's map: the others follow from 256 on
        spellings = sorted(to_byte, key=lambda c: to_byte[c] if to_byte[c] >= 0 else 1000 + ord(c))
        order = {c: to_byte[c] if to_byte[c] >= 0 else next(rest) for c in spellings}
        spellings = sorted(order, key=lambda c: order[c])
        decoder = decoders.ByteLevel()
    backend = Backend(models.BPE(vocab={s: i for i, s in enumerate(spellings)}, merges=[]))
    backend.decoder = decoder
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, special_tokens={}, eos_token_ids=(256,))


BYTE_LEVEL, FALLBACK = bytes_tokenizer(fallback=False), bytes_tokenizer(fallback=True)
both = pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, FALLBACK], ids=["byte-level", "fallback"])


@pytest.fixture(scope="module")
def demo(demo_gguf: Path) -> Tokenizer:
    return load_tokenizer(demo_gguf)


def pieces(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None, step: int = 1, **params: Any) -> list[str]:
    """All that is emitted, the last piece by finish."""
    detokenizer = Detokenizer(tokenizer, prompt or [], SamplingParams(**params))
    out = [detokenizer.append(ids[i : i + step]) for i in range(0, len(ids), step)]
    out.append(detokenizer.finish())
    assert detokenizer.text == "".join(out)
    return out


def cut(text: str, stops: list[str], *, include: bool) -> str:
    """The model: the stop string that is complete first ends the text."""
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text if not found else text[: min(found)[0 if include else 1]]


@both
def test_characters_come_whole(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(list(TEXT.encode())) == TEXT, "the tokenizer of this test itself"
    out = pieces(tokenizer, list(TEXT.encode()))
    assert "".join(out) == TEXT
    assert [piece for piece in out if piece] == list(TEXT), "each as soon as its last byte is there"


@both
@given(text=st.text(max_size=40), step=st.integers(1, 5))
@settings(max_examples=examples(60), deadline=None)
def test_pieces_of_any_text(tokenizer: Tokenizer, text: str, step: int) -> None:
    ids = list(text.encode())
    out = pieces(tokenizer, ids, step=step)
    assert "".join(out) == text == tokenizer.decode(ids)
    assert BROKEN in text or all(BROKEN not in piece for piece in out)


@given(st.lists(st.integers(0, 255), max_size=40))
@settings(max_examples=examples(100), deadline=None)
def test_pieces_of_any_bytes(ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids)) == bytes(ids).decode(errors="replace")


def test_a_long_run_of_broken_bytes_loses_nothing_after_it() -> None:
    for broken in (*range(10, 20), 200):
        for text in ("😀", "é", "a", "你" * 9):
            ids = [0xFF] * broken + list(text.encode())
            assert "".join(pieces(BYTE_LEVEL, ids)) == BROKEN * broken + text
            # Byte fallback breaks a whole run of bytes when one is broken: only the text's end is certain.
            assert "".join(pieces(FALLBACK, [*ids, 256, *b"z"])).endswith("z")
    text = BROKEN * 30 + "😀" + BROKEN * 7 + "x"
    assert "".join(pieces(BYTE_LEVEL, list(text.encode()))) == text


@both
def test_broken_bytes_show_when_nothing_can_mend_them(tokenizer: Tokenizer) -> None:
    half = list("a你😀".encode())[:-2]
    *before, last = pieces(tokenizer, half)
    assert "".join(before) == "a你" and set(last) == {BROKEN}
    assert "".join(pieces(tokenizer, [0xFF, *b"b"])) == BROKEN + "b"


def test_a_long_silence_costs_no_longer_window() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, [], SamplingParams())
    assert detokenizer.append([256] * 10_000 + [9999] * 10_000) == ""
    assert len(detokenizer._ids) == 0
    assert detokenizer.append(list(b"ok" * 5000)) == "ok" * 5000
    assert len(detokenizer._ids) < 2000


def test_special_tokens_are_skipped_or_shown() -> None:
    ids = [*b"a", 256, *"é".encode(), 256]
    assert "".join(pieces(BYTE_LEVEL, ids)) == "aé"
    assert "".join(pieces(BYTE_LEVEL, ids, skip_special_tokens=False)) == "a<end>é<end>"
    assert "".join(pieces(BYTE_LEVEL, ids, skip_special_tokens=False, stop="<end>")) == "a"


@pytest.mark.parametrize("text", [TEXT, "it's 2024; they'll've   spaced\n\n\tout  ", "日本語のテキスト 한국어 🇩🇪 def f():\n    pass"])
def test_the_demo_tokenizer_in_pieces(demo: Tokenizer, text: str) -> None:
    ids = demo.encode(text)
    for step in (1, 2, 7):
        assert "".join(pieces(demo, ids, step=step)) == text
    for split in range(len(ids)):  # as prompt and answer, with the prompt's last characters whole
        if BROKEN not in demo.decode(ids[:split]):
            assert "".join(pieces(demo, ids[split:], prompt=ids[:split])) == text[len(demo.decode(ids[:split])) :]


def test_the_space_between_prompt_and_answer_is_kept() -> None:
    backend = Backend(models.BPE(vocab={"▁a": 0, "▁b": 1, "c": 2}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1)])
    backend.add_special_tokens(["<s>"])
    tokenizer = Tokenizer(backend, special_tokens={}, eos_token_ids=())
    assert pieces(tokenizer, [1, 2, 0], prompt=[0]) == [" b", "c", " a", ""]
    assert pieces(tokenizer, [1, 2, 0], prompt=[0, *[3] * 9]) == [" b", "c", " a", ""]
    assert pieces(tokenizer, [1, 3, 0]) == ["b", "", " a", ""]


@both
def test_a_character_that_the_prompt_began(tokenizer: Tokenizer) -> None:
    emoji = list("😀".encode())
    assert "".join(pieces(tokenizer, [*emoji[2:], *b"a"], prompt=[*b"x", *emoji[:2]])) == "😀a"


def test_stop_strings_across_tokens() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, [], SamplingParams(stop=["END", "\n\n"]))
    assert [detokenizer.append([byte]) for byte in b"ab\ncENEND!"] == ["a", "b", "", "\nc", "", "", "EN", "", "", ""]
    assert (detokenizer.stop_reason, detokenizer.finish(), detokenizer.text) == ("END", "", "ab\ncEN")


def test_text_held_for_a_stop_string_comes_in_the_end() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, [], SamplingParams(stop="END"))
    assert detokenizer.append(list(b"the EN")) == "the "
    assert (detokenizer.finish(), detokenizer.stop_reason) == ("EN", None)


def test_the_stop_string_may_be_kept() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, [], SamplingParams(stop="END", include_stop_str_in_output=True))
    assert detokenizer.append(list(b"the END!")) == "the END"


def test_a_stop_string_may_be_in_the_flush() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, [], SamplingParams(stop=BROKEN))
    assert detokenizer.append([*b"a", 0xF0]) == "a"
    assert (detokenizer.finish(), detokenizer.stop_reason) == ("", BROKEN)


@given(
    text=st.text("abé😀", max_size=30),
    stops=st.lists(st.text("abé😀", min_size=1, max_size=4), max_size=4),
    include=st.booleans(),
    step=st.integers(1, 9),
)
@settings(max_examples=examples(150), deadline=None)
def test_stop_strings_cut_as_the_model_says(text: str, stops: list[str], include: bool, step: int) -> None:
    ids = list(text.encode())
    params = SamplingParams(stop=stops, include_stop_str_in_output=include)
    detokenizer = Detokenizer(BYTE_LEVEL, [], params)
    out = "".join(detokenizer.append(ids[i : i + step]) for i in range(0, len(ids), step)) + detokenizer.finish()
    assert out == detokenizer.text == cut(text, stops, include=include)
    assert (detokenizer.stop_reason is not None) == any(stop in text for stop in stops)
