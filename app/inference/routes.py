"""``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from app.inference.generate import Completion, merged, total_usage
from app.inference.resolve import Resolved, resolve
from app.inference.schemas import ChatRequest, CompletionRequest, InferenceRequest
from app.inference.shapes import ChatShape, TextShape
from app.schemas import ListOf, Name
from app.services import Caller, CallerDep, Services, ServicesDep
from registry import endpoints
from registry.errors import ErrataError
from registry.manifests import VersionManifest
from serving.protocol import GenerateRequest, Piece, VersionRef

router = APIRouter(prefix="/v1", tags=["inference"])
MAX_LISTED = 1000
STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The completion, or its chunks as server-sent events (stream: true).",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


class ModelBody(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    version: str
    generation: int | None


@router.get("/models")
def list_models(services: ServicesDep, caller: CallerDep) -> ListOf[ModelBody]:
    """The endpoints, and the untouched bases as ``base_<name>``. Versions answer by their ids."""
    with services.database.read() as connection:
        page = endpoints.list_endpoints(connection, caller.tenant, limit=MAX_LISTED)
    models = [
        ModelBody(
            id=endpoint.name,
            created=int(endpoint.created_at),
            owned_by=caller.tenant,
            version=endpoint.state[0].version,
            generation=endpoint.generation,
        )
        for endpoint in page.items
    ]
    models += [
        ModelBody(
            id=f"base_{base.name}",
            created=0,
            owned_by="errata",
            version=VersionManifest(base.ref).id,
            generation=None,
        )
        for base in services.bases.values()
    ]
    return ListOf(data=models, has_more=page.has_more)


@router.get("/models/{model}")
def get_model(model: Name, services: ServicesDep, caller: CallerDep) -> ModelBody:
    """An endpoint, a version or a base, as a model."""
    resolved = _resolve(services, caller, model, "")
    return ModelBody(
        id=model,
        created=0,
        owned_by=caller.tenant,
        version=resolved.manifest.id,
        generation=resolved.generation,
    )


@router.post("/completions", response_class=Response, responses=STREAMED)
async def create_completion(
    body: CompletionRequest, services: ServicesDep, caller: CallerDep
) -> Response:
    """Continue one or several prompts."""
    body.check_unsupported()
    prompts = body.prompts()
    resolved = await _admitted(body, services, caller)
    requests = [
        GenerateRequest(
            VersionRef.of(resolved.manifest),
            body.sampling(index, body.max_tokens or 16, body.logprobs),
            **prompt,
        )
        for prompt in prompts
        for index in range(body.choices)
    ]
    shape = TextShape(resolved)
    return await _answer(body, services, shape, requests, body.logprobs is not None)


@router.post("/chat/completions", response_class=Response, responses=STREAMED)
async def create_chat_completion(
    body: ChatRequest, services: ServicesDep, caller: CallerDep
) -> Response:
    """Answer a conversation through the base's chat template."""
    body.check_unsupported()
    messages = tuple(message.as_text(index) for index, message in enumerate(body.messages))
    logprobs = body.logprob_count
    resolved = await _admitted(body, services, caller)
    requests = [
        GenerateRequest(
            VersionRef.of(resolved.manifest),
            body.sampling(index, body.token_limit, logprobs),
            messages=messages,
        )
        for index in range(body.choices)
    ]
    shape = ChatShape(resolved)
    return await _answer(body, services, shape, requests, logprobs is not None)


def _resolve(services: Services, caller: Caller, model: str, user: str) -> Resolved:
    with services.database.read() as connection:
        return resolve(connection, services.bases, caller.tenant, model, user)


async def _admitted(body: InferenceRequest, services: Services, caller: Caller) -> Resolved:
    user = body.safety_identifier or body.user or caller.actor
    return await run_in_threadpool(_resolve, services, caller, body.model, user)


async def _answer(
    body: InferenceRequest,
    services: Services,
    shape: TextShape,
    requests: Sequence[GenerateRequest],
    logprobs: bool,
) -> Response:
    """Wait for the first piece, so that what the engine refuses is an HTTP error, then answer."""
    completions = [Completion() for _ in requests]
    stream = merged(services.engine, requests)
    headers = shape.resolved.headers
    if body.stream:
        first = await anext(stream)
        chunks = _chunks(body, shape, completions, first, stream, logprobs)
        return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
    async with aclosing(stream):
        async for index, piece in stream:
            completions[index].add(piece)
    usage = total_usage(completions, body.choices)
    return JSONResponse(shape.whole(completions, usage, logprobs), headers=headers)


async def _chunks(
    body: InferenceRequest,
    shape: TextShape,
    completions: Sequence[Completion],
    first: tuple[int, Piece],
    stream: AsyncGenerator[tuple[int, Piece], None],
    logprobs: bool,
) -> AsyncIterator[str]:
    async with aclosing(stream):
        for index in range(len(completions)):
            if (opening := shape.opening(index)) is not None:
                yield _event(opening)
        try:
            yield _piece_event(shape, completions, *first, logprobs)
            async for index, piece in stream:
                if piece.text or piece.finish_reason or piece.logprobs:
                    yield _piece_event(shape, completions, index, piece, logprobs)
                else:
                    completions[index].add(piece)
        except ErrataError as error:
            yield _event({"error": error.body()})
            return
    if body.include_usage:
        yield _event(shape.usage_chunk(total_usage(completions, body.choices)))
    yield "data: [DONE]\n\n"


def _piece_event(
    shape: TextShape,
    completions: Sequence[Completion],
    index: int,
    piece: Piece,
    logprobs: bool,
) -> str:
    offset = sum(len(entry.text) for entry in completions[index].logprobs)
    completions[index].add(piece)
    entries = (piece.logprobs or ()) if logprobs else None
    return _event(shape.chunk(index, piece.text, entries, piece.finish_reason, offset))


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
