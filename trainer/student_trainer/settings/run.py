"""Where a run lives, is saved and evaluated, and its figures go: `run`, `evaluation`, `checkpoint` and `logging`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from student_trainer.settings.section import Names, Positive, Section

Threshold = Annotated[float, Field(gt=0, le=1)]


class RunSettings(Section):
    """Where the run lives, how long it is, and what makes it repeatable."""

    root: str = Field("runs", description="folder of all runs")
    id: str | None = Field(None, description="this run's folder under root; null: made of the time and a random tail")
    steps: int = Field(
        1000,
        ge=0,
        description="optimizer updates; 0: the student is saved as it starts, calibrated if its adapter asks it",
    )
    time_limit_s: float | None = Field(
        None, gt=0, description="after it no step begins, and the run ends as after its last: evaluated, saved"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1)
    resume: Literal["auto", "never", "require"] = Field(
        "auto", description="what to do about a checkpoint that is there"
    )
    allow_changes: Names = Field((), description="settings that may differ from the checkpoint's, by dotted name")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    threads: int | None = Field(None, ge=1, description="torch's threads on a CPU; null leaves them as they are")


class EvaluationSettings(Section):
    """The held-out figures."""

    every: int = Field(100, ge=0, description="steps between evaluations, and at the end; 0: never")
    at_start: bool = Field(True, description="before the first step too")
    top_k: int | None = Field(None, ge=1, description="K of the KL; null: teacher.top_k")
    kl: Literal["top_k", "full"] = Field("top_k", description="over K ids and the rest, or all (from hidden states)")
    samples: int = Field(2, ge=0, description="held-out texts a source that the student continues, to be read; 0: none")
    prompt_tokens: int = Field(24, ge=1, description="tokens of such a text that it is given; a chat up to its answer")
    sample_tokens: int = Field(48, ge=1, description="tokens that it writes, at most")
    infilled: int = Field(
        16, ge=0, description="spans of held-out text a source that a block-diffusion student fills in; 0: none"
    )
    thresholds: tuple[Threshold, ...] = Field(
        (), description="at each, a block-diffusion student writes texts, and the teacher judges them"
    )
    judged: int = Field(8, ge=1, description="such texts a source and threshold")
    temperature: Positive = Field(1.0, description="at which they are drawn")


class CheckpointSettings(Section):
    """When the run is saved, and how much is kept."""

    every: int = Field(500, ge=0, description="steps between saves; 0: only at the end and on SIGTERM")
    keep: int = Field(2, ge=1, description="checkpoints kept, newest first")
    on_failure: Literal["continue", "stop"] = Field("continue", description="what a save that failed does to the run")
    url: str | None = Field(None, description="s3://, gs:// or any fsspec URL: a copy of each under URL/RUN_ID")
    storage_options: dict[str, Any] = Field({}, description="for fsspec; keys and secrets belong in the environment")
    upload_within_s: float = Field(300.0, gt=0, description="how long a run waits at its end for its last upload")


class LoggingSettings(Section):
    """Where figures go beside metrics.jsonl and evaluation.jsonl, which are always written."""

    wandb: Literal["auto", "offline", "off"] = Field("auto", description="auto: online where WANDB_API_KEY is set")
    project: str = "stillhouse"
    tensorboard: bool = False
    prometheus_port: int | None = Field(None, ge=0, le=65_535, description="port of /metrics; 0 takes a free one")
    prometheus_host: str = Field("127.0.0.1", description="address that /metrics listens at")
    progress: Literal["auto", "on", "off"] = Field("auto", description="auto: where the terminal can show it")
