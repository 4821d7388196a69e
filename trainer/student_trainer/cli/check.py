"""Shows what a run would do, without training: `stillhouse-train check SETTINGS...`. Called by `main`.

Resolves every setting, fetches the teacher's identity, compares vocabularies and tokenizers, reads one batch and
fetches its targets, and estimates memory. What would stop the run stops the check, with the same message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from rich.console import Console
from rich.table import Table

from student_trainer.batch.batch import Batch
from student_trainer.build_components import build_components
from student_trainer.checkpoint.earlier_run import recognised
from student_trainer.cli.compose import compose_arguments
from student_trainer.components import Components
from student_trainer.losses.chunks import default_chunk_rows
from student_trainer.losses.kinds import terms_of
from student_trainer.losses.terms import Term, TokenTerm
from student_trainer.rollouts.prompts import prompts_of
from student_trainer.settings import Settings
from student_trainer.students.quant_linear import quant_linears
from student_trainer.students.quantisers.none import NONE
from student_trainer.targets.background import EventThread
from student_trainer.targets.protocol import spec_for
from student_trainer.targets.queries import queries_of
from teacher_proto.process.stages import DISPLAY, stage

# float32 weights, gradients and the two moments of AdamW. Muon keeps only one, so this is an upper bound.
BYTES_A_PARAMETER = 16


def main(arguments: Sequence[str]) -> int:
    """Print the findings. Raises the ValueError or StillhouseError that the run itself would end with."""
    settings = recognised(compose_arguments(arguments))
    if DISPLAY.shown != "off":
        DISPLAY.shown = settings.logging.progress
    table = Table("", "what would run", title="stillhouse-train check", show_header=False, title_justify="left")
    with ExitStack() as stack:
        thread = stack.enter_context(EventThread())
        components = build_components(settings, thread, stack)
        with stage("making batch 0"):
            batch, _ = components.source.batch(components.source.initial_state(), 0)
        for name, value in (
            *_teacher(components),
            *_student(settings, components),
            *_batch(settings, batch),
            *_on_policy(settings, batch),
            *_targets(settings, components, batch, thread),
            *_memory(settings, components, batch),
        ):
            table.add_row(name, value)
    DISPLAY.close()
    Console().print(table)
    return 0


def _teacher(components: Components) -> Iterator[tuple[str, str]]:
    if components.teacher is None:
        yield "teacher", "none: training on the data's own next tokens only"
        return
    card = components.teacher.card
    yield "teacher", f"{card.name}, fingerprint {card.fingerprint}"
    yield "", f"sequences of up to {card.max_sequence_length:,}, K up to {card.max_top_k}, {', '.join(card.kinds)}"


def _student(settings: Settings, components: Components) -> Iterator[tuple[str, str]]:
    student = components.student
    count = sum(parameter.numel() for parameter in student.model.parameters())
    trained = sum(parameter.numel() for parameter in student.model.parameters() if parameter.requires_grad)
    dtype = str(student.compute).removeprefix("torch.")
    yield "student", f"{type(student.model).__name__}, {count / 1e6:,.1f} M parameters, in {dtype} on {student.device}"
    bits = next((layer.weight_quantiser.bits for _, layer in quant_linears(student.model)), NONE.bits)
    yield "", f"{settings.student.cell}: {bits:g} bits per linear weight, {trained / 1e6:,.1f} M trainable parameters"
    if components.teacher is not None:
        shared, ours, theirs = student.shared_vocab, student.vocab_size, components.teacher.card.vocab_size
        yield "vocabulary", f"{shared or ours:,} ids in common; student {ours:,}, teacher {theirs:,}; same tokenizer"


def _batch(settings: Settings, batch: Batch) -> Iterator[tuple[str, str]]:
    labels = int(batch.loss_mask_BT.sum())
    filled = float((batch.document_ids_BT >= 0).mean())
    sources = Counter(document.source for document in batch.documents)
    yield (
        "steps",
        f"{settings.run.steps:,} of about {labels:,} labels: {settings.run.steps * labels / 1e6:,.2f} M in total",
    )
    yield "batch 0", f"{batch.tokens_BT.shape[0]} rows of {batch.tokens_BT.shape[1]:,}, {filled:.0%} filled"
    yield "", ", ".join(f"{count} documents of {source}" for source, count in sources.items())
    yield "loss", _sum_of(terms_of(settings.distillation))


def _on_policy(settings: Settings, batch: Batch) -> Iterator[tuple[str, str]]:
    own = settings.on_policy
    if own.active:
        prompts = prompts_of(batch, own, settings.run.seed)
        yield "own text", f"{own.share:.0%} of the batches, generated {own.lag} updates before training on them"
        yield "", f"in place of batch 0: {len(prompts)} prompts, with up to {own.new_tokens} new tokens each"
        yield "", _sum_of(terms_of(own))


def _sum_of(terms: Sequence[Term]) -> str:
    return " + ".join(
        f"{term.coefficient:g} x {term.name}" + (f" (T = {term.temperature:g})" if isinstance(term, TokenTerm) else "")
        for term in terms
    )


def _targets(
    settings: Settings, components: Components, batch: Batch, thread: EventThread
) -> Iterator[tuple[str, str]]:
    terms = terms_of(settings.distillation)
    tokens = int((batch.document_ids_BT >= 0).sum())
    if components.attention is not None:
        with stage("attention states of batch 0", note=components.describe_waiting):
            states = thread.call(components.attention.fetch(batch))
        size = sum(each.nbytes for each in states) / tokens
        ours = ", ".join(map(str, sorted(components.student.capture(terms).attention)))
        layers = f"the teacher's layer {states[0].layer}, the student's {ours}"
        yield "attention", f"states of {layers}: {size:,.0f} bytes per token"
    spec = spec_for(terms, settings.teacher.top_k, settings.distillation)
    if components.teacher is None or spec is None:
        return
    with stage("targets of batch 0", note=components.describe_waiting):
        answered = thread.call(components.teacher.targets.fetch(batch, queries_of(batch, spec)))
    yield "targets", f"{', '.join(spec.kinds)} with K = {spec.top_k}: {answered.nbytes / tokens:,.0f} bytes per token"


def _memory(settings: Settings, components: Components, batch: Batch) -> Iterator[tuple[str, str]]:
    student = components.student
    count = sum(parameter.numel() for parameter in student.model.parameters())
    rows = settings.distillation.chunk_rows or default_chunk_rows(student.vocab_size, student.device)
    chunk = min(rows, batch.tokens_BT.size) * student.vocab_size * 4
    state = count * BYTES_A_PARAMETER
    yield (
        "memory",
        f"about {state / 2**30:,.2f} GiB of weights, gradients and moments, {chunk / 2**20:,.0f} MiB of logits",
    )
    yield "", "plus the activations of a micro batch (lower optim.micro_batch_rows to reduce them)"
