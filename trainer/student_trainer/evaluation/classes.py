"""Student's and teacher's choices on held-out classification examples, with their probabilities. Called by `evaluator`
for sources of format classification; written to `classes.jsonl`, one line per source and evaluation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from student_trainer.batch.batch import Batch
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.evaluation.records import ClassExample, ClassMetrics
from student_trainer.ranks import Ranks

EXAMPLES = 20  # kept for the report


class ClassSums:
    """Accumulates the micro batches of one source. `words`: the ids of the class words; `decode`: ids to text."""

    def __init__(self, source: str, words: Sequence[int], decode: Callable[[Sequence[int]], str]):
        self._source, self._words, self._decode = source, tuple(words), decode
        self._said: dict[str, Tensor] = {}  # by example, see `_columns`
        self._prompts: dict[str, Tensor] = {}

    def add(self, batch: Batch, micro: MicroBatch, logits_NV: Tensor) -> Tensor:
        """[N] bool: where the likeliest class word is the right one."""
        words_C = torch.tensor(self._words, device=logits_NV.device)
        logits_NC = logits_NV[:, words_C]
        rows = range(micro.first_row, micro.first_row + micro.rows)
        documents = [document for document in batch.documents if document.row in rows]
        columns_N5 = self._columns(micro, logits_NC, words_C).cpu()
        for place, columns_5 in zip(micro.documents_N.tolist(), columns_N5, strict=True):
            document = documents[place]
            ids_T = batch.tokens_BT[document.row, document.start : document.stop - 1]
            self._said[document.key] = columns_5
            self._prompts[document.key] = torch.from_numpy(ids_T)
        return words_C[logits_NC.argmax(1)] == micro.view.labels_N

    def metrics(self, ranks: Ranks) -> ClassMetrics:
        """The result over all ranks, which must all call it."""
        said = {key: columns_5 for each in ranks.gather(self._said) for key, columns_5 in each.items()}
        mine = {key: self._prompts[key] for key in _chosen(self._prompts)}
        prompts = {key: ids_T for each in ranks.gather(mine) for key, ids_T in each.items()}
        student, teacher = self._no_counts(), self._no_counts()
        examples = {}
        for key, columns_5 in said.items():
            label, choice, probability, teachers_choice, teachers_probability = columns_5.tolist()
            right = int(label)
            student[right][int(choice)] += 1
            if teachers_choice >= 0:
                teacher[right][int(teachers_choice)] += 1
            if key in prompts:
                examples[key] = ClassExample(
                    key, self._decode(prompts[key].tolist()), right, int(choice), round(probability, 4),
                    int(teachers_choice) if teachers_choice >= 0 else None,
                    round(teachers_probability, 4) if teachers_choice >= 0 else None,
                )  # fmt: skip
        return ClassMetrics(
            self._source, [self._decode([word]) for word in self._words], student,
            teacher if any(map(any, teacher)) else None, [examples[key] for key in _chosen(examples)],
        )  # fmt: skip

    def _columns(self, micro: MicroBatch, logits_NC: Tensor, words_C: Tensor) -> Tensor:
        """[N, 5]: the right class, the student's choice and its probability among the classes, and the same for the
        teacher; its choice is -1 if none of the words is in its top K.
        """
        label_N = (micro.view.labels_N[:, None] == words_C).int().argmax(1)
        student_NC = logits_NC.double().softmax(1)
        teacher_NC = _teachers(micro, words_C)
        probability_N, choice_N = student_NC.max(1)
        teachers_probability_N, teachers_choice_N = teacher_NC.max(1)
        teachers_choice_N = torch.where(teachers_probability_N.isnan(), -1, teachers_choice_N)
        return torch.stack([label_N, choice_N, probability_N, teachers_choice_N, teachers_probability_N], 1)

    def _no_counts(self) -> list[list[int]]:
        return [[0] * len(self._words) for _ in self._words]


def _teachers(micro: MicroBatch, words_C: Tensor) -> Tensor:
    """[N, C] the teacher's probabilities of the words in its top K, normalised over these; NaN if there are none."""
    rows = micro.teacher
    if rows is None or rows.ids_NK is None or rows.logprobs_NK is None:
        return torch.full((len(micro.view.labels_N), len(words_C)), torch.nan, device=words_C.device)
    found_NCK = rows.ids_NK[:, None].long() == words_C[:, None]
    logprobs_NCK = torch.where(found_NCK, rows.logprobs_NK[:, None].double(), -torch.inf)
    if rows.valid_N is not None:
        logprobs_NCK = logprobs_NCK.masked_fill(~rows.valid_N[:, None, None], -torch.inf)
    return logprobs_NCK.amax(2).softmax(1)


def _chosen(keys: Iterable[str]) -> list[str]:
    """A few examples, always the same, chosen by hash: files are often sorted by class."""
    return sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:EXAMPLES]
