"""/v1/completions."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from pjax.outputs import CompletionOutput, RequestOutput
from pjax.params import BeamSearchParams
from pjax.server.answers import Cursor, Logprobs, completion_logprobs, prompt_logprobs, usage
from pjax.server.bodies import BodyRoute
from pjax.server.bridge import Generation
from pjax.server.errors import invalid
from pjax.server.sampling import sampling_params
from pjax.server.schemas import CompletionRequest
from pjax.server.service import Service, finish, json_response, new_id, note, note_outputs, now, stream

Prompt = tuple[str | None, list[int]]


def router(service: Service) -> APIRouter:
    """The endpoint."""
    routes = APIRouter(route_class=BodyRoute)

    @routes.post("/v1/completions")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continues texts or token ids."""
        return await _Completion(service, body).answer(request)

    return routes


class _Completion:
    """One request.

    Args:
      body: max_tokens 0 is for scoring: with `echo` the prompt comes back with its log-probabilities.
    """

    def __init__(self, service: Service, body: CompletionRequest) -> None:
        self.service = service
        self.body = body
        self.id = new_id("cmpl")
        self.model = service.prompts.model(body.model)
        self.created = now()
        self.scores_only = body.max_tokens == 0
        if self.scores_only and not body.echo:
            raise invalid("max_tokens", "max_tokens is 0, but must be >= 1 without echo")
        max_tokens = body.max_tokens if body.max_tokens is None else max(body.max_tokens, 1)
        more: dict[str, Any] = {"logprobs": body.logprobs}
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            more["prompt_logprobs"] = body.logprobs
        self.params = sampling_params(body, service.config, max_tokens=max_tokens, **more)
        if isinstance(self.params, BeamSearchParams) and body.echo:
            raise invalid("echo", "echo is not applied by beam search")

    async def answer(self, request: Request) -> Response:
        note(request, self.body, self.id)
        with self.service.bridge.preparing():
            prompts = await self._prompts()
        generation = self.service.start(self.body, [ids for _, ids in prompts], self.params, self.id)
        if self.body.stream:
            return await stream(request, self.service, generation, self._chunks(request, generation, prompts))
        outputs = await finish(request, generation)
        choices = [
            self._choice(index * self.body.n + place, prompts[index], output, sequence)
            for index, output in enumerate(outputs)
            for place, sequence in enumerate(output.outputs[: self.body.n])
        ]
        return json_response(self._wrapped(choices, usage(outputs, generated=not self.scores_only)))

    async def _prompts(self) -> list[Prompt]:
        may_be_cut = self.body.truncate_prompt_tokens is not None
        prompts = await self.service.prompts.of_completion(self.body.prompt, self.body.add_special_tokens, may_be_cut=may_be_cut)
        wanted = self.body.max_tokens if "max_tokens" in self.body.model_fields_set else None
        cut: list[Prompt] = []
        for text, ids in prompts:
            kept = self.service.prompts.truncate(ids, self.body.truncate_prompt_tokens, wanted)
            cut.append((text if len(kept) == len(ids) else None, kept))
        for _, ids in cut:
            self.service.prompts.check(ids, wanted, "prompt")
        return cut

    def _wrapped(self, choices: Sequence[Mapping[str, Any]], used: Mapping[str, Any] | None) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model, "choices": choices, "usage": used}

    def _echoed(self, prompt: Prompt, output: RequestOutput) -> tuple[str, list[int], Logprobs | None]:
        """What `echo` puts before the first token."""
        if not self.body.echo:
            return "", [], None
        text, ids = prompt
        found = output.prompt_logprobs if self.body.logprobs is not None else None
        return self.service.tokenizer.decode(ids) if text is None else text, ids, found

    def _choice(self, index: int, prompt: Prompt, output: RequestOutput, sequence: CompletionOutput) -> dict[str, Any]:
        shown = "" if self.scores_only else sequence.text
        ids, found = ([], []) if self.scores_only else (sequence.token_ids, sequence.logprobs)
        before, echoed, scores = self._echoed(prompt, output)
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self._logprobs([*echoed, *ids], [*(scores or ()), *(found or ())], 0)
        reason = "length" if self.scores_only else sequence.finish_reason
        choice = self._shown(index, before + shown, logprobs, reason, sequence.stop_reason)
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self.body.return_token_ids:
            choice |= {"prompt_token_ids": output.prompt_token_ids, "token_ids": ids}
        return choice

    def _logprobs(self, ids: Sequence[int], logprobs: Logprobs, offset: int) -> dict[str, Any]:
        assert self.body.logprobs is not None
        return completion_logprobs(self.service.tokenizer, ids, logprobs, self.body.logprobs, offset)

    def _shown(self, index: int, text: str, logprobs: Any, reason: str | None, stop: int | str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason, "stop_reason": stop}

    async def _chunks(self, request: Request, generation: Generation, prompts: Sequence[Prompt]) -> AsyncIterator[dict[str, Any]]:
        options = self.body.stream_options
        cursors: dict[int, Cursor] = {}
        latest: dict[int, RequestOutput] = {}
        async for index, output in generation:
            latest[index] = output
            for place, sequence in enumerate(output.outputs[: self.body.n]):
                number = index * self.body.n + place
                first = number not in cursors
                cursor = cursors.setdefault(number, Cursor())
                if cursor.ended:
                    continue
                choice = self._delta(number, prompts[index], output, sequence, cursor, first)
                if choice is None:
                    continue
                used = usage(list(latest.values()), generated=not self.scores_only) if options and options.continuous_usage_stats else None
                chunk = self._wrapped([choice], used)
                if options is None:
                    del chunk["usage"]
                yield chunk
        outputs = [latest[index] for index in sorted(latest)]
        note_outputs(request, outputs)
        if options is not None and options.include_usage:
            yield self._wrapped([], usage(outputs, generated=not self.scores_only))

    def _delta(
        self, number: int, prompt: Prompt, output: RequestOutput, sequence: CompletionOutput, cursor: Cursor, first: bool
    ) -> dict[str, Any] | None:
        """The choice of one chunk; None when there is nothing to tell yet."""
        offset = cursor.num_chars
        text, ids, found = cursor.advance(sequence)
        if self.scores_only:
            text, ids, found = "", [], []
            if not cursor.ended:
                return None
            first = True
        before, echoed, scores = self._echoed(prompt, output) if first else ("", [], None)
        if not (text or before or cursor.ended or found or self.body.return_token_ids):
            return None
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self._logprobs([*echoed, *ids], [*(scores or ()), *(found or ())], offset)
        reason = "length" if self.scores_only else sequence.finish_reason
        choice = self._shown(number, before + text, logprobs, reason, sequence.stop_reason)
        if first and self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        if self.body.return_token_ids:
            choice |= {"token_ids": ids} | ({"prompt_token_ids": output.prompt_token_ids} if first else {})
        return choice
