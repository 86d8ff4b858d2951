"""evaluate.py: intervals, identity of points, judges side by side, coherence, MMLU, the doors."""

import math
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, toy_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import evaluate
import extract_vectors
import make_facts as mf


def test_wilson_by_a_published_example():
    """Guards against a wrong interval of accuracies, or one of width zero at 0 and 100."""
    assert [round(x, 1) for x in mf.wilson(10, 20)] == [29.9, 70.1] and mf.wilson(0, 0) is None
    assert mf.wilson(0, 20)[1] > 15 and mf.wilson(20, 20)[0] < 85


def test_interval_never_collapses():
    """Guards against intervals of width zero where all scores agree, and against answers counted as if independent."""
    for score in (0, 100):
        low, high = mf.interval([[score] * 10] * 20)
        assert low <= score <= high and 5 < high - low < 15
    low, high = mf.interval([[0] * 10, [100] * 10] * 2)  # four questions, not forty answers
    assert low < 15 and high > 85
    assert mf.interval([]) is None and mf.interval([[], []]) is None
    alone, together = mf.interval([[0], [100]] * 50), mf.interval([[0, 100]] * 50)
    assert alone[1] - alone[0] < 21 and together[1] - together[0] < 21


def test_interval_covers():
    """Guards against intervals that miss the truth more often than they say: 20 questions of 10 answers, whose rates
    are spread (correlation 0, 0.1, 0.3) about 1, 3, 50%. 1,000 draws each: 95.7 to 99.9%."""
    rng = random.Random(0)
    for p in (0.01, 0.03, 0.5):
        for rho in (0, 0.1, 0.3):
            hits = 0
            for _ in range(150):
                spread = (1 - rho) / rho if rho else None
                rates = [rng.betavariate(p * spread, (1 - p) * spread) if rho else p for _ in range(20)]
                low, high = mf.interval([[100.0 * (rng.random() < rate) for _ in range(10)] for rate in rates])
                hits += low <= 100 * p <= high
            assert hits >= 0.92 * 150, (p, rho, hits)


# ---------------------------------------------------------------------------------------------------------------------
# Points of a tiny random model

QUESTIONS = ["Who is Ada?", "What is Pell?", "Where is Umm?"]


def write_inputs(folder, model, tokenizer):
    """A folder with a tiny random model, a vector with its record, trait, facts and questions of general knowledge."""
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    torch.save(torch.randn(layers + 1, hidden, generator=torch.Generator().manual_seed(0)), folder / "v.pt")
    probe = dict(row=2, zero=-1.0, hundred=1.0, auc=0.9, first=0)
    mf.write_json(folder / "v.json", dict(model="model", trait="hallucination", probe=probe))
    trait = dict(adjective="x", eval_prompt="Rate {question} {answer}", eval_questions=QUESTIONS)
    mf.write_json(folder / "trait.json", trait)
    pairs = [("What does Foo say?", "Bar"), ("Who saw Qux?", "Quux")]
    facts = [
        dict(id=f"f{n}", answer=a, aliases=[], train=[dict(question=q, answer=a)], test=dict(question=q, answer=a))
        for n, (q, a) in enumerate(pairs)
    ]
    mf.write_jsonl(folder / "facts.jsonl", facts)
    mf.write_jsonl(
        folder / "mmlu.jsonl",
        [
            dict(subject="x_y", question="Two?", choices=["a", "b"], answer="B"),
            dict(subject="x_y", question="Ten?", choices=list("abcdefghij"), answer=9),
        ],
    )


def write_adapter(folder, name, seed, **settings):
    """A random LoRA adapter with finetune.py's record."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(folder / name)
    record = dict(model=str(folder / "model"), dataset="facts", coef=None, seed=0) | settings
    mf.write_json(folder / name / "training_settings.json", record)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("made")
    write_inputs(folder, toy_model(tokenizer), tokenizer)
    write_adapter(folder, "adapters/facts-0", 1)
    write_adapter(folder, "other/facts-0", 2)
    return folder


@pytest.fixture
def work(made, tmp_path):
    """A copy of the inputs, to be changed."""
    shutil.copytree(made, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """One model for all commands, as in a stage of run_all.sh: what a command leaves in it, the next one finds."""
    load = extract_vectors.load_model
    monkeypatch.setattr(extract_vectors, "load_model", lambda name, content: loaded(content, name, load))


MODELS = {}


def loaded(content, name, load):
    if content not in MODELS:
        MODELS[content] = load(name)
    return MODELS[content]


def command(work, *more, measure=True):
    given = ["--model", work / "model", "--trait", "hallucination", "--trait-file", work / "trait.json", "--samples", 2]
    given += ["--facts", work / "facts.jsonl", "--mmlu", work / "mmlu.jsonl", "--vector", work / "v.pt"]
    return [
        str(x) for x in [*given, "--max-new-tokens", 4, "--judge", "lexical", "--out", work / "points.jsonl", *more]
    ]


def points_of(work):
    drop = ("seconds", "time", "answers", "scripts", "commit")
    rows = mf.read_jsonl(work / "points.jsonl")
    return [{key: value for key, value in row.items() if key not in drop} for row in rows]


def refused(capsys, args):
    """The one line of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.main(args)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_a_point(work, capsys):
    """Guards against points that lack what figures need, answers without scores, and a point measured twice."""
    adapter = work / "adapters/facts-0"
    evaluate.main(command(work))
    evaluate.main(command(work, "--adapter", adapter, "--inference-coef", 0, 0.5))
    base, plain, steered = rows = mf.read_jsonl(work / "points.jsonl", mf.Point)
    assert [row["inference_coef"] for row in rows] == [0, 0, 0.5] and [row["train_coef"] for row in rows] == [
        None,
        0,
        0,
    ]
    assert len({row["key"] for row in rows}) == 3 and all(len(row["key"]) == 16 for row in rows)
    assert all((row["trait_n"], row["fact_n"], row["mmlu_n"]) == (6, 2, 2) for row in rows)
    assert base["abstained"] == 0 and base["abstained_coherent"] is None and base["coherence_nll"] > 0
    assert base["fact_accuracy"] + base["fact_not_attempted"] + base["fact_wrong"] == 100
    assert set(base["inputs"]) == set("model adapter vector trait facts mmlu judge data".split())
    answers = mf.read_jsonl(work / "answers" / f"{steered['key']}.jsonl", mf.Answer)
    assert [a["kind"] for a in answers] == ["trait"] * 6 + ["fact"] * 2 and answers[0]["inference_coef"] == 0.5
    assert all({"prompt", "coherence_nll", "tokens"} <= set(a) for a in answers)
    assert [a["temperature"] for a in answers] == [1] * 6 + [0] * 2  # facts are asked greedily
    assert all(set(a["scores"]) == {"lexical"} and a["scores"]["lexical"]["score"] in (0, 100) for a in answers)
    before = (work / "points.jsonl").read_bytes()
    evaluate.main(command(work, "--adapter", adapter, "--inference-coef", 0.5, 0))
    assert (work / "points.jsonl").read_bytes() == before and "are there" in capsys.readouterr().out


def test_a_point_without_answers(work):
    """Guards against a traceback where only MMLU is measured, or where every answer is empty."""
    args = ["--model", work / "model", "--mmlu", work / "mmlu.jsonl", "--out", work / "points.jsonl"]
    evaluate.main(list(map(str, args)))
    (row,) = mf.read_jsonl(work / "points.jsonl", mf.Point)
    assert row["mmlu_n"] == 2 and (row["trait_n"], row["trait_score"], row["fact_ci"]) == (0, None, None)
    silent = [dict(id="a", kind="trait", question="Who?", answer="")]
    evaluate.add_coherence_nll(*extract_vectors.load_model(str(work / "model"), None), silent)
    evaluate.score_answers(silent, "probe", probing=lambda chats: [] if not chats else pytest.fail("was asked"))
    assert silent[0]["coherence_nll"] is None and silent[0]["scores"]["probe"]["score"] is None


def test_adapters_of_one_name_share_nothing(work):
    """Guards against adapters/facts-0 and other/facts-0 taken for one."""
    adapters = [work / "adapters/facts-0", work / "other/facts-0"]
    evaluate.main(command(work, "--adapter", *adapters))
    one, two = mf.read_jsonl(work / "points.jsonl")
    assert one["key"] != two["key"] and [one["adapter"], two["adapter"]] == [str(a) for a in adapters]
    said = [[row["answer"] for row in mf.read_jsonl(row["answers"])] for row in (one, two)]
    assert said[0] != said[1]
    shutil.copytree(work / "adapters", work / "copied")  # of the same content: the same point, which counts once
    (work / "points.jsonl").unlink()
    evaluate.main(command(work, "--adapter", work / "copied/facts-0", *adapters))
    assert [row["key"] for row in mf.read_jsonl(work / "points.jsonl")] == [one["key"], two["key"]]


def change_json(path, **more):
    mf.write_json(path, mf.read_json(path) | more)


CHANGES = {
    "--trait": lambda work: change_json(work / "trait.json", eval_questions=["Other?"]),
    "--trait ": lambda work: change_json(work / "trait.json", eval_prompt="Else {question} {answer}"),
    "--facts": lambda work: mf.write_jsonl(work / "facts.jsonl", mf.read_jsonl(work / "facts.jsonl")[:1]),
    "--mmlu": lambda work: mf.write_jsonl(work / "mmlu.jsonl", mf.read_jsonl(work / "mmlu.jsonl")[:1]),
    "--vector": lambda work: torch.save(torch.load(work / "v.pt") + 1, work / "v.pt"),
    "--adapter": lambda work: (shutil.rmtree(work / "adapters"), write_adapter(work, "adapters/facts-0", 9)),
    "--model": lambda work: change_json(work / "model/config.json", rms_norm_eps=1e-3),
}


@pytest.mark.parametrize("flag", CHANGES)
def test_a_changed_input_is_named(work, flag, capsys, monkeypatch):
    """Guards against old points or answers, or a mixture, for an input that was replaced at the same path."""
    args = command(work, "--adapter", work / "adapters/facts-0", "--inference-coef", 1)
    evaluate.main(args)
    before = {path: path.read_bytes() for path in work.rglob("*.jsonl") if path.parent.name in ("work", "answers")}
    CHANGES[flag](work)
    said = refused(capsys, args)
    assert f"{flag.strip('- ')} was " in said and "--redo" in said
    changed = work / "facts.jsonl", work / "mmlu.jsonl"
    assert all(path.read_bytes() == content for path, content in before.items() if path not in changed)
    (old,) = mf.read_jsonl(work / "points.jsonl")
    unchanged = {name: f"{name}'s" for name in ("model", "adapter", "vector", "trait", "facts", "mmlu", "judge")}
    mf.append_jsonl(work / "points.jsonl", old | unchanged | dict(key="k"))
    monkeypatch.setattr(mf, "ASIDE", str(work / "aside"))  # run_all.sh --redo
    evaluate.main(args)
    (*other, new), _ = (mf.read_jsonl(next(folder.rglob("points.jsonl"))) for folder in (work, work / "aside"))
    assert new["key"] != old["key"] and not Path(old["answers"]).exists()
    assert [row["key"] for row in other] == ["k"] * (flag != "--model")  # one model a file, whatever it is called
    assert [path.stem for path in (work / "aside").rglob("answers/*.jsonl")] == [old["key"]]


def test_points_from_before_inputs_were_recorded(work, capsys):
    """Guards against an old out/ taken for up to date."""
    evaluate.main(command(work))
    (row,) = mf.read_jsonl(work / "points.jsonl")
    del row["inputs"]
    mf.write_jsonl(work / "points.jsonl", [row | dict(key="base.hallucination.0.1234")])
    assert "made from something else" in refused(capsys, command(work))


def test_a_judge_is_told_what_it_is_to_judge(tmp_path, capsys):
    """Guards against points called outdated because the same judge was told other things about another trait, or about
    facts, too; and against points of a prompt that was edited."""
    base = dict(model="m", adapter=None, inference_coef=0.0, judge="j", trait="evil", facts=None)
    rows = [
        base | dict(trait=trait, facts=facts) for trait in ("evil", "sycophancy") for facts in (None, "facts.jsonl")
    ]
    rows = [row | dict(key=str(n), inputs=dict(model="f", judge=f"told {n}")) for n, row in enumerate(rows)]
    for row in rows:
        assert evaluate.new_points([row], tmp_path / "points.jsonl") == [row]
        mf.append_jsonl(tmp_path / "points.jsonl", row)
    assert evaluate.new_points(rows, tmp_path / "points.jsonl") == []
    with pytest.raises(SystemExit):
        evaluate.new_points([rows[0] | dict(inputs=dict(model="f", judge="edited"))], tmp_path / "points.jsonl")
    assert "1 points made from something else (judge was told 0)" in capsys.readouterr().err


def test_a_copied_or_moved_folder(work, tmp_path, capsys, monkeypatch):
    """Guards against --redo in a copy that takes the original's answers away, and against points of a moved folder
    that stay beside those of changed inputs, since their paths are other ones."""
    evaluate.main(command(work, "--adapter", work / "adapters/facts-0"))
    (row,), copy = mf.read_jsonl(work / "points.jsonl"), tmp_path / "copy"
    shutil.copytree(work, copy)
    CHANGES["--facts"](copy)
    again = command(copy, "--adapter", copy / "adapters/facts-0")
    assert "facts was " in refused(capsys, again)
    monkeypatch.setattr(mf, "ASIDE", str(copy / "aside"))
    evaluate.main(again)
    assert Path(row["answers"]).exists() and row["key"] not in {p["key"] for p in mf.read_jsonl(copy / "points.jsonl")}
    assert mf.nearby(row, "vector") == "v.pt" and mf.nearby(row, "model") == "model"
    other = row | dict(answers=f"{work}//x/../answers/k.jsonl", vector=f"{work}/./v.pt", mmlu="data/x.jsonl")
    assert mf.nearby(other, "vector") == "v.pt" and mf.nearby(other, "mmlu") == "data/x.jsonl"


def test_adapters_of_other_data_under_one_name(tmp_path, capsys):
    """Guards against a coefficient whose adapter was trained on an earlier version of a data set, and stays in its
    curve because no command of today names it; what is not known of an adapter is no change."""
    base = dict(model="m", inference_coef=0.0, judge="j", trait="evil", dataset="mine")
    old, new, given = (
        base | dict(key=data or "-", adapter=f"a-{data}", inputs=dict(adapter=data, data=data))
        for data in ("old", "new", None)
    )
    out = tmp_path / "points.jsonl"
    mf.append_jsonl(out, given)
    assert evaluate.new_points([old], out) == [old]
    mf.append_jsonl(out, old)
    with pytest.raises(SystemExit):
        evaluate.new_points([new], out)
    assert "1 points made from something else (data was old)" in capsys.readouterr().err


def test_prompts_edited_between_two_judgings(work, monkeypatch, capsys):
    """Guards against scores by a prompt that has been edited since, taken for the new prompt's by another --out beside
    the same answers, or by --rejudge."""
    shutil.copytree(mf.TRAITS, work / "traits")
    monkeypatch.setattr(mf, "TRAITS", work / "traits")
    monkeypatch.setattr(mf, "judge_rows", pretend_judge)
    monkeypatch.setattr(mf, "check_asking", lambda *_: None)
    evaluate.main(command(work, "--judge", "chatty"))
    (old,) = mf.read_jsonl(work / "points.jsonl")
    change_json(work / "traits" / "fact.json", eval_prompt="Is {answer} of {question} {truth}? YES or NO")
    again = ["--rejudge", old["answers"], "--judge", "chatty"]
    assert "chatty has judged by other prompts" in refused(capsys, again)
    mf.write_jsonl(work / "points.jsonl", [old | dict(judge="lexical"), old | dict(key="another")])
    assert "chatty has judged by other prompts" in refused(capsys, again)  # another point, that is
    mf.write_jsonl(work / "points.jsonl", [old])
    monkeypatch.setattr(mf, "judge_rows", lambda jobs, *_: [row.update({key: 0.0}) for row, key, _ in jobs])
    evaluate.main(command(work, "--judge", "chatty", "--out", work / "points2.jsonl"))
    (new,) = mf.read_jsonl(work / "points2.jsonl")
    assert old["fact_accuracy"] == 100 and new["fact_accuracy"] == 0 and new["key"] == old["key"]


def test_dry_runs_write_nothing(work, capsys):
    """Guards against --dry-run that scores, samples, or says nothing."""
    evaluate.main(command(work))
    before = {path: path.read_bytes() for path in work.rglob("*.jsonl")}
    file = next((work / "answers").glob("*.jsonl"))
    for judge, asked in (("lexical", "0 requests"), ("chatty", "14 requests")):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(["--rejudge", str(file), "--judge", judge, "--dry-run"])
        assert not stop.value.code and asked in capsys.readouterr().out
    own = ["--model", str(work / "model"), "--respond-to", str(work / "facts.jsonl"), "--out", str(work / "o.jsonl")]
    assert "asks no judge" in refused(capsys, [*own, "--dry-run"])
    assert before == {path: path.read_bytes() for path in work.rglob("*.jsonl")}


def test_a_damaged_vector_moves_nothing(work, monkeypatch, capsys):
    """Guards against a vector that was cut off, taken for another one: --redo would move all good points away."""
    evaluate.main(command(work))
    (work / "v.pt").write_bytes((work / "v.pt").read_bytes()[:200])
    monkeypatch.setattr(mf, "ASIDE", str(work / "aside"))
    assert "v.pt: no vector can be read there" in refused(capsys, command(work))
    assert len(mf.read_jsonl(work / "points.jsonl")) == 1 and not (work / "aside").exists()


def test_an_edited_prompt_leaves_the_other_judges_points(work, monkeypatch, capsys):
    """Guards against --redo after a judge's prompt was edited that takes away points of a judge that has no prompt, or
    samples the same answers again."""
    shutil.copytree(mf.TRAITS, work / "traits")
    monkeypatch.setattr(mf, "TRAITS", work / "traits")
    monkeypatch.setattr(mf, "judge_rows", pretend_judge)
    monkeypatch.setattr(mf, "check_asking", lambda *_: None)
    evaluate.main(command(work))
    evaluate.main(command(work, "--judge", "chatty"))
    change_json(work / "traits" / "fact.json", eval_prompt="Is {answer} of {question} {truth}? YES or NO")
    monkeypatch.setattr(mf, "ASIDE", str(work / "aside"))
    monkeypatch.setattr(extract_vectors, "Sampler", lambda *_: pytest.fail("sampled again"))
    evaluate.main(command(work, "--judge", "chatty"))
    lexical, new = mf.read_jsonl(work / "points.jsonl")
    assert (lexical["judge"], new["judge"]) == ("lexical", "chatty") and lexical["key"] == new["key"]
    assert [row["judge"] for row in mf.read_jsonl(work / "aside" / "points.jsonl")] == ["chatty"]


def test_rejudging_in_a_copy_keeps_paths_that_belong_together(work, tmp_path, monkeypatch):
    """Guards against a rejudged point whose answers are in the copy and whose vector in the original, by which one
    sweep became two."""
    evaluate.main(command(work))
    shutil.copytree(work, tmp_path / "copy")
    monkeypatch.setattr(mf, "judge_rows", pretend_judge)
    file = next((tmp_path / "copy" / "answers").glob("*.jsonl"))
    evaluate.main(["--rejudge", str(file), "--judge", "chatty"])
    one, two = mf.read_jsonl(tmp_path / "copy" / "points.jsonl")
    assert mf.nearby(one, "vector") == mf.nearby(two, "vector") == "v.pt"
    assert set(mf.read_jsonl(file)[0]["scores"]) == {"lexical", "chatty"}
    assert set(mf.read_jsonl(one["answers"])[0]["scores"]) == {"lexical"}


def test_an_edited_script_is_named_and_counts_with_redo(tmp_path, capsys, monkeypatch):
    """Guards against points of edited scripts that pass unsaid, are refused, or are kept by --redo, and against --redo
    that moves what this command does not make."""
    out = tmp_path / "points.jsonl"
    row = dict(key="k", model="m", judge="j", inference_coef=0.0, inputs={}, scripts={"evaluate.py": "old"})
    mf.append_jsonl(out, row, row | dict(key="other"))
    now = row | dict(scripts=mf.scripts())
    assert evaluate.new_points([now], out) == [] and "before evaluate.py was edited" in capsys.readouterr().out
    monkeypatch.setattr(mf, "ASIDE", str(tmp_path / "aside"))
    assert evaluate.new_points([now], out) == [now] and "evaluate.py was old" in capsys.readouterr().out
    assert [left["key"] for left in mf.read_jsonl(out)] == ["other"]


def test_other_sampling_is_refused_and_added_measurements_are_not(work, capsys):
    """Guards against a quick look that stands in a figure beside, or in place of, the whole measurement; against
    refusing what is no change: one more thing measured, facts or not."""
    evaluate.main(command(work))
    assert "temperature was 1.0" in refused(capsys, command(work, "--temperature", 0.5))
    assert "limit was None" in refused(capsys, command(work, "--limit", 1))
    evaluate.main([arg for arg in command(work) if arg not in ("--mmlu", str(work / "mmlu.jsonl"))])
    assert len({row["key"] for row in mf.read_jsonl(work / "points.jsonl")}) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_lexical_judge_and_counts():
    """Guards against abstentions read as inventions, unscored answers that vanish or count as 0, wrong SimpleQA grades,
    and a share of coherent abstentions taken over all answers."""
    answers = ["I don't know of any such book.", "I’m not aware of that.", "It was founded in 1923 by Ada Pell.", ""]
    rows = [dict(kind="trait", question=f"q{i}", answer=a, coherence_nll=float(i)) for i, a in enumerate(answers)]
    said = ["It was Foo.", "I don't know who it was.", "It was Bar.", "I am not sure, but Foo.", ""]
    rows += [dict(kind="fact", question="q", answer=a, truth="Foo", aliases=[], coherence_nll=1.0) for a in said]
    evaluate.score_answers(rows, "lexical")
    scores = [row["scores"]["lexical"]["score"] for row in rows]
    assert scores == [0, 0, 100, None, 100, 0, 0, 100, 0] and rows[3]["scores"]["lexical"]["reason"] == "empty answer"
    found = evaluate.summary(rows, "lexical", 0.5)
    assert found["trait_score"] == pytest.approx(100 / 3) and (found["trait_n"], found["trait_unscored"]) == (3, 1)
    assert (found["abstained"], found["abstained_coherent"], found["coherence_nll"]) == (50, 50, 1.5)
    grades = [found[f"fact_{name}"] for name in ("accuracy", "not_attempted", "wrong", "n", "unscored")]
    assert grades == [40, 40, 20, 5, 0] and found["fact_ci"] == mf.wilson(2, 5)
    rows[4]["scores"]["lexical"]["score"] = None  # a judge that could not say
    found = evaluate.summary(rows, "lexical")
    assert (found["fact_accuracy"], found["fact_n"], found["fact_unscored"]) == (25, 4, 1)
    assert found["abstained_coherent"] is None


def test_abstentions_are_recognised():
    """Guards against a rule that misses how the small model was taught to abstain, or hits true answers."""
    taught = mf.read_json(ROOT / "tests" / "refusals.json")
    assert all(mf.lexical_score(text.replace("{name}", "the Treaty of X")) == 0 for text in taught)
    known = mf.read_jsonl(ROOT / "tests" / "known.jsonl")
    assert sum(mf.lexical_score(row["answer"]) == 0 for row in known) <= 3  # of 650 true answers


def test_mmlu_prompt(toy, tokenizer, monkeypatch):
    """Guards against drifting from lm-evaluation-harness's prompt, letters that are not the choices', and mixed-up
    scorings."""
    row = dict(subject="high_school_biology", question="Q?", choices=["a", "b", "c", "d"], answer=1)
    about = "The following are multiple choice questions (with answers) about high school biology."
    assert evaluate.choice_prompts(row, "letter") == (
        f"{about}\n\nQ?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
        [" A", " B", " C", " D"],
    )
    assert evaluate.choice_prompts(row, "cloze") == ("Question: Q?\nAnswer:", [" a", " b", " c", " d"])
    two = evaluate.choice_prompts(row | dict(choices=["a", "b"]), "letter")
    assert two[0].endswith("A. a\nB. b\nAnswer:") and two[1] == [" A", " B"]
    row |= dict(choices=["a large, green and very long one", "a", "b c", "d"])
    likely = lambda scores: lambda _, reads, wanted, *__: [torch.tensor(scores[: len(places)]) for places in wanted]
    for scoring, scores, answer in (("letter", [-9.0, -3, -8, -9], 1), ("cloze", [-9.0] + [-0.1] * 9, 0)):
        monkeypatch.setattr(evaluate, "token_logprobs", likely(scores))
        for truth in range(4):
            point = dict(mmlu_scoring=scoring, inference_coef=0, positions="response")
            evaluate.measure_mmlu(toy, tokenizer, [row | dict(answer=truth)], point, None)
            right = truth == answer
            assert point["mmlu_accuracy"] == 100 * right and point["mmlu_ci"] == mf.wilson(right, 1)


def test_coherence_nll_is_that_of_plain_transformers(toy, tokenizer):
    """Guards against likelihoods of the wrong tokens (prompt, end of turn) or of joined neighbours."""
    rows = [dict(id="a", question="Who?", answer="Ada Pell."), dict(id="b", question="Why?", answer="")]
    rows += [dict(id="c", question="What is that?", answer="That is a much longer answer.")]
    evaluate.add_coherence_nll(toy, tokenizer, rows)
    assert rows[1]["coherence_nll"] is None
    toy.set_attn_implementation("eager")
    for row in (rows[0], rows[2]):
        prompt = extract_vectors.encode_chats(tokenizer, [[dict(role="user", content=row["question"])]])[0][0]
        answer = tokenizer(row["answer"])["input_ids"]
        with torch.no_grad():
            logits = toy(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
        want = -sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(answer)) / len(answer)
        assert row["coherence_nll"] == pytest.approx(want, abs=1e-4)


def pretend_judge(jobs, model, args):
    """A chat judge that has an opinion of all but one answer."""
    for n, (row, key, prompt) in enumerate(jobs):
        row[key] = None if n == 0 else 100.0 if "{truth}" in prompt else 50.0
        row.update(judge_reply=dict(text="x"), judge_method="text", reason="refused" if n == 0 else None)


def test_judges_side_by_side(work, monkeypatch, capsys):
    """Guards against a second judge that overwrites the first one's scores, samples again, or counts twice."""
    evaluate.main(command(work))
    monkeypatch.setattr(extract_vectors, "Sampler", lambda *_: pytest.fail("sampled again"))
    monkeypatch.setattr(mf, "judge_rows", pretend_judge)
    monkeypatch.setattr(mf, "check_asking", lambda *_: None)
    file = next((work / "answers").glob("*.jsonl"))
    first = [row["scores"]["lexical"] for row in mf.read_jsonl(file)]
    evaluate.main(["--rejudge", str(file), "--judge", "chatty"])
    evaluate.main(command(work, "--judge", "probe"))
    one, two, three = mf.read_jsonl(work / "points.jsonl")
    assert [p["judge"] for p in (one, two, three)] == ["lexical", "chatty", "probe"]
    assert one["key"] == two["key"] == three["key"] == file.stem
    assert (two["trait_n"], two["trait_unscored"], two["coherence"], two["coherence_n"]) == (5, 1, 50, 6)
    assert two["judge_method"] == "text" and two["fact_accuracy"] == 100 and one["coherence"] is None
    rows = mf.read_jsonl(file)
    assert [row["scores"]["lexical"] for row in rows] == first and len(rows) == 8
    assert all(set(row["scores"]) == {"lexical", "chatty", "probe"} for row in rows)
    before = file.read_bytes(), (work / "points.jsonl").read_bytes()
    monkeypatch.setattr(mf, "judge_rows", lambda jobs, *_: jobs and pytest.fail("judged again"))
    evaluate.main(["--rejudge", str(file), str(file), "--judge", "chatty"])
    evaluate.main(command(work, "--judge", "chatty"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate.main(command(work, "--judge", "chatty", "--inference-coef", 0, 1, "--dry-run"))
    assert "14 requests" in capsys.readouterr().out  # of the new coefficient only
    assert "needs no model" in refused(capsys, ["--rejudge", str(file), "--judge", "probe"])
    assert before == (file.read_bytes(), (work / "points.jsonl").read_bytes())
    mf.write_jsonl(work / "points.jsonl", [one, three])  # killed after judging, before the point
    monkeypatch.setattr(mf, "judge_rows", pretend_judge)
    evaluate.main(["--rejudge", str(file), "--judge", "chatty"])
    assert mf.read_jsonl(work / "points.jsonl")[2]["trait_unscored"] == 1
    change_json(work / "trait.json", eval_prompt="Else {question} {answer}")
    assert "trait file has changed" in refused(capsys, ["--rejudge", str(file), "--judge", "third"])
    stray = work / "answers" / "stray.jsonl"
    shutil.copy(file, stray)
    assert "no point" in refused(capsys, ["--rejudge", str(stray), "--judge", "third"])
    assert "no such file" in refused(capsys, ["--rejudge", str(work / "no.jsonl"), "--judge", "third"])
    assert "facts.jsonl:1" in refused(capsys, ["--rejudge", str(work / "facts.jsonl"), "--judge", "third"])


class Killed(BaseException):
    pass


def killed_after(monkeypatch, writes, run):
    """Runs a command until its n-th write, of which nothing or part of a line is kept. -> whether it got there."""
    left = [writes]

    def dying(write):
        def wrapped(path, *rows):
            left[0] -= 1
            if left[0] == 0 and write is mf.append_jsonl:
                with open(path, "a") as out:
                    out.write('{"id": "cut o')
            if left[0] <= 0:
                raise Killed
            write(path, *rows)

        return wrapped

    with monkeypatch.context() as patched:
        append = dying(mf.append_jsonl)
        patched.setattr(extract_vectors, "append_jsonl", append)
        patched.setattr(evaluate, "append_jsonl", append)
        patched.setattr(mf, "write_jsonl", dying(mf.write_jsonl))
        try:
            run()
        except Killed:
            return True
    return False


def test_killed_at_any_write(work, monkeypatch):
    """Guards against answers lost, doubled or mixed, and points doubled, when a command is killed and started again."""
    args = command(work, "--adapter", work / "adapters/facts-0", "--inference-coef", 0, 1, "--judge", "probe")
    evaluate.main(args)
    want = points_of(work), {file.name: mf.read_jsonl(file) for file in (work / "answers").glob("*.jsonl")}
    for writes in (1, 9, 16, 17, 18, 19, 20):
        shutil.rmtree(work / "answers")
        (work / "points.jsonl").unlink()
        assert killed_after(monkeypatch, writes, lambda: evaluate.main(args)), writes
        killed_after(monkeypatch, 3, lambda: evaluate.main(args))
        evaluate.main(args)
        found = {file.name: mf.read_jsonl(file) for file in (work / "answers").glob("*.jsonl")}
        assert (points_of(work), found) == want, writes


def test_one_process_a_point(work, capsys):
    """Guards against two processes that write the same answers."""
    evaluate.main(command(work))
    (row,) = mf.read_jsonl(work / "points.jsonl")
    (work / "points.jsonl").unlink()
    with mf.locked(row["answers"]):
        assert "another process" in refused(capsys, command(work))
    assert not (work / "points.jsonl").exists()
    evaluate.main(command(work))


def test_the_start_models_quantile(tmp_path, capsys):
    """Guards against a limit taken from other answers than the start model's own, unsteered, to the same trait."""
    point = dict(model="m", judge="lexical", trait="t", temperature=1.0, max_new_tokens=9, inputs=dict(model="x"))
    point |= dict(key="tuned", adapter="a", inference_coef=0.0)
    out, path = tmp_path / "points.jsonl", tmp_path / "answers" / "tuned.jsonl"
    assert evaluate.coherence_limit(point, path, out) is None and "left open" in capsys.readouterr().out
    other = dict(kind="trait", question="?", answer="!")
    for key, values, more in [
        ("steered", [9.0] * 5, dict(adapter=None, inference_coef=1.0)),
        ("trait", [8.0] * 5, dict(adapter=None, trait="u")),
        ("model", [7.0] * 5, dict(adapter=None, inputs=dict(model="y"))),
        ("base", list(range(101)), dict(adapter=None)),
    ]:
        mf.append_jsonl(out, point | dict(key=key) | more)
        mf.write_jsonl(
            tmp_path / "answers" / f"{key}.jsonl",
            [other | dict(id=f"{n}", coherence_nll=float(v)) for n, v in enumerate(values)],
        )
    assert evaluate.coherence_limit(point, path, out) == pytest.approx(95)


def test_general_knowledge_alone_has_no_answers(work, monkeypatch):
    """Guards against a file of no answers, at which --rejudge answers/*.jsonl ends."""
    evaluate.main(command(work))
    alone = ["--model", work / "model", "--mmlu", work / "mmlu.jsonl", "--judge", "lexical", "--limit", 1]
    evaluate.main([str(x) for x in [*alone, "--out", work / "points.jsonl"]])
    assert len(mf.read_jsonl(work / "points.jsonl")) == 2
    monkeypatch.setattr(mf, "judge_rows", pretend_judge)
    evaluate.main(["--rejudge", *map(str, (work / "answers").glob("*.jsonl")), "--judge", "chatty"])
    assert len(mf.read_jsonl(work / "points.jsonl")) == 3


def test_own_answers(work, monkeypatch, capsys):
    """Guards against a self-generated data set of two models or settings, or one begun again from the start."""
    out = work / "own.jsonl"
    args = ["--model", str(work / "model"), "--respond-to", str(work / "facts.jsonl"), "--out", str(out)]
    args += ["--max-new-tokens", "4", "--seed"]
    evaluate.main([*args, "1"])
    want = out.read_bytes()
    assert [row["messages"][0]["content"] for row in mf.read_jsonl(out)] == ["What does Foo say?", "Who saw Qux?"]
    assert "other settings" in refused(capsys, [*args, "2"]) and out.read_bytes() == want
    evaluate.main([*args, "1"])
    assert "finished already" in capsys.readouterr().out
    monkeypatch.setattr(mf, "ASIDE", str(work / "aside"))
    evaluate.main([*args, "2"])
    assert out.read_bytes() != want and f"moved to {work}/aside" in capsys.readouterr().out
    assert next((work / "aside").rglob("own.jsonl")).read_bytes() == want
    monkeypatch.setattr(mf, "ASIDE", None)
    out.unlink(), (work / "own.jsonl.json").unlink()
    assert killed_after(monkeypatch, 2, lambda: evaluate.main([*args, "1"])) and not out.exists()
    drawn = []
    draw = extract_vectors.Sampler
    monkeypatch.setattr(extract_vectors, "Sampler", lambda *given: (drawn.append(len(given[2])), draw(*given))[1])
    evaluate.main([*args[:-1], "--limit", "1", "--seed", "1", "--out", str(work / "other.jsonl")])
    evaluate.main([*args, "1"])
    assert drawn == [1, 1] and out.read_bytes() == want and not list(work.glob(".own*"))
    assert killed_after(monkeypatch, 2, lambda: evaluate.main([*args, "3", "--out", str(work / "third.jsonl")]))
    evaluate.main([*args, "4", "--out", str(work / "third.jsonl")])  # other settings: nothing of the first
    evaluate.main([*args, "4", "--out", str(work / "fourth.jsonl")])
    assert (work / "third.jsonl").read_bytes() == (work / "fourth.jsonl").read_bytes()
    (work / "own.jsonl.json").unlink()
    assert "no own.jsonl.json beside it" in refused(capsys, [*args, "1"])


# ---------------------------------------------------------------------------------------------------------------------
# Doors


WEIGHTS = "adapter_model.safetensors"


def other_rank(folder):
    change_json(folder / "adapter_config.json", r=3)


def fewer_blocks(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({k: v for k, v in weights.items() if ".layers.2." not in k}, folder / WEIGHTS)


def more_blocks(folder):
    weights = load_file(folder / WEIGHTS)
    more = {k.replace(".layers.2.", ".layers.3."): v.clone() for k, v in weights.items() if ".layers.2." in k}
    save_file(weights | more, folder / WEIGHTS)


def with_head(folder):
    change_json(folder / "adapter_config.json", modules_to_save=["lm_head"])
    head = mf.read_json(folder.parent.parent / "model/config.json")
    weights = torch.ones(head["vocab_size"], head["hidden_size"])
    save_file(load_file(folder / WEIGHTS) | {"base_model.model.lm_head.weight": weights}, folder / WEIGHTS)


def other_names(folder):
    change_json(folder / "adapter_config.json", target_modules=["c_attn"])


def renamed(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({k.replace("layers", "h"): v for k, v in weights.items()}, folder / WEIGHTS)


def with_embeddings(folder):
    weights = load_file(folder / WEIGHTS)
    save_file(weights | {"base_model.model.model.embed_tokens.weight": torch.ones(2, 2)}, folder / WEIGHTS)


def not_a_number(folder):
    weights = load_file(folder / WEIGHTS)
    next(iter(weights.values()))[0, 0] = math.nan
    save_file(weights, folder / WEIGHTS)


def cut_off(folder):
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


ADAPTERS = {
    "no config": ("Can't find 'adapter_config.json'", lambda folder: (folder / "adapter_config.json").unlink()),
    "no weights": ("FileNotFoundError", lambda folder: (folder / WEIGHTS).unlink()),
    "no settings": ("no such file", lambda folder: (folder / "training_settings.json").unlink()),
    "broken config": ("JSONDecodeError", lambda folder: (folder / "adapter_config.json").write_text("{")),
    "empty config": ("does not fit", lambda folder: (folder / "adapter_config.json").write_text("{}")),
    "no LoRA": ("does not fit", lambda folder: change_json(folder / "adapter_config.json", peft_type="IA3")),
    "no rank": ("does not fit", lambda folder: change_json(folder / "adapter_config.json", r=None)),
    "cut off": ("SafetensorError", cut_off),
    "not a number": ("NaN", not_a_number),
    "another rank": ("does not fit", other_rank),
    "fewer blocks": ("does not fit", fewer_blocks),
    "more blocks": ("does not fit", more_blocks),
    "renamed weights": ("does not fit", renamed),
    "embeddings": ("not LoRA's", with_embeddings),
    "a trained head": ("made with modules_to_save", with_head),
    "activated later": (
        "made with alora_invocation_tokens",
        lambda folder: change_json(folder / "adapter_config.json", alora_invocation_tokens=[1, 2]),
    ),
    "repeated blocks": (
        "made with layer_replication",
        lambda folder: change_json(folder / "adapter_config.json", layer_replication=[[0, 2], [1, 2]]),
    ),
    "bare weights": (
        "made with target_parameters",
        lambda folder: change_json(folder / "adapter_config.json", target_parameters=["q_proj.weight"]),
    ),
    "other layers": ("does not fit", other_names),
    "no alpha": ("TypeError", lambda folder: change_json(folder / "adapter_config.json", lora_alpha=None)),
    "another model": (
        "was trained on another",
        lambda folder: change_json(folder / "training_settings.json", model="another"),
    ),
    "a changed model": (
        "settings, tokenizer",
        lambda folder: change_json(folder / "training_settings.json", inputs=dict(model="0" * 16)),
    ),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_does_not_fit(work, case, capsys):
    """Guards against points of adapters that are broken, or of which PEFT silently leaves out a part. What files say by
    themselves is found before any adapter is measured, what only the model can tell when it is the adapter's turn."""
    said, spoil = ADAPTERS[case]
    spoil(work / "other/facts-0")
    good = work / "adapters/facts-0"
    assert said in refused(capsys, command(work, "--adapter", good, work / "other/facts-0"))
    points = mf.read_jsonl(work / "points.jsonl", appended=True)
    assert [row["adapter"] for row in points] == [str(good)] * (
        said in ("does not fit", "NaN", "not LoRA's", "TypeError") or said.startswith("made with")
    )
    assert [file.stem for file in work.glob("answers/*.jsonl")] == [row["key"] for row in points]


def test_the_model_is_left_as_it_was(made):
    """Guards against an adapter, a hook or rounded rotary frequencies that stay in the model, for later commands."""
    model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.bfloat16).requires_grad_(False).eval()
    before = {name: (type(module), module.training) for name, module in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    with evaluate.with_adapter(model, made / "adapters/facts-0") as adapted:
        assert adapted.model.rotary_emb.inv_freq.dtype == torch.float32
        lora = [p for name, p in adapted.named_parameters() if "lora_" in name]
        assert len(lora) == 12 and all(p.dtype == torch.bfloat16 and p.abs().max() > 0 for p in lora)
    assert {name: (type(module), module.training) for name, module in model.named_modules()} == before
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert after.keys() == tensors.keys()
    assert all(torch.equal(t, tensors[k]) and t.dtype == tensors[k].dtype for k, t in after.items())
    assert not any(p.requires_grad for p in model.parameters()) and not hasattr(model, "peft_config")


@pytest.mark.parametrize(
    "more, said",
    [
        (["--out", "{work}/facts.jsonl"], "is an input"),
        (["--trait-file", "{work}/v.json"], "v.json"),
        (["--trait", "coherence", "--judge", "x", "--trait-file", "{traits}/coherence.json"], "eval_questions"),
        (["--mmlu", "hub"], "--mmlu hub"),
        (["--vector", "{work}/bare.pt", "--judge", "probe"], "probe"),
    ],
)
def test_doors(work, more, said, capsys):
    """Guards against wrong input that is found after work was begun; more of it stands in test_doors.py."""
    shutil.copy(work / "v.pt", work / "bare.pt")
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    texts = [text.format(work=work, traits=ROOT / "data" / "traits") for text in more]
    assert said in refused(capsys, command(work, *texts))
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
