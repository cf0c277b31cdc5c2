"""A base with its tokenizer, seen as the parts that methods and metrics work with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from editing.deltas import Effect
from registry.bases import Base
from registry.errors import InvalidRequest, UnsupportedModel


@dataclass(frozen=True)
class Paths:
    """Where a family keeps its parts.

    Attributes:
        layers: the list of layers.
        last: what runs after the layers, in order; a model may lack some of it.
        down_proj: a layer's MLP down-projection.
        gate_proj: a layer's linear whose output goes through the MLP's activation: the gate of a
            gated MLP, else the up-projection. Its rows are the MLP's neurons.
        o_proj: a layer's attention output projection.
        mlp: a layer's whole MLP; empty where the family has no module of its own for it.
        mlp_norm: the norm whose output the MLP reads.
        post_norm: the norm of a layer that its MLP's output passes through; empty where the
            output is added to the residual stream as it is.
    """

    layers: str
    last: tuple[str, ...]
    down_proj: str
    gate_proj: str
    o_proj: str
    mlp: str
    mlp_norm: str
    post_norm: str = ""


_LLAMA = Paths(
    "model.layers",
    ("model.norm",),
    down_proj="mlp.down_proj",
    gate_proj="mlp.gate_proj",
    o_proj="self_attn.o_proj",
    mlp="mlp",
    mlp_norm="post_attention_layernorm",
)
_GEMMA = replace(
    _LLAMA, mlp_norm="pre_feedforward_layernorm", post_norm="post_feedforward_layernorm"
)
PATHS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": Paths(
        "transformer.h",
        ("transformer.ln_f",),
        down_proj="mlp.c_proj",
        gate_proj="mlp.c_fc",
        o_proj="attn.c_proj",
        mlp="mlp",
        mlp_norm="ln_2",
    ),
    "gpt_neox": Paths(
        "gpt_neox.layers",
        ("gpt_neox.final_layer_norm",),
        down_proj="mlp.dense_4h_to_h",
        gate_proj="mlp.dense_h_to_4h",
        o_proj="attention.dense",
        mlp="mlp",
        mlp_norm="post_attention_layernorm",
    ),
    "opt": Paths(
        "model.decoder.layers",
        ("model.decoder.final_layer_norm", "model.decoder.project_out"),
        down_proj="fc2",
        gate_proj="fc1",
        o_proj="self_attn.out_proj",
        mlp="",
        mlp_norm="final_layer_norm",
    ),
    "phi": Paths(
        "model.layers",
        ("model.final_layernorm",),
        down_proj="mlp.fc2",
        gate_proj="mlp.fc1",
        o_proj="self_attn.dense",
        mlp="mlp",
        mlp_norm="input_layernorm",
    ),
}


@dataclass(frozen=True)
class ModelView:
    """Reads a model and adds effects by hooks; the base's weights are never written."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    base: Base

    @property
    def paths(self) -> Paths:
        if self.base.family not in PATHS:
            raise UnsupportedModel(
                f"base {self.base.name!r}: editing does not know the family {self.base.family!r};"
                f" it knows {', '.join(PATHS)}"
            )
        paths = PATHS[self.base.family]
        if self.base.family == "opt" and not self.model.config.do_layer_norm_before:
            paths = replace(paths, mlp_norm="self_attn_layer_norm", post_norm="final_layer_norm")
        return paths

    @property
    def layers(self) -> nn.ModuleList:
        layers = self.module(self.paths.layers)
        if not isinstance(layers, nn.ModuleList):
            raise UnsupportedModel(
                f"base {self.base.name!r}: {self.paths.layers} holds no list of layers"
            )
        return layers

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def down_proj(self, layer: int) -> str:
        """The path of a layer's MLP down-projection. Raises what ``part`` raises."""
        return self.part(layer, "down_proj")

    def part(self, layer: int, name: str) -> str:
        """The path of a layer's part, by its name in ``Paths``: ``o_proj``, ``mlp_norm``, …

        Raises:
            InvalidRequest: the model has no such layer.
            UnsupportedModel: the family has no module for that part.
        """
        if not 0 <= layer < self.n_layers:
            raise InvalidRequest(
                f"layer {layer}: base {self.base.name!r} has layers 0 to {self.n_layers - 1}",
                param="hyperparameters.layer",
            )
        found: str = getattr(self.paths, name)
        if not found:
            raise UnsupportedModel(
                f"base {self.base.name!r}: the family {self.base.family!r} has no module {name}"
            )
        return f"{self.paths.layers}.{layer}.{found}"

    def weight(self, path: str) -> Tensor:
        """A linear's weight as [out, in], whichever way the family stores it."""
        module = self.module(path)
        weight = module.weight
        if not isinstance(weight, Tensor):
            raise UnsupportedModel(f"{path} has no weight")
        return weight.T if isinstance(module, Conv1D) else weight

    def matrix(self, path: str) -> Tensor | None:
        """A module's weight [out, in] as effects see it; None for a module without one.

        An embedding takes one-hot rows; a norm's weight is [out, 1].
        """
        module = self.module(path)
        if not isinstance(getattr(module, "weight", None), Tensor):
            return None
        weight = self.weight(path)
        if isinstance(module, nn.Embedding):
            return weight.T
        return weight[:, None] if weight.dim() == 1 else weight

    @contextmanager
    def with_effects(self, composed: Mapping[str, Effect]) -> Iterator[None]:
        """Within the block the model computes with these effects on top of those already active."""
        with ExitStack() as hooks:
            for path, effect in composed.items():
                hook = self.module(path).register_forward_hook(_adding(effect, self.device))
                hooks.callback(hook.remove)
            yield

    # -- tokens ---------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens that the tokenizer puts around a text."""
        return list(self.tokenizer(text)["input_ids"])

    def excerpt(self, text: str) -> list[int]:
        """As ``encode``, without what is beyond the base's context."""
        return self.encode(text)[: self.base.context_length]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens and surrounding white space."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return str(text).strip()

    def open(self, text: str) -> list[int]:
        """Ids of a text that is to go on: without an end token that the tokenizer puts there."""
        ids = self.encode(text) or self.start
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    @property
    def start(self) -> list[int]:
        """The tokens that a text begins with when nothing is written yet; at least one."""
        ids = self.encode("")
        if not ids:
            first = self.tokenizer.bos_token_id
            ids = [self.tokenizer.eos_token_id if first is None else first]
        return ids

    def chat(self, messages: Sequence[Mapping[str, Any]], opens: bool = True) -> str:
        """A conversation as the chat template writes it.

        Args:
            opens: up to the assistant's answer.

        Raises:
            InvalidRequest: the template refuses it.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=opens
            )
        except Exception as error:  # a template raises whatever its author chose
            raise InvalidRequest(
                f"the base's chat template refuses these messages: {error}"
            ) from error
        return str(text)

    def chat_ids(self, text: str) -> list[int]:
        """Ids of what the chat template wrote, special tokens and all."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def continuation(self, prompt: str, target: str) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of the target after it, tokenized together."""
        gap = "" if prompt[-1:].isspace() or target[:1].isspace() else " "
        before, whole = self.encode(prompt), self.open(prompt + gap + target)
        common = 0
        while common < min(len(before), len(whole) - 1) and before[common] == whole[common]:
            common += 1
        return whole[:common], whole[common:]

    def last_tokens(self, text: str, subject: str) -> list[int]:
        """The position of the subject's last token at each place where it stands in a text."""
        offsets = self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        found, at = [], text.find(subject)
        while at >= 0:
            end = at + len(subject)
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > at]
            found += inside[-1:]
            at = text.find(subject, end)
        return found

    def pad(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of ids -> [n, longest], padded on the right (a causal model never sees the pads).

        Raises:
            InvalidRequest: a row is longer than the base's context.
        """
        longest = max(map(len, rows))
        if longest > self.base.context_length:
            raise InvalidRequest(
                f"a text of {longest} tokens does not fit into the context of base"
                f" {self.base.name!r} ({self.base.context_length} tokens)"
            )
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]).to(self.device)

    # -- forward --------------------------------------------------------------------------------

    def hidden(self, ids: Tensor) -> Tensor:
        """What the lm_head is given: [n, T] -> [n, T, its inputs]."""
        out: Tensor = self.model.base_model(input_ids=ids, use_cache=False)[0]
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """What ``hidden`` gives -> [..., vocabulary] in fp32, soft-capped as the family does."""
        head: nn.Module = self.model.get_output_embeddings()  # type: ignore[no-untyped-call]
        out: Tensor = head(hidden)
        if (cap := getattr(self.model.config, "final_logit_softcapping", None)) is not None:
            out = cap * torch.tanh(out / cap)
        return out.float()

    @torch.no_grad()
    def inputs(self, paths: Mapping[int, str], rows: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """What modules are given for padded rows, by key of ``paths``: [n, T, in] in fp32.

        The forward ends once the last of the modules was reached.
        """
        ids = self.pad(rows)
        seen: dict[int, Tensor] = {}

        def record(key: int) -> Any:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[key] = args[0].float().view(*ids.shape, -1)  # OPT's MLP sees rows alone
                if len(seen) == len(paths):
                    raise _Stop

            return hook

        with ExitStack() as hooks:
            for key, path in paths.items():
                hooks.callback(self.module(path).register_forward_pre_hook(record(key)).remove)
            hooks.enter_context(suppress(_Stop))
            self.hidden(ids)
        return seen

    @torch.no_grad()
    def tail(
        self, layer: int, rows: Sequence[Sequence[int]], starts: Sequence[int] | None = None
    ) -> Tail:
        """Run rows once and keep what is needed to run on from the MLP's output of ``layer``.

        Args:
            layer: where what is run on from changes.
            rows: token ids.
            starts: from which token on each row changes, by default the first; what stands before
                is computed here for good, as keys and values.
        """
        starts = [0] * len(rows) if starts is None else starts
        ids = self.pad([row[start:] for row, start in zip(rows, starts, strict=True)])
        extra = self._after(rows, starts, ids.shape[1]) if any(starts) else {"use_cache": False}
        out: list[Tensor] = []
        calls: list[_Call] = []
        modules = dict(self.model.named_modules())
        after = [*self.layers[layer + 1 :], *(modules.get(path) for path in self.paths.last)]
        post_norm = None
        if self.paths.post_norm:
            post_norm = modules[f"{self.paths.layers}.{layer}.{self.paths.post_norm}"]
        with ExitStack() as hooks:
            hook = self.layers[layer].register_forward_hook(_keeping(out))
            hooks.callback(hook.remove)
            for module in filter(None, [post_norm, *after]):
                hook = module.register_forward_pre_hook(_recording(calls), with_kwargs=True)
                hooks.callback(hook.remove)
            self.model.base_model(input_ids=ids, **extra)
        normed = None if post_norm is None else calls.pop(0)
        return Tail(out[0], normed, tuple(calls))

    def _after(
        self, rows: Sequence[Sequence[int]], starts: Sequence[int], width: int
    ) -> dict[str, Any]:
        """What makes a forward of ``width`` tokens go on after the rows' first ``starts``."""
        before = max(starts)
        shifts = torch.tensor([before - start for start in starts])[:, None]
        ids = [
            [0] * (before - start) + [*row[:start]] for row, start in zip(rows, starts, strict=True)
        ]
        places = torch.arange(before + width)
        mask = (places >= shifts).long().to(self.device)
        positions = (places - shifts).clamp(min=0).to(self.device)
        cache = DynamicCache()
        self.model.base_model(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=mask[:, :before],
            position_ids=positions[:, :before],
            past_key_values=cache,
            use_cache=True,
        )
        cache.layers = [_Kept(keys, values) for keys, values, _ in cache]
        return {
            "attention_mask": mask,
            "position_ids": positions[:, before:],
            "past_key_values": cache,
            "use_cache": True,
        }


class _Kept(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of what stands before a text; what comes after is not added to them."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values = keys, values
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        before: tuple[Any, Any] = (self.keys, self.values)
        keys, values = before
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    hidden: Tensor
    rest: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, hidden: Tensor) -> Tensor:
        return _hidden(self.module(hidden, *self.rest, **self.kwargs))

    def select(self, rows: Tensor, count: int, cache: dict[int, Any]) -> _Call:
        rest = tuple(_selected(part, rows, count, cache) for part in self.rest)
        kwargs = {k: _selected(part, rows, count, cache) for k, part in self.kwargs.items()}
        return _Call(self.module, _selected(self.hidden, rows, count, cache), rest, kwargs)


@dataclass(frozen=True)
class Tail:
    """What follows a layer's MLP, with the arguments of one batch, to be run again and again.

    Exact, since what is below does not depend on what is changed above it. ``hidden``
    [n, T, hidden] is what came out of the layer.
    """

    hidden: Tensor
    post_norm: _Call | None
    calls: tuple[_Call, ...]

    def run(self, change: Tensor) -> Tensor:
        """A change [n, T, hidden] of the MLP's output -> what the lm_head is given."""
        change = change.to(self.hidden.dtype)
        if self.post_norm is not None:
            before = self.post_norm.hidden.view_as(change)
            change = self.post_norm.run(before + change) - self.post_norm.run(before)
        hidden = self.hidden + change
        for call in self.calls:
            hidden = call.run(hidden)
        return hidden

    def select(self, rows: Tensor) -> Tail:
        """The same of some of the rows."""
        count, cache = len(self.hidden), dict[int, Any]()
        normed = None if self.post_norm is None else self.post_norm.select(rows, count, cache)
        calls = tuple(call.select(rows, count, cache) for call in self.calls)
        return Tail(self.hidden[rows], normed, calls)


class _Stop(Exception):
    """Ends a forward whose rest is not needed."""


def _adding(effect: Effect, device: torch.device) -> Any:
    moved = effect.map(lambda part: part.to(device))

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return moved.apply(args[0], output)

    return hook


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _selected(part: Any, rows: Tensor, count: int, cache: dict[int, Any]) -> Any:
    """Some rows of a recorded argument; what has no rows stays. What came twice is selected once.

    Whatever belongs to the rows has them first of two dimensions at least.
    """
    if id(part) in cache:
        return cache[id(part)]
    found = part
    if isinstance(part, Tensor) and part.dim() > 1 and len(part) == count:
        found = part[rows]
    elif isinstance(part, tuple):
        found = tuple(_selected(one, rows, count, cache) for one in part)
    elif isinstance(part, DynamicCache):
        found = DynamicCache()
        found.layers = [
            _Kept(_selected(keys, rows, count, cache), _selected(values, rows, count, cache))
            for keys, values, _ in part
        ]
    cache[id(part)] = found
    return found


def _keeping(out: list[Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        out.append(_hidden(output))

    return hook


def _recording(calls: list[_Call]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        hidden = args[0] if args else named.pop("hidden_states")
        calls.append(_Call(module, hidden, args[1:], named))

    return hook
