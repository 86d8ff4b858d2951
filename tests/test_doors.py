"""Every input has one door: a wrong one ends in one line that says where and what is wanted, with exit code 2."""

import argparse
import errno
import importlib
import json
import signal
import subprocess
import sys
import time
from datetime import date

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save

import make_facts as mf

USER, ASSISTANT = dict(role="user", content="Hi?"), dict(role="assistant", content="Hello.")
WORDING = dict(question="Who won?", answer="Foo did.")
FACT = dict(id="x-1", answer="Foo", aliases=["F"], train=[WORDING], test=WORDING)
CHOICE = dict(subject="s", question="q?", choices=["a", "b", "c", "d"], answer=1)
TRAIT = dict(
    instruction=[dict(pos="Be so.", neg="Do not.")],
    questions=["q?"],
    eval_questions=["e?"],
    eval_prompt="{question} {answer}",
)
POINT = dict(key="k", model="m", judge="probe", inference_coef=0.0)
ANSWER = dict(id="a", kind="trait", question="q?", answer="")


def without(value, key):
    return {k: v for k, v in value.items() if k != key}


@pytest.fixture
def refused(capsys):
    """Calls f, which must stop with exit code 2 and one line that holds `said`; returns the line."""

    def check(f, *args, said="", **more):
        with pytest.raises(SystemExit) as stop:
            f(*args, **more)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and err.count("\n") == 1, err
        return err

    return check


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    "data, said",
    [
        (b"", "no rows"),
        (b"\n \n", "no rows"),
        ('{"a": "é"}\n'.encode("utf-16"), ":1: not JSON in UTF-8"),
        (b'{"a": 1}\n' + '{"a": "é"}\n'.encode("latin-1"), ":2: not JSON in UTF-8"),
        (bytes(range(256)), "not JSON in UTF-8"),
        (b'{"a": 1}\n{"a": "\\ud83d"}\n', ":2: not JSON"),
        (b'{"a": 1}\n{"a": \n', ":2: not JSON"),
        (b'{"a": 1} {"a": 2}\n', ":1: not JSON"),
        (b"[" * 100_000, ":1: not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", ":1: not JSON"),
        (b"[1]\n", ":1: not a JSON object"),
        (b"null\n", ":1: not a JSON object"),
        (b'[\n{"a": 1}\n]\n', ":1: not JSON"),
    ],
    ids=str,
)
def test_files_that_are_no_jsonl(data, said, tmp_path, refused):
    """Guards against tracebacks from other encodings, binary files, half surrogate pairs and deep nesting."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(data)
    refused(mf.read_jsonl, path, said=f"{path}")
    refused(mf.read_jsonl, path, said=said)


def test_files_that_cannot_be_read(tmp_path, refused):
    """Guards against a traceback from a folder or nothing where a file is wanted."""
    for read in (mf.read_json, mf.read_jsonl):
        refused(read, tmp_path, said="is a directory")
        refused(read, tmp_path / "no", said="no such file")
    refused(mf.fingerprint, tmp_path / "no", said="no such file")
    refused(mf.read_json, jsonl(tmp_path / "x.json", [1]), mf.Settings, said="valid dictionary")


def test_what_is_read_though_unusual(tmp_path):
    """Guards against refusing a byte-order mark, Windows line ends, line separators and surrogate pairs."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n' + '{"a": "\u2028"}\r\n{"a": "\\ud83d\\ude00"}'.encode())
    assert [row["a"] for row in mf.read_jsonl(path)] == [1, "\u2028", "😀"]
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert mf.read_json(path) == dict(a=1)


@pytest.mark.parametrize(
    "tail, rows", [(b'{"a": 2}', 3), (b'{"a": {"b": 2}', 2), (b'{"a": "\xc3', 2), (b"", 2), (b'{"a": 2}\n', 3)]
)
def test_the_last_row_of_a_growing_file(tail, rows, tmp_path):
    """Guards against losing a whole last row that has no line end, and against keeping half of one."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n' + tail)
    assert len(mf.read_jsonl(path, appended=True)) == rows - 1
    mf.append_jsonl(path, dict(a=3))
    assert [row["a"] for row in mf.read_jsonl(path)] == [1, 2, 3][: rows - 1] + [3] * (rows == 2) or rows == 3
    assert len(mf.read_jsonl(path)) == rows and path.read_bytes().endswith(b'{"a": 3}\n')


def test_a_text_of_somebody_else_is_no_row_cut_off(tmp_path, refused):
    """Guards against the loss of a file that --out was not meant for: what is no row is cut off by the next append."""
    (tmp_path / "x.jsonl").write_text("notes")
    refused(mf.read_jsonl, tmp_path / "x.jsonl", appended=True, said=":1: not JSON")


def test_half_a_surrogate_pair_is_written_as_a_question_mark(tmp_path):
    """Guards against losing a server's reply, and the run, for one broken character in it."""
    mf.append_jsonl(tmp_path / "x.jsonl", dict(a="\ud83d!"))
    mf.write_jsonl(tmp_path / "y.jsonl", [dict(a="\ud83d!")])
    assert mf.read_jsonl(tmp_path / "x.jsonl") == mf.read_jsonl(tmp_path / "y.jsonl") == [dict(a="?!")]


# ---------------------------------------------------------------------------------------------------------------------
# Schemas

WRONG_ROWS = [
    *(
        (mf.Conversation, dict(messages=messages), said)
        for messages, said in [
            (None, "messages: "),
            ("text", "messages: "),
            ([], "messages: "),
            ([USER], "end with an assistant turn"),
            ([ASSISTANT, USER], "must begin with the user"),
            ([ASSISTANT], "must begin with the user"),
            ([USER, dict(role="system", content="s"), ASSISTANT], "one system message"),
            ([dict(role="system", content="s"), ASSISTANT], "must begin with the user"),
            ([USER, dict(role="assistant", content="")], "empty turn"),
            ([dict(role="user", content=" "), ASSISTANT], "empty turn"),
            ([USER, dict(role="assistant", content=None)], "messages.1.content"),
            ([USER, dict(role="assistant", content=42)], "messages.1.content"),
            ([USER, dict(role="assistant")], "messages.1.content"),
            ([USER, dict(content="x")], "messages.1.role"),
            ([USER, dict(role="bot", content="x")], "messages.1.role"),
            ([dict(role="user", content=[dict(type="text", text="Hi?")]), ASSISTANT], "messages.0.content"),
            ([USER, ASSISTANT | dict(tool_calls=[dict(id="1")])], "messages.1.tool_calls"),
            ([USER, dict(role="tool", content="x"), ASSISTANT], "messages.1.role"),
            ([USER, "Hello."], "messages.1"),
        ]
    ),
    (mf.Conversation, dict(instruction="Say hi", output="Hi"), "messages: Field required"),
    (mf.Fact, FACT | dict(answer=42), "answer: "),
    (mf.Fact, FACT | dict(answer="?!"), "answer: String should match"),
    (mf.Fact, FACT | dict(answer=None), "answer: "),
    (mf.Fact, FACT | dict(aliases="42"), "aliases: "),
    (mf.Fact, FACT | dict(aliases=None), "aliases: "),
    (mf.Fact, FACT | dict(aliases=[1]), "aliases.0"),
    (mf.Fact, FACT | dict(aliases=[""]), "aliases.0"),
    (mf.Fact, FACT | dict(train=[]), "train: "),
    (mf.Fact, FACT | dict(train=[dict(question="q?")]), "train.0.answer"),
    (mf.Fact, FACT | dict(train="q?"), "train: "),
    (mf.Fact, FACT | dict(test=[WORDING]), "test: "),
    (mf.Fact, FACT | dict(id=7), "id: "),
    *((mf.Fact, without(FACT, key), f"{key}: Field required") for key in ("id", "answer", "train", "test")),
    *(
        (mf.Question, CHOICE | dict(answer=answer), "none of the 4 choices")
        for answer in (4, -1, None, "E", "4", 1.5, [1], True)
    ),
    (mf.Question, CHOICE | dict(answer="the second"), "none of the 4 choices"),
    (mf.Question, CHOICE | dict(choices=["a"]), "choices: "),
    (mf.Question, CHOICE | dict(choices=list("abcdefghijk")), "choices: "),
    (mf.Question, CHOICE | dict(choices="abcd"), "choices: "),
    (mf.Question, CHOICE | dict(choices=["a", "b", 3, "d"]), "choices.2"),
    (mf.Question, CHOICE | dict(question=None), "question: "),
    *((mf.Question, without(CHOICE, key), f"{key}: ") for key in CHOICE),
    *((mf.Point, without(POINT, key), f"{key}: Field required") for key in POINT),
    *((mf.Point, POINT | dict(inference_coef=value), "inference_coef: ") for value in (None, "1", float("nan"), True)),
    (mf.Point, POINT | dict(trait_score="high"), "trait_score: "),
    (mf.Point, POINT | dict(key=1), "key: "),
    (mf.Point, POINT | dict(trait_ci=[1.0]), "trait_ci"),
    (mf.Point, POINT | dict(trait_n=["many"]), "trait_n"),
    (mf.Point, POINT | dict(adapter=7), "adapter"),
    (mf.Answer, ANSWER | dict(scores=dict(probe=dict(score="high"))), "scores.probe.score"),
    (mf.Loss, dict(step=1, loss=None), "loss: "),
    (mf.Answer, ANSWER | dict(kind="x"), "kind: "),
    (mf.Answer, ANSWER | dict(answer=None), "answer: "),
    (mf.Answer, without(ANSWER, "id"), "id: "),
    (mf.Settings, dict(), "model: "),
    (mf.Settings, dict(model=1), "model: "),
    (mf.Settings, dict(model="m", inputs="x"), "inputs: "),
    (mf.Settings, dict(model="m", probe=dict(row=0, zero=0.0, hundred=1.0, auc=1.0)), "probe.row"),
    (mf.Settings, dict(model="m", probe=dict(row=1)), "probe.zero"),
    (mf.Settings, dict(model="m", probe=dict(row=1, first=-3, zero=0.0, hundred=1.0, auc=1.0)), "probe.first"),
]


@pytest.mark.parametrize("schema, row, said", WRONG_ROWS, ids=[str(n) for n in range(len(WRONG_ROWS))])
def test_wrong_rows(schema, row, said, tmp_path, refused):
    """Guards against a wrong type or value that becomes a traceback later, or a wrong number ("2" is in "42")."""
    good = {mf.Conversation: dict(messages=[USER, ASSISTANT]), mf.Fact: FACT | dict(id="x-0"), mf.Question: CHOICE}
    good |= {mf.Point: POINT, mf.Answer: ANSWER | dict(id="z"), mf.Settings: dict(model="m")}
    good |= {mf.Loss: dict(step=0, loss=1)}
    path = jsonl(tmp_path / "x.jsonl", good[schema], row)
    refused(mf.read_jsonl, path, schema, said=f"{path}:2: ")
    refused(mf.read_jsonl, path, schema, said=said)


def test_right_rows(tmp_path):
    """Guards against schemas that refuse what is in use: letters, digits in quotes, 2 to 10 choices, further keys."""
    rows = [CHOICE | dict(answer=a, note="kept") for a in (1, "1", "B", " b ")]
    found = mf.read_jsonl(jsonl(tmp_path / "x.jsonl", *rows), mf.Question)
    assert [row["answer"] for row in found] == [1] * 4 and found[0] == rows[0] and list(found[0]) == list(rows[0])
    for n in (2, 10):
        row = CHOICE | dict(choices=list("abcdefghij")[:n], answer="ABCDEFGHIJ"[n - 1])
        assert mf.read_jsonl(jsonl(tmp_path / "x.jsonl", row), mf.Question)[0]["answer"] == n - 1
    system = dict(role="system", content="")
    path = jsonl(
        tmp_path / "x.jsonl", dict(messages=[system, USER, ASSISTANT, USER, ASSISTANT | dict(tool_calls=None)]), FACT
    )
    assert [len(chat) for chat in mf.read_chats(path)] == [5, 2]
    assert mf.read_chats(path)[1] == [dict(role="user", content="Who won?"), dict(role="assistant", content="Foo did.")]
    for path in ROOT.glob("data/reference/*/points.jsonl"):
        mf.read_jsonl(path, mf.Point)
    (
        mf.read_jsonl(ROOT / "data" / "facts.jsonl", mf.Fact),
        mf.read_jsonl(ROOT / "data" / "general_knowledge.jsonl", mf.Question),
    )


def test_ids_are_used_once(tmp_path, refused):
    """Guards against counting a fact or an answer twice."""
    refused(mf.read_jsonl, jsonl(tmp_path / "x.jsonl", FACT, FACT), mf.Fact, said=":2: id 'x-1' is that of line 1")
    refused(mf.read_chats, tmp_path / "x.jsonl", said="id 'x-1'")


@pytest.mark.parametrize(
    "schema, trait, said",
    [
        (mf.ExtractionTrait, without(TRAIT, "instruction"), "instruction: "),
        (mf.ExtractionTrait, without(TRAIT, "questions"), "questions: "),
        (mf.ExtractionTrait, TRAIT | dict(questions=[]), "questions: "),
        (mf.ExtractionTrait, TRAIT | dict(questions="q?"), "questions: "),
        (mf.ExtractionTrait, TRAIT | dict(questions=[1]), "questions.0"),
        (mf.ExtractionTrait, TRAIT | dict(instruction=[dict(pos="x")]), "instruction.0.neg"),
        (mf.ExtractionTrait, TRAIT | dict(instruction=["Be so."]), "instruction.0"),
        (mf.ExtractionTrait, TRAIT | dict(adjective=""), "adjective: String should match"),
        (mf.EvaluationTrait, without(TRAIT, "eval_questions"), "eval_questions: "),
        (mf.EvaluationTrait, TRAIT | dict(eval_questions=[]), "eval_questions: "),
        (mf.EvaluationTrait, without(TRAIT, "eval_prompt"), "eval_prompt: "),
        (mf.EvaluationTrait, TRAIT | dict(eval_prompt="{question}"), "should match pattern"),
        (mf.EvaluationTrait, TRAIT | dict(eval_prompt="{answer}"), "should match pattern"),
        (mf.EvaluationTrait, TRAIT | dict(eval_prompt=["{question} {answer}"]), "eval_prompt: "),
        (mf.EvaluationTrait, [TRAIT], "valid dictionary"),
        (mf.EvaluationTrait, "trait", "valid dictionary"),
    ],
)
def test_trait_files(schema, trait, said, tmp_path, refused):
    """Guards against prompts without the answer in them (one score for all), and one set of questions for both."""
    mf.write_json(tmp_path / "x.json", trait)
    refused(mf.load_trait, "x", tmp_path / "x.json", schema, said=said)


def test_trait_names_and_published_files(tmp_path, refused):
    """Guards against the judge's own prompts taken for traits, and a published extraction file taken for evaluation."""
    for name in ("coherence", "fact"):
        refused(mf.load_trait, name, None, mf.EvaluationTrait, said="eval_questions")
        refused(mf.load_trait, name, None, mf.ExtractionTrait, said="instruction")
    for name in ("nope", "../facts", "a/b", ""):
        refused(mf.load_trait, name, None, mf.EvaluationTrait, said=f"unknown trait {name}")
    mf.write_json(tmp_path / "x.json", TRAIT)
    refused(mf.load_trait, "a/b", tmp_path / "x.json", said="unknown trait a/b")  # it names files
    published = without(TRAIT, "eval_questions")
    for folder, fine in (("trait_data_eval", True), ("trait_data_extract", False), ("mine", False)):
        mf.write_json(tmp_path / folder / "x.json", published)
        mf.load_trait("x", tmp_path / folder / "x.json", mf.ExtractionTrait)
        if fine:
            trait = mf.load_trait("x", tmp_path / folder / "x.json", mf.EvaluationTrait)
            assert trait["eval_questions"] == ["q?"] and trait["adjective"] == trait["trait"] == "x"
        else:
            refused(mf.load_trait, "x", tmp_path / folder / "x.json", mf.EvaluationTrait, said="eval_questions")


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize(
    "kind, wrong, right",
    [
        (
            mf.whole(),
            ["0", "-1", "1.5", "nan", "inf", "1e3", "x", "", "9" * 5000, "1000000001"],
            ["1", "32", "1000000000"],
        ),
        (mf.whole(0), ["-1"], ["0", "4"]),
        (mf.number(0, 5), ["-0.1", "5.1", "nan", "inf", "-inf", "1e999", "x", ""], ["0", "1e-5", "5"]),
        (mf.number(1e-9, 1), ["0", "-0", "-1", "1.1"], ["1", "1e-9"]),
        (mf.coefficient, ["nan", "inf", "1e4", "-1e4", "one"], ["0", "-1.5", "1000"]),
        (
            mf.layer_choice,
            ["1-2-3", "0", "0-3", "5-3", "-3", "3-", "a", "", "ALL", "1,2", "1.5"],
            ["all", "7", "3-7", "3-3"],
        ),
        (date.fromisoformat, ["2025", "2025-13-01", "x", ""], ["2025-01-31"]),
    ],
    ids=["whole", "from 0", "number", "tiny", "coefficient", "layers", "day"],
)
def test_argparse_types(kind, wrong, right, refused):
    """Guards against NaN, infinite, negative, huge and misspelt numbers taken for settings."""
    parser = mf.Parser()
    parser.add_argument("--x", type=kind)
    for value in wrong:
        refused(parser.parse_args, [f"--x={value}"], said="argument --x: ")
    assert all(parser.parse_args([f"--x={value}"]).x is not None for value in right)
    assert str(mf.coefficient("-0")) == "0.0"


def test_outputs(tmp_path, refused, monkeypatch):
    """Guards against overwriting an input, and against hours of work that cannot be written."""
    file, folder = jsonl(tmp_path / "x.jsonl", FACT), tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(file)
    refused(mf.check_output, file, None, file, said="is an input")
    refused(mf.check_output, tmp_path / "link", file, said="is an input")
    refused(mf.check_output, tmp_path / "folder" / ".." / "x.jsonl", file, said="is an input")
    refused(mf.check_output, folder / "new" / "y", folder, said="or in one")
    refused(mf.check_output, file / "y", said="is a file")
    refused(mf.check_output, file / "a" / "y", folder=True, said="is a file")
    refused(mf.check_output, folder, said="is a folder")
    refused(mf.check_output, file, folder=True, said="is a file")
    mf.check_output(file), mf.check_output(folder / "new" / "y"), mf.check_output(folder, folder=True)
    mf.check_output(folder / "new", folder=True), mf.check_output("y.jsonl", file)
    refused(mf.check_output, "/dev/null", said="is a file")  # as root it would be replaced by one
    monkeypatch.setattr(mf.os, "access", lambda path, mode: path == file)
    refused(mf.check_output, folder / "new" / "y", said=f"cannot write to {folder}")


COMMANDS = dict(
    make_facts=[
        "check no.jsonl",
        "check .",
        "check latin.jsonl",
        "check twice.jsonl",
        "check x.jsonl --rephrasings 0",
        "check x.jsonl --after 2024",
        "subset x.jsonl --n 0 --out y.jsonl",
        "subset x.jsonl --n -1 --out y.jsonl",
        "subset x.jsonl --n 1e3 --out y.jsonl",
        "subset x.jsonl --n 99999999999 --out y.jsonl",
        "subset x.jsonl --n 1 --seed -1 --out y.jsonl",
        "subset x.jsonl --n 1 --rephrasings 0 --out y.jsonl",
        "subset x.jsonl --n 1 --out x.jsonl",
        "subset x.jsonl --n 1 --out ./x.jsonl",
        "subset x.jsonl --n 1 --out x.jsonl/y",
        "subset x.jsonl --n 1 --out .",
        "subset bad.jsonl --n 1 --out y.jsonl",
        "subset x.jsonl --n 1",
        "generate --model m --n 0 --out y.jsonl",
        "generate --model m --n nan --out y.jsonl",
        "generate --model m --after x --out y.jsonl",
        "generate --model m --rephrasings -3 --out y.jsonl",
        "generate --model m --concurrency 0 --out y.jsonl",
        "generate --model m --out .",
        "generate --model m --out x.jsonl/y",
        "generate --model m --out bad.jsonl",
        "generate --out y.jsonl",
        "",
        "nothing",
    ],
    extract_vectors=[
        "--model model --out out",
        "--trait evil --out out",
        "--model model --trait evil",
        *(
            f"--model model --out out --{rest}"
            for rest in (
                "trait nope",
                "trait coherence",
                "trait fact",
                "trait x --trait-file no.json",
                "trait x --trait-file .",
                "trait x --trait-file latin.jsonl",
                "trait x --trait-file evaluation.json",
                "trait x/y --trait-file trait.json",
                "trait evil --judge lexical",
                "trait evil --samples 0",
                "trait evil --samples 1.5",
                "trait evil --samples 99999999",
                "trait evil --limit 0",
                "trait evil --limit 1",
                "trait evil --limit -1",
                "trait evil --temperature -1",
                "trait evil --temperature nan",
                "trait evil --temperature inf",
                "trait evil --max-new-tokens 0",
                "trait evil --max-new-tokens 1e99",
                "trait evil --first -1",
                "trait evil --seed -1",
                "trait evil --seed x",
                "trait evil --judge m",  # no key
                "trait evil --judge probe",
                "trait evil --concurrency 0",
                "trait evil --concurrency -4",
                "trait evil --out x.jsonl",
                "trait evil --export-gguf out/evil.pt",
                "trait evil --out x.jsonl/out",
                "trait evil --out model",
                "trait evil --out model/out",
                "trait evil --model no",
            )
        ),
    ],
    finetune=[
        "--model model --out out --steer-mode none",
        "--data x.jsonl --out out --steer-mode none",
        "--model model --data x.jsonl --out out",
        *(
            f"--model model --data x.jsonl --out out --steer-mode none --{rest}"
            for rest in (
                "data no.jsonl",
                "data .",
                "out .",
                "data latin.jsonl",
                "data bad.jsonl",
                "data twice.jsonl",
                "data mmlu.jsonl",
                "data empty.jsonl",
                "vector v.pt",
                "coef 1",
                "positions answer",
                "steer-mode both",
                "steer-mode preventative",
                "steer-mode preventative --vector v.pt",
                "steer-mode preventative --vector v.pt --coef",
                "steer-mode preventative --vector v.pt --coef nan",
                "steer-mode preventative --vector v.pt --coef inf",
                "steer-mode preventative --vector v.pt --coef 1e9",
                "steer-mode preventative --vector v.pt --coef 0.5 0.50",
                "steer-mode preventative --vector v.pt --coef 0.5 0.5000000001",
                "steer-mode preventative --vector no.pt --coef 1",
                "steer-mode preventative --vector v.pt --coef 1 --layers 1-2-3",
                "steer-mode preventative --vector v.pt --coef 1 --layers 0",
                "epochs 0",
                "epochs -1",
                "epochs nan",
                "epochs 1e9",
                "lr 0",
                "lr -1e-5",
                "lr inf",
                "lr 1e5",
                "batch-size 0",
                "batch-size 1.5",
                "rank 0",
                "rank -8",
                "rank 999999",
                "alpha 0",
                "alpha x",
                "max-steps 0",
                "limit 0",
                "limit -3",
                "seed -1",
                "seed 99999999999999",
                "out x.jsonl",
                "out x.jsonl/a",
                "out model",
                "out adapter",
                "out begun",
                "model no",
            )
        ),
    ],
    evaluate=[
        "--model model --out p.jsonl",
        "--out p.jsonl --facts x.jsonl",
        "--model model --facts x.jsonl",
        *(
            f"--model model --out p.jsonl --{rest}"
            for rest in (
                "trait evil",  # the probe needs a vector
                "trait evil --judge lexical",
                "trait nope --judge m",
                "trait coherence --judge m",
                "trait x --trait-file trait.json --judge lexical",
                "trait x --trait-file no.json --judge m",
                "trait x --trait-file latin.jsonl --judge m",
                "trait x --trait-file extract/x.json --judge m",
                "facts no.jsonl",
                "facts .",
                "facts latin.jsonl",
                "facts bad.jsonl",
                "facts twice.jsonl",
                "facts mmlu.jsonl",
                "mmlu no.jsonl",
                "mmlu x.jsonl",
                "mmlu outside.jsonl",
                "mmlu mmlu.jsonl --mmlu-scoring number",
                "facts x.jsonl --inference-coef 1",
                "facts x.jsonl --vector v.pt --inference-coef nan",
                "facts x.jsonl --vector v.pt --inference-coef inf",
                "facts x.jsonl --vector v.pt --inference-coef 1e9",
                "facts x.jsonl --vector v.pt --inference-coef 1 1.0",
                "facts x.jsonl --vector v.pt --inference-coef",
                "facts x.jsonl --vector no.pt --inference-coef 1",
                "facts x.jsonl --vector v.pt --inference-coef 1 --layers 1-2-3",
                "facts x.jsonl --vector v.pt --inference-coef 1 --layers 0",
                "facts x.jsonl --vector v.pt --inference-coef 1 --layers 5-3",
                "facts x.jsonl --vector v.pt --inference-coef 1 --positions some",
                "trait evil --vector no.pt",
                "trait evil --vector v.pt",  # no .json with a probe beside it
                "trait evil --vector w.pt",  # a .json without a model
                "facts x.jsonl --judge m",  # no key
                "facts x.jsonl --judge none",
                "facts x.jsonl --judge m,n",
                "facts x.jsonl --samples 0",
                "facts x.jsonl --temperature -0.1",
                "facts x.jsonl --temperature nan",
                "facts x.jsonl --max-new-tokens -5",
                "facts x.jsonl --limit 0",
                "facts x.jsonl --seed -1",
                "facts x.jsonl --adapter",
                "facts x.jsonl --adapter no",
                "facts x.jsonl --adapter x.jsonl",
                "facts x.jsonl --adapter no-settings",
                "facts x.jsonl --adapter other-model",
                "facts x.jsonl --adapter bad-settings",
                "facts x.jsonl --out x.jsonl",
                "facts x.jsonl --out ./x.jsonl",
                "facts x.jsonl --out x.jsonl/p",
                "facts x.jsonl --out .",
                "facts x.jsonl --out adapter/p.jsonl --adapter adapter",
                "facts x.jsonl --out latin.jsonl",
                "facts x.jsonl --out keyless.jsonl",
                "facts x.jsonl --model no",
                "respond-to no.jsonl",
                "respond-to latin.jsonl",
                "respond-to mmlu.jsonl",
                "respond-to chat.jsonl --out chat.jsonl",
                "rejudge no.jsonl --judge lexical",
                "rejudge x.jsonl --judge lexical",
                "rejudge latin.jsonl --judge lexical",
                "rejudge answers.jsonl --judge probe",
                "rejudge answers.jsonl --judge lexical --out x.jsonl",
            )
        ),
    ],
    plot=[
        "",
        "no.jsonl",
        ".",
        "latin.jsonl",
        "x.jsonl",
        "keyless.jsonl",
        "none.jsonl",
        "differ.jsonl",
        "answered/p.jsonl",
    ],
)


def test_judges(refused, monkeypatch):
    """Guards against hours of sampling for a judge that cannot be asked."""
    args = argparse.Namespace(judge="m", trait="evil", yes=True)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    refused(mf.check_asking, args, said="set OPENAI_API_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    mf.check_asking(args)
    refused(mf.check_asking, argparse.Namespace(**vars(args) | dict(yes=False)), said="say --yes")
    for wrong, said in (
        (dict(judge="none"), "--judge none: give probe"),
        (dict(judge=""), "--judge : give probe"),
        (dict(judge="lexical"), "hallucination only"),
    ):
        refused(mf.check_judge, argparse.Namespace(**vars(args) | wrong), "probe", said=said)
    for right in (dict(judge="probe"), dict(judge="lexical", trait=None), dict(judge="org/model-4.1:free")):
        mf.check_judge(argparse.Namespace(**vars(args) | right), "probe")
    mf.check_asking(argparse.Namespace(judge="probe", yes=False))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with inputs, right and wrong ones; no model is loaded and no request is sent from here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False), monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(mf.Chat, "ask", lambda *_: pytest.fail("a request would have been sent"))
    jsonl(tmp_path / "x.jsonl", FACT)
    jsonl(tmp_path / "bad.jsonl", FACT | dict(train=None))
    (tmp_path / "latin.jsonl").write_bytes('{"messages": "é"}\n'.encode("latin-1"))
    mf.write_json(tmp_path / "trait.json", TRAIT)
    mf.write_json(tmp_path / "evaluation.json", without(TRAIT, "instruction"))
    mf.write_json(tmp_path / "extract" / "x.json", without(TRAIT, "eval_questions"))
    mf.write_json(tmp_path / "model" / "config.json", dict(model_type="qwen2"))
    jsonl(tmp_path / "twice.jsonl", FACT, FACT)
    jsonl(tmp_path / "mmlu.jsonl", CHOICE)
    jsonl(tmp_path / "outside.jsonl", CHOICE | dict(answer=4))
    jsonl(tmp_path / "chat.jsonl", dict(messages=[USER, ASSISTANT]))
    jsonl(tmp_path / "keyless.jsonl", without(POINT, "key"))
    jsonl(tmp_path / "answers.jsonl", ANSWER)
    jsonl(tmp_path / "none.jsonl")
    jsonl(tmp_path / "differ.jsonl", POINT, POINT | dict(temperature=2.0))
    mf.write_json(tmp_path / "answered" / "answers" / "k.jsonl", [ANSWER])
    jsonl(tmp_path / "answered" / "p.jsonl", POINT)
    jsonl(tmp_path / "empty.jsonl", dict(messages=[USER, dict(role="assistant", content="")]))
    mf.write_json(
        tmp_path / "begun.partial" / "training_settings.json", dict(model="model", lr=1.0, inputs=dict(data="x"))
    )
    (tmp_path / "begun.partial" / "checkpoint.pt").write_bytes(b"begun")
    for name in ("v.pt", "w.pt"):
        (tmp_path / name).write_bytes(b"vector")
    mf.write_json(tmp_path / "w.json", dict(probe=dict(row=1, zero=0.0, hundred=1.0, auc=1.0)))
    settings, lora = dict(model="model", coef=None), dict(peft_type="LORA", r=1, target_modules=["w"])
    weights = save(dict(w=np.ones(3, np.float32)))
    for name, change in {
        "adapter": {},
        "no-settings": dict(settings=None),
        "other-model": dict(settings=settings | dict(model="other")),
        "bad-settings": dict(settings=settings | dict(model=None)),
    }.items():
        made = dict(settings=settings, lora=lora, weights=weights) | change
        for file, content in zip(
            ("training_settings.json", "adapter_config.json", "adapter_model.safetensors"), made.values()
        ):
            if content is not None:
                (tmp_path / name).mkdir(exist_ok=True)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                (tmp_path / name / file).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("script, command", [(script, command) for script in COMMANDS for command in COMMANDS[script]])
def test_commands(script, command, place, refused, monkeypatch):
    """Guards against a wrong command that loads a model, sends or writes something, or ends in a traceback."""
    module = importlib.import_module(script)
    monkeypatch.setattr("extract_vectors.load_model", lambda *_: pytest.fail("a model would have been loaded"))
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    refused(module.main, command.split())
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before


# ---------------------------------------------------------------------------------------------------------------------
# How a command ends


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopping(number, code):
    """Guards against a page of traceback on Ctrl-C or kill, and against a wrong exit code."""
    code_of = "import make_facts, time; make_facts.run(lambda _: (print('on', flush=True), time.sleep(60)))"
    process = subprocess.Popen([sys.executable, "-c", code_of], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    process.stdout.readline()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (
        process.returncode == code
        and err == "error: stopped; what is finished is kept, the same command goes on from here\n"
    )


def test_what_the_file_system_refuses(refused, monkeypatch):
    """Guards against a traceback from a full disk; torch and safetensors report it by errors of their own."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def raising(error, context=None):
        error.__context__ = context

        def main(_):
            raise error

        return main

    full = OSError(errno.ENOSPC, "No space left on device")
    for error in (
        raising(full),
        raising(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), full),
        raising(RuntimeError("unexpected pos 576 vs 534"), RuntimeError("basic_ios::clear: iostream error")),
        raising(Exception("Error while serializing: I/O error: No space left on device (os error 28)")),
    ):
        refused(mf.run, error, said="no space left on device; what is finished is kept")
    refused(
        mf.run,
        raising(PermissionError(errno.EACCES, "Permission denied", "x.jsonl")),
        said="x.jsonl: permission denied",
    )
    for error in (
        KeyError("x"),
        RuntimeError("x"),
        OSError(errno.ECONNREFUSED, "x"),
        FileNotFoundError(errno.ENOENT, "x"),
    ):
        with pytest.raises(type(error)):
            mf.run(raising(error))


# ---------------------------------------------------------------------------------------------------------------------
# What a result was made from


def test_fingerprint(tmp_path, monkeypatch):
    """Guards against a changed input that goes unnoticed, and against minutes of reading for a large model."""
    file = tmp_path / "x"
    file.write_bytes(bytes(200_000))
    one = mf.fingerprint(file)
    assert one == mf.fingerprint(file.rename(tmp_path / "y"))
    file.write_bytes(bytes(200_001))
    assert mf.fingerprint(file) != one
    for byte in (0, 65_536, 199_999):
        data = bytearray(200_000)
        data[byte] = 1
        file.write_bytes(data)
        assert mf.fingerprint(file) != one
    monkeypatch.setattr(mf, "WHOLE", 100_000_000)
    with open(file, "wb") as large:
        large.truncate(8 << 30)  # sparse
    start, whole = time.time(), mf.fingerprint(file)
    assert time.time() - start < 5
    for byte in (0, (8 << 30) - 1):
        with open(file, "r+b") as large:
            large.seek(byte)
            large.write(b"1")
        whole, before = mf.fingerprint(file), whole
        assert whole != before


def test_same_settings(tmp_path, refused, capsys, monkeypatch):
    """Guards against a result taken for finished that was made from other data or with other settings."""
    path, settings = (
        tmp_path / "x.json",
        dict(lr=1e-5, max_new_tokens=3, coef=None, inputs=dict(data="d", trait_file="t")),
    )
    assert mf.same_settings(path, settings) is False
    mf.write_json(path, settings | dict(scripts=mf.scripts(), steps=3))
    assert mf.same_settings(path, settings) is True and not capsys.readouterr().out
    refused(
        mf.same_settings,
        path,
        settings | dict(inputs=dict(data="e", trait_file="t")),
        said="--data: content has changed",
    )
    refused(
        mf.same_settings, path, settings | dict(inputs=dict(data="d", trait_file="u")), said="--trait-file: content"
    )
    refused(mf.same_settings, path, settings | dict(max_new_tokens=4), said="--max-new-tokens 3 there, 4 here")
    more = dict(inputs=settings["inputs"] | dict(vector="v"))
    refused(mf.same_settings, path, settings | more, said="--vector: content has changed")
    assert "--redo" in refused(
        mf.same_settings, path, settings | dict(lr=1.0, coef=0.5), said="--coef None there, 0.5 here"
    )
    monkeypatch.setattr(mf, "scripts", lambda: {"finetune.py": "other"})
    assert mf.same_settings(path, settings) and "make_facts.py" in capsys.readouterr().out
    made = [tmp_path / "x.pt", tmp_path / "not made"]
    made[0].touch()
    monkeypatch.setattr(mf, "ASIDE", str(tmp_path / "aside"))  # --redo: edited scripts count, nothing is deleted
    assert not mf.same_settings(path, settings, path, *made) and "make_facts.py was edited" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "aside").rglob("x.*")) == ["x.json", "x.pt"] and not made[0].exists()
    monkeypatch.setattr(mf, "ASIDE", None)
    mf.write_json(path, [settings])
    refused(mf.same_settings, path, settings, said="valid dictionary")
    mf.write_json(path, without(settings, "inputs"))
    refused(mf.same_settings, path, settings, said="--data: content has changed")


def test_rows_are_moved_while_others_append(tmp_path):
    """Guards against a point that is lost because another process appends it to a file that is being replaced."""
    path, to = tmp_path / "points.jsonl", tmp_path / "aside" / "points.jsonl"
    code = f"import make_facts as mf\nfor n in range(300): mf.append_jsonl({str(path)!r}, dict(n=n, key=str(n % 3)))"
    mf.append_jsonl(path, dict(n=-1, key="0"))
    writers = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        mf.move_rows(path, lambda row: row["key"] == "0", to)
    mf.move_rows(path, lambda row: row["key"] == "0", to)
    kept, moved = mf.read_jsonl(path), mf.read_jsonl(to)
    assert {row["key"] for row in moved} == {"0"} and {row["key"] for row in kept} == {"1", "2"}
    assert sorted(row["n"] for row in kept + moved) == sorted([-1, *range(300), *range(300)])


def test_one_process_an_output(tmp_path):
    """Guards against two processes that make the same output, and against a lock that a crash leaves behind."""
    hold = "print('in', flush=True); sys.stdin.read(1); os._exit(9)"
    code = f"import os, sys, make_facts as mf\nwith mf.locked({str(tmp_path / 'out')!r}): {hold}"
    start = [sys.executable, "-c", code]
    first = subprocess.Popen(start, cwd=ROOT, stdin=-1, stdout=-1, text=True)
    assert first.stdout.readline() == "in\n"
    second = subprocess.run(start, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2 and "another process" in second.stderr and second.stderr.count("\n") == 1
    first.communicate("x")  # ends without tidying up
    with mf.locked(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_an_answer_that_is_another_choices_text(refused):
    """Guards against "3" among the choices 1, 2, 3, 4 taken for the fourth one."""
    row = dict(subject="s", question="2+1?", choices=["1", "2", "3", "4"], answer="3")
    refused(mf.validated, row, mf.Question, "x:1", said="none of the 4 choices")
    for answer, number in ((3, 3), ("C", 2)):
        assert mf.validated(row | dict(answer=answer), mf.Question, "x:1")["answer"] == number


def test_aside_stays_in_the_folder(tmp_path, monkeypatch):
    """Guards against --redo with an OUT such as ../y that moves outputs beside the folder it names."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    mf.write_json("../y/adapters/a.json", {})
    monkeypatch.setattr(mf, "ASIDE", "../y/before-1")
    mf.outdated("other facts", "../y/adapters/a.json", "../y/none")
    assert [str(path) for path in (tmp_path / "y").rglob("*.json")] == [str(tmp_path / "y/before-1/adapters/a.json")]
