import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bakeoff.bench.simulation import experiment, outcomes
from bakeoff.errors import InputError
from bakeoff.verdict import (
    Ratio,
    break_even_images,
    mean_interval,
    outliers,
    paired_ratio,
    percentile,
    share_interval,
    verdicts,
)

EXPERIMENTS = 2_000


def judged(ratio, blocks, *, stalls=False):
    return outcomes(ratio, blocks, experiments=EXPERIMENTS, stalls=stalls)


def test_a_share_has_wilsons_interval():
    low, high = share_interval(15, 16)
    assert (low, high) == pytest.approx((0.7167, 0.9889), abs=1e-3)
    assert share_interval(4, 4)[1] == 1
    assert share_interval(4, 4)[0] == pytest.approx(4 / (4 + 1.96**2), abs=1e-3)


def share(found, condition):
    return sum(map(condition, found)) / len(found)


SLOW_RATIOS = [pytest.param(ratio, marks=pytest.mark.slow) for ratio in (1.02, 1.05, 1.10)]


@pytest.mark.parametrize("ratio", [1.0, *SLOW_RATIOS, 2.0])
@pytest.mark.parametrize("stalls", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_intervals_cover_the_planted_truth(ratio, stalls):
    covered = share(judged(ratio, 5, stalls=stalls), lambda v: v.ratio.low <= ratio <= v.ratio.high)
    assert covered >= 0.93
    assert stalls or covered <= 0.97


@pytest.mark.parametrize("stalls", [False, True])
def test_no_difference_is_seldom_called_one(stalls):
    assert share(judged(1.0, 5, stalls=stalls), lambda v: v.word != "no difference shown") <= 0.05


def test_real_differences_are_called():
    assert share(judged(1.10, 5), lambda v: v.word == "slower") >= 0.90
    assert share(judged(1.05, 10), lambda v: v.word == "slower") >= 0.80


@pytest.mark.parametrize("factor", [3, 10])
@pytest.mark.parametrize("arm", ["base", "arm"])
def test_a_stalled_block_never_turns_a_verdict_round(factor, arm):
    rng = np.random.default_rng(1)
    for _ in range(200):
        timed = experiment(rng, {"base": 1.0, "arm": 0.8}, 5)
        timed[arm][2] = [sample * factor for sample in timed[arm][2]]
        assert verdicts({"arm": paired_ratio(timed["base"], timed["arm"])}, None)["arm"].word != "slower"


def test_many_equal_arms_are_corrected_for():
    rng = np.random.default_rng(2)
    called = 0
    for _ in range(400):
        timed = experiment(rng, {"base": 1.0, **{f"arm{i}": 1.0 for i in range(6)}}, 5)
        ratios = {name: paired_ratio(timed["base"], timed[name]) for name in timed if name != "base"}
        called += any(v.word != "no difference shown" for v in verdicts(ratios, None).values())
    assert called / 400 <= 0.07


def test_a_small_effect_is_not_a_verdict_however_sure():
    sure = {"arm": Ratio(1.01, 1.009, 1.011, 10, 1e-9)}
    assert verdicts(sure, None)["arm"].word == "no difference shown"
    clear = {"arm": Ratio(1.05, 1.04, 1.06, 10, 1e-9)}
    assert verdicts(clear, None)["arm"].word == "slower"
    assert verdicts(clear, Ratio(1.0, 0.9, 1.1, 10, 1.0))["arm"].word == "no difference shown"


@pytest.mark.parametrize("itself", [1.08, 1 / 1.08])
def test_no_difference_is_called_that_the_baseline_has_from_itself(itself):
    clear = {"arm": Ratio(1.05, 1.04, 1.06, 10, 1e-9)}
    lucky = Ratio(itself, itself / 1.01, itself * 1.01, 10, 1e-9)  # a process that is quicker than its twin, for good
    (verdict,) = verdicts(clear, lucky).values()
    assert verdict.word == "no difference shown"
    assert verdict.smallest_effect == pytest.approx(0.08)


@given(st.lists(st.floats(0.001, 1000), min_size=2, max_size=8), st.floats(0.1, 10))
def test_the_ratio_is_exact_where_nothing_is_noisy(times, factor):
    ratio = paired_ratio([[t] for t in times], [[t * factor] for t in times])
    assert ratio.ratio == pytest.approx(factor)
    assert ratio.low == pytest.approx(ratio.high)


@pytest.mark.parametrize(
    ("baseline", "arm"),
    [([[1.0]], [[1.0]]), ([[1.0]] * 3, [[1.0]] * 2), ([[1.0], []], [[1.0]] * 2), ([[0.0]] * 2,) * 2],
)
def test_what_is_no_experiment_is_refused(baseline, arm):
    with pytest.raises(InputError):
        paired_ratio(baseline, arm)


def test_outliers_are_labelled():
    assert outliers([1.0, 1.01, 0.99, 1.0, 5.0]) == [False, False, False, False, True]
    assert outliers([1.0, 1.0, 1.0]) == [False] * 3


def test_percentiles_need_their_samples():
    assert percentile([1.0] * 28, 90) is None
    assert percentile([1.0] * 29, 90) == 1.0
    assert percentile([1.0] * 298, 99) is None


def test_break_even():
    assert break_even_images(1, 2.0, 11, 1.0) == 10
    assert break_even_images(1, 1.0, 11, 1.0) is None
    assert break_even_images(5, 2.0, 1, 1.0) == 0


def test_the_interval_of_a_mean():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert high - mean == pytest.approx(4.302653 / math.sqrt(3))
    assert mean - low == pytest.approx(high - mean)
    with pytest.raises(InputError):
        mean_interval([1.0])
