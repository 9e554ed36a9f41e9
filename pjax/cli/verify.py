"""Compares every layer's input, the logits and greedy tokens in float32, and names where they first depart.

The exit status is 0 when they agree, 1 when they do not, 2 when the checkpoint can't be read.
"""

from __future__ import annotations

import argparse

from pjax.cli.flags import Parser


def add_arguments(parser: Parser) -> None:
    """The checkpoint, and how much of it to try."""
    parser.add_argument("model", help="a Hugging Face folder, a .gguf file or a hub id")
    parser.add_argument("--max-tokens", type=int, default=16, help="greedy tokens of each prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Compares; the exit status."""
    if args.max_tokens < 1:
        args.parser.error(f"--max-tokens is {args.max_tokens}, but must be >= 1")
    from pjax.verify import verify

    report = verify(args.model, max_tokens=args.max_tokens, seed=args.seed)
    print(report)
    return 0 if report.passed else 1
