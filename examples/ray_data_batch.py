"""Completes a file of prompts with Ray Data: an engine in each of a few actors, fed with blocks while others are read and written.

The input has a JSON object a line, {"prompt": text} and whatever else; the output has the same objects with "text",
"finish_reason" and "num_tokens". A batch is one call of `LLM.generate`, so make it several times max_num_seqs.

python examples/ray_data_batch.py MODEL PROMPTS.jsonl OUTPUT_FOLDER --engines 2 --gpus 1      (pip install 'pjax[ray]')
"""

import argparse


class Completer:
    """One engine, in an actor of Ray."""

    def __init__(self, model, max_tokens, options):
        from pjax import LLM, SamplingParams

        self.llm = LLM(model, progress=False, **options)
        self.params = SamplingParams(temperature=0, max_tokens=max_tokens)

    def __call__(self, batch):
        """Columns of a batch in, the same and three more out."""
        outputs = [output.outputs[0] for output in self.llm.generate(list(map(str, batch["prompt"])), self.params, use_tqdm=False)]
        found = {
            "text": [output.text for output in outputs],
            "finish_reason": [output.finish_reason for output in outputs],
            "num_tokens": [len(output.token_ids) for output in outputs],
        }
        return {**batch, **found}


def completed(data, model, *, engines=1, batch_size=512, max_tokens=64, cpus=1, gpus=0, tpus=0, **options):
    """The dataset with answers.

    Args:
      data: a ray.data.Dataset with a column "prompt".
      engines: actors, each with so many CPU cores, GPUs and TPU chips.
      options: of `pjax.LLM`.
    """
    from ray.data import ActorPoolStrategy

    return data.map_batches(
        Completer,
        fn_constructor_args=(model, max_tokens, options),
        compute=ActorPoolStrategy(size=engines),
        batch_size=batch_size,
        num_cpus=cpus,
        num_gpus=gpus or None,
        **({"resources": {"TPU": tpus}} if tpus else {}),
    )


def main():
    """Reads, completes and writes."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("output")
    for name, default in (("engines", 1), ("batch-size", 512), ("max-tokens", 64), ("gpus", 0), ("tpus", 0)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")
    args = vars(parser.parse_args())
    model, prompts, output = args.pop("model"), args.pop("prompts"), args.pop("output")
    completed(ray.data.read_json(prompts, lines=True), model, **args).write_json(output)


if __name__ == "__main__":
    main()
