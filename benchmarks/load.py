"""How fast a checkpoint loads, as a share of the disk's read speed.

A made-up LLaMA checkpoint of about 1 GB is written in each format, then loaded in turns with plain reads of its files.
Before each, the files are dropped from the page cache (`posix_fadvise`), so both read the disk; with --warm neither does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 32000}


def write_llama(folder: Path, num_bytes: int) -> Path:
    """float32 weights; as many layers as make the size."""
    folder.mkdir()
    d, f = SIZES["hidden_size"], SIZES["intermediate_size"]
    layers = max((num_bytes // 4 - 2 * SIZES["vocab_size"] * d) // (4 * d * d + 3 * d * f), 1)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (SIZES["vocab_size"], d), "lm_head.weight": (SIZES["vocab_size"], d)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"{at}mlp.{name}_proj.weight": shape for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f)))}
        shapes |= {f"{at}{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (d,)
    rng = np.random.default_rng(0)
    save_file({name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}, folder / "model.safetensors")
    config = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": layers, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_torch(source: Path, folder: Path) -> Path:
    """The same with pytorch_model.bin."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    torch.save(load_file(source / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def files(folder: Path) -> list[Path]:
    """All of them."""
    return [path for path in folder.rglob("*") if path.is_file()]


def forget(folder: Path) -> None:
    """Drops the files from the page cache."""
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path) -> float:
    """Seconds to read every file in order into one buffer."""
    buffer = memoryview(bytearray(1 << 22))
    started = time.perf_counter()
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def load(folder: Path, dtype: str) -> float:
    """Seconds from opening the checkpoint to parameters on the device."""
    import jax

    from pjax.models import open_model

    started = time.perf_counter()
    jax.block_until_ready(open_model(folder, dtype=dtype, layer_mode="loop").load(progress=False))
    return time.perf_counter() - started


def main() -> None:
    """Measures every format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=1.0, help="GB (default: 1)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--formats", nargs="+", default=["safetensors", "torch", "orbax"], choices=("safetensors", "torch", "orbax"))
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    parser.add_argument("--folder", type=Path, help="where to write, on the disk to be measured (default: the temporary folder)")
    args = parser.parse_args()

    import jax

    from pjax.convert import convert

    jax.block_until_ready(jax.numpy.zeros(1))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        source = write_llama(root / "safetensors", int(args.size * 1e9))
        for format in args.formats:
            folder = root / format
            if format == "torch":
                as_torch(source, folder)
            elif format == "orbax":
                convert(source, folder, format="orbax", progress=False)
            size = sum(path.stat().st_size for path in files(folder)) / 1e9
            times: dict[str, list[float]] = {"read": [], "load": []}
            for _ in range(args.rounds):
                for kind, measure in (("read", read_plainly), ("load", lambda folder: load(folder, args.dtype))):
                    if not args.warm:
                        forget(folder)
                    times[kind].append(measure(folder))
            read, loaded = (statistics.median(times[kind]) for kind in ("read", "load"))
            print(
                f"{format:<12} {size:.2f} GB to {args.dtype}: plain read {size / read:.2f} GB/s, "
                f"load {size / loaded:.2f} GB/s, ratio {read / loaded:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
