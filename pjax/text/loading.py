"""The tokenizer of a checkpoint, whatever its format."""

from __future__ import annotations

from pathlib import Path

from pjax.checkpoints.gguf_header import GGUFHeader
from pjax.text.chat_template import read_template
from pjax.text.tokenizer import Tokenizer, load_folder_tokenizer


def load_tokenizer(path: str | Path, chat_template: str | Path | None = None, *, header: GGUFHeader | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a .gguf file. CheckpointError when there is none or it is damaged.

    Args:
      chat_template: a template, or the path of one, to use instead of the checkpoint's; errors as in `read_template`.
      header: of the .gguf file, where it has been read.
    """
    template = None if chat_template is None else read_template(chat_template)
    tokenizer = _load(Path(path), header)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def _load(path: Path, header: GGUFHeader | None) -> Tokenizer:
    if path.is_file():
        from pjax.text.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(path, header)
    return load_folder_tokenizer(path)
