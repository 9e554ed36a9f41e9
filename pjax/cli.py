"""The `pjax` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pjax.errors import PjaxError


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    top = argparse.ArgumentParser(prog="pjax", description="LLM inference in pure JAX.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    verify = commands.add_parser(
        "verify",
        help="compare a checkpoint in pjax with transformers (needs torch)",
        description="Compares every layer's input, the logits and greedy tokens in float32, and names where they first depart. "
        "The exit status is 0 when they agree, 1 when they do not, 2 when the checkpoint can't be read.",
    )
    verify.add_argument("model", help="a Hugging Face folder, a .gguf file or a hub id")
    verify.add_argument("--max-tokens", type=int, default=16, help="greedy tokens of each prompt (default: %(default)s)")
    verify.add_argument("--seed", type=int, default=0, help="of the random prompts (default: %(default)s)")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; the exit status."""
    args = parser().parse_args(arguments)
    if args.max_tokens < 1:
        parser().error(f"--max-tokens is {args.max_tokens}, but must be >= 1")
    from pjax.verify import verify

    try:
        report = verify(args.model, max_tokens=args.max_tokens, seed=args.seed)
    except PjaxError as error:
        print(f"pjax: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0 if report.passed else 1
