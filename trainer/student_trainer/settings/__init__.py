"""The settings of a run as frozen records: the one definition of every setting, its default and its meaning.

May import nothing else of the trainer, and no torch. Open `run.py` first; every section has a file like it. `compose`
makes them from YAML and overrides; everything reads them. A run with an unknown name does not start;
`checkpoint.resume` says which settings a resumed run may change.
"""

from __future__ import annotations

from pydantic import model_validator

from student_trainer.settings.data import DataSettings
from student_trainer.settings.distillation import DistillationSettings
from student_trainer.settings.on_policy import OnPolicySettings
from student_trainer.settings.optim import (
    GroupSettings,
    MuonSettings,
    OptimSettings,
    QKClipSettings,
    ScheduleSettings,
    UndecayedGroupSettings,
)
from student_trainer.settings.run import CheckpointSettings, EvaluationSettings, LoggingSettings, RunSettings
from student_trainer.settings.section import Section
from student_trainer.settings.student import (
    DiffusionSettings,
    LoRASettings,
    LRCSettings,
    QuantisationSettings,
    StudentSettings,
)
from student_trainer.settings.teacher import PrefetchSettings, TeacherSettings
from student_trainer.settings.terms import TermSettings

__all__ = [
    "CheckpointSettings",
    "DataSettings",
    "DiffusionSettings",
    "DistillationSettings",
    "EvaluationSettings",
    "GroupSettings",
    "LRCSettings",
    "LoRASettings",
    "LoggingSettings",
    "MuonSettings",
    "OnPolicySettings",
    "OptimSettings",
    "PrefetchSettings",
    "QKClipSettings",
    "QuantisationSettings",
    "RunSettings",
    "ScheduleSettings",
    "Settings",
    "StudentSettings",
    "TeacherSettings",
    "TermSettings",
    "UndecayedGroupSettings",
]


class Settings(Section):
    """All settings of a run."""

    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    student: StudentSettings = StudentSettings()
    teacher: TeacherSettings = TeacherSettings()
    distillation: DistillationSettings = DistillationSettings()
    on_policy: OnPolicySettings = OnPolicySettings()
    optim: OptimSettings = OptimSettings()
    prefetch: PrefetchSettings = PrefetchSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    logging: LoggingSettings = LoggingSettings()

    @model_validator(mode="after")
    def _consistent(self) -> Settings:
        asking = [name for name, term in self.distillation.by_name().items() if term.needs_teacher]
        if self.teacher.kind == "none" and asking:
            raise ValueError(
                f"teacher.kind is none, but these losses need a teacher: {', '.join(asking)}. Set "
                "distillation=cross_entropy, or name a teacher, as in teacher=remote teacher.url=http://HOST:PORT"
            )
        mixture = self.data.mixture
        if self.teacher.kind == "none" and mixture.needs_teacher:
            raise ValueError(f"teacher.kind is none, but data.mixture.policy={mixture.policy} compares with a teacher")
        if getattr(mixture, "precondition", False) and self.optim.kind != "adamw":
            raise ValueError(
                f"data.mixture.precondition divides by Adam's second moments, which optim.kind={self.optim.kind} does "
                "not keep for the student's matrices: leave it out"
            )
        warmup = self.student.quantisation.warmup_steps
        if self.student.quantiser != "none" and warmup and warmup >= self.run.steps:
            raise ValueError(
                f"student.quantisation.warmup_steps is {warmup}, but run.steps is {self.run.steps}: the student would "
                "never be fully quantised; choose a warm-up that ends before the run does"
            )
        if self.on_policy.active:
            self._check_on_policy()
        return self

    def _check_on_policy(self) -> None:
        needed = self.on_policy.prompt_tokens + self.on_policy.new_tokens
        if self.teacher.kind == "none":
            raise ValueError(
                f"on_policy.share is {self.on_policy.share}, but there is no teacher to score the student's text"
            )
        mixture = self.data.mixture
        if mixture.policy != "static" and self.on_policy.share == 1:
            raise ValueError(
                f"on_policy.share is 1, so no batch comes from the data, which data.mixture.policy={mixture.policy} "
                "depends on: set policy static, or a smaller share"
            )
        if mixture.policy != "static" and mixture.lag <= self.on_policy.lag:
            raise ValueError(
                f"data.mixture.lag is {mixture.lag}, but the student's text is prompted with a batch "
                f"{self.on_policy.lag} updates ahead (on_policy.lag), which has no weights yet: raise data.mixture.lag"
            )
        if needed > self.data.seq_len:
            raise ValueError(
                f"on_policy: {self.on_policy.prompt_tokens} prompt tokens and {self.on_policy.new_tokens} new ones "
                f"are {needed}, a row has {self.data.seq_len}: lower prompt_tokens or new_tokens, or raise data.seq_len"
            )
