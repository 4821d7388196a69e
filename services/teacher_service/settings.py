"""The options of `stillhouse-teacher`: every one has an environment variable, `STILLHOUSE_` and its name.

Read by `main.py`. An option on the command line beats its variable.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

PREFIX = "STILLHOUSE_"
EngineName = Literal["vllm", "hf", "scripted"]


class TeacherSettings(BaseSettings):
    """Sizes in tokens, bytes or `tokens x (K + 1)`; times in seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    model: str = Field(description="a folder with a model, or its name on a hub")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="port to listen on; 0 picks a free one")
    engine: EngineName = Field("vllm", description="vllm for speed, hf for any machine, scripted for tests")
    revision: str | None = Field(None, description="revision of a hub model, a commit for choice")
    name: str | None = Field(None, description="name to serve the model under, instead of its folder's or hub's")
    dtype: str = Field("auto", description="dtype of the weights: auto, bfloat16, float16 or float32")
    max_model_len: int | None = Field(None, ge=1, description="longest sequence; the model's own limit if not given")
    max_top_k: int = Field(256, ge=1, le=4096, description="largest K that may be asked for")
    engine_args: str = Field("", description="options for the engine itself; unknown options of this command are added")
    script: str = Field("{}", description="JSON: what the scripted engine is to do")
    keys: Path | None = Field(None, description="file with a line a student: NAME KEY, or NAME sha256:HEX")
    store: Path | None = Field(None, description="folder of the target store; answers are kept there and found again")
    store_bytes: int = Field(50 * 2**30, ge=2**20, description="size of the store; the least recently used leave")
    capacity: int = Field(2**26, ge=1, description="tokens x (K + 1) that may be in the house, waiting ones included")
    window: int = Field(16_384, ge=1, description="tokens handed to the engine at a time; turns are shared fairly")
    body_timeout: float = Field(10.0, gt=0, description="seconds for a request's body to arrive, and 1 per 64 KiB")
    stall_timeout: float = Field(60.0, gt=0, description="seconds after which a client that reads nothing is dropped")
    drain_time: float = Field(60.0, gt=0, description="seconds that accepted requests have after SIGTERM")
    tls_cert: Path | None = Field(None, description="certificate chain (PEM); turns TLS on")
    tls_key: Path | None = Field(None, description="private key (PEM)")
    tls_client_ca: Path | None = Field(None, description="only clients with a certificate signed by this CA (PEM)")
    log_format: Literal["json", "text"] = Field("json", description="form of the log on stderr")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    @model_validator(mode="after")
    def _hang_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        if self.script != "{}" and self.engine != "scripted":
            raise ValueError(f"--script is for --engine scripted, and the engine is {self.engine}")
        if self.engine_args and self.engine == "scripted":
            raise ValueError(f"{self.engine_args!r}: not an option of stillhouse-teacher with --engine {self.engine}")
        return self


def parse_settings(arguments: list[str]) -> TeacherSettings:
    """Settings from a command line and the environment. ValueError in one line; `--help` prints and exits."""
    known, rest = _parser().parse_known_args(arguments)
    given = {name: value for name, value in vars(known).items() if value is not None}
    if rest and known.model is not None and arguments.index(rest[0]) < arguments.index(known.model):
        raise ValueError(f"put MODEL before {rest[0]!r} and other options that are the engine's")
    if rest:
        given["engine_args"] = " ".join([given.get("engine_args", ""), *rest]).strip()
    try:
        return TeacherSettings(**given)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(one) for one in error.errors(include_url=False))) from None


def _explain(error: Any) -> str:
    if error["type"] == "missing":
        return f"{error['loc'][0]} is not given: stillhouse-teacher MODEL, or {PREFIX}{str(error['loc'][0]).upper()}"
    if not error["loc"]:
        return str(error["ctx"]["error"])
    return f"--{str(error['loc'][0]).replace('_', '-')}: {error['msg']}, got {error['input']!r}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stillhouse-teacher",
        description="Serve a language model as a teacher: POST /v1/targets, GET /v1/teacher, /docs.",
        epilog=f"Every option has an environment variable: --max-top-k is {PREFIX}MAX_TOP_K, MODEL is {PREFIX}MODEL. "
        "With --engine vllm, options that are not listed here go to vLLM: --tensor-parallel-size 2. "
        "Without a server: `stillhouse-teacher fill` scores a data set into a target store, `stillhouse-teacher pack` "
        "makes Parquet of it; each has its --help.",
        allow_abbrev=False,
    )
    for name, field in TeacherSettings.model_fields.items():
        default = "" if field.is_required() or field.default is None else f" (default: {field.default})"
        text = f"{field.description}{default}".replace("%", "%%")
        if name == "model":
            parser.add_argument("model", nargs="?", metavar="MODEL", help=text)
        else:
            choices = getattr(field.annotation, "__args__", None)
            names = [choice for choice in choices or () if isinstance(choice, str)]
            parser.add_argument(
                f"--{name.replace('_', '-')}", metavar="|".join(names) or name.split("_")[-1].upper(), help=text
            )
    return parser
