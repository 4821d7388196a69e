"""A ternary student as a GGUF file of llama.cpp's `bitnet` architecture. A format of `export`.

llama.cpp's graph for it is a Llama with attn_sub_norm and ffn_sub_norm, SiLU, RoPE in Hugging Face's layout and the
head tied to the embeddings. TQ1_0 and TQ2_0 have blocks of 256 along the input width. If that is not a multiple of 256,
Q4_0 blocks of 32 hold the same values exactly: d = scale, nibbles 7, 8 and 9 for -1, 0 and 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from student_trainer.export.bitnet import as_architecture
from student_trainer.export.bits import bits_a_weight
from student_trainer.export.card import ModelCard, write_card
from student_trainer.export.expression import CannotExpressError, Expression, quantiser_in
from student_trainer.export.folder import ExportReport, check_finished, fresh_folder, size_of
from student_trainer.export.gguf_tokenizer import add_tokenizer
from student_trainer.students.diffusion_record import read_diffusion

TernaryType = Literal["TQ1_0", "TQ2_0"]

TARGET = "llama.cpp's bitnet architecture"
TENSOR_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.attn_sub_norm": "attn_sub_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.ffn_sub_norm": "ffn_sub_norm",
}
OUTER_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def export_gguf(
    model: Any, tokenizer: Any, folder: Path, card: ModelCard, *, ternary_type: TernaryType = "TQ2_0"
) -> ExportReport:
    """Write `<card name>.gguf` of llama.cpp's bitnet architecture, then read it back and compare every tensor.

    With `tokenizer` None no vocabulary is written: such a file can only be used with token ids. CannotExpressError for
    what the architecture lacks, ValueError for a tokenizer that GGUF has no name for.
    """
    check_finished(model, "gguf")
    if read_diffusion(model.config) is not None:
        raise CannotExpressError(TARGET, ["this architecture reads from left to right, not by blocks"])
    file_name = f"{card.name.replace('/', '--')}.gguf"
    with fresh_folder(folder) as unfinished:
        types = write_gguf(model, tokenizer, unfinished / file_name, card.name, ternary_type=ternary_type)
        notes = _gguf_notes(types)
        what = "One GGUF file: ternary matrices, full-precision norms, 16-bit embeddings. Tensor types: " + ", ".join(
            f"{count} {kind}" for kind, count in sorted(types.items())
        )
        loading = f"```\nllama-cli -m {file_name} -p 'Once upon a time'\n```"
        write_card(card, unfinished / "README.md", library="gguf", what=what + ".", loading=loading, notes=notes,
                   quantiser=quantiser_in(model), bits=bits_a_weight(model))  # fmt: skip
    return ExportReport("gguf", folder, "bitnet", True, size_of(folder), notes)


def _gguf_notes(types: Mapping[str, int]) -> tuple[str, ...]:
    notes = ["llama.cpp rounds activations per block, the student per token: logits agree up to that rounding."]
    if types.get("Q4_0"):
        notes.append(
            f"{types['Q4_0']} matrices have an input width that TQ blocks of 256 do not divide; they are stored as "
            "Q4_0 blocks, which hold the same three values exactly, at 4.5 bits."
        )
    return tuple(notes)


def write_gguf(model: Any, tokenizer: Any, file: Path, name: str, *, ternary_type: TernaryType) -> dict[str, int]:
    """Write the file, read it back and compare every tensor. Returns the number of tensors of each GGML type.

    CannotExpressError names what the architecture lacks; ValueError for a scale or weight beyond fp16.
    """
    import gguf

    if ternary_type not in ("TQ1_0", "TQ2_0"):
        raise ValueError(f"gguf: got ternary type '{ternary_type}', expected 'TQ1_0' or 'TQ2_0'")
    expression = _expression(model)
    writer = gguf.GGUFWriter(file, "bitnet")
    try:
        _add_metadata(writer, expression.config, name, ternary_type)
        add_tokenizer(writer, tokenizer, expression.config.vocab_size)
        expected = {}
        for hf_name, tensor in expression.weights.items():
            gguf_name = tensor_name(hf_name)
            # From the codes, not the latent weights: the file holds the values that the student multiplies by.
            codes = expression.codes(tensor) if hf_name in expression.ternary_names else None
            data, kind, values = _encode(hf_name, tensor, codes, ternary_type)
            writer.add_tensor(gguf_name, data, raw_dtype=kind)
            expected[gguf_name] = values
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return _read_back(file, expected)


def _expression(model: Any) -> Expression:
    expression = as_architecture(model, any_activations=True)
    config = expression.config
    reasons = []
    if expression.corrections:
        reasons.append("an adapter in full precision beside ternary matrices (formats hf and bitnet write it)")
    if not config.tie_word_embeddings:
        reasons.append("an output head of its own (in this architecture it is always tied to the embeddings)")
    if config.hidden_act != "silu":
        reasons.append(f"hidden_act '{config.hidden_act}' (llama.cpp's releases agree only on silu)")
    if config.rope_parameters.get("rope_type", "default") != "default":
        reasons.append(f"rotary embeddings of type '{config.rope_parameters['rope_type']}'")
    if reasons:
        raise CannotExpressError(TARGET, reasons)
    return expression


def tensor_name(hf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    if hf_name in OUTER_NAMES:
        return OUTER_NAMES[hf_name]
    parts = hf_name.split(".")
    assert parts[:2] == ["model", "layers"] and parts[-1] == "weight", hf_name
    return f"blk.{parts[2]}.{TENSOR_NAMES['.'.join(parts[3:-1])]}.weight"


def _add_metadata(writer: Any, config: Any, name: str, ternary_type: TernaryType) -> None:
    import gguf

    head_width = config.hidden_size // config.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{ternary_type}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_width)
    writer.add_vocab_size(config.vocab_size)


def _encode(
    name: str, tensor: Tensor, codes: tuple[Tensor, Tensor] | None, kind: TernaryType
) -> tuple[np.ndarray, Any, np.ndarray]:
    """Bytes or floats for the writer, their GGML type, and the values that must be read back.

    `codes`: the codes and scale of a ternary tensor; None for one that stays in floating point.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    tensor = tensor.detach().cpu()
    if codes is None:
        # llama.cpp wants norms in float32; embeddings are 16-bit.
        values = tensor.float().numpy() if tensor.dim() == 1 else tensor.to(torch.float16).numpy()
        if not np.isfinite(values).all():
            raise ValueError(f"gguf: {name} has values beyond the range of fp16")
        return values, types.F32 if tensor.dim() == 1 else types.F16, values.astype(np.float32)
    codes_OI, scale = codes[0].cpu(), codes[1]
    half = np.float16(scale.item())
    if not np.isclose(float(half), scale.item(), rtol=1e-3):
        raise ValueError(f"gguf: {name} has scale {scale.item():.3g}, which fp16 cannot represent")
    values_OI = codes_OI.numpy().astype(np.float32) * np.float32(half)
    width = values_OI.shape[1]
    if width % 256 == 0:
        # A TQ block with scale s holds {-s, 0, s} exactly: only s is rounded, to fp16.
        return gguf.quants.quantize(values_OI, types[kind]), types[kind], values_OI
    if width % 32 == 0:
        return q4_0_blocks(codes_OI.numpy(), half), types.Q4_0, values_OI
    return values_OI.astype(np.float16), types.F16, values_OI


def q4_0_blocks(codes_OI: np.ndarray, scale: np.float16) -> np.ndarray:
    """Ternary codes as Q4_0: 18 bytes for 32 values; fp16 d, then value i in the low and i + 16 in the high nibbles."""
    rows, width = codes_OI.shape
    # Value = d (nibble - 8): 7, 8 and 9 are -1, 0 and 1.
    nibbles = (codes_OI + 8).astype(np.uint8).reshape(rows, width // 32, 2, 16)
    packed = nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)
    scales = np.full((rows, width // 32, 1), scale, np.float16).view(np.uint8)
    return np.concatenate([scales, packed], axis=-1).reshape(rows, -1)


def _read_back(file: Path, expected: dict[str, np.ndarray]) -> dict[str, int]:
    """Dequantise every tensor of the file with the gguf package, and assert that the values are exact."""
    import gguf

    reader = gguf.GGUFReader(file)
    types: Counter[str] = Counter()
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values.reshape(expected[tensor.name].shape), expected[tensor.name]), tensor.name
        types[tensor.tensor_type.name] += 1
    assert sum(types.values()) == len(expected)
    return dict(types)
