"""The engine of the attention service: the truncated model in a thread, batching, and the check against its teacher.

`app.py` sees nothing else of the model. torch and transformers are imported when it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attention_service.settings import AttentionSettings
from serving.engine import Job
from serving.logs import stage
from serving.scheduling.batches import Batches
from teacher_proto.attention import AttentionLimits, AttentionQuery, AttentionShape
from teacher_proto.attention_targets import AttentionTargets
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.errors import StillhouseError
from teacher_proto.identity import NumericIdentity, TeacherIdentity
from teacher_proto.model_files import find_model, hash_files, identify

if TYPE_CHECKING:
    from attention_service.model import AttentionModel

_DEFAULT_MAX_LENGTH = 2048
# A teacher that starts at the same time takes minutes to load.
_TEACHER_WAIT_S = 900.0


class AttentionEngine:
    """A `serving.engine.AnyEngine` that computes attention. `shape` is known once `start` has returned."""

    identity: TeacherIdentity
    limits: AttentionLimits
    shape: AttentionShape

    def __init__(self, settings: AttentionSettings):
        self._settings = settings
        self._teacher: TeacherIdentity | None = None
        self._model: AttentionModel | None = None
        self._batches: Batches[AttentionQuery, AttentionTargets] = Batches(
            "attention engine", self._compute, settings.max_batch_tokens
        )

    async def start(self) -> None:
        """Load the model. ValueError if it can't be served, or is not the model of the teacher at --teacher-url."""
        if self._settings.teacher_url is not None:
            with stage("teacher's identity received"):
                self._teacher = await self._ask_teacher(self._settings.teacher_url)
        await self._batches.start(self._load)

    @property
    def tokens_computed(self) -> int:
        return self._batches.tokens_computed

    async def score(self, job: Job[AttentionQuery]) -> AttentionTargets:
        """The attention of a job. A job that is cancelled while it waits is never computed."""
        return await self._batches.answer(job)

    async def check(self) -> None:
        self._batches.check()

    async def close(self) -> None:
        """Wait for the running forward pass, fail the jobs that wait, release the memory."""
        await self._batches.close()
        self._model = None

    def _compute(self, queries: Sequence[AttentionQuery]) -> list[AttentionTargets]:
        assert self._model is not None
        return self._model.attend(queries)

    async def _ask_teacher(self, url: str) -> TeacherIdentity:
        key = self._settings.teacher_key
        async with TeacherClient(url, key=key.get_secret_value() if key is not None else None) as client:
            try:
                return (await client.teacher(_TEACHER_WAIT_S)).identity
            except StillhouseError as error:
                raise ValueError(f"--teacher-url: {error}") from None

    def _load(self) -> None:
        with stage("torch and transformers imported"):
            import transformers

            from attention_service.model import AttentionModel

        settings, teacher = self._settings, self._teacher
        name, dtype = settings.name, settings.dtype
        if teacher is not None:
            name = name or teacher.semantic.model
            dtype = teacher.semantic.dtype if dtype == "auto" else dtype
        with stage("model found"):
            folder = find_model(settings.model, revision=settings.revision, name=name)
        with stage("weights loaded, first pass"):
            model = AttentionModel(folder, dtype=dtype, device=settings.device, highest_layer=settings.highest_layer)
        longest = settings.max_model_len or model.max_positions or _DEFAULT_MAX_LENGTH
        self.limits = AttentionLimits(
            vocab_size=model.vocab_size,
            max_sequence_length=min(longest, model.max_positions or longest),
            max_entries=settings.max_entries,
        )
        numeric = NumericIdentity(
            engine="transformers attention", engine_version=transformers.__version__, device=model.device_name,
            parallel="1", attention_backend=model.attention,
        )  # fmt: skip
        with stage("weights hashed"):
            hashes = hash_files(folder.weight_files)
        self.identity = identify(
            folder, hashes, dtype=str(model.dtype).removeprefix("torch."),
            quantization=(folder.config.get("quantization_config") or {}).get("quant_method"),
            vocab_size=model.vocab_size, numeric=numeric, options=_shared_options(teacher),
        )  # fmt: skip
        if teacher is not None:
            self._require_same_model(teacher)
        self._model, self.shape = model, model.shape

    def _require_same_model(self, teacher: TeacherIdentity) -> None:
        lines = [line for line in self.identity.difference(teacher) if line.startswith("semantic.")]
        if lines:
            raise ValueError(
                f"--teacher-url {self._settings.teacher_url}: that teacher serves another model: "
                f"{'; '.join(lines)}; start this service with the same MODEL, --revision, --name and --dtype"
            )


def _shared_options(teacher: TeacherIdentity | None) -> dict[str, str]:
    """Those options of the teacher's engine that a plain forward pass does not have but that leave the model unchanged:
    how the KV cache is stored. Any other (another RoPE) makes another model, whose attention is not served here."""
    options = teacher.semantic.options if teacher is not None else {}
    return {name: value for name, value in options.items() if name.startswith("kv_cache_dtype")}
