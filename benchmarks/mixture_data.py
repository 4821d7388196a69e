"""The texts of six real domains and the tiny models of `mixture`, made on the spot."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import BENCH_DIR
from demo.prepare import TEXT

ROOT = BENCH_DIR.parent / "mixture"
DOMAINS = ("prose", "code", "movies", "amazon", "nyt", "tweets")
SPLITS = {"test": range(2), "probe": range(2, 3), "train": range(3, 10)}
PIECE, POOL, HELD = 400, 200_000, 40_000  # characters per piece, per pool, per probe or test set
VOCABULARY, SEQ_LEN = 1024, 256


def write_data() -> dict[str, int]:
    """Write pieces of each domain's documents to a file per split; returns the total characters of each domain."""
    done = ROOT / "data" / "sizes.json"
    if not done.exists():
        folder = ROOT / "data.unfinished"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        sizes = {}
        for domain in DOMAINS:
            texts = sorted(documents(domain), key=lambda text: hashlib.sha256(text.encode()).digest())
            sizes[domain] = sum(map(len, texts))
            for split, buckets in SPLITS.items():
                room = POOL if split == "train" else HELD
                with (folder / f"{domain}-{split}.jsonl").open("w") as file:
                    for text in texts:
                        if hashlib.sha256(b"split" + text.encode()).digest()[0] % 10 not in buckets:
                            continue
                        for piece in list(pieces(text))[:8]:
                            if (room := room - len(piece)) < 0:
                                break
                            file.write(json.dumps({"text": piece}) + "\n")
        (folder / "sizes.json").write_text(json.dumps(sizes))
        folder.rename(done.parent)
    found: dict[str, int] = json.loads(done.read_text())
    return found


def documents(domain: str) -> list[str]:
    from student_trainer.data.sentiment import open_collection

    if domain in ("prose", "code"):
        return [json.loads(line)["text"] for line in (TEXT / f"{domain}.jsonl").read_text().splitlines()]
    return list(open_collection(domain, "all")["text"])


def pieces(text: str) -> Iterator[str]:
    """Parts of at most PIECE characters, cut at whitespace if there is any."""
    text = text.strip()
    while text:
        cut = len(text) if len(text) <= PIECE else max(text.rfind(" ", 0, PIECE), text.rfind("\n", 0, PIECE))
        cut = cut if cut > 0 else PIECE
        if piece := text[:cut].strip():
            yield piece
        text = text[cut:].lstrip()


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer trained on the pools."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    files = [ROOT / "data" / f"{domain}-train.jsonl" for domain in DOMAINS]
    tokenizer.train_from_iterator(
        (json.loads(line)["text"] for f in files for line in f.read_text().splitlines()), learn
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def random_model(folder: Path, layers: int, width: int, tokenizer: Any, seed: int) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
