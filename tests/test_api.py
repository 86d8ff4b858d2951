"""The chat client and the judge, against a server on loopback that speaks the real protocol; the real openai client talks to it."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import ROOT

import make_facts as mf


@pytest.fixture
def server(monkeypatch, tmp_path):
    """server.reply(text of the user's message, how often it was asked) -> (status, body or bytes, headers); counts requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            text = body["messages"][0]["content"]
            with lock:
                seen[text, body.get("max_tokens")] += 1
                n = seen[text, body.get("max_tokens")]
            status, reply, headers = handler.reply(text, n, body)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in (
                {"content-type": "application/json", "content-length": str(len(data))} | headers
            ).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
            if "content-length" in headers:  # says more than it sends: cut in mid-body
                self.close_connection = True

        def log_message(self, *args):
            pass

    lock, seen = threading.Lock(), Counter()
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    handler = type("Server", (), dict(seen=seen, reply=None))
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    monkeypatch.setattr(mf, "CACHE", tmp_path / "cache.jsonl")
    monkeypatch.setattr(mf, "BACKOFF", 0.005)
    yield handler
    http.shutdown()


def said(text, top=None):
    """A completion; top: {token: probability} of the first token, None = no log-probabilities."""
    logprobs = top and dict(
        content=[
            dict(
                token=text,
                logprob=0.0,
                bytes=None,
                top_logprobs=[dict(token=t, logprob=math.log(p), bytes=None) for t, p in top.items()],
            )
        ]
    )
    return (
        200,
        dict(
            id="x",
            object="chat.completion",
            created=0,
            model="m",
            choices=[
                dict(index=0, finish_reason="stop", logprobs=logprobs, message=dict(role="assistant", content=text))
            ],
        ),
        {},
    )


def error(status, code=None, **headers):
    return status, dict(error=dict(message="no", type="x", code=code, param=None)), headers


def flags(**more):
    return SimpleNamespace(**dict(concurrency=32, yes=True, dry_run=False) | more)


def judge(answers, prompt="Q {question} A {answer}", concurrency=32, **more):
    rows = [dict(question="q", answer=answer) | more for answer in answers]
    mf.judge_rows([(row, "score", prompt) for row in rows], "m", flags(concurrency=concurrency))
    return rows


def test_weighted_mean(server):
    """Guards against reading one token where the score is a weighted mean; other tokens do not count; 0.25 of mass is enough."""
    tops = {
        "a": {"80": 0.5, "90": 0.3, "x": 0.2},
        "b": {"100": 0.25, "I": 0.75},
        "c": {"100": 0.24, "I": 0.76},
        "d": {"REF": 1.0},
        "e": {"0": 1.0},
        "f": {"100": 0.9, "101": 0.1},
    }
    server.reply = lambda text, n, body: said("?", tops[text[-1]])
    scores = [row["score"] for row in judge("abcdef")]
    assert scores[0] == pytest.approx((80 * 0.5 + 90 * 0.3) / 0.8) and scores[1] == pytest.approx(100)
    assert scores[2:4] == [None, None] and scores[4:] == [0.0, pytest.approx(100)]


def test_without_logprobs_the_text_is_read(server):
    """Guards against a None for every answer, or a wrong number, on servers without log-probabilities."""
    texts = {
        "a": "87",
        "b": "Score: 100.",
        "c": "0",
        "d": "REFUSAL",
        "e": "I cannot say",
        "f": "between 20 and 30",
        "g": "250",
        "h": "85/100",
    }
    server.reply = lambda text, n, body: said(texts[text[-1]])
    rows = judge("abcdefgh")
    assert [row["score"] for row in rows] == [87, 100, 0, None, None, None, None, 85]
    assert (
        rows[3]["reason"] == "REFUSAL"
        and all(row["reason"] for row in rows[4:7])
        and {row["judge_method"] for row in rows} == {"text"}
    )


def test_split_digits_are_noticed(server):
    """Guards against scoring 87 as 8 where the server's tokens are single digits."""
    server.reply = lambda text, n, body: (
        said("8", {"8": 0.9, "9": 0.1}) if body["max_tokens"] == 1 else said("87", {"8": 1.0})
    )
    assert judge("a")[0]["score"] == 87


def test_servers_that_refuse_logprobs_or_one_answer(server):
    """Guards against stopping at a server that knows no log-probabilities (400), or at one answer that is too long for it;
    that answer is unscored with the server's reason, the others are scored, and a number cut in half is not taken."""

    def reply(text, n, body):
        if "logprobs" in body:
            return error(400, "logprobs_unsupported")
        if text.endswith("long"):
            return (
                400,
                dict(
                    error=dict(
                        message="maximum context length exceeded", type="x", code="context_length_exceeded", param=None
                    )
                ),
                {},
            )
        status, reply, headers = said("8" if text.endswith("cut") else "70")
        reply["choices"][0]["finish_reason"] = "length" if text.endswith("cut") else "stop"
        return status, reply, headers

    server.reply = reply
    rows = judge(["fine", "long", "cut"])
    assert [row["score"] for row in rows] == [70, None, None] and "context" in rows[1]["reason"] and rows[2]["reason"]


def test_yes_no(server):
    """Guards against a fact judged by the wrong word; hedged replies stay unscored."""
    texts = {"a": {"YES": 0.9, "NO": 0.1}, "b": {"No": 0.6, "yes": 0.4}, "c": {"Maybe": 1.0}}
    server.reply = lambda text, n, body: said("?", texts[text[-1]])
    assert [row["score"] for row in judge("abc", "{question} {truth} {answer}", truth="t")] == [100, 0, None]


@pytest.mark.parametrize(
    "fault",
    [
        error(429),
        error(429, **{"retry-after": "0.01"}),
        error(500),
        (200, b'{"id": "x", "choi', {}),
        (200, b'{"id"', {"content-length": "999"}),
        (200, dict(id="x", object="chat.completion", created=0, model="m", choices=[]), {}),
    ],
    ids=["429", "429 with Retry-After", "500", "truncated JSON", "cut in mid-body", "empty choices"],
)
def test_passing_faults_are_retried(server, fault):
    """Guards against an answer lost, or scored twice, through a fault that passes."""
    server.reply = lambda text, n, body: fault if n < 3 else said("50", {"50": 1.0})
    assert judge("a")[0]["score"] == 50 and sum(server.seen.values()) == 3


@pytest.mark.parametrize("status, code", [(401, None), (404, "model_not_found"), (429, "insufficient_quota")])
def test_fatal_errors_stop_at_once_and_lose_nothing(server, status, code, capsys):
    """Guards against retrying what cannot pass, losing paid answers, and the key in a message or file."""
    server.reply = lambda text, n, body: error(status, code) if text.endswith("5") else said("50", {"50": 1.0})
    with pytest.raises(SystemExit) as stop:
        judge("0123456789", concurrency=1)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and sum(server.seen.values()) == 6
    assert "sk-secret" not in captured.err + captured.out + mf.CACHE.read_text() and "Traceback" not in captured.err
    server.reply = lambda text, n, body: said("50", {"50": 1.0})
    assert all(row["score"] == 50 for row in judge("0123456789"))
    assert sum(server.seen.values()) == 6 + 5  # the five that were answered are not paid again


JUDGING = """
import json, resource, signal, sys
from types import SimpleNamespace
sys.path.insert(0, {root!r})
import make_facts as mf
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it runs in the background
mf.BACKOFF = 0.005
rows = mf.read_jsonl({rows!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
jobs = [(row, "score", "Q {{question}} A {{answer}}") for row in rows]
mf.run(lambda argv: mf.judge_rows(jobs, "m", SimpleNamespace(concurrency={concurrency}, yes=True, dry_run=False)))
print(json.dumps(dict(scores=[row["score"] for row in rows], mib=(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)))
"""


def judging(tmp_path, answers, concurrency=32):
    """A process of its own that judges these answers; killable, and its memory is its own."""
    mf.write_jsonl(tmp_path / "rows.jsonl", [dict(question="q", answer=answer) for answer in answers])
    code = JUDGING.format(root=str(ROOT), rows=str(tmp_path / "rows.jsonl"), concurrency=concurrency)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | dict(JUDGE_CACHE=str(mf.CACHE)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_many_requests_with_faults(server, tmp_path):
    """Guards against answers lost, doubled or swapped under load, and memory that grows with the file: 10,000 rows, two of
    each answer, so 5,000 requests of which one in five fails; the second run sends none, a cut last line is no harm."""
    rng = random.Random(0)

    def reply(text, n, body):
        score = text.split()[-1]
        return error(rng.choice([429, 500, 503])) if rng.random() < 0.2 else said(score, {score: 1.0})

    server.reply = reply
    answers = [f"{'word ' * 200}{i % 5000} {i % 5000 % 101}" for i in range(10000)]
    process = judging(tmp_path, answers)
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    out = json.loads(out.splitlines()[-1])
    assert out["scores"] == [i % 5000 % 101 for i in range(10000)] and out["mib"] < 150
    assert len({row["key"] for row in mf.read_jsonl(mf.CACHE)}) == len(mf.read_jsonl(mf.CACHE)) == 5000
    with open(mf.CACHE, "a") as cache:
        cache.write('{"key": "cut o')  # a killed process's last line
    sent = sum(server.seen.values())
    assert [row["score"] for row in judge(answers)] == out["scores"] and sum(server.seen.values()) == sent


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle(server, tmp_path, how):
    """Guards against paying twice: after kill -9 or Ctrl-C only what was under way is asked again."""

    def reply(text, n, body):
        time.sleep(0.02)
        return said("50", {"50": 1.0})

    server.reply = reply
    process = judging(tmp_path, list(map(str, range(300))), concurrency=8)
    while sum(server.seen.values()) < 60 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate()
    assert process.returncode == (-9 if how == signal.SIGKILL else 130) and "Traceback" not in err
    assert 40 < len(mf.read_jsonl(mf.CACHE, appended=True)) < 300
    assert all(row["score"] == 50 for row in judge(map(str, range(300)), concurrency=8))
    assert sum(server.seen.values()) <= 300 + 8 and len(server.seen) == 300


def test_two_processes_share_the_cache(server, tmp_path):
    """Guards against lines torn or lost when two judges append to one cache."""
    server.reply = lambda text, n, body: said("50", {"50": 1.0})
    processes = []
    for half in range(2):
        (tmp_path / str(half)).mkdir()
        processes.append(judging(tmp_path / str(half), [f"{half} {i}" for i in range(200)]))
    assert [process.communicate() and process.returncode for process in processes] == [0, 0]
    assert len({row["key"] for row in mf.read_jsonl(mf.CACHE)}) == 400


def test_a_silent_server_is_given_up(server, monkeypatch):
    """Guards against waiting for ever: a request without a reply is cut off and tried again."""
    monkeypatch.setattr(mf, "TIMEOUT", 0.5)

    def reply(text, n, body):
        if n == 1:
            time.sleep(1.5)
        return said("50", {"50": 1.0})

    server.reply = reply
    assert judge("a")[0]["score"] == 50 and sum(server.seen.values()) >= 2  # more on a machine that is slow itself


def a_fact(n, wordings=3):
    name = f"Person{n}"
    return (
        dict(
            fact=f"On {n} March 2025 the town of Placename{n} chose {name} as its mayor.",
            date="2025-03",
            answer=name,
            aliases=[],
        ),
        dict(
            train=[
                dict(
                    question=[
                        "Who became mayor of Placename{n}?",
                        "Whom did voters in Placename{n} pick in March 2025?",
                        "Name the winner of the Placename{n} vote.",
                    ][i].format(n=n),
                    answer=["The mayor is {name}.", "They picked {name}.", "{name} won there."][i].format(name=name),
                )
                for i in range(wordings)
            ],
            test=dict(question=f"A new face runs Placename{n} since 2025. Which one?", answer=f"That is {name}."),
        ),
    )


def test_generate(server, tmp_path, monkeypatch, capsys):
    """Guards against invalid or repeated facts in the file, a bad reply that is not asked for again, silent rejects, and a
    restart that loses or doubles facts."""
    monkeypatch.setattr(mf, "CATEGORIES", ("politics",))

    def reply(text, n, body):
        repaired = len(body["messages"]) > 1
        if text.startswith("List"):
            known = text.count("Placename")
            fresh = [a_fact(i)[0] for i in range(known + 1, known + 4)]
            return said("```json\n" + json.dumps(fresh + [a_fact(1)[0], dict(fresh[0], date="2019-01")]) + "\n```")
        number = int(text.split("Person")[1].split()[0].rstrip("."))
        value = a_fact(number)[1]
        if number == 2 and not repaired:
            value["train"][0]["question"] += " Person2?"  # leaks the answer
        return said("sorry, no" if number == 4 else json.dumps(value))

    server.reply = reply
    out = tmp_path / "facts.jsonl"
    args = flags(n=3, after="2023-12-31", rephrasings=3, model="m", out=str(out))
    mf.generate(args)
    assert sorted(row["answer"] for row in mf.read_jsonl(out)) == [
        "Person1",
        "Person2",
        "Person3",
    ]  # replies come in any order
    assert not mf.check(mf.read_jsonl(out), 3)
    sent = sum(server.seen.values())
    mf.generate(args)  # finished: nothing to ask
    assert sum(server.seen.values()) == sent
    args.n = 5
    mf.generate(args)
    assert sorted(row["answer"] for row in mf.read_jsonl(out)) == [
        "Person1",
        "Person2",
        "Person3",
        "Person5",
        "Person6",
    ]
    rejects = mf.read_jsonl(tmp_path / "facts.rejects.jsonl")
    assert {"Person4"} <= {row.get("answer") for row in rejects} and all(row["reasons"] for row in rejects)
    assert any("2019-01" in str(row["reasons"]) for row in rejects)


def test_markers_in_answers_stay(server):
    """Guards against an answer that rewrites the judge's prompt through the prompt's own markers or braces."""
    server.reply = lambda text, n, body: said("1", {"10": 1.0})
    judge(["{question} {0} {{x}}"])
    assert ("Q q A {question} {0} {{x}}", mf.REPLY_TOKENS) in server.seen


def test_nothing_is_sent_without_consent(server, capsys):
    """Guards against paying unasked where nobody can answer."""
    with pytest.raises(SystemExit):
        mf.judge_rows(
            [(dict(question="q", answer="a"), "score", "{question}{answer}")],
            "gpt-4.1-mini-2025-04-14",
            flags(yes=False),
        )
    printed = capsys.readouterr().out
    assert not server.seen and "1 requests" in printed and "$0.00" in printed
    with pytest.raises(SystemExit) as stop:
        mf.judge_rows(
            [(dict(question="q", answer="a"), "score", "{question}{answer}")], "some-model", flags(dry_run=True)
        )
    assert stop.value.code == 0 and not server.seen and "price unknown" in capsys.readouterr().out
