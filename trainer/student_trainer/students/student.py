"""The loop's interface to a student: hidden states for packed rows, and the head that makes logits from them.

Built by `causal`, for every architecture, used by `loop`, `evaluator` and `checkpoints`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from student_trainer.batch.batch import Batch
from student_trainer.batch.head import Head
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import Attention, Reader, View, ViewSeed
from student_trainer.losses.balance import gradient_norms, term_gradient_norms
from student_trainer.losses.head import head_loss
from student_trainer.losses.kinds import token_term
from student_trainer.losses.terms import Capture, Captured, CleanTerm, StatesTerm, Term, TokenTerm
from student_trainer.losses.values import HeadLoss
from student_trainer.settings import StudentSettings
from student_trainer.students.capture import capturing, check_capture, parameters_behind
from student_trainer.students.quant_linear import is_quantised, set_quantisation_blend, warmup_blend


class Body(Protocol):
    """A view's inputs to final hidden states [B, T, D], after the last norm."""

    def __call__(self, input_ids_BT: Tensor, position_ids_BT: Tensor, attention: Attention) -> Tensor: ...


def _directly(call: Callable[..., Any], *args: Any) -> Any:
    return call(*args)


def _any_clean(terms: Iterable[Term]) -> bool:
    return any(isinstance(term, CleanTerm) for term in terms)


@dataclass(eq=False)
class Student:
    """A model that learns. `reader`: how it reads a batch. `shared_vocab`: the number of leading ids that it has in
    common with the teacher, None without one. `model` is the whole Hugging Face model, whose parameters are trained and
    saved. `gathered(call, *args)` calls with the parameters in full: directly, or gathered by `sharding`.
    `warmup_steps`: of a quantised student. `adapted`: the settings of its adapter, None without one.
    """

    model: nn.Module
    body: Body
    reader: Reader
    head_module: nn.Module
    head_constants: dict[str, Any] = field(default_factory=dict)
    shared_vocab: int | None = None
    compute: torch.dtype = torch.float32
    gathered: Callable[..., Any] = _directly
    warmup_steps: int = 0
    adapted: StudentSettings | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def head(self) -> Head:
        bias_V = getattr(self.head_module, "bias", None)
        return Head(self.head_module.weight, bias_V, **self.head_constants)

    @property
    def vocab_size(self) -> int:
        return int(self.head.weight_VD.shape[0])

    def views(self, batch: Batch, seed: ViewSeed) -> tuple[View, ...]:
        """How the student reads the rows of a batch: see `batch.view`."""
        return self.reader.views(batch, seed)

    @property
    def autoregressive(self) -> bool:
        """Whether it can write from left to right."""
        return self.reader.autoregressive

    def autocast(self) -> torch.autocast:
        """A context in which passes are computed in the student's dtype."""
        return torch.autocast(self.device.type, dtype=self.compute, enabled=self.compute != torch.float32)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """A context for passes that nothing is learnt from: no gradient, and the model in evaluation mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)

    def before_step(self, number: int) -> None:
        """Apply what depends on the step (from 0) rather than on a gradient: the warm-up of a quantised student.

        Its blend of exact and quantised is a buffer of the model, which checkpoints keep.
        """
        if is_quantised(self.model):
            set_quantisation_blend(self.model, warmup_blend(number, self.warmup_steps))

    def loss(self, micro: MicroBatch, terms: tuple[Term, ...], chunk_rows: int | None) -> HeadLoss:
        """Forward pass and loss of a micro batch: sums over its labels, to be divided by the batch's count."""
        return self.loss_and_logits(micro, terms, chunk_rows, want_top1=False, want_logits=False)[0]

    def loss_and_logits(
        self, micro: MicroBatch, terms: tuple[Term, ...], chunk_rows: int | None, want_top1: bool, want_logits: bool
    ) -> tuple[HeadLoss, Tensor | None]:
        """The loss of one forward pass and, if wanted, the logits [N, V] fp32 of its labels' rows."""
        if not len(micro.view.labels_N):
            # A rank without labels here still takes part in gathering and reducing, with gradients of zero.
            terms = tuple(token_term(term.name, "cross_entropy", 0.0) for term in terms)
        *loss, logits_NV = self.gathered(self._loss, micro, terms, chunk_rows, want_top1, want_logits)
        return HeadLoss(*loss), logits_NV

    def _loss(
        self, micro: MicroBatch, terms: tuple[Term, ...], chunk_rows: int | None, want_top1: bool, want_logits: bool
    ) -> tuple[Any, ...]:
        """The fields of a HeadLoss, then the logits: FSDP looks for tensors in plain containers."""
        with capturing(self.model, self.capture(terms)) as captured:
            hidden_ND = self.hidden(micro, clean=_any_clean(terms))
        loss = self.loss_of(captured(hidden_ND), self.head, micro, terms, chunk_rows, want_top1, defer=True)
        logits_NV = self.head.logits(hidden_ND[: len(micro.view.labels_N)]) if want_logits else None
        return loss.total, loss.per_term, loss.counted, loss.top1_N, loss.deferred, logits_NV

    def loss_of(
        self, captured: Captured, head: Head, micro: MicroBatch, terms: tuple[Term, ...], chunk_rows: int | None,
        want_top1: bool = False, defer: bool = False,
    ) -> HeadLoss:  # fmt: skip
        """The loss of a micro batch, from its hidden rows and whatever else its forward pass captured.

        `defer` as in `head_loss`.
        """
        labels = len(micro.view.labels_N)
        hidden_ND, clean_ND = captured.hidden_ND[:labels], captured.hidden_ND[labels:]
        loss = HeadLoss(hidden_ND.new_zeros((), dtype=torch.float32), {}, {})
        of_tokens = [term for term in terms if isinstance(term, TokenTerm)]
        of_clean = [token_term(t.name, "cross_entropy", t.coefficient) for t in terms if isinstance(t, CleanTerm)]
        for rows_ND, these in ((hidden_ND, of_tokens), (clean_ND, of_clean)):
            if not these:
                continue
            part = head_loss(
                rows_ND, head.weight_VD, micro.view.labels_N, micro.teacher, these,
                head_bias_V=head.bias_V, logit_softcap=head.softcap, logit_scale=head.scale,
                shared_vocab=self.shared_vocab, weights_N=micro.view.weights_N, chunk_rows=chunk_rows,
                want_top1=want_top1, compute=self.compute, defer=defer,
                every_row=micro.teacher is None or micro.teacher.valid_N is None,  # a view lists labels that count
            )  # fmt: skip
            # Clean rows have the same labels: their terms join the others in one record.
            loss = part if these is of_tokens else loss.beside(part)
        for term in terms:
            if isinstance(term, StatesTerm):
                values_N = term.values(captured, micro, self.config)
                loss = loss.plus(term, values_N, micro.view.weights_N)
        return loss

    def gradient_norms(
        self, micro: MicroBatch, terms: tuple[Term, ...], chunk_rows: int | None
    ) -> dict[str, float]:  # fmt: skip
        """By term, the norm of its gradient at coefficient 1: with respect to the hidden rows, if all terms are on
        those; with a term on other states among them, with respect to the weights that produce those states.
        """
        # Not with respect to the head: that saves a product of the vocabulary's size per term.
        head = replace(self.head, weight_VD=self.head.weight_VD.detach())
        if head.bias_V is not None:
            head = replace(head, bias_V=head.bias_V.detach())

        def loss_of(captured: Captured, terms: tuple[Term, ...]) -> HeadLoss:
            return self.loss_of(captured, head, micro, terms, chunk_rows)

        wanted = self.capture(terms)
        if not (weights := parameters_behind(self.model, wanted)):
            with torch.no_grad():
                hidden_ND = self.hidden(micro, clean=_any_clean(terms))
            return term_gradient_norms(lambda leaf_ND, terms: loss_of(Captured(leaf_ND, {}), terms), hidden_ND, terms)
        with capturing(self.model, wanted) as made:
            hidden_ND = self.hidden(micro, clean=_any_clean(terms))
        captured = made(hidden_ND)
        roots = {term.name: loss_of(captured, (replace(term, coefficient=1.0),)).total for term in terms}
        return gradient_norms({name: (root, None) for name, root in roots.items()}, weights)

    @property
    def config(self) -> Any:
        """The model's transformers config."""
        return self.model.config

    def capture(self, terms: Iterable[Term]) -> Capture:
        """What to keep of a forward pass for these terms."""
        return Capture.of(terms, self.config)

    def check_terms(self, terms: Iterable[Term]) -> None:
        """ValueError for a term that needs what this student lacks."""
        for term in terms:
            if term.kind == "tcs" and self.autoregressive:
                raise ValueError(
                    f"the loss {term.name} (tcs) is on masked tokens, but this student masks none: it reads from left "
                    "to right. Use top_k_kl, or student=diffusion"
                )
            if isinstance(term, CleanTerm) and self.autoregressive:
                raise ValueError(
                    f"the loss {term.name} (autoregressive) is on the clean half of a block-diffusion student, but "
                    "this student reads from left to right anyway: use cross_entropy, or student=diffusion"
                )
            if isinstance(term, StatesTerm):
                term.check_student(self.config)
                check_capture(self.model, self.capture((term,)))

    def hidden(self, micro: MicroBatch, clean: bool = False) -> Tensor:
        """The hidden rows [N, D] that predict the labels of the micro batch; with `clean`, followed by those of its
        clean half, [2 N, D].
        """
        with self.autocast():
            hidden_BTD = self.body(micro.view.input_ids_BT, micro.view.position_ids_BT, micro.view.attention)
        rows_N = micro.view.rows_N
        if clean:
            assert micro.view.clean_rows_N is not None, "the student has no clean half that reads from left to right"
            rows_N = torch.cat([rows_N, micro.view.clean_rows_N])
        return hidden_BTD.flatten(0, 1)[rows_N]

    def logits(self, micro: MicroBatch) -> Tensor:
        """Logits [N, V] fp32 of a few rows, for inspection; `loss` never makes them."""
        with torch.no_grad():
            logits_NV: Tensor = self.gathered(self._logits, micro)
        return logits_NV

    def _logits(self, micro: MicroBatch) -> Tensor:
        return self.head.logits(self.hidden(micro))

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers by name, tied ones only once: what a checkpoint keeps."""
        return dict(self._named_once())

    def _named_once(self) -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor.detach()
