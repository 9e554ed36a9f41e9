"""The compiler's own schedule of the decode kernel: `python -m tests.aot.schedule v5e` prints a JSON line a model.

A process of its own, since the compiler is told where to write its schedules before it is loaded. A bundle is what a
TPU core issues in a cycle; loops are not weighted by their trip counts, so that only the inner loop's figure means
something: how many bytes of KV it takes in a bundle.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

KERNEL = "paged_decode"
LINE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s*(?:[A-Z]{2})?\s*:\s*(>*)")


def inner_loop(folder: Path) -> tuple[int, int]:
    """Bundles of the deepest loop in the kernel's last schedule, and how many of its lines store spilled vectors."""
    (path,) = (p for p in folder.glob(f"*-{KERNEL}*-final_bundles.txt") if "schedule-analysis" not in p.name)
    by_depth: dict[int, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        found = LINE.match(line)
        if found:
            by_depth.setdefault(len(found[1]), []).append(line)
    inner = by_depth[max(by_depth)]
    return len(inner), sum(bool(re.search(r"_spill.*\bvst|\bvst.*_spill", line)) for line in inner)


def measure(generation: str, folder: Path) -> None:
    """Prints a line for each model."""
    import jax
    import jax.numpy as jnp

    from pjax.pallas_kernels.paged_attention import tpu as kernel
    from pjax.pallas_kernels.paged_attention.options import AttentionOptions
    from pjax.pallas_kernels.paged_attention.tuning import MODELS
    from tests.aot import tpu

    for model, heads in MODELS.items():
        compiled = tpu.compile_attention(generation, heads, "bfloat16", decode_only=True)
        bundles, spills = inner_loop(folder)
        for path in folder.iterdir():
            path.unlink()
        q, pages = jax.ShapeDtypeStruct((64, heads[0], heads[2]), jnp.bfloat16), tpu.pool_struct(heads, "bfloat16", 16)
        options = AttentionOptions(num_kv_heads=heads[1], scale=1.0)
        block = kernel.make_spec(q, pages, options, kernel.default_sizes(q, pages, options, "decode")).block
        memory = compiled.memory_analysis()
        figures: dict[str, Any] = {
            "model": model,
            "block": block,
            "bundles": bundles,
            "spills": spills,
            "bytes_per_bundle": round(block * pages.shape[2] * 2 / bundles),
            "temporary": memory.temp_size_in_bytes,
            "argument": memory.argument_size_in_bytes,
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={name} --xla_jf_dump_llo_text=true"
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
        measure(sys.argv[1], Path(name))
