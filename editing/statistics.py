"""What editing needs of a base: texts, the covariance of layer inputs, context prefixes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from editing.metrics.perplexity import me_ppl
from editing.models.generation import generate
from editing.models.view import ModelView
from registry.errors import JobFailed
from registry.manifests import Progress

SAMPLE_BATCH = 512
SAMPLE_LENGTH = 64
TOKENS_PER_FORWARD = 8192
PREFIXES = 20
PREFIX_WORDS = 12
REFERENCES = 100
TEXTS = 4000


@dataclass(frozen=True)
class Resources:
    """Statistics of one base, made once and kept.

    Attributes:
        covariance: by layer, C = E[k kᵀ] [in, in] of the MLP down-projection's input, fp32.
        tokens: how many tokens C was estimated on.
        prefixes: short texts that an edit's prompt is put behind.
        texts: some of the texts of C, among which tokens like a subject's are looked for.
        references: texts held out from all of the above, for perplexity.
        warning: what is weak about these statistics; empty where nothing is.
    """

    covariance: Mapping[int, Tensor]
    tokens: int
    prefixes: tuple[str, ...]
    texts: tuple[str, ...]
    references: tuple[str, ...]
    warning: str = ""

    def to_bytes(self) -> bytes:
        words = {
            "tokens": self.tokens,
            "prefixes": self.prefixes,
            "texts": self.texts,
            "references": self.references,
            "warning": self.warning,
        }
        tensors = {f"covariance/{layer}": C.contiguous() for layer, C in self.covariance.items()}
        encoded = json.dumps(words, sort_keys=True).encode()
        return save_tensors(
            {**tensors, "words": torch.frombuffer(bytearray(encoded), dtype=torch.uint8)}
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Resources:
        tensors = load_tensors(data)
        words = json.loads(tensors.pop("words").numpy().tobytes())
        return cls(
            covariance={int(name.removeprefix("covariance/")): C for name, C in tensors.items()},
            tokens=words["tokens"],
            prefixes=tuple(words["prefixes"]),
            texts=tuple(words["texts"]),
            references=tuple(words["references"]),
            warning=words["warning"],
        )


def prepare(
    view: ModelView,
    layers: Sequence[int],
    tokens: int,
    texts: Sequence[str] | None = None,
    seed: int = 0,
) -> Generator[Progress, None, Resources]:
    """Gather a base's resources from ``texts`` or, without any, from what the base itself writes.

    ``tokens`` is how many tokens C is to be estimated on; with fewer at hand all are used and
    ``warning`` says so.

    Raises:
        JobFailed: there is no text.
    """
    sampled = texts is None
    if texts is None:
        texts = yield from sample_texts(view, tokens, seed)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise JobFailed(
            f"base {view.base.name!r}: there is no text to estimate C on; let ERRATA_TEXTS name a"
            " file with a text on each line"
        )
    held_out = min(2 * REFERENCES if sampled else REFERENCES, len(texts) // 5)
    references, texts = texts[:held_out], texts[held_out:]
    if sampled:
        references = likelier_half(view, references)
    rows = [view.excerpt(text) for text in texts]
    covariance, count = yield from estimate_covariance(view, layers, rows, tokens)
    warning = ""
    if count < tokens:
        warning = (
            f"base {view.base.name!r}: C was estimated on {count} tokens, {tokens} were asked for;"
            " edits may disturb their neighbourhood, give more reference texts (ERRATA_TEXTS)"
        )
        yield Progress(count, tokens, warning)
    prefixes = tuple(dict.fromkeys(_prefix(text) for text in texts))[:PREFIXES]
    return Resources(covariance, count, prefixes, tuple(texts[:TEXTS]), tuple(references), warning)


def sample_texts(
    view: ModelView, tokens: int, seed: int = 0
) -> Generator[Progress, None, list[str]]:
    """Texts of about ``tokens`` tokens in all, written by the base at temperature 1."""
    texts: list[str] = []
    count = batch = 0
    start = view.start
    length = min(SAMPLE_LENGTH, view.base.context_length - len(start))
    wanted = max(8, min(SAMPLE_BATCH, tokens // 16))
    while count < tokens and batch * wanted < 4 * tokens:
        rows = generate(view, [start] * wanted, length, temperature=1.0, seed=seed + batch)
        batch += 1
        count += sum(map(len, rows))
        texts += view.tokenizer.batch_decode(rows, skip_special_tokens=True)
        yield Progress(min(count, tokens), tokens, "sampling texts from the base")
    return [text.strip() for text in texts if text.strip()]


def likelier_half(view: ModelView, texts: Sequence[str]) -> list[str]:
    """Without slips of the sampling: one of them would outweigh all others in ME-PPL."""
    ranked = sorted(texts, key=lambda text: me_ppl(view, [text]) or math.inf)
    return ranked[: len(texts) // 2]


@torch.no_grad()
def estimate_covariance(
    view: ModelView, layers: Sequence[int], rows: Sequence[Sequence[int]], tokens: int
) -> Generator[Progress, None, tuple[dict[int, Tensor], int]]:
    """C = E[k kᵀ] of each layer's down-projection input, over the first ``tokens`` tokens of rows.

    Sums are kept in fp64. Returns C by layer and the number of tokens.
    """
    paths = {layer: view.down_proj(layer) for layer in sorted(set(layers))}
    sums: dict[int, Tensor] = {}
    count = 0
    for batch in _batches(rows, tokens):
        keep = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.bool)
        for i, row in enumerate(batch):
            keep[i, : len(row)] = True
        for layer, keys in view.inputs(paths, batch).items():
            k = keys[keep.to(keys.device)]
            total = (k.T @ k).double().cpu()
            sums[layer] = sums[layer] + total if layer in sums else total
        count += int(keep.sum())
        yield Progress(min(count, tokens), tokens, "estimating the covariance of layer inputs")
    return {layer: (total / max(count, 1)).float() for layer, total in sums.items()}, count


def _batches(
    rows: Sequence[Sequence[int]], tokens: int
) -> Generator[list[Sequence[int]], None, None]:
    """Rows of like length together, about ``TOKENS_PER_FORWARD`` padded tokens a batch."""
    chosen, count = [], 0
    for row in rows:
        if count >= tokens:
            break
        chosen.append(row)
        count += len(row)
    batch: list[Sequence[int]] = []
    for row in sorted((r for r in chosen if r), key=len):
        if batch and (len(batch) + 1) * len(row) > TOKENS_PER_FORWARD:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _prefix(text: str) -> str:
    """The first sentence of a text where it is short, else its first words."""
    words = re.split(r"(?<=[.!?])\s", text)[0].split()
    sentence = " ".join(words[:PREFIX_WORDS])
    return sentence + (" " if sentence[-1] in ".!?" else ". ")
