"""Chat templates: jinja2 in a sandbox, with what transformers gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from pjax.errors import ConfigError
from pjax.machine import expand_user

JINJA_CHARACTERS = "{}\n"  # a path has none of them, a template has at least one


def read_template(template: str | Path) -> str:
    """A chat template's text from a file, or as it is given: a str with a brace or a line break is the template itself, as in vLLM.

    Raises ConfigError when there is no such file, when it is no UTF-8, or when the template is no jinja2 (with its line).
    """
    if not isinstance(template, str | Path):
        raise ConfigError(f"chat_template is {template!r:.80}, but must be a path or a template")
    if isinstance(template, str) and any(character in template for character in JINJA_CHARACTERS):
        text, name = template, "chat_template"
    else:
        name = f"chat template {template}"
        try:
            text = expand_user(template).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{name} is not readable as a file of UTF-8: {error}") from error
    from jinja2.exceptions import TemplateSyntaxError

    try:
        _compiled(text)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{name} is no jinja2 template: line {error.lineno}: {error.message}") from error
    return text


def render(template: str, names: Mapping[str, Any]) -> str:
    """The template's text; raises whatever the template raises."""
    return str(_compiled(template).render(names))


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """Templates come with checkpoints: they run in jinja2's sandbox, with the helpers that transformers gives them."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks the model's words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as the base class has it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    del environment.globals["lipsum"]  # which makes as much text as it is asked for
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
