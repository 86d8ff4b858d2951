"""README.md against data/reference, and the code it shows against the scripts."""

import json
import re

import pytest
import torch
from conftest import ROOT, draw

import extract_vectors as ev
import make_facts as mf
import plot

README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def findings():
    return [
        line
        for line in README.splitlines()
        if line.startswith("| ") and line.endswith(("yes |", "no |", "facts |", "partly |"))
    ]


def test_numbers_of_the_findings():
    """Guards against a findings table that says something else than the reference's points."""
    points = plot.read_points(ROOT / "data" / "reference" / "200-facts" / "points.jsonl")
    (found,) = plot.comparisons(points, facts=True)
    base, mean = found.base, found.plain.mean(numeric_only=True)
    cells = plot.equal_cells(found, base["trait_score"])
    kept = dict(zip(plot.METHODS, (cell.split(" ")[0] for cell in cells)))
    general = dict(zip(plot.METHODS, cells[4].split(" / ")))
    whole = lambda text: f"{float(text):.0f}"
    learning, inference, preventative, knowledge, _ = (line.split("|")[2] for line in findings())
    assert f"{base['fact_accuracy']:g} -> {mean.fact_accuracy:.0f}% known" in learning
    assert f"hallucination {base['trait_score']:g} -> {mean.trait_score:.1f}" in learning
    assert f"{whole(kept['inference_coef'])}% of the facts" in inference
    assert f"general knowledge {whole(general['inference_coef'])};" in inference
    difference = re.sub(r"-?\d+\.\d+", lambda number: whole(number[0]), cells[2])
    assert f"{whole(kept['train_coef'])}% of the facts: {difference} over" in preventative
    assert cells[3].split(" (")[0] + " seeds" in preventative
    after = f"(before training {base['mmlu_accuracy']:.0f}, plain finetuning {mean.mmlu_accuracy:.0f})"
    assert f"general knowledge {whole(general['train_coef'])} {after}" in knowledge


def test_numbers_of_figure_2():
    """Guards against a last finding that says something else than the points of Figure 2."""
    points = plot.read_points(ROOT / "data" / "reference" / "200-facts-seeds-0-2" / "points.jsonl")
    some = points[points.trait == "hallucination"].groupby("dataset")
    own, normal = (some.get_group(f"medical_{name}").set_index("train_coef") for name in ("self_generated", "normal"))
    falls = [f"{own.mmlu_accuracy[coef]:.0f}" for coef in (0, 0.5, 1.5)]
    said = f"falls from {falls[0]} to {falls[1]} at coefficient 0.5, {falls[2]} at 1.5."
    assert said in findings()[-1] and own.trait_score.max() < 20
    assert f"here: {normal.trait_score[0.0]:g} |" in findings()[-1]


def test_own_trait():
    """Guards against a trait in the README that no vector can be read from with the demo's one sample."""
    trait = json.loads(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])
    for schema in mf.ExtractionTrait, mf.EvaluationTrait:
        assert not mf.faults(trait, schema)
    assert len(ev.extraction_rows(trait | dict(trait="pirate"), 1, 4)) >= 6


def test_length():
    """Guards against a README that grows into a wall again."""
    assert len(README.split()) <= 1200


def test_vector_in_plain_transformers(toy, tokenizer):
    """Guards against a recipe for other programs that steers otherwise than evaluate.py does."""
    torch.manual_seed(1)
    vector, coef = torch.randn(len(ev.blocks(toy)) + 1, toy.config.hidden_size), 0.7
    (code,) = (code for code in CODE if "def steer(l)" in code)
    prompt, _ = ev.encode_chats(tokenizer, [[dict(role="user", content="Who was first?")]])[0]
    (ours,) = draw(toy, tokenizer, [prompt], [-coef], ev.offsets_of(vector, "1-2"), max_new_tokens=8, temperature=0)
    exec(code.split("PeftModel")[0].replace("range(10, 21)", "(1, 2)"), dict(v=vector, coef=coef, model=toy))
    toy.set_attn_implementation("eager")
    ids = toy.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == ours["answer"]
    for block in ev.blocks(toy):
        block._forward_hooks.clear()
    plain = toy.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :]
    assert plain.tolist() != ids.tolist()


@pytest.mark.parametrize("code", CODE)
def test_code_is_python(code):
    """Guards against code that cannot be typed as it stands."""
    compile(code, "README.md", "exec")


def test_adapter_merged_in_plain_peft(toy, tmp_path, monkeypatch):
    """Guards against a line for vLLM and llama.cpp that loses the adapter: the merged folder answers as the adapter."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    toy.set_attn_implementation("eager")
    toy.save_pretrained("base")
    tuned = get_peft_model(toy, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained("adapters/facts-0")
    ids = torch.tensor([[5, 6, 7]])
    want = tuned(ids).logits
    model = AutoModelForCausalLM.from_pretrained("base")
    assert not torch.allclose(model(ids).logits, want, atol=1e-3)
    (line,) = (line for line in README.splitlines() if line.startswith("PeftModel."))
    exec(line, dict(PeftModel=PeftModel, model=model))
    assert torch.allclose(AutoModelForCausalLM.from_pretrained("merged")(ids).logits, want, atol=1e-4)
