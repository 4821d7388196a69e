"""GGUF files read back tensor by tensor, and run by llama.cpp where its Python package is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from student_trainer.export.card import ModelCard
from student_trainer.export.check import compare_logits, llama_cpp_logits
from student_trainer.export.expression import CannotExpressError
from student_trainer.export.gguf import export_gguf, q4_0_blocks, tensor_name
from student_trainer.export.gguf_tokenizer import add_tokenizer, pre_tokeniser_name
from student_trainer.students.quant_linear import quant_linears
from tests.unit.students.tiny import ternary_codes, tiny_ids
from tests.unit.test_export import student

CARD = ModelCard("tiny", "tiny/base", "tiny/teacher", "sha256:abc")
# 256 divides every input width, or the wide one alone, or none; 32 divides none of the last.
WIDTHS = {
    "all blocks of 256": ({"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}, {"TQ": 14}),
    "down_proj alone": ({"intermediate_size": 256}, {"TQ": 2, "Q4_0": 12}),
    "blocks of 32": ({}, {"Q4_0": 14}),
    "no blocks": ({"hidden_size": 48, "head_dim": 12, "intermediate_size": 64}, {"Q4_0": 2, "F16": 12}),
}


def read(folder: Path) -> tuple[Any, dict[str, Any]]:
    reader = gguf.GGUFReader(folder / "tiny.gguf")
    return reader, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize("ternary_type", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("widths", list(WIDTHS))
def test_every_matrix_dequantises_to_its_codes_times_the_scale(tmp_path: Path, widths: str, ternary_type: Any) -> None:
    overrides, expected = WIDTHS[widths]
    model = student(eps=1e-5, **overrides)
    export_gguf(model, None, tmp_path / "out", CARD, ternary_type=ternary_type)
    _, tensors = read(tmp_path / "out")
    counts: dict[str, int] = {}
    for name, layer in quant_linears(model):
        tensor = tensors[tensor_name(f"{name}.weight")]
        codes_OI, scale = ternary_codes(layer)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(codes_OI.shape)
        assert np.array_equal(np.sign(values), codes_OI.numpy())
        assert set(np.abs(values).ravel().tolist()) <= {0.0, float(np.float16(scale.item()))}
        kind = tensor.tensor_type.name.replace(ternary_type, "TQ")
        counts[kind] = counts.get(kind, 0) + 1
    assert counts == expected


def test_norms_embeddings_and_metadata_are_the_models(tmp_path: Path) -> None:
    model = student(rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    export_gguf(model, None, tmp_path / "out", CARD)
    reader, tensors = read(tmp_path / "out")
    layer = model.model.layers[1]
    for name, parameter in {
        "blk.1.attn_norm.weight": layer.input_layernorm.weight,
        "blk.1.ffn_norm.weight": layer.post_attention_layernorm.weight,
        "blk.1.attn_sub_norm.weight": layer.self_attn.o_proj.rms_norm.weight,
        "blk.1.ffn_sub_norm.weight": layer.mlp.down_proj.rms_norm.weight,
        "output_norm.weight": model.model.norm.weight,
    }.items():
        assert np.array_equal(tensors[name].data, parameter.detach().numpy())
    embeddings = model.model.embed_tokens.weight.detach().half().numpy()
    assert np.array_equal(tensors["token_embd.weight"].data, embeddings)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "bitnet" and fields["general.name"] == "tiny"
    for key, value in {
        "block_count": 2, "embedding_length": 64, "feed_forward_length": 128, "attention.head_count": 4,
        "attention.head_count_kv": 2, "rope.freq_base": 12345.0, "rope.dimension_count": 16, "vocab_size": 97,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "context_length": 64,
    }.items():  # fmt: skip
        assert fields[f"bitnet.{key}"] == value


def test_q4_0_blocks_hold_ternary_values_exactly() -> None:
    codes_OI = np.random.default_rng(0).integers(-1, 2, size=(6, 96)).astype(np.int8)
    scale = np.float16(0.0371)
    values = gguf.quants.dequantize(q4_0_blocks(codes_OI, scale), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(values, codes_OI * np.float32(scale))


REFUSED = [
    ("qwen3", {}, "QK-norm"),
    ("qwen2", {}, "biases"),
    ("llama", {"sub_norm": "all"}, "sub_norm 'all'"),
    ("llama", {"sub_norm": "none"}, "sub_norm 'none'"),
    ("llama", {"tie_word_embeddings": False}, "an output head of its own"),
    ("bitnet", {"hidden_act": "relu2"}, "hidden_act 'relu2'"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "type 'linear'"),
]


@pytest.mark.parametrize(("family", "overrides", "reason"), REFUSED)
def test_what_llama_cpp_lacks_is_refused_by_name(
    tmp_path: Path, family: str, overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CannotExpressError, match=reason):
        export_gguf(student(family, **overrides), None, tmp_path / "out", CARD)
    assert not list(tmp_path.iterdir())


def test_values_that_fp16_does_not_hold_are_refused(tmp_path: Path) -> None:
    model = student()
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has values beyond the range of fp16"):
        export_gguf(model, None, tmp_path / "out", CARD)
    with pytest.raises(ValueError, match="got ternary type 'Q4_K'"):
        export_gguf(student(), None, tmp_path / "out", CARD, ternary_type="Q4_K")  # type: ignore[arg-type]


def test_unquantised_activations_are_no_obstacle_here(tmp_path: Path) -> None:
    assert export_gguf(student(quantise_activations=False), None, tmp_path / "out", CARD).stands_alone


def test_tokenizer_is_written_with_its_rules(tmp_path: Path, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    export_gguf(student(vocab_size=520), tokenizer, tmp_path / "out", CARD)
    reader, _ = read(tmp_path / "out")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] in {"gpt-2", "smollm"}
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == 520 and tokens[519] == "[PAD519]"
    assert all(tokens[index] == text for text, index in tokenizer.get_vocab().items())


def rules(steps: list[dict[str, Any]], kind: str = "BPE") -> dict[str, Any]:
    return {"model": {"type": kind}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
BYTES_AND_WORDS = BYTES | {"use_regex": True}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_pre_tokenisers_are_named_by_their_rules() -> None:
    assert pre_tokeniser_name({"model": {"type": "BPE"}, "pre_tokenizer": BYTES_AND_WORDS}) == "gpt-2"
    assert pre_tokeniser_name(rules([{"type": "Digits", "individual_digits": True}, BYTES_AND_WORDS])) == "smollm"
    assert pre_tokeniser_name(rules([split(LLAMA3), BYTES])) == "llama-bpe"
    assert pre_tokeniser_name(rules([split(LLAMA3.replace("{1,3}", "")), BYTES])) == "qwen2"
    for unknown in ([split(r"\w+"), BYTES], [{"type": "Digits", "individual_digits": False}, BYTES_AND_WORDS], []):
        with pytest.raises(ValueError, match=r"no llama\.cpp name is known"):
            pre_tokeniser_name(rules(unknown))
    with pytest.raises(ValueError, match="is a Unigram model, expected byte-level BPE"):
        pre_tokeniser_name(rules([BYTES_AND_WORDS], kind="Unigram"))


def test_tokenizers_that_do_not_fit_are_refused(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    writer = gguf.GGUFWriter(None, "bitnet")
    with pytest.raises(ValueError, match="the model's vocabulary has 100 entries"):
        add_tokenizer(writer, tokenizer, 100)
    with pytest.raises(ValueError, match="object is not a fast tokenizer"):
        add_tokenizer(writer, object(), 512)


@pytest.mark.parametrize("widths", list(WIDTHS))
@pytest.mark.parametrize("ternary_type", ["TQ1_0", "TQ2_0"])
def test_llama_cpp_gives_the_students_logits(tmp_path: Path, widths: str, ternary_type: Any) -> None:
    pytest.importorskip("llama_cpp")
    model = student(**WIDTHS[widths][0])
    report = export_gguf(model, None, tmp_path / "out", CARD, ternary_type=ternary_type)
    ids_T = tiny_ids(1, 24)[0]
    theirs = llama_cpp_logits(report.folder / "tiny.gguf", ids_T.numpy())
    with torch.no_grad():
        ours = model(ids_T[None]).logits[0].numpy()
    comparison = compare_logits(ours, theirs)
    # llama.cpp rounds activations to int8 too, in blocks; three per cent of the spread is what that explains.
    assert comparison.difference < 0.05 and comparison.agreement > 0.8, comparison
