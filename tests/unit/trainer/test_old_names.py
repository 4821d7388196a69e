"""Names of older trainers, the presets' names for coefficients, and what is chosen where the command line is silent."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
import yaml

from student_trainer.checkpoint.resume import check_changes
from student_trainer.cli.compose import compose
from student_trainer.cli.defaults import original_of
from student_trainer.settings.redact import public

MINIMAL = ["student.checkpoint_path=/model", "data.sources.a.kind=jsonl", "data.sources.a.path=/data.jsonl"]
PRESETS = ("bitdistill", "logits_only", "tcs", "classification", "summarization", "attention_only")


def composed(*more: str, minimal: bool = True) -> dict:
    return public(compose([*(MINIMAL if minimal else []), *more]))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["teacher.model_name=a/b"], ["teacher=local", "teacher.model=a/b"]),
        (["teacher.use_vllm=true", "teacher.vllm_url=http://h:1"], ["teacher=remote", "teacher.url=http://h:1"]),
        (["teacher.vllm_url=http://h:1"], ["teacher=remote", "teacher.url=http://h:1"]),
        (
            ["teacher.use_vllm=false", "teacher.vllm_url=http://h:1", "teacher.model_name=a/b"],
            ["teacher=local", "teacher.model=a/b"],
        ),
        (["teacher=cached", "teacher.store=/s", "teacher.vllm_url=http://h:1", "teacher.on_miss=remote"],
         ["teacher=cached", "teacher.store=/s", "teacher.url=http://h:1", "teacher.on_miss=remote"]),
        (["optimizer.type=muon"], ["optim=muon_clip"]),
        (["training=lrc_calibration"], ["recipe=lrc"]),
        (["optimizer=MuonClip", "optimizer.enable_clipping=false"], ["optim=muon_clip", "optim.qk_clip.tau=null"]),
        (["optimizer.type=adamw", "optimizer.enable_clipping=true"], ["optim=adamw", "optim.qk_clip.tau=100"]),
        (["optimizer.lr=1e-3", "optimizer.weight_decay=0.2"], ["optim.learning_rate=1e-3", "optim.weight_decay=0.2"]),
    ],
)  # fmt: skip
def test_an_old_name_is_todays_and_says_so(old: list[str], new: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert composed(*old) == composed(*new)
    said = [record.getMessage() for record in caplog.records if " is now " in record.getMessage()]
    assert len(said) == sum(
        each.split("=")[0].split(".")[0] in ("optimizer", "training") or ".model_name" in each or "vllm" in each
        for each in old
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.type=lion", "optimizer.type=lion: expected one of muon, muonclip, muon_clip, adamw"),
        ("training=lrc", "training=lrc: expected one of lrc_calibration"),
        ("optimizer.lerning_rate=1", "Did you mean 'optim.learning_rate'"),
        ("teacher.modl_name=x", "Did you mean"),
        ("data.config_name=mixd_pretrain", "Did you mean 'mixed_pretrain'"),
    ],
)
def test_what_no_trainer_knew_stops(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        compose([*MINIMAL, override])
    assert said in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_presets_names_set_its_terms(preset: str) -> None:
    before = composed(f"distillation={preset}")["distillation"]
    term = next((name for name in ("top_k_kl", "tcs", "label_kl") if name in before["terms"]), None)
    if term is not None:
        assert before["terms"][term]["coefficient"] == before["lambda_logits"]
        assert before["terms"][term]["temperature"] == before["temperature"]
        after = composed(f"distillation={preset}", "distillation.lambda_logits=0.25", "distillation.temperature=3")
        changed = after["distillation"]["terms"][term]
        assert (changed["coefficient"], changed["temperature"]) == (0.25, 3.0)
    assert before["attention"]["coefficient"] == before["gamma_attention"]


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["distillation=cross_entropy", "distillation.lambda_logits=3"], "distillation.lambda_logits"),
        (["distillation=logits_only", "distillation.gamma_attention=3"], "distillation.gamma_attention"),
        (
            ["distillation=logits_only", "distillation.terms.top_k_kl.temperature=2", "distillation.temperature=3"],
            "distillation.temperature",
        ),
    ],
)
def test_a_name_that_nothing_reads_warns(overrides: list[str], name: str) -> None:
    with pytest.warns(UserWarning, match=f"{name} has no effect: no term"):
        compose([*MINIMAL, *overrides])


@pytest.mark.parametrize(("gamma", "orders"), [("1e-5", 10), ("0.1", 6)])
def test_a_coefficient_far_below_the_papers_says_what_it_is(gamma: str, orders: int) -> None:
    with pytest.warns(
        UserWarning, match=f"{orders} orders of magnitude below the paper's 100000: .* will have no effect"
    ):
        compose([*MINIMAL, "distillation=bitdistill", f"distillation.gamma_attention={gamma}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compose([*MINIMAL, "distillation=bitdistill", "distillation.gamma_attention=1"])


def test_a_run_from_before_the_names_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    settings = compose([*MINIMAL, "distillation=bitdistill"])
    before = public(settings)
    for name in ("lambda_logits", "gamma_attention", "temperature"):
        del before["distillation"][name]
    caplog.clear()  # of what composing says
    check_changes(before, settings)
    assert not caplog.records
    with pytest.raises(ValueError, match=r"distillation\.terms\.top_k_kl\.coefficient: 10\.0 in the checkpoint, 9\.0"):
        check_changes(before, compose([*MINIMAL, "distillation=bitdistill", "distillation.lambda_logits=9"]))


@pytest.mark.parametrize("recipe", ["bitdistill", "bitnet_pretraining"])
def test_the_recipe_has_its_length_and_muon_with_clipping(recipe: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        settings = compose([*MINIMAL, f"recipe={recipe}"])
    assert (settings.data.seq_len, settings.optim.kind, settings.optim.qk_clip.tau) == (2048, "muon_clip", 100.0)
    assert "recipe uses" not in caplog.text
    with caplog.at_level(logging.INFO):
        compose([*MINIMAL, f"recipe={recipe}", "optim.qk_clip.tau=null", "data.seq_len=64"])
    (line,) = [record.getMessage() for record in caplog.records if "the recipe" in record.getMessage()]
    assert line == "data.seq_len is 64 (the recipe uses 2,048), optim.qk_clip.tau is null (the recipe clips at 100)"


def test_a_run_that_a_recipe_began_with_another_optimizer_keeps_it(tmp_path: Path) -> None:
    line = [*MINIMAL, "recipe=bitnet_pretraining", f"run.root={tmp_path}", "run.id=r"]
    begun = compose([*line, "optim=adamw"])
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "settings.yaml").write_text(yaml.safe_dump(public(begun)))
    assert compose(line).optim == begun.optim
    assert compose([*line, "optim=muon_clip"]).optim.kind == "muon_clip"
    assert compose([*line, "run.resume=never"]).optim.kind == "muon_clip"


def folder_of(root: Path, config: dict, base: str | None = None) -> Path:
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if base is not None:
        (root / "README.md").write_text(f"---\nbase_model: {json.dumps(base)}\n---\n# It\n")
    return root


def test_the_original_model_is_found(tmp_path: Path) -> None:
    base = folder_of(tmp_path / "base", {})
    carded = folder_of(tmp_path / "carded", {}, base=str(base))
    named = folder_of(tmp_path / "named", {"_name_or_path": str(base)})
    export = folder_of(tmp_path / "export", {"student_quantisation": {"version": 1}}, base="owner/name")
    ours = {"quantiser": "bitnet"}
    assert original_of({"checkpoint_path": str(carded)}) == (str(base), "base_model of its model card")
    assert original_of({"checkpoint_path": str(named)}) == (str(base), "_name_or_path of its config")
    assert original_of({"checkpoint_path": str(export), **ours}) == ("owner/name", "base_model of its model card")
    assert original_of({"checkpoint_path": str(base), **ours}) == (str(base), "its settings")
    assert original_of({"checkpoint_path": str(carded), **ours}) == (str(carded), "its settings"), "made of it here"
    assert original_of({"checkpoint_path": str(base), "kind": "diffusion"}) == (str(base), "its settings")
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.yaml").write_text(yaml.safe_dump({"student": {"checkpoint_path": str(base), **ours}}))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "settings.yaml").write_text(yaml.safe_dump({"student": {"checkpoint_path": str(run)}}))
    told = (str(base), "the run that it comes from")
    assert original_of({"checkpoint_path": str(run), **ours}) == told
    assert original_of({"checkpoint_path": str(tmp_path / "second")}) == told


def test_what_names_no_original_has_none(tmp_path: Path) -> None:
    for number, (config, base) in enumerate(
        [({}, None), ({}, "gone"), ({"_name_or_path": "/gone"}, None), ({"_name_or_path": ""}, "/gone/too")]
    ):
        assert original_of({"checkpoint_path": str(folder_of(tmp_path / str(number), config, base))}) is None
    itself = folder_of(tmp_path / "itself", {"_name_or_path": str(tmp_path / "itself")})
    assert original_of({"checkpoint_path": str(itself)}) is None
    assert original_of({"checkpoint_path": str(tmp_path / "nothing")}) is None
    assert original_of({}) is None
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("not JSON")
    assert original_of({"checkpoint_path": str(tmp_path / "odd")}) is None


def test_a_teacher_that_is_named_in_any_way_is_not_looked_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = folder_of(tmp_path / "base", {})
    line = [f"student.checkpoint_path={base}", "student=bitnet", *MINIMAL[1:]]
    assert compose(line).teacher.kind == "local" and compose([*line, "teacher.top_k=8"]).teacher.model == str(base)
    for named in ("teacher.url=http://h:1", "teacher.start_within_s=3", "teacher=remote", "recipe=bitdistill"):
        assert compose([*line, named]).teacher.kind == "remote"
    assert compose([*line, "teacher=none", "distillation=cross_entropy"]).teacher.kind == "none"
    begun = compose([*line, "teacher=remote", f"run.root={tmp_path}", "run.id=begun"])
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "settings.yaml").write_text(yaml.safe_dump(public(begun)))
    assert compose([*line, f"run.root={tmp_path}", "run.id=begun"]).teacher.kind == "remote", "as it began"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert compose(MINIMAL).teacher.kind == "remote"
    assert (
        "/model names no original model in its config or model card: using the teacher at http://127.0.0.1:8000"
        in caplog.text
    )


def test_without_any_data_it_is_the_mixture_for_pretraining(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert set(compose(["student.checkpoint_path=/m"]).data.sources) == {"web", "textbooks", "mathematics"}
    assert "no data is given: using data=mixed_pretrain" in caplog.text
    assert not compose(["student.checkpoint_path=/m", "data.rows=3"]).data.sources
