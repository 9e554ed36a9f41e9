"""The tokenizer of a checkpoint, whatever its format."""

from __future__ import annotations

from pathlib import Path

from pjax.text.tokenizer import Tokenizer, load_folder_tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a .gguf file. CheckpointError when there is none or it is damaged."""
    path = Path(path)
    if path.is_file():
        from pjax.text.gguf_tokenizer import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    return load_folder_tokenizer(path)
