"""Answers of the service, for its OpenAPI description."""

from dataclasses import fields

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..index import Hit

# The path of a picture on the server is not published.
_PRIVATE = ("image",)

HIT = {
    "image_id": "mug-3-front",
    "product_id": "mug-3",
    "live_id": "live-7",
    "title": "red enamel mug",
    "score": 2.31,
    "embedding_score": 0.74,
    "matching_score": 5.2,
    "confidence": 0.91,
    "alignment_score": 1.08,
}

HitBody = create_model(
    "Hit",
    __config__=ConfigDict(json_schema_extra={"example": HIT}),
    __doc__="A found image of the shop; pair scores are null if the model has none.",
    **{one.name: (one.type, ...) for one in fields(Hit) if one.name not in _PRIVATE},
)


def hit_body(hit: Hit) -> dict:
    """The fields of `HitBody` for a hit."""
    return {one.name: getattr(hit, one.name) for one in fields(hit) if one.name not in _PRIVATE}


class AnswerBody(BaseModel):
    """The result for one clip."""

    no_product: bool = Field(description="The clip shows none of the shop's products, or the model is not sure.")
    confidence: float = Field(description="Confidence of the first hit, 0 to 1.")
    hits: list[HitBody] = Field(description="Best first.")
    note: str = Field("", description="A note on the clip, such as that it is damaged.")
    timings: dict[str, float] = Field(
        description="Milliseconds: read_ms, wait_ms (for the batch before), and of the batch encode_ms and search_ms.",
        examples=[{"read_ms": 31.0, "wait_ms": 5.2, "encode_ms": 88.0, "search_ms": 3.0}],
    )


class StreamBody(BaseModel):
    """A running or finished stream."""

    stream_id: str = Field(examples=["5f0c9d1e7b3a4c62"])
    segments: int = Field(description="Number of segments so far.")
    running: bool
    error: str | None = Field(None, description="Reason of an early end.")


class ImageFailure(BaseModel):
    image_id: str
    reason: str = Field(examples=["cannot be decoded (it is none of JPEG, PNG, WEBP, or damaged)"])


class ShopBody(BaseModel):
    """The result of a change of a shop's images."""

    images: int = Field(description="Number of images in the whole index.")
    version: int = Field(description="Version of the index.")
    changed: int = Field(description="Number of images that were written or removed.")
    unreadable: list[ImageFailure] = Field(default=[], description="Images that were left out.")
    unknown: list[str] = Field(default=[], description="Ids that the livestream does not sell.")


class ReadyBody(BaseModel):
    ready: bool
    images: int
    version: int
    precision: str = Field(examples=["bf16"])


class ErrorBody(BaseModel):
    error: str = Field(description="One sentence.", examples=["Send one of clip, frames and url."])
