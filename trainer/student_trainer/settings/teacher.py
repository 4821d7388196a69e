"""Where targets come from, and how far ahead they are requested: the sections `teacher` and `prefetch`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from student_trainer.settings.section import Names, Positive, Section


class OneTeacher(Section):
    """One source of targets: a service, a model in this process, or a target store."""

    url: Names = Field(
        ("http://127.0.0.1:8000",),
        description="kind remote: URL of the teacher, or a list of URLs of replicas of the same teacher",
    )
    key_variable: str = Field("STILLHOUSE_KEY", description="kind remote: environment variable that holds the API key")
    model: str = Field("", description="kind local: folder or hub name of a Hugging Face causal language model")
    revision: str | None = Field(
        None, description="kind local: revision on the hub; a commit makes the run reproducible"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="kind local: dtype of the weights; auto: the checkpoint's if the hardware computes in it, "
        "else float32",
    )
    device: str = Field("auto", description="kind local: cpu, cuda, cuda:N; auto: a GPU if there is one")
    max_batch_tokens: int = Field(4096, ge=1, description="kind local: tokens per forward pass, padding included")
    store: str = Field("", description="kind cached: folder of a target store, or folder or URL of a target dataset")
    store_bytes: int = Field(
        50 * 2**30,
        ge=2**20,
        description="kind cached with on_miss=remote: maximum size of the store; the least recently used targets "
        "are evicted",
    )
    store_cache: str = Field(
        "",
        description="kind cached, dataset in a bucket: local folder that caches what was downloaded; empty: a "
        "temporary one",
    )
    store_cache_bytes: int = Field(
        10 * 2**30, ge=2**20, description="kind cached, dataset in a bucket: maximum size of that folder, in bytes"
    )
    store_ahead: int = Field(
        2, ge=0, description="kind cached, dataset in a bucket: Parquet row groups to download ahead of use"
    )
    on_miss: Literal["stop", "remote"] = Field(
        "stop",
        description="kind cached, for a sequence that is not in the store: stop; remote: request its targets from "
        "teacher.url and add them to the store",
    )
    fingerprint: str | None = Field(
        None, description="fingerprint that the teacher must have; null: that of the teacher that the run begins with"
    )


class MemberSettings(OneTeacher):
    """One of several teachers."""

    kind: Literal["remote", "local", "cached"] = Field(
        "remote", description="where this teacher's targets come from; see teacher.kind"
    )
    weight: Positive = Field(
        1.0, description="mix=ensemble: weight of this teacher in the mixture, relative to the others"
    )
    sources: Names = Field((), description="mix=by_source: data sources that this teacher scores")


class TeacherSettings(OneTeacher):
    """Where targets come from, what is requested, and how long the run waits for it."""

    kind: Literal["remote", "local", "cached", "mixed", "none"] = Field(
        "remote",
        description="where targets come from: remote: a service; local: a model in this process; cached: a store or "
        "dataset of targets; mixed: several teachers; none",
    )
    attention_url: Names = Field(
        ("http://127.0.0.1:8001",),
        description="URL of the attention service, or a list of replicas; only read if distillation.attention is on",
    )
    members: dict[str, MemberSettings] = Field(default_factory=dict, description="kind mixed: the teachers, by name")
    mix: Literal["ensemble", "by_source"] = Field(
        "ensemble",
        description="kind mixed; ensemble: average the teachers' probabilities; by_source: one teacher for each "
        "data source",
    )
    top_k: int = Field(64, ge=1, description="K: largest logprobs requested per position")
    list_missing: bool = Field(
        True,
        description="kind cached, dataset: look up all documents of the run before it starts, and list those "
        "without targets",
    )
    sanity: Literal["stop", "warn", "off"] = Field(
        "stop",
        description="what to do if the first targets do not look like predictions of the next token (misaligned, or "
        "another tokenizer): stop, warn, or off: do not check",
    )
    same_tokenizer: Literal["check", "trust"] = Field(
        "check", description="check: refuse a teacher whose tokenizer differs from the student's; trust: do not compare"
    )
    tokenizer: str | None = Field(
        None, description="folder or hub name of the teacher's tokenizer; only used to list the tokens that differ"
    )
    deadline_s: Positive = Field(
        300.0, description="seconds without progress after which a request fails, retries included"
    )
    read_timeout_s: Positive = Field(
        60.0,
        description="seconds of silence after which a connection is dropped; a teacher at work reports progress "
        "every few seconds",
    )
    start_within_s: float = Field(
        0.0, ge=0, description="seconds to wait for the teacher to come up when the run starts"
    )
    log_every_s: Positive = Field(10.0, description="while the teacher is unreachable: seconds between log messages")
    save_after_s: Positive = Field(60.0, description="seconds of an outage after which a checkpoint is saved, once")
    outage_timeout_s: Positive = Field(3600.0, description="seconds of an outage after which the run stops")

    @model_validator(mode="after")
    def _members_fit(self) -> TeacherSettings:
        if (self.kind == "mixed") != bool(self.members):
            raise ValueError(
                "teacher.kind is mixed and teacher.members is empty: name the teachers, as in "
                "teacher.members.big.url=http://HOST:PORT"
                if self.kind == "mixed"
                else f"teacher.members are given, but teacher.kind is {self.kind}: set teacher=mixed"
            )
        if self.kind == "mixed" and self.mix == "by_source":
            answered = [source for member in self.members.values() for source in member.sources]
            if not answered or len(set(answered)) != len(answered) or not all(m.sources for m in self.members.values()):
                raise ValueError(
                    "teacher.mix is by_source: give each of teacher.members the `sources` that it scores, and no "
                    "source to two of them"
                )
        return self

    @property
    def all_members(self) -> dict[str, OneTeacher]:
        """The teachers by name; if they are not mixed, the only one under an empty name."""
        return dict(self.members) if self.kind == "mixed" else {"": self}


class PrefetchSettings(Section):
    """How far ahead targets are requested."""

    depth: int | Literal["auto"] = Field(
        "auto",
        description="batches whose targets are requested ahead of the one being trained on; auto: as many as hide "
        "the teacher's latency; 0: none",
    )
    max_depth: int = Field(32, ge=1, description="depth auto: upper limit, in batches")
    max_bytes: int = Field(2**30, ge=1, description="depth auto: upper limit, in bytes of targets in flight or ready")

    @model_validator(mode="after")
    def _depth_in_range(self) -> PrefetchSettings:
        if self.depth != "auto" and self.depth < 0:
            raise ValueError(f"prefetch.depth is {self.depth}: give 0 or more, or auto")
        return self
