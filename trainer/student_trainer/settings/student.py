"""The model that learns: the section `student`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from student_trainer.settings.section import Names, Positive, Section

# Names in older trainers, whose settings can still be read. `kind` was causal, bitnet or diffusion.
# `type` is from another trainer, see TYPES.
OLD_NAMES = {
    "student.kind": "student.quantiser", "student.bitnet": "student.quantisation",
    "student.type": "student.architecture",
}  # fmt: skip
NO_STUDENT = "student.checkpoint_path must be given: a folder or hub name of a Hugging Face causal model"
AUTO = "auto"  # for architecture and quantiser: as in the checkpoint
TYPES = {
    "causal": {"architecture": "causal", "quantiser": "none"},
    "bitnet": {"quantiser": "bitnet"},
    "dlm": {"architecture": "diffusion"},
    "auto": {"architecture": AUTO, "quantiser": AUTO},
}


class QuantisationSettings(Section):
    """How a quantised student is made. Null: as in the checkpoint if that is quantised already, else the quantiser's
    default.
    """

    sub_norm: Literal["output", "all", "none"] | None = Field(
        None,
        description="SubLN norms; output: before o_proj and down_proj; all: before every linear layer; none: nowhere; "
        "null: output with bitnet, else none",
    )
    sub_norm_start: Literal["rms", "ones"] = Field(
        "rms",
        description="initial gains of the SubLN norms; rms: the typical RMS of their inputs, measured on the run's "
        "first batch, so that the norms hardly change what the model computes; ones: as in BitDistill",
    )
    eps: Positive | None = Field(None, description="epsilon of the SubLN norms; null: 1e-8")
    quantise_activations: bool | None = Field(
        None, description="quantise activations too; null: true with bitnet, false with fairy2i, seq2 and rtn"
    )
    activation_bits: Literal[4, 8] | None = Field(None, description="bits per activation, if quantised; null: 8")
    bits: int | None = Field(None, ge=2, le=8, description="quantiser rtn: bits per weight; null: 4")
    group_size: int | None = Field(
        None, ge=2, description="quantiser rtn: weights of a row that share a scale; null: the whole row"
    )
    stages: Literal[1, 2] | None = Field(
        None, description="quantiser fairy2i: stages, each of 1 bit per weight for what the last one left; null: 2"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which quantisation rises linearly from none to full")

    @property
    def of_layers(self) -> dict[str, Any]:
        """The arguments of `quantise`. The other settings are about the beginning of training."""
        return self.model_dump(exclude={"warmup_steps", "sub_norm_start"})


class LoRASettings(Section):
    """Low-rank updates, trained in place of the student's own weights."""

    rank: int | None = Field(None, ge=1, description="rank of LoRA; null: no LoRA, all weights are trained")
    alpha: int = Field(16, ge=1, description="scale: LoRA's update is multiplied by alpha / rank")
    targets: Names = Field(
        ("all-linear",), description="names of the linear modules to adapt; all-linear: all but the output head"
    )


class GrowthSettings(Section):
    """Blocks that grow during training: min(block_size, first 2^floor((step - after) / every)), and `first` before
    step `after` (NBDiff, arXiv 2512.06776). A function of the step only.
    """

    every: int | None = Field(
        None,
        ge=1,
        description="steps between doublings of the block size; null: student.diffusion.block_size from the start",
    )
    first: int = Field(1, ge=1, description="initial block size, in tokens")
    after: int = Field(0, ge=0, description="step from which doublings are counted")

    def at(self, step: int, block_size: int) -> int:
        """The block size at a step."""
        if self.every is None:
            return block_size
        doublings = min(max(step - self.after, 0) // self.every, block_size.bit_length())
        return int(min(block_size, self.first * 2**doublings))


class LRCSettings(Section):
    """Low-rank corrections of a quantised student's linear layers, on inputs that are not quantised."""

    rank: float = Field(
        0.1, gt=0, le=1, description="rank of the correction, as a fraction of the smaller dimension of the weight"
    )
    start: Literal["closed_form", "random"] = Field(
        "closed_form",
        description="initialisation; closed_form: the least-squares solution on calibration data; random: as in LoRA, "
        "where the correction is zero at first",
    )
    targets: Names = Field(
        ("all-linear",), description="names of the linear modules to correct; all-linear: all but the output head"
    )
    sequences: int = Field(128, ge=1, description="closed_form: calibration sequences of data.seq_len tokens")
    reference: Literal["full_precision", "same_inputs"] = Field(
        "full_precision",
        description="closed_form: output that a layer is fitted to; full_precision: that of the full-precision "
        "model; same_inputs: that of the unquantised weight on the student's own inputs",
    )
    damping: float = Field(
        0.01,
        ge=0,
        allow_inf_nan=False,
        description="closed_form: ridge added to the diagonal of the inputs' second moments, as a multiple of its mean",
    )


class DiffusionSettings(Section):
    """How a student of architecture diffusion is trained and decoded. Null: as in the checkpoint if that is a diffusion
    model already.
    """

    block_size: int | None = Field(
        None, ge=1, le=64, description="tokens per block, which are predicted together; null: the checkpoint's, else 16"
    )
    family: Literal["in_place", "token_shift"] | None = Field(
        None,
        description="in_place: position t predicts token t; token_shift: position t - 1 does, as in causal models; "
        "null: the checkpoint's, else in_place",
    )
    clean_half: Literal["block_causal", "causal"] | None = Field(
        None,
        description="attention among clean tokens: within the whole block (block_causal) or strictly causal; null: "
        "the checkpoint's, else block_causal",
    )
    mask_token_id: int | None = Field(
        None,
        ge=0,
        description="id of the mask token; null: the checkpoint's, else a new one appended to the vocabulary",
    )
    mask_embedding: Literal["mean", "keep"] = Field(
        "mean",
        description="initial embedding of the mask token of a former causal model: the mean over the vocabulary, or "
        "keep its own",
    )
    masks: Literal["uniform", "position_dependent", "suffix"] = Field(
        "uniform",
        description="which tokens of a block are masked; uniform: each with the same probability; "
        "position_dependent: later tokens more often; suffix: always the last ones",
    )
    complementary: bool | None = Field(
        None,
        description="train on a second view with the complementary masks; null: yes with masks=uniform and "
        "loss_weights=none, else no",
    )
    loss_weights: Literal["none", "1/t"] = Field(
        "none", description="weight of a masked token in the loss; none: 1; 1/t: 1 / the masked fraction of its block"
    )
    threshold: float = Field(
        0.9,
        gt=0,
        le=1,
        description="decoding: in each step, all tokens more likely than this are written; 1: one token per step",
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
                f"student.diffusion.growth.first is {self.growth.first}, more than the {self.block_size} tokens to "
                "which blocks grow: lower it, or raise student.diffusion.block_size"
            )
        if self.complementary and self.masks != "uniform":
            raise ValueError(
                f"student.diffusion.complementary is true, but the complement of {self.masks} masks shows later "
                "tokens and masks earlier ones: leave it out, or set student.diffusion.masks=uniform"
            )
        if self.complementary and self.loss_weights == "1/t":
            raise ValueError(
                "student.diffusion.complementary is true and loss_weights is 1/t: with two complementary views, every "
                "token is already trained on once; set one of the two back"
            )
        return self


class StudentSettings(Section):
    """The model that learns: an architecture, a quantiser and an adapter, each by name."""

    architecture: str = Field(
        "causal",
        description="causal: autoregressive; diffusion: block diffusion; auto: as in the checkpoint",
    )
    quantiser: str = Field(
        "none",
        description="quantisation of the linear layers' weights; none; bitnet: ternary (1.58 bits); fairy2i: "
        "complex, 1 or 2 bits; seq2: 2 bits with learnt scales; rtn: round to nearest, see "
        "quantisation.bits; auto: as in the checkpoint",
    )
    adapter: str | None = Field(
        None,
        description="train low-rank weights instead of all weights: none, lora or lrc; null: lora if lora.rank is "
        "set, else none",
    )
    checkpoint_path: str = Field(
        "",
        description="initial weights: a folder, hub name or fsspec URL (such as gs:// or s3://) of a Hugging "
        "Face causal language model, or the folder of an earlier run",
    )
    cache_folder: str | None = Field(
        None, description="where a checkpoint downloaded from a URL is kept; null: ~/.cache/stillhouse/checkpoints"
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="fsspec options for that URL; keys and secrets belong in the environment"
    )
    revision: str | None = Field(None, description="revision on the hub; a commit makes the run reproducible")
    tokenizer: str | None = Field(None, description="folder or hub name of the tokenizer; null: the checkpoint's")
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="autocast dtype; parameters stay in float32; auto: bfloat16 if the hardware computes in it, "
        "else float32; a resumed run keeps its dtype",
    )
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto", description="attention kernel; auto: FlexAttention on a GPU, scaled_dot_product_attention elsewhere"
    )
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )
    compile: bool = Field(False, description="torch.compile every layer; on a CPU this needs a C++ compiler")
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
        """The settings of the chosen adapter."""
        return self.lrc if self.adapter_name == "lrc" else self.lora

    @property
    def cell(self) -> str:
        """Architecture, quantiser and adapter, for messages."""
        return f"architecture {self.architecture}, quantiser {self.quantiser}, adapter {self.adapter_name}"

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, values: Any) -> Any:
        return with_new_names(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _consistent(self) -> StudentSettings:
        if self.adapter == "lora" and self.lora.rank is None:
            raise ValueError("student.adapter is lora: set its rank too, for example student.lora.rank=16")
        return self


def with_new_names(student: Mapping[str, Any]) -> dict[str, Any]:
    """The section with OLD_NAMES replaced; a value under an old name was given by somebody, and overrides defaults."""
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
