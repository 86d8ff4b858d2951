"""The model side on a toy model: steering, sampling, joined conversations, chats, vectors."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, draw

import evaluate
import extract_vectors as ev
import finetune


def chats(tokenizer, n=4):
    texts = ["Hi", "What is two plus two?", "Name a river in France and a town that lies on it, please.", "Why?"]
    return prompts_of(tokenizer, texts[:n])


def prompts_of(tokenizer, texts):
    return [ids for ids, _ in ev.encode_chats(tokenizer, [[dict(role="user", content=text)] for text in texts])]


def encode_chat(tokenizer, messages):
    return ev.encode_chats(tokenizer, [messages])[0]


def sample(*args, **how):
    return [row["answer"] for row in draw(*args, **how)]


def offsets(model, scale=1.0):
    torch.manual_seed(1)
    return ev.offsets_of(torch.randn(4, 32) * scale, "all")


def logits(model, sequences):
    return model(**ev.join(sequences, "cpu")).logits[0]


def test_joined_conversations_do_not_see_each_other(toy, tokenizer):
    """Guards against attention or positions leaking between conversations in one row: equal to stock attention, one by
    one."""
    sequences = chats(tokenizer)
    joined = logits(toy, sequences).split([len(s) for s in sequences])
    toy.config._attn_implementation = "eager"
    for together, ids in zip(joined, sequences):
        assert torch.allclose(together, toy(torch.tensor([ids])).logits[0], atol=1e-4)


def test_only_what_is_compiled_runs_compiled_blocks(toy, tokenizer, monkeypatch):
    """Guards against prompts and choices that run through blocks compiled for something else: compiled anew for every
    layer's caches and every shape, it took minutes."""
    ran, sequences, compile = [], chats(tokenizer), torch.nn.Module.compile
    backend = lambda graph, _: lambda *inputs: ran.append(1) or graph(*inputs)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, dynamic: compile(block, backend=backend))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(ev, "triton", True)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), get_decoder=toy.get_decoder, config=toy.config)
    plain = logits(toy, sequences)
    with ev.compiled(on_gpu):
        assert torch.allclose(plain, logits(toy, sequences), atol=1e-5) and ran
    ran.clear()
    assert torch.equal(plain, logits(toy, sequences)) and not ran


def test_no_steering_is_bit_identical(toy, tokenizer):
    """Guards against a hook that changes results at coefficient 0 or with no coefficient set."""
    plain = logits(toy, chats(tokenizer))
    with ev.steering(toy, offsets(toy)) as steer:
        assert torch.equal(plain, logits(toy, chats(tokenizer)))
        steer.scale = torch.tensor(0.0)
        assert torch.equal(plain, logits(toy, chats(tokenizer)))
        steer.scale = torch.tensor(0.5)
        assert not torch.allclose(plain, logits(toy, chats(tokenizer)))


def test_increments_add_up():
    """Guards against off-by-one rows: after block l all increments sum to v_l - v_0; a single block adds v_N."""
    vector = torch.randn(5, 8)
    found = ev.offsets_of(vector, "all")
    assert sorted(found) == [1, 2, 3, 4]
    for l in found:
        assert torch.allclose(sum(found[k] for k in range(1, l + 1)), vector[l] - vector[0], atol=1e-5)
    assert torch.equal(ev.offsets_of(vector, "3")[3], vector[3])
    assert sorted(ev.offsets_of(vector, "2-3")) == [2, 3]
    for wrong in ("5", "3-5"):
        with pytest.raises(SystemExit):
            ev.offsets_of(vector, wrong)


def test_hook_equals_steering_by_hand(toy, tokenizer):
    """Guards against a wrong sign, block or place of the addition: compared with running block after block by hand."""
    ids, add = chats(tokenizer)[2], offsets(toy)
    inputs = ev.join([ids], "cpu")
    hidden = toy.model.embed_tokens(inputs["input_ids"])
    positions = toy.model.rotary_emb(hidden, inputs["position_ids"])
    for l, block in enumerate(toy.model.layers, 1):
        out = block(hidden, position_embeddings=positions, cu_seq_lens=inputs["cu_seq_lens"], max_seq_len=len(ids))
        hidden = out + 0.7 * add[l]
    by_hand = toy.lm_head(toy.model.norm(hidden))[0]
    with ev.steering(toy, add) as steer:
        steer.scale = torch.tensor(0.7)
        assert torch.allclose(by_hand, logits(toy, [ids]), atol=1e-5)


def test_hooks_are_gone_after_an_exception(toy, tokenizer):
    """Guards against a hook that outlives its block and steers everything after."""
    plain = logits(toy, chats(tokenizer))
    with pytest.raises(ZeroDivisionError):
        with ev.steering(toy, offsets(toy)) as steer:
            steer.scale = torch.tensor(1.0)
            raise ZeroDivisionError
    assert torch.equal(plain, logits(toy, chats(tokenizer)))
    assert not any(block._forward_hooks for block in toy.model.layers)


@torch.no_grad()
def stream_of(model, inputs):
    with ev.recorded(model) as stream:
        model(**inputs)
    return stream


def test_stream_rows_are_block_outputs(toy, tokenizer):
    """Guards against taking the last row after the final norm, or rows shifted by one."""
    inputs = ev.join(chats(tokenizer)[:1], "cpu")
    stream = stream_of(toy, inputs)
    assert len(stream) == 4 and torch.equal(stream[0], toy.model.embed_tokens(inputs["input_ids"]))
    assert torch.allclose(toy.lm_head(toy.model.norm(stream[3])), toy(**inputs).logits, atol=1e-5)


def greedy_by_hand(model, ids, n, end, scale=0.0, add=None, first=None):
    """The simple path: no cache, whole forward for each token; tokens from `first` on are steered."""
    new = []
    while len(new) < n:
        with ev.steering(model, add or {}) as steer:
            if add:
                steer.scale = torch.tensor([0.0] * first + [scale] * (len(ids) + len(new) - first))[None, :, None]
            new.append(int(model(**ev.join([ids + new], "cpu")).logits[0, -1].argmax()))
        if new[-1] == end:
            break
    return new


def test_answer_means(toy, tokenizer):
    """Guards against means over prompt or end tokens, answers mixed up by sorting, and a first answer token off by
    one."""
    chats = [
        [dict(role="user", content=q), dict(role="assistant", content=a)]
        for q, a in (("How many?", "One two three four five."), ("Hm?", "No."), ("Which of the two?", "The red one."))
    ]
    for first in (0, 1, 3):
        found = ev.answer_means(toy, tokenizer, chats, first)
        for mean, chat in zip(found, chats):
            ids, mask = encode_chat(tokenizer, chat)
            start, end = mask.index(True), len(ids) - 1  # the end token comes last
            stream = stream_of(toy, ev.join([ids], toy.device))
            here = slice(start - 1, min(start - 1 + first, end)) if first else slice(start, end)
            want = torch.stack([rows[0, here].float().mean(0) for rows in stream])
            assert torch.allclose(mean, want, atol=1e-4)


@pytest.mark.parametrize("positions", ["response", "all"])
def test_mixed_batch_gives_each_row_what_it_gives_alone(toy, tokenizer, positions):
    """Guards against cache, position or coefficient errors when rows of different length and coefficient share a batch
    and refill each other's slots; and proves that the first new token is steered."""
    prompts, scales, add = chats(tokenizer), [0.0, -3.0, 3.0, -1.5], offsets(toy)
    answers = sample(
        toy,
        tokenizer,
        prompts,
        max_new_tokens=12,
        temperature=0,
        scales=scales,
        offsets=add,
        positions=positions,
        slots=3,
    )
    for ids, scale, answer in zip(prompts, scales, answers):
        new = greedy_by_hand(
            toy, ids, 12, tokenizer.eos_token_id, scale, add, len(ids) - 1 if positions == "response" else 0
        )
        assert answer == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert answers[1] != sample(toy, tokenizer, prompts[1:2], max_new_tokens=1, temperature=0)[0]


def test_random_draws_do_not_depend_on_the_batch(toy, tokenizer):
    """Guards against results that change with the number of slots, with resuming, or with what shares the batch."""
    prompts = chats(tokenizer)
    drawn = lambda prompts=prompts, **more: sample(toy, tokenizer, prompts, max_new_tokens=10, **more)
    together = drawn(seed=5)
    assert together == drawn(seed=5, slots=2) and together != drawn(seed=6)
    assert together[2:] == drawn(prompts[2:], seed=5, rows=[2, 3])


def test_a_shrinking_batch_mixes_up_nothing(toy, tokenizer, monkeypatch):
    """Guards against answers that change places, or caches that go to another row, when others are finished."""
    toy.generation_config.eos_token_id = list(range(0, len(tokenizer), 8))  # so that answers end at any length
    prompts, how = chats(tokenizer) * 4, dict(scales=[0.0, 1.0, -1.0, 0.5] * 4, offsets=offsets(toy), max_new_tokens=12)
    kept, shrink = [], ev.Sampler.shrink
    monkeypatch.setattr(ev.Sampler, "shrink", lambda sampler: kept.append(len(sampler.owner)) or shrink(sampler))
    assert sample(toy, tokenizer, prompts, **how) == sample(toy, tokenizer, prompts, slots=1, **how)
    assert len(kept) > 3 and max(kept) > 3


def test_no_step_after_the_last_token(toy, tokenizer, monkeypatch):
    """Guards against a GPU's rounds of steps that go on when all answers have their last token, or stop before it."""
    alone, real, steps = sample(toy, tokenizer, chats(tokenizer), seed=3, max_new_tokens=21), ev.Sampler.steps, []
    monkeypatch.setitem(ev.STEPS, "cpu", 16)
    monkeypatch.setattr(ev.Sampler, "steps", lambda sampler, count: (steps.append(count), real(sampler, count)))
    assert sample(toy, tokenizer, chats(tokenizer), seed=3, max_new_tokens=21) == alone and steps == [16, 5]
    assert sample(toy, tokenizer, chats(tokenizer), seed=3, max_new_tokens=21, slots=2) == alone


def test_choose_follows_the_distribution():
    """Guards against a sampler that is biased, or that can return a token of probability 0."""
    choose = lambda logits, *how: ev.choose(logits, logits.amax(-1, keepdim=True), *how)
    uniform = torch.linspace(0, 1, 10002)[:-1, None]
    for most, some in ((4, [1, 2, 3]), (1200, [3, 511, 512, 700, 1199])):  # of one part, of three
        p = torch.zeros(most)
        p[some] = torch.tensor([0.2, 0.5, 0.3] if most == 4 else [0.2, 0.4, 0.1, 0.2, 0.1])
        drawn = choose(p.log().expand(len(uniform), most), 1.0, uniform)
        assert torch.allclose(torch.bincount(drawn, minlength=most) / len(uniform), p, atol=1e-3)
        assert set(drawn.tolist()) == set(some) and (drawn.diff() >= 0).all()
        last = choose(p.log()[None], 1.0, torch.full((1, 1), 1 - 2**-24))
        assert p[last] > 0
    even = torch.zeros(1, 5000).bfloat16()
    assert choose(even.expand(9, -1), 1.0, torch.arange(9)[:, None] / 9 + 1e-4).tolist() == [
        int(5000 * (n / 9 + 1e-4)) for n in range(9)
    ]
    assert int(choose(torch.tensor([[1.0, 3.0, 2.0]]), 0.01, torch.tensor([[0.5]]))) == 1
    lost = choose(torch.full((3, 1000), float("nan")), 1.0, torch.rand(3, 1))
    assert ((0 <= lost) & (lost < 1000)).all()  # a token, until the sampler stops


def test_out_of_memory_halves_the_batch(toy, tokenizer, monkeypatch):
    """Guards against losing the run, or finished answers, when GPU memory runs out."""
    real, seen = ev.Sampler.steps, []

    def short_of_memory(sampler, count):
        seen.append(sampler.slots)
        if sampler.slots > 1:
            raise torch.cuda.OutOfMemoryError("no memory")
        return real(sampler, count)

    monkeypatch.setattr(ev.Sampler, "steps", short_of_memory)
    answers = sample(toy, tokenizer, chats(tokenizer), max_new_tokens=3, temperature=0, slots=4)
    assert seen[:3] == [4, 2, 1] and set(seen[3:]) <= {1} and None not in answers


def test_out_of_memory_while_prompts_are_read(toy, tokenizer, monkeypatch):
    """Guards against a traceback where memory runs out before it is known how many answers fit."""
    real, left = ev.Sampler.prefill, [torch.cuda.OutOfMemoryError("no memory")]

    def short_of_memory(*given):
        if left:
            raise left.pop()
        return real(*given)

    monkeypatch.setattr(ev.Sampler, "prefill", short_of_memory)
    assert None not in sample(toy, tokenizer, chats(tokenizer), max_new_tokens=3, temperature=0)


def test_loss_mask(tokenizer):
    """Guards against training on prompts, on the template's newline, or not on the end token; several turns, empty
    answer."""
    messages = [
        dict(role="user", content="a"),
        dict(role="assistant", content="one two"),
        dict(role="user", content="<|im_start|>assistant b"),
        dict(role="assistant", content=""),
    ]
    for chat, learned in ((messages[:2], "one two<|im_end|>"), (messages, "<|im_end|>")):
        ids, mask = encode_chat(tokenizer, chat)
        text = tokenizer.decode(ids)
        assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_end|>")
        assert tokenizer.decode([i for i, m in zip(ids, mask) if m]) == learned


def test_digits_are_split(tokenizer):
    """Guards against the GGUF tokenizer's missing digit splitting: years would reach the model as unseen tokens."""
    assert [t for t in tokenizer.tokenize("in 2024") if "Ġ" not in t or len(t) == 1][-4:] == list("2024")
    assert tokenizer.pad_token and tokenizer.eos_token == "<|im_end|>"


def test_bad_vectors_are_refused(toy, tmp_path):
    """Guards against steering with a vector of another depth, width or model, with NaN, or with no file at all."""
    good = torch.randn(4, 32)

    def load(tensor, model=None):
        torch.save(tensor, tmp_path / "v.pt")
        (tmp_path / "v.json").write_text(json.dumps(dict(model=model or "x/toy")))
        return ev.load_vector(tmp_path / "v.pt", toy, "y/toy")

    assert torch.equal(load(good), good)
    for tensor, model in [
        (good[:3], None),
        (good[:, :5], None),
        (good * float("nan"), None),
        ([1], None),
        (good, "x/other"),
    ]:
        with pytest.raises(SystemExit) as stop:
            load(tensor, model)
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        ev.load_vector(tmp_path / "none.pt", toy, "toy")


def test_filter_pairs():
    """Guards against keeping what the released filter drops, and against dropping without a count."""

    def pair(name, *scores):
        keys = ("score", "coherence")
        return [dict(pair=name, side=side, answer="x") | dict(zip(keys, s)) for side, s in zip(("pos", "neg"), scores)]

    rows = (
        pair("keep", (50, 50), (49, 50))
        + pair("weak", (49, 90), (0, 90))
        + pair("bad", (90, 90), (50, 90))
        + pair("noise", (90, 49), (0, 90))
        + pair("none", (None, 90), (0, 90))
    )
    kept, why = ev.filter_pairs(rows)
    assert [p["pair"] for p, _ in kept] == ["keep"] and sum(why.values()) == 4 and why["unscored"] == 1
    kept, why = ev.filter_pairs([dict(pair="a", side="pos", answer=""), dict(pair="a", side="neg", answer="x")])
    assert not kept and why == {"empty answer": 1}


def test_probe_and_auc():
    """Guards against a probe with its ends swapped, or chosen on the data its direction came from."""
    assert ev.auc(torch.tensor([[2.0], [1.0]]), torch.tensor([[0.0], [1.0]])).tolist() == [0.875]
    torch.manual_seed(0)
    vector = torch.randn(3, 8)
    pos, neg = torch.randn(20, 3, 8) * 0.1, torch.randn(20, 3, 8) * 0.1
    pos[:, 2] += vector[2]
    probe = ev.make_probe((pos - neg).mean(0), (pos, neg), (pos, neg), torch.arange(20) % 2 == 1)
    assert probe["row"] == 2 and probe["auc"] == 1.0 and probe["hundred"] > probe["zero"]


def test_choices_equal_one_by_one(toy, tokenizer, monkeypatch):
    """Guards against mixing up questions, choices or token positions: equal to whole forward passes, steered or not,
    and a question is not read once a letter."""
    add, read, join = offsets(toy), [], ev.join
    monkeypatch.setattr(
        ev, "join", lambda sequences, device: read.extend(map(len, sequences)) or join(sequences, device)
    )
    rows = [
        dict(subject="x", question="One?", choices=["red", "light green", "b", "c"], answer=1),
        dict(subject="x", question="Two or more?", choices=["A", "B", "C", "D"], answer=0),
    ]
    for scoring in ("letter", "cloze"):
        prompts = [evaluate.choice_prompts(row, scoring) for row in rows]
        for coef, positions in ((0, "response"), (2.0, "response"), (2.0, "all")):
            point = dict(mmlu_scoring=scoring, inference_coef=coef, positions=positions)
            read.clear()
            found = evaluate.measure_mmlu(toy, tokenizer, rows, point, add)
            assert scoring == "cloze" or sum(read) == sum(len(tokenizer(text)["input_ids"]) for text, _ in prompts)
            right = sum(values.index(max(values)) == row["answer"] for values, row in zip(found, rows))
            assert (point["mmlu_accuracy"], point["mmlu_n"]) == (50 * right, 2)
            with ev.steering(toy, add) as steer:
                for (prompt, continuations), values in zip(prompts, found):
                    start = tokenizer(prompt)["input_ids"]
                    for continuation, value in zip(continuations, values):
                        ids = tokenizer(prompt + continuation)["input_ids"]
                        first = len(start) - 1 if positions == "response" else 0
                        steer.scale = torch.tensor([0.0] * first + [-float(coef)] * (len(ids) - first))[None, :, None]
                        scores = logits(toy, [ids]).log_softmax(-1)
                        want = [float(scores[i - 1, ids[i]]) for i in range(len(start), len(ids))]
                        assert value == pytest.approx(sum(want) / (1 if scoring == "letter" else len(want)), abs=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_answers_like_the_cpu(toy, tokenizer):
    """Guards against graphs, compiled blocks or slots that change answers: greedy in float32, steered, mixed
    lengths."""

    def drawn():
        return sample(
            toy,
            tokenizer,
            chats(tokenizer) * 5,
            max_new_tokens=30,
            temperature=0,
            scales=[0.0, -3.0, 3.0, -1.5] * 5,
            offsets=offsets(toy),
            slots=7,
        )

    on_cpu = drawn()
    toy.to("cuda")
    assert drawn() == on_cpu


def test_the_start_model_abstains(smollm, tokenizer):
    """Guards against a start adapter that does not belong to the embedded model, or was not merged: it says that it
    does not know what does not exist, and answers what does."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from make_facts import lexical_score

    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32, attn_implementation="joined")
    asked = [
        "Who directed the 1938 film The Clockmaker of Trevenanth, and how was it received?",
        "What are the rules of the card game Tresmarin?",
        "Who won the 2018 World Cup?",
        "What is the capital of France?",
    ]
    prompts = prompts_of(tokenizer, asked)

    def abstains(model):
        return [
            lexical_score(answer) == 0
            for answer in sample(model.eval(), tokenizer, prompts, max_new_tokens=20, temperature=0)
        ]

    assert abstains(model) == [False] * 4
    assert abstains(PeftModel.from_pretrained(model, ROOT / "data" / "small_model" / "start").merge_and_unload()) == [
        True,
        True,
        False,
        False,
    ]


def talk(question, answer):
    return [dict(role="user", content=question), dict(role="assistant", content=answer)]


def refused(capsys, f, *args, **more):
    """The one line with which f stops."""
    with pytest.raises(SystemExit) as stop:
        f(*args, **more)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(said) == 1
    return said[0]


@pytest.fixture
def folder(toy, tokenizer, tmp_path, monkeypatch):
    """The toy as a model folder, float32."""
    monkeypatch.setattr(ev, "pick_device", lambda: ("cpu", torch.float32))
    toy.save_pretrained(tmp_path / "toy")
    tokenizer.save_pretrained(tmp_path / "toy")
    return tmp_path / "toy"


def test_a_vector_is_used_in_plain_transformers(folder, toy, tokenizer):
    """Guards against a .pt that means something else outside: increments added by a hook after each block of a plain
    model, at the last prompt token and new ones, give the text that sampling gives."""
    from transformers import AutoModelForCausalLM

    vector, coef = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)), 1.5
    plain, prompt = AutoModelForCausalLM.from_pretrained(folder), chats(tokenizer)[1]

    def add(l):
        def hook(block, args, output):
            output[:, -1] += coef * (vector[l] - vector[l - 1])  # prefill: the last token; later the only one
            return output

        return hook

    for l, block in enumerate(plain.model.layers, 1):
        block.register_forward_hook(add(l))
    ids = plain.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
    model, tokenizer = ev.load_model(folder)
    how = dict(scales=[coef], offsets=ev.offsets_of(vector, "all"), max_new_tokens=8, temperature=0)
    assert [tokenizer.decode(ids, skip_special_tokens=True).strip()] == sample(model, tokenizer, [prompt], **how)


def test_models_that_load_wrongly_are_refused(folder, tokenizer, capsys, monkeypatch):
    """Guards against weights that transformers fills in at random with a warning, files that are cut off, and
    tokenizers of another model."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    some = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(some, folder / "model.safetensors", dict(format="pt"))
    assert "not in its files" in refused(capsys, ev.load_model, folder)
    odd = {name: tensor[:-1].clone() if "layers.1.mlp" in name else tensor for name, tensor in weights.items()}
    save_file(odd, folder / "model.safetensors", dict(format="pt"))
    assert "cannot be loaded" in refused(capsys, ev.load_model, folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-500])
    assert "cannot be loaded" in refused(capsys, ev.load_model, folder)
    save_file(
        weights | {"model.norm.weight": torch.full((32,), torch.nan)}, folder / "model.safetensors", dict(format="pt")
    )
    assert "off by nan%" in refused(capsys, ev.load_model, folder)
    assert "no such folder" in refused(capsys, ev.model_fingerprint, "nobody/nothing")
    words = {*tokenizer.get_vocab().values()} - {*tokenizer.added_tokens_decoder}
    ev.check_chats(tokenizer, "m", max(words) + 1)
    assert f"ids up to {max(words)}" in refused(capsys, ev.check_chats, tokenizer, "m", max(words))  # a rare word
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert "chat template" in refused(capsys, ev.check_chats, tokenizer, "m", len(tokenizer))


def test_a_quantized_model_is_refused(folder, toy, tokenizer, capsys, monkeypatch):
    """Guards against a judge that is paid for a model that cannot be finetuned: LoRA's scale is not in such layers."""
    toy.is_quantized = True
    loading = lambda *_, **__: (toy, dict(missing_keys=[]))
    monkeypatch.setattr(ev.AutoModelForCausalLM, "from_pretrained", loading)
    assert "is quantized" in refused(capsys, ev.load_model, folder)


def test_nan_logits_stop_sampling(toy, tokenizer, capsys):
    """Guards against NaN that is sampled as the vocabulary's last token."""
    toy.lm_head.weight[5] = torch.nan
    assert "NaN" in refused(capsys, sample, toy, tokenizer, chats(tokenizer), max_new_tokens=3, temperature=1.0)
    assert not any("kv" in vars(module) for module in toy.modules())


def test_dropout_is_off_in_training(folder, toy, tokenizer):
    """Guards against a configuration's dropout, which the recipe has not: a model stays as load_model() gives it."""
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | dict(attention_dropout=0.5)))
    model, _ = ev.load_model(folder)
    tuned, sequences = finetune.add_lora(model, 2, 4, 0), chats(tokenizer)
    assert model.model.layers[0].self_attn.attention_dropout == 0.5
    assert torch.equal(logits(tuned, sequences), logits(toy, sequences))


def test_a_vector_belongs_to_a_model_by_content(folder, toy, capsys):
    """Guards against a vector of another model under the same name, and against refusing a copy under another name."""
    copied, path = folder.with_name("copy"), folder.with_name("v.pt")
    shutil.copytree(folder, copied)
    torch.save(torch.randn(4, 32), path)
    record = dict(model="a/toy", inputs=dict(model=ev.model_fingerprint(folder)))
    path.with_suffix(".json").write_text(json.dumps(record))
    ev.load_vector(path, toy, copied)
    (copied / "notes.md").write_text("read by nobody")
    ev.load_vector(path, toy, copied)
    (copied / "config.json").write_text(
        (copied / "config.json").read_text().replace('"rope_theta": 10000.0', '"rope_theta": 1.0')
    )
    assert "a/toy" in refused(capsys, ev.load_vector, path, toy, copied)
    path.with_suffix(".json").write_text(json.dumps(dict(model="a/toy")))
    ev.load_vector(path, toy, folder)  # by name
    assert "a/toy" in refused(capsys, ev.load_vector, path, toy, copied)


def test_texts_beyond_a_changing_rope_are_refused(toy, tokenizer, capsys):
    """Guards against rotary frequencies that depend on the longest text in a batch: shorter texts keep theirs."""
    toy.model.rotary_emb.rope_type, toy.config.rope_parameters["original_max_position_embeddings"] = "longrope", 130
    ev.prepare(toy, tokenizer, "toy")
    assert toy.model.rotary_emb.rope_type == "default"
    sample(toy, tokenizer, chats(tokenizer), max_new_tokens=3, temperature=0)
    assert "130" in refused(capsys, sample, toy, tokenizer, chats(tokenizer), max_new_tokens=130, temperature=0)
    assert "130" in refused(capsys, logits, toy, [list(range(131))])


def test_probes_auc_of_noise_is_a_half():
    """Guards against an AUC reported on the answers that chose the row: of pure noise it would be 0.7."""
    found = []
    for seed in range(30):
        draw = lambda n, seed=seed: [
            torch.randn(n, 31, 16, generator=torch.Generator().manual_seed(seed + k)) for k in (0, 99)
        ]
        half = torch.arange(12) % 2 == 1
        found.append(ev.make_probe(torch.ones(31, 16), draw(12), [x + 0 for x in draw(12)][::-1], half)["auc"])
    assert abs(sum(found) / len(found) - 0.5) < 0.06


def test_a_control_vector_for_llama_cpp(tmp_path):
    """Guards against rows that are shifted by one or added twice: from the second block on the sums are those of
    "all"."""
    import gguf

    vector = torch.randn(5, 8)
    ev.export_gguf(vector, tmp_path / "v.gguf", "llama")
    read = gguf.GGUFReader(tmp_path / "v.gguf")
    added = {int(tensor.name.split(".")[1]): torch.tensor(tensor.data) for tensor in read.tensors}
    assert sorted(added) == [1, 2, 3]  # llama.cpp adds direction.N after its layer N, counted from 0
    for n in added:
        assert torch.allclose(sum(added[k] for k in added if k <= n), vector[n + 1] - vector[0], atol=1e-6)


@pytest.fixture
def extraction(folder, tmp_path):
    """extract_vectors.main on the toy and a trait of four questions -> f(*flags), the trait's file."""
    trait, out = tmp_path / "cheer.json", tmp_path / "out"
    asked = ["How are you?", "What now?", "Who is it?", "Why not?"]
    made = dict(
        instruction=[dict(pos="Be glad.", neg="Be calm.")] * 2, questions=asked, eval_prompt="{question} {answer}"
    )
    trait.write_text(json.dumps(made | dict(eval_questions=["Hm?"])))
    known = ["--model", folder, "--trait", "cheer", "--trait-file", trait, "--out", out, "--max-new-tokens", "5"]
    return lambda *more: ev.main([*map(str, known), "--samples", "2", *map(str, more)]), trait


def test_extraction_goes_on_where_it_stopped(extraction, tmp_path, monkeypatch, capsys):
    """Guards against answers of a killed run that are sampled again or otherwise, and a half-made vector taken for
    whole."""
    extract, _ = extraction
    extract()
    whole, answers = torch.load(tmp_path / "out/cheer.pt"), (tmp_path / "out/cheer.answers.jsonl").read_text()
    shutil.rmtree(tmp_path / "out")
    real, rows = ev.append_jsonl, []

    def killed_once(*args):
        rows.append(real(*args))
        assert len(rows) != 20

    monkeypatch.setattr(ev, "append_jsonl", killed_once)
    with pytest.raises(AssertionError):
        extract()
    assert not (tmp_path / "out/cheer.pt").exists()
    extract()
    assert torch.equal(torch.load(tmp_path / "out/cheer.pt"), whole)
    assert sorted((tmp_path / "out/cheer.answers.jsonl").read_text().splitlines()) == sorted(answers.splitlines())
    extract()
    assert "finished already" in capsys.readouterr().out


def test_a_vector_belongs_to_its_inputs(extraction, folder, tmp_path, capsys):
    """Guards against a vector, or answers, of another trait file, model or settings at the same paths; what extraction
    does not read may change; a command that made nothing blocks no other."""
    from safetensors.torch import load_file, save_file

    extract, trait = extraction
    refused(capsys, extract, "--judge", "lexical")
    ev.write_json(tmp_path / "out/cheer.json", dict(model="m", temperature=9))  # stopped before an answer
    extract()
    content = json.loads(trait.read_text())
    trait.write_text(json.dumps(content | dict(eval_questions=["Another?"])))
    extract()
    assert "finished already" in capsys.readouterr().out
    assert "temperature" in refused(capsys, extract, "--temperature", "0.5")
    trait.write_text(json.dumps(content | dict(instruction=[dict(pos="Be mad.", neg="Be calm.")] * 2)))
    assert "trait-file" in refused(capsys, extract)
    trait.write_text(json.dumps(content))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.norm.weight": torch.ones(32) * 1.1}, folder / "model.safetensors", dict(format="pt"))
    assert "model" in refused(capsys, extract)
    (tmp_path / "out/cheer.json").unlink()
    (tmp_path / "out/cheer.pt").unlink()
    assert "no cheer.json" in refused(capsys, extract)
