"""Resume is exact: stopped before any batch, amid new weights or at the edge of an epoch, a run goes on with the same
batches as one that was never stopped. And whatever the settings, no token is lost, doubled or misplaced.
"""

import json
from collections import Counter
from typing import Any

import fsspec
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from student_trainer.batch.batch import Batch
from student_trainer.data.loader import BatchSource
from student_trainer.data.mixture import MixtureState
from student_trainer.settings.data import DataSettings, SourceSettings
from tests.unit.data.making import inline, opened, same, tokenizer

QUICK = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any)


def documents(words: list[int], salt: int) -> list[str]:
    return [f"{salt}{'x' * (i % 3)} " + "still " * count if count else "" for i, count in enumerate(words)]


def streamed(texts: list[str], shards: int) -> SourceSettings:
    """The same texts as a stream of JSON lines in memory."""
    paths = []
    for shard in range(shards):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[shard::shards])
        path = f"memory://property/{hash(lines)}.jsonl"
        with fsspec.open(path, "wb") as file:
            file.write(lines.encode())
        paths.append(path)
    return SourceSettings(kind="jsonl", path=tuple(paths), streaming=True, held_out_fraction=0)


@st.composite
def data_settings(draw: st.DrawFn) -> DataSettings:
    sources = {}
    for name in ("a", "b", "c")[: draw(st.integers(1, 3))]:
        texts = documents(draw(lengths), ord(name))
        if draw(st.booleans()):
            source = streamed(texts, draw(st.integers(1, 3)))
        else:
            source = inline(texts, shuffle=draw(st.booleans()))
        sources[name] = source.model_copy(update={"weight": draw(st.sampled_from([0.1, 1, 3]))})
    return DataSettings(
        sources=sources,
        seq_len=draw(st.integers(3, 40)),
        rows=draw(st.integers(1, 4)),
        packing=draw(st.sampled_from(["best_fit", "wrapped", "none"])),
        packing_window=draw(st.integers(1, 6)),
        interleave=draw(st.integers(1, 5)),
        add_bos=draw(st.booleans()),
        workers=draw(st.integers(1, 2)),
        batches_ahead=draw(st.sampled_from([1, 16])),
    )


def go(source: BatchSource, state: MixtureState, stop: int, weights: dict[int, dict[str, float]]) -> Any:
    """Batches up to `stop`, with new weights before the batches that `weights` names; and all states."""
    batches: list[Batch] = []
    states = [state]
    while state.number < stop:
        if state.number in weights:
            state = state.with_weights(weights[state.number])
        batch, state = source.batch(state, state.number)
        batches.append(batch)
        states.append(state)
    return batches, states


@settings(max_examples=500, **QUICK)
@given(data=st.data(), config=data_settings(), seed=st.integers(0, 3))
def test_a_stopped_run_goes_on_as_one_that_was_not(data: st.DataObject, config: DataSettings, seed: int) -> None:
    length = data.draw(st.integers(2, 14), "length")
    shares = st.fixed_dictionaries({name: st.floats(0.05, 5) for name in config.sources})
    weights = data.draw(st.dictionaries(st.integers(0, length - 1), shares, max_size=3), "weights")
    stop = data.draw(st.integers(0, length - 1), "stop")
    with opened(config, seed) as source:
        batches, states = go(source, source.initial_state(), length, weights)
    saved = json.dumps(states[stop].to_json())
    with opened(config, seed) as source:
        resumed, resumed_states = go(source, MixtureState.from_json(json.loads(saved)), length, weights)
    assert len(resumed) == length - stop
    assert all(same(a, b) for a, b in zip(resumed, batches[stop:], strict=True))
    assert resumed_states == states[stop:]


@settings(max_examples=150, **QUICK)
@given(config=data_settings())
def test_no_token_is_lost_doubled_or_misplaced(config: DataSettings) -> None:
    """What is in the batches, what waits and what is left of begun documents are together what was drawn."""
    encode, bos = tokenizer(), 1 if config.add_bos else 0
    with opened(config) as source:
        batches, states = go(source, source.initial_state(), 6, {})
    state = states[-1]
    placed: Counter[str] = Counter()
    for batch in batches:
        for document in batch.documents:
            placed[document.source] += document.stop - document.start
            tokens = batch.tokens_BT[document.row, document.start : document.stop]
            index, *offset = document.key.split(":")[1:]
            texts = _texts(config.sources[document.source])
            whole = [*encode.encode(texts[index], add_special_tokens=False), 1]
            start = int(offset[0]) if offset else 0
            assert tokens[bos:].tolist() == whole[start : start + len(tokens) - bos]
            assert bool(offset) == (len(tokens) - bos < len(whole))
    for source_state in state.sources:
        waiting = sum(1 for i, _ in state.pending if state.sources[i].name == source_state.name)
        missing = source_state.tokens - placed[source_state.name]
        assert 0 <= missing <= waiting * config.seq_len and (missing > 0) == (waiting > 0)
    counted = sum(int(np.sum(batch.document_ids_BT >= 0)) for batch in batches)
    assert counted == sum(placed.values())


def _texts(source: SourceSettings) -> dict[str, str]:
    """Document names to texts, read without the package."""
    if source.kind == "documents":
        return {str(i): text for i, text in enumerate(source.documents)}
    found = {}
    for shard, path in enumerate(sorted(set(source.path))):
        with fsspec.open(path) as file:
            found |= {f"{shard}/{i}": json.loads(line)["text"] for i, line in enumerate(file.read().splitlines())}
    return found


@settings(max_examples=60, **QUICK)
@given(config=data_settings(), world=st.sampled_from([2, 3]))
def test_any_number_of_ranks_reads_the_same_batches(config: DataSettings, world: int) -> None:
    config = config.model_copy(update={"rows": config.rows * world})
    with opened(config) as source:
        batches, states = go(source, source.initial_state(), 3, {})
    for rank in range(world):
        with opened(config, rank=rank, world=world) as source:
            parts, part_states = go(source, source.initial_state(), 3, {})
        share = config.rows // world
        assert part_states == states
        assert all(same(p, b.rows(rank * share, (rank + 1) * share)) for p, b in zip(parts, batches, strict=True))
