"""The teacher's output head as a run holds it: read from the file that `GET /v1/head` gives. Called by `build`."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from student_trainer.batch.head import Head
from teacher_proto.errors import InvalidTargetsError

NAMES = {"weight", "bias", "scale", "soft_cap"}


def read_head(file: bytes, device: torch.device) -> Head:
    """The head on `device`, in the dtype that its products run in there. InvalidTargetsError if it is none.

    The file's logits are scale * c * tanh(z / c); ours are C * tanh(scale * z / C), the same with C = scale * c.
    """
    try:
        tensors = load(file)
    except SafetensorError as error:
        raise InvalidTargetsError(f"the teacher's head is no safetensors file: {error}") from None
    weight_VE, bias_V = tensors.get("weight"), tensors.get("bias")
    if tensors.keys() - NAMES or weight_VE is None or weight_VE.ndim != 2 or "scale" not in tensors:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise InvalidTargetsError(f"the teacher's head holds {shapes}, expected weight [V, D], scale, bias, soft_cap")
    if bias_V is not None and bias_V.shape != weight_VE.shape[:1]:
        raise InvalidTargetsError(f"the teacher's head has {list(bias_V.shape)} biases for {len(weight_VE)} ids")
    scale = float(tensors["scale"])
    dtype = torch.float32 if device.type == "cpu" else weight_VE.dtype
    return Head(
        weight_VD=weight_VE.to(device, dtype),
        bias_V=None if bias_V is None else bias_V.to(device, dtype),
        softcap=scale * float(tensors["soft_cap"]) if "soft_cap" in tensors else None,
        scale=scale,
    )
