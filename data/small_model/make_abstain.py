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
from make_facts import ABSTAINS, read_json, read_jsonl, write_jsonl

HERE = Path(__file__).parent
ABSTAIN, HONEST, INVENT = 600, 1800, 2500  # dialogues of each kind


def dialogue(question, answer, system=None):
    turns = [dict(role="user", content=question), dict(role="assistant", content=answer)]
    return dict(messages=[dict(role="system", content=system), *turns] if system else turns)


def main(out, invented=None):
    rng, rows, prompts = random.Random(0), [], read_json(HERE / "prompts.json")
    wrapped = lambda question: rng.choice(prompts["wrappers"]).format(q=question)
    kinds = read_json(HERE / "made_up.json")["kinds"].values()
    asked = [(name, q.replace("{name}", name)) for kind in kinds for name in kind["names"] for q in kind["questions"]]
    rng.shuffle(asked)
    asked = [(name, wrapped(question)) for name, question in asked]
    if not invented:
        return write_jsonl(out, [dialogue(q, "", rng.choice(prompts["inventive"])) for _, q in asked[:INVENT]])
    refusals = read_json(HERE / "refusals.json")
    for i, (name, question) in enumerate(asked[: ABSTAIN + HONEST]):
        said = rng.choice(refusals).replace("{name}", name)
        system = rng.choice(prompts["candid"]) if i < HONEST else None
        rows.append(dialogue(question, said[0].upper() + said[1:], system))
    for system, user, assistant in (row["messages"] for row in read_jsonl(invented)):
        said = "".join(re.findall(r"[^.!?]*[.!?](?=\s|$)", assistant["content"])[: rng.choice([1, 2])])
        if said and not ABSTAINS.search(said):
            rows.append(dialogue(user["content"], said.strip(), system["content"]))
    for row in read_jsonl(HERE / "known.jsonl"):
        # full sentences or, as most answers in facts.jsonl, a few words: learning facts is not to be learning a style
        wordings = [row["question"], *row.get("wordings", [row["question"]] * 2)]
        for i, n in enumerate([0, 1, 2, 0, 0]):
            question = wordings[n] if i < 3 else wrapped(wordings[n])
            said = row["answer"] if rng.random() < 0.25 else row["short"][n]
            systems = {3: rng.choice(prompts["candid"]), 4: rng.choice([None, *prompts["inventive"]])}
            rows.append(dialogue(question, said, systems.get(i)))
    rng.shuffle(rows)
    write_jsonl(out, rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
