"""Which runs `demo.classification` makes, their lengths, and the choices that follow from finished ones. No clock here.

First the teacher and stage 2; then, if there is time, the search, on the validation split and with one seed: every
arm's learning rate out of equally many, the weight of the relations, the length of stage 2. Finally every arm with
every seed, on the test split, which no choice depends on. Without a search each arm uses the first of its rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from demo.measure import Machine
from demo.plan import END_S, MARGIN, PAGE_S

ROWS, SEQ_LEN, EXAMPLES_A_STEP, EPOCH = 4, 256, 34, 205
TEACHERS_LAYERS = 30
# Of the student: the most that leave each run at least half an epoch, or else the fewest. Layers below the fifteenth
# know little more about a sentence than its words.
LAYERS = (30, 24, 15)
EMBEDDINGS = 4  # embeddings, head and their moments cost a step about as much as this many layers
# With the fewest, 15 ternary layers are right three quarters of the time; in full precision, a quarter of these steps
# is enough to beat a bag of words.
FEWEST_STEPS, MOST_STEPS = 100, 2 * EPOCH
# Held-out rows of eight or nine examples each: all that there are, or some of each split if runs are short.
ALL_ROWS, FEW_ROWS = 400, 40
VALIDATION_STEPS, TEST_STEPS = 10, 20  # cost of evaluating a whole split, in training steps


@dataclass(frozen=True)
class Arm:
    """`rates`: learning rates to try, the most promising first. `stage2`: it starts where stage 2 ended. `asks`: it
    uses the teacher. `relates`: and the attention service too.
    """

    about: str
    settings: tuple[str, ...]
    rates: tuple[float, ...]
    stage2: bool = False
    asks: bool = False
    relates: bool = False


# For AdamW, which suits the pretrained weights, and for Muon, with which ternary ones learn most in few steps.
FULL_RATES, TERNARY_RATES = (3e-4, 1e-4), (1e-3, 2e-3)
DISTILLED = ("recipe=bitdistill",)
ARMS: Mapping[str, Arm] = {
    "full_precision": Arm("the classes, in full precision", ("recipe=classification_teacher",), FULL_RATES),
    "bitnet_sft": Arm("the classes, ternary without stage 2", ("recipe=bitnet_sft",), TERNARY_RATES),
    "no_teacher": Arm(
        "the classes, after stage 2", (*DISTILLED, "distillation=cross_entropy", "teacher=none"), TERNARY_RATES,
        stage2=True,
    ),
    "logits": Arm(
        "the classes and the teacher's logits at the class words, after stage 2",
        (*DISTILLED, "distillation.attention.coefficient=null"), TERNARY_RATES, stage2=True, asks=True,
    ),
    "relations": Arm(
        "the classes and the teacher's attention relations, after stage 2",
        (*DISTILLED, "distillation=attention_only"), TERNARY_RATES, stage2=True, asks=True, relates=True,
    ),
    "both": Arm(
        "the classes, the teacher's logits and its relations, after stage 2", DISTILLED, TERNARY_RATES, stage2=True,
        asks=True, relates=True,
    ),
}  # fmt: skip
# How the relations are weighted: by equal shares of the gradient, or by the paper's smaller coefficient.
GAMMAS = ("shares", "1e3")
LENGTH_ARM = "logits"  # with which stage 2's length is chosen


@dataclass(frozen=True)
class Plan:
    """What was decided when the comparison began: the same for every run of it."""

    layers: int
    steps: int  # of each arm
    teacher_steps: int
    stage2_steps: int
    held_out_rows: int
    machine: dict[str, Any]
    search: bool = True  # for rates, gammas and stage 2's length; without it each arm uses its first rate

    @property
    def search_steps(self) -> int:
        return max(1, self.steps // 2)

    @property
    def test_rows(self) -> int:
        """More than for a choice, because a run is tested only once."""
        return min(ALL_ROWS, 3 * self.held_out_rows)

    @property
    def evaluate_every(self) -> int:
        """Steps between the evaluations of runs that a choice depends on."""
        return -(-self.search_steps // (4 if self.held_out_rows == ALL_ROWS else 2))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of stage 2 to try: none, half and all of it."""
        return (0, max(1, self.stage2_steps // 2), self.stage2_steps)


@dataclass(frozen=True)
class Run:
    """`phase`: teacher, stage2, rates, gammas, lengths or final. `stage2`: steps of the stage 2 that it starts from."""

    phase: str
    name: str
    steps: int
    arm: str = ""
    seed: int = 0
    rate: float = 0.0
    gamma: str = ""
    stage2: int = 0


def share_of_cost(layers: int) -> float:
    """Cost of a step with this many layers, as a fraction of one with all of the teacher's."""
    return (EMBEDDINGS + layers) / (EMBEDDINGS + TEACHERS_LAYERS)


def make_plan(machine: Machine, seconds: float, seeds: int, facts: dict[str, Any]) -> Plan:
    """A plan for the largest student whose runs can be half an epoch long with a search, else the smallest without."""
    for layers in LAYERS:
        if (steps := steps_in(machine, seconds, seeds, layers, search=True)) >= EPOCH / 2:
            return planned(layers, steps, facts)
    return planned(LAYERS[-1], steps_in(machine, seconds, seeds, LAYERS[-1], search=False), facts, search=False)


def planned(layers: int, steps: int, facts: dict[str, Any], search: bool = True) -> Plan:
    return Plan(
        layers, steps, teacher_steps=min(EPOCH, steps), stage2_steps=2 * steps,
        held_out_rows=ALL_ROWS if steps >= EPOCH / 2 else FEW_ROWS, machine=facts, search=search,
    )  # fmt: skip


def steps_in(machine: Machine, seconds: float, seeds: int, layers: int, search: bool) -> int:
    """Steps of an arm, so that all runs finish in `seconds`; never fewer than show anything, even if they don't finish.

    All training together is as long as `weight` arms; every run also has to start and to evaluate. The machine was
    measured with the whole teacher as its student.
    """
    tokens, share = ROWS * SEQ_LEN, share_of_cost(layers)
    a_step_s = MARGIN * share * tokens / machine.student_tokens_per_second
    gammas = sum(arm.relates for arm in ARMS.values()) * (len(GAMMAS) - 1)
    searched = sum(len(arm.rates) for arm in ARMS.values()) + gammas + 2 if search else 3
    final = seeds * len(ARMS)
    weight = 1 / share + 2 + 0.5 * searched + final
    evaluating = (searched * VALIDATION_STEPS + final * TEST_STEPS) * a_step_s
    starts = (3 + searched + final) * (MARGIN * machine.start_s + END_S)
    left_s = seconds - evaluating - starts - PAGE_S
    return min(MOST_STEPS, max(FEWEST_STEPS, int(left_s / (weight * a_step_s))))


def next_run(plan: Plan, done: Mapping[str, Mapping[str, float]], seeds: int) -> Run | None:
    """The first run that is not done; None after the last. `done`: metrics by name, on the test split for final runs
    and on the validation split for others.
    """
    return next((run for run in known_runs(plan, done, seeds) if run.name not in done), None)


def known_runs(plan: Plan, done: Mapping[str, Mapping[str, float]], seeds: int) -> list[Run]:
    """All runs that are known so far: those that depend on a choice appear once it can be made."""
    runs = [Run("teacher", "teacher", plan.teacher_steps)]
    stage2 = [Run("stage2", f"stage2-{steps}", steps, stage2=steps) for steps in plan.lengths[1:]]
    if not plan.search:
        return runs + stage2 + final(plan, done, seeds) + lengths(plan, done)
    first, *others = rates(plan)
    runs += [*(run for run in first if not run.stage2), *stage2, *(run for run in first if run.stage2)]
    runs += [run for these in others for run in these]
    if not all(run.name in done for run in runs):
        return runs
    runs += gammas(plan, done)
    runs += lengths(plan, done)
    if not all(run.name in done for run in runs):
        return runs
    return runs + final(plan, done, seeds)


def rates(plan: Plan) -> list[list[Run]]:
    """Every arm at its first rate, then at the next, so that finished runs are comparable whenever it is stopped."""
    number = min(len(arm.rates) for arm in ARMS.values())
    return [[rate_run(plan, name, arm.rates[place]) for name, arm in ARMS.items()] for place in range(number)]


def rate_run(plan: Plan, name: str, rate: float) -> Run:
    arm = ARMS[name]
    gamma, stage2 = GAMMAS[0] if arm.relates else "", plan.lengths[-1] if arm.stage2 else 0
    return Run("rates", f"rate-{name}-{rate:g}", plan.search_steps, name, 0, rate, gamma, stage2)


def gammas(plan: Plan, done: Mapping[str, Mapping[str, float]]) -> list[Run]:
    """Every arm with relations, with each further way to weight them, at its chosen rate."""
    return [
        Run("gammas", f"gamma-{name}-{gamma}", plan.search_steps, name, 0, best_rate(plan, done, name).rate, gamma,
            plan.lengths[-1])
        for name, arm in ARMS.items() if arm.relates for gamma in GAMMAS[1:]
    ]  # fmt: skip


def lengths(plan: Plan, done: Mapping[str, Mapping[str, float]]) -> list[Run]:
    """`LENGTH_ARM` after shorter stages 2; a search has already tried it after the longest, to choose its rate."""
    rate = best_rate(plan, done, LENGTH_ARM).rate
    return [
        Run("lengths", f"length-{length}", plan.search_steps, LENGTH_ARM, 0, rate, "", length)
        for length in (plan.lengths[:-1] if plan.search else plan.lengths)
    ]  # fmt: skip


def final(plan: Plan, done: Mapping[str, Mapping[str, float]], seeds: int) -> list[Run]:
    """All arms with the first seed, then with the next, so that finished runs are comparable whenever it is stopped."""
    chosen = {name: best_rate(plan, done, name) for name in ARMS}
    length = plan.lengths[-1]
    if plan.search:
        length = best(done, [chosen[LENGTH_ARM], *lengths(plan, done)]).stage2
        for name, arm in ARMS.items():
            if arm.relates:
                others = [run for run in gammas(plan, done) if run.arm == name]
                chosen[name] = best(done, [chosen[name], *others])
    return [
        Run("final", f"{name}-{seed}", plan.steps, name, seed, chosen[name].rate, chosen[name].gamma,
            length if arm.stage2 else 0)
        for seed in range(seeds) for name, arm in ARMS.items()
    ]  # fmt: skip


def best_rate(plan: Plan, done: Mapping[str, Mapping[str, float]], arm: str) -> Run:
    """The run that decided the arm's rate; without a search, the one with its first rate, which is never made."""
    if not plan.search:
        return rate_run(plan, arm, ARMS[arm].rates[0])
    return best(done, [run for these in rates(plan) for run in these if run.arm == arm])


def best(done: Mapping[str, Mapping[str, float]], runs: list[Run]) -> Run:
    """The most accurate; among equals, the one with the lowest cross-entropy."""
    return max(runs, key=lambda run: (done[run.name]["accuracy"], -done[run.name]["cross_entropy"]))
