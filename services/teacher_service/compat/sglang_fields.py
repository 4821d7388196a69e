"""How each field of SGLang's `/generate` request is treated: read, without effect, or refused unless it is neutral.

Used by `sglang_generate.py`; the tables are also in docs/api.md, and a test compares the two. The fields are those of
SGLang 0.5.23 (`GenerateReqInput` of `sglang.srt.managers.io_struct`, `SamplingParams` of
`sglang.srt.sampling.sampling_params`), and others that axolotl sends.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from teacher_proto.errors import OutOfRangeError
from teacher_proto.request_checks import within
from teacher_service.compat.requests import MAX_TEMPERATURE, Ids, ManyIds, check_extras, check_written, read_model

# Fields that change neither a score nor the most likely token, and why; their values are ignored.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "identifies the client; here the API key does": (
        "rid", "session_id", "conversation_id", "priority", "routing_key",
    ),
    "SGLang's routing, caching, logging and metrics": (
        "extra_key", "cache_salt", "log_metrics", "no_logs", "custom_labels", "external_trace_header", "received_time",
        "http_worker_ipc", "background", "data_parallel_rank", "routed_dp_rank", "disagg_prefill_dp_rank",
        "bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key", "decode_tp_size",
    ),
    "not a field of SGLang's; axolotl sends it": ("echo",),
}  # fmt: skip
SAMPLING_WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "sampling; the generated token is always the most likely": (
        "top_p", "top_k", "min_p", "sampling_seed",
    ),
    "stopping; at most one token is generated": (
        "stop", "stop_token_ids", "stop_regex", "ignore_eos", "no_stop_trim",
    ),
    "formatting of generated text; special tokens are always shown": (
        "skip_special_tokens", "spaces_between_special_tokens", "stream_interval",
    ),
}  # fmt: skip
# Fields that would change the response in an unsupported way, each with the values that change nothing. None never
# changes anything.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "text": (), "input_embeds": (), "image_data": ([],), "video_data": ([],), "audio_data": ([],), "modalities": ([],),
    "stream": (False,), "return_hidden_states": (False,), "return_routed_experts": (False,),
    "routed_experts_start_len": (0,), "return_indexer_topk": (False,), "return_sampling_mask": (False,),
    "return_prompt_token_ids": (False,), "return_entropy": (False,), "return_bytes": (False,), "session_params": (),
    "lora_path": (), "lora_id": (), "custom_logit_processor": (), "positional_embed_overrides": (),
    "require_reasoning": (False,), "max_thinking_tokens": (), "multi_item_delimiter_indices": (),
}  # fmt: skip
SAMPLING_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,),
    "min_new_tokens": (0, 1), "json_schema": (), "regex": (), "ebnf": (), "structural_tag": (), "custom_params": ({},),
    "logit_bias": ({},),
}  # fmt: skip


class SamplingParams(BaseModel):
    """The fields of SGLang's sampling parameters that are read."""

    model_config = ConfigDict(frozen=True, extra="allow")

    max_new_tokens: StrictInt | None = Field(
        None, description="0, or 1 for the most likely next token; 0 if it is left out and the prompt is scored"
    )
    temperature: StrictFloat | StrictInt | None = Field(
        None,
        ge=0,
        le=MAX_TEMPERATURE,
        description="of every logprob; 0 and 1 both give the teacher's own distribution",
    )


class GenerateRequest(BaseModel):
    """The fields of SGLang's request that are read. `input_ids` are the token ids of one sequence, or of several."""

    model_config = ConfigDict(frozen=True, extra="allow")

    input_ids: Ids | ManyIds
    sampling_params: SamplingParams | None = None
    return_logprob: StrictBool | None = False
    logprob_start_len: StrictInt | Annotated[list[StrictInt], Field(fail_fast=True)] | None = Field(
        None, description="first token whose logprob is listed, one for all sequences or one for each; -1: none"
    )
    top_logprobs_num: StrictInt | None = 0
    token_ids_logprob: Ids | ManyIds | None = Field(
        None, description="ids to score at every position: the same for all sequences, or a list for each"
    )
    return_text_in_logprobs: StrictBool | None = False
    return_flat_raw_top_logprobs: StrictBool | None = False
    return_flat_raw_top_logprobs_b64: StrictBool | None = False

    @property
    def batched(self) -> bool:
        """Whether the request has several sequences, so that the response is a list."""
        return not self.input_ids or isinstance(self.input_ids[0], list)

    @property
    def sequences(self) -> list[list[int]]:
        return self.input_ids if self.batched else [self.input_ids]  # type: ignore[list-item, return-value]

    @property
    def starts(self) -> list[int]:
        """For each sequence the first token whose logprob is listed; the sequence's length if none is."""
        given = self.logprob_start_len if self.return_logprob and self.logprob_start_len is not None else -1
        each = given if isinstance(given, list) else [given] * len(self.sequences)
        return [len(ids) if start < 0 else start for start, ids in zip(each, self.sequences, strict=True)]

    @property
    def gathered(self) -> list[list[int]] | None:
        """For each sequence the ids to score at every position; None for no ids."""
        ids = self.token_ids_logprob
        if not ids:
            return None
        return ids if isinstance(ids[0], list) else [ids] * len(self.sequences)

    @property
    def written(self) -> int:
        """How many tokens are generated."""
        return (self.sampling_params and self.sampling_params.max_new_tokens) or 0

    @property
    def temperature(self) -> float | None:
        """The temperature of all logprobs; None for the teacher's own distribution, also requested as 0 or 1."""
        asked = self.sampling_params.temperature if self.sampling_params and self.return_logprob else None
        return None if asked in (None, 0, 1) else asked


def read_generate(body: dict[str, Any], max_top_k: int) -> GenerateRequest:
    """A request that this teacher can serve. OutOfRangeError names a field that it can't."""
    request = read_model(GenerateRequest, body)
    check_extras(request.model_extra, WITHOUT_EFFECT, NEUTRAL, "SGLang's request")
    params = request.sampling_params or SamplingParams()
    check_extras(
        params.model_extra, SAMPLING_WITHOUT_EFFECT, SAMPLING_NEUTRAL, "SGLang's sampling parameters",
        "sampling_params.",
    )  # fmt: skip
    count = len(request.sequences)
    for field in ("logprob_start_len", "token_ids_logprob"):
        value = getattr(request, field)
        if isinstance(value, list) and (field == "logprob_start_len" or (value and isinstance(value[0], list))):
            within(field, len(value), count, count, "values, one per sequence")
    for ids, start in zip(request.sequences, request.starts, strict=True):
        within("logprob_start_len", start, 0, len(ids), "as the first token whose logprob is listed")
    scores = any(start < len(ids) for ids, start in zip(request.sequences, request.starts, strict=True))
    within("top_logprobs_num", request.top_logprobs_num or 0, 0, max_top_k, "logprobs")
    needs = {"return_logprob": ("top_logprobs_num", "token_ids_logprob", "return_flat_raw_top_logprobs"),
             "return_flat_raw_top_logprobs": ("return_flat_raw_top_logprobs_b64",)}  # fmt: skip
    for needed, fields in needs.items():
        for field in fields:
            if getattr(request, field) and not getattr(request, needed):
                raise OutOfRangeError(f"{field}: no effect without {needed}", field=field, got=True)
    given = params.max_new_tokens
    check_written("sampling_params.max_new_tokens", given, 0 if given is None and scores else given, 128)
    return request
