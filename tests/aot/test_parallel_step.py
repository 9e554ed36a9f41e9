"""The programs of a step divided over several TPUs or GPUs, through the real compilers: memory, collectives, two ways to run layers."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from pjax.models.sharding import MODEL_AXIS
from pjax.pallas_kernels.pages import page_bytes
from pjax.runner.batch import Bucket
from pjax.sampling.prompt_logprobs import BLOCK
from pjax.sampling.sampler import ROWS
from tests.aot import sample_program
from tests.aot.gpu import TARGETS, Job, compile_in_process
from tests.aot.parallel_step import MODELS, PAGE_SIZE, cycles_of_layers, make, make_scoring, own_bytes
from tests.aot.tpu import mesh_of
from tests.collectives import collectives

USABLE = {"v5e": 15.75, "v6e": 31.25}  # GiB: the compiler refuses more
SHARE = 0.9  # of what the weights leave, as the engine takes
DECODE, MIXED = Bucket(True, 64, 64), Bucket(False, 512, 64)
SLACK = 96 << 20  # the head's logits, one layer's activations, one layer's weights where they are stacked


def pool_and_tokens(model: str, size: int, mesh: Mesh, gib: float) -> tuple[int, int, int]:
    """Bytes of weights and of a useful pool on each device, and the tokens that it holds."""
    _, _, shares = make(model, mesh, "scan", DECODE, "xla", pool_bytes=1 << 30)
    weights, own = own_bytes(shares), shares.config
    pool = int(SHARE * (gib * 2**30 - weights))
    one = page_bytes(own.num_layers, PAGE_SIZE, own.num_kv_heads, own.head_size, "bfloat16")
    assert shares.size == size
    return weights, pool, pool // one * PAGE_SIZE


def check_few_numbers(found: list[tuple[str, tuple[int, ...]]], rows: int) -> None:
    """A few numbers go between devices for each row that is sampled or scored."""
    assert found
    few = {rows, ROWS, BLOCK}  # rows, those that are sampled at a time, prompt tokens that are scored at a time
    few |= {8 * count for count in few}  # as XLA writes what it gathers from eight devices
    for kind, shape in found:
        # At most the likeliest 32 tokens of each device for each of these.
        assert kind in ("all-reduce", "all-gather") and few & set(shape), (kind, shape)
        assert int(np.prod(shape)) <= 8 * 32 * max(rows, BLOCK), (kind, shape)


@pytest.mark.parametrize(
    ("topology", "model", "mode", "least_tokens"),
    [
        ("v5e:2x2", "Llama-3-8B", "unroll", 300_000),
        ("v5e:2x4", "Llama-3-8B", "scan", 750_000),
        ("v6e:2x4", "Llama-3-70B", "scan", 300_000),
        ("v5e:2x4", "GPT-NeoX-20B", "scan", 70_000),
    ],
)
def test_step_on_tpus(topology: str, model: str, mode: str, least_tokens: int) -> None:
    """512 tokens of decode rows and chunks, so both kernels.

    Every layer of every model; stacked ("scan") where unrolling them takes minutes.
    """
    mesh, generation = mesh_of(topology), topology.partition(":")[0]
    weights, pool, tokens = pool_and_tokens(model, mesh.size, mesh, USABLE[generation])
    call, arguments, _ = make(model, mesh, mode, MIXED, "tpu", pool_bytes=pool)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = call.lower(*arguments).compile()  # refused when it does not fit
    memory, text = compiled.memory_analysis(), compiled.as_text()
    temporaries = memory.temp_size_in_bytes
    print(f"\n{topology} {model} {mode}: weights {weights >> 20} MiB, pool {pool >> 20} MiB = {tokens} tokens", end="")
    print(f", temporaries {temporaries / 2**20:.1f} MiB a chip")
    config = MODELS[model][1]
    num_layers = config["num_hidden_layers"] if mode == "unroll" else 1
    sums = 2 * num_layers + 1  # two a layer and the embedding's
    assert collectives(text) == [("all-reduce", (512, config["hidden_size"]))] * sums
    own_layer = weights / config["num_hidden_layers"] if mode == "scan" else 0
    assert temporaries < SLACK + 1.2 * own_layer < pool / 4
    assert memory.alias_size_in_bytes > 0.98 * pool
    assert memory.argument_size_in_bytes < 1.01 * (weights + pool) + (16 << 20)
    assert tokens >= least_tokens


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=["decode", "mixed"])
def test_the_two_ways_to_run_layers(bucket: Bucket) -> None:
    """By the compiler's own estimate of a layer's cycles (4 layers here): unrolled is faster, as each weight is read once."""
    mesh, found = mesh_of("v5e:2x2"), dict[str, float]()
    for mode in ("unroll", "scan"):
        call, arguments, _ = make("Llama-3-8B", mesh, mode, bucket, "tpu", pool_bytes=1 << 30, num_layers=4)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            text = call.lower(*arguments).compile().as_text()
        found[mode] = cycles_of_layers(text, (bucket.num_tokens, 4096), 4)
    print(f"\nv5e:2x2 Llama-3-8B, {bucket.num_tokens} tokens: {', '.join(f'{m} {c:,.0f} cycles a layer' for m, c in found.items())}")
    assert found["unroll"] < found["scan"]


@pytest.mark.parametrize(("topology", "model"), [("v5e:2x4", "GPT-NeoX-20B"), ("v6e:2x4", "Llama-3-70B")])
def test_sampling_and_scoring_on_tpus(topology: str, model: str) -> None:
    """64 rows, more than are sampled at a time, and 512 prompt tokens."""
    mesh, config = mesh_of(topology), MODELS[model][1]
    vocab_size, hidden = config["vocab_size"], config["hidden_size"]
    _, _, shares = make(model, mesh, "scan", DECODE, "xla", pool_bytes=1 << 30)
    for name, (call, arguments) in {
        "sample": sample_program.make(vocab_size, 64, mesh),
        "score": make_scoring(shares, vocab_size, hidden, 512),
    }.items():
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = call.lower(*arguments).compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes
        print(f"\n{topology} {model} {name}: temporaries {temporaries / 2**20:.1f} MiB a chip", end="")
        check_few_numbers(collectives(compiled.as_text()), 64)
        assert temporaries < SLACK


def build_sample(devices: Any) -> Any:
    """Sampling of 64 rows with a vocabulary of 128,256 on 8 GPUs. In a process of its own."""
    return sample_program.make(128256, 64, Mesh(np.array(devices), (MODEL_AXIS,)))


def build(devices: Any, pool_bytes: int) -> Any:
    """Llama-3-70B on 8 GPUs: 512 tokens of 64 rows. In a process of its own."""
    call, arguments, _ = make("Llama-3-70B", Mesh(np.array(devices), (MODEL_AXIS,)), "scan", MIXED, "triton", pool_bytes=pool_bytes)
    return call, arguments


def test_step_on_eight_h100s() -> None:
    mesh = mesh_of("v6e:2x4")  # any eight devices: for the sizes
    target = TARGETS["h100"]
    weights, pool, tokens = pool_and_tokens("Llama-3-70B", 8, mesh, target.memory / 2**30 - 2)
    jobs = [
        Job("70B", "tests.aot.test_parallel_step:build", {"pool_bytes": pool}),
        Job("sample", "tests.aot.test_parallel_step:build_sample"),
    ]
    outcome, sampling = compile_in_process("h100", jobs).values()
    print(f"\n8 x H100 Llama-3-70B scan: weights {weights >> 20} MiB, pool {pool >> 20} MiB = {tokens} tokens; {outcome}")
    assert not outcome.error and not sampling.error
    assert [(kind, tuple(shape)) for kind, shape in outcome.collectives] == [("all-reduce", (512, 8192))] * 3
    check_few_numbers([(kind, tuple(shape)) for kind, shape in sampling.collectives], 64)
    assert sampling.temp_bytes < SLACK
    assert outcome.temp_bytes < SLACK + 1.2 * weights / 80 < pool / 4
    assert outcome.alias_bytes > 0.98 * pool
    assert outcome.argument_bytes + outcome.temp_bytes < target.memory - (1 << 30)  # what CUDA and its libraries take
    assert tokens >= 1_000_000
