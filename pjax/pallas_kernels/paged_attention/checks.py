"""Values of a ragged batch that shapes do not show: checked on request, since reading them waits for the device."""

from __future__ import annotations

import functools
import os

import jax
import numpy as np

from pjax.pallas_kernels.paged_attention.ragged_batch import RaggedBatch

DEBUG_VARIABLE = "PJAX_DEBUG"


def is_debug() -> bool:
    """Whether the environment asks for checks of values; read when a step is traced."""
    return os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


def check_values(batch: RaggedBatch, *, num_tokens: int, num_pages: int, page_size: int) -> None:
    """Raises ValueError, with name, value and bound, when a kernel would read or write what is not the row's own.

    Under `jax.jit` the values are checked when the step runs, and the error ends that run.
    """
    check = functools.partial(_check, num_tokens=num_tokens, num_pages=num_pages, page_size=page_size, decode_only=batch.decode_only)
    arrays = (batch.row_starts, batch.kv_lens, batch.block_tables, batch.num_decode)
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        jax.debug.callback(check, *arrays)
    else:
        check(*arrays)


def _check(
    row_starts: jax.Array,
    kv_lens: jax.Array,
    block_tables: jax.Array,
    num_decode: jax.Array,
    *,
    num_tokens: int,
    num_pages: int,
    page_size: int,
    decode_only: bool,
) -> None:
    starts, lens, tables = (np.asarray(array) for array in (row_starts, kv_lens, block_tables))
    counts, most = np.diff(starts), tables.shape[1] * page_size
    live = counts > 0
    if starts[0] != 0 or starts[-1] > num_tokens:
        raise ValueError(f"batch.row_starts goes from {starts[0]} to {starts[-1]}, but must start at 0 and end at {num_tokens} at most")
    if not 0 <= num_decode <= len(lens):
        raise ValueError(f"batch.num_decode is {num_decode}, but must be 0 to {len(lens)}, the rows")
    is_decode = np.arange(len(lens)) < num_decode
    columns = np.arange(tables.shape[1]) * page_size < np.where(live, lens, 0)[:, None]
    wrong = {
        "row_starts falls, or has another count of tokens than 1 in a decode row": (counts < 0) | (is_decode & (counts != 1)),
        "row_starts has tokens from num_decode on, but the batch is decode_only": live & ~is_decode & decode_only,
        "kv_lens is less than the row's own tokens": live & (lens < counts),
        f"kv_lens is over the {most} tokens of the block table's {tables.shape[1]} pages": live & (lens > most),
        f"block_tables has a page outside 0 to {num_pages - 1}": (columns & ((tables < 0) | (tables >= num_pages))).any(axis=1),
    }
    for what, rows in wrong.items():
        if rows.any():
            row = int(rows.argmax())
            shown = tables[row][columns[row]].tolist()
            raise ValueError(f"batch.{what}: row {row} has {counts[row]} tokens, kv_len {lens[row]}, pages {shown}")
