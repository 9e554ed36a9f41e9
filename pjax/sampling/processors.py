"""Logits processors of the user: JAX functions that the step calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from pjax.errors import ConfigError
from pjax.sampling.adjust import LogitsProcessor
from pjax.sampling.parameters import MAX_PROCESSORS


def check_processors(processors: Mapping[str, LogitsProcessor], num_rows: Sequence[int], length: int, vocab_size: int) -> None:
    """Traces each at the shapes of the steps; ConfigError when one fails or gives anything but float32 [S, V].

    Args:
      num_rows: S of every bucket.
      length: columns of the token table.
    """
    if len(processors) > MAX_PROCESSORS:
        raise ConfigError(f"there are {len(processors)} logits_processors, but must be at most {MAX_PROCESSORS}")
    for name, process in processors.items():
        for rows in sorted(set(num_rows)):
            logits = jax.ShapeDtypeStruct((rows, vocab_size), jnp.float32)
            tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
            try:
                made = jax.eval_shape(process, logits, tokens, jax.ShapeDtypeStruct((rows,), jnp.int32))
            except Exception as error:  # it is the user's code
                raise ConfigError(f"logits processor {name!r} can't be traced for {rows} rows: {error}") from error
            shape, dtype = getattr(made, "shape", None), getattr(made, "dtype", None)
            if shape != logits.shape or dtype != jnp.float32:
                raise ConfigError(
                    f"logits processor {name!r} gives {dtype}{list(shape or ())}, but must give float32[{rows}, {vocab_size}]"
                )
