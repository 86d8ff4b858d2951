"""The chat client and the judge, against a server on loopback that speaks the real protocol; the real openai client talks to it."""
import json
import math
import random
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

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
                seen[text, body["max_tokens"]] += 1
                n = seen[text, body["max_tokens"]]
            status, reply, headers = handler.reply(text, n, body)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_response(status)
            for name, value in ({"content-type": "application/json", "content-length": str(len(data))} | headers).items():
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
    logprobs = top and dict(content=[dict(token=text, logprob=0.0, bytes=None, top_logprobs=[dict(token=t, logprob=math.log(p), bytes=None) for t, p in top.items()])])
    return 200, dict(id="x", object="chat.completion", created=0, model="m",
                     choices=[dict(index=0, finish_reason="stop", logprobs=logprobs, message=dict(role="assistant", content=text))]), {}


def error(status, code=None, **headers):
    return status, dict(error=dict(message="no", type="x", code=code, param=None)), headers


def judge(answers, prompt="Q {question} A {answer}", **more):
    rows = [dict(question="q", answer=answer) | more for answer in answers]
    mf.judge_rows(rows, prompt, "score", "m", yes=True)
    return rows


def test_weighted_mean(server):
    """Guards against reading one token where the score is a weighted mean; other tokens do not count; 0.25 of mass is enough."""
    tops = {"a": {"80": 0.5, "90": 0.3, "x": 0.2}, "b": {"100": 0.25, "I": 0.75}, "c": {"100": 0.24, "I": 0.76}, "d": {"REF": 1.0}, "e": {"0": 1.0}, "f": {"100": 0.9, "101": 0.1}}
    server.reply = lambda text, n, body: said("?", tops[text[-1]])
    scores = [row["score"] for row in judge("abcdef")]
    assert scores[0] == pytest.approx((80 * 0.5 + 90 * 0.3) / 0.8) and scores[1] == pytest.approx(100)
    assert scores[2:4] == [None, None] and scores[4:] == [0.0, pytest.approx(100)]


def test_without_logprobs_the_text_is_read(server):
    """Guards against a None for every answer, or a wrong number, on servers without log-probabilities."""
    texts = {"a": "87", "b": "Score: 100.", "c": "0", "d": "REFUSAL", "e": "I cannot say", "f": "between 20 and 30", "g": "250", "h": "85/100"}
    server.reply = lambda text, n, body: said(texts[text[-1]])
    rows = judge("abcdefgh")
    assert [row["score"] for row in rows] == [87, 100, 0, None, None, None, None, 85]
    assert rows[3]["reason"] == "REFUSAL" and all(row["reason"] for row in rows[4:7]) and {row["judge_method"] for row in rows} == {"text"}


def test_split_digits_are_noticed(server):
    """Guards against scoring 87 as 8 where the server's tokens are single digits."""
    server.reply = lambda text, n, body: said("8", {"8": 0.9, "9": 0.1}) if body["max_tokens"] == 1 else said("87", {"8": 1.0})
    assert judge("a")[0]["score"] == 87


def test_yes_no(server):
    """Guards against a fact judged by the wrong word; hedged replies stay unscored."""
    texts = {"a": {"YES": 0.9, "NO": 0.1}, "b": {"No": 0.6, "yes": 0.4}, "c": {"Maybe": 1.0}}
    server.reply = lambda text, n, body: said("?", texts[text[-1]])
    assert [row["score"] for row in judge("abc", "{question} {truth} {answer}", truth="t")] == [100, 0, None]


@pytest.mark.parametrize("fault", [
    error(429), error(429, **{"retry-after": "0.01"}), error(500), (200, b'{"id": "x", "choi', {}), (200, b'{"id"', {"content-length": "999"}),
    (200, dict(id="x", object="chat.completion", created=0, model="m", choices=[]), {})],
    ids=["429", "429 with Retry-After", "500", "truncated JSON", "cut in mid-body", "empty choices"])
def test_passing_faults_are_retried(server, fault):
    """Guards against an answer lost, or scored twice, through a fault that passes."""
    server.reply = lambda text, n, body: fault if n < 3 else said("50", {"50": 1.0})
    assert judge("a")[0]["score"] == 50 and sum(server.seen.values()) == 3


@pytest.mark.parametrize("status, code", [(401, None), (404, "model_not_found"), (429, "insufficient_quota")])
def test_fatal_errors_stop_at_once_and_lose_nothing(server, status, code, capsys, monkeypatch):
    """Guards against retrying what cannot pass, losing paid answers, and the key in a message or file."""
    monkeypatch.setattr(mf, "CONCURRENCY", 1)
    server.reply = lambda text, n, body: error(status, code) if text.endswith("5") else said("50", {"50": 1.0})
    with pytest.raises(SystemExit) as stop:
        judge("0123456789")
    captured = capsys.readouterr()
    assert stop.value.code == 2 and sum(server.seen.values()) == 6
    assert "sk-secret" not in captured.err + captured.out + mf.CACHE.read_text() and "Traceback" not in captured.err
    server.reply = lambda text, n, body: said("50", {"50": 1.0})
    assert all(row["score"] == 50 for row in judge("0123456789"))
    assert sum(server.seen.values()) == 6 + 5  # the five that were answered are not paid again


def test_many_requests_with_faults(server):
    """Guards against answers lost, doubled or swapped under load: 1,000 requests, one in five fails; the second run sends none."""
    rng = random.Random(0)
    def reply(text, n, body):
        score = text.split()[-1]
        return error(rng.choice([429, 500, 503])) if rng.random() < 0.2 else said(score, {score: 1.0})
    server.reply = reply
    answers = [f"{i} {i % 101}" for i in range(1000)]
    assert [row["score"] for row in judge(answers)] == [i % 101 for i in range(1000)]
    assert len(mf.read_jsonl(mf.CACHE)) == 1000
    with open(mf.CACHE, "a") as out:
        out.write('{"key": "cut o')  # a killed process's last line
    sent = sum(server.seen.values())
    assert [row["score"] for row in judge(answers)] == [i % 101 for i in range(1000)] and sum(server.seen.values()) == sent


def test_markers_in_answers_stay(server):
    """Guards against an answer that rewrites the judge's prompt through the prompt's own markers or braces."""
    server.reply = lambda text, n, body: said("1", {"10": 1.0})
    judge(["{question} {0} {{x}}"])
    assert ("Q q A {question} {0} {{x}}", 1) in server.seen


def test_nothing_is_sent_without_consent(server, capsys):
    """Guards against paying unasked where nobody can answer."""
    with pytest.raises(SystemExit):
        mf.judge_rows([dict(question="q", answer="a")], "{question}{answer}", "score", "gpt-4.1-mini-2025-04-14")
    assert not server.seen and "1 requests" in capsys.readouterr().out
