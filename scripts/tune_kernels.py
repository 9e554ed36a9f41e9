"""Finds the fastest block sizes of the attention kernels on this machine's device, and keeps them where the kernels look.

Each shape's decode step (many rows, one token each) and prefill step (one chunk of a prompt) is timed with every combination of the
backend's candidate sizes, one program after the other; the best of each replaces the default. Needs a TPU or a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pjax.pallas_kernels import RaggedBatch, pool_shape
from pjax.pallas_kernels.paged_attention import tuning
from pjax.pallas_kernels.paged_attention.options import AttentionOptions

MODELS = tuning.MODELS | {"Llama-3-70B/8": (8, 1, 128)}  # on each of 8 chips


def heads(text: str) -> tuple[int, int, int]:
    """A model's name, or N,K,H."""
    if text in MODELS:
        return MODELS[text]
    try:
        num_heads, num_kv_heads, head_size = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N,K,H nor one of {', '.join(MODELS)}") from None
    if num_heads < 1 or num_kv_heads < 1 or head_size < 1 or num_heads % num_kv_heads:
        raise argparse.ArgumentTypeError(f"{text!r}: N must be a multiple of K, all at least 1")
    return num_heads, num_kv_heads, head_size


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("shapes", nargs="*", type=heads, help="models or N,K,H; all of the known models by default")
    parser.add_argument("--backend", help="the platform's by default")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--page-size", type=int, default=16, choices=[8, 16, 32, 64, 128])
    parser.add_argument("--rows", type=int, default=64, help="decode rows")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence")
    parser.add_argument("--chunk", type=int, default=512, help="prompt tokens of a prefill step")
    parser.add_argument("--repeat", type=int, default=20, help="runs of a program; their median counts")
    parser.add_argument("--out", type=Path, default=tuning.FOLDER, help="folder of the JSON file")
    args = parser.parse_args()
    for name in ("rows", "context", "chunk", "repeat"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}, but must be >= 1")
    if args.chunk > args.context:
        parser.error(f"--chunk is {args.chunk}, but must be at most --context, {args.context}")
    args.backend = args.backend or {"tpu": "tpu", "gpu": "triton"}.get(jax.default_backend())
    if args.backend is None:
        parser.error(f"there is nothing to tune on {jax.default_backend()}; --backend names a kernel")
    return args


def make_batch(phase: str, args: argparse.Namespace) -> tuple[RaggedBatch, int, int]:
    """The batch of a phase, its packed tokens, and the pages it needs."""
    rows, tokens = (args.rows, 1) if phase == "decode" else (1, args.chunk)
    width = -(-args.context // args.page_size)
    tables = np.random.default_rng(0).permutation(rows * width).reshape(rows, width)
    fields = (np.arange(rows + 1) * tokens, np.full(rows, args.context), tables, np.array(rows if phase == "decode" else 0))
    batch = RaggedBatch(*(jnp.asarray(field, jnp.int32) for field in fields), decode_only=phase == "decode")
    return batch, rows * tokens, rows * width


def combinations(default: Any, candidates: dict[str, tuple[int, ...]]) -> Iterator[Any]:
    """The default first, then every other combination of the candidates."""
    yield default
    for values in itertools.product(*candidates.values()):
        sizes = dataclasses.replace(default, **dict(zip(candidates, values, strict=True)))
        if sizes != default:
            yield sizes


def seconds(run: Callable[[], jax.Array], repeat: int) -> float:
    """Median of `repeat` runs after the first."""
    run().block_until_ready()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run().block_until_ready()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def tune(module: Any, phase: str, shape: tuple[int, int, int], args: argparse.Namespace, bar: Any) -> tuple[tuning.Shape, dict[str, Any]]:
    """The fastest sizes of one shape and phase. A combination that does not compile is left out, the default may not be."""
    num_heads, num_kv_heads, head_size = shape
    batch, num_tokens, num_pages = make_batch(phase, args)
    keys = jax.random.split(jax.random.key(0))
    q = jax.random.normal(keys[0], (num_tokens, num_heads, head_size), args.dtype)
    pages = jax.random.normal(keys[1], pool_shape(1, num_pages, args.page_size, num_kv_heads, head_size), args.dtype)
    options = AttentionOptions(num_kv_heads=num_kv_heads, scale=head_size**-0.5)
    reason = module.why_not(q, pages, options)
    if reason:
        sys.exit(f"{args.backend} {reason}")
    default = module.default_sizes(q, pages, options, phase)
    taken: dict[Any, float] = {}
    for sizes in combinations(default, module.CANDIDATES[phase]):
        attend = jax.jit(lambda q, pages, batch, sizes=sizes: module.attend(q, pages, batch, options, {phase: sizes}))
        try:
            taken[sizes] = seconds(lambda attend=attend: attend(q, pages, batch), args.repeat)
        except Exception as error:
            if sizes == default:
                raise
            bar.write(f"{shape} {phase} {sizes}: {str(error).splitlines()[0][:120]}")
        bar.update()
    best = min(taken, key=lambda sizes: taken[sizes])
    changed = {name: value for name, value in dataclasses.asdict(best).items() if value != getattr(default, name)}
    bar.write(f"{shape} {phase}: {taken[best] * 1e6:.0f} us with {best}, {taken[default] * 1e6:.0f} us by default")
    entry = {"sizes": changed, "microseconds": round(taken[best] * 1e6, 1), "default_microseconds": round(taken[default] * 1e6, 1)}
    entry |= {"context": args.context, "tokens": num_tokens, "jax": jax.__version__}
    return tuning.Shape.of(q, pages, options), entry


def main() -> None:
    args = parse()
    module = importlib.import_module(f"pjax.pallas_kernels.paged_attention.{args.backend}")
    shapes = args.shapes or list(MODELS.values())
    each = sum(len(list(itertools.product(*fields.values()))) for fields in module.CANDIDATES.values())
    measured: dict[tuning.Key, dict[str, Any]] = {}
    with tqdm(total=each * len(shapes), desc="Timing", unit="program") as bar:
        for shape in shapes:
            for phase in module.CANDIDATES:
                key, entry = tune(module, phase, shape, args, bar)
                measured[args.backend, phase, key] = entry
    print(tuning.write_entries(jax.devices()[0].device_kind, measured, args.out))


if __name__ == "__main__":
    main()
