"""What the transformers engine does when things go wrong or come together."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from teacher_proto import hardware
from teacher_proto.compute import hf_model
from teacher_proto.compute.head import HeadScaling
from teacher_proto.errors import EngineDeadError, EngineError, EngineMemoryError
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import TokenTargets
from teacher_service.engines.hf import HfEngine
from tests.contract.engine_cases import job, sequences_of

TOP_K = TargetSpec(kinds=("top_k",), top_k=8)
POISON = 7


@pytest_asyncio.fixture
async def engine(tiny_llama: Path) -> AsyncIterator[HfEngine]:
    engine = HfEngine(str(tiny_llama), max_batch_tokens=600)
    await engine.start()
    yield engine
    await engine.close()


def watch(engine: HfEngine, fail: Callable[[Sequence[Query]], None] = lambda queries: None) -> list[list[int]]:
    """Lengths of each batch that the engine computes from now on; `fail` may raise for one."""
    assert engine._model is not None
    batches: list[list[int]] = []
    score = engine._model.score

    def watched(queries: Sequence[Query]) -> list[np.ndarray]:
        batches.append([len(one.tokens_T) for one in queries])
        fail(queries)
        return score(queries)

    engine._model.score = watched  # type: ignore[method-assign]
    return batches


async def test_sequences_of_like_length_go_together(engine: HfEngine) -> None:
    batches = watch(engine)
    lengths = [100, 10, 90, 80, 500, 11, 74, 9, 101]
    await asyncio.gather(*(engine.score(job(tokens_T, TOP_K)) for tokens_T in sequences_of(lengths, 512)))
    assert sorted(length for batch in batches for length in batch) == sorted(lengths)
    assert [sorted(batch) for batch in batches] == [[80, 90, 100, 101], [9, 10, 11], [500], [74]]
    assert all(max(batch) * len(batch) <= 600 and min(batch) >= 0.75 * max(batch) for batch in batches)


async def test_padding_changes_nothing_beyond_rounding(engine: HfEngine) -> None:
    sequences = sequences_of([40, 33, 39, 31], 512)
    batches = watch(engine)
    together = await asyncio.gather(*(engine.score(job(tokens_T, TOP_K)) for tokens_T in sequences))
    assert [len(batch) for batch in batches] == [4]
    for tokens_T, targets in zip(sequences, together, strict=True):
        alone = await engine.score(job(tokens_T, TOP_K))
        np.testing.assert_allclose(targets.lse, alone.lse, atol=1e-5)
        np.testing.assert_array_equal(targets.ids, alone.ids)


async def test_a_job_cancelled_while_it_waits_is_never_computed(engine: HfEngine) -> None:
    batches = watch(engine)
    first = asyncio.create_task(engine.score(job(*(sequences_of([500], 512)), TOP_K)))
    waiting = asyncio.create_task(engine.score(job(*(sequences_of([20], 512)), TOP_K)))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(first, waiting, return_exceptions=True)
    await engine.score(job(*(sequences_of([30], 512)), TOP_K))
    assert batches == [[500], [30]]


async def test_one_bad_job_fails_alone(engine: HfEngine) -> None:
    def fail(queries: Sequence[Query]) -> None:
        if any((one.tokens_T == POISON).any() for one in queries):
            raise RuntimeError("this token is poison")

    watch(engine, fail)
    good, bad = np.arange(8, 40), np.append(np.arange(8, 38), POISON)
    results = await asyncio.gather(
        *(engine.score(job(t, TOP_K)) for t in (good, bad, good + 1)), return_exceptions=True
    )
    assert [type(result).__name__ for result in results] == ["TokenTargets", "EngineError", "TokenTargets"]
    assert "poison" in str(results[1])
    await engine.check()


async def test_out_of_memory_says_so(engine: HfEngine) -> None:
    def fail(queries: Sequence[Query]) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    watch(engine, fail)
    with pytest.raises(EngineMemoryError, match="80 GiB") as caught:
        await engine.score(job(np.arange(5), TOP_K))
    assert caught.value.retryable


async def test_closing_ends_what_waits_and_what_comes(engine: HfEngine) -> None:
    tasks = [asyncio.create_task(engine.score(job(tokens_T, TOP_K))) for tokens_T in sequences_of([500] * 5, 512)]
    await asyncio.sleep(0)
    await engine.close()
    await engine.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, EngineDeadError) for result in results)
    with pytest.raises(EngineDeadError, match="closed"):
        await engine.score(job(np.arange(5), TOP_K))


async def test_an_unforeseen_failure_kills_the_engine_and_hangs_nobody(engine: HfEngine) -> None:
    def fail(queries: Sequence[Query]) -> None:
        raise KeyError("a fault of ours")

    watch(engine, fail)
    tasks = [engine.score(job(tokens_T, TOP_K)) for tokens_T in sequences_of([10, 500], 512)]
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, EngineDeadError) for result in results)
    with pytest.raises(EngineDeadError, match="a fault of ours"):
        await engine.check()


async def test_nan_in_the_weights_is_an_error_of_the_sequences_that_meet_it(tiny_llama: Path, tmp_path: Path) -> None:
    """Masked attention weights are 0, and 0 times NaN is NaN: the rows before the token are lost as well."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][300] = torch.nan

    engine = HfEngine(str(spoil(tiny_llama, tmp_path / "spoilt", change)))
    await engine.start()
    good, bad = np.arange(20), np.append(np.arange(19), 300)
    answers = await asyncio.gather(
        engine.score(job(good, TOP_K)), engine.score(job(bad, TOP_K)), return_exceptions=True
    )
    assert isinstance(answers[0], TokenTargets) and answers[0].num_rows == 20
    assert isinstance(answers[1], EngineError) and not answers[1].retryable
    assert "lse that is not finite, first at position" in str(answers[1])
    await engine.close()


async def test_a_head_that_does_more_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_model, "scaling_of", lambda config: HeadScaling(scale=2.0))
    with pytest.raises(ValueError, match="can't be served by the hf engine"):
        await HfEngine(str(tiny_llama)).start()


async def test_a_quantised_head_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = hf_model._load

    def quantised(*arguments: Any) -> Any:
        model = load(*arguments)
        weight = model.lm_head.weight.data.to(torch.int8)
        model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
        return model

    monkeypatch.setattr(hf_model, "_load", quantised)
    with pytest.raises(ValueError, match=r"a Linear, has a weight of torch.int8 \(512, 64\): a quantised head"):
        await HfEngine(str(tiny_llama)).start()


async def test_logits_are_float32_where_a_device_sums_in_it(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU's product: bf16 in, float32 out. Without it logits are rounded to bf16."""
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype) @ b.to(out_dtype))
    hidden_ND = torch.randn(30, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for wide in (True, False):
        monkeypatch.setattr(hardware, "sums_in_float32", lambda device, answer=wide: answer)
        engine = HfEngine(str(tiny_llama), dtype="bfloat16")
        await engine.start()
        assert engine._model is not None
        logits_NV = engine._model.compute_logits(hidden_ND)
        exact_NV = hidden_ND.float() @ engine._model.head()["weight"].float().T
        torch.testing.assert_close(logits_NV.float(), exact_NV, rtol=1e-6 if wide else 2**-8, atol=1e-5)
        assert logits_NV.dtype == (torch.float32 if wide else torch.bfloat16)
        assert engine.identity.numeric.device == ("cpu, head in float32" if wide else "cpu")
        assert (await engine.score(job(np.arange(30), TOP_K))).num_rows == 30
        await engine.close()


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"), "no \\*.safetensors"),
        (lambda folder: change_config(folder, {"model_type": "still"}), "transformers cannot load"),
    ],
)
async def test_what_is_no_model_is_refused_in_words(
    tiny_llama: Path, tmp_path: Path, break_it: Callable[[Path], Any], message: str
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "copy"))
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        await HfEngine(str(folder)).start()


def spoil(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def change_config(folder: Path, changes: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
