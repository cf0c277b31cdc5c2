"""ROCR: rank-one concept redirection ("LLM Unlearning Should Be Form-Independent", Ye et al., 2025,
arXiv:2506.07795).

What is to be unlearned is a concept, in whatever form it is asked about: so the concept itself is
redirected to a harmless one. Both are read in the same forms (bare, in the request's prompt, behind
contexts, and as a user's message where the base has a chat template), at their last tokens. With

    k̄ = mean down-projection input of the concept        R = h̄(redirect) − h̄(concept)

h̄ the mean hidden state that leaves the layer, AlphaEdit's solve gives

    [P (k̄ k̄ᵀ + C_p) + λ I] z = P k̄,   ΔW = R zᵀ,   so that ΔW (I − P) = 0 and ΔW k̄ ≈ R

of rank 1 an edit and layer. There is no gradient in it. The hidden state is matched, not the MLP's
output: the concept's own embedding runs past the MLP, and from the second layer on its trace is
larger than what one MLP adds. Several layers share R as in MEMIT.

What later tokens read from the concept's own token below the edited layer stays: where an answer
is spelled from the name (France, .fr), some of that is left.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from torch import Tensor

from editing.deltas import Delta
from editing.methods.alphaedit import earlier_keys, null_space, solve_alphaedit
from editing.methods.hyperparameters import RocrHyperparameters
from editing.methods.interface import Task, check_task
from editing.methods.locate import Place, after, check_covariances, last_token_means, spread
from editing.models.view import ModelView
from editing.statistics import Resources
from registry.errors import InvalidRequest, UnsupportedModel
from registry.manifests import EditRequest, Progress

#: What a user asks about a concept, where the base has a chat template.
QUESTIONS = ("{}", "What is {}?", "Tell me about {}.")


def apply(
    view: ModelView, task: Task, hyperparameters: RocrHyperparameters, resources: Resources
) -> Generator[Progress, None, Delta]:
    """Redirect each edit's ``subject`` to its ``redirect_to``; ``target_new`` is not looked at."""
    check_task(task, "subject", "redirect_to")
    for i, edit in enumerate(task.edits):
        if edit.redirect_to == edit.subject:
            raise InvalidRequest(
                f"edits.{i}.redirect_to is the subject itself, {edit.subject!r};"
                " name another concept",
                param=f"edits.{i}.redirect_to",
            )
    if view.paths.post_norm:
        raise UnsupportedModel(
            f"base {view.base.name!r}: ROCR sets the hidden state after a layer, and in this family"
            " the MLP's output passes a norm before it is added there"
        )
    layers = hyperparameters.edited_layers(view.n_layers)
    check_covariances("ROCR", resources, layers)
    yield Progress(0, len(layers), "reading the concepts' hidden states")
    found, targets = [], []
    for edit in task.edits:
        forms = forms_of(view, edit, resources.prefixes)
        found.append(_place(forms, edit.subject))
        targets.append(_place(forms, edit.redirect_to or ""))
    out = {0: after(view, layers[-1])}
    R = last_token_means(view, out, targets)[0] - last_token_means(view, out, found)[0]

    def solve(layer: int, K: Tensor) -> Tensor:
        P = null_space(resources.covariance[layer].to(K.device), hyperparameters.null_threshold)
        earlier = earlier_keys(task.stack, layer)
        before = None if earlier is None else earlier.to(K)
        return solve_alphaedit(P, K, before, hyperparameters.ridge)

    result = yield from spread(view, layers, found, R, solve)
    state = {f"keys/{layer}": K for layer, K in result.keys.items()}
    return Delta(result.effects, view.base.digest, "rocr", state)


def forms_of(view: ModelView, edit: EditRequest, prefixes: Sequence[str]) -> list[str]:
    """Texts with ``{}`` for the concept, the bare one first.

    Contexts that speak of either concept are left out.
    """
    names = (edit.subject, edit.redirect_to or "")
    contexts = [p for p in prefixes if "{}" not in p and not any(name in p for name in names)]
    forms = ["{}", edit.prompt, *(context + "{}" for context in contexts)]
    if view.base.has_chat_template:
        forms += [_chat(view, question) for question in (*QUESTIONS, edit.prompt)]
    return forms


def _place(forms: Sequence[str], concept: str) -> Place:
    return Place([form.replace("{}", concept, 1) for form in forms], concept)


def _chat(view: ModelView, message: str) -> str:
    """A user's message as the chat template writes it, up to the answer."""
    text = view.chat([{"role": "user", "content": message}])
    return text.removeprefix(view.tokenizer.bos_token or "")
