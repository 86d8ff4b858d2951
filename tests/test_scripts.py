"""Every script for real on the embedded model at tiny sizes; bad input; killing and going on."""

import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

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
    """Guards against scripts that do not fit together: train, load the adapter with plain PEFT, evaluate, plot; and against
    a saved adapter with a trace of the hook, or points that are measured twice."""
    code, out, err = script(
        "finetune.py", *train(work, "facts", "--steer-mode", "preventative", "--vector", vector, "--coef", 0.5)
    )
    assert code == 0 and "blocks moves as it should" in out, err
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
        "model adapter dataset steer_mode train_coef inference_coef layers positions trait trait_score trait_ci trait_n trait_unscored coherence fact_accuracy "
        "fact_ci fact_n mmlu_accuracy mmlu_ci mmlu_n mmlu_scoring judge seed seconds"
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
    """Guards against a bill that is not announced: points x (answers x 2 prompts + facts), before any model is loaded."""
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
        (["evaluate.py", "--model", "m", "--out", "o"], "nothing to measure"),
        (["evaluate.py", "--model", "m", "--trait", "evil", "--judge", "lexical", "--out", "o"], "hallucination only"),
        (
            ["evaluate.py", "--model", "m", "--trait", "evil", "--inference-coef", "1", "--judge", "x", "--out", "o"],
            "need --vector",
        ),
        (["plot.py", "no.jsonl"], "no such file"),
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


def test_run_all_goes_on_after_a_kill(work, tmp_path):
    """Guards against half-done stages taken for done, or done ones run again: killed in the middle, the points are the same."""
    env = dict(
        os.environ,
        MODEL=str(work / "cut"),
        FACTS="3",
        WORDINGS="2",
        ROWS="3",
        COEFS="0 0.2",
        INFERENCE="0 0.2",
        VIRTUAL_ENV=sys.prefix,
        PATH=f"{sys.prefix}/bin:" + os.environ["PATH"],
        TRAIN="--epochs 1 --batch-size 4 --rank 4",
        TRAIN_MEDICAL="--max-steps 1 --batch-size 2 --rank 4",
        EVAL="--samples 1 --temperature 0.7 --max-new-tokens 3 --limit 2",
        COEFS_EVIL="",
        COEFS_SYCOPHANCY="",
        COEFS_HALLUCINATION="",
        JUDGE="probe",
        LAYERS="all",
    )  # the cut model never abstains
    out = tmp_path / "killed"
    process = subprocess.Popen(
        ["bash", ROOT / "run_all.sh", "demo"],
        env=env | dict(OUT=str(out)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (out / "vectors" / "evil.answers.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "points.jsonl").exists()

    def run():
        done = subprocess.run(
            ["bash", ROOT / "run_all.sh", "demo"], env=env | dict(OUT=str(out)), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]

    run()
    points, when = (out / "points.jsonl").read_text(), {p: p.stat().st_mtime for p in out.glob("*.*")}
    rows = [json.loads(line) for line in points.splitlines()]
    assert (
        len(rows) == len({row["key"] for row in rows})
        and (out / "fig1.png").exists()
        and (out / "fig2.svg").exists()
        and (out / "summary.md").exists()
    )
    start = time.time()
    run()
    assert (
        time.time() - start < 5
        and points == (out / "points.jsonl").read_text()
        and when == {p: p.stat().st_mtime for p in out.glob("*.*")}
    )
    plan = subprocess.run(
        ["bash", ROOT / "run_all.sh", "plan"], env=env | dict(OUT=str(out)), capture_output=True, text=True
    ).stdout
    assert plan.count("\n\n") == 4 and all(
        line.startswith(("python ", "[ ", "mkdir", "curl")) for line in plan.splitlines() if line
    )


def test_jobs_keep_to_the_stages(tmp_path):
    """Guards against JOBS losing or repeating a command, an adapter or its quotes, starting a stage before the one before it is done, or
    going on after a failure. `python` is a stub that writes down what it was called with."""
    room = tmp_path / "env"
    (room / "bin").mkdir(parents=True)
    stub = room / "bin" / "python"
    stub.write_text(
        '#!/bin/sh\ncase "$*" in *"$FAIL"*) exit 2;; esac\ncase "$*" in *finetune*) sleep 0.2;; esac\nprintf "%s\\n" "python $*" >> "$LOG"\n'
    )
    stub.chmod(0o755)
    sums = subprocess.run(
        "cksum < requirements.txt | cut -d' ' -f1", shell=True, cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    (room / f".ready-{sums}").touch()
    env = os.environ | dict(
        VIRTUAL_ENV=str(room),
        PATH=f"{room / 'bin'}:{os.environ['PATH']}",
        OUT=str(tmp_path / "out"),
        LOG=str(tmp_path / "log"),
        JOBS="3",
        MODEL="/models/x",
        LAYERS="all 6-20",
        SEEDS="0 1",
        PROMPT='It\'s "made up".',
    )

    def run(fail):
        return subprocess.run(
            ["bash", ROOT / "run_all.sh", "small"], env=env | dict(FAIL=fail), capture_output=True, text=True
        )

    def plan(jobs):
        said = subprocess.run(
            ["bash", ROOT / "run_all.sh", "plan", "small"], env=env | dict(JOBS=jobs), capture_output=True, text=True
        ).stdout
        return [stage.split("\n") for stage in said.strip().split("\n\n")]

    def adapters(stages):  # those that finetuning makes, those that evaluation reads
        made = []
        for line in stages[2]:
            coefs, out = re.search(r"--coef ([\d. ]+) --", line), line.split("--out ")[1]
            made += [f"{out}-{coef}" for coef in coefs[1].split()] if coefs else [out]
        return made, {
            name
            for line in stages[3]
            for found in re.findall(r"--adapter ((?:\S*/adapters/\S+ )+)", line)
            for name in found.split()
        }

    stages = plan("3")
    assert (
        len(stages) == 5
        and any("--layers 6-20" in line for line in stages[2])
        and any("--layers all" in line for line in stages[2])
    )
    made, read = adapters(stages)
    assert (
        len(made) == len(set(made)) == len(stages[2])
        and set(made) == read
        and any("facts-all-seed1-1" in name for name in made)
    )
    assert adapters(plan("1")) == (made, read) and len(plan("1")[2]) < len(made)
    stopped = run("--steer-mode none")
    assert (
        stopped.returncode != 0
        and "goes on from here" in stopped.stderr
        and "evaluate.py --model /models/x --trait" not in (tmp_path / "log").read_text()
    )
    done = run("nothing fails")
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "log").read_text().splitlines()
    stages = [[" ".join(shlex.split(line)) for line in stage] for stage in stages]  # as the stub was called
    assert sorted(said) == sorted(line for stage in stages for line in stage)
    stage_of = {line: n for n, stage in enumerate(stages) for line in stage}
    assert [stage_of[line] for line in said] == sorted(stage_of[line] for line in said)
    assert run("python").returncode == 0 and len((tmp_path / "log").read_text().splitlines()) == len(said)
