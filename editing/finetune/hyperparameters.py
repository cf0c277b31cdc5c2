"""Hyperparameters of each way to fine-tune, as requests give them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]
#: What "auto" comes to: so many steps if the rows allow it, in batches of a power of two.
AUTO_STEPS, AUTO_BATCHES, MOST_EPOCHS = 600, (4, 64), 50
#: Of learning rates, given or made by a multiplier.
MOST_RATE = 10


class TuningHyperparameters(BaseModel):
    """OpenAI's three, and what every way has. Closed to unknown names.

    ``learning_rate_multiplier`` multiplies the method's own rate, ``RATE``, unless
    ``learning_rate`` is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    RATE: ClassVar[float] = 1e-3

    n_epochs: Annotated[int, Field(ge=1, le=1000)] | Auto = Field(
        "auto", description="Passes over the rows."
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Auto = Field(
        "auto", description="Rows of one step."
    )
    learning_rate_multiplier: Annotated[float, Field(gt=0, le=1000)] | Auto = "auto"
    learning_rate: Annotated[float, Field(gt=0, le=MOST_RATE)] | None = Field(
        None, description="The rate itself, in the multiplier's place."
    )
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's.")
    warmup: float = Field(0.03, ge=0, le=1, description="Share of the steps before the full rate.")
    max_tokens: Annotated[int, Field(ge=16, le=1_000_000)] | Auto = Field(
        "auto", description="Of one flat row; by default what fits ERRATA_TRAINING_MEMORY."
    )
    keep_weight: float = Field(
        1.0,
        ge=0,
        le=1e4,
        description="Of the divergence from the version on the base's own texts; 0: none.",
    )
    keep_texts: int = Field(16, ge=1, le=1024, description="Of them, those of one step.")
    ema: bool = Field(
        False, description="What is made is a moving average of what is trained (arXiv:2410.10868)."
    )
    target_modules: tuple[Annotated[str, Field(min_length=1, max_length=100)], ...] | None = Field(
        None, min_length=1, max_length=100, description="Last names of linears; by default all."
    )

    def settled(self, rows: int) -> TuningHyperparameters:
        """With numbers in the place of every "auto", for so many training rows."""
        least, most = AUTO_BATCHES
        size = max(least, min(most, 1 << (max(rows // 16, 1).bit_length() - 1)))
        size = size if self.batch_size == "auto" else self.batch_size
        epochs = min(MOST_EPOCHS, max(1, round(AUTO_STEPS / -(-rows // size))))
        times = 1.0 if self.learning_rate_multiplier == "auto" else self.learning_rate_multiplier
        settled = {
            "batch_size": size,
            "n_epochs": epochs if self.n_epochs == "auto" else self.n_epochs,
            "learning_rate": self.learning_rate or self.RATE * times,
        }
        return self.model_copy(update=settled)


class LoraHyperparameters(TuningHyperparameters):
    """LoRA (arXiv:2106.09685)."""

    RATE: ClassVar[float] = 3e-3

    r: int = Field(32, ge=1, le=1024, description="Rank.")
    lora_alpha: float = Field(64, gt=0, le=1e5, description="The factors' product is times α/r.")
    use_rslora: bool = Field(False, description="Times α/√r instead.")
    layer_dropping: bool = Field(
        False,
        description="CopRA: layers are left out at random, all in the end kept; mergeable.",
    )


class DoraHyperparameters(TuningHyperparameters):
    """DoRA (arXiv:2402.09353)."""

    RATE: ClassVar[float] = 3e-3

    r: int = Field(32, ge=1, le=1024, description="Rank.")
    lora_alpha: float = Field(64, gt=0, le=1e5, description="The factors' product is times α/r.")


class Ia3Hyperparameters(TuningHyperparameters):
    """(IA)³ (arXiv:2205.05638), on what linears put out."""

    RATE: ClassVar[float] = 2e-2


class RankHyperparameters(TuningHyperparameters):
    """Of one rank: MiSS (arXiv:2409.15371), PEANuT (arXiv:2410.01870), DEFT."""

    RATE: ClassVar[float] = 3e-3

    r: int = Field(16, ge=1, le=1024, description="Rank.")


class LohaHyperparameters(RankHyperparameters):
    """LoHa (arXiv:2108.06098)."""

    RATE: ClassVar[float] = 5e-3


class LokrHyperparameters(RankHyperparameters):
    """LoKr (arXiv:2309.14859)."""

    RATE: ClassVar[float] = 2e-2


class GloraHyperparameters(RankHyperparameters):
    """GLoRA (arXiv:2306.07967)."""

    RATE: ClassVar[float] = 6e-3


class BoundedHyperparameters(RankHyperparameters):
    """Where a step's length is bounded by the method: DeLoRA (arXiv:2503.18225), HRA
    (arXiv:2405.17484)."""

    RATE: ClassVar[float] = 1e-3


class PsoftHyperparameters(RankHyperparameters):
    """PSOFT: a rotation between the r principal directions."""

    RATE: ClassVar[float] = 2e-3


class HiraHyperparameters(RankHyperparameters):
    """HiRA (ICLR 2025), and HUT as far as its abstract goes (arXiv:2409.13501)."""

    RATE: ClassVar[float] = 2e-2


class GraloraHyperparameters(RankHyperparameters):
    """GraLoRA (arXiv:2505.20355)."""

    gralora_k: int = Field(2, ge=1, le=64, description="Blocks of a side; it divides r.")


class OftHyperparameters(TuningHyperparameters):
    """OFT (arXiv:2306.07280): rotations of blocks of a linear's inputs."""

    RATE: ClassVar[float] = 2e-3

    oft_block_size: int = Field(16, ge=2, le=1024, description="Inputs of a block.")


class BoftHyperparameters(TuningHyperparameters):
    """BOFT (arXiv:2311.06243)."""

    RATE: ClassVar[float] = 2e-3

    boft_block_size: int = Field(4, ge=2, le=1024, description="Inputs of a block.")
    boft_n_butterfly_factor: int = Field(1, ge=1, le=10, description="Rotations in a row.")


class RoadHyperparameters(TuningHyperparameters):
    """RoAd (arXiv:2409.00119): rotations of pairs of outputs."""

    RATE: ClassVar[float] = 2e-2

    group_size: int = Field(16, ge=2, le=1024, description="Outputs that are paired among them.")


class BlockHyperparameters(TuningHyperparameters):
    """C3A (arXiv:2407.19342): circular convolutions, divided by a linear's inputs."""

    RATE: ClassVar[float] = 1.0

    block_size: int = Field(16, ge=1, le=65536, description="It divides every in and out.")


class FourierHyperparameters(TuningHyperparameters):
    """FourierFT (arXiv:2405.03003): few entries of ΔW's spectrum."""

    RATE: ClassVar[float] = 0.15

    n_frequency: int = Field(1000, ge=1, le=1_000_000, description="Entries of a linear's.")


class WaveletHyperparameters(FourierHyperparameters):
    """WaveFT: of its wavelets' coefficients."""

    RATE: ClassVar[float] = 2e-3


class TinyLoraHyperparameters(TuningHyperparameters):
    """TinyLoRA (arXiv:2602.04118)."""

    RATE: ClassVar[float] = 3e-4

    r: int = Field(2, ge=1, le=64, description="Rank of the frozen SVD.")
    u: int = Field(64, ge=1, le=65536, description="Numbers trained for a group of linears.")


class OsfHyperparameters(TuningHyperparameters):
    """OSF (arXiv:2504.07097): the top singular directions stand still."""

    RATE: ClassVar[float] = 2e-3

    effective_rank: float = Field(0.5, gt=0, le=1, description="Share of them that stands still.")


class SupertuningHyperparameters(TuningHyperparameters):
    """Super-Tuning (arXiv:2607.09287): the largest weights."""

    RATE: ClassVar[float] = 4e-2

    sparsity: float = Field(0.99, ge=0, lt=1, description="Share of the weights left alone.")


class BeftHyperparameters(TuningHyperparameters):
    """BEFT (arXiv:2509.15974): a shift of what linears put out."""

    RATE: ClassVar[float] = 3e-2


class CompacterHyperparameters(TuningHyperparameters):
    """Compacter (arXiv:2106.04647), beside the MLP."""

    RATE: ClassVar[float] = 6e-2

    bottleneck: int = Field(64, ge=1, le=65536, description="Neurons of a layer's adapter.")
    n: int = Field(4, ge=1, le=64, description="Kronecker terms; it divides bottleneck and width.")


class ShiraHyperparameters(TuningHyperparameters):
    """SHiRA (arXiv:2406.13175): entries at random places, as many as a LoRA of rank r has."""

    RATE: ClassVar[float] = 1e-2

    r: int = Field(16, ge=1, le=1024, description="Entries: r · (in + out) of a linear.")


class VeraHyperparameters(TuningHyperparameters):
    """VeRA (arXiv:2310.11454)."""

    RATE: ClassVar[float] = 6e-2

    r: int = Field(128, ge=1, le=4096, description="Rank of the shared random factors.")


class RandLoraHyperparameters(TuningHyperparameters):
    """RandLoRA (arXiv:2502.00987)."""

    r: int = Field(16, ge=1, le=1024, description="Rank of each random basis.")


class NormHyperparameters(TuningHyperparameters):
    """The norms' weights and biases, and SSF (arXiv:2210.08823): those of every operation."""

    RATE: ClassVar[float] = 2e-2


class FullHyperparameters(TuningHyperparameters):
    """All entries of the linears."""

    RATE: ClassVar[float] = 1e-3


class HftHyperparameters(FullHyperparameters):
    """HFT (arXiv:2404.18466)."""

    rounds: int = Field(4, ge=1, le=1000, description="How often other matrices stand still.")


class SpielHyperparameters(TuningHyperparameters):
    """SpIEL (arXiv:2401.16405)."""

    RATE: ClassVar[float] = 5e-2

    density: float = Field(0.01, gt=0, le=1, description="Share of the entries that are trained.")
    rate: float = Field(0.2, ge=0, le=1, description="Share of them that moves, at first.")
    every: int = Field(20, ge=1, le=10_000, description="Steps between moves.")
    gathered: int = Field(5, ge=1, le=10_000, description="Steps whose gradients decide.")


class SaraHyperparameters(TuningHyperparameters):
    """SaRA (arXiv:2409.06633)."""

    RATE: ClassVar[float] = 1.5e-2

    share: float = Field(0.1, gt=0, le=1, description="Of the smallest weights, which are trained.")
    nuclear_weight: float = Field(1e-5, ge=0, le=1e3, description="Of the nuclear norm of ΔW.")


class MaskHyperparameters(TuningHyperparameters):
    """Mask tuning (arXiv:2004.12406)."""

    RATE: ClassVar[float] = 5e-4


class SaidHyperparameters(TuningHyperparameters):
    """SAID (arXiv:2012.13255)."""

    RATE: ClassVar[float] = 3e-2

    d: int = Field(4096, ge=1, le=1_000_000, description="Intrinsic dimension: numbers trained.")


class LofitHyperparameters(TuningHyperparameters):
    """LoFiT (arXiv:2406.01563)."""

    RATE: ClassVar[float] = 0.3

    share: float = Field(0.1, gt=0, le=1, description="Of all heads, which get an offset.")
    finding: float = Field(0.3, gt=0, lt=1, description="Share of the run that finds them.")
    l1: float = Field(1e-4, ge=0, le=10, description="Weight of the penalty meanwhile.")
