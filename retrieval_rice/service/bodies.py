"""What the service answers, as its OpenAPI description tells it."""

from dataclasses import fields

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..index import Hit

# Where a picture lies on the server is nobody's business.
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
    __doc__="An image of the shop that was found; of a model without them, pair scores are null.",
    **{one.name: (one.type, ...) for one in fields(Hit) if one.name not in _PRIVATE},
)


def hit_body(hit: Hit) -> dict:
    """A hit as `HitBody` has it."""
    return {one.name: getattr(hit, one.name) for one in fields(hit) if one.name not in _PRIVATE}


class AnswerBody(BaseModel):
    """What one clip shows."""

    no_product: bool = Field(description="The clip shows none of the shop's products, or the model is not sure.")
    confidence: float = Field(description="Of the first hit, 0 to 1.")
    hits: list[HitBody] = Field(description="Best first.")
    note: str = Field("", description="What is worth knowing of the clip, such as that it is damaged.")
    timings: dict[str, float] = Field(
        description="Milliseconds: read_ms, wait_ms (for the batch before), and of the batch encode_ms and search_ms.",
        examples=[{"read_ms": 31.0, "wait_ms": 5.2, "encode_ms": 88.0, "search_ms": 3.0}],
    )


class StreamBody(BaseModel):
    """A stream that is being followed, or was."""

    stream_id: str = Field(examples=["5f0c9d1e7b3a4c62"])
    segments: int = Field(description="Segments so far.")
    running: bool
    error: str | None = Field(None, description="Why it ended before its time.")


class ImageFailure(BaseModel):
    image_id: str
    reason: str = Field(examples=["cannot be decoded (it is none of JPEG, PNG, WEBP, or damaged)"])


class ShopBody(BaseModel):
    """What became of a shop's images."""

    images: int = Field(description="In the whole index.")
    version: int = Field(description="Of the index.")
    changed: int = Field(description="Images that were written or taken out.")
    unreadable: list[ImageFailure] = Field(default=[], description="Images that were left out.")
    unknown: list[str] = Field(default=[], description="Ids that the livestream does not sell.")


class ReadyBody(BaseModel):
    ready: bool
    images: int
    version: int
    precision: str = Field(examples=["bf16"])


class ErrorBody(BaseModel):
    error: str = Field(description="One sentence.", examples=["Send one of clip, frames and url."])
