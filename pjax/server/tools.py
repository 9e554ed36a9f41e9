"""Tool calls as models write them, read back from whole texts and from streams.

hermes (Hermes, Qwen):  <tool_call>{"name": …, "arguments": {…}}</tool_call>, any number of them, text before and between
llama3_json (Llama 3):  the whole text is {"name": …, "parameters": {…}}, several of them divided by ";", <|python_tag|> before it or not
mistral:                [TOOL_CALLS][{"name": …, "arguments": {…}}, …], or [TOOL_CALLS]name{…} for each, [ARGS] after the name or not

What looks like a call but can't be read is text, as the model wrote it.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pjax.text.tokenizer import Tokenizer

_DECODER = json.JSONDecoder()
_NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[ARGS\])?\s*(?=\{)")
MARKERS = {"hermes": ("<tool_call>",), "llama3_json": ("<|python_tag|>",), "mistral": ("[TOOL_CALLS]",)}


@dataclass(frozen=True)
class Call:
    """One call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str

    def shown(self) -> dict[str, Any]:
        """As messages hold it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def parser_for(tokenizer: Tokenizer, setting: str) -> str | None:
    """The parser of that name; with "auto" the one that the chat template points to. None: this model gets no tools."""
    if setting == "none":
        return None
    if setting != "auto":
        return setting
    template = tokenizer.chat_template or ""
    if "tools" not in template:
        return None
    found = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3_json": '"parameters"'}
    return next((name for name, marker in found.items() if marker in template), None)


def has_special_marker(tokenizer: Tokenizer, parser: str) -> bool:
    """Whether the text must keep special tokens, since one of them begins a call."""
    return any(tokenizer.token_to_id(marker) in tokenizer.special_ids for marker in MARKERS[parser])


class ToolReader:
    """Reads the text of one answer as it comes: content, and calls once they are whole."""

    def __init__(self, parser: str) -> None:
        self._parser = parser
        self._marker = MARKERS[parser][0]
        self._rest = ""  # neither content nor a call yet
        self._whole = parser == "llama3_json"  # nothing is content before the end
        self.num_calls = 0

    def feed(self, text: str, *, last: bool) -> tuple[str, list[Call]]:
        """Takes more text; (content, calls) that are certain now. With `last` nothing is held back."""
        self._rest += text
        if self._parser == "hermes":
            content, calls = self._hermes(last)
        elif self._parser == "mistral":
            content, calls = self._mistral(last)
        else:
            content, calls = self._llama(last)
        self.num_calls += len(calls)
        return content, calls

    def _until_marker(self) -> str:
        """Content before the marker, which is cut off; an end that may begin one stays."""
        at = self._rest.find(self._marker)
        if at < 0:
            at = len(self._rest) - _overlap(self._rest, self._marker)
        content, self._rest = self._rest[:at], self._rest[at:]
        return content

    def _hermes(self, last: bool) -> tuple[str, list[Call]]:
        content, calls = "", list[Call]()
        while True:
            before = self._until_marker()
            content += before if before.strip() or not (calls or self.num_calls) else ""
            if not self._rest.startswith(self._marker):
                break
            end = self._rest.find("</tool_call>")
            if end < 0 and not last:
                break
            inner = self._rest[len(self._marker) : end if end >= 0 else len(self._rest)]
            whole, self._rest = (self._rest, "") if end < 0 else (self._rest[: end + 12], self._rest[end + 12 :])
            call = _call(_loads(inner), "arguments")
            if call is None:
                content += whole
            else:
                calls.append(call)
        if last:
            content, self._rest = content + self._rest, ""
        return content.rstrip() if calls and not content.strip() else content, calls

    def _mistral(self, last: bool) -> tuple[str, list[Call]]:
        content = self._until_marker()
        if not last:
            return content, []
        whole, self._rest = self._rest, ""
        calls: list[Call] = []
        for part in whole.split(self._marker)[1:]:
            read = _mistral_calls(part)
            if not read:
                return content + whole, []
            calls += read
        return (content, calls) if calls else (content + whole, [])

    def _llama(self, last: bool) -> tuple[str, list[Call]]:
        start = self._rest.lstrip()
        may_call = start.startswith(("{", self._marker)) or self._marker.startswith(start)
        if not self._whole or not may_call:
            self._whole = False
            content, self._rest = self._rest, ""
            return content, []
        if not last:
            return "", []
        whole, self._rest = self._rest, ""
        calls = _llama_calls(start.removeprefix(self._marker).strip())
        return ("", calls) if calls else (whole, [])


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of a text that begins the marker."""
    return next((size for size in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:size])), 0)


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _call(value: Any, key: str, identifier: str | None = None) -> Call | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    arguments = value.get(key, {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(identifier or f"call_{secrets.token_hex(12)}", value["name"], text)


def _llama_calls(text: str) -> list[Call]:
    calls: list[Call] = []
    at = 0
    while at < len(text):
        try:
            value, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        call = _call(value, "parameters" if isinstance(value, Mapping) and "parameters" in value else "arguments")
        if call is None:
            return []
        calls.append(call)
        rest = text[at:].lstrip()
        if rest and not rest.startswith(";"):
            return []
        at = len(text) - len(rest.removeprefix(";").lstrip())
    return calls


def _mistral_calls(text: str) -> list[Call]:
    def new_id() -> str:  # its chat template takes nine letters or digits and nothing else
        return secrets.token_hex(5)[:9]

    named = _NAME.match(text)
    if named is not None:
        try:
            arguments, end = _DECODER.raw_decode(text, named.end())
        except (ValueError, RecursionError):
            return []
        return [] if text[end:].strip() else [Call(new_id(), named.group(1), json.dumps(arguments, ensure_ascii=False))]
    value = _loads(text)
    calls = [_call(entry, "arguments", new_id()) for entry in (value if isinstance(value, list) else [value])]
    return [] if None in calls else [call for call in calls if call is not None]
