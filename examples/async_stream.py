"""Two answers streamed at once, and a third one given up, from an engine in a thread of its own.

python examples/async_stream.py MODEL
"""

from __future__ import annotations

import asyncio
import sys

from pjax import AsyncLLM, SamplingParams


async def answer(llm: AsyncLLM, prompt: str, most: int | None = None) -> str:
    """The text; stops reading, and so aborts the request, after `most` tokens."""
    text = ""
    stream = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=24))
    async for output in stream:
        text = output.outputs[0].text
        print(f"{prompt!r}: {text!r}")
        if most is not None and len(output.outputs[0].token_ids) >= most:
            break
    await stream.aclose()
    return text


async def main() -> None:
    """Serves three callers."""
    llm = AsyncLLM(sys.argv[1], max_model_len=512, max_num_seqs=8, lazy=True)
    await asyncio.gather(answer(llm, "The capital of France is"), answer(llm, "Tell me about gravity"), answer(llm, "One, two,", most=3))
    await llm.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
