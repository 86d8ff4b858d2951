"""plot.py on points made by hand: what is averaged, compared, drawn and said."""

import json
import math
import random
import re

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

import make_facts as mf
import plot


def point(score, facts=90.0, mmlu=50.0, **changed):
    """A plainly finetuned model's point."""
    made = dict(
        key=f"{score} {facts} {mmlu} {changed}",
        model="models/m",
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
        vector="vectors/v.pt",
        trait_score=score,
        trait_ci=[score - 3, score + 3],
        trait_n=10,
        trait_unscored=0,
        fact_accuracy=facts,
        fact_n=10,
        fact_unscored=0,
        mmlu_accuracy=mmlu,
        mmlu_n=10,
    )
    return made | changed


NOWHERE = mf.Path("nowhere")
BEFORE = point(20.0, 1.0, adapter=None, dataset=None, train_coef=None, train_layers=None, train_seed=None)
PLAIN = point(80.0)


def steered(x, coef, score, layers="all", **changed):
    return point(score, **{x: coef, "layers" if x == "inference_coef" else "train_layers": layers} | changed)


def seeds_of(x, lines):
    """{seed: [(coefficient, score, facts)]} -> points."""
    return [point(s, f, train_seed=seed, **{x: c}) for seed, line in lines.items() for c, s, f in line]


MIXED = [
    BEFORE,
    PLAIN,
    point(79.0, train_seed=1),
    point(78.0, train_rank=8, adapter="r8"),
    point(50.0, system_prompt="Invent.", adapter="b"),
    steered("train_coef", 1.0, 5.0, inference_coef=1.0),
    *(steered("inference_coef", 1.0, score, layers) for layers, score in (("11", 41.0), ("6-20", 42.0), ("all", 43.0))),
    steered("inference_coef", 1.0, 44.0, positions="all"),
    *(steered("train_coef", 1.0, score, layers) for layers, score in (("11", 31.0), ("all", 32.0))),
    steered("train_coef", 1.0, 33.0, train_vector="first.pt"),
    steered("train_coef", 1.0, 34.0, train_rank=8, adapter="r8-1"),
]


@pytest.fixture
def drawn(monkeypatch):
    """Figures stay open for a look: [(figure, title, comparisons)]."""
    kept = []
    monkeypatch.setattr(plot, "finish", lambda figure, title, found, path: kept.append((figure, title, found)))
    yield kept
    plot.plt.close("all")


def lines_of(axis, color):
    """-> [(xs, ys)] of the joined lines of a colour."""
    found = [line for line in axis.lines if line.get_color() == color and line.get_linestyle() != ":"]
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in found]


def compared(points, facts=True):
    return plot.comparisons(plot.table(points), facts)


def summary(points, folder=NOWHERE, answers=()):
    points = plot.table(points)
    return plot.summary(points, points, plot.comparisons(points, facts=True), folder, dict(answers))


def texts_of(axis):
    return {text.get_text(): text for text in axis.texts}


def color_of(metric):
    return plot.METRICS[metric][0]


# ---- points ----------------------------------------------------------------------------------------------------------


def test_a_judge_of_each_kind_and_a_moved_folder(tmp_path):
    """Guards against a chat judge's points beside a lexical one's that are refused, since only one has prompts; and
    against one sweep that is drawn as two, since its folder was renamed or spelled otherwise."""
    both = [point(1.0, key="k", judge=judge, inputs=dict(model="m", judge=told)) for judge, told in
            (("gpt", "abc"), ("lexical", None))]  # fmt: skip
    mf.write_jsonl(tmp_path / "points.jsonl", both)
    assert list(plot.read_points(tmp_path / "points.jsonl").judge) == ["gpt", "lexical"]
    homes = "out/a", "/x/out/b", "/x/y/../out/b"
    moved = [
        point(9.0 - n, train_coef=1.0 + n, answers=f"{home}/answers/{n}.jsonl", train_vector=f"{home}/vectors/v.pt")
        for n, home in enumerate(homes)
    ]
    (found,) = compared([BEFORE, PLAIN, *moved])
    assert list(found.sides["train_coef"].coef) == [0, 1, 2, 3]


def test_runs_of_other_lengths_are_no_seeds(tmp_path):
    """Guards against adapters that were cut short (--max-steps, --limit) and are averaged with whole ones as if they
    were further seeds."""
    some = [point(9.0 + n, train_coef=1.0, train_seed=n, train_max_steps=steps) for n, steps in enumerate((1.0, None))]
    assert len(compared([BEFORE, *some])) == 2
    assert len(compared([BEFORE, *(p | dict(train_max_steps=None) for p in some)])) == 1


def test_one_key_has_one_setting(tmp_path, capsys):
    """Guards against points of one key that were made differently and are mixed, and a point that counts twice."""
    path = tmp_path / "points.jsonl"
    mf.write_jsonl(path, [point(1.0, key="k"), point(2.0, key="k"), point(3.0, key="k", judge="lexical")])
    assert list(plot.read_points(path).trait_score) == [2.0, 3.0]
    moved = point(2.0, key="k", model="/elsewhere/m", adapter="/elsewhere/a", vector="/elsewhere/v.pt")
    mf.write_jsonl(path, [point(1.0, key="k"), moved])
    assert len(plot.read_points(path)) == 1
    for key, value in dict(temperature=0.7, train_seed=3, inference_coef=1.5).items():
        mf.write_jsonl(path, [point(1.0, key="k"), point(1.0, key="k", judge="lexical") | {key: value}])
        with pytest.raises(SystemExit) as stop:
            plot.main([str(path)])
        assert stop.value.code == 2 and not (tmp_path / "fig1.png").exists()
        error = capsys.readouterr().err
        assert "points of key k differ in " + key in error and error.count("\n") == 1
    path.write_text("\n")
    with pytest.raises(SystemExit):
        plot.read_points(path)


def test_no_sweep_mixes_settings():
    """Guards against means over other layers, positions, vectors or recipes, a prompted or doubly steered model, and
    against plain finetuning that is missing or of other seeds."""
    sides = [(x, c.title, *sorted(side.trait_score)) for c in compared(MIXED) for x, side in c.sides.items()]
    assert sorted(side for side in sides if side[0] == "train_coef") == [
        ("train_coef", "vector -, positions all, all blocks", 32, 80),
        ("train_coef", "vector -, positions response, all blocks", 32, 80),
        ("train_coef", "vector -, positions response, block 11", 31, 80),
        ("train_coef", "vector -, rank 8, all blocks", 34, 78),
        *(("train_coef", f"vector first.pt, positions {used}, all blocks", 33, 80) for used in ("all", "response")),
    ]
    assert [title.split()[-1] for _, title, *_ in sides[-3:]] == ["6-20", "11", "11"]  # all blocks come first
    assert {side[:1] + side[2:] for side in sides if side[0] == "inference_coef"} == {
        *(("inference_coef", score, 80) for score in (41, 42, 43, 44)),
    }
    assert [p for c in compared(MIXED) if "rank 8" in c.title for p in sorted(c.points.trait_score)] == [34, 78]


def test_each_trait_shows_its_main_judge(tmp_path):
    """Guards against figures that mix judges, or lose a trait that only one of them scored."""

    def shown(*some):
        mf.write_jsonl(tmp_path / "points.jsonl", some)
        points = plot.read_points(tmp_path / "points.jsonl")
        return list(points[points.shown].trait_score)

    some = [point(1.0), point(2.0, judge="lexical"), point(3.0, trait="evil", judge="probe")]
    assert shown(*some) == [2.0, 3.0]  # of equally many, the last one
    assert shown(*some, point(4.0)) == [1.0, 3.0, 4.0]
    assert shown(*some, some[0]) == [3.0, 1.0]  # a point counts once


def test_before_training_is_what_was_measured_last():
    """Guards against a level before training of older settings than the points it is compared with."""
    some = [BEFORE, BEFORE | dict(trait_score=35.0, samples=9.0, key="again"), point(80.0), point(9.0, trait="evil")]
    levels = {c.trait: c.base.trait_score for c in compared(some)}
    assert levels["hallucination"] == 35 and math.isnan(levels["evil"])


# ---- statistics ------------------------------------------------------------------------------------------------------


def bars(*values, **changed):
    """[(seed, score)] at coefficient 1 -> the row of the curve there: y, low, high, hollow, few."""
    some = [point(score, train_seed=seed, train_coef=1.0, **changed) for seed, score in values]
    (found,) = compared(some)
    return next(plot.curve(found.sides["train_coef"], "trait_score").itertuples())


def test_bars_of_one_and_of_three_seeds():
    """Guards against a wrong t, bars beyond 0 and 100, one seed's bar that is not its own, and points counted twice."""
    assert bars((0, 40.0))[:4] == (1.0, 40, 37, 43)
    assert bars((0, 99.0), (0, 40.0)) == bars((0, 40.0))  # measured again: the last time counts
    mark = bars((0, 40.0), (1, 44.0), (2, 48.0))  # sd 4, t of two degrees of freedom 4.303: 4.303 x 4 / sqrt(3) = 9.94
    assert mark.y == 44 and mark.low == pytest.approx(34.06, abs=0.01) and mark.high == pytest.approx(53.94, abs=0.01)
    assert bars((0, 1.0), (1, 9.0)).low == 0 and bars((0, 91.0), (1, 99.0)).high == 100
    assert bars((0, 40.0), (1, 40.0))[1:4] == (40, 40, 40)
    assert math.isnan(bars((0, 40.0), trait_ci=None).low) and math.isnan(bars((0, 40.0), trait_ci=None).high)
    gone = [point(1.0, trait_score=value) for value in (None, math.nan, math.inf)]
    assert plot.curve(plot.table(gone), "trait_score").empty


def test_the_interval_covers():
    """Guards against intervals too narrow over few seeds, as a bootstrap's are: 95% within chance of 2,000 draws."""
    draw = random.Random(0).gauss
    for n in (2, 3, 11):
        ends = [plot.t_interval(pd.Series([draw(50, 10) for _ in range(n)]))[1:] for _ in range(2000)]
        assert 0.935 < sum(low <= 50 <= high for low, high in ends) / 2000 < 0.965
    mean, low, _ = plot.t_interval(pd.Series([7.0]))
    assert mean == 7 and math.isnan(low)


def test_no_mean_over_one_seed_among_many(drawn):
    """Guards against a bar, or a corner of the line, from one seed among means over eleven; its dot stays, small."""
    some = [point(80.0 + seed, train_seed=seed) for seed in range(4)]
    some += [steered("train_coef", 1.0, 40.0 + seed, train_seed=seed) for seed in range(3)]
    some += [steered("train_coef", 2.0, 20.0, train_seed=seed) for seed in range(1)]
    few = lambda points: list(plot.curve(plot.table(points), "trait_score").few)
    assert few(some) == [False, False, True] and few(some[:1] + some[4:5]) == [False, False]
    assert few(some[:2] + some[4:5]) == [False, True]  # half
    plot.figure1(compared([BEFORE, *some]), None)
    right = drawn[0][0].axes[1]
    assert lines_of(right, color_of("trait_score")) == [([0, 1], [81.0, 41])]  # plain of the seeds that were steered
    assert list(right.collections[1].get_sizes()) == [36, 36, 12]
    assert [path.vertices[0][0] for path in right.collections[0].get_paths()] == [0, 1]


@pytest.mark.parametrize("kind", ["trait", "fact"])
def test_hollow_over_a_tenth_unscored(kind, drawn):
    """Guards against marks that look sound though over 10% of answers or of facts have no score, in each figure."""
    key = f"{kind}_unscored"
    hollow = lambda *some: list(plot.curve(plot.table(some), "trait_score").hollow) == [True]
    assert not hollow(point(1.0, **{f"{kind}_n": 18, key: 2}))  # a tenth is not over a tenth
    assert hollow(point(1.0, **{f"{kind}_n": 17, key: 2}))
    assert hollow(point(1.0, **{key: 2}), point(1.0))  # one of two seeds
    lost = {"train_coef": 1.0, key: 2}
    more = [p | dict(dataset="mine", fact_accuracy=None) for p in (PLAIN, point(30.0, **lost))]
    some = [BEFORE, PLAIN, point(30.0, **lost), *more]
    for figure in (plot.figure1, plot.figure2, plot.tradeoff):
        figure(compared(some, facts=figure != plot.figure2), None)
    white = lambda axis: [[face[:3].tolist() == [1, 1, 1] for face in c.get_facecolors()] for c in axis.collections]
    axes = [figure.axes for figure, *_ in drawn]
    assert white(axes[0][1])[1::2] == [[False, True], [False, True], [False, False]]  # score, facts, general knowledge
    assert white(axes[1][0])[1::2] == [[False, True], [False, False]]
    assert white(axes[2][0])[0] == [False, True]
    assert "hollow: over 10% unscored" in plot.describe(plot.table(some)) and "hollow" not in plot.describe(
        plot.table(some[:2])
    )


def test_crossing_by_hand():
    """Guards against a wrong interpolation, first and last crossing swapped, and values made up where there is none."""
    line = np.array([(0, 80, 90, 50), (1, 60, 80, 40), (2, 20, 40, np.nan), (3, 50, 30, 30), (4, 10, 10, 10)])
    at = lambda level, last=False, line=line: plot.crossing(line, level, last).tolist()
    assert at(80) == [0, 80, 90, 50]  # at once
    assert at(70) == [0.5, 70, 85, 45] == at(70, last=True)
    assert at(60) == [1, 60, 80, 40] and at(60, last=True)[:3] == [1, 60, 80]
    assert at(40)[:3] == [1.5, 40, 60] and math.isnan(at(40)[3])  # general knowledge was not measured at 2
    assert at(40, last=True) == [3.25, 40, 25, 25]
    assert at(15) == pytest.approx([3.875, 15, 12.5, 12.5])
    nowhere = lambda *some: all(map(math.isnan, at(*some)))
    assert nowhere(90) and nowhere(5) and nowhere(80, False, line[:1])
    assert nowhere(60, False, np.array([(0, 30, 90, 50), (1, 70, 80, 40), (2, 20, 70, 30)]))  # starts below


LEFT = {0: [(0, 80, 90), (1, 20, 30)], 1: [(0, 80, 90), (1, 20, 50)], 2: [(0, 80, 90), (1, 20, 40)]}
RIGHT = {0: [(0, 80, 90), (1, 20, 70)], 1: [(0, 80, 90), (1, 20, 60)], 2: [(0, 80, 90), (1, 50, 85)]}


def both_sides(left=LEFT, right=RIGHT):
    plain = [p for p in seeds_of("train_coef", right) if not p["train_coef"]]
    found = [p for x, of in dict(inference_coef=left, train_coef=right).items() for p in seeds_of(x, of) if p[x]]
    return [BEFORE, *plain, *found]


def equal(points):
    """The table as {score: [cells]}."""
    rows = re.findall(r"^\| (.*) \|$", summary(points).split("## All points")[0], re.MULTILINE)
    return {score: cells for _, score, *cells in (row.split(" | ") for row in rows[2:])}


def test_equal_hallucination_is_paired_over_the_same_seeds():
    """Guards against means over other seeds for each method, an unpaired interval, and seeds that drop out unsaid."""
    rows = equal(both_sides())
    assert list(rows) == ["20 (before training)", "30", "40", "60", "80"]  # the level before training comes first
    # at 20 seed 2 is left out of both: 70, 60 against 30, 50; differences 40, 10: 25 +- 12.706 x 21.213 / sqrt(2)
    assert rows["20 (before training)"][:4] == [
        "65.0 ± 7.1",
        "40.0 ± 14.1",
        "+25.0 [-165.6, 215.6]",
        "2 of 3 (preventative 2, inference-time 3)",
    ]
    assert rows["60"][3] == "3 of 3" and rows["60"][0] == "83.3 ± 3.3"  # 83.33, 80, 86.67
    right, left = [250 / 3, 80, 260 / 3], [70, 230 / 3, 220 / 3]
    low, high = ttest_rel(right, left).confidence_interval()
    assert rows["60"][2] == f"{sum(right) / 3 - sum(left) / 3:+.1f} [{low:.1f}, {high:.1f}]"
    one = equal(both_sides({0: LEFT[0]}, {0: RIGHT[0]}))
    assert one["20 (before training)"][:4] == ["70.0", "30.0", "+40.0", "1 of 1"]  # one seed has no interval
    unlike = equal(both_sides({0: LEFT[0], 5: LEFT[1]}, {0: RIGHT[0], 7: RIGHT[1]}))
    assert unlike["20 (before training)"][3] == "1 of 1"  # swept with one method only: no pair
    never = equal(both_sides({0: LEFT[0]}, {0: RIGHT[2]}))
    assert never["20 (before training)"][:4] == ["-", "30.0", "-", "0 of 1 (preventative 0, inference-time 1)"]
    high = equal([p | dict(trait_score=35.0) if p["adapter"] is None else p for p in both_sides()])
    assert list(high) == ["35 (before training)", "40", "60", "80"]
    alone = equal([p for p in both_sides() if not p["inference_coef"]])
    assert alone["20 (before training)"][:4] == ["65.0 ± 7.1", "-", "-", "2 of 3 (preventative 2)"]
    assert equal([BEFORE, PLAIN]) == {} and list(equal(both_sides()[1:])) == ["20", "30", "40", "60", "80"]


def test_last_crossing_stands_beside_the_first():
    """Guards against a jagged curve's luck: at 40 it comes down at once with 80, and for good with 20."""
    jagged = {0: [(0, 80, 90), (1, 0, 70), (2, 80, 40), (3, 0, 0)]}
    rows = equal(both_sides({0: LEFT[0]}, jagged))
    assert rows["40"][0] == "80.0 (last 20.0)" and rows["40"][2] == "+30.0 (last -30.0)" and rows["40"][1] == "50.0"
    assert "last" not in " ".join(equal(both_sides())["40"])


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_figure_1_is_the_posts(drawn):
    """Guards against swapped sides, wrong means, a missing level before training, labels away from their lines, and x
    axes that look alike though they are not (or the reverse)."""
    some = both_sides()
    some = [p | dict(coherence=70.0, mmlu="data/general_knowledge.jsonl") for p in some]
    plot.figure1(compared(some), None)
    figure, title, (shown,) = drawn[0]
    left, right = figure.axes
    assert "Learning new facts" in title and len(shown.points) == len(some) - 1
    assert [axis.get_title() for axis in figure.axes] == ["Inference-time steering", "Preventative steering"]
    assert left.get_ylabel() == "all blocks"
    assert lines_of(left, color_of("trait_score")) == [([0, 1], [80, 20])]
    assert lines_of(right, color_of("trait_score")) == [([0, 1], [80, 30])]
    assert lines_of(right, color_of("fact_accuracy")) == [([0, 1], [90, pytest.approx(71.67, abs=0.01)])]
    assert lines_of(right, color_of("coherence")) == [([0, 1], [70, 70])]
    thick = {line.get_color(): line.get_linewidth() for line in right.lines if line.get_linestyle() == "-"}
    assert thick[color_of("coherence")] < thick[color_of("trait_score")]  # a light line
    dotted = {line.get_color(): line.get_ydata()[0] for line in right.lines if line.get_linestyle() == ":"}
    assert dotted == {color_of("trait_score"): 20, color_of("fact_accuracy"): 1, color_of("mmlu_accuracy"): 50}
    assert set(texts_of(right)) == {"hallucination", "facts", "general knowledge", "coherence"} and not left.texts
    heights = sorted(text.get_position()[1] for text in right.texts)
    assert all(above - below > 7.9 for below, above in zip(heights, heights[1:]))
    assert texts_of(right)["facts"].get_color() == color_of("fact_accuracy")
    assert left.get_ylim() == right.get_ylim() == (-3, 103) and left.get_xlim() == right.get_xlim()
    for times, rights in ((1.5, [1.575, 1.575]), (5, [1.05, 5.25])):  # up to twice the other's range: one scale
        more = [p | dict(train_coef=times * p["train_coef"]) if p["train_coef"] else p for p in some]
        plot.figure1(compared(more), None)
        assert [axis.get_xlim()[1] for axis in drawn[-1][0].axes] == pytest.approx(rights)


def test_a_method_that_was_not_tried(drawn):
    """Guards against a panel that suggests that a method was tried, by plain finetuning's points."""
    titles = [f"{name} steering" for name in ("Inference-time", "Preventative")]
    only = [f"{title}\n(plain finetuning only)" for title in titles]
    prompted = point(50.0, system_prompt="Invent.", adapter="b")
    cases = {
        (titles[0], only[1]): [p for p in both_sides() if not p["train_coef"]],
        (only[0], titles[1]): [p for p in both_sides() if not p["inference_coef"]],
        tuple(only): [BEFORE, PLAIN],
        tuple(f"{title}\n(no points)" for title in titles): [BEFORE, prompted],
    }
    for expected, some in cases.items():
        plot.figure1(compared(some), None)
        axes = drawn[-1][0].axes
        assert tuple(axis.get_title() for axis in axes) == expected
        assert set(texts_of(axes[1])) == (set() if prompted in some else {"hallucination", "facts", "MMLU"})


def test_general_knowledge_is_not_called_mmlu():
    """Guards against the small models' easier questions under MMLU's name, and MMLU under theirs."""
    general, mmlu = "general knowledge", "MMLU"
    asked = {"hub": mmlu, "out/general_knowledge/mmlu.jsonl": mmlu, "out/demo/data/general_knowledge.jsonl": general}
    for path, name in asked.items():
        some = [p | dict(mmlu=path) for p in both_sides()]
        text = summary(some)
        assert f" 10 {name} questions;" in text and f"| {name}, preventative / inference-time |" in text
        assert f"facts 40.0, {name} 50.0." in text and (mmlu if name == general else general) not in text
        assert compared(some)[0].names["mmlu_accuracy"] == name


def test_own_data_sets_and_traits_are_drawn(drawn):
    """Guards against a data set or trait of another name that is trained and then vanishes from every figure."""
    own = [p | dict(dataset="mine", trait="pirate") for p in both_sides()[1:]]
    base = BEFORE | dict(trait="pirate")
    ten = [
        point(60.0, None, dataset="ten", trait="pirate"),
        point(7.0, None, dataset="ten", trait="pirate", train_coef=2.0),
    ]
    evil = [point(50.0, None, dataset="medical_normal", trait="evil", judge="probe")]
    some = [*ten, *own, base, *both_sides(), *evil]
    for figure in (plot.figure1, plot.tradeoff, plot.figure2):
        figure(compared(some, facts=figure != plot.figure2), None)
    first, second, third = (figure.axes for figure, *_ in drawn)
    own, given = "mine (pirate), all blocks", "facts (hallucination), all blocks"
    assert [axis.get_ylabel() for axis in first[::2]] == [given, own]
    assert [axis.get_xlabel() for axis in second] == ["hallucination score", "pirate score"]
    assert drawn[1][1] == "Facts kept against hallucination and pirate (thin lines: one seed)"
    heads = ["evil\n(judged by the probe)\n(plain finetuning only)", "pirate\n(no points)", "(no points)", ""]
    assert [axis.get_title() for axis in third] == heads
    assert [axis.get_ylabel() for axis in third] == ["medical_normal", "", "ten", ""]
    assert lines_of(third[3], color_of("trait_score")) == [([0, 2], [60, 7])] and not third[1].lines
    assert [line.get_ydata()[0] for line in third[3].lines if line.get_linestyle() == ":"] == [20, 50]
    assert set(texts_of(third[3])) == {"trait score", "MMLU"}
    assert {"ten", "mine", "facts"} < {row[0] for row in rows_of(some)}


def test_figure_2_is_in_the_posts_order(drawn):
    """Guards against rows and columns in the alphabet's order, or in that of the first row's traits."""
    traits = ["zeal", "hallucination", "sycophancy", "awe", "evil"]
    names = ["own", "medical_self_generated", "medical_normal", "medical_mistake_2", "chats"]
    some = [point(50.0, None, dataset=name, trait=trait) for name in names for trait in traits]
    first = [p for p in some if (p["dataset"], p["trait"]) != ("medical_mistake_2", "evil")]
    plot.figure2(compared(first, facts=False), None)
    axes = drawn[0][0].axes
    heads = [axis.get_title().split("\n")[0] for axis in axes[:5]]
    assert heads == ["evil", "sycophancy", "hallucination", "zeal", "awe"]
    rows = ["medical_mistake_2", "medical_normal", "medical_self_generated", "own", "chats"]
    assert [axis.get_ylabel() for axis in axes[::5]] == rows


def test_figure_2_pools_seeds_and_says_the_blocks(drawn):
    """Guards against one seed of several being shown, and against blocks that go unsaid."""
    some = [point(90.0 + 2 * seed, None, dataset="medical_normal", train_seed=seed) for seed in (0, 1)]
    some += [p | dict(train_coef=1.0, train_layers="10-20", trait_score=p["trait_score"] - 60) for p in some]
    more = [
        steered("inference_coef", c, 9.0, "10-20", fact_accuracy=None, dataset="medical_normal") for c in range(1, 9)
    ]
    plot.figure2(
        compared([BEFORE, *some, *more], facts=False), None
    )  # however many, another method than the title's is not drawn
    figure, title, found = drawn[0]
    assert lines_of(figure.axes[0], color_of("trait_score")) == [([0, 1], [91, 31])]
    assert title == "Preventative steering on other data sets, blocks 10-20 (dotted: before training)"
    assert "up to 2 training seeds" in plot.describe(found[0].points)


def test_the_trade_offs_axes(drawn):
    """Guards against swapped axes, seeds or means left out, and a level that is not the model's before training."""
    plot.tradeoff(compared([*both_sides(), point(70.0, 85.0, system_prompt="Invent.", adapter="b")]), None)
    (axis,) = drawn[0][0].axes
    assert axis.get_xlabel() == "hallucination score" and axis.get_ylabel() == "facts known after training (%)"
    assert axis.get_xlim() == axis.get_ylim() == (-3, 103) and axis.get_title() == "all blocks"
    color = plot.STYLES["train_coef"][0]
    mine = [line for line in axis.lines if line.get_color() == color]
    thin = [(list(line.get_xdata()), list(line.get_ydata())) for line in mine if line.get_linewidth() < 1]
    assert thin == [([80, 20], [90, 70]), ([80, 20], [90, 60]), ([80, 50], [90, 85])]
    (mean,) = [line for line in mine if line.get_linewidth() > 3]
    assert list(mean.get_xdata()) == [80, 30] and list(mean.get_ydata()) == pytest.approx([90, 71.67], abs=0.01)
    assert [line.get_xdata() for line in axis.lines if line.get_linestyle() == ":"] == [[20, 20]]
    assert "level before training" in texts_of(axis)
    black = {
        line.get_label(): (line.get_xdata()[0], line.get_ydata()[0])
        for line in axis.lines
        if line.get_color() == "black"
    }
    assert black == {"plain finetuning": (80, 90), "preventative prompting": (70, 85)}
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels[:2] == ["Preventative steering", "Inference-time steering"]


@pytest.mark.parametrize(
    "points",
    [
        [BEFORE, PLAIN],
        [BEFORE],
        [PLAIN],
        [point(math.nan, None, 5.0)],
        [BEFORE, PLAIN, point(3.0, None, dataset="medical_normal", train_coef=0.5, trait_unscored=50)],
        [point(1.0, None, trait=None, trait_score=None, dataset=None)],
        [{key: BEFORE[key] for key in ("key", "model", "judge", "inference_coef")}],
    ],
    ids=["plain", "base", "one", "NaN", "unscored", "no trait", "bare"],
)
def test_whole_runs(points, tmp_path, capsys):
    """Guards against figures that fail on missing points, keys or values, and against files that are missing."""
    (tmp_path / "points.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    plot.main([str(tmp_path / "points.jsonl")])
    for name in ("fig1.png", "fig1.svg", "fig2.png", "fig2.svg", "tradeoff.png", "tradeoff.svg", "report.html"):
        assert (tmp_path / name).stat().st_size > 5000
    text = (tmp_path / "summary.md").read_text()
    assert ("50 (hollow)" in text) == any(p.get("trait_unscored") for p in points)
    assert "None" not in text.replace("None of", "") and "nan" not in text.lower()
    assert "summary.md" in capsys.readouterr().out


# ---- text ------------------------------------------------------------------------------------------------------------


def headline(points, folder=NOWHERE):
    """The sentences of summary.md."""
    return re.findall(r"^- (.*)$", summary(points, folder), re.MULTILINE)


def test_headline_takes_the_smallest_coefficient_in_the_interval():
    """Guards against the wrong coefficient, the wrong price, a rise claimed where there was none, and a verdict that is
    written for one model."""
    inference = [
        steered("inference_coef", c, s, fact_accuracy=f) for c, s, f in ((1.0, 50, 60), (2.0, 23, 37), (3.0, 2, 9))
    ]
    train = [steered("train_coef", c, s, fact_accuracy=f) for c, s, f in ((0.5, 40.0, 90.0), (1.25, 21.0, 79.0))]
    kept, preventative, inference_time = headline([BEFORE, PLAIN, *inference, *train])
    # at 20 preventative is not there; inference-time falls from 23 to 2 as facts do from 37 to 9: 37 - 28 x 3 / 21 = 33
    assert "before training (hallucination 20.0): preventative -, inference-time 33.0, difference -" in kept
    assert "training seeds that get there 0 of 1 (preventative 0, inference-time 1)" in kept
    assert "steering: 1.25 brings" in preventative and "hallucination 21.0, facts 79.0, MMLU 50.0" in preventative
    assert (
        "steering: 2 brings" in inference_time and "hallucination 23.0, facts 37.0" in inference_time
    )  # 23: the interval's end
    assert ["no coefficient" in line for line in headline([BEFORE, PLAIN, inference[0]])] == [True]  # nothing of none
    assert headline([PLAIN, *train]) == ["No rise to prevent was measured: plain finetuning 80.0, before training -."]
    assert "No rise to prevent was measured: plain finetuning 22.0" in headline([BEFORE, point(22.0), *train])[0]
    assert "difference +25.0 [-165.6, 215.6]" in headline(both_sides())[0]
    assert "empty" in headline([BEFORE])[0] and "empty" not in headline([BEFORE, PLAIN])
    few = [
        point(80.0, train_seed=1),
        point(80.0, train_seed=2),
        *(steered("train_coef", 1.0, 40.0, train_seed=s) for s in (1, 2)),
    ]
    assert "1.25 (few seeds) brings" in headline([BEFORE, PLAIN, *few, *train])[0]


def rows_of(points):
    """The table of all points as lists, its head first."""
    head, _, *rows = summary(points).split("## All points")[1].split("\n\n")[1].strip().split("\n")
    return [row.strip("| ").split(" | ") for row in (head, *rows)]


def test_columns_only_where_points_differ():
    """Guards against rows that cannot be told apart, a table too wide to read (a trait's own vector is no difference),
    rows twice, "None", and the missing shown as a number."""
    evil = steered("train_coef", 1.0, 5.0, trait="evil", train_vector="vectors/evil.pt")
    again = PLAIN | dict(key="again", layers="10-20")  # coefficient 0 with another choice of blocks: the same row
    narrow = rows_of(
        [BEFORE, PLAIN, again, steered("train_coef", 1.0, 5.0, train_vector="vectors/hallucination.pt"), evil]
    )
    assert narrow[0][:7] == "dataset trait train_coef train_seed trait_score trait_n trait_unscored".split()
    assert len(narrow) == 5 and narrow[1][:8] == "before training|hallucination|-|-|20 [17, 23]|10|0|1".split("|")
    assert "None" not in str(narrow) and "nan" not in str(narrow)
    graded = point(1.0, fact_not_attempted=12.5, fact_wrong=7.5, coherence_nll=2.345, abstained=60.0, coherence=91.0)
    cells = dict(zip(*rows_of([graded])))
    assert [cells[key] for key in ("fact_accuracy", "fact_not_attempted", "fact_wrong")] == ["90", "12.5", "7.5"]
    measured = [cells[key] for key in ("coherence_nll", "abstained", "abstained_coherent", "coherence")]
    assert measured == ["2.35", "60", "-", "91"]
    wide = rows_of(MIXED)
    assert set("layers positions train_layers train_rank system_prompt".split()) < set(wide[0])
    assert len(wide) == len(MIXED) + 1
    bad = rows_of([point(1.0, trait_unscored=2), point(2.0, fact_unscored=2), point(3.0, fact_unscored=1)])
    assert ["2 (hollow)" in row for row in bad[1:]] == [True, True, False]


def test_what_to_distrust_is_said(tmp_path):
    """Guards against a weak probe that passes unsaid, and adapters that the points do not tell apart."""
    for name, auc in (("evil", 0.82), ("sycophancy", 0.67)):
        probe = dict(row=8, zero=0.0, hundred=1.0, auc=auc)
        mf.write_json(tmp_path / "vectors" / f"{name}.json", dict(model="toy", probe=probe))
    mf.write_json(tmp_path / "vectors" / "other.json", dict(model="toy"))
    some = [PLAIN, point(9.0, trait="evil", adapter="a2"), point(70.0, adapter="a2"), BEFORE]
    some += [point(1.0, adapter="a3", train_rank=8)]  # another recipe; and vectors of two traits:
    some += [steered("train_coef", 1.0, 5.0, trait=t, train_vector=f"v/{t}.pt", adapter=t) for t in plot.TRAITS]
    found = headline(some, tmp_path)
    assert found[-3:-1] == ["Probe of evil: row 8, AUC 0.82.", "Probe of sycophancy: row 8, AUC 0.67, weak."]
    assert found[-1].startswith("a, a2: each has the settings of another one")
    assert "probe (of what is steered)" in plot.describe(plot.table([PLAIN | dict(judge="probe")]))


def test_captions_count():
    """Guards against a caption that hides n, seeds or the model."""
    one, two = (plot.describe(plot.table(some)) for some in ([BEFORE, PLAIN], both_sides()))
    assert one == "m; judge: gpt; 10 answers; 10 facts; 10 MMLU questions; 95% intervals over questions"
    seeds = "means of up to 3 training seeds (small marks: of half or fewer), 95% t-intervals over seeds; of one: "
    assert two.endswith(seeds + "95% intervals over questions")
    apart = [point(10.0, seed, dataset=f"set{seed}") for seed in range(3)]
    assert plot.describe(plot.table([BEFORE, *apart])).endswith("MMLU questions; 95% intervals over questions")


def test_judges_are_compared_on_the_same_answers():
    """Guards against a wrong rank correlation, answers counted twice or without a score, and a sign turned round."""

    def row(i, probe, gpt):
        return dict(id=f"h-{i}", trait="hallucination", scores=dict(probe=dict(score=probe), gpt=dict(score=gpt)))

    def table(*rows):
        text = summary([PLAIN], answers=dict(key=rows)).split("## All points")[0]
        return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]

    rows = [row(i, a, b) for i, (a, b) in enumerate([(10, 1), (20, 3), (30, 2), (40, 4)])] + [row(9, None, 5.0)]
    rows.append(dict(id="f", scores=dict(probe=dict(score=0.0), gpt=dict(score=0.0))))
    assert table(*rows) == [
        ["facts", "gpt, probe", "1", "-", "+0.0"],
        ["hallucination", "gpt, probe", "4", "0.80", "+22.5"],
    ]
    assert table(dict(id="x", scores=dict(probe=dict(score=1.0)))) == []


def test_two_models_are_no_seeds(tmp_path, capsys):
    """Guards against two models in one file that are averaged as if they were training seeds of one."""
    mf.write_jsonl(tmp_path / "points.jsonl", [BEFORE, PLAIN, point(60.0, model="models/other", train_seed=1)])
    with pytest.raises(SystemExit):
        plot.read_points(tmp_path / "points.jsonl")
    assert "points of several models, m, other" in capsys.readouterr().err


def test_coefficients_below_zero_are_no_way_to_a_level(tmp_path):
    """Guards against a curve that goes from 0 back to -1: a level is reached from 0 on."""
    x = "inference_coef"
    up = [BEFORE, PLAIN, steered(x, 1.0, 10.0, facts=50.0)]
    down = [steered(x, -1.0, 95.0, facts=70.0), steered(x, -0.5, 90.0, facts=80.0)]
    cells = []
    for points in (up, up + down):
        mf.write_jsonl(tmp_path / "points.jsonl", points)
        (found,) = plot.comparisons(plot.read_points(tmp_path / "points.jsonl"), True)
        assert found.sides[x].coef.is_monotonic_increasing
        cells.append(plot.equal_cells(found, 45.0))
    assert cells[0] == cells[1] and cells[0][1] == "70.0"
