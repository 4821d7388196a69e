"""Who answers, and how far ahead they are asked: the sections `teacher` and `prefetch`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from student_trainer.settings.section import Names, Positive, Section


class OneTeacher(Section):
    """One source of targets: a service, a model in this process, or a store of answers."""

    url: Names = Field(("http://127.0.0.1:8000",), description="remote: one teacher, or a list of replicas of it")
    key_variable: str = Field("STILLHOUSE_KEY", description="remote: the environment variable that holds the key")
    model: str = Field("", description="local: folder or hub name of a Hugging Face causal language model")
    revision: str | None = Field(None, description="local: hub revision; a commit keeps a run repeatable")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="local: auto is the checkpoint's own where the hardware computes in it, else float32"
    )
    device: str = Field("auto", description="local: auto, cpu, cuda or cuda:N")
    max_batch_tokens: int = Field(4096, ge=1, description="local: tokens of a forward pass, padding included")
    store: str = Field("", description="cached: folder of a target store, or folder or URL of a target dataset")
    store_bytes: int = Field(50 * 2**30, ge=2**20, description="cached, written through: the store's size at most")
    store_cache: str = Field(
        "",
        description="cached, a dataset in a bucket: folder for what was fetched of it; empty: one for this run alone",
    )
    store_cache_bytes: int = Field(
        10 * 2**30, ge=2**20, description="cached, a dataset in a bucket: that folder's size"
    )
    store_ahead: int = Field(
        2, ge=0, description="cached, a dataset in a bucket: row groups fetched before they are asked for"
    )
    on_miss: Literal["stop", "remote"] = Field(
        "stop", description="cached, what the store has not: stop, or ask teacher.url and write it through"
    )
    fingerprint: str | None = Field(None, description="the teacher that must answer; null: whoever does at the start")


class MemberSettings(OneTeacher):
    """One of several teachers."""

    kind: Literal["remote", "local", "cached"] = "remote"
    weight: Positive = Field(1.0, description="ensemble: the share, against the others'")
    sources: Names = Field((), description="by_source: the sources of data that this teacher answers for")


class TeacherSettings(OneTeacher):
    """Who answers, what it is asked, and how long the run waits for it."""

    kind: Literal["remote", "local", "cached", "mixed", "none"] = "remote"
    attention_url: Names = Field(("http://127.0.0.1:8001",), description="the attention service beside it")
    members: dict[str, MemberSettings] = Field(default_factory=dict, description="mixed: the teachers by name")
    mix: Literal["ensemble", "by_source"] = Field(
        "ensemble", description="mixed: all answer and their probabilities are mixed, or one for each source of data"
    )
    top_k: int = Field(64, ge=1, description="logprobs a token")
    list_missing: bool = Field(
        True, description="cached, a dataset: look up all documents of the run before it begins, and list what it lacks"
    )
    sanity: Literal["stop", "warn", "off"] = Field("stop", description="check of the first targets' alignment")
    same_tokenizer: Literal["check", "trust"] = Field("check", description="trust: don't compare tokenizers")
    tokenizer: str | None = Field(None, description="the teacher's tokenizer, to name the tokens that differ")
    deadline_s: Positive = Field(300.0, description="longest time without progress of one request with all its retries")
    read_timeout_s: Positive = Field(60.0, description="longest silence: a working teacher reports progress")
    start_within_s: float = Field(0.0, ge=0, description="how long the start waits for a teacher to come up")
    log_every_s: Positive = Field(10.0, description="how often an outage is spoken of")
    save_after_s: Positive = Field(60.0, description="outage after which the run is saved once")
    outage_timeout_s: Positive = Field(3600.0, description="outage after which the run stops")

    @model_validator(mode="after")
    def _members_fit(self) -> TeacherSettings:
        if (self.kind == "mixed") != bool(self.members):
            raise ValueError(
                "teacher.kind is mixed and teacher.members is empty: name the teachers, as in "
                "teacher.members.big.url=http://HOST:PORT"
                if self.kind == "mixed"
                else f"teacher.members are given and teacher.kind is {self.kind}: say teacher=mixed"
            )
        if self.kind == "mixed" and self.mix == "by_source":
            answered = [source for member in self.members.values() for source in member.sources]
            if not answered or len(set(answered)) != len(answered) or not all(m.sources for m in self.members.values()):
                raise ValueError(
                    "teacher.mix is by_source: give each of teacher.members the `sources` that it answers for, and no "
                    "source to two"
                )
        return self

    @property
    def all_members(self) -> dict[str, OneTeacher]:
        """The teachers by name with the kind of each; one, without a name, where they are not mixed."""
        return dict(self.members) if self.kind == "mixed" else {"": self}


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
