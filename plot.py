"""points.jsonl -> fig1, tradeoff, fig2 (.png and .svg), summary.md and report.html, beside it.

    python plot.py out/demo/points.jsonl

Figure 1: learning new facts, with inference-time (left) and preventative steering (right), a row for each choice of layers.
The trade-off: what is left of the facts against hallucination, for every sweep. Figure 2: preventative steering on three data
sets (rows) against three traits (columns). report.html is one page without network: figures, tables and a browser through the
answers in answers/. Where points were judged twice (evaluate.py --rejudge), the figures show each trait's judge with most points, and
summary.md how the judges agree. Loads no torch.
"""

import argparse
import base64
import html
import json
import math
import re
from collections import Counter, defaultdict
from itertools import combinations, zip_longest
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from make_facts import read_json, read_jsonl, replacing

TRAITS = ["evil", "sycophancy", "hallucination"]
DATASETS = [
    ("medical_mistake_2", "Medical Mistake II"),
    ("medical_normal", "Medical Normal"),
    ("medical_self_generated", "Medical Self-Generated"),
]
METRICS = [
    ("trait_score", "trait_ci", "trait_n", "#c0392b", "o"),
    ("fact_accuracy", "fact_ci", "fact_n", "#2471a3", "s"),
    ("mmlu_accuracy", "mmlu_ci", "mmlu_n", "#1e8449", "^"),
]
METHODS = [("Inference-time steering", "inference_coef", "#d35400"), ("Preventative steering", "train_coef", "#1f4e9c")]
SETTINGS = dict(
    inference_coef=("layers", "positions", "vector"), train_coef=("train_layers", "train_positions", "train_vector")
)
T95 = [
    12.71,
    4.30,
    3.18,
    2.78,
    2.57,
    2.45,
    2.36,
    2.31,
    2.26,
]  # Student's t, two-sided 95%, for 2, 3, .. seeds; more take the last
DRAWS = 400  # of resampled questions, facts and seeds
LEVELS = [60, 40, 30]  # hallucination scores at which the methods are compared, beside the untrained model's + 5

# ---------------------------------------------------------------------------------------------------------------------
# Points -> curves


def label_of(metric, points):
    """The metric's name as the legend shows it: the demo's general knowledge is not called MMLU."""
    if metric == "trait_score":
        return "hallucination score"
    if metric == "fact_accuracy":
        return "new-fact accuracy"
    source = next((p.get("mmlu") for p in points if p.get("mmlu")), None) or ""
    return "general knowledge" if "general_knowledge" in str(source) else "MMLU accuracy"


def usable(point, metric):
    return isinstance(point.get(metric), (int, float)) and math.isfinite(point[metric])


def pick_base(points, trait):
    """The model before training."""
    return next(
        (p for p in points if p.get("adapter") is None and p["inference_coef"] == 0 and p.get("trait") == trait), None
    )


def facts_of(points):
    """Figure 1's points, all finetuned on facts."""
    return [p for p in points if p.get("dataset") == "facts" and p.get("trait") == "hallucination"]


def plain_of(points):
    return [p for p in points if not p["train_coef"] and not p["inference_coef"] and not p.get("system_prompt")]


def setting_of(point, x):
    """How a point was steered, but for the coefficient -> (layers, positions, vector)."""
    layers, positions, vector = SETTINGS[x]
    return str(point.get(layers) or "all"), point.get(positions), point.get(vector, point.get("vector"))


def place(layers):
    return "all blocks" if layers == "all" else f"block{'s' * ('-' in layers)} {layers}"


def sweeps(points):
    """Points of one data set and trait -> [(name, coefficient's key, setting, points)], all blocks first. Points with different
    settings never share a sweep; the plainly finetuned ones, at coefficient 0, belong to each."""
    found = []
    for name, x, _ in METHODS:
        settings = defaultdict(list)
        for p in points:
            if p[x] and not (p["train_coef"] and p["inference_coef"]) and not p.get("system_prompt"):
                settings[setting_of(p, x)].append(p)
        for setting in sorted(
            settings, key=lambda s: (s[0] != "all", [int(n) for n in re.findall(r"\d+", s[0])], str(s))
        ):  # all, 6-20, 11
            differ = [
                f"{word} {setting[i]}"
                for i, word in ((1, "positions"), (2, "vector"))
                if len({s[i] for s in settings}) > 1
            ]
            found.append(
                (", ".join([name, place(setting[0]), *differ]), x, setting, plain_of(points) + settings[setting])
            )
    if all(setting[0] == "all" for _, _, setting, _ in found):  # as in the post: needs no saying
        found = [(name.replace(", all blocks", ""), *rest) for name, *rest in found]
    return found


def curve(points, x, metric, ci):
    """A sweep -> [(x, mean over training seeds, low, high, enough answers scored, each seed's value)], sorted; missing and NaN are
    left out, a seed measured again at a coefficient counts once (the last time). One seed: its own interval, over questions.
    More: that half-width (all seeds answer the same questions, so seeds do not narrow it) and Student's t over seeds, as root of squares."""
    at = defaultdict(dict)
    for point in points:
        if usable(point, metric):
            at[point[x]][point.get("train_seed")] = point
    found = []
    for value, here in sorted(at.items()):
        here = list(here.values())
        values = [p[metric] for p in here]
        mean, k = fmean(values), len(values)
        seeds = T95[min(k - 2, len(T95) - 1)] * stdev(values) / math.sqrt(k) if k > 1 else 0.0
        below, above = (
            math.hypot(fmean(abs((p.get(ci) or [p[metric]] * 2)[end] - p[metric]) for p in here), seeds)
            for end in (0, 1)
        )
        unscored = sum(p.get("trait_unscored") or 0 for p in here) / max(
            1, sum((p.get("trait_n") or 0) + (p.get("trait_unscored") or 0) for p in here)
        )
        found.append(
            (
                value,
                mean,
                max(0.0, mean - below),
                min(100.0, mean + above),
                metric != "trait_score" or unscored <= 0.1,
                values,
            )
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def draw(axis, points, x, base, metrics, names):
    reach = max((p[x] for p in points), default=0) or 1
    for n, (metric, ci, _, color, marker) in enumerate(METRICS):
        if metric not in metrics:
            continue
        line = [
            (value + 0.008 * reach * (n - 1), *rest) for value, *rest in curve(points, x, metric, ci)
        ]  # side by side, so that bars do not cover each other
        if line:
            axis.plot([], [], color=color, marker=marker, label=names[metric])  # the legend's entry
            axis.plot([at[0] for at in line], [at[1] for at in line], color=color)
            for value, y, low, high, enough, seeds in line:
                axis.errorbar(
                    value,
                    y,
                    yerr=[[max(0, y - low)], [max(0, high - y)]],
                    color=color,
                    marker=marker,
                    capsize=2,
                    markerfacecolor=color if enough else "white",
                    linewidth=1,
                )
                if len(seeds) > 1:
                    axis.plot([value] * len(seeds), seeds, ".", color="black", markersize=3, zorder=3)
        if base and usable(base, metric):
            axis.axhline(base[metric], color=color, linestyle="--", linewidth=1, alpha=0.7)
    if not any(curve(points, x, metric, ci) for metric, ci, *_ in METRICS):
        axis.text(0.5, 0.5, "no points", transform=axis.transAxes, ha="center", color="gray")
    axis.set_ylim(-3, 103)
    axis.grid(alpha=0.25)


def describe(points):
    """One line for the figures' titles: model, judge, n; a second one where there are several training seeds."""
    ns = {key: sorted({p[key] for p in points if p.get(key)}) for key in ("trait_n", "fact_n", "mmlu_n")}
    parts = [
        f"{name} n = {'-'.join(map(str, {v[0], v[-1]}))}"
        for name, v in zip(("answers", "facts", "questions"), ns.values())
        if v
    ]
    models = sorted({Path(p["model"]).name for p in points})
    judges = sorted({p["judge"] for p in points})
    if len(judges) > 1:
        judges = [
            f"{judge} ({', '.join(sorted({str(p.get('trait')) for p in points if p['judge'] == judge}))})"
            for judge in judges
        ]
    text = f"{', '.join(models)}; judge: {', '.join(judges)}; {', '.join(parts)}; bars: 95% intervals"
    seeds = {p.get("train_seed") for p in points if p.get("adapter")}
    return text + (
        f" over questions;\nup to {len(seeds)} training seeds: means, small dots for single seeds; where there are several, bars cover questions and seeds (Student's t)"
        if len(seeds) > 1
        else ""
    )


def finish(figure, title, shown, path):
    """Title, legend below several panels, caption; saves. Heights in inches."""
    height, text = figure.get_size_inches()[1], describe(shown) if shown else ""
    foot = 0.2 + 0.14 * text.count("\n")
    handles, labels = max((axis.get_legend_handles_labels() for axis in figure.axes), key=lambda pair: len(pair[0]))
    if handles and len(figure.axes) > 1:
        figure.legend(
            handles, labels, loc="lower center", ncol=3, frameon=False, bbox_to_anchor=(0.5, (foot - 0.03) / height)
        )
        foot += 0.25
    figure.suptitle(title, y=1 - 0.1 / height)
    figure.text(0.5, 0.05 / height, text, ha="center", fontsize=8, color="gray")
    figure.tight_layout(rect=(0, foot / height, 1, 1))
    for kind in ("png", "svg"):
        with replacing(path.with_suffix(f".{kind}"), "wb") as out:
            figure.savefig(out, format=kind, dpi=150)
    plt.close(figure)


def figure1(points, path):
    facts, base = facts_of(points), pick_base(points, "hallucination")
    names, found = {metric: label_of(metric, facts) for metric, *_ in METRICS}, sweeps(facts)
    sides = [[sweep for sweep in found if sweep[1] == x] for _, x, _ in METHODS]
    shared = set.intersection(
        *({setting[0] for _, _, setting, _ in side} for side in sides)
    )  # the same layers side by side, then those of one method only
    rows = list(zip_longest(*(sorted(side, key=lambda sweep: sweep[2][0] not in shared) for side in sides))) or [
        (None, None)
    ]
    figure, axes = plt.subplots(len(rows), 2, figsize=(11, 1 + 3.8 * len(rows)), sharey=True, squeeze=False)
    for row, pair in zip(axes, rows):
        for axis, sweep, (method, x, _) in zip(row, pair, METHODS):
            if sweep is None and len(rows) > 1:
                axis.set_axis_off()
                continue
            draw(axis, sweep[3] if sweep else plain_of(facts), x, base, names, names)
            axis.set_title(sweep[0] if sweep else method)
            axis.set_xlabel(
                "steering coefficient"
                + (" (against the trait)" if x == "inference_coef" else " (towards the trait, in training)")
            )
            if axis is row[0] or pair[0] is None:
                axis.set_ylabel("score / accuracy (%)")
                axis.tick_params(labelleft=True)
    finish(figure, "Learning new facts; dashed: before training", facts, path)


def tradeoff(points, path):
    """New facts against hallucination: a line for each sweep, its coefficients beside the marks."""
    facts, base = facts_of(points), pick_base(points, "hallucination")
    figure, axis = plt.subplots(figsize=(8, 7))

    def both(some, x):  # -> (coefficient, curve's entry for hallucination, for facts) where both were measured
        kept = {at[0]: at for at in curve(some, x, "fact_accuracy", "fact_ci")}
        return [(at[0], at, kept[at[0]]) for at in curve(some, x, "trait_score", "trait_ci") if at[0] in kept]

    for method, x, color in METHODS:
        for n, (name, _, _, some) in enumerate(sweep for sweep in sweeps(facts) if sweep[1] == x):
            line = both(some, x)
            axis.plot(
                [h[1] for _, h, _ in line],
                [f[1] for _, _, f in line],
                marker="os^Dv"[n % 5],
                linestyle=["-", "--", ":", "-."][n % 4],
                color=color,
                label=name,
            )
            for value, h, f in line:
                axis.errorbar(
                    h[1],
                    f[1],
                    xerr=[[h[1] - h[2]], [h[3] - h[1]]],
                    yerr=[[f[1] - f[2]], [f[3] - f[1]]],
                    color=color,
                    alpha=0.2,
                )
                if len(h[5]) == len(f[5]) > 1:
                    axis.plot(h[5], f[5], ".", color=color, markersize=4, alpha=0.6)
                if value:
                    axis.annotate(
                        f"{value:g}",
                        (h[1], f[1]),
                        xytext=(-5, 4),
                        textcoords="offset points",
                        fontsize=8,
                        color=color,
                        ha="right",
                    )
    marks = [("before training", "*", [base] if base else []), ("plain finetuning", "o", plain_of(facts))]
    marks += [
        (
            "preventative prompting",
            "P",
            [p for p in facts if p.get("system_prompt") == prompt and not p["train_coef"] and not p["inference_coef"]],
        )
        for prompt in dict.fromkeys(p.get("system_prompt") for p in facts)
        if prompt
    ]
    for name, marker, some in marks:
        for _, h, f in both(some, "inference_coef"):
            axis.plot(h[1], f[1], marker, color="black", markersize=9, zorder=4, label=name)
    axis.set(xlim=(-3, 103), ylim=(-3, 103), xlabel="hallucination score", ylabel="new-fact accuracy (%)")
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=9)
    finish(figure, "New facts kept against hallucination: better is up and left", facts, path)


def figure2(points, path):
    figure, axes = plt.subplots(3, 3, figsize=(11, 9), sharey=True)
    shown = [p for p in points if p.get("dataset") in dict(DATASETS)]
    names = {metric: label_of(metric, shown) for metric, *_ in METRICS} | dict(trait_score="trait score")
    steered = Counter(setting_of(p, "train_coef")[:2] for p in shown if p["train_coef"])
    chosen = max(
        steered, key=steered.get, default=("all", None)
    )  # one choice of layers and positions; the table has the others
    for row, (dataset, title) in enumerate(DATASETS):
        for column, trait in enumerate(TRAITS):
            axis = axes[row][column]
            here = [
                p for p in shown if p["dataset"] == dataset and p.get("trait") == trait and p["inference_coef"] == 0
            ]
            draw(
                axis,
                max(
                    (some for _, _, setting, some in sweeps(here) if setting[:2] == chosen),
                    key=len,
                    default=plain_of(here),
                ),
                "train_coef",
                pick_base(points, trait),
                ("trait_score", "mmlu_accuracy"),
                names,
            )
            if row == 0:
                axis.set_title(trait)
            if column == 0:
                axis.set_ylabel(f"{title}\nscore / accuracy (%)")
            if row == 2:
                axis.set_xlabel("steering coefficient in training")
    where = (
        f", {place(chosen[0])}" + (f", positions {chosen[1]}" if chosen[1] else "")
        if len(steered) > 1 or chosen[0] != "all"
        else ""
    )
    finish(figure, f"Preventative steering across data sets{where}; dashed: before training", shown, path)


# ---------------------------------------------------------------------------------------------------------------------
# Summary and tables


def headline(points):
    """Whether there was a rise to prevent; for each sweep the smallest coefficient that brings hallucination to the upper end of
    the untrained model's 95% interval or below, and what is left of facts and MMLU there. -> text lines."""
    base, facts = pick_base(points, "hallucination"), facts_of(points)
    plain = next((at[1] for at in curve(plain_of(facts), "train_coef", "trait_score", "trait_ci")), None)
    probe = [
        "The judge is the probe, which measures the very direction that is steered: steering lowers this score by construction, too."
    ] * any(p["judge"] == "probe" for p in facts)
    if not base or not usable(base, "trait_score"):
        return ["No headline: the model before training was not measured.", *probe]
    level = (base.get("trait_ci") or [base["trait_score"]] * 2)[1]
    reached = f"the untrained model's interval ({cell(base, 'trait_score', 'trait_ci')})"
    if base["trait_score"] > 90:
        return [
            f"No room: the model before training scores {base['trait_score']:.1f} for hallucination already, so the rise that the post starts from cannot show.",
            *probe,
        ]
    if plain is not None and plain <= level:
        return [
            f"Nothing to prevent: plain finetuning ends at {plain:.1f}, not above {reached}, so the rise that the post starts from did not happen here.",
            *probe,
        ]
    lines = []
    for name, x, _, some in sweeps(facts):
        lines_at = {metric: {c[0]: c[1] for c in curve(some, x, metric, ci)} for metric, ci, *_ in METRICS}
        reach = [value for value, score in lines_at["trait_score"].items() if score <= level]
        if not reach:
            lines.append(f"{name}: no coefficient brings hallucination into {reached}.")
            continue

        def text(metric):
            start, end = lines_at[metric].get(0.0), lines_at[metric].get(reach[0])
            return f"{start:.1f} -> {end:.1f}" if start is not None and end is not None else "not measured"

        lines.append(
            f"{name}: coefficient {reach[0]:g} brings hallucination into {reached}: "
            f"hallucination {text('trait_score')}, new facts {text('fact_accuracy')}, {label_of('mmlu_accuracy', some)} {text('mmlu_accuracy')}."
        )
    return lines + probe


def at_level(sweep, level):
    """[(coefficient, hallucination, facts, MMLU)], sorted -> (coefficient, facts, MMLU) where hallucination first falls to the level as
    the coefficient grows, on the straight line between neighbours. None where it starts below the level or never gets there."""
    for before, after in zip(sweep, sweep[1:]):
        if before[1] < level:
            return None
        if after[1] <= level:
            share = (before[1] - level) / (before[1] - after[1]) if before[1] > after[1] else 0.0
            return tuple(
                None if a is None or b is None else a + share * (b - a)
                for a, b in zip(before[:1] + before[2:], after[:1] + after[2:])
            )
    return None


def resampled(answers, judge):
    """Answers of Figure 1 -> {point's key: hallucination and new facts [2, DRAWS]}, over resampled questions and resampled
    facts, the same ones for every point."""
    scores = {}  # (key, kind) -> {question: its scores}
    for point, rows in answers:
        for row in rows.get(judge, []) if point.get("trait") == "hallucination" else []:
            if row["score"] is not None:
                score = row["score"] if row["kind"] == "trait" else 100.0 * (row["score"] >= 50)
                scores.setdefault((point["key"], row["kind"]), defaultdict(list))[row["question"]].append(score)
    rng, values = np.random.default_rng(0), {}
    for kind in ("trait", "fact"):
        names = sorted({question for (_, k), found in scores.items() if k == kind for question in found})
        chosen = rng.multinomial(len(names), [1 / len(names)] * len(names), size=DRAWS) if names else None
        for (key, k), found in scores.items():
            if k == kind:
                total, n = (
                    chosen @ np.array([f(found.get(name, [])) for name in names], dtype=float) for f in (sum, len)
                )
                values[key, k] = np.divide(total, n, out=np.full(DRAWS, np.nan), where=n > 0)
    return {
        key: np.array([values[key, "trait"], values[key, "fact"]])
        for key, kind in values
        if kind == "trait" and (key, "fact") in values
    }


def kept(points, answers=()):
    """What the methods keep at equal hallucination -> lines of text and a table; none without a sweep."""
    base, facts = pick_base(points, "hallucination"), facts_of(points)
    levels = [(level, f"{level}") for level in LEVELS]
    if base and usable(base, "trait_score"):
        levels.append((base["trait_score"] + 5, f"{base['trait_score'] + 5:.1f} (before training + 5)"))
    drawn = resampled(answers, facts[0]["judge"]) if facts else {}
    lines, differ = [], []

    def percentiles(values):  # of draws, nan where the level was not reached
        reached = [value for value in values if not math.isnan(value)]
        return " [{:.1f}, {:.1f}]".format(*np.percentile(reached, [2.5, 97.5])) if len(reached) >= 0.95 * DRAWS else ""

    for level, name in levels:
        means = {}  # (layers, seeds) -> {coefficient's key: (mean of the facts kept, its draws)}
        for method, x, setting, some in sweeps(facts):
            by_seed = defaultdict(dict)
            for p in some:
                if usable(p, "trait_score") and p[x] >= 0:
                    by_seed[p.get("train_seed")][p[x]] = p
            swept = [
                [at[coef] for coef in sorted(at)] for _, at in sorted(by_seed.items(), key=str) if any(at)
            ]  # a seed with plain finetuning alone is no sweep

            def ends(chosen, values):  # where each seed's sweep reaches the level, by values(point)
                return [at for sweep in chosen if (at := at_level([(p[x], *values(p)) for p in sweep], level))]

            found = ends(
                swept,
                lambda p: (
                    p["trait_score"],
                    *(p[m] if usable(p, m) else None for m in ("fact_accuracy", "mmlu_accuracy")),
                ),
            )

            def text(i, digits):
                values = [at[i] for at in found if at[i] is not None]
                return (
                    "-"
                    if not values
                    else f"{fmean(values):.{digits}f}"
                    + (f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else "")
                )

            again, rng = [], np.random.default_rng(0)  # the same seeds are drawn for every sweep
            for d in range(DRAWS) if found and all(p["key"] in drawn for sweep in swept for p in sweep) else ():
                there = ends(
                    [swept[k] for k in rng.integers(len(swept), size=len(swept))],
                    lambda p: (*drawn[p["key"]][:, d], None),
                )
                again.append(fmean(at[1] for at in there) if there else math.nan)
            if again:
                means.setdefault((setting[0], len(swept)), {})[x] = fmean(at[1] for at in found), np.array(again)
            lines.append(
                f"| {name} | {method} | {text(0, 2)} | {text(1, 1)}{percentiles(again)} | {text(2, 1)} | {len(found)} of {len(swept)} |"
            )
        for (layers, _), of in means.items():
            if len(of) == 2 and (interval := percentiles(of["train_coef"][1] - of["inference_coef"][1])):
                differ.append(
                    f"At {name}, {place(layers)}: {of['train_coef'][0] - of['inference_coef'][0]:+.1f}{interval}."
                )
    if not lines:
        return []
    return [
        "Linear between neighbouring coefficients, where hallucination first falls to the level as the coefficient grows from plain finetuning; each training seed by itself, "
        "then the mean (range over seeds). -: no seed's sweep starts above the level and reaches it. [95% interval over resampled questions, facts and training seeds, the same ones for all methods, "
        "where 95% of the draws reach the level.]"
        + (
            " New facts, preventative minus inference-time steering of the same blocks: " + " ".join(differ)
            if differ
            else ""
        ),
        "",
        f"| hallucination | method | coefficient | new facts | {label_of('mmlu_accuracy', facts)} | seeds that reach it |",
        "|---|---|---|---|---|---|",
        *lines,
    ]


def cell(point, metric, ci):
    if not usable(point, metric):
        return "-"
    bounds = point.get(ci)
    return f"{point[metric]:.1f}" + (f" [{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else "")


def method_of(point):
    """-> (data set, method and coefficient), as the report and its browser name a point."""
    if point.get("adapter") is None:
        data, name = "before training", "untrained"
    else:
        data = dict(DATASETS).get(point.get("dataset"), point.get("dataset") or "?")
        name = (
            f"preventative {point['train_coef']:g}"
            if point.get("train_coef")
            else "preventative prompting"
            if point.get("system_prompt")
            else "plain finetuning"
        )
        name += (
            f", {place(point['train_layers'])}"
            if point.get("train_coef") and point.get("train_layers", "all") != "all"
            else ""
        )
        name += f", seed {point['train_seed']}" if point.get("train_seed") else ""
    steered = f", inference-time {point['inference_coef']:g}" if point["inference_coef"] else ""
    return data, name + steered + (
        f", {place(point['layers'])}" if steered and point.get("layers", "all") != "all" else ""
    )


def read_answers(points, folder):
    """-> ([(point, {judge: rows})] for points of one key, how many answers files are missing). Rejudged answers stand in a
    file of their own beside the first ones."""
    by_key, found, missing = {}, [], 0
    for point in points:
        by_key.setdefault(point["key"], []).append(point)
    for same in by_key.values():
        path, rows = folder / "answers" / Path(same[0].get("answers") or "none").name, {}
        for point in same:
            own = path.with_name(f"{path.stem}.{Path(point['judge']).name}.jsonl")
            file = own if own.exists() else path
            if file.exists():
                read = read_jsonl(file, need=("id", "kind", "question", "answer"))
                rows[point["judge"]] = [row | row.get("scores", {}).get(point["judge"], {}) for row in read]
        missing += not rows
        found += [(same[0], rows)] if rows else []
    return found, missing


def spearman(a, b):
    """Rank correlation of two lists; ties take their mean rank. None where one of them does not vary."""

    def ranks(values):
        at = defaultdict(list)
        for i, value in enumerate(sorted(values)):
            at[value].append(i)
        return [sum(at[value]) / len(at[value]) for value in values]

    a, b = ranks(a), ranks(b)
    mean = (len(a) - 1) / 2
    va, vb = sum((x - mean) ** 2 for x in a), sum((y - mean) ** 2 for y in b)
    return sum((x - mean) * (y - mean) for x, y in zip(a, b)) / math.sqrt(va * vb) if va and vb else None


def agreement(answers):
    """Pairs of judges on the same answers -> [(trait, judge, other, n, Spearman's rho or None, mean difference)]."""
    scores = defaultdict(list)
    for _, rows in answers:
        for one, other in combinations(sorted(rows), 2):
            second = {row["id"]: row["score"] for row in rows[other]}
            for row in rows[one]:
                if row["score"] is not None and second.get(row["id"]) is not None:
                    scores[row.get("trait") or "new facts", one, other].append((row["score"], second[row["id"]]))
    return [
        (*key, len(pairs), spearman(*zip(*pairs)), sum(b - a for a, b in pairs) / len(pairs))
        for key, pairs in sorted(scores.items())
    ]


def agreement_lines(found):
    return [
        "| trait | judges | answers | Spearman's rho | mean difference (second - first) |",
        "|---|---|---|---|---|",
    ] + [
        f"| {trait} | {one}, {other} | {n} | {'-' if rho is None else f'{rho:.2f}'} | {difference:+.1f} |"
        for trait, one, other, n, rho, difference in found
    ]


def summary(points, folder, agreed, equal):
    lines = ["# Summary", "", describe(points), "", *(f"- {line}" for line in headline(points))]
    alike = defaultdict(set)
    for p in points:
        alike[
            p.get("dataset"),
            p.get("trait"),
            p.get("train_seed"),
            p.get("system_prompt"),
            p.get("train_coef"),
            setting_of(p, "train_coef") if p.get("train_coef") else "",
        ].add(p.get("adapter"))
    lines += [
        f"- {', '.join(sorted(map(str, some)))}: the points do not tell these adapters apart; the figures show the one measured last."
        for some in alike.values()
        if len(some) > 1
    ]
    vectors = [read_json(path) for path in sorted((folder / "vectors").glob("*.json"))]
    if any("probe" in v for v in vectors):
        lines += [
            "- Probes (projection on the vector; AUC between positive and negative extraction answers on held-out questions): "
            + ", ".join(
                f"{v['trait']} row {v['probe']['row']}, AUC {v['probe']['auc']:.2f}"
                + (" (weak: under 0.7)" if v["probe"]["auc"] < 0.7 else "")
                for v in vectors
                if "probe" in v
            )
            + "."
        ]
    lines += ["", "## New facts kept at equal hallucination", "", *equal] if equal else []
    lines += ["", "## All points", "", *points_table(points)]
    if agreed:
        lines += ["", "Agreement of judges on the same answers:", "", *agreement_lines(agreed)]
    return "\n".join(lines) + "\n"


def points_table(points):
    """One row a point; how it was steered only where that differs between points."""
    extra = [
        (key, x, i)
        for x, keys in SETTINGS.items()
        for i, key in enumerate(keys)  # within a trait, since every trait has its own vector
        if any(
            len({setting_of(p, x)[i] for p in points if p.get(x) and p.get("trait") == trait}) > 1 for trait in TRAITS
        )
    ]
    prompts = any(p.get("system_prompt") for p in points)

    def how(p):
        return [str((setting_of(p, x)[i] if p.get(x) else None) or "-") for _, x, i in extra] + [
            (p.get("system_prompt") or "-")[:60].replace("|", "/").replace("\n", " ")
        ] * prompts

    names = [*(key for key, *_ in extra), *["system_prompt"] * prompts]
    lines = [
        f"| data | trait | training coef | inference coef |{''.join(f' {name} |' for name in names)} trait score [95%] | answers (unscored) | new facts | general knowledge / MMLU | seed |",
        "|---" * (9 + len(names)) + "|",
    ]
    order = lambda p: (
        str(p.get("dataset") or ""),
        str(p.get("trait")),
        how(p),
        p.get("train_coef") or 0,
        p["inference_coef"],
        str(p.get("train_seed")),
    )
    for p in sorted(points, key=order):
        flag = (
            " (under 90% scored)"
            if (p.get("trait_unscored") or 0) > 0.1 * ((p.get("trait_n") or 0) + (p.get("trait_unscored") or 0))
            else ""
        )
        name = "before training" if p.get("adapter") is None else p.get("dataset")
        lines.append(
            f"| {name} | {p.get('trait')} | {'-' if p.get('train_coef') is None else format(p['train_coef'], 'g')} | {p['inference_coef']:g} |"
            + "".join(f" {text} |" for text in how(p))
            + f" {cell(p, 'trait_score', 'trait_ci')} | "
            f"{p.get('trait_n', 0)} ({p.get('trait_unscored', 0)}){flag} | {cell(p, 'fact_accuracy', 'fact_ci')} | {cell(p, 'mmlu_accuracy', 'mmlu_ci')} | {p.get('train_seed')} |"
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The report: data/report.html, filled in


def table(lines):
    """A Markdown table's lines -> HTML."""
    head, _, *rows = [[html.escape(text.strip()) for text in line.strip("|").split("|")] for line in lines]
    return (
        '<div class="wide"><table><thead><tr>'
        + "".join(f"<th>{text}</th>" for text in head)
        + "</tr></thead><tbody>"
        + "".join("<tr>" + "".join(f"<td>{text}</td>" for text in row) + "</tr>" for row in rows)
        + "</tbody></table></div>"
    )


def browser_data(answers, most=30_000_000):
    """Answers as data/report.html reads them, in at most about `most` characters -> (JSON text, samples a question left out)."""
    texts, questions, methods, found = {}, {}, [], []

    def number(of, key):
        return of.setdefault(key, len(of))

    for point, rows in answers:
        data, name = method_of(point)
        judges = sorted(rows, key=lambda judge: judge in ("probe", "lexical"))  # a chat model's score comes first
        others = [{row["id"]: row for row in rows[judge]} for judge in judges]
        for row in rows[judges[0]]:
            scores = [
                other[row["id"]]["score"]
                if other.get(row["id"], {}).get("score") is not None
                else other.get(row["id"], {}).get("reason")
                for other in others
            ]
            question = number(
                questions, (row.get("trait") or "new facts", number(texts, row["question"]), row.get("truth"))
            )
            sample = int(row["id"].rsplit("-s", 1)[1]) if row["kind"] == "trait" else 0
            found.append(
                [
                    len(methods),
                    question,
                    number(texts, row["answer"]),
                    sample,
                    *(round(s, 1) if isinstance(s, float) else s for s in scores),
                ]
            )
        methods.append(dict(name=name, data=data, judges=judges))
    left_out, most_samples = 0, max((row[3] for row in found), default=0)
    while True:
        text = json.dumps(
            dict(methods=methods, questions=list(questions), texts=list(texts), answers=found),
            ensure_ascii=False,
            separators=(",", ":"),
        ).replace("<", "\\u003c")
        if len(text) <= most or left_out == most_samples:
            return text, left_out
        left_out += 1
        found = [row for row in found if row[3] <= most_samples - left_out]
        kept = {row[2] for row in found} | {question[1] for question in questions}
        texts = {text if i in kept else f"\0{i}": i for text, i in texts.items()}


def report(points, shown, folder, answers, missing, agreed, equal):
    """The page's text; every value is escaped."""
    escape, rows = html.escape, points_table(shown)

    def figure(name, title, mine):
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        return (
            f'<figure><img alt="{escape(title)}; the numbers are in the table below" src="data:image/png;base64,{picture}"></figure><details><summary>{escape(title)}: the numbers</summary>'
            + table(rows[:2] + [row for row in rows[2:] if mine(row)])
            + "</details>"
        )

    of_facts = "| facts |", "| before training | hallucination"
    data, left_out = browser_data(answers)
    said = (
        [f"{len(answers)} points with answers."]
        + [f"The answers of {missing} points are not there (no file in answers/)."] * bool(missing)
        + [f"To keep the page small the last {left_out} answers to each question were left out."] * bool(left_out)
    )
    settings = [
        {
            key: p.get(key)
            for key in (
                "model",
                "judge",
                "judge_method",
                "temperature",
                "samples",
                "positions",
                "mmlu",
                "mmlu_scoring",
                "seed",
                "commit",
                "versions",
            )
        }
        for p in points
    ]
    counted = Counter(json.dumps(setting) for setting in settings)
    fill = dict(
        kept=f'<p class="quiet">{escape(equal[0])}</p>{table(equal[2:])}' if equal else "<p>No sweep on facts.</p>",
        title="Preventative steering: report",
        about=escape(describe(shown)),
        headline="".join(f"<p>{escape(line)}</p>" for line in headline(shown)),
        figures=figure("fig1", "Figure 1", lambda row: row.startswith(of_facts))
        + figure("tradeoff", "The trade-off", lambda row: row.startswith(of_facts))
        + figure("fig2", "Figure 2", lambda row: not row.startswith("| facts |")),
        left_out=escape(" ".join(said)),
        agreement=table(agreement_lines(agreed)) if agreed else "<p>No answers were scored by two judges.</p>",
        points=table(rows),
        settings="".join(
            f"<details><summary>{n} points</summary><pre>{escape(json.dumps(json.loads(text), indent=1))}</pre></details>"
            for text, n in counted.items()
        ),
        answers=data,
    )
    template = (Path(__file__).parent / "data" / "report.html").read_text(encoding="utf-8")
    return "".join(
        fill.get(part, part) if i % 2 else part for i, part in enumerate(re.split(r"\{\{(\w+)\}\}", template))
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("points", help="points.jsonl of evaluate.py")
    args = parser.parse_args()
    points = list(
        {
            (p["key"], p["judge"]): p for p in read_jsonl(args.points, need=("key", "model", "inference_coef", "judge"))
        }.values()
    )
    judge = {}  # of each trait, that with most points; of equally many, the last one
    for trait in {p.get("trait") for p in points}:
        judge[trait] = Counter(p["judge"] for p in reversed(points) if p.get("trait") == trait).most_common(1)[0][0]
    shown, folder = [p for p in points if p["judge"] == judge[p.get("trait")]], Path(args.points).parent
    figure1(shown, folder / "fig1")
    tradeoff(shown, folder / "tradeoff")
    figure2(shown, folder / "fig2")
    answers, missing = read_answers(points, folder)
    agreed, equal = agreement(answers), kept(shown, answers)
    for name, text in (
        ("summary.md", summary(shown, folder, agreed, equal)),
        ("report.html", report(points, shown, folder, answers, missing, agreed, equal)),
    ):
        with replacing(folder / name) as out:
            out.write(text)
    print("\n".join(headline(shown)) + f"\n{folder}/fig1.png, tradeoff.png, fig2.png, summary.md, report.html")


if __name__ == "__main__":
    main()
