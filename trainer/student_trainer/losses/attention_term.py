"""The relation term as the loop sums it: a value for every token that counts, that of its document. Used by
`students.student`.

A token's value is the mean relation loss over all positions of its document, so the term is a sum over tokens like
every other, whatever the cut into micro batches and ranks, and has figures by source.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from student_trainer.batch.teacher_rows import TeacherAttention
from student_trainer.losses.attention_relations import attention_relations
from student_trainer.losses.head import HeadLoss
from student_trainer.losses.terms import Term
from student_trainer.settings.attention import AttentionSettings
from student_trainer.students.attention_hook import attention_module
from student_trainer.students.attention_states import AttentionStates
from teacher_proto.relations import QKV, layer_index

# What comes behind the states within an attention module, by the names that transformers gives it.
OUTPUT_PARTS = ("o_proj", "out_proj", "c_proj", "dense", "attn_sub_norm", "sinks")


def relation_among(terms: Iterable[Term]) -> Term | None:
    """The relation term, if it is one of these."""
    return next((term for term in terms if term.kind == "attention_relations"), None)


@dataclass(frozen=True)
class AttentionTerm:
    """`layer` is the student's, counted from 0. ValueError from `of` where the student has not what the term needs."""

    form: str
    relation_heads: int
    layer: int

    @classmethod
    def of(cls, settings: AttentionSettings, model: Any) -> AttentionTerm:
        wanted = settings.layer if settings.student_layer is None else settings.student_layer
        try:
            layer = layer_index(wanted, num_layers=model.config.num_hidden_layers)
            attention_module(model, layer)
        except ValueError as error:
            raise ValueError(f"distillation.attention, the student: {error}") from None
        check_relation_heads(settings.relation_heads, _widths(model.config), "the student")
        return cls(settings.form, settings.relation_heads, layer)

    def watch(self, model: nn.Module) -> AttentionStates:
        """Around the student's forward pass."""
        return AttentionStates(model, self.layer)

    def weights(self, model: nn.Module) -> list[Tensor]:
        """The parameters that make query, key and value of the layer: all that the term has in common with others is
        here and below.
        """
        module = attention_module(model, self.layer)
        made = [(name, each) for name, each in module.named_parameters() if each.requires_grad]
        return [each for name, each in made if not name.startswith(OUTPUT_PARTS)]

    def values(self, states: QKV, teacher: TeacherAttention) -> Tensor:
        """[N] float32, differentiable: the mean relation loss of each label's document."""
        loss = attention_relations(
            states, teacher.documents, form=self.form, relation_heads=self.relation_heads,
            document_ids_BT=teacher.document_ids_BT,
        )  # fmt: skip
        counts_D = loss.per_document_D.new_tensor(loss.counts_D)
        return (loss.per_document_D / counts_D)[teacher.document_N]

    def add(self, loss: HeadLoss, term: Term, states: QKV, teacher: TeacherAttention) -> HeadLoss:
        """The loss of a micro batch with this term in its sum and among its figures."""
        values_N = self.values(states, teacher)
        return replace(
            loss,
            total=loss.total + term.coefficient * values_N.sum(),
            per_term=loss.per_term | {term.name: values_N.detach()},
            counted=loss.counted | {term.name: torch.ones_like(values_N, dtype=torch.bool)},
        )


def check_relation_heads(relation_heads: int, widths: dict[str, int], whose: str) -> None:
    """ValueError naming the divisors where R does not divide every width that it is to cut."""
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
