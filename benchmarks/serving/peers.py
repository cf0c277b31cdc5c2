"""The peers: each way of serving ragged prompts that the libraries offer, at its best settings.

A peer is a contestant (benchmarks.serving.timing). Where a peer has settings, it comes as variants
by name, and the quickest of them runs against the engine.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from benchmarks.serving.timing import Contestant, Prompts
from editing.deltas import Effect
from editing.models.loading import load_model
from registry.bases import Base

#: Rows of a batch of prompts that stand sorted by length.
SORTED_BATCHES = (4, 8)


def load_peer(base: Base, dtype: str) -> PreTrainedModel:
    """A model of its own with the same weights, on the engine's device: nothing of the engine hangs
    on it."""
    model = load_model(base, dtype)
    model.set_attn_implementation("sdpa")
    if torch.cuda.is_available():
        model.to("cuda")  # type: ignore[arg-type]
    return model


def _placed(model: PreTrainedModel, run: Contestant) -> Contestant:
    """Let a contestant make its tensors on the model's device."""
    if model.device.type == "cpu":
        return run

    def placed(prompts: Prompts) -> list[list[int]]:
        with torch.device(model.device):
            return run(prompts)

    return placed


# -- prefill: the first token of each prompt --------------------------------------------------


def one_by_one(model: PreTrainedModel) -> Contestant:
    @torch.inference_mode()
    def run(prompts: Prompts) -> list[list[int]]:
        firsts = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
            firsts.append([int(logits[0, -1].argmax())])
        return firsts

    return _placed(model, run)


def padded(model: PreTrainedModel) -> dict[str, Contestant]:
    """All prompts in one batch, padded right, where causal attention needs no mask: quicker than
    padding left with a mask, as ``generate`` does."""
    return {"padded right": _padded_right(model)}


def sorted_padded(model: PreTrainedModel) -> dict[str, Contestant]:
    """Padded right, the quicker way, in small batches of prompts of like length."""
    run = _padded_right(model)
    return {f"{size} a batch": _sorted_in(size, run) for size in SORTED_BATCHES}


def bins(model: PreTrainedModel, capacity: int) -> Contestant:
    """Prepacking (arXiv:2404.09529): prompts packed first-fit-decreasing into bins of
    ``capacity``, one batch of bins under a block-diagonal causal mask, positions restarted."""

    @torch.inference_mode()
    def run(prompts: Prompts) -> list[list[int]]:
        packed = first_fit_decreasing([len(prompt) for prompt in prompts], capacity)
        width = max(sum(len(prompts[i]) for i in members) for members in packed)
        ids = torch.zeros(len(packed), width, dtype=torch.long)
        positions = torch.zeros(len(packed), width, dtype=torch.long)
        owner = torch.full((len(packed), width), -1)
        ends: dict[int, tuple[int, int]] = {}
        for row, members in enumerate(packed):
            place = 0
            for i in members:
                stop = place + len(prompts[i])
                ids[row, place:stop] = torch.tensor(prompts[i])
                positions[row, place:stop] = torch.arange(stop - place)
                owner[row, place:stop] = i
                ends[i] = (row, stop - 1)
                place = stop
        mask = (owner[:, :, None] == owner[:, None, :]).tril()
        hidden = model.base_model(
            input_ids=ids, position_ids=positions, attention_mask=mask[:, None], use_cache=False
        ).last_hidden_state
        rows, columns = zip(*(ends[i] for i in range(len(prompts))), strict=True)
        return _firsts(model, hidden[list(rows), list(columns)])

    return _placed(model, run)


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices by bin: the largest first, each into the first bin that has room."""
    packed: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = next((n for n, free in enumerate(room) if free >= sizes[index]), len(packed))
        if place == len(packed):
            packed.append([])
            room.append(capacity)
        packed[place].append(index)
        room[place] -= sizes[index]
    return packed


def linears_alone(model: PreTrainedModel) -> dict[str, Contestant]:
    """The layers' linear modules on as many rows as the prompts have tokens, nothing else.

    ``products`` writes into memory that is kept, ``modules`` calls the modules.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    modules = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
    kept: dict[tuple[str, int, int], Tensor] = {}

    def rows(side: str, count: int, features: int) -> Tensor:
        if (side, count, features) not in kept:
            kept[side, count, features] = torch.randn(count, features).to(model.dtype)
        return kept[side, count, features]

    @torch.inference_mode()
    def products(prompts: Prompts) -> list[list[int]]:
        count = sum(map(len, prompts))
        for module in modules:
            is_linear = isinstance(module, nn.Linear)
            weight = module.weight.T if is_linear else module.weight
            x, out = rows("in", count, weight.shape[0]), rows("out", count, weight.shape[1])
            if module.bias is None:
                torch.mm(x, weight, out=out)
            else:
                torch.addmm(module.bias, x, weight, out=out)
        return []

    @torch.inference_mode()
    def called(prompts: Prompts) -> list[list[int]]:
        count = sum(map(len, prompts))
        for module in modules:
            features = module.in_features if isinstance(module, nn.Linear) else module.nx
            module(rows("in", count, features))
        return []

    return {"products": _placed(model, products), "modules": _placed(model, called)}


def _padded_right(model: PreTrainedModel) -> Contestant:
    @torch.inference_mode()
    def run(prompts: Prompts) -> list[list[int]]:
        ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        ends = [len(prompt) - 1 for prompt in prompts]
        return _firsts(model, hidden[range(len(prompts)), ends])

    return _placed(model, run)


def _firsts(model: PreTrainedModel, hidden: Tensor) -> list[list[int]]:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return [[token] for token in head(hidden).argmax(-1).tolist()]


def _left(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Ids and mask [prompts, longest], padded left with zeros."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def _sorted_in(size: int, run: Contestant) -> Contestant:
    def sorted_run(prompts: Prompts) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            found |= zip(chosen, run([prompts[i] for i in chosen]), strict=True)
        return [found[i] for i in range(len(prompts))]

    return sorted_run


# -- generation -------------------------------------------------------------------------------


def padded_generate(model: PreTrainedModel, new_tokens: int) -> Contestant:
    """``generate`` on all prompts in one batch, padded left."""
    options = _greedy(new_tokens, eos=None)

    @torch.inference_mode()
    def run(prompts: Prompts) -> list[list[int]]:
        ids, mask = _left(prompts)
        whole: Any = model.generate(ids, attention_mask=mask, generation_config=options)  # type: ignore[operator]
        new: list[list[int]] = whole[:, ids.shape[1] :].tolist()
        return new

    return _placed(model, run)


class ContinuousBatching:
    """transformers' continuous batching, what ``generate_batch`` runs, its pool kept between calls
    as the engine's is.

    One variant at a time holds the model; ``close`` ends it.
    """

    #: Rows of a step: more make a larger dense mask, fewer cut prompts in more parts.
    STEPS = (512, 1024)
    SETTINGS = ((512, 32), (512, 256), (1024, 256))  # with the tokens of a page

    def __init__(self, model: PreTrainedModel, new_tokens: int, capacity: int) -> None:
        self._model: Any = model
        self._options = _greedy(new_tokens, eos=-1)  # None would be a warning
        self._capacity = capacity
        self._held: tuple[ContinuousBatchingConfig, Any] | None = None

    def variants(self) -> dict[str, Contestant]:
        return {
            f"{tokens} tokens a step, pages of {page}": self._variant(tokens, page)
            for tokens, page in self.SETTINGS
        }

    def fewer_variants(self) -> dict[str, Contestant]:
        """One for each size of step."""
        return {f"{tokens} tokens a step": self._variant(tokens, 32) for tokens in self.STEPS}

    def close(self) -> None:
        if self._held is not None:
            self._held[1].destroy()
            self._held = None

    def _variant(self, tokens: int, page: int) -> Contestant:
        config = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=self._capacity // page + 64,
            max_batch_tokens=tokens,
            allow_block_sharing=False,  # nothing is shared here, and hashing costs time
            use_async_batching=False,
        )

        def run(prompts: Prompts) -> list[list[int]]:
            manager = self._manager(config)
            status = manager.background_thread_status
            status.clear()
            names = manager.add_requests(prompts, max_new_tokens=self._options.max_new_tokens)
            status.request_stop(status.FLUSH_AND_STOP, 0)  # when all are done
            # in this thread: another one would have a second team of OpenMP threads, and both
            # teams wait more slowly from then on
            manager._run_generation_loop()
            found: dict[str, list[int]] = {}
            while len(found) < len(prompts):
                answer = manager.get_result(timeout=0.01)
                if answer is None:
                    raise RuntimeError(f"continuous batching failed: {status.fatal_error}")
                if answer.is_finished():
                    found[answer.request_id] = list(answer.generated_tokens)
            return [found[name] for name in names]

        return run

    def _manager(self, config: ContinuousBatchingConfig) -> Any:
        if self._held is None or self._held[0] is not config:
            self.close()
            manager = self._model.init_continuous_batching(
                generation_config=self._options, continuous_batching_config=config
            )
            self._held = (config, manager)
        return self._held[1]


class MixedAdapters:
    """peft's mixed batches: every row of a padded batch names its LoRA adapter.

    Args:
        model: gets the adapters; give it a twin of its own.
        edits: rank-1 effects by module path, one mapping an adapter.
    """

    def __init__(
        self, model: PreTrainedModel, edits: Sequence[Mapping[str, Effect]], new_tokens: int
    ) -> None:
        from peft import LoraConfig, PeftModel, get_peft_model

        self._options = _greedy(new_tokens, eos=None)
        self._count = len(edits)
        self.model: Any = None
        for number, effects in enumerate(edits):
            targets = "|".join(re.escape(path) for path in effects)
            config = LoraConfig(r=1, lora_alpha=1, target_modules=rf"(.*\.)?({targets})")
            if self.model is None:
                with warnings.catch_warnings():  # the library asks for an old name of its own
                    warnings.simplefilter("ignore", FutureWarning)
                    self.model = get_peft_model(model, config, adapter_name="0")
            else:
                self.model.add_adapter(str(number), config)
        wrapped: PeftModel = self.model
        for number, effects in enumerate(edits):
            for path, effect in effects.items():
                if effect.A is None or effect.B is None:
                    raise ValueError(f"{path!r}: an adapter needs a low-rank effect")
                layer: Any = wrapped.get_base_model().get_submodule(path)
                layer.lora_A[str(number)].weight.data.copy_(effect.A)
                layer.lora_B[str(number)].weight.data.copy_(effect.B)
        wrapped.eval()

    def variants(self, sizes: Sequence[int]) -> dict[str, Contestant]:
        """Prompts sorted by length, ``size`` a batch."""
        return {f"sorted, {size} a batch": self._in_batches(size) for size in sizes}

    def _in_batches(self, size: int) -> Contestant:
        @torch.inference_mode()
        def run(prompts: Prompts) -> list[list[int]]:
            order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
            found: dict[int, list[int]] = {}
            for start in range(0, len(order), size):
                chosen = order[start : start + size]
                ids, mask = _left([prompts[i] for i in chosen])
                whole = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    adapter_names=[str(i % self._count) for i in chosen],
                    generation_config=self._options,
                )
                found |= zip(chosen, whole[:, ids.shape[1] :].tolist(), strict=True)
            return [found[i] for i in range(len(prompts))]

        return _placed(self.model, run)


def _greedy(new_tokens: int, eos: int | None) -> GenerationConfig:
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0
    )
