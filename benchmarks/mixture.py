"""Which mixture policy yields the best student, on six real domains and an equal budget? `make bench-mixture`.

    python -m benchmarks.mixture [--minutes 9] [--docs]      repeat it until it no longer says "run again for the rest"

Domains: prose and code of the standard library, film reviews, product reviews, editorials, tweets. Each has a pool to
train on, a probe set for the policies that use one, and a test set that only the final metrics use. Two tiny models
with their own vocabulary make seventy runs feasible on two slow cores: a teacher trained on all pools equally, and a
student trained from scratch. Every arm makes the same number of steps and tokens; five seeds decide the student's
weights and the order of the texts. Each run is a line of `benchmarks/results/mixture.jsonl`, and finished runs are not
repeated. The best fixed mixture is searched for with a separate seed, by the probe.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import mixture_results
from benchmarks.mixture_data import DOMAINS, ROOT, SEQ_LEN, make_tokenizer, random_model, write_data
from benchmarks.mixture_results import PROBES, SEARCH_SEED, SEEDS, best_fixed, read_run, results
from benchmarks.report import machine
from demo.prepare import prepare

ROWS = 4
STEPS, RATE, INTERVAL, LAG = 40, 5e-3, 5, 2
TEACHER_STEPS = 300
Weights = dict[str, float]
# Everything else is left at each policy's defaults.
ADAPTIVE = [f"data.mixture.update_interval={INTERVAL}", f"data.mixture.lag={LAG}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=600.0, help="start no run after this many minutes")
    parser.add_argument("--only", default="", help="only arms whose names contain this")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/mixtures.md")
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    prepare(("text", "reviews"))
    ROOT.mkdir(parents=True, exist_ok=True)
    mixture_results.RESULTS.parent.mkdir(exist_ok=True)
    sizes = write_data()
    make_teacher()
    for arm, seed in missing(sizes):
        if options.only not in arm:
            continue
        if time.monotonic() > deadline:
            print("out of time: run again for the rest")
            return 0
        run(arm, seed, sizes)
    mixture_results.tables(options.docs)
    return 0


# --- models ---------------------------------------------------------------------------------------------------------


def make_teacher() -> None:
    """Train the teacher on all pools equally, and export it with its tokenizer."""
    from student_trainer import main as trainer

    if (ROOT / "teacher").exists():
        return
    started = ROOT / "teacher.start"
    random_model(started, 2, 128, make_tokenizer(), 0)
    settings = [
        *common("teacher", 0, started), *sources(equal()), "distillation=cross_entropy",
        "teacher=none", f"run.steps={TEACHER_STEPS}", f"evaluation.every={TEACHER_STEPS}", "data.rows=8",
    ]  # fmt: skip
    run_folder = ROOT / "runs" / folder_of("teacher", 0)
    if trainer.run(settings) or trainer.run(
        ["export", str(run_folder), "--format", "hf", "--out", str(ROOT / "teacher.new")]
    ):
        raise SystemExit("training or exporting the teacher failed")
    (ROOT / "teacher.new").rename(ROOT / "teacher")


def student_of(seed: int) -> Path:
    """The student that a seed starts from: two layers of random weights."""
    from transformers import AutoTokenizer

    folder = ROOT / f"student-{seed}"
    if not folder.exists():
        random_model(folder, 2, 64, AutoTokenizer.from_pretrained(ROOT / "teacher"), seed)
    return folder


# --- arms -----------------------------------------------------------------------------------------------------------


def equal() -> Weights:
    return dict.fromkeys(DOMAINS, 1 / len(DOMAINS))


def by_size(sizes: Mapping[str, int]) -> Weights:
    return {domain: size / sum(sizes.values()) for domain, size in sizes.items()}


def fixed_mixtures() -> dict[str, Weights]:
    """Candidates for the best fixed mixture, by name."""
    mixtures = {f"movies {share:.0%}": _with_share("movies", share) for share in (0.4, 0.7)}
    mixtures["code 40%"] = _with_share("code", 0.4)
    english = ("movies", "amazon", "nyt", "tweets")
    mixtures["no code"] = {each: 0.0 if each == "code" else 1 / 5 for each in DOMAINS}
    mixtures["english"] = {each: 1 / 4 if each in english else 0.0 for each in DOMAINS}
    return mixtures


def _with_share(domain: str, share: float) -> Weights:
    """`share` for one domain, the rest in equal parts for the others."""
    rest = (1 - share) / (len(DOMAINS) - 1)
    return {each: share if each == domain else rest for each in DOMAINS}


def policies() -> dict[str, list[str]]:
    """Settings of the arms that use no probe."""
    arms = {name: [f"data.mixture.policy={name}", *ADAPTIVE] for name in ("excess", "divergence", "ado")}
    arms["divergence over english"] = [*arms["divergence"], "data.mixture.over=[movies,amazon,nyt,tweets]"]
    return arms


def arm_settings(arm: str, seed: int, sizes: Mapping[str, int]) -> list[str]:
    """Sources and policy of an arm. Probe sets are included for the search, and for policies that use one."""
    kind, _, name = arm.partition(": ")
    if kind == "fixed":
        weights = {"by size": by_size(sizes), "equal": equal(), **fixed_mixtures()}[name]
        return sources(weights, probes=DOMAINS if seed == SEARCH_SEED else ())
    if kind == "influence_select":
        return [*weighted_source(name), *sources({})]
    if kind == "influence":
        return [*sources(equal(), probes=PROBES[name]), *influence_policy(name)]
    return [*sources(equal()), *policies()[kind]]


def influence_policy(probe: str) -> list[str]:
    named = ",".join(f"probe_{domain}" for domain in PROBES[probe])
    return ["data.mixture.policy=influence", f"data.mixture.probe=[{named}]", *ADAPTIVE]


def weighted_source(probe: str) -> list[str]:
    path = ROOT / f"weighted-{probe}.parquet"
    if not path.exists():
        weigh(probe, path)
    source = "data.sources.weighted"
    return [f"{source}.kind=parquet", f"{source}.path={path}", f"{source}.weight_column=weight",
            f"{source}.held_out_fraction=0"]  # fmt: skip


def weigh(probe: str, path: Path) -> None:
    """Weight the documents of all pools for a probe, by a student trained on all domains equally."""
    from student_trainer import main as trainer

    for split, domains in (("train", DOMAINS), ("probe", PROBES[probe])):
        lines = [(ROOT / "data" / f"{domain}-{split}.jsonl").read_text().splitlines() for domain in domains]
        mixed = sorted({line for each in lines for line in each}, key=lambda line: hashlib.md5(line.encode()).digest())
        (ROOT / f"{split}-{probe}.jsonl").write_text("".join(line + "\n" for line in mixed))
    code = trainer.run([
        "influence", str(ROOT / f"train-{probe}.jsonl"), "--target", str(ROOT / f"probe-{probe}.jsonl"), "--out",
        str(path), "--target-documents", "96", "--landmarks", "256", *common("weigh", 0, healed()),
    ])  # fmt: skip
    if code:
        raise SystemExit(f"influence ended with code {code}")


def healed() -> Path:
    """The run whose student influence is measured on: equal shares, with the search's seed."""
    return ROOT / "runs" / folder_of("fixed: equal", SEARCH_SEED)


def missing(sizes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """Runs still to be made, the search first, because the best mixtures follow from it."""
    done = {(line["arm"], line["seed"]) for line in results()}
    first = [("fixed: equal", SEARCH_SEED), *((f"fixed: {name}", SEARCH_SEED) for name in fixed_mixtures())]
    yield from (each for each in first if each not in done)
    for seed in SEEDS:
        yield from ((arm, seed) for arm in arms() if (arm, seed) not in done)


def arms() -> list[str]:
    """All arms that are compared, known once the search is done."""
    best = dict.fromkeys(f"fixed: {best_fixed(probe)}" for probe in PROBES)
    named = [*policies(), *(f"{kind}: {probe}" for kind in ("influence", "influence_select") for probe in PROBES)]
    return list(dict.fromkeys(["fixed: by size", "fixed: equal", *named, *best]))


# --- runs -----------------------------------------------------------------------------------------------------------


def common(arm: str, seed: int, student: Path) -> list[str]:
    """The settings that all arms share."""
    return [
        "data=none", f"data.seq_len={SEQ_LEN}", f"data.rows={ROWS}", "data.workers=1", "data.held_out_rows=8",
        f"data.cache_folder={ROOT / 'cache'}", f"run.root={ROOT / 'runs'}", f"run.id={folder_of(arm, seed)}",
        f"run.seed={seed}", f"run.steps={STEPS}", f"student.checkpoint_path={student}", "distillation=logits_only",
        "teacher=local", f"teacher.model={ROOT / 'teacher'}", "teacher.dtype=float32",
        "teacher.top_k=64", "optim=adamw", "student.compute=float32",
        f"optim.learning_rate={RATE}", "optim.schedule.warmup_steps=10", f"evaluation.every={STEPS}",
        "evaluation.at_start=false", "evaluation.samples=0", "checkpoint.every=0", "logging.wandb=off",
        "logging.progress=off",
    ]  # fmt: skip


def sources(weights: Mapping[str, float], probes: Sequence[str] = ()) -> list[str]:
    """Settings of the training sources with a weight, of the test sets, and of the probes of these domains."""
    lines = []
    for domain in DOMAINS:
        for split in ("train", "test", "probe"):
            trained = split == "train"
            if (trained and not weights.get(domain)) or (split == "probe" and domain not in probes):
                continue
            source = f"data.sources.{domain if trained else f'{split}_{domain}'}"
            lines += [
                f"{source}.kind=jsonl", f"{source}.path={ROOT / 'data' / f'{domain}-{split}.jsonl'}",
                f"{source}.weight={weights[domain] if trained else 0}",
                f"{source}.held_out_fraction={0 if trained else 1}",
            ]  # fmt: skip
    return lines


def folder_of(arm: str, seed: int) -> str:
    return re.sub("[^a-z0-9]+", "-", arm.lower()).strip("-") + f"-{seed}"


def run(arm: str, seed: int, sizes: Mapping[str, int]) -> None:
    """Make a run as `stillhouse-train` would, and append its line to the results."""
    from student_trainer import main as trainer

    settings = arm_settings(arm, seed, sizes)
    folder = ROOT / "runs" / folder_of(arm, seed)
    shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted run
    began = time.monotonic()
    code = trainer.run([*common(arm, seed, student_of(seed)), *settings, "run.resume=never"])
    if code:
        raise SystemExit(f"stillhouse-train ended with code {code}: {arm}, seed {seed}")
    line = read_run(folder) | {"arm": arm, "seed": seed, "seconds": round(time.monotonic() - began, 1)}
    with mixture_results.RESULTS.open("a") as file:
        file.write(json.dumps(line | {"cpu": machine()["cpu"]}) + "\n")
    print(f"{arm}, seed {seed}: {line['seconds']} s, {line['test']}", flush=True)
    if folder != healed():
        shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(main())
