"""A transformers causal language model as a teacher: token ids in, packed rows out.

Used by the service's `hf_engine` and by the trainer's local teacher, so that both return the same targets; imported on
demand. Only the last hidden states of a batch are kept; the model's own head computes logits from them for one chunk of
rows at a time.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from teacher_proto import hardware
from teacher_proto.compute.head import HeadScaling, scaling_of
from teacher_proto.compute.sampling import sample_key
from teacher_proto.compute.slices import Slice, reduce_slices
from teacher_proto.hardware import choose_dtype, emulation_warning, pick_device
from teacher_proto.identity import NumericIdentity, TeacherIdentity
from teacher_proto.model_files import ModelFolder, hash_files, identify
from teacher_proto.requests import Limits, Query
from teacher_proto.wire.packed import RowLayout, layout_of

log = logging.getLogger(__name__)
_DEFAULT_MAX_LENGTH = 2048
_PROBE_LENGTH = 16
_PROBE_TOLERANCE = {torch.float32: 1e-4}


class HfModel:
    """The model on its device, in `dtype`; "auto" is the checkpoint's own if the device computes in it, else float32.
    ValueError if its logits are not its last hidden states through a known head.
    """

    def __init__(self, folder: ModelFolder, *, dtype: str, device: str):
        self._folder = folder
        self.device = torch.device(pick_device(device))
        chosen = choose_dtype(dtype, self.device, folder.dtype)
        if warning := emulation_warning(chosen, self.device):
            log.warning("%s: %s", folder.name, warning)
        model = _load(folder, chosen).to(self.device)
        config = model.config.get_text_config()
        # The body; of a model with a vision tower, the language model.
        self._body = model.base_model if config is model.config else model.get_decoder()
        self._head = model.get_output_embeddings()
        if self._head is None or self._body is model:
            raise ValueError(f"{folder.name}: transformers gives no output head for {type(model).__name__}")
        _check_head(self._head, folder.name)
        self._scaling = scaling_of(config.to_dict())
        self.dtype: torch.dtype = model.dtype
        self.attention: str = getattr(model.config, "_attn_implementation", None) or "eager"
        self.vocab_size: int = self._head.weight.shape[0]
        self.hidden_size: int = self._head.weight.shape[1]
        self.max_positions: int | None = getattr(config, "max_position_embeddings", None)
        self._widens = self.dtype in (torch.bfloat16, torch.float16) and hardware.sums_in_float32(self.device.type)
        # Only body and head are kept of `model`.
        self._compare_with_logits_of(model, folder.name)

    def identity(self) -> TeacherIdentity:
        """This teacher's identity. Hashes the weight files unless their hashes are cached."""
        device = self.device_name + (", head in float32" if self._widens else "")
        numeric = NumericIdentity(
            engine="transformers", engine_version=transformers.__version__, device=device, parallel="1",
            attention_backend=self.attention,
        )  # fmt: skip
        quantization = (self._folder.config.get("quantization_config") or {}).get("quant_method")
        return identify(
            self._folder, hash_files(self._folder.weight_files), dtype=str(self.dtype).removeprefix("torch."),
            quantization=quantization, vocab_size=self.vocab_size, numeric=numeric,
        )  # fmt: skip

    def limits(self, max_length: int | None, max_top_k: int) -> Limits:
        """The model's limits: at most `max_length` tokens per sequence, by default its number of positions."""
        longest = max_length or self.max_positions or _DEFAULT_MAX_LENGTH
        return Limits(
            vocab_size=self.vocab_size,
            max_sequence_length=min(longest, self.max_positions or longest),
            max_top_k=min(max_top_k, self.vocab_size),
        )

    @property
    def device_name(self) -> str:
        return hardware.device_name(self.device)

    @property
    def scaling(self) -> HeadScaling:
        return self._scaling

    def head(self) -> dict[str, torch.Tensor]:
        """`weight` [V, D] and `bias` [V] of the head."""
        bias = getattr(self._head, "bias", None)
        return {"weight": self._head.weight} | ({} if bias is None else {"bias": bias})

    def compute_logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] in the model's dtype, or in float32 where the device returns the product in it at no cost."""
        if not self._widens:
            return self._scaling(self._head(hidden_ND))
        product_NV = torch.mm(hidden_ND, self._head.weight.t(), out_dtype=torch.float32)
        bias = getattr(self._head, "bias", None)
        return self._scaling(product_NV if bias is None else product_NV.add_(bias))

    @torch.inference_mode()
    def score(self, queries: Sequence[Query]) -> list[np.ndarray]:
        """Packed rows [R, bytes] uint8 for each query, from one forward pass over all of them."""
        hidden = self._hidden_states([query.tokens_T for query in queries])
        groups: dict[RowLayout, list[tuple[int, Slice]]] = defaultdict(list)
        for i, (query, hidden_TD) in enumerate(zip(queries, hidden, strict=True)):
            start, stop = query.rows
            layout = layout_of(query, self.vocab_size, self.hidden_size)
            gather = torch.tensor(query.gather_ids_RG) if layout.gather_width else None
            key = sample_key(query.spec.seed, query.tokens_T) if "sampled" in query.spec.kinds else 0
            tokens_T = torch.tensor(query.tokens_T)
            groups[layout].append((i, Slice(start, stop, hidden_TD[start:stop], tokens_T, gather, key)))
        packed: list[np.ndarray] = [np.empty(0, dtype=np.uint8)] * len(queries)
        for layout, members in groups.items():
            parts = reduce_slices([s for _, s in members], self.compute_logits, layout)
            assert parts is not None
            for (i, _), part in zip(members, parts, strict=True):
                packed[i] = part.cpu().numpy()
        return packed

    def _hidden_states(self, sequences: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Final hidden states [T, D] of each sequence."""
        output = self._body(**padded(sequences, self.device), use_cache=False)
        return [output.last_hidden_state[i, : len(tokens_T)] for i, tokens_T in enumerate(sequences)]

    @torch.inference_mode()
    def _compare_with_logits_of(self, model: Any, name: str) -> None:
        """Check our logits against the model's own on a few tokens."""
        tokens_T = np.arange(_PROBE_LENGTH) * 7919 % self.vocab_size
        ours_TV = self.compute_logits(self._hidden_states([tokens_T])[0]).float()
        theirs = model(input_ids=torch.tensor(tokens_T, device=self.device)[None], use_cache=False).logits
        off = (ours_TV - theirs[0].float()).abs().max().item()
        allowed = _PROBE_TOLERANCE.get(self.dtype, 2e-2) * max(1.0, theirs.abs().max().item())
        if not off <= allowed:
            raise ValueError(
                f"{name}: its logits are not its last hidden states times its output head (off by {off:.3g}): this "
                "architecture applies more than a soft cap or a scale, and can't be served by the hf engine"
            )


def padded(sequences: Sequence[np.ndarray], device: torch.device) -> dict[str, torch.Tensor | None]:
    """`input_ids` [B, T] and `attention_mask` of sequences, None if all have the same length. Padding is on the right,
    where causal attention never looks."""
    lengths = [len(tokens_T) for tokens_T in sequences]
    ids_BT = torch.zeros((len(sequences), max(lengths)), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for i, tokens_T in enumerate(sequences):
        ids_BT[i, : lengths[i]] = torch.tensor(tokens_T)
        mask_BT[i, : lengths[i]] = 1
    mask = mask_BT.to(device) if min(lengths) < max(lengths) else None
    return {"input_ids": ids_BT.to(device), "attention_mask": mask}


def _load(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """Load the model. ValueError with the first line of the error of transformers."""
    transformers.utils.logging.disable_progress_bar()  # it would garble a service's log
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, **local)
        # Some models with a vision tower are in the causal mapping, others only in this one.
        wrapped = type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        wrapped = wrapped and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        kind = transformers.AutoModelForImageTextToText if wrapped else transformers.AutoModelForCausalLM
        return kind.from_pretrained(folder.path, dtype=dtype, use_safetensors=True, **local).eval()
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"transformers cannot load {folder.name}: {reason}") from error


def _check_head(head: Any, name: str) -> None:
    """ValueError if the head's weight is not a plain float matrix, as with a quantised head: its shape would not give
    the vocabulary size, and `GET /v1/head` could not return it."""
    weight = getattr(head, "weight", None)
    what = "no weight"
    if isinstance(weight, torch.Tensor):
        if weight.ndim == 2 and weight.is_floating_point() and weight.element_size() > 1:
            return
        what = f"a weight of {weight.dtype} {tuple(weight.shape)}"
    raise ValueError(
        f"{name}: its output head, a {type(head).__name__}, has {what}: a quantised head is not served by the hf "
        "engine. Leave lm_head out of the quantisation, or serve the checkpoint with vLLM"
    )
