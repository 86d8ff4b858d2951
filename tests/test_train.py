"""Finetuning: the loss, its rows and memory, the recipe, processes, going on, and what is refused. All in float32 on
the CPU."""

import contextlib
import copy
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import extract_vectors as ev
import finetune
import make_facts as mf

# ---------------------------------------------------------------------------------------------------------------------
# The loss, its rows and memory, on a toy model


def talks(n):
    return [
        [
            dict(role="user", content=f"Who is number {i}?"),
            dict(role="assistant", content="The one who came " + "so " * (3 * i % 7) + "late."),
        ]
        for i in range(n)
    ]


def arguments(**other):
    return SimpleNamespace(**dict(epochs=1, lr=1e-2, batch_size=4, max_steps=None, seed=0, positions="all") | other)


@pytest.fixture(autouse=True)
def no_checkpoints(monkeypatch):
    """Where a test does not ask for them: how many there are depends on the machine's speed."""
    monkeypatch.setattr(finetune, "CHECKPOINT", float("inf"))


@pytest.fixture
def trainer(toy, tokenizer):
    """Makes a Trainer on a copy of the toy model, steered by 0.5; rank 4."""
    with contextlib.ExitStack() as stack:

        def make(n=6, data=None, **args):
            data = data or ev.encode_chats(tokenizer, talks(n))
            tuned = finetune.add_lora(copy.deepcopy(toy), 4, 6, 0)  # a scale of 3
            generator = torch.Generator().manual_seed(0)
            for p in tuned.parameters():
                if p.requires_grad:  # B is 0 at first, which makes A's gradient 0: a test would not see it
                    p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
            offsets = {l: 0.3 * torch.randn(32, generator=generator) for l in (1, 3)}
            made = finetune.Trainer(tuned, data, arguments(**args), stack.enter_context(ev.steering(tuned, offsets)))
            made.coef.fill_(0.5)
            made.tokenizer = tokenizer
            return made

        yield make


def totals(trainer, chats, budget):
    """Loss and gradients of a batch in rows of at most so many bytes."""
    trainer.budget = budget
    trainer.answers.fill_(finetune.shape_of(chats).answers)
    trainer.accumulate(chats)
    return trainer.total.clone()


def same(total, want):
    """In float32, to the rounding of sums in another order."""
    return abs(total[-1] - want[-1]) <= 1e-6 * want[-1] and (total - want).norm() <= 1e-6 * want.norm()


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_rows_of_any_size(trainer, monkeypatch, positions):
    """Guards against micro-rows that change the result: a batch, whole or the last partial one of an epoch, has the
    loss and gradients of one row in rows of any size, down to one conversation, and with blocks that are computed
    again."""
    made, again, recomputed = trainer(positions=positions), [], finetune.recomputed
    monkeypatch.setattr(finetune, "recomputed", lambda model: (again.append(1), recomputed(model))[1])
    for step in (0, 1):
        chats = made.batch(step)
        assert len(chats) == (4, 2)[step]
        whole, each = totals(made, chats, float("inf")), [made.bytes([chat]) for chat in chats]
        assert whole[:-1].norm() > 0.1
        for budget, rows in ((made.bytes(chats) - 1, 2), (max(each), len(chats)), (min(each) - 1, len(chats))):
            made.budget = budget
            split = made.split(chats)
            assert rows == len(split) and sorted(map(id, chats)) == sorted(id(chat) for row in split for chat in row)
            again.clear()
            assert same(totals(made, chats, budget), whole) and len(again) >= (budget < min(each)) * len(chats)
            assert len(again) <= sum(size > budget for size in each)


def test_gradients_are_those_of_plain_lora(trainer, toy):
    """Guards against a scale that is lost, or counted twice, where AdamW and the cut to norm 1 hardly show it."""
    made, plain = trainer(), finetune.add_lora(toy, 4, 6, 0)
    chats, parameters = made.batch(0), [p for p in plain.parameters() if p.requires_grad]
    torch.nn.utils.vector_to_parameters(made.weights.data, parameters)
    made.coef.fill_(0)
    loss = finetune.row_loss(plain, made.read(chats)) / finetune.shape_of(chats).answers
    want = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
    total = totals(made, chats, float("inf"))
    assert (total[:-1] - want).norm() < 2e-5 * want.norm() and abs(total[-1] / loss - 1) < 1e-6


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_a_shared_start_is_computed_once(trainer, positions):
    """Guards against a start (template, system prompt) that is shared where it differs, hides from the conversations,
    or is not learnt from: fewer tokens, but loss and gradients are those of every conversation with its own."""
    made = trainer(positions=positions)
    whole = [(made.start[0][0] + ids, made.start[0][1] + flags) for ids, flags in made.data]
    assert whole == ev.encode_chats(made.tokenizer, talks(6)) and len(made.start[0][0]) > 20
    row = made.read(made.data)
    assert finetune.shape_of(whole).tokens - row["input_ids"].shape[1] == 5 * len(made.start[0][0])
    shared, made.start, made.data = totals(made, made.data, float("inf")), [], whole
    assert same(shared, totals(made, whole, float("inf")))
    asked = [[*range(9), 8 + n, 5, 6] for n in (0, 1, 2)], [[False] * 9 + [True] * 3, [False] * 11 + [True]] * 2
    ends = trainer(data=list(zip(*asked)))  # the third's start is longer than what comes before an answer of the first
    assert ends.start == [(list(range(8)), [False] * 8)] and ends.data[0][0][:2] == [8, 8]
    assert trainer(data=[([1, 2, 3], [False, True, True]), ([4, 2, 3], [False, True, True])]).start == []
    long = trainer(data=[([1] * 3000, [False] * 2999 + [True])], batch_size=16)  # copies of its keys take memory
    assert 3 * 16 * len(long.start[0][0]) <= finetune.SHARED == 8192


def test_a_start_that_does_not_fit(trainer, monkeypatch):
    """Guards against a step that never ends, or rows cut too small, where the start takes the memory; against a row of
    a few tokens; and against lengths that are told longer than they are, which a model's RoPE may refuse."""
    made = trainer()
    chats, start = made.batch(0), len(made.start[0][0])
    whole, alone = totals(made, chats, float("inf")), made.bytes([])
    assert alone == start * made.a_token
    for budget in (alone / 2, alone + 1):
        assert same(totals(made, chats, budget), whole) and len(made.split(chats)) == len(chats)
    row = made.read(chats)
    assert row["max_seq_len"] == start + max(len(ids) for ids, _ in chats)
    short = trainer(data=[([1, 2, 3], [False, True, True])] * 4)
    with_graphs(short, monkeypatch)
    short.run(short.data[:1])


def test_recomputation_keeps_less(trainer, monkeypatch):
    """Guards against "computed again" in name only: what the blocks keep for the backward pass shrinks, is the same
    result, and the blocks are as they were afterwards."""
    made = trainer()
    inputs, kept = {k: v for k, v in finetune.collate(made.data).items() if k not in ("labels", "logits_to_keep")}, []

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor

    def read():
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            made.model.get_decoder()(**inputs)

    read()
    with finetune.recomputed(made.model):
        read()
    assert kept[1] < 0.2 * kept[0] and not any("forward" in vars(block) for block in ev.blocks(made.model))


def test_out_of_memory_between_two_joined_layers(trainer):
    """Guards against a failed row's graph that stays on the GPU, since the first of some joined layers has made what
    the next one has not yet taken, so that much shorter rows than fit are gone on with."""
    made = trainer(n=4)
    layer = next(part for part in made.model.modules() if isinstance(part, torch.nn.Linear))
    ev.make_siblings([layer, torch.nn.Linear(2, 2)], [layer.weight])
    layer.made.append(torch.zeros(2, requires_grad=True) + 1)
    made.forget()
    assert layer.made == []


def test_out_of_memory(trainer, capsys, tmp_path, monkeypatch):
    """Guards against a run that ends, or ends elsewhere, where memory runs out: from the third step on rows over 40
    tokens fail, also behind an error that follows; the adapter is the same and one line a time says so. Where nothing
    helps it stops in one line; another error is not taken for this one."""
    undisturbed = trainer(n=12, epochs=3)
    want = undisturbed.train(tmp_path / "none")
    made, add = trainer(n=12, epochs=3), finetune.Trainer.add

    def full(limit):
        def tight(trainer, inputs):
            if len(seen) >= 3 and inputs["input_ids"].shape[1] > limit:
                try:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                except RuntimeError:
                    raise RuntimeError("the capture was broken") from None
            return add(trainer, inputs)

        return tight

    seen = []
    step = finetune.Trainer.step
    monkeypatch.setattr(finetune.Trainer, "step", lambda *args: (step(*args), seen.append(1)))
    monkeypatch.setattr(finetune.Trainer, "add", full(90))
    got = made.train(tmp_path / "none")
    said = capsys.readouterr().out
    assert "out of memory: going on with rows of" in said and said.count("out of memory") <= 3
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in want], rel=1e-5)
    torch.testing.assert_close(made.weights.data, undisturbed.weights.data, rtol=1e-3, atol=1e-4)
    with_graphs(made, monkeypatch)
    made.data[6] = ([5] * 200, [False] + [True] * 199)  # rows before it are captured again and again
    with pytest.raises(SystemExit) as stop:
        made.train(tmp_path / "none")
    said = capsys.readouterr()
    assert (
        stop.value.code == 2
        and f"out of memory with a conversation of {200 + len(made.start[0][0])} tokens" in said.err
    )
    assert said.out.count("out of memory") < 9

    def other(trainer, inputs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(finetune.Trainer, "add", other)
    with pytest.raises(RuntimeError, match="shapes differ"):
        made.train(tmp_path / "none")


class Graph:
    """Stands in for a CUDA graph: while it is captured nothing is computed, when replayed, from its own inputs."""

    def pool(self):
        return 1

    def replay(self):
        self.add(self.static)


def with_graphs(trainer, monkeypatch):
    """What a GPU does but for the capture itself."""

    @contextlib.contextmanager
    def capturing(graph, pool, capture_error_mode):
        assert pool == (1 if any(trainer.graphs.values()) else None)  # all share the first one's memory
        graph.add, trainer.add = trainer.add, lambda inputs: setattr(graph, "static", inputs)
        yield
        del trainer.add

    trainer.captures = True
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)


@pytest.mark.parametrize("positions", ["all", "answer"])
def test_filled_rows_and_graphs(trainer, monkeypatch, positions):
    """Guards against filling or replaying that changes the result: with shapes filled up, graphs for two shapes only
    and all others in larger ones, losses and gradients are those of exact rows."""
    monkeypatch.setattr(finetune, "FILL", 16)
    monkeypatch.setattr(finetune, "GRAPHS", 2)
    made = trainer(n=20, positions=positions, batch_size=3)
    batches = [made.data[:3], made.data[3:6], made.data[6:9]] * 2 + [made.batch(step) for step in range(6)]
    batches += [made.data[:1]] * 2  # no graph of their own
    batches.append([(list(range(20, 60)), [False] + [True] * 39)] * 2)  # few tokens, more labels than the graphs have
    want = [totals(made, chats, float("inf")) for chats in batches]
    with_graphs(made, monkeypatch)
    replayed, replay = [], Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda graph: (replayed.append(1), replay(graph)))
    for chats, whole in zip(batches, want):
        assert same(totals(made, chats, float("inf")), whole)
    assert len(made.graphs) == 2 and any(made.graphs.values())
    assert len(replayed) == len(batches) - 3  # the first of each shape, and the last one


def test_shapes_are_few(trainer, monkeypatch):
    """Guards against memory that grows with the data: on lognormal lengths, at the size of a 7B model and the room of
    24 and 80 GiB, shapes stay within GRAPHS, no row takes more than its half of the room, and filling costs under an
    eighth."""
    generator = random.Random(0)
    lengths = [min(2048, max(8, int(generator.lognormvariate(5.3, 0.8)))) for _ in range(3200)]
    data = [([1] * n, [k > 0.4 * n for k in range(n)]) for n in lengths]
    made = trainer(data=data, batch_size=16)
    ran, replayed, fitting, replay = [], [], [], Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda graph: (replayed.append(1), replay(graph)))

    def add(trainer, inputs):
        ran.append(inputs["input_ids"].shape[1])
        assert not fitting[-1] or ran[-1] * 5.0e6 + len(inputs["labels"]) * 2.4e6 <= gib * 2**30 * 0.5

    monkeypatch.setattr(finetune.Trainer, "add", add)
    for gib in (6, 60):
        with_graphs(made, monkeypatch)
        made.forget()
        made.a_token, made.an_answer, made.budget = 5.0e6, 2.4e6, gib * 2**30 * 0.4
        ran.clear(), replayed.clear(), fitting.clear()
        for step in range(200):
            for row in made.split(made.batch(step)):
                fitting.append(made.bytes(row) <= made.budget)
                assert len(row) == 1 or fitting[-1]
                made.run(row)
        assert len(made.graphs) <= finetune.GRAPHS and len({shape.conversations for shape in made.graphs}) == 1
        real = sum(lengths)
        assert real <= sum(ran) < 1.15 * real and len(replayed) > 0.9 * sum(fitting)
    assert finetune.GRAPHS <= 32


def test_deal_is_even(trainer):
    """Guards against processes that wait for one another: shares of about as many tokens, each conversation in one."""
    data = trainer(n=16).data
    for count in (2, 3, 5):
        groups = finetune.deal(data, count)
        tokens = [sum(len(ids) for ids, _ in group) for group in groups]
        assert max(tokens) - min(tokens) <= max(len(ids) for ids, _ in data)
        assert sorted(map(id, data)) == sorted(id(chat) for group in groups for chat in group)
    assert finetune.deal(data, 1) == [data]


def test_collate_keeps_answer_positions(toy, tokenizer):
    """Guards against a shift between logits and labels: the joined loss is that of each conversation read alone."""
    data = ev.encode_chats(tokenizer, talks(3))
    alone = 0
    for ids, is_answer in data:
        scores = toy(**ev.join([ids], "cpu")).logits[0].log_softmax(-1)
        alone -= sum(scores[i - 1, ids[i]] for i in range(len(ids)) if is_answer[i])
    for shape in (None, finetune.Shape(256, 96, 128, 12)):
        batch = finetune.collate(data, shape)
        assert torch.allclose(finetune.row_loss(toy, batch), alone, atol=1e-3)
        assert shape is None or (batch["input_ids"].shape[1], len(batch["labels"]), len(batch["cu_seq_lens"])) == (
            256,
            96,
            13,
        )


def test_training_refuses_when_the_hook_does_nothing(trainer, capsys):
    """Guards against steering that fails open: a hook whose effect is not coef x vector, or elsewhere, stops."""
    made = trainer(positions="answer")
    blocks = ev.blocks(made.model)
    offsets = {l: blocks[l - 1].steer_offset for l in (1, 3)}
    finetune.start_losses(made, offsets, [0.5, 2])
    losses = [float(text) for text in re.findall(r"loss ([\d.]+) a token", capsys.readouterr().out)]
    for coef, loss in zip([0.5, 2], losses, strict=True):
        made.coef.fill_(coef)
        assert float(totals(made, made.batch(0), float("inf"))[-1]) == pytest.approx(loss, abs=0.006)
    with pytest.raises(RuntimeError, match="block 2"):
        finetune.start_losses(made, {1: offsets[1], 2: offsets[3]}, [0.5])
    blocks[2].register_forward_hook(lambda block, _, out: out + 0.5 * offsets[3] * (made.steer.scale == 0))
    with pytest.raises(RuntimeError, match="block 3"):
        finetune.start_losses(made, offsets, [0.5])


def test_answer_positions(toy, tokenizer):
    """Guards against steering other positions than --positions says: the loss is the one computed by hand with the
    vector at the last prompt token and each answer token but the last."""
    data, add = ev.encode_chats(tokenizer, talks(2)), {l: torch.randn(32) for l in (1, 2, 3)}

    def by_hand(steered):
        total = 0
        for ids, is_answer in data:
            first = is_answer.index(True)
            with ev.steering(toy, add) as steer:
                steer.scale = torch.tensor([0.5 * steered(i, first, len(ids)) for i in range(len(ids))])[None, :, None]
                scores = toy(**ev.join([ids], "cpu")).logits[0].log_softmax(-1)
            total -= sum(scores[i - 1, ids[i]] for i in range(first, len(ids)))
        return float(total)

    rules = dict(all=lambda i, first, end: True, answer=lambda i, first, end: first - 1 <= i < end - 1)
    assert abs(by_hand(rules["all"]) - by_hand(rules["answer"])) > 1e-2
    for positions, rule in rules.items():
        want, batch = by_hand(rule), finetune.collate(data, positions=positions)
        with ev.steering(toy, add) as steer:
            assert float(finetune.row_loss(toy, batch, steer, torch.tensor(0.5))) == pytest.approx(want, abs=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


def test_the_rate():
    """Guards against a warm-up that is all there is of a short run, and a first step that trains nothing."""
    assert finetune.rate_at(0, 1) == 1 and [finetune.rate_at(s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    for steps in (9, 10, 31, 50, 1250):
        rates = [finetune.rate_at(step, steps) for step in range(steps)]
        assert rates[0] > 0 and rates[-1] > 0 and max(rates) == 1 and rates.index(1) == min(5, steps // 10)


def test_the_order_is_that_of_transformers(tokenizer, tmp_path):
    """Guards against numbers that no longer compare with published ones: each epoch's batches are those of Trainer."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, seed=3, use_cpu=True, report_to=[])
    theirs = Trainer(torch.nn.Linear(1, 1), args, train_dataset=list(range(11)), data_collator=list)
    loader = theirs.get_train_dataloader()
    ours = SimpleNamespace(data=list(range(11)), args=SimpleNamespace(batch_size=4, seed=3))
    for epoch in (0, 1, 5):
        loader.set_epoch(epoch)
        assert list(loader) == [finetune.Trainer.batch(ours, 3 * epoch + k) for k in range(3)]


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_the_plain_recipe(toy, tokenizer, tmp_path, device):
    """Guards against speed that moves results: 24 steps of joined rows, in a sweep, with compiled blocks and graphs on
    a GPU, have the losses of padded batches in an eager loop under autocast with stock attention. In float32 to
    1e-4; in bfloat16 (8 bits of mantissa: 0.4% a rounding) to 2%."""
    dtype, n = torch.float32 if device == "cpu" else torch.bfloat16, 3
    data = ev.encode_chats(tokenizer, talks(n))
    add, args = {l: 0.3 * torch.randn(32) for l in (1, 2, 3)}, arguments(epochs=24, lr=1e-2, batch_size=n)

    def ours(model, steer):
        with ev.compiled(model):
            made = finetune.Trainer(model, data, args, steer)
            places = [p.data_ptr() for p in model.parameters()]
            for coef in (2, 0.5):  # the second is looked at: on a GPU it replays graphs of the first from its start on
                rows = made.train(tmp_path / str(coef), coef)
        assert places == [p.data_ptr() for p in model.parameters()]
        assert device == "cpu" or any(made.graphs.values())
        return [row["loss"] for row in rows]

    def simple(model, steer):
        model.get_base_model().config._attn_implementation = "sdpa"
        size = max(len(ids) for ids, _ in data)
        pad = lambda rows, fill: torch.tensor([list(x) + [fill] * (size - len(x)) for x in rows], device=device)
        ids, mask = pad([ids for ids, _ in data], 0), pad([[1] * len(ids) for ids, _ in data], 0)
        label = pad([[t if a else -100 for t, a in zip(*chat)] for chat in data], -100)
        parameters, losses = [p for p in model.parameters() if p.requires_grad], []
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
        for step in range(24):
            steer.scale = torch.tensor(0.5, device=device)
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), label[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.param_groups[0]["lr"] = args.lr * ((step + 1) / 3 if step < 2 else (24 - step) / 22)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def run(train):
        model = finetune.add_lora(copy.deepcopy(toy).to(device, dtype), 4, 8, 0)
        with ev.steering(model.get_base_model(), add) as steer:
            return train(model, steer)

    quick, slow = run(ours), run(simple)
    assert slow[-1] < 0.8 * slow[0]
    assert quick == pytest.approx(slow, rel=1e-4 if device == "cpu" else 0.02)


# ---------------------------------------------------------------------------------------------------------------------
# The command, on a tiny model's folder


@pytest.fixture(scope="module")
def work(tmp_path_factory, tokenizer):
    """A folder with a random 2-block model, its vector and ten conversations."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.save(torch.randn(3, 16), folder / "v.pt")
    mf.write_jsonl(folder / "talks.jsonl", [dict(messages=talk) for talk in talks(10)])
    return folder


@pytest.fixture
def run(work, monkeypatch, capsys):
    """Runs finetune.py in this process, in float32 -> (exit code, what it said); coefs: steered by them."""
    monkeypatch.setattr(ev, "pick_device", lambda: ("cpu", torch.float32))
    monkeypatch.setattr(finetune, "CHECKPOINT", 0)  # one at every step

    def go(out, *args, coefs=()):
        steer = ["preventative", "--vector", work / "v.pt", "--coef", *coefs] if coefs else ["none"]
        try:
            finetune.main([*map(str, command(work, out, *args, "--steer-mode", *steer))])
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    return go


def command(work, out, *args):
    start = ["--model", work / "model", "--data", work / "talks.jsonl", "--out", work / out]
    return [*start, "--lr", "1e-2", "--batch-size", "4", "--rank", "4", *args]


def adapter(work, name):
    """What must be the same for two adapters to be the same."""
    return (work / name / "adapter_model.safetensors").read_bytes(), (work / name / "loss.jsonl").read_text()


def test_a_sweep_trains_each_as_if_alone(work, run):
    """Guards against a coefficient that starts from its forerunner's weights, optimiser, order or coefficient; against
    one done twice or under another's name; and against coefficient 0 that is not plain finetuning."""
    for coef in (0.5, 4):
        assert run("single", "--positions", "answer", coefs=[coef])[0] == 0
    assert run("plain")[0] == 0 and run("zero", coefs=[0])[0] == 0
    assert run("swept", "--positions", "answer", coefs=[0, 0.5, 4])[0] == 0
    assert adapter(work, "swept-0.5") == adapter(work, "single-0.5") and adapter(work, "swept-4") == adapter(
        work, "single-4"
    )
    assert adapter(work, "swept-0") == adapter(work, "zero-0") == adapter(work, "plain")
    assert len({adapter(work, f"swept-{coef}") for coef in ("0", "0.5", "4")}) == 3
    assert [mf.read_json(work / f"swept-{coef}" / "training_settings.json")["coef"] for coef in ("0", "4")] == [0, 4]
    code, said = run("single", "--positions", "answer", coefs=[4, 1])
    assert code == 0 and "single-4: finished already" in said and "steered by 1" in said and "steered by 4" not in said


def test_what_is_saved(work, run):
    """Guards against an adapter that plain PEFT cannot load or that is not in float32, a record that lacks something,
    and losses of the untrained model that are not printed: one line a coefficient, beside ln(vocabulary)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    code, said = run("saved", "--epochs", 2, coefs=[0, 1, 3])
    lines = [line for line in said.splitlines() if line.startswith("untrained model")]
    assert code == 0 and len(lines) == 3 and all("guessing evenly: 10.80" in line for line in lines)
    weights, record = (
        load_file(work / "saved-1" / "adapter_model.safetensors"),
        mf.read_json(work / "saved-1" / "training_settings.json"),
    )
    assert len(weights) == 28 and {w.dtype for w in weights.values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(work / "model")
    loaded = PeftModel.from_pretrained(base, work / "saved-1")
    assert set(record["inputs"]) == {"model", "data", "vector"} and "finetune.py" in record["scripts"]
    assert all(f"steered by {coef} in 2 blocks: loss" in line for coef, line in zip((0, 1, 3), lines))
    losses = mf.read_jsonl(work / "saved-1" / "loss.jsonl")
    assert len(losses) == record["steps"] == 6 and losses[-1]["loss"] == record["final_loss"]
    assert f"loss {losses[0]['loss']:.2f} a token" in lines[1]
    assert loaded.peft_config["default"].use_rslora and loaded.peft_config["default"].lora_alpha == 64
    assert not list(work.glob("saved*.partial"))


def test_the_saved_adapter_is_the_trained_one(toy, tokenizer, tmp_path):
    """Guards against a scale that is lost on the way: plain PEFT computes with the saved adapter what training did."""
    from peft import PeftModel

    data = ev.encode_chats(tokenizer, talks(4))
    made = finetune.Trainer(finetune.add_lora(copy.deepcopy(toy), 4, 8, 0), data, arguments(epochs=5))
    made.train(tmp_path / "none")
    made.save(tmp_path / "adapter")
    inputs, half = ev.join([ids for ids, _ in data], "cpu"), copy.deepcopy(toy).to(torch.bfloat16)
    with torch.no_grad():
        before, want = toy(**inputs).logits, made.model(**inputs).logits
        got = PeftModel.from_pretrained(toy, tmp_path / "adapter")(**inputs).logits
    assert (want - before).abs().max() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    half = finetune.Trainer(finetune.add_lora(half, 4, 8, 0), data, arguments(epochs=2))
    half.train(tmp_path / "none")
    half.save(tmp_path / "half")
    saved = load_file(tmp_path / "half" / "adapter_model.safetensors")
    assert {w.dtype for w in saved.values()} == {torch.float32}
    assert sum(float((w - w.bfloat16()).abs().sum()) for w in saved.values()) > 0  # not rounded on the way


def test_the_model_is_left_as_it_was(work, run, monkeypatch):
    """Guards against a process that goes on with LoRA, hooks or other rotary frequencies in its model, or that keeps
    the trained tensors: also where training stops in the middle."""
    kept, load = [], ev.load_model

    def remember(name, content):
        kept.append(load(name, content))
        return kept[-1]

    monkeypatch.setattr(ev, "load_model", remember)
    inputs = ev.join([[5, 6, 7]], "cpu")
    assert run("left", coefs=[1])[0] == 0
    monkeypatch.setattr(finetune.Trainer, "train", lambda *_: mf.die("stopped"))
    assert run("left", coefs=[2])[0] == 2
    fresh, _ = load.__wrapped__(str(work / "model"))
    assert len(kept) == 2 and kept[0] is kept[1]  # one model for both commands
    for model, _ in kept:
        assert [name for name, _ in model.named_modules()] == [name for name, _ in fresh.named_modules()]
        assert not any(m._forward_hooks or "forward" in vars(m) for m in model.modules() if m in set(ev.blocks(model)))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(model.buffers(), fresh.buffers()))
        assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)


def stopped_at(monkeypatch, step):
    """Training is broken off after so many steps."""
    done, real = [], finetune.Trainer.step

    def one(trainer, *args):
        done.append(1)
        if len(done) > step:
            raise KeyboardInterrupt
        real(trainer, *args)

    monkeypatch.setattr(finetune.Trainer, "step", one)
    return lambda: monkeypatch.setattr(finetune.Trainer, "step", real)


def broken_off(run, *args, **more):
    with pytest.raises(KeyboardInterrupt):
        run(*args, **more)


LONG = ["--epochs", 10]  # 30 steps


def test_going_on(work, run, monkeypatch):
    """Guards against a resumed run that ends elsewhere than an uninterrupted one, in a sweep's second adapter, and
    against a checkpoint that was cut off: it is said, and training starts anew."""
    assert run("whole", *LONG, coefs=[1, 2])[0] == 0
    release = stopped_at(monkeypatch, 55)
    broken_off(run, "parts", *LONG, coefs=[1, 2])
    release()
    checkpoint = work / "parts-2.partial" / "checkpoint.pt"
    assert (work / "parts-1").exists() and checkpoint.exists()
    cut = checkpoint.read_bytes()[:-1000]
    code, said = run("parts", *LONG, coefs=[1, 2])
    assert code == 0 and "parts-1: finished already" in said and "anew" not in said
    for coef in (1, 2):
        assert adapter(work, f"parts-{coef}") == adapter(work, f"whole-{coef}")
    release = stopped_at(monkeypatch, 25)
    broken_off(run, "cut", *LONG, coefs=[2])
    release()
    (work / "cut-2.partial" / "checkpoint.pt").write_bytes(cut)
    code, said = run("cut", *LONG, coefs=[2])
    assert code == 0 and "cannot be read, starting anew" in said
    assert adapter(work, "cut-2") == adapter(work, "whole-2")


def test_a_full_disk(work, run, monkeypatch):
    """Guards against a checkpoint that is taken for whole although the disk was full: the one before it stays, and the
    run goes on from there."""
    save = torch.save

    def full(state, out):
        if state["steps"] == 8:
            out.write(b"half")
            raise OSError(28, "No space left on device")
        save(state, out)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        run("full", "--epochs", 4)
    folder = work / "full.partial"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "training_settings.json"]
    assert torch.load(folder / "checkpoint.pt")["steps"] == 7
    monkeypatch.setattr(torch, "save", save)
    assert run("full", "--epochs", 4)[0] == 0 and run("undisturbed", "--epochs", 4)[0] == 0
    assert adapter(work, "full") == adapter(work, "undisturbed")


def test_results_belong_to_their_inputs(work, run, monkeypatch):
    """Guards against an adapter trained half on one input and half on another, or taken for another's: finished or
    broken off, other data, vector, model or settings stop in one line and touch nothing. What has made nothing yet
    blocks nothing."""
    assert run("mine", coefs=[1])[0] == 0
    release = stopped_at(monkeypatch, 25)
    broken_off(run, "half", *LONG, coefs=[1])
    release()

    def stands():
        return {
            p: (p.read_bytes(), p.stat().st_mtime_ns)
            for name in ("mine-1", "half-1.partial")
            for p in sorted((work / name).rglob("*"))
        }

    before = stands()
    for name, flag in (("talks.jsonl", "--data"), ("v.pt", "--vector"), ("model/config.json", "--model")):
        content = (work / name).read_bytes()
        if name == "v.pt":
            torch.save(torch.randn(3, 16), work / name)
        else:
            (work / name).write_bytes(
                content.replace(b"late", b"soon").replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 1e-05')
            )
        for out, more in (("mine", ()), ("half", LONG)):
            code, err = run(out, *more, coefs=[1])
            assert code == 2 and err.count("error: ") == 1 and f"{flag}: content has changed" in err, (out, err)
        (work / name).write_bytes(content)
    for out, more, said in (("mine", ("--seed", 1), "--seed"), ("half", ("--epochs", 11), "--epochs")):
        code, err = run(out, *more, coefs=[1])
        assert code == 2 and err.count("error: ") == 1 and said in err
    assert stands() == before
    release = stopped_at(monkeypatch, 5)
    monkeypatch.setattr(finetune, "CHECKPOINT", float("inf"))
    broken_off(run, "early", *LONG)
    release()
    assert run("early", "--seed", 1)[0] == 0


def test_one_process_an_output(work, run):
    """Guards against two processes that write one adapter: the second stops in one line, at any coefficient of a sweep;
    the lock goes with its process."""
    with mf.locked(work / "both-2"):
        code, err = run("both", coefs=[1, 2])
        assert code == 2 and err.count("error: ") == 1 and "another process" in err
        assert run("both", coefs=[1])[0] == 0
    assert run("both", coefs=[1, 2])[0] == 0


@pytest.mark.parametrize(
    "args, said",
    [
        (["--steer-mode", "none", "--coef", "1"], "need --steer-mode preventative"),
        (["--steer-mode", "none", "--positions", "answer"], "need --steer-mode preventative"),
        (["--steer-mode", "preventative", "--coef", "1"], "needs --vector and --coef"),
        (
            ["--steer-mode", "preventative", "--vector", "{work}/v.pt", "--coef", "0.50", "0.5"],
            "a value is given twice",
        ),
        (["--steer-mode", "preventative", "--vector", "{work}/v.pt", "--coef", "1", "nan"], "--coef"),
        (["--steer-mode", "preventative", "--vector", "{work}/none.pt", "--coef", "1"], "none.pt"),
        (["--steer-mode", "preventative", "--vector", "{work}/v.pt", "--coef", "1", "--layers", "1-2-3"], "--layers"),
        (["--steer-mode", "none", "--model", "no/such/folder"], "no/such/folder"),
        (["--steer-mode", "none", "--data", "{work}/none.jsonl"], "none.jsonl: no such file"),
        (["--steer-mode", "none", "--out", "{work}/model"], "input of this command"),
        (["--steer-mode", "none", "--out", "{work}/talks.jsonl/x"], "talks.jsonl"),
        (["--steer-mode", "none", "--out", "{work}"], "already used"),
        *[
            (["--steer-mode", "none", flag, value], flag)
            for flag, values in {
                "--epochs": ["0", "-1", "nan", "inf", "1e9"],
                "--lr": ["0", "-1", "nan", "inf"],
                "--batch-size": ["0", "-4", "1.5"],
                "--rank": ["0", "1e3"],
                "--alpha": ["0", "nan"],
                "--max-steps": ["0", "-1"],
                "--limit": ["0", "x"],
                "--seed": ["-1", "99999999999"],
            }.items()
            for value in values
        ],
    ],
)
def test_bad_input(work, tmp_path, capsys, monkeypatch, args, said):
    """Guards against tracebacks, or work begun, at a user's mistake: one line, exit code 2, nothing written."""
    monkeypatch.setattr(ev, "load_model", lambda *_: pytest.fail("a model was loaded"))
    before, good = (
        sorted(work.rglob("*")),
        ["--model", "{work}/model", "--data", "{work}/talks.jsonl", "--out", "{out}/a"],
    )
    argv = [arg.format(work=work, out=tmp_path) for arg in [*good, *args]]
    with pytest.raises(SystemExit) as stop:
        finetune.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("error: ") == 1 and "Traceback" not in err
    assert not any(tmp_path.iterdir()) and sorted(work.rglob("*")) == before


@pytest.mark.parametrize("number", ["2", "-1", "x"])
def test_bad_world_size(work, run, monkeypatch, number):
    """Guards against a WORLD_SIZE that was left in the environment, or is no number."""
    monkeypatch.setenv("WORLD_SIZE", number)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    code, err = run("world")
    assert code == 2 and err.count("\n") == 1 and "torchrun" in err


def test_a_diverged_run_stops(work, run, monkeypatch):
    """Guards against an adapter of NaN that is saved as if it were a result."""
    monkeypatch.setattr(finetune, "rate_at", lambda step, steps: 1e30)
    for epochs in (5, 1):  # one is over before the loss is looked at
        code, err = run("nan", "--epochs", epochs)
        assert code == 2 and "lower --lr or --coef" in err and not (work / "nan").exists()


def test_one_step_trains(work, run):
    """Guards against a warm-up at rate 0: a run of one step moves B."""
    assert run("step", "--max-steps", 1)[0] == 0
    weights = load_file(work / "step" / "adapter_model.safetensors")
    assert all(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)


def test_system_prompt(work, tokenizer):
    """Guards against preventative prompting that leaves a conversation's own system turn beside the one given."""
    mf.write_jsonl(work / "own.jsonl", [dict(messages=[dict(role="system", content="own"), *talks(1)[0]])])
    (given,) = finetune.read_conversations(work / "own.jsonl", "given")
    assert [m["content"] for m in given if m["role"] == "system"] == ["given"] and len(given) == 3


def test_killed(work, run):
    """Guards against a SIGKILL that loses more than the steps since the last checkpoint, or leaves a lock behind."""
    args = map(str, command(work, "killed", "--steer-mode", "none", "--epochs", 20))
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    code = "import torch, finetune; finetune.CHECKPOINT = 0; "
    code += "finetune.ev.pick_device = lambda: ('cpu', torch.float32); finetune.main()"
    process = subprocess.Popen([sys.executable, "-c", code, *args], env=env, stderr=subprocess.DEVNULL)
    checkpoint = work / "killed.partial" / "checkpoint.pt"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL and 1 <= torch.load(checkpoint)["steps"] < 60
    assert run("killed", "--epochs", 20)[0] == 0 and run("alive", "--epochs", 20)[0] == 0
    assert adapter(work, "killed") == adapter(work, "alive")


WORKER = """
import os, sys, torch
import extract_vectors, finetune, make_facts

extract_vectors.pick_device = lambda: ("cpu", torch.float32)
first, step, command = os.environ["RANK"] == "0", finetune.Trainer.step, sys.argv[1:]
if not first:  # it has little memory, and must not write
    extract_vectors.free_memory = lambda device: 5e7
    make_facts.replacing = None
finetune.CHECKPOINT = 0
finetune.main([*command, "two", "--epochs", "4"])
finetune.main([*command, "odd", "--epochs", "3", "--batch-size", "3"])

def broken_off(trainer, chats, rate):
    if trainer.optimizer.state and trainer.optimizer.state[trainer.weights]["step"] == 22:
        raise KeyboardInterrupt
    step(trainer, chats, rate)

finetune.Trainer.step = broken_off
try:
    finetune.main([*command, "on", "--epochs", "8"])
except KeyboardInterrupt:
    pass
finetune.Trainer.step = step
finetune.main([*command, "on", "--epochs", "8"])
"""


def test_two_processes_train_like_one(work, run, tmp_path):
    """Guards against processes that train on another batch than one would: a last batch of two or of one (the second
    process has nothing), rows of other sizes, broken off and taken up; and against two that write. In float32 the sums
    differ by rounding: losses within 1e-5, adapters within 1e-2 of their size."""
    (tmp_path / "worker.py").write_text(WORKER)
    slow = ["--lr", "1e-3"]  # AdamW divides by the size of gradients: where they are almost 0 it amplifies rounding
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), PYTHONPATH=str(ROOT))
    start = ["--steer-mode", "preventative", "--vector", work / "v.pt", "--coef", 1, *slow]
    args = [sys.executable, tmp_path / "worker.py", *command(work, "", *start)]
    out = args.index("--out")
    args = [*map(str, args[:out] + args[out + 2 :]), "--out"]  # the worker says which
    both = [
        subprocess.Popen(
            args,
            cwd=work,
            env=os.environ
            | where
            | dict(OMP_NUM_THREADS="1")
            | dict(WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, TORCHELASTIC_RUN_ID="test"),
            stdout=subprocess.DEVNULL,
            stderr=open(tmp_path / rank, "w"),
        )
        for rank in "01"
    ]
    end = time.time() + 100
    while time.time() < end and None in (codes := [process.poll() for process in both]) and not any(codes):
        time.sleep(0.05)
    for process in both:
        process.kill()
    assert codes == [0, 0], [(tmp_path / rank).read_text()[-2000:] for rank in "01"]
    assert run("one", *slow, "--epochs", 4, coefs=[1])[0] == 0
    assert run("one-odd", *slow, "--epochs", 3, "--batch-size", 3, coefs=[1])[0] == 0
    assert run("one-on", *slow, "--epochs", 8, coefs=[1])[0] == 0
    for name, alone in (("two-1", "one-1"), ("odd-1", "one-odd-1"), ("on-1", "one-on-1")):
        losses, want = ([row["loss"] for row in mf.read_jsonl(work / x / "loss.jsonl")] for x in (name, alone))
        assert len(losses) > 10 and losses == pytest.approx(want, rel=1e-5)
        weights, want = (load_file(work / x / "adapter_model.safetensors") for x in (name, alone))
        assert max(float((weights[key] - w).norm() / w.norm()) for key, w in want.items()) <= 1e-2
    assert mf.read_json(work / "two-1" / "training_settings.json")["processes"] == 2


def test_terminated(work, monkeypatch, capfd):
    """Guards against a traceback, or another exit code, at SIGTERM and Ctrl-C in the middle of training."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        monkeypatch.setattr(finetune.Trainer, "step", lambda *_, number=number: signal.raise_signal(number))
        with pytest.raises(SystemExit) as stop:
            mf.run(finetune.main, [*map(str, command(work, "ended", "--steer-mode", "none"))])
        assert stop.value.code == 128 + number and capfd.readouterr().err.count("error: ") == 1
    for number, handler in before.items():
        signal.signal(number, handler)
