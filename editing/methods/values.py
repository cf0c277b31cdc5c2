"""What a layer's MLP must say at some tokens for edits to hold: many edits optimised as one batch.

An edit changes the output of one layer's MLP by c_t δ at token t. Everything below stays as it is,
and so does everything before the first token with c_t ≠ 0: both are computed once, and only the
layers above and the tokens from there on are run again for another δ. One Adam moves the δ of all
edits; each has its own loss, its own clamp, and leaves the batch as soon as it holds.

Where edits are written into the layer by a solution known beforehand, each text is changed by all
of them at once, Σ_i c_ti δ_i: what is optimised is then the edited model itself. An edit that held
comes back when the others, once they hold, have moved it.

The references (ROME, MEMIT) optimise one edit after another through the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from editing.models.view import ModelView, Tail
from registry.errors import JobFailed
from registry.manifests import EditRequest, Progress

#: Texts to keep that one step looks at, of each edit.
KEPT_BATCH = 8
#: From this probability of an answer's first token on, the model is about to state the fact.
ANSWERING = 0.02
#: Padded tokens of one forward and backward: at most so many, and from so many on texts that are
#: longer by a share stand apart.
CHUNK_TOKENS, APART_TOKENS, APART = 4096, 384, 1.2
#: Edits that held leave the batch once only this share of it still goes on.
COMPACT_AT = 0.8


class Descent(Protocol):
    """The hyperparameters of the descent."""

    @property
    def steps(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def stop_loss(self) -> float: ...
    @property
    def clamp(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def kl_factor(self) -> float: ...


@dataclass(frozen=True)
class Text:
    """A text that an edit changes.

    Attributes:
        ids: its tokens.
        watched: positions whose next token's prediction is looked at; none before ``start``.
        start: the first position that the edit changes.
        coefficient: c_t from ``start`` on [len(ids) - start]; or those of each edit's δ in its
            stead [len(ids) - start, edits].
    """

    ids: Sequence[int]
    watched: Sequence[int]
    start: int
    coefficient: Tensor


@dataclass(frozen=True)
class Goal:
    """One edit.

    Attributes:
        name: for progress.
        said: texts that end with the new target, watched where its tokens are predicted.
        kept: texts to keep, of which each step looks at ``KEPT_BATCH``.
        answers: first tokens of the edited fact as it is stated today. Where the model is about to
            say one of them nothing is kept.
        scale: ‖v‖, in which δ is measured: lengths differ by layer.
    """

    name: str
    said: Sequence[Text]
    kept: Sequence[Text]
    answers: Sequence[int]
    scale: float


@dataclass(frozen=True)
class Values:
    """Attributes:
    deltas: δ of each edit [edits, hidden].
    losses: the largest loss of a target token that each edit ended with [edits].
    steps: how many steps each edit took.
    """

    deltas: Tensor
    losses: Tensor
    steps: Sequence[int]


def optimise(
    view: ModelView, layer: int, goals: Sequence[Goal], descent: Descent
) -> Generator[Progress, None, Values]:
    """Adam on every δ until each target token of the edit is likely enough in every text.

    The loss of an edit is

        NLL(said) + kl_factor · (1 - t/T) · KL(before ‖ after) + decay · ‖δ‖/‖v‖

    with the KL summed over a text's watched positions and averaged over texts. Its weight falls
    with the step t, so that of edit and texts to keep, where they conflict, the edit wins.
    """
    count, width = len(goals), view.hidden_size
    scale = torch.tensor([goal.scale for goal in goals], device=view.device)[:, None]
    u = torch.zeros(count, width, device=view.device, requires_grad=True)
    adam = torch.optim.Adam([u], lr=descent.learning_rate / width**0.5)
    losses, steps = torch.zeros(count, device=view.device), [0] * count
    going = list(range(count))
    batch = _Batch(view, layer, goals, going)
    for step in range(descent.steps + 1):
        adam.zero_grad()
        losses[going] = batch.nll(scale * u)[going]
        going = [i for i in going if losses[i] >= descent.stop_loss]
        if not going and batch.is_joint:
            everyone = _Batch(view, layer, goals, range(count))
            losses = everyone.nll((scale * u).detach())
            going = [i for i in range(count) if losses[i] >= descent.stop_loss]
        yield Progress(
            *_share(count, len(going), step, descent.steps),
            _told(goals, going, losses, step),
            {
                "target_nll": losses.max().item(),
                "steps": float(step),
                "holding": float(count - len(going)),
                "length": u.detach().norm(dim=1).mean().item(),
            },
        )
        if not going or step == descent.steps:
            break
        if not set(going) <= set(batch.edits):
            batch = _Batch(view, layer, goals, going)
        elif len(going) <= COMPACT_AT * len(batch.edits):
            batch.keep(going)
        weight = descent.kl_factor * (1 - step / descent.steps)
        batch.kl(scale * u, step, weight)
        torch.autograd.backward(descent.decay * u.norm(dim=1).sum())
        before = u.detach().clone()
        adam.step()
        with torch.no_grad():
            u *= (descent.clamp / u.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
            held = sorted(set(range(count)) - set(going))
            u[held] = before[held]
        for i in going:
            steps[i] += 1
    return Values((scale * u).detach(), losses, steps)


@dataclass(frozen=True)
class Watched:
    """Token ids, the positions whose next token is looked at, and where δ stands."""

    ids: Sequence[int]
    watched: range
    places: Sequence[int]


def say(view: ModelView, prompt: str, target: str, subject: str = "") -> Watched:
    """The prompt with its target, watched where the target's tokens are predicted.

    δ stands at the subject's last tokens or, without one, at the prompt's last token.
    """
    before, after = view.continuation(prompt, target)
    watched = range(len(before) - 1, len(before) + len(after) - 1)
    places = view.last_tokens(prompt, subject) if subject else [watched.start]
    return Watched([*before, *after], watched, places)


def keep(view: ModelView, subject: str, texts: Sequence[str]) -> list[Watched]:
    """Texts about a subject, watched from its last token on."""
    kept = []
    for text in texts:
        ids, ends = view.encode(text), view.last_tokens(text, subject)
        if ends and ends[0] < len(ids) - 1:
            kept.append(Watched(ids, range(ends[0], len(ids) - 1), ends))
    return kept


def at_token(view: ModelView, texts: Sequence[Watched]) -> list[Text]:
    """Texts changed by δ itself at their places and nowhere else, as in MEMIT."""
    made = []
    for text in texts:
        start = text.places[0]
        coefficient = torch.zeros(len(text.ids) - start, device=view.device)
        coefficient[[place - start for place in text.places]] = 1
        made.append(Text(text.ids, text.watched, start, coefficient))
    return made


def by_key(view: ModelView, layer: int, a: Tensor, texts: Sequence[Watched]) -> list[Text]:
    """Texts changed as a low-rank effect changes them: what is optimised is then exactly the
    edited model.

    Args:
        a: the effect's key [in], which changes token t by (a·k_t) δ; or Z [in, edits], which
            changes it by Σ_i (z_i·k_t) δ_i.
    """
    if not texts:
        return []
    keys = view.inputs({layer: view.down_proj(layer)}, [text.ids for text in texts])[layer]
    return [
        Text(text.ids, text.watched, 0, keys[row, : len(text.ids)] @ a)
        for row, text in enumerate(texts)
    ]


def check_finite(method: str, edits: Sequence[EditRequest], deltas: Tensor) -> None:
    """Raises JobFailed where the descent came to nothing: names the edit and what helps."""
    for place, delta in enumerate(deltas):
        if not bool(torch.isfinite(delta).all()):
            raise JobFailed(
                f"{method}: the value found for {edits[place].rewrite_prompt!r} is not finite;"
                " lower hyperparameters.learning_rate"
            )


class _Batch:
    """The texts of the edits that still go on, in chunks ready to be run from the edited layer."""

    def __init__(
        self, view: ModelView, layer: int, goals: Sequence[Goal], edits: Sequence[int]
    ) -> None:
        self.edits = tuple(edits)
        self.is_joint = goals[0].said[0].coefficient.dim() == 2
        self._count = len(goals)
        self._view, self._layer = view, layer
        said = [(i, text) for i in edits for text in goals[i].said]
        tokens = Counter(i for i, text in said for _ in text.watched)
        self._said = [_chunk(view, layer, part, tokens) for part in _chunks(said)]
        ordered = {i: sorted(goals[i].kept, key=lambda text: len(text.ids)) for i in edits}
        self._kept = [
            [(i, text) for i in edits for text in _part(ordered[i], place)]
            for place in range(max(-(-len(texts) // KEPT_BATCH) for texts in ordered.values()))
        ]
        self._answers = [goal.answers for goal in goals]
        self._ready: dict[int, list[_Chunk]] = {}

    def keep(self, edits: Sequence[int]) -> None:
        """Go on with some of the edits alone."""
        self.edits = tuple(edits)
        chosen = torch.zeros(self._count, dtype=torch.bool, device=self._view.device)
        chosen[list(edits)] = True
        self._said = _selected(self._said, chosen)
        self._ready = {place: _selected(chunks, chosen) for place, chunks in self._ready.items()}
        self._kept = [[(i, text) for i, text in texts if chosen[i]] for texts in self._kept]

    def nll(self, deltas: Tensor) -> Tensor:
        """The largest loss of a target token by edit [edits]; adds the gradient of each mean."""
        largest = torch.full((self._count,), -1.0, device=deltas.device)
        held = deltas.detach().requires_grad_()
        for chunk in self._said:
            logits = self._view.logits(chunk.hidden(held))
            loss = F.cross_entropy(logits, chunk.targets, reduction="none")
            if deltas.requires_grad:
                torch.autograd.backward((loss * chunk.weights).sum())
            largest.scatter_reduce_(0, chunk.owners, loss.detach(), "amax")
        if deltas.requires_grad:
            torch.autograd.backward(deltas, held.grad)
        return largest

    def kl(self, deltas: Tensor, step: int, weight: float) -> None:
        """Adds the gradient of ``weight`` times KL(before ‖ after) of this step's texts."""
        if not self._kept or weight == 0:
            return
        held = deltas.detach().requires_grad_()
        for chunk in self._chunks_to_keep(step % len(self._kept)):
            after = self._view.logits(chunk.hidden(held)).log_softmax(-1)
            kl = F.kl_div(after, chunk.before, reduction="none", log_target=True).sum(-1)
            torch.autograd.backward(weight * (kl * chunk.weights).sum())
        if held.grad is not None:
            torch.autograd.backward(deltas, held.grad)

    def _chunks_to_keep(self, place: int) -> list[_Chunk]:
        """Chunks of the texts to keep at a place, with their log-probabilities before."""
        if place not in self._ready:
            texts = self._kept[place]
            counts = Counter(i for i, _ in texts)
            chunks = [_chunk(self._view, self._layer, part, counts) for part in _chunks(texts)]
            self._ready[place] = [self._watch(chunk) for chunk in chunks]
        return self._ready[place]

    @torch.no_grad()
    def _watch(self, chunk: _Chunk) -> _Chunk:
        """With its log-probabilities, and without positions that are about to state the fact."""
        nothing = torch.zeros(self._count, self._view.hidden_size, device=self._view.device)
        before = self._view.logits(chunk.hidden(nothing)).log_softmax(-1)
        stating = torch.zeros(len(before), dtype=torch.bool, device=before.device)
        for i in set(chunk.owners.tolist()):
            if self._answers[i]:
                likely = before[:, list(self._answers[i])].exp().amax(-1) >= ANSWERING
                stating |= likely & (chunk.owners == i)
        return replace(chunk, before=before).watching(~stating)


@dataclass(frozen=True)
class _Chunk:
    """Texts that run together, each changed by its own edit, and m positions that are watched.

    Attributes:
        tail: what is run again.
        coefficient: of each text [n, T], or of each edit in each text [n, T, edits].
        edits: the edit of each text [n].
        rows: the text of each watched position [m], and ``positions`` the place in it.
        targets: the token that follows it [m].
        weights: of its loss [m].
        before: log-probabilities of the unedited model there [m, vocabulary], of texts to keep.
    """

    tail: Tail
    coefficient: Tensor
    edits: Tensor
    rows: Tensor
    positions: Tensor
    targets: Tensor
    weights: Tensor
    before: Tensor

    @property
    def owners(self) -> Tensor:
        """The edit of each watched position [m]."""
        return self.edits[self.rows]

    def hidden(self, deltas: Tensor) -> Tensor:
        """Last hidden states at the watched positions, each text changed by its edit's δ."""
        if self.coefficient.dim() == 3:
            change = self.coefficient @ deltas
        else:
            change = self.coefficient[..., None] * deltas[self.edits][:, None]
        return self.tail.run(change)[self.rows, self.positions]

    def watching(self, which: Tensor) -> _Chunk:
        """With some of the positions watched alone."""
        named = ("rows", "positions", "targets", "weights", "before")
        return replace(self, **{n: p[which] for n in named if len(p := getattr(self, n))})

    def select(self, chosen: Tensor) -> _Chunk:
        """With the texts of some edits alone; ``chosen`` is a flag by edit."""
        rows = chosen[self.edits].nonzero()[:, 0]
        places = torch.full_like(self.edits, -1)
        places[rows] = torch.arange(len(rows), device=rows.device)
        watching = self.watching(chosen[self.owners])
        return replace(
            watching,
            tail=self.tail.select(rows),
            coefficient=self.coefficient[rows],
            edits=self.edits[rows],
            rows=places[watching.rows],
        )


def _chunk(
    view: ModelView, layer: int, texts: Sequence[tuple[int, Text]], shares: Mapping[int, int]
) -> _Chunk:
    """A chunk of texts, each with its edit; a position's weight is one by its edit's share."""
    width = max(len(text.coefficient) for _, text in texts)
    places = [
        (row, p - text.start, text.ids[p + 1] if p + 1 < len(text.ids) else 0)
        for row, (_, text) in enumerate(texts)
        for p in text.watched
    ]
    rows, positions, targets = torch.tensor(places, device=view.device).T
    weights = [1 / shares[i] for i, text in texts for _ in text.watched]
    return _Chunk(
        tail=view.tail(layer, [text.ids for _, text in texts], [text.start for _, text in texts]),
        coefficient=torch.stack([_padded(text.coefficient, width) for _, text in texts]),
        edits=torch.tensor([i for i, _ in texts], device=view.device),
        rows=rows,
        positions=positions,
        targets=targets,
        weights=torch.tensor(weights, device=view.device),
        before=torch.zeros(0, device=view.device),
    )


def _selected(chunks: Sequence[_Chunk], chosen: Tensor) -> list[_Chunk]:
    """The chunks with the texts of some edits alone."""
    return [chunk.select(chosen) for chunk in chunks if bool(chosen[chunk.edits].any())]


def _chunks(texts: Sequence[tuple[int, Text]]) -> Generator[list[tuple[int, Text]], None, None]:
    """Texts of like length together: what is padded is computed in vain."""
    chunk: list[tuple[int, Text]] = []
    for entry in sorted(texts, key=lambda entry: len(entry[1].coefficient)):
        width = len(entry[1].coefficient)
        if chunk:
            shortest = len(chunk[0][1].coefficient)
            is_apart = width > APART * shortest and len(chunk) * shortest >= APART_TOKENS
            if is_apart or (len(chunk) + 1) * width > CHUNK_TOKENS:
                yield chunk
                chunk = []
        chunk.append(entry)
    if chunk:
        yield chunk


def _part(texts: Sequence[Text], place: int) -> Sequence[Text]:
    """The place-th batch of an edit's texts; it begins again after the last."""
    if not texts:
        return ()
    batches = -(-len(texts) // KEPT_BATCH)
    start = place % batches * KEPT_BATCH
    return texts[start : start + KEPT_BATCH]


def _padded(coefficient: Tensor, width: int) -> Tensor:
    """Zeros after the last token."""
    rows = torch.zeros(width, *coefficient.shape[1:], device=coefficient.device)
    rows[: len(coefficient)] = coefficient
    return rows


def _share(count: int, going: int, step: int, total: int) -> tuple[int, int]:
    """Done and total of a progress, in steps of all edits."""
    return (count - going) * total + step * going, count * total


def _told(goals: Sequence[Goal], going: Sequence[int], losses: Tensor, step: int) -> str:
    if len(goals) == 1:
        return f"{goals[0].name}: loss {losses[0].item():.2f} after {step} steps"
    return f"{len(goals) - len(going)} of {len(goals)} edits hold after {step} steps"
