"""Small trained tokenizers in folders as Hugging Face has them, and transformers' reading of those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "it's 2024; they'll've   spaced\n\n\tout  ",
    "def f(x):\n    return x ** 2  # code\n\r\n",
    "你好，世界。日本語のテキスト 한국어",
    "👩‍👩‍👧‍👦 🇩🇪 😀😀 e\u0301 é",
    "ﬁ ½ Ⅻ ٣٤ \u00a0\u3000\u200b x",
    "a\x00b\x7f\ufffd\U0010ffff",
]


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def train(*, byte_level: bool) -> Backend:
    """A small BPE, either as GPT-2's or as LLaMA 2's."""
    corpus = TEXTS * 3 + ["the quick brown fox, the lazy dogs and the hedgehog think that this is the end"] * 5
    if byte_level:
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        first = ["<s>", "</s>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
        )
        first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        alphabet = []
        corpus = [c for c in corpus if c.isascii()]
    backend.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=600, special_tokens=first, initial_alphabet=alphabet))
    if byte_level:
        return backend
    # The byte tokens must not be special, as they are in the trainer's list.
    state = json.loads(backend.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return Backend.from_str(json.dumps(state))


def write_folder(path: Path, backend: Backend, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
