"""Pieces that several features' requests and answers share."""

from __future__ import annotations

from typing import Annotated, Generic, TypeVar

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field

from registry.errors import UnsupportedParameter

T = TypeVar("T")

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
#: A name as users choose it; ``ver_`` and ``base_`` are reserved and checked where one is made.
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items of this page.")]
Message = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00]*$")]
#: Whole numbers that SQL holds are below this, which a document's float says exactly.
BEYOND = 2**63


class Request(BaseModel):
    """A request body: unknown fields are refused, so that a typing error does not pass."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ListOf(BaseModel, Generic[T]):
    """A page of a list."""

    object: str = "list"
    data: list[T]
    has_more: bool = False


def unsupported(name: str, *, neutral: bool = False) -> UnsupportedParameter:
    """What a request is told whose parameter would have to be ignored; a neutral one has values
    that change nothing here."""
    other = " at other values than its default" if neutral else ""
    return UnsupportedParameter(f"{name} is not supported here{other}; leave it out", param=name)
