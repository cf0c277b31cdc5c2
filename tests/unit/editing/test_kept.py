"""Places like an edit's: found where a linear is given the same, on other topics alone."""

from collections.abc import Sequence

import torch

from editing.methods.kept import NEAR_TOKENS, near, unaffected, whole
from editing.methods.locft import said_row
from editing.metrics.targets import TOKENS_PER_FORWARD
from editing.models import ModelView
from editing.models.resuming import Point, Resuming
from registry.manifests import EditRequest
from tests.unit.editing.conftest import small_view

PERU = EditRequest("The capital of {} is", "Peru", "Rome", "Lima")
ZINC = EditRequest("{} has the symbol", "Zinc", "Neon")


def test_texts_that_state_an_edited_fact_are_not_kept() -> None:
    plain = EditRequest("Water boils at", target_new="50")
    texts = ["The capital of Peru is Lima.", "Peru lies in America.", "Lima", "Zinc is Zn."]
    assert unaffected(texts, [PERU, plain]) == texts[1:]
    assert unaffected(texts, [ZINC]) == texts[:-1]  # its true target is not given


def test_a_text_is_kept_whole_but_for_its_end(atlas: ModelView) -> None:
    ((ids, watched),) = whole(atlas, ["Peru lies in America.", ""])
    assert ids == atlas.encode("Peru lies in America.")
    assert list(watched) == list(range(len(ids) - 1))


def test_the_nearest_places_are_found(atlas: ModelView) -> None:
    """By cosine over all tokens of all texts, taken one text at a time; no edited topic's."""
    resuming = Resuming(atlas, 3)
    texts = ["The capital of France is Paris.", "Zinc is a metal.", "The capital of Peru is Lima."]
    prompt = atlas.encode("The capital of Peru is")
    said = [([*prompt, 1, 2], range(len(prompt) - 1, len(prompt) + 1))]
    rows = near(resuming, said, [PERU], texts, 1)
    path = resuming.path
    key = atlas.inputs({0: path}, [prompt])[0][0, -1]
    cosines = {
        (text, t): float(torch.cosine_similarity(keys[t], key, dim=0))
        for text in texts[:2]
        for keys in [atlas.inputs({0: path}, [atlas.encode(text)])[0][0]]
        for t in range(len(atlas.encode(text)) - 1)
    }
    text, start = max(cosines, key=lambda place: cosines[place])
    ids = atlas.encode(text)
    stop = min(start + NEAR_TOKENS, len(ids) - 1)
    assert rows == [(ids, range(start, stop))]
    assert text == texts[0]
    assert len(near(resuming, said, [PERU], texts, 9)) <= 2


def test_nothing_is_near_without_texts(atlas: ModelView) -> None:
    view = small_view("gpt2", atlas)
    said = [(view.encode("Zinc has the symbol Neon"), range(3, 4))]
    assert near(Resuming(view, 1), said, [ZINC], ["Zinc is Zn."], 4) == []
    assert near(Resuming(view, 1), said, [ZINC], [], 4) == []


class Counting(Resuming):
    """Remembers the most tokens whose points were asked for at once."""

    most = 0

    def points(self, rows: Sequence[Sequence[int]]) -> list[Point]:
        self.most = max(self.most, sum(map(len, rows)))
        return super().points(rows)


def test_points_of_few_edits_are_there_at_once(atlas: ModelView) -> None:
    view = small_view("gpt2", atlas)
    resuming = Counting(view, 1, room=0)
    edits = [EditRequest("{} is called", f"Land {i}", "Peru") for i in range(1000)]
    said = [said_row(view, edit.rewrite_prompt, edit.target_new, None) for edit in edits]
    assert sum(len(ids) for ids, _ in said) > TOKENS_PER_FORWARD
    assert near(resuming, said, edits, ["Zinc is a metal."], 1)
    assert resuming.most <= TOKENS_PER_FORWARD
