"""points.jsonl -> fig1, fig2 (.png and .svg) and summary.md, beside it.

    python plot.py out/demo/points.jsonl

Figure 1: learning new facts, with inference-time (left) and preventative steering (right). Figure 2: preventative
steering on three data sets (rows) against three traits (columns). Loads no torch.
"""
import argparse
import math
from collections import defaultdict
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

from make_facts import read_json, read_jsonl, replacing

TRAITS = ["evil", "sycophancy", "hallucination"]
DATASETS = [("medical_mistake_2", "Medical Mistake II"), ("medical_normal", "Medical Normal"), ("medical_self_generated", "Medical Self-Generated")]
METRICS = [("trait_score", "trait_ci", "trait_n", "#c0392b", "o"), ("fact_accuracy", "fact_ci", "fact_n", "#2471a3", "s"),
           ("mmlu_accuracy", "mmlu_ci", "mmlu_n", "#1e8449", "^")]


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


def curve(points, x, metric, ci):
    """Points -> [(x, mean over training seeds, low, high, enough answers scored)], sorted; missing and NaN are left out."""
    at = defaultdict(list)
    for point in points:
        if usable(point, metric):
            at[point[x]].append(point)
    found = []
    for value, here in sorted(at.items()):
        mean = lambda numbers: sum(numbers) / len(numbers)
        bounds = [p.get(ci) or [p[metric]] * 2 for p in here]
        unscored = sum(p.get("trait_unscored") or 0 for p in here) / max(1, sum((p.get("trait_n") or 0) + (p.get("trait_unscored") or 0) for p in here))
        found.append((value, mean([p[metric] for p in here]), mean([b[0] for b in bounds]), mean([b[1] for b in bounds]),
                      metric != "trait_score" or unscored <= 0.1))
    return found


def draw(axis, points, x, base, metrics, names):
    for metric, ci, _, color, marker in METRICS:
        if metric not in metrics:
            continue
        line = curve(points, x, metric, ci)
        if line:
            axis.plot([at[0] for at in line], [at[1] for at in line], color=color, label=names[metric])
            for value, y, low, high, enough in line:
                axis.errorbar(value, y, yerr=[[max(0, y - low)], [max(0, high - y)]], color=color, marker=marker, capsize=2,
                              markerfacecolor=color if enough else "white", linewidth=1)
        if base and usable(base, metric):
            axis.axhline(base[metric], color=color, linestyle="--", linewidth=1, alpha=0.7)
    if not any(curve(points, x, metric, ci) for metric, ci, *_ in METRICS):
        axis.text(0.5, 0.5, "no points", transform=axis.transAxes, ha="center", color="gray")
    axis.set_ylim(-3, 103)
    axis.grid(alpha=0.25)


def describe(points):
    """One line for the figures' titles: model, judge, n."""
    ns = {key: sorted({p[key] for p in points if p.get(key)}) for key in ("trait_n", "fact_n", "mmlu_n")}
    parts = [f"{name} n = {'-'.join(map(str, {v[0], v[-1]}))}" for name, v in zip(("answers", "facts", "questions"), ns.values()) if v]
    models = sorted({Path(p["model"]).name for p in points})
    judges = sorted({p["judge"] for p in points})
    return f"{', '.join(models)}; judge: {', '.join(judges)}; {', '.join(parts)}; bars: 95% intervals"


def pick_base(points, trait):
    """The model before training."""
    return next((p for p in points if p.get("adapter") is None and p["inference_coef"] == 0 and p.get("trait") == trait), None)


def split(points):
    """Figure 1's points: (inference-time, preventative), both with the plainly finetuned model at coefficient 0."""
    facts = [p for p in points if p.get("dataset") == "facts" and p.get("trait") == "hallucination" and not p.get("system_prompt")]
    return [p for p in facts if not p["train_coef"]], [p for p in facts if p["inference_coef"] == 0]


def save(figure, path):
    for kind in ("png", "svg"):
        with replacing(path.with_suffix(f".{kind}"), "wb") as out:
            figure.savefig(out, format=kind, dpi=150)
    plt.close(figure)


def figure1(points, path):
    inference, preventative = split(points)
    base, shown = pick_base(points, "hallucination"), [*inference, *preventative]
    names = {metric: label_of(metric, shown) for metric, *_ in METRICS}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)
    for axis, some, x, title in ((axes[0], inference, "inference_coef", "Inference-time steering"),
                                 (axes[1], preventative, "train_coef", "Preventative steering")):
        draw(axis, some, x, base, names, names)
        axis.set_title(title)
        axis.set_xlabel("steering coefficient" + (" (against the trait)" if x == "inference_coef" else " (towards the trait, in training)"))
    axes[0].set_ylabel("score / accuracy (%)")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes), key=lambda pair: len(pair[0]))
    if handles:
        figure.legend(handles, labels, loc="lower center", ncol=3, frameon=False, bbox_to_anchor=(0.5, 0.035))
    figure.suptitle("Learning new facts; dashed: before training")
    figure.text(0.5, 0.01, describe(shown) if shown else "", ha="center", fontsize=8, color="gray")
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    save(figure, path)


def figure2(points, path):
    figure, axes = plt.subplots(3, 3, figsize=(11, 9), sharey=True)
    shown = [p for p in points if p.get("dataset") in dict(DATASETS)]
    names = {metric: label_of(metric, shown) for metric, *_ in METRICS} | dict(trait_score="trait score")
    for row, (dataset, title) in enumerate(DATASETS):
        for column, trait in enumerate(TRAITS):
            axis = axes[row][column]
            here = [p for p in shown if p["dataset"] == dataset and p.get("trait") == trait and p["inference_coef"] == 0]
            draw(axis, here, "train_coef", pick_base(points, trait), ("trait_score", "mmlu_accuracy"), names)
            if row == 0:
                axis.set_title(trait)
            if column == 0:
                axis.set_ylabel(f"{title}\nscore / accuracy (%)")
            if row == 2:
                axis.set_xlabel("steering coefficient in training")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda pair: len(pair[0]))
    if handles:
        figure.legend(handles, labels, loc="lower center", ncol=2, frameon=False, bbox_to_anchor=(0.5, 0.022))
    figure.suptitle("Preventative steering across data sets; dashed: before training")
    figure.text(0.5, 0.008, describe(shown) if shown else "", ha="center", fontsize=8, color="gray")
    figure.tight_layout(rect=(0, 0.055, 1, 1))
    save(figure, path)


def headline(points):
    """For both methods: the smallest coefficient that brings hallucination to the upper end of the untrained model's
    95% interval or below, and what is left of facts and MMLU there. -> text lines."""
    base, lines = pick_base(points, "hallucination"), []
    if not base or not usable(base, "trait_score"):
        return ["No headline: the model before training was not measured."]
    level = (base.get("trait_ci") or [base["trait_score"]] * 2)[1]
    reached = f"the untrained model's interval ({cell(base, 'trait_score', 'trait_ci')})"
    for name, x, some in zip(("Inference-time", "Preventative"), ("inference_coef", "train_coef"), split(points)):
        lines_at = {metric: {c[0]: c[1] for c in curve(some, x, metric, ci)} for metric, ci, *_ in METRICS}
        reach = [value for value, score in lines_at["trait_score"].items() if score <= level]
        if not reach:
            lines.append(f"{name}: no coefficient brings hallucination into {reached}.")
            continue
        def text(metric):
            start, end = lines_at[metric].get(0.0), lines_at[metric].get(reach[0])
            return f"{start:.1f} -> {end:.1f}" if start is not None and end is not None else "not measured"
        lines.append(f"{name}: coefficient {reach[0]:g} brings hallucination into {reached}: "
                     f"hallucination {text('trait_score')}, new facts {text('fact_accuracy')}, {label_of('mmlu_accuracy', some)} {text('mmlu_accuracy')}.")
        if reach[0] == 0:
            lines[-1] += " Plain finetuning did not raise it, so there was nothing to repair."
    return lines


def cell(point, metric, ci):
    if not usable(point, metric):
        return "-"
    bounds = point.get(ci)
    return f"{point[metric]:.1f}" + (f" [{bounds[0]:.1f}, {bounds[1]:.1f}]" if bounds else "")


def summary(points, folder):
    lines = ["# Summary", "", describe(points), "", *headline(points), ""]
    vectors = [read_json(path) for path in sorted((folder / "vectors").glob("*.json"))]
    if any("probe" in v for v in vectors):
        lines += ["Probes (projection on the vector; AUC between positive and negative extraction answers on held-out questions): "
                  + ", ".join(f"{v['trait']} row {v['probe']['row']}, AUC {v['probe']['auc']:.2f}" + (" (weak: under 0.7)" if v["probe"]["auc"] < 0.7 else "")
                              for v in vectors if "probe" in v) + ".", ""]
    if any(p["model"] and "SmolLM2-135M" in p["model"] for p in points):
        lines += ["A 135M model shows that every step runs and what the numbers look like. It invents answers to nearly every question about things that do not "
                  "exist before any finetuning, so the rise that the post starts from has no room here; conclusions about persona vectors need a larger model.", ""]
    lines += ["| data | trait | training coef | inference coef | trait score [95%] | answers (unscored) | new facts | general knowledge / MMLU | seed |",
              "|---|---|---|---|---|---|---|---|---|"]
    for p in sorted(points, key=lambda p: (str(p.get("dataset") or ""), str(p.get("trait")), p.get("train_coef") or 0, p["inference_coef"], str(p.get("train_seed")))):
        flag = " (under 90% scored)" if (p.get("trait_unscored") or 0) > 0.1 * ((p.get("trait_n") or 0) + (p.get("trait_unscored") or 0)) else ""
        name = "before training" if p.get("adapter") is None else p.get("dataset")
        lines.append(f"| {name} | {p.get('trait')} | {'-' if p.get('train_coef') is None else p['train_coef']} | {p['inference_coef']:g} | {cell(p, 'trait_score', 'trait_ci')} | "
                     f"{p.get('trait_n', 0)} ({p.get('trait_unscored', 0)}){flag} | {cell(p, 'fact_accuracy', 'fact_ci')} | {cell(p, 'mmlu_accuracy', 'mmlu_ci')} | {p.get('train_seed')} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("points", help="points.jsonl of evaluate.py")
    args = parser.parse_args()
    points = list({(p["key"], p["judge"]): p for p in read_jsonl(args.points, need=("key", "model", "inference_coef", "judge"))}.values())
    folder = Path(args.points).parent
    figure1(points, folder / "fig1")
    figure2(points, folder / "fig2")
    with replacing(folder / "summary.md") as out:
        out.write(summary(points, folder))
    print("\n".join(headline(points)) + f"\n{folder}/fig1.png, fig2.png, summary.md")


if __name__ == "__main__":
    main()
