"""What a request for targets is answered with, for `serving.replies` to write out. Used by `app.py` and `asking.py`."""

from __future__ import annotations

from functools import partial

from serving.replies import Reply
from teacher_proto import wire
from teacher_proto.targets import TokenTargets
from teacher_proto.wire_json import json_document
from teacher_service.asked import Asked
from teacher_service.engine import Job
from teacher_service.service import TeacherService


def reply_to(asked: Asked, service: TeacherService) -> Reply[Job, TokenTargets]:
    engine = service.engine
    spec, vocab_size = asked.request.spec, engine.limits.vocab_size
    header = wire.Header(
        request_id=asked.request_id, fingerprint=engine.identity.fingerprint,
        num_sequences=len(asked.request.sequences), vocab_size=vocab_size, top_k=spec.top_k,
        temperatures=tuple(spec.temperatures),
    )  # fmt: skip
    return Reply(
        permit=service.permit(asked), jobs=asked.jobs(), student=asked.student, header=wire.encode_header(header),
        encode=lambda index, targets: wire.encode_targets(index, targets, vocab_size),
        document=partial(json_document, header),
    )  # fmt: skip
