"""What is sent and answered, for /openapi.json and /docs."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from jaxsft.ship.upload import FIELD, RAW


class Class(BaseModel):
    """A class of the model's."""

    name: str = Field(alias="class", description="the class's name, or its number where it has none")
    probability: float = Field(description="0..1, calibrated where the run has been")


class Explanation(BaseModel):
    """Where the network looked."""

    name: str = Field(alias="class", description="the class that the picture is of: the most probable one")
    image: str = Field(description="a data URL of a PNG: Grad-CAM over the part of the picture that the network sees")


class Answer(BaseModel):
    """What is on a picture."""

    classes: list[Class] = Field(description="the most probable first")
    labels: list[str] | None = Field(None, description="of a model of several labels: those above 0.5")
    explanation: Explanation | None = Field(None, description="where it was asked for")
    seconds: float = Field(description="that the service took, the time in which the picture came included")


class Error(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="what is wrong; what to do")


PICTURE = {"type": "string", "format": "binary"}
REQUEST: dict[str, Any] = {
    "required": True,
    "description": "a JPEG, PNG, WebP, BMP, PPM, TIFF or GIF, whose first picture counts",
    "content": {
        "multipart/form-data": {"schema": {"type": "object", "required": [FIELD], "properties": {FIELD: PICTURE}}},
        RAW.decode(): {"schema": PICTURE},
        "image/*": {"schema": PICTURE},
    },
}
REASONS = {
    400: "not a picture, a broken one, or a broken form",
    408: "the body came too slowly",
    413: "the body has too many bytes, or the picture too many pixels",
    415: "a body of another type, or a compressed one",
    422: f'a parameter is wrong, or the form has no field "{FIELD}"',
    503: "too much to do, or the service is starting or ending; Retry-After says when to try again",
    504: "the answer took too long",
}
Responses = dict[int | str, dict[str, Any]]
PREDICT: Responses = {
    200: {"model": Answer, "description": "the classes"},
    **{status: {"model": Error, "description": reason} for status, reason in REASONS.items()},
}
HEALTH: Responses = {
    200: {"description": "pictures are answered"},
    503: {"description": "not yet, or no more; Retry-After says when to ask again"},
}
METRICS: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "the metrics"}}
