"""What a vLLM worker reports about itself, for the teacher's identity and head. Imported by vLLM in its workers.

Named in `vllm_options.py` through vLLM's option `worker_extension_cls`; `vllm_process.py` calls it by `collective_rpc`.
"""

from __future__ import annotations

from typing import Any

import torch


class TargetsWorker:
    """Mixed into vLLM's worker class; the names here must not clash with those of that class."""

    def stillhouse_describe(self: Any) -> dict[str, Any]:
        """Attention backends in use, how logits follow from the head's product (soft cap, scale), and whether ranks
        share its rows."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        backends = {layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")}
        model, config = self.get_model(), self.vllm_config.model_config
        processor = getattr(model, "logits_processor", None)
        if processor is None and hasattr(model, "get_language_model"):  # a model with a vision tower
            processor = getattr(model.get_language_model(), "logits_processor", None)
        return {
            "attention_backends": sorted(backends),
            "soft_cap": getattr(processor, "soft_cap", None),
            "scale": getattr(processor, "scale", 1.0),
            "shares_rows": model.pooler.shares_rows(
                torch.empty((0, config.get_hidden_size()), dtype=config.dtype, device=self.device)
            ),
        }
