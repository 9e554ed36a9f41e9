"""Starts the OpenAI-compatible server, with a page at / to try it, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import argparse

from pjax.cli.common import add_engine, server_config
from pjax.cli.flags import Parser, add_fields
from pjax.errors import ConfigError

FLAGS = {"api_keys": "api_key", "allowed_origins": "allowed_origin"}  # one at a time, repeatable


def add_arguments(parser: Parser) -> None:
    """All of ServerConfig's fields and EngineConfig's."""
    from pjax.server.server_config import ServerConfig

    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="as --model (default: the demo model)")
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="NAME", help="a Hugging Face folder, a .gguf file or a hub id")
    add_fields(parser, ServerConfig, "server", leave_out=("model", "engine"), flags=FLAGS)
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    """Serves; the exit status."""
    if args.model_argument is not None:
        if args.model not in (None, "", args.model_argument):
            raise ConfigError(f"the model is {args.model_argument!r} and --model {args.model!r}, but must be one")
        args.model = args.model_argument
    config = server_config(args)
    from pjax.server import run as serve

    return serve(config)
