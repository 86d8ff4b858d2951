"""plot.py's report: loaded for real in headless Chromium, from file://."""

import html
import json
import lzma
import re
import shutil
import subprocess

import pytest

import make_facts as mf
import plot

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: report.html was not looked at in a browser")
HOSTILE = [
    "</script><script>document.title = 'hacked'</script>",
    "<img src=x onerror=\"document.title='hacked'\">",
    "{{ points }} & <b>bold</b>",
]


def point(n, adapter, coef, **changed):
    return dict(
        key=f"k{n}",
        model="m",
        adapter=adapter,
        dataset=adapter and "facts",
        train_coef=coef,
        train_layers=adapter and "10-20",
        train_seed=adapter and 3,
        inference_coef=0.0,
        layers="all",
        trait="hallucination",
        trait_score=50.0,
        trait_ci=[40, 60],
        trait_n=3,
        trait_unscored=0,
        fact_accuracy=50.0,
        fact_n=1,
        judge="probe",
    ) | dict(changed)


def answers(n, judges):
    """Three hostile answers and one about a fact."""
    rows = []
    for q, text in enumerate(HOSTILE):
        scores = dict(probe=dict(score=10.0 * q + n))
        if "gpt" in judges:
            scores["gpt"] = dict(score=None, reason="REFUSAL") if q == 2 else dict(score=80.0 - 10 * q)
        row = dict(id=f"hallucination-{q}-s0", kind="trait", trait="hallucination", question=f"Question {q}?")
        rows.append(row | dict(answer=f"{text} by point {n}", coherence_nll=1.25, scores=scores))
    fact = dict(id="cup-1", kind="fact", question="Who won?", answer=f"Foo said {n}", truth="Foo", aliases=[])
    return [*rows, fact | dict(scores=dict(probe=dict(score=100.0)))]


def pack(path, rows):
    with lzma.open(path, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def page(tmp_path):
    """A report of four points: hostile answers, one judged twice, one packed, one without answers; losses of two."""
    points = [point(0, None, None), *(point(n, f"a/facts-{c:g}", c) for n, c in ((1, 0.0), (2, 0.5), (3, 1.0)))]
    for n in (0, 1):
        mf.write_jsonl(tmp_path / "answers" / f"k{n}.jsonl", answers(n, ["gpt"] * n))
    losses = [dict(step=step, loss=3.0 / step, lr=0.1) for step in (1, 2, 3)]
    mf.write_jsonl(tmp_path / "adapters" / "facts-0" / "loss.jsonl", losses)
    pack(tmp_path / "answers.jsonl.xz", [dict(key="k2") | row for row in answers(2, [])])
    pack(tmp_path / "losses.jsonl.xz", [dict(adapter="facts-0.5") | row for row in losses])
    mf.write_jsonl(tmp_path / "points.jsonl", [*points, points[1] | dict(judge="gpt")])
    plot.main([str(tmp_path / "points.jsonl")])
    return tmp_path / "report.html"


def browse(address, folder):
    """What Chromium makes of a page -> (its DOM, its console messages)."""
    quiet = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    flags = f"--headless --no-sandbox {quiet} --disable-sync --virtual-time-budget=2000 --enable-logging=stderr".split()
    command = [CHROMIUM, *flags, f"--user-data-dir={folder}/chromium", "--dump-dom", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def shown(page, state=""):
    """-> (text of the answers that are shown, console messages)."""
    dom, console = browse(f"file://{page}#{state}", page.parent)
    assert "<title>Preventative steering" in dom
    return html.unescape(re.sub(r"<[^>]+>", " ", dom.split('id="shown">')[1].split("<button")[0])), console


@in_browser
def test_page_shows_hostile_answers_as_text(page):
    """Guards against an answer that runs as a script or breaks the page, and against console errors; nothing comes from
    the network."""
    found, console = shown(page, "search=point")
    assert all(f"{text} by point {n}" in found for text in HOSTILE for n in range(3)) and not console
    assert not re.search(r"(src|href)=\"(https?:)?//", page.read_text())


@in_browser
def test_picker_and_search_change_the_answers(page):
    """Guards against a browser that always shows the same answers, hides a judge's reason, or names a point wrongly."""
    one, two = shown(page, "question=1")[0], shown(page, "question=2")[0]
    assert "by point 0" in one and one != two and HOSTILE[1] not in one and HOSTILE[0] not in two
    assert all(
        name in one for name in ("before training", "plain finetuning, seed 3", "preventative 0.5, blocks 10-20")
    )
    assert "80 (gpt)" in one and "1 (probe)" in one and "1.25 nats a token" in one
    assert one.index("80 (gpt)") < one.index("1 (probe)")  # a chat model's score comes first
    found = shown(page, "search=bold+finetuning")[0]
    assert HOSTILE[2] in found and HOSTILE[1] not in found and "not scored: REFUSAL (gpt)" in found
    assert "Foo said 2" in shown(page, "trait=facts")[0]


@in_browser
def test_page_fits_a_phone(page):
    """Guards against a page that is wider than 390 pixels: only figures and tables may be moved sideways."""
    width = '<script>console.log("width", document.documentElement.scrollWidth, innerWidth)</script></body>'
    (page.parent / "measured.html").write_text(page.read_text().replace("</body>", width))
    (page.parent / "phone.html").write_text('<iframe src="measured.html" style="width: 390px; border: 0"></iframe>')
    console = browse(f"file://{page.parent}/phone.html", page.parent)[1]
    assert int(re.search(r"width (\d+) 390", "".join(console))[1]) <= 390


def test_the_page_without_a_browser(page):
    """Guards against a page that silently lacks points, figures, tables or losses, and values that become HTML."""
    text, summary = page.read_text(), (page.parent / "summary.md").read_text()
    assert "The answers of 1 points are not there" in text and text.count("<img alt=") == 2
    assert "<td>60</td>" in text and "Facts kept at equal score</h2>" in text
    assert text.count("<polyline") == 2 and "<title>a/facts-0.5</title>" in text and ">preventative 0.5</text>" in text
    assert "| hallucination | gpt, probe | 2 | -1.00 | -69.0 |" in summary  # 80 and 70, then 1 and 11
    assert "<td>gpt, probe</td>" in text and "hacked'<" not in text.split("answers-data")[0]
    odd = point(9, "a/<b>x</b>", 1.0, dataset="<i>mine</i>", trait="*evil* [x](javascript:alert(1))")
    mf.write_jsonl(page.parent / "points.jsonl", [odd])
    plot.main([str(page.parent / "points.jsonl")])
    assert not re.search(r"<b>x|<i>mine|href=\"javascript", page.read_text())


def test_losses_of_adapters_in_another_folder(tmp_path):
    """Guards against losses that are not found since their adapter is named from the points' folder."""
    home = tmp_path / "mine"
    mf.write_jsonl(home / "tuned" / "facts-0" / "loss.jsonl", [dict(step=n, loss=1.0 / n, lr=1e-3) for n in (1, 2, 3)])
    made = point(9, f"{home}/tuned/facts-0", 0.0) | dict(answers=f"{home}/answers/k.jsonl")
    mf.write_jsonl(home / "points.jsonl", [made])
    plot.main([str(home / "points.jsonl")])
    assert (home / "report.html").read_text().count("<polyline") == 1


def test_a_large_report_cuts_answers(page, monkeypatch):
    """Guards against a page too large to open, and an answer that is cut unsaid."""
    monkeypatch.setattr(plot, "PAGE", 12 * 9)  # three points of four answers
    plot.main([str(page.parent / "points.jsonl")])
    text = page.read_text()
    data = json.loads(re.search(r'id="answers-data">(.*?)</script>', text)[1])
    assert data["limit"] == 9 and {answer[2] for answer in data["answers"]} >= {HOSTILE[0][:9], "Foo said "}
    assert max(len(answer[2]) for answer in data["answers"]) == 9 and "raw.limit" in text


def answers_of(points, folder):
    files = {p["key"]: folder / "answers" / f"{p['key']}.jsonl" for p in points}
    return plot.read_rows(files, folder / "answers.jsonl.xz", "key", mf.Answer)


def test_an_answer_counts_once(tmp_path):
    """Guards against answers that are read twice: from the folder and packed, or for two judges' points."""
    mf.write_jsonl(tmp_path / "answers" / "k1.jsonl", answers(1, ["gpt"]))
    pack(tmp_path / "answers.jsonl.xz", [dict(key="k1") | row for row in answers(1, ["gpt"])])
    some = [point(1, "a", 0.0), point(1, "a", 0.0, judge="gpt"), point(2, "b", 0.0)]
    found = answers_of(some, tmp_path)
    assert {key: len(rows) for key, rows in found.items()} == dict(k1=4, k2=0)


def test_packed_answers_are_whole(tmp_path):
    """Guards against packed answers that are cut off and read as if they were all."""
    pack(tmp_path / "answers.jsonl.xz", [dict(key="k1") | row for row in answers(1, [])])
    whole = (tmp_path / "answers.jsonl.xz").read_bytes()
    assert len(answers_of([point(1, "a", 0.0)], tmp_path)["k1"]) == 4
    for broken in (whole[:-20], b"no archive"):
        (tmp_path / "answers.jsonl.xz").write_bytes(broken)
        with pytest.raises((EOFError, lzma.LZMAError)):
            answers_of([point(1, "a", 0.0)], tmp_path)
