"""points.jsonl -> fig1, fig2 (.png and .svg), summary.md and report.html, beside it.

    python plot.py out/demo/points.jsonl

Figure 1: learning new facts, with inference-time (left) and preventative steering (right). Figure 2: preventative
steering on three data sets (rows) against three traits (columns). report.html is one page without network: figures, tables
and a browser through the answers in answers/. Where points were judged twice (evaluate.py --rejudge), the figures show the
judge with most points, and summary.md how the judges agree. Loads no torch.
"""
import argparse
import base64
import html
import json
import math
import re
from collections import Counter, defaultdict
from itertools import combinations
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
    reach = max((p[x] for p in points), default=0) or 1
    for n, (metric, ci, _, color, marker) in enumerate(METRICS):
        if metric not in metrics:
            continue
        line = [(value + 0.008 * reach * (n - 1), *rest) for value, *rest in curve(points, x, metric, ci)]  # side by side, so that bars do not cover each other
        if line:
            axis.plot([], [], color=color, marker=marker, label=names[metric])  # the legend's entry
            axis.plot([at[0] for at in line], [at[1] for at in line], color=color)
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


def method_of(point):
    """-> (data set, method and coefficient), as the report and its browser name a point."""
    if point.get("adapter") is None:
        data, name = "before training", "untrained"
    else:
        data = dict(DATASETS).get(point.get("dataset"), point.get("dataset") or "?")
        name = f"preventative {point['train_coef']:g}" if point.get("train_coef") else "preventative prompting" if point.get("system_prompt") else "plain finetuning"
        name += f", blocks {point['train_layers']}" if point.get("train_coef") and point.get("train_layers") != "all" else ""
        name += f", seed {point['train_seed']}" if point.get("train_seed") else ""
    steered = f", inference-time {point['inference_coef']:g}" if point["inference_coef"] else ""
    return data, name + steered + (f", blocks {point['layers']}" if steered and point.get("layers") != "all" else "")


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
                rows[point["judge"]] = read_jsonl(file, need=("id", "kind", "question", "answer", "score"))
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
    return [(*key, len(pairs), spearman(*zip(*pairs)), sum(b - a for a, b in pairs) / len(pairs)) for key, pairs in sorted(scores.items())]


def agreement_lines(found):
    return ["| trait | judges | answers | Spearman's rho | mean difference (second - first) |", "|---|---|---|---|---|"] + [
        f"| {trait} | {one}, {other} | {n} | {'-' if rho is None else f'{rho:.2f}'} | {difference:+.1f} |" for trait, one, other, n, rho, difference in found]


def summary(points, folder, agreed):
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
    if agreed:
        lines += ["", "Agreement of judges on the same answers:", "", *agreement_lines(agreed)]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The report: data/report.html, filled in


def table(lines):
    """A Markdown table's lines -> HTML."""
    head, _, *rows = [[html.escape(text.strip()) for text in line.strip("|").split("|")] for line in lines]
    return ('<div class="wide"><table><thead><tr>' + "".join(f"<th>{text}</th>" for text in head) + "</tr></thead><tbody>"
            + "".join("<tr>" + "".join(f"<td>{text}</td>" for text in row) + "</tr>" for row in rows) + "</tbody></table></div>")


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
            scores = [other[row["id"]]["score"] if other.get(row["id"], {}).get("score") is not None else other.get(row["id"], {}).get("reason") for other in others]
            question = number(questions, (row.get("trait") or "new facts", number(texts, row["question"]), row.get("truth")))
            sample = int(row["id"].rsplit("-s", 1)[1]) if row["kind"] == "trait" else 0
            found.append([len(methods), question, number(texts, row["answer"]), sample, *(round(s, 1) if isinstance(s, float) else s for s in scores)])
        methods.append(dict(name=name, data=data, judges=judges))
    left_out, most_samples = 0, max((row[3] for row in found), default=0)
    while True:
        text = json.dumps(dict(methods=methods, questions=list(questions), texts=list(texts), answers=found), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
        if len(text) <= most or left_out == most_samples:
            return text, left_out
        left_out += 1
        found = [row for row in found if row[3] <= most_samples - left_out]
        kept = {row[2] for row in found} | {question[1] for question in questions}
        texts = {text if i in kept else f"\0{i}": i for text, i in texts.items()}


def report(points, shown, folder, answers, missing, agreed):
    """The page's text; every value is escaped."""
    lines, escape = summary(shown, folder, []).splitlines(), html.escape
    rows = [line for line in lines if line.startswith("|")]
    def figure(name, title, mine):
        picture = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        return (f'<figure><img alt="{escape(title)}; the numbers are in the table below" src="data:image/png;base64,{picture}"></figure><details><summary>{escape(title)}: the numbers</summary>'
                + table(rows[:2] + [row for row in rows[2:] if mine(row)]) + "</details>")
    data, left_out = browser_data(answers)
    said = [f"{len(answers)} points with answers."] + [f"The answers of {missing} points are not there (no file in answers/)."] * bool(missing) \
        + [f"To keep the page small the last {left_out} answers to each question were left out."] * bool(left_out)
    settings = [{key: p.get(key) for key in ("model", "judge", "judge_method", "temperature", "samples", "positions", "mmlu", "mmlu_scoring", "seed", "commit", "versions")} for p in points]
    counted = Counter(json.dumps(setting) for setting in settings)
    fill = dict(title="Preventative steering: report", about=escape(describe(shown)), headline="".join(f"<p>{escape(line)}</p>" for line in headline(shown)),
                figures=figure("fig1", "Figure 1", lambda row: row.startswith(("| facts", "| before training | hallucination"))) + figure("fig2", "Figure 2", lambda row: not row.startswith("| facts")),
                left_out=escape(" ".join(said)), agreement=table(agreement_lines(agreed)) if agreed else "<p>No answers were scored by two judges.</p>", points=table(rows),
                settings="".join(f"<details><summary>{n} points</summary><pre>{escape(json.dumps(json.loads(text), indent=1))}</pre></details>" for text, n in counted.items()), answers=data)
    template = (Path(__file__).parent / "data" / "report.html").read_text(encoding="utf-8")
    return "".join(fill.get(part, part) if i % 2 else part for i, part in enumerate(re.split(r"\{\{(\w+)\}\}", template)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("points", help="points.jsonl of evaluate.py")
    args = parser.parse_args()
    points = list({(p["key"], p["judge"]): p for p in read_jsonl(args.points, need=("key", "model", "inference_coef", "judge"))}.values())
    judge = Counter(p["judge"] for p in reversed(points)).most_common(1)[0][0]  # of equally many, the last one
    shown, folder = [p for p in points if p["judge"] == judge], Path(args.points).parent
    figure1(shown, folder / "fig1")
    figure2(shown, folder / "fig2")
    answers, missing = read_answers(points, folder)
    agreed = agreement(answers)
    for name, text in (("summary.md", summary(shown, folder, agreed)), ("report.html", report(points, shown, folder, answers, missing, agreed))):
        with replacing(folder / name) as out:
            out.write(text)
    print("\n".join(headline(shown)) + f"\n{folder}/fig1.png, fig2.png, summary.md, report.html")


if __name__ == "__main__":
    main()
