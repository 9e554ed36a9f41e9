"""Token ids in, token ids and log-probabilities out: what a research or reinforcement-learning loop needs.

Usage: python examples/token_ids.py MODEL (a folder or .gguf file; it needs no tokenizer)
"""

import sys

import numpy as np

from pjax import LLM, SamplingParams

if len(sys.argv) != 2:
    sys.exit(__doc__)
llm = LLM(sys.argv[1], skip_tokenizer_init=True, max_model_len=256, max_num_seqs=16)
rng = np.random.default_rng(0)
prompts = rng.integers(0, llm.engine.model_config.vocab_size, (16, 20)).tolist()
params = [SamplingParams(temperature=1.0, max_tokens=24, seed=seed, logprobs=0, ignore_eos=True) for seed in range(len(prompts))]
outputs = llm.generate(prompts, params)
tokens = np.array([output.outputs[0].token_ids for output in outputs])
logprobs = np.array([output.outputs[0].cumulative_logprob for output in outputs])
print(f"tokens {tokens.shape}, mean log-probability of a token {logprobs.mean() / tokens.shape[1]:.3f}")
