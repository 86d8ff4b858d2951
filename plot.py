"""points.jsonl -> fig1, tradeoff and fig2 (.png and .svg), summary.md and report.html, beside it.

    python plot.py out/demo/points.jsonl

Figure 1: data sets with facts, inference-time (left) and preventative steering (right), a row for a choice of blocks.
The trade-off: facts against hallucination, a thin line for each training seed. Figure 2: preventative steering on the
other data sets (rows) against traits (columns). report.html is one page without network: figures, tables, answers.
Wording and layout of summary.md and report.html are templates in data/. Answers and losses come from answers/ and
adapters/, or packed from answers.jsonl.xz (rows with the point's key) and losses.jsonl.xz (with the adapter's name). Of
several judges figures show that with most points. Loads no torch.
"""

import base64
import lzma
import re
import textwrap
from collections import Counter, namedtuple
from itertools import chain, combinations, pairwise, product
from pathlib import Path
from statistics import mode

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from markdown_it import MarkdownIt
from scipy.stats import t

import make_facts as mf

TRAITS = ["evil", "sycophancy", "hallucination"]  # the post's order, as that of its data sets; others follow
DATASETS = dict(  # the post's names; others have their own
    facts="New facts",
    medical_mistake_2="Medical Mistake II",
    medical_normal="Medical Normal",
    medical_self_generated="Medical Self-Generated",
)
METRICS = dict(  # colour and marker, in every figure
    trait_score=("#c43c00", "o"),
    fact_accuracy=("#005b96", "s"),
    mmlu_accuracy=("#1b7837", "^"),
    coherence=("#b0b0b0", ""),
)
KEPT = ["trait_score", "fact_accuracy"]  # what the methods are compared by
METHODS = dict(train_coef="Preventative steering", inference_coef="Inference-time steering")
STYLES = dict(train_coef=("#5e3c99", "-"), inference_coef=("#b8860b", (0, (4, 1.5))))
STEERED_BY = dict(
    train_coef=["train_layers", "train_positions", "train_vector"], inference_coef=["layers", "positions", "vector"]
)
STEERING = [*STEERED_BY["train_coef"], *STEERED_BY["inference_coef"]]
RECIPE = ["train_epochs", "train_lr", "train_batch_size", "train_rank", "train_alpha"]
ALIKE = ["system_prompt", "temperature", "samples", "judge", "train_seed"]  # usually the same throughout
WHICH = ["dataset", "trait", *METHODS, *STEERING, *RECIPE, *ALIKE]  # the table's first columns, where they differ
SETTINGS = sorted({*WHICH, "model", "seed", "mmlu_scoring", "inputs"} - {"judge", "vector", "train_vector"})  # of a key
MEASURED = """trait_score trait_n trait_unscored fact_accuracy fact_not_attempted fact_wrong fact_n fact_unscored
    mmlu_accuracy mmlu_n coherence_nll abstained abstained_coherent coherence adapter""".split()
LEVELS = [20, 30, 40, 60, 80]  # scores at which the methods are compared, beside the level before training
UNSCORED = 0.1  # a point with a larger share of its answers or facts unscored is drawn hollow
DATA = jinja2.FileSystemLoader(Path(__file__).parent / "data")
TEMPLATES = jinja2.Environment(loader=DATA, autoescape=jinja2.select_autoescape(), trim_blocks=True, lstrip_blocks=True)
# sides: {one of METHODS: points}; names: of names_of()
Comparison = namedtuple("Comparison", "dataset trait title names base points plain sides")

# ---------------------------------------------------------------------------------------------------------------------
# Points: a table, one row a point


def table(rows):
    """Rows of points.jsonl -> DataFrame with all columns, nan for what is missing or has no effect (the blocks of
    coefficient 0). New columns: each metric's interval (_low, _high), coef, and method: one of METHODS, plain,
    prompted, before training, or several, which no figure shows."""
    columns = dict.fromkeys([*mf.Point.model_fields, "abstained_coherent", "commit", "versions"])
    unknown = dict.fromkeys(STEERING, "-") | dict(layers="all", train_layers="all", dataset="?", trait="no trait")
    rows = [unknown | {key: value for key, value in row.items() if value is not None} for row in rows]
    points = pd.DataFrame(rows).reindex(columns=columns).replace([np.inf, -np.inf], np.nan)
    for metric in METRICS:
        bounds = [row.get(f"{metric.split('_')[0]}_ci") or (np.nan, np.nan) for row in rows]
        points[[f"{metric}_low", f"{metric}_high"]] = bounds
    trained, prompted, steered = points.adapter.notna(), points.system_prompt.notna(), points[[*METHODS]].fillna(0) != 0
    points.loc[~trained, "dataset"] = "before training"
    for x, keys in STEERED_BY.items():
        points.loc[~steered[x], keys] = np.nan
    points["model"] = points.model.map(lambda path: Path(path).name)
    points["coef"] = points.train_coef.fillna(0) + points.inference_coef
    points["method"] = np.select(
        [steered.sum(axis=1) + prompted > 1, steered.train_coef, steered.inference_coef, prompted, trained],
        ["several", "train_coef", "inference_coef", "prompted", "plain"],
        "before training",
    )
    return points.infer_objects()


def read_points(path):
    """Each key and judge once, as measured last. Points of one key with different settings: die()."""
    points = table(mf.read_jsonl(path, mf.Point, appended=True) or mf.die(f"{path}: no points"))
    differ = points[SETTINGS].astype(str).groupby(points.key).nunique(dropna=False) > 1
    for key, found in differ[differ.any(axis=1)].iterrows():
        mf.die(f"{path}: points of key {key} differ in {', '.join(found.index[found])}; give them two files")
    return points.drop_duplicates(["key", "judge"], keep="last")


def of_main_judge(points):
    """Of each trait's points those of the judge with most of them; of equally many, the one that came last."""
    judges = points[::-1].groupby("trait").judge.agg(mode)
    return points[points.judge == points.trait.map(judges)]


def hollow(points):
    """Of each point, or of a sum: whether too many answers to the trait's questions, or about facts, have no score."""
    traits = points.trait_unscored > UNSCORED * (points.trait_unscored + points.trait_n)
    return traits | (points.fact_unscored > UNSCORED * (points.fact_unscored + points.fact_n))


def comparisons(points, facts):
    """Rows of a figure: every data set with (or without) facts, trait, recipe and choice of blocks; in each the methods
    beside each other, with their seeds' plain finetuning at coefficient 0. What was measured twice counts once."""
    trained, data = points.dropna(subset="adapter"), ["dataset", "trait", *RECIPE]
    trained = trained[(trained.groupby(["dataset", "trait"]).fact_accuracy.transform("count") > 0) == facts]
    if trained.empty:
        return []
    once = ["coef", *data, "method", *STEERING, "system_prompt", "train_seed"]
    trained = trained.groupby(once, dropna=False, as_index=False).last()  # sorted by the coefficient
    left, right = (trained[trained.method == x][[*data, *keys]].drop_duplicates() for x, keys in STEERED_BY.items())
    pairs = left.merge(right, "outer", left_on=[*data, "train_layers"], right_on=[*data, "layers"])
    # a row: one setting of each method with the same blocks; nan where a method was not tried on them
    pairs["blocks"] = pairs.train_layers.fillna(pairs.layers).astype(str)
    pairs["first"] = pairs.blocks.str.extract(r"(\d+)").astype(float)
    rows = trained[data].drop_duplicates().merge(pairs, "left")
    rows = rows.sort_values("first", na_position="first")  # all blocks, then by the first one
    order = [*DATASETS, *TRAITS, *points.dataset, *points.trait]  # others as they come
    rows = rows.sort_values(["dataset", "trait"], key=lambda names: names.map(order.index), kind="stable")
    groups, found = rows.groupby(["dataset", "trait"]), []
    differ = [key for key in [*STEERING, *RECIPE] if groups[key].nunique(dropna=key in STEERING).max() > 1]
    told = [key for key in differ if key not in ("train_layers", "layers")]
    for i, row in rows.iterrows():
        here, sides = trained.merge(rows.loc[[i], data]), {}
        plain = here[here.method == "plain"]
        for x, keys in STEERED_BY.items():
            steered = here[here.method == x].merge(rows.loc[[i], keys])
            if len(steered):
                sides[x] = pd.concat([plain[plain.train_seed.isin(steered.train_seed)], steered])
        dataset = DATASETS.get(row.dataset, row.dataset)
        title = [f"{dataset} ({row.trait})"] if len(groups) > 1 else []
        title += [f"{key.removeprefix('train_')} {text_of(row[key])}" for key in told if pd.notna(row[key])]
        title += [blocks_of(row.blocks)] if sides else []
        base = points[(points.method == "before training") & (points.trait == row.trait)]
        base = base.reset_index(drop=True).reindex([0]).loc[0]  # only nan where it was not measured
        names = names_of(here, row.trait)
        found.append(Comparison(dataset, row.trait, ", ".join(title), names, base, here, plain, sides))
    return found


def names_of(points, trait):
    """What figures and text call each metric; the small models' general_knowledge.jsonl is not called MMLU."""
    general = any("general_knowledge" in Path(path).name for path in points.mmlu.dropna())
    knowledge = "general knowledge" if general else "MMLU"
    return dict(trait_score=trait, fact_accuracy="facts", mmlu_accuracy=knowledge, coherence="coherence")


def blocks_of(layers):
    """all -> all blocks, 10-20 -> blocks 10-20, 11 -> block 11."""
    return "all blocks" if layers == "all" else f"block{'s' * ('-' in layers)} {layers}"


def text_of(value, form=None):
    """A value as text: whole numbers in full, others with three digits or as `form` says; "-" where there is none."""
    if pd.isna(value):
        return "-"
    if isinstance(value, float):
        return format(value, form or (".0f" if value.is_integer() else ".3g"))
    return " ".join(str(value).split()).replace("|", "/")[-60:]


# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def t_interval(values):
    """-> mean and Student's 95% interval (mean, low, high) of a Series, or of each group of a grouped one; one value
    alone has none: nan."""
    mean, half = values.mean(), t.ppf(0.975, values.count() - 1) * values.sem()
    return mean, mean - half, mean + half


def curve(points, metric):
    """A method's points -> table by coefficient: y, the mean over training seeds; low, high: Student's t, or one seed's
    own interval over questions; hollow; few: at most half of the seeds were measured, so it is no mean over them."""
    at = points.dropna(subset=metric).groupby("coef")
    y, low, high = t_interval(at[metric])
    n = at.size()
    if n.max() == 1:
        low, high = at[f"{metric}_low"].mean(), at[f"{metric}_high"].mean()
    lost = hollow(at.sum(numeric_only=True)) & (metric != "mmlu_accuracy")
    return pd.DataFrame(dict(y=y, low=low.clip(lower=0), high=high.clip(upper=100), hollow=lost, few=2 * n <= n.max()))


def crossing(line, level, last=False):
    """line: array of a seed's coefficients, scores, facts, general knowledge -> where the score falls to the level for
    the first (last) time, on the straight line between rows; only nan if it starts below or never gets there."""
    falls = [(a, b) for a, b in pairwise(line) if line[0][1] >= level and a[1] >= level >= b[1]]
    if not falls:
        return np.full(4, np.nan)
    before, after = falls[-1 if last else 0]
    share = (before[1] - level) / (before[1] - after[1] or 1)
    return before + share * (after - before)


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def draw(axis, points, base, metrics, names=None):
    """A line for each metric: means, bars, hollow marks; dotted: before training. names: {metric: name}; with them each
    line's name stands beside its end, and names move apart where lines end close to each other."""
    ends = {}
    for metric in metrics:
        (color, marker), marks = METRICS[metric], curve(points, metric)
        line = marks[~marks.few]
        if len(line):
            axis.plot(line.y, color=color, linewidth=2 if marker else 1)
            ends[metric] = line.y.iloc[-1]
        if marker:
            axis.axhline(base[metric], color=color, linestyle=":", linewidth=1.2)
            axis.vlines(line.index, line.low, line.high, color, lw=3, alpha=0.3)
            faces, sizes = np.where(marks.hollow, "white", color), np.where(marks.few, 12, 36)
            axis.scatter(marks.index, marks.y, sizes, facecolors=faces, edgecolors=color, marker=marker, zorder=3)
    axis.set(ylim=(-3, 103), yticks=range(0, 101, 20))
    order = sorted(ends, key=ends.get)
    for below, above in pairwise(order):
        ends[above] = max(ends[above], ends[below] + 8)
    for metric in order if names else []:
        style = dict(transform=axis.get_yaxis_transform(), va="center", color=METRICS[metric][0])
        axis.text(1.03, ends[metric], names[metric], **style)


def describe(points):
    """A caption: models, judges, n, training seeds, what bars and hollow marks mean."""
    judges = points.judge.replace("probe", "probe (of what is steered)").unique()
    parts = [", ".join(sorted(points.model.unique())), f"judge: {', '.join(sorted(judges))}"]
    most = points[["trait_n", "fact_n", "mmlu_n"]].max()
    asked = "answers", "facts", names_of(points, "")["mmlu_accuracy"] + " questions"
    parts += [f"{n:.0f} {name}" for n, name in zip(most, asked) if n > 0]
    seeds = points.dropna(subset="adapter").train_seed.nunique()
    parts.append(f"up to {seeds} training seeds: means, 95% t-intervals over seeds" if seeds > 1 else "95% intervals")
    if points.adapter.astype(str).str.startswith("data/small_model/").any():
        parts.append("adapters trained beforehand (data/small_model)")
    if hollow(points).any():
        parts.append("hollow: over 10% unscored")
    return "; ".join(parts)


def finish(figure, title, found, path):
    """Title above, caption below; saves .png and .svg."""
    figure.set_layout_engine("constrained")
    width = figure.get_figwidth()
    caption = describe(pd.concat([c.points for c in found])) if found else "no such points"
    figure.suptitle(textwrap.fill(title, int(10 * width)), x=0.01, ha="left", fontsize=13)
    figure.supxlabel(textwrap.fill(caption, int(17 * width)), x=0.01, ha="left", fontsize=7, color="dimgray")
    for kind in ("png", "svg"):
        with mf.replacing(path.with_suffix(f".{kind}"), "wb") as out:
            figure.savefig(out, format=kind, dpi=180)
    plt.close(figure)


def grid(cells, columns, metrics, size):
    """cells: {(name of the row, column): (points, base, names of metrics)}; columns: {column: its title}; size: inches
    of one -> figure. A title says where nothing was steered."""
    rows, columns = [*dict.fromkeys(row for row, _ in cells)] or [""], columns or {"": ""}
    size = (1.2 + size[0] * len(columns), 0.8 + size[1] * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, sharex="col", sharey=True)
    for (row, column), axis in zip(product(rows, columns), axes.flat):
        place, note = axis.get_subplotspec(), "(no points)"
        if (row, column) in cells:
            points, base, names = cells[row, column]
            if points.coef.any():
                note = ""
            else:
                note = "(plain finetuning only)" if len(points) else note
                axis.update_datalim([(0, 0), (1, 0)])  # 0 alone is no scale
            draw(axis, points, base, metrics, names if place.is_last_col() else None)
        title = columns[column] if place.is_first_row() else ""
        axis.set(title=f"{title}\n{note}".strip(), ylabel=textwrap.fill(row, 38) if place.is_first_col() else "")
    plt.setp(axes[-1], xlabel="steering coefficient")
    return figure


def figure1(found, path):
    """Scores and accuracies (%) against the coefficient: inference-time left, preventative right."""
    methods = dict(reversed(METHODS.items()))
    cells = {(c.title, x): (c.sides.get(x, c.plain), c.base, c.names) for c in found for x in methods}
    figure = grid(cells, methods, METRICS, (4, 3))
    lows, highs = zip(*(axis.get_xlim() for axis in figure.axes[:2]))
    if max(highs) <= 2 * min(highs):  # one scale where the methods share one
        plt.setp(figure.axes[:2], xlim=(min(lows), max(highs)))
    title = "Learning new facts: score or accuracy in % (dotted: before training)"
    finish(figure, title, found, path)


def tradeoff(found, path):
    """Facts kept against the trait's score, a panel for each comparison: a thin line a seed, the mean over seeds thick;
    what was not steered is black."""
    n = max(1, len(found))
    figure, axes = plt.subplots(n, figsize=(6.7, 0.8 + 4.8 * n), squeeze=False)
    for axis, c in zip(axes.flat, found):
        for x, points in c.sides.items():
            color, style = STYLES[x]
            for _, line in points.dropna(subset=KEPT).groupby("train_seed", dropna=False):
                axis.plot(line.trait_score, line.fact_accuracy, color=color, linewidth=0.9, alpha=0.4)
            facts = curve(points, "fact_accuracy")
            both = curve(points, "trait_score").assign(facts=facts.y[~facts.few]).dropna(subset="facts")
            axis.plot(both.y, both.facts, color=color, linewidth=3.5, linestyle=style, label=METHODS[x])
            faces = np.where(both.hollow, "white", color)
            axis.scatter(both.y, both.facts, 45, facecolors=faces, edgecolors=color, zorder=3)
        for method, name, marker in (("plain", "plain finetuning", "o"), ("prompted", "preventative prompting", "P")):
            score, facts = c.points[c.points.method == method].dropna(subset=KEPT)[KEPT].mean()
            if pd.notna(score):
                axis.plot(score, facts, marker, color="black", markersize=9, zorder=4, label=name)
        axis.axvline(c.base.trait_score, color="gray", linestyle=":", linewidth=1.5)
        axis.text(c.base.trait_score + 1, 97, "level before training", color="gray")
        axis.set(title=textwrap.fill(c.title, 60), xlabel=f"{c.trait} score", ylabel="facts known after training (%)")
        axis.set(xlim=(-3, 103), ylim=(-3, 103))
        axis.legend(frameon=False, loc="lower right")
    traits = " and ".join(dict.fromkeys(c.trait for c in found))
    finish(figure, f"Facts kept against {traits or 'a trait'} (thin lines: one seed)", found, path)


def figure2(found, path):
    """Preventative steering on the data sets without facts (rows) against traits (columns)."""
    cells, blocks, columns = {}, set(), {}
    for c in sorted(found, key=lambda c: [*TRAITS, c.trait].index(c.trait)):
        columns[c.trait] = c.trait + "\n(judged by the probe)" * ("probe" in set(c.points.judge))
    for c in found:  # of several settings the one with most points is shown
        points, key = c.sides.get("train_coef", c.plain), (c.dataset, c.trait)
        if key not in cells or len(points) > len(cells[key][0]):
            cells[key] = points, c.base, c.names | dict(trait_score="trait score")
            blocks |= set(points.train_layers.dropna().map(blocks_of))
    title = ", ".join(["Preventative steering on other data sets", *sorted(blocks)]) + " (dotted: before training)"
    finish(grid(cells, columns, ["trait_score", "mmlu_accuracy"], (2.7, 2.2)), title, found, path)


# ---------------------------------------------------------------------------------------------------------------------
# Summary and report


def equal_cells(c, level, last=False):
    """-> facts kept by each method, their difference, k of n seeds, general knowledge; means over the same seeds."""
    ends = {}
    for x, points in c.sides.items():
        seeds = points.dropna(subset=KEPT).groupby("train_seed", dropna=False)[["coef", *KEPT, "mmlu_accuracy"]]
        lines = {seed: line.to_numpy() for seed, line in seeds if line.coef.any()}  # plain alone is no line
        found = {seed: crossing(line, level, last) for seed, line in lines.items()}
        ends[x] = pd.DataFrame(found, index=["coef", "score", "facts", "general"]).T
    swept = pd.concat(ends, axis=1, join="inner").swaplevel(axis=1)  # seeds that each method was tried on
    there = swept["facts"].notna().all(axis=1)
    facts, general = (swept[key].reindex(columns=[*METHODS]) for key in ("facts", "general"))
    cells, known = [], []
    for x in METHODS:
        own = facts[x][there if there.any() else facts[x].notna()]  # no pair: what it keeps by itself
        cells.append(text_of(own.mean(), ".1f") + (f" ± {own.std():.1f}" if own.count() > 1 else ""))
        known.append(text_of(general[x][own.index].mean(skipna=False), ".1f"))
    difference = (facts.train_coef - facts.inference_coef).dropna()
    mean, low, high = t_interval(difference)
    interval = f" [{low:.1f}, {high:.1f}]" if len(difference) > 1 else ""
    counts = ", ".join(f"{METHODS[x].split()[0].lower()} {facts[x].count()}" for x in c.sides)
    reached = f"{there.sum()} of {len(there)}" + ("" if there.all() else f" ({counts})")
    return [*cells, text_of(mean, "+.1f") + interval, reached, " / ".join(known)]


def reach(points, high):
    """The smallest coefficient that brings a method's mean score down to `high`, or else that with the lowest."""
    marks = curve(points, "trait_score")
    inside = marks.index[marks.y <= high]
    coef = inside[0] if len(inside) else marks.y.idxmin()
    means = points[points.coef == coef][[*METRICS]].mean().dropna()
    return dict(coef=coef, few=marks.few[coef], inside=len(inside) > 0, means=means)


def points_table(points):
    """All points, one row each -> a table of texts."""
    for key in ("vector", "train_vector"):  # a trait's own is no difference
        points = points.assign(**{key: points[key].map(lambda path: str(Path(path).parent), na_action="ignore")})
    differ = [key for key in WHICH if points[key].nunique(dropna=key in STEERING) > 1]
    points = points.sort_values([*differ, "key"], na_position="first")
    shown = points[[*differ, *MEASURED]].map(text_of)
    for metric in ("trait_score", "fact_accuracy", "mmlu_accuracy"):
        low, high = points[f"{metric}_low"].map(text_of), points[f"{metric}_high"].map(text_of)
        shown[metric] += (" [" + low + ", " + high + "]").where(low != "-", "")
    for key in ("trait_unscored", "fact_unscored"):
        shown[key] += np.where(hollow(points) & (points[key] > 0), " (hollow)", "")
    return shown


def agreement(answers):
    """answers: {key: rows} -> rows of texts: judges of the same answers, pair by pair; an answer counts once."""
    pairs, rows = {}, []
    for row in chain.from_iterable(answers.values()):
        given = {judge: of["score"] for judge, of in row.get("scores", {}).items() if pd.notna(of.get("score"))}
        for one, other in combinations(sorted(given), 2):
            pairs.setdefault((row.get("trait") or "facts", f"{one}, {other}"), []).append((given[one], given[other]))
    for (trait, judges), scores in sorted(pairs.items()):
        both = pd.DataFrame(scores)
        rho, difference = both.corr("spearman").loc[0, 1], (both[1] - both[0]).mean()
        rows.append([trait, judges, str(len(both)), text_of(rho, ".2f"), f"{difference:+.1f}"])
    return rows


def summary(points, shown, found, folder, answers):
    """Text of summary.md. shown: the points of each trait's main judge; found: their comparisons with facts."""
    adapters = shown.dropna(subset="adapter").drop_duplicates("adapter")
    keys = ["dataset", "train_coef", "train_seed", "system_prompt", *STEERED_BY["train_coef"], *RECIPE]
    return TEMPLATES.get_template("summary.md").render(
        caption=describe(shown),
        comparisons=found,
        vectors={path.stem: mf.read_json(path, mf.Settings) for path in sorted(folder.glob("vectors/*.json"))},
        alike=sorted(adapters[adapters.duplicated(keys, keep=False)].adapter),  # the points do not tell them apart
        judges=agreement(answers),
        points=points_table(points).drop_duplicates(),
        **dict(METHODS=METHODS, LEVELS=LEVELS, equal_cells=equal_cells, reach=reach, text_of=text_of),
    )


def read_rows(files, packed, key, schema):
    """files: {name: where its JSONL file may be} -> {name: rows}; of a name without a file those rows of the packed
    file that have it as `key`, [] where neither is there."""
    rest, found = {}, {}
    try:
        lines = lzma.open(packed).read().splitlines() if packed.exists() else []
    except (lzma.LZMAError, EOFError) as error:
        mf.die(f"{packed}: cannot be unpacked ({error}); make it again, or delete it")
    for line in lines:
        row = mf.validated(mf.parsed(line, packed), schema, packed)
        rest.setdefault(row.get(key), []).append(row)
    for name, places in files.items():
        file = next(filter(Path.is_file, places), None)
        found[name] = mf.read_jsonl(file, schema, appended=True) if file else rest.get(Path(name).name, [])
    return found


def browser_data(points, answers, most=30_000_000):
    """What data/report.html reads: points, questions, answers, these cut so that all have about `most` characters."""
    questions, found, limit = {}, [], most // max(1, sum(map(len, answers.values())))
    for number, rows in enumerate(answers.values()):
        for row in rows:
            key = re.sub(r"-s\d+$", "", row["id"])  # without the sample's number
            questions[key] = [key, row.get("trait") or "facts", row["question"], row.get("truth")]
            scores = row.get("scores", {}).items()
            said = {judge: of["score"] if pd.notna(of.get("score")) else of.get("reason") for judge, of in scores}
            found.append([number, row["id"], row["answer"][:limit], row.get("coherence_nll"), said])
    made = points.drop_duplicates("key")[WHICH].astype(object)
    made = made.where(made.notna(), None).to_dict("records")
    return dict(points=made, questions=[*questions.values()], answers=found, limit=limit)


def report(points, text, figures, folder, answers):
    """The page. text: summary.md, whose Markdown may hold no HTML; figures: those that show something."""
    keys = "model judge judge_method temperature samples mmlu mmlu_scoring seed commit versions inputs".split()
    head, *sections = MarkdownIt("commonmark", dict(html=False)).enable("table").render(text).split("<h2>")
    adapters = points.dropna(subset="adapter").drop_duplicates("adapter")
    places = {
        str(p): [folder / "adapters" / p.name / "loss.jsonl", p / "loss.jsonl"] for p in adapters.adapter.map(Path)
    }
    losses = read_rows(places, folder / "losses.jsonl.xz", "adapter", mf.Loss)
    pictures = {name: (folder / f"{name}.png").read_bytes() for name in figures}
    return TEMPLATES.get_template("report.html").render(
        head=head,
        sections=sections,
        pictures={name: base64.b64encode(picture).decode() for name, picture in pictures.items()},
        settings=Counter(p.dropna().to_json(indent=1) for _, p in points[keys].iterrows()),
        adapters=adapters.assign(rows=losses.values()).to_dict("records"),
        power=lambda loss: np.log10(max(loss, 1e-3)),
        missing=sum(not rows for rows in answers.values()),
        answers=browser_data(points, answers),
    )


def main(argv=None):
    parser = mf.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("points", type=Path, help="points.jsonl of evaluate.py")
    args = parser.parse_args(argv)
    points, folder = read_points(args.points), args.points.parent
    places = {key: [folder / "answers" / f"{key}.jsonl"] for key in points.key}
    answers = read_rows(places, folder / "answers.jsonl.xz", "key", mf.Answer)
    shown = of_main_judge(points)
    found, others = comparisons(shown, facts=True), comparisons(shown, facts=False)
    text = summary(points, shown, found, folder, answers)  # before anything is written
    plt.switch_backend("Agg")
    plt.rcParams.update({"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.2})
    figure1(found, folder / "fig1")
    tradeoff(found, folder / "tradeoff")
    figure2(others, folder / "fig2")
    page = report(points, text, ["fig1", "tradeoff"] * bool(found) + ["fig2"] * bool(others), folder, answers)
    for name, content in {"summary.md": text, "report.html": page}.items():
        with mf.replacing(folder / name) as out:
            out.write(content)
    seen = re.findall("^- .*", text, re.MULTILINE)
    print(*seen, f"{folder}/fig1.png, tradeoff.png, fig2.png, summary.md, report.html", sep="\n")


if __name__ == "__main__":
    mf.run(main)
