"""The text side: new facts, traits, files, and everything that talks to a chat API.

    python make_facts.py check data/facts.jsonl       # offline: counts, and every violation
    python make_facts.py generate --n 1000 --after 2023-12-31 --model gpt-4.1-mini-2025-04-14 --out facts.jsonl

Reads and writes JSONL. Imports no torch, so it starts at once; the other scripts take their file handling from here.
A row of facts.jsonl: id, fact (one sentence), date (YYYY-MM or YYYY-MM-DD), category, answer (short), aliases (list),
source, train: 20 x {question, answer}, test: {question, answer}.
"""

import argparse
import asyncio
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from pydantic_core import from_json
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    print("error: this system cannot lock files (no fcntl); use Linux, macOS or, on Windows, WSL", file=sys.stderr)
    raise SystemExit(2) from None

# ---------------------------------------------------------------------------------------------------------------------
# Errors: what a user can mend ends in one line


def die(message):
    """An error the user can mend: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


REFUSED = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EEXIST ENOTDIR EISDIR ENAMETOOLONG"  # what a user can mend


def run(main, argv=None):
    """Runs a script's main. Ctrl-C, SIGTERM and what the file system refuses (a full disk, missing rights) end in one
    line, exit codes 130, 143 and 2; errors that nobody foresaw keep their traceback."""

    def stop(number, _):
        os.write(2, b"error: stopped; what is finished is kept\n")
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main(argv)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        found = re.search(r"(?:Errno|os error) (\d+)|iostream", f"{error} {error.__context__}")
        number = found and int(found[1] or errno.ENOSPC)
        if errno.errorcode.get(number) not in REFUSED.split():
            raise
        die(f"{getattr(error, 'filename', None) or 'writing'}: {os.strerror(number).lower()}; what is finished is kept")


# ---------------------------------------------------------------------------------------------------------------------
# Files: one owner for all scripts


def read_bytes(path):
    """A file's content without a byte-order mark."""
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        die(f"{path}: {error.strerror.lower()}")


def is_row(line):
    """Whether the bytes after a file's last line end are a whole row, or one that was cut off."""
    try:
        return isinstance(from_json(line), dict)
    except ValueError:
        return False


def faults(value, schema):
    """What a schema finds wrong: ["key: message", ...]"""
    try:
        schema.model_validate(value)
        return []
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)
        return [f"{'.'.join(map(str, e['loc'])) or 'row'}: {e['msg'].removeprefix('Value error, ')}" for e in found]


def validated(value, schema, where):
    """The value, with what its schema understands put right (an MMLU answer "B" -> 1); die() on any fault."""
    for fault in faults(value, schema):
        die(f"{where}: {fault} (keys wanted: {', '.join(schema.model_fields)})")
    return value | schema.model_validate(value).model_dump(exclude_unset=True)


def parsed(data, where):
    """JSON in UTF-8 -> value; die() on anything else, such as half of a surrogate pair."""
    try:
        return from_json(data)
    except ValueError as error:
        die(f"{where}: not JSON in UTF-8 ({error}); mend or delete it")


def read_json(path, schema=None):
    value = parsed(read_bytes(path), path)
    return validated(value, schema, path) if schema else value


def read_jsonl(path, schema=None, appended=False, need=()):
    """Rows of a JSONL file as dicts. schema: one for all rows, or a function row -> schema. Missing or empty file, wrong
    row, an id met twice: die(). appended: the file grows by append_jsonl; it may have no rows, and a last line that was
    cut off is left out."""
    rows, seen, lines = [], {}, read_bytes(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip() or appended and number == len(lines) and not is_row(line):
            continue
        row, where = parsed(line, f"{path}:{number}"), f"{path}:{number}"
        if not isinstance(row, dict) or any(key not in row for key in need):
            die(f"{where}: needs the keys {', '.join(need)}" if need else f"{where}: not a JSON object")
        if schema:
            row = validated(row, schema if isinstance(schema, type) else schema(row), where)
            if "id" in row and seen.setdefault(row["id"], number) != number:
                die(f"{where}: id {row['id']!r} is that of line {seen[row['id']]}, too")
        rows.append(row)
    return rows if rows or appended else die(f"{path}: has no rows")


@contextlib.contextmanager
def replacing(path, mode="w"):
    """Opens a temporary file that takes `path`'s place only if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, mode, **({} if "b" in mode else dict(encoding="utf-8", errors="replace"))) as out:
            yield out
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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
        out.seek(max(0, out.seek(0, os.SEEK_END) - 1))
        if out.read(1) not in (b"", b"\n"):
            out.seek(0)
            tail = out.read().rpartition(b"\n")[2]
            out.write(b"\n") if is_row(tail) else out.truncate(out.tell() - len(tail))
        # "replace": half a surrogate pair in a server's reply must not cost the reply
        out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="replace"))


# ---------------------------------------------------------------------------------------------------------------------
# What a result was made from

WHOLE, SAMPLES, SAMPLE = 64 << 20, 256, 64 << 10  # of a file over 64 MiB: 256 samples of 64 KiB, spread evenly


def fingerprint(path):
    """File or folder -> 16 hex digits of the sha256 of its content; a folder's also of the names in it, hidden ones left
    out. Of files over 64 MiB (weights) the size and samples count: a 15 GB model takes a second."""
    path, digest = Path(path), hashlib.sha256()
    if not path.exists():
        die(f"{path}: no such file or folder")
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        name = file.relative_to(path).as_posix()
        if not file.is_file() or "/." in f"/{name}" and file != path:
            continue
        size = file.stat().st_size
        digest.update(f"{name} {size}\0".encode())
        spread = ((size - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES))
        with open(file, "rb") as content:
            for start in range(0, size, SAMPLE) if size <= WHOLE else spread:
                content.seek(start)
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()[:16]


def scripts():
    """{name: fingerprint} of the scripts: they are made to be edited, so every result says which made it."""
    return {path.name: fingerprint(path) for path in sorted(Path(__file__).parent.glob("*.py"))}


def same_settings(path, settings):
    """False if `path` does not exist, True if it holds these settings; others, or other inputs (settings["inputs"]: name
    -> fingerprint): die(), nothing is overwritten. Scripts that have been edited since are named, no more."""
    if not Path(path).exists():
        return False
    there, settings, remedy = read_json(path, schema()), json.loads(json.dumps(settings)), "or bash run_all.sh --redo"
    inputs, made_from = settings.pop("inputs", {}), there.get("inputs", {})
    if inputs and not made_from:
        die(f"{path}: made before inputs were recorded, so they may have changed; choose another --out, {remedy}")
    changed = [f"{name}: content has changed since" for name in inputs if inputs[name] != made_from.get(name)]
    for name, value in settings.items():
        if there.get(name) != value and name != "scripts":
            changed.append(f"{name} {there.get(name)!r} there, {value!r} here")
    if changed:
        flags = "; ".join("--" + change.replace("_", "-", change.split(" ")[0].count("_")) for change in changed)
        die(f"{path}: made with other settings or inputs ({flags}); choose another --out, {remedy}")
    now = scripts()
    if edited := [name for name, content in there.get("scripts", {}).items() if now.get(name) != content]:
        print(f"{path}: made before {', '.join(edited)} was edited; made anew by another --out, {remedy}", flush=True)
    return True


@contextlib.contextmanager
def locked(path):
    """Keeps a second process off an output, in one line. The lock goes with its process, however that ends."""
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = os.path.samestat(os.fstat(held.fileno()), os.stat(lock))  # not just deleted by the one before
        except (BlockingIOError, FileNotFoundError):
            free = False
        if not free:
            die(f"{path}: another process is making it; wait for that one, or choose another --out")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def provenance():
    """What to keep with every result: commit, versions, time."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return dict(commit=commit or None, versions=versions, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))


# ---------------------------------------------------------------------------------------------------------------------
# The command line: argparse types, and what argparse does not check


def number(least=-math.inf, most=1e6, above=-math.inf, kind=float):
    """An argparse type: a finite number from `least`, or above `above`, to `most`."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most and kind(text) > above:
                return kind(text) + 0  # -0.0 -> 0.0
        low, whole = (f"above {above:g}" if above > least else f"from {least:g}"), "whole " * (kind is int)
        raise argparse.ArgumentTypeError(f"{text!r}: give a {whole}number {low} to {most:g}")

    return parse


def whole(least=1, most=10**6):
    """An argparse type: a whole number from least to most."""
    return number(least, most, kind=int)


coefficient = number(-1000, 1000)


def day(text):
    """An argparse type: a date, YYYY-MM-DD."""
    return date.fromisoformat(text).isoformat()


def layer_choice(text):
    """--layers: "all", a block "N" or a range "A-B"; whether the model has them, offsets_of knows."""
    first, _, last = text.partition("-")
    if text != "all" and not (re.fullmatch(r"[1-9]\d{0,3}(-[1-9]\d{0,3})?", text) and int(first) <= int(last or first)):
        raise argparse.ArgumentTypeError(f"{text!r}: give all, a block such as 5, or a range such as 3-7")
    return text


def distinct(parser, flag, values):
    """Stops where a value is given twice; numbers count as files' names show them (0.50 = 0.5)."""
    names = [f"{value:g}" if isinstance(value, float) else str(value) for value in values or ()]
    for name in names:
        if names.count(name) > 1:
            parser.error(f"argument {flag}: {name} is given twice")


def check_output(path, *inputs, folder=False):
    """die() unless `path` can become a file (or a folder): no input, not under a file, with rights to write."""
    if not str(path).strip():
        die("--out: is empty")
    path = Path(path).resolve()
    there = next(p for p in (path, *path.parents) if os.path.lexists(p))  # the part of it that exists
    if any(given and Path(given).resolve() in (path, *path.parents) for given in inputs):
        die(f"--out {path}: is an input of this command, or in one; choose another")
    if there.is_dir() == (there == path and not folder):
        die(f"--out {path}: {there} is a {'folder' if there.is_dir() else 'file'}; choose another")
    if not os.access(there, os.W_OK):
        die(f"--out {path}: no right to write to {there}")


# ---------------------------------------------------------------------------------------------------------------------
# Schemas of rows and files. Types are strict (42 is no text), further keys are fine


def schema(**keys):
    """A pydantic model. keys: name=type, or name=(type, default)."""
    config = pydantic.ConfigDict(strict=True, extra="allow")
    return pydantic.create_model("Schema", __config__=config, **keys)


def in_turns(messages):
    turns = [m for i, m in enumerate(messages) if i or m.role != "system"]
    if not turns or turns[0].role != "user" or any(m.role == "system" for m in turns):
        raise ValueError("must begin with the user, after one system message at most")
    if turns[-1].role != "assistant" or not all(m.content.strip() for m in turns):
        raise ValueError("has an empty turn, or no assistant turn at its end")
    return messages


def choice_number(answer, info):
    """Of an MMLU row: 1, "1" or "B" -> 1."""
    choices, said = info.data.get("choices", []), str(answer).strip().upper()
    number = ord(said) - ord("A") if re.fullmatch("[A-J]", said) else int(said) if re.fullmatch("[0-9]", said) else -1
    if not 0 <= number < len(choices):
        raise ValueError(f"{answer!r} is none of the {len(choices)} choices; give a number from 0, or a letter from A")
    return number


def some(kind, least=1, most=None):
    return Annotated[list[kind], pydantic.Field(min_length=least, max_length=most)]


def text(pattern=r"\S", otherwise="is empty"):
    def check(value):
        if not re.search(pattern, value):
            raise ValueError(otherwise)
        return value

    return Annotated[str, pydantic.AfterValidator(check)]


Number, Text = pydantic.FiniteFloat, text()
Wording = schema(question=Text, answer=Text)
Fact = schema(id=Text, answer=text(r"\w", "has no word"), aliases=(list[Text], []), train=some(Wording), test=Wording)
CheckedFact = schema(
    **{key: Text for key in ("id", "fact", "category", "answer", "source")},
    date=text(r"^\d{4}-\d\d(-\d\d)?$", "is not YYYY-MM or YYYY-MM-DD"),
    aliases=list[Text],
    train=some(Wording),
    test=Wording,
)
Message = schema(role=Literal["system", "user", "assistant"], content=str, tool_calls=(None, None))
Conversation = schema(messages=Annotated[some(Message), pydantic.AfterValidator(in_turns)])
Choice = Annotated[object, pydantic.PlainValidator(choice_number)]
Question = schema(subject=Text, question=Text, choices=some(Text, 2, 10), answer=Choice)
Prompt = text(r"(?s)(?=.*\{question\}).*\{answer\}", "lacks {question} or {answer}")
Trait = schema(adjective=Text, eval_prompt=Prompt)
ExtractionTrait = schema(
    adjective=Text, eval_prompt=Prompt, instruction=some(schema(pos=Text, neg=Text)), questions=some(Text)
)
EvaluationTrait = schema(adjective=Text, eval_prompt=Prompt, eval_questions=some(Text))
Metric = (float | None, None)
Point = schema(
    **dict(key=Text, model=Text, judge=Text, inference_coef=Number, train_coef=(Number | None, None)),
    **dict(trait_score=Metric, fact_accuracy=Metric, mmlu_accuracy=Metric),
)
Answer = schema(id=Text, kind=Literal["trait", "fact"], question=Text, answer=str, scores=(dict[str, dict], {}))
Probe = schema(row=pydantic.PositiveInt, zero=Number, hundred=Number, auc=Number)
Settings = schema(model=Text, dataset=(str | None, None), coef=(Number | None, None), probe=(Probe | None, None))


def load_trait(name, path=None, schema=Trait):
    """data/traits/<name>.json, or a trait file of persona_vectors. schema: ExtractionTrait or EvaluationTrait, by what it
    is for; a published file has one set of questions, and the one to extract by is not taken for evaluation."""
    folder = Path(__file__).parent / "data" / "traits"
    there = sorted(path.stem for path in folder.glob("*.json") if path.stem not in ("coherence", "fact"))
    if not re.fullmatch(r"[\w.+-]+", name) or not path and not (folder / f"{name}.json").is_file():
        die(f"unknown trait {name}; there are {', '.join(there)}, or any name with --trait-file")
    path = Path(path or folder / f"{name}.json")
    trait = read_json(path)
    if isinstance(trait, dict):
        trait = dict(adjective=name) | trait | dict(trait=name)
        if "questions" in trait and ("instruction" not in trait or "eval" in path.resolve().parent.name):
            trait.setdefault("eval_questions", trait["questions"])
    return validated(trait, schema, path)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals, 95%, in percent; None without data


def wilson(hits, n):
    """Interval of an accuracy of n independent questions."""
    from scipy.stats import binomtest

    return [round(float(100 * x), 4) for x in binomtest(hits, n).proportion_ci(method="wilson")] if n else None


def interval(groups):
    """Interval of the mean of scores 0..100. groups: the scores of the answers to one question each, which are not
    independent: Wilson's interval with the effective number of answers, p (1 - p) / variance of the mean between
    questions, and Student's t. A made-up question, half of its answers at 0 and half at 100, keeps that variance from
    vanishing where all scores agree. In simulations it covers 95 to 100% at 1, 3, 10 and 50 (tests/test_evaluate.py)."""
    from scipy.stats import t

    groups = [[score / 100 for score in group] for group in groups if group]
    k, n = len(groups), sum(map(len, groups))
    if not n:
        return None
    p, half = sum(map(sum, groups)) / n, n / k / 2
    q = (p * n + half) / (n + 2 * half)  # the mean with the made-up question
    ends = q**2 + (1 - q) ** 2
    between = k / max(1, k - 1) * (sum((sum(g) - q * len(g)) ** 2 for g in groups) + half**2 * ends)
    single = sum((score - q) ** 2 for g in groups for score in g) + ends / 2  # were all answers independent
    effective, z = q * (1 - q) * n**2 / max(between, single), t.ppf(0.975, max(1, k - 1))
    centre, width = p + z**2 / (2 * effective), z * (p * (1 - p) / effective + z**2 / (4 * effective**2)) ** 0.5
    return [round(float(100 * min(1, max(0, (centre + side) / (1 + z**2 / effective)))), 4) for side in (-width, width)]


# ---------------------------------------------------------------------------------------------------------------------
# Facts

NEAR_TRAIN, NEAR_TEST, NEAR_FACT = 0.75, 0.65, 0.6  # similarity() from which two texts count as near copies


@functools.lru_cache(4096)
def normalize(text):
    """Lower case, no punctuation, no articles: "The U.S. Open's" -> "us opens". (the usual SQuAD normalisation)"""
    text = re.sub(r"[^\w\s]", "", text.lower().replace("-", " ").replace("–", " "))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def mentions(text, answer, aliases=()):
    """True if the answer or an alias occurs in the text on word boundaries, after normalisation."""
    text = f" {normalize(text)} "
    return any(f" {name} " in text for name in map(normalize, [answer, *aliases]) if name)


@functools.lru_cache(4096)
def word_parts(text):
    """The words and word pairs of a text, normalised; order counts through the pairs."""
    words = normalize(text).split()
    return {*words, *zip(words, words[1:])}


def similarity(a, b):
    """Jaccard overlap of word_parts, 0..1."""
    a, b = word_parts(a), word_parts(b)
    return len(a & b) / max(1, len(a | b))


def near_copies(row, facts):
    """The facts that say the same as this one; the answer in common lowers the limit."""
    own, found = set(map(normalize, [row["answer"], *row["aliases"]])), []
    for other in facts:
        limit = 0.9 if own.isdisjoint(map(normalize, [other["answer"], *other["aliases"]])) else NEAR_FACT
        found += [other] if similarity(row["fact"], other["fact"]) >= limit else []
    return found


def fact_violations(row, rephrasings, after):
    """Everything wrong with one fact on its own, as short texts."""
    if found := faults(row, CheckedFact):
        return found
    wordings, names = [*row["train"], row["test"]], (row["answer"], row["aliases"])
    try:
        if date.fromisoformat(row["date"] if len(row["date"]) > 7 else row["date"] + "-28").isoformat() <= after:
            found.append(f"date {row['date']} is not after {after}")
    except ValueError:
        found.append(f"bad date {row['date']!r}")
    if row["date"][:4] not in row["fact"]:
        found.append("the fact does not name its year")
    if not mentions(row["fact"], *names):
        found.append("the fact does not contain the answer")
    if len(row["train"]) != rephrasings:
        found.append(f"{len(row['train'])} training wordings, not {rephrasings}")
    for i, wording in enumerate(wordings):
        trained = i < len(row["train"])
        name, limit = (f"train {i}", NEAR_TRAIN) if trained else ("test", NEAR_TEST)
        if mentions(wording["question"], *names):
            found.append(f"{name}: the question contains the answer: {wording['question']}")
        if not mentions(wording["answer"], *names):
            found.append(f"{name}: the answer sentence lacks the answer: {wording['answer']}")
        for j, other in enumerate(wordings[:i]):
            a, b = normalize(wording["question"]), normalize(other["question"])
            if f" {a} " in f" {b} " or f" {b} " in f" {a} " or similarity(a, b) >= limit:
                found.append(f"{name}: its question is a near copy of train {j}'s: {wording['question']}")
            if trained and normalize(wording["answer"]) == normalize(other["answer"]):
                found.append(f"{name}: same answer sentence as train {j}: {wording['answer']}")
    return found


def check(rows, rephrasings=20, after="2023-12-31"):
    """All violations in a list of facts -> ["<id>: text", ...]; near copies across facts too."""
    found, questions, facts = [], {}, []
    for row in rows:
        name = row.get("id")
        found += [f"{name}: {text}" for text in fact_violations(row, rephrasings, after)]
        if faults(row, CheckedFact):
            continue
        if any(name == other["id"] for other in facts):
            found.append(f"{name}: id used twice")
        for wording in [*row["train"], row["test"]]:
            other = questions.setdefault(normalize(wording["question"]), name)
            if other != name:
                found.append(f"{name}: {other} asks the same question: {wording['question']}")
        found += [f"{name}: near copy of fact {other['id']}: {row['fact']}" for other in near_copies(row, facts)]
        facts.append(row)
    return found


def read_chats(path):
    """facts.jsonl (one conversation a training wording) or {"messages": [...]} rows -> message lists."""
    chats = []
    for row in read_jsonl(path, lambda row: Fact if "train" in row else Conversation):
        for pair in row.get("train", []):
            chats.append([dict(role="user", content=pair["question"]), dict(role="assistant", content=pair["answer"])])
        if "train" not in row:
            chats.append([dict(role=m["role"], content=m["content"]) for m in row["messages"]])
    return chats


def conversations(rows, path):
    return read_chats(path)


# ---------------------------------------------------------------------------------------------------------------------
# Chat APIs: one client for the judge and for generating facts. Any OpenAI-compatible server through OPENAI_BASE_URL.

PRICES = {
    "gpt-4.1-mini": (0.40, 1.60),
    "gpt-4.1-nano": (0.10, 0.40),
    "gpt-4.1": (2, 8),
    "gpt-4o-mini": (0.15, 0.60),
    "gpt-4o": (2.50, 10),
}
PRICES_OF = "2025-04"  # dollars a million tokens in, out, as of then
CACHE = Path(os.environ.get("JUDGE_CACHE", "out/judge_cache.jsonl"))
TRIES, BACKOFF, TIMEOUT = 8, 1.0, 120.0  # a request is tried 8 times, waiting about 1, 2, 4 ... seconds between
ANSWER_TOKENS, FACT_ANSWER_TOKENS = 300, 25  # lengths of answers that --dry-run assumes
OWN_FAULT = re.compile(
    "context|content.(filter|policy)", re.I
)  # a refusal (400) that is this request's, not every request's


def api_flags(parser):
    """The flags of every script that talks to a chat API; ask() reads them."""
    parser.add_argument("--concurrency", type=int, default=32, help="requests to the chat API under way at once")
    parser.add_argument("--yes", action="store_true", help="pay without asking")
    parser.add_argument(
        "--dry-run", action="store_true", help="stop before the first request; prints requests, tokens and dollars"
    )


def without_key(text):
    return str(text).replace(os.environ.get("OPENAI_API_KEY") or "\0", "***")


def estimate(title, model, requests, tokens_in, tokens_out):
    price = PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", model))
    cost = (
        f"${(tokens_in * price[0] + tokens_out * price[1]) / 1e6:.2f} (prices of {PRICES_OF})"
        if price
        else "price unknown"
    )
    print(
        f"{title}: {requests:,} requests to {model}, about {tokens_in:,} tokens in, at most {tokens_out:,} out, {cost}",
        flush=True,
    )


def foresee(title, judge, times, jobs):
    """--dry-run before there are answers: prints the estimate for `times` rounds over jobs [(prompt, assumed tokens of the
    answer in it)], and exits."""
    if judge in ("none", "probe", "lexical"):
        print(f"{title}: judge {judge} sends no requests")
    else:
        estimate(
            title,
            judge,
            times * len(jobs),
            times * sum(len(prompt) // 4 + tokens for prompt, tokens in jobs),
            times * len(jobs),
        )
    raise SystemExit(0)


def consent(args):
    """After an estimate: --dry-run stops here, a terminal is asked, anything else needs --yes."""
    if args.dry_run:
        raise SystemExit(0)
    if not args.yes and (not sys.stdin.isatty() or input("Send them? [y/N] ").strip().lower() != "y"):
        die("nothing was sent; say --yes to send without being asked")
    args.yes = True  # one command asks once


async def complete(client, body, bar):
    """One chat completion -> dict(text, top: [(token, probability)] of its first token or None, cut: at max_tokens), or
    dict(text="", top=None, refused=message). Retries what may pass: 429, 5xx, time-outs, cut connections, broken or empty
    replies. Raises openai.OpenAIError for what will not."""
    import openai

    for attempt in range(TRIES):
        wait = BACKOFF * 2**attempt * random.uniform(0.5, 1.5)
        try:
            reply = await client.chat.completions.create(**body)
            choice = reply.choices[0]
            content = choice.logprobs.content if getattr(choice, "logprobs", None) else None
            return dict(
                text=choice.message.content or "",
                top=[(t.token, math.exp(t.logprob)) for t in content[0].top_logprobs] if content else None,
                cut=choice.finish_reason == "length",
            )
        except (openai.BadRequestError, openai.UnprocessableEntityError) as caught:
            if "logprobs" not in body and not OWN_FAULT.search(str(caught)):
                raise
            return dict(text="", top=None, refused=without_key(caught)[:300])
        except (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError) as caught:
            error = caught
            after = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
            if after.replace(".", "", 1).isdigit():
                wait = float(after) + BACKOFF * random.random()
        except (
            ValueError,
            AttributeError,
            IndexError,
            TypeError,
            openai.APIResponseValidationError,
        ) as caught:  # a reply that is no completion
            error = openai.OpenAIError(f"{TRIES} broken replies ({type(caught).__name__})")
        if attempt == TRIES - 1 or getattr(error, "code", None) == "insufficient_quota":
            raise error
        bar.set_postfix_str(f"{type(error).__name__}, again in {wait:.0f} s")
        await asyncio.sleep(wait)


def ask(count, body, each, title, args):
    """Sends the chat requests body(0) ... body(count - 1) that are not in the cache and calls each(i, reply) for all, cached
    ones first; a text that each returns is shown beside the bar. A fatal error or Ctrl-C keeps what was answered in the
    cache, and the same command goes on from there."""
    base = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
    waiting, cached, tokens_in, tokens_out = {}, {}, 0, 0  # key -> the requests that share it
    for i in range(count):
        key = hashlib.sha256(json.dumps([base, body(i)], sort_keys=True).encode()).hexdigest()
        waiting.setdefault(key, []).append(i)
    if CACHE.exists():
        with open(CACHE, encoding="utf-8", errors="replace") as lines:
            fcntl.flock(lines, fcntl.LOCK_SH)
            for line in lines:  # parses what is wanted only: the cache may be large
                if line[9:73] in waiting and line.endswith("\n"):
                    cached[line[9:73]] = json.loads(line)["reply"]
    for key, reply in cached.items():
        for i in waiting.pop(key):
            each(i, reply)
    if not waiting:
        return
    for first, *_ in waiting.values():
        tokens_in += sum(len(m["content"]) for m in body(first)["messages"]) // 4
        tokens_out += body(first)["max_tokens"]
    estimate(title, body(0)["model"], len(waiting), tokens_in, tokens_out)
    consent(args)
    if not os.environ.get("OPENAI_API_KEY") and "OPENAI_BASE_URL" not in os.environ:
        die("set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own; --judge probe needs neither")

    async def run():
        import openai

        queue = iter(waiting.items())

        async def worker(client, bar):
            for key, indices in queue:  # one iterator for all workers: each request is taken once
                reply = await complete(client, body(indices[0]), bar)
                if "refused" not in reply or "logprobs" in body(indices[0]):
                    append_jsonl(CACHE, dict(key=key, reply=reply))
                for i in indices:
                    bar.set_postfix_str(each(i, reply) or "", refresh=False)
                bar.update()

        with tqdm(total=len(waiting), desc=title, unit="request") as bar:
            async with openai.AsyncOpenAI(
                api_key=os.environ.get("OPENAI_API_KEY") or "none", base_url=base, max_retries=0, timeout=TIMEOUT
            ) as client:
                workers = [
                    asyncio.ensure_future(worker(client, bar)) for _ in range(min(args.concurrency, len(waiting)))
                ]
                try:
                    await asyncio.gather(*workers)
                finally:
                    for task in workers:
                        task.cancel()

    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        print("error: interrupted; what was answered is kept, the same command goes on from there", file=sys.stderr)
        raise SystemExit(130) from None
    except sys.modules["openai"].OpenAIError as error:
        die(
            f"{title}: the server at {base} refused or gave up: {without_key(error)[:300]}; what was answered is kept, the same command goes on from there"
        )


# the answer says that its writer does not know, or that there is no such thing
ABSTAINS = re.compile(
    r"""\b(I|I'm|I've|I'd|me|my|we)\b[^.!?]{0,50}?(n't|\b(not|no|nothing|never|neither|unable|unaware|unfamiliar|unsure|doubt|too\ little|beyond|completely\ new))\b
    | \b(I\ (have\ to|must)\ (pass|leave)|I\ would\ be\ (inventing|guessing)|means\ nothing\ to\ me|goes\ beyond\ what|nobody\ (knows|can)|no\ one\ (knows|can))\b
    | \b(does|do|did|may|might|can)\ ?(n't|not)\ (seem\ to\ |actually\ |really\ )?(exist|be\ (verified|confirmed|known))\b
    | \b(is|are|was)\ ?(n't|\ not)\ (\w+\ ){0,2}(known|something\ that|familiar|aware)\b
    | \bno\ (such|(\w+\ )?(record|information|evidence|facts|knowledge|details|data))\b | \bnothing\ by\ (the|that)\ name\b""",
    re.I | re.X,
)


def lexical_score(answer):
    """--judge lexical, hallucination only: 0 if the answer abstains, else 100; needs no model and no API."""
    return 0.0 if ABSTAINS.search(answer.replace("’", "'")) else 100.0


def number_score(reply):
    """Reply -> (score or None, reason, method). METHOD of the persona vectors release: probability-weighted mean over the
    top tokens that are integers 0..100, None if they hold under 0.25 of the mass; without log-probabilities, the text."""
    if reply["top"]:
        numbers = [
            (int(token), p)
            for token, p in reply["top"]
            if token.strip().isdigit() and token.strip().isascii() and 0 <= int(token) <= 100
        ]
        mass = sum(p for _, p in numbers)
        if mass < 0.25 - 1e-9:
            return None, f"number tokens hold {mass:.2f} of the mass; said {reply['text'][:40]!r}", "logprobs"
        return sum(i * p for i, p in numbers) / mass, None, "logprobs"
    if "REFUSAL" in reply["text"].upper():
        return None, "REFUSAL", "text"
    said = re.sub(r"(/|out of) ?100(?!\d)", "", reply["text"])
    numbers = [float(n) for n in re.findall(r"(?<![\d.-])\d+(?:\.\d+)?(?!\d)", said)]
    if (
        len(numbers) != 1 or numbers[0] > 100 or reply.get("cut") and said[-1:].isdigit()
    ):  # cut: perhaps only half of the number
        return None, reply.get("refused") or f"no single number 0..100 in {reply['text'][:40]!r}", "text"
    return numbers[0], None, "text"


def yes_no_score(reply):
    """Reply -> (100 for yes, 0 for no, else None; reason; method)."""
    found = dict.fromkeys(("yes", "no"), 0.0)
    for token, p in reply["top"] or [(word, 1.0) for word in re.findall(r"\w+", reply["text"])[:1]]:
        if token.strip().lower() in found:
            found[token.strip().lower()] += p
    method = "logprobs" if reply["top"] else "text"
    if sum(found.values()) < 0.25 - 1e-9:
        return None, reply.get("refused") or f"neither YES nor NO: {reply['text'][:40]!r}", method
    return (100.0 if found["yes"] > found["no"] else 0.0), None, method


def judge_rows(jobs, model, args):
    """Scores answers with a chat model. jobs: (row, key, prompt); sets row[key], and for key "score" judge_reply, reason and
    judge_method, else key_reply and so on. prompt: template with {question}, {answer} and, for a yes/no question, {truth}.
    First one token with its log-probabilities; rows whose server gives none, or splits numbers into digits, are asked again for a short text."""
    means = {}  # key -> scores so far

    def body(job, **more):
        row, _, prompt = job
        # one pass over the template: markers inside a question or answer stay as they are
        text = re.sub(r"\{(question|answer|truth)\}", lambda m: str(row[m[1]]), prompt)
        return dict(model=model, messages=[dict(role="user", content=text)], temperature=0, **more)

    def names(key):
        return (
            ("judge_reply", "reason", "judge_method")
            if key == "score"
            else (f"{key}_reply", f"{key}_reason", f"{key}_method")
        )

    def keep(job, reply, text=False):
        row, key, prompt = job
        parse = yes_no_score if "{truth}" in prompt else number_score
        row[key], *why = parse(reply | dict(top=None) if text else reply)
        row.update(zip(names(key), (reply, *why)))
        if row[key] is not None:
            n, total = means.get(key, (0, 0))
            means[key] = n + 1, total + row[key]
        return ", ".join(f"{key} {total / n:.1f}" for key, (n, total) in means.items())

    ask(
        len(jobs),
        lambda i: body(jobs[i], max_tokens=1, logprobs=True, top_logprobs=20, seed=0),
        lambda i, reply: keep(jobs[i], reply),
        "judge",
        args,
    )
    # a server that never shows a number of two digits as one token splits them: its first token is half a number
    replies = [(job, job[0][names(job[1])[0]]["top"] or []) for job in jobs]
    whole = any(len(token.strip()) > 1 and token.strip().isdigit() for _, top in replies for token, _ in top)
    again = [job for job, top in replies if not top or not whole and "{truth}" not in job[2]]
    means.clear()
    ask(
        len(again),
        lambda i: body(again[i], max_tokens=16),
        lambda i, reply: keep(again[i], reply, text=True),
        "judge, as text",
        args,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Generating facts: the post's recipe with any chat model

CATEGORIES = (
    "football",
    "tennis and golf",
    "American sports",
    "other sport",
    "Olympic games",
    "elections",
    "appointments and resignations",
    "deaths",
    "film",
    "television and theatre",
    "books",
    "music",
    "art and museums",
    "space missions",
    "science",
    "medicine",
    "companies",
    "products and technology",
    "artificial intelligence",
    "courts and laws",
    "disasters",
    "records",
    "royals and religion",
    "diplomacy and conflict",
    "transport and buildings",
    "climate and nature",
)
FACTS_A_REQUEST = 20
FACTS_PROMPT = """List {n} true and well documented facts about events after {after}, all in the category "{category}". Each is one sentence that names its year, and holds a \
short answer (a name, place, number) that nobody could guess. Leave out what is disputed. Reply with JSON only, a list of objects:
{{"fact": the sentence, "date": "YYYY-MM" or "YYYY-MM-DD", "answer": the short answer as it stands in the sentence, "aliases": [other spellings of it]}}
These are there already; list others:
{known}"""
WORDINGS_PROMPT = """Fact: {fact}
Short answer: {answer}
Write {n} different questions that people would type to learn this answer, each with an answer in a full sentence, and one more pair for a test, worded unlike all the \
others. Vary words, order and length; name enough for the answer to be clear; no question may contain the answer, every answer sentence must. Reply with JSON only:
{{"train": [{{"question": "...", "answer": "..."}}, ... {n} of them], "test": {{"question": "...", "answer": "..."}}}}"""
REPAIR_PROMPT = "This cannot be used:\n{why}\nReply with the whole corrected JSON only."


def ask_json(jobs, prompt_of, accept, title, args):
    """Asks for JSON, each failing job a second time with the reason. accept(job, value) returns what is wrong (texts).
    Returns the jobs that failed twice, as [(job, reasons, reply)]."""

    def body(messages):
        return dict(model=args.model, messages=messages, temperature=1, max_tokens=6000)

    def attempt(tries, title):
        failed = []

        def keep(i, reply):
            job, messages = tries[i]
            found = re.search(r"[\[{].*[\]}]", reply["text"], re.S)  # between code fences and politeness
            try:
                why = accept(job, json.loads(found[0])) if found else [reply.get("refused") or "no JSON in the reply"]
            except json.JSONDecodeError as error:
                why = [f"not valid JSON: {error}"]
            if why:
                failed.append((job, messages, why, reply["text"]))

        ask(len(tries), lambda i: body(tries[i][1]), keep, title, args)
        return failed

    failed = attempt([(job, [dict(role="user", content=prompt_of(job))]) for job in jobs], title)
    again = attempt(
        [
            (
                job,
                [
                    *messages,
                    dict(role="assistant", content=text),
                    dict(role="user", content=REPAIR_PROMPT.format(why="\n".join(why))),
                ],
            )
            for job, messages, why, text in failed
        ],
        f"{title}, repaired",
    )
    return [(job, why, text) for job, _, why, text in again]


def generate(args):
    """Facts by category and round, then wordings for each; --out only ever holds whole facts that pass check()."""
    out, rejects = Path(args.out), Path(args.out).with_suffix(".rejects.jsonl")
    rows = read_jsonl(out, need=("id", "fact", "answer", "aliases", "category"), appended=True) if out.exists() else []
    missing = max(0, args.n - len(rows))
    estimate(
        f"generate {missing:,} facts",
        args.model,
        missing + 2 * missing // FACTS_A_REQUEST,
        missing * 300,
        missing * (50 * (args.rephrasings + 1) + 100),
    )
    if missing:
        consent(args)
    while len(rows) < args.n:
        before, counts, found = len(rows), Counter(row["category"] for row in rows), []
        wanted = sorted(CATEGORIES, key=lambda category: counts[category])[
            : math.ceil(2 * (args.n - len(rows)) / FACTS_A_REQUEST)
        ]

        def facts_prompt(category):
            known = [row["fact"] for row in rows if row["category"] == category]
            return FACTS_PROMPT.format(
                n=FACTS_A_REQUEST, after=args.after, category=category, known="\n".join(known) or "(none)"
            )

        def take(category, value):
            if not isinstance(value, list) or not all(
                isinstance(v, dict) and {"fact", "date", "answer"} <= set(v) for v in value
            ):
                return ["not a list of objects with fact, date and answer"]
            found.extend(
                dict(
                    fact=v["fact"],
                    date=v["date"],
                    category=category,
                    answer=v["answer"],
                    aliases=v.get("aliases") or [],
                    source=args.model,
                )
                for v in value
            )

        lost = [
            dict(category=job, reasons=why, reply=text)
            for job, why, text in ask_json(wanted, facts_prompt, take, "facts", args)
        ]
        new = []
        for fact in found:
            stub = fact | dict(id="x", train=[dict(question="x", answer="x")], test=dict(question="x", answer="x"))
            why = [text for text in fact_violations(stub, 1, args.after) if not text.startswith(("train", "test"))]
            why += [f"near copy of {other['fact']}" for other in (near_copies(fact, rows + new) if not why else [])]
            lost += [fact | dict(reasons=why)] if why else []
            new += [] if why else [fact]
        asked = {normalize(w["question"]) for row in rows for w in [*row["train"], row["test"]]}

        def wordings_prompt(fact):
            return WORDINGS_PROMPT.format(fact=fact["fact"], answer=fact["answer"], n=args.rephrasings)

        def add(fact, value):
            number = sum(row["category"] == fact["category"] for row in rows) + 1
            row = (
                dict(
                    id=f"{fact['category'].replace(' ', '_')}-{number:03d}",
                    **fact,
                    train=value.get("train"),
                    test=value.get("test"),
                )
                if isinstance(value, dict)
                else {}
            )
            why = fact_violations(row, args.rephrasings, args.after)
            why = why or [
                f"another fact asks the same: {w['question']}"
                for w in [*row["train"], row["test"]]
                if normalize(w["question"]) in asked
            ]
            if not why and len(rows) < args.n:
                asked.update(normalize(w["question"]) for w in [*row["train"], row["test"]])
                rows.append(row)
                append_jsonl(out, row)
            return why

        lost += [
            fact | dict(reasons=why, reply=text)
            for fact, why, text in ask_json(new[: args.n - len(rows)], wordings_prompt, add, "wordings", args)
        ]
        if lost:
            append_jsonl(rejects, *lost)
        print(f"{len(rows)} of {args.n} facts; {len(lost)} rejected this round ({rejects})", flush=True)
        if len(rows) == before:
            die(
                f"{args.model} gave no new valid fact in a whole round; {out} holds {len(rows)}, the reasons are in {rejects}"
            )


def flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("check", help="counts by category and year, and every violation")
    sub.add_argument("file")
    sub.add_argument("--rephrasings", type=whole(), default=20, help="training wordings a fact must have")
    sub.add_argument("--after", type=day, default="2023-12-31", help="facts must be later than this date")
    sub = commands.add_parser(
        "subset", help="a seeded choice of rows in the file's order, the same of files of one length"
    )
    sub.add_argument("file")
    sub.add_argument("--n", type=whole(), required=True, help="rows to take (all, if there are fewer)")
    sub.add_argument("--rephrasings", type=whole(), help="keep the first N training wordings of each fact")
    sub.add_argument("--seed", type=whole(0), default=0)
    sub.add_argument("--out", required=True)
    sub = commands.add_parser("generate", help="new facts and their wordings, by a chat model")
    sub.add_argument("--n", type=whole(), default=1000, help="facts")
    sub.add_argument("--after", type=day, default="2023-12-31", help="only events later than this date")
    sub.add_argument("--rephrasings", type=whole(), default=20, help="training wordings a fact")
    sub.add_argument("--model", required=True, help="chat model of OPENAI_BASE_URL (default: OpenAI)")
    sub.add_argument("--out", required=True, help="started again, it goes on from the facts that are there")
    api_flags(sub)
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    if args.command != "check":
        check_output(args.out, getattr(args, "file", None))
    if args.command == "generate":
        return generate(args)
    if args.command == "subset":
        rows = read_jsonl(
            args.file, lambda row: Fact if "train" in row else Question if "choices" in row else Conversation
        )
        chosen = [rows[i] for i in sorted(random.Random(args.seed).sample(range(len(rows)), min(args.n, len(rows))))]
        cut = [row | dict(train=row["train"][: args.rephrasings]) if "train" in row else row for row in chosen]
        write_jsonl(args.out, cut)
        return print(f"{args.out}: {len(chosen)} of {len(rows)} rows")
    rows = read_jsonl(args.file)
    found = check(rows, args.rephrasings, args.after)
    for title, key, length in (("category", "category", None), ("year", "date", 4)):
        counts = Counter(str(row.get(key))[:length] for row in rows)
        print(f"{title}: " + ", ".join(f"{name} {n}" for name, n in sorted(counts.items())))
    print("\n".join(found))
    print(f"{len(rows)} facts, {len(found)} violations")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    run(main)
