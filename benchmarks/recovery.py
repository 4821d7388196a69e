"""What low-rank corrections recover: SmolLM2-135M rounded to int4 and to 1.58 bits, before correction, after the closed
form, and after training it, by rank and by seed of the calibration text.

    python -m benchmarks.recovery --docs                 the table of docs/recovery.md; over an hour of one core
    python -m benchmarks.recovery --minutes 8            as much of it as fits; the next call continues
    python -m benchmarks.recovery --model FOLDER --tokens 1024 --seeds 0 --steps 4     to try it out

The closed form is computed by `student_trainer.calibration` at the largest rank; a smaller rank takes its first
columns, which are the best correction of that rank for the same inputs. Training is AdamW on the full KL from the model
in full precision, with everything but the corrections frozen. Results are kept in runs/recovery.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import machine, publish, report
from demo.comparison import markdown
from demo.prepare import TEACHER, TEXT, prepare
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import CausalDocuments, View
from student_trainer.calibration.calibrate import calibrate
from student_trainer.calibration.layer_passes import quantised_once
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.settings import LRCSettings, QuantisationSettings, StudentSettings
from student_trainer.students.adapters.low_rank import Correction, corrections, put_corrections
from student_trainer.students.adapters.lrc import rank_of
from student_trainer.students.quant_linear import quant_linears
from student_trainer.students.student import Student

ROOT, DOCS = Path("runs/recovery"), Path("docs/recovery.md")
QUANTISERS = {
    "int4": {"quantiser": "rtn", "quantisation": QuantisationSettings(sub_norm="none", bits=4)},
    "1.58 bits": {
        "quantiser": "bitnet", "quantisation": QuantisationSettings(sub_norm="none", quantise_activations=False),
    },
}  # fmt: skip
# Without a correction: what a similar number of bits achieves otherwise.
PLAIN = {
    name: {"quantiser": "rtn", "quantisation": QuantisationSettings(sub_norm="none", bits=bits, group_size=group)}
    for name, bits, group in (("int4, groups of 32", 4, 32), ("int5", 5, None), ("int6", 6, None), ("int8", 8, None))
}
RANKS = (0.05, 0.1, 0.3)
WIDTH, HELD_OUT_ROWS, ROWS = 256, 8, 4
CPU = torch.device("cpu")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TEACHER)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of calibration text (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="training steps of 256 tokens (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after this many minutes")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/recovery.md")
    options = parser.parse_args()
    prepare(("teacher", "text"))
    torch.set_num_threads(1)
    ROOT.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    began = time.monotonic()
    for cell in bench.cells():
        if not bench.file(*cell).exists() and time.monotonic() - began < 60 * options.minutes:
            bench.measure(*cell)
    rows = bench.rows()
    notes = ["CE and KL: nats per token on held-out text, KL(full precision || student) over the whole vocabulary."]
    report("recovery", rows, title=f"Recovery of {options.model.name}", notes=notes)
    if options.docs:
        publish(DOCS, f"{markdown(rows)}\n\nOn {machine()['cpu']}, one thread.")
    return 0


class Bench:
    """`measure` writes one file of metrics; `rows` makes the table from the files."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._name = f"{options.model.name}-{options.tokens}-{options.steps}"
        self._exact: Student | None = None
        self._text_RT: Tensor | None = None
        self._exact_NV: list[Tensor] | None = None

    def cells(self) -> Iterator[tuple[str, int, str]]:
        """What to measure, in order: quantiser, seed, and "plain", "closed" or the rank to train."""
        seeds = self._options.seeds
        yield from ((quantiser, 0, "plain") for quantiser in PLAIN)
        yield from ((quantiser, seed, "closed") for seed in seeds for quantiser in QUANTISERS)
        if self._options.steps:
            middle_first = sorted(RANKS, key=lambda rank: abs(rank - RANKS[1]))
            yield from (
                (quantiser, seed, f"{rank:g}") for rank in middle_first for seed in seeds for quantiser in QUANTISERS
            )

    def file(self, quantiser: str, seed: int, what: str) -> Path:
        return ROOT / f"{self._name}-{re.sub('[^a-z0-9.]+', '-', quantiser)}-{seed}-{what}.json"

    def measure(self, quantiser: str, seed: int, what: str) -> None:
        began = time.process_time()
        if what == "plain":
            self._measure_plain(quantiser, began)
            return
        student = load_student(
            StudentSettings(
                checkpoint_path=str(self._options.model), adapter="lrc", lrc=LRCSettings(rank=RANKS[-1]),
                **QUANTISERS[quantiser],
            ), CPU,
        )  # fmt: skip
        found: dict[str, Any] = {}
        if what == "closed":
            found["exact"] = self._figures(self.exact)
            found["before"] = self._figures(student)
            found["bits"] = {f"{rank:g}": _bits(student, rank) for rank in RANKS}
        self._calibrate(student, quantiser, seed)
        largest = corrections(student.model)
        for rank in RANKS if what == "closed" else (float(what),):
            _cut(student, largest, rank)
            if what != "closed":
                self._train(student, seed)
            found[f"{rank:g}"] = self._figures(student)
        found["cpu_s"] = time.process_time() - began
        self.file(quantiser, seed, what).write_text(json.dumps(found, indent=1))
        print(quantiser, seed, what, json.dumps(found), flush=True)

    def _measure_plain(self, quantiser: str, began: float) -> None:
        student = load_student(StudentSettings(checkpoint_path=str(self._options.model), **PLAIN[quantiser]), CPU)
        found = {"before": self._figures(student), "bits": _bits(student, None), "cpu_s": time.process_time() - began}
        self.file(quantiser, 0, "plain").write_text(json.dumps(found, indent=1))

    def _calibrate(self, student: Student, quantiser: str, seed: int) -> None:
        """Calibrate, continuing from the layers that an earlier call has saved, as a run does."""
        folder = ROOT / f"{self._name}-{quantiser.replace(' ', '-')}-{seed}-layers"
        rows = self._calibration_rows(seed)
        micros = [_micro(part) for part in rows.split(ROWS)]
        calibrate(student, micros, LRCSettings(rank=RANKS[-1]), folder, f"{quantiser} {seed}")

    def _train(self, student: Student, seed: int) -> None:
        """Train the corrections alone, at a learning rate of 1e-4, on the full KL of 256 tokens per step."""
        parameters = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1000 + seed)
        text_RT = self._training_text()
        with quantised_once(student.model):
            for _ in range(self._options.steps):
                row = int(torch.randint(len(text_RT), (), generator=generator))
                micro = _micro(text_RT[row : row + 1])
                with torch.no_grad():
                    exact_NV = _logits(self.exact, micro).log_softmax(-1)
                loss = _kl(exact_NV, _logits(student, micro)).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    @torch.no_grad()
    def _figures(self, student: Student) -> dict[str, float]:
        """Cross-entropy and KL on the held-out rows."""
        entropy, kl, count = 0.0, 0.0, 0
        for part_RT, exact_NV in zip(self._held_out().split(2), self._held_out_logprobs(), strict=True):
            micro = _micro(part_RT)
            ours_NV = _logits(student, micro).log_softmax(-1)
            entropy += float(F.nll_loss(ours_NV, micro.view.labels_N, reduction="sum"))
            kl += float(_kl(exact_NV, ours_NV).sum())
            count += len(ours_NV)
        return {"cross_entropy": entropy / count, "kl": kl / count}

    def _held_out(self) -> Tensor:
        return self._text()[-HELD_OUT_ROWS:]

    @torch.no_grad()
    def _held_out_logprobs(self) -> list[Tensor]:
        if self._exact_NV is None:
            parts = self._held_out().split(2)
            self._exact_NV = [_logits(self.exact, _micro(part_RT)).log_softmax(-1) for part_RT in parts]
        return self._exact_NV

    @property
    def exact(self) -> Student:
        if self._exact is None:
            self._exact = load_student(StudentSettings(checkpoint_path=str(self._options.model)), CPU)
        return self._exact

    def _text(self) -> Tensor:
        """The demo's prose, concatenated, as token ids in rows of `WIDTH`."""
        if self._text_RT is None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self._options.model)
            lines = (TEXT / "prose.jsonl").read_text().splitlines()
            ids = [token for line in lines for token in tokenizer(json.loads(line)["text"])["input_ids"]]
            self._text_RT = torch.tensor(ids[: len(ids) // WIDTH * WIDTH]).view(-1, WIDTH)
        return self._text_RT

    def _training_text(self) -> Tensor:
        return self._text()[:-HELD_OUT_ROWS]

    def _calibration_rows(self, seed: int) -> Tensor:
        rows_RT = self._training_text()
        order = torch.randperm(len(rows_RT), generator=torch.Generator().manual_seed(seed))
        return rows_RT[order[: self._options.tokens // WIDTH]]

    def rows(self) -> list[dict[str, Any]]:
        """The table: means over the measured seeds, followed by their range if they differ."""
        made = []
        for quantiser in QUANTISERS:
            closed = [json.loads(file.read_text()) for file in self._files(quantiser, "closed")]
            if not closed:
                continue
            for rank in RANKS:
                name = f"{rank:g}"
                trained = [json.loads(file.read_text()) for file in self._files(quantiser, name)]
                made.append(
                    {
                        "weights": quantiser,
                        "rank": f"{rank:.0%}",
                        "bits per weight": f"{closed[0]['bits'][name]:.2f}",
                        **{
                            f"{figure}, {when}": _spread([each[key][field] for each in runs])
                            for figure, field in (("CE", "cross_entropy"), ("KL", "kl"))
                            for when, key, runs in (
                                ("before", "before", closed), ("closed form", name, closed),
                                (f"{self._options.steps} steps", name, trained),
                            )
                        },
                        "CE of the model": _spread([closed[0]["exact"]["cross_entropy"]]),
                        "seeds": f"{len(closed)}, {len(trained)} trained",
                    }
                )  # fmt: skip
        for quantiser in PLAIN:
            if (file := self.file(quantiser, 0, "plain")).exists():
                found = json.loads(file.read_text())
                row = dict.fromkeys(made[0] if made else (), "") | {"weights": quantiser, "rank": "none"}
                row |= {
                    "bits per weight": f"{found['bits']:.2f}",
                    "CE, before": f"{found['before']['cross_entropy']:.3f}",
                }
                made.append(row | {"KL, before": f"{found['before']['kl']:.3f}"})
        return made

    def _files(self, quantiser: str, what: str) -> list[Path]:
        return [file for seed in self._options.seeds if (file := self.file(quantiser, seed, what)).exists()]


def _bits(student: Student, rank: float | None) -> float:
    """Bits per weight of the decoder's linear layers: packed, with scales, and a correction of this rank in 16 bits."""
    bits = weights = 0.0
    for _, layer in quant_linears(student.model):
        count = layer.out_features * layer.in_features
        bits += layer.weight_quantiser.stored_bits(layer.out_features, layer.in_features) * count
        if rank is not None:
            bits += 16 * rank_of(layer, rank) * (layer.out_features + layer.in_features)
        weights += count
    return bits / weights


def _micro(tokens_BT: Tensor) -> MicroBatch:
    """Each row is one document; every token but a row's last predicts the next one."""
    batch, width = tokens_BT.shape
    rows_N = torch.arange(batch * width).view(batch, width)[:, :-1].flatten()
    view = View(
        tokens_BT, torch.arange(width).expand(batch, width),
        CausalDocuments(torch.zeros(batch, width, dtype=torch.int32)), rows_N, tokens_BT[:, 1:].flatten(),
        torch.arange(len(rows_N)),
    )  # fmt: skip
    nothing_N = torch.zeros(len(rows_N), dtype=torch.int64)
    return MicroBatch(view, nothing_N, nothing_N, None)


def _logits(student: Student, micro: MicroBatch) -> Tensor:
    """Logits [N, V] as float32, with a graph, computed in the student's dtype."""
    with torch.autocast("cpu", dtype=student.compute, enabled=student.compute != torch.float32):
        return F.linear(student.hidden(micro), student.head.weight_VD).float()


def _kl(exact_NV: Tensor, ours_NV: Tensor) -> Tensor:
    """KL(exact || ours) of each row [N], from logprobs and logits."""
    return F.kl_div(ours_NV.log_softmax(-1), exact_NV, log_target=True, reduction="none").sum(-1)


def _cut(student: Student, largest: dict[str, Correction], rank: float) -> None:
    """Give the student the first columns of its largest corrections."""
    cut = {}
    for name, layer in quant_linears(student.model):
        count, found = rank_of(layer, rank), largest[name]
        a_RI, b_OR = found.a_RI[:count].detach().clone(), found.b_OR[:, :count].detach().clone()
        cut[name] = Correction(a_RI, b_OR, count)
    put_corrections(student.model, cut)


def _spread(values: list[float]) -> str:
    if not values:
        return "not measured"
    mean = statistics.mean(values)
    return f"{mean:.3f}" if max(values) - min(values) < 5e-4 else f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})"


if __name__ == "__main__":
    raise SystemExit(main())
