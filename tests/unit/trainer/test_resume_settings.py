"""Which settings a resumed run may change: every one has its answer, and the fixed ones are refused by name."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from student_trainer.checkpoint.resume import RULES, check_changes, check_student, rule_for
from student_trainer.cli.compose import compose
from student_trainer.cli.help import settings_by_name
from student_trainer.settings import Settings

MINIMAL = ["student.checkpoint_path=/model", "data.sources.a.kind=jsonl", "data.sources.a.path=/data.jsonl"]
BEFORE = compose(MINIMAL).model_dump(mode="json")
NAMES = [name for name, _ in settings_by_name(Settings)]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_has_an_answer(name: str) -> None:
    assert rule_for(name) in ("fixed", "numeric", "free")


def test_every_line_of_the_table_is_about_a_setting() -> None:
    for known in RULES:
        pattern = known.replace("*", "NAME")
        assert any(name == pattern or name.startswith(f"{pattern}.") for name in NAMES), f"{known} is no setting"


FIXED = ["run.seed=1", "run.steps=7", "data.seq_len=64", "data.rows=2", "data.sources.a.weight=2", "data.packing=none",
         "data.sources.b.kind=jsonl data.sources.b.path=/b", "distillation.terms.top_k_kl.temperature=2",
         "distillation=cross_entropy", "optim.learning_rate=1", "optim.schedule.kind=wsd", "optim.clip_norm=null",
         "teacher.top_k=8"]  # fmt: skip


@pytest.mark.parametrize("change", FIXED)
def test_a_change_of_what_is_learnt_is_refused_with_both_values(change: str) -> None:
    now = compose([*MINIMAL, *change.split()])
    with pytest.raises(ValueError, match="cannot continue with different settings") as caught:
        check_changes(BEFORE, now)
    name = change.split("=")[0]
    assert name.rsplit(".", 1)[0] in str(caught.value) and "in the checkpoint" in str(caught.value)


def test_a_fixed_setting_may_change_where_it_is_allowed_by_name() -> None:
    check_changes(BEFORE, compose([*MINIMAL, "run.steps=7", "run.allow_changes=run.steps"]))
    check_changes(BEFORE, compose([*MINIMAL, "optim.learning_rate=1", "optim.eps=1", "run.allow_changes=[optim]"]))
    with pytest.raises(ValueError, match=r"run\.seed"):
        check_changes(BEFORE, compose([*MINIMAL, "run.steps=7", "run.seed=3", "run.allow_changes=run.steps"]))


@pytest.mark.parametrize("change", ["run.root=/x", "teacher.url=http://b:1", "prefetch.depth=3", "checkpoint.every=1",
                                    "logging.wandb=off", "data.workers=5", "evaluation.every=0"])  # fmt: skip
def test_what_changes_nothing_that_is_learnt_is_free(change: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = compose([*MINIMAL, change])
    caplog.clear()  # of what composing says
    check_changes(BEFORE, settings)
    assert not caplog.records


@pytest.mark.parametrize("change", ["run.threads=1", "optim.micro_batch_rows=1", "student.compute=bfloat16"])
def test_what_changes_rounding_alone_is_warned_of(change: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_changes(BEFORE, compose([*MINIMAL, change]))
    assert change.split("=")[0] in caplog.text


def test_a_setting_that_an_older_trainer_did_not_have_stood_at_its_default() -> None:
    older = BEFORE | {"student": {k: v for k, v in BEFORE["student"].items() if k != "architecture"}}
    check_changes(older, compose(MINIMAL))
    with pytest.raises(ValueError, match=r"student\.architecture: causal in the checkpoint, other now"):
        check_changes(older, compose([*MINIMAL, "student.architecture=other"]))
    check_changes(BEFORE | {"data": {k: v for k, v in BEFORE["data"].items() if k != "mixture"}}, compose(MINIMAL))


def test_how_relations_would_be_computed_is_compared_where_there_are_any() -> None:
    """The preset of diffusion students says it since it relates positions within blocks, with no coefficient."""
    tcs = compose([*MINIMAL, "distillation=tcs"]).model_dump(mode="json")
    attention = {name: value for name, value in tcs["distillation"]["attention"].items() if name != "within"}
    older = tcs | {"distillation": tcs["distillation"] | {"attention": attention}}
    check_changes(older, compose([*MINIMAL, "distillation=tcs"]))
    with_relations = tcs["distillation"] | {"attention": attention | {"coefficient": 10.0}}
    with pytest.raises(ValueError, match=r"attention\.within: documents in the checkpoint, blocks now"):
        check_changes(
            tcs | {"distillation": with_relations},
            compose([*MINIMAL, "distillation=tcs", "distillation.gamma_attention=10"]),
        )


# A term as a trainer wrote it whose every kind had the settings of all kinds.
OLD_TERM = {"kind": None, "coefficient": 1.0, "temperature": 1.0, "tail": "bucket", "temperature_squared": False,
            "beta": 0.5, "alpha": 0.1, "support": "top_k", "schedule": None}  # fmt: skip
OLD_TERMS = {
    "cross_entropy": OLD_TERM | {"coefficient": 0.5},
    "top_k_kl": OLD_TERM,
    "drawn": OLD_TERM | {"kind": "sampled", "temperature": 2.0},
    "own": OLD_TERM | {"kind": "jsd", "beta": 0.3, "support": "gather"},
}
OLD_RUN = [*MINIMAL, "distillation.terms.drawn.kind=sampled", "distillation.terms.drawn.temperature=2",
           "distillation.terms.own.kind=jsd", "distillation.terms.own.beta=0.3",
           "distillation.terms.own.support=gather",
           "on_policy=gkd"]  # fmt: skip


def old_settings() -> dict[str, Any]:
    before = compose(OLD_RUN).model_dump(mode="json")
    before["distillation"]["terms"] = OLD_TERMS
    before["on_policy"]["terms"] = {"jsd": OLD_TERM}
    return before


def test_a_run_whose_terms_were_written_with_the_settings_of_all_kinds_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    before, settings = old_settings(), compose(OLD_RUN)
    caplog.clear()  # of what composing says
    check_changes(before, settings)
    assert not caplog.records
    for change, name in (("own.beta=0.4", "own.beta"), ("drawn.temperature=1", "drawn.temperature")):
        with pytest.raises(ValueError, match=rf"distillation\.terms\.{name}: .* in the checkpoint"):
            check_changes(old_settings(), compose([*OLD_RUN, f"distillation.terms.{change}"]))
    with pytest.raises(ValueError, match=r"on_policy\.terms\.jsd\.beta: 0\.5 in the checkpoint, 0\.2 now"):
        check_changes(old_settings(), compose([*OLD_RUN, "on_policy.terms.jsd.beta=0.2"]))


def test_what_is_named_in_settings_is_not_taken_for_its_default() -> None:
    """The loss's terms by name: those of the run, not those that a run has where nobody names any."""
    own = [*MINIMAL, "on_policy=gkd", "distillation=none", "distillation.terms.jsd.coefficient=1"]
    before = compose(own).model_dump(mode="json")
    check_changes(before, compose(own))
    for added in ("on_policy.terms.reverse_kl.coefficient=1", "distillation.terms.cross_entropy.coefficient=1"):
        with pytest.raises(ValueError, match=added.rpartition(".")[0]):
            check_changes(before, compose([*own, added]))


def of_an_older_trainer(student: dict[str, Any]) -> dict[str, Any]:
    """The section as it was when one name stood for architecture and quantiser, and there was one quantiser."""
    newer = ("architecture", "quantiser", "adapter", "quantisation")
    kind = "bitnet" if student["quantiser"] == "bitnet" else "causal"
    kept = {name: value for name, value in student.items() if name not in newer}
    return kept | {"kind": kind, "bitnet": student["quantisation"]}


@pytest.mark.parametrize("names", ["new", "old"])
def test_a_run_begun_with_the_names_of_an_older_trainer_goes_on(names: str) -> None:
    now = {
        "new": ["student=bitnet", "student.quantisation.warmup_steps=5"],
        "old": ["student.kind=bitnet", "student.bitnet.warmup_steps=5"],
    }[names]
    begun = compose([*MINIMAL, "student=bitnet", "student.quantisation.warmup_steps=5"]).model_dump(mode="json")
    before = begun | {"student": of_an_older_trainer(begun["student"])}
    assert before["student"]["kind"] == "bitnet"
    check_changes(before, compose([*MINIMAL, *now]))
    with pytest.raises(ValueError, match=r"student\.quantisation\.warmup_steps: 5 in the checkpoint, 6 now"):
        check_changes(before, compose([*MINIMAL, *now[:1], now[1].replace("5", "6")]))
    with pytest.raises(ValueError, match=r"student\.quantiser: bitnet in the checkpoint, none now"):
        check_changes(before, compose([*MINIMAL, "student=causal"]))


def test_the_older_entry_of_a_quantised_students_config_is_the_newer_ones_equal() -> None:
    how = {"sub_norm": "output", "eps": 1e-8, "quantise_activations": True}
    entry = {"version": 1, "quantiser": "bitnet", "sub_norm": "output", "eps": 1e-8, "activations": "int8"}
    common = {"transformers": "5", "tokenizer": {"tokens": 3}}
    before = common | {"config": {"hidden_size": 8, "bitnet_student": how}}
    now = common | {"config": {"hidden_size": 8, "student_quantisation": entry}}
    settings = compose(MINIMAL)
    check_student(before, now, settings)
    with pytest.raises(ValueError, match=r"config\.student_quantisation\.sub_norm: all in the checkpoint, output now"):
        check_student(
            before | {"config": {"hidden_size": 8, "bitnet_student": how | {"sub_norm": "all"}}}, now, settings
        )
