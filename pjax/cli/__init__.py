"""The `pjax` command: a module here for each of its commands. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from pjax import __version__
from pjax.cli.flags import Parser, make_parser
from pjax.ending import end_within
from pjax.errors import ConfigError, PjaxError

EXIT_SECONDS = 5.0  # from a command's end to the process's
HOSTS_EXIT_SECONDS = 15.0  # where several hosts end in order
COMMANDS = {
    "serve": "start the OpenAI-compatible server",
    "generate": "write text for prompts given as arguments, a file or standard input",
    "chat": "talk with a model, here or at a server",
    "complete": "let a model continue text, here or at a server",
    "run-batch": "run a file of requests in OpenAI's batch format",
    "bench": "measure latency, throughput or a server",
    "convert": "write a checkpoint as safetensors or orbax",
    "verify": "compare a checkpoint in pjax with transformers (needs torch)",
    "collect-env": "print versions, devices and settings, for a bug report",
}


def parser(only: str | None = None) -> Parser:
    """All commands, and their options: of one command only where one is named."""
    top = make_parser("pjax", "LLM inference and serving in pure JAX.")
    top.add_argument("--version", action="version", version=f"pjax {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"pjax.cli.{name.replace('-', '_')}") if only in (None, name) else None
        sub = make_parser(f"pjax {name}", (module and module.__doc__) or text, commands, name, text)
        if module is not None:
            module.add_arguments(sub)
            sub.set_defaults(run=module.run, parser=sub)
    return top


def _check_cpu_level(command: str) -> None:
    """ConfigError for a PJAX_CPU_LEVEL that is wrong; collect-env prints what is wrong with it."""
    if os.environ.get("PJAX_CPU_LEVEL") and command != "collect-env":
        from pjax import native

        try:
            native.library()
        except ValueError as error:
            raise ConfigError(str(error)) from error


def entry(arguments: Sequence[str] | None = None) -> NoReturn:
    """`main` as a process: it ends with that status within seconds, even while a program is being compiled."""
    status = 1
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    finally:
        has_hosts = "pjax.hosts.runtime" in sys.modules  # which nothing else imports
        end_within(HOSTS_EXIT_SECONDS if has_hosts else EXIT_SECONDS, status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parser(next((word for word in arguments if not word.startswith("-")), "")).parse_args(arguments)
    try:
        _check_cpu_level(args.command)
        status = int(args.run(args))
        sys.stdout.flush()  # what cannot be written is told here, not by the interpreter as it ends
        return status
    except PjaxError as error:
        print(f"pjax {args.command}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pjax"):
            raise
        extra = "the server and its clients need an extra: pip install 'pjax[server]'"
        print(f"pjax {args.command}: {error.name} is not installed; {extra}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has enough
        _drop_output()
        return 1
    except OSError as error:  # a full disk, a folder that is missing
        print(f"pjax {args.command}: {error}", file=sys.stderr)
        _drop_output()
        return 1


def _drop_output() -> None:
    """Writes what standard output still holds; where that fails, it goes nowhere, and the interpreter does not complain as it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
