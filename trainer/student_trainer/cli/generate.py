"""Generates text with a student: `stillhouse-train generate FOLDER --prompt TEXT`. Called by `main`, and by scripts:

    writer = Writer.load("runs/diffusion/exports/hf")
    writer.write(["Once upon a time"], new_tokens=64)[0].text

FOLDER is a run, or its export of format hf. A block-diffusion student fills in block by block, several tokens per
forward pass; any other student writes from left to right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from student_trainer.checkpoint.earlier_run import earlier_run, load_student, model_behind, recognised, settings_of
from student_trainer.data.tokenise import pad_id
from student_trainer.rollouts.open import sampler_of
from student_trainer.rollouts.sampler import Passes, ends_of_text
from student_trainer.settings import DiffusionSettings, Settings, StudentSettings
from student_trainer.settings.student import AUTO
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.student import Student


@dataclass(frozen=True)
class Written:
    """The continuation of a prompt. `ended`: by an end-of-text token. `passes`: for block-diffusion students."""

    prompt: str
    text: str
    tokens: int
    ended: bool
    passes: Passes | None = None


@dataclass(frozen=True, eq=False)
class Writer:
    """A student with its tokenizer, ready to generate text."""

    student: Student
    tokenizer: Any

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu", compute: str = "auto") -> Writer:
        """From the folder of a run or of an export. ValueError for a folder without a student."""
        settings = _settings_in(str(folder)).model_copy(update={"compute": compute})
        behind = model_behind(settings)
        name = behind.tokenizer or behind.checkpoint_path
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"no tokenizer in {name}: {str(error).strip().splitlines()[0]}") from None
        return cls(load_student(settings, torch.device(device)), tokenizer)

    def write(
        self, prompts: Sequence[str], *, new_tokens: int = 128, temperature: float = 0.0,
        threshold: float | None = None, seed: int = 0, meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Written]:  # fmt: skip
        """At most `new_tokens` tokens after each prompt, up to an end of text. Temperature 0 is greedy. `threshold`:
        a block-diffusion student writes all tokens more likely than this in one step; None: the setting of its run, 0.9
        for an export.
        """
        ids = [np.array(self.tokenizer(prompt)["input_ids"], np.int32) for prompt in prompts]
        for prompt, ids_N in zip(prompts, ids, strict=True):
            if not len(ids_N):
                raise ValueError(f"the prompt {prompt!r} has no tokens: give a prompt with at least one token")
        student = self._sure_above(threshold)
        sampler = sampler_of(student, ends_of_text(student, self.tokenizer), pad_id(self.tokenizer))
        assert sampler is not None, "whatever can be loaded can write"
        seeds = [seed + row for row in range(len(ids))] if temperature > 0 else None
        samples = sampler.sample(ids, seeds, new_tokens=new_tokens, temperature=temperature or 1.0, meanwhile=meanwhile)
        return [
            Written(prompt, self._text(sample.ids_N), len(sample.ids_N), sample.ended, sample.passes)
            for prompt, sample in zip(prompts, samples, strict=True)
        ]  # fmt: skip

    def _text(self, ids_N: np.ndarray) -> str:
        return str(self.tokenizer.decode(ids_N.tolist()))

    def _sure_above(self, threshold: float | None) -> Student:
        if threshold is None:
            return self.student
        if not isinstance(self.student.reader, DiffusionReader):
            raise ValueError("--threshold is for block-diffusion students, but this one generates from left to right")
        return replace(self.student, reader=replace(self.student.reader, threshold=threshold))


def _settings_in(folder: str) -> StudentSettings:
    """The settings to load the student in a folder: architecture, quantiser and, of a run, its threshold."""
    snapshot = earlier_run(folder)
    sure = {} if snapshot is None else {"threshold": settings_of(snapshot).diffusion.threshold}
    student = StudentSettings(
        architecture=AUTO, quantiser=AUTO, checkpoint_path=folder, attention="sdpa",
        diffusion=DiffusionSettings(**sure),
    )  # fmt: skip
    return recognised(Settings(student=student)).student


def main(arguments: Sequence[str]) -> int:
    """Print the continuation of each prompt."""
    options = _parser().parse_args(arguments)
    writer = Writer.load(options.folder, options.device)
    written = writer.write(
        options.prompt, new_tokens=options.new_tokens, temperature=options.temperature, threshold=options.threshold,
        seed=options.seed,
    )  # fmt: skip
    for one in written:
        print(json.dumps(_as_json(one)) if options.json else _as_text(one))
    return 0


def _as_json(one: Written) -> dict[str, Any]:
    return {**vars(one), "passes": None if one.passes is None else vars(one.passes)}


def _as_text(one: Written) -> str:
    lines = [f"{one.prompt} ▸ {one.text}"]
    if one.passes is not None:
        took = one.passes
        rate = one.tokens / max(1, took.writing)
        lines.append(
            f"  {one.tokens} tokens, {rate:.2f} per forward pass: {took.denoising} to denoise blocks, "
            f"{took.commit} over completed blocks; those over the prompt ({took.prefill}) are not counted"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stillhouse-train generate", description="Generate text with a student.")
    parser.add_argument("folder", metavar="FOLDER", help="folder of a run, or of its export of format hf")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; may be given several times")
    parser.add_argument("--new-tokens", type=int, default=128, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="sampling temperature; 0: greedy (default)")
    parser.add_argument(
        "--threshold", type=float,
        help="block-diffusion students: all tokens more likely than this are written in a step; 1: one token per step",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    return parser
