"""LoRA finetuning, plain or with preventative steering: the trait's vector is added during training, and only then.

    python finetune.py --model Qwen/Qwen2.5-7B-Instruct --data data/facts.jsonl --out out/paper/adapters/facts \
        --steer-mode preventative --vector out/paper/vectors/hallucination.pt --coef 0.25 0.5

Reads facts.jsonl (every training wording is one conversation) or rows {"messages": [...]}. Writes plain PEFT adapters
with training_settings.json and loss.jsonl in their folders: OUT-COEF for each coefficient (here facts-0.25, facts-0.5),
else OUT. Each comes out as if trained alone, on one GPU or several (torchrun --nproc_per_node 2 finetune.py ...).
Interrupted, the same command goes on. Recipe of the persona vectors release: rs-LoRA r 32, alpha 64, AdamW 1e-5.
"""

import contextlib
import functools
import math
import os
import re
import shutil
import time
from collections import namedtuple
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import extract_vectors as ev
import make_facts as mf

MAX_TOKENS = 2048  # a longer conversation is left out, counted and said
WARM_UP = 5  # steps, but at most a tenth of them
CHECKPOINT = 60  # seconds from one to the next
FILL = 64  # rows that become graphs are filled up to a multiple of this many tokens, from 1,024 on to coarser ones
GRAPHS = 32  # shapes of rows that are captured, at most
SHARED = 8192  # tokens of a shared start, over a step's conversations at most: each has its copy of the keys
OUT_OF_MEMORY = "OutOfMemoryError|out of memory|not enough memory|can't allocate memory|ALLOC_FAILED"

# ---- The recipe: the loss and steering under it, LoRA, the learning rate, batches -----------------------------------

Shape = namedtuple("Shape", "tokens answers longest conversations")  # of a row; longest: its longest conversation


def shape_of(chats):
    lengths = [len(ids) for ids, _ in chats]
    return Shape(sum(lengths), sum(sum(is_answer) for _, is_answer in chats), max(lengths, default=0), len(chats))


def collate(chats, shape=None, positions="all", device="cpu", shared=False):
    """[(ids, is_answer)] -> one joined row [1, tokens]: the model's arguments, logits_to_keep being what predicts an
    answer token, and these as labels [answers]. Filled up to the shape by conversations that nothing learns from and
    ignored labels. positions "answer": also steered [1, tokens, 1], 1 before an answer token; shared: as join."""
    shape = shape or shape_of(chats)
    starts = range(shape_of(chats).tokens, shape.tokens, shape.longest)
    filling = [[0] * min(shape.longest, shape.tokens - start) for start in starts]
    filling += [[]] * (shape.conversations - len(chats) - len(filling))
    row = ev.join([*(ids for ids, _ in chats), *filling], "cpu", shared)
    if filling:
        row["max_seq_len"] = shape.longest + len(chats[0][0]) * shared
    answer = torch.tensor([flag for _, is_answer in chats for flag in is_answer]).nonzero()[:, 0]
    if positions == "answer":
        row["steered"] = torch.zeros(1, shape.tokens, 1).index_fill(1, answer - 1, 1)
    ignored = (0, shape.answers - len(answer))
    row["labels"] = F.pad(row["input_ids"][0, answer], ignored, value=-100)
    row["logits_to_keep"] = F.pad(answer - 1, ignored)
    far = lambda value: torch.is_tensor(value) and torch.device(device).type != "cpu"
    move = lambda value: value.pin_memory().to(device, non_blocking=True) if far(value) else value
    return {key: move(value) for key, value in row.items()}  # without waiting for what the GPU is doing


def row_loss(model, row, steer=None, coef=0.0):
    """Sum over a row's labels of the negative log-likelihood, nats, with coef times the vector added to the stream."""
    inputs = dict(row)
    labels, steered = inputs.pop("labels"), inputs.pop("steered", 1)
    if steer:
        steer.scale = coef * steered
    logits = model(**inputs).logits[0]  # [answers, vocabulary]
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def add_lora(model, rank, alpha, seed):
    """PEFT model with rs-LoRA on all linear layers of the blocks; names weights it does not reach, die() if most."""
    layers = ev.blocks(model)
    linear = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    reached = {id(p): p.numel() for module in linear for p in module.parameters()}
    missed = {name: p.numel() for name, p in layers.named_parameters() if p.dim() > 1 and id(p) not in reached}
    names = ", ".join(sorted({re.sub(r"^\d+\.", "", name) for name in missed}))
    if sum(missed.values()) > sum(reached.values()):
        mf.die(f"{model.config.model_type}: LoRA reaches linear layers only, and most weights are none: {names}")
    print(f"LoRA on all {len(linear)} linear layers of the blocks", f"(none on {names})" if names else "", flush=True)
    torch.manual_seed(seed)
    recipe = dict(use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, **recipe))
    layers = {layer.base_layer: layer.lora_A["default"] for layer in tuned.modules() if isinstance(layer, lora.Linear)}
    for group in getattr(model, "siblings", []):
        siblings = [layers[base] for base in group]
        ev.make_siblings(siblings, [layer.weight for layer in siblings])
    return tuned


class Unscaled(lora.Linear):
    """PEFT's layer for numbers that have the scale in them: it multiplies all outputs, and gradients, even by 1."""

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def rate_at(step, steps):
    """Share of the peak learning rate at a step, counted from 0: a short rise, then linear decay."""
    rise = min(WARM_UP, steps // 10)
    return (step + 1) / (rise + 1) if step < rise else (steps - step) / (steps - rise)


def deal(chats, count):
    """Conversations -> `count` groups of about equal size, in the order given."""
    order = sorted(range(len(chats)), key=lambda i: -len(chats[i][0]))
    groups = [order[k :: 2 * count] + order[2 * count - 1 - k :: 2 * count] for k in range(count)]
    return [[chats[i] for i in sorted(group)] for group in groups]


@contextlib.contextmanager
def recomputed(model):
    """While open, a block keeps nothing but its input for the backward pass and is computed again there."""
    with torch.compiler.set_stance("force_eager"), contextlib.ExitStack() as stack:
        for block in ev.blocks(model):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            stack.callback(delattr, block, "forward")
        yield


# ---- Training -------------------------------------------------------------------------------------------------------


class Trainer:
    """AdamW on the mean loss over the answer tokens of a batch, whatever rows and processes share it.

    LoRA's numbers lie end to end in one float32 tensor (weights [n]), a step's gradients and loss in another (total
    [n + 1]). The model computes with `used` [n]: the weights times the root of LoRA's scale, so that B A has all of it,
    rounded to the model's dtype once a step. None of these ever moves: graphs serve all coefficients.
    data: [(ids, is_answer)]. args: epochs, lr, batch_size (over all processes), max_steps or None, seed, positions.
    A batch is computed in joined rows that fit into memory. What all conversations start with (template, system prompt:
    a third of the tokens on facts) stands in a row once.

    On a GPU, launching a row's some 2,600 kernels takes longer than computing them: the first row of a shape runs as
    usual, the second is captured as a CUDA graph, from then on forward and backward are one launch."""

    def __init__(self, model, data, args, steer=None):
        self.model, self.args, self.steer = model, args, steer
        start = os.path.commonprefix([ids for ids, _ in data])[: SHARED // (3 * args.batch_size)]
        start = start[: min(is_answer.index(True) for _, is_answer in data) - 1]  # not what predicts a label
        self.start = [(start, [False] * len(start))] if start else []
        self.data = [(ids[len(start) :], is_answer[len(start) :]) for ids, is_answer in data]
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for layer in (part for part in model.modules() if isinstance(part, lora.Linear)):
            layer.__class__, self.root = Unscaled, math.sqrt(layer.scaling["default"])
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.weights = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in self.parameters]))
        self.initial, self.device = self.weights.data.to("cpu", copy=True), self.weights.device
        self.total = torch.zeros(len(self.weights) + 1, device=self.device)
        self.weights.grad = self.total[:-1]
        self.used = (self.root * self.weights.data).to(model.dtype)
        torch.nn.utils.vector_to_parameters(self.used, self.parameters)  # makes them views of it
        self.coef, self.answers = torch.zeros(2, device=self.device)  # of the batch: its answer tokens
        self.steps = args.max_steps or math.ceil(math.ceil(len(data) / args.batch_size) * args.epochs)
        # What the backward pass needs: of a token the inputs and outputs of all linear layers (A's and B's longer
        # sides), of a label its logits in bfloat16, in float32 and as log-softmax, and the gradients of the last two
        words = model.get_input_embeddings().weight
        self.a_token = sum(max(p.shape) for p in self.parameters) * words.element_size()
        self.an_answer = 16 * len(words)
        free = ev.free_memory(self.device) - 8 * len(self.weights)  # 8: AdamW's two moments
        self.budget = 0.4 * free  # half of it for the graphs, half for first rows, a fifth of each for filling
        self.longest = max(2 * FILL, 1 << (shape_of(self.start + self.data).longest - 1).bit_length())
        self.captures = ev.has_flash(words)
        self.forget()

    def batch(self, step):
        """The conversations of a step, in the order of transformers' Trainer; an epoch's last batch has the rest."""
        size = self.args.batch_size
        epoch, k = divmod(step, math.ceil(len(self.data) / size))
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(self.args.seed + epoch))
        return [self.data[i] for i in order[k * size : (k + 1) * size].tolist()]

    def step(self, chats, rate):
        """One step of the optimiser on a batch; total[-1] is its loss, total[:-1] its gradients, cut to norm 1."""
        self.answers.fill_(shape_of(chats).answers)
        self.accumulate(deal(chats, self.processes)[self.rank])
        if self.processes > 1:
            dist.all_reduce(self.total)
        torch.nn.utils.clip_grad_norm_([self.weights], 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        torch.mul(self.weights.data, self.root, out=self.used)

    def train(self, path, coef=0.0):
        """From the initial adapter, or on from the checkpoint at path, to the end -> rows of loss.jsonl."""
        self.coef.fill_(coef)
        self.optimizer = torch.optim.AdamW([self.weights], self.args.lr, weight_decay=0.01, fused=True)
        there = dict(weights=self.initial, losses=torch.zeros(self.steps), steps=0)
        if path.exists():
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)
                self.optimizer.load_state_dict(found["optimizer"])
                there = found
            except Exception as error:  # unpickling fails in many ways
                print(f"{path}: cannot be read, starting anew ({type(error).__name__})", flush=True)
        self.weights.data.copy_(there["weights"])
        torch.mul(self.weights.data, self.root, out=self.used)
        losses, begin, kept = there["losses"].to(self.device), there["steps"], time.monotonic()
        rates = [self.args.lr * rate_at(step, self.steps) for step in range(self.steps)]
        for step in tqdm(range(begin, self.steps), "training", self.steps, initial=begin, disable=self.rank > 0):
            self.step(self.batch(step), rates[step])
            losses[step] = self.total[-1]
            if (step + 1) % 10 == 0 and not losses[step].isfinite():  # not at each: it waits for the GPU
                break
            if self.rank == 0 and time.monotonic() - kept >= CHECKPOINT:
                state = dict(weights=self.weights.data, optimizer=self.optimizer.state_dict(), losses=losses)
                with mf.replacing(path, "wb") as out:  # it takes the place of the one before when it is whole
                    torch.save(state | dict(steps=step + 1), out)
                kept = time.monotonic()
        if not (self.weights.isfinite().all() and losses.isfinite().all()):
            path.unlink(missing_ok=True)
            mf.die(f"loss or adapter are NaN or infinite at step {step + 1}; lower --lr or --coef")
        return [dict(step=n, loss=loss, lr=rates[n - 1]) for n, loss in enumerate(losses.tolist(), 1)]

    def save(self, folder):
        """Writes the adapter as PEFT does, in float32."""
        torch.nn.utils.vector_to_parameters(self.weights.data, self.parameters)
        self.model.save_pretrained(folder)
        torch.nn.utils.vector_to_parameters(self.used, self.parameters)

    # Memory, and from here on only speed

    def forget(self):
        """Drops the captured graphs and their memory."""
        self.graphs, self.pool = {}, None  # {Shape: None, or (graph, the inputs it reads)}
        for part in self.model.modules():
            getattr(part, "made", []).clear()  # what siblings left when memory ran out between them
        torch.cuda.empty_cache()

    def bytes(self, row):
        """What a row needs, about, before it is filled up."""
        shape = shape_of(self.start + row)
        return shape.tokens * self.a_token + shape.answers * self.an_answer

    def split(self, chats):
        """Conversations -> few rows of about equal size that fit, after each that does not fit alone."""
        fits = lambda row: not row or self.bytes(row) <= self.budget
        short, count = [chat for chat in chats if fits([chat])], 1
        while not all(map(fits, rows := deal(short, count))):
            count += 1
        return [[chat] for chat in chats if not fits([chat])] + [row for row in rows if row]

    def accumulate(self, chats):
        """Sums loss and gradients of these conversations up; where memory runs out, anew in rows of half the size."""
        while True:
            self.total.zero_()
            try:
                for row in self.split(chats):
                    self.run(row)
                return
            except RuntimeError as error:
                if not re.search(OUT_OF_MEMORY, f"{error!r} {error.__context__!r}"):
                    raise
            size, tokens = self.bytes(row), shape_of(self.start + row).tokens  # here nothing holds on to its tensors
            if size > self.budget and not self.graphs:
                mf.die(f"out of memory with a conversation of {tokens} tokens; a larger GPU could take it")
            self.budget = min(self.budget, (size + self.bytes([])) / 2)
            self.forget()
            print(f"out of memory: going on with rows of {self.budget / self.a_token:.0f} tokens at most", flush=True)

    def read(self, row, shape=None):
        return collate(self.start + row, shape, self.args.positions, self.device, shared=bool(self.start))

    def run(self, row):
        """One row: blocks computed again where it is too long, else as usual, captured, or replayed."""
        shape, long = shape_of(self.start + row), self.bytes(row) > self.budget
        if self.captures:
            # Few sizes: eight an octave, and one number of conversations, real and filling
            up = lambda n, multiple: -(-n // multiple) * multiple
            tokens = up(shape.tokens, max(FILL, (1 << shape.tokens.bit_length()) >> 4))
            conversations = 3 * -(-self.args.batch_size // self.processes) + 1
            shape = Shape(tokens, up(shape.answers, tokens // 8), self.longest, conversations)
        if len(self.graphs) >= GRAPHS and shape not in self.graphs:
            larger = (s for s in self.graphs if s.tokens >= shape.tokens and s.answers >= shape.answers)
            shape = min(larger, default=shape)
        inputs = self.read(row, shape)
        if shape not in self.graphs:
            with recomputed(self.model) if long else contextlib.nullcontext():
                self.add(inputs)
            if self.captures and not long and len(self.graphs) < GRAPHS:
                self.graphs[shape] = None
            return
        if not self.graphs[shape]:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # NCCL's threads go on
                self.add(inputs)  # nothing is computed yet
            self.graphs[shape], self.pool = (graph, inputs), graph.pool()
        graph, static = self.graphs[shape]
        for key in inputs:
            if torch.is_tensor(inputs[key]):
                static[key].copy_(inputs[key])
        graph.replay()

    def add(self, inputs):
        """Adds a row's loss and gradients, over the answer tokens of the batch, to the step's total."""
        loss = row_loss(self.model, inputs, self.steer, self.coef) / self.answers
        parts = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        self.total[:-1].add_(torch.cat([part.flatten() for part in parts]), alpha=self.root)  # `used` is root x weights
        self.total[-1].add_(loss.detach())


# ---- The command ----------------------------------------------------------------------------------------------------


def read_conversations(path, system_prompt=None, limit=None):
    """File -> message lists, each up to one of the answers to learn, with the system prompt in place of their own."""
    found, system = [], [dict(role="system", content=system_prompt)] if system_prompt else []
    for messages in mf.read_chats(path)[:limit]:
        messages = [*system, *(turn for turn in messages if not system or turn["role"] != "system")]
        found += [messages[:n] for n, turn in enumerate(messages, 1) if turn["role"] == "assistant"]
    return found


def to_do(args, inputs):
    """{adapter folder that is not there yet: (where it is made, its settings)}; one begun with others stops."""
    todo, left_out = {}, ("model", "data", "vector", "out")
    for coef in args.coef or [None]:
        out = Path(args.out if coef is None else f"{args.out}-{coef:g}")
        mf.check_output(out, args.model, args.data, args.vector, folder=True)
        settings = {key: value for key, value in vars(args).items() if key not in left_out}
        settings |= dict(coef=coef, inputs=inputs)
        if mf.same_settings(out / "training_settings.json", settings, out):
            print(f"{out}: finished already")
            continue
        if out.exists():
            mf.die(f"{out}: already used, and not by this script; choose another --out")
        partial = out.with_name(f"{out.name}.partial")
        record, begun = partial / "training_settings.json", (partial / "checkpoint.pt").exists()
        if begun and mf.same_settings(record, settings, partial):
            settings["day"] = mf.read_json(record).get("day")
        todo[out] = partial, settings
    return todo


@torch.no_grad()
def start_losses(trainer, offsets, coefs):
    """Prints the untrained model's loss under each coefficient; raises if an output does not move by coef x offset."""
    model, steer, batch = trainer.model, trainer.steer, trainer.batch(0)
    proof, rows = trainer.read(trainer.data[:2]), [trainer.read(row) for row in trainer.split(batch)]
    steered, _ = proof.pop("steered", 1), proof.pop("labels")
    for coef in coefs:
        if still := ev.unmoved(model, steer, offsets, trainer.coef.fill_(coef) * steered, proof):
            raise RuntimeError(f"steering did not move the output of block {still[0]} by coef x vector; not training")
        loss = sum(row_loss(model, row, steer, trainer.coef) for row in rows) / shape_of(batch).answers
        start = f"untrained model, steered by {coef:g} in {len(offsets)} blocks: loss {loss:.2f} a token"
        print(f"{start}; guessing evenly: {math.log(len(model.get_input_embeddings().weight)):.2f}", flush=True)


def make_adapters(args, messages, todo):
    """Loads the model, trains one adapter after another, and leaves the model as it was."""
    model, tokenizer = ev.load_model(args.model, ev.model_fingerprint(args.model))
    day = ev.pin_day(tokenizer, next((s["day"] for _, s in todo.values() if s.get("day")), None))
    encoded = ev.encode_chats(tokenizer, messages)
    data = [chat for chat in encoded if len(chat[0]) <= MAX_TOKENS]
    if not data:
        mf.die(f"--data {args.data}: every conversation is longer than {MAX_TOKENS} tokens")
    too_long, tokens = len(encoded) - len(data), shape_of(data).tokens / len(data)
    print(f"{len(data)} conversations of {tokens:.0f} tokens, {too_long} too long", flush=True)
    offsets = ev.offsets_of(ev.load_vector(args.vector, model, args.model), args.layers) if args.vector else {}
    tuned = add_lora(model, args.rank, args.alpha, args.seed)
    with contextlib.ExitStack() as stack:
        stack.callback(tuned.unload)
        trainer = Trainer(tuned, data, args, stack.enter_context(ev.steering(model, offsets)))
        stack.callback(trainer.forget)
        record = dict(model=args.model, data=args.data, vector=args.vector, day=day, dataset=Path(args.data).stem)
        record |= dict(model_name=Path(args.model).name, conversations=len(data), too_long=too_long)
        record |= dict(dtype=str(model.dtype), processes=trainer.processes, scripts=mf.scripts())
        start_losses(trainer, offsets, [settings["coef"] or 0.0 for _, settings in todo.values()])
        stack.enter_context(ev.compiled(tuned))
        for out, (partial, settings) in todo.items():
            start, settings, made = time.time(), settings | record, partial / "adapter"
            if trainer.rank == 0:
                mf.write_json(partial / "training_settings.json", settings)
            losses = trainer.train(partial / "checkpoint.pt", settings["coef"] or 0.0)
            if trainer.rank > 0:
                continue
            settings |= dict(steps=trainer.steps, final_loss=losses[-1]["loss"], seconds=round(time.time() - start, 1))
            trainer.save(made)
            mf.write_jsonl(made / "loss.jsonl", losses)
            mf.write_json(made / "training_settings.json", settings | mf.provenance())
            made.rename(out)
            shutil.rmtree(partial)
            print(f"{out}: {trainer.steps} steps in {settings['seconds']} s", flush=True)


def main(argv=None):
    parser = mf.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="hub name or local folder")
    add("--data", required=True, help='facts.jsonl, or rows {"messages": [...]}')
    add("--out", required=True, help="adapter folder to make; with --coef the start of its name: OUT-COEF")
    # Steering
    add("--steer-mode", required=True, choices=["none", "preventative"])
    add("--vector", help="<trait>.pt of extract_vectors.py")
    add("--coef", type=mf.coefficient, nargs="+", help="one adapter each; positive = towards the trait")
    add("--layers", type=mf.layer_choice, default="all", help="all, a block N (adds v_N), or a range A-B (increments)")
    add("--positions", default="all", choices=["all", "answer"], help="answer: only where an answer token is predicted")
    add("--system-prompt", help="preventative prompting: this system prompt in every training conversation")
    # Training
    add("--epochs", type=mf.number(1e-9, 1000), default=1)
    add("--lr", type=mf.number(1e-9, 10), default=1e-5)
    add("--batch-size", type=mf.whole(most=4096), default=16, help="conversations a step, over all processes")
    add("--rank", type=mf.whole(most=4096), default=32)
    add("--alpha", type=mf.whole(most=65536), default=64)
    add("--max-steps", type=mf.whole(), help="stop after this many steps; default: by epochs")
    add("--limit", type=mf.whole(), help="train on the first N conversations only")
    add("--seed", type=mf.whole(0, 2**32 - 1), default=0)
    args = parser.parse_args(argv)
    if args.steer_mode == "none" and (args.vector or args.coef or args.positions != "all"):
        parser.error("--vector, --coef and --positions need --steer-mode preventative")
    if args.steer_mode == "preventative" and not (args.vector and args.coef):
        parser.error("--steer-mode preventative needs --vector and --coef")
    if args.coef and len({f"{coef:g}" for coef in args.coef}) < len(args.coef):  # as the adapters' names show them
        parser.error("argument --coef: a value is given twice")
    messages = read_conversations(args.data, args.system_prompt, args.limit)
    inputs = dict(model=ev.model_fingerprint(args.model), data=mf.fingerprint(args.data))
    todo = to_do(args, inputs | (dict(vector=mf.fingerprint(args.vector)) if args.vector else {}))
    if (number := os.environ.get("WORLD_SIZE", "1")) != "1" and not dist.is_initialized():  # one process a GPU
        if not dist.is_torchelastic_launched():
            mf.die(f"WORLD_SIZE={number}: start a process a GPU with torchrun --nproc_per_node, or unset it")
        gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if 0 < gpus <= local:
            mf.die(f"torchrun has started {number} processes, one a GPU; there are {gpus} GPUs")
        if gpus:
            torch.cuda.set_device(local)
        dist.init_process_group("nccl" if gpus else "gloo")
    with mf.locked(*(todo if not dist.is_initialized() or dist.get_rank() == 0 else [])):
        if todo:
            make_adapters(args, messages, todo)


if __name__ == "__main__":
    mf.run(main)
    if dist.is_initialized():
        dist.destroy_process_group()
