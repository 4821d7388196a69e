"""What a vLLM worker tells about itself, for the teacher's identity and head. Imported by vLLM in its workers.

Named by `VllmEngine` through vLLM's option `worker_extension_cls`, called through `collective_rpc`.
"""

from __future__ import annotations

from typing import Any


class TargetsWorker:
    """Mixed into vLLM's worker class; the names must not meet any of its own."""

    def stillhouse_describe(self: Any) -> dict[str, Any]:
        """Attention backends in use, and how logits follow from the head's product (soft cap, scale)."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        backends = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
        model = self.get_model()
        processor = getattr(model, "logits_processor", None)
        if processor is None and hasattr(model, "get_language_model"):  # beside a vision tower
            processor = getattr(model.get_language_model(), "logits_processor", None)
        return {
            "attention_backends": sorted(backends),
            "soft_cap": getattr(processor, "soft_cap", None),
            "scale": getattr(processor, "scale", 1.0),
        }
