"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from pjax.server.errors import invalid
from pjax.server.schemas import DetokenizeRequest, TokenizeChat, TokenizeText
from pjax.server.service import Service, json_response


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()
    tokenizer = service.tokenizer

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeText | TokenizeChat) -> Response:
        """The token ids of a text or a conversation."""
        service.prompts.model(body.model)
        if isinstance(body, TokenizeText):
            ids = await service.prompts.encode(body.prompt, body.add_special_tokens)
        else:
            ids = await service.prompts.of_chat(body)
        answer = {"count": len(ids), "max_model_len": service.prompts.max_model_len, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = [tokenizer.id_to_token(token) for token in ids]
        return json_response(answer)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.prompts.model(body.model)
        for index, token in enumerate(body.tokens):
            if token >= tokenizer.vocab_size:
                raise invalid("tokens", f"tokens has {token} at {index}, but ids must be in [0, {tokenizer.vocab_size})")
        return json_response({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, False)})

    return routes
