"""Token ids to text while they are made: never half a character, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from pjax.params import SamplingParams
from pjax.text.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 5  # prompt tokens decoded in front, so that the first new token gets the space that belongs before it
MAX_HELD = 16  # tokens held back for an unfinished character before the finished ones among them are looked for
UNFINISHED = range(3, 7)  # tokens that may hold the bytes of one unfinished character, and some of the one before


class Detokenizer:
    """The text of one sequence, token by token, in constant time a token.

    A window of tokens is decoded: `[prefix, read)` has been emitted, `[read, end)` not yet. The new text is what the
    whole window says beyond the emitted part; it waits while it ends in an unfinished character. Text that may be the
    beginning of a stop string is held back as well.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._stops = params.stops
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens, self._num_tokens = params.min_tokens, 0
        self._longest_stop = max((len(stop) for stop in self._stops), default=0)
        self._ids = [token for token in prompt_ids[-4 * CONTEXT :] if self._has_text(token)][-CONTEXT:]
        self._prefix, self._read = 0, len(self._ids)
        self._held = ""  # decoded, but may be the beginning of a stop string
        self._pieces: list[str] = []
        self.stop_reason: str | None = None
        """The stop string that was found; nothing is emitted after it."""

    @property
    def text(self) -> str:
        """All text that was emitted so far."""
        return "".join(self._pieces)

    def append(self, token_ids: Sequence[int]) -> str:
        """Takes new tokens; returns the text that is final now, often none."""
        if self.stop_reason is not None:
            return ""
        text = ""
        for token in token_ids:
            self._num_tokens += 1
            if self._has_text(token) and self.stop_reason is None:
                self._ids.append(token)
                text += self._release(self._next_text())
        return self._emit(text)

    def finish(self) -> str:
        """What was held back; bytes that never became a character are U+FFFD. No token may follow."""
        if self.stop_reason is not None:
            return ""
        text = self._release(self._new_text(len(self._ids)))
        self._read = len(self._ids)
        if self.stop_reason is None:
            text, self._held = text + self._held, ""
        return self._emit(text)

    def _has_text(self, token: int) -> bool:
        """Tokens that say nothing would only make the window longer."""
        return token not in self._skipped and self._tokenizer.id_to_token(token) is not None

    def _emit(self, text: str) -> str:
        if text:
            self._pieces.append(text)
        return text

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=False)  # they are left out already

    def _new_text(self, end: int) -> str:
        """What the tokens `[read, end)` add to the emitted ones."""
        emitted, whole = self._decode(self._prefix, self._read), self._decode(self._prefix, end)
        if not whole.startswith(emitted):
            emitted = emitted.rstrip(BROKEN)  # a character that the prompt began
        return whole[len(emitted) :] if whole.startswith(emitted) else self._decode(self._read, end)

    def _next_text(self) -> str:
        """The new text and the window moved behind it; nothing while a character is unfinished."""
        end = len(self._ids)
        text = self._new_text(end)
        if text.endswith(BROKEN):
            end = self._finished_end()
            text = self._new_text(end)
        if text:
            self._prefix, self._read = self._read, end
            if self._prefix > 1024:  # keep the list short
                del self._ids[: self._prefix]
                self._read -= self._prefix
                self._prefix = 0
        return text

    def _finished_end(self) -> int:
        """The end of the tokens whose characters are finished though a later one is not: with few held, none are taken.

        Between two characters, and nowhere else, the two sides say apart what they say together.
        """
        end = len(self._ids)
        held = end - self._read
        if held < MAX_HELD:
            return self._read
        together = self._decode(self._read, end)
        for size in UNFINISHED:
            if self._decode(self._read, end - size) + self._decode(end - size, end) == together:
                return end - size
        return self._read if held < 4 * MAX_HELD else end  # nothing that UTF-8 could still finish

    def _release(self, fresh: str) -> str:
        """Cuts at a stop string that ends in the fresh text; holds back an end that one may begin with."""
        if not self._stops:
            return fresh
        text = self._held + fresh
        found: list[tuple[int, str]] = []
        if self._num_tokens > self._min_tokens:
            starts = [(text.find(stop, max(len(self._held) - len(stop) + 1, 0)), stop) for stop in self._stops]
            found = [(start, stop) for start, stop in starts if start >= 0]
        if found:
            # The first to be complete wins, however the text came in pieces; of those, the first to begin.
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
