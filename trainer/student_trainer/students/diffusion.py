"""Makes a block-diffusion student, which fills in masked tokens block by block, several at a time. Named by `load`;
`build_components` has its mask token and its row length checked. `diffusion_reader` defines how it reads a batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from student_trainer.losses.terms import CleanTerm, Term
from student_trainer.settings import StudentSettings
from student_trainer.students.causal import wrap_decoder
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.diffusion_record import convert
from student_trainer.students.student import Student


def wrap_diffusion(model: Any, attention: str, settings: StudentSettings) -> Student:
    """A loaded model as a block-diffusion student; a causal model is converted. ValueError as for `convert`."""
    wanted = settings.diffusion
    reader = DiffusionReader(
        record=convert(model, wanted), masks=wanted.masks, complementary=wanted.in_two_views,
        by_share=wanted.loss_weights == "1/t", threshold=wanted.threshold, growth=wanted.growth,
    )  # fmt: skip
    return wrap_decoder(model, attention, settings, reader)


def check_reading(student: Student, tokenizer: Any, seq_len: int, terms: Iterable[Term] = ()) -> None:
    """ValueError if a diffusion student can't read rows of `seq_len` tokens or texts of this tokenizer, or if its clean
    half sees the tokens that a loss has it predict.
    """
    if not isinstance(student.reader, DiffusionReader):
        return
    record = student.reader.record
    for term in terms:
        if isinstance(term, CleanTerm) and record.clean_half != "causal" and record.block_size > 1:
            raise ValueError(
                f"the loss {term.name} (autoregressive) has clean rows predict the next token, but in a block-causal "
                f"clean half with blocks of {record.block_size} all rows but the last of a block already see it: set "
                "student.diffusion.clean_half=causal, or leave the loss out"
            )
    if seq_len % record.block_size:
        nearest = max(1, round(seq_len / record.block_size)) * record.block_size
        raise ValueError(
            f"data.seq_len is {seq_len}, not a multiple of the student's blocks of {record.block_size} tokens: set "
            f"data.seq_len={nearest}, or another student.diffusion.block_size"
        )
    mask, special = record.mask_token_id, set(tokenizer.all_special_ids)
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    token = tokenizer.convert_ids_to_tokens(mask) if mask < len(tokenizer) else None
    if token is not None and mask not in special | added:
        raise ValueError(
            f"the student's mask token {mask} is {token!r} in its tokenizer, a token that texts contain: choose a "
            "special token or a row after the tokenizer's, or leave student.diffusion.mask_token_id out"
        )
    if mask in {tokenizer.bos_token_id, tokenizer.eos_token_id}:
        raise ValueError(f"the student's mask token {mask} is {token!r}, which marks the beginning or end of texts")
