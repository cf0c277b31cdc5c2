"""What a job stands on: its parent's deltas, and which of them an edit is to make anew."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

from editing.deltas import Delta, Effect, compose
from editing.deltas.fit import read_fitting
from editing.methods import METHODS
from editing.metrics import greedy_matches
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.edits import edited
from registry.errors import JobFailed
from registry.history import check_depth
from registry.manifests import EditRequest
from registry.versions import Version
from workers.kinds.prepare import load_resources
from workers.recipes import EditRecipe, check_edit
from workers.work import Work


@dataclass(frozen=True)
class Ground:
    """What a job stands on.

    Attributes:
        chain: the parent's lineage, newest first.
        stack: the parent's deltas.
        replaced: the digest of the topmost of them, where the method makes it anew.
        retrained: the edits that are in it.
    """

    view: ModelView
    recipe: EditRecipe
    resources: Resources
    chain: Sequence[Version]
    stack: Sequence[Delta]
    replaced: str | None = None
    retrained: Sequence[EditRequest] = ()

    @property
    def digests(self) -> tuple[str, ...]:
        """The deltas beneath the one that is to be made."""
        stack = self.chain[0].manifest.stack
        return stack if self.replaced is None else stack[:-1]

    @property
    def beneath(self) -> Sequence[Delta]:
        return self.stack[: len(self.digests)]

    @cached_property
    def below(self) -> dict[str, Effect]:
        """What the deltas beneath do together."""
        return compose(delta.effects for delta in self.beneath)

    def as_it_was(self) -> AbstractContextManager[None]:
        """Within it the view computes as the parent does."""
        return self.view.with_effects(compose(delta.effects for delta in self.stack))

    @contextmanager
    def with_change(self, effects: Mapping[str, Effect]) -> Iterator[None]:
        """Within it the view computes as a version does that is made of these effects."""
        with self.view.with_effects(self.below), self.view.with_effects(effects):
            yield


def parent_of(work: Work) -> tuple[Version, ModelView, list[Delta]]:
    """A claimed job's parent, the view of its base and its deltas.

    Raises:
        JobFailed: there is no parent, or it stands on another base than this worker has.
    """
    parent = claimed_parent(work)
    view = view_of(work, parent)
    return parent, view, deltas_of(work, view, parent.manifest.stack)


def claimed_parent(work: Work) -> Version:
    """A claimed job's parent. Raises JobFailed where there is none."""
    if work.claim.parent is None:
        raise JobFailed(f"job {work.claim.job.id} names neither endpoint nor parent")
    return work.claim.parent


def view_of(work: Work, version: Version) -> ModelView:
    """The view of a version's base.

    Raises:
        JobFailed: it stands on another base than this worker has under the name.
    """
    base = version.manifest.base
    view = work.models.view(base.name)
    if view.base.ref != base:
        raise JobFailed(
            f"version {version.id} stands on base {base.digest[:12]}…, this worker has"
            f" {view.base.digest[:12]}… under the name {base.name!r}",
            code="base_not_loaded",
        )
    return view


def deltas_of(work: Work, view: ModelView, stack: Sequence[str]) -> list[Delta]:
    """The deltas of a stack on the view's base.

    Raises:
        ArtifactCorrupt: one is damaged, or not of this base.
    """
    digest = view.base.digest
    return [read_fitting(work.artifacts.get(one), view.model, digest) for one in stack]


@contextmanager
def as_version(work: Work, version: Version) -> Iterator[ModelView]:
    """Within it the view, which is given, computes as a version does. Raises as ``view_of``."""
    view = view_of(work, version)
    stack = deltas_of(work, view, version.manifest.stack)
    with view.with_effects(compose(delta.effects for delta in stack)):
        yield view


def ground_of(work: Work) -> Ground:
    """What a claimed edit job stands on.

    Raises:
        JobFailed: there is no parent, or it stands on another base than this worker has.
        UnprocessableRequest: what ``check_edit`` refuses.
    """
    parent, view, stack = parent_of(work)
    check_depth(parent, work.settings.max_stack)
    job = work.claim.job
    recipe = check_edit(view.base, job.request["method"], job.request["hyperparameters"])
    ground = Ground(view, recipe, load_resources(work, recipe.resources), work.chain, stack)
    makers = _retrained(ground)
    if not makers:
        return ground
    return replace(ground, replaced=parent.manifest.stack[-1], retrained=_union(work, makers))


def _retrained(ground: Ground) -> list[Version]:
    """The versions whose edits are in the stack's topmost delta, if the method makes it anew.

    It does where it made that delta itself, in the same layers. Newest first.
    """
    stack, recipe = ground.chain[0].manifest.stack, ground.recipe
    if not METHODS[recipe.method].retrains or not stack:
        return []
    if ground.stack[-1].method != recipe.method:  # flattened or merged with the work of others
        return []
    depth = ground.view.base.depth
    layers = recipe.hyperparameters.edited_layers(depth)
    makers = [version for version, delta in edited(ground.chain) if delta == stack[-1]]
    for maker in makers:
        made = maker.manifest.recipe
        if made["method"] != recipe.method:
            return []
        hyperparameters = type(recipe.hyperparameters)(**made["hyperparameters"])
        if hyperparameters.edited_layers(depth) != layers:
            return []
    return makers


def _union(work: Work, makers: Sequence[Version]) -> list[EditRequest]:
    """The edits of versions, oldest first; of two of one prompt the later one."""
    latest: dict[str, EditRequest] = {}
    for maker in reversed(makers):
        for edit in read_edits(work, maker.manifest.recipe["edits"]):
            latest.pop(edit.rewrite_prompt, None)
            latest[edit.rewrite_prompt] = edit
    return list(latest.values())


def asked_of(edits: Iterable[EditRequest]) -> list[tuple[str, str]]:
    """What edits answer: each one's prompt and target, as ``greedy_matches`` takes them."""
    return [(edit.rewrite_prompt, edit.target_new) for edit in edits]


def holds_of(
    work: Work,
    view: ModelView,
    chain: Sequence[Version],
    known: Mapping[str, Sequence[bool]] = MappingProxyType({}),
) -> dict[str, list[bool]]:
    """Whether each live edit of a lineage's head holds: whether the greedy answer to its prompt
    begins with its target. By version, a value for each of its edits.

    Args:
        view: computing as the head does.
        known: of versions that were asked already.
    """
    live = [version for version, _ in edited(chain) if version.id not in known]
    edits = {version.id: read_edits(work, version.manifest.recipe["edits"]) for version in live}
    asked = [pair for made in edits.values() for pair in asked_of(made)]
    matches = iter(greedy_matches(view, asked))
    found = {key: [next(matches) for _ in made] for key, made in edits.items()}
    return {key: list(value) for key, value in known.items()} | found


def read_edits(work: Work, digest: str | None) -> list[EditRequest]:
    """The edits that an artifact holds; none without one."""
    if digest is None:
        return []
    return [EditRequest.from_json(row) for row in json.loads(work.artifacts.get(digest))]
