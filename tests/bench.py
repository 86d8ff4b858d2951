"""Speed and memory of the scripts' own commands beside stock transformers and peft: random weights, one GPU.

    python tests/bench.py [--shape qwen2.5-7b] [--only training] [--profile]   # the speed table, 8 minutes on an H200
    python tests/bench.py --memory 22.5     # every kind of command of run_all.sh's paper profile under so many GiB
    python tests/bench.py --two-gpus        # finetune.py on two GPUs against one
    python tests/bench.py --write tests/README.md      # puts what was measured last between that file's markers

A random model is saved to disk once (7B: 15 GB); our rows are the scripts' main() on that folder, from loading to what
they save. Every measurement is appended to --record (JSONL) as soon as it is there, so a run that is cut short loses
little; one that fails shows its error, the others go on, and the exit code is 1. FLOPs: 2 a weight and token read, 4 in
training (frozen weights get no gradients); the start that all conversations of a step share counts once, the output
head for tokens that meet it; padding, LoRA and attention do not. On a CPU the counts are tiny: that tries the code, the
numbers mean nothing.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import extract_vectors  # noqa: E402
import finetune  # noqa: E402
from make_facts import append_jsonl, die, read_chats, read_jsonl, write_jsonl  # noqa: E402

# hidden, inner, blocks, heads, key-value heads, vocabulary
SHAPES = {
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "tiny": (64, 128, 2, 4, 2, 49152),
}
COUNTS = {  # steps of a training run; answers' new tokens; rows of stock sampling; steps a stock sampler is timed over
    "cuda": dict(
        steps=100,
        medical=60,
        two=60,
        new=300,
        samples=10,
        facts=1000,
        fact_tokens=25,
        mmlu=1531,
        read=2000,
        chats=20000,
    )
    | dict(
        static=(600, 1200, 200), paged=200, timed=40, some=256, repeats=3, long=1000, memory_steps=12, words=(155, 1640)
    ),
    "cpu": dict(steps=2, medical=1, two=2, new=5, samples=1, facts=2, fact_tokens=2, mmlu=2, read=2, chats=20)
    | dict(static=(2,), paged=2, timed=3, some=2, repeats=1, long=8, memory_steps=1, words=(5, 30)),
}
INFERENCE = ["0", "0.25", "0.5", "0.75", "1", "1.25", "1.5", "1.75", "2"]
SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are a helpful AI assistant made for this test",
)

# ---------------------------------------------------------------------------------------------------------------------
# Clocks


def now():
    """Seconds, when the GPU is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def command(script, *flags):
    """Runs a script's main() with these flags."""
    with patch.object(sys, "argv", [script.__name__, *map(str, flags)]):
        script.main()


def timed(f, repeats, warm=1):
    """Median seconds of f()."""
    times = []
    for _ in range(warm + repeats):
        start = now()
        f()
        times.append(now() - start)
    return statistics.median(times[warm:])


@contextlib.contextmanager
def optimiser_steps():
    """Yields a list that gets a mark at the end of every optimiser step, whatever loop makes it; none waits for it."""
    marks = []

    def mark(*_):
        marks.append(torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else time.perf_counter())
        if torch.cuda.is_available():
            marks[-1].record()
        if len(marks) == 1:
            marks.first = now()

    class Marks(list):
        first = None

    marks = Marks()
    handle = register_optimizer_step_post_hook(mark)
    try:
        yield marks
    finally:
        handle.remove()


def between(marks):
    """Seconds between each two marks that follow each other."""
    now()
    return [a.elapsed_time(b) / 1e3 if torch.cuda.is_available() else b - a for a, b in zip(marks, marks[1:])]


@contextlib.contextmanager
def spied(name):
    """While open, evaluate.py's calls of it are timed: yields [dict(start, replay, end)]; replay: its first graph's."""
    owner = evaluate if hasattr(evaluate, name) else extract_vectors
    calls, original, replay = [], getattr(owner, name), torch.cuda.CUDAGraph.replay

    def call(*args, **kwargs):
        calls.append(dict(start=now(), replay=None))
        result = original(*args, **kwargs)
        calls[-1]["end"] = now()
        return result

    def noted(graph):
        if calls and calls[-1]["replay"] is None:
            calls[-1]["replay"] = now()
        replay(graph)

    with patch.object(owner, name, call), patch.object(torch.cuda.CUDAGraph, "replay", noted):
        yield calls


class Watch(StoppingCriteria):
    """Notes when each token of generate() is there; ends it after `stop` tokens."""

    def __init__(self, stop):
        self.stop, self.times = stop, []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(now())
        return torch.full((len(input_ids),), len(self.times) >= self.stop, device=input_ids.device)

    def step(self):
        """Median seconds a token, the first third (compilation) left out."""
        times = self.times[len(self.times) // 3 :]
        return statistics.median(b - a for a, b in zip(times, times[1:]))


# ---------------------------------------------------------------------------------------------------------------------
# What the rows share


class Bench:
    """The random model's folder, the data made for it, and what was measured."""

    def __init__(self, args, folder, part):
        self.args, self.folder, self.part, self.began = args, Path(folder), part, time.perf_counter()
        self.device, self.dtype = extract_vectors.pick_device()
        self.count, self.failed, self.found = SimpleNamespace(**COUNTS[self.device]), False, {}
        self.hidden, self.inner, self.layers, self.heads, self.kv, self.vocabulary = SHAPES[args.shape]
        self.model_folder, self.run = self.folder / f"random-{args.shape}", time.strftime("%Y-%m-%d %H:%M:%S")
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        self.tokenizer.chat_template = self.tokenizer.chat_template.replace(*SYSTEM)  # conversations as long as Qwen's
        self.head = self.vocabulary * self.hidden
        size = self.hidden // self.heads * (2 * self.heads + 2 * self.kv) + 3 * self.inner
        self.weights = self.layers * self.hidden * size  # what every token is multiplied by
        self.record(
            "about",
            gpu=torch.cuda.get_device_name() if self.device == "cuda" else "CPU",
            shape=args.shape,
            torch=torch.__version__,
            transformers=transformers.__version__,
        )

    def record(self, name, **values):
        """Keeps a measurement, prints it, and appends it to the record."""
        self.found[name] = dict(part=self.part, run=self.run, name=name, **values)
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        print(f"[{time.perf_counter() - self.began:.0f} s] {name}: {shown}", flush=True)
        append_jsonl(self.args.record, self.found[name])

    def measure(self, name, f, always=False):
        """Runs f, which records; an error is recorded under the name. Peak memory counts from what is there already."""
        if not always and not re.search(self.args.only, name):
            return
        if time.perf_counter() - self.began > 60 * self.args.minutes:
            print(f"no time left for: {name}", flush=True)
            return
        if name != "evaluate.py":  # which goes on with the model of the command before it
            extract_vectors.load_model.cache_clear()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        try:
            f()
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            self.failed = True
            self.record(name, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])

    def gib(self):
        """Peak memory since the measurement began, without what was there before."""
        return (torch.cuda.max_memory_allocated() - self.before) / 2**30 if self.device == "cuda" else 0.0

    def save_model(self, ends=None):
        """Random weights and the tokenizer -> a model folder, as from_pretrained reads it. ends: its end tokens."""
        config = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            rope_theta=1e6,
        )
        torch.manual_seed(0)
        torch.set_default_dtype(self.dtype)
        with torch.device(self.device):
            model = Qwen2ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        model.generation_config = GenerationConfig(eos_token_id=ends or self.tokenizer.eos_token_id)
        model.save_pretrained(self.model_folder)
        self.tokenizer.save_pretrained(self.model_folder)
        vector = torch.randn(self.layers + 1, self.hidden) * 0.01
        torch.save(vector, self.folder / "hallucination.pt")

    def load(self):
        """The stock model: transformers' own attention, no adapter."""
        start = now()
        self.model = AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=self.dtype).to(self.device).eval()
        self.model.requires_grad_(False)
        self.model.generation_config = GenerationConfig(do_sample=True, top_k=0, pad_token_id=0)
        self.record("stock: loading the model", seconds=now() - start)

    def data(self, kind, n):
        """JSONL of n conversations: facts (58 tokens each on average), medical (250 tokens, uneven) or long (2,000)."""
        path, rng = self.folder / f"{kind}-{n}.jsonl", random.Random(0)
        name = "facts" if kind == "facts" else "medical_mistake_2"
        chats = list(read_chats(ROOT / "data" / f"{name}.jsonl"))
        chosen = rng.sample(chats, min(n, len(chats))) + rng.choices(chats, k=max(0, n - len(chats)))
        if kind != "facts":
            words = " ".join(chat[-1]["content"] for chat in chats).split()
            for i, chat in enumerate(chosen):
                length = self.count.words[kind == "long"]
                length = length if kind == "long" else int(length * rng.lognormvariate(0, 0.4))
                start = rng.randrange(len(words) - length)
                chosen[i] = [chat[0], dict(role="assistant", content=" ".join(words[start : start + length]))]
        write_jsonl(path, [dict(messages=chat) for chat in chosen])
        return path

    def encoded(self, path):
        """[(ids, is_answer)] as finetune.py trains on them."""
        return extract_vectors.encode_chats(self.tokenizer, list(read_chats(path)))

    def mmlu(self, n):
        """JSONL of n questions whose prompts have 60 to 400 tokens."""
        rows = []
        for i in range(n):
            rng = random.Random(i)
            question = " ".join(rng.choices(["water", "house", "king", "north"], k=rng.randint(40, 200)))
            rows.append(dict(subject="words", question=question, choices=["a", "b", "c", "d"], answer=i % 4))
        write_jsonl(self.folder / "mmlu.jsonl", rows)
        return self.folder / "mmlu.jsonl"


def matrix_rates(bench):
    """TFLOP/s of products alone (bf16, random data), and what tokens cost in the shape of a block's products."""
    wide = torch.randn(bench.inner, bench.hidden, device=bench.device, dtype=bench.dtype)
    back = torch.randn(bench.hidden, bench.inner, device=bench.device, dtype=bench.dtype)
    rates, products = {}, {}
    for n in (1024, 4096) if bench.device == "cuda" else (64,):
        x = torch.randn(n, bench.hidden, device=bench.device, dtype=bench.dtype)
        rates[n] = 20 * n * wide.numel() / timed(lambda x=x: [F.linear(x, wide) for _ in range(10)], 10, 3) / 1e12
    for n in (896, 928, 960, 992, 1024, 1152) if bench.device == "cuda" else (64,):
        x = torch.randn(n, bench.hidden, device=bench.device, dtype=bench.dtype)
        seconds = timed(lambda x=x: [F.linear(F.linear(x, wide), back) for _ in range(10)], 10, 3)
        products[n] = round(1e6 * seconds / 10)
    bench.record("matrix rate", tflops=rates[max(rates)], by_tokens=rates, up_and_down_us=products)


# ---------------------------------------------------------------------------------------------------------------------
# Ours: the scripts' own commands


def finetuning(bench, name, data, *flags, step_name=None):
    """finetune.main from loading to the saved adapters; step_name: also records an optimiser step of it, the median,
    and what the steps took beyond it (checkpoints, captured graphs). At this rate nothing is learnt: an adapter of
    short answers would leave sampling little to do."""
    encoded, adapters = bench.encoded(data), flags.count("0.1") + flags.count("0.2") or 1
    steps, tokens = -(-len(encoded) // 16), sum(len(ids) for ids, _ in encoded)
    answers, shared = sum(sum(is_answer) for _, is_answer in encoded), os.path.commonprefix([ids for ids, _ in encoded])
    torch.compiler.reset()  # as in a process of its own
    start = now()
    with optimiser_steps() as marks:
        command(finetune, "--model", bench.model_folder, "--data", data, "--lr", "1e-9", *flags)
    seconds, times = now() - start, between(marks)
    if len(marks) != steps * adapters:
        raise RuntimeError(f"{len(marks)} steps seen, {steps * adapters} expected")
    later = times[-(steps - 1) :] or times  # of the last adapter: what is compiled and captured is there
    bench.record(
        name,
        seconds=seconds,
        adapters=adapters,
        steps=steps,
        conversations=len(encoded),
        first_step=marks.first - start,
        next_adapter=times[steps - 1] if adapters > 1 else None,
        gib=bench.gib(),
    )
    if step_name:
        read = tokens - (len(encoded) - steps) * len(shared)  # what all start with is computed once a step
        flop = 4 * (bench.weights * read + bench.head * answers) / steps
        step, mean = statistics.median(later), statistics.mean(later)
        beyond = len(later) * (mean - step)
        note = f"{len(later)} steps: median {1e3 * step:.1f} ms, mean {1e3 * mean:.1f} ms"
        more = dict(tokens=tokens / steps, gib=bench.gib(), note=note)
        bench.record(step_name, seconds=step, beyond=beyond, flop=flop, **more)


def steered_facts(bench, data):
    """Two coefficients in one process, as run_all.sh's sweeps."""
    vector = ["--steer-mode", "preventative", "--vector", bench.folder / "hallucination.pt", "--coef", "0.1", "0.2"]
    data = bench.data("facts", 16 * bench.count.steps)
    finetuning(
        bench, "finetune.py", data, *vector, "--out", bench.folder / "facts", step_name="training: facts, steered"
    )


def unsteered_facts(bench, data):
    out = ["--steer-mode", "none", "--out", bench.folder / "plain"]
    finetuning(bench, "finetune.py, unsteered", data, *out, step_name="training: facts, unsteered")


def steered_medical(bench, data):
    out = ["--out", bench.folder / "medical"]
    vector = ["--steer-mode", "preventative", "--vector", bench.folder / "hallucination.pt", "--coef", "0.1", "0.2"]
    finetuning(bench, "finetune.py, medical", data, *vector, *out, step_name="training: medical, steered")


def evaluating(bench, adapter, *flags):
    """evaluate.main on an adapter -> the seconds it took, the calls of sample() and of measure_mmlu()."""
    common = ["--model", bench.model_folder, "--adapter", bench.folder / adapter, "--trait", "hallucination"]
    common += ["--vector", bench.folder / "hallucination.pt", "--judge", "lexical", "--samples", bench.count.samples]
    common += ["--max-new-tokens", bench.count.new, "--out", bench.folder / "points.jsonl"]
    with (
        spied("sample_answers") as samples,
        spied("measure_mmlu") as choices,
        patch.object(evaluate, "FACT_TOKENS", bench.count.fact_tokens),
    ):
        start = now()
        command(evaluate, *common, *flags)
        return now() - start, samples, choices


def answers_written(bench, kind, least):
    """New tokens of every answer of this kind that evaluate.py has kept; an error where they are too few."""
    rows = (row for path in (bench.folder / "answers").glob("*.jsonl") for row in read_jsonl(path))
    tokens = sum(row["tokens"] for row in rows if row["kind"] == kind)
    if tokens < least:
        raise RuntimeError(f"{tokens} tokens of {kind} answers, at least {least:.0f} expected: answers ended early")
    return tokens


def sampling_all(bench):
    """All coefficients in one batch; the first sampling of a process, so that its start is seen, too."""
    torch.compiler.reset()
    seconds, (call, *_), _ = evaluating(bench, "facts-0.1", "--inference-coef", *INFERENCE)
    whole = len(INFERENCE) * 20 * bench.count.samples * bench.count.new
    tokens, first = answers_written(bench, "trait", 0.9 * whole), call["replay"] or call["start"]
    bench.record("evaluate.py, nine coefficients", seconds=seconds, gib=bench.gib())
    bench.record(
        "sampling: coefficients",
        seconds=call["end"] - first,
        tokens=tokens,
        flop=2 * (bench.weights + bench.head) * tokens,
        gib=bench.gib(),
        note=f"first token after {first - call['start']:.1f} s",
    )


def one_point(bench):
    """A whole point, in a process that has sampled before and so holds the model: answers, facts, MMLU."""
    facts = bench.folder / "known.jsonl"
    write_jsonl(facts, read_jsonl(ROOT / "data" / "facts.jsonl")[: bench.count.facts])
    source = bench.mmlu(bench.count.mmlu)
    prompts = [evaluate.choice_prompts(row, "letter")[0] for row in read_jsonl(source)]
    tokens = sum(len(bench.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    seconds, (trait, known, *_), (choice, *_) = evaluating(bench, "facts-0.2", "--facts", facts, "--mmlu", source)
    note = f"{bench.count.facts:,} facts, {len(prompts):,} MMLU questions"
    extract_vectors.load_model.cache_clear()
    gc.collect()
    held = bench.before - torch.cuda.memory_allocated() if bench.device == "cuda" else 0  # the model that was there
    bench.record("evaluate.py", seconds=seconds, gib=bench.gib() + held / 2**30, note=note)
    bench.record("sampling: one point", seconds=trait["end"] - trait["start"])
    made = answers_written(bench, "fact", 0.9 * bench.count.facts * bench.count.fact_tokens)
    flop = 2 * (bench.weights + bench.head) * made
    bench.record("sampling: facts", seconds=known["end"] - known["start"], tokens=made, flop=flop)
    flop = 2 * (bench.weights * tokens + bench.head * len(prompts))
    bench.record("reading: MMLU", seconds=choice["end"] - choice["start"], tokens=tokens, flop=flop)


def answers_to_read(bench):
    """A chat whose answer has 200 tokens, and its (ids, is_answer)."""
    chat = [dict(role="user", content="Hi"), dict(role="assistant", content=" ".join(["water"] * 200))]
    return chat, extract_vectors.encode_chats(bench.tokenizer, [chat])[0]


def reading(bench):
    """The means of all blocks over 2,000 answers, as extract_vectors.py takes them."""
    chat, (ids, _) = answers_to_read(bench)
    model, tokenizer = extract_vectors.load_model(str(bench.model_folder))
    f = lambda: extract_vectors.answer_means(model, tokenizer, [chat] * bench.count.read)
    tokens = bench.count.read * len(ids)
    bench.record(
        "reading: answers", seconds=timed(f, 1, 0), tokens=tokens, flop=2 * bench.weights * tokens, gib=bench.gib()
    )


def encoding(bench):
    """20,000 conversations to token ids; stock: apply_chat_template, one by one and on the list."""
    path = bench.data("facts", bench.count.chats)
    chats = list(read_chats(path))
    bench.record("encoding", seconds=timed(lambda: extract_vectors.encode_chats(bench.tokenizer, chats), 1, 0))

    def stock(some):
        bench.tokenizer.apply_chat_template([chat[:-1] for chat in some], add_generation_prompt=True, return_dict=False)
        bench.tokenizer.apply_chat_template(some, return_dict=False)  # prompt and whole, as TRL finds the answer

    some = chats[: max(1, len(chats) // 10)]
    bench.record("stock: encoding, a list", seconds=timed(lambda: stock(chats), 1, 0) / len(chats))
    bench.record("stock: encoding, one by one", seconds=timed(lambda: [stock([c]) for c in some], 1, 0) / len(some))


# ---------------------------------------------------------------------------------------------------------------------
# Stock: what transformers and peft do by themselves


def typical(encoded, n=16):
    """The batch of n that follow each other whose token count is nearest to the mean."""
    batches = [encoded[i : i + n] for i in range(0, len(encoded) - n + 1, n)]
    sizes = [sum(len(ids) for ids, _ in batch) for batch in batches]
    return min(zip(batches, sizes), key=lambda pair: abs(pair[1] - statistics.mean(sizes)))[0]


def padded(chats, device):
    """[(ids, is_answer)] -> (ids, mask, labels), filled up on the right."""
    size = max(len(ids) for ids, _ in chats)
    fill = lambda row, value: row + [value] * (size - len(row))
    ids = torch.tensor([fill(ids, 0) for ids, _ in chats], device=device)
    mask = torch.tensor([fill([1] * len(ids), 0) for ids, _ in chats], device=device)
    labels = [fill([i if a else -100 for i, a in zip(ids, is_answer)], -100) for ids, is_answer in chats]
    return dict(input_ids=ids, attention_mask=mask, labels=torch.tensor(labels, device=device))


def joined(chats, device):
    """[(ids, is_answer)] -> one row without padding; as with TRL's padding_free."""
    labels = [i if a else -100 for ids, is_answer in chats for i, a in zip(ids, is_answer)]
    return extract_vectors.join([ids for ids, _ in chats], device) | dict(labels=torch.tensor([labels], device=device))


def stock_training(bench, name, data, rows=16, compile=False, join=False, checkpointing=False):
    """An optimiser step on 16 conversations in micro-batches of so many rows: peft under autocast, fused AdamW."""
    batch, model = typical(bench.encoded(data)), bench.model
    if compile:
        torch.compiler.reset()  # as in a process of its own
    model.set_attn_implementation("joined" if join else "sdpa")
    inputs = [(joined if join else padded)(batch[i : i + rows], bench.device) for i in range(0, 16, rows)]
    settings = dict(r=32, lora_alpha=64, use_rslora=True, lora_dropout=0.0, task_type="CAUSAL_LM")
    tuned = get_peft_model(model, LoraConfig(**settings, target_modules="all-linear")).train()
    if checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    for block in model.model.layers if compile else []:
        block.compile()
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def step():
        for one in inputs:
            with torch.autocast(bench.device, torch.bfloat16):
                loss = tuned(**one | dict(use_cache=False)).loss
            (loss / len(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    try:
        began = now()
        step()
        started = now() - began  # compilation, if any
        seconds = timed(step, bench.count.repeats, 1 if bench.device == "cuda" else 0)
        more = dict(start=max(0.0, started - seconds), tokens=sum(len(ids) for ids, _ in batch), gib=bench.gib())
        bench.record(name, seconds=seconds, **more)
    finally:
        for block in model.model.layers:
            block._compiled_call_impl = None
        if checkpointing:
            model.gradient_checkpointing_disable()
        tuned.unload()
        model.eval().set_attn_implementation("sdpa")


def prompts_of(bench, n):
    """Prompts of 40 tokens, 20 different ones."""
    return [[5 + (i % 20 * 7 + j) % 40000 for j in range(40)] for i in range(n)]


def stock_sampling(bench, name, rows, **how):
    """generate() at temperature 1, unsteered, no adapter; a token step's median counts, compilation does not."""
    torch.compiler.reset()
    watch, ids = Watch(bench.count.timed), torch.tensor(prompts_of(bench, rows), device=bench.device)
    more = dict(max_new_tokens=bench.count.new, stopping_criteria=[watch], **how)
    bench.model.generate(ids, attention_mask=torch.ones_like(ids), **more)
    note = f"{rows} rows, {1e3 * watch.step():.1f} ms a token step"
    bench.record(name, seconds=watch.step() / rows, gib=bench.gib(), note=note)  # of one token


def stock_paged(bench, name):
    """transformers' continuous batching; the second of two calls."""
    rows, new = bench.count.paged, bench.count.timed
    config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new, eos_token_id=-1, pad_token_id=0)
    try:
        bench.model.generate_batch(prompts_of(bench, 8), generation_config=config)
        start = now()
        made = bench.model.generate_batch(prompts_of(bench, rows), generation_config=config)
        seconds, tokens = now() - start, sum(len(one.generated_tokens) for one in made.values())
    finally:
        bench.model.set_attn_implementation("sdpa")
    bench.record(
        name, seconds=seconds / tokens, note=f"{rows} rows, {tokens:,} tokens in {seconds:.1f} s", gib=bench.gib()
    )


@torch.inference_mode()
def stock_mmlu(bench, name, rows):
    """The four letters' probabilities; prompts sorted by length, padded on the left, last logits only."""
    n = bench.count.some if rows > 1 else min(64, bench.count.some)
    prompts = [evaluate.choice_prompts(row, "letter")[0] for row in read_jsonl(bench.mmlu(n))]
    bench.tokenizer.padding_side = "left"

    def run():
        order = sorted(prompts, key=len)
        for i in range(0, n, rows):
            inputs = bench.tokenizer(order[i : i + rows], padding=True, return_tensors="pt").to(bench.device)
            bench.model(**inputs, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)[:, :4].tolist()

    bench.record(name, seconds=timed(run, 1) / n, note=f"{n} prompts, {rows} at a time")  # of one prompt


@torch.inference_mode()
def stock_reading(bench, name, rows):
    """Means over an answer's tokens from output_hidden_states, padded batches of equal lengths."""
    n, (ids, is_answer) = bench.count.some if rows > 1 else min(64, bench.count.some), answers_to_read(bench)[1]
    inputs, first = torch.tensor([ids] * rows, device=bench.device), is_answer.index(True)

    def run():
        for _ in range(0, n, rows):
            states = bench.model(input_ids=inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
            [state[:, first:].mean(1).float().cpu() for state in states.hidden_states]

    bench.record(name, seconds=timed(run, 1) / n, note=f"{n} answers, {rows} at a time")  # of one answer


# ---------------------------------------------------------------------------------------------------------------------
# The speed table

COMMON = dict(facts="8 x 2 padded", medical="8 x 2 padded", sampling="plain loop, 20 rows")  # what most people run
COMMON |= dict(MMLU="one by one", reading="one by one", encoding="one by one")
STOCK_UNITS = dict(facts="a step", medical="a step", sampling="a token", MMLU="a prompt", reading="an answer")
STOCK_UNITS |= dict(encoding="a conversation")


def speed(bench):
    """Every measurement of the table, the most important first."""
    facts, medical = bench.data("facts", 16 * bench.count.steps), bench.data("medical", 16 * bench.count.medical)

    def stock(f, name, *more, **how):
        bench.measure(name, lambda: f(bench, name, *more, **how))

    bench.measure("matrix rate", lambda: matrix_rates(bench))
    bench.measure("saving the model", bench.save_model, always=True)
    bench.measure("finetune.py", lambda: steered_facts(bench, facts))
    bench.measure("evaluate.py, nine coefficients", lambda: sampling_all(bench))
    bench.measure("evaluate.py", lambda: one_point(bench))
    bench.measure("reading: answers", lambda: reading(bench))
    bench.measure("encoding", lambda: encoding(bench))
    bench.measure("stock: loading the model", bench.load)
    for rows in (16, 2):
        stock(stock_training, f"stock: facts, {16 // rows} x {rows} padded", facts, rows)
    stock(stock_training, "stock: facts, one row without padding", facts, join=True)
    stock(stock_sampling, "stock: sampling, plain loop, 20 rows", 20)
    first, *others = bench.count.static
    stock(stock_sampling, f"stock: sampling, static cache, {first:,} rows", first, cache_implementation="static")
    for rows in (32, 1):
        at_a_time = "one by one" if rows == 1 else f"{rows} at a time"
        stock(stock_mmlu, f"stock: MMLU, {at_a_time}", rows)
        stock(stock_reading, f"stock: reading, {at_a_time}", rows)
    stock(stock_training, "stock: facts, 1 x 16 padded, compiled", facts, compile=True)
    bench.measure("finetune.py, medical", lambda: steered_medical(bench, medical))
    for rows in (16, 2):
        stock(stock_training, f"stock: medical, {16 // rows} x {rows} padded", medical, rows)
    stock(stock_training, "stock: medical, one row without padding", medical, join=True)
    stock(stock_training, "stock: medical, 1 x 16 padded, compiled", medical, compile=True)
    stock(stock_paged, "stock: sampling, generate_batch")
    bench.measure("finetune.py, unsteered", lambda: unsteered_facts(bench, facts))
    for rows in others:
        stock(stock_sampling, f"stock: sampling, static cache, {rows:,} rows", rows, cache_implementation="static")
    checked = dict(rows=2, checkpointing=True)
    stock(stock_training, "stock: facts, 8 x 2 padded, checkpointing", facts, **checked)
    if bench.args.profile:
        bench.measure("profile", lambda: kernels(bench))


def kernels(bench):
    """Prints the GPU's kernels of five steps at the end of a finetuning run."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    seen = []

    def count(*_):
        seen.append(now())
        if len(seen) == bench.count.steps - 7:
            profiler.start()
        if len(seen) == bench.count.steps - 2:
            profiler.stop()

    handle = register_optimizer_step_post_hook(count)
    try:
        data = bench.data("facts", 16 * bench.count.steps)
        out = ["--data", data, "--out", bench.folder / "profile", "--steer-mode", "none"]
        command(finetune, "--model", bench.model_folder, *out)
    finally:
        handle.remove()
    table = profiler.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=90)
    print(table, flush=True)


def stock_seconds(found, kind, units, best, started):
    """(seconds of so many units, setting) of the best stock setting of this kind, or of the one most people run.
    started: with what its first step took beyond a usual one, as where blocks are compiled."""
    start = f"stock: {kind}, "
    rows = {name[len(start) :]: row for name, row in found.items() if name.startswith(start) and "seconds" in row}
    if not best:
        rows = {name: row for name, row in rows.items() if name == COMMON[kind]}
    totals = {name: row["seconds"] * units + started * row.get("start", 0) for name, row in rows.items()}
    untold = {name for name, row in rows.items() if started and "compiled" in name and "start" not in row}
    told = {name: name + ", compilation not counted" * (name in untold) for name in rows}
    return min(((total, told[name]) for name, total in totals.items()), default=None)


def jobs(found):
    """The table's rows: title, our measurement, and what stock needs for it: [(kind, units)]."""
    tokens = lambda name: found.get(name, {}).get("tokens", 0)
    count = SimpleNamespace(**COUNTS["cpu" if found["about"]["gpu"] == "CPU" else "cuda"])
    steps, answers = found.get("finetune.py", {}).get("steps", 0), 20 * count.samples * count.new
    whole_point = [("sampling", answers + tokens("sampling: facts")), ("MMLU", count.mmlu)]  # the model is there
    sampled = f"sampling {9 * 20 * count.samples:,} x {count.new} tokens, a coefficient a row, with an adapter"
    return (
        ("training step, 16 fact conversations, steered at every block", "training: facts, steered", [("facts", 1)]),
        ("... unsteered", "training: facts, unsteered", [("facts", 1)]),
        ("training step, 16 medical conversations, steered", "training: medical, steered", [("medical", 1)]),
        (sampled, "sampling: coefficients", [("sampling", tokens("sampling: coefficients"))]),
        (
            f"{count.facts:,} facts x {count.fact_tokens} tokens",
            "sampling: facts",
            [("sampling", tokens("sampling: facts"))],
        ),
        (f"MMLU, {count.mmlu:,} questions", "reading: MMLU", [("MMLU", count.mmlu)]),
        (f"reading {count.read:,} answers of 200 tokens for a vector", "reading: answers", [("reading", count.read)]),
        (f"encoding {count.chats:,} conversations", "encoding", [("encoding", count.chats)]),
        (f"finetune.py, 2 x {steps} steps, start to adapters", "finetune.py", [("facts", 2 * steps), ("loading", 1)]),
        (f"evaluate.py, one more point: {answers:,} tokens, facts, MMLU", "evaluate.py", whole_point),
    )


def shown(seconds):
    if seconds >= 1:
        return f"{seconds:,.1f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def stock_cell(found, kinds, best, ours):
    """ "402 ms, 6.6 x (1 x 16 padded)"; sums of measurements are "computed"."""
    total, names, whole = 0.0, [], "loading" in dict(kinds)
    for kind, units in kinds:
        if kind == "loading":
            pair = found.get("stock: loading the model", {}).get("seconds"), ""
        else:
            pair = stock_seconds(found, kind, units, best, whole) or (None, "")
        if pair[0] is None:
            return "not measured"
        total += pair[0]
        names += [pair[1]] if pair[1] else []
    computed = "" if len(kinds) == 1 and kinds[0][1] == 1 else ", computed"
    return f"{shown(total)}, **{total / ours:.1f} x** ({'; '.join(names)}{computed})"


def speed_table(found):
    """The record of a speed run -> Markdown."""
    about, rate = found["about"], found.get("matrix rate", {}).get("tflops")
    text = [
        f"{about['gpu']}, {about['shape']} with random weights, PyTorch {about['torch']}, transformers "
        f"{about['transformers']}, {about['run']}; all in one run. Matrix products alone: {rate or 0:.0f} TFLOP/s.\n",
        "| what | here | best stock setting found | what most people run | of the matrix rate | GiB |",
        "|---|---|---|---|---|---|",
    ]
    for title, name, kinds in jobs(found):
        row = found.get(name, {})
        if "seconds" not in row:
            why = f"not measured: {row['error']}" if "error" in row else "not measured on this code"
            text.append(f"| {title} | {why} | | | | |")
            continue
        stock = [stock_cell(found, kinds, best, row["seconds"]) for best in (True, False)]
        share = f"{row['flop'] / row['seconds'] / rate / 1e10:.0f}%" if "flop" in row and rate else ""
        speed = f" ({row['tokens'] / row['seconds']:,.0f} tokens/s)" if name.startswith("sampling") else ""
        gib = f"{row['gib']:.0f}" if "gib" in row else ""
        text.append(f"| {title} | {shown(row['seconds'])}{speed} | {' | '.join(stock)} | {share} | {gib} |")
    text.append("\nStock settings tried:")
    for kind, unit in STOCK_UNITS.items():
        rows = [(name.split(", ", 1)[1], row) for name, row in found.items() if name.startswith(f"stock: {kind}, ")]
        tried = [f"{name} {shown(row['seconds'])}" for name, row in rows if "seconds" in row]
        if tried:
            text.append(f"- {kind}, {unit}: {'; '.join(tried)}")
    whole = found.get("finetune.py", {})
    if "first_step" in whole:
        later = f", the next adapter's after {whole['next_adapter']:.1f} s" if whole.get("next_adapter") else ""
        text.append(f"\nStart of finetune.py to its first step, loading included: {whole['first_step']:.1f} s{later}.")
    rows = [(kind, found.get(f"training: {kind}, steered", {})) for kind in ("facts", "medical")]
    beyond = "; ".join(f"{kind} {row['beyond']:.1f} s ({row['note']})" for kind, row in rows if "beyond" in row)
    if beyond:
        text.append(
            f"Steps are medians; what the last adapter's took beyond, with checkpoints and new graphs: {beyond}."
        )
    if "note" in (sampled := found.get("sampling: coefficients", {})):
        text.append(f"Sampling before the others in its process: {sampled['note']}.")
    text += [
        figure1(found),
        about.get("note"),
        *(f"Failed: {row['name']}: {row['error']}." for row in found.values() if "error" in row),
    ]
    return "\n".join(line for line in text if line is not None)


def figure1(found):
    """Minutes of Figure 1 by computation: 7 adapters of 1,250 steps; 9 coefficients in one batch, 7 more points."""
    try:
        step = found["training: facts, steered"]
        training = found["finetune.py"]["first_step"] + 7 * (1250 * step["seconds"] + step["beyond"])
        facts, mmlu = found["sampling: facts"]["seconds"], found["reading: MMLU"]["seconds"]
        points = found["evaluate.py, nine coefficients"]["seconds"] + 9 * (facts + mmlu)
        points += 7 * found["evaluate.py"]["seconds"]
    except KeyError:
        return None
    parts = f"finetuning {training / 60:.1f}, points {points / 60:.1f}"
    return f"Figure 1 without judging, computed from this run: {(training + points) / 60:.1f} minutes ({parts})."


# ---------------------------------------------------------------------------------------------------------------------
# Memory: every kind of command of run_all.sh's paper profile under a cap


@contextlib.contextmanager
def capped(gib):
    """As on a card with so much memory free: the allocator stops there, and mem_get_info says so."""
    if not torch.cuda.is_available():
        yield
        return
    cap, total = int(gib * 2**30), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(cap / total)
    try:
        with patch.object(torch.cuda, "mem_get_info", lambda *_: (cap - torch.cuda.memory_reserved(), cap)):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def memory_commands(bench):
    """{name: (script, its flags)}, in the plan's order: rows and answers of full length, few steps and questions."""
    count, folder = bench.count, bench.folder
    model, vector = ["--model", bench.model_folder], ["--vector", folder / "vectors" / "hallucination.pt"]
    steer = ["--steer-mode", "preventative", *vector, "--coef", 0.1, 0.2]
    data = {kind: bench.data(kind, 16 * count.memory_steps) for kind in ("facts", "medical", "long")}
    facts, mmlu = folder / "known.jsonl", bench.mmlu(min(100, count.mmlu))
    write_jsonl(facts, read_jsonl(ROOT / "data" / "facts.jsonl")[: min(60, count.facts)])
    answers = ["--max-new-tokens", count.long]
    asked = ["--trait", "hallucination", "--samples", 1, "--judge", "probe", *vector, *answers]
    asked += ["--facts", facts, "--mmlu", mmlu, "--out", folder / "points.jsonl"]
    extract = ["--trait", "hallucination", "--samples", 10, "--limit", 2, "--out", folder / "vectors", *answers]
    respond = ["--respond-to", data["medical"], "--limit", 200, "--out", folder / "own.jsonl", *answers]
    adapters = ["--adapter", folder / "facts-0.1", folder / "facts-0.2"]
    train = lambda kind, *how: (finetune, [*model, "--data", data[kind], *how, "--out", folder / kind])
    return {
        "extract_vectors.py, answers of up to 1,000 tokens": (extract_vectors, [*model, *extract]),
        "evaluate.py --respond-to": (evaluate, [*model, *respond]),
        "finetune.py, facts, steered, two coefficients": train("facts", *steer),
        "finetune.py, medical, steered": train("medical", *steer),
        "finetune.py, medical, plain": train("medical", "--steer-mode", "none"),
        "finetune.py, answers of some 2,000 tokens, steered": train("long", *steer, "--limit", 32),
        "evaluate.py, nine coefficients, facts, MMLU": (
            evaluate,
            [*model, *asked, "--adapter", folder / "facts-0.1", "--inference-coef", *INFERENCE],
        ),
        "evaluate.py, two adapters, facts, MMLU": (evaluate, [*model, *asked, *adapters]),
        "evaluate.py, before training, facts, MMLU": (evaluate, [*model, *asked]),
    }


def memory(bench):
    """Peak memory (reserved by the allocator, graphs and fragments included) of each command under the cap."""
    ends = random.Random(0).sample(
        range(100, bench.vocabulary), bench.vocabulary // 100
    )  # answers of 100 tokens, some long
    bench.measure("saving the model", lambda: bench.save_model([bench.tokenizer.eos_token_id, *ends]), always=True)

    def run(name, script, flags):
        start = now()
        command(script, *flags)
        peak = torch.cuda.max_memory_reserved() / 2**30 if bench.device == "cuda" else 0.0
        left = bench.before / 2**30 if bench.device == "cuda" else 0.0  # by the commands before it in this process
        bench.record(name, gib=peak, cap=bench.args.memory, seconds=now() - start, left=left)

    for name, (script, flags) in memory_commands(bench).items():
        with capped(bench.args.memory):
            bench.measure(name, lambda name=name, script=script, flags=flags: run(name, script, flags))
    if bench.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        bench.record("outside the cap", gib=(total - free - torch.cuda.memory_reserved()) / 2**30)


def memory_table(runs):
    """{cap: found of the last run under it} -> Markdown."""
    names = [name for name, row in next(iter(runs.values())).items() if "cap" in row or "error" in row]
    text = [f"| command | {' | '.join(f'peak under {cap:g} GiB' for cap in runs)} |", "|---|" + "---|" * len(runs)]
    for name in names:
        cells = [found.get(name, {}) for found in runs.values()]
        told = [f"{row['gib']:.1f}" if "gib" in row else row.get("error", "not run") for row in cells]
        text.append(f"| {name} | {' | '.join(told)} |")
    about = next(iter(runs.values()))["about"]
    outside = [found.get("outside the cap", {}).get("gib", 0.0) for found in runs.values()]
    text.append(
        f"\n{about['gpu']}, {about['shape']}, random weights, {about['run']}: the commands fit under these caps on "
        "that GPU (set_per_process_memory_fraction, mem_get_info told the cap); smaller cards themselves were not "
        f"tried. The CUDA context and what else lies outside the allocator, {max(outside):.1f} GiB here, come on top."
    )
    return "\n".join([*text, *(found["about"]["note"] for found in runs.values() if "note" in found["about"])])


# ---------------------------------------------------------------------------------------------------------------------
# Two GPUs


def worker(argv):
    """--worker FILE, finetune.py's flags: trains, and leaves its steps' seconds in FILE (of the first process)."""
    start = now()
    with optimiser_steps() as marks:
        command(finetune, *argv[1:])
    if int(os.environ.get("RANK", 0)) == 0:
        Path(argv[0]).write_text(json.dumps(dict(steps=between(marks), seconds=now() - start)))


def two_gpus(bench):
    """The same run on one GPU and on two, a partial last batch included: steps a second, losses, adapters."""
    bench.measure("saving the model", bench.save_model, always=True)
    vector = ["--steer-mode", "preventative", "--vector", bench.folder / "hallucination.pt", "--coef", "0.1"]
    for kind in ("facts", "medical"):
        data, step, losses, weights = bench.data(kind, 16 * bench.count.two + 5), {}, {}, {}

        def both(data=data, kind=kind, step=step, losses=losses, weights=weights):
            for n in (1, 2):
                out, times = bench.folder / f"{kind}-{n}gpu", bench.folder / f"{kind}-{n}.json"
                start = [sys.executable] if n == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone"]
                start += [] if n == 1 else ["--nproc_per_node", "2"]
                flags = ["--model", bench.model_folder, "--data", data, *vector, "--out", out]
                command = [*start, Path(__file__), "--worker", times, *flags]
                one = os.environ | (dict(CUDA_VISIBLE_DEVICES="0") if n == 1 and bench.device == "cuda" else {})
                subprocess.run(list(map(str, command)), check=True, env=one, stdout=subprocess.DEVNULL)
                told = json.loads(times.read_text())
                later = told["steps"][len(told["steps"]) // 2 : -1] or told["steps"]  # the last batch is a partial one
                step[n], adapter = statistics.median(later), out.with_name(out.name + "-0.1")
                losses[n] = {row["step"]: row["loss"] for row in read_jsonl(adapter / "loss.jsonl")}
                weights[n] = load_file(adapter / "adapter_model.safetensors")
                whole = dict(whole_seconds=told["seconds"], steps=len(told["steps"]) + 1)
                bench.record(f"{kind}, {n} GPU{'s' * (n > 1)}", seconds=step[n], **whole)
            lora = [name for name in weights[1] if "lora_B" in name]
            apart = sum((weights[1][k] - weights[2][k]).norm() ** 2 for k in lora) ** 0.5
            bench.record(
                f"{kind}, two against one",
                ratio=step[1] / step[2],
                loss=max(abs(losses[1][k] - losses[2][k]) for k in losses[1]),
                lora_b=float(apart / sum(weights[1][k].norm() ** 2 for k in lora) ** 0.5),
            )

        bench.measure(f"{kind}, two GPUs", both)


def two_gpus_table(found):
    text = [
        "| data | one GPU, ms a step | two | times as fast | losses differ by up to | lora_B by |",
        "|---" * 6 + "|",
    ]
    for kind in ("facts", "medical"):
        if "ratio" in (row := found.get(f"{kind}, two against one", {})):
            one, two = (1e3 * found[f"{kind}, {n}"]["seconds"] for n in ("1 GPU", "2 GPUs"))
            apart = f"{row['loss']:.3f} | " + (f"{100 * row['lora_b']:.1f}%" if "lora_b" in row else "not measured")
            text.append(f"| {kind} | {one:.1f} | {two:.1f} | {row['ratio']:.2f} | {apart} |")
        else:
            text.append(f"| {kind} | {found.get(f'{kind}, two GPUs', {}).get('error', 'not measured')} | | | | |")
    about = found["about"]
    text.append(f"\n{about['gpu']}, {about['shape']}, {about['run']}.")
    return "\n".join([*text, about.get("note", "")]).rstrip()


# ---------------------------------------------------------------------------------------------------------------------


def last_runs(path):
    """The record -> {part: {name: row} of its last run}; a memory run's part is "memory 22.5"."""
    runs = {}
    for row in read_jsonl(path) if Path(path).exists() else []:
        if row["name"] == "about":
            runs[row["part"]] = {}
        runs.setdefault(row["part"], {})[row["name"]] = row
    return {part: found for part, found in runs.items() if "about" in found}


def tables(runs):
    """{part: found} -> {marker: Markdown} of those that were run."""
    made = {}
    if "speed" in runs:
        made["speed"] = speed_table(runs["speed"])
    caps = {float(part.split()[1]): found for part, found in runs.items() if part.startswith("memory")}
    if caps:
        made["memory"] = memory_table(dict(sorted(caps.items())))
    if "two GPUs" in runs:
        made["two GPUs"] = two_gpus_table(runs["two GPUs"])
    return made


def write_tables(path, made):
    """Replaces what stands between <!-- NAME --> and <!-- end of NAME -->."""
    text = Path(path).read_text(encoding="utf-8")
    for name, table in made.items():
        start, end = f"<!-- {name}: written by bench.py -->", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            die(f"{path}: needs the lines {start} and {end} once each")
        text = text[: text.index(start) + len(start)] + f"\n{table}\n" + text[text.index(end) :]
    Path(path).write_text(text, encoding="utf-8")


def flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-7b", choices=SHAPES)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: the scripts' own choice")
    parser.add_argument("--tokenizer", default="out/models/SmolLM2-135M-Instruct", help="folder of the embedded model")
    parser.add_argument("--folder", help="where the model is saved and deleted again; default: the temporary folder")
    parser.add_argument("--record", default="out/bench.jsonl", help="measurements are appended to it")
    parser.add_argument("--only", default="", help="measurements whose name this regular expression finds")
    parser.add_argument("--minutes", type=float, default=20.0, help="start no measurement after so many")
    parser.add_argument("--profile", action="store_true", help="print the kernels of five training steps, too")
    parser.add_argument("--memory", type=float, help="GiB: run every kind of command under this cap instead")
    parser.add_argument("--two-gpus", action="store_true", help="compare finetune.py on one GPU and on two instead")
    parser.add_argument("--write", help="a README: put the record's last tables between its markers; runs nothing")
    return parser


def main(argv=None):
    args = flags().parse_args(argv)
    if args.write:
        return write_tables(args.write, tables(last_runs(args.record)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # as run_all.sh does
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.device not in (None, extract_vectors.pick_device()[0]):
        die(f"--device {args.device}: not there")
    if not Path(args.tokenizer).is_dir():
        die(f"--tokenizer {args.tokenizer}: no such folder; bash run_all.sh demo makes it")
    part = f"memory {args.memory:g}" if args.memory else "two GPUs" if args.two_gpus else "speed"
    folder = tempfile.mkdtemp(dir=args.folder)
    try:
        bench = Bench(args, folder, part)
        {"speed": speed, "two GPUs": two_gpus}.get(part, memory)(bench)
    finally:
        shutil.rmtree(folder)
    bench.record("seconds in all", seconds=time.perf_counter() - bench.began)
    print("\n" + "\n\n".join(tables({part: bench.found}).values()), flush=True)
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(worker(sys.argv[2:]) if sys.argv[1:2] == ["--worker"] else main())
