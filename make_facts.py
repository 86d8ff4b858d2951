"""The text side: new facts, traits, files, and everything that talks to a chat API.

    python make_facts.py check data/facts.jsonl       # offline: every violation
    python make_facts.py generate --n 1000 --after 2023-12-31 --model gpt-4.1-mini-2025-04-14 --out facts.jsonl

Reads and writes JSONL; imports no torch, so it starts at once. A row of facts.jsonl: id, fact (one sentence), date
(YYYY-MM or YYYY-MM-DD), category, answer, aliases, source, train: 20 x {question, answer}, test: {question, answer}.
"""

import argparse
import asyncio
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter, namedtuple
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import filelock
import pydantic
from pydantic_core import from_json
from tqdm import tqdm

# ---- Errors and the command line: what a user can mend ends in one line ---------------------------------------------


def die(message):
    """An error the user can mend: one line on stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def stop(number, _):
    os.write(2, b"error: stopped; what is finished is kept, the same command goes on from here\n")
    raise SystemExit(128 + number)


def run(main, argv=None):
    """Runs a script's main. Ctrl-C, SIGTERM and what the file system refuses end in one line, codes 130, 143 and 2."""
    sys.stdin = sys.stdin or open(os.devnull)  # where it is closed
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main(argv)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        found = re.search(r"(?:Errno|os error) (\d+)|iostream", f"{error} {error.__context__}")
        number = found and int(found[1] or errno.ENOSPC)
        mendable = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EEXIST ENOTDIR EISDIR ENAMETOOLONG".split()
        if errno.errorcode.get(number) not in mendable:
            raise
        die(f"{getattr(error, 'filename', None) or 'writing'}: {os.strerror(number).lower()}; what is finished is kept")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, too."""

    def error(self, message):
        die(f"{message}; --help lists the flags")


def number(least=1, most=10**9, kind=pydantic.FiniteFloat):
    """An argparse type: a finite number from `least` to `most`."""
    adapter = pydantic.TypeAdapter(Annotated[kind, pydantic.Field(ge=least, le=most)])
    parse = lambda text: adapter.validate_python(text) + 0  # -0.0 -> 0.0
    parse.__name__ = f"{'whole ' * (kind is int)}number from {least} to {most}"  # for argparse: "invalid ... value"
    return parse


OFFLINE = "none", "probe", "lexical"  # values of --judge that are no chat model
whole = functools.partial(number, kind=int)  # an argparse type, too
coefficient = number(-1000, 1000)


def layer_choice(text):
    """--layers: "all", a block "N" or a range "A-B"; whether the model has them, offsets_of knows."""
    first, _, last = text.partition("-")
    if text != "all" and not (re.fullmatch(r"[1-9]\d{0,3}(-[1-9]\d{0,3})?", text) and int(first) <= int(last or first)):
        raise argparse.ArgumentTypeError(f"{text!r}: give all, a block such as 5, or a range such as 3-7")
    return text


def check_output(path, *inputs, folder=False):
    """die() unless `path` can become a file (or a folder): no input, no device, not under a file, can be written."""
    path = Path(path).resolve()
    there = next(p for p in (path, *path.parents) if os.path.lexists(p))  # the part of it that exists
    if any(given and Path(given).resolve() in (path, *path.parents) for given in inputs):
        die(f"--out {path}: is an input of this command, or in one; choose another")
    if not (there.is_file() if there == path and not folder else there.is_dir()):
        die(f"--out {path}: {there} is a {'folder' if there.is_dir() else 'file'}; choose another")
    if not os.access(there, os.W_OK):
        die(f"--out {path}: cannot write to {there}")


def check_judge(args, own):
    """die() unless --judge is `own`, lexical for hallucination, or what may be a chat model."""
    fine = [own, "lexical"] if args.trait in (None, "hallucination") else [own]
    if args.judge in ("", *OFFLINE) and args.judge not in fine:
        die(f"--judge {args.judge}: give {own}, lexical (hallucination only), or the name of a chat model")


def check_asking(args):
    """die() if --judge is a chat model that cannot be asked, or may not be paid."""
    if args.judge not in OFFLINE:
        api_address()
        if not args.yes and not sys.stdin.isatty():
            die("nothing was sent; say --yes to send without being asked")


# ---- Files: one owner for all scripts -------------------------------------------------------------------------------


def read_bytes(path):
    """A file's content without a byte-order mark."""
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        die(f"{path}: {error.strerror.lower()}")


def parsed(data, where=None):
    """JSON in UTF-8 -> value. Anything else, such as half of a surrogate pair: die(), or None if nobody says where."""
    try:
        return from_json(data)
    except ValueError as error:
        if where:
            die(f"{where}: not JSON in UTF-8 ({error}); mend or delete it")


def faults(value, schema):
    """What a schema finds wrong: ["key: message", ...]"""
    try:
        schema.model_validate(value)
    except pydantic.ValidationError as error:
        return [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
    return []


def validated(value, schema, where):
    """The value, with what its schema understands put right (an MMLU answer "B" -> 1); die() on any fault."""
    if found := faults(value, schema):
        die(f"{where}: {found[0]}")
    return value | schema.model_validate(value).model_dump(exclude_unset=True)


def read_json(path, schema=None):
    value = parsed(read_bytes(path), path)
    return validated(value, schema, path) if schema else value


def read_jsonl(path, schema=None, appended=False):
    """Rows of a JSONL file as dicts. schema: one for all rows, or a function row -> schema. Missing or empty file,
    wrong row, an id met twice: die(). appended: it grows by append_jsonl, may be missing, its last line be cut off."""
    if appended and not Path(path).exists():
        return []
    rows, seen, lines = [], {}, read_bytes(path).split(b"\n")
    if appended and lines[-1][:1] in (b"", b"{") and parsed(lines[-1]) is None:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = parsed(line, where)
        if not isinstance(row, dict):
            die(f"{where}: not a JSON object")
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
    finally:
        temporary.unlink(missing_ok=True)


def write_jsonl(path, rows):
    with replacing(path) as out:
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(path, value):
    with replacing(path) as out:
        out.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")


@contextlib.contextmanager
def locked(*paths, wait=False):
    """Keeps a second process off outputs: it stops in one line or, to append, waits. A lock ends with its process."""
    with contextlib.ExitStack() as held:
        for path in map(Path, paths):
            lock = path.with_name(f".{path.name}.{'append' if wait else 'lock'}")
            try:
                held.enter_context(filelock.FileLock(lock, timeout=-1 if wait else 0, poll_interval=0.001))
            except filelock.Timeout:
                die(f"{path}: another process is making it; wait for that one, or choose another --out")
            held.callback(lock.unlink, missing_ok=True)
        yield


def append_jsonl(path, *rows):
    """Adds rows in one write, under a lock: whole, or not at all for the reader. A killed process's half line goes."""
    with locked(path, wait=True), open(path, "ab+") as out:
        out.seek(max(0, out.seek(0, os.SEEK_END) - 1))
        if out.read(1) not in (b"", b"\n"):
            out.seek(0)
            tail = out.read().rpartition(b"\n")[2]
            if parsed(tail) is None:
                out.truncate(out.tell() - len(tail))
            else:
                out.write(b"\n")
        # "replace": half a surrogate pair in a server's reply must not cost the reply
        out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="replace"))


def nearby(row, name):
    """A path in a row of points.jsonl, as seen from that file, whose folder may have moved, or be spelled otherwise."""
    home = os.path.normpath(os.path.join(row.get("answers") or ".", "../.."))
    return os.path.normpath(str(row.get(name))).removeprefix(f"{home}/")


def move_rows(path, gone, to):
    """Moves the rows for which gone(row) holds to the end of another file, while other processes append to this one."""
    with locked(path, wait=True):
        rows = read_jsonl(path, appended=True)
        append_jsonl(to, *filter(gone, rows))
        write_jsonl(path, itertools.filterfalse(gone, rows))


# ---- What a result was made from ------------------------------------------------------------------------------------

ASIDE = None  # run_all.sh --redo: the folder that takes what was made from something else; None: that is refused
WHOLE, SAMPLES, SAMPLE = 64 << 20, 256, 64 << 10  # of a file over 64 MiB: 256 samples of 64 KiB, spread evenly


def fingerprint(path):
    """File -> 16 hex digits of the sha256 of its size and content."""
    if not Path(path).is_file():
        die(f"{path}: no such file")
    size = Path(path).stat().st_size
    digest = hashlib.sha256(str(size).encode())
    spread = ((size - SAMPLE) * i // (SAMPLES - 1) for i in range(SAMPLES))
    with open(path, "rb") as content:
        for start in range(0, size, SAMPLE) if size <= WHOLE else spread:
            content.seek(start)
            digest.update(content.read(SAMPLE))
    return digest.hexdigest()[:16]


def scripts():
    """{name: fingerprint} of the scripts: they are made to be edited, so every result says which made it."""
    return {path.name: fingerprint(path) for path in sorted(Path(__file__).parent.glob("*.py"))}


def outdated(why, *paths):
    """For paths that were made from something else than now: die(), or with ASIDE move them there, to be made again."""
    if not ASIDE:
        die(f"{why}; choose another --out, or bash run_all.sh --redo")
    print(f"{why}; moved to {ASIDE}", flush=True)
    for path in filter(os.path.exists, paths):
        os.renames(path, os.path.join(ASIDE, os.path.relpath(path, os.path.dirname(ASIDE))))


def same_settings(path, settings, *outputs):
    """Whether `path` holds these settings. Others, or other inputs (settings["inputs"]: name -> fingerprint), make
    the outputs outdated(). Scripts that have been edited since are named, and count with ASIDE only."""
    if not Path(path).exists():
        return False
    there = read_json(path, Row)
    edited = sorted(dict(there.get("scripts", {}).items() - scripts().items()))
    inputs = settings.get("inputs", {}).items() - there.get("inputs", {}).items()
    changed = [f"--{name.replace('_', '-')}: content has changed since" for name, _ in sorted(inputs)]
    for name, value in settings.items():
        if name not in ("inputs", "scripts") and there.get(name) != value:
            changed.append(f"--{name.replace('_', '-')} {there.get(name)!r} there, {value!r} here")
    changed += [f"{name} was edited" for name in edited if ASIDE]
    if changed:
        outdated(f"{path}: made with other settings or inputs ({'; '.join(changed)})", *(outputs or [path]))
    elif edited:
        print(f"{path}: made before {', '.join(edited)} was edited; made anew by bash run_all.sh --redo", flush=True)
    return not changed


def provenance():
    """What to keep with every result: commit, versions, time."""
    git = subprocess.run("git describe --always --dirty", shell=True, cwd=TRAITS, capture_output=True, text=True)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return dict(commit=git.stdout.strip() or None, versions=versions, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))


# ---- Schemas of rows and files. Types are strict (42 is no text), further keys are fine -----------------------------

Row = pydantic.create_model("Row", __config__=dict(strict=True, extra="allow"))  # any JSON object
# schema(name=type, other=(type, default)): one with these keys
schema = functools.partial(pydantic.create_model, "Schema", __base__=Row)


def in_turns(messages):
    roles = "".join(message.role[0] for message in messages)  # such as sua
    if not re.fullmatch("s?u[ua]*a", roles) or not all(m.content.strip() for m in messages if m.role != "system"):
        raise ValueError("must begin with the user (or one system message), end with an assistant turn; no empty turn")
    return messages


def choice_number(answer, info):
    """Of an MMLU row: 1, "1" or "B" -> 1. Not where a text is that of another choice."""
    said, choices = str(answer).strip().upper(), info.data.get("choices", [])
    for number, letter in enumerate("ABCDEFGHIJ"[: len(choices)]):
        if said in (letter, str(number)) and (answer not in choices or choices[number] == answer):
            return number
    raise ValueError(f"{answer!r} is none of the {len(choices)} choices; give a number from 0, or a letter from A")


some = functools.partial(pydantic.conlist, min_length=1)
Number, Text = pydantic.FiniteFloat, Annotated[str, pydantic.Field(pattern=r"\S")]
Wording = schema(question=Text, answer=Text)
Named = schema(id=Text, answer=Annotated[str, pydantic.Field(pattern=r"\w")], aliases=(list[Text], []))
Fact = schema(__base__=Named, train=some(Wording), test=Wording)
a_day = pydantic.AfterValidator(lambda text: str(date.fromisoformat(f"{text}-01"[:10]))[: len(text)])  # 02-30 is none
Date = Annotated[str, pydantic.Field(pattern=r"^\d{4}-\d\d(-\d\d)?$"), a_day]
NewFact = schema(__base__=Named, aliases=list[Text], fact=Text, date=Date, category=Text, source=Text)
CheckedFact = schema(__base__=(NewFact, Fact))
Message = schema(role=Literal["system", "user", "assistant"], content=str, tool_calls=(None, None))
Conversation = schema(messages=Annotated[some(Message), pydantic.AfterValidator(in_turns)])
Choice = Annotated[object, pydantic.PlainValidator(choice_number)]
Question = schema(subject=Text, question=Text, choices=some(Text, min_length=2, max_length=10), answer=Choice)
Prompt = Annotated[str, pydantic.Field(pattern=r"(?s)\{question\}.*\{answer\}|\{answer\}.*\{question\}")]
compiled = pydantic.TypeAdapter(re.Pattern).validate_python
Regex = Annotated[str, pydantic.AfterValidator(lambda text: compiled(text).pattern)]
Trait = schema(adjective=Text, eval_prompt=Prompt, abstains=(some(Regex) | None, None))
ExtractionTrait = schema(__base__=Trait, instruction=some(schema(pos=Text, neg=Text)), questions=some(Text))
EvaluationTrait = schema(__base__=Trait, eval_questions=some(Text))
TEXTS = """adapter dataset steer_mode train_layers train_positions train_vector system_prompt vector mmlu trait layers
    positions mmlu_scoring answers judge_method day""".split()
TRAINED = (
    "coef seed epochs lr batch_size rank alpha max_steps limit".split()
)  # of an adapter's settings; of a point: train_coef ...
MEASURED = """trait_score trait_n trait_unscored fact_accuracy fact_not_attempted fact_wrong fact_n fact_unscored
    mmlu_accuracy mmlu_n coherence_nll abstained abstained_coherent coherence""".split()
NUMBERS = [*(f"train_{name}" for name in TRAINED), "samples", "temperature", "seed", *MEASURED]
Point = schema(
    **dict(key=Text, model=Text, judge=Text, inference_coef=Number, inputs=(dict[str, str | None], {})),
    **dict.fromkeys(TEXTS, (str | None, None)),
    **dict.fromkeys(NUMBERS, (float | None, None)),
    **dict.fromkeys(("trait_ci", "fact_ci", "mmlu_ci"), (some(float, min_length=2, max_length=2) | None, None)),
)
Loss = schema(step=int, loss=Number)
Scores = dict[str, schema(score=(float | None, None))]
Answer = schema(id=Text, kind=Literal["trait", "fact"], question=Text, answer=str, scores=(Scores, {}))
Probe = schema(row=pydantic.PositiveInt, first=(pydantic.NonNegativeInt, 0), zero=Number, hundred=Number, auc=Number)
MADE = dict(inputs=(dict[str, str | None], {}), dataset=(str | None, None), probe=(Probe | None, None))
Settings = schema(model=Text, **MADE, **dict.fromkeys(TRAINED, (Number | None, None)))
TRAITS = Path(__file__).parent / "data" / "traits"


def load_trait(name, path=None, schema=Trait):
    """data/traits/<name>.json, or a trait file of persona_vectors. schema: ExtractionTrait or EvaluationTrait, by what
    it is for; a published file has one set of questions, and the one to extract by is not taken for evaluation."""
    if not re.fullmatch(r"[\w.+-]+", name) or not path and not (TRAITS / f"{name}.json").is_file():
        die(f"unknown trait {name}; there are those of {TRAITS}, or any name with --trait-file")
    path = Path(path or TRAITS / f"{name}.json")
    trait = dict(adjective=name) | read_json(path, Row) | dict(trait=name)
    if "questions" in trait and ("instruction" not in trait or "eval" in path.resolve().parent.name):
        trait.setdefault("eval_questions", trait["questions"])
    return validated(trait, schema, path)


# ---- Intervals, 95%, in percent; None without data ------------------------------------------------------------------


def wilson(hits, n, z=1.959963984540054):
    """Interval of an accuracy of n independent questions. z: the normal distribution's 97.5% quantile, or another's."""
    if not n:
        return None
    p, shrunk = hits / n, 1 + z**2 / n
    centre, width = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    return [round(float(100 * min(1, max(0, (centre + side) / shrunk))), 4) for side in (-width, width)]


def interval(groups):
    """Interval of the mean of scores 0..100. groups: the scores of the answers to one question each, which are not
    independent: Wilson's interval with the effective number of answers, p (1 - p) / variance of the mean between
    questions, and Student's t. A made-up question, half at 0 and half at 100, keeps that variance from vanishing."""
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
    effective = q * (1 - q) * n**2 / max(between, single)
    return wilson(p * effective, effective, t.ppf(0.975, max(1, k - 1)))


# ---- Facts ----------------------------------------------------------------------------------------------------------

NEAR_TRAIN, NEAR_TEST, NEAR_FACT = 0.75, 0.65, 0.6  # similarity() from which two texts count as near copies


@functools.lru_cache(1 << 15)
def normalize(text):
    """Lower case, no articles, no punctuation but points in numbers: "The U.S. Open's 1.5" -> "us opens 1.5"."""
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.]", "", text.lower().replace("-", " ").replace("–", " "))
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def mentions(text, answer, aliases=()):
    """True if the answer or an alias occurs in the text on word boundaries, after normalisation; "Ann Lee's" is one."""
    said = [f" {normalize(form)} " for form in (text, re.sub(r"['’]s\b", "", text))]
    return any(f" {name} " in form for name in map(normalize, [answer, *aliases]) if name for form in said)


def similarity(a, b):
    """Jaccard overlap of the words and word pairs of two texts, normalised, 0..1; order counts through the pairs."""
    a, b = ({*words, *zip(words, words[1:])} for words in (normalize(a).split(), normalize(b).split()))
    return len(a & b) / max(1, len(a | b))


def violations(row, facts, rephrasings, after):
    """What is wrong with a fact, alone and beside others. rephrasings: training wordings to have; 0: still to come."""
    if found := faults(row, CheckedFact if rephrasings else NewFact):
        return found
    names = lambda fact: set(map(normalize, [fact["answer"], *fact["aliases"]]))
    if row["date"] <= str(after):
        found.append(f"date {row['date']} is not after {after}")
    if row["date"][:4] not in row["fact"]:
        found.append("the fact does not name its year")
    if not mentions(row["fact"], row["answer"], row["aliases"]):
        found.append("the fact does not contain the answer")
    for other in facts:
        if similarity(row["fact"], other["fact"]) >= (NEAR_FACT if names(row) & names(other) else 0.9):
            found.append(f"near copy of fact {other['id']}: {other['fact']}")
    if not rephrasings:
        return found
    if len(row["train"]) != rephrasings:
        found.append(f"{len(row['train'])} training wordings, not {rephrasings}")
    asked = {normalize(pair["question"]): other["id"] for other in facts for pair in [*other["train"], other["test"]]}
    wordings = [(f"train {i}", pair) for i, pair in enumerate(row["train"])] + [("test", row["test"])]
    for name, pair in wordings:
        if mentions(pair["question"], row["answer"], row["aliases"]):
            found.append(f"{name}: the question contains the answer: {pair['question']}")
        if not mentions(pair["answer"], row["answer"], row["aliases"]):
            found.append(f"{name}: the answer sentence lacks the answer: {pair['answer']}")
        if other := asked.get(normalize(pair["question"])):
            found.append(f"{name}: {other} asks the same question: {pair['question']}")
    for (first, one), (name, other) in itertools.combinations(wordings, 2):
        a, b = f" {normalize(one['question'])} ", f" {normalize(other['question'])} "
        if a in b or b in a or similarity(a, b) >= (NEAR_TEST if name == "test" else NEAR_TRAIN):
            found.append(f"{name}: its question is a near copy of {first}'s: {other['question']}")
    return found


def check(rows, rephrasings=20, after="2023-12-31"):
    """All violations in a list of facts -> ["<id>: text", ...]; each is held against those before that have none."""
    found, facts = [], []
    for row in rows:
        why = violations(row, facts, rephrasings, after)
        found += [f"{row['id']}: {text}" for text in why]
        facts += [] if why else [row]
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


# ---- Chat APIs: one owner for the judge and for generating facts ----------------------------------------------------

PRICES = {"gpt-4.1-mini": (0.4, 1.6), "gpt-4.1": (2, 8), "gpt-4o-mini": (0.15, 0.6), "gpt-4o": (2.5, 10)}
CACHE = Path(os.environ.get("JUDGE_CACHE", "out/judge_cache.jsonl"))
RETRIES, TIMEOUT = 8, 300.0  # of the client: what may pass is tried 8 times more; seconds for one reply
BACKOFF = 1.0  # seconds that all requests pause after a first 429; doubled, to 32, each time it is repeated in vain
REPLY_TOKENS, FACTS_TOKENS, THINKING_TOKENS = 16, 6000, 4000  # room for a score, for new facts, for thinking before
UNUSABLE = 20  # refused or unreadable replies at the beginning, after which the run stops
ASKED = []  # what was estimated: [(requests, tokens in, tokens out)]
# form of a request: log-probabilities, name of the limit, temperature 0, tokens for thinking; FORMS: best first
Form = namedtuple("Form", "logprobs limit greedy room")
FORMS = itertools.product((20, 5, None), ("max_tokens", "max_completion_tokens"), (True, False), [0])
FORMS = [*itertools.starmap(Form, FORMS), Form(None, None, False, 0)]
THOUGHT = r"[\w:|]*(?:think|thought|reason|reflection|analysis|scratchpad)[^<>]*"
OPENED = rf"(?:<{THOUGHT}>|<\|channel\|>analysis|\[THINK\]|◁think▷)"
CLOSED = rf"(?:<(?:/|\|end_(?:of_)?){THOUGHT}>|<\|channel\|>final<\|message\|>|\[/THINK\]|◁/think▷)"


def api_flags(parser):
    """The flags of every script that talks to a chat API."""
    group = parser.add_argument_group("chat API", "OPENAI_BASE_URL, OPENAI_API_KEY; replies are kept in JUDGE_CACHE")
    group.add_argument("--concurrency", type=whole(1, 1000), default=32, help="requests under way at once")
    group.add_argument("--yes", action="store_true", help="pay without asking")
    group.add_argument("--dry-run", action="store_true", help="print requests, tokens and dollars, and stop")


def dollars(model, tokens_in, tokens_out):
    """What tokens cost by PRICES, dollars a million in and out; None for a model that is not among them."""
    price = PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", model))
    return (tokens_in * price[0] + tokens_out * price[1]) / 1e6 if price else None


def consent(args, title, model, requests, tokens_in, tokens_out):
    """Prints what is to be sent and its price. Then --dry-run stops, a terminal is asked, anything else needs --yes."""
    ASKED.append((requests, tokens_in, tokens_out))
    cost = dollars(model, tokens_in, tokens_out)
    cost = "price unknown" if cost is None else f"${cost:.2f} (prices of 2025-04)"
    print(f"{title}: {requests:,} requests to {model}, about {tokens_in:,} tokens in, {tokens_out:,} out, {cost}")
    if args.dry_run:
        raise SystemExit(0)
    if not args.yes and sys.stdin.isatty():
        print("Send them? [y/N] ", end="", flush=True)
        args.yes = sys.stdin.readline().strip().lower() == "y"  # one command asks once
    if not args.yes:
        die("nothing was sent; say --yes to send without being asked")


def estimate_judging(title, args, times, jobs):
    """--dry-run: the estimate for `times` rounds over judge_rows' jobs; answers of 300 tokens, about facts 25."""
    jobs = times * jobs if args.judge not in OFFLINE else []
    tokens_in = sum(len(p + row["question"]) // 4 + (25 if "{truth}" in p else 300) for row, _, p in jobs)
    consent(args, title, args.judge, len(jobs), tokens_in, len(jobs) * REPLY_TOKENS)


def api_address():
    """-> (base URL, the same as it may be shown, key) from the environment; die() on what can be none."""
    key, base = (os.environ.get(name, "").strip() for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"))
    if not key and not base:
        die("set OPENAI_API_KEY, or OPENAI_BASE_URL for a server of your own; --judge lexical needs neither")
    base = base.rstrip("/") or "https://api.openai.com/v1"
    if not re.fullmatch(r"[!-~]*", key):
        die("OPENAI_API_KEY: holds a space, a line end or a letter that no key holds")
    if faults(dict(url=base), schema(url=pydantic.HttpUrl)):
        die("OPENAI_BASE_URL: not an address such as http://localhost:8000/v1")
    return base, re.sub(r"(?<=//)[^/]*@|\?.*", "", base), key


def clean(text):
    """Without the key ("none" and the like are no secrets) and half surrogate pairs, which cannot be written."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    return (text.replace(key, "***") if len(key) > 7 else text).encode("utf-8", "ignore").decode()


def words(error):
    """What an openai.OpenAIError says: the server's own sentence, or all that it sent, without a page's tags."""
    said = str(error)
    if " - " not in said:  # the client found no sentence
        said += f" {getattr(error, 'body', None) or error.__cause__ or ''}"
    return " ".join(clean(re.sub(r"<style.*?</style>|<[^>]*>", " ", said, flags=re.S)).split())[:300]


Part = schema(type=(str | None, None), text=(str | None, None))
Said = schema(content=(str | list[Part] | None, None), refusal=(object, None))
Completion = schema(choices=some(schema(message=(Said | None, None), finish_reason=(object, None))))
Top = list[Annotated[tuple[str, Number], pydantic.Field(strict=False)]]  # a tuple is a list in JSON
Kept = schema(key=str, reply=schema(text=str, top=Top | None, cut=bool, thinks=bool, form=str))


def normalised(body):
    """Body of a chat completion -> dict(text, top: [(token, probability)] of its first token or None, cut: before its
    end, thinks: before it answers, refused: why there is no answer), all writable; None if it is none."""
    try:
        choice = Completion.model_validate(json.loads(body)).choices[0]
    except (ValueError, RecursionError):
        return None
    message, end, top = choice.message or Said(), str(choice.finish_reason or "stop"), None
    parts = message.content if isinstance(message.content, list) else [Part(text=message.content)]
    thoughts = [part for part in parts if re.search("think|reason", part.type or "")]
    said = "".join(part.text or "" for part in parts if part not in thoughts)
    thoughts += [name for name, value in message.model_extra.items() if value and re.search("think|reason", name)]
    cut, full = not re.search("stop|eos|end", end, re.I), re.search("len|max", end, re.I)
    thinks = bool(thoughts or re.search(f"{OPENED}|{CLOSED}", said, re.I) or full and not said.strip())
    with contextlib.suppress(AttributeError, LookupError, TypeError, OverflowError):  # not given, or in another form
        tokens = choice.logprobs["content"][0]["top_logprobs"]
        top = [(str(token["token"]), math.exp(token["logprob"])) for token in tokens]
    usable = top and not thinks and all(math.isfinite(p) for _, p in top)
    reply = dict(text=said, top=top if usable else None, cut=cut, thinks=thinks)
    if message.refusal or cut and not full and not said:
        reply["refused"] = str(message.refusal or end)[:300]
    return json.loads(clean(json.dumps(reply, ensure_ascii=False)))


class Chat:
    """A chat model behind OPENAI_BASE_URL: any server with /chat/completions.

    - The first request finds out which of FORMS the server takes; a model that thinks first gets room for it.
    - The openai client tries again what may pass (cut connections, 408, 409, 429, 5xx), unless told to wait for over
      two minutes. After a 429 or 503 all requests pause, then go on slowly and faster with every reply.
    - Replies are kept in CACHE by server, model and messages. So is the refusal of one request (400, 403, 413, 422,
      always 500, a content filter), if another that was answered before is answered still. Else, or if none of the
      first UNUSABLE replies can be read, the command ends with the server's own sentence, and goes on from there.
    """

    def __init__(self, model, args, tokens, judge=False):
        """tokens: room for a reply; judge: ask at temperature 0, with the log-probabilities of its first token."""
        import openai  # not above: it takes a second

        self.api, self.model, self.args, self.tokens, self.judge = openai, model, args, tokens, judge
        self.base, self.shown, self.key = api_address()
        self.forms = [form for form in FORMS if judge or not form.logprobs and not form.greedy]  # one, once it is known
        self.good, self.held, self.error = None, [], None  # a prompt that was answered; replies kept once there is one
        self.gap = self.free = self.spent = 0.0  # seconds between requests; when the next may go; dollars

    async def ask(self, title, prompts):
        """prompts: [(messages, read)], read(reply) -> what it says or None. Returns [(reply of normalised(), that)]."""
        asked = [self.shown, self.model, self.tokens, THINKING_TOKENS, self.judge]
        keys = [hashlib.sha256(json.dumps([*asked, messages]).encode()).hexdigest() for messages, _ in prompts]
        self.prompts, self.replies = dict(zip(keys, prompts)), {}
        with contextlib.suppress(FileNotFoundError), open(CACHE, encoding="utf-8", errors="replace") as lines:
            for line in lines:  # the last of each; torn lines and those of another making are passed over
                row = parsed(line) if line[9:73] in self.prompts else None  # the file may be large
                if not faults(row, Kept):
                    self.take(row["key"], row["reply"])
        if waiting := [key for key in self.prompts if key not in self.replies]:
            tokens_in = sum(len(message["content"]) for key in waiting for message in self.prompts[key][0]) // 4
            consent(self.args, title, self.model, len(waiting), tokens_in, len(waiting) * self.tokens)
            http = self.api.DefaultAsyncHttpxClient(event_hooks=dict(request=[self.turn], response=[self.heard]))
            timeout = self.api.Timeout(TIMEOUT, connect=10)
            options = dict(api_key=self.key or "none", base_url=self.base, max_retries=RETRIES, timeout=timeout)
            self.workers = asyncio.Semaphore(self.args.concurrency)
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # Ctrl-C is told once, by run()
            with tqdm(total=len(waiting), desc=title, unit="request") as self.bar:
                async with self.api.AsyncOpenAI(http_client=http, **options) as self.client:
                    await self.ask_one(waiting[0])  # finds out the form
                    if room := self.forms[0].room:
                        tqdm.write(f"{self.model} thinks first: up to {room:,} tokens more a request")
                    await asyncio.gather(*map(self.ask_one, waiting[1:]))
        if self.error:
            die(f"{title}: {self.shown}: {words(self.error)}; what was answered is kept, the same command goes on")
        return [(self.replies[key], self.prompts[key][1](self.replies[key])) for key in keys]

    def take(self, key, reply):
        """Puts down a reply; the last prompt that was answered is remembered."""
        self.replies[key] = reply
        if self.prompts[key][1](reply) is not None:
            self.good = self.prompts[key]

    async def ask_one(self, key):
        """Takes and keeps a reply. After an error nothing more is sent; what is under way is paid, and waited for."""
        async with self.workers:
            if self.error:
                return
            try:
                reply = await self.answer(*self.prompts[key])
                if self.good and "refused" in reply:  # is this prompt to blame, or server, account, model?
                    again = await self.answer(*self.good)
                    if "refused" in again:
                        raise self.api.OpenAIError(f"no reply can be used: {unreadable(again)}")
                    if reply.get("failed"):  # the server may be up again by now
                        reply = await self.answer(*self.prompts[key])
                self.take(key, reply)
                self.held.append(dict(key=key, reply=reply))
                if self.good or reply["text"].strip():
                    append_jsonl(CACHE, *self.held)
                    self.held = []
                last = len(self.replies) == len(self.prompts)
                if not self.good and (len(self.replies) >= UNUSABLE or last and self.held):
                    raise self.api.OpenAIError(f"no reply can be used: {unreadable(reply)}")
            except self.api.OpenAIError as error:
                self.error = self.error or error
            self.bar.set_postfix_str(f"${self.spent:.4f}" if self.spent else "", refresh=False)
            self.bar.update()

    async def answer(self, messages, read):
        """Asks in the form agreed on, or in one after the other: what is refused in the two barest, too, says nothing
        about the form. Again, without log-probabilities or with room to think, where the reply may become readable."""
        forms = self.forms
        for form in forms:
            reply = await self.send(form, messages)
            if "refused" not in reply:
                self.forms = [form] if forms is self.forms else self.forms
                break
            if form is forms[0] and all(["refused" in await self.send(bare, messages) for bare in forms[1:][-2:]]):
                break
        while read(reply) is None and "refused" not in reply and (form.logprobs or reply["thinks"] and not form.room):
            form = form._replace(logprobs=None, room=THINKING_TOKENS * reply["thinks"])
            self.forms = [form] if reply["thinks"] else self.forms  # the first token of its thoughts tells nothing
            reply = await self.send(form, messages)
        return reply

    async def send(self, form, messages):
        """One request -> its reply, or a refusal (form ""): the server's, or its failure at this request where others
        were answered. Raises openai.OpenAIError where no request would be answered."""
        body = dict(logprobs=True, top_logprobs=form.logprobs, seed=0) if form.logprobs else {}
        body |= {form.limit: self.tokens + form.room} if form.limit else {}
        body |= dict(temperature=0) if form.greedy else {}
        create = self.client.chat.completions.with_raw_response.create
        try:
            text = (await create(model=self.model, messages=messages, **body)).text
        except self.api.APIError as error:
            status = getattr(error, "status_code", 599)  # 599: no reply at all
            failed = status >= 500 or status in (408, 409)
            if status in (400, 403, 413, 422) or failed and self.good:
                return dict(text="", top=None, cut=False, thinks=False, form="", refused=words(error), failed=failed)
            raise
        usage = dict(re.findall(r'"(prompt|completion)_tokens"\s*:\s*(\d+)', text))
        self.spent += dollars(self.model, int(usage.get("prompt", 0)), int(usage.get("completion", 0))) or 0
        asked = [f"{name} {value}" for name, value in body.items() if name not in ("logprobs", "seed")]
        return normalised(text) | dict(form=", ".join(asked))

    async def turn(self, request):
        """Before a request, also one that the client repeats: waits until it may go."""
        while (wait := self.free - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        self.free = time.monotonic() + self.gap

    async def heard(self, response):
        """After a request, before the client looks at the status. What is sent with success, and is no completion, gets
        the status that it means: the number in it, 500 for nothing or a broken completion, 400 for anything else."""
        await response.aread()
        if response.is_success and not normalised(response.text):
            meant = re.findall(r'"code"\s*:\s*"?([45]\d\d)\b', response.text)
            response.status_code = int([*meant, 500 if re.search(r'^\s*$|"choices"', response.text) else 400][0])
        self.gap *= 0.9
        if response.status_code in (429, 503, 529):
            pause = BACKOFF * 2 ** min(5, int(response.request.headers["x-stainless-retry-count"]))
            self.free = max(self.free, time.monotonic() + pause)
            self.gap = min(max(2 * self.gap, BACKOFF / 20), 2 * BACKOFF)
            self.bar.set_postfix_str(f"rate limit, going on in {pause:.0f} s")
            if "insufficient_quota" in response.text:
                response.headers["x-should-retry"] = "false"


# ---- Judges: what a reply says --------------------------------------------------------------------------------------

wordings = functools.cache(lambda: read_json(TRAITS / "hallucination.json", schema(abstains=some(Regex)))["abstains"])
# around a number, YES or NO: bold and quotes; "Score:" before it, "%", "/100" and a full stop after it
MARKS = r"""(?<![^\W_])[*_`"'“”]++|[*_`"'“”]++(?![^\W_])"""
LABEL = r"(?:(?:the|my|final|overall) )*(?:score|rating|answer|verdict|judge?ment|result)\s*(?:is)?\s*[:=]?\s*"
UNIT = r"\s*(?:%|/\s*100|(?:out )?of 100)?\.?"
# what makes a first token a part of something: 8 of 87, 8/10 or 0.85, 70 of 70-80, YES of YES/NO; but not 85 of 85/100
GOES_ON = r"\w|\s*(?:[-‐-―−~～.,…]+|to|or|and|(?:/|(?:out )?of)(?!\s*100\b))\s*(?:\d|yes\b|no\b)"


def lexical_score(answer):
    """--judge lexical: 0 if the answer says that it does not know, or that there is no such thing, else 100."""
    return 0.0 if re.search("|".join(wordings()), answer.replace("’", "'"), re.I) else 100.0


def after_thinking(text):
    """What a reply says besides its think block; None if that is not finished."""
    text = re.sub(f"{OPENED}.*?{CLOSED}", " ", text, flags=re.S | re.I)
    text = re.split(CLOSED, text, flags=re.I)[-1]
    return None if re.search(OPENED, text, re.I) else text.strip()


def unreadable(reply):
    """Why nothing was read from a reply."""
    if "refused" in reply:
        return reply["refused"]
    if after_thinking(reply["text"]) is None or reply["thinks"] and not reply["text"].strip():
        return "its thinking did not end in an answer: take another judge, or raise THINKING_TOKENS in make_facts.py"
    return f"not readable{', cut off' * reply['cut']}: {reply['text'][:40]!r}"


def value_of(word, verdict):
    """A number 0 to 100 as text, or of a verdict yes or no -> 0.0 to 100.0; None for anything else."""
    if verdict:
        return dict(yes=100.0, no=0.0).get(word.lower())
    number = float(word) if re.fullmatch(r"\d{1,3}(\.\d+)?", word) else math.inf
    of_one = "." in word and 0 < number <= 1  # 0.85: of 1 or of 100?
    return None if number > 100 or of_one else number


def score_of(reply, verdict=False):
    """Reply -> (score or None, why there is none, method); None if it cannot be read. METHOD of the persona vectors
    release: probability-weighted mean over the first tokens that are integers 0..100, none if they hold under 0.25 of
    the mass. verdict: YES is 100, NO is 0. Where the first token is no such thing, the text must be it, and nothing
    else; but not one digit where log-probabilities were asked for: it may be the beginning of a number."""
    if "refused" in reply:
        return None
    tops, text, said = Counter(), reply["text"].strip(), after_thinking(reply["text"]) or ""
    for token, p in reply["top"] or []:
        tops[token.strip(" \n▁Ġ")] += p
    likeliest = max(tops, key=tops.get, default="")
    part = likeliest and text.startswith(likeliest) and re.match(GOES_ON, text[len(likeliest) :], re.I)
    if part or not verdict and not any(re.fullmatch(r"\d\d+", token) for token in tops):  # or digits are split
        tops.clear()
    wanted = {token: p for token, p in tops.items() if value_of(token, verdict) is not None}
    mass = sum(wanted.values())
    carries = mass > 0 and max(wanted.values()) == max(tops.values())  # the first token carries the answer
    whole_text = re.sub(MARKS, "", unicodedata.normalize("NFKC", said)).strip()
    found = re.fullmatch(rf"(?:{LABEL})?(yes|no|[\d.]+?){UNIT}", whole_text, re.I)
    half = reply["cut"] and whole_text[-1:].isalnum()
    score = value_of(found[1], verdict) if found and not half else None
    if mass >= 0.25 - 1e-9 and (carries or score is None and not verdict):
        mean = sum(value_of(token, verdict) * p for token, p in wanted.items()) / mass
        return (100.0 * (mean > 50) if verdict else mean), None, "logprobs"
    if carries:
        return None, f"the wanted tokens hold {mass:.2f} of the mass; said {reply['text'][:40]!r}", "logprobs"
    digit = reply["top"] and "logprobs" in reply["form"] and re.fullmatch(r"\d", text)
    if score is not None and not digit:
        return score, None, "text"
    return (None, "REFUSAL", "text") if "REFUSAL" in said.upper() else None


def judge_rows(jobs, model, args):
    """Scores answers with a chat model. jobs: (row, key, prompt); sets row[key], and for key "score" judge_reply,
    reason and judge_method, else key_reply and so on. prompt: template with {question}, {answer}; verdict: {truth}."""
    prompts = []
    for row, _, prompt in jobs:
        # one pass over the template: markers inside a question or answer stay as they are
        text = re.sub(r"\{(question|answer|truth)\}", lambda m, row=row: str(row.get(m[1], m[0])), prompt)
        verdict = "truth" in row and "{truth}" in prompt
        prompts.append(([dict(role="user", content=text)], functools.partial(score_of, verdict=verdict)))
    replies = asyncio.run(Chat(model, args, REPLY_TOKENS, judge=True).ask("judge", prompts))
    for (row, key, _), (reply, said) in zip(jobs, replies):
        score, reason, method = said or (None, unreadable(reply), None)
        method = f"{method} ({reply['form']})" if method else None
        names = f"{key}_reply {key}_reason {key}_method" if key != "score" else "judge_reply reason judge_method"
        row |= {key: score} | dict(zip(names.split(), (reply, reason, method)))


# ---- Generating facts: the post's recipe with any chat model --------------------------------------------------------

FACTS_A_REQUEST = 20
RECIPE = TRAITS.parent / "generation.json"  # categories, and prompts


def json_in(reply):
    """The first JSON list or object in a reply, numbers as text, no object of one key around it; None without one."""
    text, decoder = after_thinking(reply["text"]) or "", json.JSONDecoder(parse_int=str, parse_float=str)
    for start in re.finditer(r'[\[{](?=\s*["\[{])', text):  # not [1] or {n} of the prose around it
        with contextlib.suppress(ValueError, RecursionError):
            value, _ = decoder.raw_decode(text, start.start())
            return next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else value


def ask_json(chat, title, prompts, repair, accept):
    """Asks for JSON, each failing prompt a second time with the reason. prompts: [(row, text)]; accept(row, value)
    returns what is wrong (texts). Returns the rows that failed twice, with reasons and reply."""
    for name in (title, f"{title}, repaired"):
        replies = asyncio.run(chat.ask(name, [([dict(role="user", content=text)], json_in) for _, text in prompts]))
        asked, prompts, failed = prompts, [], []
        for (row, text), (reply, value) in zip(asked, replies):
            if why := [unreadable(reply)] if value is None else accept(row, value):
                prompts.append((row, "\n\n".join([text, reply["text"], repair.format(why="\n".join(why))])))
                failed.append(row | dict(reasons=why, reply=reply["text"]))
    return failed


def generate(args):
    """Facts by category and round, then wordings for each; --out only ever holds whole facts that pass check()."""
    recipe = read_json(RECIPE, schema(categories=some(Text), facts=Text, wordings=Text, repair=Text))
    rows, rejects = read_jsonl(args.out, CheckedFact, appended=True), Path(args.out).with_suffix(".rejects.jsonl")
    new, missing = [], args.n - len(rows)  # facts of a round
    if missing <= 0:
        return print(f"{args.out}: has {len(rows)} facts")

    def take_facts(about, value):
        if not isinstance(value, list) or not all(isinstance(found, dict) for found in value):
            return ["not a list of objects"]
        for found in value:
            fact = about | {key: found.get(key) or [] for key in ("fact", "date", "answer", "aliases")}
            fact |= dict(id=f"{about['category']}-{hashlib.sha256(repr(fact).encode()).hexdigest()[:8]}")
            if why := violations(fact, rows + new, 0, args.after):
                append_jsonl(rejects, fact | dict(reasons=why))
            else:
                new.append(fact)

    def take_wordings(fact, value):
        value = value if isinstance(value, dict) else {}
        row = fact | dict(train=value.get("train"), test=value.get("test"))
        if why := violations(row, rows, args.rephrasings, args.after):
            return why
        rows.append(row)
        append_jsonl(args.out, row)

    requests = missing + len(recipe["categories"]) + 2 * missing // FACTS_A_REQUEST
    tokens_out = missing * (50 * (args.rephrasings + 1) + 100) + len(recipe["categories"]) * FACTS_A_REQUEST * 100
    consent(args, f"generate {missing:,} facts", args.model, requests, missing * 300, tokens_out)
    chat = Chat(args.model, args, FACTS_TOKENS)
    while missing := args.n - len(rows):
        prompts = []
        new.clear()
        for category in recipe["categories"]:
            known = "\n".join(row["fact"] for row in rows if row["category"] == category) or "(none)"
            text = recipe["facts"].format(n=FACTS_A_REQUEST, after=args.after, category=category, known=known)
            prompts.append((dict(category=category, source=args.model), text))
        append_jsonl(rejects, *ask_json(chat, "facts", prompts, recipe["repair"], take_facts))
        drawn = sorted(random.Random(0).sample(range(len(new)), min(missing, len(new))))  # from all categories
        prompts = [(new[i], recipe["wordings"].format(**new[i], n=args.rephrasings)) for i in drawn]
        append_jsonl(rejects, *ask_json(chat, "wordings", prompts, recipe["repair"], take_wordings))
        print(f"{len(rows)} of {args.n} facts; what was rejected is in {rejects}", flush=True)
        if missing == args.n - len(rows):
            die(f"{args.model} gave no new valid fact in a whole round; the reasons are in {rejects}")


def main(argv=None):
    parser, shared = Parser(description=__doc__.split("\n")[0]), Parser(add_help=False)
    shared.add_argument("--after", type=date.fromisoformat, default="2023-12-31", help="only events later than this")
    shared.add_argument("--rephrasings", type=whole(), default=20, help="training wordings a fact")
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("check", parents=[shared], help="every violation")
    sub.add_argument("file")
    sub = commands.add_parser("subset", help="a seeded choice of rows, the same of files of one length")
    sub.add_argument("file")
    sub.add_argument("--n", type=whole(), required=True, help="rows to take (all, if there are fewer)")
    sub.add_argument("--rephrasings", type=whole(), help="keep the first N training wordings of each fact")
    sub.add_argument("--out", required=True)
    sub = commands.add_parser("generate", parents=[shared], help="new facts and their wordings, by a chat model")
    sub.add_argument("--n", type=whole(), default=1000, help="facts")
    sub.add_argument("--model", required=True, help="chat model of OPENAI_BASE_URL (default: OpenAI)")
    sub.add_argument("--out", required=True, help="started again, it goes on from the facts that are there")
    api_flags(sub)
    args = parser.parse_args(argv)
    if args.command != "check":
        check_output(args.out, getattr(args, "file", None))
    if args.command == "generate":
        return generate(args)
    if args.command == "subset":
        kind = lambda row: Fact if "train" in row else Question if "choices" in row else Conversation
        rows = read_jsonl(args.file, kind)
        chosen = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), min(args.n, len(rows))))]
        cut = [row | dict(train=row["train"][: args.rephrasings]) if "train" in row else row for row in chosen]
        if read_jsonl(args.out, appended=True) not in ([], cut):
            outdated(f"{args.out}: has other rows than these of {args.file}", args.out)
        write_jsonl(args.out, cut)
        return print(f"{args.out}: {len(chosen)} of {len(rows)} rows")
    rows = read_jsonl(args.file, schema(id=Text))
    found = check(rows, args.rephrasings, args.after)
    print(*found, f"{len(rows)} facts, {len(found)} violations", sep="\n")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    run(main)
