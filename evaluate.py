"""Measures points: trait score, new-fact and MMLU accuracy of adapters, with or without inference-time steering.

    python evaluate.py --model Qwen/Qwen2.5-7B-Instruct --adapter out/paper/adapters/facts-0 --trait hallucination \
        --vector out/paper/vectors/hallucination.pt --inference-coef 0 0.5 1 --facts data/facts.jsonl --mmlu hub \
        --judge gpt-4.1-mini-2025-04-14 --out out/paper/points.jsonl

Appends one row per (adapter, coefficient) to --out; answers/<key>.jsonl beside it keeps its answers, as prompted, with
the judges' scores. key: hash of all that a point is made from. A positive coefficient steers AGAINST the trait.
"""

import contextlib
import functools
import hashlib
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from tqdm import tqdm

import extract_vectors as ev
import make_facts as mf
from make_facts import append_jsonl, die, fingerprint, lexical_score, load_trait, locked, read_json, read_jsonl

UNREAD = "modules_to_save alora_invocation_tokens target_parameters kasa_config layer_replication".split()  # not plain
grown = functools.partial(read_jsonl, appended=True)  # of a file that grows; [] where it is not begun
FACT_TOKENS = 100  # new tokens of an answer about a fact
INPUTS = "model vector facts mmlu judge trait adapter".split()  # of a point: names, and fingerprints of their content
SAMPLING = "samples temperature max_new_tokens seed limit".split()  # the same for all points of a trait in a file
SETTINGS = "trait layers positions samples temperature max_new_tokens seed limit mmlu_scoring inference_coef".split()
SHOWN = "inference_coef trait_score trait_unscored coherence_nll fact_accuracy fact_unscored mmlu_accuracy".split()

# ---- What is asked, and how it is measured --------------------------------------------------------------------------


def read_questions(args):
    """-> what answers are sampled for, as rows of answers/*.jsonl; the same for every point."""
    rows = []
    if args.trait:
        questions = load_trait(args.trait, args.trait_file, mf.EvaluationTrait)["eval_questions"][: args.limit]
        about = dict(kind="trait", trait=args.trait, trait_file=args.trait_file, temperature=args.temperature)
        for (q, question), s in itertools.product(enumerate(questions), range(args.samples)):
            rows.append(about | dict(id=f"{args.trait}-{q}-s{s}", question=question))
    for fact in read_jsonl(args.facts, mf.Fact)[: args.limit] if args.facts else []:
        asked = dict(kind="fact", id=fact["id"], question=fact["test"]["question"], temperature=0.0)
        rows.append(asked | dict(truth=fact["answer"], aliases=fact.get("aliases", [])))
    return rows


def read_mmlu(source):
    """JSONL file (subject, question, choices, answer), or "hub": MMLU's validation split, 1,531 questions."""
    if source != "hub":
        return read_jsonl(source, mf.Question)
    from datasets import load_dataset

    try:
        return list(load_dataset("cais/mmlu", "all", split="validation"))
    except (OSError, ValueError) as error:
        die(f"--mmlu hub: cais/mmlu cannot be fetched ({error}); go online, or give a JSONL file")


def choice_prompts(row, scoring):
    """-> (prompt, a continuation a choice). letter: lm-evaluation-harness's 0-shot mmlu; cloze: the choices' texts."""
    if scoring == "cloze":
        return f"Question: {row['question']}\nAnswer:", [f" {choice}" for choice in row["choices"]]
    letters = "ABCDEFGHIJ"[: len(row["choices"])]
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"]))
    about = f"The following are multiple choice questions (with answers) about {row['subject'].replace('_', ' ')}."
    return f"{about}\n\n{row['question'].strip()}\n{listed}\nAnswer:", [f" {letter}" for letter in letters]


def read_adapter(folder):
    """-> (LoraConfig, {name: weights}); die() on missing or broken files."""
    try:
        return LoraConfig.from_pretrained(folder, inference_mode=True), load_file(f"{folder}/adapter_model.safetensors")
    except Exception as error:  # broken files make PEFT raise anything
        die(f"--adapter {folder}: missing or broken ({type(error).__name__}: {error}); delete it and train again")


@contextlib.contextmanager
def with_adapter(model, adapter):
    """While open, the model has the LoRA adapter in it, in the model's dtype; afterwards it is as it was. die() unless
    the weights are finite, and exactly those that the adapter's config puts into this model: PEFT only warns."""
    config, weights = read_adapter(adapter)
    if odd := [name for name in UNREAD if getattr(config, name, None)]:
        die(f"--adapter {adapter}: made with {odd[0]}, which is not computed here; give a plain LoRA adapter")
    weights = {name: tensor.to(model.dtype) for name, tensor in weights.items()}
    try:
        wrapped = PeftModel(model, config, low_cpu_mem_usage=True)
    except Exception as error:  # a wrong config makes PEFT raise anything
        die(f"--adapter {adapter}: does not fit the model ({type(error).__name__}: {error})")
    try:
        wanted = get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()
        finite = {name: tensor.shape for name, tensor in weights.items() if tensor.isfinite().all()}
        if finite != {name: tensor.shape for name, tensor in wanted if "lora_" in name}:
            die(f"--adapter {adapter}: does not fit the model, or holds NaN, infinity or what is not LoRA's")
        set_peft_model_state_dict(wrapped, weights, low_cpu_mem_usage=True)
        yield wrapped.eval().get_base_model()
    finally:
        wrapped.unload()


def sample_points(model, tokenizer, rows, points, offsets, args):
    """Rows of one kind, answered for all points in one batch; each is on disk as soon as it is there."""
    most = min(FACT_TOKENS, args.max_new_tokens) if rows[0]["kind"] == "fact" else args.max_new_tokens
    drawing, wanted = ev.Drawing(most, rows[0]["temperature"], args.seed, args.positions), []
    for point in points:
        about = {name: point[name] for name in ("adapter", "inference_coef", "day")}
        wanted += [(point["answers"], row | about, n, -point["inference_coef"]) for n, row in enumerate(rows)]
    title = f"{Path(points[0]['adapter'] or 'base').name}: {rows[0]['kind']}"
    return ev.sample_answers(model, tokenizer, wanted, drawing, offsets, title)


@torch.inference_mode()
def token_logprobs(model, reads, wanted, title, offsets=None, coef=0.0, positions="response"):
    """Token id lists, joined where they fit -> for each read the log-probabilities (float32) of wanted[i]: [(position,
    token predicted there)]. Steered against the trait by coef, at "response" from the first wanted position on."""
    found, device = {}, model.device
    with ev.steering(model, offsets or {}) as steer:
        for group in tqdm(ev.by_length(reads, ev.ROW_TOKENS[device.type]), title, unit="row"):
            inputs = ev.join([reads[i] for i in group], device)
            steered = [positions == "all" or at >= wanted[i][0][0] for i in group for at in range(len(reads[i]))]
            steer.scale = torch.tensor(steered, device=device)[None, :, None] * -coef  # [1, tokens, 1]
            starts = zip(inputs["cu_seq_lens"].tolist(), group)
            asked = torch.tensor([(start + at, token) for start, i in starts for at, token in wanted[i]], device=device)
            logits = model(**inputs, logits_to_keep=asked[:, 0]).logits[0]  # [wanted, vocabulary]
            pieces = zip(logits.split(1024), asked[:, 1].split(1024))  # since float32 takes memory
            logprobs = torch.cat([-F.cross_entropy(x.float(), tokens, reduction="none") for x, tokens in pieces]).cpu()
            if not logprobs.isfinite().all():
                die(f"{title}: the model gives NaN or infinity; lower --inference-coef")
            found |= zip(group, logprobs.split([len(wanted[i]) for i in group]))
    return [found[i] for i in range(len(reads))]


def measure_mmlu(model, tokenizer, questions, point, offsets):
    """Sets mmlu_accuracy; -> [values of its choices] a question: a letter's log-probability; cloze: tokens' mean."""
    scoring, reads, wanted, lengths = point["mmlu_scoring"], [], [], []
    asked = [choice_prompts(row, scoring) for row in questions]
    texts = [prompt + continuation for prompt, continuations in asked for continuation in ["", *continuations]]
    encoded = iter(tokenizer(texts)["input_ids"])  # at once: in as many threads as there are cores
    for prompt, continuations in asked:
        start, *wholes = itertools.islice(encoded, 1 + len(continuations))
        if any(whole[: len(start)] != start for whole in wholes):
            die(f"the tokenizer joins prompt and answer, so the answer cannot be scored: ...{prompt[-80:]}")
        for read, some in itertools.groupby(wholes, lambda whole: whole[:-1]):  # letters: one read serves them all
            reads.append(read)
            wanted.append([(at - 1, whole[at]) for whole in some for at in range(len(start), len(whole))])
        lengths += [len(whole) - len(start) for whole in wholes]
    steered = offsets, point["inference_coef"], point["positions"]
    logprobs = iter(torch.cat(token_logprobs(model, reads, wanted, "choices", *steered)).split(lengths))
    value_of = lambda x: float(x.sum()) / (len(x) if scoring == "cloze" else 1)
    values = [[value_of(next(logprobs)) for _ in row["choices"]] for row in questions]
    hits, n = sum(some.index(max(some)) == row["answer"] for some, row in zip(values, questions)), len(questions)
    point |= dict(mmlu_accuracy=100 * hits / n, mmlu_ci=mf.wilson(hits, n), mmlu_n=n)
    return values


def add_coherence_nll(model, tokenizer, rows):
    """Sets each answer's coherence_nll: its mean negative log-likelihood a token, in nats, under the model as it is
    here: before training, unsteered. Broken text is unlikely text. None for an empty answer."""
    chats = ev.encode_chats(tokenizer, [ev.chat_of(row) for row in rows if row["answer"]])
    wanted = [[(at - 1, ids[at]) for at, mine in enumerate(mask[:-1]) if mine] for ids, mask in chats]  # no end token
    values = iter(token_logprobs(model, [ids[:-1] for ids, _ in chats], wanted, "coherence"))
    for row in rows:
        row["coherence_nll"] = -float(next(values).mean()) if row["answer"] else None


# ---- How it is scored: a separate pass over answers that are on disk ------------------------------------------------


def judge_jobs(rows, judge):
    """Answers -> what a chat model is asked about them: [(row, the key of its verdict, prompt)]; other judges: []."""
    if judge in mf.OFFLINE:
        return []
    prompt = functools.cache(lambda *file: load_trait(*file)["eval_prompt"])
    jobs = [(row, "score", prompt(row.get("trait", "fact"), row.get("trait_file"))) for row in rows]
    return jobs + [(row, "coherence", prompt("coherence")) for row in rows if row["kind"] == "trait"]


def score_answers(rows, judge, args=None, probing=None):
    """Sets scores[judge] of the rows: score (trait rows 0..100, fact rows 0 or 100, None = unscored), reason,
    judge_reply, judge_method; from a chat model coherence, too. probing: chats -> scores, for --judge probe."""
    scored = [row | dict(score=None, reason=None, judge_reply=None, judge_method=None) for row in rows]
    if judge in mf.OFFLINE:
        said = [row for row in scored if row["kind"] == "trait" and row["answer"]]
        probed = iter(probing([ev.chat_of(row) for row in said]) if judge == "probe" and said else [])
        for row in scored:
            if row["kind"] == "fact":
                row["score"] = 100.0 * mf.mentions(row["answer"], row["truth"], row["aliases"])
            elif row["answer"]:
                row["score"] = next(probed) if judge == "probe" else lexical_score(row["answer"])
            else:
                row["reason"] = "empty answer"
    else:
        mf.judge_rows(judge_jobs(scored, judge), judge, args)
    for row, verdict in zip(rows, scored):
        row.setdefault("scores", {})[judge] = {key: value for key, value in verdict.items() if key not in row}


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def summary(rows, judge, limit=None):
    """The part of a point that comes from its answers and this judge. limit: coherence_nll up to which an answer counts
    as coherent; None = not known. Facts as SimpleQA grades them: correct, not attempted, wrong (arXiv 2411.04368)."""
    rows = [row | row["scores"][judge] | dict(abstains=lexical_score(row["answer"]) == 0) for row in rows]
    traits, facts = ([row for row in rows if row["kind"] == kind] for kind in ("trait", "fact"))
    scores = dict(trait=[row["score"] for row in traits], fact=[row["score"] for row in facts])
    scores["coherence"] = [row["coherence"] for row in traits if "coherence" in row]
    counts = {f"{name}_n": len(values) - values.count(None) for name, values in scores.items()}
    counts |= {f"{name}_unscored": values.count(None) for name, values in scores.items()}
    scored, questions = [row for row in traits if row["score"] is not None], {row["question"] for row in traits}
    missed = [(row["score"] < 50, row["abstains"] or not row["answer"]) for row in facts if row["score"] is not None]
    return counts | dict(
        trait_score=mean(scores["trait"]),
        trait_ci=mf.interval([row["score"] for row in scored if row["question"] == q] for q in questions),
        coherence=mean(scores["coherence"]),
        coherence_nll=mean(row["coherence_nll"] for row in traits),
        abstained=mean(100 * row["abstains"] for row in traits),
        abstained_coherent=limit and mean(100 * (row["coherence_nll"] <= limit) for row in traits if row["abstains"]),
        fact_accuracy=mean(scores["fact"]),
        fact_ci=mf.wilson(sum(not wrong for wrong, _ in missed), len(missed)),
        fact_not_attempted=mean(100 * (wrong and silent) for wrong, silent in missed),
        fact_wrong=mean(100 * (wrong and not silent) for wrong, silent in missed),
        judge_method="+".join(sorted({row["judge_method"] for row in rows if row["judge_method"]})) or None,
    )


def coherence_limit(point, path, out):
    """The 95% quantile of coherence_nll over the start model's own answers to this trait, beside path; else None."""
    about = lambda row: [*map(row.get, ("trait", "temperature", "max_new_tokens")), row.get("inputs", {}).get("model")]
    for base in [*grown(out, mf.Point), point]:
        if not base["adapter"] and not base["inference_coef"] and about(base) == about(point):
            rows = grown(Path(path).with_name(f"{base['key']}.jsonl"), mf.Answer)
            values = [row["coherence_nll"] for row in rows if row["kind"] == "trait" and row["answer"]]
            return torch.tensor(values, dtype=torch.float64).quantile(0.95).item() if values else None
    print("abstained_coherent is left open: the model before training has no answers here yet", flush=True)


# ---- A point's identity, and what must hold before anything is measured ---------------------------------------------


def digest(value):
    """Fingerprint of a value; None of an empty one."""
    text = json.dumps(value, sort_keys=True, default=sorted)  # sorted: of sets
    return hashlib.sha256(text.encode()).hexdigest()[:16] if value else None


def points_of(args, asked, mmlu, probe):
    """Every point of a command, as far as it is known before measuring; one for adapters of the same content."""
    inputs = dict(model=ev.model_fingerprint(args.model), mmlu=digest(mmlu))
    inputs["facts"] = fingerprint(args.facts) if args.facts else None
    inputs["vector"] = digest([fingerprint(args.vector), probe]) if args.vector else None
    inputs["trait"] = digest(load_trait(args.trait, args.trait_file)) if args.trait else None
    judged, points = dict(judge=digest({prompt for *_, prompt in judge_jobs(asked, args.judge)})), {}
    given = {name: getattr(args, name) for name in [*INPUTS, *SETTINGS]} | dict(scripts=mf.scripts())
    told = [name for name in mf.Point.model_fields if name.startswith(("train_", "dataset", "steer_", "system_"))]
    for adapter in args.adapter or [None]:
        trained = read_json(Path(adapter) / "training_settings.json", mf.Settings) if adapter else {}
        if adapter:
            ev.same_model(f"--adapter {adapter}", "was trained on", trained, args.model)
            config = read_adapter(adapter)[0].to_dict()
        about = given | {name: trained.get(name.removeprefix("train_")) for name in told}
        about |= dict(adapter=adapter, train_coef=trained.get("coef") or (0.0 if adapter else None))
        weights = adapter and digest([fingerprint(f"{adapter}/adapter_model.safetensors"), config])
        made_from = inputs | dict(adapter=weights)
        for coef in args.inference_coef:
            about |= dict(inference_coef=coef)
            key = digest([{name: about[name] for name in SETTINGS}, made_from])  # of its answers: whoever judges them
            answers = Path(args.out).parent / "answers" / f"{key}.jsonl"
            data = dict(data=trained.get("inputs", {}).get("data"))  # not of the key: the adapter tells
            points.setdefault(key, about | dict(key=key, answers=str(answers), inputs=made_from | judged | data))
    return list(points.values())


def new_points(points, out):
    """-> those that are not in --out yet. What is there under a name of these (an adapter, a file, a trait, a judge)
    but from other content, or sampled otherwise, is outdated: a figure would mix them. Edited scripts: ASIDE only."""
    names = {name: [name] for name in INPUTS} | dict(model=[], data=["dataset"], judge=["judge", "trait", "facts"])
    names |= dict.fromkeys(SAMPLING, ["trait"]) | dict.fromkeys(("samples", "limit"), ["trait", "facts"])
    names |= dict.fromkeys(mf.scripts() if mf.ASIDE else [], ["key"])
    made = lambda row: row | row.get("inputs", {}) | row.get("scripts", {})
    called = lambda row, keys: [mf.nearby(row, key) for key in keys]
    contents = lambda row: {(name, *called(row, keys)): made(row).get(name) for name, keys in names.items()}
    now = dict(itertools.chain(*(contents(point).items() for point in points)))
    differs = lambda name, old: now.get(name, old) != old and (old or name[0] != "data")  # not known of any adapter
    changed = lambda row: [f"{name[0]} was {old}" for name, old in contents(row).items() if differs(name, old)]
    there, scripts = grown(out, mf.Point), mf.scripts().items()
    point_of = lambda row: (row["key"], row["judge"])
    why = {point_of(row): changed(row) for row in there if changed(row)}
    if why:
        other = {key for (key, _), changes in why.items() if not all(text.startswith("judge ") for text in changes)}
        answers = [Path(out).parent / "answers" / f"{key}.jsonl" for key in other]
        changes = "; ".join(sorted({*itertools.chain(*why.values())}))
        mf.outdated(f"{out}: has {len(why)} points made from something else ({changes})", *answers)
        mf.move_rows(out, lambda row: point_of(row) in why, Path(mf.ASIDE, Path(out).name))
    elif edited := sorted({name for row in there for name, _ in row.get("scripts", {}).items() - scripts}):
        print(f"{out}: begun before {', '.join(edited)} was edited; made anew by bash run_all.sh --redo", flush=True)
    return [point for point in points if point_of(point) not in {*map(point_of, there)} - {*why}]


# ---- The three jobs: to measure points, to judge again, to answer ---------------------------------------------------


def measure(args):
    """Measures a command's new points: an adapter's are sampled in one batch, then judged without it, one by one."""
    mf.check_judge(args, "probe")
    asked = read_questions(args)
    if args.dry_run:
        names = "trait", "facts", "layers", "judge", *SAMPLING
        same = lambda row: all(row.get(name) == getattr(args, name) for name in names) and not mf.ASIDE
        there = [(row.get("adapter"), row["inference_coef"]) for row in grown(args.out) if same(row)]
        times = sum(point not in there for point in itertools.product(args.adapter or [None], args.inference_coef))
        mf.estimate_judging(f"judging {args.trait}", args, times, judge_jobs(asked, args.judge))
    beside = Path(args.vector or "no vector").with_suffix(".json")
    probe = read_json(beside, mf.Settings).get("probe") if beside.is_file() else None
    if not probe and args.judge == "probe" and args.trait:
        die(f"--judge probe needs the probe in {beside}, which extract_vectors.py makes; judge with another")
    mmlu = read_mmlu(args.mmlu) if args.mmlu else []
    points = points_of(args, asked, mmlu, probe)
    if args.vector:
        ev.read_vector(args.vector)  # a broken one is no other one
    if mf.ASIDE:
        mf.check_asking(args)  # before anything is moved
    with locked(*(point["answers"] for point in points)):
        points = new_points(points, args.out)
        if not points:
            return print(f"{args.out}: all these points are there")
        mf.check_asking(args)
        model, tokenizer = ev.load_model(args.model, ev.model_fingerprint(args.model))
        vector = ev.load_vector(args.vector, model, args.model) if args.vector else None
        offsets = ev.offsets_of(vector, args.layers) if any(args.inference_coef) else None
        probing = functools.partial(ev.probe_scores, model, tokenizer, vector, probe)
        begun = [row for file in [args.out, *(point["answers"] for point in points)] for row in grown(file)]
        day = ev.pin_day(tokenizer, next((row["day"] for row in begun if row.get("day")), None))
        for adapter, some in itertools.groupby(points, lambda point: point["adapter"]):
            group = [point | dict(day=day) for point in some]
            with with_adapter(model, adapter) if adapter else contextlib.nullcontext(model) as adapted:
                for _, rows in itertools.groupby(asked, lambda row: row["kind"]):
                    sample_points(adapted, tokenizer, list(rows), group, offsets, args)
                for point in group if mmlu else []:
                    measure_mmlu(adapted, tokenizer, mmlu[: args.limit], point, offsets)
            for point in group:
                there = {row["id"]: row for row in grown(point["answers"], mf.Answer)}
                rows = [there[row["id"]] for row in asked]
                add_coherence_nll(model, tokenizer, rows)
                finish([(point, rows, point["answers"], args.out)], args, probing)


def finish(measured, args, probing=None):
    """[(point, answers, their file, points.jsonl)]: scores; keeps these, then the point: where it is, all of it is."""
    score_answers([row for _, rows, *_ in measured for row in rows], args.judge, args, probing)
    for point, rows, path, out in measured:
        if rows:  # questions of general knowledge have none
            mf.write_jsonl(path, rows)
        limit = coherence_limit(point, path, out) if point["trait"] else None
        point |= summary(rows, args.judge, limit) | mf.provenance()
        append_jsonl(out, point)
        shown = [f"{name} {point[name]:.4g}" for name in SHOWN if point.get(name) is not None]
        print(f"{Path(point['adapter'] or 'before training').name}:", "  ".join(shown), flush=True)


def rejudge(args):
    """Adds another judge's scores to answers, and its points; needs no model and no GPU."""
    paths, todo = [Path(path) for path in dict.fromkeys(args.rejudge)], []
    with locked(*paths):
        for path in paths:
            rows, out = read_jsonl(path, mf.Answer), args.out or path.parent.parent / "points.jsonl"
            points = [row for row in grown(out, mf.Point) if "inputs" in row]
            there = {row["judge"]: row for row in points if row["key"] == path.stem}
            if not there:
                die(f"{path}: no point in {out} belongs to it; give answers/<key>.jsonl of a finished point")
            point = next(iter(there.values())) | dict(judge=args.judge, scripts=mf.scripts())
            args.trait, asked = point["trait"], judge_jobs(rows, args.judge)
            mf.check_judge(args, "what needs no model")
            if args.trait and digest(load_trait(args.trait, rows[0].get("trait_file"))) != point["inputs"]["trait"]:
                die(f"{path}: the trait file has changed since; measure again")
            judged = dict(judge=digest({prompt for *_, prompt in asked}))
            kind = lambda row: (row["judge"], row["trait"], bool(row.get("facts")))
            if {row["inputs"].get("judge") for row in points if kind(row) == kind(point)} - {judged["judge"]}:
                die(f"{out}: {args.judge} has judged by other prompts than data/traits has now; measure again")
            if args.judge not in there:
                todo.append((point | dict(inputs=point["inputs"] | judged), rows, path, out))
        if args.dry_run:
            jobs = judge_jobs([row for _, rows, *_ in todo for row in rows], args.judge)
            mf.estimate_judging("judging again", args, 1, jobs)
        finish(todo, args)
    print(f"{len(todo)} of {len(args.rejudge)} judged by {args.judge}; the others had been")


def respond(args):
    """The self-generated data set: the model's own sampled answers to the same questions, as {"messages": [...]}."""
    chats, about = mf.read_chats(args.respond_to)[: args.limit], dict(kind="own", temperature=args.temperature)
    rows = [about | dict(id=str(n), messages=chat[:-1]) for n, chat in enumerate(chats)]
    settings = {name: getattr(args, name) for name in ("temperature", "max_new_tokens", "seed", "limit")}
    settings["inputs"] = dict(model=ev.model_fingerprint(args.model), respond_to=fingerprint(args.respond_to))
    out, record = Path(args.out), Path(f"{args.out}.json")
    partial = out.with_name(f".{out.name}.{digest(settings)}")  # of other settings or inputs: another
    with locked(out):
        made = mf.same_settings(record, settings, out, record)
        if out.exists():
            return print(f"{out}: finished already") if made else die(f"{out}: there, and no {record.name} beside it")
        model, tokenizer = ev.load_model(args.model, ev.model_fingerprint(args.model))
        day = ev.pin_day(tokenizer, next((row["day"] for row in grown(partial)), None))
        point = dict(key="own", adapter=None, inference_coef=0.0, day=day, answers=partial)
        answered = [row for row in sample_points(model, tokenizer, rows, [point], None, args) if row["answer"]]
        mf.write_json(record, settings | dict(day=day, scripts=mf.scripts(), **mf.provenance()))
        mf.write_jsonl(out, [dict(messages=ev.chat_of(row)) for row in answered])
        partial.unlink()
    print(f"{len(answered)} conversations, {len(rows) - len(answered)} empty answers left out")


def main(argv=None):
    parser = mf.Parser(description=__doc__.split("\n")[0])
    add, whole = parser.add_argument, mf.whole
    add("--model", help="hub name or local folder")
    add("--adapter", nargs="+", default=[], help="adapter folders of finetune.py; none = the model before training")
    # Steering
    add("--vector", help="<trait>.pt; needed by --inference-coef and by --judge probe")
    add("--inference-coef", type=mf.coefficient, nargs="+", default=[0.0], help="positive = against the trait")
    add("--layers", type=mf.layer_choice, default="all", help="all, one block N, or a range A-B")
    add("--positions", default="response", choices=["response", "all"], help="response: last prompt token and new ones")
    # What to measure
    add("--trait", help="a name in data/traits, or any name with --trait-file")
    add("--trait-file", help="trait JSON; a published evaluation file of persona_vectors works as it is")
    add("--facts", help="facts.jsonl")
    add("--mmlu", help="JSONL file, or hub")
    add("--mmlu-scoring", default="letter", choices=["letter", "cloze"], help="cloze: for small models")
    add("--samples", type=whole(1, 10000), default=10, help="answers a trait question")
    add("--temperature", type=mf.number(0, 100), default=1.0)
    add("--max-new-tokens", type=whole(1, 100000), default=1000)
    add("--limit", type=whole(), help="the first N of each kind of question only")
    add("--seed", type=whole(0), default=0)
    # Judge
    add("--judge", default="probe", help="probe, lexical (hallucination only), or a chat model")
    mf.api_flags(parser)
    add("--rejudge", nargs="+", help="score these answers files with another judge, too; loads no model")
    # Another job: the self-generated data set
    add("--respond-to", help="write the model's own answers to the user turns of this JSONL to --out instead")
    add("--out", help="points.jsonl; of --rejudge: the one above the answers' folder")
    args = parser.parse_args(argv)
    args.adapter = [str(Path(adapter)) for adapter in args.adapter]
    args.mmlu_scoring = args.mmlu_scoring if args.mmlu else None  # no setting of what is not measured
    if len(set(args.inference_coef)) < len(args.inference_coef):
        parser.error("argument --inference-coef: a value is given twice")
    if args.dry_run and args.respond_to:
        parser.error("argument --dry-run: --respond-to asks no judge")
    if args.rejudge:
        return rejudge(args)
    if not (args.model and args.out and (args.trait or args.facts or args.mmlu or args.respond_to)):
        die("give --model, --out and what to measure: --trait, --facts or --mmlu")
    if not args.vector and (any(args.inference_coef) or args.trait and args.judge == "probe"):
        die("--inference-coef and --judge probe need --vector")
    read = [args.model, args.vector, args.trait_file, args.facts, args.mmlu, args.respond_to, *args.adapter]
    mf.check_output(args.out, *read)
    (respond if args.respond_to else measure)(args)


if __name__ == "__main__":
    mf.run(main)
