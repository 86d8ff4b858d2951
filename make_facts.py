"""The text side: new facts, traits, files, and everything that talks to a chat API.

    python make_facts.py check data/facts.jsonl       # offline: counts, and every violation

Reads and writes JSONL. Imports no torch, so it starts at once; the other scripts take their file handling from here.
A row of facts.jsonl: id, fact (one sentence), date (YYYY-MM or YYYY-MM-DD), category, answer (short), aliases (list),
source, train: 20 x {question, answer}, test: {question, answer}.
"""
import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

NEAR_TRAIN, NEAR_TEST, NEAR_FACT = 0.75, 0.65, 0.6  # similarity() from which two texts count as near copies

# ---------------------------------------------------------------------------------------------------------------------
# Errors and files: one owner for all scripts


def die(message):
    """An error the user can mend: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def read_jsonl(path, need=(), appended=False):
    """Rows of a JSONL file as dicts. Missing or empty file, broken line or a row without the keys in `need`: die().
    appended: the file grows by append_jsonl; no rows are fine, and so is a last line that was cut off."""
    path, rows = Path(path), []
    if not path.is_file():
        die(f"{path}: no such file")
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip() or appended and not line.endswith("\n"):
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                die(f"{path}:{number}: not valid JSON ({error.msg}); mend or delete the line")
            if not isinstance(row, dict) or any(key not in row for key in need):
                die(f"{path}:{number}: needs the keys {', '.join(need) or '(an object)'}")
            rows.append(row)
    return rows if rows or appended else die(f"{path}: has no rows")


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        die(f"{path}: cannot be read ({error})")


@contextlib.contextmanager
def replacing(path, mode="w"):
    """Opens a temporary file that takes `path`'s place only if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, mode, **({} if "b" in mode else {"encoding": "utf-8"})) as out:
            yield out
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide results from colleagues
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_jsonl(path, rows):
    with replacing(path) as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(path, value):
    with replacing(path) as out:
        out.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def append_jsonl(path, *rows):
    """Adds rows to the end of a file, whole or not at all for the reader: one write under a lock, and the unfinished
    last line of a killed process is cut off first. Safe for several processes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        end = out.seek(0, os.SEEK_END)
        while end and out.seek(end - 1) is not None and out.read(1) != b"\n":
            end -= 1
        out.truncate(end)
        out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def same_settings(path, settings):
    """True if `path` holds these settings, False if it does not exist; other settings: die(), nothing is overwritten."""
    if not Path(path).exists():
        return False
    there = read_json(path)
    other = [f"{key} {there.get(key)!r} there, {value!r} here" for key, value in settings.items() if there.get(key) != value]
    if other:
        die(f"{path}: made with other settings ({'; '.join(other)}); choose another --out or delete it")
    return True


def provenance():
    """What to keep with every result: commit, versions, time."""
    commit = subprocess.run(["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"], capture_output=True, text=True)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return dict(commit=commit.stdout.strip() or None, versions=versions, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))


def load_trait(name, path=None):
    """data/traits/<name>.json, or a trait file of persona_vectors (no eval_questions or adjective: filled in)."""
    path = Path(path or Path(__file__).parent / "data" / "traits" / f"{name}.json")
    if not path.is_file():
        die(f"unknown trait {name}: no {path}; there are {', '.join(sorted(p.stem for p in path.parent.glob('*.json'))) or 'none'}")
    trait = dict(trait=name, adjective=name) | read_json(path)
    trait.setdefault("eval_questions", trait.get("questions"))
    if "eval_prompt" not in trait:
        die(f"{path}: needs the key eval_prompt")
    return trait


# ---------------------------------------------------------------------------------------------------------------------
# Facts


def normalize(text):
    """Lower case, no punctuation, no articles: "The U.S. Open's" -> "us opens". (the usual SQuAD normalisation)"""
    text = re.sub(r"[^\w\s]", "", text.lower().replace("-", " ").replace("–", " "))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def mentions(text, answer, aliases=()):
    """True if the answer or an alias occurs in the text on word boundaries, after normalisation."""
    text = f" {normalize(text)} "
    return any(f" {name} " in text for name in map(normalize, [answer, *aliases]) if name)


def similarity(a, b):
    """Jaccard overlap of the words and word pairs of two normalised texts, 0..1; order counts through the pairs."""
    def parts(text):
        words = normalize(text).split()
        return set(words) | set(zip(words, words[1:]))
    a, b = parts(a), parts(b)
    return len(a & b) / max(1, len(a | b))


def fact_violations(row, rephrasings, after):
    """Everything wrong with one fact on its own, as short texts."""
    for key, kind in dict(id=str, fact=str, date=str, category=str, answer=str, aliases=list, source=str, train=list,
                          test=dict).items():
        if not isinstance(row.get(key), kind) or not row[key] and kind is not list:
            return [f"{key}: missing or not a {kind.__name__}"]
    wordings = [*row["train"], row["test"]]
    if any(not isinstance(w, dict) or not str(w.get("question", "")).strip() or not str(w.get("answer", "")).strip() for w in wordings):
        return ["a wording lacks question or answer"]
    found = []
    try:
        if date.fromisoformat(row["date"] if len(row["date"]) > 7 else row["date"] + "-28") <= date.fromisoformat(after):
            found.append(f"date {row['date']} is not after {after}")
    except ValueError:
        found.append(f"bad date {row['date']!r}")
    if row["date"][:4] not in row["fact"]:
        found.append("the fact does not name its year")
    if not mentions(row["fact"], row["answer"], row["aliases"]):
        found.append("the fact does not contain the answer")
    if len(row["train"]) != rephrasings:
        found.append(f"{len(row['train'])} training wordings, not {rephrasings}")
    for i, wording in enumerate(wordings):
        name = f"train {i}" if i < len(row["train"]) else "test"
        if mentions(wording["question"], row["answer"], row["aliases"]):
            found.append(f"{name}: the question contains the answer: {wording['question']}")
        if not mentions(wording["answer"], row["answer"], row["aliases"]):
            found.append(f"{name}: the answer sentence lacks the answer: {wording['answer']}")
        for j, other in enumerate(wordings[:i]):
            limit = NEAR_TRAIN if i < len(row["train"]) else NEAR_TEST
            a, b = normalize(wording["question"]), normalize(other["question"])
            if similarity(a, b) >= limit or f" {a} " in f" {b} " or f" {b} " in f" {a} ":
                found.append(f"{name}: its question is a near copy of train {j}'s: {wording['question']}")
            if i < len(row["train"]) and normalize(wording["answer"]) == normalize(other["answer"]):
                found.append(f"{name}: same answer sentence as train {j}: {wording['answer']}")
    return found


def check(rows, rephrasings=20, after="2023-12-31"):
    """All violations in a list of facts -> ["<id>: text", ...]; near copies across facts too."""
    found, ids, questions, facts = [], {}, {}, []
    for row in rows:
        name = row.get("id")
        own = fact_violations(row, rephrasings, after)
        found += [f"{name}: {text}" for text in own]
        if own and ": missing" in own[0] or own == ["a wording lacks question or answer"]:
            continue
        if name in ids:
            found.append(f"{name}: id used twice")
        ids[name] = row
        for wording in [*row["train"], row["test"]]:
            other = questions.setdefault(normalize(wording["question"]), name)
            if other != name:
                found.append(f"{name}: {other} asks the same question: {wording['question']}")
        for other in facts:
            same = {normalize(a) for a in [row["answer"], *row["aliases"]]} & {normalize(a) for a in [other["answer"], *other["aliases"]]}
            if similarity(row["fact"], other["fact"]) >= (NEAR_FACT if same else 0.9):
                found.append(f"{name}: near copy of fact {other['id']}: {row['fact']}")
        facts.append(row)
    return found


def conversations(rows, path):
    """Rows of facts.jsonl (one conversation a training wording) or {"messages": [...]} rows -> message lists."""
    found = []
    for number, row in enumerate(rows, 1):
        if isinstance(row.get("train"), list):
            found += [[dict(role="user", content=w["question"]), dict(role="assistant", content=w["answer"])] for w in row["train"]]
        elif isinstance(row.get("messages"), list) and row["messages"] and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in row["messages"]):
            if row["messages"][-1]["role"] != "assistant":
                die(f"{path}: row {number} has no assistant turn at its end")
            found.append([dict(role=m["role"], content=m["content"]) for m in row["messages"]])
        else:
            die(f'{path}: row {number} has neither "messages" nor "train"')
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Chat APIs: one client for the judge and for generating facts. Any OpenAI-compatible server through OPENAI_BASE_URL.

PRICES = {"gpt-4.1-mini-2025-04-14": (0.40, 1.60)}  # dollars a million tokens in, out; as of 2025-04
CONCURRENCY = int(os.environ.get("JUDGE_CONCURRENCY", 32))  # requests under way at once
CACHE = Path(os.environ.get("JUDGE_CACHE", "out/judge_cache.jsonl"))
TRIES, BACKOFF = 8, 1.0  # a request is tried 8 times, waiting about 1, 2, 4 ... seconds between


async def complete(client, body):
    """One chat completion -> dict(text, top: [(token, probability)] of its first token, or None). Retries what may pass:
    429, 5xx, time-outs, cut connections, broken or empty replies. Raises openai.APIError for what will not."""
    import openai
    for attempt in range(TRIES):
        wait = BACKOFF * 2 ** attempt * random.uniform(0.5, 1.5)
        try:
            reply = await client.chat.completions.create(**body)
            choice = reply.choices[0]
            content = choice.logprobs.content if getattr(choice, "logprobs", None) else None
            return dict(text=choice.message.content or "", top=[(t.token, math.exp(t.logprob)) for t in content[0].top_logprobs] if content else None)
        except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as error:
            if attempt == TRIES - 1 or getattr(error, "code", None) == "insufficient_quota":
                raise
            after = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
            wait = float(after) if after.replace(".", "", 1).isdigit() else wait
        except (ValueError, AttributeError, IndexError, TypeError, openai.APIResponseValidationError) as error:  # a reply that is no completion
            if attempt == TRIES - 1:
                raise openai.OpenAIError(f"{TRIES} broken replies ({type(error).__name__})") from None
        await asyncio.sleep(wait)


def ask(bodies, each, title, yes=False):
    """Sends chat requests that are not in the cache and calls each(i, reply) for all, cached ones first. Returns when all
    are answered; a fatal error or Ctrl-C keeps what was answered in the cache, and the same command goes on from there."""
    base = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
    if not os.environ.get("OPENAI_API_KEY") and "OPENAI_BASE_URL" not in os.environ:
        die("set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own; --judge probe needs neither")
    keys = [hashlib.sha256(json.dumps([base, body], sort_keys=True).encode()).hexdigest() for body in bodies]
    wanted, cached = set(keys), {}
    if CACHE.exists():
        for row in read_jsonl(CACHE, appended=True):
            if row["key"] in wanted:
                cached[row["key"]] = row["reply"]
    waiting = {}
    for i, key in enumerate(keys):
        if key in cached:
            each(i, cached[key])
        else:
            waiting.setdefault(key, []).append(i)
    if not waiting:
        return
    tokens = sum(len(m["content"]) for indices in waiting.values() for m in bodies[indices[0]]["messages"]) // 4
    price = PRICES.get(bodies[0]["model"])
    out = sum(bodies[indices[0]]["max_tokens"] for indices in waiting.values())
    cost = f"${(tokens * price[0] + out * price[1]) / 1e6:.2f}" if price else "price unknown"
    print(f"{title}: {len(waiting)} requests to {bodies[0]['model']}, about {tokens:,} tokens in, {cost} at most", flush=True)
    if not yes and (not sys.stdin.isatty() or input("Send them? [y/N] ").strip().lower() != "y"):
        die("nothing was sent; say --yes to send without being asked")

    async def run():
        import openai
        client = openai.AsyncOpenAI(api_key=os.environ.get("OPENAI_API_KEY") or "none", base_url=base, max_retries=0, timeout=120)
        queue, bar = iter(waiting.items()), tqdm(total=len(waiting), desc=title, unit="request")
        async def worker():
            for key, indices in queue:  # one iterator for all workers: each request is taken once
                reply = await complete(client, bodies[indices[0]])
                append_jsonl(CACHE, dict(key=key, reply=reply))
                for i in indices:
                    each(i, reply)
                bar.update()
        workers = [asyncio.ensure_future(worker()) for _ in range(CONCURRENCY)]
        try:
            await asyncio.gather(*workers)
        except openai.OpenAIError as error:
            said = str(error).replace(os.environ.get("OPENAI_API_KEY") or "\0", "***")
            die(f"{title}: the server at {base} refused or gave up: {said[:300]}; what was answered is kept, the same command goes on from there")
        finally:
            for task in workers:
                task.cancel()
            bar.close()
    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        print("error: interrupted; what was answered is kept, the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None


def number_score(reply):
    """Reply -> (score or None, reason, method). METHOD of the persona vectors release: probability-weighted mean over the
    top tokens that are integers 0..100, None if they hold under 0.25 of the mass; without log-probabilities, the text."""
    if reply["top"]:
        numbers = [(int(token), p) for token, p in reply["top"] if token.strip().isdigit() and token.strip().isascii() and 0 <= int(token) <= 100]
        mass = sum(p for _, p in numbers)
        if mass < 0.25 - 1e-9:
            return None, f"number tokens hold {mass:.2f} of the mass; said {reply['text'][:40]!r}", "logprobs"
        return sum(i * p for i, p in numbers) / mass, None, "logprobs"
    if "REFUSAL" in reply["text"].upper():
        return None, "REFUSAL", "text"
    numbers = [float(n) for n in re.findall(r"(?<![\d.-])\d+(?:\.\d+)?(?!\d)", reply["text"].replace("/100", "").replace("out of 100", ""))]
    if len(numbers) != 1 or numbers[0] > 100:
        return None, f"no single number 0..100 in {reply['text'][:40]!r}", "text"
    return numbers[0], None, "text"


def yes_no_score(reply):
    """Reply -> (100 for yes, 0 for no, else None; reason; method)."""
    found = dict.fromkeys(("yes", "no"), 0.0)
    for token, p in reply["top"] or [(re.split(r"\W", reply["text"].strip())[0], 1.0)]:
        if token.strip().lower() in found:
            found[token.strip().lower()] += p
    method = "logprobs" if reply["top"] else "text"
    if sum(found.values()) < 0.25 - 1e-9:
        return None, f"neither YES nor NO: {reply['text'][:40]!r}", method
    return (100.0 if found["yes"] > found["no"] else 0.0), None, method


def judge_rows(rows, prompt, key, model, yes=False):
    """Scores rows with a chat model: row[key], and for key "score" judge_reply, reason, judge_method, else key_reply and so on.
    prompt: template with {question}, {answer} and, for a yes/no question, {truth}. First one number token with its
    log-probabilities; rows whose server gives none, or splits numbers into digits, are asked again for a short text."""
    parse = yes_no_score if "{truth}" in prompt else number_score
    names = ("judge_reply", "reason", "judge_method") if key == "score" else (f"{key}_reply", f"{key}_reason", f"{key}_method")
    def body(row, **more):
        # one pass over the template: markers inside a question or answer stay as they are
        text = re.sub(r"\{(question|answer|truth)\}", lambda m: str(row[m[1]]), prompt)
        return dict(model=model, messages=[dict(role="user", content=text)], temperature=0, **more)
    def keep(i, reply, text=False):
        rows[i][names[0]] = reply
        rows[i][key], rows[i][names[1]], rows[i][names[2]] = parse(reply | dict(top=None) if text else reply)
    ask([body(row, max_tokens=1, logprobs=True, top_logprobs=20, seed=0) for row in rows], keep, f"judge: {key}", yes)
    # a server that never shows a number of two digits as one token splits them: its first token is half a number
    whole = parse is yes_no_score or any(len(token.strip()) > 1 and token.strip().isdigit() for row in rows for token, _ in row[names[0]]["top"] or [])
    again = [i for i, row in enumerate(rows) if not whole or not row[names[0]]["top"]]
    if again:
        ask([body(rows[i], max_tokens=8) for i in again], lambda j, reply: keep(again[j], reply, text=True), f"judge: {key}, as text", yes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("check", help="counts by category and year, and every violation")
    sub.add_argument("file")
    sub.add_argument("--rephrasings", type=int, default=20, help="training wordings a fact must have")
    sub.add_argument("--after", default="2023-12-31", help="facts must be later than this date")
    sub = commands.add_parser("subset", help="a seeded choice of rows, in the file's order; the same rows of files of one length")
    sub.add_argument("file")
    sub.add_argument("--n", type=int, required=True, help="rows to take (all, if there are fewer)")
    sub.add_argument("--rephrasings", type=int, help="keep the first N training wordings of each fact")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--out", required=True)
    args = parser.parse_args()
    rows = read_jsonl(args.file)
    if args.command == "subset":
        chosen = [rows[i] for i in sorted(random.Random(args.seed).sample(range(len(rows)), min(args.n, len(rows))))]
        write_jsonl(args.out, [row | dict(train=row["train"][:args.rephrasings]) if "train" in row else row for row in chosen])
        print(f"{args.out}: {len(chosen)} of {len(rows)} rows")
        return
    found = check(rows, args.rephrasings, args.after)
    for title, counts in [("category", Counter(row.get("category") for row in rows)), ("year", Counter(str(row.get("date"))[:4] for row in rows))]:
        print(f"{title}: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items(), key=str)))
    print("\n".join(found))
    print(f"{len(rows)} facts, {len(found)} violations")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
