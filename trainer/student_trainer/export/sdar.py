"""A diffusion student as a folder in SDAR's form, which SGLang serves. A format of `export`.

The form is Qwen3's config keys and weight names plus blocks and a mask token. SGLang reads less of a folder than it
seems to, and does not report what it ignores. So every student that it would compute differently is refused here, with
the reason:

- the architecture's name alone determines the mask token, 151669, whatever the config says;
- it always builds norms of queries and keys, and does not report missing weights for them;
- it looks for the head under its own name even if it is tied to the embeddings, so the head is written out;
- it looks for the rotary base only in `rope_theta`, and otherwise uses 10,000;
- it reads prompts block by block, with each token seeing its whole block, and predicts a token in its own row.

`configuration_sdar.py` and `modeling_sdar.py`, templates beside this file, are written into the folder. SGLang needs
the first besides the weights; the second computes a pass over whole blocks, on any device.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from student_trainer.export.card import ModelCard, write_card
from student_trainer.export.expression import CannotExpressError, latent_weights
from student_trainer.export.folder import ExportReport, fresh_folder, size_of
from student_trainer.export.mask_token import with_mask_token
from student_trainer.students.adapters.low_rank import corrections
from student_trainer.students.diffusion_record import DiffusionRecord, read_diffusion
from student_trainer.students.quant_linear import is_quantised
from student_trainer.students.quantisers.none import NONE

MASK = 151669
BLOCK = 4  # SGLang's default
THRESHOLD = 0.95
SAMPLER_FILE = "sglang_low_confidence.yaml"
TEMPLATES = ("configuration_sdar.py", "modeling_sdar.py")
# The entries of Qwen3's config that SDAR's has under the same name.
KEPT = (
    "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "max_window_layers", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "sliding_window", "use_cache", "use_sliding_window",
    "vocab_size",
)  # fmt: skip
_SERVE_SDAR = """```sh
python -m sglang.launch_server --model-path FOLDER --trust-remote-code --dllm-algorithm LowConfidence \\
    --dllm-algorithm-config FOLDER/{file} --max-running-requests 16
```

`--trust-remote-code` is for `configuration_sdar.py` of this folder. One GPU: no pipeline parallelism, no LoRA. Without
`--max-running-requests` it serves one request at a time, and it is greedy whatever temperature is requested."""
_SDAR_NOTE = (
    "The files follow SDAR's form as SGLang 0.5.23 reads it, but have not been tested by serving them with SGLang. In "
    "transformers, `trust_remote_code` loads `modeling_sdar.py`: forward passes over complete texts, no generation."
)


def export_sdar(model: Any, tokenizer: Any, folder: Path, card: ModelCard) -> ExportReport:
    """Write a block-diffusion student in SDAR's form. CannotExpressError lists every reason why it can't be written."""
    record = check_sdar(model, tokenizer)
    with fresh_folder(folder) as unfinished:
        write_sdar(model, tokenizer, unfinished, record)
        what = "A block-diffusion model in SDAR's form: Qwen3's weights, which fill in masked tokens block by block."
        write_card(card, unfinished / "README.md", library="transformers", what=what,
                   loading=_SERVE_SDAR.format(file=SAMPLER_FILE), notes=(_SDAR_NOTE,), quantiser=NONE,
                   bits=None)  # fmt: skip
    return ExportReport("sdar", folder, "SDARForCausalLM", True, size_of(folder), (_SDAR_NOTE,))


def check_sdar(model: Any, tokenizer: Any) -> DiffusionRecord:
    """The student's diffusion record. CannotExpressError lists every reason why SGLang would compute something else."""
    record, config = read_diffusion(model.config), model.config
    if record is None:
        raise CannotExpressError("SDAR's form", ["the student reads from left to right, not by blocks"])
    reasons = []
    if is_quantised(model):
        reasons.append("its weights are quantised in each forward pass")
    elif corrections(model):
        reasons.append("it has an adapter that is not merged into its weights")
    if config.model_type != "qwen3":
        reasons.append(f"it is a {config.model_type} model, not Qwen3 with norms of queries and keys")
    elif set(config.layer_types or ()) - {"full_attention"} or config.use_sliding_window:
        reasons.append("some of its layers use sliding-window attention")
    if (rope := _rope(config)).get("rope_type", "default") != "default":
        reasons.append(f"its rotary positions are of type {rope['rope_type']}")
    if record.family != "in_place":
        reasons.append(f"student.diffusion.family is {record.family}, in SDAR a row predicts its own token")
    if record.clean_half != "block_causal" and record.block_size > 1:
        reasons.append(f"student.diffusion.clean_half is {record.clean_half}, in SDAR a prompt's token sees its block")
    if record.mask_token_id != MASK:
        reasons.append(
            f"its mask token is {record.mask_token_id}, SDAR's is {MASK}: set student.diffusion.mask_token_id={MASK}"
        )
    elif tokenizer is not None and (why := with_mask_token(tokenizer, MASK)[1]):
        reasons.append(f"its tokenizer cannot name the mask token: {why}")
    if reasons:
        raise CannotExpressError("SDAR's form", reasons)
    return record


def sdar_config(model: Any, record: DiffusionRecord) -> dict[str, Any]:
    """The content of config.json, with SDAR's fields only."""
    ours = model.config.to_dict()
    config = {name: ours[name] for name in KEPT}
    ends = config["eos_token_id"]
    first = ends[0] if isinstance(ends, list) else ends
    return {
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "model_type": "sdar",
        **config,
        "block_size": record.block_size,
        "mask_token_id": record.mask_token_id,
        "pad_token_id": first if model.config.pad_token_id is None else model.config.pad_token_id,
        "rope_scaling": None,
        "rope_theta": _rope(model.config)["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip


def sdar_weights(model: Any) -> dict[str, Tensor]:
    """The weights under Qwen3's names, with the head as a separate tensor whether it is tied or not."""
    return {**latent_weights(model), "lm_head.weight": model.get_output_embeddings().weight.detach().clone()}


def write_sdar(model: Any, tokenizer: Any, folder: Path, record: DiffusionRecord) -> None:
    """Write everything in the folder except its card."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict({name: tensor.contiguous() for name, tensor in sdar_weights(model).items()}, folder)
    (folder / "config.json").write_text(json.dumps(sdar_config(model, record), indent=2))
    for name in TEMPLATES:
        (folder / name).write_text(Path(__file__).with_name(f"{name}.txt").read_text())
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        with_mask_token(tokenizer, record.mask_token_id)[0].save_pretrained(folder)
    (folder / SAMPLER_FILE).write_text(f"threshold: {THRESHOLD}\nblock_size: {record.block_size}\n")


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})
