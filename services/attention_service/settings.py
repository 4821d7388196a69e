"""The options of `stillhouse-attention`: every one has an environment variable, `STILLHOUSE_ATTENTION_` and its name.

Read by `main.py`; options shared with the teacher service are in `serving.settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from serving.settings import ServiceSettings, build_settings, options_parser
from teacher_proto.compute.relations import LAYER_NAMES, layer_index

PREFIX = "STILLHOUSE_ATTENTION_"


class AttentionSettings(ServiceSettings):
    """Sizes in tokens, bytes or numbers in responses; times in seconds."""

    model_config = SettingsConfigDict(env_prefix=PREFIX)
    program: ClassVar[str] = "stillhouse-attention"
    renamed: ClassVar[Mapping[str, str]] = {"beside": "teacher_url", "beside_key": "teacher_key"}

    layer: str = Field(
        "late_middle",
        description=f"highest layer to load and serve: an index from 0, a fraction of the depth, or "
        f"{'|'.join(LAYER_NAMES)}",
    )
    dtype: str = Field(
        "auto",
        description="dtype of the weights: bfloat16, float16, float32; auto: that of the teacher at --teacher-url, "
        "else the checkpoint's own if the hardware computes in it, else float32",
    )
    device: str = Field("auto", description="cpu, cuda, cuda:N; auto: a GPU if there is one")
    teacher_url: str | None = Field(
        None,
        description="URL of the teacher that serves the same weights: name and dtype are taken from it, and other "
        "weights are refused",
    )
    teacher_key: SecretStr | None = Field(None, description="API key for that teacher")
    capacity: int = Field(
        2**28,
        ge=1,
        description="largest sum of numbers in the responses to all requests in progress; further requests wait or "
        "get 503",
    )
    max_entries: int = Field(2**26, ge=1, description="largest response for one sequence, in numbers")
    max_batch_tokens: int = Field(4096, ge=1, description="tokens per forward pass, padding included")

    @model_validator(mode="after")
    def _hang_together(self) -> Self:
        self.highest_layer(num_layers=2**20)
        if self.teacher_key is not None and self.teacher_url is None:
            raise ValueError("--teacher-key needs --teacher-url")
        return self

    def highest_layer(self, num_layers: int) -> int:
        """The index of `layer` in a model with this many layers. ValueError if it has no such layer."""
        try:
            layer: int | float | str = int(self.layer)
        except ValueError:
            try:
                layer = float(self.layer)
            except ValueError:
                layer = self.layer
        try:
            return layer_index(layer, num_layers=num_layers)
        except ValueError as error:
            raise ValueError(f"--layer: {error}") from None


def parse_settings(arguments: list[str]) -> AttentionSettings:
    """Settings from a command line and the environment. ValueError in one line; `--help` prints and exits."""
    parser = options_parser(
        AttentionSettings,
        description="Serve a language model's attention beside a teacher of the same model: POST /v1/attention, "
        "GET /v1/teacher, /docs. Layers above --layer are neither loaded nor computed.",
        epilog=f"Every option has an environment variable: --layer is {PREFIX}LAYER, MODEL is {PREFIX}MODEL.",
    )
    known, rest = parser.parse_known_args(arguments)
    if rest:
        raise ValueError(f"{rest[0]!r} is not an option; stillhouse-attention --help lists them")
    return build_settings(AttentionSettings, {n: value for n, value in vars(known).items() if value is not None})
