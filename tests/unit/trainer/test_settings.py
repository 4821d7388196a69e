"""Settings: composed from groups and overrides, refused by name where misspelt, warned of where without effect."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from student_trainer.cli.compose import compose, compose_arguments
from student_trainer.cli.help import entry, settings_by_name
from student_trainer.settings import Settings

MINIMAL = ["student.checkpoint_path=/model", "data.sources.a.kind=jsonl", "data.sources.a.path=/data.jsonl"]


def test_groups_and_overrides_become_settings() -> None:
    settings = compose(
        [*MINIMAL, "distillation=logits_only", "teacher.url=[http://a:1,http://b:2]", "optim.betas=[0.8,0.9]",
         "distillation.terms.top_k_kl.temperature=2", "distillation.terms.again.kind=reverse_kl", "run.steps=7"]
    )  # fmt: skip
    assert settings.student.checkpoint_path == "/model"
    assert settings.teacher.url == ("http://a:1", "http://b:2")
    assert settings.optim.betas == (0.8, 0.9) and settings.run.steps == 7
    terms = settings.distillation.by_name()
    assert terms["top_k_kl"].temperature == 2.0 and terms["again"].kind == "reverse_kl"
    assert settings.data.sources["a"].path == ("/data.jsonl",)


def test_a_group_of_parameters_keeps_its_other_defaults_when_one_is_set() -> None:
    settings = compose([*MINIMAL, "optim.embeddings.learning_rate=1e-5"])
    assert settings.optim.embeddings.learning_rate == 1e-5 and settings.optim.embeddings.weight_decay == 0.0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("studnet.checkpoint_path=x", "'student.checkpoint_path'"),
        ("optim.lerning_rate=1", "'optim.learning_rate'"),
        ("learning_rate=1", "'optim.learning_rate'"),
        ("distillation=logit_only", "'logits_only'"),
        ("distillation.terms.top_k_kl.tmperature=2", "'distillation.terms.top_k_kl.temperature'"),
        ("data.sources.a.kid=text", "'data.sources.a.kind'"),
        ("optim.schedule.kind=cosin", "'cosine'"),
        ("optim.learning_rate=fast", "optim.learning_rate"),
        ("optim.learning_rate=-1", "optim.learning_rate"),
        ("run.steps=-1", "run.steps"),
        ("prefetch.depth=-1", "prefetch.depth"),
        ("distillation.terms.x.coefficient=1", "'x'"),
        ("teacher.kind=none", "need a teacher"),
        ("on_policy.share=1.5", "on_policy.share"),
        ("on_policy={share: 0.5, new_tokens: 4000}", "a row has 2048"),
        ("on_policy.terms.cross_entropy.coefficient=1", "repeat itself"),
        ("on_policy.terms.reverse_kl.kind=nonsense", "nonsense"),
        ("distillation.balance.shares={top_k:1}", "balance.shares names top_k"),
        ("distillation.balance.shares={top_k_kl:0}", "distillation.balance.shares"),
        ("distillation.terms.top_k_kl.schedule=[[3,1],[3,0]]", "increasing steps"),
        ("distillation=none", "distillation.terms is empty"),
        (
            "distillation.terms.cross_entropy.beta=0.3",
            "distillation.terms: cross_entropy.beta is not a setting of kind",
        ),
        (
            "on_policy={share: 0.5, terms: {jsd: {alpha: 0.2}}}",
            "jsd.alpha is not a setting of kind jsd, only of skewed_kl",
        ),
        ("distillation.terms.top_k_kl.support=gather", "distillation.terms.top_k_kl.support: Input should be 'top_k'"),
        (
            "distillation.terms.top_k_kl.bta=2",
            "Did you mean 'distillation.terms.top_k_kl.beta'",
        ),
        ("nonsense", "NAME=VALUE"),
        ("optim.betas=[0.9", "cannot parse an override"),
    ],
)
def test_a_setting_that_cannot_be_stops_with_its_name_and_the_nearest(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        compose([*MINIMAL, override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_value_that_must_be_given_is_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match=r"data\.sources\.text\.path must be given"):
        compose(["student.checkpoint_path=/model", "data=text"])


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["teacher=none", "distillation=cross_entropy", "teacher.top_k=3"], "teacher.top_k"),
        (["teacher=none", "distillation=cross_entropy", "prefetch.depth=3"], "prefetch.depth"),
        (["prefetch.depth=3", "prefetch.max_depth=9"], "prefetch.max_depth"),
        (["optim.schedule.decay_steps=3"], "optim.schedule.decay_steps"),
        (["on_policy.lag=3"], "on_policy.lag"),
        (["on_policy.terms.reverse_kl.tail=renormalise"], "on_policy.terms.reverse_kl.tail"),
        (["evaluation.every=0", "evaluation.samples=3"], "evaluation.samples"),
        (["evaluation.samples=0", "evaluation.sample_tokens=3"], "evaluation.sample_tokens"),
        (["optim.schedule.kind=constant", "optim.schedule.floor=0.5"], "optim.schedule.floor"),
        (["distillation.samples=3"], "distillation.samples"),
        (["run.device=cuda", "run.threads=3"], "run.threads"),
        (["distillation.gather_k=3"], "distillation.gather_k"),
        (["distillation.hidden_dtype=int8"], "distillation.hidden_dtype"),
        (["distillation.balance.every=3"], "distillation.balance.every"),
        (
            ["distillation.balance.shares={cross_entropy:1,top_k_kl:2}", "distillation.terms.top_k_kl.coefficient=2"],
            "distillation.terms.top_k_kl.coefficient",
        ),
        (["evaluation.every=0", "evaluation.kl=full"], "evaluation.kl"),
        (["teacher.same_tokenizer=trust", "teacher.tokenizer=/x"], "teacher.tokenizer"),
        (["data.sources.a.chat_template=x"], "chat_template"),
        (["teacher.model=/m"], "teacher.model"),
        (["teacher=local", "teacher.model=/m", "teacher.url=http://x:1"], "teacher.url"),
        (["teacher=local", "teacher.model=/m", "teacher.deadline_s=3"], "teacher.deadline_s"),
        (["teacher=cached", "teacher.store=/s", "teacher.store_bytes=99999999"], "teacher.store_bytes"),
        (["teacher=cached", "teacher.store=/s", "teacher.url=http://x:1"], "teacher.url"),
        (["teacher=cached", "teacher.store=/s", "teacher.store_ahead=3"], "teacher.store_ahead"),
        (["teacher.list_missing=false"], "teacher.list_missing"),
        (["teacher.mix=by_source"], "teacher.mix"),
        (["teacher=mixed", "teacher.members.x.model=/m"], "teacher.members.x.model"),
        (["teacher=mixed", "teacher.members.x.sources=a"], "teacher.members.x.sources"),
    ],
)
def test_a_setting_without_effect_warns(overrides: list[str], name: str) -> None:
    with pytest.warns(UserWarning, match="no effect") as caught:
        compose([*MINIMAL, *overrides])
    assert any(name in str(warning.message) for warning in caught)


def test_settings_with_effect_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compose([*MINIMAL, "teacher=cached", "teacher.store=/s", "teacher.on_miss=remote", "teacher.url=http://x:1",
                 "teacher.store_bytes=99999999", "teacher.deadline_s=3"])  # fmt: skip
        compose([*MINIMAL, "teacher=cached", "teacher.store=s3://b/t", "teacher.store_cache=/c",
                 "teacher.store_ahead=3", "teacher.list_missing=false", "teacher.outage_timeout_s=9",
                 "teacher.store_cache_bytes=99999999"])  # fmt: skip
        compose([*MINIMAL, "teacher=mixed", "teacher.members.x.kind=local", "teacher.members.x.model=/m",
                 "teacher.members.x.weight=2", "teacher.members.y.url=http://x:1"])  # fmt: skip
        compose([*MINIMAL, "run.threads=3", "teacher.top_k=3", "prefetch.max_depth=9", "optim.schedule.kind=wsd",
                 "optim.schedule.decay_steps=3", "distillation.terms.top_k_kl.temperature=2"])  # fmt: skip


def test_a_folder_of_ones_own_adds_choices(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text("seq_len: 77\nsources: {}\n")
    assert compose(["student.checkpoint_path=/m", "data=mine"], tmp_path).data.seq_len == 77
    with pytest.raises(ValueError, match="Did you mean 'mine'"):
        compose(["data=minee"], tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        compose([], tmp_path / "absent")


@pytest.mark.parametrize(
    ("overrides", "weights"),
    [
        (["data=text", "data.sources.text.path=/t"], {"text": 1.0}),
        (["data=chat", "data.sources.chat.path=/c.jsonl"], {"chat": 1.0}),
        (["data=hub", "data.sources.hub.name=a/b"], {"hub": 1.0}),
        (["data=mixed", "data.sources.text.path=/t", "data.sources.chat.path=/c"], {"text": 0.8, "chat": 0.2}),
        (["data=mixed_pretrain", "data.sources.web.weight=0.5"], {"web": 0.5, "textbooks": 0.2, "mathematics": 0.1}),
    ],
)
def test_the_groups_of_data_are_mixtures(overrides: list[str], weights: dict[str, float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = compose(["student.checkpoint_path=/model", *overrides])
    assert {name: source.weight for name, source in settings.data.sources.items()} == weights


def test_settings_survive_their_own_plain_form() -> None:
    settings = compose(MINIMAL)
    assert Settings.model_validate(settings.model_dump(mode="json")) == settings


def test_help_names_every_setting_and_imports_neither_torch_nor_hydra() -> None:
    code = (
        "import sys; from student_trainer.main import run; assert run(['--help']) == 0; "
        "assert not {'torch', 'hydra', 'transformers'} & set(sys.modules), 'too much was imported'"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    for name, _ in settings_by_name(Settings):
        assert name in shown
    assert "logits_only" in shown


def test_help_has_a_line_a_setting_in_a_pipe_and_is_wrapped_in_a_terminal() -> None:
    name, about = f"  {'run.steps=1000':52}", "number of updates " * 8
    assert entry(name, about, None) == f"{name}{about}".rstrip()
    assert entry(name, "short", 80) == f"{name}short"
    for width in (80, 120):
        first, *lines = entry(name, about, width).splitlines()
        assert first.startswith("  run.steps=1000") and all(len(line) <= width for line in (first, *lines))
        assert " ".join(" ".join((first, *lines)).split()) == f"run.steps=1000 {about}".strip()
        assert (first == "  run.steps=1000") == (width == 80)


def test_a_command_without_a_student_is_refused_before_libraries_are_imported() -> None:
    with pytest.raises(ValueError, match=r"student\.checkpoint_path must be given"):
        compose_arguments(MINIMAL[1:])
    assert compose_arguments([*MINIMAL[1:], "student.tokenizer=/tokenizer"]).student.tokenizer == "/tokenizer"
