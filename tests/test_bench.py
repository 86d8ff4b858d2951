"""The bench at tiny size on the CPU, where its numbers mean nothing."""

import json
import subprocess
import sys

from conftest import ROOT


def bench(only, change="pass"):
    code = f"import sys; sys.path.insert(0, 'tests'); sys.argv[1:] = ['--shape', 'tiny', '--device', 'cpu', '--only', {only!r}]; import bench; {change}; bench.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, {row["name"]: row for row in json.loads(done.stdout.splitlines()[-1])["table"]}, done.stdout


def test_bench_trains(smollm):
    """Guards against a bench that no longer fits the scripts' training, or cannot go on to a sweep's next point."""
    code, rows, _ = bench("16 facts, steered")
    assert code == 0 and set(rows) == {
        "training: 16 facts, steered",
        "training: 16 facts, steered: next point, same process",
    }


def test_failing_row(smollm):
    """Guards against a bench that one failing row ends, or that hides it."""
    code, rows, out = bench("reading", "bench.answer_means = None")
    assert (
        code == 1
        and rows["reading: MMLU, 2 prompts"]["tokens_s"] > 0
        and "TypeError" in rows["reading: 2 answers of 200 tokens"]["error"]
    )
    assert "| reading: 2 answers of 200 tokens | **failed** |" in out
