"""The output head of a checkpoint, read without loading the model: what `GET /v1/head` serves with vLLM. Used by the
engines."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from teacher_proto.compute.head import HeadScaling
from teacher_proto.targets import TokenTargets
from teacher_service.head_file import HeadFile, HeadTensor

_WEIGHT_NAMES = ("lm_head.weight", "output.weight", "embed_out.weight", "language_model.lm_head.weight")
_EMBEDDING_NAMES = (
    "model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight",
    # of a language model with a vision tower: the current name, and the former one
    "model.language_model.embed_tokens.weight", "language_model.model.embed_tokens.weight",
)  # fmt: skip
# Relative to the largest logit: bf16 rounds by 2**-9 of it, and sums are in another order.
_HEAD_TOLERANCE = 0.02


_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def quantised_head(weight_files: list[Path]) -> str | None:
    """The name of a tensor that shows that a checkpoint's output head is quantised: packed values or scales, or a
    weight that is not in floating point. None for a plain head, and for a checkpoint without a separate head."""
    for path in weight_files:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                stem, _, part = name.rpartition(".")
                if f"{stem}.weight" not in _WEIGHT_NAMES:
                    continue
                if part not in ("weight", "bias") or file.get_slice(name).get_dtype() not in _NAMES.values():
                    return str(name)
    return None


def head_tensor(tensor: torch.Tensor) -> HeadTensor:
    """A tensor [N, ...] on any device, copied from there as it is read."""
    return HeadTensor(_NAMES[tensor.dtype], tuple(tensor.shape), lambda start, stop: raw_bytes(tensor[start:stop]))


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor as they are in memory."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


class CheckpointHead:
    """The head of a checkpoint: `weight` [V, D] and, if there is one, `bias` [V].

    If the head is tied to the embeddings, those are used. ValueError if the checkpoint has neither by a known name.
    """

    def __init__(self, weight_files: list[Path], vocab_size: int, scaling: HeadScaling):
        where: dict[str, Path] = {}
        for path in weight_files:
            with safe_open(path, framework="pt") as file:
                where |= dict.fromkeys(file.keys(), path)
        name = next((name for name in (*_WEIGHT_NAMES, *_EMBEDDING_NAMES) if name in where), None)
        if name is None:
            raise ValueError(f"the checkpoint has none of {', '.join((*_WEIGHT_NAMES, *_EMBEDDING_NAMES))}")
        self._names = {"weight": name}
        if (bias := name.removesuffix("weight") + "bias") in where:
            self._names["bias"] = bias
        self._where = where
        self._vocab_size = vocab_size
        self._scaling = scaling

    def tensors(self) -> dict[str, torch.Tensor]:
        """Some checkpoints pad the vocabulary; ids beyond it are never returned, and are cut off here. ValueError if
        the weight is quantised."""
        tensors = {role: self._read(name)[: self._vocab_size].contiguous() for role, name in self._names.items()}
        weight = tensors["weight"]
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise ValueError(f"{self._names['weight']} is quantised to {weight.dtype}")
        return tensors

    def file(self) -> HeadFile:
        """The head as a file, whose rows are read from the checkpoint on demand."""
        return HeadFile({role: self._tensor(name) for role, name in self._names.items()}, self._scaling)

    def check(self, targets: TokenTargets) -> None:
        """ValueError unless the head turns fp16 `hidden` into the logits that `logprobs` and `lse` give for `ids`."""
        assert targets.hidden is not None and targets.ids is not None
        assert targets.logprobs is not None and targets.lse is not None
        tensors = self.tensors()
        hidden_RD = torch.from_numpy(targets.hidden).float()
        if hidden_RD.shape[1] != tensors["weight"].shape[1]:
            raise ValueError(
                f"the head takes {tensors['weight'].shape[1]} values, but hidden states have {hidden_RD.shape[1]}"
            )
        ids_R = torch.from_numpy(targets.ids[:, 0].astype("int64"))
        product_R = (hidden_RD * tensors["weight"][ids_R].float()).sum(dim=-1)
        if "bias" in tensors:
            product_R = product_R + tensors["bias"][ids_R].float()
        theirs_R = torch.from_numpy(targets.logprobs[:, 0].astype("float32") + targets.lse)
        off = (self._scaling(product_R) - theirs_R).abs().max().item()
        allowed = _HEAD_TOLERANCE * max(1.0, theirs_R.abs().max().item())
        if not off <= allowed:
            raise ValueError(
                f"the checkpoint's head computes other logits than vLLM from hidden states (off by {off:.3g})"
            )

    def _tensor(self, name: str) -> HeadTensor:
        with safe_open(self._where[name], framework="pt") as file:
            part = file.get_slice(name)
            shape, dtype = part.get_shape(), part.get_dtype()

        def read(start: int, stop: int) -> bytes:
            with safe_open(self._where[name], framework="pt") as file:
                return raw_bytes(file.get_slice(name)[start:stop])

        return HeadTensor(dtype, (min(shape[0], self._vocab_size), *shape[1:]), read)

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._where[name], framework="pt") as file:
            return file.get_tensor(name)
