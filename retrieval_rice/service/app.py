"""The routes of the service."""

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, File, Form, Header, Path, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..uploads import UploadError
from .bodies import AnswerBody, ErrorBody, ReadyBody, ShopBody, StreamBody, hit_body
from .gate import RETRY_SECONDS, ServiceGate
from .metrics import CONTENT_TYPE
from .names import check_names
from .streams import FollowedStream
from .work import Refused, Service

logger = logging.getLogger(__name__)

MAX_TOP_K = 100
_MAX_WORDS = 2000
_DESCRIPTION = """Recognises which product of a shop a clip presents. If the service has a token, requests must carry
it as `Authorization: Bearer ...`. Errors have one sentence, `{"error": ...}`. 503 with `Retry-After` means that the
maximum number of requests is in progress."""
_REFUSALS = {
    400: "The body is not a complete form.",
    401: "The token is missing or wrong.",
    404: "No such livestream, stream or source.",
    408: "Sending took too long.",
    411: "The request does not say its length.",
    403: "This service does not fetch addresses.",
    413: "Too many bytes, files, pixels or seconds.",
    422: "An argument is missing or wrong, or a file cannot be read.",
    502: "A source does not answer.",
    503: "Too many requests; try again after `Retry-After` seconds.",
}

LiveId = Annotated[str, Path(min_length=1, max_length=200, description="The livestream's id.", examples=["live-7"])]
_LIVE = Form(min_length=1, max_length=200, description="Search this livestream only.", examples=["live-7"])
_URL = Form(max_length=2000, description="Address of the clip (http or https), if the service fetches addresses.")


def build_app(service: Service, token: str | None = None, max_requests: int = 32) -> FastAPI:
    """
    The service as an ASGI application.

    Args:
        service: The service.
        token: Token that requests must carry, if any.
        max_requests: Maximum number of requests with a body in progress; more get 503.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    refusals = {status: {"model": ErrorBody, "description": words} for status, words in _REFUSALS.items()}
    # FastAPI's documentation pages would load scripts from other servers.
    app = FastAPI(
        title="RICE", description=_DESCRIPTION, version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        responses=refusals, redirect_slashes=False,
    )  # fmt: skip
    app.add_middleware(
        ServiceGate, limits=service.limits, metrics=service.metrics, token=token, most=max_requests
    )  # fmt: skip
    _tell_mistakes(app)
    _add_health(app, service)
    routes = APIRouter(dependencies=[Depends(check_names)])
    _add_recognition(routes, service)
    _add_streams(routes, service)
    _add_shops(routes, service)
    app.include_router(routes)
    return app


def _sentence(status: int, words: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else headers
    return JSONResponse({"error": " ".join(words.split())}, status, headers)


def _tell_mistakes(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return _sentence(error.status, str(error))

    @app.exception_handler(UploadError)
    async def upload(_: Request, error: UploadError) -> JSONResponse:
        return _sentence(413 if error.too_large else 422, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][1:])) or "the request"
        words = "send it as a file, with a file's name" if "UploadFile" in first["msg"] else first["msg"].rstrip(".")
        return _sentence(422, f"{name}: {words}.")

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        words = {
            404: "There is no such address here; see /openapi.json.",
            405: "This address needs another method; see /openapi.json.",
        }
        # The client also gets the message of the form parser.
        sentence = words.get(error.status_code, f"{str(error.detail).rstrip('.')}.")
        # A header names the methods of an address.
        return _sentence(error.status_code, sentence, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        # Only the server's log has the traceback, with paths and settings.
        return _sentence(500, "The service failed; see its log.")


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, bool]:
        return {"alive": True}

    @app.get("/readyz", summary="Whether requests should come here", response_model=ReadyBody)
    def readyz() -> Any:
        if service.is_stopping:
            return _sentence(503, "The service is stopping.")
        try:
            images, version = len(service.index), service.index.version
        except (ValueError, OSError) as error:
            logger.warning("not ready: %s", error)
            return _sentence(503, "The index cannot be read; see the log of the service.")
        return ReadyBody(ready=True, images=images, version=version, precision=service.precision)

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    def metrics() -> Response:
        try:
            service.metrics.images.set(len(service.index))
            service.metrics.version.set(service.index.version)
        except (ValueError, OSError) as error:
            # The counters are returned anyway.
            logger.warning("the index cannot be read: %s", error)
        service.metrics.streams.set(len(service.streams.running))
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _one_of(**given: Any) -> None:
    if sum(bool(value) for value in given.values()) != 1:
        *names, last = given
        raise Refused(422, f"Send one of {', '.join(names)} and {last}.")


def _add_recognition(routes: APIRouter, service: Service) -> None:
    @routes.post("/v1/recognise", summary="Recognise the product of a clip", response_model=AnswerBody)
    async def recognise(
        clip: Annotated[UploadFile | None, File(description="A video: MP4, WebM, MKV or AVI.")] = None,
        frames: Annotated[list[UploadFile], File(description="Or its frames, pictures in their order.")] = [],  # noqa: B006
        url: Annotated[str | None, _URL] = None,
        live_id: Annotated[str | None, _LIVE] = None,
        asr: Annotated[str, Form(max_length=_MAX_WORDS, description="Speech of the clip.")] = "",
        top_k: Annotated[int, Form(ge=1, le=MAX_TOP_K, description="Maximum number of hits.")] = 10,
    ) -> AnswerBody:
        _one_of(clip=clip, frames=frames, url=url)
        files = frames if clip is None else [clip]
        answered, note = await service.recognise(files, url, asr, live_id, top_k)
        answer = answered.answer
        return AnswerBody(
            no_product=answer.no_product,
            confidence=answer.confidence,
            hits=[hit_body(hit) for hit in answer.hits],
            note=note,
            timings={name: round(value, 2) for name, value in answered.timings.items()},
        )


def _body(stream: FollowedStream) -> StreamBody:
    running = stream.ended_at is None
    return StreamBody(stream_id=stream.stream_id, segments=stream.count, running=running, error=stream.error)


def _add_streams(routes: APIRouter, service: Service) -> None:
    def known(stream_id: str) -> FollowedStream:
        if stream_id not in service.streams.known:
            raise Refused(404, f"There is no stream {stream_id!r} here, or it was deleted.")
        return service.streams.known[stream_id]

    @routes.post("/v1/streams", summary="Follow a video or a source", response_model=StreamBody, status_code=201)
    async def follow(
        clip: Annotated[UploadFile | None, File(description="A video: MP4, WebM, MKV or AVI.")] = None,
        url: Annotated[str | None, _URL] = None,
        source: Annotated[str | None, Form(max_length=200, description="Name of a source of the service.")] = None,
        live_id: Annotated[str | None, _LIVE] = None,
        window_s: Annotated[float, Form(ge=1, le=30, description="Length of a window in seconds.")] = 4.0,
        hop_s: Annotated[float, Form(ge=0.25, le=30, description="Seconds between the starts of windows.")] = 1.0,
    ) -> StreamBody:
        _one_of(clip=clip, url=url, source=source)
        if hop_s > window_s:
            raise Refused(422, "hop_s: it must not be above window_s, or parts would be skipped.")
        settings = {"window_s": window_s, "hop_s": hop_s}
        return _body(await service.follow([clip] if clip else [], url, source, live_id, settings))

    @routes.get("/v1/streams/{stream_id}", summary="Progress of a stream", response_model=StreamBody)
    async def state(stream_id: str) -> StreamBody:
        return _body(known(stream_id))

    @routes.delete("/v1/streams/{stream_id}", summary="End it", response_model=StreamBody)
    async def end(stream_id: str) -> StreamBody:
        stream = known(stream_id)
        stream.stop()
        return _body(stream)

    @routes.get(
        "/v1/streams/{stream_id}/events",
        summary="Its segments as they end, as server-sent events",
        description="`segment` with the JSON of `rice recognise --jsonl`, then one `end`. After a lost connection a "
        "client continues with the header `Last-Event-ID`, as browsers do.",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {"example": _EVENTS}}}},
    )
    async def events(stream_id: str, last_event_id: Annotated[int, Header(ge=0)] = 0) -> StreamingResponse:
        stream = known(stream_id)
        return StreamingResponse(stream.events(last_event_id), media_type="text/event-stream")


_EVENTS = """id: 1
event: segment
data: {"start_s": 0.0, "end_s": 12.4, "product_id": "mug-3", "image_id": "mug-3-front", "title": "red enamel mug", ...}

event: end
data: {"segments": 1, "error": null}
"""


def _add_shops(routes: APIRouter, service: Service) -> None:
    @routes.put("/v1/shops/{live_id:path}/images", summary="Write images of a livestream", response_model=ShopBody)
    async def put(
        live_id: LiveId,
        images: Annotated[list[UploadFile], File(description="Pictures.")],
        image_ids: Annotated[list[str], Form(description="An id for each picture.", examples=[["mug-3-front"]])],
        product_ids: Annotated[list[str], Form(description="A product for each; default: the image's id.")] = [],  # noqa: B006
        titles: Annotated[list[str], Form(description="A title for each.")] = [],  # noqa: B006
    ) -> ShopBody:
        count = len(images)
        if count > service.limits.max_files:
            raise Refused(413, f"{count} pictures are more than the maximum of {service.limits.max_files}.")
        for name, values in (("image_ids", image_ids), ("product_ids", product_ids), ("titles", titles)):
            if len(values) != count and (values or name == "image_ids"):
                raise Refused(422, f"{name}: there are {len(values)} of them for {count} images; send one for each.")
            if not all(len(value) <= _MAX_WORDS for value in values):
                raise Refused(422, f"{name}: one is longer than {_MAX_WORDS} characters.")
        if not all(product_ids):
            raise Refused(422, "product_ids: one is empty; send one for each image, or none.")
        if not all(image_ids) or len(set(image_ids)) < count:
            raise Refused(422, "image_ids: every image needs its own id.")
        records = [
            {"image_id": name, "product_id": product_ids[i] if product_ids else name,
             "title": titles[i] if titles else ""}
            for i, name in enumerate(image_ids)
        ]  # fmt: skip
        failures = await service.put_images(live_id, images, records)
        unreadable = [{"image_id": failure["id"], "reason": failure["reason"]} for failure in failures]
        return _shop(service, count - len(unreadable), unreadable=unreadable)

    @routes.delete(
        "/v1/shops/{live_id:path}/images", summary="Remove images from a livestream", response_model=ShopBody
    )
    async def delete(
        live_id: LiveId,
        image_id: Annotated[list[str], Query(description="Once or several times.", min_length=1)],
    ) -> ShopBody:
        gone, unknown = await service.delete_images(live_id, image_id)
        return _shop(service, len(gone), unknown=unknown)


def _shop(service: Service, changed: int, **parts: list) -> ShopBody:
    return ShopBody(images=len(service.index), version=service.index.version, changed=changed, **parts)
