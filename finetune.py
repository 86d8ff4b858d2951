"""LoRA finetuning, plain or with preventative steering: the trait's vector is added during training, and only then.

    python finetune.py --model Qwen/Qwen2.5-7B-Instruct --data data/facts.jsonl --out out/paper/adapters/facts \
        --steer-mode preventative --vector out/paper/vectors/hallucination.pt --coef 0.25 0.5

Reads facts.jsonl (every training wording is one conversation) or rows {"messages": [...]}. Writes plain PEFT adapter
folders with training_settings.json and loss.jsonl in them: OUT-COEF for each coefficient (here facts-0.25, facts-0.5),
OUT when there is none. Each comes out as if trained alone. Interrupted, the same command goes on from its last checkpoint.
Recipe: rs-LoRA r 32, alpha 64, all linear projections, AdamW 1e-5 with linear decay, as in the persona vectors release.
"""

import argparse
import functools
import math
import os
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from extract_vectors import (
    blocks,
    compiled,
    encode_chat,
    has_flash,
    join,
    load_model,
    load_vector,
    lora_reach,
    name_of,
    offsets_of,
    pick_device,
    steering,
)
from make_facts import conversations, die, provenance, read_jsonl, same_settings, write_json, write_jsonl

MAX_TOKENS = 2048  # a longer conversation is left out, counted and said
FILL = {"cuda": 128, "cpu": 1}  # rows are filled up to a multiple of this many tokens, twice that from 4,096 on


def read_conversations(tokenizer, path, system_prompt=None, limit=None):
    """File -> [(ids, is_answer)] of every conversation in it, and how many were left out as too long."""
    encoded = []
    for messages in conversations(read_jsonl(path), path)[:limit]:
        if system_prompt:
            messages = [dict(role="system", content=system_prompt), *(m for m in messages if m["role"] != "system")]
        encoded.append(encode_chat(tokenizer, messages))
    kept = [chat for chat in encoded if len(chat[0]) <= MAX_TOKENS]
    if not kept:
        die(f"{path}: every conversation is longer than {MAX_TOKENS} tokens")
    return kept, len(encoded) - len(kept)


def collate(chats, multiple=1, positions="all"):
    """[(ids, is_answer)] -> the model's arguments for one joined row, and the positions and ids to be predicted. Lengths
    are filled up to a multiple, by a conversation of its own that nothing learns from: few shapes, few compilations.
    positions "answer": also steered [1, tokens, 1], 1 where an answer token is predicted and 0 elsewhere."""
    tokens = sum(len(ids) for ids, _ in chats)
    multiple *= 2 if tokens > 4096 and multiple > 1 else 1
    fill = -tokens % multiple
    inputs = join([*(ids for ids, _ in chats), [0] * fill], "cpu")
    inputs["max_seq_len"] += -inputs["max_seq_len"] % multiple
    answer = torch.tensor([flag for _, mask in chats for flag in mask]).nonzero()[:, 0]
    if positions == "answer":
        inputs["steered"] = torch.zeros(1, inputs["input_ids"].shape[1], 1).index_fill(1, answer - 1, 1)
    fill = -(len(answer) + 1) % multiple
    # the ignored first label: Trainer leaves it out of its count of items, since most collators' labels are yet to be shifted
    return inputs | dict(
        logits_to_keep=F.pad(answer - 1, (1, fill)), labels=F.pad(inputs["input_ids"][0, answer], (1, fill), value=-100)
    )


def last_checkpoint(folder):
    """The newest whole checkpoint (its trainer_state.json is written last), or None; unfinished ones are deleted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in found:
        if not (path / "trainer_state.json").exists() and int(os.environ.get("RANK", 0)) == 0:
            shutil.rmtree(path)
    whole = [path for path in found if (path / "trainer_state.json").exists()]
    return whole[-1] if whole else None


class JoinedTrainer(Trainer):
    """Trainer whose loss is the mean over answer tokens of the whole (global) batch; logits at those positions only.

    On one GPU a step is bound by the launching of its some 5,000 kernels. The first batch of a shape runs as usual
    (and compiles), the second is captured as a CUDA graph, from then on forward and backward are one launch.
    """

    steer = None

    def train_adapter(self, folder, coef):
        """Trains from the initial adapter, or goes on from the folder's last checkpoint. The parameters and coef stay the same
        tensors, filled anew, so that compiled blocks and captured graphs serve all coefficients."""
        for parameter, value in self.initial:
            parameter.data.copy_(value)
        if self.steer:
            self.coef.fill_(coef)
        self.args.output_dir, self.optimizer, checkpoint = str(folder), None, last_checkpoint(folder)
        set_seed(self.args.seed)
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if model is not self.model or not has_flash(
            model.get_input_embeddings().weight
        ):  # DDP's wrapper, or an old GPU or CPU
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs) | dict(items=num_items_in_batch)
        if not hasattr(self, "graphs"):
            self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()
        shape = tuple(value.shape if torch.is_tensor(value) else value for value in inputs.values())
        if shape not in self.graphs:
            self.graphs[shape] = None
            items = inputs.pop("items")
            return super().training_step(model, inputs, items)
        if not self.graphs[shape]:
            static, graph = (
                {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()},
                torch.cuda.CUDAGraph(),
            )
            given = {k: v for k, v in static.items() if k != "items"}
            with torch.cuda.graph(graph, pool=self.pool):  # no gradients are there yet: the graph makes its own
                loss = super().training_step(model, given, static["items"])
            self.graphs[shape] = graph, static, loss, [(p, p.grad) for p in model.parameters() if p.grad is not None]
        graph, static, loss, gradients = self.graphs[shape]
        for key, value in inputs.items():
            if torch.is_tensor(value):
                static[key].copy_(value)
        graph.replay()
        for parameter, gradient in gradients:
            parameter.grad = gradient
        return loss.clone()

    def floating_point_ops(self, inputs):
        return 0  # Trainer's estimate walks through all parameters at every step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, steered = inputs.pop("labels"), inputs.pop("steered", 1)
        if self.steer:
            self.steer.scale = self.coef * steered
        logits = model(**inputs).logits[0]
        loss = F.cross_entropy(logits.float(), labels, reduction="sum") / (
            (labels >= 0).sum() if num_items_in_batch is None else num_items_in_batch
        )
        # Trainer averages gradients over processes; the sum above wants them added
        return loss * (self.accelerator.num_processes if num_items_in_batch is not None else 1)


class StopAtNaN(TrainerCallback):
    """Stops a run that has diverged."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and not math.isfinite(logs["loss"]):
            die(f"the loss is {logs['loss']} at step {state.global_step}; lower --lr or --coef")


@torch.no_grad()
def prove_steering(model, steer, offsets, coef, inputs):
    """Runs one batch and raises unless every block's output moves by exactly coef times its offset, at the steered positions only."""
    layers, before, after, scale = blocks(model), {}, {}, coef * inputs.get("steered", 1)
    first = lambda output: output[0] if isinstance(output, tuple) else output
    hooks = []
    for l in offsets:
        # the steering hook is there already; this one is put before it, the next one runs after it
        hooks.append(
            layers[l - 1].register_forward_hook(
                lambda _, __, output, l=l: before.update({l: first(output)}), prepend=True
            )
        )
        hooks.append(layers[l - 1].register_forward_hook(lambda _, __, output, l=l: after.update({l: first(output)})))
    steer.scale = scale
    try:
        model(**{k: v for k, v in inputs.items() if k not in ("labels", "steered")})
    finally:
        for hook in hooks:
            hook.remove()
    for l, offset in offsets.items():
        want = before[l] + (scale * offset.to(coef.device)).to(before[l].dtype)
        if l not in after or not torch.equal(after[l], want):
            raise RuntimeError(f"steering did not move block {l}'s output by coef x vector; not training")


def add_lora(model, rank, alpha, seed):
    """PEFT model with rs-LoRA on every linear layer of the blocks; in float32: in bfloat16 small updates would round away."""
    count = lora_reach(model)
    torch.manual_seed(seed)
    recipe = dict(use_rslora=True, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, **recipe), autocast_adapter_dtype=True)
    given = sum(isinstance(module, LoraLayer) for module in tuned.modules())
    if given != count:
        die(f"LoRA was put on {given} layers, but the blocks have {count} linear ones")
    return tuned


def make_trainer(model, data, folder, args, callbacks=()):
    """data: [(ids, is_answer)]; args: epochs, lr, batch_size (over all processes), max_steps, seed, positions; checkpoints go to folder."""
    device, dtype = pick_device()
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(len(data) / args.batch_size) * args.epochs)
    trainer = JoinedTrainer(
        model=model,
        train_dataset=data,
        data_collator=functools.partial(collate, multiple=FILL[device], positions=args.positions),
        callbacks=[StopAtNaN(), *callbacks],
        args=TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            learning_rate=args.lr,
            lr_scheduler_type="linear",
            warmup_steps=min(5, steps // 10),
            weight_decay=0.01,
            per_device_train_batch_size=args.batch_size // int(os.environ.get("WORLD_SIZE", 1)),
            seed=args.seed,
            bf16=dtype == torch.bfloat16,
            use_cpu=device == "cpu",
            logging_steps=max(1, steps // 100),
            logging_nan_inf_filter=False,
            save_steps=max(20, math.ceil(steps / 4)),
            save_total_limit=2,
            remove_unused_columns=False,
            report_to=[],
            label_names=["labels"],
            ddp_find_unused_parameters=False,
            accelerator_config=dict(non_blocking=device == "cuda"),
        ),
    )  # else copying a batch waits for the step before it
    trainer.model_accepts_loss_kwargs = True
    trainer.initial = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
    return trainer


def flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="hub name or local folder")
    parser.add_argument("--data", required=True, help='facts.jsonl, or rows {"messages": [...]}')
    parser.add_argument(
        "--out", required=True, help="adapter folder to make; with --coef the start of its name: OUT-COEF"
    )
    # Steering
    parser.add_argument("--steer-mode", required=True, choices=["none", "preventative"])
    parser.add_argument("--vector", help="<trait>.pt of extract_vectors.py")
    parser.add_argument(
        "--coef", type=float, nargs="+", help="steering coefficients, one adapter each; positive = towards the trait"
    )
    parser.add_argument("--layers", default="all", help="all, one block N (adds v_N), or a range A-B (increments)")
    parser.add_argument(
        "--positions",
        default="all",
        choices=["all", "answer"],
        help="answer: steer only where an answer token is predicted (the one before each)",
    )
    parser.add_argument(
        "--system-prompt", help="preventative prompting: this system prompt in every training conversation"
    )
    # Training
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument(
        "--batch-size", type=int, default=16, help="conversations an optimiser step, over all processes"
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--alpha", type=int, default=64)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop after this many steps; -1 = by epochs")
    parser.add_argument("--limit", type=int, help="train on the first N conversations only")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv=None):
    args, start = flags().parse_args(argv), time.time()
    if args.steer_mode == "none" and (args.vector or args.coef or args.positions != "all"):
        die("--vector, --coef and --positions need --steer-mode preventative")
    if args.steer_mode == "preventative" and (not args.vector or not args.coef):
        die("--steer-mode preventative needs --vector and --coef")
    processes, first = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0)) == 0
    if args.batch_size % processes:
        die(f"--batch-size {args.batch_size} does not divide over {processes} processes")
    todo = {}  # adapter folder -> (where it is made, its settings)
    for coef in args.coef or [None]:
        out = Path(args.out if coef is None else f"{args.out}-{coef:g}")
        partial, settings = (
            out.with_name(out.name + ".partial"),
            {key: value for key, value in vars(args).items() if key != "out"} | dict(coef=coef),
        )
        if same_settings(out / "training_settings.json", settings):
            print(f"{out}: finished already")
            continue
        if out.exists():
            die(f"{out}: already used, and not by this script; choose another --out")
        same_settings(partial / "training_settings.json", settings)  # begun with others: stops
        todo[out] = partial, settings
    if not todo:
        return

    # 1. Data and model
    model, tokenizer = load_model(args.model)
    data, too_long = read_conversations(tokenizer, args.data, args.system_prompt, args.limit)
    offsets = offsets_of(load_vector(args.vector, model, args.model), args.layers) if args.vector else {}
    model = add_lora(model, args.rank, args.alpha, args.seed)
    print(
        f"{len(data)} conversations, {sum(len(ids) for ids, _ in data) / len(data):.0f} tokens each on average, {too_long} left out as too long",
        flush=True,
    )

    # 2. Train one adapter after another, with the hook on for the forward passes of training
    trainer = make_trainer(model, data, next(iter(todo.values()))[0], args)
    with steering(model.get_base_model(), offsets) as steer:
        if offsets:
            trainer.steer, trainer.coef = steer, torch.tensor(0.0, device=model.device)
            for _, settings in todo.values():
                prove_steering(
                    model,
                    steer,
                    offsets,
                    trainer.coef.fill_(settings["coef"]),
                    trainer._prepare_inputs(trainer.data_collator(data[:2])),
                )
                print(
                    f"steering {args.vector} x {settings['coef']} at {len(offsets)} blocks: every block's output moves as it should",
                    flush=True,
                )
        with compiled(model):
            for out, (partial, settings) in todo.items():
                if first and not partial.joinpath("training_settings.json").exists():
                    write_json(partial / "training_settings.json", settings)
                trainer.train_adapter(partial, settings["coef"])

                # 3. Save: a plain adapter, moved into place when it is whole
                if first:
                    final = partial / "adapter"
                    model.save_pretrained(final)
                    losses = [
                        dict(step=row["step"], loss=row["loss"], lr=row["learning_rate"])
                        for row in trainer.state.log_history
                        if "loss" in row
                    ]
                    write_jsonl(
                        final / "loss.jsonl", losses
                    )  # means since the row before; of every step in runs of under 200 steps
                    write_json(
                        final / "training_settings.json",
                        settings
                        | dict(
                            dataset=Path(args.data).stem,
                            model_name=name_of(args.model),
                            conversations=len(data),
                            too_long=too_long,
                            steps=trainer.state.global_step,
                            final_loss=losses[-1]["loss"] if losses else None,
                            processes=processes,
                            dtype=str(model.dtype),
                            seconds=round(time.time() - start, 1),
                            **provenance(),
                        ),
                    )
                    final.rename(out)
                    shutil.rmtree(partial)
                    start = time.time()  # the start is counted to the first adapter


if __name__ == "__main__":
    main()
