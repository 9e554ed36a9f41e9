"""Parameters of a beam search."""

from __future__ import annotations

from dataclasses import dataclass

from pjax.params.limits import bad, is_int, is_number, plain


@dataclass(frozen=True, kw_only=True)
class BeamSearchParams:
    """Beam search as in transformers' `generate(num_beams=…, do_sample=False)`, with vLLM's names.

    Raises InvalidRequestError when a value is out of its bounds, and TypeError for a name that pjax does not apply.
    """

    beam_width: int
    """Sequences that are continued at every step, and that are returned."""
    max_tokens: int
    """Most tokens to generate."""
    length_penalty: float = 1.0
    """The score is the sum of log-probabilities / number of generated tokens ** this: above 0 it favours long sequences."""
    early_stopping: bool | str = False
    """When `beam_width` sequences have ended: True stops; False stops when the likeliest beam, were it to end now, would
    score lower than all of them; "never" stops when it could not score higher at any length up to `max_tokens`."""
    ignore_eos: bool = False
    temperature: float = 0.0
    """The logits are divided by it before the log-probabilities are taken; 0 leaves them alone, as 1 does."""

    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens", "length_penalty", "temperature"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        for name in ("beam_width", "max_tokens"):
            if not is_int(getattr(self, name)) or getattr(self, name) < 1:
                raise bad(name, getattr(self, name), "an integer >= 1")
        if not is_number(self.length_penalty):
            raise bad("length_penalty", self.length_penalty, "a finite number")
        if not is_number(self.temperature) or self.temperature < 0:
            raise bad("temperature", self.temperature, "a finite number >= 0")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise bad("early_stopping", self.early_stopping, 'True, False or "never"')
        if not isinstance(self.ignore_eos, bool):
            raise bad("ignore_eos", self.ignore_eos, "True or False")
