"""Which tokens a request may get and which it gets more often, as token ids."""

from __future__ import annotations

from dataclasses import dataclass

from pjax.errors import InvalidRequestError
from pjax.params.limits import MAX_BAD_LENGTH, MAX_BAD_SEQUENCES


@dataclass(frozen=True, kw_only=True)
class LogitRules:
    """What SamplingParams says of single tokens, once words are token ids and the model's own end is known."""

    allowed: frozenset[int] | None = None
    """None is all."""
    banned: frozenset[int] = frozenset()
    stops: frozenset[int] = frozenset()
    """Not before `min_tokens` tokens."""
    bias: tuple[tuple[int, float], ...] = ()
    """Token and what is added to its logit."""
    bad_sequences: tuple[tuple[int, ...], ...] = ()
    """Sequences of two tokens and more, whose last token never follows the others in what was generated."""

    def check(self, vocab_size: int, where: str) -> None:
        """InvalidRequestError when no token is left, or there are more or longer bad sequences than a step looks for."""
        left = (set(range(vocab_size)) if self.allowed is None else self.allowed) - self.banned
        if not left:
            raise InvalidRequestError(f"bad_words and allowed_token_ids leave no token {where}")
        if left <= self.stops:
            raise InvalidRequestError(f"min_tokens is set, but every token that is allowed would end the sequence {where}")
        if len(self.bad_sequences) > MAX_BAD_SEQUENCES:
            raise InvalidRequestError(
                f"bad_words are {len(self.bad_sequences)} sequences of two tokens and more, but must be at most {MAX_BAD_SEQUENCES} {where}"
            )
        longest = max(map(len, self.bad_sequences), default=0)
        if longest > MAX_BAD_LENGTH:
            raise InvalidRequestError(f"bad_words has one of {longest} tokens, but each must have at most {MAX_BAD_LENGTH} {where}")
