"""How each field of vLLM's completion request is treated: read, without effect, or refused unless it is neutral.

Used by `completions.py`; the tables are also in docs/api.md, and a test compares the two. The fields are those of vLLM
0.32 (`vllm.entrypoints.openai.completion.protocol`), and others that axolotl and TRL send.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from teacher_proto.errors import OutOfRangeError
from teacher_service.compat.requests import (
    MAX_TEMPERATURE,
    Ids,
    ManyIds,
    Texts,
    check_extras,
    check_written,
    read_model,
)

# Fields that change neither a score nor the most likely token, and why; their values are ignored.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "sampling; the generated token is always the most likely": ("seed", "top_p", "top_k", "min_p"),
    "stopping; at most one token is generated": (
        "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "length_penalty",
    ),
    "formatting of generated text; special tokens are always shown": (
        "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "stream_options", "stream_interval",
    ),
    "identifies the client; here the API key does": ("user", "request_id", "session_id", "priority"),
    "vLLM's cache and other routes": (
        "cache_salt", "truncation_side", "return_token_offsets", "mm_payload", "return_mm_kwargs",
        "routed_experts_prompt_start",
    ),
    "of chat completions, sent along by axolotl; `prompt_logprobs` is read": ("top_logprobs",),
}  # fmt: skip

# Fields that would change the response in an unsupported way, each with the values that change nothing. None never
# changes anything.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "stream": (False,), "suffix": ("",), "use_beam_search": (False,), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "min_tokens": (0, 1),
    "bad_words": ([],), "allowed_token_ids": (), "logprob_token_ids": ([],), "truncate_prompt_tokens": (),
    "prompt_embeds": ([],), "response_format": ({"type": "text"},), "structured_outputs": (), "guided_json": (),
    "guided_regex": (), "watermarking": (False,), "repetition_detection": (), "thinking_token_budget": (-1,),
    "kv_transfer_params": (), "ec_transfer_params": (), "vllm_xargs": ({},), "max_new_tokens": (0, 1),
    "sampling_params": ({}, {"max_tokens": 0}, {"max_tokens": 1}),
}  # fmt: skip


def _as_number(value: Any) -> Any:
    """vLLM reads `true` as 1, and axolotl sends it."""
    return int(value) if isinstance(value, bool) else value


class CompletionRequest(BaseModel):
    """The fields of vLLM's completion request that are read. `prompt` is one prompt or several, text or token ids."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str | None = None
    prompt: Ids | ManyIds | str | Texts
    max_tokens: StrictInt | None = Field(
        None, description="0, or 1 for the most likely next token; 0 if it is left out and the prompt is scored"
    )
    prompt_logprobs: StrictInt | None = None
    logprobs: Annotated[StrictInt | None, BeforeValidator(_as_number)] = None
    echo: StrictBool | None = False
    temperature: StrictFloat | StrictInt | None = Field(
        None,
        ge=0,
        le=MAX_TEMPERATURE,
        description="of `prompt_logprobs`; 0 and 1 both give the teacher's own distribution",
    )
    add_special_tokens: StrictBool = True
    return_token_ids: StrictBool | None = None
    return_tokens_as_token_ids: StrictBool | None = None

    @property
    def scoring_temperature(self) -> float | None:
        """The temperature of `prompt_logprobs`; None for the teacher's own distribution, also requested as 0 or 1."""
        return None if self.temperature in (None, 0, 1) else self.temperature

    @property
    def lists_prompt(self) -> bool:
        """Whether to return `prompt_logprobs`: if they are requested, or the prompt is echoed with logprobs."""
        return self.prompt_logprobs is not None or bool(self.echo and self.logprobs is not None)

    @property
    def top_k(self) -> int:
        """The K to request from the engine: at least 1 if a token is generated or a temperature is requested."""
        tempered = self.scoring_temperature is not None and self.lists_prompt
        return max(self.prompt_logprobs or 0, self.logprobs or 0, 1 if self.max_tokens or tempered else 0)


def read_completion(body: dict[str, Any], max_top_k: int) -> CompletionRequest:
    """A request whose fields are all honoured or change nothing. OutOfRangeError names one that is neither."""
    request = read_model(CompletionRequest, body)
    check_extras(request.model_extra, WITHOUT_EFFECT, NEUTRAL, "vLLM's completion request")
    if "max_tokens" not in body and (request.prompt_logprobs is not None or request.echo):
        request = request.model_copy(update={"max_tokens": 0})
    check_written("max_tokens", body.get("max_tokens"), request.max_tokens, 16)
    for field in ("prompt_logprobs", "logprobs"):
        value = getattr(request, field)
        if value is not None and not 0 <= value <= max_top_k:
            raise OutOfRangeError(
                f"{field}: got {value}, expected 0 to {max_top_k}", field=field, got=value, limit=max_top_k
            )
    return request
