"""The forward and the score program of known models, divided over a mesh as the engine divides them: what is to be compiled, and seen."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjax.kv_cache.layout import make_layout, specs_of
from pjax.models import gpt_neox, llama
from pjax.models.sharding import MODEL_AXIS, Shares, divide
from pjax.pallas_kernels.pages import page_bytes, pool_format, pool_shape
from pjax.runner.batch import Bucket, forward_input_struct
from pjax.runner.forward import POOL_SPEC, jit_forward, jit_score, make_forward, make_score, shard_forward, shard_score
from pjax.sampling.prompt_logprobs import scored_struct
from pjax.sampling.vocabulary import Vocabulary

PAGE_SIZE, MAX_LEN = 16, 8192
LLAMA = {"model_type": "llama", "max_position_embeddings": MAX_LEN, "vocab_size": 128256, "num_key_value_heads": 8}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Llama-3-8B": (
        llama, LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    ),
    "Llama-3-70B": (
        llama, LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    ),
    "GPT-NeoX-20B": (
        gpt_neox,
        {
            "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64, "vocab_size": 50432,
            "max_position_embeddings": MAX_LEN, "rotary_pct": 0.25,
        },
    ),
}  # fmt: skip


def make(
    model: str, mesh: Mesh, mode: str, bucket: Bucket, backend: str, *, pool_bytes: int, num_layers: int | None = None
) -> tuple[Any, tuple[Any, ...], Shares]:
    """The jitted forward program in bfloat16 and its arguments' structs, with a pool of `pool_bytes` on each device; the shares."""
    family, fields = MODELS[model]
    config = family.Config.from_hf(fields | ({} if num_layers is None else {"num_hidden_layers": num_layers}))
    shares = divide(lambda of: family.Model(of, dtype="bfloat16", layer_mode=mode), config, mesh)
    leaves, structure = jax.tree.flatten(shares.abstract)
    own = shares.config
    num_pages = pool_bytes // page_bytes(own.num_layers, PAGE_SIZE, own.num_kv_heads, own.head_size, "bfloat16")
    order: Any = pool_format(NamedSharding(mesh, POOL_SPEC))
    shape = pool_shape(own.num_layers, num_pages, PAGE_SIZE, own.num_kv_heads * shares.size, own.head_size)

    forward = make_forward(shares.graph, structure, make_layout(specs_of(own), MAX_LEN), backend)
    tokens = placed(jax.ShapeDtypeStruct((bucket.num_rows, MAX_LEN), jnp.int32), mesh)
    pool = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=order)
    tables = placed(jax.ShapeDtypeStruct((1, bucket.num_rows, MAX_LEN // PAGE_SIZE), jnp.int32), mesh)
    inputs = jax.tree.map(lambda struct: placed(struct, mesh), forward_input_struct(bucket))
    return jit_forward(shard_forward(forward, shares), order), (leaves, pool, tables, tokens, inputs), shares


def make_scoring(shares: Shares, vocab_size: int, hidden_size: int, num_tokens: int) -> tuple[Any, tuple[Any, ...]]:
    """The jitted program that scores prompt tokens, and its arguments' structs."""
    leaves, structure = jax.tree.flatten(shares.abstract)
    score = shard_score(make_score(shares.graph, structure, Vocabulary(MODEL_AXIS, vocab_size)), shares)
    inputs = jax.ShapeDtypeStruct((num_tokens, hidden_size), jnp.bfloat16), scored_struct(num_tokens)
    return jit_score(score), (leaves, *jax.tree.map(lambda struct: placed(struct, shares.mesh), inputs))


def placed(struct: Any, mesh: Mesh) -> Any:
    """The same on every device."""
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def own_bytes(shares: Shares) -> int:
    """Bytes of the parameters on one device."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shares.abstract, is_leaf=lambda x: isinstance(x, nnx.Variable))
    )


def cycles_of_layers(text: str, shape: tuple[int, int], num_layers: int) -> float:
    """The compiler's own estimate for one layer, of a TPU's program: of the computation with the sums of `shape`, [T, D].

    Unrolled, that is the program's entry, divided by its layers; scanned, the loop's body.
    """
    pattern = re.compile(rf"\[{shape[0]},{shape[1]}\]\S* all-reduce(?:-start)?\(")
    most = max(text.split("\n\n"), key=lambda computation: len(pattern.findall(computation)))
    total = sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', most)))
    return total / num_layers if len(pattern.findall(most)) > 2 else total
