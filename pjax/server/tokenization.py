"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from pjax.server.bodies import BodyRoute
from pjax.server.errors import invalid
from pjax.server.schemas import DetokenizeRequest, TokenizeChat, TokenizeText
from pjax.server.service import Service, json_response


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes = APIRouter(route_class=BodyRoute)
    tokenizer = service.tokenizer

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeText | TokenizeChat) -> Response:
        """The token ids of a text or a conversation."""
        service.prompts.model(body.model)
        with service.bridge.preparing():
            if isinstance(body, TokenizeText):
                ids = await service.prompts.encode_whole(body.prompt, body.add_special_tokens, "prompt")
            else:
                ids = await service.prompts.of_chat(body)
            answer = {"count": len(ids), "max_model_len": service.prompts.max_model_len, "tokens": ids}
            if body.return_token_strs:
                answer["token_strs"] = await service.prompts.run(len(ids), lambda: [tokenizer.id_to_token(token) for token in ids])
        return json_response(answer)

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        service.prompts.model(body.model)
        with service.bridge.preparing():
            return json_response({"prompt": await service.prompts.run(len(body.tokens), text_of, body.tokens)})

    def text_of(tokens: list[int]) -> str:
        vocab_size = tokenizer.vocab_size
        for index, token in enumerate(tokens):
            if token >= vocab_size:
                raise invalid("tokens", f"tokens has {token} at {index}, but ids must be in [0, {vocab_size})")
        return tokenizer.decode(tokens, False)

    return routes
