"""plot.py on points made by hand: what is averaged, what bars mean, what is read off the sweeps."""

import math

import pytest

import plot


def point(score, facts=90.0, mmlu=50.0, **changed):
    return (
        dict(
            key="k",
            model="m",
            adapter="a",
            dataset="facts",
            trait="hallucination",
            judge="gpt",
            train_coef=0.0,
            train_layers="all",
            train_positions="all",
            train_seed=0,
            inference_coef=0.0,
            layers="all",
            positions="response",
            vector="v.pt",
            trait_score=score,
            trait_ci=[score - 3, score + 3],
            trait_n=10,
            fact_accuracy=facts,
            fact_n=10,
            mmlu_accuracy=mmlu,
            mmlu_n=10,
        )
        | changed
    )


BEFORE = point(20.0, 1.0, adapter=None, dataset=None, train_coef=None, train_layers=None, train_seed=None)
PLAIN = point(80.0)


def steered(x, coef, score, layers="all", **changed):
    return point(score, **{x: coef, "layers" if x == "inference_coef" else "train_layers": layers} | changed)


MIXED = [
    BEFORE,
    PLAIN,
    point(50.0, system_prompt="Invent.", adapter="b"),
    steered("train_coef", 1.0, 5.0, inference_coef=1.0),
    *(steered("inference_coef", 1.0, score, layers) for layers, score in (("11", 41.0), ("6-20", 42.0), ("all", 43.0))),
    steered("inference_coef", 1.0, 44.0, positions="all"),
    *(steered("train_coef", 1.0, score, layers) for layers, score in (("11", 31.0), ("all", 32.0))),
    steered("train_coef", 1.0, 33.0, train_vector="first.pt"),
]


def test_no_mark_mixes_settings(monkeypatch):
    """Guards against marks that average other layers, positions or vectors, a prompted or doubly steered model, and against a panel without plain finetuning."""
    found = {name: [p["trait_score"] for p in some] for name, _, _, some in plot.sweeps(plot.facts_of(MIXED))}
    assert found == {
        "Inference-time steering, all blocks, positions all": [80, 44],
        "Inference-time steering, all blocks, positions response": [80, 43],
        "Inference-time steering, blocks 6-20, positions response": [80, 42],
        "Inference-time steering, block 11, positions response": [80, 41],
        "Preventative steering, all blocks, vector first.pt": [80, 33],
        "Preventative steering, all blocks, vector v.pt": [80, 32],
        "Preventative steering, block 11, vector v.pt": [80, 31],
    }
    drawn = {}
    monkeypatch.setattr(
        plot,
        "finish",
        lambda figure, *_: drawn.update(
            {axis.get_title(): list(axis.lines[1].get_ydata()) for axis in figure.axes if axis.get_title()}
        ),
    )
    plot.figure1(MIXED, None)
    assert drawn == found
    drawn.clear()
    plot.figure1([BEFORE, PLAIN, MIXED[6], MIXED[9]], None)  # all blocks alone look as in the post
    assert drawn == {"Inference-time steering": [80, 43], "Preventative steering": [80, 32]}


def test_bars_of_one_and_of_three_seeds():
    """Guards against bars that shrink with every seed though all answer the same questions, leave the seeds' spread out, or count a point twice that was measured twice."""

    def bars(*values):
        return plot.curve(
            [point(score, train_seed=seed, train_coef=1.0) for seed, score in values],
            "train_coef",
            "trait_score",
            "trait_ci",
        )[0]

    assert bars((0, 40.0)) == (1.0, 40, 37, 43, True, [40])
    assert bars((0, 99.0), (0, 40.0)) == bars((0, 40.0))
    x, mean, low, high, _, seeds = bars(
        (0, 40.0), (1, 44.0), (2, 48.0)
    )  # spread 4, t of two degrees 4.30: 4.30 x 4 / sqrt(3) = 9.93; with 3: 10.37
    assert mean == 44 and mean - low == pytest.approx(10.37, abs=0.01) == high - mean and seeds == [40, 44, 48]
    assert bars((0, 1.0), (1, 9.0))[2] == 0  # clipped
    assert math.isclose(bars((0, 40.0), (1, 40.0))[3], 43)


def test_equal_hallucination_by_hand():
    """Guards against a wrong interpolation, the last instead of the first crossing, and values made up where a sweep does not cross."""
    sweep = [(0, 80, 90, 50), (1, 60, 80, 40), (2, 20, 40, None), (3, 50, 30, 30), (4, 10, 10, 10)]
    assert plot.at_level(sweep, 70) == (0.5, 85, 45)
    assert plot.at_level(sweep, 60) == (1, 80, 40)
    assert plot.at_level(sweep, 40) == (1.5, 60, None)  # the first of three crossings; MMLU was not measured
    assert plot.at_level(sweep, 15) == pytest.approx((3.875, 12.5, 12.5))
    assert plot.at_level(sweep, 90) is None and plot.at_level(sweep, 5) is None and plot.at_level(sweep[:1], 80) is None
    assert plot.at_level([(0, 30, 90, 50), (1, 70, 80, 40), (2, 20, 70, 30)], 60) is None  # starts below


def test_seeds_are_read_one_by_one():
    """Guards against reading the level off the mean of the seeds, and seeds that never reach it passing unsaid."""
    seeds = [
        p
        for seed, end, facts in ((0, 40.0, 70.0), (1, 20.0, 60.0), (2, 75.0, 90.0))
        for p in (point(80.0, train_seed=seed), steered("train_coef", 2.0, end, fact_accuracy=facts, train_seed=seed))
    ]
    table = plot.kept([BEFORE, *seeds, point(80.0, train_seed=3)])
    assert (
        "| 60 | Preventative steering | 0.83 (0.67 to 1.00) | 80.0 (80.0 to 80.0) | 50.0 (50.0 to 50.0) | 2 of 3 |"
        in table
    )  # facts 90 -> 70 half-way, 90 -> 60 a third of the way
    assert "| 30 | Preventative steering | 1.67 | 65.0 | 50.0 | 1 of 3 |" in table
    assert "| 25.0 (before training + 5) | Preventative steering | 1.83 | 62.5 | 50.0 | 1 of 3 |" in table
    assert plot.kept([BEFORE, PLAIN]) == []


def test_intervals_resample_whole_questions():
    """Guards against intervals at equal hallucination that take answers to one question, or the points of a sweep, for independent, or leave the facts out."""

    def answers(key, coef, per_question, facts):
        rows = [
            dict(kind="trait", question=f"q{q}", score=score) for q, score in enumerate(per_question) for _ in range(10)
        ]
        rows += [dict(kind="fact", question=f"f{f}", score=score) for f, score in enumerate(facts)] + [
            dict(kind="trait", question="q0", score=None)
        ]
        return steered("train_coef", coef, sum(per_question) / 2, key=key, fact_accuracy=sum(facts) / 2), dict(gpt=rows)

    found = [
        answers("a", 0.0, (100, 100), (100, 100)),
        answers("b", 2.0, (0, 100), (0, 100)),
        answers("c", 4.0, (0, 0), (0, 0)),
    ]
    drawn = plot.resampled(found, "gpt")
    assert (
        set(drawn["b"][0]) == set(drawn["b"][1]) == {0, 50, 100}
        and set(drawn["a"][0]) == {100}
        and (drawn["b"][0] != drawn["b"][1]).any()
    )
    assert (plot.resampled([*found, answers("d", 1.0, (0, 100), (0, 100))], "gpt")["d"][0] == drawn["b"][0]).all()
    table = plot.kept([point for point, _ in found], found)
    assert (
        "| 60 | Preventative steering | 1.60 | 60.0 [0.0, 100.0] | 50.0 | 1 of 1 |" in table
    )  # both questions the invented one and both facts the lost one: all lost before the level
    assert "| 60 | Preventative steering | 1.60 | 60.0 | 50.0 | 1 of 1 |" in plot.kept([point for point, _ in found])
    twin = [
        (p | dict(key=f"{p['key']}2", inference_coef=p["train_coef"], train_coef=0.0), rows) for p, rows in found[1:]
    ]  # the same answers by the other method
    assert "At 60, all blocks: +0.0 [0.0, 0.0]." in plot.kept([point for point, _ in found + twin], found + twin)[0]


def test_headline_follows_the_numbers(tmp_path):
    """Guards against a verdict that is written for one model, a rise claimed where there was none, and a probe that is not named as such."""
    rise = [BEFORE, PLAIN, steered("train_coef", 1.0, 22.0)]
    assert plot.headline(rise) == [
        "Preventative steering: coefficient 1 brings hallucination into the untrained model's interval (20.0 [17.0, 23.0]): "
        "hallucination 80.0 -> 22.0, new facts 90.0 -> 90.0, MMLU accuracy 50.0 -> 50.0."
    ]
    assert plot.headline([BEFORE | dict(trait_score=95.0), *rise[1:]])[0].startswith(
        "No room: the model before training scores 95.0"
    )
    assert plot.headline([BEFORE, point(22.0), *rise[2:]])[0].startswith(
        "Nothing to prevent: plain finetuning ends at 22.0"
    )
    assert "the very direction that is steered" in plot.headline([p | dict(judge="probe") for p in rise])[-1]
    text = plot.summary([*rise, point(70.0, adapter="a2")], tmp_path, [], [])
    assert "- a, a2: the points do not tell these adapters apart" in text and "apart" not in plot.summary(
        rise, tmp_path, [], []
    )


def test_columns_only_where_points_differ():
    """Guards against two rows of the table that cannot be told apart, and a table too wide to read: a trait's own vector is no difference."""
    narrow = plot.points_table(
        [
            BEFORE,
            PLAIN,
            steered("train_coef", 1.0, 5.0),
            steered("train_coef", 1.0, 5.0, trait="evil", train_vector="evil.pt"),
        ]
    )
    assert not any(key in narrow[0] for key in ("layers", "positions", "vector", "prompt"))
    wide = plot.points_table(MIXED)
    assert "inference coef | layers | positions | train_layers | train_vector | system_prompt | trait score" in wide[0]
    assert len({row.count("|") for row in wide}) == 1
    assert any(
        row.startswith("| facts | hallucination | 0 | 1 | 6-20 | response | - | - | - | 42.0") for row in wide
    ) and any("| 0 | 0 | - | - | - | - | Invent. | 50.0" in row for row in wide)
