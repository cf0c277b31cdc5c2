"""peft's adapters of linears, as effects.

Each linear that is to be tuned gets a stand-in with the same weight, and peft puts its layer around
that: parameters, their shapes and how they begin are the library's. The base model itself is never
touched. What a layer does is read off its factors where they are low-rank, off its own
``get_delta_weight`` where that is what it adds to the weight, else off what it answers to unit
vectors. That must be affine in the linear's input, else no effect can hold it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.func import functional_call

from editing.deltas import Effect
from editing.finetune.adapter import Adapter
from editing.models.view import ModelView
from registry.errors import InvalidRequest

NAME = "default"
#: Of its parameters, those that are not 0 in a layer that does nothing: magnitudes, scales, what is
#: taken of the weight itself.
STEADY = (
    "lora_magnitude_vector",
    "ia3_l",
    "boft_s",
    "road_alpha",
    "deft_P",
    "deft_R",
    "osf_svd_params",
    "vector_a",
    "vector_b",
)


class LibraryAdapter(Adapter):
    """The layers that peft makes for a configuration.

    Args:
        paths: of the linears.
        configure: gives peft's configuration for ``target_modules``.
        read: the effect of one of its layers.
        seed: of its random start.

    Raises:
        InvalidRequest: what peft says against the hyperparameters on these linears.
    """

    def __init__(
        self,
        view: ModelView,
        paths: Sequence[str],
        configure: Callable[[list[str]], peft.PeftConfig],
        read: Callable[[Any], Effect],
        seed: int,
    ) -> None:
        super().__init__()
        self._read = read
        self._names = {path: path.replace(".", "/") for path in paths}
        stands = _StandIns({name: view.weight(path) for path, name in self._names.items()})
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            try:
                made: Any = peft.get_peft_model(stands, configure([*self._names.values()]))
            except ValueError as error:
                raise InvalidRequest(f"hyperparameters: {error}", param="hyperparameters") from None
        self.layers: nn.ModuleDict = made.base_model.model.linears
        self.to(view.device)
        for layer in self.layers.values():
            _measure(layer)

    def effects(self) -> dict[str, Effect]:
        return {path: self._read(self.layers[name]) for path, name in self._names.items()}

    def steady(self) -> list[nn.Parameter]:
        return [
            p for name, p in self.named_parameters() if not {*STEADY}.isdisjoint(name.split("."))
        ]


class LayerDropping(Adapter):
    """CopRA (arXiv:2410.22911): at each step layers' adapters are left out at random.

    In the first three quarters of a run a layer's probability to take part rises from 0 to 1, in
    the rest all do. Each then does its share by itself, which makes adapters mergeable.
    """

    #: Share of a run after which all layers take part.
    RISING = 0.75

    def __init__(self, adapter: LibraryAdapter, seed: int) -> None:
        super().__init__()
        self.adapter, self.seed = adapter, seed
        self._left_out: set[str] = set()

    def before_step(self, step: int, total: int) -> None:
        chance = min(1.0, step / max(1.0, self.RISING * total))
        source = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        layers = sorted({_layer(path) for path in self.adapter.effects()})
        out = torch.rand(len(layers), generator=source) >= chance
        if out.all():  # a step without any would have no gradient
            out[int(torch.randint(len(layers), (1,), generator=source))] = False
        self._left_out = {layer for layer, drop in zip(layers, out.tolist(), strict=True) if drop}

    def after_step(self) -> None:
        self._left_out = set()

    def effects(self) -> dict[str, Effect]:
        found = self.adapter.effects()
        return {path: e for path, e in found.items() if _layer(path) not in self._left_out}

    def steady(self) -> list[nn.Parameter]:
        return self.adapter.steady()


def _layer(path: str) -> str:
    """The path up to and with the layer's number."""
    head, number, _ = re.split(r"\.(\d+)\.", path, maxsplit=1)
    return f"{head}.{number}"


class _StandIns(nn.Module):
    """Linears without a bias that share other linears' weights."""

    config: Mapping[str, str] = {"model_type": "custom"}

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.linears = nn.ModuleDict({name: _linear(weight) for name, weight in weights.items()})


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@torch.no_grad()
def _measure(layer: Any) -> None:
    """DoRA's rows begin at their lengths, which the library takes in the base's dtype, in fp32."""
    for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
        magnitude.weight.copy_(layer.base_layer.weight.float().norm(dim=1))


def low_rank(layer: Any) -> Effect:
    """LoRA, and DoRA: W' = m (W + BA) / ‖W + BA‖ by row, the norm taken as a constant."""
    A, B = layer.lora_A[NAME].weight.float(), layer.lora_B[NAME].weight.float()
    B = layer.scaling[NAME] * B
    if NAME not in layer.lora_magnitude_vector:
        return Effect(A=A, B=B)
    with torch.no_grad():
        length = (layer.base_layer.weight.float() + B @ A).norm(dim=1)
    scale = layer.lora_magnitude_vector[NAME].weight.float() / length
    return Effect(scale=scale, A=A, B=scale[:, None] * B)


def scaled(layer: Any) -> Effect:
    """IA3: the linear's output, number by number."""
    return Effect(scale=layer.ia3_l[NAME].float().flatten())


def dense(layer: Any) -> Effect:
    """Whatever a layer adds to the weight."""
    return Effect(dense=layer.get_delta_weight(NAME).float())


def hadamard(layer: Any) -> Effect:
    """HiRA: the weight times a low-rank matrix, entry by entry, ΔW = W ⊙ BA."""
    A, B = layer.hira_A[NAME].float(), layer.hira_B[NAME].float()
    return Effect(dense=layer.base_layer.weight.float() * (B @ A))


def answered(layer: Any) -> Effect:
    """What a layer answers to unit vectors, less what its linear does: rotations of the weight, and
    what shifts the output. It is affine: y = W' x + s. The library answers in the dtype of weight
    and input, here fp32 whatever the base's: ΔW is smaller than a bf16 weight's last bit."""
    weight = layer.get_base_layer().weight.float()
    unit = torch.eye(weight.shape[1], device=weight.device)

    def answer(x: Tensor) -> Tensor:
        found: Tensor = functional_call(layer, {"base_layer.weight": weight}, (x,))
        return found

    shift = answer(torch.zeros_like(unit[:1]))
    return Effect(shift=shift[0], dense=(answer(unit) - shift).T - weight)


def reflected(layer: Any) -> Effect:
    """HRA: W' = W H₁ … H_r with Hᵢ = I − 2 uᵢ uᵢᵀ / ‖uᵢ‖², one after the other on the weight. The
    library multiplies them out first, which takes in² numbers for each.
    """
    weight = turned = layer.get_base_layer().weight.float()
    for u in torch.nn.functional.normalize(layer.hra_u[NAME].float(), dim=0).T:
        turned = turned - 2 * torch.outer(turned @ u, u)
    return Effect(dense=turned - weight)


def rotated(layer: Any) -> Effect:
    """BOFT: W' = s ⊙ W Rᵀ."""
    weight = layer.get_base_layer().weight.float()
    rotation, scale = layer.get_delta_weight(NAME)
    return Effect(dense=scale.float() * (weight @ rotation.float().T) - weight)


def shifted(layer: Any) -> Effect:
    """BEFT: a shift of the linear's output."""
    weight = layer.get_base_layer().weight
    return Effect(shift=layer(torch.zeros_like(weight[:1]))[0].float())


def scattered(layer: Any) -> Effect:
    """SHiRA: few entries of the weight, at places that were drawn once."""
    rows, columns = layer.shira_indices[NAME]
    matrix = torch.zeros(layer.base_layer.weight.shape, device=rows.device)
    values = layer.scaling[NAME] * layer.shira_weight[NAME].float()
    return Effect(dense=matrix.index_put((rows.long(), columns.long()), values))


def shared(layer: Any) -> Effect:
    """VeRA: random factors that all layers share, scaled by vectors of their own."""
    A = layer.vera_A[NAME][:, : layer.in_features].float()
    B = layer.vera_B[NAME][: layer.out_features].float()
    d, b = layer.vera_lambda_d[NAME].float(), layer.vera_lambda_b[NAME].float()
    return Effect(A=d[:, None] * A, B=b[:, None] * B)
