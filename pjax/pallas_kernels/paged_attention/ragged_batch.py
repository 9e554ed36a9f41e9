"""The ragged batch: which packed tokens belong to which sequence, and where its keys and values lie."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedBatch:
    """T packed query tokens of S sequences, each with its own pages.

    Row `s` owns the packed tokens `[row_starts[s], row_starts[s + 1])`; they are the last ones of its `kv_lens[s]`
    tokens. Rows `[0, num_decode)` have exactly one token each (so row `s` owns packed token `s`); the rows from there
    on have any number of tokens, zero included. Tokens from `row_starts[S]` on are padding.

    An empty row (padding) has `row_starts[s] == row_starts[s + 1]`.
    """

    row_starts: jax.Array  # int32 [S + 1]
    kv_lens: jax.Array  # int32 [S], tokens that have keys and values once this step has written its own
    block_tables: jax.Array  # int32 [S, W], page ids; entries past ceil(kv_len / G) are never read as data
    num_decode: jax.Array  # int32 []
    decode_only: bool = field(default=False, metadata={"static": True})  # a promise at trace time: no row from num_decode on has a token

    @property
    def num_rows(self) -> int:
        """S, padding included."""
        return self.kv_lens.shape[0]

    def offset_pages(self, offset: int | jax.Array) -> RaggedBatch:
        """The same batch with `offset` added to every page id: `layer · num_pages` addresses a layer's own pages."""
        return replace(self, block_tables=self.block_tables + offset)

    def token_rows(self, num_tokens: int) -> jax.Array:
        """int32 [T]: the row of each packed token; S for padding."""
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)
        return jnp.searchsorted(self.row_starts[1:], tokens, side="right").astype(jnp.int32)

    def token_positions(self, num_tokens: int, rows: jax.Array | None = None) -> jax.Array:
        """int32 [T]: position of each packed token in its own sequence; 0 for padding. `rows`: its `token_rows`, where known."""
        rows = self.token_rows(num_tokens) if rows is None else rows
        safe = jnp.minimum(rows, self.num_rows - 1)
        from_end = self.row_starts[safe + 1] - jnp.arange(num_tokens, dtype=jnp.int32)
        return jnp.where(rows < self.num_rows, self.kv_lens[safe] - from_end, 0)

    def token_slots(self, num_tokens: int, page_size: int, num_slots: int) -> jax.Array:
        """int32 [T]: slot (page · G + offset) where each packed token's key and value go; `num_slots` for padding."""
        rows = self.token_rows(num_tokens)
        positions = self.token_positions(num_tokens)
        page_ids = self.block_tables[jnp.minimum(rows, self.num_rows - 1), positions // page_size]
        slots = page_ids * page_size + positions % page_size
        return jnp.where(rows < self.num_rows, slots, num_slots)
