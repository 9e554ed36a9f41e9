"""Flags from the fields of settings, so that the two never part: each field's type, default and docstring make its flag.

Every flag can also stand in a YAML file (`--config`) or in the environment (`PJAX_` and its name); the command line wins over the
environment, which wins over the file.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, NoReturn, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import configargparse

from pjax.errors import ConfigError

T = TypeVar("T")

PREFIX = "PJAX_"
_POWERS = {letter: power for power, letter in enumerate("kmgt", 1)}
_SIZE = re.compile(r"(-?\d+(?:\.\d+)?)\s*([kmgtKMGT]?)(i?)([bB]?)")


def size(text: str) -> int:
    """A number with a unit, as vLLM reads it: 32k is 32,000 and 32K is 32,768; 4GB is 4·10^9, and 4G and 4GiB are 4·2^30."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500M or 2G")
    number, letter, binary, byte = match.groups()
    base = 1024 if binary or (letter.isupper() and not byte) else 1000
    value = float(number) * base ** _POWERS.get(letter.lower(), 0)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is {value:g}, but must be a whole number")
    return int(value)


class _Yaml(configargparse.YAMLConfigFileParser):  # type: ignore[misc]
    """Names in the file may have - or _."""

    def parse(self, stream: Any) -> dict[str, Any]:
        """The file's settings by the names of the flags."""
        return {name.replace("_", "-"): value for name, value in super().parse(stream).items()}


class Parser(configargparse.ArgumentParser):  # type: ignore[misc]
    """argparse's, whose values also come from a file and the environment."""

    def parse_known_args(self, *arguments: Any, env_vars: Mapping[str, str] = os.environ, **more: Any) -> Any:
        """An empty variable counts as none: compose files and Makefiles pass on what may not be set."""
        return super().parse_known_args(*arguments, env_vars={name: value for name, value in env_vars.items() if value}, **more)


def make_parser(prog: str, text: str, commands: Any = None, name: str = "", summary: str = "") -> Parser:
    """A parser, of a command if `commands` are given, that reads the file and the environment too."""
    options: dict[str, Any] = {
        "prog": prog,
        "description": text,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "config_file_parser_class": _Yaml,
        "auto_env_var_prefix": PREFIX if commands is not None else None,
        "add_env_var_help": False,
        "add_config_file_help": False,
        "allow_abbrev": False,
    }
    if commands is None:
        return Parser(**options)
    parser: Parser = commands.add_parser(name, help=summary, **options)
    parser.add_argument(
        "--config", is_config_file=True, metavar="FILE", help="YAML with flags by their names; each is also read from PJAX_<NAME>"
    )
    return parser


class _Settings(Parser):
    """Tells what is wrong to a program."""

    def error(self, message: str) -> NoReturn:
        """ConfigError instead of an exit."""
        raise ConfigError(message)


def settings_parser(prog: str) -> Parser:
    """A parser for `parse_mapping`, which reads the environment too."""
    return _Settings(
        prog=prog,
        config_file_parser_class=_Yaml,
        auto_env_var_prefix=PREFIX,
        add_env_var_help=False,
        add_config_file_help=False,
        add_help=False,
        allow_abbrev=False,
    )


def parse_mapping(parser: Parser, given: Mapping[str, Any]) -> argparse.Namespace:
    """Flags from a mapping, each value as in YAML or as text. ConfigError for what is wrong."""
    import yaml

    try:
        text = yaml.safe_dump(dict(given))
    except yaml.YAMLError as error:
        raise ConfigError(f"a setting is neither text, number, truth value nor a list of them: {error}") from None
    return cast(argparse.Namespace, parser.parse_args([], config_file_contents=text))


def field_docs(cls: type) -> dict[str, str]:
    """The docstrings that stand under a dataclass's fields, in one line each."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            assert isinstance(node.target, ast.Name)
            found[node.target.id] = " ".join(str(after.value.value).split())
    return found


def add_fields(
    parser: Any,
    cls: type,
    title: str,
    *,
    leave_out: Iterable[str] = (),
    flags: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """A group of flags, one for each field of a dataclass.

    Args:
      flags: names of flags that are not their fields'.
      defaults: what this command takes instead of a field's default.

    Raises TypeError for a field whose type no flag can have.
    """
    group = parser.add_argument_group(title)
    hints, docs, home = get_type_hints(cls), field_docs(cls), sys.modules[cls.__module__]
    for field in fields(cls):
        if field.name in leave_out or not field.init:
            continue
        default = field.default if field.default_factory is MISSING else field.default_factory()
        default = None if default is MISSING else (defaults or {}).get(field.name, default)
        flag = (flags or {}).get(field.name, field.name).replace("_", "-")
        choices = getattr(home, f"{field.name}s".upper(), None)  # DTYPES are the choices of dtype
        options = _options(f"{cls.__name__}.{field.name}", hints[field.name], default, choices)
        text = docs.get(field.name, "").replace("%", "%%")
        shown = "" if default is None or default == () else f" (default: {_shown(default)})"
        group.add_argument(f"--{flag}", dest=field.name, help=(text + shown).strip() or None, **options)


def values(cls: type, args: argparse.Namespace) -> dict[str, Any]:
    """What the flags of a dataclass's fields say; those without flags, and lists that nobody gave, keep their defaults."""
    found = {field.name: getattr(args, field.name) for field in fields(cls) if hasattr(args, field.name)}
    lists = {name for name, hint in get_type_hints(cls).items() if _element(_without_none(hint)[0]) is not None}
    return {name: value for name, value in found.items() if not (value is None and name in lists)}


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, int) and default >= 1 << 20 and default % (1 << 20) == 0:
        return f"{default >> 20}MiB"
    return f"{default:g}" if isinstance(default, float) else str(default)


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type without its `| None`, and whether it had one. Of `str | Sequence[str]` the sequence counts."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    inner = [one for one in get_args(hint) if one is not type(None)]
    lists = [one for one in inner if _element(one) is not None]
    return (lists or inner)[0], len(inner) < len(get_args(hint))


def _element(hint: Any) -> Any:
    """The element type of a list or tuple of texts or numbers, or None."""
    origin = get_origin(hint)
    listed = isinstance(origin, type) and issubclass(origin, Sequence)
    return get_args(hint)[0] if listed and get_args(hint)[0] in (str, int, float) else None


def _options(name: str, hint: Any, default: Any, choices: Sequence[Any] | None) -> dict[str, Any]:
    """Arguments of `add_argument` for a field."""
    hint, optional = _without_none(hint)
    if (element := _element(hint)) is not None:
        metavar = {str: "TEXT", int: "N", float: "X"}[element]
        return {"action": "append", "type": _reader(element), "metavar": metavar, "default": None}
    if hint is bool and not (optional and default is None):
        return {"action": argparse.BooleanOptionalAction, "default": default}
    if _is_mapping(hint):
        return {"type": _json, "metavar": "JSON", "default": default}
    if hint not in (bool, str, int, float):
        raise TypeError(f"{name} is {hint}, of which there is no flag")
    read = _choice(choices, hint) if choices else _reader(hint)
    metavar = "{" + ",".join(map(str, choices)) + "}" if choices else {bool: "BOOL", str: "TEXT", int: "N", float: "X"}[hint]
    return {"type": _or_none(read) if optional else read, "metavar": metavar, "default": default}


def _is_mapping(hint: Any) -> bool:
    origin = get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "yes", "1")


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _reader(kind: type) -> Callable[[str], Any]:
    readers: dict[type, Callable[[str], Any]] = {bool: _bool, str: str, int: size, float: _float}
    return readers[kind]


def _choice(choices: Sequence[Any], kind: type) -> Callable[[str], Any]:
    """One of the choices, in any case; anything else is left to the settings' own check, which names the bound."""

    def read(text: str) -> Any:
        return next((choice for choice in choices if str(choice).lower() == text.lower()), None) or _reader(kind)(text)

    return read


def _or_none(read: Callable[[str], T]) -> Callable[[str], T | None]:
    def read_or_none(text: str) -> T | None:
        return None if text.lower() == "none" else read(text)

    return read_or_none
