"""The pooler inside vLLM, fed step by step as the scheduler would: chunks, preemption, mixed requests, dummy runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import TokenTargets
from teacher_proto.wire.packed import RowLayout, unpack_rows

pytestmark = pytest.mark.vllm
V, D = 300, 16
TOP_K = TargetSpec(kinds=("top_k", "score"), top_k=5, temperatures=(2.0,))
EVERYTHING = TargetSpec(kinds=("top_k", "gather", "sampled", "hidden"), top_k=3, num_samples=9, hidden_dtype="float16")


class Steps:
    """Requests in a pooler, and the steps that compute parts of them."""

    def __init__(self, sequences: list[np.ndarray], specs: list[TargetSpec], rows: list[tuple[int, int]] | None = None):
        from vllm.pooling_params import PoolingParams
        from vllm.v1.pool.metadata import PoolingStates

        from teacher_service.engines.vllm_adapter import TASK, TargetsPooler
        from teacher_service.engines.vllm_messages import arguments

        generator = torch.Generator().manual_seed(0)
        self.weight_VD = torch.randn((V, D), generator=generator)
        self.hidden = [torch.randn((len(s), D), generator=generator) for s in sequences]
        self.gather = [np.arange(4 * len(s)).reshape(-1, 4) % V for s in sequences]
        self.sequences, self.specs = sequences, specs
        self.rows = rows or [(0, len(s)) for s in sequences]
        self.products: list[int] = []
        self.pooler = TargetsPooler(self._logits, V, D)
        self.params = [
            PoolingParams(task=TASK, extra_kwargs=arguments(Query(tokens_T, cut, spec, gather[slice(*cut)]), i))
            for i, (tokens_T, spec, cut, gather) in enumerate(
                zip(sequences, specs, self.rows, self.gather, strict=True)
            )
        ]
        self.states = [PoolingStates() for _ in sequences]

    def _logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        self.products.append(len(hidden_ND))
        return hidden_ND @ self.weight_VD.T

    def step(self, *parts: tuple[int, int, int]) -> list[torch.Tensor | None]:
        """One step over (request, begin, end) parts."""
        from vllm.v1.pool.metadata import PoolingMetadata

        which = [i for i, _, _ in parts]
        lengths = torch.tensor([len(self.sequences[i]) for i in which])
        tokens = torch.full((len(which), int(lengths.max())), V)
        for row, i in enumerate(which):
            tokens[row, : lengths[row]] = torch.tensor(self.sequences[i])
        metadata = PoolingMetadata(
            prompt_lens=lengths, prompt_token_ids=None, prompt_token_ids_cpu=tokens,
            pooling_params=[self.params[i] for i in which], pooling_states=[self.states[i] for i in which],
        )  # fmt: skip
        counts = np.array([end - begin for _, begin, end in parts])
        metadata.build_pooling_cursor(counts, torch.tensor([end for _, _, end in parts]), torch.device("cpu"))
        hidden = torch.cat([self.hidden[i][begin:end] for i, begin, end in parts])
        return self.pooler(hidden, metadata)

    def record(self, i: int, packed: torch.Tensor | None) -> TokenTargets:
        assert packed is not None
        spec, start = self.specs[i], self.rows[i][0]
        layout = RowLayout(spec, V, 4 if "gather" in spec.kinds else 0, D if "hidden" in spec.kinds else 0)
        return unpack_rows(packed.numpy(), start, layout)


def sequences(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, V, length) for length in lengths]


def assert_equal(ours: TokenTargets, expected: TokenTargets) -> None:
    assert ours.start == expected.start and set(ours.tensors()) == set(expected.tensors())
    for name, array in ours.tensors().items():
        if name in ("lse", "log_z", "next_logprob", "logprobs", "gather_logprobs"):
            np.testing.assert_allclose(array, expected.tensors()[name], atol=2e-3, err_msg=name)
        else:
            np.testing.assert_array_equal(array, expected.tensors()[name], err_msg=name)


@pytest.mark.parametrize("spec", [TOP_K, EVERYTHING])
def test_chunks_make_the_record_of_one_step(spec: TargetSpec) -> None:
    one = Steps(sequences(50), [spec])
    [whole] = one.step((0, 0, 50))
    many = Steps(sequences(50), [spec])
    assert many.step((0, 0, 7)) == [None] and many.step((0, 7, 49)) == [None]
    [pieces] = many.step((0, 49, 50))
    assert_equal(many.record(0, pieces), one.record(0, whole))
    assert many.states[0].hidden_states_cache == []


def test_after_a_preemption_the_rows_come_once() -> None:
    steps = Steps(sequences(40), [TOP_K])
    [expected] = Steps(sequences(40), [TOP_K]).step((0, 0, 40))
    steps.step((0, 0, 16))
    steps.step((0, 16, 32))
    steps.step((0, 0, 16))  # it lost its cache and begins anew
    steps.step((0, 16, 32))
    [packed] = steps.step((0, 32, 40))
    assert_equal(steps.record(0, packed), steps.record(0, expected))


def test_requests_that_ask_alike_share_a_product_and_others_do_not() -> None:
    steps = Steps(sequences(30, 20, 10, 5), [TOP_K, TOP_K, EVERYTHING, TOP_K])
    outputs = steps.step((0, 0, 30), (1, 0, 10), (2, 0, 10), (3, 0, 5))
    assert steps.products == [45, 10] and outputs[1] is None
    for i, length in ((0, 30), (2, 10), (3, 5)):
        [alone] = Steps(sequences(30, 20, 10, 5), [TOP_K, TOP_K, EVERYTHING, TOP_K]).step((i, 0, length))
        assert_equal(steps.record(i, outputs[i]), steps.record(i, alone))


def test_only_the_rows_asked_for_go_through_the_head() -> None:
    whole = Steps(sequences(100), [EVERYTHING])
    expected = whole.record(0, whole.step((0, 0, 100))[0]).narrow(40, 60)
    cut = Steps(sequences(100), [EVERYTHING], [(40, 60)])
    assert cut.step((0, 0, 30)) == [None] and cut.step((0, 30, 55)) == [None]
    [packed] = cut.step((0, 55, 100))
    assert cut.products == [15, 5]
    assert_equal(cut.record(0, packed), expected)


def test_a_dummy_run_asks_for_the_most_and_a_too_large_k_is_clamped() -> None:
    """An exception here would end the engine."""
    steps = Steps(sequences(10, 6), [TOP_K, TargetSpec(kinds=("top_k",), top_k=V + 1)])
    steps.params[0].extra_kwargs = None
    dummy, clamped = steps.step((0, 0, 10), (1, 0, 6))
    assert dummy is not None and len(dummy) == 10 and dummy.shape[1] > 256 * 4 + 64 * 2 + D * 2
    assert clamped is not None and clamped.shape == (6, V * 4 + 8)


def test_a_rank_without_logits_returns_nothing_and_lives() -> None:
    steps = Steps(sequences(10), [TOP_K])
    steps.pooler.compute_logits = lambda hidden_ND: None
    [packed] = steps.step((0, 0, 10))
    assert packed is not None and packed.numel() == 0


def test_what_is_asked_survives_vllm_s_own_messages() -> None:
    import msgspec

    from teacher_service.engines.vllm_messages import arguments

    key = -(2**63)
    asked: dict[str, Any] = arguments(Query(np.arange(12), (3, 9), EVERYTHING, np.arange(24).reshape(6, 4)), key)
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(asked))
    assert back["sample_key"] == key and back["gather_ids"] == np.arange(24, dtype="<i4").tobytes()
    steps = Steps(sequences(12), [EVERYTHING], [(3, 9)])
    steps.params[0].extra_kwargs = back | {"sample_key": 0}
    direct = Steps(sequences(12), [EVERYTHING], [(3, 9)])
    for one in (steps, direct):
        one.gather[0] = np.arange(48).reshape(12, 4)
    direct.params[0].extra_kwargs = asked | {"sample_key": 0}
    [ours], [expected] = steps.step((0, 0, 12)), direct.step((0, 0, 12))
    assert ours is not None and expected is not None and torch.equal(ours, expected)
