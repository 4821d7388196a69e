"""The model that learns: the section `student`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from student_trainer.settings.section import Names, Positive, Section


class BitNetSettings(Section):
    """What makes a student ternary. Null: as in the checkpoint if it is ternary already, else the value named."""

    sub_norm: Literal["output", "all", "none"] | None = Field(
        None, description="SubLN before o_proj and down_proj, before every linear, or nowhere; null: output"
    )
    eps: Positive | None = Field(None, description="of the SubLN norms; null: 1e-8")
    quantise_activations: bool | None = Field(None, description="int8 activations beside ternary weights; null: true")
    warmup_steps: int = Field(0, ge=0, description="steps in which quantisation rises from none to all")


class LoRASettings(Section):
    """Low-rank additions that are trained in place of the student's own weights."""

    rank: int | None = Field(None, ge=1, description="null: no LoRA, all weights are trained")
    alpha: int = Field(16, ge=1, description="the addition is scaled by alpha / rank")
    targets: Names = Field(("all-linear",), description="names of linear modules; all-linear: every one but the head")


class StudentSettings(Section):
    """The model that learns."""

    kind: Literal["causal", "bitnet"] = Field("causal", description="bitnet: its linear layers made ternary")
    architecture: str = Field("causal", description="how it reads a text; causal: from left to right")
    checkpoint_path: str = Field(
        "", description="a Hugging Face causal language model, by folder or hub name, or the folder of an earlier run"
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
    bitnet: BitNetSettings = BitNetSettings()
