"""Finds settings that are given but have no effect with the others' values. Called by `compose`, which logs a warning.

A table of rules: the dotted name, when the setting has an effect, and why it has none otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from student_trainer.losses.kinds import all_terms
from student_trainer.losses.terms import Needs
from student_trainer.settings import Settings, TeacherSettings
from student_trainer.settings.student import AUTO
from student_trainer.settings.teacher import MemberSettings
from teacher_proto.dataset.folder import is_url
from teacher_proto.requests import Kind


class Rule(NamedTuple):
    """`name` has an effect only if `acts` holds. A name that ends in a dot stands for its whole section."""

    name: str
    acts: Callable[[Settings], bool]
    why: str


def _has_teacher(settings: Settings) -> bool:
    return settings.teacher.kind != "none"


def _asks_for(kind: Kind) -> Callable[[Settings], bool]:
    return lambda settings: kind in Needs.of(all_terms(settings)).kinds


def _has_attention(settings: Settings) -> bool:
    return settings.distillation.attention.active


def _fills_in(settings: Settings) -> bool:
    return settings.student.architecture in ("diffusion", AUTO)


def _may_wait(settings: Settings) -> bool:
    teachers: tuple[TeacherSettings | MemberSettings, ...] = (settings.teacher, *settings.teacher.members.values())
    return _has_attention(settings) or any(
        t.kind == "remote" or (t.kind == "cached" and t.on_miss == "remote") for t in teachers
    )


def _has_form(form: str) -> Callable[[Settings], bool]:
    """Whether the mixture's policy has this form, or has no forms."""
    return lambda settings: getattr(settings.data.mixture, "form", form) == form


def _depth_is_reached(settings: Settings) -> bool:
    """Whether so many batches can be in flight: those after batch n + lag - 1 are not made before update n."""
    depth, mixture = settings.prefetch.depth, settings.data.mixture
    return mixture.policy == "static" or depth == "auto" or depth < mixture.lag


# The kind of teacher that reads a field. A store with on_miss=remote also reads those of a service.
OF_KIND = {
    **dict.fromkeys(("url", "key_variable"), "remote"),
    **dict.fromkeys(("model", "revision", "dtype", "device", "max_batch_tokens"), "local"),
    **dict.fromkeys(("store", "store_bytes", "store_cache", "store_cache_bytes", "store_ahead", "on_miss"), "cached"),
}


def _of_one_teacher(name: str, teacher: TeacherSettings | MemberSettings, mix: str) -> str | None:
    """Why the field `name` of a teacher has no effect; None if it has one."""
    owner, kind = OF_KIND.get(name), teacher.kind
    written_through = kind == "cached" and teacher.on_miss == "remote"
    if owner not in (None, kind) and not (owner == "remote" and written_through):
        return f"this teacher's kind is {kind}"
    if name == "store_bytes" and not written_through:
        return "the store is only read, not written"
    if name in ("store_cache", "store_cache_bytes", "store_ahead") and not is_url(teacher.store):
        return "teacher.store is not the URL of a bucket"
    if name == "weight" and mix == "by_source":
        return "teacher.mix is by_source"
    if name == "sources" and mix == "ensemble":
        return "teacher.mix is ensemble"
    return None


# Shorthands that the presets of `distillation` interpolate into fields of their terms.
PRESET_NAMES = ("distillation.lambda_logits", "distillation.gamma_attention", "distillation.temperature")
GAMMA = 1e5  # BitDistill's coefficient for relations, with the official reduction
FAR = 6  # a coefficient this many orders of magnitude below it is taken for a mistake

RULES = (
    Rule("data.mixture.lag", lambda s: s.data.mixture.policy != "static", "data.mixture.policy is static"),
    *(
        Rule(f"data.mixture.{name}", _has_form("bounded"), "data.mixture.form is not bounded")
        for name in ("kept", "start")
    ),
    *(
        Rule(f"data.mixture.{name}", _has_form("exponentiated"), "data.mixture.form is not exponentiated")
        for name in ("eta", "smoothing")
    ),
    Rule("prefetch.depth", _depth_is_reached, "data.mixture.lag is the limit, as later batches have no weights yet"),
    *(
        Rule(f"distillation.balance.{name}", lambda s: bool(s.distillation.balance.shares), "balance.shares is empty")
        for name in ("reference", "every", "ema")
    ),
    *(
        Rule(
            f"distillation.lookahead.{name}",
            lambda s: s.distillation.lookahead.window is not None,
            "distillation.lookahead.window is null",
        )
        for name in ("candidates", "positions", "student_best")
    ),
    Rule("distillation.samples", _asks_for("sampled"), "no loss uses samples"),
    Rule("distillation.sample_seed", _asks_for("sampled"), "no loss uses samples"),
    Rule("distillation.gather_at", _asks_for("gather"), "no loss has support gather"),
    Rule("distillation.gather_k", lambda s: s.distillation.gather_at == "student", "distillation.gather_at is labels"),
    Rule("distillation.gather_k", _asks_for("gather"), "no loss has support gather"),
    Rule("distillation.hidden_dtype", _asks_for("hidden"), "no loss has support full"),
    *(
        Rule(f"teacher.{name}", _has_teacher, "teacher.kind is none")
        for name in ("fingerprint", "top_k", "sanity", "tokenizer", "same_tokenizer")
    ),
    *(
        Rule(f"teacher.{name}", _may_wait, "no teacher of this run is queried over the network")
        for name in ("start_within_s", "deadline_s", "read_timeout_s")
    ),
    Rule(
        "teacher.outage_timeout_s",
        lambda s: _may_wait(s) or any(is_url(one.store) for one in s.teacher.all_members.values()),
        "no teacher of this run is queried over the network",
    ),
    Rule("teacher.list_missing", lambda s: s.teacher.kind == "cached", "teacher.kind is not cached"),
    Rule("teacher.mix", lambda s: s.teacher.kind == "mixed", "teacher.kind is not mixed"),
    Rule("teacher.tokenizer", lambda s: s.teacher.same_tokenizer == "check", "teacher.same_tokenizer is trust"),
    Rule("teacher.attention_url", _has_attention, "distillation.attention.coefficient is null"),
    *(
        Rule(f"distillation.attention.{name}", _has_attention, "distillation.attention.coefficient is null")
        for name in ("form", "within", "relation_heads", "layer", "student_layer", "schedule", "transport")
    ),
    Rule(
        "distillation.attention.relation_heads",
        lambda s: s.distillation.attention.form != "maps",
        "distillation.attention.form is maps, which use the models' own heads",
    ),
    Rule("prefetch.", _has_teacher, "teacher.kind is none, so there are no targets to request"),
    Rule("prefetch.max_depth", lambda s: s.prefetch.depth == "auto", "prefetch.depth is fixed"),
    Rule("prefetch.max_bytes", lambda s: s.prefetch.depth == "auto", "prefetch.depth is fixed"),
    Rule("evaluation.kl", lambda s: _has_teacher(s) and s.evaluation.every > 0, "no evaluation uses a teacher"),
    *(
        Rule(f"evaluation.{name}", _fills_in, "student.architecture is not diffusion")
        for name in ("infilled", "thresholds", "judged", "temperature")
    ),
    Rule("evaluation.thresholds", _has_teacher, "teacher.kind is none, and the texts are scored by the teacher"),
    *(
        Rule(f"evaluation.{name}", lambda s: bool(s.evaluation.thresholds), "evaluation.thresholds is empty")
        for name in ("judged", "temperature")
    ),
    Rule("evaluation.top_k", lambda s: _has_teacher(s) and s.evaluation.every > 0, "no evaluation uses a teacher"),
    *(
        Rule(f"evaluation.{name}", lambda s: s.evaluation.every > 0, "evaluation.every is 0")
        for name in ("at_start", "samples", "prompt_tokens", "sample_tokens")
    ),
    *(
        Rule(f"evaluation.{name}", lambda s: s.evaluation.samples > 0, "evaluation.samples is 0")
        for name in ("prompt_tokens", "sample_tokens")
    ),
    *(
        Rule(f"on_policy.{name}", lambda s: s.on_policy.active, "on_policy.share is 0")
        for name in ("lag", "prompt_tokens", "new_tokens", "temperature", "sequences_at_once", "terms.")
    ),
    Rule("optim.schedule.decay_steps", lambda s: s.optim.schedule.kind == "wsd", "only schedule wsd has a decay phase"),
    Rule("optim.schedule.floor", lambda s: s.optim.schedule.kind != "constant", "a constant learning rate never falls"),
    Rule("optim.muon.", lambda s: s.optim.kind == "muon_clip", "optim.kind is not muon_clip"),
    Rule("optim.qk_clip.alpha", lambda s: s.optim.qk_clip.tau is not None, "optim.qk_clip.tau is null"),
    *(
        Rule(f"checkpoint.{name}", lambda s: s.checkpoint.url is not None, "checkpoint.url is null")
        for name in ("storage_options", "upload_within_s")
    ),
    Rule("run.threads", lambda s: not s.run.device.startswith("cuda"), "run.device is a GPU"),
    *(
        Rule(f"student.lora.{name}", lambda s: s.student.lora.rank is not None, "student.lora.rank is null")
        for name in ("alpha", "targets")
    ),
    Rule("student.lora.", lambda s: s.student.adapter_name == "lora", "student.adapter is not lora"),
    Rule("student.lrc.", lambda s: s.student.adapter_name == "lrc", "student.adapter is not lrc"),
    *(
        Rule(f"student.lrc.{name}", lambda s: s.student.lrc.start == "closed_form", "student.lrc.start is random")
        for name in ("sequences", "reference", "damping")
    ),
    *(
        Rule(
            f"student.diffusion.growth.{name}",
            lambda s: s.student.diffusion.growth.every is not None,
            "student.diffusion.growth.every is null",
        )
        for name in ("first", "after")
    ),
    Rule(
        "student.quantisation.stages", lambda s: s.student.quantiser == "fairy2i", "only quantiser fairy2i has stages"
    ),
    Rule("student.diffusion.", _fills_in, "student.architecture is not diffusion"),
    Rule(
        "student.quantisation.activation_bits",
        lambda s: s.student.quantiser in ("bitnet", "auto") or bool(s.student.quantisation.quantise_activations),
        "this quantiser does not quantise activations; set student.quantisation.quantise_activations=true",
    ),
    Rule("student.quantisation.", lambda s: s.student.quantiser != "none", "student.quantiser is none"),
    Rule("logging.prometheus_host", lambda s: s.logging.prometheus_port is not None, "logging.prometheus_port is null"),
    Rule("student.revision", lambda s: not s.student.checkpoint_path.startswith(("/", ".")), "it is a local folder"),
    *(
        Rule(f"student.{name}", lambda s: "://" in s.student.checkpoint_path, "student.checkpoint_path is not a URL")
        for name in ("cache_folder", "storage_options.")
    ),
)


def names_without_effect(given: set[str], unread: set[str]) -> list[str]:
    """One line for each of PRESET_NAMES that is given but that no term refers to."""
    return [
        f"{name} has no effect: no term of the chosen distillation reads it, or that term's own setting is given"
        for name in sorted(given & unread)
    ]


def _far_too_weak(settings: Settings) -> list[str]:
    gamma = settings.distillation.attention.coefficient
    if not gamma or (orders := round(math.log10(GAMMA / gamma))) < FAR:
        return []
    return [
        f"distillation.gamma_attention is {gamma:g}, {orders} orders of magnitude below the paper's {GAMMA:g}: the "
        "attention term will have no effect"
    ]


def without_effect(settings: Settings, given: set[str]) -> list[str]:
    """One line for each setting of `given` (dotted names) and each field of a loss term that has no effect."""
    lines = []
    for name in sorted(given):
        for rule in RULES:
            matches = name.startswith(rule.name) if rule.name.endswith(".") else name == rule.name
            if matches and not rule.acts(settings):
                lines.append(f"{name} has no effect: {rule.why}")
                break
    teachers: dict[str, TeacherSettings | MemberSettings] = {"teacher": settings.teacher}
    teachers |= {f"teacher.members.{name}": member for name, member in settings.teacher.members.items()}
    for name in sorted(given):
        owner, _, field = name.rpartition(".")
        if name == "teacher.key_variable" and _has_attention(settings):
            continue
        if owner in teachers and (why := _of_one_teacher(field, teachers[owner], settings.teacher.mix)):
            lines.append(f"{name} has no effect: {why}")
    balance = settings.distillation.balance
    lines += [
        f"distillation.terms.{name}.coefficient has no effect: balance.shares adapts the coefficient"
        for name in sorted(balance.shares.keys() - {balance.reference or next(iter(balance.shares), None)})
        if f"distillation.terms.{name}.coefficient" in given
    ]
    for section, terms in (("distillation", settings.distillation.terms), ("on_policy", settings.on_policy.terms)):
        for name, term in terms.items():
            lines += [
                f"{section}.terms.{name}.{field} has no effect with the other settings of this {term.kind} loss"
                for field in term.without_effect()
            ]
    return lines + _far_too_weak(settings)
