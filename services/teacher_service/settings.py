"""The options of `stillhouse-teacher`: every one has an environment variable, `STILLHOUSE_` and its name.

Read by `main.py`; options shared with the attention service are in `serving.settings`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from serving.settings import ServiceSettings, build_settings, options_parser

PREFIX = "STILLHOUSE_"
EngineName = Literal["vllm", "hf", "scripted"]


class TeacherSettings(ServiceSettings):
    """Sizes in tokens, bytes or `tokens x (K + 1)`; times in seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX)
    program: ClassVar[str] = "stillhouse-teacher"
    # STILLHOUSE_KEY and the like are a client's: `teacher.key_variable` names it.
    others: ClassVar[tuple[str, ...]] = (
        f"{PREFIX}ATTENTION_", f"{PREFIX}KEY", f"{PREFIX}KEY_", f"{PREFIX}DEMO", f"{PREFIX}DIE_WITH_PARENT",
    )  # fmt: skip

    engine: EngineName = Field(
        "vllm", description="vllm: fast; hf: plain transformers, any causal model; scripted: no model, for tests"
    )
    max_top_k: int = Field(256, ge=1, le=4096, description="largest K that a request may specify")
    engine_args: str = Field(
        "",
        description='options for the engine in one string, as in --engine-args="--tensor-parallel-size 2"; options '
        "unknown to this command are appended",
    )
    script: str = Field("{}", description="engine scripted: what it does, as JSON")
    store: Path | None = Field(
        None,
        description="folder of a target store: targets are written to it, and read from it when they are requested "
        "again",
    )
    store_bytes: int = Field(
        50 * 2**30, ge=2**20, description="maximum size of the store; the least recently used targets are evicted"
    )

    @model_validator(mode="after")
    def _hang_together(self) -> Self:
        if self.script != "{}" and self.engine != "scripted":
            raise ValueError(f"--script is for --engine scripted, but the engine is {self.engine}")
        if self.engine_args and self.engine == "scripted":
            raise ValueError(f"{self.engine_args!r}: not an option of stillhouse-teacher with --engine {self.engine}")
        return self


def parse_settings(arguments: list[str]) -> TeacherSettings:
    """Settings from a command line and the environment. ValueError in one line; `--help` prints and exits."""
    parser = options_parser(
        TeacherSettings,
        description="Serve a language model as a teacher: POST /v1/targets, GET /v1/teacher, /docs.",
        epilog=f"Every option has an environment variable: --max-top-k is {PREFIX}MAX_TOP_K, MODEL is {PREFIX}MODEL. "
        "With --engine vllm, options that are not listed here are passed on to vLLM: --tensor-parallel-size 2. "
        "Without a server, `stillhouse-teacher fill` computes the targets of a data set, `stillhouse-teacher pack` "
        "turns a target store into Parquet files, `stillhouse-teacher dataset` checks and merges target datasets; each "
        "has its own --help.",
    )
    known, rest = parser.parse_known_args(arguments)
    given = {name: value for name, value in vars(known).items() if value is not None}
    if rest and known.model is not None and arguments.index(rest[0]) < arguments.index(known.model):
        raise ValueError(f"put MODEL before {rest[0]!r} and other options for the engine")
    if rest:
        # Quoted, as in the environment variable: the shell has removed the quotes around JSON.
        given["engine_args"] = f"{given.get('engine_args', '')} {shlex.join(rest)}".strip()
    return build_settings(TeacherSettings, given)
