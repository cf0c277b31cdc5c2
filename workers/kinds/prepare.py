"""Prepare a base for editing: its texts, context prefixes and the C of the layers asked for."""

from __future__ import annotations

from dataclasses import replace

from editing.statistics import Resources, prepare
from registry.errors import JobFailed
from registry.resources import add_resource, find_resources
from registry.results import Result
from workers.recipes import TEXTS, covariance_of, layer_of, text_source
from workers.work import Work


def perform(work: Work) -> Result:
    """Make the resources that the request names and keep them for every later job."""
    job = work.claim.job
    view = work.models.view(job.base)
    names: list[str] = job.request["resources"]
    layers = sorted({layer for name in names if (layer := layer_of(name)) is not None})
    source, file = text_source(work.settings, view.base)
    texts = None if file is None else file.read_text().splitlines()
    made = work.follow(prepare(view, layers, work.settings.covariance_tokens, texts))
    work.models.check_untouched(job.base)
    parts = {TEXTS: replace(made, covariance={})}
    parts |= {
        covariance_of(layer): replace(made, covariance={layer: made.covariance[layer]})
        for layer in layers
    }
    stored = {name: work.artifacts.put(part.to_bytes()) for name, part in parts.items()}
    with work.database.write() as connection:
        for name, digest in stored.items():
            add_resource(connection, view.base.digest, source, name, digest)
    return Result(metrics={"tokens": made.tokens, "warning": made.warning or None})


def load_resources(work: Work, names: frozenset[str]) -> Resources:
    """What was prepared of the job's base, put together.

    Raises:
        JobFailed: a resource is missing (the texts changed since the job was taken).
    """
    base = work.models.view(work.claim.job.base).base
    source, _ = text_source(work.settings, base)
    with work.database.read() as connection:
        digests = find_resources(connection, base.digest, source)
    missing = names - set(digests)
    if missing:
        raise JobFailed(
            f"base {base.name!r}: {', '.join(sorted(missing))} is not prepared for the texts in"
            " force; submit the job again, which prepares them",
            code="resources_missing",
        )
    parts = [Resources.from_bytes(work.artifacts.get(digests[name])) for name in sorted(names)]
    covariance = {layer: C for part in parts for layer, C in part.covariance.items()}
    return replace(parts[0], covariance=covariance)
