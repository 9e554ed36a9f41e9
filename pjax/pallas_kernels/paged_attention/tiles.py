"""Tiles of query tokens: how a kernel with a fixed block shape sees the rows of a ragged batch that have many tokens."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tiles:
    """M tiles of up to `size` consecutive query tokens of one row each; the live ones come first."""

    rows: jax.Array  # int32 [M]
    counts: jax.Array  # int32 [M], live tokens; 0 for a tile that is not live
    positions: jax.Array  # int32 [M], of the tile's first token in its sequence
    tokens: jax.Array  # int32 [M, size], packed index of each token; those past the count are in range too
    places: jax.Array  # int32 [T], where a packed token stands in [M · size]; M · size for tokens in no tile

    @classmethod
    def of_decode(cls, batch: RaggedBatch, num_tokens: int) -> Tiles:
        """Tiles of one token each, of the rows before `num_decode`. M is S, at most T."""
        rows = jnp.arange(min(batch.num_rows, num_tokens), dtype=jnp.int32)
        live = rows < batch.num_decode
        positions = jnp.where(live, batch.kv_lens[: len(rows)] - 1, 0)
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)
        places = jnp.where(tokens < batch.num_decode, tokens, len(rows))
        return cls(rows, live.astype(jnp.int32), positions, rows[:, None], places)

    @classmethod
    def of(cls, batch: RaggedBatch, num_tokens: int, size: int) -> Tiles:
        """Tiles of the rows from `num_decode` on. M is ceil(T / size) + S, at most T."""
        num_rows = batch.num_rows
        most = min(num_tokens, -(-num_tokens // size) + num_rows)
        counts = batch.row_starts[1:] - batch.row_starts[:-1]
        counts = jnp.where(jnp.arange(num_rows, dtype=jnp.int32) < batch.num_decode, 0, counts)
        ends = jnp.cumsum((counts + size - 1) // size).astype(jnp.int32)  # tiles of the rows up to each
        index = jnp.arange(most, dtype=jnp.int32)
        rows = jnp.minimum(jnp.searchsorted(ends, index, side="right").astype(jnp.int32), num_rows - 1)
        live = index < ends[-1]
        before = (index - (ends[rows] - (counts[rows] + size - 1) // size)) * size  # tokens of the row in its earlier tiles
        first = batch.row_starts[rows] + before
        tile_counts = jnp.where(live, jnp.minimum(size, counts[rows] - before), 0)
        positions = jnp.where(live, batch.kv_lens[rows] - counts[rows] + before, 0)
        tokens = jnp.clip(first[:, None] + jnp.arange(size, dtype=jnp.int32), 0, num_tokens - 1)
        row_of = batch.token_rows(num_tokens)
        safe = jnp.minimum(row_of, num_rows - 1)
        inside = jnp.arange(num_tokens, dtype=jnp.int32) - batch.row_starts[safe]
        first_tile = ends[safe] - (counts[safe] + size - 1) // size
        places = jnp.where((row_of < num_rows) & (counts[safe] > 0), first_tile * size + inside, most * size)
        return cls(rows, tile_counts, positions, tokens, places)

    @property
    def size(self) -> int:
        """Query tokens of a full tile."""
        return self.tokens.shape[1]
