"""What the trainer does otherwise on a GPU, where a line decides it: both sides, on a CPU."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save

from student_trainer.batch.teacher_rows import TeacherRows
from student_trainer.losses.chunks import CPU_CHUNK_ELEMENTS, GPU_CHUNK_ELEMENTS, default_chunk_rows
from student_trainer.optim import logit_tiles
from student_trainer.ranks import ALONE
from student_trainer.settings import Settings, StudentSettings
from student_trainer.students import compute
from student_trainer.students.causal import attention_for
from student_trainer.targets.open import read_head
from teacher_proto import hardware

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def test_a_chunk_is_as_tall_as_the_device_s_memory_allows_and_never_low() -> None:
    assert default_chunk_rows(2**15, CPU) == CPU_CHUNK_ELEMENTS // 2**15
    assert default_chunk_rows(2**15, GPU) == GPU_CHUNK_ELEMENTS // 2**15 > default_chunk_rows(2**15, CPU)
    assert default_chunk_rows(2**30, CPU) == default_chunk_rows(2**30, GPU) == 256


def test_attention_is_flex_on_a_gpu_and_sdpa_elsewhere_unless_it_is_named() -> None:
    assert attention_for(StudentSettings(), GPU) == "flex" and attention_for(StudentSettings(), CPU) == "sdpa"
    for name in ("flex", "sdpa"):
        assert attention_for(StudentSettings(attention=name), GPU) == name  # type: ignore[arg-type]
        assert attention_for(StudentSettings(attention=name), CPU) == name  # type: ignore[arg-type]


def test_a_teacher_s_head_is_float32_on_a_cpu_and_keeps_its_dtype_elsewhere() -> None:
    file = save({"weight": torch.ones(4, 3, dtype=torch.bfloat16), "scale": torch.tensor(2.0)})
    assert read_head(file, CPU).weight_VD.dtype == torch.float32
    assert read_head(file, torch.device("meta")).weight_VD.dtype == torch.bfloat16


def test_the_widest_row_of_draws_is_looked_up_only_where_nothing_is_waited_for() -> None:
    rows = TeacherRows(
        sampled_offsets=torch.tensor([0, 2, 5]), sampled_ids=torch.arange(5), sampled_counts=torch.ones(5)
    )
    assert rows.to("meta").sampled_width == 3
    elsewhere = TeacherRows(**{name: value.to("meta") for name, value in vars(rows).items()
                               if isinstance(value, torch.Tensor)})  # fmt: skip
    assert elsewhere.to("meta").sampled_width is None


def test_logits_are_looked_at_in_tiles_of_any_device_s_size_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logit_tiles, "LEAST_ROWS", 7)
    query, key = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8)

    def largest() -> torch.Tensor:
        visibility = logit_tiles.Visibility(None, True, None, 50, CPU)
        return logit_tiles.largest_logits(query, key, visibility, 0.5)

    here = largest()
    monkeypatch.setattr(logit_tiles, "TILE_BYTES", {})  # a device that is in no table
    torch.testing.assert_close(largest(), here)


def test_the_start_names_the_device_that_the_student_computes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a card, {device.index}")
    monkeypatch.setattr(hardware, "_computes", lambda dtype, device: True)
    with caplog.at_level(logging.INFO, "student_trainer"):
        compute.name_compute(Settings(), GPU, ALONE)
        compute.name_compute(Settings(), CPU, ALONE)
    assert "in bfloat16 on cuda:1 (a card, 1)" in caplog.text and f"on cpu ({hardware.cpu_name()})" in caplog.text
