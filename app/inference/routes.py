"""``/v1/models``, ``/v1/completions``, ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Literal

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from app.inference.generate import Completion, best, total_usage, unless_gone
from app.inference.observed import observed
from app.inference.resolve import Admitted, Resolved, admit, resolve
from app.inference.schemas import ChatRequest, CompletionRequest, InferenceRequest
from app.inference.shapes import ChatShape, ChunkEvents, TextShape, as_event
from app.schemas import ListOf, Name
from app.services import Caller, CallerDep, Services, ServicesDep
from app.strict import Router
from registry import endpoints
from registry.bases import Base
from registry.errors import ErrataError, InvalidRequest
from registry.manifests import VersionManifest
from serving.protocol import GenerateRequest, Piece, Usage, VersionRef

router = Router(prefix="/v1", tags=["inference"])
MAX_LISTED = 1000
BASES_OWNER = "errata"
#: The status of an answer that nobody waits for any more.
CLIENT_GONE = 499
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
            owned_by=BASES_OWNER,
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
        created=int(resolved.created_at),
        owned_by=BASES_OWNER if model.startswith("base_") else caller.tenant,
        version=resolved.manifest.id,
        generation=resolved.generation,
    )


@router.post("/completions", response_class=Response, responses=STREAMED)
async def create_completion(
    body: CompletionRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    """Continue one or several prompts."""
    body.check_unsupported()
    prompts = body.prompts()
    sampling = body.sampling(16 if body.max_tokens is None else body.max_tokens, body.logprobs)
    admitted = await _admitted(body, services, caller)
    _check_lengths(prompts, services.bases[admitted.resolved.manifest.base.name])
    requests = [
        GenerateRequest(
            VersionRef.of(admitted.resolved.manifest),
            sampling,
            **prompt,
            echo=bool(body.echo),
            proxy=admitted.proxy,
            tenant=caller.tenant,
            samples=body.samples,
        )
        for prompt in prompts
    ]
    shape = TextShape(admitted)
    return await _answer(body, request, services, caller, shape, requests, body.logprobs)


@router.post("/chat/completions", response_class=Response, responses=STREAMED)
async def create_chat_completion(
    body: ChatRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    """Answer a conversation through the base's chat template."""
    body.check_unsupported()
    body.check_samples(1)
    messages = tuple(message.as_text(index) for index, message in enumerate(body.messages))
    logprobs = body.logprob_count
    sampling = body.sampling(body.token_limit, logprobs)
    admitted = await _admitted(body, services, caller)
    asked = GenerateRequest(
        VersionRef.of(admitted.resolved.manifest),
        sampling,
        messages=messages,
        proxy=admitted.proxy,
        tenant=caller.tenant,
        samples=body.samples,
    )
    return await _answer(body, request, services, caller, ChatShape(admitted), [asked], logprobs)


def _resolve(services: Services, caller: Caller, model: str, user: str) -> Resolved:
    with services.database.read() as connection:
        return resolve(connection, services.bases, caller.tenant, model, user)


async def _admitted(body: InferenceRequest, services: Services, caller: Caller) -> Admitted:
    if caller.key is not None:
        await services.limiter.admit_tokens(caller.key)
    user = body.safety_identifier or body.user or caller.actor

    def find() -> Admitted:
        with services.database.read() as connection:
            return admit(connection, services.bases, caller.tenant, body.model, body.proxy, user)

    return await run_in_threadpool(find)


def _check_lengths(prompts: Sequence[Mapping[str, Any]], base: Base) -> None:
    """Raises InvalidRequest for more token ids than the base reads, before they travel."""
    for prompt in prompts:
        if (tokens := len(prompt.get("prompt_tokens", ()))) > base.context_length:
            raise InvalidRequest(
                f"the prompt has {tokens} tokens, more than {base.context_length}, the model's"
                " context length; shorten the prompt",
                param="prompt",
                code="context_length_exceeded",
            )


async def _answer(
    body: InferenceRequest,
    request: Request,
    services: Services,
    caller: Caller,
    shape: TextShape,
    requests: Sequence[GenerateRequest],
    logprobs: int | None,
) -> Response:
    """Wait for the first piece, so that what the engine refuses is an HTTP error, then answer."""
    seconds = body.seconds(services.settings.request_seconds)
    pieces = services.limiter.metered(
        caller.key,
        requests,
        observed(
            services.meters,
            requests[0].version.base,
            services.engine.generate_all(requests, seconds=seconds),
        ),
    )
    headers = shape.admitted.headers
    count = len(requests) * body.samples
    if body.stream:
        first = await unless_gone(request, anext(pieces))
        if first is None:
            return Response(status_code=CLIENT_GONE)
        events = _events(body, shape, count, first, pieces)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    completions = await unless_gone(request, _whole(pieces, count))
    if completions is None:
        return Response(status_code=CLIENT_GONE)
    usage = total_usage([completion.usage for completion in completions], body.samples)
    chosen = best(completions, body.samples, body.choices)
    return JSONResponse(shape.whole(chosen, usage, logprobs is not None), headers=headers)


async def _whole(pieces: AsyncGenerator[tuple[int, Piece], None], count: int) -> list[Completion]:
    completions = [Completion() for _ in range(count)]
    async with aclosing(pieces):
        async for index, piece in pieces:
            completions[index].add(piece)
    return completions


async def _events(
    body: InferenceRequest,
    shape: TextShape,
    count: int,
    first: tuple[int, Piece],
    pieces: AsyncGenerator[tuple[int, Piece], None],
) -> AsyncIterator[bytes]:
    """The chunks as server-sent events."""
    usages = [Usage(0, 0)] * count
    events = [ChunkEvents(shape, index) for index in range(count)]
    async with aclosing(pieces):
        for choice in events:
            if choice.opening:
                yield choice.opening
        item: tuple[int, Piece] | None = first
        try:
            while item is not None:
                index, piece = item
                if piece.usage is not None:
                    usages[index] = piece.usage
                if event := events[index].of(piece):
                    yield event
                item = await anext(pieces, None)
        except ErrataError as error:
            yield as_event({"error": error.body()})
            return
    if body.include_usage:
        yield as_event(shape.usage_chunk(total_usage(usages, body.samples)))
    yield b"data: [DONE]\n\n"
