"""The forward program of LLaMA models, as the engine runs it: what is to be compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pjax.kv_cache.layout import make_layout, specs_of
from pjax.models import llama
from pjax.pallas_kernels.pages import page_bytes, pool_format, pool_shape
from pjax.runner.batch import Bucket, forward_input_struct
from pjax.runner.forward import jit_forward, make_forward

PAGE_SIZE, POOL_BYTES = 16, 1 << 30
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "Llama-3-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "rows of 448 numbers": {
        "hidden_size": 448, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 112, "vocab_size": 1024,
    },
}  # fmt: skip


def make(model: str, mode: str, bucket: Bucket, sharding: Any, backend: str) -> tuple[Any, tuple[Any, ...]]:
    """The jitted program in bfloat16, and structs of its arguments: parameters, a pool of POOL_BYTES, block tables, token table, inputs."""
    config = llama.Config.from_hf(MODELS[model] | {"model_type": "llama", "max_position_embeddings": 8192})
    graph, abstract = nnx.split(nnx.eval_shape(lambda: llama.Model(config, dtype="bfloat16", layer_mode=mode)))
    leaves, structure = jax.tree.flatten(abstract)

    def placed(struct: Any) -> Any:
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)

    num_pages = POOL_BYTES // page_bytes(config.num_layers, PAGE_SIZE, config.num_kv_heads, config.head_size, "bfloat16")
    shape = pool_shape(config.num_layers, num_pages, PAGE_SIZE, config.num_kv_heads, config.head_size)
    order: Any = pool_format(sharding)
    pool = jax.ShapeDtypeStruct(shape, "bfloat16", sharding=order)
    tokens = placed(jax.ShapeDtypeStruct((bucket.num_rows, 8192), jnp.int32))
    tables = placed(jax.ShapeDtypeStruct((1, bucket.num_rows, 8192 // PAGE_SIZE), jnp.int32))
    inputs = jax.tree.map(placed, forward_input_struct(bucket))
    forward = make_forward(graph, structure, make_layout(specs_of(config), 8192), backend)
    return jit_forward(forward, order), (list(map(placed, leaves)), pool, tables, tokens, inputs)
