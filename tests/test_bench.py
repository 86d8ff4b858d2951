"""The bench at tiny size on the CPU, where its numbers mean nothing, and the tables in tests/README.md."""

import argparse
import json
import os
from types import SimpleNamespace
from unittest.mock import patch

import bench
import pytest
from conftest import ROOT

import make_facts as mf


@pytest.fixture
def run(smollm, tmp_path, monkeypatch):
    """Runs the bench at tiny size -> (exit code, {name: row of the record})."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    record = tmp_path / "bench.jsonl"

    def run(only, *flags):
        tiny = ["--shape", "tiny", "--device", "cpu", "--tokenizer", str(smollm), "--folder", str(tmp_path)]
        code = bench.main([*tiny, "--record", str(record), "--only", only, *flags])
        return code, {row["name"]: row for row in map(json.loads, record.read_text().splitlines())}

    return run


def test_speed(run, tmp_path, capsys):
    """Guards against a bench that no longer fits the scripts' commands, that one failing row ends, or that hides it."""
    with patch.object(bench, "stock_reading", None):
        wanted = "^finetune.py$|^evaluate.py|plain loop|loading|stock: facts, 1 x 16 padded$|^stock: reading, 32"
        code, rows = run(wanted)
    assert code == 1 and "TypeError" in rows["stock: reading, 32 at a time"]["error"]
    step, made = rows["training: facts, steered"], rows["sampling: coefficients"]["tokens"]
    assert rows["finetune.py"]["steps"] == 2 and rows["finetune.py"]["adapters"] == 2 and step["seconds"] > 0
    assert 0.9 * 9 * 20 * 5 <= made <= 9 * 20 * 5 and rows["sampling: facts"]["tokens"] == 4
    assert rows["reading: MMLU"]["tokens"] > 100
    found = capsys.readouterr().out
    table = [line.split(" | ") for line in found.splitlines() if line.startswith("| ")]
    assert len(table) == 11  # the head and ten rows
    times = rows["stock: facts, 1 x 16 padded"]["seconds"] / step["seconds"]
    assert table[1][2].endswith(f"**{times:.1f} x** (1 x 16 padded)") and table[1][3] == "not measured"  # 8 x 2
    assert "Failed: stock: reading, 32 at a time: TypeError" in found
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- speed: written by bench.py -->\nold\n<!-- end of speed -->\nb\n", encoding="utf-8")
    bench.main(["--record", str(tmp_path / "bench.jsonl"), "--write", str(readme)])
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("a\n") and text.endswith("-->\nb\n") and "old" not in text and "| MMLU, 2" in text


def test_memory(run, smollm, tmp_path):
    """Guards against commands of the memory table that the scripts no longer take, and a table without their peaks."""
    code, rows = run("respond-to", "--memory", "22.5")
    assert code == 0 and rows["evaluate.py --respond-to"]["cap"] == 22.5
    with patch.object(bench.Bench, "record"):
        args = bench.flags().parse_args(["--shape", "tiny", "--tokenizer", str(smollm), "--memory", "22.5"])
        commands = bench.memory_commands(bench.Bench(args, tmp_path, "memory 22.5"))

    def parsed(parser, argv):
        raise EOFError(argparse.ArgumentParser.parse_args(parser, argv))

    with patch.object(mf.Parser, "parse_args", parsed):
        for script, flags in commands.values():
            pytest.raises(EOFError, script.main, list(map(str, flags)))
    about = dict(gpu="X", shape="tiny", run="now")
    runs = {22.5: dict(about=about, a=dict(cap=22.5, gib=20.04)), 38.0: dict(about=about, a=dict(error="Out"))}
    assert "| a | 20.0 | Out |" in bench.memory_table(runs)


def test_answers_that_end_early_are_no_measurement(tmp_path):
    """Guards against a rate of sampling that is the start's, as the adapter had learnt short answers."""
    (tmp_path / "answers").mkdir()
    rows = [dict(kind="trait", tokens=30), dict(kind="trait", tokens=2), dict(kind="fact", tokens=5)]
    (tmp_path / "answers" / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert bench.answers_written(SimpleNamespace(folder=tmp_path), "trait", 32) == 32
    with pytest.raises(RuntimeError, match="32 tokens of trait answers"):
        bench.answers_written(SimpleNamespace(folder=tmp_path), "trait", 54)


def test_readme_has_the_record(tmp_path):
    """Guards against tables in tests/README.md that are not those of tests/bench.jsonl."""
    readme, copy = ROOT / "tests" / "README.md", tmp_path / "README.md"
    copy.write_text(readme.read_text(encoding="utf-8"), encoding="utf-8")
    bench.main(["--record", str(ROOT / "tests" / "bench.jsonl"), "--write", str(copy)])
    assert copy.read_text(encoding="utf-8") == readme.read_text(encoding="utf-8")


def test_readme_names_every_family():
    """Guards against a table of families that says other than what tests/test_families.py tries."""
    families = pytest.importorskip("test_families")
    lines = (ROOT / "tests" / "README.md").read_text(encoding="utf-8").splitlines()
    for names, start in ((families.WORK, "| exact"), (families.REFUSED, "| refused")):
        told = "; ".join(line.split(" | ")[1].strip(" |") for line in lines if line.startswith(start))
        assert sorted(told.split("; ")) == sorted(names), start
