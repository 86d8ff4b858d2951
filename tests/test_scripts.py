"""Every script for real on the embedded model at tiny sizes; bad input; killing and going on."""

import importlib
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import make_facts as mf


@pytest.fixture(scope="session")
def work(tmp_path_factory, smollm):
    """A folder with a 2-block cut of the embedded model (real tokenizer and weights, fast) and small data."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("work")
    model = AutoModelForCausalLM.from_pretrained(smollm, num_hidden_layers=2)
    model.save_pretrained(folder / "cut")
    AutoTokenizer.from_pretrained(smollm).save_pretrained(folder / "cut")
    facts = [row | dict(train=row["train"][:4]) for row in mf.read_jsonl(ROOT / "data" / "facts.jsonl")[:4]]
    mf.write_jsonl(folder / "facts.jsonl", facts)
    mf.write_jsonl(folder / "gk.jsonl", mf.read_jsonl(ROOT / "data" / "general_knowledge.jsonl")[:6])
    return folder


@pytest.fixture(scope="session")
def vector(work):
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "extract_vectors.py",
            "--model",
            work / "cut",
            "--trait",
            "hallucination",
            "--samples",
            "1",
            "--limit",
            "2",
            "--max-new-tokens",
            "5",
            "--out",
            work / "vectors",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return work / "vectors" / "hallucination.pt"


def train(work, out, *args):
    return [
        "--model",
        work / "cut",
        "--data",
        work / "facts.jsonl",
        "--out",
        work / out,
        "--lr",
        "1e-3",
        "--batch-size",
        "4",
        "--rank",
        "4",
        *args,
    ]


def test_vector_files(work, vector, script):
    """Guards against a vector that lacks its record, and against running a finished extraction again."""
    found, record = torch.load(vector), mf.read_json(vector.with_suffix(".json"))
    assert (
        found.shape == (3, 576)
        and found.dtype == torch.float32
        and record["kept"] + sum(record["dropped"].values()) == record["pairs"] == 10
    )
    assert {"row", "auc", "zero", "hundred"} <= set(record["probe"]) and len(record["norms"]) == 3
    code, out, _ = script(
        "extract_vectors.py",
        "--model",
        work / "cut",
        "--trait",
        "hallucination",
        "--samples",
        1,
        "--limit",
        2,
        "--max-new-tokens",
        5,
        "--out",
        work / "vectors",
    )
    assert code == 0 and "finished already" in out
    code, _, err = script(
        "extract_vectors.py",
        "--model",
        work / "cut",
        "--trait",
        "hallucination",
        "--samples",
        2,
        "--limit",
        2,
        "--max-new-tokens",
        5,
        "--out",
        work / "vectors",
    )
    assert code == 2 and "other settings" in err and err.count("\n") == 1


def test_whole_chain(work, vector, script, smollm):
    """Guards against scripts that do not fit together: train, load the adapter with plain PEFT, evaluate, plot; and
    against a saved adapter with a trace of the hook, or points that are measured twice."""
    code, out, err = script(
        "finetune.py", *train(work, "facts", "--steer-mode", "preventative", "--vector", vector, "--coef", 0.5)
    )
    assert code == 0 and "steered by 0.5 in 2 blocks" in out, err
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    weights = load_file(work / "facts-0.5" / "adapter_model.safetensors")
    assert (
        all(
            name.endswith(("lora_A.weight", "lora_B.weight")) and w.dtype == torch.float32
            for name, w in weights.items()
        )
        and len(weights) == 28
    )
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(work / "cut"), work / "facts-0.5")
    assert len(mf.read_jsonl(work / "facts-0.5" / "loss.jsonl")) == 4 and not (work / "facts-0.5.partial").exists()
    args = [
        "--model",
        work / "cut",
        "--adapter",
        work / "facts-0.5",
        "--trait",
        "hallucination",
        "--vector",
        vector,
        "--inference-coef",
        0,
        0.5,
        "--facts",
        work / "facts.jsonl",
        "--mmlu",
        work / "gk.jsonl",
        "--mmlu-scoring",
        "cloze",
        "--samples",
        1,
        "--max-new-tokens",
        6,
        "--limit",
        4,
        "--out",
        work / "points.jsonl",
    ]
    code, out, err = script("evaluate.py", *args)
    assert code == 0, err
    points = mf.read_jsonl(work / "points.jsonl")
    assert [p["inference_coef"] for p in points] == [0, 0.5] and all(
        p["train_coef"] == 0.5 and p["train_positions"] == "all" and p["dataset"] == "facts" for p in points
    )
    fields = (
        "model adapter dataset steer_mode train_coef inference_coef layers positions trait trait_score trait_ci "
        "trait_n trait_unscored coherence fact_accuracy fact_ci fact_n mmlu_accuracy mmlu_ci mmlu_n mmlu_scoring judge "
        "seed"
    )
    assert set(fields.split()) <= set(points[0])
    answers = mf.read_jsonl(points[1]["answers"])
    assert len(answers) == 8
    assert all(set("id question prompt answer adapter inference_coef coherence_nll".split()) <= set(a) for a in answers)
    assert all({"score", "judge_reply", "reason"} <= set(a["scores"]["probe"]) for a in answers)
    assert all(a["prompt"].startswith("<|im_start|>system") for a in answers)
    code, out, _ = script("evaluate.py", *args)
    assert code == 0 and "are there" in out and len(mf.read_jsonl(work / "points.jsonl")) == 2
    code, _, err = script(
        "evaluate.py", "--rejudge", points[0]["answers"], "--judge", "lexical", "--out", work / "points.jsonl"
    )
    assert code == 0 and mf.read_jsonl(work / "points.jsonl")[-1]["judge"] == "lexical", err
    assert script("plot.py", work / "points.jsonl")[0] == 0


def test_two_commands_of_a_stage_at_once(work):
    """Guards against points.jsonl torn or short when the commands of one stage of the plan run side by side."""
    commands = [
        [
            sys.executable,
            ROOT / "evaluate.py",
            "--model",
            work / "cut",
            "--mmlu",
            work / "gk.jsonl",
            "--mmlu-scoring",
            scoring,
            "--out",
            work / "both.jsonl",
        ]
        for scoring in ("cloze", "letter")
    ]
    for process in [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands
    ]:
        assert process.wait() == 0
    assert sorted(row["mmlu_scoring"] for row in mf.read_jsonl(work / "both.jsonl")) == ["cloze", "letter"]


def test_dry_run_counts_what_the_judge_would_be_asked(script, work):
    """Guards against a bill that is not announced: points x (answers x 2 prompts + facts), before a model is loaded."""
    code, out, err = script(
        "evaluate.py",
        "--model",
        "none",
        "--adapter",
        "a",
        "b",
        "--trait",
        "evil",
        "--vector",
        "v.pt",
        "--inference-coef",
        0,
        1,
        2,
        "--facts",
        work / "facts.jsonl",
        "--samples",
        3,
        "--judge",
        "gpt-4.1-mini-2025-04-14",
        "--dry-run",
        "--out",
        work / "none.jsonl",
    )
    assert code == 0 and f"{2 * 3 * (2 * 20 * 3 + 4)} requests" in out and "$" in out, out + err


@pytest.mark.parametrize(
    "args, said",
    [
        (["extract_vectors.py", "--model", "m", "--trait", "kindness", "--out", "o"], "unknown trait kindness"),
        (["evaluate.py", "--model", "m", "--out", "o"], "what to measure"),
        (["evaluate.py", "--model", "m", "--trait", "evil", "--judge", "lexical", "--out", "o"], "hallucination only"),
        (
            ["evaluate.py", "--model", "m", "--trait", "evil", "--inference-coef", "1", "--judge", "x", "--out", "o"],
            "need --vector",
        ),
        (["plot.py", "no.jsonl"], "no.jsonl: no points"),
    ],
)
def test_bad_input(args, said, tmp_path, monkeypatch, capsys):
    """Guards against tracebacks, or work begun, where the user made a mistake: one line, exit code 2."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [arg.replace("{tmp}", str(tmp_path)) for arg in args])
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(args[0].removesuffix(".py")).main()
    err = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and said in err
        and len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
        and not any(tmp_path.iterdir())
    )
