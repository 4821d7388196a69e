"""The table of staleness: forward and reverse KL on the student's own text, sampled some updates earlier.

Made by `quality`. A pruned student is partly healed on the data; from there each arm trains on its own text. Afterwards
it continues held-out prompts, and both KLs are measured on its own continuations and on those of the documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_runs import (
    ROOT,
    Size,
    alone,
    compare,
    exact_teacher,
    heal,
    held_out_texts,
    local_teacher,
    student_of,
)  # fmt: skip
from benchmarks.seeded_results import Cell, Line, by_seed, interval, paired, spread

NAME = "staleness"
LAGS = (0, 1, 4, 16)
DIVERGENCES = {"forward KL": "forward_kl", "reverse KL": "reverse_kl"}
START_SEED, PROMPT, NEW, PROMPTS = 100, 32, 32, 48
STEPS = 40
BEFORE = "before"


def about(size: Size) -> str:
    return (
        f"{size.what}, {size.keep[1]} of its {size.layers} layers, {STEPS} updates on 32 texts of {NEW} tokens after "
        f"{PROMPT} given ones"
    )


def cells(size: Size, seeds: Sequence[int]) -> list[Cell]:
    first = {"arm": BEFORE, "lag": 0, "seed": seeds[0]}
    return [first, *({"arm": arm, "lag": lag, "seed": seed} for seed in seeds for lag in LAGS for arm in DIVERGENCES)]


def make(size: Size, cell: Cell) -> Line:
    start = _start(size)
    if cell["arm"] == BEFORE:
        return _measure(size, start, _loaded(start, size))
    student = heal(size, start, cell["seed"], [
        *local_teacher(size), "distillation=logits_only", *_own_text(DIVERGENCES[cell["arm"]]),
        f"on_policy.lag={cell['lag']}", f"run.steps={STEPS}",
    ])  # fmt: skip
    return _measure(size, start, student)


def _own_text(kind: str) -> list[str]:
    return [
        "on_policy=reverse_kl", "on_policy.share=1.0", f"on_policy.prompt_tokens={PROMPT}",
        f"on_policy.new_tokens={NEW}", f"on_policy.terms={{loss:{{kind:{kind},coefficient:1.0}}}}", "data.rows=32",
        f"data.seq_len={PROMPT + NEW}",
    ]  # fmt: skip


def _start(size: Size) -> Path:
    """The student that every arm begins with: the more deeply pruned one, half healed."""
    folder = ROOT / size.name / "half-healed"
    if not folder.is_dir():
        settings = [*local_teacher(size), *alone("forward_kl"), f"run.steps={size.steps // 2}"]
        student = heal(size, student_of(size, size.keep[1]), START_SEED, settings)
        from transformers import AutoTokenizer

        student.model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(student_of(size, size.keep[1])).save_pretrained(folder)
    return folder


def _loaded(folder: Path, size: Size) -> Any:
    import torch

    from student_trainer.checkpoint.earlier_run import load_student
    from student_trainer.settings import StudentSettings

    return load_student(StudentSettings(checkpoint_path=str(folder), compute=size.compute), torch.device("cpu"))


def _measure(size: Size, folder: Path, student: Any) -> Line:
    """Both KLs on the student's own text and on the data, with the same prompts and draws for every arm."""
    from transformers import AutoTokenizer

    from student_trainer.data.tokenise import pad_id
    from student_trainer.rollouts.sampler import GenerateSampler, ends_of_text

    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [t for texts in held_out_texts(size).values() for t in texts if len(t) >= PROMPT + NEW][:PROMPTS]
    sampler = GenerateSampler(student, ends_of_text(student, tokenizer), pad_id(tokenizer))
    prompts = [text_T[:PROMPT].astype(np.int32) for text_T in texts]
    samples = sampler.sample(prompts, list(range(len(prompts))), new_tokens=NEW)
    own = [np.concatenate([p, sample.ids_N]) for p, sample in zip(prompts, samples, strict=True)]
    found: Line = {}
    for name, pieces in (("own", own), ("data", [text_T[: PROMPT + NEW] for text_T in texts])):
        figures = compare(student.model, exact_teacher(size), pieces, after=PROMPT)
        found |= {f"{name}_kl": figures["kl"], f"{name}_reverse_kl": figures["reverse_kl"]}
    return found


def rows(size: Size, lines: Sequence[Line]) -> list[dict[str, Any]]:
    made = []
    for arm in (BEFORE, *DIVERGENCES):
        for lag in LAGS:
            here = [line for line in lines if (line["arm"], line["lag"]) == (arm, lag)]
            fresh = [line for line in lines if (line["arm"], line["lag"]) == (arm, 0)]
            if not here:
                continue
            own = by_seed(here, "own_reverse_kl")
            against = [] if lag == 0 else paired(own, by_seed(fresh, "own_reverse_kl"))
            made.append({
                "learnt from own text by": arm, "lag": "" if arm == BEFORE else lag,
                "KL(student‖teacher), own text": spread(list(own.values()), 4),
                "less that of lag 0": interval(against, 4, "+"),
                "KL(teacher‖student), own text": spread([line["own_kl"] for line in here], 4),
                "KL(student‖teacher), data": spread([line["data_reverse_kl"] for line in here], 4),
                "KL(teacher‖student), data": spread([line["data_kl"] for line in here], 4), "seeds": len(here),
            })  # fmt: skip
    return made
