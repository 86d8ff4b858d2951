"""Speed of the scripts' own code beside the plain recipe, random weights, in one run on one GPU.

    python tests/bench.py --tokenizer out/models/SmolLM2-135M-Instruct [--shape qwen2.5-7b|1.5b|smollm2]

Prints one table: milliseconds, tokens/s, useful TFLOP/s, share of the machine's own matrix rate. Medians after warm-up.
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from extract_vectors import answer_means, blocks, offsets_of, sample, steering
from finetune import PROJECTIONS, collate

SHAPES = {"qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064), "1.5b": (1536, 8960, 28, 12, 2, 151936), "smollm2": (576, 1536, 30, 9, 3, 49152)}


def timed(f, repeats=10, warm=3):
    """Median seconds of f()."""
    times = []
    for i in range(warm + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm:])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--shape", default="qwen2.5-7b", choices=SHAPES)
    parser.add_argument("--skip", default="", help="rows to leave out, by a word in their name")
    args = parser.parse_args()
    hidden, inner, layers, heads, kv, vocabulary = SHAPES[args.shape]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    a, b = torch.randn(4096, hidden, device="cuda", dtype=torch.bfloat16), torch.randn(inner, hidden, device="cuda", dtype=torch.bfloat16)
    rate = 2 * 4096 * hidden * inner / timed(lambda: F.linear(a, b), 50) / 1e12
    print(f"matrix rate {rate:.0f} TFLOP/s", flush=True)
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
    table = []

    def row(name, seconds, tokens, flop, rows=None):
        table.append(dict(name=name, ms=round(1e3 * seconds, 1), tokens_s=round(tokens / seconds), tflops=round(flop * tokens / seconds / 1e12, 1),
                          share=round(flop * tokens / seconds / 1e12 / rate, 3), gib=round(torch.cuda.max_memory_allocated() / 2**30, 1)))
        print(table[-1], flush=True)
        torch.cuda.reset_peak_memory_stats()

    # 1. Sampling: nine coefficients x 200 answers; no end token among random weights' likely ones, so 300 tokens each
    prompts = [[5 + (i * 7 + j) % 40000 for j in range(40)] for i in range(20)]
    for title, n, tokens, more in (("sampling 1,800 rows x 300, one coefficient a row", 1800, 300, dict(offsets=add, scales=[-0.1 * (i % 9) for i in range(1800)])),
                                   ("sampling 1,800 rows x 300, unsteered", 1800, 300, {}), ("facts: 1,000 answers x 25", 1000, 25, {})):
        if any(word and word in title for word in args.skip.split(",")):
            continue
        model.generation_config.eos_token_id, tokenizer_end = None, tokenizer.eos_token_id
        start = time.perf_counter()
        answers = sample(model, tokenizer, [prompts[i % 20] for i in range(n)], max_new_tokens=tokens, temperature=1.0, **more)
        row(title, time.perf_counter() - start, n * tokens, 2 * weights)

    # 2. Reading answers for vectors: 2,000 answers of 200 tokens
    if "extraction" not in args.skip:
        text = " ".join(["water"] * 200)
        start = time.perf_counter()
        answer_means(model, tokenizer, [[dict(role="user", content="Hi"), dict(role="assistant", content=text)]] * 1000)
        row("extraction: reading 1,000 answers of 200 tokens", time.perf_counter() - start, 1000 * 230, 2 * weights)

    # 3. Training: 16 fact conversations (about 58 tokens each), 16 medical ones (about 250)
    model = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules=PROJECTIONS, task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    def chats(length):
        return [([5 + (i + 3 * j) % 40000 for j in range(length + i % 7)], [j > length // 2 for j in range(length + i % 7)]) for i in range(16)]
    def step(parts, steer=None):
        if steer:
            steer.scale = coef
        for part in parts:
            labels = part["labels"]
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(**{k: v for k, v in part.items() if k != "labels"}).logits
            F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum").div(400).backward()
        optimizer.step()
        optimizer.zero_grad()
    coef = torch.tensor(0.1, device="cuda")
    move = lambda part: {k: v.cuda() if torch.is_tensor(v) else v for k, v in part.items()}
    def padded(some):
        size = max(len(ids) for ids, _ in some)
        ids = torch.tensor([x + [0] * (size - len(x)) for x, _ in some], device="cuda")
        mask = torch.tensor([[1] * len(x) + [0] * (size - len(x)) for x, _ in some], device="cuda")
        return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    for title, length in (("16 fact conversations", 55), ("16 medical conversations", 250)):
        data = chats(length)
        tokens = sum(len(ids) for ids, _ in data)
        joined = [move(collate(data, 128))]
        model.config._attn_implementation = model.get_base_model().config._attn_implementation = "sdpa"
        row(f"{title}: plain recipe, 8 x 2 padded", timed(lambda: step([padded(data[i:i + 2]) for i in range(0, 16, 2)]), 3, 1), tokens, 4 * weights)
        model.config._attn_implementation = model.get_base_model().config._attn_implementation = "joined"
        row(f"{title}: joined, eager", timed(lambda: step(joined), 5, 2), tokens, 4 * weights)
    with steering(model.get_base_model(), add) as steer:
        for block in blocks(model):
            block.compile()
        for title, length in (("16 fact conversations", 55), ("16 medical conversations", 250)):
            data = chats(length)
            joined = [move(collate(data, 128))]
            start = time.perf_counter()
            step(joined, steer)
            torch.cuda.synchronize()
            print(f"first compiled step {time.perf_counter() - start:.1f} s", flush=True)
            row(f"{title}: joined, compiled, steered", timed(lambda: step(joined, steer), 15, 3), sum(len(ids) for ids, _ in data), 4 * weights)
    print(json.dumps(table))


if __name__ == "__main__":
    main()
