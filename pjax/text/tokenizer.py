"""Tokenizers by the `tokenizers` package, from a Hugging Face folder or a GGUF file, and chat templates by jinja2."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from pjax.errors import CheckpointError, InvalidRequestError


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

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with begin- and end-of-sequence tokens where the checkpoint says so."""
        return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text; bytes that are no UTF-8 become U+FFFD, ids without a token nothing."""
        return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The conversation as the model was trained to read it. InvalidRequestError when there is no template or it refuses."""
        if self.chat_template is None:
            raise InvalidRequestError("this model has no chat template")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidRequestError(f"message {index} is {message!r}, but must be a mapping with a role")
        from jinja2.exceptions import TemplateError

        try:
            template = _environment().from_string(self.chat_template)
            names = self.special_tokens | variables
            return str(template.render(messages=list(messages), add_generation_prompt=add_generation_prompt, **names))
        except TemplateError as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}") from error


def _environment() -> Any:
    """Templates come with checkpoints: they run in jinja2's sandbox, with the helpers that transformers gives them."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def load_folder_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. CheckpointError when there is none or it is damaged."""
    if not (path / "tokenizer.json").is_file():
        return _convert_slow(path)
    try:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{path / 'tokenizer.json'} is damaged: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    return _with_settings(path, backend)


def _with_settings(path: Path, backend: tokenizers.Tokenizer) -> Tokenizer:
    settings = _json(path / "tokenizer_config.json")
    special: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
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
        return file.read_text(encoding="utf-8")
    if isinstance(template, list):  # several named ones
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _convert_slow(path: Path) -> Tokenizer:
    """Folders with only the files of a slow tokenizer: transformers converts them."""
    names = ("tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")
    if not any((path / name).is_file() for name in names):
        raise CheckpointError(f"{path} has no tokenizer (tokenizer.json, {', '.join(names)}); skip_tokenizer_init does without one")
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(path))
    except Exception as error:
        raise CheckpointError(f"{path}: transformers can't read its tokenizer: {error}") from error
    return _with_settings(path, converted.backend_tokenizer)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return value if isinstance(value, dict) else {}
