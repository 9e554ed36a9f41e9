"""The paged-attention kernels in your own JAX program: one step of two sequences, nothing of pjax but the kernels.

Usage: python examples/kernel_only.py
"""

import jax
import jax.numpy as jnp

from pjax.pallas_kernels import RaggedBatch, paged_attention, pool_shape, write_targets

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, PAGE_SIZE, NUM_PAGES = 8, 2, 64, 16, 32

# Sequence 0 decodes its 20th token; sequence 1 reads a prompt of 5. Each has pages of its own, in any order.
batch = RaggedBatch(
    row_starts=jnp.array([0, 1, 6], jnp.int32),  # packed tokens [0, 1) and [1, 6)
    kv_lens=jnp.array([20, 5], jnp.int32),  # tokens in the pool after this step
    block_tables=jnp.array([[7, 3], [12, 0]], jnp.int32),
    num_decode=jnp.array(1, jnp.int32),  # rows with one token come first
)


@jax.jit(donate_argnums=0)
def step(pages: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, batch: RaggedBatch) -> tuple[jax.Array, jax.Array]:
    """Writes the step's keys and values into the pool, in place, and attends over it."""
    pages = write_targets(batch, pages, q.shape[0]).write(pages, k, v, page_offset=0)
    return pages, paged_attention(q, pages, batch, num_kv_heads=NUM_KV_HEADS)


pages = jnp.zeros(pool_shape(1, NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_SIZE))
keys = jax.random.split(jax.random.key(0), 3)
q, k, v = (jax.random.normal(key, (8, heads, HEAD_SIZE)) for key, heads in zip(keys, (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)))
pages, out = step(pages, q, k, v, batch)
print(f"attention of 6 packed tokens (2 are padding): {out.shape}, padding is zero: {bool((out[6:] == 0).all())}")
