"""The jitted sample program: shared between engines where nothing but the vocabulary decides what it is."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from pjax.sampling.program import jit_sample


@dataclass
class AddOne:
    """A logits processor without a hash."""

    amount: float = 1.0

    def __call__(self, logits: jax.Array, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        return logits + self.amount


def test_engines_share_a_program_without_processors_only() -> None:
    assert jit_sample("sample_4", 5) is jit_sample("sample_4", 5)
    assert jit_sample("sample_4", 5) is not jit_sample("sample_8", 5)
    processor = AddOne()
    assert jit_sample("sample_4", 5, processors=(processor,)) is not jit_sample("sample_4", 5, processors=(processor,))
