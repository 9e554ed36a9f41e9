"""Requests as their callers see them: text and log-probabilities so far, and the outputs made of them."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

from pjax.outputs import CompletionOutput, Logprob, RequestOutput
from pjax.runner import StepResult
from pjax.sampling.prompt_logprobs import PromptScores
from pjax.sampling.sampler import NO_TOKEN
from pjax.sampling.vocabulary import NOT_FINITE
from pjax.scheduler import Request
from pjax.scheduler.beam_search import BeamSearch
from pjax.text.detokenizer import Detokenizer
from pjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FAILURES = {
    NOT_FINITE: "the model's logits hold NaN or infinity, or nothing but -inf: its weights are damaged, or activations overflow dtype",
    NO_TOKEN: "logits_processors, allowed_token_ids, bad_words, min_tokens or penalties leave no token, or make logits NaN or infinite",
}
"""Why no token could be sampled, by what the step gives instead of one."""


@dataclass(eq=False, slots=True)
class SequenceView:
    """One sequence: its text and log-probabilities so far."""

    request: Request
    detokenizer: Detokenizer | None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    text: str = ""


@dataclass(eq=False, slots=True)
class Group:
    """The sequences of one prompt."""

    prompt: str | None
    prompt_token_ids: list[int]
    """A copy for callers, which all outputs share: a long prompt costs a step nothing."""
    sequences: list[SequenceView]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """With the first one, which has none, and others missing as long as the prompt is not computed."""


class Views:
    """What callers see of all unfinished requests."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._groups: dict[str, Group] = {}

    def __contains__(self, request: str | Request) -> bool:
        """Whether anything is known of an id, or of this very request: its id may be another's by now."""
        if isinstance(request, str):
            return request in self._groups
        group = self._groups.get(request.request_id)
        return group is not None and group.sequences[request.index].request is request

    def make(self, prompt: str | None, requests: list[Request]) -> Group:
        """What callers will see of the sequences of one prompt; `add` follows them."""
        first, params = requests[0], requests[0].params
        tokenizer = self._tokenizer if params.detokenize else None

        def view(request: Request) -> SequenceView:
            return SequenceView(request, Detokenizer(tokenizer, first.prompt_token_ids, params) if tokenizer else None)

        scores: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            scores = [None] * len(first.prompt_token_ids)
        return Group(prompt, list(first.prompt_token_ids), [view(request) for request in requests], scores)

    def add(self, group: Group) -> None:
        """Follows the sequences of one prompt from now on."""
        self._groups[group.sequences[0].request.request_id] = group

    def forget(self, request_id: str) -> None:
        """Follows a request no longer: its last output was made."""
        del self._groups[request_id]

    def observe_prompt(self, request: Request, scores: PromptScores, first: int, start: int, end: int) -> None:
        """Takes the log-probabilities of the tokens after positions `[start, end)` of a prompt; those computed again are the same.

        Args:
          first: where they begin in `scores`.
        """
        group = self._groups[request.request_id]
        if group.prompt_logprobs is None:
            return
        count, detokenize = request.params.prompt_logprobs or 0, request.params.detokenize
        for place, position in enumerate(range(start + 1, end + 1), first):
            row = (scores.logprobs[place], scores.ranks[place], scores.top_tokens[place], scores.top_logprobs[place])
            group.prompt_logprobs[position] = self._entries(request.prompt_token_ids[position], *row, count, detokenize)

    def observe(self, result: StepResult, request: Request, index: int, reason: str | None) -> str | None:
        """Takes a sequence's newest token, sample `index` of the step.

        Args:
          reason: why the sequence ends with it; None when it goes on.

        Returns the stop string that its text ends with, if any; with reason "error" a message that says why no token was sampled.
        """
        if reason == "error":
            return _describe_failure(request, int(result.tokens[index]))
        sequence = self._groups[request.request_id].sequences[request.index]
        if request.params.needs_logprobs:
            sequence.cumulative_logprob += float(result.logprobs[index])
        if request.params.logprobs is not None:
            row = (result.logprobs[index], result.ranks[index], result.top_tokens[index], result.top_logprobs[index])
            token = int(result.tokens[index])
            sequence.logprobs.append(self._entries(token, *row, request.params.logprobs, sequence.detokenizer is not None))
        if sequence.detokenizer is None:
            return None
        # As in vLLM: the text of the token that ended it is kept only if asked for.
        hidden = reason == "stop" and not request.params.include_stop_str_in_output
        sequence.text += "" if hidden else sequence.detokenizer.append(request.output_token_ids[-1:])
        if sequence.detokenizer.stop_reason is None and reason is not None:
            sequence.text += sequence.detokenizer.finish()
        return sequence.detokenizer.stop_reason

    def _entries(
        self, token: int, logprob: Any, rank: Any, top_tokens: Any, top_logprobs: Any, count: int, detokenize: bool
    ) -> dict[int, Logprob]:
        """The token's own, then those of the `count` likeliest."""
        entries = {token: (float(logprob), int(rank))}
        for place in range(count):
            entries.setdefault(int(top_tokens[place]), (float(top_logprobs[place]), place + 1))
        decode = self._tokenizer.decode if detokenize and self._tokenizer else None
        return {t: Logprob(value, rank, decode([t], skip_special_tokens=False) if decode else None) for t, (value, rank) in entries.items()}

    def output(self, request_id: str) -> RequestOutput:
        """A request as it is."""
        group = self._groups[request_id]
        first, scores = group.sequences[0].request, group.prompt_logprobs
        finished = all(sequence.request.finish_reason is not None for sequence in group.sequences)
        return RequestOutput(
            request_id=request_id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            outputs=_completions(group.sequences) if first.beam is None else self._found(first.beam, group),
            finished=finished,
            prompt_logprobs=list(scores) if scores is not None and None not in scores[1:] else None,
            num_cached_tokens=first.num_cached_tokens,
            metrics=replace(first.metrics, finished_time=first.metrics.finished_time if finished else None),
        )

    def failed_output(self, request_id: str, error: Exception) -> RequestOutput:
        """The last output of a request of which `output` failed: its tokens, with reason "error"."""
        group = self._groups[request_id]
        message = f"{type(error).__name__}: {error} (request {request_id!r})"
        log.error("%s", message, exc_info=error)
        first = group.sequences[0].request
        return RequestOutput(
            request_id=request_id,
            prompt=group.prompt,
            prompt_token_ids=group.prompt_token_ids,
            outputs=[
                CompletionOutput(
                    index=index,
                    text=sequence.text,
                    token_ids=list(sequence.request.output_token_ids),
                    finish_reason="error",
                    stop_reason=message,
                )
                for index, sequence in enumerate(group.sequences[: first.params.n])
            ],
            finished=True,
            num_cached_tokens=first.num_cached_tokens,
            metrics=first.metrics,
        )

    def _found(self, search: BeamSearch, group: Group) -> list[CompletionOutput]:
        """The finished sequences, and the beams as they are where the search was ended from outside or has failed."""
        found: list[tuple[list[int], float, str, int | str | None]]
        found = [(one.tokens, one.cum_logprob, "stop" if one.ended else "length", None) for one in search.finished]
        if not search.done:
            beams = [group.sequences[index].request for index in search.beams]
            found += [
                (list(beam.output_token_ids), float(total), beam.finish_reason, beam.stop_reason)
                for beam, total in zip(beams, search.cum_logprobs, strict=False)  # fewer beams where it failed half-way
                if beam.finish_reason is not None and (beam.output_token_ids or beam.finish_reason == "error")
            ]
        return [
            CompletionOutput(
                index=index,
                text=self._tokenizer.decode(tokens) if self._tokenizer else "",
                token_ids=tokens,
                cumulative_logprob=total,
                finish_reason=reason,
                stop_reason=stop_reason,
            )
            for index, (tokens, total, reason, stop_reason) in enumerate(found)
        ]


def _describe_failure(request: Request, failure: int) -> str:
    """Why a request got no token, which is logged too; `failure` is a key of FAILURES."""
    place = len(request.prompt_token_ids) + len(request.output_token_ids)
    message = f"no token {place} could be sampled: {FAILURES[failure]} (request {request.request_id!r})"
    log.warning("%s", message)
    return message


def _completions(sequences: list[SequenceView]) -> list[CompletionOutput]:
    """All of them, or of `best_of` the n likeliest so far, failed ones last."""
    n = sequences[0].request.params.n
    if len(sequences) > n:
        sequences = sorted(sequences, key=lambda one: (one.request.finish_reason == "error", -one.cumulative_logprob))[:n]
    return [_completion(sequence, index) for index, sequence in enumerate(sequences)]


def _completion(sequence: SequenceView, index: int) -> CompletionOutput:
    request = sequence.request
    wants_logprobs = request.params.logprobs is not None
    return CompletionOutput(
        index=index,
        text=sequence.text,
        token_ids=list(request.output_token_ids),
        cumulative_logprob=sequence.cumulative_logprob if request.params.needs_logprobs else None,
        logprobs=list(sequence.logprobs) if wants_logprobs else None,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
