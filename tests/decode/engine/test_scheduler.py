"""Which sequences start when: what fits, what waits, how long prompts are read, and what an engine counts."""

import math
from itertools import pairwise

import pytest
from engine_requests import CAPACITY, again, alone, plain_values, run_to_the_end

from decode.engine.engine import Engine
from decode.engine.sequence import SamplingParams, Sequence
from minillama import InputError


def test_what_does_not_fit_is_refused_when_it_is_added_with_its_numbers(ensemble):
    for slots, positions in ((0, 10), (2, 0), (2, [10, 10, 0])):
        with pytest.raises(InputError, match="must be at least 1"):
            Engine(ensemble, slots, positions)
    engine = Engine(ensemble, 2, [20, 30, 30])
    prompts = ([5] * 15,) * 3
    for sequence, named in (
        (Sequence(prompts, max_new_tokens=6), "needs 21 positions, a slot has 20"),
        (Sequence(prompts, targets=[5] * 6), "needs 21 positions, a slot has 20"),
        (Sequence(prompts, SamplingParams(beams=3)), "needs 3 slots, one for each beam; there are 2"),
        (Sequence(prompts[:2]), "2 prompts for 3 members"),
        (Sequence(([5], [], [5])), "is empty"),
        (Sequence(prompts, weights=(0.0, 0.0, 0.0)), "every weight is zero"),
        (Sequence(prompts, weights=(1.0, 2.0)), "2 weights for 3 members"),
        (Sequence(prompts, weights=(1.0, math.nan, 0.0)), "S is nan"),
        (Sequence(prompts, weights=(1.0, 1e-50, 0.0)), "S is 1e-50"),
        (Sequence(prompts, max_new_tokens=0), "max_new_tokens 0"),
        (Sequence(([5] * 96,) * 3), "has 96 tokens"),
        (Sequence(([5] * 90,) * 3, targets=[5] * 7), "its 7 tokens do not fit"),
        (Sequence(prompts, top_logprobs=33), "33 candidates"),
        (Sequence(([5], [5], [60])), "token ids must be 0 to 59, found 60 to 60"),
        (Sequence(prompts, targets=[-1]), "found -1 to -1"),
        (Sequence(prompts, max_new_tokens=1, key=2**31), "key 2147483648"),
        (Sequence(prompts, targets=[5], stop_tokens=frozenset(range(64))), "64 stop tokens"),
        (Sequence(prompts, SamplingParams(beams=2), stop_tokens=frozenset(range(31))), "33 candidates"),
    ):
        with pytest.raises(InputError, match=named):
            engine.add(sequence)
    assert not engine.has_work
    for sequence in (Sequence(prompts, max_new_tokens=5), Sequence(([5], [5] * 25, [5]), max_new_tokens=5)):
        assert engine.fits([sequence])
    added = Sequence(prompts, max_new_tokens=5)
    engine.add(added)
    with pytest.raises(InputError, match="was added before"):
        engine.add(added)
    # A member that is left out may have a prompt that no slot could hold, or none.
    assert engine.fits([Sequence(([5] * 15, [], [5] * 99), max_new_tokens=5, weights=(1.0, 0.0, 0.0))])
    assert not engine.fits([Sequence(prompts, max_new_tokens=6)])


def test_a_beam_search_waits_until_it_has_a_slot_for_each_beam(ensemble):
    engine = Engine(ensemble, 4, CAPACITY)
    free = frozenset()
    short = engine.add(Sequence(([5],) * 3, max_new_tokens=3, stop_tokens=free))
    long = engine.add(Sequence(([6],) * 3, max_new_tokens=8, stop_tokens=free))
    search = engine.add(Sequence(([7],) * 3, SamplingParams(beams=3), 4, free))
    after = engine.add(Sequence(([8],) * 3, max_new_tokens=2, stop_tokens=free))
    ended, step = {}, 0
    while engine.has_work:
        assert (search in engine.scheduler.running) <= (short in ended)
        for update in engine.step():
            if update.completion is not None:
                ended[update.id] = step
        step += 1
    assert ended[short] == 2
    assert ended[search] == 6  # from the step after the short one's last
    assert ended[long] == 7
    assert ended[after] == 8  # the order of the queue is kept: it starts when the search ends


def test_a_long_prompt_is_read_in_chunks_beside_sequences_that_decode(ensemble, monkeypatch):
    monkeypatch.setattr("decode.engine.scheduler.MAX_PROMPT_POSITIONS", 8)
    engine = Engine(ensemble, 3, CAPACITY)
    short = Sequence(([5, 6], [7], [8, 9, 10]), max_new_tokens=20, stop_tokens=frozenset())
    long = Sequence(([9] * 60, [8] * 70, [7] * 3), max_new_tokens=2, stop_tokens=frozenset())
    scored = Sequence(([9] * 20, [5], [7] * 3), targets=[5, 6] * 10)
    expected = [plain_values(alone(ensemble, sequence)) for sequence in (short, long, scored)]
    first, second, third = (engine.add(again(sequence)) for sequence in (short, long, scored))
    lengths, completions = [], {}
    while engine.has_work:
        updates = {update.id: update for update in engine.step()}
        completions |= {number: u.completion for number, u in updates.items() if u.completion is not None}
        if first not in completions:
            assert len(updates[first].tokens) == 1  # it never waits for the long prompt
        lengths += [sum(len(s.remaining[1]) for s in engine.scheduler.running.values())]
    assert all(before - after <= 8 for before, after in pairwise(lengths))
    assert [plain_values(completions[number]) for number in (first, second, third)] == expected


def test_the_shared_prefix_is_used_only_where_a_prompt_begins_with_it(ensemble):
    prefix = [[5, 6, 7, 8], [9, 9], []]
    engine = Engine(ensemble, 3, CAPACITY, prefix=prefix)
    prompts = [
        ([5, 6, 7, 8, 10], [9, 9, 4], [3]),
        ([5, 6, 7, 8], [9, 9, 4], [3]),  # the first member's is not longer than the prefix
        ([5, 6, 8, 8, 10], [9], [3]),
        ([4], [9, 9, 5, 5], [9, 9]),
    ]
    sequences = [Sequence(prompt, max_new_tokens=8, stop_tokens=frozenset()) for prompt in prompts]
    expected = [plain_values(alone(ensemble, sequence)) for sequence in sequences]
    found = dict(engine.generate(sequences))
    assert [plain_values(found[number]) for number in range(4)] == expected


def test_an_engine_that_fits_has_slots_for_whole_searches_and_room_for_the_longest(ensemble):
    def fitting(batch_size, *beams):
        sequences = [
            Sequence(([5, 6, 4], [7] * n, [5, 6, 8]), SamplingParams(beams=b), 10 + n) for n, b in enumerate(beams, 1)
        ]
        engine = Engine.fitting(ensemble, sequences, batch_size)
        slots = engine.runner.slots
        assert engine.fits(sequences)
        return slots.count, slots.capacity, slots.prefix

    assert fitting(16, 1, 1, 1) == (3, [16, 16, 16], [[5, 6], [], [5, 6]])
    assert fitting(2, 1, 1, 1)[0] == 2
    assert fitting(1, 1, 4)[0] == 4
    assert fitting(10, 4, 4, 4)[0] == 8
    assert fitting(16, 1)[2] == [[], [], []]
    with pytest.raises(InputError, match="batch_size 0"):
        Engine.fitting(ensemble, [], 0)
    with pytest.raises(InputError, match="prompt 2 has 96 tokens"):
        Engine.fitting(ensemble, [Sequence(([5],) * 3), Sequence(([5] * 96,) * 3)], 4)
    assert Engine.fitting(ensemble, [], 4).runner.slots.count == 1


def test_statistics_count_steps_tokens_and_the_first_tokens_time(ensemble):
    engine = Engine(ensemble, 2, CAPACITY)
    assert engine.stats.first_token_time is None
    engine.add(Sequence(([5],) * 3, max_new_tokens=4, stop_tokens=frozenset()))
    engine.add(Sequence(([6],) * 3, max_new_tokens=2, stop_tokens=frozenset()))
    engine.step()
    first = engine.stats.first_token_time
    assert first is not None
    run_to_the_end(engine)
    assert engine.stats.first_token_time == first
    assert (engine.stats.steps, engine.stats.tokens) == (4, 6)
    assert engine.step() == []
    assert engine.stats.steps == 4
