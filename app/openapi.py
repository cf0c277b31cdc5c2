"""The document of the API, where FastAPI alone would promise what HTTP cannot carry."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


class Application(FastAPI):
    """FastAPI whose document describes parameters as they travel, and whole bounds as such."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            document = super().openapi()
            _drop_nulls(document)
            _make_whole(document)
        return super().openapi()


def _drop_nulls(document: dict[str, Any]) -> None:
    """Parameters are left out, never null: a header or a query holds text."""
    for path in document["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                schema = parameter["schema"]
                kept = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
                if len(kept) == 1:
                    del schema["anyOf"]
                    schema |= kept[0]


def _make_whole(part: Any) -> None:
    """FastAPI makes floats of all bounds, and 9.223372036854776e18 is read as another number."""
    if isinstance(part, dict):
        for name in _BOUNDS:
            if isinstance(part.get(name), float) and part[name].is_integer():
                part[name] = int(part[name])
    for inner in part.values() if isinstance(part, dict) else part:
        if isinstance(inner, dict | list):
            _make_whole(inner)
