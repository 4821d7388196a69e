"""How each field of vLLM's `/inference/v1/generate` request is treated: read, without effect, or refused.

Used by `token_generate.py`; the tables are also in docs/api.md, and a test compares the two. The fields are those of
vLLM 0.32 (`vllm.entrypoints.scale_out.token_in_token_out.protocol.GenerateRequest`, `vllm.SamplingParams`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from teacher_proto.request_checks import refuse, within
from teacher_proto.requests import Limits
from teacher_service.compat.requests import MAX_TEMPERATURE, Ids, check_extras, check_written, read_model

# Fields that change neither a score nor the most likely token, and why; their values are ignored.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "identifies the client; here the API key does": ("request_id", "priority"),
    "vLLM's cache and renderer": (
        "cache_salt", "token_offsets", "stream_options", "reasoning_ended", "reasoning_parser_kwargs",
    ),
}  # fmt: skip
SAMPLING_WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "sampling; the generated token is always the most likely": ("seed", "top_p", "top_k", "min_p"),
    "stopping; at most one token is generated": (
        "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos",
    ),
    "formatting of generated text; the response has token ids": (
        "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "stream_interval", "output_kind",
    ),
    "internals of vLLM": (
        "flat_logprobs", "skip_clone", "skip_reading_prefix_cache", "output_text_buffer_length",
        "routed_experts_prompt_start",
    ),
}  # fmt: skip
# Fields that would change the response in an unsupported way, each with the values that change nothing. None never
# changes anything.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "features": (), "content_parts": ([],), "output_mode": ("tokens",), "stream": (False,), "kv_transfer_params": (),
    "ec_transfer_params": (),
}  # fmt: skip
SAMPLING_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "min_tokens": (0, 1),
    "watermarking": (False,), "logprob_token_ids": ([],), "structured_outputs": (), "logit_bias": ({},),
    "allowed_token_ids": (), "extra_args": ({},), "bad_words": ([],), "thinking_token_budget": (-1,),
    "repetition_detection": (), "trace_decode_token_ids": ([],),
}  # fmt: skip

# vLLM pads rows of ids with -1.
_PADDED = Annotated[list[Annotated[StrictInt, Field(ge=-1, lt=2**31)]], Field(fail_fast=True)]


class SamplingParams(BaseModel):
    """The fields of vLLM's sampling parameters that are read."""

    model_config = ConfigDict(frozen=True, extra="allow")

    max_tokens: StrictInt | None = Field(
        None, description="0, or 1 for the most likely next token; 0 if it is left out and the prompt is scored"
    )
    temperature: StrictFloat | StrictInt | None = Field(
        None,
        ge=0,
        le=MAX_TEMPERATURE,
        description="of the prompt's logprobs; 0 and 1 both give the teacher's own distribution",
    )
    logprobs: StrictInt | None = None
    prompt_logprobs: StrictInt | None = None
    prompt_logprob_token_ids: Annotated[list[_PADDED], Field(fail_fast=True)] | None = Field(
        None, description="ids to score, a row for each token after `prompt_logprob_start`; -1 pads a row"
    )
    prompt_logprob_start: Annotated[StrictInt, Field(ge=0)] | None = None

    @property
    def scores(self) -> bool:
        """Whether the prompt is scored."""
        return self.prompt_logprobs is not None or self.prompt_logprob_token_ids is not None

    @property
    def scoring_temperature(self) -> float | None:
        """The temperature of the prompt's logprobs; None for the teacher's own distribution, as for 0 and 1."""
        return None if self.temperature in (None, 0, 1) or not self.scores else self.temperature


class TokenRequest(BaseModel):
    """The fields of vLLM's request that are read. `token_ids` are those of one prompt."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str | None = None
    token_ids: Ids
    sampling_params: SamplingParams
    return_token_ids: StrictBool | None = None


def read_tokens(body: dict[str, Any], limits: Limits) -> TokenRequest:
    """A request whose fields are all honoured or change nothing. OutOfRangeError names one that is neither."""
    request = read_model(TokenRequest, body)
    params, inside = request.sampling_params, "sampling_params."
    check_extras(request.model_extra, WITHOUT_EFFECT, NEUTRAL, "vLLM's request")
    check_extras(
        params.model_extra, SAMPLING_WITHOUT_EFFECT, SAMPLING_NEUTRAL, "vLLM's sampling parameters", inside
    )  # fmt: skip
    given = params.max_tokens
    check_written(f"{inside}max_tokens", given, 0 if given is None and params.scores else given, 16)
    for field in ("logprobs", "prompt_logprobs"):
        most = min(limits.max_top_k, limits.vocab_size)
        within(f"{inside}{field}", getattr(params, field) or 0, 0, most, "logprobs")
    rows, start, field = params.prompt_logprob_token_ids, params.prompt_logprob_start, f"{inside}prompt_logprob_start"
    if rows is None:
        if start is not None:
            refuse(field, start, None, "it only together with prompt_logprob_token_ids")
        return request
    count = max(len(request.token_ids) - 1 - (start or 0), 0)
    field = f"{inside}prompt_logprob_token_ids"
    if not rows or len(rows) != count:
        refuse(field, len(rows), count, f"{count} rows, one for each token after prompt_logprob_start, at least one")
    within(field, max(map(len, rows)), 1, limits.max_gather, "ids per row")
    if (high := max(max(row, default=-1) for row in rows)) >= limits.vocab_size:
        refuse(field, high, limits.vocab_size - 1, f"token ids from 0 to {limits.vocab_size - 1}, or -1")
    return request
