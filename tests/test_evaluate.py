"""evaluate.py: intervals, identity of points, judges side by side, coherence, MMLU, the doors."""

import random

import make_facts as mf


def test_wilson_by_a_published_example():
    """Guards against a wrong interval of accuracies, or one of width zero at 0 and 100."""
    assert [round(x, 1) for x in mf.wilson(10, 20)] == [29.9, 70.1] and mf.wilson(0, 0) is None
    assert mf.wilson(0, 20)[1] > 15 and mf.wilson(20, 20)[0] < 85


def test_interval_never_collapses():
    """Guards against intervals of width zero where all scores agree, and against answers counted as if independent."""
    for score in (0, 100):
        low, high = mf.interval([[score] * 10] * 20)
        assert low <= score <= high and 5 < high - low < 15
    low, high = mf.interval([[0] * 10, [100] * 10] * 2)  # four questions, not forty answers
    assert low < 15 and high > 85
    assert mf.interval([]) is None and mf.interval([[], []]) is None
    alone, together = mf.interval([[0], [100]] * 50), mf.interval([[0, 100]] * 50)
    assert alone[1] - alone[0] < 21 and together[1] - together[0] < 21


def test_interval_covers():
    """Guards against intervals that miss the truth more often than they say: 20 questions of 10 answers, whose own rates
    are spread (correlation 0, 0.1, 0.3) about 1, 3 and 50%. 1,000 draws each: 95.7 to 99.9%."""
    rng = random.Random(0)
    for p in (0.01, 0.03, 0.5):
        for rho in (0, 0.1, 0.3):
            hits = 0
            for _ in range(150):
                spread = (1 - rho) / rho if rho else None
                rates = [rng.betavariate(p * spread, (1 - p) * spread) if rho else p for _ in range(20)]
                low, high = mf.interval([[100.0 * (rng.random() < rate) for _ in range(10)] for rate in rates])
                hits += low <= 100 * p <= high
            assert hits >= 0.92 * 150, (p, rho, hits)
