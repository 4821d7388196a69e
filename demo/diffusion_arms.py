"""What `demo.diffusion` compares: two arms of one student, and ablations that each change one thing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo.prepare import PRUNED, SMALL, TEACHER, TEXT

# How confident a student must be in a token to write it in the same pass as others, in texts that the teacher judges.
THRESHOLDS = (0.2, 0.5, 0.9)


@dataclass(frozen=True)
class Arm:
    """`settings`: where it differs from the base. `views` of a row: two rows of one view cost as much as one of two."""

    about: str
    settings: tuple[str, ...] = ("distillation=tcs",)
    asks: bool = True  # the teacher for targets, in every step
    views: int = 2


@dataclass(frozen=True)
class Comparison:
    """Arms of one student, each with every seed. `base`: the arm that the others are compared with.

    `served`: the teacher is SmolLM2 behind its service, and the runs are as long as time allows; otherwise it is a
    small model that is trained first, and they have `steps`. `judged`: texts of `new_tokens` per source and threshold.
    """

    name: str
    about: str
    prepared: tuple[str, ...]
    served: bool
    student: Path
    settings: tuple[str, ...]
    arms: Mapping[str, Arm]
    base: str
    seq_len: int
    rows: int
    held_out_rows: int
    judged: int
    new_tokens: int
    infilled: int
    learning_rate: float
    steps: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def runs(self) -> list[tuple[str, int]]:
        """All arms with the first seed, then with the next, so that finished runs are comparable whenever it stops."""
        return [(arm, seed) for seed in self.seeds for arm in self.arms]


CROSS_ENTROPY = Arm("cross-entropy of masked tokens alone", ("distillation=cross_entropy",), asks=False)
TCS = Arm("cross-entropy and target concrete scores: the teacher's top K, the rest as one bucket")

MAIN = Comparison(
    "main", "SmolLM2-135M with 24 of its 30 layers, made a block-diffusion model", ("teacher", "pruned", "text"),
    served=True, student=PRUNED,
    settings=("--config-folder", "demo/config", "data=stdlib", f"student.tokenizer={TEACHER}"),
    arms={"cross_entropy": CROSS_ENTROPY, "tcs": TCS}, base="cross_entropy",
    seq_len=256, rows=1, held_out_rows=8, judged=4, new_tokens=24, infilled=24, learning_rate=1.5e-4,
)  # fmt: skip


def _with(about: str, *settings: str, views: int = 2) -> Arm:
    return Arm(about, ("distillation=tcs", *settings), views=views)


ABLATIONS = Comparison(
    "ablations", "a model of 0.4 million weights, trained on Python's library and then made a block-diffusion model",
    ("text", "small"), served=False, student=SMALL,
    settings=(
        "data.sources.code.kind=jsonl", f"data.sources.code.path={TEXT / 'code.jsonl'}",
        "data.sources.code.held_out_fraction=0.05", "student.compute=float32",
    ),
    arms={
        "tcs": Arm("blocks of 16, row t predicts token t, uniform masks in two views, block-causal clean half"),
        "cross_entropy": CROSS_ENTROPY,
        # Equal bytes: 16 ids with their logprobs, or 15 and what the tail is computed from.
        "k15_tail": _with("the top 15, the rest as one bucket", "teacher.top_k=15"),
        "k16_truncated": _with(
            "the top 16, the rest left out", "teacher.top_k=16", "distillation.terms.tcs.tail=truncate"
        ),
        "renormalised": _with("the top 64, renormalised", "distillation.terms.tcs.tail=renormalise"),
        "token_shift": _with("row t predicts token t + 1", "student.diffusion.family=token_shift"),
        "block_4": _with("blocks of 4", "student.diffusion.block_size=4"),
        "block_8": _with("blocks of 8", "student.diffusion.block_size=8"),
        "one_view": _with("uniform masks in one view", "student.diffusion.complementary=false", views=1),
        "position_dependent": _with(
            "late tokens masked more often, in one view", "student.diffusion.masks=position_dependent", views=1
        ),
        "suffix": _with("a block's last tokens masked, in one view", "student.diffusion.masks=suffix", views=1),
        "causal_half": _with("a causal clean half", "student.diffusion.clean_half=causal"),
        "autoregressive": _with(
            "a causal clean half, and its own cross-entropy at 0.5", "student.diffusion.clean_half=causal",
            "distillation.terms.autoregressive.coefficient=0.5",
        ),
        "lookahead": _with(
            "16 targets per row from the teacher's look-ahead over the next four tokens, others from its causal rows",
            "distillation.lookahead.window=4",
        ),
    },
    base="tcs", seq_len=64, rows=2, held_out_rows=32, judged=12, new_tokens=32, infilled=64, learning_rate=1e-3,
    steps=120,
)  # fmt: skip
