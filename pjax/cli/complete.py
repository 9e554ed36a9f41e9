"""Lets a model continue text, as it is made: one prompt given as an argument, or prompt after prompt from the terminal.

With --url the model is that of a running server, and nothing heavy is loaded here.
"""

from __future__ import annotations

import argparse
import sys

from pjax.cli.flags import Parser
from pjax.cli.talk import Partner, add_partner, open_partner
from pjax.errors import InvalidRequestError, RequestFailedError


def add_arguments(parser: Parser) -> None:
    """The prompt, and who continues it."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="one text to continue (default: a line at a time from the terminal)")
    add_partner(parser)


def run(args: argparse.Namespace) -> int:
    """Continues the prompt, or one after the other until the input ends."""
    partner = open_partner(args)
    try:
        if args.prompt is not None:
            _continue(partner, args.prompt)
            return 0
        while (line := _ask()) is not None:
            if not line:
                continue
            try:
                _continue(partner, line)
            except (InvalidRequestError, RequestFailedError) as error:
                print(f"pjax complete: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                print()
        return 0
    finally:
        partner.close()


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _continue(partner: Partner, prompt: str) -> None:
    print(prompt, end="", flush=True)
    for piece in partner.complete(prompt):
        print(piece, end="", flush=True)
    print()
