"""Who answers, and how far ahead they are asked: the sections `teacher` and `prefetch`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from student_trainer.settings.section import Names, Positive, Section


class TeacherSettings(Section):
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


class PrefetchSettings(Section):
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
