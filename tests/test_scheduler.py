"""Plans as a pure function of profile, model and workload: against brute force, and refused if they do not fit."""

import dataclasses

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import GQA, LLAMA, OPT, profile
from kvpr_jax import memory, scheduler
from kvpr_jax.scheduler import Costs, Request, Workload, buckets, choose_split, make_plan

GIB = memory.GIB
FLOAT32 = jnp.dtype("float32")

# OPT-6.7B: D 4096, 32 heads of 128, 32 layers, float16.
OPT_6_7B = dataclasses.replace(
    OPT, vocab_size=50272, num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=32, head_dim=128,
    mlp_size=16384, max_positions=2048, embed_size=4096,
)  # fmt: skip
# One NVIDIA H200 (shared measurements: 54.1 GB/s over the link, one layer over B 32 x S 1024).
H200 = profile(
    to_device=[(2**20, 2**20 / 19.9e9), (2**28, 2**28 / 54.1e9)], base_s=2e-4, keys_values_token_s=0.8e-3 / 1024,
    project_token_s=3.6e-3 / 1024, absorb_token_s=0.8e-3 / 1024, head_s=2e-3,
)  # fmt: skip


def plan_for(config=OPT, workload=Workload(2, 16, 8), request=Request(), device=GIB, host=GIB, given=None):
    return make_plan(config, FLOAT32, workload, request, given or profile(), device, host)


@pytest.mark.parametrize("tokens, expected", [
    (1, [0, 1]), (16, [0, 16]), (50, [0, 16, 32, 48, 50]), (1024, [*range(0, 1025, 64)]),
])  # fmt: skip
def test_buckets(tokens, expected):
    assert buckets(tokens) == expected


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 3000),
    resident=st.integers(0, 2000),
    steps=st.integers(1, 2000),
    bandwidth=st.floats(1e8, 1e12),
    keys_values=st.floats(1e-9, 1e-4),
    project=st.floats(1e-9, 1e-3),
    absorb=st.floats(1e-9, 1e-4),
    recompute=st.sampled_from(["project", "absorb"]),
    engine=st.sampled_from(["overlapped", "sequential"]),
)
def test_the_split_is_the_best_bucket(
    tokens, resident, steps, bandwidth, keys_values, project, absorb, recompute, engine
):
    given_profile = profile(
        to_device=[(2**20, 5e-5 + 2**20 / bandwidth), (2**26, 5e-5 + 2**26 / bandwidth)],
        keys_values_token_s=keys_values, project_token_s=project, absorb_token_s=absorb,
    )  # fmt: skip
    costs = Costs(OPT_6_7B, 2, 4, given_profile)

    def step_s(split):  # the cost model of the design page, written out again
        form = project if recompute == "project" else absorb
        link = 0.0
        if split:
            link += 5e-5 + 4 * split * 4096 * 2 / bandwidth
        if split < tokens:
            link += 2 * (5e-5 + 4 * (tokens - split) * 4096 * 2 / bandwidth)
        compute = 1e-4 + split * form + (tokens - split + resident) * keys_values
        whole = link + compute if engine == "sequential" else max(link, compute)
        return 32 * whole + 1e-3 + (0.0 if engine == "sequential" else min(link, compute))

    best = min(step_s(split) for split in buckets(tokens))
    chosen = choose_split(costs, tokens, resident, steps, recompute, engine)
    assert chosen in buckets(tokens)
    assert step_s(chosen) == pytest.approx(best, rel=1e-6)


def test_a_compiled_split_is_kept_when_few_steps_are_left():
    costs = Costs(OPT_6_7B, 2, 32, H200)
    fresh = choose_split(costs, 1024, 0, 1000, "absorb", "overlapped")
    assert fresh == 1024
    assert choose_split(costs, 1024, 0, 2, "absorb", "overlapped", compiled=frozenset({960})) == 960
    assert choose_split(costs, 1024, 0, 10**6, "absorb", "overlapped", compiled=frozenset({960})) == 1024


def test_the_papers_schedule_gains_less():
    """On an H200 the paper's two phases reach at most 1.57x for OPT-6.7B, the pipelined schedule about 2x."""
    costs = Costs(OPT_6_7B, 2, 32, dataclasses.replace(H200, base_s=0.0, head_s=0.0, keys_values_token_s=0.0))
    streamed = costs.step_s(0, 1024, 0, "project", "overlapped")
    paper = min(costs.two_phase_step_s(split, 1024 - split) for split in buckets(1024))
    ours = min(costs.step_s(split, 1024 - split, 0, "absorb", "overlapped") for split in buckets(1024))
    assert streamed / paper == pytest.approx(1.57, abs=0.03)
    assert streamed / ours == pytest.approx(2.0, abs=0.1)


def test_grouped_queries_stream_everything_and_say_why():
    plan = plan_for(GQA, request=Request(offload="all"))
    assert plan.split == 0 and plan.activation_share == 0
    assert "activations (60 numbers a token) are no smaller than keys and values (40)" in plan.reason


def test_what_fits_stays_on_the_device():
    plan = plan_for()
    assert not plan.offloaded and plan.resident_tokens == 16 and plan.host_bytes == plan.host_bytes_per_step == 0
    assert plan.tail_tokens == 7  # room for every new token that is fed back


@pytest.mark.parametrize("text, expected", [("0", 0), ("16", 16), ("0%", 0), ("100%", 16), ("50%", 8), ("5", 5)])
def test_a_forced_split_is_what_was_asked(text, expected):
    plan = plan_for(request=Request(split=text))
    assert plan.split == expected and plan.offloaded and plan.resident_tokens == 0
    assert plan.activation_share == expected / 16
    assert plan.host_bytes_per_step == 3 * 2 * (expected * 44 + (16 - expected) * 88) * 4


@pytest.mark.parametrize("make, message", [
    (lambda: Request(split="half"), "split 'half' must be auto, a number of tokens or a percentage"),
    (lambda: Request(split="1.5"), "split '1.5' must be"),
    (lambda: Request(split="-3"), "split -3 must be 0 or more"),
    (lambda: Request(split="101%"), "split 101% must be from 0% to 100%"),
    (lambda: Request(split="nan%"), "split nan% must be from 0% to 100%"),
    (lambda: plan_for(request=Request(split="17")), "split 17 is more than the prompt's 16 tokens"),
    (lambda: Request(split="8", offload="none"), "split 8 needs the cache on the host"),
    (lambda: Request(device_cache_gib=-1.0), "device-cache-gib -1.0 must be 0 or more"),
    (lambda: Request(tail_tokens=0), "tail_tokens 0 must be at least 1"),
])  # fmt: skip
def test_requests_that_cannot_be_met_are_named(make, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_too_little_host_memory_names_both_figures_and_the_flags():
    workload = Workload(32, 1024, 64)
    with pytest.raises(
        MemoryError,
        match=r"host memory: the plan needs \d+\.\d+ GiB and 3\.00 GiB are free beside the weights; .*--split",
    ):
        plan_for(OPT_6_7B, workload, Request(offload="all"), device=64 * GIB, host=3 * GIB)


def test_too_little_device_memory_names_both_figures_and_the_flags(monkeypatch):
    monkeypatch.setattr(memory, "device_memory_is_host_memory", lambda: False)
    workload = Workload(32, 1024, 64)
    with pytest.raises(MemoryError, match=r"device memory: the plan needs \d+\.\d+ GiB and 2\.00 GiB.*--offload all"):
        plan_for(OPT_6_7B, workload, Request(offload="none"), device=2 * GIB, host=500 * GIB)


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 64),
    prompt=st.integers(1, 2000),
    new=st.integers(1, 500),
    device_gib=st.floats(0.5, 140),
    split=st.sampled_from(["auto", "0%", "37%", "100%"]),
    config=st.sampled_from([OPT_6_7B, OPT, LLAMA, GQA]),
)
def test_plans_are_consistent_and_fit(batch, prompt, new, device_gib, split, config):
    free = int(device_gib * GIB)
    workload = Workload(batch, prompt, new)
    try:
        plan = make_plan(config, jnp.dtype("bfloat16"), workload, Request(split=split), H200, free, 2000 * GIB)
    except MemoryError:
        return
    assert 0 <= plan.split <= plan.cached_tokens - plan.resident_tokens <= plan.cached_tokens == prompt
    assert 1 <= plan.prefill_sequences <= batch and 1 <= plan.prefill_queries <= prompt
    assert 0 <= plan.activation_share <= 1 and plan.tail_tokens >= 1 and plan.predicted_step_s > 0
    assert plan.device_bytes <= free
    assert plan.host_bytes_per_step <= plan.host_bytes
    if not plan.offloaded:
        assert plan.host_bytes == 0 and plan.resident_tokens == prompt


@pytest.mark.parametrize(
    "request_", [Request(offload="all"), Request(split="100", recompute="project"), Request(split="0")], ids=str
)
def test_candidates_show_what_the_plan_was_chosen_from(request_):
    workload = Workload(32, 1024, 64)
    plan = plan_for(OPT_6_7B, workload, request_, device=100 * GIB, host=100 * GIB, given=H200)
    found = scheduler.candidates(OPT_6_7B, jnp.dtype("float32"), plan, H200)
    own = [each for each in found if each.recompute == plan.recompute]
    assert {each.split for each in own} == {*buckets(1024), plan.split} and len(found) == len(own) + 1
    assert {each.recompute for each in found} == {"project", "absorb"}
    (chosen,) = [each for each in own if each.split == plan.split]
    assert chosen.step_s == plan.predicted_step_s
    assert chosen.step_s >= max(chosen.link_s, chosen.compute_s)
    if request_.split == "auto":
        assert plan.predicted_step_s == min(each.step_s for each in found)
    assert scheduler.candidates(OPT, jnp.dtype("float32"), plan_for(), H200) == []
