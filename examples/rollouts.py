"""Reinforcement learning on one mesh: optax trains the very arrays that the engine samples from; nothing is copied.

A policy gradient (REINFORCE) teaches a model to write tokens with even ids. Each turn samples with the engine, scores the samples
with the trainer's own forward pass over the same sharded parameters, and swaps the updated parameters into the engine.

Usage: python examples/rollouts.py MODEL [DEVICES] (a folder or .gguf file; its KV heads must be a multiple of the devices)
"""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pjax import LLM, SamplingParams
from pjax.models import forward, open_model
from pjax.models.sharding import MODEL_AXIS, make_mesh
from pjax.sampling.vocabulary import Vocabulary

PROMPTS, PROMPT_LEN, NEW, TURNS = 16, 4, 12, 8


def held() -> int:
    """Bytes of all arrays on the first device."""
    arrays = [array for array in jax.live_arrays() if jax.devices()[0] in array.sharding.device_set]
    return sum(math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in arrays)


if len(sys.argv) not in (2, 3):
    sys.exit(__doc__)
mesh = make_mesh(int(sys.argv[2]) if len(sys.argv) == 3 else 1)
source = open_model(sys.argv[1], dtype="float32", layer_mode="unroll", mesh=mesh)
shares, vocab = source.shares, source.config.vocab_size
assert shares is not None
if source.config.num_kv_heads % mesh.size:
    sys.exit(f"{mesh.size} devices share {source.config.num_kv_heads} KV heads: their copies would have to be trained alike")
params = source.load(progress=False)
vocabulary = Vocabulary(MODEL_AXIS, vocab)


def score(model, tokens):
    """Log-probabilities [B, NEW] of the tokens [B, S] after the prompt, from one device's share of the model."""
    logits = forward(model, tokens[:, :-1])[:, PROMPT_LEN - 1 :]
    flat = vocabulary.without_padding(logits.reshape(-1, logits.shape[-1]))
    return vocabulary.take(vocabulary.log_softmax(flat), tokens[:, PROMPT_LEN:].ravel()).reshape(len(tokens), NEW)


logprobs_of = shares.map(score)
optimizer = optax.adam(3e-3)


@jax.jit
def train(params, state, tokens, advantage):
    """One step; the parameters stay where they are in the mesh."""
    gradients = jax.grad(lambda params: -jnp.mean(logprobs_of(params, tokens) * advantage))(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state


before = held()
sizes = {"max_model_len": 64, "max_num_seqs": PROMPTS, "max_num_batched_tokens": 64, "num_pages": 64, "lazy": True}
llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", layer_mode="unroll", progress=False, mesh=mesh, params=params, **sizes)
pages = 2 * 64 * 16 * source.own_config.num_layers * source.own_config.num_kv_heads * source.own_config.head_size * 4
print(
    f"first device: {before} bytes before the engine, of them parameters {source.num_bytes}; {held() - before} more with it, pages {pages}"
)

state = optimizer.init(params)
rng = np.random.default_rng(0)
for turn in range(TURNS):
    prompts = rng.integers(0, vocab, (PROMPTS, PROMPT_LEN)).tolist()
    wanted = [SamplingParams(max_tokens=NEW, logprobs=0, ignore_eos=True, seed=100 * turn + i) for i in range(PROMPTS)]
    outputs = [output.outputs[0] for output in llm.generate(prompts, wanted, use_tqdm=False)]
    tokens = np.array([prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)], np.int32)
    sampled = np.array([[one[token].logprob for token, one in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs])
    difference = np.abs(np.asarray(jax.jit(logprobs_of)(params, tokens)) - sampled).max()
    reward = (tokens[:, PROMPT_LEN:] % 2 == 0).astype(np.float32)
    params, state = train(params, state, tokens, reward - reward.mean())
    llm.update_params(params)
    print(f"turn {turn}: mean reward {reward.mean():.3f}, engine and trainer differ by {difference:.1e} at most")
same = all(a is b for a, b in zip(jax.tree.leaves(llm.engine.params), jax.tree.leaves(params), strict=True))
print(f"the engine reads the trainer's own arrays: {same}")
