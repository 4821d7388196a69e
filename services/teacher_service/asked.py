"""A checked request on its way through the house: who asks, what, and what it weighs. Made by `asking.py`."""

from __future__ import annotations

from dataclasses import dataclass

from teacher_proto.requests import TargetsRequest
from teacher_service.engine import Job


@dataclass(frozen=True)
class Asked:
    """A checked request with who asked it and under which id.

    `weight`: what its answer takes, of what our wire does. A `fresh` one is computed whatever answers are at hand, an
    `urgent` one goes past queue and admission.
    """

    request: TargetsRequest
    student: str
    request_id: str
    weight: int = 1
    fresh: bool = False
    urgent: bool = False

    def jobs(self) -> list[Job]:
        request, spec = self.request, self.request.spec
        gathered = request.gather_ids if "gather" in spec.kinds else None
        return [
            Job(
                tokens_T,
                request.row_range(i),
                spec,
                f"{self.request_id}-{i}",
                gathered[i] if gathered else None,
                urgent=self.urgent,
                fresh=self.fresh,
            )
            for i, tokens_T in enumerate(request.sequences)
        ]

    def values_per_token(self, hidden_width: int) -> int:
        """Numbers that an answer holds for a token, which with one more is what a permit counts."""
        return self.weight * (self.request.values_per_token(hidden_width) + 1) - 1
