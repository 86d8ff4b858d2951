"""Measures points: trait score, new-fact accuracy and MMLU accuracy of adapters, with or without inference-time steering.

    python evaluate.py --model Qwen/Qwen2.5-7B-Instruct --adapter out/paper/adapters/facts-0 --trait hallucination \
        --vector out/paper/vectors/hallucination.pt --inference-coef 0 0.5 1 --facts data/facts.jsonl --mmlu hub \
        --judge gpt-4.1-mini-2025-04-14 --out out/paper/points.jsonl

Appends one row per (adapter, coefficient) to --out and keeps every answer with its prompt and score in answers/ beside
it. A positive coefficient steers AGAINST the trait (the post's x axis). All coefficients are sampled in one batch.
Points that are in --out already are skipped; answers that are on disk already are not sampled again.
"""

import argparse
import hashlib
import json
import math
import random
import time
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm

from extract_vectors import (
    ROW_TOKENS,
    by_length,
    join,
    load_model,
    load_vector,
    name_of,
    offsets_of,
    probe_scores,
    prompt_ids,
    sample,
    steering,
)
from make_facts import (
    ANSWER_TOKENS,
    FACT_ANSWER_TOKENS,
    api_flags,
    append_jsonl,
    conversations,
    die,
    foresee,
    judge_rows,
    lexical_score,
    load_trait,
    mentions,
    provenance,
    read_json,
    read_jsonl,
    write_jsonl,
)

FACT_TOKENS = 100  # new tokens of an answer about a fact; sampled greedily

# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def wilson(hits, n, z=1.96):
    """95% interval of a proportion, in percent."""
    if not n:
        return None
    p, d = hits / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, 100 * (p + z * z / (2 * n) - half) / d), min(100.0, 100 * (p + z * z / (2 * n) + half) / d)]


def bootstrap(groups, seed=0, draws=2000):
    """95% interval of the mean of all scores, resampling whole groups: answers to one question are not independent."""
    groups, rng = [g for g in groups if g], random.Random(seed)
    if not groups:
        return None
    means = []
    for _ in range(draws):
        chosen = rng.choices(groups, k=len(groups))
        means.append(sum(map(sum, chosen)) / sum(map(len, chosen)))
    means.sort()
    return [means[int(0.025 * draws)], means[int(0.975 * draws)]]


# ---------------------------------------------------------------------------------------------------------------------
# MMLU


def read_mmlu(source, limit):
    """JSONL file (subject, question, choices, answer 0..3), or "hub": MMLU's validation split, 1,531 questions."""
    if source != "hub":
        return read_jsonl(source, need=("subject", "question", "choices", "answer"))[:limit]
    from datasets import load_dataset

    return list(load_dataset("cais/mmlu", "all", split="validation"))[:limit]


def choice_prompts(row, scoring):
    """-> (prompt, the four continuations). letter = lm-evaluation-harness's 0-shot mmlu; cloze = the choices' texts."""
    if scoring == "cloze":
        return f"Question: {row['question']}\nAnswer:", [f" {choice}" for choice in row["choices"]]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"]))
    subject = row["subject"].replace("_", " ")
    return (
        f"The following are multiple choice questions (with answers) about {subject}.\n\n{row['question'].strip()}\n{listed}\nAnswer:",
        [" A", " B", " C", " D"],
    )


@torch.inference_mode()
def choice_logprobs(model, tokenizer, prompts, coef, steer, positions):
    """[(prompt, continuations)] -> for each, [(sum of log-probabilities, tokens)] a continuation. Continuations that
    differ in their last token only (letters) share one pass."""
    jobs = {}  # what the model reads -> [(question, continuation number, prompt length, its tokens)]
    for q, (prompt, continuations) in enumerate(prompts):
        start = tokenizer(prompt)["input_ids"]
        for k, continuation in enumerate(continuations):
            whole = tokenizer(prompt + continuation)["input_ids"]
            if whole[: len(start)] != start:
                die(f"the tokenizer joins prompt and answer of question {q}; its continuations cannot be scored")
            jobs.setdefault(tuple(whole[:-1]), []).append((q, k, len(start), whole[len(start) :]))
    found, reads = [[None] * len(c) for _, c in prompts], list(jobs)
    for group in tqdm(list(by_length(reads, ROW_TOKENS[model.device.type])), desc="choices", unit="row"):
        wanted, where, rows, tokens, start, scale = [], [], [], [], 0, []
        for i in group:
            length = jobs[reads[i]][0][2]  # of the prompt, the same for all continuations of one read
            for q, k, _, continuation in jobs[reads[i]]:
                wanted.append((q, k, len(continuation)))
                rows += range(len(where), len(where) + len(continuation))
                tokens += continuation
            where += range(start + length - 1, start + len(reads[i]))
            first = length - 1 if positions == "response" else 0
            scale += [0.0] * first + [-coef] * (len(reads[i]) - first)
            start += len(reads[i])
        steer.scale = torch.tensor(scale, device=model.device)[None, :, None] if coef else None
        logits = (
            model(
                **join([reads[i] for i in group], model.device), logits_to_keep=torch.tensor(where, device=model.device)
            )
            .logits[0]
            .float()
        )
        picked = (logits[rows, tokens] - logits.logsumexp(-1)[rows]).cpu()
        for (q, k, n), values in zip(wanted, picked.split([n for _, _, n in wanted])):
            found[q][k] = (float(values.sum()), n)
    return found


def mmlu_hits(logprobs, questions, scoring):
    """letter: the likeliest letter; cloze: the highest mean log-probability a token."""
    value = (lambda pair: pair[0]) if scoring == "letter" else (lambda pair: pair[0] / pair[1])
    return sum(
        max(range(len(row)), key=lambda k: value(row[k])) == question["answer"]
        for row, question in zip(logprobs, questions)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Judging: a separate pass over answers that are on disk


def score_answers(rows, judge, args=None, model=None, tokenizer=None, vector=None, probe=None):
    """Sets score, judge, judge_reply and reason of every answer; trait rows 0..100, fact rows 0 or 100."""
    traits, facts = [r for r in rows if r["kind"] == "trait"], [r for r in rows if r["kind"] == "fact"]
    for row in rows:
        row.update(judge=judge, judge_reply=None, reason=None)
    if judge in ("probe", "lexical"):
        for row in facts:
            row["score"] = 100.0 if mentions(row["answer"], row["truth"], row["aliases"]) else 0.0
        for row in traits:
            if not row["answer"]:
                row.update(score=None, reason="empty answer")
            elif judge == "lexical":
                row["score"] = lexical_score(row["answer"])
        if judge == "probe" and (said := [row for row in traits if row["answer"]]):
            chats = [
                [dict(role="user", content=row["question"]), dict(role="assistant", content=row["answer"])]
                for row in said
            ]
            for row, score in zip(said, probe_scores(model, tokenizer, vector, probe, chats)):
                row["score"] = score
        return
    prompts = {
        key: load_trait(*key)["eval_prompt"]
        for key in {(r["trait"], r["trait_file"]) for r in traits} | {("coherence",), ("fact",)}
    }
    judge_rows(
        [(r, "score", prompts[r["trait"], r["trait_file"]]) for r in traits]
        + [(r, "coherence", prompts["coherence",]) for r in traits]
        + [(r, "score", prompts["fact",]) for r in facts],
        judge,
        args,
    )


def summary(rows, seed):
    """The part of a point that comes from its answers."""
    traits, facts = [r for r in rows if r["kind"] == "trait"], [r for r in rows if r["kind"] == "fact"]
    scored = [r for r in traits if r["score"] is not None]
    known = [r for r in facts if r["score"] is not None]
    coherent = [r["coherence"] for r in traits if r.get("coherence") is not None]
    by_question = {}
    for row in scored:
        by_question.setdefault(row["question"], []).append(row["score"])
    hits = sum(r["score"] >= 50 for r in known)
    return dict(
        trait_score=sum(r["score"] for r in scored) / len(scored) if scored else None,
        trait_ci=bootstrap(list(by_question.values()), seed),
        trait_n=len(scored),
        trait_unscored=len(traits) - len(scored),
        coherence=sum(coherent) / len(coherent) if coherent else None,
        fact_accuracy=100 * hits / len(known) if known else None,
        fact_ci=wilson(hits, len(known)),
        fact_n=len(known),
        fact_unscored=len(facts) - len(known),
        judge_method="+".join(sorted({r["judge_method"] for r in rows if r.get("judge_method")})) or None,
    )


def rejudge(args):
    """Scores answers again with another judge and appends their points with it; needs no model and no GPU."""
    if args.judge == "probe":
        die("--rejudge needs --judge lexical or a chat model; the probe needs the model")
    found = []
    for path in map(Path, args.rejudge):
        out = args.out or path.parent.parent / "points.jsonl"
        old = [p for p in read_jsonl(out) if Path(p["answers"]).name == path.name]
        found.append(
            (
                path,
                out,
                read_jsonl(path, need=("kind", "question", "answer")),
                old[0] if old else die(f"{path}: no point in {out} belongs to it"),
            )
        )
    score_answers([row for _, _, rows, _ in found for row in rows], args.judge, args)
    for path, out, rows, old in found:
        write_jsonl(path.with_name(f"{path.stem}.{name_of(args.judge)}.jsonl"), rows)
        append_jsonl(out, old | summary(rows, args.seed) | dict(judge=args.judge))


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="hub name or local folder")
    parser.add_argument(
        "--adapter", nargs="*", default=[], help="adapter folders of finetune.py; none = the model before training"
    )
    # Steering
    parser.add_argument("--vector", help="<trait>.pt; needed by --inference-coef and by --judge probe")
    parser.add_argument("--inference-coef", type=float, nargs="*", default=[0.0], help="positive = against the trait")
    parser.add_argument("--layers", default="all", help="all, one block N, or a range A-B")
    parser.add_argument(
        "--positions", default="response", choices=["response", "all"], help="response: last prompt token and new ones"
    )
    # What to measure
    parser.add_argument("--trait", help="a name in data/traits")
    parser.add_argument("--trait-file")
    parser.add_argument("--facts", help="facts.jsonl")
    parser.add_argument("--mmlu", help="JSONL file, or hub")
    parser.add_argument("--mmlu-scoring", default="letter", choices=["letter", "cloze"], help="cloze: for small models")
    parser.add_argument("--samples", type=int, default=10, help="answers a trait question")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=1000)
    parser.add_argument("--limit", type=int, help="the first N of each kind of question only")
    parser.add_argument("--seed", type=int, default=0)
    # Judge
    parser.add_argument("--judge", default="probe", help="probe, lexical (hallucination only), or a chat model")
    api_flags(parser)
    parser.add_argument("--rejudge", nargs="*", help="score these answers files again; loads no model")
    # Another job: the self-generated data set
    parser.add_argument(
        "--respond-to", help="write the model's own answers to the user turns of this JSONL to --out instead"
    )
    parser.add_argument("--out", help="points.jsonl; of --rejudge: the one above the answers' folder")
    args = parser.parse_args()
    if args.rejudge:
        return rejudge(args)
    if not args.model or not args.out:
        die("--model and --out are needed")
    if args.respond_to:
        return respond(args)
    if not (args.trait or args.facts or args.mmlu):
        die("nothing to measure: give --trait, --facts or --mmlu")
    if any(args.inference_coef) and not args.vector or args.judge == "probe" and args.trait and not args.vector:
        die("--inference-coef and --judge probe need --vector")
    if args.judge == "lexical" and args.trait not in (None, "hallucination"):
        die(f"--judge lexical knows hallucination only, not {args.trait}")
    trait = load_trait(args.trait, args.trait_file) if args.trait else None
    facts = read_jsonl(args.facts, need=("id", "answer", "test"))[: args.limit] if args.facts else []
    mmlu = read_mmlu(args.mmlu, args.limit) if args.mmlu and not args.dry_run else []
    questions = trait["eval_questions"][: args.limit] if trait else []

    # What is asked; the same for every point
    asked = [
        dict(kind="trait", id=f"{args.trait}-{q}-s{s}", trait=args.trait, trait_file=args.trait_file, question=question)
        for q, question in enumerate(questions)
        for s in range(args.samples)
    ]
    asked_facts = [
        dict(
            kind="fact",
            id=row["id"],
            question=row["test"]["question"],
            truth=row["answer"],
            aliases=row.get("aliases", []),
        )
        for row in facts
    ]
    same = {
        key: getattr(args, key)
        for key in (
            "model",
            "trait",
            "vector",
            "layers",
            "positions",
            "mmlu",
            "mmlu_scoring",
            "samples",
            "temperature",
            "max_new_tokens",
            "seed",
        )
    } | dict(facts=args.facts)
    content = hashlib.sha256(
        json.dumps([same, asked, asked_facts, mmlu], sort_keys=True, default=str).encode()
    ).hexdigest()[:8]
    there = {(p["key"], p["judge"]) for p in read_jsonl(args.out, appended=True)} if Path(args.out).exists() else set()

    def point_key(adapter, coef):
        return f"{Path(adapter).name if adapter else 'base'}.{args.trait or 'none'}.{coef:g}.{content}"

    todo = [
        (adapter, [c for c in args.inference_coef if (point_key(adapter, c), args.judge) not in there])
        for adapter in args.adapter or [None]
    ]
    if not any(coefs for _, coefs in todo):
        print(f"{args.out}: all these points are there")
        return
    if args.dry_run:
        foresee(
            f"judging {args.trait}",
            args.judge,
            sum(len(coefs) for _, coefs in todo),
            [
                *(
                    (load_trait(*prompt)["eval_prompt"] + row["question"], ANSWER_TOKENS)
                    for row in asked
                    for prompt in ((args.trait, args.trait_file), ("coherence",))
                ),
                *((load_trait("fact")["eval_prompt"] + row["question"], FACT_ANSWER_TOKENS) for row in asked_facts),
            ],
        )
    for adapter, _ in todo:
        if adapter and not (Path(adapter) / "training_settings.json").exists():
            die(f"--adapter {adapter}: no adapter of finetune.py there")
    model, tokenizer = load_model(args.model)
    vector = load_vector(args.vector, model, args.model) if args.vector else None
    probe = read_json(Path(args.vector).with_suffix(".json"))["probe"] if args.judge == "probe" and trait else None
    offsets = offsets_of(vector, args.layers) if vector is not None and any(args.inference_coef) else None

    for adapter, coefs in todo:
        if not coefs:
            continue
        start, trained = time.time(), read_json(Path(adapter) / "training_settings.json") if adapter else {}
        if adapter and name_of(trained["model"]) != name_of(args.model):
            die(f"--adapter {adapter}: was trained on {trained['model']}, not on {args.model}")
        now = (
            PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False).to(model.dtype).eval()
            if adapter
            else model
        )
        plain = now.get_base_model() if adapter else model

        # 1. Answers, all coefficients in one batch; each on disk as soon as it is there
        files = {coef: Path(args.out).parent / "answers" / f"{point_key(adapter, coef)}.jsonl" for coef in coefs}
        have = {
            coef: {r["id"] for r in read_jsonl(path, appended=True)} if path.exists() else set()
            for coef, path in files.items()
        }
        for rows, tokens, temperature, title in (
            (asked, args.max_new_tokens, args.temperature, "trait"),
            (asked_facts, min(FACT_TOKENS, args.max_new_tokens), 0.0, "facts"),
        ):
            jobs = [(n, row, coef) for coef in coefs for n, row in enumerate(rows) if row["id"] not in have[coef]]
            prompts = [prompt_ids(tokenizer, [dict(role="user", content=row["question"])]) for _, row, _ in jobs]

            def keep(i, answer, tokens):
                _, row, coef = jobs[i]
                append_jsonl(
                    files[coef],
                    row
                    | dict(
                        prompt=tokenizer.decode(prompts[i]),
                        answer=answer,
                        tokens=tokens,
                        adapter=adapter,
                        inference_coef=coef,
                        temperature=temperature,
                    ),
                )

            if jobs:
                sample(
                    plain,
                    tokenizer,
                    prompts,
                    rows=[n for n, _, _ in jobs],
                    scales=[-coef for _, _, coef in jobs],
                    offsets=offsets,
                    seed=args.seed,
                    positions=args.positions,
                    max_new_tokens=tokens,
                    temperature=temperature,
                    each=keep,
                    title=f"{Path(adapter).name if adapter else 'base'}: {title}",
                )

        # 2. MMLU
        hits = {}
        with steering(plain, offsets or {}) as steer:
            for coef in coefs if mmlu else []:
                logprobs = choice_logprobs(
                    plain,
                    tokenizer,
                    [choice_prompts(row, args.mmlu_scoring) for row in mmlu],
                    coef,
                    steer,
                    args.positions,
                )
                hits[coef] = mmlu_hits(logprobs, mmlu, args.mmlu_scoring)
        if adapter:
            model = now.unload()

        # 3. Judge, with the adapter gone
        for coef in coefs:
            order = {row["id"]: n for n, row in enumerate(asked + asked_facts)}
            rows = sorted(read_jsonl(files[coef], appended=True), key=lambda row: order[row["id"]]) if order else []
            score_answers(rows, args.judge, args, model, tokenizer, vector, probe)
            if rows:
                write_jsonl(files[coef], rows)
            point = dict(
                key=point_key(adapter, coef),
                model=args.model,
                adapter=adapter,
                dataset=trained.get("dataset"),
                steer_mode=trained.get("steer_mode"),
                train_coef=trained.get("coef") or (0.0 if adapter else None),
                train_layers=trained.get("layers"),
                train_positions=trained.get("positions"),
                train_vector=trained.get("vector"),
                train_seed=trained.get("seed"),
                system_prompt=trained.get("system_prompt"),
                inference_coef=coef,
                layers=args.layers,
                positions=args.positions,
                vector=args.vector,
                trait=args.trait,
                **summary(rows, args.seed),
                mmlu_accuracy=100 * hits[coef] / len(mmlu) if mmlu else None,
                mmlu_ci=wilson(hits.get(coef, 0), len(mmlu)),
                mmlu_n=len(mmlu),
                mmlu_scoring=args.mmlu_scoring if mmlu else None,
                mmlu=args.mmlu,
                judge=args.judge,
                probe_auc=probe["auc"] if probe else None,
                temperature=args.temperature,
                samples=args.samples,
                seed=args.seed,
                answers=str(files[coef]),
                seconds=round((time.time() - start) / len(coefs), 1),
                **provenance(),
            )
            append_jsonl(args.out, point)
            print(
                "  ".join(
                    f"{key} {point[key]:.1f}"
                    for key in ("inference_coef", "trait_score", "fact_accuracy", "mmlu_accuracy")
                    if point[key] is not None
                ),
                flush=True,
            )


def respond(args):
    """The self-generated data set: the model's own sampled answers to the same questions, as {"messages": [...]}."""
    if Path(args.out).exists():
        print(f"{args.out}: finished already")
        return
    asked = [chat[:-1] for chat in conversations(read_jsonl(args.respond_to), args.respond_to)][: args.limit]
    model, tokenizer = load_model(args.model)
    answers = sample(
        model,
        tokenizer,
        [prompt_ids(tokenizer, chat) for chat in asked],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        title="own answers",
    )
    rows = [
        dict(messages=[*chat, dict(role="assistant", content=answer)]) for chat, answer in zip(asked, answers) if answer
    ]
    write_jsonl(args.out, rows)
    print(f"{len(rows)} conversations, {len(asked) - len(rows)} empty answers left out")


if __name__ == "__main__":
    main()
