"""What a model's attention layer calls: writes the step's keys and values into the pages, then attends over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pjax.errors import InvalidRequestError, UnsupportedError
from pjax.kv_cache.layout import KVCacheLayout
from pjax.pallas_kernels import RaggedBatch, paged_attention
from pjax.pallas_kernels.kv_write import WriteTargets, write_targets

PER_LAYER = ("scale", "sliding_window", "logit_softcap")


@dataclass(frozen=True, kw_only=True)
class LayerOptions:
    """How a layer attends. An option that differs between layers is a tuple of L values, one for each.

    A backend of paged attention that does not apply an option refuses it by name.
    """

    scale: float | tuple[float | None, ...] | None = None  # multiplies the logits; None: H ** -0.5
    sliding_window: int | tuple[int | None, ...] | None = None  # tokens that a token sees, itself included; None: all before it
    logit_softcap: float | tuple[float | None, ...] | None = None  # logits become c · tanh(logits / c)
    sinks: jax.Array | None = None  # float [N], a logit of each head that has no value; this layer's own

    def apply(self, layer: int | jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
        """`attend` with the options of one layer, as keywords; none of them is a tuple.

        Where `layer` is traced, a conditional chooses among the sets of options that differ: each is a number for the kernels.
        """
        options = vars(self)
        names = [name for name in PER_LAYER if isinstance(options[name], tuple)]
        if not names:
            return attend(**options)
        by_layer = list(zip(*(options[name] for name in names), strict=True))
        if isinstance(layer, int):
            return attend(**options | dict(zip(names, by_layer[layer], strict=True)))
        different = list(dict.fromkeys(by_layer))
        branches = [partial(attend, **options | dict(zip(names, values, strict=True))) for values in different]
        which = jnp.array([different.index(values) for values in by_layer], jnp.int32)
        out: jax.Array = lax.switch(which[layer], branches)
        return out


PLAIN = LayerOptions()


@dataclass(frozen=True, kw_only=True)
class RowContext:
    """Which row (sequence) each token of a step belongs to, and what is known of rows, for every layer."""

    rows: jax.Array  # int32 [T]; S for padding
    row_values: Mapping[str, jax.Array] = field(default_factory=dict)  # each int32 [S]: the slot of a row's adapter, say

    def token_values(self, name: str, *, padding: int = 0) -> jax.Array:
        """int32 [T]: the value of each token's row; `padding` for tokens that are none."""
        if name not in self.row_values:
            raise InvalidRequestError(f"row value is {name!r}, but must be one of {', '.join(self.row_values) or '(none in this step)'}")
        return self.row_values[name].at[self.rows].get(mode="fill", fill_value=padding)


@dataclass(frozen=True, kw_only=True)
class PagedContext(RowContext):
    """One step's batch as every layer sees it. Made once a step, outside the layers."""

    batch: RaggedBatch  # with the block tables of the first group of layers
    positions: jax.Array  # int32 [T]
    block_tables: jax.Array  # int32 [groups, S, W]
    targets: WriteTargets  # of a group's first layer; where there are several groups, each array has an axis of them in front
    num_pages: int  # pages of one layer
    layout: KVCacheLayout
    backend: str | None = None

    @property
    def num_tokens(self) -> jax.Array:
        """int32 []: how many of the T tokens are not padding."""
        return self.batch.row_starts[-1]

    @classmethod
    def make(
        cls,
        batch: RaggedBatch,
        pages: jax.Array,
        num_tokens: int,
        layout: KVCacheLayout,
        backend: str | None = None,
        row_values: Mapping[str, jax.Array] | None = None,
        block_tables: jax.Array | None = None,
    ) -> PagedContext:
        """For T packed tokens and a pool [L·P, G, 2·K·H] of `layout.num_layers` layers.

        Args:
          block_tables: int32 [groups, S, W], one table for each group of the layout; may be left out where there is one group.
        """
        rows = batch.token_rows(num_tokens)
        tables = batch.block_tables[None] if block_tables is None else block_tables
        if tables.shape[0] != len(layout.groups):
            raise ValueError(f"block_tables has shape {tables.shape}, but must be [groups, S, W] of {len(layout.groups)} groups")
        write_backend = backend if backend in (None, "native", "tpu") else "xla"
        targets = [write_targets(replace(batch, block_tables=table), pages, num_tokens, backend=write_backend) for table in tables]
        return cls(
            rows=rows,
            row_values=row_values or {},
            batch=batch,
            positions=batch.token_positions(num_tokens, rows),
            block_tables=tables,
            targets=targets[0] if len(targets) == 1 else jax.tree.map(lambda *arrays: jnp.stack(arrays), *targets),
            num_pages=pages.shape[0] // layout.num_layers,
            layout=layout,
            backend=backend,
        )

    def attend(
        self, pages: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, layer: int | jax.Array, options: LayerOptions = PLAIN
    ) -> tuple[jax.Array, jax.Array]:
        """Writes k, v [T, K, H] as layer `layer` and attends with q [T, N, H]; returns ([T, N, H], pages).

        Raises UnsupportedError when the backend that was asked for does not apply an option; the message names both.
        """
        batch, targets, place = self._in_group(layer)
        offset = place * self.num_pages
        pages = targets.write(pages, k, v, offset)
        attend = partial(paged_attention, q, pages, batch.offset_pages(offset), num_kv_heads=k.shape[1], backend=self.backend)
        try:
            return options.apply(layer, attend), pages
        except NotImplementedError as error:
            raise UnsupportedError(str(error)) from error

    def _in_group(self, layer: int | jax.Array) -> tuple[RaggedBatch, WriteTargets, int | jax.Array]:
        """Returns the batch and the targets of a layer's group, and the layer's place in the group."""
        places = self.layout.places
        group: int | jax.Array
        place: int | jax.Array
        if isinstance(layer, int):
            group, place = places[layer]
        elif len(self.layout.groups) == 1 and self.layout.groups[0].layers == tuple(range(len(places))):
            return self.batch, self.targets, layer
        else:
            table = jnp.array([places.get(number, (0, 0)) for number in range(max(places) + 1)], jnp.int32)
            group, place = table[layer, 0], table[layer, 1]
        if len(self.layout.groups) == 1:
            return self.batch, self.targets, place
        return replace(self.batch, block_tables=self.block_tables[group]), jax.tree.map(lambda array: array[group], self.targets), place
