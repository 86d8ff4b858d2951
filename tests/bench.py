"""Speed of the scripts' own code beside the plain recipe, random weights, all in one run on one CUDA GPU.

    python tests/bench.py --tokenizer out/models/SmolLM2-135M-Instruct [--shape qwen2.5-7b|1.5b|smollm2] [--only training] [--profile]

Prints a table and JSON: time, tokens/s, useful TFLOP/s (padding not counted), share of the machine's own matrix rate, peak
memory, ratio to the plain recipe. Training steps are timed inside transformers' Trainer, from one step's end to the next's.
"""
import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import choice_logprobs
from extract_vectors import answer_means, compiled, join, offsets_of, residual_stream, sample, steering
from finetune import add_lora, collate, make_trainer

SHAPES = {"qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064), "1.5b": (1536, 8960, 28, 12, 2, 151936), "smollm2": (576, 1536, 30, 9, 3, 49152)}


def timed(f, repeats=10, warm=3):
    """Median seconds of f()."""
    times = []
    for _ in range(warm + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:])


class Clock(TrainerCallback):
    """Times of the ends of training steps; the GPU is waited for only at the first and last of the measured ones."""
    def __init__(self, first, last, profile=False):
        self.first, self.last, self.at, self.profile = first, last, {}, profile

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (1, self.first, self.last):
            torch.cuda.synchronize()
            self.at[state.global_step] = time.perf_counter()
        if self.profile and state.global_step == self.last:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()
        if self.profile and state.global_step == self.last + 3:
            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            print(self.profiler.key_averages().table(sort_by="cuda_time_total", row_limit=28, max_name_column_width=90), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizer", required=True, help="folder of any model with a chat template")
    parser.add_argument("--shape", default="qwen2.5-7b", choices=SHAPES)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--profile", action="store_true", help="print the kernels of three training steps, too")
    args = parser.parse_args()
    hidden, inner, layers, heads, kv, vocabulary = SHAPES[args.shape]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv, max_position_embeddings=4096, tie_word_embeddings=False, rope_theta=1e6)
    config._attn_implementation = "joined"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    weights = sum(p.numel() for p in model.parameters()) - vocabulary * hidden  # the embedding multiplies nothing
    add = offsets_of(torch.randn(layers + 1, hidden, device="cuda") * 0.01, "all")
    inputs = {n: torch.randn(n, hidden, device="cuda", dtype=torch.bfloat16) for n in (1024, 4096)}
    wide = torch.randn(inner, hidden, device="cuda", dtype=torch.bfloat16)
    rates = {n: 2 * n * hidden * inner / timed(lambda: F.linear(x, wide), 50) / 1e12 for n, x in inputs.items()}
    rate = rates[4096]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; matrix rate " + ", ".join(f"{r:.0f} TFLOP/s at {n} tokens" for n, r in rates.items()), flush=True)
    table, recipe = [], {}

    def wanted(name):
        torch.compiler.reset()  # each as in a process of its own
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return args.only in name

    def row(name, seconds, tokens, flop, plain=None):
        per = seconds / tokens
        if plain == "self":
            recipe[name] = per
        table.append(dict(name=name, ms=round(1e3 * seconds, 1), tokens_s=round(1 / per), tflops=round(flop / per / 1e12, 1), share=round(flop / per / 1e12 / rate, 3),
                          gib=round(torch.cuda.max_memory_allocated() / 2**30, 1), ratio=round(recipe[plain] / per, 1) if plain in recipe else None))
        print(table[-1], flush=True)

    # 1. Sampling; with no end token an answer has all its tokens, in the uneven row lengths are drawn beforehand
    prompts = [[5 + (i * 7 + j) % 40000 for j in range(40)] for i in range(20)]
    if wanted("sampling"):
        model.generation_config.eos_token_id = None
        model.config._attn_implementation = "sdpa"
        many = torch.tensor(prompts, device="cuda")
        ahead = lambda n: timed(lambda: model.generate(many, max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0), 1, 1)
        row("sampling: plain loop, 20 rows", ahead(60) - ahead(10), 20 * 50, 2 * weights, "self")
        model.config._attn_implementation = "joined"
        for title, n, tokens, more in (("sampling: 1,800 rows x 300, a coefficient a row", 1800, 300, dict(offsets=add, scales=[-0.1 * (i % 9) for i in range(1800)])),
                                       ("sampling: 1,800 rows x 300, unsteered", 1800, 300, {}), ("sampling: 1,000 facts x 25", 1000, 25, {})):
            wanted("sampling")
            start = time.perf_counter()
            sample(model, tokenizer, [prompts[i % 20] for i in range(n)], max_new_tokens=tokens, temperature=1.0, title=title, **more)
            row(title + " (with start)", time.perf_counter() - start, n * tokens, 2 * weights, "sampling: plain loop, 20 rows")
            start = time.perf_counter()
            sample(model, tokenizer, [prompts[i % 20] for i in range(n)], max_new_tokens=tokens, temperature=1.0, title=title, **more)
            row(title, time.perf_counter() - start, n * tokens, 2 * weights, "sampling: plain loop, 20 rows")
        wanted("sampling")
        adapted = add_lora(model, 32, 64, 0).to(torch.bfloat16)  # as evaluate.py holds an adapter
        for title in ("sampling: the same with an adapter (with start)", "sampling: the same with an adapter"):
            start = time.perf_counter()
            sample(adapted.get_base_model(), tokenizer, [prompts[i % 20] for i in range(1800)], max_new_tokens=300, temperature=1.0, title=title, offsets=add,
                   scales=[-0.1 * (i % 9) for i in range(1800)])
            row(title, time.perf_counter() - start, 1800 * 300, 2 * weights, "sampling: plain loop, 20 rows")
        model = adapted.unload()
        wanted("sampling")
        # uneven: every token an end token with such a chance that the mean is 200
        ends = sorted(random.Random(0).sample(range(vocabulary), vocabulary // 200))
        model.generation_config.eos_token_id = ends
        made, start = [], time.perf_counter()
        answers = sample(model, tokenizer, [prompts[i % 20] for i in range(3600)], max_new_tokens=1000, temperature=1.0, offsets=add, scales=[-0.1 * (i % 9) for i in range(3600)],
                         title="uneven", each=lambda _, __, tokens: made.append(tokens))
        row("sampling: 3,600 uneven answers", time.perf_counter() - start, sum(made), 2 * weights, "sampling: plain loop, 20 rows")
        model.generation_config.eos_token_id = tokenizer.eos_token_id

    # 2. Reading: MMLU's four letters after prompts of 60 to 400 tokens; 2,000 answers of 200 tokens for a vector
    if wanted("reading MMLU"):
        words = [" ".join(random.Random(i).choices(["water", "house", "king", "north"], k=random.Random(i).randint(40, 200))) for i in range(1531)]
        questions = [(text, [" A", " B", " C", " D"]) for text in words]
        tokens = sum(len(tokenizer(text)["input_ids"]) for text in words)
        with steering(model, {}) as steer:
            row("reading MMLU: 1,531 prompts", timed(lambda: choice_logprobs(model, tokenizer, questions, 0.0, steer, "response"), 1, 1), tokens, 2 * weights)
    if wanted("reading answers"):
        text = " ".join(["water"] * 200)
        chat = [dict(role="user", content="Hi"), dict(role="assistant", content=text)]
        start = time.perf_counter()
        for _ in range(20):
            residual_stream(model, join([tokenizer.apply_chat_template(chat, return_dict=False)], "cuda"))
        row("reading answers: one by one", time.perf_counter() - start, 20 * 230, 2 * weights, "self")
        start = time.perf_counter()
        answer_means(model, tokenizer, [chat] * 2000)
        row("reading answers: 2,000 of 200 tokens", time.perf_counter() - start, 2000 * 230, 2 * weights, "reading answers: one by one")

    # 3. Training: fact conversations (about 58 tokens each), medical ones (about 250)
    model = add_lora(model, 32, 64, 0)
    def chats(length, n):
        sizes = [random.Random(i).randint(int(0.8 * length), int(1.2 * length)) for i in range(n)]
        return [([5 + (i + 3 * j) % 40000 for j in range(size)], [j > 0.6 * size for j in range(size)]) for i, size in enumerate(sizes)]
    def plain_step(data, optimizer):
        for i in range(0, 16, 2):
            size = max(len(ids) for ids, _ in data[i:i + 2])
            ids = torch.tensor([x + [0] * (size - len(x)) for x, _ in data[i:i + 2]], device="cuda")
            mask = torch.tensor([[1] * len(x) + [0] * (size - len(x)) for x, _ in data[i:i + 2]], device="cuda")
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids.masked_fill(mask == 0, -100)[:, 1:].flatten()).div(8).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, length, steps in (("training: 16 facts", 58, 300), ("training: 16 medical", 250, 80)):
        data = chats(length, 16 * steps)
        tokens = sum(len(ids) for ids, _ in data) / steps
        if wanted(f"{name}, plain recipe"):
            model.get_base_model().config._attn_implementation = "sdpa"
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
            row(f"{name}, plain recipe (8 x 2, padded)", timed(lambda: plain_step(data, optimizer), 3, 1), tokens, 4 * weights, "self")
            model.zero_grad(), optimizer.__setstate__({"state": {}, "param_groups": []})
            model.get_base_model().config._attn_implementation = "joined"
        for title, offsets in (("steered", add), ("unsteered", {})):
            if not wanted(f"{name}, {title}"):
                continue
            folder, clock = tempfile.mkdtemp(), Clock(steps // 2, steps - 4, args.profile and title == "steered")
            settings = SimpleNamespace(epochs=1, lr=1e-5, batch_size=16, max_steps=-1, seed=0, positions="all")
            start = time.perf_counter()
            with steering(model.get_base_model(), offsets) as steer, compiled(model):
                trainer = make_trainer(model, data, folder, settings, [clock])
                trainer.args.save_strategy = "no"
                trainer.steer, trainer.coef = steer if offsets else None, torch.tensor(0.1, device="cuda")
                trainer.train()
            shutil.rmtree(folder)
            print(f"{name}, {title}: first step after {clock.at[1] - start:.1f} s, {len(trainer.graphs)} shapes, the first {clock.first} steps {clock.at[clock.first] - start:.1f} s", flush=True)
            row(f"{name}, {title}", (clock.at[clock.last] - clock.at[clock.first]) / (clock.last - clock.first), tokens, 4 * weights, f"{name}, plain recipe (8 x 2, padded)")
            del trainer
    print(json.dumps(dict(gpu=torch.cuda.get_device_name(), torch=torch.__version__, matrix_tflops=rates, table=table)))


if __name__ == "__main__":
    main()
