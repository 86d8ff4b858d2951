"""The chat client and the judge, against servers on loopback that speak the real protocol; the real openai client talks
to them. Each case is something that a server is known to do."""

import gzip
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
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import ROOT

import make_facts as mf

KEY = "sk-secret-123"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """server.reply(last word of the message, how often it was asked, body) -> (status, body or bytes, headers);
    server.seen: [(last word, body)] of all requests, in order."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            word = body["messages"][0]["content"].split()[-1]
            with lock:
                counts[word] += 1
                handler.seen.append((word, body))
                handler.heads.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                n = counts[word]
            status, reply, headers = handler.reply(word, n, body)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for item in (
                {"content-type": "application/json", "content-length": str(len(data)), "retry-after-ms": "5"} | headers
            ).items():
                if item[1] is not None:
                    self.send_header(*item)
            self.end_headers()
            self.wfile.write(data)
            if "content-length" in headers:  # says more than it sends: cut in mid-body
                self.close_connection = True

        def log_message(self, *args):
            pass

    class Quiet(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, *args):  # a client that was killed
            pass

    lock, counts = threading.Lock(), Counter()
    http = Quiet(("127.0.0.1", 0), Handler)
    handler = SimpleNamespace(seen=[], heads=[], reply=None)
    threading.Thread(target=http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{http.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(mf, "CACHE", tmp_path / "cache.jsonl")
    monkeypatch.setattr(mf, "BACKOFF", 0.005)
    yield handler
    http.shutdown()
    http.server_close()


def said(text, top=None, end="stop", **message):
    """A completion; top: {token: probability or None for a null} of the first token, None: no log-probabilities."""
    logs = {t: p if p is None else -9999.0 if p == 0 else math.log(p) for t, p in (top or {}).items()}
    tops = [dict(token=t, logprob=p, bytes=None) for t, p in logs.items()]
    logprobs = top and dict(content=[dict(token=str(text), logprob=0.0, bytes=None, top_logprobs=tops)])
    message = dict(role="assistant", content=text) | message
    choice = dict(index=0, finish_reason=end, logprobs=logprobs, message=message)
    return 200, dict(id="x", object="chat.completion", created=0, model="m", choices=[choice]), {}


def error(status, message="no", code=None, **headers):
    return status, dict(error=dict(message=message, type="x", code=code, param=None)), headers


def flags(**more):
    return SimpleNamespace(**dict(concurrency=32, yes=True, dry_run=False) | more)


def judge(answers, prompt="Q {question} A {answer}", concurrency=32, **more):
    rows = [dict(question="q", answer=answer) | more for answer in answers]
    mf.judge_rows([(row, "score", prompt) for row in rows], "m", flags(concurrency=concurrency))
    return rows


def verdicts(answers):
    return judge(answers, "{question} {truth} {answer}", truth="t")


def stops(capsys, answers="0123456789", **more):
    """What a run prints that ends with exit code 2: one line, without the key."""
    with pytest.raises(SystemExit) as stop:
        judge(answers, **more)
    captured = capsys.readouterr()
    cached = mf.CACHE.read_text() if mf.CACHE.exists() else ""
    assert stop.value.code == 2 and KEY not in captured.err + captured.out + cached and "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_weighted_mean(server):
    """Guards against reading one token where the score is a weighted mean of the integers 0 to 100, against other
    tokens that count, and against another limit than 0.25 of the mass."""
    cases = {
        "a": ({"80": 0.5, "90": 0.3, "x": 0.2}, (80 * 0.5 + 90 * 0.3) / 0.8),
        "b": ({"100": 0.25, "I": 0.75}, 100),
        "c": ({"100": 0.24, "I": 0.76}, None),
        "d": ({"REF": 1.0}, None),
        "e": ({"0": 0.96, "10": 0.04}, 0.4),
        "f": ({"100": 0.9, "101": 0.1}, 100),
        "g": ({" 80": 0.5, "080": 0.25, "60": 0.25}, 75),
        "h": ({"80.": 0.7, "40": 0.3}, 40),
        "i": ({"▁80": 0.5, "Ġ60": 0.5}, 70),
        "j": ({"70": 1.0, "10": 0}, 70),
        "k": ({"８０": 0.5, "60": 0.5}, 70),
        "l": ({"-80": 0.7, "40": 0.3}, 40),
    }
    server.reply = lambda word, n, body: said("?", cases[word][0])
    rows = judge(cases)
    assert [row["score"] for row in rows] == [
        mean if mean is None else pytest.approx(mean) for _, mean in cases.values()
    ]
    assert rows[0]["judge_method"] == "logprobs (top_logprobs 20, max_tokens 16, temperature 0)"
    assert all(row["reason"] and row["judge_method"] is None for row in rows[2:4])
    body = next(body for word, body in server.seen if word == "a")
    assert {key: body[key] for key in ("temperature", "logprobs", "top_logprobs", "seed")} == dict(
        temperature=0, logprobs=True, top_logprobs=20, seed=0
    )


def test_a_number_with_little_mass_is_none(server):
    """Guards against a text that is read where the published rule says None: a number is likeliest, but all hold
    under 0.25."""
    server.reply = lambda word, n, body: said("85", {"85": 0.2} | {f"t{i}": 0.05 for i in range(16)})
    row = judge("a")[0]
    assert (
        row["score"] is None and "0.20" in row["reason"] and "logprobs" in row["judge_method"] and len(server.seen) == 1
    )


def test_a_server_without_logprobs_is_asked_for_text(server):
    """Guards against a row that is lost, or asked twice though its text can be read, where a server has no
    log-probabilities."""
    server.reply = lambda word, n, body: said("70-80" if word == "b" else "70")
    assert [row["score"] for row in judge("abcd")] == [70, None, 70, 70] and len(server.seen) == 5


def test_infinite_and_doubled(server):
    """Guards against a crash over -Infinity in JSON, and against one of two entries of a token that is lost."""
    _, body, _ = said("80", {"80": 0.4})
    tops = body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    tops += [dict(token="80", logprob=math.log(0.4)), dict(token="40", logprob=math.log(0.2))]
    tops += [dict(token="0", logprob=-math.inf)]
    server.reply = lambda word, n, b: (200, json.dumps(body).encode(), {})
    assert judge("a")[0]["score"] == pytest.approx(72)


TEXTS = {
    "87": 87,
    " 0\n": 0,
    "100.": 100,
    "85/100": 85,
    "85 / 100.": 85,
    "85 out of 100": 85,
    "85%": 85,
    "85.5": 85.5,
    "Score: 85": 85,
    "**Score:** 85": 85,
    "Score: **85**": 85,
    "**85**/100": 85,
    "The final score is 85.": 85,
    "Rating: 85%": 85,
    '"85"': 85,
    "８５": 85,
    "８５／１００": 85,
    "<think>70 or 75?</think>\n\n85": 85,
    "Hmm, 70.</think>85": 85,
    "<thinking>\nIs it 20?\n</thinking> **85**": 85,
    "<seed:think>1</seed:think>85": 85,
    "[THINK]4[/THINK]85": 85,
    "<reasoning_content>20</reasoning_content>85": 85,
    "<|begin_of_thought|>20<|end_of_thought|>85": 85,
    "<|START_THINKING|>20<|END_THINKING|>85": 85,
    "<|channel|>analysis<|message|>20<|end|><|start|>assistant<|channel|>final<|message|>85": 85,
    "85 \ud83d": 85,
    # nothing else
    "250": None,
    "-5": None,
    "0.85": None,
    "70-80": None,
    "between 20 and 30": None,
    "8/10": None,
    "8.5/10": None,
    "I can't answer question 3.": None,
    "85 because it names 2": None,
    "Step 1": None,
    "85, 90": None,
    "8*5": None,
    "8**5": None,
    "<think>a</think>8<think>b</think>5": None,
    "<|channel|>analysis<|message|>85": None,
    "1e2": None,
    "REFUSAL": None,
    "The answer makes 2 claims": None,
    "<think>The scale is 0-100, so": None,
    "<think>\n85": None,
    "<thinking>I would say 85.": None,
    "<think>85</think>": None,
    "": None,
}


def test_texts_of_scores(server):
    """Guards against a number that is taken from prose, from a range, from another scale or from unfinished thinking,
    and against one that is missed in its usual dress. Servers without log-probabilities."""
    names = [f"n{i}" for i in range(len(TEXTS))]
    server.reply = lambda word, n, body: said(list(TEXTS)[int(word[1:])])
    rows = judge(names)
    got = dict(zip(TEXTS, [row["score"] for row in rows]))
    assert got == TEXTS
    assert all(row["reason"] for row in rows if row["score"] is None)
    assert {row["judge_method"].split(" (")[0] for row in rows if row["score"] is not None} == {"text"}
    assert "thinking" in rows[list(TEXTS).index("<think>\n85")]["reason"]
    assert rows[list(TEXTS).index("REFUSAL")]["reason"] == "REFUSAL"


VERDICTS = {
    "YES": 100,
    "no": 0,
    "Yes.": 100,
    "**YES**": 100,
    "Answer: NO": 0,
    "Verdict: **NO**.": 0,
    "<think>NO? The names agree.</think>\nYES": 100,
    "NOT SURE": None,
    "Yes and no": None,
    "YES/NO": None,
    "None": None,
    "<think>YES": None,
    "85": None,
}


def test_texts_of_verdicts(server):
    """Guards against a fact judged by one word of a hedged reply, or unscored because of bold, a full stop,
    thinking."""
    names = [f"n{i}" for i in range(len(VERDICTS))]
    server.reply = lambda word, n, body: said(list(VERDICTS)[int(word[1:])])
    rows = verdicts(names)
    assert dict(zip(VERDICTS, [row["score"] for row in rows])) == VERDICTS
    assert all(row["reason"] for row in rows if row["score"] is None)


def test_verdicts_by_their_first_token(server):
    """Guards against a verdict by the wrong token, a YES of two tokens, thinking or bold first that make right answers
    unscored, and a NOT whose first token is NO."""
    first = {
        "a": said("YES", {"YES": 0.9, "NO": 0.1}),
        "b": said("No", {"No": 0.6, "yes": 0.4}),
        "c": said("Maybe", {"Maybe": 1.0}),
        "d": said("Y", {"Y": 1.0}),
        "e": said("**", {"**": 0.9, "YES": 0.05}),
        "f": said("NOT SURE", {"NO": 0.9}),
        "g": said("<think>", {"<think>": 1.0}),
        "h": said(" YES", {" YES": 0.5, "▁Yes": 0.3}),
    }
    text = dict(c="Maybe", d="YES", e="**YES**", f="NOT SURE", g="<think>yes?</think>NO")
    server.reply = lambda word, n, body: first[word] if body.get("logprobs") else said(text[word])
    assert [row["score"] for row in verdicts(first)] == [100, 0, None, 100, 100, None, 0, 100]


BEGINNINGS = {
    "0.85": ("0", None),
    "80-90": ("80", None),
    "70 to 100": ("70", None),
    "8/10": ("8", None),
    "8 out of 10": ("8", None),
    "85.5": ("85", 85.5),
    "85/100": ("85", 90),
    "85 out of 100.": ("85", 90),
    "85.": ("85", 90),
    "YES/NO": ("YES", None),
    "Yes and no": ("Yes", None),
    "Yes.": ("Yes", 100),
    "70...80": ("70", None),
    "70\u221280": ("70", None),
}


def test_a_first_token_that_is_not_the_whole(server):
    """Guards against 0 for "0.85", 80 for "80-90", 8 for "8/10", YES for "YES/NO" where the server gives
    log-probabilities of the first token and the whole text."""
    texts = list(BEGINNINGS)

    def reply(word, n, body):
        token = BEGINNINGS[texts[int(word[1:])]][0]
        return said(texts[int(word[1:])], {token: 0.5, "95": 0.5 - 1e-6} if "logprobs" in body else None)

    server.reply = reply
    names = [f"n{i}" for i in range(len(texts))]
    got = [row["score"] for row in judge(names[:9] + names[12:]) + verdicts(names[9:12])]
    scores = [None if score is None else pytest.approx(score, abs=1e-3) for _, score in BEGINNINGS.values()]
    assert got == scores[:9] + scores[12:] + scores[9:12]


def test_a_first_token_that_carries_no_answer(server):
    """Guards against a score by a first token that the reply did not take: the likeliest is no answer, the reply is."""
    tops = {"Score: 85.": {"Score": 0.6, "20": 0.4}, "\n85": {"\n": 0.6, "20": 0.4}, "70?</think>85": {"70": 1.0}}
    server.reply = lambda word, n, body: said(list(tops)[int(word)], list(tops.values())[int(word)])
    assert [row["score"] for row in judge("012")] == [85] * 3 and len(server.seen) == 3
    tops = {"The answer is YES.": {"The": 0.6, "NO": 0.4}, "Y": {"Y": 0.6, "NO": 0.4}, "No?</think>YES": {"No": 1.0}}
    assert [row["score"] for row in verdicts("012")] == [100, None, 100]


def test_log_probabilities_of_thoughts(server):
    """Guards against a score, or a verdict, by the first token of the thinking, which some servers put first into
    the log-probabilities."""
    server.reply = lambda word, n, body: said("85", {"20": 0.5, "Okay": 0.5}, reasoning_content="20 or 85?")
    assert [row["score"] for row in judge("abcd")] == [85] * 4 and len(server.seen) == 4
    server.reply = lambda word, n, body: said("YES", {"No": 0.6, "Okay": 0.4}, reasoning="No wait")
    assert [row["score"] for row in verdicts("efgh")] == [100] * 4


@pytest.mark.parametrize("end", ["error", "abort", "max_tokens", "model_length", "SAFETY", "stop", "eos_token", None])
def test_names_of_an_end(server, end):
    """Guards against half a number that is scored because the server has its own name for a reply that was cut off."""
    server.reply = lambda word, n, body: said("50") if word == "a" else said("8", end=end)
    row = judge("ab")[1]
    assert (row["score"], row["reason"] is None) == ((8, True) if end in ("stop", "eos_token", None) else (None, False))


def test_nothing_at_all_may_pass(server):
    """Guards against a row that is lost for good over one reply without content."""
    empty = []
    server.reply = lambda word, n, body: (
        empty.append(1) or (200, b"", {}) if word == "b" and not empty else said("85", {"85": 1.0})
    )
    assert [row["score"] for row in judge("abc", concurrency=1)] == [85, 85, 85] and empty == [1]


def test_markers_that_a_row_has_nothing_for(server):
    """Guards against a traceback over {truth} in a trait's own prompt, and against a score read as a verdict."""
    server.reply = lambda word, n, body: said("85", {"85": 1.0})
    (row,) = judge("a", "{question} {answer} {truth}")
    assert row["score"] == 85 and server.seen[0][1]["messages"][0]["content"] == "q a {truth}"


def test_a_refusal_is_no_score(server):
    """Guards against a number in the text of a refused reply, and a filter under another name that is asked again."""
    refused = dict(b=said("0", refusal="I cannot rate this"), c=said(None, end="SAFETY"))
    server.reply = lambda word, n, body: refused.get(word, said("85", {"85": 1.0}))
    rows = judge("abcd")
    assert [row["reason"] for row in rows] == [None, "I cannot rate this", "SAFETY", None]
    assert [word for word, _ in server.seen].count("c") == 1


@pytest.mark.parametrize("limit", [True, False], ids=["as asked", "one token only"])
def test_split_digits(server, limit):
    """Guards against scoring 87 as 8 where the server's tokens are single digits, whether it sends the whole reply
    or, of its own will, one token when log-probabilities are wanted."""

    def reply(word, n, body):
        top = {word[0]: 0.9, "1": 0.1} if word[0] != "1" else {"1": 1.0}
        return said(word[0] if "logprobs" in body and not limit else word, top if "logprobs" in body else None)

    server.reply = reply
    words = ["7", "87", "5", "100", "0"]
    rows = judge(words, concurrency=1)
    assert [row["score"] for row in rows] == [7, 87, 5, 100, 0] and {row["judge_method"][:4] for row in rows} == {
        "text"
    }
    assert len(server.seen) == (8 if limit else 10)  # only a single digit may be a part of more


ODD_LOGPROBS = dict(
    null=[dict(token="85", logprob=None)],
    nan=[dict(token="85", logprob=math.nan)],
    text=[dict(token="85", logprob="-0.1")],
    huge=[dict(token="85", logprob=1e9)],
    nothing=[],
    no_token=[dict(logprob=-0.1)],
    no_list=None,
)


@pytest.mark.parametrize("name", [*ODD_LOGPROBS, "content empty", "content null", "legacy", "a text"])
def test_odd_logprobs(server, name):
    """Guards against a crash, a NaN score or a lost row over log-probabilities in another form: the text is read."""
    status, body, headers = said("85", {"x": 1.0})
    choice = body["choices"][0]
    if name in ODD_LOGPROBS:
        choice["logprobs"]["content"][0]["top_logprobs"] = ODD_LOGPROBS[name]
    elif name == "legacy":
        choice["logprobs"] = dict(tokens=["85"], token_logprobs=[-0.1], top_logprobs=[{"85": -0.1}], text_offset=[0])
    else:
        choice["logprobs"] = {"content empty": dict(content=[]), "content null": dict(content=None), "a text": "no"}[
            name
        ]
    server.reply = lambda word, n, b: (status, json.dumps(body).encode(), headers)
    for row in judge("a") + judge("a"):
        assert (row["score"], row["judge_method"][:4], len(server.seen)) == (85, "text", 1)


PARTS = [dict(type="thinking", thinking=[dict(type="text", text="70?")]), dict(type="text", text="85")]


@pytest.mark.parametrize(
    "reply, score, why",
    [
        (said(PARTS), 85, None),
        (said([dict(type="reasoning", text="70"), dict(type="text", text="8"), dict(type="text", text="5")]), 85, None),
        (said(b"".decode(), refusal="I will not rate this."), None, "I will not rate this."),
        (said("", end="content_filter"), None, "content_filter"),
        (said("8", end="content_filter"), None, "cut off"),
        (said("8", end="length"), None, "cut off"),
        (said(None), None, "not readable"),
        (said(7.5), None, "chat.completion"),
        (said([None, 85]), None, "chat.completion"),
    ],
    ids="parts reasoning refusal filter half cut null number odd".split(),
)
def test_odd_contents(server, reply, score, why):
    """Guards against a crash over a content that is no text, now or at every later start from the cache, and against
    half a number that is taken for a whole one; the row says why it has no score."""
    server.reply = lambda word, n, body: said("50") if word == "fine" else reply
    rows = judge(["fine", "odd"])
    assert rows[1]["score"] == score and (why is None or why in rows[1]["reason"])
    sent = len(server.seen)
    assert judge(["fine", "odd"])[1]["score"] == score and len(server.seen) == sent


def test_message_null_and_no_choices(server):
    """Guards against a reply without choices or message that ends the run, or that crashes every later start."""
    null = said("")
    null[1]["choices"][0]["message"] = None
    replies = dict(a=null, b=(200, dict(id="x", choices=[]), {}), c=(200, dict(id="x", choices=None), {}), d=said("50"))
    server.reply = lambda word, n, body: replies[word]
    assert [row["score"] for row in judge("dabc")] == [50, None, None, None]
    sent = len(server.seen)
    rows = judge("dabc")
    assert len(server.seen) == sent and all(row["reason"] for row in rows[1:])


# ---------------------------------------------------------------------------------------------------------------------
# The form


def picky(wrong, refused):
    """A server that refuses requests for which wrong(body) holds."""
    return lambda word, n, body: (
        refused if wrong(body) else said("85", {"85": 0.9, "90": 0.1} if "logprobs" in body else None)
    )


MAX = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
TEMPERATURE = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
EXTRA = dict(detail=[dict(type="extra_forbidden", loc=["body", "logprobs"], msg="Extra inputs are not permitted")])
TEXT, FORM = "text (max_tokens 16, temperature 0)", "top_logprobs 20, max_tokens 16, temperature 0"


@pytest.mark.parametrize(
    "wrong, refused, score, method",
    [
        (
            lambda b: "max_tokens" in b,
            error(400, MAX, "unsupported_parameter"),
            85.5,
            "logprobs (top_logprobs 20, max_completion_tokens 16, temperature 0)",
        ),
        (
            lambda b: "max_completion_tokens" not in b,
            error(400, MAX),
            85.5,
            "logprobs (top_logprobs 20, max_completion_tokens 16, temperature 0)",
        ),
        (
            lambda b: "max_tokens" in b,
            error(422, "nope"),
            85.5,
            "logprobs (top_logprobs 20, max_completion_tokens 16, temperature 0)",
        ),
        (
            lambda b: "temperature" in b,
            error(400, TEMPERATURE, "unsupported_value"),
            85.5,
            "logprobs (top_logprobs 20, max_tokens 16)",
        ),
        (lambda b: "temperature" in b, error(403, "not this value"), 85.5, "logprobs (top_logprobs 20, max_tokens 16)"),
        (lambda b: "logprobs" in b, error(403, "Log probs of this model are not for you."), 85, TEXT),
        (lambda b: "logprobs" in b, (422, EXTRA, {}), 85, TEXT),
        (lambda b: "logprobs" in b, error(400, "unknown field"), 85, TEXT),
        (lambda b: "logprobs" in b, (200, dict(error="logprobs: unknown"), {}), 85, TEXT),
        (
            lambda b: b.get("top_logprobs", 0) > 5,
            error(400, "top_logprobs must be 0 to 5"),
            85.5,
            "logprobs (top_logprobs 5, max_tokens 16, temperature 0)",
        ),
        (
            lambda b: b.get("top_logprobs", 0) > 5,
            error(400, "out of range"),
            85.5,
            "logprobs (top_logprobs 5, max_tokens 16, temperature 0)",
        ),
        (lambda b: set(b) - {"model", "messages"}, error(400, "bad"), 85, "text ()"),
        (
            lambda b: {"max_tokens", "temperature", "logprobs"} & set(b),
            error(400, "no"),
            85,
            "text (max_completion_tokens 16)",
        ),
    ],
)
def test_the_form_is_agreed_on_once(server, wrong, refused, score, method):
    """Guards against a model that cannot be used because it wants another limit, temperature or log-probabilities,
    however its server says so; the first request finds that out, for all, and no refusal is remembered."""
    server.reply = picky(wrong, refused)
    rows = judge("abcdefgh")
    assert [row["score"] for row in rows] == [pytest.approx(score)] * 8
    assert {row["judge_method"] for row in rows} == {method}
    counts = Counter(word for word, _ in server.seen)
    assert counts["a"] <= 16 and all(counts[word] == 1 for word in "bcdefgh")
    assert "refused" not in mf.CACHE.read_text() and not any(wrong(body) for _, body in server.seen[-7:])


def test_a_first_row_that_is_refused_says_nothing_of_the_form(server):
    """Guards against log-probabilities given up, or the run, because the very first answer is too long for the
    server."""
    long = error(400, "maximum context length exceeded", "context_length_exceeded")
    server.reply = lambda word, n, body: long if word == "long" else said("85", {"85": 0.9, "90": 0.1})
    rows = judge(["long", "a", "b"])
    assert [row["score"] for row in rows] == [None, pytest.approx(85.5), pytest.approx(85.5)]
    assert "context length" in rows[0]["reason"] and "logprobs" in rows[1]["judge_method"]
    sent = len(server.seen)
    judge(["long", "a", "b"])
    assert len(server.seen) == sent  # asked again with a fresh cache only


THINKERS = dict(
    reasoning_content=said(None, end="length", reasoning_content="Okay,"),
    reasoning=said("", end="length", reasoning="Let me see"),
    hidden=said("", end="length"),
    stopped=said(None, reasoning="Okay, 80?"),
    tag=said("<think>", {"<think>": 1.0}),
    prose=said("<think>\nThe scale is 0-100, so 20", end="length"),
    refusal=said("<think>\nIs this a REFUSAL? 20", {"<think>": 0.7, "20": 0.3}, end="length"),
    null_part=said([dict(type="text", text=None)], end="length", reasoning_content="Okay,"),
    other_tag=said("<reasoning>30 is", end="length"),
    parts=said([dict(type="thinking", thinking="20")], end="length"),
)


@pytest.mark.parametrize("name", THINKERS)
def test_thinking_judges_get_room(server, name):
    """Guards against a judge that thinks first and is cut off before its answer, paid for and unscored; from the
    first such reply on there is room for it, in one request a row."""
    room = mf.REPLY_TOKENS + mf.THINKING_TOKENS
    server.reply = lambda word, n, body: (
        said("<think>20?</think>85", reasoning_content="20?") if body["max_tokens"] == room else THINKERS[name]
    )
    rows = judge("abcdefgh")
    assert [row["score"] for row in rows] == [85] * 8 and len(server.seen) == 9
    assert {row["judge_method"] for row in rows} == {f"text (max_tokens {room}, temperature 0)"}


@pytest.mark.parametrize("name", ["reasoning_content", "hidden"])
@pytest.mark.parametrize("rows", [8, 300])
def test_a_judge_that_never_answers_is_noticed(server, name, rows, capsys):
    """Guards against hundreds of paid replies that are all empty, and a run that calls itself finished."""
    server.reply = lambda word, n, body: THINKERS[name]
    line = stops(capsys, map(str, range(rows)), concurrency=4)
    assert "THINKING_TOKENS" in line and "another judge" in line and len(server.seen) <= 30 and not mf.CACHE.exists()


def test_unfinished_thinking_is_unscored(server):
    """Guards against a number out of thinking that did not end, and a run that ends because some of it did not."""
    server.reply = lambda word, n, body: THINKERS["prose"]
    row = judge("ab")[0]
    assert row["score"] is None and "thinking did not end" in row["reason"]
    server.reply = lambda word, n, body: said("<think>2</think>85") if word == "n0" and n == 1 else THINKERS["hidden"]
    assert [row["score"] for row in judge([f"n{i}" for i in range(30)])] == [85] + [None] * 29


# ---------------------------------------------------------------------------------------------------------------------
# Refusals and errors

REFUSALS = [
    error(400, "The prompt repeats one pattern too often.", "invalid_prompt"),
    error(400, "Your prompt set off our content management policy.", "content_filter"),
    error(403, "Flagged by moderation"),
    error(422, "unprocessable"),
    error(413, "request entity too large"),
    (200, dict(error=dict(message="blocked for safety", code=400)), {}),
]


@pytest.mark.parametrize("refused", REFUSALS, ids=["repeats", "filter", "403", "422", "413", "200"])
def test_one_refused_row(server, refused):
    """Guards against a run that dies of one broken answer, now and at every later start; the row says why it is
    unscored, and the others are judged as ever."""
    server.reply = lambda word, n, body: refused if word == "x" else said("85", {"85": 0.9, "90": 0.1})
    rows = judge("abcxdefg")
    assert [row["score"] for row in rows] == [pytest.approx(85.5)] * 3 + [None] + [pytest.approx(85.5)] * 4
    assert refused[1]["error"]["message"] in rows[3]["reason"] and rows[3]["judge_method"] is None
    sent = len(server.seen)
    again = judge("abcxdefg")
    assert len(server.seen) == sent and again[3]["reason"] == rows[3]["reason"]
    mf.CACHE.unlink()
    server.reply = lambda word, n, body: said("85", {"85": 0.9, "90": 0.1})
    assert judge("abcxdefg")[3]["score"] == pytest.approx(85.5)


@pytest.mark.parametrize("how", ["500", "408", "cut", "choice"])
def test_a_row_that_breaks_the_server(server, monkeypatch, how):
    """Guards against a run that dies, at every start, of one row at which the server fails each time, or half of whose
    reply is scored."""
    monkeypatch.setattr(mf, "RETRIES", 1)
    half = said("8", end="error")
    half[1]["choices"][0]["error"] = dict(code=502, message="cannot handle this")

    def reply(word, n, body):
        if word != "x":
            return said("85", {"85": 1.0})
        if how == "cut":
            raise ConnectionResetError
        return half if how == "choice" else error(int(how), "cannot handle this")

    server.reply = reply
    rows = judge("abcxdefg")
    assert [row["score"] is None for row in rows] == [word == "x" for word in "abcxdefg"]
    assert {"cut": "onnection", "choice": "cut off"}.get(how, "cannot handle this") in rows[3]["reason"]


def test_an_outage_that_ends(server, monkeypatch):
    """Guards against rows that are remembered as refused because the server was down for longer than the client's
    retries last, and up again when another row was asked to find out."""
    monkeypatch.setattr(mf, "RETRIES", 2)
    server.reply = lambda word, n, body: (
        error(500, "restarting") if 20 < len(server.seen) <= 20 + 8 * 3 else said("85", {"85": 1.0})
    )
    assert [row["score"] for row in judge([f"n{i}" for i in range(60)], concurrency=8)] == [pytest.approx(85)] * 60


@pytest.mark.parametrize("up", [10, 37], ids=["many rows left", "few"])
def test_a_server_that_goes_down(server, monkeypatch, capsys, up):
    """Guards against an outage that is taken for the rows' own fault, and remembered."""
    monkeypatch.setattr(mf, "RETRIES", 1)
    server.reply = lambda word, n, body: (
        said("85", {"85": 1.0}) if len(server.seen) <= up else error(500, "gone fishing")
    )
    words = [f"n{i}" for i in range(40)]
    assert "gone fishing" in stops(capsys, words, concurrency=4)
    server.reply = lambda word, n, body: said("85", {"85": 1.0})
    assert all(row["score"] == pytest.approx(85) for row in judge(words))


@pytest.mark.parametrize("status", [401, 402, 404, 429])
def test_what_is_under_way_is_kept(server, status, capsys):
    """Guards against paying twice for the requests that were under way when another one ended the run."""

    def reply(word, n, body):
        if word == "r7" and n == 1:
            return error(status, "your quota is used up", "insufficient_quota")
        time.sleep(0.2 * (word != "r0"))
        return said("85", {"85": 1.0})

    server.reply = reply
    words = [f"r{i}" for i in range(30)]
    stops(capsys, words, concurrency=8)
    judge(words)
    assert {word for word, n in Counter(word for word, _ in server.seen).items() if n > 1} == {"r7"}


def test_many_refused_rows_in_a_row(server):
    """Guards against a run that dies because all answers at one strong coefficient are refused: at each, one that was
    answered is asked again, and as it is answered, the refusal is the row's own."""
    server.reply = lambda word, n, body: REFUSALS[1] if word[0] == "x" else said("85", {"85": 1.0})
    rows = judge([f"a{i}" for i in range(5)] + [f"x{i}" for i in range(100)], concurrency=4)
    assert [row["score"] is None for row in rows] == [False] * 5 + [True] * 100 and len(server.seen) == 105 + 100
    sent = len(server.seen)
    rows = judge([f"x{i}" for i in range(100)] + ["a0"])
    assert len(server.seen) == sent and rows[-1]["score"] == pytest.approx(85)


@pytest.mark.parametrize("answered", [0, 40])
@pytest.mark.parametrize("refused", [error(400, "The hard limit of your bill is reached.", "billing"), REFUSALS[-1]])
def test_an_account_that_is_refused(server, answered, refused, capsys):
    """Guards against a refusal of the account that is taken for one of the rows: the run stops in one line with the
    server's sentence, nothing of it is remembered, and later all rows are scored by their log-probabilities."""
    fine = said("85", {"85": 0.9, "90": 0.1})
    server.reply = lambda word, n, body: fine if len(server.seen) <= answered else refused
    words = [f"n{i}" for i in range(200)]
    assert refused[1]["error"]["message"] in stops(capsys, words, concurrency=4)
    assert len(server.seen) <= answered + 80
    server.reply = lambda word, n, body: fine
    rows = judge(words)
    assert [row["score"] for row in rows] == [pytest.approx(85.5)] * 200
    assert {row["judge_method"][:8] for row in rows} == {"logprobs"}


PAGE = b"<html><head><style>p {}</style><title>Sign in</title></head><body><p>Please sign in</p></body></html>"


@pytest.mark.parametrize(
    "reply, words",
    [
        ((200, dict(error="no such endpoint: /chat/completions"), {}), "no such endpoint: /chat/completions"),
        ((200, dict(error=dict(message="Unexpected endpoint", code=404)), {}), "Unexpected endpoint"),
        ((200, dict(message="Not here", status="failed"), {}), "Not here"),
        ((200, PAGE, {"content-type": "text/html"}), "Please sign in"),
        ((404, dict(detail="Not Found"), {}), "Not Found"),
        (error(404, "The model `m` does not exist", "model_not_found"), "404 - The model `m` does not exist"),
        (error(401, f"Incorrect API key: {KEY}"), "401 - Incorrect API key: ***"),
        (error(402, "Insufficient Balance"), "402 - Insufficient Balance"),
        (error(429, "You exceeded your quota", "insufficient_quota"), "429 - You exceeded your quota"),
        ((405, PAGE, {"content-type": "text/html"}), "405 Sign in Please sign in"),
        ((400, gzip.compress(b'{"error": {"message": "packed"}}'), {"content-encoding": "gzip"}), "packed"),
        ((400, b"", {}), "code: 400"),
        ((202, dict(status="queued"), {}), "queued"),
        ((204, b"", {}), "code: 500"),  # tried again: it may pass
    ],
)
def test_what_no_request_gets_past_stops_at_once(server, reply, words, capsys):
    """Guards against minutes of retries, a traceback, the key in a message, and a server's sentence that is kept
    back."""
    server.reply = lambda word, n, body: reply
    start = time.time()
    assert words in stops(capsys) and time.time() - start < 5 and len(server.seen) <= 30


@pytest.mark.parametrize("status, code", [(401, None), (404, "model_not_found"), (429, "insufficient_quota")])
def test_a_fatal_error_in_the_middle_loses_nothing(server, status, code, capsys):
    """Guards against retrying what cannot pass, and against losing answers that are paid."""
    server.reply = lambda word, n, body: error(status, "no", code) if word == "5" else said("50", {"50": 1.0})
    stops(capsys, concurrency=1)
    assert len(server.seen) == 6
    server.reply = lambda word, n, body: said("50", {"50": 1.0})
    assert all(row["score"] == 50 for row in judge("0123456789"))
    assert len(server.seen) == 6 + 5  # the five that were answered are not paid again


@pytest.mark.parametrize(
    "fault",
    [
        error(408),
        error(409),
        error(429),
        error(429, **{"retry-after-ms": None, "retry-after": "0.01"}),
        error(429, **{"retry-after-ms": None, "retry-after": formatdate(time.time() + 1, usegmt=True)}),
        error(429, **{"retry-after-ms": "nan", "retry-after": "0"}),
        error(500),
        (503, PAGE, {"content-type": "text/html"}),
        error(529),
        (200, b'{"id": "x", "choices": [', {}),
        (200, b'{"id"', {"content-length": "999"}),
        (200, dict(id="x", object="chat.completion", created=0, model="m", choices=[]), {}),
        (200, dict(error=dict(message="upstream", code=502)), {}),
    ],
    ids="408 409 429 seconds date nan 500 503 529 truncated cut empty upstream".split(),
)
def test_passing_faults_are_retried(server, fault):
    """Guards against an answer lost, or scored twice, through a fault that passes."""
    server.reply = lambda word, n, body: fault if n < 3 else said("50", {"50": 1.0})
    assert judge("a")[0]["score"] == pytest.approx(50) and len(server.seen) == 3


@pytest.mark.parametrize("fault", [error(503), (200, dict(error=dict(message="too fast", code=429)), {})])
def test_a_burst_of_overload(server, fault):
    """Guards against a run that ends, or rows that are refused, because a server is overloaded for longer than the
    client's retries last, or says 429 in a body with status 200."""
    until = time.time() + 0.25  # a minute, two hundred times as fast
    server.reply = lambda word, n, body: (
        fault if len(server.seen) > 5 and time.time() < until else said("85", {"85": 1.0})
    )
    assert all(row["score"] == pytest.approx(85) for row in judge(map(str, range(60))))


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("asked", ["86400", "1e300", "date"])
def test_no_wait_of_a_day(server, status, asked, capsys):
    """Guards against a run that sleeps for hours because a server asks for it; what is done is kept."""
    asked = formatdate(time.time() + 86400, usegmt=True) if asked == "date" else asked
    day = error(status, "quota for today is used up", **{"retry-after": asked, "retry-after-ms": None})
    server.reply = lambda word, n, body: said("50", {"50": 1.0}) if len(server.seen) <= 5 else day
    start = time.time()
    line = stops(capsys, concurrency=1)
    assert "quota for today" in line and time.time() - start < 5
    assert len(mf.read_jsonl(mf.CACHE)) == 5


def bucket(rate, burst):
    """A rate limit: `rate` requests a second, at most `burst` at once. Refused requests count, too, in part."""
    state = dict(tokens=burst, time=time.monotonic())
    lock = threading.Lock()

    def take():
        with lock:
            now = time.monotonic()
            state["tokens"] = min(burst, state["tokens"] + (now - state["time"]) * rate)
            state["time"] = now
            if state["tokens"] >= 1:
                state["tokens"] -= 1
                return True
            state["tokens"] -= 0.05
            return False

    return take


def window(number, seconds):
    """A rate limit: `number` requests in every window of so many seconds."""
    used = Counter()
    return lambda: used.update([int(time.monotonic() / seconds)]) or used[int(time.monotonic() / seconds)] <= number


@pytest.mark.parametrize(
    "limit, header",
    [("bucket", {"retry-after-ms": "5"}), ("window", {}), ("long window", {"retry-after-ms": "1"})],
    ids=["bucket", "window", "too short a wait"],
)
def test_any_rate_limit_is_lived_with(server, limit, header):
    """Guards against giving up under 60 requests a minute (two hundred times as fast here), 32 workers and 500 rows,
    and against workers that keep knocking: few more requests than rows are sent."""
    limits = {
        "bucket": lambda: bucket(200, 2),
        "window": lambda: window(60, 0.3),
        "long window": lambda: window(120, 0.3),
    }
    allowed = limits[limit]()
    server.reply = lambda word, n, body: (
        said("50", {"50": 1.0}) if allowed() else error(429, **{"retry-after-ms": None} | header)
    )
    assert all(row["score"] == pytest.approx(50) for row in judge(map(str, range(500))))
    assert len(server.seen) < 1500


# ---------------------------------------------------------------------------------------------------------------------
# Key, address, cache


def test_the_key_stays_where_it_belongs(server, monkeypatch, capsys):
    """Guards against a key with a line end (a file read by the shell) that no server takes, and against the key in a
    reply, a message or the cache where a server repeats it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\r\n")
    server.reply = lambda word, n, body: error(400, f"no {KEY}") if word == "b" else said(f"85 {KEY}")
    rows = judge("ab" * 30)
    captured = capsys.readouterr()
    assert {heads["authorization"] for _, heads in server.heads} == {f"Bearer {KEY}"}
    assert KEY not in json.dumps(rows) + captured.out + captured.err + mf.CACHE.read_text()
    assert "no ***" in rows[1]["reason"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("OPENAI_API_KEY", "sk-one sk-two"),
        ("OPENAI_API_KEY", "sk-ключ"),
        ("OPENAI_BASE_URL", "localhost:9999/v1"),
        ("OPENAI_BASE_URL", "http://localhost:port/v1"),
        ("OPENAI_BASE_URL", "http://user:geheim@"),
        ("OPENAI_BASE_URL", "http://localhost:99999/v1"),
        ("OPENAI_BASE_URL", "http://256.1.1.1/v1"),
    ],
)
def test_wrong_keys_and_addresses_are_one_line(server, monkeypatch, capsys, name, value):
    """Guards against a traceback, or retries, over a key or an address that can be none; neither is shown."""
    monkeypatch.setenv(name, value)
    line = stops(capsys)
    assert name in line and value not in line and "geheim" not in line and not server.seen


def test_a_password_in_the_address_is_not_shown(server, monkeypatch, capsys):
    """Guards against a password of OPENAI_BASE_URL on the screen or in the cache."""
    base = os.environ["OPENAI_BASE_URL"]
    monkeypatch.setenv("OPENAI_BASE_URL", base.replace("//", "//user:geheim@") + "/")
    server.reply = lambda word, n, body: error(401, "who are you?")
    line = stops(capsys)
    assert "geheim" not in line and base in line and server.heads[0][0] == "/v1/chat/completions"
    server.reply = lambda word, n, body: said("85")
    judge("a")
    assert "geheim" not in mf.CACHE.read_text() + capsys.readouterr().err


def test_a_dead_address_is_one_line(server, monkeypatch, capsys):
    """Guards against a traceback where nothing listens."""
    monkeypatch.setattr(mf, "RETRIES", 1)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    assert "onnection" in stops(capsys)


def test_the_cache_knows_the_server_and_the_model(server, monkeypatch):
    """Guards against replies of one server, or model, that are taken for those of another."""
    server.reply = lambda word, n, body: said("85", {"85": 1.0})
    judge("a")
    judge("a")
    assert len(server.seen) == 1
    mf.judge_rows([(dict(question="q", answer="a"), "score", "Q {question} A {answer}")], "other", flags())
    assert len(server.seen) == 2
    monkeypatch.setenv("OPENAI_BASE_URL", os.environ["OPENAI_BASE_URL"].replace("127.0.0.1", "localhost"))
    judge("a")
    assert len(server.seen) == 3


def test_a_damaged_cache_is_no_harm(server):
    """Guards against a cache line of another making, or torn, that crashes every later start."""
    server.reply = lambda word, n, body: said("85", {"85": 1.0})
    judge("abcdefghi")
    lines = mf.CACHE.read_text().splitlines()
    head = [line[:75] for line in lines]
    odd = [
        '"reply": null}',
        '"reply": {"text": null}}',
        '"reply": 5}',
        "",
        '"reply": {"refused": "log-probabilities"}}',
        lines[5][75:].replace("1.0", "null"),
        lines[6][75:].replace('["85", 1.0]', "5"),
        lines[7][75:].replace("1.0", "Infinity"),
    ]
    mf.CACHE.write_text("\n".join([*(a + " " + b for a, b in zip(head, odd)), lines[8], '{"key": "cut o']))
    assert [row["score"] for row in judge("abcdefghi")] == [85] * 9 and len(server.seen) == 9 + 8
    assert judge("abcdefghi") and len(server.seen) == 9 + 8


def test_dollars_are_shown(server, capsys):
    """Guards against a bill that is seen only afterwards: the bar adds up what the replies' usage says."""
    status, body, headers = said("85", {"85": 1.0})
    body["usage"] = dict(prompt_tokens=1_000_000, completion_tokens=500_000, total_tokens=1_500_000)
    server.reply = lambda word, n, b: (status, body, headers)
    row = dict(question="q", answer="a")
    mf.judge_rows([(row, "score", "{question} {answer}")], "gpt-4.1-mini-2025-04-14", flags())
    assert "$1.2000" in capsys.readouterr().err
    body["usage"] = dict(prompt_tokens=None, completion_tokens="many")
    assert judge("b")[0]["score"] == 85


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
mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
print(json.dumps(dict(scores=[row["score"] for row in rows], mib=mib)))
"""


def judging(tmp_path, answers, concurrency=32):
    """A process of its own that judges these answers; killable, and its memory is its own."""
    mf.write_jsonl(tmp_path / "rows.jsonl", [dict(question="q", answer=answer) for answer in answers])
    code = JUDGING.format(root=str(ROOT), rows=str(tmp_path / "rows.jsonl"), concurrency=concurrency)
    env = os.environ | dict(JUDGE_CACHE=str(mf.CACHE))
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_many_requests_with_faults(server, tmp_path):
    """Guards against answers lost, doubled or swapped under load, and memory that grows with the file: 10,000 rows,
    two of each answer, so 5,000 requests of which one in five fails; the second run sends none, a cut last line is no
    harm."""
    rng = random.Random(0)

    def reply(word, n, body):
        fails = rng.random() < 0.2
        return error(rng.choice([429, 500, 503, 408])) if fails else said(word, {word: 1.0})

    server.reply = reply
    answers = [f"{'word ' * 50}{i % 5000} {i % 5000 % 101}" for i in range(10000)]
    process = judging(tmp_path, answers)
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    out = json.loads(out.splitlines()[-1])
    assert out["scores"] == [pytest.approx(i % 5000 % 101) for i in range(10000)] and out["mib"] < 150
    assert len({row["key"] for row in mf.read_jsonl(mf.CACHE)}) == len(mf.read_jsonl(mf.CACHE)) == 5000
    with open(mf.CACHE, "a") as cache:
        cache.write('{"key": "cut o')  # a killed process's last line
    sent = len(server.seen)
    assert [row["score"] for row in judge(answers)] == out["scores"] and len(server.seen) == sent


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle(server, tmp_path, how):
    """Guards against paying twice: after kill -9 or Ctrl-C only what was under way is asked again."""

    def reply(word, n, body):
        time.sleep(0.02)
        return said("50", {"50": 1.0})

    server.reply = reply
    process = judging(tmp_path, list(map(str, range(300))), concurrency=8)
    while len(server.seen) < 60 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate()
    assert process.returncode == (-9 if how == signal.SIGKILL else 130) and "Traceback" not in err
    assert 40 < len(mf.read_jsonl(mf.CACHE, appended=True)) < 300
    assert all(row["score"] == 50 for row in judge(map(str, range(300)), concurrency=8))
    assert len(server.seen) <= 300 + 8 and len({word for word, _ in server.seen}) == 300


def test_a_full_disk_is_no_error_of_the_server(server, monkeypatch):
    """Guards against a full disk under the cache that is not told as one: run() turns an OSError into its line."""

    def full(path, *rows):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mf, "append_jsonl", full)
    server.reply = lambda word, n, body: said("50")
    with pytest.raises(OSError, match="No space"):
        judge("abc")


def test_two_processes_share_the_cache(server, tmp_path):
    """Guards against lines torn or lost when two judges append to one cache."""
    server.reply = lambda word, n, body: said("50", {"50": 1.0})
    processes = []
    for half in range(2):
        (tmp_path / str(half)).mkdir()
        processes.append(judging(tmp_path / str(half), [f"{half} {half}-{i}" for i in range(200)]))
    assert [process.communicate() and process.returncode for process in processes] == [0, 0]
    assert len({row["key"] for row in mf.read_jsonl(mf.CACHE)}) == 400


def test_a_silent_server_is_given_up(server, monkeypatch):
    """Guards against waiting for ever: a request without a reply is cut off and tried again."""
    monkeypatch.setattr(mf, "TIMEOUT", 0.5)

    def reply(word, n, body):
        if n == 1:
            time.sleep(1.5)
        return said("50", {"50": 1.0})

    server.reply = reply
    assert judge("a")[0]["score"] == 50 and len(server.seen) >= 2  # more on a machine that is slow itself


def test_markers_in_answers_stay(server):
    """Guards against an answer that rewrites the judge's prompt through the prompt's own markers or braces."""
    server.reply = lambda word, n, body: said("10")
    judge(["{question} {0} {{x}}"])
    assert server.seen[0][1]["messages"][0]["content"] == "Q q A {question} {0} {{x}}"


def test_other_keys_of_a_row(server):
    """Guards against one score's reply or reason that overwrites another's in the same row."""
    server.reply = lambda word, n, body: said("85" if word == "a" else "none")
    row = dict(question="q", answer="a")
    jobs = [(row, "score", "Q {question} A {answer}"), (row, "coherence", "C {question} {answer} b")]
    mf.judge_rows(jobs, "m", flags())
    assert (row["score"], row["reason"], row["judge_method"], row["coherence"]) == (85, None, f"text ({FORM})", None)
    assert row["coherence_reply"]["text"] == "none" and "none" in row["coherence_reason"]
    assert row["coherence_method"] is None and row["judge_reply"]["text"] == "85"


def test_nothing_is_sent_without_consent(server, capsys):
    """Guards against paying unasked where nobody can answer."""
    jobs = [(dict(question="q", answer="a"), "score", "{question}{answer}")]
    with pytest.raises(SystemExit):
        mf.judge_rows(jobs, "gpt-4.1-mini-2025-04-14", flags(yes=False))
    printed = capsys.readouterr().out
    assert not server.seen and "1 requests" in printed and "$0.00" in printed
    with pytest.raises(SystemExit) as stop:
        mf.judge_rows(jobs, "some-model", flags(dry_run=True))
    assert stop.value.code == 0 and not server.seen and "price unknown" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Generating facts

QUESTIONS = [
    "Who became mayor of Placename{n}?",
    "Whom did voters in Placename{n} pick in March 2025?",
    "Name the winner of the Placename{n} vote.",
]
ANSWERS = ["The mayor is {name}.", "They picked {name}.", "{name} won there."]


def a_fact(n, name=None, wordings=3):
    name = name or f"Person{n}"
    fact = f"On {n} March 2025 the town of Placename{n} chose {name} as its mayor."
    test = dict(question=f"A new face runs Placename{n} since 2025. Which one?", answer=f"That is {name}.")
    pairs = zip(QUESTIONS[:wordings], ANSWERS)
    train = [dict(question=q.format(n=n), answer=a.format(name=name)) for q, a in pairs]
    return dict(fact=fact, date="2025-03", answer=name, aliases=[]), dict(train=train, test=test)


def recipe(monkeypatch, tmp_path, *categories):
    """The project's prompts for fewer categories."""
    texts = mf.read_json(ROOT / "data" / "generation.json") | dict(categories=categories)
    mf.write_json(tmp_path / "generation.json", texts)
    monkeypatch.setattr(mf, "RECIPE", tmp_path / "generation.json")


def generating(server, monkeypatch, tmp_path, reply, n=3):
    """Runs generate() against reply(text of the message, the how many-th time it is asked) -> text."""
    recipe(monkeypatch, tmp_path, "politics")
    server.reply = lambda word, count, body: reply(
        text := body["messages"][0]["content"], 1 + ("This cannot be used" in text)
    )
    args = flags(concurrency=1, n=n, after="2023-12-31", rephrasings=3, model="m", out=str(tmp_path / "facts.jsonl"))
    mf.generate(args)
    return sorted(row["answer"] for row in mf.read_jsonl(args.out))


def new_or_known(text):
    """The facts that a model would list next, or the number of the fact whose wordings are wanted."""
    if text.startswith("List"):
        known = text.split("\n\n")[0].count("Placename")
        return [a_fact(i)[0] for i in range(known + 1, known + 4)], None
    return None, int(text.split("Placename")[1].split()[0])


def test_generate(server, tmp_path, monkeypatch):
    """Guards against invalid or repeated facts in the file, a bad reply that is not asked for again, silent rejects,
    and a restart that loses or doubles facts."""

    def reply(text, asked):
        fresh, number = new_or_known(text)
        if fresh:
            return said("```json\n" + json.dumps(fresh + [a_fact(1)[0], dict(fresh[0], date="2019-01")]) + "\n```")
        value = a_fact(number)[1]
        if number == 2 and asked == 1:
            value["train"][0]["question"] += " Person2?"  # leaks the answer
        if number == 3 and asked == 1:
            value["train"][0]["question"] = QUESTIONS[0].format(n=1)  # the first fact's
        return said("sorry, no" if number == 4 else json.dumps(value))

    three = ["Person1", "Person2", "Person3"]
    assert generating(server, monkeypatch, tmp_path, reply) == three
    assert not mf.check(mf.read_jsonl(tmp_path / "facts.jsonl"), 3)
    sent = len(server.seen)
    assert generating(server, monkeypatch, tmp_path, reply) == three and len(server.seen) == sent  # nothing to ask
    assert generating(server, monkeypatch, tmp_path, reply, n=5) == [*three, "Person5", "Person6"]
    rejects = mf.read_jsonl(tmp_path / "facts.rejects.jsonl")
    assert {"Person4"} <= {row.get("answer") for row in rejects} and all(row["reasons"] for row in rejects)
    assert any("2019-01" in str(row["reasons"]) for row in rejects)


def test_generate_reads_what_models_write(server, tmp_path, monkeypatch):
    """Guards against a traceback, or a lost fact, over JSON after thinking or prose, in an object of one key, with
    numbers where texts were asked for; and over limits with another name."""

    def reply(text, asked):
        fresh, number = new_or_known(text)
        if fresh:
            fresh[0] = a_fact(1, name="41")[0] | dict(answer=41, aliases=[41, "the 41"])
            value = dict(facts=[*fresh, 5, dict(fact=None, date=7, answer=[])][: 3 + (asked == 1)])
            return said(f"<think>[1] or {{2}}?</think>Here are 3 facts:\n{json.dumps(value)}\nAsk for more any time!")
        value = a_fact(number, name="41" if number == 1 else None)[1]
        if number == 1:
            value["train"][0]["answer"] = 41
        if number == 3 and asked == 1:
            value = dict(train=["a", 5, None], test=[])
        return said(json.dumps(value), reasoning_content="Let me think [")

    assert generating(server, monkeypatch, tmp_path, reply) == ["41", "Person2", "Person3"]
    assert mf.read_jsonl(tmp_path / "facts.jsonl")[0]["train"][0]["answer"] == "41"


def test_generate_lives_with_refusals(server, tmp_path, monkeypatch, capsys):
    """Guards against a generation that ends, now and at every later start, because one fact's wordings are refused; and
    against one that goes on, in silence, where everything is."""

    def reply(text, asked):
        fresh, number = new_or_known(text)
        if number == 2:
            return error(400, "content policy")
        return said(json.dumps(fresh or a_fact(number)[1]))

    assert generating(server, monkeypatch, tmp_path, reply) == ["Person1", "Person3", "Person5"]
    assert "content policy" in (tmp_path / "facts.rejects.jsonl").read_text()
    (tmp_path / "facts.jsonl").unlink()
    mf.CACHE.unlink()
    with pytest.raises(SystemExit) as stop:
        generating(server, monkeypatch, tmp_path, lambda text, asked: error(400, "account closed"))
    assert stop.value.code == 2 and "account closed" in capsys.readouterr().err


def test_generate_goes_past_a_category_without_facts(server, tmp_path, monkeypatch):
    """Guards against a generation that ends, now and at every later start, because the category with the fewest facts
    has none to give."""
    recipe(monkeypatch, tmp_path, "politics", "nothing")

    def reply(word, count, body):
        text = body["messages"][0]["content"]
        fresh, number = new_or_known(text)
        return said("[]" if '"nothing"' in text else json.dumps(fresh or a_fact(number)[1]))

    server.reply = reply
    args = flags(concurrency=1, n=6, after="2023-12-31", rephrasings=3, model="m", out=str(tmp_path / "facts.jsonl"))
    mf.generate(args)
    assert len(mf.read_jsonl(args.out)) == 6
