"""Options that every service has, and how a command line and the environment become settings.

Each service's `settings.py` adds its own fields. Every option also has an environment variable, the class's prefix and
its name; the command line takes precedence. Nothing slow is imported here, so that `--help` is immediate.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_OF_KUBERNETES = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)$")


class ServiceSettings(BaseSettings):
    """Sizes in tokens, bytes or numbers in responses; times in seconds. `program` is the command's name."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)
    program: ClassVar[str]
    renamed: ClassVar[Mapping[str, str]] = {}  # old names of fields, which are still accepted
    others: ClassVar[tuple[str, ...]] = ()  # variables of other programs; a name that ends in _ is a prefix

    model: str = Field(description="folder or hub name of the model")
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="port to listen on; 0: any free port")
    revision: str | None = Field(None, description="revision on the hub, preferably a commit")
    name: str | None = Field(
        None, description="name under which the model is served; its folder's or hub name if not given"
    )
    dtype: str = Field(
        "auto",
        description="dtype of the weights: bfloat16, float16, float32; auto: the checkpoint's own if the hardware "
        "computes in it, else float32",
    )
    max_model_len: int | None = Field(
        None, ge=1, description="longest sequence accepted, in tokens; the model's limit if not given"
    )
    keys: Path | None = Field(
        None,
        description="file of API keys, one line per client: NAME KEY, or NAME sha256:HEX; without it anybody may "
        "send requests",
    )
    capacity: int = Field(
        2**26,
        ge=1,
        description="largest sum of tokens x (K + 1) over all requests in progress; further requests wait or get 503",
    )
    window: int = Field(16_384, ge=1, description="tokens given to the engine at a time; clients take turns by tokens")
    keep_time: float = Field(
        600.0, gt=0, description="seconds to keep a result whose client disconnected, in case it asks again"
    )
    keep_bytes: int = Field(2**28, ge=0, description="memory for those results, in bytes")
    ready_time: float = Field(
        60.0, gt=0, description="seconds without progress after which a busy engine is reported as not ready"
    )
    body_timeout: float = Field(
        10.0, gt=0, description="seconds within which a request body must arrive, plus 1 per 64 KiB"
    )
    stall_timeout: float = Field(
        60.0, gt=0, description="seconds after which a client that stops reading its response is disconnected"
    )
    drain_time: float = Field(60.0, gt=0, description="seconds that accepted requests get to finish after SIGTERM")
    tls_cert: Path | None = Field(None, description="certificate chain (PEM); turns on TLS, with --tls-key")
    tls_key: Path | None = Field(None, description="private key (PEM)")
    tls_client_ca: Path | None = Field(
        None, description="CA certificate (PEM): only clients with a certificate signed by it are accepted"
    )
    log_format: Literal["json", "text"] = Field("json", description="format of the log on stderr")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level that is logged")

    @model_validator(mode="after")
    def _tls_hangs_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        return self


Settings = TypeVar("Settings", bound=ServiceSettings)


def build_settings(kind: type[Settings], given: dict[str, Any]) -> Settings:
    """Settings from the given options and the environment. ValueError in one line, also for an unknown variable with
    the service's prefix: a misspelt variable for the keys file would leave the service open."""
    if unknown := unknown_variables(kind, os.environ):
        known = ", ".join(sorted(variables(kind)))
        raise ValueError(f"environment: {kind.program} has no variable {', '.join(unknown)}; available: {known}")
    try:
        return kind(**(renamed_variables(kind, os.environ) | given))
    except ValidationError as error:
        raise ValueError("; ".join(_explain(kind, one) for one in error.errors(include_url=False))) from None


def variables(kind: type[ServiceSettings]) -> set[str]:
    """Names of the environment variables that a service reads."""
    return {f"{kind.model_config['env_prefix']}{name.upper()}" for name in kind.model_fields}


def renamed_variables(kind: type[ServiceSettings], environment: Mapping[str, str]) -> dict[str, str]:
    """Fields that are set by a variable's old name and not by its new one; says so on stderr."""
    found = {}
    for old, new in kind.renamed.items():
        was, is_now = (f"{kind.model_config['env_prefix']}{name.upper()}" for name in (old, new))
        if environment.get(was) and not environment.get(is_now):
            print(f"{kind.program}: {was} is now called {is_now}", file=sys.stderr)
            found[new] = environment[was]
    return found


def unknown_variables(kind: type[ServiceSettings], environment: Mapping[str, str]) -> list[str]:
    """Variables with the service's prefix that nothing reads, except those that Kubernetes sets by itself for a Service
    whose name is the prefix."""
    prefix, others = kind.model_config["env_prefix"], kind.others
    known = variables(kind) | {f"{prefix}{old.upper()}" for old in kind.renamed}
    return sorted(
        name for name, value in environment.items()
        if value and name.startswith(prefix) and name not in known and not _OF_KUBERNETES.search(name)
        and name not in others and not name.startswith(tuple(other for other in others if other.endswith("_")))
    )  # fmt: skip


def _explain(kind: type[ServiceSettings], error: Any) -> str:
    if error["type"] == "missing":
        name = str(error["loc"][0])
        return f"{name} is missing: use {kind.program} MODEL, or set {kind.model_config['env_prefix']}{name.upper()}"
    if not error["loc"]:
        return str(error["ctx"]["error"])
    return f"--{str(error['loc'][0]).replace('_', '-')}: {error['msg']}, got {error['input']!r}"


class _Renamed(argparse.Action):
    """An option's old name."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:  # fmt: skip
        print(f"{parser.prog}: {option_string} is now called --{self.dest.replace('_', '-')}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def options_parser(kind: type[ServiceSettings], description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with an option for each field; options that are not given are None."""
    parser = argparse.ArgumentParser(prog=kind.program, description=description, epilog=epilog, allow_abbrev=False)
    for name, field in kind.model_fields.items():
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
    for old, new in kind.renamed.items():
        parser.add_argument(f"--{old.replace('_', '-')}", dest=new, action=_Renamed, help=argparse.SUPPRESS)
    return parser
