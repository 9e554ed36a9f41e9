"""The sample program of a vocabulary, on one device or divided over a mesh: what is to be compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjax.models.sharding import MODEL_AXIS
from pjax.runner.forward import LOGITS_SPEC
from pjax.sampling.program import jit_sample, sample_input_struct
from pjax.sampling.vocabulary import WHOLE, Vocabulary

MAX_LEN, MAX_LOGPROBS = 8192, 32


def make(vocab_size: int, num_rows: int, where: Any) -> tuple[Any, tuple[Any, ...]]:
    """The jitted program and structs of its arguments: logits, the token table, a shape's inputs.

    Args:
      where: the sharding of one device, or a mesh.
    """
    mesh = where if isinstance(where, Mesh) else None
    whole = where if mesh is None else NamedSharding(mesh, PartitionSpec())

    def placed(struct: Any) -> Any:
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=whole)

    vocabulary = WHOLE if mesh is None else Vocabulary(MODEL_AXIS, vocab_size)
    width = vocab_size if mesh is None else -(-vocab_size // mesh.size) * mesh.size
    logits = jax.ShapeDtypeStruct((num_rows, width), jnp.float32, sharding=whole if mesh is None else NamedSharding(mesh, LOGITS_SPEC))
    tokens = placed(jax.ShapeDtypeStruct((num_rows, MAX_LEN), jnp.int32))
    inputs = jax.tree.map(placed, sample_input_struct(num_rows, max_num_seqs=num_rows, vocab_size=vocab_size))
    return jit_sample("sample", MAX_LOGPROBS, vocabulary, (), mesh), (logits, tokens, inputs)
