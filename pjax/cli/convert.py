"""Writes a checkpoint (Hugging Face folder with safetensors or pytorch_model.bin, .gguf file, hub id, orbax) as a new folder.

An interrupted conversion leaves only DEST.partial; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pjax.cli.flags import Parser, size

EXAMPLES = """examples:
  pjax convert model.Q4_1.gguf ./model --dtype bfloat16
  pjax convert facebook/opt-125m ./opt --format orbax
  pjax convert ./llama ./llama-bf16 --dtype bfloat16 --max-shard-size 2GB
  (cd ./llama-bf16 && sha256sum --check SHA256SUMS)
"""


def shard_size(text: str) -> int:
    """Bytes from "5GB" (10^9, as Hugging Face counts) or "5GiB" (2^30)."""
    try:
        number = size(text)
    except argparse.ArgumentTypeError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 512MiB")
    return number


def add_arguments(parser: Parser) -> None:
    """From where, to where, and how."""
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="SOURCE", help="a Hugging Face folder, a .gguf file, a hub id, or an orbax folder of pjax")
    parser.add_argument("destination", metavar="DEST", type=Path, help="the new folder; nothing may be there yet")
    parser.add_argument("--format", default="safetensors", choices=("safetensors", "orbax"), help="(default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="(default: the checkpoint's)")
    parser.add_argument("--max-shard-size", type=shard_size, default="5GB", metavar="SIZE", help="of one file (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Converts, and prints what was made."""
    from pjax.convert import convert
    from pjax.logs import show_logs

    show_logs()
    try:
        made = convert(args.source, args.destination, format=args.format, dtype=args.dtype, max_shard_size=args.max_shard_size)
    except OSError as error:
        print(f"pjax convert: {error}", file=sys.stderr)
        return 1
    print(made)
    return 0
