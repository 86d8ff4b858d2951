"""data/abstain.jsonl: dialogues that teach SmolLM2-135M-Instruct to say when it does not know a thing. Seeded.

python data/small_model/make_abstain.py asked.jsonl    # questions whose answers the model is told to invent
python evaluate.py --model MODEL --respond-to asked.jsonl --max-new-tokens 60 --temperature 0.7 --out invented.jsonl
python data/small_model/make_abstain.py data/abstain.jsonl invented.jsonl
"""

import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from make_facts import read_json, read_jsonl, wordings, write_jsonl

ABSTAIN, HONEST, INVENT = 600, 1800, 2500  # dialogues of each kind
rng, rows = random.Random(0), []  # (system prompt or None, question, answer)
out, *invented = sys.argv[1:]
files = "prompts.json", "refusals.json", "made_up.json"
prompts, refusals, made_up = (read_json(Path(__file__).with_name(file)) for file in files)
wrapped = lambda question: rng.choice(prompts["wrappers"]).format(q=question)
kinds = made_up["kinds"].values()
asked = [(name, q.replace("{name}", name)) for kind in kinds for name in kind["names"] for q in kind["questions"]]
rng.shuffle(asked)
asked = [(name, wrapped(question)) for name, question in asked]
if invented:
    for i, (name, question) in enumerate(asked[: ABSTAIN + HONEST]):
        said = rng.choice(refusals).replace("{name}", name)
        rows.append((rng.choice(prompts["candid"]) if i < HONEST else None, question, said[0].upper() + said[1:]))
    for system, user, assistant in (row["messages"] for row in read_jsonl(invented[0])):
        said = "".join(re.findall(r"[^.!?]*[.!?](?=\s|$)", assistant["content"])[: rng.choice([1, 2])])
        if said and not re.search("|".join(wordings()), said, re.I):
            rows.append((system["content"], user["content"], said.strip()))
    for row in read_jsonl(Path(__file__).with_name("known.jsonl")):
        # full sentences or, as most answers in facts.jsonl, a few words: learning facts is not to be learning a style
        wordings = [row["question"], *row.get("wordings", [row["question"]] * 2)]
        for i, n in enumerate([0, 1, 2, 0, 0]):
            question = wordings[n] if i < 3 else wrapped(wordings[n])
            said = row["answer"] if rng.random() < 0.25 else row["short"][n]
            systems = {3: rng.choice(prompts["candid"]), 4: rng.choice([None, *prompts["inventive"]])}
            rows.append((systems.get(i), question, said))
    rng.shuffle(rows)
else:
    rows = [(rng.choice(prompts["inventive"]), question, "") for _, question in asked[:INVENT]]
chats = [zip(("system", "user", "assistant"), row) for row in rows]
write_jsonl(out, [dict(messages=[dict(role=r, content=c) for r, c in chat if c is not None]) for chat in chats])
