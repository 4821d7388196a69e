"""What a run is, as frozen records: the one definition of every setting, its default and its meaning.

Made by `compose` out of YAML and overrides, read by everything. Nothing here imports torch. A name that is not here
stops the start; `resume.py` says which of these a resumed run may change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from student_trainer.data.settings import DataSettings

if TYPE_CHECKING:
    from student_trainer.losses.terms import Term


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _tuple_of_one(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_tuple_of_one)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class RunSettings(_Section):
    """Where the run lives, how long it is, and what makes it repeatable."""

    root: str = Field("runs", description="folder of all runs")
    id: str | None = Field(None, description="this run's folder under root; null: made of the time and a random tail")
    steps: int = Field(1000, ge=1, description="optimizer updates")
    seed: int = Field(0, ge=0, le=2**63 - 1)
    resume: Literal["auto", "never", "require"] = Field(
        "auto", description="what to do about a checkpoint that is there"
    )
    allow_changes: Names = Field((), description="settings that may differ from the checkpoint's, by dotted name")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, ge=1, description="torch's threads on a CPU; null leaves them as they are")


class StudentSettings(_Section):
    """The model that learns."""

    kind: Literal["causal"] = "causal"
    checkpoint_path: str = Field("", description="folder or hub name of a Hugging Face causal language model")
    revision: str | None = Field(None, description="hub revision; a commit keeps a run repeatable")
    tokenizer: str | None = Field(None, description="folder or hub name of its tokenizer; null: checkpoint_path")
    compute: Literal["float32", "bfloat16"] = Field("float32", description="autocast dtype; parameters stay float32")
    attention: Literal["auto", "sdpa", "flex"] = Field("auto", description="auto: flex on a GPU, sdpa elsewhere")
    gradient_checkpointing: bool = False


class TeacherSettings(_Section):
    """Who answers, what it is asked, and how long the run waits for it."""

    kind: Literal["remote", "none"] = "remote"
    url: Names = Field(("http://127.0.0.1:8000",), description="one teacher, or a list of replicas of it")
    key_variable: str = Field("STILLHOUSE_KEY", description="the environment variable that holds the key")
    fingerprint: str | None = Field(None, description="the teacher that must answer; null: whoever does at the start")
    top_k: int = Field(64, ge=1, description="logprobs a token")
    sanity: Literal["stop", "warn", "off"] = Field("stop", description="check of the first targets' alignment")
    same_tokenizer: Literal["check", "trust"] = Field("check", description="trust: don't compare tokenizers")
    tokenizer: str | None = Field(None, description="the teacher's tokenizer, to name the tokens that differ")
    deadline_s: Positive = Field(300.0, description="one request with all its retries")
    read_timeout_s: Positive = Field(60.0, description="longest silence inside an answer")
    start_within_s: float = Field(0.0, ge=0, description="how long the start waits for a teacher to come up")
    say_every_s: Positive = Field(30.0, description="how often an outage is spoken of")
    save_after_s: Positive = Field(60.0, description="outage after which the run is saved once")
    give_up_after_s: Positive = Field(3600.0, description="outage after which the run stops")


class TermSettings(_Section):
    """One summand of the loss; see `losses.terms.Term` for the exact meaning of each field."""

    kind: str | None = Field(None, description="which loss; null: the term's name")
    coefficient: float = 1.0
    temperature: float = 1.0
    tail: Literal["bucket", "renormalise"] = "bucket"
    temperature_squared: bool = Field(False, description="multiply by the temperature squared")
    beta: float = 0.5
    alpha: float = 0.1
    support: Literal["top_k", "gather", "sampled", "full"] = "top_k"

    def term(self, name: str) -> Term:
        """The term that the losses read. ValueError for one that cannot be."""
        from student_trainer.losses.terms import Term  # brings torch

        return Term(name=name, kind=self.kind or name, **self.model_dump(exclude={"kind"}))


class DistillationSettings(_Section):
    """The loss: its terms by name."""

    terms: dict[str, TermSettings] = Field(default_factory=lambda: {"cross_entropy": TermSettings()})
    chunk_rows: int | None = Field(None, ge=1, description="rows whose logits exist at a time; null: by memory")

    def build(self) -> tuple[Term, ...]:
        """The terms in the order of their names in the settings. ValueError for one that cannot be."""
        if not self.terms:
            raise ValueError("distillation.terms is empty: name at least one loss")
        return tuple(settings.term(name) for name, settings in self.terms.items())


class ScheduleSettings(_Section):
    """The learning rate as a function of the step alone."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0, description="steps in which the rate rises in a straight line")
    decay_steps: int | None = Field(None, ge=1, description="wsd: steps of the fall; null: a tenth of the run")
    floor: Share = Field(0.1, description="the rate at the end, as a share of each group's own peak")


class GroupSettings(_Section):
    """What one group of parameters has of its own; null takes the optimizer's."""

    learning_rate: float | None = Field(None, ge=0)
    weight_decay: float | None = Field(None, ge=0)
    floor: Share | None = None


class UndecayedGroupSettings(GroupSettings):
    """A group without decay, if not told otherwise."""

    weight_decay: float | None = Field(0.0, ge=0)


class MuonSettings(_Section):
    """Muon's own; its rate, decay and floor are those of the group `matrices`."""

    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    newton_schulz_steps: int = Field(5, ge=1, lt=100, description="iterations towards the orthogonal matrix")


class QKClipSettings(_Section):
    """Attention whose largest logit exceeds `tau` in a step is scaled back to it after the update."""

    tau: Positive | None = Field(None, description="the largest logit allowed, 100 in Kimi K2; null: no clipping")
    alpha: Share = Field(0.5, description="the query's share of the scaling; the key has the rest")


class OptimSettings(_Section):
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


class PrefetchSettings(_Section):
    """How far ahead targets are asked for."""

    depth: int | Literal["auto"] = Field(
        "auto", description="batches in flight beside the one in use; auto: by latency"
    )
    max_depth: int = Field(32, ge=1, description="auto: never more than this")
    max_bytes: int = Field(2**30, ge=1, description="auto: bytes of targets in flight or ready")

    @model_validator(mode="after")
    def _depth_in_range(self) -> PrefetchSettings:
        if self.depth != "auto" and self.depth < 0:
            raise ValueError(f"prefetch.depth is {self.depth}: give 0 or more, or auto")
        return self


class EvaluationSettings(_Section):
    """The held-out figures."""

    every: int = Field(100, ge=0, description="steps between evaluations, at start and end too; 0: never")
    top_k: int | None = Field(None, ge=1, description="K of the KL; null: teacher.top_k")


class CheckpointSettings(_Section):
    """When the run is saved, and how much is kept."""

    every: int = Field(500, ge=0, description="steps between saves; 0: only at the end and on SIGTERM")
    keep: int = Field(2, ge=1, description="checkpoints kept, newest first")
    on_failure: Literal["continue", "stop"] = Field("continue", description="what a save that failed does to the run")


class LoggingSettings(_Section):
    """Where figures go beside metrics.jsonl and evaluation.jsonl, which are always written."""

    wandb: Literal["auto", "offline", "off"] = Field("auto", description="auto: online where WANDB_API_KEY is set")
    project: str = "stillhouse"
    tensorboard: bool = False
    progress: Literal["auto", "on", "off"] = Field("auto", description="auto: where the terminal can show it")


class Settings(_Section):
    """A whole run."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    student: StudentSettings = StudentSettings()
    teacher: TeacherSettings = TeacherSettings()
    distillation: DistillationSettings = DistillationSettings()
    optim: OptimSettings = OptimSettings()
    prefetch: PrefetchSettings = PrefetchSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    logging: LoggingSettings = LoggingSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        terms = self.distillation.terms.items()
        asking = [name for name, term in terms if (term.kind or name) != "cross_entropy"]
        if self.teacher.kind == "none" and asking:
            raise ValueError(f"teacher.kind is none, but the loss has {', '.join(asking)}, which need a teacher")
        return self
