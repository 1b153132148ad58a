"""Steps that are slower than predicted for long are noticed, and the cost model learns from them."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import OPT, profile
from kvpr_jax.costs import Costs, Held
from kvpr_jax.pace import SLOW, SLOW_S, STEPS, Pace


def misses(pace: Pace, times: list[float], predicted_s: float = 0.01) -> list[float]:
    """What is said of steps that take so many times their prediction."""
    return [found for each in times if (found := pace.lasting_miss(predicted_s * each, predicted_s)) is not None]


def test_a_miss_is_one_that_lasts():
    pace = Pace()
    assert misses(pace, [1.0] * 100 + [50.0] * (STEPS // 2 - 1) + [1.0] * 100) == []
    assert misses(pace, [SLOW - 0.01] * 100) == []
    assert misses(pace, [2.0] * (STEPS // 2)) == []  # as many were as predicted
    assert misses(pace, [2.0]) == [2.0]


def test_counting_begins_anew_behind_a_miss():
    pace = Pace()
    assert misses(pace, [3.0] * STEPS) == [3.0]
    assert misses(pace, [3.0] * (STEPS - 1)) == [] and misses(pace, [3.0]) == [3.0]


def test_a_millisecond_is_no_miss():
    assert misses(Pace(), [2.0] * STEPS, SLOW_S * 0.99) == [] and misses(Pace(), [2.0] * STEPS, SLOW_S) == [2.0]


def test_fast_steps_may_be_those_of_a_slow_reader():
    assert misses(Pace(), [0.1] * (3 * STEPS)) == []


@settings(max_examples=200, deadline=None)
@given(
    activations=st.integers(0, 2000),
    keys_values=st.integers(1, 2000),
    resident=st.integers(0, 2000),
    tail=st.integers(0, 256),
    smaller=st.booleans(),
    bandwidth=st.floats(1e6, 1e12),
    dispatch_s=st.floats(0.0, 1e-3),
    times=st.floats(1.25, 40.0),
    recompute=st.sampled_from(["project", "absorb"]),
    engine=st.sampled_from(["overlapped", "sequential"]),
    group=st.sampled_from([1, 3]),
)
def test_slowed_costs_predict_what_was_measured(
    activations, keys_values, resident, tail, smaller, bandwidth, dispatch_s, times, recompute, engine, group
):
    machine = profile(
        to_device=[(1, 1 / bandwidth), (2**24, 2**24 / bandwidth)], dispatch_s=dispatch_s,
        keys_values=[(16, 1e-5), (512, 6e-5)], absorb=[(16, 5e-5), (512, 1e-4)],
    )  # fmt: skip
    machine = dataclasses.replace(
        machine, layer_dispatch_s=dispatch_s / 3, further_s=machine.base_s / 2, beside_copies=0.1
    )
    costs = Costs(OPT, 4, 500, machine, group)
    held = Held(activations, keys_values, resident, tail, smaller), recompute, engine
    measured_s = times * costs.step_s(*held)
    slowed, blamed = costs.slowed(*held, step_s=measured_s)
    assert slowed.step_s(*held) == pytest.approx(measured_s, rel=1e-6)
    sides = {
        "copies to the device": lambda c: c.link_s(held[0]),
        "compute": lambda c: c.compute_s(held[0], recompute),
    }
    if engine == "overlapped":
        sides["dispatch"] = lambda c: c.issue_s(held[0])

    def ends_s(side):
        share = 0.0 if engine == "sequential" else 0.1 * machine.layer_s(group) / costs.compute_s(held[0], recompute)
        beside = {
            "copies to the device": 0.0,
            "compute": share * OPT.num_layers * costs.link_s(held[0]) + machine.head_s,
            "dispatch": 3 * dispatch_s,
        }
        return OPT.num_layers * sides[side](costs) + beside[side]

    assert blamed == max(sides, key=ends_s)
    for side, seconds in sides.items():  # the others are as they were
        assert (seconds(slowed) > 1.01 * seconds(costs)) == (side == blamed)
