"""A tokenizer from GGUF metadata, built with the `tokenizers` package (transformers would need torch for it)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from pjax.checkpoints.gguf_header import GGUFHeader, read_gguf_header
from pjax.checkpoints.gguf_parts import parts_of
from pjax.errors import CheckpointError, UnsupportedError
from pjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

# Values of tokenizer.ggml.pre. Words are split by GPT-2's pattern unless another one is named.
GPT2_KINDS = ("default", "gpt-2", "gpt2", "olmo", "mpt")
DIGIT_KINDS = ("smollm", "starcoder", "refact")  # GPT-2's pattern, after every digit was set apart
LLAMA3_KINDS = ("llama-bpe", "llama3", "llama-v3")
QWEN2_KINDS = ("qwen2", "deepseek-r1-qwen")
NFC_KINDS = (*QWEN2_KINDS, "olmo", "mpt")  # GGUF does not say that a text is normalised; these tokenizers' sources do it
NFC_ARCHITECTURES = ("gptneox",)  # Pythia's and Dolly's tokenizer is olmo's, which files from before 2024 don't name

# Texts of tokens that end a turn or a text: llama.cpp finds them in the vocabulary, whatever eos_token_id says.
ENDS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>",
    "<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>", "<end_of_utterance>",
)  # fmt: skip

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types of the format's specification


class _Metadata:
    """The `tokenizer.*` fields of a GGUF file."""

    def __init__(self, path: Path, header: GGUFHeader | None) -> None:
        self.path = path
        self._fields = (header or read_gguf_header(parts_of(path)[0])).metadata

    @property
    def architecture(self) -> Any:
        return self._fields.get("general.architecture")

    def get(self, key: str, default: Any = None) -> Any:
        return self._fields.get(f"tokenizer.{key}", default)

    def array(self, key: str) -> list[Any]:
        value = self.get(key)
        if not isinstance(value, list):
            raise CheckpointError(f"{self.path}: metadata field tokenizer.{key} is {value!r:.40}, but must be an array")
        return value

    def of_tokens(self, key: str, count: int, default: float) -> list[Any]:
        """An array with one entry for every token, or the default where the file has none."""
        values = [default] * count if self.get(key) is None else self.array(key)
        if len(values) != count:
            raise CheckpointError(f"{self.path}: tokenizer.{key} has {len(values)} entries, but there are {count} tokens")
        return values

    def token_id(self, key: str, tokens: Sequence[str], default: int | None = None) -> int | None:
        """A token's id, or None where the file and its model name none.

        Like llama.cpp, takes the default with a warning where the file names an id that is no token's.
        """
        index = self.get(key, default)
        if index is not None and (not isinstance(index, int) or isinstance(index, bool)):
            raise CheckpointError(f"{self.path}: tokenizer.{key} is {index!r}, but must be a token id")
        if index is not None and not 0 <= index < len(tokens):
            log.warning("%s: tokenizer.%s is %d, which is ignored: token ids are in [0, %d)", self.path.name, key, index, len(tokens))
            return default
        return index


def load_gguf_tokenizer(path: Path, header: GGUFHeader | None = None) -> Tokenizer:
    """The tokenizer that a .gguf file carries; `header` is the file's, where it has been read.

    Raises CheckpointError when a field is missing or damaged, UnsupportedError when the kind of tokenizer is not supported.
    """
    metadata = _Metadata(path, header)
    model = metadata.get("ggml.model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(f"{path}: tokenizer.ggml.model is {model!r}; supported: gpt2, llama")
    is_llama = model == "llama"
    tokens = metadata.array("ggml.tokens")
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if is_llama and len(tokens) > 2 else {}  # llama.cpp's
    ids = {
        key: metadata.token_id(f"ggml.{key}_token_id", tokens, defaults.get(key))
        for key in ("bos", "eos", "unknown", "padding", "eot", "eom")
    }
    try:
        backend = _sentencepiece(metadata, tokens, ids["unknown"]) if is_llama else _byte_level(metadata, tokens)
    except (CheckpointError, UnsupportedError):
        raise
    except Exception as error:  # tokenizers raises plain Exception, for example when a merge names no token
        raise CheckpointError(f"{path}: its tokens and merges do not fit together: {error}") from error
    types = metadata.of_tokens("ggml.token_type", len(tokens), NORMAL)
    ends = [index for key in ("eos", "eot", "eom") if (index := ids[key]) is not None]
    found = _found(ENDS, tokens)
    borders = {index for index in (ids["bos"], ids["eos"], *found) if index is not None}
    special = [t for i, (t, kind) in enumerate(zip(tokens, types)) if kind in (UNKNOWN, CONTROL) or i in borders]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t, kind in zip(tokens, types) if kind == USER_DEFINED])
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    names = {name: tokens[index] for name, key in keys.items() if (index := ids[key]) is not None}
    begins = metadata.get("ggml.add_bos_token", is_llama or metadata.get("ggml.pre") in LLAMA3_KINDS)  # llama.cpp's defaults
    _add_borders(backend, names, bos=bool(begins), eos=bool(metadata.get("ggml.add_eos_token", False)))
    template = metadata.get("chat_template")
    return Tokenizer(backend, special_tokens=names, eos_token_ids=tuple(dict.fromkeys([*ends, *found])), chat_template=template)


def _found(texts: Sequence[str], tokens: Sequence[str]) -> list[int]:
    """Ids of those of the texts that are tokens."""
    wanted = set(texts)
    return [index for index, token in enumerate(tokens) if token in wanted]


def _byte_level(metadata: _Metadata, tokens: list[str]) -> Backend:
    """GPT-2's byte-level BPE, after the splits that the checkpoint names."""
    kind = metadata.get("ggml.pre", "default")
    splitters: list[Any] = []
    if kind in DIGIT_KINDS:
        splitters = [pre_tokenizers.Digits(individual_digits=True)]
    elif kind in (*LLAMA3_KINDS, *QWEN2_KINDS):
        pattern = LLAMA3_PATTERN if kind in LLAMA3_KINDS else QWEN2_PATTERN
        splitters = [pre_tokenizers.Split(Regex(pattern), "isolated")]
    elif kind not in GPT2_KINDS:
        known = ", ".join((*GPT2_KINDS, *DIGIT_KINDS, *LLAMA3_KINDS, *QWEN2_KINDS))
        raise UnsupportedError(f"{metadata.path}: tokenizer.ggml.pre is {kind!r}; supported: {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.array("ggml.merges")]
    # Llama 3's tokenizer takes a word that is itself a token without merging.
    backend = Backend(BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, ignore_merges=kind in LLAMA3_KINDS))
    if kind in NFC_KINDS or metadata.architecture in NFC_ARCHITECTURES:
        backend.normalizer = normalizers.NFC()
    uses_gpt2_pattern = kind in (*GPT2_KINDS, *DIGIT_KINDS)
    prefix = bool(metadata.get("ggml.add_space_prefix", False))
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=uses_gpt2_pattern)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splitters, level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: _Metadata, tokens: list[str], unknown: int | None) -> Backend:
    """SentencePiece BPE with byte fallback: merges are the token pairs that make a token, the best scored first."""
    scores = metadata.of_tokens("ggml.scores", len(tokens), 0.0)
    ranks = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((-score, ranks[left], ranks[right], (left, right)))
    merges.sort(key=lambda merge: merge[:3])
    unk = None if unknown is None else tokens[unknown]
    backend = Backend(BPE(vocab=ranks, merges=[m[3] for m in merges], unk_token=unk, fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get("ggml.add_space_prefix", True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip: list[Any] = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return backend


def _add_borders(backend: Backend, special_tokens: Mapping[str, str], *, bos: bool, eos: bool) -> None:
    """Lets `encode` put the begin token before a text and the end token after it, where asked for and known."""
    single, used = "$A:0", []
    for wanted, name, form in ((bos, "bos_token", "{0}:0 {1}"), (eos, "eos_token", "{1} {0}:0")):
        token = special_tokens.get(name)
        index = None if token is None else backend.token_to_id(token)
        if wanted and index is not None:
            single = form.format(token, single)
            used.append((token, index))
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=used)
