"""Expresses a student as transformers' BitNet: as its architecture, or as its quantisation of another architecture.

`hf` calls `in_transformers`, `gguf` calls `as_architecture`. The result computes exactly what the student does, or the
student is refused. With SubLN before o_proj and down_proj it is the BitNet architecture (attn_sub_norm, ffn_sub_norm);
with SubLN before every linear, or none, it is the original architecture with `quantization_config` (which names the
norms rms_norm).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from student_trainer.export.expression import CannotExpressError, Expression, express, latent_weights, record_of
from student_trainer.students.adapters.low_rank import Correction, corrections, put_corrections
from student_trainer.students.diffusion_record import read_diffusion, write_diffusion
from student_trainer.students.quant_linear import quant_linears, quantise_as
from student_trainer.students.quantisers.record import read_record

# Relative to the logits' standard deviation. float32 rounding gives less than 1e-5 at 30 layers, a wrong eps 8e-3.
SAME_LOGITS = 1e-3
BF16_SAME_LOGITS = 5e-2
_FULL_ACTIVATIONS = "its activations are not quantised, but BitNet's always are"
NORM_NAMES = {"self_attn.o_proj.rms_norm": "self_attn.attn_sub_norm", "mlp.down_proj.rms_norm": "mlp.ffn_sub_norm"}


def in_transformers(model: Any) -> Expression:
    """The student for plain transformers. CannotExpressError lists every reason if it can't be expressed."""
    record = record_of(model)
    if record.sub_norm == "output":
        return as_architecture(model)
    reasons = [] if record.activations == "int8" else [_FULL_ACTIVATIONS]
    if record.sub_norm == "all" and corrections(model):
        reasons.append("an adapter reads SubLN's output, but transformers computes SubLN inside the linear layer")
    if reasons:
        raise CannotExpressError("transformers' BitNet quantisation", reasons)
    return express(model, copy.deepcopy(model.config), latent_weights(model), corrections(model))


def as_architecture(model: Any, *, any_activations: bool = False) -> Expression:
    """The student as a BitNetForCausalLM, after comparing its logits with the student's own.

    `any_activations`: the runtime rounds activations in its own way, so the student's way is no obstacle.

    The architecture has one eps for all norms. Scaling the input of SubLN by c has the effect of dividing its eps by
    c^2, and that input is linear in v_proj and up_proj: so their weights are multiplied by
    c = sqrt(eps of the model / eps of SubLN).
    """
    reasons = [reason for reason in obstacles(model) if not (any_activations and reason == _FULL_ACTIVATIONS)]
    if reasons:
        raise CannotExpressError("transformers' BitNet architecture", reasons)
    config = _architecture_config(model.config)
    gain, scaled = _sub_norm_gain(model), ("v_proj", "up_proj")
    weights = {}
    for name, tensor in latent_weights(model).items():
        for ours, theirs in NORM_NAMES.items():
            name = name.replace(ours, theirs)
        is_scaled = name.endswith(tuple(f"{layer}.weight" for layer in scaled)) and gain != 1.0
        weights[name] = tensor * gain if is_scaled else tensor
    added = {
        name: correction.scaled(gain) if name.endswith(scaled) and gain != 1.0 else correction
        for name, correction in corrections(model).items()
    }
    _check_same_logits(model, config, weights, added)
    return express(model, config, weights, added)


def obstacles(model: Any) -> list[str]:
    """What this student has that the BitNet architecture lacks, in words. Empty if it fits."""
    config, record = model.config, record_of(model)
    reasons = []
    if type(model).__name__.endswith("ForSequenceClassification"):
        reasons.append("a classification head")
    if record.sub_norm != "output":
        reasons.append(f"sub_norm '{record.sub_norm}' (BitNet has norms before o_proj and down_proj, and no others)")
    if record.activations != "int8":
        reasons.append(_FULL_ACTIVATIONS)
    if any(".q_norm." in name or ".k_norm." in name for name in model.state_dict()):
        reasons.append("QK-norm")
    biased = sorted({name.rsplit(".", 1)[-1] for name, layer in quant_linears(model) if layer.bias is not None})
    if biased:
        reasons.append(f"biases in {', '.join(biased)}")
    width = config.num_attention_heads * _head_width(config)
    if width != config.hidden_size:
        reasons.append(
            f"{config.num_attention_heads} heads of width {_head_width(config)} make {width}, not {config.hidden_size}"
        )
    layer_types = getattr(config, "layer_types", None)
    if "sliding_attention" in layer_types if layer_types else getattr(config, "sliding_window", None):
        reasons.append("sliding-window attention")
    if (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0) != 1.0:
        reasons.append("rotary embeddings on only a part of each head")
    return reasons


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _architecture_config(config: Any) -> Any:
    from transformers import BitNetConfig

    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout", "rope_parameters",
    )  # fmt: skip
    made = BitNetConfig(**{name: copy.deepcopy(getattr(config, name)) for name in names}, attention_bias=False)
    if (record := read_diffusion(config)) is not None:
        write_diffusion(made, record)
    return made


def _sub_norm_gain(model: Any) -> float:
    if model.config.model_type == "bitnet":
        return 1.0
    gain = math.sqrt(model.config.rms_norm_eps / record_of(model).eps)
    # Rounded products would move latent weights across a ternary threshold; multiplying by a power of two is exact.
    return gain if model.dtype == torch.float32 else 2.0 ** round(math.log2(gain))


@torch.no_grad()
def _check_same_logits(model: Any, config: Any, weights: dict[str, Tensor], added: dict[str, Correction]) -> None:
    """Compare logits on random tokens: a model may differ from Llama in ways that neither config nor names show.

    Activations are not quantised here: at ties in int8 rounding the last bit of a sum decides, and in a deep model
    ties alone change logits by a few per cent from one number of threads to another.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        # On meta, so that no second set of weights is allocated: the student's own are assigned.
        rebuilt = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    rebuilt.load_state_dict(weights, strict=not config.tie_word_embeddings, assign=True)
    rebuilt.tie_weights()
    # RoPE's frequencies are not in the state dict, so make the rotary module anew, not on meta.
    rebuilt.model.rotary_emb = type(rebuilt.model.rotary_emb)(config).to(model.device)
    quantise_as(rebuilt, record_of(model))
    put_corrections(rebuilt, added)
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(config.vocab_size, (2, 32), generator=generator).to(model.device)
    ours, theirs = (_exact_activation_logits(each, ids_BT) for each in (model, rebuilt))
    # Root mean square of the difference, relative to the logits' standard deviation.
    difference = ((ours - theirs).pow(2).mean().sqrt() / ours.std()).item()
    if not difference < (SAME_LOGITS if model.dtype == torch.float32 else BF16_SAME_LOGITS):
        reason = f"{model.config.model_type} computes something else: logits differ by {difference:.2g} of their spread"
        raise CannotExpressError("transformers' BitNet architecture", [reason])


def _exact_activation_logits(model: Any, ids_BT: Tensor) -> Tensor:
    was_training = model.training
    try:
        with _exact_activations(model):
            return model.eval()(ids_BT, use_cache=False).logits.float()
    finally:
        model.train(was_training)


@contextmanager
def _exact_activations(model: Any) -> Iterator[None]:
    layers = [layer for _, layer in quant_linears(model)]
    quantisers = [layer.activation_quantiser for layer in layers]
    for layer in layers:
        layer.activation_quantiser = None
    try:
        yield
    finally:
        for layer, quantiser in zip(layers, quantisers, strict=True):
            layer.activation_quantiser = quantiser


def packed(expression: Expression) -> dict[str, Tensor]:
    """The weights, each ternary one as uint8 with four codes per byte and a float32 `weight_scale`.

    The layout is transformers' (rows o, o + O/4, o + O/2, o + 3O/4 share a byte). CannotExpressError if an output width
    is not a multiple of 4, or if a ternary linear has a bias.
    """
    from transformers.integrations.bitnet import VALUES_PER_ITEM, pack_weights

    tensors = dict(expression.weights)
    odd = [n for n in expression.ternary_names if tensors[n].shape[0] % VALUES_PER_ITEM]
    biased = [n for n in expression.ternary_names if n.removesuffix("weight") + "bias" in tensors]
    reasons = [f"{len(odd)} weights like {odd[0]} have an output width that is not a multiple of 4"] if odd else []
    if biased:
        reasons.append(
            f"{len(biased)} linears like {biased[0].removesuffix('.weight')} have a bias, which would be scaled too"
        )
    if reasons:
        raise CannotExpressError("transformers' packed BitNet", reasons)
    for name in expression.ternary_names:
        codes_OI, scale = expression.codes(tensors[name])
        # Code + 1 in two bits; four rows at distance O/4 make one row of bytes.
        tensors[name] = pack_weights(codes_OI)
        tensors[f"{name}_scale"] = scale.reshape(1)
    return tensors


def quantisation_config(config: Any, *, mode: str) -> dict[str, Any]:
    """transformers' BitNetQuantConfig for an export; `mode`: "online" for latent weights, "offline" for packed ones."""
    record = read_record(config)
    assert record is not None, "a quantised model has its record"
    return {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": mode,
        "modules_to_not_convert": ["lm_head", "score"],
        "use_rms_norm": record.sub_norm == "all",
        "rms_norm_eps": record.eps,
    }
