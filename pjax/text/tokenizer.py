"""Tokenizers by the `tokenizers` package, from a Hugging Face folder or a GGUF file, with their chat templates."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from pjax.checkpoints.magic import refuse_lfs_pointer
from pjax.errors import CheckpointError, InvalidRequestError
from pjax.text.added_tokens import add_stated_tokens, named_special_tokens, other_special_tokens
from pjax.text.chat_template import render

log = logging.getLogger(__name__)
LONG_TEXT = 4096  # characters or tokens, from which on other threads must not wait


class Tokenizer:
    """A model's tokenizer with its special tokens and chat template."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str],
        eos_token_ids: Sequence[int],
        chat_template: str | None = None,
    ) -> None:
        self.backend = backend
        self.special_tokens = dict(special_tokens)  # bos_token, eos_token, …: what chat templates may name
        self.eos_token_ids = tuple(eos_token_ids)
        self.chat_template = chat_template
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""
        return max(int(self.backend.get_vocab_size(with_added_tokens=True)), 1 + max(self.special_ids, default=-1))

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token as the vocabulary spells it, which bounds those of the text that a token stands for."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a sequence; None when the checkpoint names none."""
        token = self.special_tokens.get("bos_token")
        return None if token is None else self.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (`Ġthe`, `<0x0A>`); None when there is no such id."""
        token = self.backend.id_to_token(token_id)
        return None if token is None else str(token)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token spelt as in the vocabulary; None when there is none."""
        token_id = self.backend.token_to_id(token)
        return None if token_id is None else int(token_id)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with begin- and end-of-sequence tokens where the checkpoint says so.

        Special tokens that the text spells out become their ids. Raises InvalidRequestError when it is no Unicode text.
        """
        try:
            if len(text) < LONG_TEXT:
                return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)
            # For batches, tokenizers lets other threads run meanwhile.
            return list(self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except (UnicodeError, TypeError) as error:  # lone surrogates, or not a str
            raise InvalidRequestError(f"prompt is {text!r:.80}, but must be a str that UTF-8 can encode: {error}") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        if len(ids) < LONG_TEXT:
            return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        return str(self.backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0])

    def apply_chat_template(
        self,
        /,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the model was trained to read it. InvalidRequestError when there is no template or it refuses.

        Args:
          chat_template: a template's text to use instead of the model's own.
          variables: what the template may name beside the messages and special tokens.
        """
        template, names = self.chat_of(messages, variables | {"add_generation_prompt": add_generation_prompt}, chat_template)
        try:
            return render(template, names)
        except Exception as error:  # the template is code: given a message that it does not expect, it raises anything
            raise InvalidRequestError(f"the chat template refuses these messages: {error}") from error

    def chat_of(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], chat_template: str | None = None
    ) -> tuple[str, dict[str, Any]]:
        """(template, all that it may name) of a conversation; see `apply_chat_template`, which renders it."""
        template = self.chat_template if chat_template is None else chat_template
        if template is None:
            raise InvalidRequestError("this model has no chat template: give one (chat_template, --chat-template)")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidRequestError(f"message {index} is {message!r}, but must be a mapping with a role")
        return template, {"tools": None, "documents": None, **self.special_tokens, **variables, "messages": list(messages)}


def load_folder_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. CheckpointError when there is none or it is damaged."""
    if not (path / "tokenizer.json").is_file():
        return _convert_slow(path)
    refuse_lfs_pointer(path / "tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{path / 'tokenizer.json'} is damaged: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return _with_settings(path, backend)


def _with_settings(path: Path, backend: tokenizers.Tokenizer) -> Tokenizer:
    # Begin and end tokens are the post-processor's: like transformers 5, add_bos_token and add_eos_token of
    # tokenizer_config.json count only where there is no tokenizer.json, and then transformers has applied them.
    config = _json(path / "tokenizer_config.json")
    settings = _json(path / "special_tokens_map.json") | {key: value for key, value in config.items() if value is not None}
    add_stated_tokens(backend, settings, _json(path / "added_tokens.json"), path)
    special = named_special_tokens(settings)
    added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    known = {
        token
        for token in (*special.values(), *other_special_tokens(settings))
        if token not in added and backend.token_to_id(token) is not None
    }
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in sorted(known)])
    for name in ("bos_token", "eos_token"):
        if name in special and backend.token_to_id(special[name]) is None:
            log.warning("%s: its %s is %r, which its tokenizer does not have: it is ignored", path.name, name, special[name])
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return Tokenizer(
        backend,
        special_tokens=special,
        eos_token_ids=() if eos is None else (eos,),
        chat_template=_template(path, settings.get("chat_template")),
    )


def _template(path: Path, template: Any) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
    if isinstance(template, list) and all(isinstance(entry, Mapping) for entry in template):  # several named ones
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _convert_slow(path: Path) -> Tokenizer:
    """Folders with only the files of a slow tokenizer: transformers converts them."""
    names = ("tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")
    if not any((path / name).is_file() for name in names):
        raise CheckpointError(f"{path} has no tokenizer (tokenizer.json, {', '.join(names)}); skip_tokenizer_init does without one")
    if (path / "tokenizer.model").is_file():
        refuse_lfs_pointer(path / "tokenizer.model")
        _check_packages(path / "tokenizer.model")
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: transformers can't read its tokenizer: {error}") from error
    return _with_settings(path, converted.backend_tokenizer)


def _check_packages(file: Path) -> None:
    """Names the packages that a slow tokenizer's file needs, where they are missing: transformers' own message names others too."""
    with file.open("rb") as opened:
        is_sentencepiece = opened.read(1) == b"\n"  # a list of pieces; tiktoken's file is lines of text
    kind, modules = ("SentencePiece", ("sentencepiece", "google.protobuf")) if is_sentencepiece else ("tiktoken", ("tiktoken",))
    missing = [name for name in modules if not _is_there(name)]
    if missing:
        packages = "pip install 'pjax[sentencepiece]'" if is_sentencepiece else "pip install tiktoken"
        raise CheckpointError(
            f"{file} is a {kind} model without a tokenizer.json, and {', '.join(missing)} is missing: {packages}, "
            "or give the tokenizer.json of the same model"
        )


def _is_there(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return value if isinstance(value, dict) else {}
