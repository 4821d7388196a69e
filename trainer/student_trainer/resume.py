"""May a run go on with other settings than it began with? Called by `build` when a checkpoint is there.

Every setting has one of three answers. *fixed*: it changes what is learnt; refused, unless `run.allow_changes` names
it. *numeric*: it changes only how sums are rounded; warned of. *free*: it changes nothing that is learnt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from student_trainer.redact import public, public_tree
from student_trainer.settings import Settings
from teacher_proto.identity import flatten

logger = logging.getLogger(__name__)
Answer = Literal["fixed", "numeric", "free"]

# By dotted name; the longest that is a beginning of a setting's name answers for it. "*" stands for one part.
ANSWERS: dict[str, Answer] = {
    "run.root": "free",
    "run.id": "free",
    "run.steps": "fixed",
    "run.time_limit_s": "free",
    "run.seed": "fixed",
    "run.resume": "free",
    "run.allow_changes": "free",
    "run.device": "numeric",
    "run.threads": "numeric",
    "data": "fixed",
    "data.workers": "free",
    "data.batches_ahead": "free",
    "data.held_out_rows": "free",
    "data.cache_folder": "free",
    "data.sources.*.storage_options": "free",
    "student": "fixed",
    "student.checkpoint_path": "free",  # the weights come from the checkpoint
    "student.revision": "free",
    "student.compute": "numeric",
    "student.attention": "numeric",
    "student.gradient_checkpointing": "numeric",
    "student.compile": "numeric",
    "teacher": "free",  # who answers, by which way: the identity itself is compared
    "teacher.top_k": "fixed",
    "distillation": "fixed",
    "distillation.chunk_rows": "numeric",
    "on_policy": "fixed",
    "on_policy.sequences_at_once": "numeric",
    "optim": "fixed",
    "optim.micro_batch_rows": "numeric",
    "prefetch": "free",
    "evaluation": "free",
    "checkpoint": "free",
    "logging": "free",
}


def answer_for(name: str) -> Answer:
    """What a change of the setting `name` means. KeyError for a name that nothing in the table covers."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for known, answer in ANSWERS.items():
            pattern = known.split(".")
            if len(pattern) == length and all(p in ("*", part) for p, part in zip(pattern, parts, strict=False)):
                return answer
    raise KeyError(name)


def check_changes(before: Mapping[str, Any], now: Settings) -> None:
    """`before` are the settings in the checkpoint. ValueError lists the fixed ones that differ and are not allowed."""
    old, new = flatten(public_tree(before)), flatten(public(now))
    refused = []
    for name in sorted(old.keys() | new.keys()):
        was, becomes = old.get(name, "absent"), new.get(name, "absent")
        if was == becomes:
            continue
        answer = answer_for(name)
        line = f"{name}: {was} in the checkpoint, {becomes} now"
        if answer == "fixed" and not any(name == a or name.startswith(f"{a}.") for a in now.run.allow_changes):
            refused.append((name, line))
        elif answer != "free":
            logger.warning("resumed with a change, %s", line)
    if refused:
        lines = "; ".join(line for _, line in refused)
        names = ",".join(name for name, _ in refused)
        raise ValueError(
            f"the run cannot go on with other settings: {lines}. Set them back, begin anew with another run.id, or "
            f"allow it with run.allow_changes=[{names}]"
        )
