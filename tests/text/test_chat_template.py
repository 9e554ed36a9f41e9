"""Chat templates: rendered as transformers renders them; those that fail, and where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from pjax.errors import ConfigError, InvalidRequestError
from pjax.text.loading import load_tokenizer
from pjax.text.tokenizer import Tokenizer
from tests.text.folders import train, transformers_tokenizer, write_folder

MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "Grüße 😀\n"},
    {"role": "assistant", "content": "  ok"},
]
TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools: ' + message.role) }}{% endif %}
    {% generation %}
<{{ message['role'] }}>{{ message['content'] | tojson }}{{ eos_token }}
    {% endgeneration %}
    {% if loop.index == 99 %}{% break %}{% endif %}
{%- endfor %}
{% if tools is not none %}TOOLS {{ tools | tojson(indent=2) }}{% endif %}
{% if add_generation_prompt %}<assistant>{% endif %}"""


def test_the_demo_template_renders_as_in_transformers(demo: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=demo.backend, chat_template=demo.chat_template
    )
    for messages in (MESSAGES, MESSAGES[1:]):
        for prompt in (True, False):
            ours = demo.apply_chat_template(messages, add_generation_prompt=prompt)
            assert ours == theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert demo.apply_chat_template(MESSAGES[1:2]).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_what_templates_may_use_is_as_in_transformers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, train(byte_level=True), chat_template=TEMPLATE)
    ours, theirs = load_tokenizer(folder), transformers_tokenizer(folder)
    tools = [{"type": "function", "function": {"name": "f", "description": "Grüße <b>", "parameters": {}}}]
    for variables in ({}, {"tools": tools}, {"add_generation_prompt": False}):
        options: dict[str, Any] = {"add_generation_prompt": True, **variables}
        assert ours.apply_chat_template(MESSAGES, **options) == theirs.apply_chat_template(MESSAGES, tokenize=False, **options)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "this model has no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + messages[0].none }}", "refuses these messages"),
        ("{{ 'a' + 1 }}", "refuses these messages"),
        ("{% for %}", "refuses these messages"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_templates_that_fail_fail_the_request(template: str | None, message: str) -> None:
    tokenizer = Tokenizer(Backend(models.BPE()), special_tokens={}, eos_token_ids=(), chat_template=template)
    with pytest.raises(InvalidRequestError, match=message):
        tokenizer.apply_chat_template(MESSAGES)


def test_a_message_without_a_role_is_refused(demo: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="message 0 is 'hi', but must be a mapping with a role"):
        demo.apply_chat_template(["hi"])  # type: ignore[list-item]


def test_where_a_folder_keeps_its_template(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = write_folder(tmp_path, train(byte_level=True), chat_template=named)
    assert load_tokenizer(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert load_tokenizer(folder).chat_template == "J"


def test_a_template_of_ones_own_takes_the_place_of_the_models(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, train(byte_level=True), chat_template="MODEL")
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }} é {{ name }}", encoding="utf-8")
    for template in (file, str(file), "{{ messages[0].content }} é {{ name }}"):
        tokenizer = load_tokenizer(folder, template)
        assert tokenizer.apply_chat_template(MESSAGES[1:], name=1) == "Grüße 😀\n é 1"
    assert tokenizer.apply_chat_template(MESSAGES, chat_template="O {{ eos_token }}") == "O </s>"
    assert load_tokenizer(folder).apply_chat_template(MESSAGES) == "MODEL"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nothing.jinja", r"chat template nothing\.jinja is not readable as a file of UTF-8: .*No such file"),
        (Path("/"), r"chat template / is not readable"),
        (3, r"chat_template is 3, but must be a path or a template"),
        ("a\n{% for %}", r"chat_template is no jinja2 template: line 2: "),
        ("{{ x | nofilter }}", r"chat_template is no jinja2 template: line 1: No filter named 'nofilter'"),
        (b"\xff{", r"latin\.jinja is not readable as a file of UTF-8: .*can't decode byte 0xff"),
        (b"\n\n{{ x", r"latin\.jinja is no jinja2 template: line 3: "),
    ],
)
def test_bad_templates_are_refused_by_name(tmp_path: Path, template: Any, message: str) -> None:
    folder = write_folder(tmp_path, train(byte_level=True))
    if isinstance(template, bytes):
        (tmp_path / "latin.jinja").write_bytes(template)
        template = tmp_path / "latin.jinja"
    with pytest.raises(ConfigError, match=message):
        load_tokenizer(folder, template)
