"""The model's mbarriers against an exhaustive reference: all interleavings of a ring of two stages."""

from itertools import product

import pytest
from model_kernels import SEEDS, fill, matrix

from fa_reference.hopper import SM
from fa_reference.hopper.barriers import Mbarrier
from fa_reference.hopper.rules import (
    Deadlock,
    MissedPhase,
    OverwriteInUse,
    ReadTooEarly,
    WrongParity,
)

STAGES, TILES = 2, 5


def explore(producer_parity, consumer_parity, visit=lambda *_: None) -> set[str]:
    """All interleavings of a 2-stage ring, from the PTX text: {"ok", "race", "deadlock"}, whichever can happen.

    A state: producer's and consumer's program counters (3 and 4 steps a tile), phases completed by each full and empty
    barrier, tile that each stage holds, tile whose load is in flight to it (-1: none). A full barrier completes when
    its load does (1 arrival, which comes before the load). A wait for parity p passes iff an odd (even) number of
    phases is complete for p = 0 (1). visit(path, state) sees each state once, with a way there.
    """
    start = (0, 0, (0,) * STAGES, (0,) * STAGES, (-1,) * STAGES, (-1,) * STAGES)
    todo, known, outcomes = [(start, ())], {start}, set()

    def put(values, s, value):
        return values[:s] + (value,) + values[s + 1 :]

    while todo:
        state, path = todo.pop()
        visit(path, state)
        p, c, full, empty, held, loading = state
        following = []
        for s in range(STAGES):
            if loading[s] >= 0:  # the load completes, and with it the phase
                new = (p, c, put(full, s, full[s] + 1), empty, put(held, s, loading[s]), put(loading, s, -1))
                following.append((("tma", s), new))
        if p < 3 * TILES:
            j, step = divmod(p, 3)
            s = j % STAGES
            being_read = c // 4 % STAGES == s and c % 4 == 2 and c < 4 * TILES
            if step == 0 and empty[s] % 2 != producer_parity(j):
                following.append((("wait", s), (p + 1, *state[1:])))
            elif step == 1:
                following.append((("expect", s), (p + 1, *state[1:])))
            elif step == 2:
                if loading[s] >= 0 or being_read or (j >= STAGES and c < 4 * (j - STAGES) + 3):
                    outcomes.add("race")  # an older load in flight, or a tile not yet read
                    continue
                following.append((("load", s), (p + 1, c, full, empty, held, put(loading, s, j))))
        if c < 4 * TILES:
            j, step = divmod(c, 4)
            s = j % STAGES
            if step == 0 and full[s] % 2 != consumer_parity(j):
                following.append((("wait full", s), (p, c + 1, *state[2:])))
            elif step in (1, 2):  # starts to read, has read
                if held[s] != j or loading[s] >= 0:
                    outcomes.add("race")
                    continue
                following.append((("read", s), (p, c + 1, *state[2:])))
            elif step == 3:
                following.append((("release", s), (p, c + 1, full, put(empty, s, empty[s] + 1), held, loading)))
        if not following:
            outcomes.add("ok" if (p, c) == (3 * TILES, 4 * TILES) else "deadlock")
        for action, new in following:
            if new not in known:
                known.add(new)
                todo.append((new, (*path, action)))
    return outcomes


class WrongNumbers(Exception):
    """A tile that was there already was taken for the next: no rule is broken, but the result shows it."""


def right_parity(j):
    return j // STAGES % 2


def test_parity_equals_phase_numbers_in_every_interleaving():
    """In every reachable state of a right ring, the model's parity test says what unbounded phase numbers say."""
    compared = 0

    def visit(path, state):
        nonlocal compared
        full, empty = ([Mbarrier(f"{name}[{s}]", 1) for s in range(STAGES)] for name in ("full", "empty"))
        observed = {"wait": empty, "wait full": full}
        for action, s in path:
            if action == "expect":
                full[s].arrive("producer", set(), tx=100)
            elif action == "tma":
                full[s].complete_tx(100, set(), full[s].phase)
            elif action == "release":
                empty[s].arrive("consumer", set())
            elif action in observed:
                observed[action][s].observed = observed[action][s].phase - 1
        p, c, full_phases, empty_phases, *_ = state
        assert [m.phase for m in full + empty] == [*full_phases, *empty_phases]
        for j, barriers, flip, waits in (
            (p // 3, empty, 1, p % 3 == 0 and p < 3 * TILES),
            (c // 4, full, 0, c % 4 == 0 and c < 4 * TILES),
        ):
            if waits:
                barrier = barriers[j % STAGES]
                round_wanted = j // STAGES - flip  # a producer wants the round before to be released
                assert barrier.test_parity(right_parity(j) ^ flip) == (barrier.phase > round_wanted)
                compared += 1

    assert explore(lambda j: right_parity(j) ^ 1, right_parity, visit) == {"ok"}
    assert compared > 100


PARITIES = {
    "right": right_parity,
    "inverted": lambda j: right_parity(j) ^ 1,
    "always 0": lambda j: 0,
    "always 1": lambda j: 1,
}


@pytest.mark.parametrize("producer, consumer", list(product(PARITIES, PARITIES)))
def test_the_model_refuses_a_ring_exactly_if_some_interleaving_goes_wrong(producer, consumer):
    outcomes = explore(lambda j: PARITIES[producer](j) ^ 1, PARITIES[consumer])
    for seed in SEEDS:
        sm = SM(seed=seed)
        X = matrix(sm, 64 * TILES)
        tiles = [sm.smem(f"tile[{s}]", (64, 64), "float16") for s in range(STAGES)]
        full, empty = ([sm.mbarrier(f"{name}[{s}]", 1) for s in range(STAGES)] for name in ("full", "empty"))

        async def produce(wg, X=X, tiles=tiles, full=full, empty=empty):
            for j in wg.loop(range(TILES)):
                s = j % STAGES
                await wg.mbarrier_wait(empty[s], PARITIES[producer](j) ^ 1)
                await fill(wg, tiles[s], X, 64 * j, full[s])

        async def consume(wg, tiles=tiles, full=full, empty=empty):
            for j in wg.loop(range(TILES)):
                s = j % STAGES
                await wg.mbarrier_wait(full[s], PARITIES[consumer](j))
                if (await wg.load_shared(tiles[s])).values[0, 0] != 64 * j / 256:
                    raise WrongNumbers(f"tile {j}")
                await wg.mbarrier_arrive(empty[s])

        roles = {"producer": produce, "consumer": consume}
        if outcomes == {"ok"}:
            sm.run(roles)
        else:  # in every run, not only in the unlucky ones
            with pytest.raises((WrongParity, Deadlock, ReadTooEarly, OverwriteInUse, MissedPhase, WrongNumbers)):
                sm.run(roles)
