"""The model that learns: the section `student`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from student_trainer.settings.section import Names, Positive, Section

# What older trainers called them, whose settings are still read. `kind` was causal, bitnet or diffusion.
# `type` is another trainer's, see TYPES.
OLD_NAMES = {
    "student.kind": "student.quantiser", "student.bitnet": "student.quantisation",
    "student.type": "student.architecture",
}  # fmt: skip
AUTO = "auto"  # of architecture and quantiser: what the folder holds
TYPES = {
    "causal": {"architecture": "causal", "quantiser": "none"},
    "bitnet": {"quantiser": "bitnet"},
    "dlm": {"architecture": "diffusion"},
    "auto": {"architecture": AUTO, "quantiser": AUTO},
}


class QuantisationSettings(Section):
    """How a quantised student is made. Null: as in the checkpoint if it is quantised already, else as the quantiser
    has it.
    """

    sub_norm: Literal["output", "all", "none"] | None = Field(
        None,
        description="SubLN before o_proj and down_proj, before every linear, or nowhere; null: bitnet "
        "output, fairy2i and seq2 none",
    )
    eps: Positive | None = Field(None, description="of the SubLN norms; null: 1e-8")
    quantise_activations: bool | None = Field(
        None, description="activations in few bits beside such weights; null: bitnet true, fairy2i, seq2 and rtn false"
    )
    activation_bits: Literal[4, 8] | None = Field(None, description="of quantised activations; null: 8")
    bits: int | None = Field(None, ge=2, le=8, description="of a weight, where the quantiser is rtn; null: 4")
    group_size: int | None = Field(
        None, ge=2, description="of rtn: weights of a row that share a step; null: a whole row"
    )
    stages: Literal[1, 2] | None = Field(
        None, description="of fairy2i: times that what is left is quantised again, and bits a weight; null: 2"
    )
    warmup_steps: int = Field(0, ge=0, description="steps in which quantisation rises from none to all")

    @property
    def of_layers(self) -> dict[str, Any]:
        """What `quantise` is told: all but how training gets there."""
        return self.model_dump(exclude={"warmup_steps"})


class LoRASettings(Section):
    """Low-rank additions that are trained in place of the student's own weights."""

    rank: int | None = Field(None, ge=1, description="null: no LoRA, all weights are trained")
    alpha: int = Field(16, ge=1, description="the addition is scaled by alpha / rank")
    targets: Names = Field(("all-linear",), description="names of linear modules; all-linear: every one but the head")


class GrowthSettings(Section):
    """Blocks that grow while the student learns: min(block_size, first 2^floor((step - after) / every)), the first
    before step `after` (NBDiff, arXiv 2512.06776). A function of the step alone.
    """

    every: int | None = Field(
        None, ge=1, description="steps from one doubling to the next; null: block_size throughout"
    )
    first: int = Field(1, ge=1, description="tokens of a block at first")
    after: int = Field(0, ge=0, description="the step from which doublings are counted")

    def at(self, step: int, block_size: int) -> int:
        """The block of a step's batch."""
        if self.every is None:
            return block_size
        doublings = min(max(step - self.after, 0) // self.every, block_size.bit_length())
        return int(min(block_size, self.first * 2**doublings))


class LRCSettings(Section):
    """Low-rank corrections of a quantised student's linears, on inputs that are not rounded."""

    rank: float = Field(0.1, gt=0, le=1, description="as a share of the smaller side of a weight")
    start: Literal["closed_form", "random"] = Field(
        "closed_form",
        description="first values: the best ones by calibration data, or as LoRA's, which correct nothing",
    )
    targets: Names = Field(("all-linear",), description="names of linear modules; all-linear: every one but the head")
    sequences: int = Field(128, ge=1, description="rows of data.seq_len that the closed form is computed of")
    reference: Literal["full_precision", "same_inputs"] = Field(
        "full_precision",
        description="what a layer's output is to be like: the full-precision model's, or its exact weight's on inputs "
        "as they are in the student",
    )
    damping: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="of the inputs' second moments: times the mean of their diagonal"
    )


class DiffusionSettings(Section):
    """How a student of architecture diffusion reads and learns. Null: as in the checkpoint if it is a diffusion model
    already.
    """

    block_size: int | None = Field(None, ge=1, le=64, description="tokens filled in side by side; null: 16")
    family: Literal["in_place", "token_shift"] | None = Field(
        None, description="token t is predicted by row t, or by row t - 1; null: in_place"
    )
    clean_half: Literal["block_causal", "causal"] | None = Field(
        None, description="a clean token sees its whole block, or as far as itself; null: block_causal"
    )
    mask_token_id: int | None = Field(None, ge=0, description="null: a new token behind the vocabulary")
    mask_embedding: Literal["mean", "keep"] = Field(
        "mean", description="of a causal model's mask token at first: the vocabulary's mean, or as the model has it"
    )
    masks: Literal["uniform", "position_dependent", "suffix"] = Field(
        "uniform",
        description="which tokens of a block are masked: each by the same chance, late ones rather, or the last ones",
    )
    complementary: bool | None = Field(
        None, description="a second view masks what the first one shows; null: with uniform masks, unless weighed"
    )
    loss_weights: Literal["none", "1/t"] = Field(
        "none", description="what a masked token weighs: 1, or 1 / the share of its block that is masked"
    )
    threshold: float = Field(
        0.9, gt=0, le=1, description="when it writes: tokens that are likelier are written side by side; 1: one by one"
    )
    growth: GrowthSettings = GrowthSettings()

    @property
    def in_two_views(self) -> bool:
        """`complementary`, or what null means."""
        return (
            self.masks == "uniform" and self.loss_weights == "none"
            if self.complementary is None
            else self.complementary
        )

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionSettings:
        if self.growth.every is not None and self.growth.first > (self.block_size or self.growth.first):
            raise ValueError(
                f"student.diffusion.growth.first is {self.growth.first}, more than the {self.block_size} tokens that "
                "blocks are to grow to: give less, or a larger student.diffusion.block_size"
            )
        if self.complementary and self.masks != "uniform":
            raise ValueError(
                f"student.diffusion.complementary is true, but the complement of {self.masks} masks shows what comes "
                "late and masks what comes early: leave it out, or set student.diffusion.masks=uniform"
            )
        if self.complementary and self.loss_weights == "1/t":
            raise ValueError(
                "student.diffusion.complementary is true and loss_weights is 1/t: two complementary views have every "
                "token learnt once already; set one of the two back"
            )
        return self


class StudentSettings(Section):
    """The model that learns: an architecture, a quantiser and an adapter, each by its name."""

    architecture: str = Field(
        "causal",
        description="how it reads a text; causal: left to right; diffusion: block by block; auto: as in the folder",
    )
    quantiser: str = Field(
        "none",
        description="of its linear layers' weights; none: full precision; bitnet: ternary; fairy2i: complex, of 1 or "
        "2 bits; seq2: 2 bits, scales learnt; rtn: rounded to the nearest of 2^bits values; auto: as in the folder",
    )
    adapter: str | None = Field(
        None,
        description="what is trained in place of all weights: none, lora, lrc; null: lora where lora.rank is given",
    )
    checkpoint_path: str = Field(
        "",
        description="a Hugging Face causal language model, by folder or hub name, or the folder of an earlier run; a "
        "folder also by a URL (gs://, s3://, any of fsspec's)",
    )
    cache_folder: str | None = Field(
        None, description="where a checkpoint behind a URL is kept; null: ~/.cache/stillhouse/checkpoints"
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="of such a URL, for fsspec; keys and secrets belong in the environment"
    )
    revision: str | None = Field(None, description="hub revision; a commit keeps a run repeatable")
    tokenizer: str | None = Field(None, description="folder or hub name of its tokenizer; null: checkpoint_path")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="autocast dtype, parameters stay float32; auto: bfloat16 where the hardware computes in it, else "
        "float32, and what a resumed run began with",
    )
    attention: Literal["auto", "sdpa", "flex"] = Field("auto", description="auto: flex on a GPU, sdpa elsewhere")
    gradient_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile each layer; on a CPU it takes a C++ compiler")
    lora: LoRASettings = LoRASettings()
    lrc: LRCSettings = LRCSettings()
    quantisation: QuantisationSettings = QuantisationSettings()
    diffusion: DiffusionSettings = DiffusionSettings()

    @property
    def adapter_name(self) -> str:
        """`adapter`, or what null means."""
        if self.adapter is not None:
            return self.adapter
        return "none" if self.lora.rank is None else "lora"

    @property
    def adapter_settings(self) -> LoRASettings | LRCSettings:
        """Those of the adapter that is named."""
        return self.lrc if self.adapter_name == "lrc" else self.lora

    @property
    def cell(self) -> str:
        """Who it is of the product, for messages."""
        return f"architecture {self.architecture}, quantiser {self.quantiser}, adapter {self.adapter_name}"

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, values: Any) -> Any:
        return with_new_names(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _consistent(self) -> StudentSettings:
        if self.adapter == "lora" and self.lora.rank is None:
            raise ValueError("student.adapter is lora: give its rank too, student.lora.rank=16 for example")
        return self


def with_new_names(student: Mapping[str, Any]) -> dict[str, Any]:
    """The section with OLD_NAMES replaced; what has an old name was given by somebody, and wins over a default."""
    values = {name: value for name, value in student.items() if f"student.{name}" not in OLD_NAMES}
    if (kind := student.get("kind")) is not None:
        if kind == "diffusion":
            values["architecture"] = kind
        else:
            values["quantiser"] = "none" if kind == "causal" else kind
    if (given := student.get("type")) is not None:
        if given not in TYPES:
            raise ValueError(f"student.type is {given}, expected one of: {', '.join(TYPES)}")
        values |= TYPES[given]
    if (bitnet := student.get("bitnet")) is not None:
        before = values.get("quantisation") or {}
        if isinstance(before, Mapping) and isinstance(bitnet, Mapping):
            bitnet = {**before, **bitnet}
        values["quantisation"] = bitnet
    return values
