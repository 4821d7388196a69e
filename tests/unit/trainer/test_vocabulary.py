"""Student and teacher agree on what an id means, or the run does not start."""

from __future__ import annotations

import logging

import pytest

from student_trainer.settings import TeacherSettings
from student_trainer.targets.protocol import TeacherCard
from student_trainer.targets.vocabulary import agree_on_vocabulary, matching_prefix, shared_vocabulary
from teacher_proto.identity import tokenizer_sha256
from tests.models import tiny_tokenizer

TOKENS = {i: f"t{i}" for i in range(20)} | {20: 'quo"te', 21: "Ünï\n", 22: "ï"}
SHA = tokenizer_sha256(TOKENS)


def test_the_same_tokenizer_shares_all_rows() -> None:
    assert shared_vocabulary(TOKENS, 23, SHA, 23) == 23


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(32, 23), (23, 64), (32, 64)])
def test_a_padded_head_shares_the_rows_of_the_smaller_and_says_so(
    student_rows: int, teacher_rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    shared = shared_vocabulary(TOKENS, student_rows, SHA, teacher_rows)
    assert shared == min(student_rows, teacher_rows)
    assert f"first {shared} ids" in caplog.text


def test_tokens_added_to_the_student_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    added = TOKENS | {23: "<mask>", 24: "<x>"}
    assert shared_vocabulary(added, 25, SHA, 23) == 23
    # Also where the teacher's head is padded, so that its rows 23 and 24 mean nothing.
    assert shared_vocabulary(added, 32, SHA, 32) == 23
    assert "<mask>" in caplog.text and "id 23" in caplog.text


def test_tokens_added_to_the_teacher_are_left_out_where_its_tokenizer_is_known(
    caplog: pytest.LogCaptureFixture,
) -> None:
    theirs = TOKENS | {23: "<tool>"}
    assert shared_vocabulary(TOKENS, 32, tokenizer_sha256(theirs), 32, theirs) == 23
    assert "<tool>" in caplog.text
    with pytest.raises(ValueError, match=r"teacher\.tokenizer"):
        shared_vocabulary(TOKENS, 32, tokenizer_sha256(theirs), 32)


def test_another_tokenizer_is_refused_with_the_first_tokens_that_differ() -> None:
    theirs = TOKENS | {3: "other", 7: "else"}
    with pytest.raises(ValueError, match="2 ids mean different tokens") as caught:
        shared_vocabulary(TOKENS, 23, tokenizer_sha256(theirs), 23, theirs)
    assert "id 3: 't3' (student), 'other' (teacher); id 7: 't7' (student), 'else' (teacher)" in str(caught.value)


@pytest.mark.parametrize("length", [1, 5, 22, 23])
def test_the_hash_of_any_beginning_is_recognised(length: int) -> None:
    beginning = {i: TOKENS[i] for i in range(length)}
    assert matching_prefix(TOKENS, tokenizer_sha256(beginning)) == length
    assert matching_prefix(TOKENS, tokenizer_sha256(beginning | {0: "z"})) is None


def card(sha256: str, vocab_size: int = 512) -> TeacherCard:
    return TeacherCard("no-such-model", "f", vocab_size, 64, sha256, 16, ("top_k",))


def test_a_real_tokenizer_agrees_with_its_own_hash(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    sha256 = tokenizer_sha256({i: token for token, i in tokenizer.get_vocab().items()})
    with caplog.at_level(logging.WARNING):
        assert agree_on_vocabulary(TeacherSettings(), card(sha256), tokenizer, 512) == 512
    assert not caplog.records
    bigger = tiny_tokenizer()
    bigger.add_tokens(["<mask>"])
    assert agree_on_vocabulary(TeacherSettings(), card(sha256), bigger, 512) == len(tokenizer)


def test_what_cannot_be_compared_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    assert agree_on_vocabulary(TeacherSettings(), card(tokenizer_sha256({})), tokenizer, 512) == 512
    assert "without a tokenizer" in caplog.text
    assert agree_on_vocabulary(TeacherSettings(same_tokenizer="trust"), card("0" * 64), tokenizer, 300) == 300
    assert "trust" in caplog.text
    with pytest.raises(ValueError, match="hashes differ"):
        agree_on_vocabulary(TeacherSettings(), card("0" * 64), tokenizer, 512)
