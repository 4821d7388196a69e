"""Opens teacher, tokenizer, data and student, and checks that they fit together. Called by `build`, `check` and
`influence`.

Whatever can be refused is refused before the model is loaded; but a run that waits for its teacher loads it meanwhile.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from student_trainer.checkpoint.earlier_run import load_student, model_behind
from student_trainer.checkpoint.files import Snapshot
from student_trainer.checkpoint.resume import may_change
from student_trainer.components import Components
from student_trainer.data.loader import BatchSource
from student_trainer.device import choose_device, use_device
from student_trainer.losses.kinds import all_terms, terms_of
from student_trainer.losses.terms import Needs
from student_trainer.ranks import ALONE, Ranks
from student_trainer.settings import Settings
from student_trainer.settings.student import NO_STUDENT
from student_trainer.students.diffusion import check_reading
from student_trainer.students.diffusion_record import text_rows
from student_trainer.students.load import check_cell
from student_trainer.targets.attention import open_attention
from student_trainer.targets.background import EventThread
from student_trainer.targets.open import check_ask, open_teacher, read_head, wants_head
from student_trainer.targets.vocabulary import agree_on_vocabulary
from teacher_proto.process.stages import stage

logger = logging.getLogger(__name__)


def build_components(
    settings: Settings, thread: EventThread, stack: ExitStack, snapshot: Snapshot | None = None, ranks: Ranks = ALONE
) -> Components:
    """Teacher, tokenizer, data and student, checked against each other; the student is not sharded yet."""
    check_cell(settings.student)
    device = choose_device(settings.run, ranks.local)
    use_device(device)
    if settings.run.threads is not None:
        torch.set_num_threads(settings.run.threads)
    with stage("loading the tokenizer"):
        tokenizer = load_tokenizer(settings)
    with stage("opening the data"):
        source = BatchSource(settings.data, tokenizer, settings.run.seed, ranks.rank, ranks.world)
    stack.callback(source.close)
    waits = settings.teacher.kind != "none" and settings.teacher.start_within_s > 0
    student = load_student(settings.student, device) if waits else None
    teacher = None
    if settings.teacher.kind != "none":
        saved_card = snapshot.state.get("teacher") if snapshot is not None else None
        if saved_card is not None and may_change("teacher.fingerprint", settings):
            logger.warning(
                "run.allow_changes names teacher.fingerprint: the teacher may differ from %s, which the run began with",
                saved_card["name"],
            )
            saved_card = None
        with stage("connecting to the teacher"):
            teacher = open_teacher(settings.teacher, thread, stack, saved_card)
        check_ask(settings, teacher.card)
    head = None
    if teacher is not None and wants_head(settings):
        with stage("fetching the teacher's head"):
            head = read_head(thread.call(teacher.targets.head()), device)
    student = student or load_student(settings.student, device)
    check_reading(student, tokenizer, settings.data.seq_len, all_terms(settings))
    if teacher is not None:
        rows = text_rows(student.config, student.vocab_size)
        student.shared_vocab = agree_on_vocabulary(settings.teacher, teacher.card, tokenizer, rows)
    student.check_terms(all_terms(settings))
    attention = None
    if teacher is not None and Needs.of(terms_of(settings.distillation)).layers:
        with stage("connecting to the attention service"):
            attention = open_attention(settings, teacher, thread, stack)
    return Components(teacher, tokenizer, source, student, head, attention)


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The student's tokenizer. ValueError if there is none."""
    student = settings.student if settings.student.tokenizer else model_behind(settings.student)
    name = student.tokenizer or student.checkpoint_path
    if not name:
        raise ValueError(NO_STUDENT)
    try:
        return AutoTokenizer.from_pretrained(name, revision=student.revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        what = "has no tokenizer" if Path(name).is_dir() else "is neither a folder nor a model available from the hub"
        # What cannot be a hub name was meant as a folder, so the hub's rules for names would only mislead.
        why = "no such folder" if isinstance(error, HFValidationError) else str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name!r} {what}: {why} (student.checkpoint_path names the student; set student.tokenizer if its "
            "tokenizer is elsewhere)"
        ) from None
