"""What goes between devices in a step, in the compiled program; sampling and kernels by number, on shares."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pjax.kv_cache.layout import make_layout, specs_of
from pjax.models import open_model
from pjax.models.sharding import make_mesh
from pjax.pallas_kernels import RaggedBatch, paged_attention
from pjax.pallas_kernels.kv_write import write_targets
from pjax.runner import ModelRunner, RunnerConfig
from pjax.runner.batch import Bucket, SampleShape, ScoreShape
from pjax.sampling.sampler import SamplingArrays, sample
from pjax.sampling.vocabulary import NOT_FINITE, Vocabulary
from tests.collectives import collectives
from tests.models import hf
from tests.pallas_kernels.paged_attention.suite import Feature, make_step


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "OPT", "GPT2"])
def test_two_sums_a_layer_and_no_other_collective(tmp_path: Path, family: str) -> None:
    """One more for the embedding; the rest, of the sampler, is a few numbers a row."""
    layers, rows, tokens, hidden, size = 3, 2, 16, 32, 4
    hf.make(tmp_path, family, num_hidden_layers=layers)
    source = open_model(tmp_path, dtype="float32", layer_mode="unroll", mesh=make_mesh(size))
    sizes = {"num_pages": 8, "page_size": 4, "max_model_len": 32, "max_num_seqs": rows, "max_num_batched_tokens": tokens}
    runner = ModelRunner(source, RunnerConfig(**sizes, layout=make_layout(specs_of(source.own_config), 32), kv_cache_dtype="float32"))
    found = collectives(runner.programs.get(Bucket(False, tokens, rows)).as_text())
    assert found == [("all-reduce", (tokens, hidden))] * (2 * layers + 1)
    rest = [one for shape in (SampleShape(rows), ScoreShape(tokens)) for one in collectives(runner.programs.get(shape).as_text())]
    assert {kind for kind, _ in rest} == {"all-reduce", "all-gather"}
    for kind, shape in rest:  # of rows that sample, or of prompt tokens; a gather is of the likeliest for log-probabilities
        assert shape[0] in (rows, tokens), (kind, shape)
        assert len(shape) == 1 if kind == "all-reduce" else shape[1] <= size * 30, (kind, shape)
    runner.close()


@pytest.mark.parametrize(("size", "vocab"), [(4, 1000), (8, 1001), (8, 20)], ids=str)
def test_sampling_on_shares_of_the_vocabulary(size: int, vocab: int) -> None:
    """Every parameter at once; -inf and equal logits; rows with NaN or +inf on one device; the padding of the last share holds NaN."""
    rng, rows, num_logprobs = np.random.default_rng(size), 64, 8
    logits = (rng.standard_normal((rows, vocab)) * 3).astype(np.float32)
    logits[5, rng.integers(0, vocab, vocab // 3)] = -np.inf
    logits[6:9] = np.round(logits[6:9])  # ties
    logits[9] = 1.0
    bad = [10, 11, 12, 13, 50, 63]
    logits[bad, rng.integers(0, vocab, len(bad))] = np.nan, np.nan, np.inf, -np.nan, np.nan, np.inf
    logits[20] = -np.inf
    bad.append(20)
    params = SamplingArrays(
        temperature=jnp.asarray(rng.choice([0.0, 0.5, 1.0, 1.7], rows), jnp.float32),
        top_k=jnp.asarray(rng.choice([0, 1, 5, 40, vocab + 7], rows), jnp.int32),
        top_p=jnp.asarray(rng.choice([1.0, 0.9, 0.5, 1e-6], rows), jnp.float32),
        min_p=jnp.asarray(rng.choice([0.0, 0.0, 0.05], rows), jnp.float32),
        seed=jnp.asarray(rng.integers(0, 2**32, (rows, 2)), jnp.uint32),
        num_logprobs=jnp.asarray(rng.choice([-1, 0, 5], rows), jnp.int32),
        logprob_temperature=jnp.ones((rows,), jnp.float32),
        typical_p=jnp.asarray(rng.choice([1.0, 1.0, 0.8], rows), jnp.float32),
        repetition_penalty=jnp.ones((rows,), jnp.float32),
        presence_penalty=jnp.zeros((rows,), jnp.float32),
        frequency_penalty=jnp.zeros((rows,), jnp.float32),
        **{name: jnp.zeros((rows,), jnp.int32) for name in ("rows", "prompt_lens", "min_lens", "flags")},
    )
    positions = jnp.asarray(rng.integers(0, 5000, rows), jnp.int32)
    width = -(-vocab // size)
    padded = np.full((rows, size * width), np.nan, np.float32)
    padded[:, :vocab] = logits
    whole, columns = PartitionSpec(), PartitionSpec(None, "model")
    on_shares = jax.shard_map(
        partial(sample, max_logprobs=num_logprobs, vocabulary=Vocabulary("model", vocab)),
        mesh=make_mesh(size), in_specs=(columns, whole, whole), out_specs=whole, check_vma=False,
    )  # fmt: skip
    found = jax.jit(on_shares)(padded, positions, params)
    expected = jax.jit(partial(sample, max_logprobs=num_logprobs))(logits, positions, params)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert np.flatnonzero(found.tokens == NOT_FINITE).tolist() == sorted(bad) and (np.delete(found.tokens, bad) >= 0).all()
    good = np.setdiff1d(np.arange(rows), bad)
    np.testing.assert_array_equal(found.ranks[good], expected.ranks[good])
    np.testing.assert_allclose(found.logprobs[good], expected.logprobs[good], atol=1e-5)
    np.testing.assert_array_equal(found.top_tokens[good], expected.top_tokens[good])
    np.testing.assert_allclose(found.top_logprobs[good], expected.top_logprobs[good], atol=1e-5)
    for shard in found.tokens.addressable_shards:  # every device has them
        np.testing.assert_array_equal(shard.data, expected.tokens)


@pytest.mark.parametrize("backend", ["xla", "native", "tpu"])
@pytest.mark.parametrize("case", ["decode", "mixed"])
def test_kernels_on_shares_of_the_heads(backend: str, case: str) -> None:
    """Write and attention under shard_map against float64; the pool's rows are those of each device's own heads."""
    heads, size = (8, 4, 64), 2 if backend == "tpu" else 4
    step = make_step(Feature(case, heads, 16))

    def by_device(pool: Any) -> np.ndarray:
        rows = np.asarray(pool).reshape(*pool.shape[:2], 2, size, -1)
        return rows.swapaxes(2, 3).reshape(pool.shape)

    def run(pool: jax.Array, q: jax.Array, keys: jax.Array, values: jax.Array, batch: RaggedBatch) -> tuple[jax.Array, jax.Array]:
        targets = write_targets(batch, pool, len(q), backend="tpu" if backend == "tpu" else "xla")
        pool = targets.write(pool, keys, values, 0)
        return paged_attention(q, pool, batch, num_kv_heads=heads[1] // size, backend=backend), pool

    rows, by_head, whole = PartitionSpec(None, None, "model"), PartitionSpec(None, "model"), PartitionSpec()
    call = jax.shard_map(
        run, mesh=make_mesh(size), in_specs=(rows, by_head, by_head, by_head, whole), out_specs=(by_head, rows), check_vma=False
    )
    arguments = (by_device(step.pool), step.q, step.keys, step.values, step.batch)
    if backend == "tpu":
        from jax.experimental.pallas import tpu as pltpu

        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
            out, pool = jax.block_until_ready(jax.jit(call)(*arguments))
        pltpu.reset_tpu_interpret_mode_state()
    else:
        out, pool = jax.jit(call)(*arguments)
    np.testing.assert_allclose(np.asarray(out, np.float64), step.expected, atol=2e-5, rtol=2e-5)
    np.testing.assert_array_equal(np.asarray(pool), by_device(step.pool_after))
