"""A training loop of your own on a served teacher: plain torch, a transformers student, our client for the targets.

    python examples/torch_loop.py http://localhost:8000 HuggingFaceTB/SmolLM2-135M 'corpus/*.txt' --steps 20

The loss is KL(teacher || student) at temperature T on the teacher's top K, with everything else as one bucket.
"""

from __future__ import annotations

import argparse
import glob
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from teacher_proto.client.sync_client import SyncTeacherClient
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TokenTargets


def bucket_kl(logits_NV: torch.Tensor, targets: list[TokenTargets], temperature: float) -> torch.Tensor:
    """Mean KL in nats per token over K + 1 buckets, times T^2. `logits_NV`: the rows of all targets, in their order."""
    ids_NK = torch.cat([torch.from_numpy(target.ids.astype("int64")) for target in targets])
    p_NK = torch.cat([torch.from_numpy(target.probabilities(0, temperature)) for target in targets])
    log_q_NK = (logits_NV.float() / temperature).log_softmax(-1).gather(-1, ids_NK.to(logits_NV.device))
    p_NK = p_NK.to(logits_NV.device)
    # Rounding to fp16 may bring the K probabilities a little above 1.
    p_tail_N = (1 - p_NK.sum(-1)).clamp(min=0)
    log_q_tail_N = torch.log1p(-log_q_NK.exp().sum(-1).clamp(max=1 - 1e-6))
    head_N = (torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(-1)
    tail_N = torch.xlogy(p_tail_N, p_tail_N) - p_tail_N * log_q_tail_N
    return (head_N + tail_N).mean() * temperature**2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("url")
    parser.add_argument("student")
    parser.add_argument("text", help="glob pattern of text files")
    for name, value in (("steps", 20), ("rows", 4), ("length", 128), ("top-k", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--temperature", type=float, default=2.0)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.student)
    student = AutoModelForCausalLM.from_pretrained(options.student, dtype=torch.float32)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    text = "\n".join(Path(name).read_text() for name in sorted(glob.glob(options.text)))  # noqa: PTH207 - a pattern
    tokens = torch.tensor(tokenizer(text).input_ids)
    rows_NL = tokens[: len(tokens) // options.length * options.length].view(-1, options.length)

    with SyncTeacherClient(options.url) as teacher:
        print(f"taught by {teacher.teacher().identity.semantic.model}")
        for step in range(options.steps):
            first = step * options.rows % max(1, len(rows_NL) - options.rows + 1)
            batch_BL = rows_NL[first : first + options.rows]
            targets = teacher.targets(TargetsRequest(
                sequences=batch_BL.tolist(), top_k=options.top_k, temperatures=[options.temperature]))  # fmt: skip
            loss = bucket_kl(student(batch_BL).logits.flatten(0, 1), targets, options.temperature)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step + 1}: {loss.item():.4f}")


if __name__ == "__main__":
    main()
