"""Small models made by benchmarks: a random Llama with a tokenizer of the demo's text, training it, and removing layers
from a model. Used by `quality` and `quantiser_quality`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.prepare import TEXT, make_whole


def make_untrained(
    folder: Path, vocab_size: int, shape: tuple[int, int, int], texts: Sequence[str] = ("prose",)
) -> None:
    """Make a random Llama of `shape` (width, MLP width, layers), with a byte-level BPE tokenizer of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    if folder.is_dir():
        return
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    lines = [line for name in texts for line in (TEXT / f"{name}.jsonl").read_text().splitlines()[:400]]
    backend.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    width, inner, layers = shape
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1,
    ))  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    _save(folder, model, tokenizer)


def keep_layers(model_folder: Path, keep: int, folder: Path, dtype: str) -> Path:
    """Make a model with `keep` of the layers, evenly spaced and including the first and the last."""
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder.is_dir():
        return folder
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    layers = model.model.layers
    model.model.layers = nn.ModuleList(layers[i] for i in evenly(len(layers), keep))
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = keep
    _save(folder, model, AutoTokenizer.from_pretrained(model_folder))
    return folder


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    """Save all or nothing, because an existing folder is taken to be complete."""

    def write(unfinished: Path) -> None:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)

    make_whole(folder, write)


def evenly(number: int, keep: int) -> list[int]:
    """`keep` of `range(number)`, evenly spaced and including the first and the last."""
    return sorted({round(i * (number - 1) / (keep - 1)) for i in range(keep)})


def learn(arguments: list[str]) -> None:
    """Run `stillhouse-train` in this process, so that its imports are made only once. SystemExit if it fails."""
    from student_trainer import main as trainer

    code = trainer.run([*arguments, "run.resume=never"])
    if code:
        raise SystemExit(f"stillhouse-train ended with code {code}: {arguments[-1]}")


def run_afresh(folder: Path, arguments: list[str]) -> None:
    """Make a run from its beginning, removing what an interrupted one has left."""
    shutil.rmtree(folder, ignore_errors=True)
    learn([*arguments, f"run.id={folder.name}"])


def export(run_folder: Path, folder: Path) -> None:
    """Export the run's student as a Hugging Face checkpoint."""
    from student_trainer.cli.export import main as export_main

    def write(unfinished: Path) -> None:
        export_main([str(run_folder), "--format", "hf", "--out", str(unfinished), "--skip-check"])

    make_whole(folder, write)
