"""Guards: what an edited version must not lose."""

from __future__ import annotations

import math
from collections.abc import Mapping

from registry.manifests import GuardResult

PERPLEXITY_LIMIT = 1.1


def perplexity_guard(
    before: Mapping[str, float], after: Mapping[str, float], limit: float = PERPLEXITY_LIMIT
) -> GuardResult:
    """ME-PPL may grow by at most ``limit`` times; ``value`` is the ratio, ``before`` what it was.

    Without data on both sides the guard is ``skipped``; a perplexity that is not finite fails.
    """
    was, now = before.get("me_ppl"), after.get("me_ppl")
    if was is None or now is None:
        return GuardResult("perplexity", "skipped", limit=limit)
    ratio = now / was if was > 0 else math.inf
    if not math.isfinite(ratio):
        return GuardResult("perplexity", "failed", limit=limit, before=_finite(was))
    return GuardResult("perplexity", "passed" if ratio <= limit else "failed", ratio, limit, was)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
