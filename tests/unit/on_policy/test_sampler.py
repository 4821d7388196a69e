"""What the student writes: drawn from its own distribution, by its seed alone, as a decoder without a cache draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from student_trainer.rollouts.sampler import GenerateSampler, Sample, ends_of_text
from student_trainer.settings import StudentSettings
from student_trainer.students.load import student_from_model
from student_trainer.students.student import Student
from tests.models import save_tiny_llama, tiny_tokenizer

PROMPTS = [np.array(ids, np.int32) for ids in ([5, 6, 7], [9], [30, 31, 32, 33, 34, 35, 36])]
SEEDS = [11, 12, 13]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Student:
    folder = save_tiny_llama(tmp_path_factory.mktemp("student"), attention_dropout=0.5)
    return student_from_model(StudentSettings(checkpoint_path=str(folder), compute="float32"), torch.device("cpu"))


def dense(student: Student, prompt: np.ndarray, seed: int | None, new_tokens: int, ends: set[int]) -> Sample:
    """The same draws by whole forward passes of one sequence, in float64."""
    uniforms = np.random.default_rng(seed).random(new_tokens)
    ids, logprob = prompt.tolist(), 0.0
    model: Any = student.model.eval()
    for uniform in uniforms:
        with torch.no_grad():
            z_V = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        p_V = torch.softmax(z_V, -1).numpy()
        token = int(p_V.argmax()) if seed is None else int(np.searchsorted(p_V.cumsum(), uniform, side="right"))
        ids.append(token)
        logprob += float(np.log(p_V[token]))
        if token in ends:
            break
    model.train()
    return Sample(np.array(ids[len(prompt) :], np.int32), ids[-1] in ends, logprob)


@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("seeded", [True, False])
def test_the_samples_are_those_of_a_decoder_without_a_cache(
    student: Student, at_once: int | None, seeded: bool
) -> None:
    sampler = GenerateSampler(student, [1], 0, at_once)
    samples = sampler.sample(PROMPTS, SEEDS if seeded else None, new_tokens=12)
    for sample, prompt, seed in zip(samples, PROMPTS, SEEDS, strict=True):
        expected = dense(student, prompt, seed if seeded else None, 12, {1})
        assert sample.ids_N.tolist() == expected.ids_N.tolist()
        assert sample.ended == expected.ended
        assert sample.logprob == pytest.approx(expected.logprob, rel=1e-4)


def test_a_sample_stops_at_its_end_and_keeps_it(student: Student) -> None:
    free = GenerateSampler(student, [1], 0).sample(PROMPTS, SEEDS, new_tokens=12)
    end = int(free[0].ids_N[4])
    first = free[0].ids_N.tolist().index(end)
    cut = GenerateSampler(student, [1, end], 0).sample(PROMPTS, SEEDS, new_tokens=12)[0]
    assert cut.ids_N.tolist() == free[0].ids_N[: first + 1].tolist() and cut.ended


def test_draws_follow_the_distribution_at_the_temperature(student: Student) -> None:
    count, temperature = 4000, 0.5
    samples = GenerateSampler(student, [1], 0).sample(
        [PROMPTS[0]] * count, list(range(count)), new_tokens=1, temperature=temperature
    )
    with torch.no_grad():
        z_V = student.model.eval()(input_ids=torch.from_numpy(PROMPTS[0].astype(np.int64))[None]).logits[0, -1]
    student.model.train()
    expected_V = torch.softmax(z_V.double() / temperature, -1).numpy() * count
    seen_V = np.bincount([int(sample.ids_N[0]) for sample in samples], minlength=len(expected_V))
    often_V = expected_V >= 5
    seen = np.append(seen_V[often_V], seen_V[~often_V].sum())
    expected = np.append(expected_V[often_V], expected_V[~often_V].sum())
    # Chi-squared, whose mean is its degrees of freedom and whose variance is twice that.
    freedom = len(seen) - 1
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_nothing_is_drawn_that_the_teacher_cannot_read(student: Student) -> None:
    student.shared_vocab = 40
    try:
        samples = GenerateSampler(student, [1], 0).sample(PROMPTS * 20, list(range(60)), new_tokens=8)
    finally:
        student.shared_vocab = None
    assert max(int(sample.ids_N.max()) for sample in samples) < 40


def test_writing_leaves_the_student_and_every_random_state_as_they_were(student: Student) -> None:
    student.model.train()
    student.model.generation_config = defaults = GenerationConfig(repetition_penalty=9.0, eos_token_id=1)
    state, numbers = torch.get_rng_state(), np.random.get_state(legacy=False)
    plain = GenerateSampler(student, [1], 0).sample(PROMPTS, SEEDS, new_tokens=6)
    assert student.model.training and student.model.generation_config is defaults
    assert torch.equal(torch.get_rng_state(), state)
    assert str(np.random.get_state(legacy=False)) == str(numbers)
    assert not any(parameter.grad is not None for parameter in student.model.parameters())
    # The checkpoint's penalty is not the student's distribution.
    assert plain[0].ids_N.tolist() == dense(student, PROMPTS[0], SEEDS[0], 6, {1}).ids_N.tolist()


def test_meanwhile_may_give_up(student: Student) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        GenerateSampler(student, [1], 0).sample(PROMPTS, SEEDS, new_tokens=4, meanwhile=stop)
    assert student.model.training


def test_ends_are_those_of_tokenizer_and_student(student: Student) -> None:
    tokenizer = tiny_tokenizer()
    student.model.generation_config = GenerationConfig(eos_token_id=[7, 1])
    assert ends_of_text(student, tokenizer) == (1, 7)
    tokenizer.eos_token = None
    student.model.generation_config = GenerationConfig()
    assert ends_of_text(student, tokenizer) == ()
    assert len(GenerateSampler(student, (), 0).sample(PROMPTS[:1], None, new_tokens=20)[0].ids_N) == 20
