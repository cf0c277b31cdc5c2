"""What schemathesis is told beside its own checks."""

from __future__ import annotations

import os
import re

import schemathesis
from schemathesis import Case, CheckContext, HookContext, Response

#: How pydantic words what a field's schema refuses, and the service a field that is none.
SHAPE = re.compile(
    r": (Input|String|List|Tuple|Dictionary|Value|Data) should |: Field required"
    r"|is not a known field here"
)


@schemathesis.check
def schema_says_it(_: CheckContext, response: Response, case: Case) -> None:
    """What the document allows is refused by a rule among values only, never by a field's own."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    if response.status_code == 422 and SHAPE.search(response.json()["error"]["message"]):
        raise AssertionError(f"the document allows what is refused: {response.text}")


@schemathesis.check
def one_error_body(_: CheckContext, response: Response, case: Case) -> None:
    """Every refusal has the one body."""
    if response.status_code < 400 or case.operation.path == "/readyz":
        return
    if response.json()["error"].keys() != {"message", "type", "param", "code"}:
        raise AssertionError(f"not the body of an error: {response.text}")


@schemathesis.hook
def filter_case(_: HookContext, case: Case) -> bool:
    """The key that the run needs is not revoked by it."""
    key = "key_" + os.environ["SCHEMA_KEY"].split("_")[1]
    return (case.path_parameters or {}).get("key_id") != key
