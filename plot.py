"""points.jsonl -> fig1, tradeoff and fig2 (.png and .svg), summary.md and report.html, beside it.

    python plot.py out/demo/points.jsonl

Figure 1: data sets with facts, inference-time (left) and preventative steering (right), a row for a choice of blocks.
The trade-off: facts against hallucination, a thin line for each training seed. Figure 2: preventative steering on the
other data sets (rows) against traits (columns). report.html is one page without network: figures, tables, answers.
Answers and losses come from answers/ and adapters/, or packed from answers.jsonl.xz (rows with the point's key) and
losses.jsonl.xz (with the adapter's name). Of several judges figures show that with most points. Loads no torch.
"""

import base64
import json
import lzma
import math
import re
import textwrap
from collections import Counter, namedtuple
from itertools import combinations, zip_longest
from pathlib import Path
from statistics import fmean, stdev

import jinja2
import matplotlib.pyplot as plt
from markdown_it import MarkdownIt
from scipy.stats import spearmanr, t

import make_facts as mf

TRAITS = ["evil", "sycophancy", "hallucination"]  # the post's order; other names follow as they come
DATASETS = dict(
    facts="New facts",
    medical_mistake_2="Medical Mistake II",
    medical_normal="Medical Normal",
    medical_self_generated="Medical Self-Generated",
)
METRICS = dict(  # the key of its interval, colour and marker, in every figure
    trait_score=("trait_ci", "#c43c00", "o"),
    fact_accuracy=("fact_ci", "#005b96", "s"),
    mmlu_accuracy=("mmlu_ci", "#1b7837", "^"),
    coherence=("", "#b0b0b0", ""),
)
KEPT = ("trait_score", "fact_accuracy")  # what the methods are compared by
METHODS = dict(train_coef="Preventative steering", inference_coef="Inference-time steering")
STYLES = dict(train_coef=("#5e3c99", "-"), inference_coef=("#b8860b", (0, (4, 1.5))))
RECIPE = ["train_epochs", "train_lr", "train_batch_size", "train_rank", "train_alpha"]
PLACE = ["layers", "positions", "vector"]
STEERED_BY = dict(train_coef=[f"train_{key}" for key in PLACE], inference_coef=PLACE)
HOW = [*STEERED_BY["train_coef"], *STEERED_BY["inference_coef"], *RECIPE, "system_prompt", "temperature", "samples"]
WHICH = ["dataset", "trait", *METHODS, *HOW, "judge", "train_seed"]  # the table's first columns, where they differ
SETTINGS = {*WHICH, "model", "seed", "mmlu_scoring", "inputs"} - {"judge", "vector", "train_vector"}  # of a key
MEASURED = """trait_score trait_n trait_unscored fact_accuracy fact_not_attempted fact_wrong fact_n fact_unscored
    mmlu_accuracy mmlu_n coherence_nll abstained abstained_coherent coherence adapter""".split()
LEVELS = [20, 30, 40, 60, 80]  # scores at which the methods are compared, beside the level before training
UNSCORED = 0.1  # a point with a larger share of its answers or facts unscored is drawn hollow
EQUAL = """Facts (%), mean ± standard deviation over the seeds that get to the score with both methods: k of n.
A seed's facts are read where its score first falls to the level as the coefficient grows, on the straight line between
coefficients; "last": where it last does so, if that differs. Difference: paired over seeds, 95% by Student's t."""

Sweep = namedtuple("Sweep", "x about points")  # x: the coefficient's key; about: blocks, what else tells it apart
Comparison = namedtuple("Comparison", "title trait base points sides")  # sides: {x: Sweep or None}
Mark = namedtuple("Mark", "x mean low high hollow few")

# ---------------------------------------------------------------------------------------------------------------------
# Points -> sweeps


def read_points(path):
    """Each key and judge once, as measured last. Points of one key with different settings: die()."""
    first, last = {}, {}
    for row in mf.read_jsonl(path, mf.Point, appended=True):
        row = {key: int(value) if isinstance(value, float) and value % 1 == 0 else value for key, value in row.items()}
        settings = {key: row.get(key) for key in SETTINGS} | dict(model=Path(row["model"]).name)
        before = first.setdefault(row["key"], settings)
        differ = [f"{key} ({before[key]}, {settings[key]})" for key in settings if settings[key] != before[key]]
        if differ:
            mf.die(f"{path}: points of key {row['key']} differ in {', '.join(differ)}; give them two files")
        last[row["key"], row["judge"]] = row
    return list(last.values()) or mf.die(f"{path}: no points")


def grouped(rows, key):
    """Rows -> {key(row): its rows}, in order of appearance."""
    found = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def of_main_judge(points):
    """Of each trait's points those of the judge with most of them; of equally many, the one that came last."""
    counts = Counter((p.get("trait"), p["judge"]) for p in reversed(points)).most_common()
    judges = {trait: judge for (trait, judge), _ in reversed(counts)}
    return [p for p in points if p["judge"] == judges[p.get("trait")]]


def usable(row, *keys):
    return all(isinstance(row.get(key), (int, float)) and math.isfinite(row[key]) for key in keys)


def hollow(points):
    """Whether too many of the answers to the trait's questions, or about facts, have no score."""
    n = {key: sum(p.get(key) or 0 for p in points) for key in ("trait_n", "fact_n", "trait_unscored", "fact_unscored")}
    return any(n[f"{k}_unscored"] > UNSCORED * (n[f"{k}_unscored"] + n[f"{k}_n"]) for k in ("trait", "fact"))


def before_training(points, trait):
    """The unsteered model before training; {} if it was not measured."""
    found = (p for p in points if p.get("adapter") is None and not p["inference_coef"] and p.get("trait") == trait)
    return next(found, {})


def by_data(points, facts):
    """Trained models' points -> {(data set, trait): points} of those with facts or of those without."""
    found = grouped([p for p in points if p.get("adapter")], lambda p: (p.get("dataset") or "?", p.get("trait")))
    return {key: some for key, some in found.items() if any(usable(p, "fact_accuracy") for p in some) == facts}


def plain_of(points):
    return [p for p in points if not (p.get("train_coef") or p["inference_coef"] or p.get("system_prompt"))]


def sweeps(points):
    """Points of a data set and trait -> Sweeps: each of one setting, with its seeds' plain finetuning at 0."""
    found = []
    for x, other in zip(METHODS, reversed(METHODS)):
        keys, steered = (*STEERED_BY[x], *RECIPE), [p for p in points if p.get(x) and not p.get(other)]
        steered = [p for p in steered if not p.get("system_prompt")]
        settings = grouped(steered, lambda p, keys=keys: tuple(str(p.get(key) or "all") for key in keys))
        for setting in sorted(settings, key=lambda s: (s[0] != "all", [int(n) for n in re.findall(r"\d+", s[0])], s)):
            about = ["all blocks" if setting[0] == "all" else f"block{'s' * ('-' in setting[0])} {setting[0]}"]
            for key, *values in zip(keys, setting, *(s for s in settings if s[0] == setting[0])):
                about += [f"{key.removeprefix('train_')} {values[0]}"] * (len(set(values)) > 1)
            alike = {(p.get("train_seed"), *map(p.get, RECIPE)) for p in settings[setting]}
            plain = [p for p in plain_of(points) if (p.get("train_seed"), *map(p.get, RECIPE)) in alike]
            found.append(Sweep(x, about, plain + settings[setting]))
    return found


def comparisons(points):
    """Figure 1's rows: for every data set with facts and every choice of blocks, the methods beside each other."""
    found, data = [], by_data(points, facts=True)
    for (dataset, trait), some in data.items():
        recipes = grouped(sweeps(some), lambda s: (s.about[0], *map(s.points[0].get, RECIPE)))
        for (_, *recipe), here in recipes.items() or [((None,), [])]:
            mine = [p for p in some if not here or list(map(p.get, RECIPE)) == recipe]
            for pair in list(zip_longest(*([s for s in here if s.x == x] for x in METHODS))) or [(None, None)]:
                about = [f"{DATASETS.get(dataset, dataset)} ({trait})"] * (len(data) > 1)
                about += dict.fromkeys(text for sweep in pair if sweep for text in sweep.about)
                sides, base = dict(zip(METHODS, pair)), before_training(points, trait)
                found.append(Comparison(", ".join(about), trait, base, mine, sides))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def t_interval(values):
    """-> mean and Student's 95% interval (mean, low, high); one value alone has none: nan."""
    mean, n = fmean(values), len(values)
    half = t.ppf(0.975, n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.nan
    return mean, mean - half, mean + half


def curve(points, x, metric):
    """A sweep -> Marks: means over training seeds (which answer the same questions) with Student's t; of one seed, its
    own interval over questions. few: at most half of the seeds were measured there, so it is no mean over the seeds."""
    at, marks = grouped([p for p in points if usable(p, metric)], lambda p: p.get(x) or 0.0), []
    at = {coef: list({p.get("train_seed"): p for p in at[coef]}.values()) for coef in sorted(at)}  # measured last
    most = max(map(len, at.values()), default=0)
    for coef, here in at.items():
        mean, low, high = t_interval([p[metric] for p in here])
        if most == 1:
            low, high = here[0].get(METRICS[metric][0]) or (math.nan, math.nan)
        lost, few = metric != "mmlu_accuracy" and hollow(here), 2 * len(here) <= most
        marks.append(Mark(coef, mean, max(low, 0.0), min(high, 100.0), lost, few))
    return marks


def lines_by_seed(sweep):
    """-> {training seed: [(coefficient, score, facts, general knowledge or None)], sorted}; plain alone is no line."""
    both, lines = [p for p in sweep.points if usable(p, *KEPT)], {}
    for seed, some in grouped(both, lambda p: p.get("train_seed")).items():
        at = {p.get(sweep.x) or 0.0: p for p in some}
        lines |= {seed: [(x, *map(at[x].get, (*KEPT, "mmlu_accuracy"))) for x in sorted(at)]} if any(at) else {}
    return lines


def crossing(line, level, last=False):
    """Where a seed's score falls to the level for the first (last) time, on the straight line between neighbours ->
    (coefficient, level, facts, general knowledge). None where it starts below the level or never gets there."""
    for before, after in list(zip(line, line[1:]))[:: -1 if last else 1]:
        if line[0][1] >= level and before[1] >= level >= after[1]:
            share = (before[1] - level) / (before[1] - after[1]) if before[1] > after[1] else 0.0
            return tuple(None if None in ends else ends[0] + share * (ends[1] - ends[0]) for ends in zip(before, after))


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def label_of(metric, trait, points):
    """The metric's name as figures and text show it: the demo's general knowledge is not called MMLU."""
    general = any("general_knowledge" in str(p.get("mmlu")) for p in points)
    names = dict(trait_score=trait, fact_accuracy="facts", mmlu_accuracy="general knowledge" if general else "MMLU")
    return str(names.get(metric, metric))


def draw(axis, points, x, base, metrics):
    """A line for each metric: means, bars, hollow marks; dotted: before training -> {metric: height of its end}."""
    ends = {}
    for metric in metrics:
        (_, color, marker), marks = METRICS[metric], curve(points, x, metric)
        line = [m for m in marks if not m.few]
        if usable(base, metric) and marker:
            axis.axhline(base[metric], color=color, linestyle=":", linewidth=1.2)
        if line:
            axis.plot([m.x for m in line], [m.mean for m in line], color=color, linewidth=2 if marker else 1)
            ends[metric] = line[-1].mean
        if marker:
            axis.vlines([m.x for m in line], [m.low for m in line], [m.high for m in line], color, lw=3, alpha=0.3)
            faces, sizes = ["white" if m.hollow else color for m in marks], [12 if m.few else 36 for m in marks]
            style = dict(marker=marker, facecolors=faces, edgecolors=color, zorder=3)
            axis.scatter([m.x for m in marks], [m.mean for m in marks], sizes, **style)
    if not ends:
        axis.text(0.5, 0.5, "no points", transform=axis.transAxes, ha="center", color="gray")
    axis.set(ylim=(-3, 103), yticks=range(0, 101, 20))
    return ends


def label_lines(axis, ends, trait, points, gap=8.0):
    """Each line's name beside its end, in its colour; names move apart where lines end close to each other."""
    order = sorted(ends, key=ends.get)
    for below, above in list(zip(order, order[1:])) * 50:
        lack = max(0.0, gap - (ends[above] - ends[below]))
        ends[below], ends[above] = ends[below] - lack / 2, ends[above] + lack / 2
    for metric, height in ends.items():
        style = dict(transform=axis.get_yaxis_transform(), va="center", color=METRICS[metric][1])
        axis.text(1.03, height, label_of(metric, trait, points), **style)


def ready(point):
    """Whether the point's adapter came with the project."""
    return str(point.get("adapter")).startswith("data/small_model/")


def describe(points):
    """A caption: models, judges, n, training seeds, what bars and hollow marks mean."""
    judges = {p["judge"].replace("probe", "probe (of what is steered)") for p in points}
    parts = [", ".join(sorted({Path(p["model"]).name for p in points})), f"judge: {', '.join(sorted(judges))}"]
    for key, name in (("trait_n", "answers"), ("fact_n", "facts"), ("mmlu_n", "questions")):
        parts += [f"{max(p.get(key) or 0 for p in points)} {name}"] if any(p.get(key) for p in points) else []
    seeds = len({p.get("train_seed") for p in points if p.get("adapter")})
    parts += [f"up to {seeds} training seeds: means, 95% t-intervals over seeds" if seeds > 1 else "95% intervals"]
    parts += ["adapters trained beforehand (data/small_model)"] * any(map(ready, points))
    return "; ".join(parts + ["hollow: over 10% unscored"] * any(hollow([p]) for p in points))


def panels(rows, columns, width, height):
    """Inches of a panel -> figure, axes[row][column]."""
    rows, columns = max(1, rows), max(1, columns)
    size = (1.2 + width * columns, 0.8 + height * rows)
    plt.rcParams.update({"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.2})
    return plt.subplots(rows, columns, figsize=size, squeeze=False, sharex="col", sharey=True)


def finish(figure, title, points, path):
    """Title above, caption below; saves .png and .svg."""
    width, height = figure.get_size_inches()
    figure.suptitle(textwrap.fill(title, round(10 * width)), x=0.01, y=1 - 0.08 / height, ha="left", fontsize=13)
    figure.text(0.01, 0.08 / height, describe(points), fontsize=7, color="dimgray", wrap=True)
    figure.tight_layout(rect=(0, 0.3 / height, 1, 1))
    for kind in ("png", "svg"):
        with mf.replacing(path.with_suffix(f".{kind}"), "wb") as out:
            figure.savefig(out, format=kind, dpi=180)
    plt.close(figure)


def figure1(points, path):
    """Scores and accuracies against the coefficient: inference-time left, preventative right."""
    found = comparisons(points)
    figure, axes = panels(len(found), 2, 4, 3)
    for row, c in zip(axes, found):
        for axis, x in zip(row, reversed(METHODS)):
            alone = [] if any(c.sides.values()) else plain_of(c.points)
            ends = draw(axis, c.sides[x].points if c.sides[x] else alone, x, c.base, METRICS)
            axis.set_title(f"{METHODS[x]}, {c.title}".strip(", "))
            if axis is row[1] or not c.sides["train_coef"]:
                label_lines(axis, ends, c.trait, points)
        row[0].set_ylabel("score or accuracy (%)")
    lows, highs = zip(*(axis.get_xlim() for axis in axes[0]))
    if max(highs) <= 2 * min(highs):  # one scale where the methods share one
        plt.setp(axes[0], xlim=(min(lows), max(highs)))
    plt.setp(axes[-1], xlabel="steering coefficient")
    finish(figure, "Learning new facts (dotted: before training)", [p for c in found for p in c.points] or points, path)


def draw_means(axis, sweep):
    """In the trade-off: a thin line a seed, the mean over seeds thick."""
    color, style = STYLES[sweep.x]
    for line in lines_by_seed(sweep).values():
        axis.plot([at[1] for at in line], [at[2] for at in line], color=color, linewidth=0.9, alpha=0.4)
    facts = {m.x: m.mean for m in curve(sweep.points, sweep.x, "fact_accuracy") if not m.few}
    marks = [m for m in curve(sweep.points, sweep.x, "trait_score") if m.x in facts]
    at = [m.mean for m in marks], [facts[m.x] for m in marks]
    axis.plot(*at, color=color, linewidth=3.5, linestyle=style, label=METHODS[sweep.x])
    axis.scatter(*at, 45, facecolors=["white" if m.hollow else color for m in marks], edgecolors=color, zorder=3)


def tradeoff(points, path):
    """Facts kept against the trait's score, a panel for each comparison; what was not steered is black."""
    found = comparisons(points)
    figure, axes = panels(len(found), 1, 5.5, 4.8)
    for axis, c in zip(axes.flat, found):
        for sweep in filter(None, c.sides.values()):
            draw_means(axis, sweep)
        unsteered = [p for p in c.points if not (p.get("train_coef") or p["inference_coef"]) and usable(p, *KEPT)]
        for prompted, some in grouped(unsteered, lambda p: bool(p.get("system_prompt"))).items():
            at = [fmean(p[key] for p in some) for key in KEPT]
            name = "preventative prompting" if prompted else "plain finetuning"
            axis.plot(*at, "P" if prompted else "o", color="black", markersize=9, zorder=4, label=name)
        if usable(c.base, "trait_score"):
            axis.axvline(c.base["trait_score"], color="gray", linestyle=":", linewidth=1.5)
            axis.text(c.base["trait_score"] + 1, 97, "level before training", color="gray")
        size = dict(xlim=(-3, 103), ylim=(-3, 103))
        axis.set(title=c.title, xlabel=f"{c.trait} score", ylabel="facts known after training (%)", **size)
        axis.legend(frameon=False, loc="lower right")
    title = f"Facts kept against {' and '.join({str(c.trait): 0 for c in found}) or 'a trait'} (thin lines: one seed)"
    finish(figure, title, [p for c in found for p in c.points] or points, path)


def figure2(points, path):
    """Preventative steering on the data sets without facts (rows) against traits (columns)."""
    here, blocks = by_data(points, facts=False), {}
    present = {name for key in here for name in key}
    rows = [name for name in dict.fromkeys([*DATASETS, *(dataset for dataset, _ in here)]) if name in present]
    columns = [name for name in dict.fromkeys([*TRAITS, *(trait for _, trait in here)]) if name in present]
    figure, axes = panels(len(rows), len(columns), 2.7, 2.2)
    for row, dataset in enumerate(rows):
        for axis, trait in zip(axes[row], columns):
            some, base = here.get((dataset, trait), []), before_training(points, trait)
            plain = Sweep("train_coef", [], plain_of(some))
            sweep = max(sweeps(some), key=lambda s: (s.x == "train_coef", len(s.points)), default=plain)
            ends = draw(axis, sweep.points, sweep.x, base, ["trait_score", "mmlu_accuracy"])
            if trait == columns[-1]:
                label_lines(axis, ends, "trait score", points)
            blocks |= dict.fromkeys(sweep.about[:1])
            probe = "\n(judged by the probe)" * any(p["judge"] == "probe" for p in points if p.get("trait") == trait)
            axis.set_title(f"{trait}{probe}" * (row == 0))
        axes[row][0].set_ylabel(DATASETS.get(dataset, dataset))
    plt.setp(axes[-1], xlabel="steering coefficient")
    title = ", ".join(["Preventative steering across data sets", *blocks]) + " (dotted: before training)"
    finish(figure, title if here else "No data set but facts", [p for of in here.values() for p in of] or points, path)


def packed(path, schema, key):
    """Rows of a compressed JSONL file -> {row[key]: rows}; {} where it is not there."""
    try:
        lines = lzma.open(path).read().splitlines() if path.exists() else []
    except (lzma.LZMAError, EOFError) as error:
        mf.die(f"{path}: cannot be unpacked ({error}); make it again, or delete it")
    return grouped((mf.validated(mf.parsed(line, path), schema, path) for line in lines), lambda row: row.get(key))


def loss_curves(points, folder):
    """The adapters' loss.jsonl, where they are -> [{name, data, coef, line: [(step, log10 of the loss)]}]."""
    found, rest = [], packed(folder / "losses.jsonl.xz", mf.Loss, "adapter")
    for p in {p.get("adapter"): p for p in points if p.get("adapter")}.values():
        name, data, coef = Path(p["adapter"]).name, str(p.get("dataset")), p.get("train_coef") or 0
        files = [place / "loss.jsonl" for place in (folder / "adapters" / name, Path(p["adapter"]))]
        rows = [mf.read_jsonl(file, mf.Loss) for file in files if file.is_file()] + [rest.get(name, [])]
        line = [(row["step"], math.log10(max(row["loss"], 1e-3))) for row in rows[0]]
        found += [dict(name=name, data=data, coef=coef, line=line)] if line else []
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Summary and report


def headline(points):
    """What the figures show, in sentences: whether there was a rise to prevent, what is kept, at which coefficients."""
    lines = ["No data set with facts: Figure 1 and the trade-off are empty."] * (not by_data(points, facts=True))
    for c in comparisons(points):
        score, plain = c.base.get("trait_score"), curve(plain_of(c.points), "train_coef", "trait_score")
        high = (c.base.get("trait_ci") or [score])[-1]
        if not usable(c.base, "trait_score"):
            lines.append("No headline: the model before training was not measured.")
        elif plain and plain[0].mean <= high:
            lines.append(f"Nothing to prevent: plain finetuning {plain[0].mean:.1f}, before training {score:.1f}.")
        elif any(c.sides.values()):
            names = "preventative", "inference-time", "difference", "training seeds that get there"
            cells = ", ".join(f"{name} {text}" for name, text in zip(names, equal_cells(c, score)))
            if cells.count(" -,") < 3:  # somebody gets there
                lines.append(
                    f"{c.title}: facts kept (%) at the level before training ({c.trait} {score:.1f}): {cells}."
                )
            lines += [f"{c.title}: {reach_sentence(c, sweep, high)}" for sweep in c.sides.values() if sweep]
    return list(dict.fromkeys(lines))


def reach_sentence(c, sweep, high):
    """The smallest coefficient that brings the mean score into the interval of the model before training; its cost."""
    marks = {metric: curve(sweep.points, sweep.x, metric) for metric in METRICS}
    reach = next((m for m in marks["trait_score"] if m.mean <= high), None)
    where = f"{c.trait} back within the interval of before training (up to {high:.1f})"
    at = reach or min(marks["trait_score"], key=lambda m: m.mean)
    costs = [f"{label_of(key, c.trait, c.points)} {m.mean:.1f}" for key in marks for m in marks[key] if m.x == at.x]
    name = f"{at.x:g}{' (few seeds)' * at.few}"
    what = f"{name} brings {where}" if reach else f"no coefficient brings {where}; at {name}, the lowest"
    return f"{METHODS[sweep.x]}: {what}: {', '.join(costs)}."


def equal_cells(c, level, last=False):
    """-> facts kept by each method, their difference, k of n seeds, general knowledge; means over the same seeds."""
    lines, cells, known, difference = {x: lines_by_seed(s) for x, s in c.sides.items() if s}, [], [], "-"
    swept = [seed for seed in next(iter(lines.values()), ()) if all(seed in of for of in lines.values())]
    ends = {x: {seed: crossing(of[seed], level, last) for seed in swept} for x, of in lines.items()}
    there = {x: [seed for seed in swept if of[seed]] for x, of in ends.items()}
    seeds = [seed for seed in swept if all(seed in of for of in there.values())]
    for x in METHODS:
        own = [ends[x][seed] for seed in seeds or there[x]] if x in ends else []  # no pair: what it keeps by itself
        facts, general = [end[2] for end in own], [end[3] for end in own]
        cells.append((f"{fmean(facts):.1f}" if own else "-") + (f" ± {stdev(facts):.1f}" if len(own) > 1 else ""))
        known.append(f"{fmean(general):.1f}" if own and None not in general else "-")
    if len(ends) == 2 and seeds:
        mean, low, high = t_interval([ends["train_coef"][seed][2] - ends["inference_coef"][seed][2] for seed in seeds])
        difference = f"{mean:+.1f}" + (f" [{low:.1f}, {high:.1f}]" if len(seeds) > 1 else "")
    counts = ", ".join(f"{METHODS[x].split()[0].lower()} {len(of)}" for x, of in there.items())
    reached = f"{len(seeds)} of {len(swept)}" + f" ({counts})" * (len(seeds) < len(swept))
    return [*cells, difference, reached, " / ".join(known)]


def equal_table(points):
    """Facts kept at equal hallucination -> Markdown lines; the first level is that before training."""
    rows = []
    for c in (c for c in comparisons(points) if any(c.sides.values())):
        base = c.base["trait_score"] if usable(c.base, "trait_score") else -1
        for level in [base] * (base >= 0) + [level for level in LEVELS if level > base]:
            name = f"{level:.3g}" + " (before training)" * (level == base)
            both = zip(equal_cells(c, level), equal_cells(c, level, last=True))
            rows.append([c.title, name, *(a if a == b else f"{a} (last {b})" for a, b in both)])
    known = f"{label_of('mmlu_accuracy', '', points)}, preventative / inference-time"
    return markdown(["blocks", "score", "preventative", "inference-time", "difference [95%]", "seeds", known], rows)


def markdown(head, rows):
    """-> lines of a Markdown table, no row twice; nothing without rows."""
    rows = [head, ["---"] * len(head), *rows] if rows else []
    lines = (" | ".join(" ".join(text.replace("|", "/").split()) for text in row) for row in rows)
    return list(dict.fromkeys(f"| {line} |" for line in lines))


def cell(point, key):
    """A point's value as the table shows it; "-" where it does not apply or was not measured."""
    value, x = point.get(key), next((x for x, keys in STEERED_BY.items() if key in keys), None)
    if value is None or value != value or x and not point.get(x):
        return "before training" if key == "dataset" else "-"
    bounds = point.get(METRICS[key][0]) if key in METRICS else None
    text = f"{value:.3g}" if isinstance(value, float) else str(value)[-60:]
    text = str(Path(value).parent) if key.endswith("vector") else text  # every trait has its own
    text += " (hollow)" * (key.endswith("_unscored") and value > 0 and hollow([point]))
    return text + (f" [{bounds[0]:.3g}, {bounds[1]:.3g}]" if bounds else "")


def points_table(points):
    """All points, one row each -> Markdown lines."""
    which = [key for key in WHICH if len({cell(p, key) for p in points} - {"-" if key in HOW[:6] else ""}) > 1]
    rows = sorted(points, key=lambda p: [str(p.get(key)) for key in which])
    return markdown([*which, *MEASURED], [[cell(p, key) for key in (*which, *MEASURED)] for p in rows])


def notes(points, folder):
    """What to know before believing: probes, and adapters that the points do not tell apart."""
    keys = ("dataset", "train_coef", "train_seed", "system_prompt", *STEERED_BY["train_coef"], *RECIPE)
    settings = {path.stem: mf.read_json(path, mf.Settings) for path in sorted(folder.glob("vectors/*.json"))}
    probes = [(trait, vector["probe"]) for trait, vector in settings.items() if vector.get("probe")]
    lines = [f"Probe of {v}: row {p['row']}, AUC {p['auc']:.2f}{', weak' * (p['auc'] < 0.7)}." for v, p in probes]
    adapters = {p["adapter"]: tuple(map(p.get, keys)) for p in points if p.get("adapter")}
    alike = [sorted(some) for some in grouped(adapters, adapters.get).values() if len(some) > 1]
    if alike:
        lines.append(f"{', '.join(alike[0])}: same settings ({len(alike)} such groups); figures show the last.")
    return lines


def agreement(answers):
    """answers: [(point, rows)] -> Markdown lines: judges of the same answers, pair by pair; an answer counts once."""
    pairs = {}
    for row in (row for _, rows in answers for row in rows):
        given = {judge: of["score"] for judge, of in row.get("scores", {}).items() if usable(of, "score")}
        for one, other in combinations(sorted(given), 2):
            pairs.setdefault((row.get("trait") or "facts", one, other), []).append((given[one], given[other]))
    rows = []
    for (trait, one, other), scores in sorted(pairs.items()):
        first, second = zip(*scores)
        rho = f"{spearmanr(first, second).statistic:.2f}" if len(set(first)) > 1 < len(set(second)) else "-"
        rows.append([trait, f"{one}, {other}", f"{len(scores)}", rho, f"{fmean(second) - fmean(first):+.1f}"])
    return markdown(["trait", "judges", "answers", "Spearman's rho", "mean difference (second - first)"], rows)


def summary(points, shown, folder, answers):
    """Text of summary.md. shown: the points of each trait's main judge, which the figures show."""
    lines = ["# Preventative steering: summary", "", describe(shown), ""]
    lines += [f"- {line}" for line in headline(shown) + notes(shown, folder)]
    equal, judges = equal_table(shown), agreement(answers)
    lines += ["", "## Facts kept at equal hallucination", "", EQUAL, "", *equal] if equal else []
    lines += ["", "## Judges on the same answers", "", *judges] if judges else []
    return "\n".join([*lines, "", "## All points", "", *points_table(points), ""])


def read_answers(points, folder):
    """-> [(point, rows)], a key once; rows: [] where its answers are not there."""
    found, rest = [], packed(folder / "answers.jsonl.xz", mf.Answer, "key")
    for point in {p["key"]: p for p in points}.values():
        file = folder / "answers" / Path(point.get("answers") or f"{point['key']}.jsonl").name
        rows = mf.read_jsonl(file, mf.Answer, appended=True) if file.is_file() else rest.get(point["key"], [])
        found.append((point, rows))
    return found


def browser_data(answers, most=30_000_000):
    """What data/report.html reads: points, questions, answers, these cut so that all have about `most` characters."""
    points, questions, found, limit = [], {}, [], most // max(1, sum(len(rows) for _, rows in answers))
    for point, rows in answers:
        for row in rows:
            questions[re.sub(r"-s\d+$", "", row["id"])] = row.get("trait") or "facts", row["question"], row.get("truth")
            said = {k: s["score"] if usable(s, "score") else s.get("reason") for k, s in row.get("scores", {}).items()}
            found.append([len(points), row["id"], row["answer"][:limit], row.get("coherence_nll"), said])
        points.append({key: point.get(key) for key in WHICH})
    text = json.dumps(dict(points=points, questions=questions, answers=found, limit=limit), ensure_ascii=False)
    return text.replace("<", "\\u003c")


def report(points, text, folder, answers, losses):
    """The page. text: summary.md, whose Markdown may hold no HTML."""
    names = ["fig1", "tradeoff"] * bool(comparisons(points)) + ["fig2"] * bool(by_data(points, facts=False))
    keys = "model judge judge_method temperature samples mmlu mmlu_scoring seed commit versions inputs".split()
    head, *sections = MarkdownIt("commonmark", dict(html=False)).enable("table").render(text).split("<h2>")
    template = (Path(__file__).parent / "data" / "report.html").read_text(encoding="utf-8")
    return jinja2.Template(template, autoescape=True).render(
        head=head,
        sections=sections,
        pictures={name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in names},
        settings=Counter(json.dumps({key: p.get(key) for key in keys}, indent=1) for p in points),
        losses=losses,
        missing=sum(not rows for _, rows in answers),
        answers=browser_data(answers),
    )


def main(argv=None):
    parser = mf.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("points", type=Path, help="points.jsonl of evaluate.py")
    args = parser.parse_args(argv)
    points, folder = read_points(args.points), args.points.parent
    shown = of_main_judge(points)
    plt.switch_backend("Agg")
    answers, losses = read_answers(points, folder), loss_curves(points, folder)
    text = summary(points, shown, folder, answers)  # before anything is written
    figure1(shown, folder / "fig1")
    tradeoff(shown, folder / "tradeoff")
    figure2(shown, folder / "fig2")
    for name, content in {"summary.md": text, "report.html": report(points, text, folder, answers, losses)}.items():
        with mf.replacing(folder / name) as out:
            out.write(content)
    print("\n".join(headline(shown)) + f"\n{folder}/fig1.png, tradeoff.png, fig2.png, summary.md, report.html")


if __name__ == "__main__":
    mf.run(main)
