"""The attention-relation term: every token that counts gets the value of its document. Named by `kinds`.

A token's value is the mean relation loss over all positions of its document. So like every other term this one is a sum
over tokens, does not depend on the split into micro batches and ranks, and has metrics by source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.teacher_rows import TeacherAttention
from student_trainer.losses.attention_relations import attention_relations
from student_trainer.losses.block_relations import MAPS, BlockTable, block_relations
from student_trainer.losses.terms import Capture, Captured, Needs, StatesTerm
from student_trainer.settings.attention import AttentionSettings
from teacher_proto.compute.relations import layer_index


@dataclass(frozen=True)
class AttentionTerm(StatesTerm):
    """KL(teacher || student) of the relations of Q, K and V of one layer."""

    settings: AttentionSettings

    @property
    def needs(self) -> Needs:
        return Needs(layers=frozenset({(self.settings.layer, self.settings.transport)}))

    def check_student(self, config: Any) -> None:
        if self.settings.within == "blocks" and getattr(config, "diffusion", None) is None:
            raise ValueError(
                "distillation.attention.within is blocks, but the student does not read by blocks: use "
                "student=diffusion, or distillation.attention.within=documents"
            )
        try:
            self.layer(config)
        except ValueError as error:
            raise ValueError(f"distillation.attention, the student: {error}") from None
        if self.settings.form != MAPS:
            check_relation_heads(self.settings.relation_heads, _widths(config), "the student")

    def check_teacher(self, widths: Mapping[str, int]) -> None:
        if self.settings.form != MAPS:
            check_relation_heads(self.settings.relation_heads, widths, "the teacher")

    def capture(self, config: Any) -> Capture:
        return Capture(attention=frozenset({self.layer(config)}))

    def layer(self, config: Any) -> int:
        """The index of the student's layer, counted from 0."""
        settings = self.settings
        wanted = settings.layer if settings.student_layer is None else settings.student_layer
        return layer_index(wanted, num_layers=config.num_hidden_layers)

    def values(self, captured: Captured, micro: MicroBatch, config: Any) -> Tensor:
        """The mean relation loss of each label's document."""
        teacher = micro.attention
        assert teacher is not None, "the batch has no teacher attention states"
        if self.settings.within == "blocks":
            return self._in_blocks(captured, teacher, config)[micro.documents_N]
        loss = attention_relations(
            captured.attention[self.layer(config)], teacher.documents, form=self.settings.form,
            relation_heads=self.settings.relation_heads, document_ids_BT=teacher.document_ids_BT,
        )  # fmt: skip
        counts_D = loss.per_document_D.new_tensor(loss.counts_D)
        # Each label has its document's mean, so the mean over labels weights a document by its number of labels.
        return (loss.per_document_D / counts_D)[micro.documents_N]

    def _in_blocks(self, captured: Captured, teacher: TeacherAttention, config: Any) -> Tensor:
        """[documents]: the mean loss of each document, within the blocks of the clean half."""
        assert teacher.blocks_BT is not None, "the student has no blocks"
        return block_relations(
            captured.attention[self.layer(config)], teacher.documents,
            BlockTable.of(teacher.document_ids_BT, teacher.blocks_BT), form=self.settings.form,
            relation_heads=self.settings.relation_heads, last_rows=config.diffusion["clean_half"] != "causal",
        )  # fmt: skip


def check_relation_heads(relation_heads: int, widths: Mapping[str, int], whose: str) -> None:
    """ValueError, listing the possible values, if R does not divide every width."""
    if any(width % relation_heads for width in widths.values()):
        fitting = [n for n in range(1, min(widths.values()) + 1) if not any(w % n for w in widths.values())]
        raise ValueError(
            f"distillation.attention.relation_heads is {relation_heads}, which does not divide the widths of {whose} "
            f"({', '.join(f'{part} {width}' for part, width in widths.items())}): give one of "
            f"{', '.join(map(str, fitting))}"
        )


def _widths(config: Any) -> dict[str, int]:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {"query": config.num_attention_heads * head, "key": kv * head, "value": kv * head}
