"""How gradients become updates: the section `optim`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from student_trainer.settings.section import Positive, Section, Share


class ScheduleSettings(Section):
    """The learning rate as a function of the step alone."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="steps in which the rate rises in a straight line")
    decay_steps: int | None = Field(None, ge=1, description="wsd: steps of the fall; null: a tenth of the run")
    floor: Share = Field(0.1, description="the rate at the end, as a share of each group's own peak")


class GroupSettings(Section):
    """What one group of parameters has of its own; null takes the optimizer's."""

    learning_rate: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    floor: Share | None = None


class UndecayedGroupSettings(GroupSettings):
    """A group without decay, if not told otherwise."""

    weight_decay: float | None = Field(0.0, ge=0)


class MuonSettings(Section):
    """Muon's own; its rate, decay and floor are those of the group `matrices`."""

    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    newton_schulz_steps: int = Field(5, ge=1, lt=100, description="iterations towards the orthogonal matrix")


class QKClipSettings(Section):
    """Attention whose largest logit exceeds `tau` in a step is scaled back to it after the update."""

    tau: Positive | None = Field(None, description="the largest logit allowed, 100 in Kimi K2; null: no clipping")
    alpha: Share = Field(0.5, description="the query's share of the scaling; the key has the rest")


class OptimSettings(Section):
    """How gradients become updates."""

    kind: Literal["adamw", "muon_clip"] = Field("adamw", description="muon_clip: Muon for hidden matrices, else AdamW")
    learning_rate: Positive = 3e-4
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: Positive | None = Field(1.0, description="largest norm of the gradient; null: no clipping")
    micro_batch_rows: int | None = Field(None, ge=1, description="rows a forward pass; null: the whole batch")
    muon: MuonSettings = MuonSettings()
    qk_clip: QKClipSettings = QKClipSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    matrices: GroupSettings = GroupSettings()
    embeddings: UndecayedGroupSettings = Field(UndecayedGroupSettings(), description="embeddings and head")
    vectors: UndecayedGroupSettings = Field(UndecayedGroupSettings(), description="norms and biases")
