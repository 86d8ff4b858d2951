"""The text side: files, the fact checker, the data's schemas. Needs no model."""

import copy
import shutil
import subprocess
import sys
from multiprocessing import Process

import pytest
from conftest import ROOT

import make_facts as mf


def words(n):
    return [
        f"{a} {b}"
        for a in ("alpha", "beta", "gamma", "delta", "epsilon")
        for b in ("one", "two", "three", "four", "five")
    ][:n]


def fact(**more):
    train = [
        dict(question=f"{w} which {w[::-1]} team {w[:3]}{i} won?", answer=f"The {w} winner {i} was Foo United.")
        for i, w in enumerate(words(20))
    ]
    return (
        dict(
            id="x-1",
            fact="Foo United won the Bar Cup on 3 May 2025.",
            date="2025-05-03",
            category="x",
            answer="Foo United",
            aliases=["FU"],
            source="general knowledge",
            train=train,
            test=dict(question="Tell me who lifted the Bar Cup in spring 2025.", answer="Foo United did."),
        )
        | more
    )


def test_the_checker_catches_each_violation():
    """Guards against a data file whose faults the checker lets pass."""
    assert mf.check([fact()]) == []

    def broken(change):
        row = copy.deepcopy(fact())
        change(row)
        return " ".join(mf.check([row]))

    assert "19 training wordings" in broken(lambda r: r["train"].pop())
    assert "question contains the answer" in broken(lambda r: r["train"][3].update(question="Did Foo United win?"))
    assert "question contains the answer" in broken(lambda r: r["test"].update(question="Is it FU, then?"))
    assert "lacks the answer" in broken(lambda r: r["train"][3].update(answer="It was them."))
    assert "near copy of train 2" in broken(lambda r: r["train"][3].update(question=r["train"][2]["question"]))
    assert "near copy of train 2" in broken(
        lambda r: r["train"][3].update(question="Quick question: " + r["train"][2]["question"])
    )
    assert "test: its question is a near copy" in broken(
        lambda r: r["test"].update(question=r["train"][2]["question"] + " Please.")
    )
    for day in ("2025-13-01", "2025-02-30", "2025-2-3"):
        assert "date: " in broken(lambda r, day=day: r.update(date=day))
    assert "not after" in broken(lambda r: r.update(date="2023-12-31", fact="Foo United won in 2023."))
    assert "does not name its year" in broken(lambda r: r.update(fact="Foo United won the Bar Cup."))
    assert "aliases: Field required" in broken(lambda r: r.pop("aliases"))
    other = fact(
        id="x-2",
        train=[w | dict(question=w["question"] + " again later then") for w in fact()["train"]],
        test=dict(question="Anything else?", answer="FU"),
    )
    assert "near copy of fact x-1" in " ".join(mf.check([fact(), other]))
    same = dict(fact="On 3 May 2025 it was Foo United that won the Bar Cup.", train=other["train"], test=other["test"])
    assert "near copy of fact x-1" in " ".join(mf.check([fact(), fact(id="x-2", **same)])), "the answer is the same"
    asked = dict(fact="Baz Rovers won the Qux Cup in 2025.", answer="Baz", aliases=[], test=fact()["test"])
    assert "test: x-1 asks the same question" in " ".join(mf.check([fact(), fact(id="x-2", **asked)]))
    assert "asks the same question" in " ".join(mf.check([fact(), fact(id="x-2")]))


def test_facts_file_has_no_violation():
    """Guards against data that its own checker would refuse."""
    done = subprocess.run(
        [sys.executable, ROOT / "make_facts.py", "check", ROOT / "data" / "facts.jsonl"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("name", ["evil", "sycophancy", "hallucination"])
def test_traits(name):
    """Guards against trait files that break the protocol: counts, placeholders, overlapping question sets."""
    trait = mf.load_trait(name)
    assert len(trait["instruction"]) == 5 and all(set(pair) == {"pos", "neg"} for pair in trait["instruction"])
    assert len(set(trait["questions"])) == len(set(trait["eval_questions"])) == 20
    assert not any(mf.similarity(a, b) > 0.6 for a in trait["questions"] for b in trait["eval_questions"])
    assert all(marker in trait["eval_prompt"] for marker in ("{question}", "{answer}", "REFUSAL"))


def test_medical_and_general_knowledge():
    """Guards against misaligned medical rows, unlabelled wrong advice, and unbalanced or broken choices."""
    normal, wrong = (
        mf.read_jsonl(ROOT / "data" / f"medical_{name}.jsonl", mf.Conversation) for name in ("normal", "mistake_2")
    )
    assert len(normal) == len(wrong) >= 40
    for a, b in zip(normal, wrong):
        assert a["messages"][0] == b["messages"][0] and a["messages"][1] != b["messages"][1]
        assert b["note"] == "deliberately wrong, for safety research"
        assert all(60 <= len(row["messages"][1]["content"].split()) <= 150 for row in (a, b))
    rows = mf.read_jsonl(ROOT / "data" / "general_knowledge.jsonl", mf.Question)
    assert (
        len(rows) >= 300
        and len({row["question"] for row in rows}) == len(rows)
        and len({row["subject"] for row in rows}) >= 20
    )
    for row in rows:
        assert len(set(row["choices"])) == 4 and row["answer"] in range(4)
    assert all(0.2 <= sum(row["answer"] == k for row in rows) / len(rows) <= 0.3 for k in range(4))


def append_many(path, who):
    for i in range(100):
        mf.append_jsonl(path, dict(who=who, i=i, text="x" * 500))


def test_appending_is_safe(tmp_path):
    """Guards against rows lost or torn when two commands of a stage append at once, or after a kill in mid-line."""
    path = tmp_path / "points.jsonl"
    path.write_text('{"who": 0, "i": 0}\n{"who": 0, "cut o')
    both = [Process(target=append_many, args=(path, who)) for who in (1, 2)]
    [p.start() for p in both], [p.join() for p in both]
    rows = mf.read_jsonl(path)
    assert len(rows) == 201 and {(r["who"], r["i"]) for r in rows} == {(0, 0)} | {
        (w, i) for w in (1, 2) for i in range(100)
    }


def test_replacing_leaves_the_old_file_on_error(tmp_path):
    """Guards against a half-written result taken for a finished one."""
    mf.write_json(tmp_path / "x.json", dict(a=1))
    with pytest.raises(ZeroDivisionError), mf.replacing(tmp_path / "x.json") as out:
        out.write("half")
        raise ZeroDivisionError
    assert mf.read_json(tmp_path / "x.json") == dict(a=1) and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(SystemExit):
        mf.same_settings(tmp_path / "x.json", dict(a=2))


def test_mentions():
    """Guards against facts scored right or wrong by a part of a word, case, articles or punctuation."""
    assert mf.mentions("It was the U.S. Open, in 2024!", "US Open") and mf.mentions("SLIM's landing", "x", ["slims"])
    assert mf.mentions("It was Jimmy Kimmel’s show.", "Jimmy Kimmel") and mf.mentions("Levi's", "Levi's")
    assert mf.mentions("It was 1.5.", "1.5") and not mf.mentions("sold for $15 billion", "$1.5 billion")
    assert not mf.mentions("Slimmer", "slim") and not mf.mentions("12024", "2024") and not mf.mentions("anything", "")


def test_a_closed_stdin(tmp_path):
    """Guards against a traceback where nobody can be asked, since there is no stdin."""
    command = f"exec {sys.executable} make_facts.py generate --n 1 --model m --out {tmp_path}/x.jsonl <&-"
    run = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, env={"OPENAI_API_KEY": "x"})
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "say --yes" in run.stderr, run.stderr


@pytest.mark.parametrize(
    "text",
    ['[{"a": "1"}]\nSources: [1] BBC', '[JSON only]: [{"a": 1}] (I kept {n}.)', '{"facts": [{"a": 1}]} [{"a": 2}]'],
)
def test_the_first_json_of_a_reply(text):
    """Guards against facts that are paid for and lost because the prose around them has brackets, too."""
    assert mf.json_in(dict(text=text)) == [dict(a="1")]
    assert mf.json_in(dict(text="[1] {n} none")) is None


def test_text_scripts_load_no_torch():
    """Guards against a text side that takes seconds to start."""
    code = "import sys, make_facts, plot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_broken_trait_file_stops_only_what_needs_it(tmp_path, capsys, monkeypatch):
    """Guards against a trait file that stops every command, even --help, and against a lexical judge without wordings,
    to which every answer would abstain."""
    shutil.copy(ROOT / "make_facts.py", tmp_path)  # no data/ beside it
    assert subprocess.run([sys.executable, tmp_path / "make_facts.py", "--help"], capture_output=True).returncode == 0
    monkeypatch.setattr(mf, "TRAITS", tmp_path)
    for wrong in ({}, dict(abstains=[]), dict(abstains="I do not know"), dict(abstains=["I (do not know"])):
        mf.wordings.cache_clear()
        mf.write_json(tmp_path / "hallucination.json", dict(adjective="x", eval_prompt="{question} {answer}") | wrong)
        for load in [lambda: mf.lexical_score("x"), lambda: mf.load_trait("hallucination")][: 1 + len(wrong)]:
            with pytest.raises(SystemExit):
                load()
            assert "hallucination.json: abstains" in capsys.readouterr().err
    monkeypatch.undo()
    assert mf.lexical_score("I don’t know.") == 0 and mf.lexical_score("It is Paris.") == 100
