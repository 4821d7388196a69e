"""Which batches the student writes, what it is prompted with, and the batch that comes of it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.rollouts.prompts import count_rollouts, is_rollout, prompts_of, rollout_batch
from student_trainer.rollouts.sampler import Sample
from student_trainer.settings import OnPolicySettings

SETTINGS = OnPolicySettings(share=0.5, prompt_tokens=4, new_tokens=6)


def batch_of(*rows: list[Placed], seq_len: int = 32, number: int = 3) -> Batch:
    return build_batch(number, rows, seq_len, 0, ("a", "b"))


def text(length: int, key: str = "a:0", source: int = 0) -> Placed:
    return Placed(source, key, np.arange(100, 100 + length, dtype=np.int32), None)


def chat(*counts: bool) -> Placed:
    return Placed(1, "b:7", np.arange(len(counts), dtype=np.int32) + 200, np.array(counts))


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_the_share_holds_at_every_step_and_is_spread_evenly(share: float, seed: int) -> None:
    written = [is_rollout(share, seed, number) for number in range(400)]
    for step in range(1, 401):
        assert abs(sum(written[:step]) - share * step) <= 1
        assert sum(written[:step]) == count_rollouts(share, seed, step)
    if share == 0.5:
        assert all(first != second for first, second in pairwise(written))


def test_a_text_gives_a_prompt_wherever_prompt_and_continuation_have_room() -> None:
    prompts = prompts_of(batch_of([text(32)]), SETTINGS, seed=0)
    assert [prompt.ids_N.tolist() for prompt in prompts] == [
        [100, 101, 102, 103], [110, 111, 112, 113], [120, 121, 122, 123]
    ]  # fmt: skip
    assert [prompt.key for prompt in prompts] == ["a:0+0:student", "a:0+10:student", "a:0+20:student"]


def test_a_short_text_keeps_its_last_token_from_the_prompt() -> None:
    prompts = prompts_of(batch_of([text(3), text(1, "a:1"), text(2, "a:2")]), SETTINGS, seed=0)
    assert [(prompt.key, len(prompt.ids_N)) for prompt in prompts] == [("a:0+0:student", 2), ("a:2+0:student", 1)]


def test_a_row_takes_no_more_prompts_than_it_has_room_for() -> None:
    batch = batch_of([text(3, f"a:{i}") for i in range(8)])
    prompts = prompts_of(batch, SETTINGS, seed=0)
    assert len(prompts) == 4  # of 2 and 6 tokens each, in 32


def test_a_chat_is_kept_up_to_its_first_answer() -> None:
    asked = [False] * 5
    batch = batch_of([chat(*asked, True, True, False, False, True)])
    [prompt] = prompts_of(batch, SETTINGS, seed=0)
    assert prompt.ids_N.tolist() == [200, 201, 202, 203, 204]
    assert prompt.source == 1


def test_a_question_without_an_answer_or_without_room_gives_none() -> None:
    assert prompts_of(batch_of([chat(*[False] * 6)]), SETTINGS, seed=0) == ()
    assert prompts_of(batch_of([chat(*[False] * 27, True)]), SETTINGS, seed=0) == ()


def test_seeds_follow_from_run_step_row_and_place() -> None:
    rows = [text(32)], [text(32, "a:1")]
    seeds = [prompt.seed for prompt in prompts_of(batch_of(*rows), SETTINGS, seed=5)]
    assert len(set(seeds)) == 6
    assert seeds == [prompt.seed for prompt in prompts_of(batch_of(*rows), SETTINGS, seed=5)]
    assert set(seeds).isdisjoint(prompt.seed for prompt in prompts_of(batch_of(*rows), SETTINGS, seed=6))
    assert set(seeds).isdisjoint(prompt.seed for prompt in prompts_of(batch_of(*rows, number=4), SETTINGS, seed=5))
    # A rank that has the second row alone draws as the one that has both.
    second = prompts_of(batch_of(*rows).rows(1, 2), SETTINGS, seed=5, first_row=1)
    assert [prompt.seed for prompt in second] == seeds[3:]


def test_only_what_the_student_wrote_counts() -> None:
    batch = batch_of([text(32)], [chat(False, False, True, True)])
    prompts = prompts_of(batch, SETTINGS, seed=0)
    samples = [Sample(np.arange(i + 1, dtype=np.int32), i == 1, -2.0 * (i + 1)) for i in range(4)]
    made = rollout_batch(batch, prompts, samples, pad_id=9)
    assert made.number == batch.number and made.tokens_BT.shape == batch.tokens_BT.shape
    labels = [
        made.tokens_BT[d.row, d.start + 1 : d.stop][made.loss_mask_BT[d.row, d.start : d.stop - 1]].tolist()
        for d in made.documents
    ]
    assert labels == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    for document, prompt in zip(made.documents, prompts, strict=True):
        kept = made.tokens_BT[document.row, document.start : document.start + len(prompt.ids_N)]
        assert kept.tolist() == prompt.ids_N.tolist()
    assert [made.source_names[made.source_ids_BT[d.row, d.start]] for d in made.documents] == ["a", "a", "a", "b"]
    assert (made.tokens_BT[made.document_ids_BT < 0] == 9).all()
    assert made.kind == "rollout" and batch.kind == "data" and made.rollout is not None
    assert made.rollout.means() == {"sequences": 4, "mean_length": 2.5, "ended": 0.25, "logprob": -2.0}
