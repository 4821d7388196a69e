"""Checks whether a run may resume with changed settings. Called by `build` if there is a checkpoint.

Every setting is of one of three classes. *fixed*: it changes what is learnt, so a change is refused unless
`run.allow_changes` names it. *numeric*: it changes only rounding; a change is logged as a warning. *free*: it changes
nothing that is learnt.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from student_trainer.settings import Settings
from student_trainer.settings.redact import public, public_tree
from student_trainer.settings.student import with_new_names
from student_trainer.settings.terms import as_written_now
from student_trainer.students.quantisers.record import renewed
from teacher_proto.identity import flatten

logger = logging.getLogger(__name__)
Rule = Literal["fixed", "numeric", "free"]

TERMS = ("distillation.terms.", "on_policy.terms.")
# Settings of a term that exists only with a coefficient; without one the others have no effect.
RELATIONS = "distillation.attention."
COEFFICIENT = f"{RELATIONS}coefficient"

# By dotted name; the longest prefix of a setting's name applies. "*" matches one part.
RULES: dict[str, Rule] = {
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
    # The weights come from the checkpoint; `check_student` checks that config and tokenizer are unchanged.
    "student.checkpoint_path": "free",
    "student.cache_folder": "free",
    "student.storage_options": "free",
    "student.revision": "free",
    "student.tokenizer": "free",
    "student.compute": "numeric",
    "student.attention": "numeric",
    "student.gradient_checkpointing": "numeric",
    "student.compile": "numeric",
    "teacher": "free",  # how it is reached: its identity is compared elsewhere, unless `may_change` allows another
    "teacher.top_k": "fixed",
    "distillation": "fixed",
    **dict.fromkeys(  # names of the presets: the terms, which are fixed, hold the values
        ("distillation.lambda_logits", "distillation.gamma_attention", "distillation.temperature"), "free"
    ),
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


def rule_for(name: str) -> Rule:
    """The class of the setting `name`. KeyError if nothing in the table covers it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for known, rule in RULES.items():
            pattern = known.split(".")
            if len(pattern) == length and all(p in ("*", part) for p, part in zip(pattern, parts, strict=False)):
                return rule
    raise KeyError(name)


def may_change(name: str, now: Settings) -> bool:
    """Whether `run.allow_changes` names the setting or a section that contains it."""
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in now.run.allow_changes)


def check_changes(before: Mapping[str, Any], now: Settings) -> None:
    """`before`: the settings in the checkpoint. ValueError lists fixed ones that differ and are not allowed to.

    A setting that an older trainer did not have counts as its default.
    """
    # A run has only the terms that it names, so those of the default settings are left out.
    defaults = {name: value for name, value in flatten(public(Settings())).items() if not name.startswith(TERMS)}
    old, new = defaults | flatten(_as_written_now(public_tree(before))), flatten(public(now))
    refused = []
    for name in sorted(old.keys() | new.keys()):
        was, becomes = old.get(name, "absent"), new.get(name, "absent")
        if was == becomes or (name.startswith(RELATIONS) and old[COEFFICIENT] is None is new[COEFFICIENT]):
            continue
        rule = rule_for(name)
        line = f"{name}: {was} in the checkpoint, {becomes} now"
        if rule == "fixed" and not may_change(name, now):
            refused.append((name, line))
        elif rule != "free":
            logger.warning("resumed with a changed setting, %s", line)
    if refused:
        lines = "; ".join(line for _, line in refused)
        names = ",".join(name for name, _ in refused)
        raise ValueError(
            f"the run cannot continue with different settings: {lines}. Set them back, start a new run with "
            f"another run.id, or allow the change with run.allow_changes=[{names}]"
        )


def _as_written_now(before: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an older trainer in today's form: terms and student were written differently."""
    before = {**before, "student": with_new_names(before["student"])}
    losses = {name: before[name] for name in ("distillation", "on_policy") if name in before}
    return {**before, **{name: {**of, "terms": as_written_now(of["terms"])} for name, of in losses.items()}}


def check_student(before: Mapping[str, Any] | None, now: Mapping[str, Any], settings: Settings) -> None:
    """Compare the student's config and tokenizer, from `student_identity`, with those that the run began with.

    ValueError lists the fields that differ. The files' location doesn't matter. `before` is None in an older trainer's
    checkpoint.
    """
    if before is None:
        logger.warning("the checkpoint does not say which config and tokenizer the run began with: not comparing them")
        return
    same_version = before["transformers"] == now["transformers"]
    for part, setting in (("config", "student.checkpoint_path"), ("tokenizer", "student.tokenizer")):
        old, new = (flatten(renewed(each[part]) if part == "config" else each[part]) for each in (before, now))
        lines = []
        for name in sorted(old.keys() | new.keys()):
            was, becomes = old.get(name, "absent"), new.get(name, "absent")
            if was == becomes:
                continue
            line = f"{part}.{name}: {was} in the checkpoint, {becomes} now"
            # Another version of transformers may have more or fewer fields for the same model.
            if may_change(setting, settings) or (not same_version and "absent" in (was, becomes)):
                logger.warning("resumed with a changed student, %s", line)
            else:
                lines.append(line)
        if lines:
            raise ValueError(
                f"the run cannot continue with another student's {part}: {'; '.join(lines)}. Use the one that it began "
                f"with, start a new run with another run.id, or allow the change with run.allow_changes={setting}"
            )
