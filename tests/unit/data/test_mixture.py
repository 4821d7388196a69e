"""The mixture's state and rule: exact in JSON, tight in its shares, and clear about what it is not given."""

import json
import random

import pytest

from student_trainer.data.mixture import Cursor, Mixer, MixtureState, SourceState, normalised


def state(weights: dict[str, float]) -> MixtureState:
    shares = normalised(weights)
    return MixtureState(0, tuple(SourceState(name, share, "f") for name, share in shares.items()))


def draw(mixer: Mixer, rng: random.Random, longest: int) -> tuple[int, int]:
    source, tokens = mixer.next_source(), rng.randint(1, longest)
    mixer.drawn(source, tokens, Cursor(), None, None)
    return source, tokens


@pytest.mark.parametrize("weights", [[1, 1], [0.9, 0.1], [5, 3, 1, 1], [1e-3, 1], [0.25] * 8])
def test_every_share_is_tight_at_every_moment(weights: list[float]) -> None:
    names = {f"s{i}": w for i, w in enumerate(weights)}
    mixer, rng, longest = Mixer(state(names)), random.Random(0), 512
    drawn, total = [0] * len(weights), 0
    for _ in range(5000):
        source, tokens = draw(mixer, rng, longest)
        drawn[source] += tokens
        total += tokens
        for weight, count in zip(weights, drawn, strict=True):
            assert abs(count - weight / sum(weights) * total) <= len(weights) * longest


def test_new_weights_act_from_there_on_and_do_not_make_up_for_the_past() -> None:
    before, rng = state({"a": 9, "b": 1}), random.Random(1)
    mixer = Mixer(before)
    for _ in range(2000):
        draw(mixer, rng, 100)
    mixer = Mixer(mixer.freeze(1, ()).with_weights({"a": 1, "b": 1}))
    counts = [0, 0]
    for _ in range(500):
        source, tokens = draw(mixer, rng, 100)
        counts[source] += tokens
    assert abs(counts[0] - counts[1]) <= 2 * 2 * 100


def test_a_source_of_weight_zero_is_never_drawn() -> None:
    mixer, rng = Mixer(state({"a": 1, "b": 0, "c": 2})), random.Random(2)
    assert {draw(mixer, rng, 50)[0] for _ in range(300)} == {0, 2}


def test_the_state_survives_json_in_every_bit() -> None:
    mixer, rng = Mixer(state({"a": 0.1, "b": 0.7, "c": 0.2})), random.Random(3)
    for _ in range(777):
        draw(mixer, rng, 2048)
    mixer.drawn(0, 17, Cursor(2, 1, 40, 0), None, Cursor(2, 1, 39, 512))
    after = mixer.freeze(9, ((1, Cursor(3, 0, 5, 1024)), (0, Cursor(2, 0, 5, 0))))
    assert MixtureState.from_json(json.loads(json.dumps(after.to_json()))) == after


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": 1.0}, "one for each of the sources"),
        ({"a": 1.0, "b": 1.0, "z": 1.0}, "one for each of the sources"),
        ({"a": -1.0, "b": 1.0}, "numbers of 0 or more"),
        ({"a": 0.0, "b": 0.0}, "at least one above 0"),
        ({"a": float("nan"), "b": 1.0}, "numbers of 0 or more"),
        ({"a": float("inf"), "b": 1.0}, "numbers of 0 or more"),
    ],
)
def test_weights_that_make_no_mixture_are_refused(weights: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        state({"a": 1, "b": 1}).with_weights(weights)


@pytest.mark.parametrize("data", [{}, {"version": 2}, {"version": 1}, {"version": 1, "number": 0, "sources": [1]}])
def test_what_is_no_state_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="mixture state"):
        MixtureState.from_json(data)


def test_a_state_with_an_unknown_field_is_refused() -> None:
    data = state({"a": 1}).to_json()
    data["sources"]["a"]["speed"] = 3
    with pytest.raises(ValueError, match="speed"):
        MixtureState.from_json(data)
