"""A run's folder, length, evaluation, checkpoints and logs: sections `run`, `evaluation`, `checkpoint`, `logging`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from student_trainer.settings.section import Names, Positive, Section

Threshold = Annotated[float, Field(gt=0, le=1)]


class RunSettings(Section):
    """Where the run is on disk, how long it is, and what makes it reproducible."""

    root: str = Field("runs", description="folder that holds all runs")
    id: str | None = Field(
        None, description="name of the run's folder under run.root; null: a timestamp and a random suffix"
    )
    steps: int = Field(
        1000,
        ge=0,
        description="number of optimizer updates; 0: save the student as initialised, its adapter calibrated if it has "
        "one",
    )
    time_limit_s: float | None = Field(
        None,
        gt=0,
        description="seconds after which no new step starts: the run then ends as usual, evaluated and saved; null: "
        "no limit",
    )
    seed: int = Field(
        0, ge=0, le=2**63 - 1, description="seed of everything random: new weights, data order, masks, sampling"
    )
    resume: Literal["auto", "never", "require"] = Field(
        "auto",
        description="auto: resume from the latest checkpoint under run.id, or start if there is none; require: fail "
        "if there is none; never: fail if there is one",
    )
    allow_changes: Names = Field(
        (),
        description="settings allowed to differ from the checkpoint's on resume, by dotted name, such as "
        "[optim.learning_rate]",
    )
    device: str = Field("auto", description="device of the student: cpu, cuda, cuda:N; auto: a GPU if there is one")
    threads: int | None = Field(None, ge=1, description="CPU threads of torch; null: torch's own default")


class EvaluationSettings(Section):
    """Evaluation on held-out data."""

    every: int = Field(
        100,
        ge=0,
        description="steps between evaluations on held-out data, which also run at the end; 0: never evaluate",
    )
    at_start: bool = Field(True, description="evaluate before the first step too")
    top_k: int | None = Field(None, ge=1, description="K of the reported KL(teacher‖student); null: teacher.top_k")
    kl: Literal["top_k", "full"] = Field(
        "top_k",
        description="top_k: KL over the teacher's top K and one bucket for the tail; full: over the whole "
        "vocabulary, from the teacher's hidden states",
    )
    samples: int = Field(2, ge=0, description="continuations to generate per source, for people to read; 0: none")
    prompt_tokens: int = Field(
        24, ge=1, description="prompt length of those samples, in tokens; a chat is cut before its answer"
    )
    sample_tokens: int = Field(48, ge=1, description="maximum length of those samples, in new tokens")
    infilled: int = Field(
        16, ge=0, description="block-diffusion students: held-out spans to infill per source; 0: none"
    )
    thresholds: tuple[Threshold, ...] = Field(
        (),
        description="block-diffusion students: confidence thresholds to decode with; the teacher scores the texts, "
        "and the speed is reported",
    )
    judged: int = Field(
        8, ge=1, description="block-diffusion students: texts per source and threshold that the teacher scores"
    )
    temperature: Positive = Field(1.0, description="sampling temperature of those texts")


class CheckpointSettings(Section):
    """When the run is saved, and how many checkpoints are kept."""

    every: int = Field(500, ge=0, description="steps between checkpoints; 0: only at the end and on SIGTERM")
    keep: int = Field(2, ge=1, description="number of checkpoints kept; older ones are deleted")
    on_failure: Literal["continue", "stop"] = Field(
        "continue", description="if a checkpoint cannot be written: continue training with a warning, or stop the run"
    )
    url: str | None = Field(
        None,
        description="upload a copy of every checkpoint to URL/RUN_ID: s3://, gs:// or any other fsspec URL; null: "
        "no copy",
    )
    storage_options: dict[str, Any] = Field(
        {}, description="fsspec options for checkpoint.url; keys and secrets belong in the environment"
    )
    upload_within_s: float = Field(300.0, gt=0, description="seconds that a finished run waits for its last upload")


class LoggingSettings(Section):
    """Where metrics go besides metrics.jsonl and evaluation.jsonl, which are always written."""

    wandb: Literal["auto", "offline", "off"] = Field(
        "auto", description="Weights & Biases; auto: on if WANDB_API_KEY is set; offline: logged to disk; off"
    )
    project: str = Field("stillhouse", description="project name in Weights & Biases")
    tensorboard: bool = Field(False, description="write TensorBoard event files into the run's folder")
    prometheus_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="serve metrics for Prometheus on this port, at /metrics; 0: any free port; null: off",
    )
    prometheus_host: str = Field("127.0.0.1", description="address that /metrics listens on")
    progress: Literal["auto", "on", "off"] = Field(
        "auto", description="progress bar; auto: if the output is a terminal"
    )
