"""The attention service as one object: a `serving.service` of attention."""

from __future__ import annotations

import numpy as np

from attention_service.engine import AttentionEngine
from attention_service.settings import AttentionSettings
from serving.engine import Job
from serving.service import Service
from teacher_proto.attention import AttentionInfo, AttentionQuery, AttentionSpec
from teacher_proto.attention_targets import AttentionTargets


class AttentionService(Service[AttentionEngine, AttentionSettings, AttentionQuery, AttentionTargets]):
    """A `Service` of attention."""

    unit = "numbers in answers"

    def readiness_job(self) -> Job[AttentionQuery]:
        query = AttentionQuery(np.zeros(1, dtype=np.int64), AttentionSpec("states", 0))
        return Job(query, "readiness", urgent=True)

    def cost_of_longest(self) -> int:
        return self.engine.limits.max_entries + self.engine.limits.max_sequence_length

    def check_sound(self, query: AttentionQuery, answer: AttentionTargets) -> None:
        """Nothing is left to check: the model refuses what is not finite while it makes an answer."""

    def info(self) -> AttentionInfo:
        """What `GET /v1/teacher` answers."""
        engine = self.engine
        limits = engine.limits.model_copy(update={"max_cost": self.admission.max_cost})
        return AttentionInfo(
            identity=engine.identity, fingerprint=engine.identity.fingerprint, limits=limits, shape=engine.shape
        )
