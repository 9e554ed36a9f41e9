"""A tokenizer from GGUF metadata, built with the `tokenizers` package (transformers would need torch for it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from pjax.errors import CheckpointError, UnsupportedError
from pjax.text.tokenizer import Tokenizer

LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

# Token types of the format's specification.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4


def _splitters(kind: str) -> list[Any]:
    """Pre-tokenizers of `tokenizer.ggml.pre` that run before the byte-level one."""
    if kind in ("gpt-2", "gpt2", "default"):
        return []
    if kind == "smollm":
        return [pre_tokenizers.Digits(individual_digits=True)]
    patterns = {"llama-bpe": LLAMA3_PATTERN, "llama3": LLAMA3_PATTERN, "llama-v3": LLAMA3_PATTERN, "qwen2": QWEN2_PATTERN}
    if kind not in patterns:
        known = ", ".join(["default", "gpt-2", "smollm", *patterns])
        raise UnsupportedError(f"tokenizer.ggml.pre is {kind!r}; supported: {known}")
    return [pre_tokenizers.Split(Regex(patterns[kind]), "isolated")]


class _Metadata:
    """The `tokenizer.*` fields of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fields = GGUFReader(path).fields
        except Exception as error:  # the reader indexes past the end of truncated files in many ways
            raise CheckpointError(f"{path} is damaged or truncated: {error!r}") from error

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(f"tokenizer.{key}")
        return default if field is None else field.contents()

    def strings(self, key: str) -> list[str]:
        field = self._fields.get(f"tokenizer.{key}")
        if field is None:
            raise CheckpointError(f"{self.path} has no metadata field tokenizer.{key}")
        return [bytes(field.parts[index]).decode("utf-8") for index in field.data]

    def numbers(self, key: str, count: int, default: float) -> list[Any]:
        field = self._fields.get(f"tokenizer.{key}")
        if field is None:
            return [default] * count
        return list(np.concatenate([field.parts[index] for index in field.data]).tolist())


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer that a .gguf file carries. CheckpointError or UnsupportedError name what is missing or not supported."""
    metadata = _Metadata(path)
    model = metadata.get("ggml.model")
    tokens = metadata.strings("ggml.tokens")
    types = metadata.numbers("ggml.token_type", len(tokens), 1)
    if model == "gpt2":
        backend = _byte_level(metadata, tokens)
    elif model == "llama":
        backend = _sentencepiece(metadata, tokens)
    else:
        raise UnsupportedError(f"{path}: tokenizer.ggml.model is {model!r}; supported: gpt2, llama")
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL)]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    defined = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(t, normalized=False) for t in defined])
    names = {}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")):
        index = metadata.get(f"ggml.{key}_token_id")
        if index is not None and 0 <= index < len(tokens):
            names[name] = tokens[index]
    _add_borders(backend, metadata, names, add_bos=model == "llama")
    eos = [metadata.get(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    return Tokenizer(
        backend,
        special_tokens=names,
        eos_token_ids=tuple(dict.fromkeys(int(i) for i in eos if i is not None)),
        chat_template=metadata.get("chat_template"),
    )


def _byte_level(metadata: _Metadata, tokens: list[str]) -> Backend:
    """GPT-2's byte-level BPE, after the splits that the checkpoint names."""
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.strings("ggml.merges")]
    backend = Backend(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=_ignores_merges(metadata)))
    splitters = _splitters(metadata.get("ggml.pre", "default"))
    splits_words = any(isinstance(s, pre_tokenizers.Split) for s in splitters)
    level = pre_tokenizers.ByteLevel(add_prefix_space=bool(metadata.get("ggml.add_space_prefix", False)), use_regex=not splits_words)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splitters, level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _ignores_merges(metadata: _Metadata) -> bool:
    """Llama 3's tokenizer takes a word that is itself a token without merging."""
    return metadata.get("ggml.pre") in ("llama-bpe", "llama3", "llama-v3")


def _sentencepiece(metadata: _Metadata, tokens: list[str]) -> Backend:
    """SentencePiece BPE with byte fallback: merges are the token pairs that make a token, the best scored first."""
    scores = metadata.numbers("ggml.scores", len(tokens), 0.0)
    ranks = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((-score, ranks[left], ranks[right], (left, right)))
    merges.sort(key=lambda merge: merge[:3])
    unknown = metadata.get("ggml.unknown_token_id", 0)
    model = BPE(vocab=ranks, merges=[m[3] for m in merges], unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    backend = Backend(model)
    prefix = bool(metadata.get("ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _add_borders(backend: Backend, metadata: _Metadata, names: dict[str, str], *, add_bos: bool) -> None:
    """Begin and end tokens, where the flags (or llama.cpp's defaults for the model) ask for them."""
    single = "$A"
    used = []
    for name, flag, default in (("bos_token", "ggml.add_bos_token", add_bos), ("eos_token", "ggml.add_eos_token", False)):
        if metadata.get(flag, default) and name in names:
            token = names[name]
            single = f"{token}:0 {single}" if name == "bos_token" else f"{single} {token}:0"
            used.append((token, backend.token_to_id(token)))
    if used:
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
