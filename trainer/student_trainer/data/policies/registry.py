"""The mixture policies by name. Read by `decisions`. A new one is a class in a file of its own, a line here, and a
record of its settings in `settings.mixture`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from student_trainer.data.policies.ado import Ado
from student_trainer.data.policies.gap import Divergence, Excess
from student_trainer.data.policies.influence import Influence
from student_trainer.data.policies.policy import MixturePolicy, Static, Weights

# By `data.mixture.policy`: from the policy's own settings and the weights that the sources are given.
POLICIES: dict[str, Callable[[Any, Weights], MixturePolicy]] = {
    "static": lambda settings, initial: Static(initial),
    "excess": Excess.of,
    "divergence": Divergence.of,
    "ado": Ado.of,
    "influence": Influence.of,
}
