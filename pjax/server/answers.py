"""Parts of answers that completions and chats share: log-probabilities, usage, the stream of one choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pjax.outputs import CompletionOutput, Logprob, RequestOutput
from pjax.text.tokenizer import Tokenizer

LEAST = -9999.0  # stands for -inf, which JSON has no number for; as vLLM writes it
Logprobs = Sequence[Mapping[int, Logprob] | None]


def dumps(value: Any) -> str:
    """Compact JSON that UTF-8 can always encode."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def number(logprob: float) -> float:
    """A log-probability that JSON can write."""
    return max(logprob, LEAST) if logprob == logprob else LEAST


def token_text(tokenizer: Tokenizer, token: int, entry: Logprob | None = None) -> str:
    """A token's own text; bytes that are no character become U+FFFD."""
    if entry is not None and entry.decoded_token is not None:
        return entry.decoded_token
    return tokenizer.decode([token], skip_special_tokens=False)


def _kept(entries: Mapping[int, Logprob], chosen: int, count: int) -> list[tuple[int, Logprob]]:
    """The chosen token's entry is always there; of the others the `count` likeliest."""
    best = sorted(entries.items(), key=lambda item: -item[1].logprob)[: max(count, 1)]
    return best if count else [(chosen, entries[chosen])]


def completion_logprobs(tokenizer: Tokenizer, ids: Sequence[int], logprobs: Logprobs, count: int, offset: int) -> dict[str, Any]:
    """Log-probabilities as /v1/completions gives them.

    Args:
      count: how many of the likeliest each position shows, besides the chosen one.
      offset: characters before the first token.
    """
    tokens, values, offsets = [], [], []
    tops: list[dict[str, float] | None] = []
    for token, entries in zip(ids, logprobs, strict=True):
        entry = None if entries is None else entries.get(token)
        text = token_text(tokenizer, token, entry)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        values.append(None if entry is None else number(entry.logprob))
        top: dict[str, float] = {}
        for other, found in _kept(entries, token, count) if entries is not None and entry is not None else ():
            top.setdefault(token_text(tokenizer, other, found), number(found.logprob))
        if entry is not None:
            top.setdefault(text, number(entry.logprob))
        tops.append(None if entries is None else top)
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def chat_logprobs(tokenizer: Tokenizer, ids: Sequence[int], logprobs: Logprobs, count: int) -> dict[str, Any]:
    """Log-probabilities as /v1/chat/completions gives them."""

    def shown(token: int, entry: Logprob) -> dict[str, Any]:
        text = token_text(tokenizer, token, entry)
        return {"token": text, "logprob": number(entry.logprob), "bytes": list(text.encode("utf-8", "replace"))}

    content = []
    for token, entries in zip(ids, logprobs, strict=True):
        assert entries is not None
        best = [shown(other, entry) for other, entry in _kept(entries, token, count)] if count else []
        content.append(shown(token, entries[token]) | {"top_logprobs": best})
    return {"content": content, "refusal": None}


def prompt_logprobs(logprobs: Logprobs | None) -> list[dict[str, Any] | None] | None:
    """A prompt's log-probabilities as vLLM gives them: for each token a mapping from ids to their values."""
    if logprobs is None:
        return None
    return [
        None
        if entries is None
        else {
            str(token): {"logprob": number(entry.logprob), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for token, entry in entries.items()
        }
        for entries in logprobs
    ]


def usage(outputs: Sequence[RequestOutput], *, generated: bool = True) -> dict[str, Any]:
    """Tokens of a request's prompts and of all sequences that were generated for them."""
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_generated = sum(len(sequence.token_ids) for output in outputs for sequence in output.outputs) if generated else 0
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs)},
    }


class Cursor:
    """How far one sequence has been sent."""

    def __init__(self) -> None:
        self.num_chars = 0
        self.num_tokens = 0
        self.ended = False

    def advance(self, sequence: CompletionOutput) -> tuple[str, list[int], Logprobs | None]:
        """The text, tokens and log-probabilities that are new."""
        start = self.num_tokens
        text, ids = sequence.text[self.num_chars :], sequence.token_ids[start:]
        logprobs = None if sequence.logprobs is None else sequence.logprobs[start:]
        self.num_chars, self.num_tokens = len(sequence.text), len(sequence.token_ids)
        self.ended = sequence.finish_reason is not None
        return text, ids, logprobs
