"""How gradients become updates: the section `optim`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from student_trainer.settings.section import Positive, Section, Share


class ScheduleSettings(Section):
    """The learning rate, a function of the step only."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = Field(
        "cosine", description="shape of the learning rate after the warm-up; wsd: constant, then a linear decay"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    decay_steps: int | None = Field(
        None, ge=1, description="wsd: length of the decay in steps; null: a tenth of run.steps"
    )
    floor: Share = Field(0.1, description="final learning rate, as a fraction of each group's peak")


class GroupSettings(Section):
    """Settings of one parameter group; null: those of the optimizer."""

    learning_rate: float | None = Field(
        None, ge=0, description="peak learning rate of this group; null: optim.learning_rate"
    )
    weight_decay: float | None = Field(None, ge=0, description="weight decay of this group; null: optim.weight_decay")
    floor: Share | None = Field(
        None, description="final learning rate as a fraction of the peak; null: optim.schedule.floor"
    )


class UndecayedGroupSettings(GroupSettings):
    """A parameter group without weight decay by default."""

    weight_decay: float | None = Field(
        0.0, ge=0, description="weight decay of this group, by default none; null: optim.weight_decay"
    )


class MuonSettings(Section):
    """Settings of Muon; its learning rate, weight decay and floor are those of the group `matrices`."""

    momentum: float = Field(0.95, ge=0, lt=1, description="momentum of Muon")
    nesterov: bool = Field(True, description="Nesterov momentum")
    newton_schulz_steps: int = Field(
        5, ge=1, lt=100, description="Newton-Schulz iterations that orthogonalise an update"
    )


class QKClipSettings(Section):
    """Heads whose largest attention logit exceeds `tau` in a step are rescaled to it after the update."""

    tau: Positive | None = Field(
        None,
        description="largest attention logit allowed: heads that exceed it are rescaled after the update (Kimi K2 "
        "uses 100); null: no clipping",
    )
    alpha: Share = Field(
        0.5, description="share of the rescaling that goes to the query weights; the key weights take the rest"
    )


class OptimSettings(Section):
    """How gradients become updates."""

    kind: Literal["adamw", "muon_clip"] = Field(
        "adamw", description="adamw; muon_clip: Muon for the hidden weight matrices and AdamW for everything else"
    )
    learning_rate: Positive = Field(3e-4, description="peak learning rate")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="AdamW's beta1 and beta2")
    eps: Positive = Field(1e-8, description="AdamW's epsilon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, multiplied by the learning rate")
    clip_norm: Positive | None = Field(
        1.0, description="clip the global norm of the gradient to this; null: no clipping"
    )
    micro_batch_rows: int | None = Field(
        None,
        ge=1,
        description="rows per forward and backward pass on each rank (gradient accumulation); null: the whole batch "
        "at once",
    )
    muon: MuonSettings = MuonSettings()
    qk_clip: QKClipSettings = QKClipSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    matrices: GroupSettings = GroupSettings()
    embeddings: UndecayedGroupSettings = Field(UndecayedGroupSettings(), description="embeddings and head")
    vectors: UndecayedGroupSettings = Field(UndecayedGroupSettings(), description="norms and biases")
