"""What the layers of SmolLM2-135M-Instruct know about `data=movie_reviews`: linear probes of its frozen states at the
prompt's last token. `make bench-states`, half a minute of a core; the student of `make classification` is based on it.

All layers have the same penalty and are evaluated on the validation split: nothing is tuned here, and the test split is
not read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.report import report
from benchmarks.words import accuracy, examples, fit
from demo.prepare import TEACHER, prepare

TRAIN, VALIDATION, AT_ONCE, STRENGTH, EVERY = 800, 400, 32, 0.003, 3
PROMPT = "Review: {text}\nSentiment:"  # as in data/movie_reviews.yaml


def states_of(texts: list[str]) -> Tensor:
    """Hidden states [texts, layers + 1, width] float32: the first layer's input and every layer's output."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(TEACHER, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), AT_ONCE):
        places = order[start : start + AT_ONCE]
        prompts = [PROMPT.format(text=texts[place]) for place in places]
        with torch.no_grad():
            out = model.model(**tokenizer(prompts, return_tensors="pt", padding=True), output_hidden_states=True)
        last_NLD = torch.stack([layer[:, -1].float() for layer in out.hidden_states], 1)
        found |= dict(zip(places, last_NLD, strict=True))
    return torch.stack([found[place] for place in range(len(texts))])


def probed(train_ND: Tensor, train_N: Tensor, test_ND: Tensor, test_N: Tensor) -> float:
    """Accuracy in per cent of a logistic regression on standardised states."""
    mean_D, deviation_D = train_ND.mean(0), train_ND.std(0) + 1e-6

    def features(states_ND: Tensor) -> Tensor:
        scaled_ND = (states_ND - mean_D) / deviation_D
        return torch.cat([scaled_ND, torch.ones(len(scaled_ND), 1)], 1).double()

    return accuracy(features(test_ND), test_N, fit(features(train_ND), train_N.double(), STRENGTH))


def main() -> None:
    prepare(("teacher", "reviews"))
    texts, sign_N = examples("train")
    chosen = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:TRAIN].tolist()
    held_out, held_out_N = examples("validation")
    train_NLD = states_of([texts[place] for place in chosen])
    test_NLD = states_of(held_out[:VALIDATION])
    rows = [
        {"layers": layer, "validation %": round(
            probed(train_NLD[:, layer], sign_N[chosen], test_NLD[:, layer], held_out_N[:VALIDATION]), 1)}
        for layer in range(EVERY, train_NLD.shape[1], EVERY)
    ]  # fmt: skip
    report("states", rows, title=f"linear probe by depth, {TRAIN} sentences to learn from, {VALIDATION} held out",
           notes=("the standard error of a figure is 2 points",))  # fmt: skip


if __name__ == "__main__":
    main()
