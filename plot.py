"""points.jsonl -> fig1, tradeoff and fig2 (.png and .svg), summary.md and report.html, beside it.

    python plot.py out/demo/points.jsonl

Answers and losses come from answers/ and adapters/, or packed from answers.jsonl.xz (rows with the point's key) and
losses.jsonl.xz (with the adapter's name). report.html is one page without network; both texts are templates in data/.
"""

import base64
import lzma
import re
import textwrap
from collections import Counter, defaultdict, namedtuple
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

TRAITS = ["evil", "sycophancy", "hallucination"]  # the post's order, as that of DATASETS; others follow
DATASETS = ["facts", "medical_mistake_2", "medical_normal", "medical_self_generated"]
METRICS = dict(  # colour and marker, in every figure
    trait_score=("#c43c00", "o"),
    fact_accuracy=("#005b96", "s"),
    mmlu_accuracy=("#1b7837", "^"),
    coherence=("#b0b0b0", ""),
)
KEPT = ["trait_score", "fact_accuracy"]  # what the methods are compared by
METHODS = dict(train_coef="Preventative steering", inference_coef="Inference-time steering")
STYLES = dict(train_coef=("#5e3c99", "-"), inference_coef=("#b8860b", (0, (4, 1.5))))
STEERING = "train_layers train_positions train_vector layers positions vector".split()
STEERED_BY = dict(train_coef=STEERING[:3], inference_coef=STEERING[3:])
RECIPE = [f"train_{name}" for name in mf.TRAINED if name not in ("coef", "seed")]
OTHERS = ["system_prompt", "temperature", "samples", "judge", "train_seed"]
WHICH = ["dataset", "trait", *METHODS, *STEERING, *RECIPE, *OTHERS]  # the table's first columns, where they differ
SETTINGS = sorted({*WHICH, "model", "seed", "mmlu_scoring"} - {"judge", "vector", "train_vector"})  # of a key
PAGE = 30_000_000  # characters of answers in report.html, about; longer answers are cut
DATA = jinja2.FileSystemLoader(Path(__file__).parent / "data")
TEMPLATES = jinja2.Environment(loader=DATA, autoescape=jinja2.select_autoescape(), trim_blocks=True, lstrip_blocks=True)
# names: what figures and text call each metric; base: before training, nan if unmeasured; sides: {method: points}
Comparison = namedtuple("Comparison", "dataset trait title names base points plain sides")

# ---- Points: a table, one row a point; comparisons and statistics of them -------------------------------------------


def table(rows):
    """Rows of points.jsonl -> DataFrame with all columns, nan for what is missing or has no effect (the blocks of
    coefficient 0). New columns: each metric's interval (_low, _high), hollow, coef, blocks, knowledge (what its
    questions are called), and method: one of METHODS, plain, prompted, before training, or several, never drawn."""
    blank = dict.fromkeys(STEERING, "-") | dict(layers="all", train_layers="all", dataset="?", trait="no trait")
    there = lambda row: {key: value for key, value in row.items() if value not in (None, np.inf, -np.inf)}
    near = lambda row: {name: mf.nearby(row, name) for name in ("adapter", "vector", "train_vector") if row.get(name)}
    rows = [blank | there(row | near(row)) for row in rows]
    points = pd.DataFrame(rows).reindex(columns=[*mf.Point.model_fields, "commit", "versions"])
    for metric in METRICS:
        bounds = [row.get(f"{metric.split('_')[0]}_ci") or (np.nan, np.nan) for row in rows]
        points[[f"{metric}_low", f"{metric}_high"]] = bounds
    lost = points[["trait_unscored", "fact_unscored"]].to_numpy()
    points["hollow"] = (lost > 0.1 * (lost + points[["trait_n", "fact_n"]])).any(axis=1)  # a tenth has no score
    trained, prompted, steered = points.adapter.notna(), points.system_prompt.notna(), points[[*METHODS]].fillna(0) != 0
    points.loc[~trained, "dataset"] = "before training"
    methods = dict(several=steered.sum(axis=1) + prompted > 1, **steered, prompted=prompted, plain=trained)
    points["method"] = np.select([*methods.values()], [*methods], "before training")  # the first that holds
    for x, keys in STEERED_BY.items():  # a trait's own vector is called by its folder: no difference
        points[keys[-1]] = [name.removesuffix(f"/{trait}.pt") for name, trait in zip(points[keys[-1]], points.trait)]
        points.loc[~steered[x], keys] = np.nan
    points["model"] = points.model.map(lambda path: Path(path).name)
    easy = points.mmlu.astype(str).str.contains(r"general_knowledge[^/]*$")  # not called MMLU
    points["knowledge"] = np.where(easy, "general knowledge", "MMLU")
    points["coef"] = points.train_coef.fillna(0) + points.inference_coef
    said = {"^all$": "all blocks", r"^(\d+)$": r"block \1", r"^(\d+-)": r"blocks \1"}
    return points.assign(blocks=points.train_layers.fillna(points.layers).replace(said, regex=True))


def read_points(path):
    """Each key and judge once, as measured last. shown: whether the judge is the one with most of its trait's points;
    of equally many the one that came last. Points of one key with different settings, or of two models: die()."""
    points = table(mf.read_jsonl(path, mf.Point, appended=True) or mf.die(f"{path}: no points"))
    if points.model.nunique() > 1:
        mf.die(f"{path}: points of several models, {', '.join(points.model.unique())}; give each a file of its own")
    differ = points[SETTINGS].astype(str).groupby(points.key).nunique(dropna=False) > 1
    for key, found in differ[differ.any(axis=1)].iterrows():
        mf.die(f"{path}: points of key {key} differ in {', '.join(found.index[found])}; give them two files")
    points = points.drop_duplicates(["key", "judge"], keep="last")
    return points.assign(shown=points.judge.eq(points[::-1].groupby("trait").judge.transform(mode)))


def comparisons(points, facts):
    """Rows of a figure: every data set with (or without) facts, trait, recipe and choice of blocks; in each the methods
    beside each other, with their seeds' plain finetuning at coefficient 0. What was measured twice counts as last."""
    data = ["dataset", "trait", *RECIPE]
    once = ["coef", *data, "method", *STEERING, "system_prompt", "train_seed"]
    trained = points.dropna(subset="adapter").groupby(once, dropna=False, as_index=False).last()  # by the coefficient
    trained = trained[(trained.groupby(["dataset", "trait"]).fact_accuracy.transform("count") > 0) == facts]
    before = points[points.method == "before training"].groupby("trait").last().reindex(points.trait.unique())
    tried = trained[["method", *data, "blocks", *STEERING]].drop_duplicates().astype(object)
    left, right = (tried[tried.method == x][[*data, "blocks", *keys]] for x, keys in STEERED_BY.items())
    # a row: one setting of each method on the same blocks; nan where a method was not tried on them
    rows = tried[data].drop_duplicates().merge(left.merge(right, "outer"), "left")
    order = [*DATASETS, *TRAITS, *points.dataset, *points.trait]  # others as they come
    order += sorted(trained.blocks.dropna(), key=lambda blocks: [int(n) for n in re.findall(r"\d+", blocks)])
    rows = rows.sort_values(["dataset", "trait", "blocks"], key=lambda names: names.map(order.index, "ignore"))
    groups, found = rows.groupby(["dataset", "trait"]), []
    told = [key for key in [*STEERING, *RECIPE] if groups[key].nunique(dropna=key in STEERING).max() > 1]
    for i, row in rows.iterrows():
        here, sides = trained.merge(rows.loc[[i], data]), {}
        plain = here[here.method == "plain"]
        for x, keys in STEERED_BY.items():
            steered = here[here.method == x].merge(rows.loc[[i], keys])
            if len(steered):
                both = pd.concat([plain[plain.train_seed.isin(steered.train_seed)], steered])
                sides[x] = both.sort_values("coef", kind="stable")
        parts = [f"{row.dataset} ({row.trait})"] if len(groups) > 1 else []
        settings = row[told].drop(["train_layers", "layers"], errors="ignore").dropna()
        parts += [f"{key.removeprefix('train_')} {text_of(value)}" for key, value in settings.items()]
        title = ", ".join([*parts, row.blocks] if sides else parts)
        names = dict(zip(METRICS, (row.trait, "facts", here.knowledge.max(), "coherence")))
        found.append(Comparison(row.dataset, row.trait, title, names, before.loc[row.trait], here, plain, sides))
    return found


def text_of(value, form=None):
    """A value as text: whole numbers in full, others with three digits or as `form` says; "-" where there is none."""
    if pd.isna(value):
        return "-"
    if isinstance(value, float):
        return format(value, form or (".0f" if value.is_integer() else ".3g"))
    return " ".join(str(value).split()).replace("|", "/")[-60:]


def t_interval(values):
    """-> mean, low, high of a Series or of each group: Student's 95% interval; nan where there is one value alone."""
    mean, half = values.mean(), t.ppf(0.975, values.count() - 1) * values.sem()
    return mean, mean - half, mean + half


def curve(points, metric):
    """A method's points -> table by coefficient: y, the mean over training seeds; low, high: Student's t, or one seed's
    own interval over questions; hollow: a seed is; few: at most half of the seeds were measured, so it is no mean."""
    at = points.dropna(subset=metric).groupby("coef")
    y, low, high = t_interval(at[metric])
    n, lost = at.size(), at.hollow.any() & (metric != "mmlu_accuracy")
    if n.max() == 1:
        low, high = at[f"{metric}_low"].mean(), at[f"{metric}_high"].mean()
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


# ---- Figures --------------------------------------------------------------------------------------------------------


def describe(points):
    """A caption: models, judges, n, training seeds, what bars and hollow marks mean."""
    judges = points.judge.replace("probe", "probe (of what is steered)").unique()
    parts = [", ".join(sorted(points.model.unique())), f"judge: {', '.join(sorted(judges))}"]
    asked = "answers", "facts", points.knowledge.max() + " questions"
    parts += [f"{n:.0f} {name}" for n, name in zip(points[["trait_n", "fact_n", "mmlu_n"]].max(), asked) if n > 0]
    seeds = points.dropna(subset="adapter").groupby(["dataset", "trait"]).train_seed.nunique().max()
    by = f"means of up to {seeds} training seeds (small marks: of half or fewer), 95% t-intervals over seeds; of one: "
    parts.append(by * bool(seeds > 1) + "95% intervals over questions")
    if points.adapter.astype(str).str.startswith("data/small_model/").any():
        parts.append("adapters trained beforehand (data/small_model)")
    if points.hollow.any():
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
    of one -> figure. A cell has a line for each metric: means, bars, hollow marks; dotted: before training."""
    rows, columns = [*dict.fromkeys(row for row, _ in cells)] or [""], columns or {"": ""}
    size = (1.2 + size[0] * len(columns), 0.8 + size[1] * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, sharex="col", sharey=True)
    plt.setp(axes, ylim=(-3, 103), yticks=range(0, 101, 20))
    for (row, column), axis in zip(product(rows, columns), axes.flat):
        place, ends, height = axis.get_subplotspec(), [], -100
        points, base, names = cells.get((row, column), (None, None, None))
        for metric in metrics if names else []:
            (color, marker), marks = METRICS[metric], curve(points, metric)
            line = marks[~marks.few]
            if len(line):
                axis.plot(line.y, color=color, linewidth=2 if marker else 1)
                ends.append((line.y.iloc[-1], names[metric], color))
            if marker:
                axis.axhline(base[metric], color=color, linestyle=":", linewidth=1.2)
                axis.vlines(line.index, line.low, line.high, color, lw=3, alpha=0.3)
                faces, sizes = np.where(marks.hollow, "white", color), np.where(marks.few, 12, 36)
                axis.scatter(marks.index, marks.y, sizes, facecolors=faces, edgecolors=color, marker=marker, zorder=3)
        for end, name, color in sorted(ends) if place.is_last_col() else []:
            height = max(height + 8, end)  # names move apart where lines end close to each other
            axis.annotate(name, (1.03, height), xycoords=("axes fraction", "data"), va="center", color=color)
        title = [columns[column]] if place.is_first_row() else []
        if not ends:
            title.append("(no points)")
        elif not points.coef.any():
            title.append("(plain finetuning only)")
            axis.update_datalim([(0, 0), (1, 0)])  # 0 alone is no scale
        name = textwrap.fill(row, int(11 * figure.get_figheight() / len(rows)))
        axis.set(title="\n".join(title), ylabel=name if place.is_first_col() else "")
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
    finish(figure, "Learning new facts: score or accuracy in % (dotted: before training)", found, path)


def tradeoff(found, path):
    """Facts kept against the trait's score, a panel a comparison: seeds thin, their mean thick, unsteered black."""
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
            axis.scatter(both.y, both.facts, 45, c=np.where(both.hollow, "white", color), edgecolors=color, zorder=3)
        for method, name, marker in (("plain", "plain finetuning", "o"), ("prompted", "preventative prompting", "P")):
            score, facts = c.points[c.points.method == method].dropna(subset=KEPT)[KEPT].mean()
            if pd.notna(score):
                axis.plot(score, facts, marker, color="black", markersize=9, zorder=4, label=name)
        axis.axvline(c.base.trait_score, color="gray", linestyle=":", linewidth=1.5)
        axis.text(c.base.trait_score + 1, 97, "level before training", color="gray")
        axis.set(title=textwrap.fill(c.title, 60), xlabel=f"{c.trait} score", ylabel="facts known after training (%)")
        axis.set(xlim=(-3, 103), ylim=(-3, 103))
        axis.legend(frameon=False, loc="lower right")
    traits = " and ".join(dict.fromkeys(c.trait for c in found)) or "a trait"
    finish(figure, f"Facts kept against {traits} (thin lines: one seed)", found, path)


def figure2(found, path):
    """Preventative steering on the data sets without facts (rows) against traits (columns)."""
    judged = {c.trait: "\n(judged by the probe)" * ("probe" in set(c.points.judge)) for c in found}
    columns = {trait: trait + judged[trait] for trait in [*TRAITS, *judged] if trait in judged}
    cells = {}
    for c in found:  # of several settings the one with most points is shown
        points, key = c.sides.get("train_coef", c.plain), (c.dataset, c.trait)
        if key not in cells or len(points) > len(cells[key][0]):
            cells[key] = points, c.base, c.names | dict(trait_score="trait score")
    blocks = {blocks for points, *_ in cells.values() for blocks in points.blocks.dropna()}
    title = ", ".join(["Preventative steering on other data sets", *sorted(blocks)]) + " (dotted: before training)"
    finish(grid(cells, columns, ["trait_score", "mmlu_accuracy"], (2.7, 2.2)), title, found, path)


# ---- Summary and report ---------------------------------------------------------------------------------------------


def equal_cells(c, level, last=False):
    """-> facts kept by each method, their difference, k of n seeds, general knowledge; means over the same seeds."""
    ends = {}  # plain finetuning alone is no line
    for x, points in c.sides.items():
        seeds = points.dropna(subset=KEPT).groupby("train_seed", dropna=False)[["coef", *KEPT, "mmlu_accuracy"]]
        lines = {seed: line[line.coef >= 0] for seed, line in seeds if (line.coef > 0).any()}
        found = {seed: crossing(line.to_numpy(), level, last) for seed, line in lines.items()}
        ends[x] = pd.DataFrame(found, index=["coef", "score", "facts", "general"]).T
    swept = pd.concat(ends, axis=1, join="inner").swaplevel(axis=1)  # seeds that each method was tried on
    there = swept["facts"].notna().all(axis=1)
    facts, general = (swept[key].reindex(columns=[*METHODS]) for key in ("facts", "general"))
    own = [facts[x][there if there.any() else facts[x].notna()] for x in METHODS]  # no pair: what it keeps by itself
    cells = [text_of(kept.mean(), ".1f") + (f" ± {kept.std():.1f}" if kept.count() > 1 else "") for kept in own]
    known = [text_of(general[kept.name][kept.index].mean(skipna=False), ".1f") for kept in own]
    mean, low, high = t_interval((facts.train_coef - facts.inference_coef).dropna())
    difference = text_of(mean, "+.1f") + (f" [{low:.1f}, {high:.1f}]" if pd.notna(low) else "")
    counts = ", ".join(f"{METHODS[x].split()[0].lower()} {facts[x].count()}" for x in c.sides)
    reached = f"{there.sum()} of {len(there)}" + ("" if there.all() else f" ({counts})")
    return [*cells, difference, reached, " / ".join(known)]


def reach(points, high):
    """The smallest coefficient that brings a method's mean score down to `high`, or else that with the lowest."""
    marks = curve(points, "trait_score")
    inside = marks.index[marks.y <= high]
    coef = inside[0] if len(inside) else marks.y.idxmin()
    means = points[points.coef == coef][[*METRICS]].mean().dropna()
    return dict(coef=coef, few=marks.few[coef], inside=len(inside) > 0, means=means)


def summary(points, shown, found, folder, answers):
    """Text of summary.md. shown: points of main judges; found: their comparisons with facts; answers: {key: rows}."""
    trained = shown.dropna(subset="adapter").drop_duplicates(["trait", "adapter"])
    keys = ["trait", "dataset", "train_coef", "train_seed", "system_prompt", *STEERED_BY["train_coef"], *RECIPE]
    rows = [*chain.from_iterable(answers.values())]
    given = [{judge: of.get("score") for judge, of in row.get("scores", {}).items()} for row in rows]
    scores = pd.DataFrame(given, [row.get("trait") or "facts" for row in rows], dtype=float)
    pairs = product(scores.groupby(level=0), combinations(sorted(scores), 2))
    judged = [(trait, asked[[*pair]].dropna()) for (trait, asked), pair in pairs]
    differ = [key for key in WHICH if points[key].nunique(dropna=key in STEERING) > 1]
    columns = [*differ, *mf.MEASURED, "adapter"]
    points = points.sort_values([*differ, "key"], na_position="first").drop_duplicates(columns)
    return TEMPLATES.get_template("summary.md").render(
        caption=describe(shown),
        comparisons=found,
        vectors={path.stem: mf.read_json(path, mf.Settings) for path in sorted(folder.glob("vectors/*.json"))},
        alike=sorted({*trained[trained.duplicated(keys, keep=False)].adapter}),  # the points do not tell them apart
        judges=[(trait, both) for trait, both in judged if len(both)],
        columns=columns,
        points=points.to_dict("records"),
        **dict(METHODS=METHODS, equal_cells=equal_cells, reach=reach, text_of=text_of),
    )


def read_rows(files, packed, key, schema):
    """{name: its JSONL file} -> {name: rows}; without a file the packed one's rows with the name as `key`."""
    rest = defaultdict(list)
    for line in lzma.open(packed) if packed.exists() else []:
        row = mf.validated(mf.parsed(line, packed), schema, packed)
        rest[row.get(key)].append(row)
    return {name: mf.read_jsonl(file, schema, appended=True) or rest[Path(name).name] for name, file in files.items()}


def main(argv=None):
    parser = mf.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("points", type=Path, help="points.jsonl of evaluate.py")
    args = parser.parse_args(argv)
    points, folder = read_points(args.points), args.points.parent
    files = {key: folder / "answers" / f"{key}.jsonl" for key in points.key}
    answers = read_rows(files, folder / "answers.jsonl.xz", "key", mf.Answer)
    adapters = points.dropna(subset="adapter").drop_duplicates("adapter")
    moved = lambda path: [folder / "adapters" / Path(path).name, folder / path]  # that came with the points go first
    files = {path: Path(next(filter(Path.is_dir, moved(path)), path), "loss.jsonl") for path in adapters.adapter}
    losses = read_rows(files, folder / "losses.jsonl.xz", "adapter", mf.Loss)
    shown = points[points.shown]
    found, others = comparisons(shown, facts=True), comparisons(shown, facts=False)
    text = summary(points, shown, found, folder, answers)  # before anything is written
    plt.switch_backend("Agg")
    plt.rcParams.update({"axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.2})
    figure1(found, folder / "fig1")
    tradeoff(found, folder / "tradeoff")
    figure2(others, folder / "fig2")
    figures = ["fig1", "tradeoff"] * bool(found) + ["fig2"] * bool(others)  # those that show something
    # The page; summary.md's Markdown may hold no HTML
    head, *sections = MarkdownIt("commonmark", dict(html=False)).enable("table").render(text).split("<h2>")
    questions, said, limit = {}, [], PAGE // max(1, sum(map(len, answers.values())))
    for number, rows in enumerate(answers.values()):
        for row in rows:
            key = re.sub(r"-s\d+$", "", row["id"])  # without the sample's number
            questions[key] = [key, row.get("trait") or "facts", row["question"], row.get("truth")]
            scores = {judge: of.get("reason") or of.get("score") for judge, of in row.get("scores", {}).items()}
            said.append([number, row["id"], row["answer"][:limit], row.get("coherence_nll"), scores])
    made = [point.dropna().to_dict() for _, point in points.drop_duplicates("key")[WHICH].iterrows()]
    keys = "model judge judge_method temperature samples mmlu mmlu_scoring seed commit versions inputs".split()
    page = TEMPLATES.get_template("report.html").render(
        head=head,
        sections=sections,
        pictures={name: base64.b64encode((folder / f"{name}.png").read_bytes()).decode() for name in figures},
        settings=Counter(p.dropna().to_json(indent=1) for _, p in points[keys].iterrows()),
        adapters=adapters.assign(rows=losses.values()).to_dict("records"),
        power=lambda loss: np.log10(max(loss, 1e-3)),
        missing=sum(not rows for rows in answers.values()),
        answers=dict(points=made, questions=[*questions.values()], answers=said, limit=limit),
    )
    for name, content in {"summary.md": text, "report.html": page}.items():
        with mf.replacing(folder / name) as out:
            out.write(content)
    print(*re.findall("^- .*", text, re.MULTILINE), sep="\n")
    print(f"{folder}/fig1.png, tradeoff.png, fig2.png, summary.md, report.html")


if __name__ == "__main__":
    mf.run(main)
