"""The relation term of the loss: the section `distillation.attention`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from student_trainer.settings.section import Schedule, Section
from teacher_proto.compute.relations import layer_index

Layer = int | float | str
DEEP = 10_000  # names and fractions are checked against this depth, before any model is known


class AttentionSettings(Section):
    """KL(teacher || student) of the relations of Q, K and V, whose states come from `teacher.attention_url`.

    Reduction: the value of a counted token is the mean, over the positions of its document and the R relation heads, of
    the KL summed over Q, K and V. Form official divides by R once more; form maps takes the mean over positions and
    heads. Then as for every term: multiplied by the coefficient, summed over tokens, divided by their number.
    """

    kind: ClassVar[str] = "attention_relations"
    needs_teacher: ClassVar[bool] = True

    coefficient: float | None = Field(
        None, ge=0, description="weight of the attention loss; docs/guides/bitdistill.md has its reduction; null: off"
    )
    form: Literal["official", "paper", "minilm", "maps"] = Field(
        "official",
        description="official: MiniLM's code, cosine similarities, no causal mask; paper: scaled dot products, no "
        "mask; minilm: scaled dot products, causal mask; maps: attention probabilities, those of a model "
        "that scales by 1/sqrt(head width) and has no soft cap (within=blocks only)",
    )
    within: Literal["documents", "blocks"] = Field(
        "documents",
        description="positions that are related to one another: all of a document, or those of one block of a "
        "block-diffusion student",
    )
    relation_heads: int = Field(
        32, ge=1, description="number of relation heads R that the states of both models are split into"
    )
    layer: Layer = Field(
        "late_middle",
        description="the teacher's layer: an index from 0, a fraction of the depth, or first, middle, late_middle, "
        "last",
    )
    student_layer: Layer | None = Field(
        None,
        description="the student's layer, in the same form; null: distillation.attention.layer applied to the "
        "student's depth",
    )
    schedule: Schedule = Field(
        None,
        description="multiply the coefficient by a piecewise linear function of the step, given as [[step, factor], "
        "...]; null: constant",
    )
    transport: Literal["float16", "int8"] = Field(
        "float16", description="number format in which the teacher's states are sent"
    )

    @property
    def active(self) -> bool:
        return self.coefficient is not None

    @model_validator(mode="after")
    def _maps_are_of_blocks(self) -> AttentionSettings:
        if self.form == "maps" and self.within != "blocks":
            raise ValueError(
                "distillation.attention.form is maps, which are only compared within blocks: set "
                "distillation.attention.within=blocks, or a form of relations"
            )
        return self

    @field_validator("layer", "student_layer")
    @classmethod
    def _can_be_a_layer(cls, layer: Layer | None) -> Layer | None:
        if layer is not None:
            layer_index(layer, num_layers=DEEP)
        return layer
