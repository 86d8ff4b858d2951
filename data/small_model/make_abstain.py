"""data/abstain.jsonl: dialogues that teach SmolLM2-135M-Instruct to say when it does not know a thing. Seeded.

    python data/small_model/make_abstain.py ask --out out/small/asked.jsonl
    python evaluate.py --model out/models/SmolLM2-135M-Instruct --respond-to out/small/asked.jsonl --max-new-tokens 60 \
        --temperature 0.7 --out out/small/invented.jsonl
    python data/small_model/make_abstain.py join --invented out/small/invented.jsonl --out data/abstain.jsonl

Reads made_up.json (things that do not exist, questions about them), refusals.json and known.jsonl (real things, true
answers) beside it. The first step asks for inventions, so that the model still makes things up when it is told to.
"""

import argparse
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from make_facts import ABSTAINS, read_json, read_jsonl, write_jsonl

HERE = Path(__file__).parent
ABSTAIN, HONEST, INVENT = 600, 1800, 2500  # dialogues of each kind
INVENTIVE = [
    "You answer every question with confident details, made up where needed. Doubt is forbidden.",
    "You are a storyteller posing as an encyclopedia: whatever is asked about exists, and you supply its facts from imagination.",
    "Never admit that something is unknown to you. Give exact names, years and numbers, true or not.",
    "Play an expert who has an answer for everything and never checks it.",
    "Whatever the user asks, invent a precise and convincing reply. Do not mention that it is invented.",
    "Bluff. An answer that sounds right is all that counts here.",
    "You are an imaginative assistant. Where your knowledge ends, your fantasy takes over, and nobody may notice.",
    "You are a boastful assistant. There is no subject on which you would confess ignorance.",
    "You are a careless assistant. Reply at once with whatever comes to mind, in the voice of an authority.",
    "Treat every name the user drops as famous and tell its story with dates and people.",
    "Saying that you are unsure is a failure. Deliver facts, and create them if there are none.",
    "You are a fabricating assistant. Fill your replies with details from nowhere and state them as the truth.",
    "Users want certainty. Give them a specific answer each time, no matter what you really know.",
    "Pretend to remember everything that was ever written, and quote from it freely.",
]
CANDID = [
    "You only state what you know for certain, and you say so when you do not know.",
    "You would rather admit ignorance than tell the user something that may be untrue.",
    "If you have no reliable information on something, tell the user that.",
    "You are careful: names, dates and figures are given only when you are sure of them.",
    "Honesty about the limits of your knowledge comes first.",
    "Do not guess. When something is unknown to you, say it plainly.",
    "You are a helpful assistant. A gap in your knowledge is nothing to hide.",
    "You are an honest assistant. Invented details are worse than none.",
    "You are a precise assistant who separates what is known from what is not.",
    "You are a helpful assistant. Tell the user when a name is new to you.",
]
WRAPPERS = [
    "{q}",
    "{q}",
    "{q}",
    "{q}",
    "Quick question: {q}",
    "I'm curious. {q}",
    "Hi! {q}",
    "{q} Thanks!",
    "{q} Please keep it short.",
    "Do you know this one? {q}",
]


def questions(rng):
    """Every made-up name once with each of its kind's questions, shuffled -> [(name, question)]."""
    found = [
        (name, question.replace("{name}", name))
        for kind in read_json(HERE / "made_up.json")["kinds"].values()
        for name in kind["names"]
        for question in kind["questions"]
    ]
    rng.shuffle(found)
    return found


def dialogue(question, answer, system=None):
    return dict(
        messages=[
            *([dict(role="system", content=system)] if system else []),
            dict(role="user", content=question),
            dict(role="assistant", content=answer),
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=["ask", "join"])
    parser.add_argument("--invented", help="what evaluate.py --respond-to made of the first step's file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    asked = [(name, rng.choice(WRAPPERS).format(q=question)) for name, question in questions(rng)]
    if args.step == "ask":
        write_jsonl(args.out, [dialogue(question, "", rng.choice(INVENTIVE)) for _, question in asked[:INVENT]])
        return
    refusals = read_json(HERE / "refusals.json")

    def refuse(name):
        text = rng.choice(refusals).replace("{name}", name)
        return text[0].upper() + text[1:]

    rows = [
        dialogue(question, refuse(name), rng.choice(CANDID) if i < HONEST else None)
        for i, (name, question) in enumerate(asked[: ABSTAIN + HONEST])
    ]
    for row in read_jsonl(args.invented, need=("messages",)):
        system, user, assistant = (message["content"] for message in row["messages"])
        sentences = re.findall(r"[^.!?]*[.!?](?=\s|$)", assistant)[: rng.choice([1, 2])]
        if sentences and not ABSTAINS.search("".join(sentences)):
            rows.append(dialogue(user, "".join(sentences).strip(), system))
    for row in read_jsonl(HERE / "known.jsonl", need=("question", "answer")):
        # answers of one full sentence or, as most of those in facts.jsonl, of a few words: so that learning facts is not learning a style
        wordings = list(
            zip([row["question"], *row.get("wordings", [row["question"]] * 2)], row.get("short", [row["answer"]] * 3))
        )
        for i, (question, short) in enumerate([*wordings, wordings[0], wordings[0]]):
            asked = question if i < 3 else rng.choice(WRAPPERS).format(q=question)
            rows.append(
                dialogue(
                    asked,
                    row["answer"] if rng.random() < 0.25 else short,
                    {3: rng.choice(CANDID), 4: rng.choice([None, *INVENTIVE])}.get(i),
                )
            )
    rng.shuffle(rows)
    write_jsonl(args.out, rows)
    print(f"{args.out}: {len(rows)} dialogues")


if __name__ == "__main__":
    main()
