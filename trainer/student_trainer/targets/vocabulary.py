"""Checks that student and teacher map the same ids to the same tokens. Called by `build_components` before training.

The two may differ at the end: a padded head, or tokens added to one of them. They then share a prefix of the ids, and
the losses compare the models on it. A different tokenizer is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from student_trainer.settings import TeacherSettings
from student_trainer.targets.protocol import TeacherCard
from teacher_proto.identity import tokenizer_sha256

logger = logging.getLogger(__name__)
SHOWN = 5


def agree_on_vocabulary(settings: TeacherSettings, card: TeacherCard, tokenizer: Any, student_rows: int) -> int:
    """How many leading ids the losses may compare, from what is known about both tokenizers. ValueError as in
    `shared_vocabulary`, or if teacher.tokenizer can't be loaded.
    """
    rows = min(student_rows, card.vocab_size)
    if settings.same_tokenizer == "trust":
        logger.warning("teacher.same_tokenizer is trust: not checking that ids mean the same to student and teacher")
        return rows
    if card.tokenizer_sha256 == tokenizer_sha256({}):
        logger.warning("the teacher was loaded without a tokenizer: cannot check that ids mean the same to it")
        return rows
    tokens = tokens_by_id(tokenizer)
    theirs = None
    if matching_prefix(tokens, card.tokenizer_sha256) is None:
        name = settings.tokenizer or (settings.model if settings.kind == "local" else card.name)
        theirs = _teacher_tokens(name, local_only=settings.tokenizer is None)
    return shared_vocabulary(tokens, student_rows, card.tokenizer_sha256, card.vocab_size, theirs)


def _teacher_tokens(name: str, local_only: bool) -> dict[int, str] | None:
    """The teacher's tokens, from teacher.tokenizer or else from a local copy under the teacher's name; None if there is
    neither.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_only, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if local_only:
            return None
        raise ValueError(f"teacher.tokenizer={name}: {str(error).strip().splitlines()[0]}") from None
    return tokens_by_id(tokenizer)


def tokens_by_id(tokenizer: Any) -> dict[int, str]:
    """A Hugging Face tokenizer's vocabulary by id, including added tokens."""
    return {index: token for token, index in tokenizer.get_vocab().items()}


def shared_vocabulary(
    student: Mapping[int, str], student_rows: int, teacher_sha256: str, teacher_rows: int,
    teacher: Mapping[int, str] | None = None,
) -> int:  # fmt: skip
    """How many leading ids mean the same token to both, which the losses may compare.

    `student`: its tokenizer's tokens by id; `student_rows` and `teacher_rows`: sizes of the two heads;
    `teacher_sha256`: hash of the teacher's tokens (`identity.tokenizer_sha256`); `teacher`: these tokens, if available.
    ValueError names the first tokens that differ, or says what to do if only the hashes are known to differ.
    """
    rows = min(student_rows, teacher_rows)
    same = matching_prefix(student, teacher_sha256)
    if same is None:
        if teacher is None:
            raise ValueError(
                f"the student's tokenizer ({len(student)} tokens) is not the teacher's: their hashes differ, and no "
                "prefix of the student's has the teacher's hash. Give teacher.tokenizer=FOLDER_OR_HUB_NAME to see "
                "which tokens differ, or to use a teacher with added tokens; teacher.same_tokenizer=trust skips this"
            )
        same = _compare(student, teacher)
    unshared = False
    for tokens, who, other in ((student, "student", "teacher"), (teacher or {}, "teacher", "student")):
        if extra := sorted(index for index in tokens if index >= same):
            # Ids that only one of them has are left out, as are all ids after them.
            rows, unshared = min(rows, same), True
            logger.warning(
                "the %s has %d tokens that the %s lacks, from %r (id %d) on: the losses compare the two on the %d ids "
                "that they share", who, len(extra), other, tokens[extra[0]], extra[0], rows,
            )  # fmt: skip
    if student_rows != teacher_rows and not unshared:
        logger.warning(
            "the student's head has %d rows, the teacher's %d, for the same tokenizer of %d tokens: the losses compare "
            "the two on the first %d ids", student_rows, teacher_rows, len(student), rows,
        )  # fmt: skip
    return rows


def matching_prefix(tokens: Mapping[int, str], sha256: str) -> int | None:
    """The number of leading ids whose `identity.tokenizer_sha256` is `sha256`; None if there is no such prefix.

    The hash is of canonical JSON, `[[0,"a"],[1,"b"]]`, so every prefix can be tried in one pass.
    """
    running = hashlib.sha256(b"[")
    found = None
    for count, index in enumerate(sorted(tokens)):
        entry = json.dumps([index, tokens[index]], separators=(",", ":"))
        running.update((("," if count else "") + entry).encode())
        # The hash of the list if it ended here.
        closed = running.copy()
        closed.update(b"]")
        if closed.hexdigest() == sha256:
            found = index + 1
    return found


def _compare(student: Mapping[int, str], teacher: Mapping[int, str]) -> int:
    differing = [index for index in sorted(student.keys() & teacher.keys()) if student[index] != teacher[index]]
    if differing:
        shown = "; ".join(
            f"id {index}: {student[index]!r} (student), {teacher[index]!r} (teacher)" for index in differing[:SHOWN]
        )
        raise ValueError(
            f"the student's tokenizer is not the teacher's: {len(differing)} ids mean different tokens, first {shown}. "
            "Targets made with one tokenizer are useless to a student with another: use a student with the teacher's"
        )
    # No common id differs, so the two agree up to the end of the shorter one.
    return min(max(student), max(teacher)) + 1
