"""Does training on its own text make a student better at it? Exposure bias, on-policy compared with off-policy.

    make bench-on_policy            or  python -m benchmarks.on_policy [--steps N] [--seeds N]

Teacher and student are small and trained here, so that three seeds of every arm take only minutes: a Llama of 4 layers
that learns the demo's text, and one of 2 that is distilled from it until it can write. Each arm continues from there on
as many tokens, with the teacher behind the real service. The arms differ in who wrote the text, and the first also in
the divergence. Afterwards each student continues held-out prompts by itself, and KL(student‖teacher) over the whole
vocabulary is measured on its own continuations and on those of the documents. Finished work is kept in
runs/bench/on_policy and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.report import BENCH_DIR, report
from demo.prepare import CACHE, prepare
from student_trainer import loop
from student_trainer.build import build
from student_trainer.cli.compose import compose
from student_trainer.data.loader import BatchSource
from student_trainer.data.tokenise import pad_id
from student_trainer.rollouts.sampler import GenerateSampler, ends_of_text
from student_trainer.students.student import Student
from teacher_proto.process.stopping import StopSignals
from tests.teacher_process import TeacherProcess

FOLDER = BENCH_DIR / "on_policy"
TEACHER, STUDENT = FOLDER / "teacher", FOLDER / "student"
VOCABULARY = 1024
PROMPTS, DRAWS, PROMPT_TOKENS, WRITTEN_TOKENS = 32, 2, 32, 96  # in evaluation; prompts per source, draws per prompt

# The prompt of a rollout is not trained on, so there are more rows of them: every arm trains on about 1,024 tokens per
# step.
DATA = ("data.rows=16", "data.seq_len=65", "~distillation.terms.cross_entropy")
OWN = (
    "data.rows=32", "data.seq_len=65", "on_policy=reverse_kl", "on_policy.share=1.0", "on_policy.prompt_tokens=32",
    "on_policy.new_tokens=32",
)  # fmt: skip
ARMS = {
    "data, forward KL": DATA,
    "data, reverse KL": (*DATA, "distillation.terms.top_k_kl.kind=reverse_kl"),
    "own text, reverse KL": OWN,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="updates per arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, default=160)
    parser.add_argument("--student-steps", type=int, default=80, help="updates before the arms branch off")
    options = parser.parse_args()
    prepare()
    if not TEACHER.is_dir():
        made = save_model(FOLDER / "teacher-raw", layers=4, width=128)
        alone = ("teacher=none", "distillation=cross_entropy", "data.rows=16", "data.seq_len=129")
        train("teacher-run", made, options.teacher_steps, *alone).model.save_pretrained(TEACHER)
        tokenizer().save_pretrained(TEACHER)
    measured: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    with TeacherProcess(str(TEACHER), "--engine", "hf", "--dtype", "float32", wait=False) as teacher:
        teacher.wait_ready(600.0)
        url = f"teacher.url={teacher.url}"
        if not STUDENT.is_dir():
            made = save_model(FOLDER / "student-raw", layers=2, width=64)
            student = train("student-run", made, options.student_steps, url, *DATA)
            student.model.save_pretrained(STUDENT)
            tokenizer().save_pretrained(STUDENT)
        for seed in range(options.seeds):
            for arm, settings in ARMS.items():
                name = f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}-{options.steps}"
                measured[arm].append(once(FOLDER / f"{name}.json", name, options.steps, seed, url, settings))
        before = once(FOLDER / "before.json", "before", 0, 0, url, DATA)
    rows = [{"student": "before", **_row([before])}]
    rows += [{"student": arm, **_row(figures)} for arm, figures in measured.items()]
    report(
        "on_policy", rows, _changes(measured),
        title=f"KL(student‖teacher), nats per token, {options.steps} steps: mean ± standard deviation of "
        f"{options.seeds} seeds",
        notes=["own text: what the student itself writes after held-out prompts; data: what the documents say there"],
    )  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the demo's text, trained in every call with the same result."""
    made = ByteLevelBPETokenizer()
    texts = [json.loads(line)["text"] for line in (CACHE / "text" / "prose.jsonl").read_text().splitlines()]
    made.train_from_iterator(texts, VOCABULARY, special_tokens=["</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=made._tokenizer, eos_token="</s>")


def save_model(folder: Path, layers: int, width: int) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def train(name: str, model: Path, steps: int, *overrides: str, seed: int = 0) -> Student:
    """Run the trainer and return its student, which stays untrained if `steps` is 0."""
    settings = compose(
        [
            "data=stdlib", f"student.checkpoint_path={model}", f"run.root={FOLDER}", f"run.id={name}",
            "run.resume=never", f"run.seed={seed}", f"run.steps={max(1, steps)}", "optim.learning_rate=2e-3",
            "optim.schedule.warmup_steps=10", "evaluation.every=0", "checkpoint.every=0", "logging.wandb=off",
            *overrides,
        ],
        Path("demo/config"),
    )  # fmt: skip
    with ExitStack() as stack, StopSignals() as signals:
        run = build(settings, signals, stack)
        if steps and loop.train(run) != loop.DONE:
            raise SystemExit("stopped: start it again to continue; finished work is not repeated")
        return run.student


def once(kept: Path, name: str, steps: int, seed: int, url: str, settings: Sequence[str]) -> dict[str, float]:
    """The metrics of one arm, which is trained and measured unless they are in `kept`."""
    if not kept.is_file():
        figures = measure(train(name, STUDENT, steps, url, "optim.learning_rate=1e-3", *settings, seed=seed))
        lines = (FOLDER / name / "metrics.jsonl").read_text().splitlines()
        kept.write_text(json.dumps({"tokens": json.loads(lines[-1])["tokens"] if lines else 0, **figures}))
    return dict(json.loads(kept.read_text()))


def measure(student: Student) -> dict[str, float]:
    """KL(student‖teacher) by source, on the student's continuations and on the data, for fixed prompts and draws."""
    teacher, own = AutoModelForCausalLM.from_pretrained(TEACHER).eval(), AutoTokenizer.from_pretrained(STUDENT)
    sampler = GenerateSampler(student, ends_of_text(student, own), pad_id(own))
    settings = compose(
        ["data=stdlib", "data.rows=8", f"data.seq_len={PROMPT_TOKENS + WRITTEN_TOKENS}", "data.held_out_rows=128"],
        Path("demo/config"),
    )
    source = BatchSource(settings.data, own, seed=0)
    student.model.eval()
    figures: dict[str, float] = {}
    for name in source.names:
        texts = held_out_texts(source, name)
        prompts = [text_T[:PROMPT_TOKENS] for text_T in texts for _ in range(DRAWS)]
        samples = sampler.sample(prompts, list(range(len(prompts))), new_tokens=WRITTEN_TOKENS)
        written = [np.concatenate([p, sample.ids_N]) for p, sample in zip(prompts, samples, strict=True)]
        figures[f"own {name}"] = reverse_kl(student.model, teacher, written)
        figures[f"data {name}"] = reverse_kl(student.model, teacher, texts)
    source.close()
    return figures


def held_out_texts(source: BatchSource, name: str) -> list[np.ndarray]:
    """Held-out pieces as long as a prompt and its continuation. ValueError if there are too few."""
    texts = [
        batch.tokens_BT[d.row, d.start : d.stop]
        for batch in source.held_out(name)
        for d in batch.documents
        if d.stop - d.start == PROMPT_TOKENS + WRITTEN_TOKENS
    ]
    if len(texts) < PROMPTS:
        raise ValueError(
            f"source {name} has {len(texts)} held-out pieces that are long enough, expected {PROMPTS} or more"
        )
    return texts[:PROMPTS]


@torch.no_grad()
def reverse_kl(student: Any, teacher: Any, texts: Sequence[np.ndarray]) -> float:
    """Mean over the tokens after the prompt, in float32, one text at a time: nothing is packed or padded."""
    total, count = 0.0, 0
    for text_T in texts:
        ids_1T = torch.from_numpy(text_T.astype(np.int64))[None]
        rows = slice(PROMPT_TOKENS - 1, len(text_T) - 1)
        log_q_RV = torch.log_softmax(student(input_ids=ids_1T).logits[0, rows].float(), -1)
        log_p_RV = torch.log_softmax(teacher(input_ids=ids_1T).logits[0, rows].float(), -1)
        total += float((log_q_RV.exp() * (log_q_RV - log_p_RV)).sum())
        count += len(log_q_RV)
    return total / count


def _row(figures: Sequence[dict[str, float]]) -> dict[str, str]:
    row = {"tokens": f"{statistics.mean(f['tokens'] for f in figures):,.0f}"}
    for key in figures[0]:
        if key != "tokens":
            row[key] = _spread([f[key] for f in figures])
    return row


def _spread(values: Sequence[float], scale: float = 1.0, sign: str = "", digits: int = 4) -> str:
    text = f"{scale * statistics.mean(values):{sign}.{digits}f}"
    return text + (f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _changes(measured: dict[str, list[dict[str, float]]]) -> dict[str, str]:
    """Relative change of the on-policy arm against each arm on data, paired by seed."""
    own = measured["own text, reverse KL"]
    changes = {}
    for arm in ("data, forward KL", "data, reverse KL"):
        for key in own[0]:
            if key != "tokens":
                ratios = [ours[key] / theirs[key] - 1 for ours, theirs in zip(own, measured[arm], strict=True)]
                changes[f"learnt from own text against {arm}: KL on {key}"] = _spread(ratios, 100.0, "+", 1) + " %"
    return changes


if __name__ == "__main__":
    main()
