"""A stream that survives the server behind it: with several replicas, one that dies takes its streams with it.

The client's own `max_retries` repeats what fails before an answer begins (a refused or lost connection, 408, 429, 500 and above),
never a stream that breaks off. `retried` asks for that one again and skips what it has given already. The second answer must
be the first one's text, so it takes requests with temperature 0 or a seed only.

python examples/retry_stream.py http://localhost:8000/v1 MODEL PROMPT      (pip install openai)
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import openai


async def retried(client: openai.AsyncOpenAI, attempts: int = 5, **request: Any) -> AsyncIterator[str]:
    """The text of one completion, piece by piece; asks up to `attempts` times.

    Raises ValueError for a request that would be answered otherwise the next time, and APIConnectionError when no attempt came to
    an end.
    """
    if request.get("temperature") != 0 and request.get("seed") is None:
        raise ValueError("give temperature=0 or a seed: without them another attempt gives another text")
    given = 0
    for attempt in range(attempts):
        if attempt:
            await asyncio.sleep(min(0.5 * 2**attempt, 8))
        seen, finished = 0, False
        stream = None
        try:
            stream = await client.completions.create(stream=True, **request)
            async for chunk in stream:
                for choice in chunk.choices:
                    seen += len(choice.text)
                    finished = finished or choice.finish_reason is not None
                    if seen > given:
                        yield choice.text[given - seen :]
                        given = seen
        except openai.APIStatusError:
            raise  # an answer, which the client has asked for max_retries times already where that could help
        except openai.APIError:
            pass  # the connection broke, or the stream itself told that the engine failed
        finally:
            if stream is not None:
                await stream.close()
        if finished:  # a stream that merely stops was cut by something between here and the server
            return
    raise openai.APIConnectionError(message=f"the stream broke off {attempts} times", request=None)  # type: ignore[arg-type]


async def main(url: str, model: str, prompt: str) -> None:
    """Prints one completion."""
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=8) as client:
        async for text in retried(client, model=model, prompt=prompt, max_tokens=64, temperature=0):
            print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
