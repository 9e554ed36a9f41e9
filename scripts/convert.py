"""Writes a checkpoint (Hugging Face folder with safetensors or pytorch_model.bin, .gguf file, hub id, orbax) as a new folder.

An interrupted conversion leaves only DEST.partial; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

EXAMPLES = """examples:
  convert.py model.Q4_1.gguf ./model --dtype bfloat16
  convert.py facebook/opt-125m ./opt --format orbax
  convert.py ./llama ./llama-bf16 --dtype bfloat16 --max-shard-size 2GB
  (cd ./llama-bf16 && sha256sum --check SHA256SUMS)
"""
UNITS = {"": 1, "B": 1} | {f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)} | {f"{k}IB": 1024**i for i, k in enumerate("KMGT", 1)}


def size(text: str) -> int:
    """Bytes from "5GB" (10^9, as Hugging Face counts) or "5GiB" (2^30)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B|)", text.strip().upper())
    if match is None or match[2] not in UNITS or (number := int(float(match[1]) * UNITS[match[2]])) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 512MiB")
    return number


def main() -> None:
    """Parses the command line and converts."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a Hugging Face folder, a .gguf file, a hub id, or an orbax folder of pjax")
    parser.add_argument("destination", metavar="DEST", type=Path, help="the new folder; nothing may be there yet")
    parser.add_argument("--format", default="safetensors", choices=("safetensors", "orbax"), help="(default: %(default)s)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="(default: the checkpoint's)")
    parser.add_argument("--max-shard-size", type=size, default="5GB", metavar="SIZE", help="of one file (default: %(default)s)")
    args = parser.parse_args()

    from pjax.convert import convert
    from pjax.errors import PjaxError
    from pjax.logs import show_logs

    show_logs()
    try:
        made = convert(args.source, args.destination, format=args.format, dtype=args.dtype, max_shard_size=args.max_shard_size)
    except (PjaxError, OSError) as error:
        sys.exit(f"convert.py: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(made)


if __name__ == "__main__":
    main()
