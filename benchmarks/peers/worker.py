"""One engine in a process of its own: requests as lines of JSON on standard input, seconds and tokens as lines on standard output.

    python benchmarks/peers/worker.py ENGINE MODEL DTYPE

It runs in that engine's environment, so it imports nothing of this project but `pjax` for pjax's own worker. A request has
prompts (token ids), num_out (tokens for each), n (samples of each prompt, at temperature 1) and beam (its width, 0 for none).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Ids = list[int]
Run = Callable[[list[Ids], list[int], int, int], list[Ids]]
THREADS = int(os.environ.get("PEERS_THREADS", "2"))
IS_LAZY = os.environ.get("PEERS_LAZY") == "1"
MAX_SEQS, MAX_LEN = int(os.environ.get("PEERS_MAX_SEQS", "32")), int(os.environ.get("PEERS_MAX_LEN", "1024"))


def pjax(model: str, dtype: str) -> Run:
    """The engine of this project; lazy where the time to the first token is measured, else made ready before it is used, as the others."""
    from pjax import LLM, BeamSearchParams, SamplingParams

    llm = LLM(model, dtype=dtype, max_model_len=MAX_LEN, max_num_seqs=MAX_SEQS, warmup="none" if IS_LAZY else "all", progress=False)

    def run(prompts: list[Ids], num_out: list[int], n: int, beam: int) -> list[Ids]:
        if beam:
            params = BeamSearchParams(beam_width=beam, max_tokens=num_out[0], ignore_eos=True)
            return [result.sequences[0].tokens[-num_out[0] :] for result in llm.beam_search(prompts, params)]
        drawn = {"temperature": 1.0, "seed": 1} if n > 1 else {"temperature": 0.0}
        settings = [SamplingParams(n=n, max_tokens=count, ignore_eos=True, **drawn) for count in num_out]
        return [list(one.token_ids) for output in llm.generate(prompts, settings, use_tqdm=False) for one in output.outputs]

    return run


def vllm(model: str, dtype: str) -> Run:
    """vLLM's CPU build."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import BeamSearchParams

    llm = LLM(model, dtype=dtype, max_model_len=MAX_LEN, max_num_seqs=MAX_SEQS, disable_log_stats=True)

    def run(prompts: list[Ids], num_out: list[int], n: int, beam: int) -> list[Ids]:
        given = [{"prompt_token_ids": ids} for ids in prompts]
        if beam:
            params = BeamSearchParams(beam_width=beam, max_tokens=num_out[0], ignore_eos=True)
            return [result.sequences[0].tokens[-num_out[0] :] for result in llm.beam_search(given, params)]
        drawn = {"temperature": 1.0, "seed": 1} if n > 1 else {"temperature": 0.0}
        settings = [SamplingParams(n=n, max_tokens=count, ignore_eos=True, detokenize=False, **drawn) for count in num_out]
        return [list(one.token_ids) for output in llm.generate(given, settings, use_tqdm=False) for one in output.outputs]

    return run


def transformers(model: str, dtype: str) -> Run:
    """`generate()` of transformers, one request at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    loaded.generation_config.eos_token_id = None  # as the others ignore it; min_new_tokens would forbid it, and draw another token

    def run(prompts: list[Ids], num_out: list[int], n: int, beam: int) -> list[Ids]:
        made = []
        for prompt, count in zip(prompts, num_out, strict=True):
            ids = torch.tensor([prompt])
            options: dict[str, Any] = {"do_sample": n > 1, "num_return_sequences": n, "max_new_tokens": count}
            options |= {"num_beams": beam} if beam else {}
            out = loaded.generate(ids, attention_mask=torch.ones_like(ids), **options)
            made += out[:, len(prompt) :].tolist()
        return made

    return run


def llama_cpp(model: str, dtype: str) -> Run:
    """llama.cpp, one request at a time; no samples that share a prompt, no beams."""
    from llama_cpp import Llama

    loaded = Llama(model, n_ctx=MAX_LEN, n_batch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def run(prompts: list[Ids], num_out: list[int], n: int, beam: int) -> list[Ids]:
        made = []
        for prompt, count in zip(prompts, num_out, strict=True):
            tokens = loaded.generate(prompt, temp=0.0, repeat_penalty=1.0)
            made.append([next(tokens) for _ in range(count)])
        return made

    return run


def ctranslate2(model: str, dtype: str) -> Run:
    """CTranslate2: a static batch, whose requests all have the same number of tokens."""
    import ctranslate2 as ct2

    with open(os.path.join(model, "vocabulary.json"), encoding="utf-8") as file:
        words = json.load(file)
    ids = {word: index for index, word in enumerate(words)}
    loaded = ct2.Generator(model, device="cpu", compute_type=dtype, intra_threads=THREADS, inter_threads=1)

    def run(prompts: list[Ids], num_out: list[int], n: int, beam: int) -> list[Ids]:
        given = [[words[token] for token in prompt] for prompt in prompts]
        options: dict[str, Any] = {"beam_size": beam} if beam else {"sampling_topk": 0 if n > 1 else 1, "num_hypotheses": n}
        count = num_out[0]
        results = loaded.generate_batch(
            given, max_length=count, min_length=count, include_prompt_in_result=False, end_token=[], max_batch_size=len(given), **options
        )
        return [[ids[word] for word in sequence] for result in results for sequence in result.sequences]

    return run


ENGINES = {made.__name__: made for made in (pjax, vllm, transformers, llama_cpp, ctranslate2)}


def main() -> None:
    """Answers until the end of standard input. What libraries print goes to standard error."""
    name, model, dtype = sys.argv[1:4]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = ENGINES[name](model, dtype)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        tokens = run(asked["prompts"], asked["num_out"], asked.get("n", 1), asked.get("beam", 0))
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}), file=answers, flush=True)


if __name__ == "__main__":
    main()
