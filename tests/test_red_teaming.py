"Attacks are pure functions, splits do not leak, attackers learn, and gamma counts per person and hour."
from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from llama2_nbdev.core import UserError
from llama2_nbdev.finetuning.chat import check_messages
from llama2_nbdev.safety.red_teaming import (
    FRAMES, GOALS, MOVES, VIOLATION, Attacker, TeamConfig, attack_row, build_up, by_move, campaign, compose, compositions, findings_of,
    gamma, make_team, split_of, violations_per_hour, world_targets)
from llama2_nbdev.world.annotators import safety, safety_rating
from llama2_nbdev.world.people import make_people
from llama2_nbdev.world.safety import CATEGORIES, HELD_OUT_CELLS, VECTORS, secret_target

PEOPLE = make_people(0)
TARGETS = world_targets(PEOPLE)
SMALL = TeamConfig(persons=6, hours=2, prompts_per_hour=5)
goals, combos = st.sampled_from(list(GOALS)), st.sampled_from(compositions(3))


def refuse(dialogs): return ["I can't do that."] * len(dialogs)


def test_moves_cover_the_vectors_of_the_taxonomy():
    assert {vector for vector, _ in MOVES.values()} == set(VECTORS) and set(FRAMES) < set(MOVES)
    assert set(GOALS.values()) == set(CATEGORIES)
    assert len(set(compositions())) == len(compositions()) == 45 and not any({"metaphor", "language"} <= set(c) for c in compositions(4))


@settings(max_examples=60, deadline=None)
@given(goal=goals, moves=combos, key=st.integers(0, 10 ** 6), unseen=st.booleans())
def test_an_attack_is_a_pure_function(goal, moves, key, unseen):
    row = attack_row(TARGETS, goal, moves, (key,), unseen)
    assert row == attack_row(TARGETS, goal, moves, (key,), unseen)
    assert check_messages(row["messages"])[-1].role == "user" and (len(row["messages"]) > 1) == ("build-up" in moves)
    assert row["area"] == GOALS[goal] == row["truth"]["category"] and row["split"] == split_of(row["area"], moves)
    assert all(safety_rating(row, a) == 5 for a in row["truth"]["answers"])  # a lesson is safe and helpful
    assert all(safety(row, a) < .5 for a in row["truth"]["unsafe"])  # whatever the words


def test_order_of_moves_and_other_seeds():
    code = secret_target(PEOPLE[0], "code")
    assert compose(code, ("role", "misspelling"), 3) == compose(code, ("misspelling", "role"), 3)
    assert len({compose(code, ("role",), s)[0]["content"] for s in range(40)}) > 2
    with pytest.raises(UserError, match="'magic' is no move; the moves are authority"): compose(code, ("magic",), 0)
    assert build_up(None, Random(0))[-1]["role"] == "assistant"


def test_kept_wordings_never_appear_in_training():
    for moves in compositions():
        if not set(moves) & {*FRAMES, "metaphor", "language"}: continue
        for goal in GOALS:
            seen, kept = ({attack_row(TARGETS, goal, moves, (i,), unseen)["messages"][-1]["content"] for i in range(40)} for unseen in (False, True))
            assert seen.isdisjoint(kept), (goal, moves)


def test_splits():
    for area in CATEGORIES:
        for moves in compositions(3):
            cell = any((area, MOVES[m][0]) in HELD_OUT_CELLS for m in moves)
            assert (split_of(area, moves) == "cell") == cell and (len(moves) > 1 or split_of(area, moves) != "composition")
        trained = [c for c in compositions() if split_of(area, c) == "train"]
        assert {m for c in trained for m in c} == {m for m, (v, _) in MOVES.items() if (area, v) not in HELD_OUT_CELLS}
        assert 2 <= sum(split_of(area, c) == "composition" for c in compositions()) < len(trained)
    unseen = campaign(refuse, SMALL, world_targets(PEOPLE, True), "unseen")
    assert {r["split"] for r in unseen} == {"cell", "composition"}
    names = [p.name for p in PEOPLE if p.split == "entity"]
    trained = campaign(refuse, replace(SMALL, persons=30), TARGETS)
    assert not any(n in str(r["messages"]) for r in trained for n in names) and {r["split"] for r in trained} == {"train"}
    with pytest.raises(UserError, match="split='test' is unknown"): make_team(SMALL, "test")


def test_attackers_learn():
    best = ("key", ("role",))
    wins = {}
    for adaptive in (True, False):
        wins[adaptive] = 0
        for seed in range(10):
            a = Attacker([("key", c) for c in compositions()[:8]], Random(seed), adaptive)
            for _ in range(100):
                plan = a.choose()
                a.learn(plan, plan == best)
                wins[adaptive] += plan == best
    assert wins[True] > 3 * wins[False] > 0


def test_nobody_learns_within_a_sitting_and_everybody_after_it():
    seen = []
    def judge(row, reply): return 1 if row["moves"] == [] else 5
    def watch(dialogs): seen.append(len(dialogs)); return [""] * len(dialogs)
    cfg = replace(SMALL, hours=8, prompts_per_hour=5, sitting=4, persons=3)
    records = campaign(watch, cfg, TARGETS, judge=judge)
    assert seen == [12] * 10 and len(records) == 120
    assert Counter(r["person"] for r in records) == {0: 40, 1: 40, 2: 40} and max(r["hour"] for r in records) < 8


def test_gamma_is_per_person_and_hour():
    def judge(row, reply): return 2 if row["person"] == 2 else 3
    records = campaign(refuse, SMALL, TARGETS, judge=judge)
    assert violations_per_hour(records, SMALL) == [0, 0, 5, 0, 0, 0]
    assert gamma(records, SMALL).mean == pytest.approx(5 / 6)  # trap 59: people who find nothing count
    twice = replace(SMALL, hours=1, prompts_per_hour=10)
    assert gamma(campaign(refuse, twice, TARGETS, judge=judge), twice).mean == pytest.approx(10 / 6)  # trap 59: hours, not prompts
    assert gamma(records, SMALL).n == 6  # people are resampled, not prompts
    assert VIOLATION == 2  # trap 59: 1 and 2 of 5 violate


def test_campaigns_repeat_and_differ():
    first = campaign(refuse, SMALL, TARGETS, seed=1, number=0)
    assert first == campaign(refuse, SMALL, TARGETS, seed=1, number=0)
    other = campaign(refuse, SMALL, TARGETS, seed=1, number=1)
    assert {str(r["messages"]) for r in first} != {str(r["messages"]) for r in other}
    assert [a.plans for a in make_team(SMALL, seed=1, campaign=0)] == [a.plans for a in make_team(SMALL, seed=1, campaign=1)]
    assert len({r["id"] for r in first}) == len(first)


def test_findings_and_moves():
    records = campaign(refuse, SMALL, TARGETS, judge=lambda row, reply: 1 + row["person"] % 3)
    found = findings_of(records + records)
    assert len({str(r["messages"]) for r in found}) == len(found) and {r["rating"] for r in found} == {1, 2}
    table = by_move(records)
    assert sum(t for _, t in table.values()) == sum(max(1, len(r["moves"])) for r in records) and all(w <= t for w, t in table.values())
