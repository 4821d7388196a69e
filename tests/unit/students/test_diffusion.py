"""The block-diffusion student: what it reads, how a causal model becomes one and is read again, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer import loop
from student_trainer.batch.align import cut
from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.view import EVALUATION, ViewSeed
from student_trainer.checkpoint.earlier_run import load_student
from student_trainer.cli.compose import compose
from student_trainer.cli.export import main as export
from student_trainer.losses import token_term
from student_trainer.losses.terms import CleanTerm
from student_trainer.settings import DiffusionSettings, StudentSettings
from student_trainer.settings.student import GrowthSettings
from student_trainer.settings.terms import AutoregressiveSettings
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.diffusion_record import DiffusionRecord, read_diffusion, text_rows
from student_trainer.students.student import Student
from teacher_proto.identity import tokenizer_sha256
from tests.block_diffusion import moved_by
from tests.models import VOCAB_SIZE, save_tiny_llama
from tests.trainer_run import ScriptedTargets, Workshop, final_files, lines_of, run_here, teacher_script, trace_of

SEED = ViewSeed(5)
MASK = 500
CPU = torch.device("cpu")
DIFFUSION = ("student=diffusion", "student.diffusion.block_size=4")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


def batch_of(*rows: list[int], seq_len: int = 24, number: int = 3, prompt: int = 0) -> Batch:
    """Rows of documents of the given lengths, of which the first `prompt` tokens are not learnt."""
    draw = np.random.default_rng(7)
    placed = [
        [
            Placed(0, f"s:{r}:{d}", draw.integers(0, 60, n, dtype=np.int32), np.arange(n) >= prompt)
            for d, n in enumerate(lengths)
        ]
        for r, lengths in enumerate(rows)
    ]  # fmt: skip
    return build_batch(number, placed, seq_len, 0, ("x",))


BATCH = batch_of([7, 12, 5], [24], [3, 9], [10], prompt=2)


def reader(family: Any = "in_place", size: int = 4, clean_half: Any = "block_causal", **more: Any) -> DiffusionReader:
    return DiffusionReader(DiffusionRecord(size, MASK, family, clean_half), **more)


def student_of(folder: Path, architecture: str = "diffusion", **diffusion: Any) -> Student:
    settings = DiffusionSettings(**{"block_size": 4, **diffusion})
    if architecture == "causal":
        settings = DiffusionSettings()
    return load_student(
        StudentSettings(
            checkpoint_path=str(folder), compute="float32", architecture=architecture, diffusion=settings
        ),
        CPU,
    )  # fmt: skip


def masked(view: Any, width: int) -> np.ndarray:
    """[B, T]: where the noisy half holds the mask token."""
    return (view.input_ids_BT[:, :width] == MASK).numpy()


def maskable(batch: Batch) -> np.ndarray:
    return np.pad(batch.loss_mask_BT[:, :-1], ((0, 0), (1, 0)))


@pytest.mark.parametrize("family", ["in_place", "token_shift"])
def test_complementary_views_partition_what_is_learnt(family: str) -> None:
    views = reader(family).views(BATCH, SEED)
    one, two = (masked(view, 24) for view in views)
    assert one.any() and two.any() and not (one & two).any()
    assert np.array_equal(one | two, maskable(BATCH)), "prompts, first tokens and padding are never masked"
    assert sorted(torch.cat([view.counted_N for view in views]).tolist()) == list(range(len(BATCH.counted()[0])))
    for view, at_BT in zip(views, (one, two), strict=True):
        rows, columns = np.nonzero(at_BT)
        shift = 1 if family == "token_shift" else 0
        assert view.rows_N.tolist() == (rows * 48 + columns - shift).tolist()
        assert view.labels_N.tolist() == BATCH.tokens_BT[rows, columns].tolist()
        assert torch.equal(view.input_ids_BT[:, 24:], torch.from_numpy(BATCH.tokens_BT).long())
        assert view.weights_N is None and view.count == len(view.labels_N)


def blocks_with_labels(batch: Batch, size: int) -> list[list[tuple[int, int]]]:
    """The places that can be masked, block by block, worked out one by one."""
    found: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    can = maskable(batch)
    for row, column in np.argwhere(can):
        key = (row, batch.document_ids_BT[row, column], batch.position_ids_BT[row, column] // size)
        found.setdefault(key, []).append((row, column))
    return list(found.values())


def test_suffix_masks_hide_the_end_of_every_block_and_nothing_else() -> None:
    lengths: dict[int, set[int]] = {}
    for number in range(40):
        batch = batch_of([7, 12, 5], [24], [3, 9], [10], prompt=2, number=number)
        (view,) = reader(masks="suffix", complementary=False).views(batch, SEED)
        at_BT = masked(view, 24)
        for block in blocks_with_labels(batch, 4):
            hidden = [bool(at_BT[place]) for place in block]
            count = sum(hidden)
            assert count and hidden == [False] * (len(block) - count) + [True] * count
            lengths.setdefault(len(block), set()).add(count)
    assert lengths[4] == {1, 2, 3, 4}


def test_position_dependent_masks_prefer_what_comes_late() -> None:
    at, even = np.zeros(8), np.zeros(8)
    for number in range(150):
        batch = batch_of([24], [24], number=number)
        for found, how in ((at, {"masks": "position_dependent", "complementary": False}), (even, {"masks": "uniform"})):
            view, *_ = reader(size=8, **how).views(batch, SEED)
            found += masked(view, 24).reshape(-1, 8).sum(0)
    assert at[7] > 1.3 * at[1] and (np.diff(at[1:]) > -0.1 * at[1]).all(), at
    assert even[1:].max() < 1.25 * even[1:].min(), even


def test_labels_that_weigh_one_over_their_share_count_each_block_alike() -> None:
    """With k of n tokens masked, the weights n / k of a block add up to n, those of a batch to its labels."""
    (view,) = reader(masks="suffix", complementary=False, by_share=True).views(BATCH, SEED)
    assert view.weights_N is not None
    learnt = len(BATCH.counted()[0])
    assert view.count == learnt and float(view.weights_N.sum()) == pytest.approx(learnt, rel=1e-6)
    # Bernoulli masks: the same in the mean alone.
    sums = []
    for number in range(400):
        batch = batch_of([24], [24], number=number)
        (view,) = reader(complementary=False, by_share=True).views(batch, SEED)
        assert view.weights_N is not None
        sums.append(float(view.weights_N.clamp(max=20).sum()) / view.count)
    assert np.mean(sums) == pytest.approx(1.0, abs=0.1)


def test_a_row_reads_the_same_wherever_it_is_cut_and_an_evaluation_always() -> None:
    for masks in ("uniform", "position_dependent", "suffix"):
        one = reader(masks=masks, complementary=masks == "uniform")
        whole = one.views(BATCH, SEED)
        for first in range(4):
            for view, part in zip(whole, one.views(BATCH.rows(first, first + 1), SEED), strict=True):
                assert torch.equal(view.input_ids_BT[first : first + 1], part.input_ids_BT)
        again = one.views(BATCH, ViewSeed(5, EVALUATION))
        assert torch.equal(again[0].input_ids_BT, one.views(BATCH, ViewSeed(5, EVALUATION))[0].input_ids_BT)
        assert not torch.equal(again[0].input_ids_BT, whole[0].input_ids_BT)


def test_blocks_grow_by_the_step_alone_up_to_their_size_which_evaluations_have_throughout() -> None:
    growth = GrowthSettings(every=3, first=2, after=4)
    assert [growth.at(step, 16) for step in (0, 4, 6, 7, 10, 12, 13, 999)] == [2, 2, 2, 4, 8, 8, 16, 16]
    assert GrowthSettings(every=1).at(10**9, 24) == 24 and GrowthSettings().at(0, 16) == 16
    grows = reader(size=8, growth=growth)
    for number, size in ((0, 2), (7, 4), (13, 8)):
        batch = batch_of([7, 12, 5], [24], number=number)
        for ours, theirs in zip(grows.views(batch, SEED), reader(size=size).views(batch, SEED), strict=True):
            assert torch.equal(ours.input_ids_BT, theirs.input_ids_BT)
            assert torch.equal(ours.attention.groups_BT, theirs.attention.groups_BT)  # type: ignore[union-attr]
        seed = ViewSeed(5, EVALUATION)
        for ours, theirs in zip(grows.views(batch, seed), reader(size=8).views(batch, seed), strict=True):
            assert torch.equal(ours.attention.groups_BT, theirs.attention.groups_BT)  # type: ignore[union-attr]


def test_a_run_whose_blocks_grow_resumes_to_the_bit(workshop: Workshop, tmp_path: Path) -> None:
    arguments = ("student=diffusion", "student.diffusion.block_size=8", "student.diffusion.growth.every=2",
                 "student.diffusion.clean_half=causal", "checkpoint.every=3", "run.steps=6",
                 "distillation=cross_entropy",
                 "distillation.terms.autoregressive.coefficient=0.5")  # fmt: skip
    assert run_here(workshop.settings(tmp_path / "whole", *arguments), ScriptedTargets()) == loop.DONE
    run, part = tmp_path / "whole" / "run", tmp_path / "part"
    shutil.copytree(run, part / "run")
    shutil.rmtree(part / "run" / "checkpoints" / "step-00000006")
    assert run_here(workshop.settings(part, *arguments), ScriptedTargets()) == loop.DONE
    assert trace_of(part / "run") == trace_of(run) and final_files(part / "run", 6) == final_files(run, 6)
    for line in trace_of(run):
        both = line["loss/cross_entropy"] + 0.5 * line["loss/autoregressive"]
        assert line["loss"] == pytest.approx(both, rel=1e-6)


def test_the_clean_halfs_cross_entropy_is_the_causal_models_with_its_gradient(workshop: Workshop) -> None:
    """On each token that is masked, in whichever family; in float64 of the model run on each document alone."""
    coefficient = 0.5
    terms = (token_term("ce", "cross_entropy", 0.0), CleanTerm("ar", AutoregressiveSettings(), coefficient))
    for family in ("in_place", "token_shift"):
        student = student_of(workshop.student, clean_half="causal", family=family)
        parts = cut(BATCH, None, student, SEED, rows=2)
        count = sum(part.view.count for part in parts)
        assert count == len(BATCH.counted()[0])
        total = 0.0
        for part in parts:
            loss = student.loss(part, terms, None)
            (loss.total / count).backward()
            total += float(loss.total.detach()) / count
            assert loss.per_term["ar"].shape == part.view.labels_N.shape
        model = AutoModelForCausalLM.from_pretrained(workshop.student, dtype=torch.float64)
        model.resize_token_embeddings(VOCAB_SIZE + 1, mean_resizing=False)
        model.load_state_dict({name: tensor.double() for name, tensor in student.model.state_dict().items()})
        expected = torch.zeros((), dtype=torch.float64)
        for document in BATCH.documents:
            span = slice(document.start, document.stop)
            tokens_T = torch.from_numpy(BATCH.tokens_BT[document.row, span]).long()
            learnt_T = torch.from_numpy(BATCH.loss_mask_BT[document.row, span])
            log_q_TV = model(tokens_T[None]).logits[0].log_softmax(-1)
            expected = expected - log_q_TV[:-1][learnt_T[:-1], tokens_T[1:][learnt_T[:-1]]].sum()
        expected = coefficient * expected / count
        assert total == pytest.approx(float(expected.detach()), rel=1e-5)
        expected.backward()
        for ours, theirs in zip(student.model.parameters(), model.parameters(), strict=True):
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad, theirs.grad.float(), rtol=1e-3, atol=1e-6)
        norms = student.gradient_norms(parts[0], terms, None)
        assert norms["ar"] > 0 and norms["ce"] > 0


def test_a_text_that_holds_the_mask_token_is_refused_by_name() -> None:
    BATCH.tokens_BT[1, 3], before = MASK, BATCH.tokens_BT[1, 3]
    try:
        with pytest.raises(ValueError, match=r"document s:1:0 holds token 500, which is the student's mask token"):
            reader().views(BATCH, SEED)
    finally:
        BATCH.tokens_BT[1, 3] = before


@pytest.mark.parametrize("clean_half", ["block_causal", "causal"])
def test_nothing_leaks_into_the_noisy_half(workshop: Workshop, clean_half: str) -> None:
    """By the model's own forward pass: which of the row's inputs change what a row computes."""
    student = student_of(workshop.student, clean_half=clean_half)
    batch = batch_of([11, 9], seq_len=20)
    view, width = student.views(batch, SEED)[0], 20
    for key, moved_T in enumerate(moved_by(student, view)):
        key_clean, key_place = divmod(key, width)
        for query in range(2 * width):
            clean, place = divmod(query, width)
            same = batch.document_ids_BT[0, place] == batch.document_ids_BT[0, key_place]
            at, key_at = (int(batch.position_ids_BT[0, each]) for each in (place, key_place))
            if not clean:
                seen = key_at // 4 < at // 4 if key_clean else key_at // 4 == at // 4
            else:
                seen = bool(key_clean) and (key_at <= at if clean_half == "causal" else key_at // 4 <= at // 4)
            assert bool(moved_T[query]) == bool(same and seen), (query, key)


def test_with_blocks_of_one_and_token_shift_it_is_the_autoregressive_model(workshop: Workshop) -> None:
    """The clean half throughout; of the noisy half the rows whose own token isn't masked."""
    model = student_of(workshop.student, "causal")
    student = student_of(workshop.student, block_size=1, family="token_shift")
    (theirs,) = model.views(BATCH, SEED)
    with torch.no_grad():
        expected_BTD = model.body(theirs.input_ids_BT, theirs.position_ids_BT, theirs.attention)
    compared = 0
    for view in student.views(BATCH, SEED):
        with torch.no_grad():
            found_BTD = student.body(view.input_ids_BT, view.position_ids_BT, view.attention)
        real_BT = torch.from_numpy(BATCH.document_ids_BT >= 0)
        torch.testing.assert_close(found_BTD[:, 24:][real_BT], expected_BTD[real_BT], rtol=1e-4, atol=1e-5)
        shown_BT = real_BT & (view.input_ids_BT[:, :24] == view.input_ids_BT[:, 24:])
        torch.testing.assert_close(found_BTD[:, :24][shown_BT], expected_BTD[shown_BT], rtol=1e-4, atol=1e-5)
        compared += int(shown_BT.sum())
    assert compared > 50
    head = student.head.weight_VD
    assert torch.equal(head[:VOCAB_SIZE], model.head.weight_VD)


@pytest.mark.parametrize("how", ["in_place", "token_shift", "weighed"])
def test_loss_and_gradient_are_those_of_the_formula_however_the_batch_is_packed_and_cut(
    workshop: Workshop, how: str
) -> None:
    """Cross-entropy in float64 of the model run on each document alone, under the dense mask written down here."""
    more = {"loss_weights": "1/t", "masks": "suffix"} if how == "weighed" else {"family": how}
    student = student_of(workshop.student, **more)
    shift = 1 if how == "token_shift" else 0
    terms = (token_term("ce", "cross_entropy", 1.0),)

    def of(parts: Any) -> tuple[float, torch.Tensor]:
        student.model.zero_grad()
        count, total = sum(part.view.count for part in parts), 0.0
        for part in parts:
            loss = student.loss(part, terms, None).total / count
            loss.backward()
            total += float(loss.detach())
        return total, torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])

    total, gradient = of(cut(BATCH, None, student, SEED))
    for rows in (1, 3):
        other, theirs = of(cut(BATCH, None, student, SEED, rows=rows))
        assert other == pytest.approx(total, rel=1e-5)
        torch.testing.assert_close(theirs, gradient, rtol=1e-3, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(workshop.student, dtype=torch.float64)
    model.resize_token_embeddings(VOCAB_SIZE + 1, mean_resizing=False)
    model.load_state_dict({name: tensor.double() for name, tensor in student.model.state_dict().items()})
    losses, count = [], 0.0
    for view in student.views(BATCH, SEED):
        assert int((view.input_ids_BT == VOCAB_SIZE).sum()) == len(view.labels_N)
        count += view.count
        for document in BATCH.documents:
            span = slice(document.start, document.stop)
            clean_T, noisy_T = (view.input_ids_BT[document.row, at:][span] for at in (24, 0))
            length = len(clean_T)
            block = torch.arange(length) // 4
            same, before, upto = (f(block[:, None], block[None]) for f in (torch.eq, torch.gt, torch.ge))
            mask = torch.cat([torch.cat([same, before], 1), torch.cat([torch.zeros_like(same), upto], 1)])
            z_TV = model(
                torch.cat([noisy_T, clean_T])[None], attention_mask=mask[None, None],
                position_ids=torch.arange(length).repeat(2)[None],
            ).logits[0].log_softmax(-1)  # fmt: skip
            at_M = torch.nonzero(noisy_T == VOCAB_SIZE)[:, 0]
            loss_M = -z_TV[at_M - shift, clean_T[at_M]]
            if how == "weighed":
                can = torch.from_numpy(maskable(BATCH)[document.row][span])
                share_M = [
                    ((noisy_T == VOCAB_SIZE) & (block == block[at])).sum() / (can & (block == block[at])).sum()
                    for at in at_M
                ]
                loss_M = loss_M / torch.tensor(share_M)
            losses.append(loss_M.sum())
    expected = torch.stack(losses).sum() / count
    assert total == pytest.approx(float(expected.detach()), rel=1e-5)
    expected.backward()
    dense = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).float()
    torch.testing.assert_close(gradient, dense, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_mask_token_is_added_behind_the_vocabulary_and_nothing_else_changes(tmp_path: Path, tied: bool) -> None:
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=1, tie_word_embeddings=tied)
    before = student_of(folder, "causal").tensors()
    student = student_of(folder)
    assert student.vocab_size == student.config.vocab_size == VOCAB_SIZE + 1
    assert read_diffusion(student.config) == DiffusionRecord(4, VOCAB_SIZE, "in_place", "block_causal")
    after = student.tensors()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        wide = after[name]
        assert torch.equal(wide[: len(tensor)], tensor), name
        if wide.shape != tensor.shape:
            assert name.endswith(("embed_tokens.weight", "lm_head.weight"))
            torch.testing.assert_close(wide[-1], tensor.mean(0))
    assert len({tuple(tensor.shape) for name, tensor in after.items() if len(tensor) == VOCAB_SIZE + 1}) == 1
    assert (student.model.get_input_embeddings().weight is student.model.get_output_embeddings().weight) is tied
    assert text_rows(student.config, student.vocab_size) == VOCAB_SIZE


def test_a_row_that_is_there_may_be_the_mask_token(workshop: Workshop) -> None:
    before = student_of(workshop.student, "causal").tensors()["model.embed_tokens.weight"]
    for how in ("mean", "keep"):
        student = student_of(workshop.student, mask_token_id=MASK, mask_embedding=how)
        after = student.tensors()["model.embed_tokens.weight"]
        others = torch.arange(VOCAB_SIZE) != MASK
        assert student.vocab_size == VOCAB_SIZE and torch.equal(after[others], before[others])
        torch.testing.assert_close(after[MASK], before[MASK] if how == "keep" else before[others].mean(0))


@pytest.mark.parametrize(
    ("diffusion", "message"),
    [
        ({"mask_token_id": 513}, "embeddings of 512 tokens, 0 to 511: leave it out to add token 512"),
        ({"mask_embedding": "keep"}, "the mask token 512 has no embedding yet"),
    ],
)
def test_a_mask_token_that_cannot_be_is_refused(workshop: Workshop, diffusion: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student_of(workshop.student, **diffusion)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"version": 2}, "version 2, this trainer reads 1"),
        ({"block_size": 0}, "block_size: got 0, expected a whole number from 1 to 64"),
        ({"block_size": True}, "block_size: got True"),
        ({"family": "shift"}, "family: got 'shift', expected 'in_place' or 'token_shift'"),
        ({"mask_token_id": None}, "mask_token_id: got None, expected a whole number of at least 0"),
        ({"mask_token_id": 4000}, "the checkpoint's mask token is 4000, but it has embeddings of 512 tokens"),
        ({"sub_block": 8}, "sub_block"),
    ],
)
def test_a_folder_whose_entry_is_wrong_is_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    right = {"version": 1, "block_size": 4, "mask_token_id": 511, "family": "in_place", "clean_half": "block_causal"}
    folder = save_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"diffusion": right | entry}))
    with pytest.raises(ValueError, match=message):
        student_of(folder)


REFUSED = {
    "seq_len": (("data.seq_len=46",), r"data.seq_len is 46, not a multiple of .* blocks of 4.*data.seq_len=4[48]"),
    "no room": (("student.diffusion.mask_token_id=600",), "embeddings of 512 tokens"),
    "a word": (
        ("student.diffusion.mask_token_id=77",), r"mask token 77 is '.+' in its tokenizer, a token that texts contain"
    ),
    "end of text": (("student.diffusion.mask_token_id=1",), "mask token 1 is '</s>', which marks the beginning or end"),
    "block": (("student.diffusion.block_size=65",), "block_size"),
    "suffix": (
        ("student.diffusion.masks=suffix", "student.diffusion.complementary=true"), "the complement of suffix masks"
    ),
    "growth": (
        ("student.diffusion.growth.every=5", "student.diffusion.growth.first=8"), "growth.first is 8, more than the 4"
    ),
    "leak": (
        ("distillation.terms.autoregressive.coefficient=0.5",), "block-causal clean half with blocks of 4 .*=causal"
    ),
    "clean half of none": (
        ("student=causal", "student.diffusion.block_size=null", "distillation.terms.autoregressive.coefficient=0.5"),
        r"autoregressive \(autoregressive\) is on the clean half .* reads from left to right",
    ),
    "twice": (
        ("student.diffusion.loss_weights=1/t", "student.diffusion.complementary=true"), "set one of the two back"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_be_are_refused(workshop: Workshop, tmp_path: Path, name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        run_here(workshop.settings(tmp_path, *DIFFUSION, *settings), ScriptedTargets())


def test_a_teacher_of_another_vocabulary_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    other = tokenizer_sha256({0: "x", 1: "y"})
    script = teacher_script(identity={"semantic.tokenizer_sha256": other})
    with pytest.raises(ValueError, match="is not the teacher's"):
        run_here(workshop.settings(tmp_path, *DIFFUSION, "teacher.kind=remote"), ScriptedTargets(script))


def test_settings_of_it_warn_where_the_student_is_another(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"student\.diffusion\.masks has no effect: student\.architecture is not"):
        compose(workshop.settings(tmp_path, "student.diffusion.masks=suffix"))
    assert compose(["student.kind=diffusion"]).student.architecture == "diffusion"


def test_a_ternary_one_learns_evaluates_resumes_is_exported_and_gone_on_with(
    workshop: Workshop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a teacher; the vocabulary that both share is the teacher's, without the mask token."""
    arguments = (*DIFFUSION, "student.quantiser=bitnet", "student.quantisation.warmup_steps=2", "run.steps=4",
                 "checkpoint.every=2", "evaluation.every=2", "distillation=logits_only")  # fmt: skip
    whole = workshop.settings(tmp_path / "whole", *arguments)
    assert run_here(whole, ScriptedTargets()) == loop.DONE
    assert "head has" not in caplog.text
    run = tmp_path / "whole" / "run"
    held_out = lines_of(run, "evaluation.jsonl")
    assert len(held_out) == 3 and all(0 < line["a"]["kl"] < 20 for line in held_out)
    part = tmp_path / "part"
    shutil.copytree(run, part / "run")
    shutil.rmtree(part / "run" / "checkpoints" / "step-00000004")
    assert run_here(workshop.settings(part, *arguments), ScriptedTargets()) == loop.DONE
    assert trace_of(part / "run") == trace_of(run)
    assert final_files(part / "run", 4) == final_files(run, 4)
    assert lines_of(part / "run", "evaluation.jsonl")[-1]["a"] == held_out[-1]["a"]

    assert export([str(run), "--format", "hf", "--out", str(tmp_path / "out"), "--name", "tiny"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["diffusion"] == {
        "version": 1, "block_size": 4, "mask_token_id": VOCAB_SIZE, "family": "in_place", "clean_half": "block_causal",
    }  # fmt: skip
    assert "student.architecture=diffusion to continue training" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ValueError, match="reads from left to right, not by blocks"):
        export([str(run), "--format", "gguf", "--out", str(tmp_path / "gguf")])

    def again(path: Path, architecture: str = "diffusion", **diffusion: Any) -> Student:
        return load_student(
            StudentSettings(
                checkpoint_path=str(path), compute="float32", architecture=architecture, quantiser="bitnet",
                diffusion=DiffusionSettings(**diffusion),
            ),
            CPU,
        )  # fmt: skip

    trained, reloaded = again(run), again(tmp_path / "out")
    assert trained.reader == reloaded.reader
    view = trained.views(BATCH, SEED)[0]
    with torch.no_grad():
        one, two = (
            student.body(view.input_ids_BT, view.position_ids_BT, view.attention) @ student.head.weight_VD.T
            for student in (trained, reloaded)
        )
    # The export's norms have one eps for all.
    assert float((one - two).pow(2).mean().sqrt() / one.std()) < 1e-2
    for path in (run, tmp_path / "out"):
        with pytest.raises(ValueError, match=r"holds a block-diffusion student, but student\.architecture is causal"):
            again(path, "causal")
        with pytest.raises(ValueError, match="family is token_shift, but the checkpoint was trained with in_place"):
            again(path, family="token_shift")
        grown = again(path, block_size=8)
        assert grown.reader.record == DiffusionRecord(8, VOCAB_SIZE, "in_place", "block_causal")  # type: ignore[attr-defined]
