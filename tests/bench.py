"""Speed of the scripts' own code beside the plain recipe: random weights, every row in one run on one GPU, in about 6 minutes.

    python tests/bench.py [--shape qwen2.5-7b|1.5b|smollm2] [--device cuda] [--only training] [--profile]

Prints a Markdown table and, as the last line, JSON. A row that fails shows its error and the others go on (exit code 1).
Training steps are timed inside transformers' Trainer, by an event at each one's end; tokens/s of sampling count from the
first 16 tokens on. FLOPs: 2 a weight and real token, 4 in training (frozen weights get no gradients), padding not counted.
On a CPU the counts are tiny: that tries the code, the numbers mean nothing.
"""

import argparse
import contextlib
import gc
import json
import os
import random
import statistics
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
from transformers import AutoTokenizer, ProgressCallback, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate import choice_logprobs
from extract_vectors import (
    STEPS,
    Sampler,
    answer_means,
    compiled,
    join,
    offsets_of,
    pick_device,
    residual_stream,
    sample,
    steering,
)
from finetune import FILL, add_lora, collate, make_trainer
from make_facts import die

# hidden, inner, blocks, heads, key-value heads, vocabulary
SHAPES = {
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "smollm2": (576, 1536, 30, 9, 3, 49152),
    "tiny": (64, 128, 2, 4, 2, 49152),
}
COUNTS = {
    "cuda": dict(
        rows=1800,
        new=300,
        point=200,
        facts=1000,
        uneven=3600,
        longest=1000,
        mmlu=1531,
        read=2000,
        fact_steps=200,
        medical_steps=62,
    ),
    "cpu": dict(rows=4, new=9, point=2, facts=2, uneven=6, longest=9, mmlu=2, read=2, fact_steps=2, medical_steps=2),
}
WINDOW = 7  # looks of 16 decoding steps each, from the second on, that steered, unsteered and adapted sampling are compared over


def now():
    """Seconds, when the GPU is done with what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(f, repeats=10, warm=3):
    """Median seconds of f()."""
    times = []
    for _ in range(warm + repeats):
        start = now()
        f()
        times.append(now() - start)
    return statistics.median(times[warm:])


class Enough(Exception):
    """Ends a sampling run of which only the first steps are wanted."""


class Clock(TrainerCallback):
    """Where the GPU is at the end of every training step; nothing waits for it but after the first step."""

    stop = 0  # ends the run after this many steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.ends, self.graphs = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else time.perf_counter())
        if torch.cuda.is_available():
            self.ends[-1].record()
        graphs = getattr(self.trainer, "graphs", {}).values()
        self.graphs.append((len(graphs), sum(graph is not None for graph in graphs)))  # shapes seen, and captured
        if state.global_step == 1:
            self.first = now()
        control.should_training_stop |= state.global_step == self.stop

    def seconds(self):
        """Of every step but the first."""
        now()
        return [
            a.elapsed_time(b) / 1e3 if torch.cuda.is_available() else b - a for a, b in zip(self.ends, self.ends[1:])
        ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-7b", choices=SHAPES)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: the scripts' own choice")
    parser.add_argument(
        "--tokenizer", default="out/models/SmolLM2-135M-Instruct", help="folder of any model with a chat template"
    )
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--profile", action="store_true", help="print the kernels of five training steps, too")
    args, began = parser.parse_args(), time.perf_counter()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device, dtype = pick_device()
    if args.device not in (None, device):
        die(f"--device {args.device}: not there")
    if not Path(args.tokenizer).is_dir():
        die(f"--tokenizer {args.tokenizer}: no such folder; bash run_all.sh demo makes it")
    count, (hidden, inner, layers, heads, kv, vocabulary) = SimpleNamespace(**COUNTS[device]), SHAPES[args.shape]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rope_theta=1e6,
    )
    config._attn_implementation = "joined"
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    weights = sum(p.numel() for p in model.parameters()) - vocabulary * hidden  # the embedding multiplies nothing
    add = offsets_of(torch.randn(layers + 1, hidden, device=device) * 0.01, "all")
    wide = torch.randn(inner, hidden, device=device, dtype=dtype)
    rates = {}  # of ten products in a row, TFLOP/s
    for n in (1024, 4096):
        x = torch.randn(n, hidden, device=device, dtype=dtype)
        rates[n] = 20 * n * hidden * inner / timed(lambda: [F.linear(x, wide) for _ in range(10)]) / 1e12
    about = dict(
        gpu=torch.cuda.get_device_name() if device == "cuda" else "CPU",
        shape=args.shape,
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__,
        transformers=transformers.__version__,
        matrix_tflops=rates,
    )
    print(about, flush=True)
    done = {}  # name -> its row

    def row_of(seconds, tokens, flop=2 * weights, **more):
        return dict(seconds=seconds, tokens_s=tokens / seconds, flop=flop, **more)

    def measure(name, f, beside=(), fresh=True):
        """A row from f() -> dict(seconds, tokens_s, flop a token, note, plain: its plain recipe's name, and what is wanted later).
        beside: (name of a row, key, words): what share of that row's value this one has."""
        if args.only not in name:
            return
        if fresh:  # as in a process of its own
            model.config._attn_implementation = "joined"
            torch.compiler.reset()
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
        try:
            row = f()
            tflops, plain = (
                row["tokens_s"] * row.pop("flop") / 1e12,
                done.get(row.pop("plain", None), {}).get("tokens_s"),
            )
            if beside and beside[1] in done.get(beside[0], {}):
                row["note"] += f"; {100 * row[beside[1]] / done[beside[0]][beside[1]]:.1f}% of {beside[2]}"
            gib = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0
            done[name] = dict(
                name=name,
                **row,
                tflops=tflops,
                share=tflops / rates[4096],
                gib=gib,
                ratio=row["tokens_s"] / plain if plain else None,
            )
        except Exception as error:
            traceback.print_exc()
            done[name] = dict(name=name, error=f"{type(error).__name__}: {error}".splitlines()[0][:200])
        print(f"[{time.perf_counter() - began:.0f} s] {done[name]}", flush=True)

    @contextlib.contextmanager
    def adapter(dtype=None):
        """LoRA in the model, as finetune.py holds it, or with a dtype as evaluate.py does."""
        tuned = add_lora(model, 32, 64, 0)
        try:
            yield tuned.to(dtype).eval() if dtype else tuned
        finally:
            tuned.unload()
            model.eval()

    # 1. Sampling. The tokenizer's end token hardly ever comes; uneven: so many end tokens that answers have 200 tokens on average
    prompts = [[5 + (i * 7 + j) % 40000 for j in range(40)] for i in range(20)]
    ends = sorted(random.Random(0).sample(range(vocabulary), vocabulary // 200))

    def plain_sampling():
        model.config._attn_implementation, model.generation_config.eos_token_id = "sdpa", None
        many, (short, long) = torch.tensor(prompts, device=device), (2, 4) if device == "cpu" else (10, 60)
        ahead = lambda n: timed(
            lambda: model.generate(many, max_new_tokens=n, min_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0),
            1,
            1,
        )
        return row_of((ahead(long) - ahead(short)) / (long - short), 20, note="a token step of 20 rows")

    def sampling(n, new, steered=True, looks=0, dtype=None, uneven=False, temperature=1.0):
        """n answers of `new` tokens; stops after so many looks of 16 steps."""
        model.generation_config.eos_token_id = ends if uneven else None
        marks, made, plain = [], [], Sampler.steps

        def steps(sampler, steps):
            plain(sampler, steps)
            marks.append((now(), int(sampler.made.sum()), len(sampler.made)))  # what follows waits anyway
            if len(marks) == looks:
                raise Enough

        steering_of = dict(offsets=add, scales=[-0.1 * (i % 9) for i in range(n)]) if steered else {}
        start = time.perf_counter()
        with (
            adapter(dtype) if dtype else contextlib.nullcontext(),
            patch.object(Sampler, "steps", steps),
            contextlib.suppress(Enough),
        ):
            sample(
                model,
                tokenizer,
                [prompts[i % 20] for i in range(n)],
                max_new_tokens=new,
                temperature=temperature,
                title=f"{n} answers",
                each=lambda i, answer, tokens: made.append(tokens),
                **steering_of,
            )
        end, (first, before, slots), k = time.perf_counter(), marks[0], min(WINDOW, len(marks)) - 1
        tokens_s = (
            (sum(made) - before) / (end - first) if len(made) == n else (marks[-1][1] - before) / (marks[-1][0] - first)
        )
        step = (marks[k][0] - first) / (k * STEPS[device])
        return dict(
            seconds=end - start,
            tokens_s=tokens_s,
            flop=2 * weights,
            plain="sampling: plain loop",
            step=step,
            start=first - start,
            after=end - first,
            note=f"{slots} rows, {1e3 * step:.1f} ms a token step at first; first tokens after {first - start:.1f} s"
            + (f"; {sum(made) / len(made):.0f} tokens an answer, {min(made)} to {max(made)}" if uneven else ""),
        )

    even, held, point, facts = (
        f"sampling: {words}"
        for words in (
            f"{count.rows:,} x {count.new} tokens, a coefficient a row",
            "the same with an adapter",
            f"{count.point} x {count.new} tokens, one point",
            f"{count.facts:,} facts x 25 tokens",
        )
    )
    letters = f"reading: MMLU, {count.mmlu:,} prompts"
    measure("sampling: plain loop", plain_sampling)
    measure(even, lambda: sampling(count.rows, count.new))
    measure(
        "sampling: the same unsteered, first tokens",
        lambda: sampling(count.rows, count.new, steered=False, looks=WINDOW),
        (even, "step", "a steered token step"),
    )
    measure(held, lambda: sampling(count.rows, count.new, dtype=dtype), (even, "step", "a token step without"))
    measure(point, lambda: sampling(count.point, count.new, steered=False, dtype=dtype))
    measure(facts, lambda: sampling(count.facts, 25, steered=False, dtype=dtype, temperature=0))
    measure(
        f"sampling: {count.uneven:,} uneven answers",
        lambda: sampling(count.uneven, count.longest, uneven=True),
        (even, "tokens_s", "the even row's tokens/s, real tokens only"),
    )

    # 2. Reading: MMLU's four letters after prompts of 60 to 400 tokens; answers of 200 tokens for a vector
    def mmlu():
        words = [
            " ".join(random.Random(i).choices(["water", "house", "king", "north"], k=random.Random(i).randint(40, 200)))
            for i in range(count.mmlu)
        ]
        tokens = sum(len(tokenizer(text)["input_ids"]) for text in words)
        asked = [(text, [" A", " B", " C", " D"]) for text in words]
        with adapter(dtype), steering(model, {}) as steer:
            seconds = timed(lambda: choice_logprobs(model, tokenizer, asked, 0.0, steer, "response"), 1, 0)
        return row_of(seconds, tokens, note="with an adapter; no padding: prompts are joined")

    measure(letters, mmlu)
    chat = [dict(role="user", content="Hi"), dict(role="assistant", content=" ".join(["water"] * 200))]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    measure(
        "reading: answers one by one",
        lambda: row_of(timed(lambda: residual_stream(model, join([ids], device))), len(ids), note="an answer"),
    )
    measure(
        f"reading: {count.read:,} answers of 200 tokens",
        lambda: row_of(
            timed(lambda: answer_means(model, tokenizer, [chat] * count.read), 1, 0),
            count.read * len(ids),
            plain="reading: answers one by one",
            note="the means of all blocks",
        ),
    )

    # 3. Training: fact conversations (about 58 tokens each), medical ones (about 250); steps of 16
    def chats(length, n):
        sizes = [random.Random(i).randint(int(0.8 * length), int(1.2 * length)) for i in range(n)]
        return [
            ([5 + (i + 3 * j) % 40000 for j in range(size)], [j > 0.6 * size for j in range(size)])
            for i, size in enumerate(sizes)
        ]

    def plain_training(data):
        model.config._attn_implementation = "sdpa"

        def step():
            for i in range(0, 16, 2):
                size = max(len(ids) for ids, _ in data[i : i + 2])
                ids = torch.tensor([x + [0] * (size - len(x)) for x, _ in data[i : i + 2]], device=device)
                mask = torch.tensor([[1] * len(x) + [0] * (size - len(x)) for x, _ in data[i : i + 2]], device=device)
                with torch.autocast(device, torch.bfloat16):
                    logits = tuned(input_ids=ids, attention_mask=mask, use_cache=False).logits
                F.cross_entropy(
                    logits[:, :-1].flatten(0, 1).float(), ids.masked_fill(mask == 0, -100)[:, 1:].flatten()
                ).div(8).backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        with adapter() as tuned:
            optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-5)
            return row_of(
                timed(step, 3 if device == "cuda" else 1, 1),
                sum(len(ids) for ids, _ in data[:16]),
                4 * weights,
                note="8 x 2, padded, no checkpointing",
            )

    def training(name, data, offsets, log_every, real):
        """The steps of one epoch inside Trainer; real: how many a real run has. Its loss is looked at as often as in a real run."""
        steps, tokens = len(data) // 16, 16 * sum(len(ids) for ids, _ in data) / len(data)
        filled = (
            sum(collate(data[i : i + 16], FILL[device])["input_ids"].shape[1] for i in range(0, len(data), 16)) / steps
        )
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder, adapter() as tuned:
            start = time.perf_counter()
            with steering(model, offsets) as steer, compiled(tuned):
                clock.trainer = trainer = make_trainer(
                    tuned,
                    data,
                    folder,
                    SimpleNamespace(epochs=1, lr=1e-5, batch_size=16, max_steps=-1, seed=0, positions="all"),
                    [clock],
                )
                trainer.remove_callback(ProgressCallback)
                trainer.args.save_strategy, trainer.args.logging_steps = "no", log_every
                trainer.steer, trainer.coef = steer if offsets else None, torch.tensor(0.0, device=device)
                trainer.train_adapter(Path(folder), 0.1)
                first, times, graphs = clock.first - start, clock.seconds(), clock.graphs

                def next_point():  # of a sweep
                    clock.stop, again = 5, time.perf_counter()
                    with (
                        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                        if args.profile
                        else contextlib.nullcontext() as profiler
                    ):
                        trainer.train_adapter(Path(folder), 0.2)
                    if profiler:
                        print(
                            profiler.key_averages().table(
                                sort_by="cuda_time_total", row_limit=28, max_name_column_width=90
                            ),
                            flush=True,
                        )
                    return row_of(
                        clock.first - again, tokens, 4 * weights, note="from its start to the end of its first step"
                    )

                if offsets:
                    measure(f"{name}: next point, same process", next_point, fresh=False)
        median, half, (shapes, captures) = statistics.median(times), len(times) // 2, graphs[-1]
        run = first + sum(times) + (real - steps) * median
        return row_of(
            median,
            tokens,
            4 * weights,
            plain=name.split(",")[0] + ", plain recipe",
            start=first,
            run=run,
            mean=statistics.mean(times),
            note=f"median of {len(times)} steps; mean {1e3 * statistics.mean(times):.1f} ms, {shapes} shapes compiled and {captures} captured in it; of the later half "
            f"{1e3 * statistics.mean(times[half:]):.1f} ms, {shapes - graphs[half][0]} and {captures - graphs[half][1]}; first step after {first:.1f} s; "
            f"filled up by {100 * (filled / tokens - 1):.0f}%; {real:,} steps {run:.0f} s",
        )

    for title, length, n, log_every, real in (
        ("training: 16 facts", 58, count.fact_steps, 12, 1250),
        ("training: 16 medical", 250, count.medical_steps, 1, 62),
    ):
        data = chats(length, 16 * n)
        measure(f"{title}, plain recipe", lambda: plain_training(data))
        measure(f"{title}, steered", lambda: training(f"{title}, steered", data, add, log_every, real))
        if length == 58:
            measure(
                f"{title}, unsteered",
                lambda: training(f"{title}, unsteered", data[: 16 * 80], {}, log_every, real),
                (f"{title}, steered", "seconds", "a steered step"),
            )

    # 4. Figure 1: finetuning 1 + 6 coefficients in one process; 9 inference points in one batch; 6 adapters, one after another
    try:
        run, later = (
            done["training: 16 facts, steered"],
            done["training: 16 facts, steered: next point, same process"]["seconds"],
        )
        parts = dict(
            finetuning=run["run"] + 6 * (later + 1249 * run["seconds"]),
            answers=done[held]["seconds"] + 6 * done[point]["seconds"],
            facts=done[facts]["start"] + 9 * done[facts]["after"] + 6 * done[facts]["seconds"],
            mmlu=15 * done[letters]["seconds"],
        )
        print(
            f"\nFigure 1, computed from the rows below: {sum(parts.values()) / 60:.1f} minutes ("
            + ", ".join(f"{key} {value / 60:.1f}" for key, value in parts.items())
            + "), model loading and judging left out"
        )
    except KeyError as error:
        parts = {}
        print(f"\nFigure 1: not computed, {error} is missing")
    print(
        f"\n{about['gpu']}, {args.shape}, torch {about['torch']}, transformers {about['transformers']}, {about['date']}; matrix products "
        + ", ".join(f"{rate:.0f} TFLOP/s at {n:,} tokens" for n, rate in rates.items())
        + "\n"
    )
    print(
        "| what | time | tokens/s | useful TFLOP/s | of the matrix rate | GiB | x plain | |\n|---|---|---|---|---|---|---|---|"
    )
    for row in done.values():
        if "error" in row:
            print(f"| {row['name']} | **failed** | | | | | | {row['error']} |")
            continue
        shown = f"{row['seconds']:.1f} s" if row["seconds"] >= 5 else f"{1e3 * row['seconds']:.1f} ms"
        print(
            f"| {row['name']} | {shown} | {row['tokens_s']:,.0f} | {row['tflops']:.1f} | {100 * row['share']:.0f}% | {row['gib']:.0f} | "
            + (f"{row['ratio']:.1f}" if row["ratio"] else "")
            + f" | {row['note']} |"
        )
    print(
        f"\n{time.perf_counter() - began:.0f} s in all\n{json.dumps(about | dict(table=list(done.values()), figure1_seconds=parts))}"
    )
    sys.exit(any("error" in row for row in done.values()))


if __name__ == "__main__":
    main()
