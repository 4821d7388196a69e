"""The model that learns: the section `student`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from student_trainer.settings.section import Section


class StudentSettings(Section):
    """The model that learns."""

    kind: Literal["causal"] = "causal"
    checkpoint_path: str = Field("", description="folder or hub name of a Hugging Face causal language model")
    revision: str | None = Field(None, description="hub revision; a commit keeps a run repeatable")
    tokenizer: str | None = Field(None, description="folder or hub name of its tokenizer; null: checkpoint_path")
    compute: Literal["float32", "bfloat16"] = Field("float32", description="autocast dtype; parameters stay float32")
    attention: Literal["auto", "sdpa", "flex"] = Field("auto", description="auto: flex on a GPU, sdpa elsewhere")
    gradient_checkpointing: bool = False
