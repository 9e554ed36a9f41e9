"""Token ids to text while they are made: never half a character, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from pjax.params import SamplingParams
from pjax.text.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 5  # prompt tokens decoded in front, so that the first new token gets the space that belongs before it
MAX_HELD = 16  # tokens held back for an unfinished character: longer runs are no UTF-8


class Detokenizer:
    """The text of one sequence, token by token, in constant time a token.

    A window of tokens is decoded: `[prefix, read)` has been emitted, `[read, end)` not yet. The new text is what the
    whole window says beyond the emitted part; it waits while it ends in an unfinished character. Text that may be the
    beginning of a stop string is held back as well.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skip_special = params.skip_special_tokens
        self._stops = params.stops
        self._include_stop = params.include_stop_str_in_output
        self._longest_stop = max((len(stop) for stop in self._stops), default=0)
        self._ids = list(prompt_ids[-CONTEXT:])
        self._prefix, self._read = 0, len(self._ids)
        self._held = ""  # decoded, but may be the beginning of a stop string
        self.stop_reason: str | None = None
        """The stop string that was found; nothing is emitted after it."""

    def append(self, token_ids: Sequence[int]) -> str:
        """Takes new tokens; returns the text that is final now, often none."""
        if self.stop_reason is not None:
            return ""
        fresh = ""
        for token in token_ids:
            self._ids.append(token)
            fresh += self._decode_window(final=False)
        return self._release(fresh)

    def finish(self) -> str:
        """What was held back. No token may follow."""
        if self.stop_reason is not None:
            return ""
        text = self._release(self._decode_window(final=True))
        if self.stop_reason is None:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=self._skip_special)

    def _decode_window(self, *, final: bool) -> str:
        emitted = self._decode(self._prefix, self._read)
        whole = self._decode(self._prefix, len(self._ids))
        unfinished = whole.endswith(BROKEN) and len(self._ids) - self._read < MAX_HELD
        if len(whole) <= len(emitted) or (unfinished and not final):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        if self._prefix > 1024:  # keep the list short
            del self._ids[: self._prefix]
            self._read -= self._prefix
            self._prefix = 0
        return whole[len(emitted) :]

    def _release(self, fresh: str) -> str:
        """Cuts at a stop string; holds back an end that one may begin with."""
        if not self._stops:
            return fresh
        text = self._held + fresh
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            # The first to be complete wins, as if tokens were characters; then the first to begin.
            start, stop = min(found, key=lambda item: (item[0] + len(item[1]), item[0]))
            self.stop_reason, self._held = stop, ""
            return text[: start + len(stop)] if self._include_stop else text[:start]
        keep = 0
        for size in range(min(self._longest_stop - 1, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - size :]) for stop in self._stops):
                keep = size
                break
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
