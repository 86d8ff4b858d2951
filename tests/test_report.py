"""plot.py's report: loaded for real in headless Chromium, from file://."""

import html
import re
import shutil
import subprocess
import sys

import pytest

import make_facts as mf
import plot

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = [
    "</script><script>document.title = 'hacked'</script>",
    "<img src=x onerror=\"document.title='hacked'\">",
    "{{points}} & <b>bold</b>",
]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A report of three points, hostile answers among theirs, one of them judged twice and one without its answers."""
    points = []
    for n, (adapter, coef) in enumerate([(None, None), ("a/facts-0", 0.0), ("a/facts-0.5", 0.5)]):
        point = dict(
            key=f"k{n}",
            model="m",
            adapter=adapter,
            dataset=adapter and "facts",
            train_coef=coef,
            inference_coef=0.0,
            trait="hallucination",
            trait_score=50.0,
            trait_ci=[40, 60],
            trait_n=3,
            trait_unscored=0,
            judge="probe",
            answers=f"elsewhere/answers/k{n}.jsonl",
            train_layers="all",
            layers="all",
        )
        rows = [
            dict(
                id=f"hallucination-{q}-s0",
                kind="trait",
                trait="hallucination",
                question=f"Question {q}?",
                answer=f"{HOSTILE[q]} by point {n}",
                score=10.0 * q + n,
            )
            for q in range(3)
        ]
        if n < 2:
            mf.write_jsonl(tmp_path / "answers" / f"k{n}.jsonl", rows)
        if n == 1:
            mf.write_jsonl(
                tmp_path / "answers" / f"k{n}.gpt.jsonl",
                [
                    row | dict(score=None if i == 2 else 90.0 - row["score"], reason="REFUSAL")
                    for i, row in enumerate(rows)
                ],
            )
            points.append(point | dict(judge="gpt"))
        points.append(point)
    mf.write_jsonl(tmp_path / "points.jsonl", points)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "points.jsonl")])
    plot.main()
    return tmp_path / "report.html"


def shown(page, state=""):
    """What Chromium makes of the page -> (text of the answers section, its messages)."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={page.parent}/chromium",
            "--virtual-time-budget=2000",
            "--enable-logging=stderr",
            "--dump-dom",
            f"file://{page}#{state}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "<title>Preventative steering" in done.stdout, done.stderr[-1000:]
    return html.unescape(re.sub(r"<[^>]+>", " ", done.stdout.split('id="shown">')[1].split("<button")[0])), [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]


def test_page_shows_hostile_answers_as_text(page):
    """Guards against an answer that runs as a script or breaks the page, and against console errors; nothing comes from the network."""
    for q, text in enumerate(HOSTILE):
        found, console = shown(page, f"trait=hallucination&question={q + 1}")
        assert f"{text} by point 0" in found and f"{text} by point 1" in found and not console
    assert not re.search(r"(src|href)=\"(https?:)?//", page.read_text())


def test_picker_and_search_change_the_answers(page):
    """Guards against a browser that always shows the same answers, or hides a judge's reason."""
    one, two = shown(page, "question=1")[0], shown(page, "question=2")[0]
    assert "by point 0" in one and one != two and HOSTILE[1] not in one and HOSTILE[0] not in two
    found = shown(page, "search=bold+finetuning")[0]
    assert HOSTILE[2] in found and HOSTILE[1] not in found and "not scored: REFUSAL" in found


def test_missing_answers_are_said_and_judges_compared(page):
    """Guards against a page that silently lacks points or the table at equal hallucination, and a wrong rank correlation: 2 answers, scores 1 and 11 against 89 and 79."""
    text, summary = page.read_text(), (page.parent / "summary.md").read_text()
    assert (
        "The answers of 1 points are not there" in text
        and "<td>Preventative steering</td>" in text
        and text.count("<img alt=") == 3
    )
    assert "| hallucination | gpt, probe | 2 | -1.00 | -78.0 |" in summary
    assert (
        plot.spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
        and plot.spearman([1, 1, 2], [5, 5, 9]) == pytest.approx(1)
        and plot.spearman([1, 1], [1, 2]) is None
    )


def test_a_large_report_leaves_out_the_last_samples():
    """Guards against a page too large to open, or one that drops answers unsaid."""
    rows = [
        dict(id=f"evil-0-s{s}", kind="trait", trait="evil", question="Q", answer=f"answer {s} " + "x" * 500, score=1.0)
        for s in range(10)
    ]
    text, left_out = plot.browser_data([(dict(adapter=None, inference_coef=0), dict(probe=rows))], most=3000)
    assert len(text) <= 3000 and 0 < left_out < 10 and "answer 0" in text and "answer 9" not in text
