"""Tokens that a Hugging Face folder has beside tokenizer.json: `added_tokens_decoder` of tokenizer_config.json, or added_tokens.json."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from pjax.errors import CheckpointError

log = logging.getLogger(__name__)

FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")
LISTS = ("additional_special_tokens", "extra_special_tokens")


def named_special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The texts of bos_token, eos_token and the like, by their names."""
    named = {key: _content(value) for key, value in settings.items() if key.endswith("_token")}
    return {key: content for key, content in named.items() if content is not None}


def other_special_tokens(settings: Mapping[str, Any]) -> list[str]:
    """The texts of special tokens that have no name."""
    values: list[Any] = []
    for key in LISTS:
        value = settings.get(key) or []
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [content for value in values if (content := _content(value)) is not None]


def add_stated_tokens(backend: tokenizers.Tokenizer, settings: Mapping[str, Any], added: Mapping[str, Any], path: Path) -> None:
    """Adds the tokens that the folder's files state, with their flags, in the order of their ids.

    A token whose id is not the one that it has, or the next that is free, is left out with a warning.

    Args:
      settings: of tokenizer_config.json and special_tokens_map.json.
      added: of added_tokens.json, which counts where `settings` has no added_tokens_decoder.
      path: of the folder, for messages.
    Raises CheckpointError when an entry is not what these files have.
    """
    stated = settings.get("added_tokens_decoder")
    tokens = sorted(_of_decoder(stated, path) if stated else _of_list(added, settings, path), key=lambda pair: pair[0])
    wrong = []
    for token_id, token in tokens:
        if _id_of(backend, token.content) == token_id:
            backend.add_tokens([token])
        else:
            wrong.append(f"{token.content!r} (id {token_id})")
    if wrong:
        log.warning("%s: these added tokens are ignored, for tokenizer.json leaves no room for their ids: %s", path.name, ", ".join(wrong))


def _id_of(backend: tokenizers.Tokenizer, content: str) -> int:
    """The id that a token has, or would get."""
    found = backend.token_to_id(content)
    if found is not None:
        return int(found)
    return max(int(backend.get_vocab_size(with_added_tokens=False)), 1 + max(backend.get_added_tokens_decoder(), default=-1))


def _of_decoder(stated: Any, path: Path) -> Iterator[tuple[int, tokenizers.AddedToken]]:
    """The entries of `added_tokens_decoder` by their ids, which JSON has as texts."""
    if not isinstance(stated, Mapping):
        raise CheckpointError(f"{path}: added_tokens_decoder is {stated!r:.80}, but must be an object")
    for key, entry in stated.items():
        content = _content(entry)
        if not str(key).isdecimal() or content is None:
            raise CheckpointError(f"{path}: added_tokens_decoder has {key!r}: {entry!r:.80}, but must have ids and objects with a content")
        flags = {flag: value for flag in FLAGS if isinstance(entry, Mapping) and isinstance(value := entry.get(flag), bool)}
        yield int(key), tokenizers.AddedToken(content, **flags)


def _of_list(added: Mapping[str, Any], settings: Mapping[str, Any], path: Path) -> Iterator[tuple[int, tokenizers.AddedToken]]:
    """The entries of added_tokens.json by their ids; special are those that the other files name so."""
    special = {*named_special_tokens(settings).values(), *other_special_tokens(settings)}
    for content, token_id in added.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise CheckpointError(f"{path}: added_tokens.json has {content!r}: {token_id!r:.80}, but must have ids")
        yield token_id, tokenizers.AddedToken(content, special=content in special, normalized=content not in special)


def _content(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, Mapping) else value
    return content if isinstance(content, str) and content else None
