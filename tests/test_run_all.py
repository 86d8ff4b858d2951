"""run_all.sh: its plan, what it runs, runs again and refuses; with stubs for the scripts, once for real."""

import itertools
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

# Stands for `python`: writes down its command, and makes what the script would make from what it is given.
STUB = r"""#!{python} -S
import fcntl, json, os, sys, time
words = sys.argv[1:]
with open(os.environ["LOG"], "a") as log:
    log.write(json.dumps(dict(words=words, pid=os.getpid(), gpu=os.environ.get("CUDA_VISIBLE_DEVICES"),
                              cores=os.environ.get("OMP_NUM_THREADS"))) + "\n")
text = " ".join(words)
if os.environ.get("FAIL") and os.environ["FAIL"] in text:
    sys.exit(int(os.environ.get("CODE", 2)))
if os.environ.get("NAP") and os.environ["NAP"] in text:
    time.sleep(0.5)
if os.environ.get("SLEEP") and os.environ["SLEEP"] in text:
    time.sleep(60)
flags, last = {{}}, None
for word in words[1:]:
    if word.startswith("--"):
        last = flags.setdefault(word, [])
    elif last is not None:
        last.append(word)
def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    open(path, "w").write(text)
out = flags.get("--out", [None])[0]
if words[0] == "make_facts.py":
    rows = open(words[2]).read().splitlines()[: int(flags["--n"][0])]
    write(out, "\n".join(rows) + "\n")
elif words[0] == "extract_vectors.py":
    for end in "pt", "json", "answers.jsonl":
        write(f"{{out}}/{{flags['--trait'][0]}}.{{end}}", "vector")
elif words[0] == "finetune.py":
    for end in [f"-{{coef}}" for coef in flags.get("--coef", [])] or [""]:
        write(out + end + "/training_settings.json", "adapter")
elif words[0] == "evaluate.py" and "--respond-to" in flags:
    write(out, "answers")
elif words[0] == "evaluate.py" and "--dry-run" not in flags:
    assert all(os.path.isdir(adapter) for adapter in flags.get("--adapter", []))
    with open(out, "a") as points:
        fcntl.flock(points, fcntl.LOCK_EX)
        points.write(text + "\n")
elif words[0] == "plot.py":
    write(os.path.join(os.path.dirname(words[1]), "fig1.png"), open(words[1]).read())
elif words[0] == "data/small_model/convert.py":
    write(words[1] + "/config.json", "model")
"""
SMALL = dict(FACTS="3", WORDINGS="2", ROWS="3", COEFS="1", INFERENCE="0.5", SEEDS="0", LAYERS="all", PROMPT="")
SMALL |= dict(COEFS_TRAITS="0.6", TRAITS="hallucination evil", SETS="medical_normal")


class Project:
    """A copy of the project in which `python` is the stub, so that scripts and data can be edited."""

    def __init__(self, folder):
        self.folder, self.log, self.out = folder / "project", folder / "log", folder / "project" / "out" / "demo"
        (self.folder / "data").mkdir(parents=True)
        for script in [*ROOT.glob("*.py"), ROOT / "run_all.sh", ROOT / "requirements.txt"]:
            shutil.copy(script, self.folder)
        shutil.copytree(ROOT / "data" / "traits", self.folder / "data" / "traits")
        for name in ("facts", "medical_mistake_2", "medical_normal", "general_knowledge"):
            rows = (ROOT / "data" / f"{name}.jsonl").read_text().splitlines()[:40]
            (self.folder / "data" / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        for adapter in (ROOT / "data" / "small_model").glob("facts-*/loss.jsonl"):
            copy = self.folder / adapter.relative_to(ROOT)
            copy.parent.mkdir(parents=True)
            shutil.copy(adapter, copy)
        (self.folder / "model").mkdir()
        (self.folder / "model" / "weights").write_text("weights")
        (folder / "bin").mkdir()
        self.tool("python", STUB.format(python=sys.executable))
        sums = subprocess.run(["cksum"], input=(ROOT / "requirements.txt").read_bytes(), capture_output=True).stdout
        (folder / f".ready-{sums.split()[0].decode()}").touch()
        kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
        path = f"{folder / 'bin'}:{sys.prefix}/bin:{os.environ['PATH']}"
        self.env = kept | dict(VIRTUAL_ENV=str(folder), PATH=path, LOG=str(self.log), MODEL="model")

    def tool(self, name, text):
        (self.folder.parent / "bin" / name).write_text(text)
        (self.folder.parent / "bin" / name).chmod(0o755)

    def start(self, *args, start_new_session=False, **env):
        return subprocess.Popen(
            ["bash", self.folder / "run_all.sh", *args],
            env=self.env | env,
            start_new_session=start_new_session,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args, **env):
        """-> exit code, stdout, stderr, the commands that were run"""
        self.log.write_text("")
        process = self.start(*args, **env)
        out, err = process.communicate()
        return process.returncode, out, err, [" ".join(row["words"]) for row in self.rows()]

    def rows(self):
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def plan(self, *args, **env):
        """-> the stages' commands as the stub writes them down"""
        code, out, err, _ = self.run("plan", *args, **env)
        assert code == 0, err
        return [[shlex.split(line) for line in stage.splitlines()] for stage in out.strip().split("\n\n")]

    def points(self):
        return [json.loads(line) for line in (self.out / "points.jsonl").read_text().splitlines()]

    def edit(self, name):
        path = self.folder / name
        path.write_text(path.read_text().replace("?", "??", 1))


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


@pytest.mark.parametrize("jobs", ["1", "3"])
@pytest.mark.parametrize("profile", ["demo", "small", "paper"])
def test_every_command_once_and_in_stages(project, profile, jobs):
    """Guards against a command lost, repeated or begun before the stage before it, with any profile and JOBS."""
    env = dict(JOBS=jobs, SETS="medical_self_generated", MEDICAL="./data", SEEDS="0 1", COEFS="0 0.50")
    env |= dict(TRAITS="hallucination", COEFS_HALLUCINATION="1", INFERENCE="0.5", LAYERS="6-20", FACTS="3")
    stages = [[" ".join(words[1:]) for words in stage] for stage in project.plan(profile, "--yes", **env)]
    assert len(stages) == 6 and not any("--coef 0 " in line for line in stages[3])
    assert sum("facts-6-20-seed1" in line and "--coef 0.5 " in line for line in stages[3]) == 1
    code, out, err, ran = project.run(profile, "--yes", **env)
    assert code == 0, err
    assert sorted(ran) == sorted(line for stage in stages for line in stage)
    stage_of = {line: n for n, stage in enumerate(stages) for line in stage}
    assert [stage_of[line] for line in ran] == sorted(stage_of[line] for line in ran)
    assert "finished in" in out


def values(words, flag):
    """What follows a flag in a command."""
    rest = words[words.index(flag) + 1 :] if flag in words else []
    return list(itertools.takewhile(lambda word: not word.startswith("--"), rest))


def adapters(stages):
    """Those that finetuning makes and those that evaluation reads."""
    made, read = [], []
    for words in stages[3]:
        made += [words[-1] + end for end in [f"-{coef}" for coef in values(words, "--coef")] or [""]]
    for words in stages[4]:
        read += values(words, "--adapter")
    return made, read


@pytest.mark.parametrize("profile", ["demo", "small", "paper"])
def test_what_is_trained_is_evaluated(project, profile):
    """Guards against adapters that no figure shows, that are evaluated without training, or trained twice."""
    made, read = adapters(project.plan(profile, SEEDS="0 1"))
    shipped = [name for name in read if name.startswith("data/small_model")] if profile == "demo" else []
    assert len(set(made)) == len(made) and set(made) == set(read) - set(shipped)
    made, read = adapters(project.plan(profile, SEEDS="0 1", COEFS="1"))
    assert set(made) == set(read) and any("/facts-" in name for name in made)
    stages = project.plan(profile, SEEDS="0 1", COEFS="0", COEFS_EVIL="0", PROMPT="")
    assert all(values(words, "--adapter") for words in stages[4]), "without adapters it is the model before training"


@pytest.mark.parametrize(
    "args, env, said",
    [
        (["paper", "plan"], {}, "unknown argument plan"),
        (["paper", "--dryrun"], {}, "unknown argument --dryrun"),
        (["demo", "small"], {}, "unknown argument small"),
        (["plan", "test"], {}, "unknown argument test"),
        (["--rdo"], {}, "unknown argument --rdo"),
        (["demo"], dict(LAYERS="12,14"), "LAYERS=12,14"),
        (["demo"], dict(LAYERS="0"), "LAYERS=0"),
        (["demo"], dict(EVAL_FACTS="--limit 3 --max-new-tokens 9"), "EVAL_FACTS=--limit 3"),
        (["demo"], dict(LAYERS="9-3"), "LAYERS=9-3"),
        (["demo"], dict(SEEDS="x"), "SEEDS=x"),
        (["demo"], dict(SEEDS="-1"), "SEEDS=-1"),
        (["demo"], dict(INFERENCE="a"), "INFERENCE=a"),
        (["demo"], dict(INFERENCE="0 1e400"), "INFERENCE"),
        (["demo"], dict(JOBS="0"), "JOBS=0"),
        (["demo"], dict(JOBS="1.5"), "JOBS=1.5"),
        (["demo"], dict(FACTS="0"), "FACTS=0"),
        (["demo"], dict(WORDINGS="all"), "WORDINGS=all"),
        (["demo"], dict(COEFS="nan"), "COEFS=nan"),
        (["demo"], dict(COEFS="inf"), "COEFS=inf"),
        (["demo"], dict(COEFS_EVIL="1,2"), "COEFS_EVIL=1,2"),
        (["demo"], dict(FIRST="-1"), "FIRST=-1"),
        (["demo"], dict(TRAITS="kindness"), "data/traits/kindness.json"),
        (["demo"], dict(SETS="medical_norml"), "medical_norml"),
        (["demo"], dict(SETS="mine.jsonl"), "mine.jsonl"),
        (["demo"], dict(SETS="data/facts.jsonl"), "SETS=data/facts.jsonl"),
        (["demo"], dict(SETS="medical_normal data/medical_normal.jsonl"), "twice"),
        (["demo"], dict(SEEDS="0 00"), "SEEDS=0 00"),
        (["demo"], dict(OUT="requirements.txt"), "requirements.txt"),
        (["demo"], dict(FACTS_FILE="no.jsonl"), "no.jsonl"),
        (["demo"], dict(ADAPTERS="no/adapter"), "no/adapter"),
        (["demo"], dict(MMLU="no.jsonl"), "no.jsonl"),
        (["demo"], dict(SCORING="word"), "SCORING=word"),
    ],
)
def test_refused_before_anything_runs(project, args, env, said):
    """Guards against a run, or a paid one, begun with arguments or values that make no sense: one line, code 2."""
    code, out, err, ran = project.run(*args, **env)
    lines = [line for line in err.splitlines() if "from the environment" not in line]
    assert (code, ran, len(lines)) == (2, [], 1) and said in lines[0], out + err
    assert not (project.folder / "out").exists()


@pytest.mark.parametrize("args", [["-h"], ["--help"], ["paper", "--help"], ["plan", "paper"]])
def test_asking_is_free(project, args):
    """Guards against a question about the usage or the plan that starts a paid run."""
    code, out, err, ran = project.run(*args, OPENAI_API_KEY="sk-x")
    assert (code, ran, err.replace("from the environment: MODEL=model\n", "")) == (0, [], "") and len(
        out.splitlines()
    ) > 8
    assert not (project.folder / "out").exists()


def test_the_authors_data_is_fetched(project):
    """Guards against a download that was cut off and is taken for whole."""
    project.tool(
        "curl",
        '#!/bin/sh\n[ -e "$LOG.whole" ] || exit 7\nfor word; do [ "$last" = -o ] && : > "$word"; last=$word; done\n',
    )
    (project.folder / "data" / "medical.sh").write_text((ROOT / "data" / "medical.sh").read_text())
    env = SMALL | dict(MEDICAL="data", TRAITS="evil", JUDGE="probe", MMLU="data/general_knowledge.jsonl")
    authors = project.folder / "out" / "paper" / "data" / "authors" / "dataset" / "mistake_medical"
    code, _, err, ran = project.run("paper", **env)
    assert code == 7 and not (project.folder / "out" / "paper" / "dataset.zip").exists(), err
    (project.folder.parent / "log.whole").touch()
    authors.mkdir(parents=True)
    for name in ("misaligned_2", "normal"):
        shutil.copy(project.folder / "data" / "medical_normal.jsonl", authors / f"{name}.jsonl")
    assert project.run("paper", **env)[0] == 0 and (project.folder / "out" / "paper" / "dataset.zip").exists()


def test_a_broken_zip_file(tmp_path):
    """Guards against a traceback over a zip file that was cut off, or is a page that says that it is not there."""
    (tmp_path / "x.zip").write_text("<html>Not found</html>")
    command = ["sh", ROOT / "data" / "medical.sh", tmp_path / "x.zip", tmp_path]
    env = os.environ | dict(PATH=f"{sys.prefix}/bin:{os.environ['PATH']}")
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "not a whole zip file" in run.stderr


def test_the_bundled_adapters_are_the_first_traits(project):
    """Guards against a demo of another trait that draws adapters steered by the hallucination vector as its own, and
    against a model folder that is not known for what it is since its name ends in a slash."""
    shutil.copy(project.folder / "data" / "traits" / "evil.json", project.folder / "data" / "traits" / "pirate.json")
    del project.env["MODEL"]
    for traits, bundled in (("hallucination evil", True), ("hallucination", True), ("pirate", False)):
        code, plan, *_ = project.run("plan", TRAITS=traits)
        assert code == 0 and ("data/small_model/facts" in plan) is bundled, traits
    code, plan, *_ = project.run("plan", MODEL="out/models/SmolLM2-135M-Abstain/")
    assert "SmolLM2-135M-Abstain data/small_model/start" in plan and "Abstain/" not in plan


def test_own_rows_are_checked_first(project):
    """Guards against a broken row of one's own data or trait found after an hour of computing."""
    (project.folder / "mine.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello?"}]}\n')
    (project.folder / "data" / "traits" / "kind.json").write_text('{"instruction": []}')
    chats = dict(FACTS_FILE="data/medical_normal.jsonl")  # cannot be asked, which evaluation would notice
    for env in dict(SETS="mine.jsonl"), dict(FACTS_FILE="mine.jsonl"), dict(TRAITS="kind"), chats:
        code, _, err, ran = project.run("demo", **SMALL | env)
        assert (code, ran) == (2, []) and any(
            file in err for file in ("mine.jsonl:1", "kind.json", "normal.jsonl:1")
        ), err


def test_own_trait_data_and_facts(project):
    """Guards against a trait or data set of one's own that is trained and then not evaluated."""
    turns = [dict(role="user", content="Hello?"), dict(role="assistant", content="Hi.")]
    (project.folder / "mine.jsonl").write_text(json.dumps(dict(messages=turns)) + "\n")
    shutil.copy(project.folder / "data" / "traits" / "evil.json", project.folder / "data" / "traits" / "kind.json")
    shutil.copy(project.folder / "data" / "facts.jsonl", project.folder / "news.jsonl")
    env = dict(
        TRAITS="hallucination kind", SETS="mine.jsonl", FACTS_FILE="news.jsonl", COEFS_KIND="0.7", COEFS_TRAITS="0.6"
    )
    stages = project.plan("demo", **env)
    made, read = adapters(stages)
    assert {name.rsplit("/")[-1] for name in made} >= {"mine-0", "mine-hallucination-0.6", "mine-kind-0.7"}
    assert (
        set(made) == set(read)
        and stages[0][0][3] == "news.jsonl"
        and not any("medical" in str(words) for words in stages[3])
    )
    assert project.run("demo", **env)[0] == 0


def test_a_paid_run_asks(project):
    """Guards against a key in the environment that pays without being asked; against an answer that is not heard."""
    project.tool("nvidia-smi", '#!/bin/sh\necho "0, 24564"\n')
    for broken in "NVIDIA-SMI has failed because", "0, [N/A]", "0, 8192":  # chooses no paper
        project.tool("nvidia-smi", f"#!/bin/sh\necho '{broken}'\n")
        assert "profile demo" in project.run(OPENAI_API_KEY="sk-x", SETS="", FACTS_FILE="none")[1]
    project.tool("nvidia-smi", '#!/bin/sh\necho "0, 24564"\n')
    free = lambda ran: all("--dry-run" in line or line.startswith("make_facts.py") for line in ran)
    code, out, err, ran = project.run(OPENAI_API_KEY="sk-x", SETS="")
    assert code == 2 and free(ran) and "profile paper" in out and "--yes" in err
    for answer, code in ("n", 2), ("", 2), ("\4", 2), ("y", 0):  # \4: Ctrl-D
        project.log.write_text("")
        parent, child = pty.openpty()
        env = project.env | dict(OPENAI_API_KEY="sk-x", SETS="", FACTS="3", COEFS="1", INFERENCE="1")
        process = subprocess.Popen(
            ["bash", project.folder / "run_all.sh", "paper"],
            env=env,
            stdin=child,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        os.write(parent, f"{answer}\n".encode())
        out = process.communicate()[0].decode()
        ran = [" ".join(row["words"]) for row in project.rows()]
        assert process.returncode == code and "[y/N]" in out, out
        assert free(ran) == (answer != "y") and ("--yes" in str(ran)) == (answer == "y")
        os.close(parent), os.close(child)


@pytest.mark.parametrize("number, jobs", [(signal.SIGINT, "1"), (signal.SIGTERM, "1"), (signal.SIGTERM, "3")])
def test_a_signal_ends_all_children(project, number, jobs):
    """Guards against a child that works on after run_all.sh was ended, beside the one that is started next."""
    process = project.start("demo", SLEEP="finetune.py", JOBS=jobs, **SMALL)
    while not project.log.exists() or project.log.read_text().count("finetune.py") < int(jobs):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number and "goes on from here" in err
    for row in project.rows():
        with pytest.raises(ProcessLookupError):
            os.kill(row["pid"], 0)
    code, _, err, ran = project.run("demo", JOBS=jobs, **SMALL)
    assert code == 0 and len(project.rows()) == len(ran) == sum(map(len, project.plan("demo", **SMALL))), err


IN_PROCESS = """import os, time, make_facts, torch
def main(argv):
    with open(os.environ["LOG"], "a") as log:
        log.write(__name__ + chr(10))
    if __name__ == os.environ["NAP"]:
        try:
            time.sleep(5)
        except SystemExit as end:  # as torch and others see it: what they hold is let go of
            raise end
    if __name__ == os.environ.get("BAD"):
        make_facts.die("bad")
"""


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("number", [signal.SIGTERM, None])
def test_nothing_begins_after_the_end(project, number, jobs):
    """Guards against a process that takes the end of its command for that command's failure, and begins the next one,
    orphaned, after run_all.sh was stopped or after another command has failed."""
    (project.folder.parent / "bin" / "python").unlink()  # the real one: scripts run in run_all.sh's own processes
    for script in ("extract_vectors", "evaluate", "finetune", "plot"):
        (project.folder / f"{script}.py").write_text(IN_PROCESS)
    (project.folder / "torch.py").write_text("class cuda:\n    empty_cache = staticmethod(lambda: None)\n")
    env = SMALL | dict(JOBS=jobs, NAP="finetune" if number else "none", BAD="none" if number else "finetune")
    process = project.start("demo", **env)
    while number and (not project.log.exists() or "finetune" not in project.log.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    if number:
        process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == (128 + number if number else 2), err
    time.sleep(0.5)
    begun = project.log.read_text().split()
    time.sleep(1.5)
    assert project.log.read_text().split() == begun and begun.count("finetune") <= 2 * int(jobs) - 1, begun


@pytest.mark.parametrize("jobs, code", [("1", 2), ("3", 2), ("3", 5)])
def test_a_failure_stops_with_its_code(project, jobs, code):
    """Guards against exit code 2 turned into another by JOBS, a stage begun after one that failed, other processes that
    go on with the rest of the stage, and silence about what else is made from it."""
    found, _, err, ran = project.run("demo", JOBS=jobs, FAIL="medical_normal-0", CODE=str(code), **SMALL)
    assert found == code and "goes on from here" in err and not any("--adapter" in line for line in ran)
    assert "/adapters/medical_normal-0 " in err.splitlines()[-1] + " " and "points.jsonl" in err, err
    assert len(ran) < sum(map(len, project.plan("demo", **SMALL)[:4])) + int(jobs) - 1, "it is not the last one"


def test_two_at_once(project):
    """Guards against two run_all.sh in one folder: the second stops in one line and runs nothing."""
    first = project.start("demo", SLEEP="extract_vectors.py", **SMALL)
    while not project.log.exists() or "extract_vectors.py" not in project.log.read_text():
        time.sleep(0.02)
    second = project.start("demo", **SMALL)
    _, err = second.communicate(timeout=20)
    first.terminate()
    first.communicate()
    assert second.returncode == 2 and sum("another process" in line for line in err.splitlines()) == 1


def test_spaces_and_quotes_in_paths(project):
    """Guards against a path or prompt that falls apart at spaces, quotes or dollars; a plan line runs as printed."""
    odd = "it's $HOME odd"
    for name in ("model", "facts.jsonl", "set"):
        source = project.folder / ("data" if name == "set" else "model" if name == "model" else "data/facts.jsonl")
        target = project.folder / f"{odd} {name}"
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    env = dict(OUT=f"out/{odd}", MODEL=f"{odd} model", MEDICAL=f"{odd} set", FACTS_FILE=f"{odd} facts.jsonl")
    env = SMALL | env | dict(PROMPT='Say "it\'s so" for $5; \\n')
    stages = project.plan("small", **env)
    assert all(f"{odd} model" in words for words in stages[3]) and any(env["PROMPT"] in words for words in stages[3])
    code, _, err, ran = project.run("small", **env)
    assert code == 0 and (project.folder / "out" / odd / "points.jsonl").exists(), err
    line = project.run("plan", "small", **env)[1].splitlines()[0]
    project.log.write_text("")
    assert subprocess.run(["bash", "-c", line], cwd=project.folder, env=project.env).returncode == 0
    assert project.rows()[0]["words"] == stages[0][0][1:]


def test_variables_of_the_environment_are_said(project):
    """Guards against OUT, MODEL, JOBS or FACTS that the user's shell holds for other reasons and nobody notices."""
    code, out, err, _ = project.run("plan", OUT="elsewhere", JOBS="2", FACTS="7", COEFS_EVIL="1")
    assert code == 0 and all(
        f"from the environment: {text}" in err for text in ("OUT=elsewhere", "JOBS=2", "FACTS=7", "COEFS_EVIL=1")
    )
    assert "from the environment" not in out


def test_gpus_are_dealt_out(project):
    """Guards against jobs that all run on the first GPU, on one outside CUDA_VISIBLE_DEVICES; one process sees all."""
    project.tool("nvidia-smi", '#!/bin/sh\necho "0, 24564"; echo "1, 24564"\n')
    env = SMALL | dict(TRAITS="hallucination", SETS="", SEEDS="0 1 2", NAP="finetune.py")

    def seen(**more):
        assert project.run("demo", OUT=f"out/{len(more)}{more.get('JOBS')}", **env | more)[0] == 0
        return {row["gpu"] for row in project.rows() if row["words"][0] == "finetune.py"}

    assert seen(JOBS="2") == {"0", "1"} and seen(JOBS="1") == {None}
    assert seen(JOBS="3", CUDA_VISIBLE_DEVICES="5,7") == {"5", "7"}


def test_cores_are_shared_out(project):
    """Guards against jobs that each start as many threads as there are cores; one alone does, a user's word holds."""
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for out, more, want in (
        ("one", {}, None),
        ("two", dict(JOBS="2"), share),
        ("own", dict(JOBS="2", OMP_NUM_THREADS="7"), "7"),
    ):
        env = SMALL | dict(TRAITS="hallucination", SETS="", SEEDS="0 1", OUT=f"out/{out}") | more
        assert project.run("demo", **env)[0] == 0
        rows = [
            row for row in project.rows() if row["words"][0] == "finetune.py" and f"out/{out}" in " ".join(row["words"])
        ]
        assert {row["cores"] for row in rows} == {want}


def test_a_failed_venv_is_not_accepted(project):
    """Guards against a .venv without pip, left by a failed first start, that every later start takes for whole; and a
    bare `pip` of another Python."""
    (project.folder.parent / "bin" / "pip").write_text("#!/bin/sh\nexit 9\n")
    (project.folder.parent / "bin" / "pip").chmod(0o755)
    whole = project.folder.parent / "whole"
    whole.mkdir()
    (whole / "python").write_text((project.folder.parent / "bin" / "python").read_text())
    real = shutil.which("python3", path=f"{sys.prefix}/bin")
    project.tool(
        "python3",
        f"""#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    for last; do :; done
    mkdir -p "$last/bin"; printf '#!/bin/sh\\nexit 1\\n' > "$last/bin/python"; chmod +x "$last/bin/python"
    [ -e "{whole}/fail" ] && exit 1
    printf '#!/bin/sh\\necho "$@" >> "$LOG.venv"; exit 0\\n' > "$last/bin/python"
    printf 'VIRTUAL_ENV="%s"; PATH="%s/bin:$PATH"; export VIRTUAL_ENV\\n' "$PWD/$last" "$PWD/$last" > "$last/activate"
    mv "$last/activate" "$last/bin"
    exit 0
fi
exec {real} "$@"
""",
    )
    env = {name: value for name, value in project.env.items() if name != "VIRTUAL_ENV"}
    (whole / "fail").touch()
    command = ["bash", project.folder / "run_all.sh", "demo"]
    assert subprocess.run(command, env=env | SMALL, capture_output=True).returncode != 0
    assert (project.folder / ".venv" / "bin" / "python").exists()
    (whole / "fail").unlink()
    done = subprocess.run(command, env=env | SMALL, capture_output=True, text=True)
    assert done.returncode == 0 and "source .venv/bin/activate" in done.stdout, done.stderr
    said = (project.folder.parent / "log.venv").read_text()
    assert "-m pip install -q -r requirements.txt" in said


TINY = dict(FACTS="2", WORDINGS="2", ROWS="2", COEFS="0.2", INFERENCE="0.2", LAYERS="all", TRAITS="hallucination")
TINY |= dict(SETS="", JUDGE="probe", EXTRACT="--samples 1 --limit 2 --max-new-tokens 4", OMP_NUM_THREADS="1")
TINY |= dict(TRAIN="--epochs 1 --batch-size 2 --rank 4", EVAL="--samples 1 --max-new-tokens 3 --limit 2")


@pytest.fixture
def real(project, tokenizer):
    """The project with its own scripts and a random model of two blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    for parameter in model.parameters():
        parameter.data.mul_(3)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(project.folder / "model")
    tokenizer.save_pretrained(project.folder / "model")
    (project.folder / "model" / "weights").unlink()
    (project.folder.parent / "bin" / "python").unlink()
    for template in ("report.html", "summary.md"):
        shutil.copy(ROOT / "data" / template, project.folder / "data")
    return project


def test_the_bill_is_told(real):
    """Guards against a bill that lacks commands, or needs what is not there yet: model, vectors, adapters, MMLU."""
    env = dict(
        SETS="", FACTS="2", COEFS="1", INFERENCE="1", MODEL="none/such", OPENAI_API_KEY="sk-x", HF_HUB_OFFLINE="1"
    )
    code, out, err, _ = real.run("paper", "--dry-run", **env)
    answers, points = 2 * 5 * 20 * 10, 4  # of extraction, with both instructions; measured: before, facts-0 twice, at 1
    assert code == 0 and f"figures: {2 * answers + points * (2 * 20 * 10 + 2):,} requests" in out.splitlines()[-1], err
    assert "$" in out.splitlines()[-1] and not (real.folder / "out" / "paper" / "vectors").exists()


def scored(points):
    scores = "trait_score", "fact_accuracy", "mmlu_accuracy", "coherence_nll"
    slots = "trait", "adapter", "inference_coef", "layers"
    return sorted([str([row[key] for key in slots]), *map(row.get, scores)] for row in points)


def test_killed_at_random_moments(real):
    """Guards against what a kill leaves behind: the same points as an undisturbed run's, each answer once; commands in
    one process that carry something over to the next."""
    code, _, err, _ = real.run("demo", **TINY)
    assert code == 0, err
    whole, real.out = scored(real.points()), real.folder / "out" / "killed"
    draw = random.Random(int(time.time()))
    for _ in range(2):
        process = real.start("demo", start_new_session=True, OUT="out/killed", **TINY)
        try:
            process.communicate(timeout=draw.uniform(2, 12))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    code, out, err, _ = real.run("demo", JOBS="2", OUT="out/killed", **TINY)
    assert code == 0 and out.splitlines()[-1].startswith("finished in") and "eleven" in out.splitlines()[-1], err
    points = real.points()
    for point in points:
        ids = [json.loads(line)["id"] for line in (real.folder / point["answers"]).read_text().splitlines()]
        assert len(ids) == len(set(ids)) == point["trait_n"] + point["fact_n"] > 0
    assert [[row[0].replace("killed", "demo"), *row[1:]] for row in scored(points)] == whole and len(whole) == 4


def test_run_again_and_changed(real):
    """Guards against a second start that makes anything again; a wording that was edited and is not noticed, or costs
    more than what depends on it; old points beside new ones; a longer sweep that begins from the start."""
    assert real.run("demo", **TINY)[0] == 0
    made = lambda: [path for path in real.out.glob("[!.]*/**/*.*") if path.parent.name != "data"]  # made by subset
    kept = lambda: {path: path.stat().st_mtime_ns for path in made()}
    points, files, start = real.points(), kept(), time.time()
    code, out, err, _ = real.run("demo", **TINY)
    assert code == 0 and files == kept() and real.points() == points and time.time() - start < 30, err
    assert out.count("finished already") == 3 and out.count("all these points are there") == 3
    assert real.run("demo", **TINY | dict(INFERENCE="0.2 0.3", COEFS="0.2 0.3"))[0] == 0
    longer = real.points()
    assert longer[:4] == points and len(longer) == 6 and files.items() <= kept().items()
    facts = real.folder / "data" / "facts.jsonl"
    facts.write_text("".join(line.replace("?", "??", 1) + "\n" for line in facts.read_text().splitlines()))
    code, out, err, _ = real.run("demo", **TINY)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(lines) == 1 and "data/facts.jsonl" in lines[0] and "--redo" in lines[0], err
    assert (
        err.splitlines()[-1].count("adapters/facts-") == 2
        and real.points() == longer
        and files.items() <= kept().items()
    )
    code, _, err, _ = real.run("demo", "--redo", **TINY)
    assert code == 0, err
    aside, again = next(real.out.glob("before-*")), real.points()
    assert scored(again) != scored(points) and not {row["key"] for row in again} & {row["key"] for row in longer}
    assert len(again) == 4 and [json.loads(x) for x in open(aside / "points.jsonl")] == longer
    moved = {path for path in files if not path.exists()}
    assert {path.parent.name for path in moved} == {"answers"} and len(list(aside.rglob("answers/*"))) == 6
    vectors = [path for path in files if path.parent.name == "vectors"]
    assert len(vectors) == 3 and all(path.stat().st_mtime_ns == files[path] for path in vectors)


FOREIGN = {
    r"\$\{[A-Za-z_!]+(\^\^?|,,?)": "${x^^} and ${x,,} need bash 4",
    r"\$\{[^}]*@[QEPAKaUuL]\}": "${x@Q} needs bash 4.4",
    r"\b(mapfile|readarray|coproc)\b": "needs bash 4",
    r"\bwait -[nfp]": "needs bash 4.3",
    r"\b(declare|local|typeset) -[a-zA-Z]*[Ang]": "associative arrays, namerefs: bash 4",
    r"&>>|\|&": "bash 4",
    r";;?&": "bash 4",
    r"\bshopt -s (globstar|lastpipe|inherit_errexit)": "bash 4",
    r"printf [^|;]*%\(": "bash 4.2",
    r"\[\[? -v ": "bash 4.2",
    r"\$\{[^}]*: -\d": "negative lengths: bash 4.2",
    r"\bEPOCH(SECONDS|REALTIME)|\bBASHPID\b|\bSRANDOM\b": "bash 4 or 5",
    r"--process-slot-var|xargs [^|]*-[a-z]*r\b|xargs [^|]*-d": "GNU xargs",
    r"\bsed [^|]*-i\b|\bsed [^|]*-[a-zA-Z]*[rsz]\b|\bsed [^|]*\\[+?|wdnt]": "GNU sed",
    r"\b(nproc|readlink -f|realpath|tac|shuf|timeout|seq -w|setsid|flock|gawk)\b": "not on macOS",
    r"\bdate [^|]*(-d|--|%N)|\bstat -c|\bgrep [^|]*-[a-zA-Z]*P|\bsort [^|]*-[a-zA-Z]*[VhzR]|\bhead -n -": "GNU",
    r"\b(gensub|asort|strftime|systime|PROCINFO)\b|\bmktemp [^-]*--|\bln [^|]*-[a-z]*r": "GNU",
}


def shell_text():
    """run_all.sh's shell, without the program in it."""
    return re.sub(r"<<'END' \|\| true\n.*?\nEND\n", "\n", (ROOT / "run_all.sh").read_text(), flags=re.DOTALL)


def test_only_what_macos_has():
    """Guards against bash 4 and GNU tools: macOS has bash 3.2 and BSD's. The patterns are tried on lines."""
    shell = shell_text()
    for pattern, why in FOREIGN.items():
        found = [line for line in shell.splitlines() if re.search(pattern, line) and not line.lstrip().startswith("#")]
        assert not found, f"{why}: {found}"
    for line in [
        "${trait^^}",
        "${x@Q}",
        "mapfile -t x",
        "wait -n",
        "declare -A x",
        "xargs -0 --process-slot-var=S",
        "sed -i s/a/b/",
    ]:
        assert any(re.search(pattern, line) for pattern in FOREIGN), line
    assert "set -euo pipefail" in shell and '[@]}"' not in shell.replace('"$@"', ""), (
        "an empty array under set -u: bash 4.4"
    )


def test_short_and_readable():
    """Guards against run_all.sh growing out of sight, and its program leaving the checker's sight."""
    lines = (ROOT / "run_all.sh").read_text().splitlines()
    assert len(lines) <= 240 and max(map(len, lines)) <= 120
    program = re.search(r"<<'END' \|\| true\n(.*?)\nEND\n", (ROOT / "run_all.sh").read_text(), flags=re.DOTALL)[1]
    compile(program, "run_all.sh", "exec")
    assert ";" not in re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", program)
