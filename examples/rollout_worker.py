"""Reinforcement learning in two processes: a worker holds the engine and samples, the trainer holds optax and teaches.

The policy gradient of rollouts.py, where both share arrays. Here the trainer writes its parameters into shared memory, without a
file, and the worker copies them onto its own device between two batches: one copy out, one copy in, by array. Prompts, tokens and
their log-probabilities go through a pipe. The two may have different devices: each process sees those that its environment names.

Usage: python examples/rollout_worker.py MODEL (a folder or .gguf file)
"""

import multiprocessing as mp
import sys
from multiprocessing.shared_memory import SharedMemory

PROMPTS, PROMPT_LEN, NEW, TURNS = 16, 4, 12, 8
SIZES = {"max_model_len": 64, "max_num_seqs": PROMPTS, "max_num_batched_tokens": 64, "num_pages": 64, "lazy": True}
OPTIONS = {"dtype": "float32", "layer_mode": "unroll", "skip_tokenizer_init": True, "progress": False}


def views(block, leaves):
    """Arrays in shared memory, one behind the other, like `leaves` in shape and dtype."""
    import numpy as np

    found, offset = [], 0
    for leaf in leaves:
        found.append(np.ndarray(leaf.shape, leaf.dtype, block.buf, offset))
        offset += leaf.size * leaf.dtype.itemsize
    return found


def shapes_of(leaves):
    """What both sides must agree on."""
    return [(leaf.shape, str(leaf.dtype)) for leaf in leaves]


def work(model, pipe):
    """The worker: (command, arguments) in, an answer or an exception out, until there is nothing more to read."""
    import jax
    import jax.numpy as jnp

    from pjax import LLM, SamplingParams

    llm = LLM(model, **OPTIONS, **SIZES)
    leaves, structure = jax.tree.flatten(llm.engine.params)

    def update(name, shapes):
        """Takes the trainer's parameters; pages computed with the old ones are forgotten."""
        if shapes != shapes_of(leaves):
            raise ValueError(f"the trainer's parameters are {shapes}, the engine's {shapes_of(leaves)}")
        block = SharedMemory(name)
        arrays = [jnp.array(view, copy=True) for view in views(block, leaves)]
        jax.block_until_ready(arrays)  # the trainer writes there again once it has the answer
        block.close()
        llm.update_params(jax.tree.unflatten(structure, arrays))

    def generate(prompts, seeds):
        """Token ids, and the log-probability that each was sampled with."""
        wanted = [SamplingParams(max_tokens=NEW, logprobs=0, ignore_eos=True, seed=seed) for seed in seeds]
        outputs = [output.outputs[0] for output in llm.generate(prompts, wanted, use_tqdm=False)]
        scores = [[one[token].logprob for token, one in zip(o.token_ids, o.logprobs, strict=True)] for o in outputs]
        return [output.token_ids for output in outputs], scores

    commands = {"update": update, "generate": generate}
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = commands[command](*arguments)
        except Exception as error:
            answer = error
        pipe.send(answer)


class Worker:
    """The trainer's end."""

    def __init__(self, model, leaves):
        context = mp.get_context("spawn")  # a fork would copy JAX's threads' locks, but not its threads
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(model, other))
        self.process.start()
        other.close()  # so that a worker that dies is noticed at once: EOFError
        self.block = SharedMemory(create=True, size=sum(leaf.size * leaf.dtype.itemsize for leaf in leaves))
        self.views = views(self.block, leaves)

    def ask(self, command, *arguments):
        """The worker's answer; raises what the worker raised, and EOFError when it has died."""
        self.pipe.send((command, arguments))
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def update(self, leaves):
        """Gives the worker these parameters; it has its own copy when this returns."""
        for view, leaf in zip(self.views, leaves, strict=True):
            view[...] = leaf
        self.ask("update", self.block.name, shapes_of(leaves))

    def close(self):
        """Ends the worker and frees the memory."""
        self.pipe.close()
        self.process.join(60)
        self.views.clear()
        self.block.close()
        self.block.unlink()


def main(model):
    """Trains for a few turns."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from pjax.models import forward, open_model

    source = open_model(model, dtype="float32", layer_mode="unroll")
    params = source.load(progress=False)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def logprobs_of(params, tokens):
        """Log-probabilities of tokens [B, S] after the prompt, [B, NEW]."""
        logits = forward(nnx.merge(source.graph, params), tokens[:, :-1])[:, PROMPT_LEN - 1 :]
        return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, PROMPT_LEN:, None], axis=-1)[..., 0]

    @jax.jit
    def train(params, state, tokens, advantage):
        gradients = jax.grad(lambda params: -jnp.mean(logprobs_of(params, tokens) * advantage))(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state

    worker = Worker(model, jax.tree.leaves(params))
    print(f"the trainer is process {mp.current_process().pid}, the worker {worker.process.pid}")
    try:
        state = optimizer.init(params)
        rng = np.random.default_rng(0)
        for turn in range(TURNS):
            prompts = rng.integers(0, source.config.vocab_size, (PROMPTS, PROMPT_LEN)).tolist()
            answers, sampled = worker.ask("generate", prompts, [100 * turn + i for i in range(PROMPTS)])
            tokens = np.array([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)], np.int32)
            difference = np.abs(np.asarray(logprobs_of(params, tokens)) - np.array(sampled)).max()
            reward = (tokens[:, PROMPT_LEN:] % 2 == 0).astype(np.float32)
            params, state = train(params, state, tokens, reward - reward.mean())
            worker.update(jax.tree.leaves(params))
            print(f"turn {turn}: mean reward {reward.mean():.3f}, worker and trainer differ by {difference:.1e} at most", flush=True)
    finally:
        worker.close()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
