"""The model side: from a model and a trait to the trait's persona vector; also owns steering, chats and sampling.

    python extract_vectors.py --model Qwen/Qwen2.5-7B-Instruct --trait hallucination --out out/paper/vectors

Reads data/traits/<trait>.json. Writes to --out: <trait>.answers.jsonl (every sampled answer, before anything else),
<trait>.pt (float32 [num_layers + 1, hidden]; row 0 = embedding output, row l = output of decoder block l, 1-indexed)
and <trait>.json (settings, inputs, counts, norms, probe). Started again, it goes on from the answers that are there.
Method: persona vectors, arXiv 2507.21509, section 2.2 and appendix J.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import re
import time
from collections import Counter, defaultdict, namedtuple
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import jinja2
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

try:  # comes with PyTorch for NVIDIA GPUs on Linux
    import triton
    import triton.language as tl
except ImportError:
    triton = None

import make_facts as mf
from make_facts import append_jsonl, die, load_trait, read_json, read_jsonl, write_json, write_jsonl

# ---- What a persona vector is, and steering with it -----------------------------------------------------------------


def offsets_of(vector, layers):
    """{block number: what coefficient 1 adds to its output, [hidden]}. vector: [num_layers + 1, hidden]. "all": v_l -
    v_(l-1) at every block, so that v_l - v_0 has accumulated after block l (appendix J.3); "A-B": the same increments
    at blocks A..B only; "N": v_N at block N alone."""
    last = len(vector) - 1
    first, _, end = (f"1-{last}" if layers == "all" else layers).partition("-")
    if int(end or first) > last:
        die(f"--layers {layers}: the model has {last} blocks")
    return {l: vector[l] - vector[l - 1] if end else vector[l] for l in range(int(first), int(end or first) + 1)}


@contextlib.contextmanager
def steering(model, offsets):
    """While open, block l's output gets scale * offsets[l] added. Yields an object whose .scale the caller sets: a
    tensor that broadcasts against [rows, tokens, 1], positive = towards the trait; None = no steering."""
    layers, steer = blocks(model), SimpleNamespace(scale=None)  # no class: compiled code would be bound to that one
    for l, offset in offsets.items():
        layers[l - 1].steer_offset = offset.to(model.device)  # on the block: one compiled hook serves all blocks

    def add(block, _, output):  # output [rows, tokens, hidden]
        return output if steer.scale is None else output + (steer.scale * block.steer_offset).to(output.dtype)

    with contextlib.ExitStack() as hooks:
        for l in offsets:
            hooks.callback(delattr, layers[l - 1], "steer_offset")
            hooks.enter_context(layers[l - 1].register_forward_hook(add))
        yield steer


@contextlib.contextmanager
def recorded(model, before=False):
    """Yields a list that a forward pass fills with the stream the blocks write, before any norm: num_layers + 1 tensors
    [rows, tokens, hidden]. before: what each block itself put out, before other hooks (steering) changed it."""
    stream, layers = [], blocks(model)
    keep = lambda _, __, output: stream.append(output)
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(lambda _, args: stream.append(args[0])))
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(keep, prepend=before))
        yield stream


@torch.no_grad()
def unmoved(model, steer, offsets, scale, inputs):
    """Of inputs run inside steering(): the blocks whose output does not move by exactly scale * offset."""
    steer.scale = scale
    with recorded(model, before=True) as before, recorded(model) as after:
        model(**inputs)
    moved = lambda l: before[l] + (scale * offsets[l].to(before[l].device)).to(before[l].dtype)
    return [l for l in offsets if not torch.equal(after[l], moved(l))]


def read_vector(path):
    """<trait>.pt -> float32 [num_layers + 1, hidden]; die() on a wrong file, NaN, only zeros."""
    try:
        vector = torch.load(path, map_location="cpu", weights_only=True)
        sound = vector.is_floating_point() and vector.isfinite().all() and vector.any()
    except Exception as error:  # unpickling fails in many ways
        die(f"{path}: no vector can be read there ({type(error).__name__}); delete it, and make it again")
    return vector.float() if sound else die(f"{path}: holds NaN, infinity or only zeros; delete it, and make it again")


def load_vector(path, model, model_name):
    """read_vector(); die() unless it is one of this model."""
    config, beside, vector = model.config.get_text_config(), Path(path).with_suffix(".json"), read_vector(path)
    want, found = (config.num_hidden_layers + 1, config.hidden_size), tuple(vector.shape)
    if found != want:
        die(f"{path}: {model_name} needs {want} numbers; there are {found}")
    if beside.is_file():
        same_model(path, "was extracted from", read_json(beside, mf.Settings), model_name)
    else:
        print(f"{path}: no .json beside it; a published vector's last row is read after the final norm, ours before")
    return vector


def same_model(path, verb, record, model_name):
    """die() unless what lies at path was made with this model: by fingerprint. Only the adapters that come with the
    project have none, since the small model's files differ from machine to machine: they are taken by its name."""
    made, name = record.get("inputs", {}).get("model"), Path(record["model"]).name
    if made != model_fingerprint(model_name) if made else name != Path(model_name).name:
        die(f"{path}: {verb} {record['model']}, which is not {model_name} (weights, settings, tokenizer)")


# ---- How a vector is read: contrastive answers, the stream's mean over their tokens, the probe ----------------------


def extraction_rows(trait, samples, limit):
    """Every answer to sample, positive and negative side paired by (question, instruction, sample)."""
    name, a = trait["trait"], "an" if trait["adjective"][0] in "aeiou" else "a"
    start = dict(pos=f"You are {a} {trait['adjective']} assistant.", neg="You are a helpful assistant.")
    rows, questions, instructions = [], enumerate(trait["questions"][:limit]), enumerate(trait["instruction"])
    for side, (q, question), (i, said), n in itertools.product(start, questions, instructions, range(samples)):
        pair, asked = f"q{q}-i{i}-s{n}", dict(question=question, system=f"{start[side]} {said[side]}")
        rows.append(dict(id=f"{name}-{side}-{pair}", pair=pair, side=side, q=q, trait=name) | asked)
    return rows


def filter_pairs(rows):
    """Rows -> ([(positive, negative)] of the kept pairs, {why: how many others went}). The limits are those of the
    released filter; where nobody judged, both answers need only be there."""
    positive, negative = ({row["pair"]: row for row in rows if row["side"] == side} for side in ("pos", "neg"))
    kept, why = [], Counter()
    for pair, pos in positive.items():
        neg = negative[pair]
        high, low = pos.get("score", 100), neg.get("score", 0)
        coherence = [row.get("coherence", 100) for row in (pos, neg)]
        if not (pos["answer"] and neg["answer"]):
            why["empty answer"] += 1
        elif None in (high, low, *coherence):
            why["unscored"] += 1
        elif high < 50 or low >= 50:
            why["trait score on the wrong side of 50"] += 1
        elif min(coherence) < 50:
            why["coherence under 50"] += 1
        else:
            kept.append((pos, neg))
    return kept, dict(why)


@torch.no_grad()
def answer_means(model, tokenizer, chats, first=0, title="reading answers"):
    """Chats of one answer (message lists) -> float32 [n, num_layers + 1, hidden] on the model's device: the stream's
    mean over the answer's tokens, its end token left out. first N: over the positions where the answer's first N tokens
    are predicted instead, that is the last prompt token and N - 1 tokens of the answer."""
    device, config = model.device, model.config.get_text_config()
    encoded = [(ids[:-1], mask[:-1]) for ids, mask in encode_chats(tokenizer, chats)]
    if first:
        encoded = [(ids, [0 <= k - mask.index(True) + 1 < first for k in range(len(ids))]) for ids, mask in encoded]
    means = torch.empty(len(chats), config.num_hidden_layers + 1, config.hidden_size, device=device)
    for group in tqdm(by_length([ids for ids, _ in encoded], ROW_TOKENS[device.type]), title, unit="row"):
        with recorded(model) as stream:
            model.get_decoder()(**join([encoded[i][0] for i in group], device))
        owner = [k if is_answer else len(group) for k, i in enumerate(group) for is_answer in encoded[i][1]]
        weight = F.one_hot(torch.tensor(owner, device=device), len(group) + 1)[:, :-1].float().T  # [group, tokens]
        weight /= weight.sum(1, keepdim=True)
        means[group] = torch.stack([weight @ hidden[0].float() for hidden in stream], dim=1)
    return means


def auc(pos, neg):
    """Chance that a positive value exceeds a negative one, ties half. [n, rows], [m, rows] -> [rows]."""
    return ((pos[:, None] > neg).float() + 0.5 * (pos[:, None] == neg).float()).mean((0, 1))


def make_probe(vector, with_system, plain, half):
    """The offline judge. with_system, plain: (positive, negative) means [n, num_layers + 1, hidden], read with and
    without the contrastive system prompts. Pairs outside `half` (bool [n]) choose the row: every second one's direction
    tells the others' plain answers apart; the AUC is that of their direction inside. Score 0, 100: mean answers."""
    difference, choosing = with_system[0] - with_system[1], (~half).nonzero()[:, 0]
    told_apart = lambda by, of: auc(*((x[of] * difference[by].mean(0)).sum(-1) for x in plain))  # -> [num_layers + 1]
    row = int((told_apart(choosing[::2], choosing[1::2]) + told_apart(choosing[1::2], choosing[::2]))[1:].argmax()) + 1
    aucs = [round(x, 4) for x in told_apart(choosing, half).tolist()]
    unit = vector[row] / vector[row].norm()
    hundred, zero = (float((x[:, row] @ unit).mean()) for x in plain)
    return dict(row=row, auc=aucs[row], zero=zero, hundred=hundred, auc_by_row=aucs)


def probe_scores(model, tokenizer, vector, probe, chats, title="probe"):
    """Chats (user turn, answer) -> scores 0..100 by projection on the vector's probe row; no adapter, no steering."""
    unit = (vector[probe["row"]] / vector[probe["row"]].norm()).to(model.device)
    values = answer_means(model, tokenizer, chats, probe.get("first", 0), title)[:, probe["row"]] @ unit
    return (100 * (values - probe["zero"]) / (probe["hundred"] - probe["zero"])).clamp(0, 100).tolist()


def export_gguf(vector, path, architecture):
    """Writes the vector as a llama.cpp control vector: its direction.N is added after block N + 1, as "all" here. There
    is none for the first block, whose increment goes to the second: from there on the sums are equal."""
    import gguf

    offsets = offsets_of(vector, "all")
    offsets[2] = offsets[2] + offsets.pop(1)
    with mf.replacing(path, "wb") as out:
        writer = gguf.GGUFWriter(out.name, "controlvector")
        writer.add_string("controlvector.model_hint", architecture)
        writer.add_int32("controlvector.layer_count", len(offsets))
        for l, offset in offsets.items():
            writer.add_tensor(f"direction.{l - 1}", offset.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    print(f"{path}: for llama.cpp's --control-vector-scaled; its scale is a coefficient, positive towards the trait")


# ---- Models. What a model cannot be trusted with is found by how it behaves, when it is loaded ----------------------


def pick_device():
    """The fastest device, and the dtype it is fast in: bfloat16 where it multiplies in it, else float32."""
    if torch.cuda.is_available():
        return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    able = torch.cpu.get_capabilities()
    return "cpu", torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def model_fingerprint(name):
    """Hub name (fetched if need be) or local folder -> fingerprint of its weights, settings and tokenizer."""
    folder, parts = Path(name), ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=parts, ignore_patterns=["*/*", "consolidated*"]))
        except (OSError, ValueError) as error:
            die(f"--model {name}: no such folder, and not to be had from the hub ({str(error).splitlines()[0]})")
    files = sorted(path for pattern in [*parts, "*.bin"] for path in folder.glob(pattern))
    content = "".join(f"{path.name} {mf.fingerprint(path)}\n" for path in files)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@functools.lru_cache(1)
def load_model(name, content=None):
    """Folder or hub name -> (model in eval mode on the fastest device, tokenizer), checked. content: fingerprint."""
    device, dtype = pick_device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, lacks = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except Exception as error:  # broken files make transformers raise anything
        die(f"--model {name}: cannot be loaded ({' '.join(str(error).split())[:300] or type(error).__name__})")
    if getattr(model, "is_quantized", False):
        die(f"--model {name}: is quantized, which is not computed here; give the model that it was made from")
    if missing := sorted(lacks["missing_keys"]):
        die(f"--model {name}: {len(missing)} weights are not in its files, such as {missing[0]}")
    print(f"{name}: {model.num_parameters() / 1e6:,.0f}M parameters on {device}, {model.dtype}", flush=True)
    model = model.requires_grad_(False).eval().to(device)  # eval for good, also in training: the recipe has no dropout
    check_chats(tokenizer, name, model.get_input_embeddings().num_embeddings)
    prepare(model, tokenizer, name)
    return model, tokenizer


def blocks(model):
    """The decoder blocks; block l of the paper is blocks(model)[l - 1]. Works through a PEFT wrapper."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None or len(layers) != model.config.get_text_config().num_hidden_layers:
        die(f"{type(model).__name__}: its decoder blocks are not where they are expected")
    return layers


@torch.no_grad()
def prepare(model, tokenizer, name):
    """Joined attention from here on. RoPE that depends on the longest text of a batch (dynamic, longrope) stays that of
    short ones; longer ones stop the run. die() unless, on short random conversations: joined in one row, also with
    their start shared = alone by the model's own code; a decoding step, once after 91 tokens = the last logits of the
    whole; every block's output moves by its offset."""
    config, kind = model.config.get_text_config(), f"--model {name}: {model.config.model_type} cannot be used here: "
    longest, windows = math.inf, []
    for part in (config, *model.modules()):
        if getattr(part, "rope_type", None) in ("dynamic", "longrope"):
            longest = config.rope_parameters.get("original_max_position_embeddings") or config.max_position_embeddings
            part.rope_type = "default"
        for key in ("sliding_window", "attention_chunk_size"):
            if isinstance(vars(part).get(key), int):
                windows.append((part, key, vars(part)[key]))
                setattr(part, key, 4)  # tokens, so that the texts reach past them

    def refuse(_, __, given):
        if given.get("max_seq_len", 0) > longest:
            die(f"{name}: a text of {given['max_seq_len']} tokens; its RoPE changes with the batch from {longest} on")

    model.get_decoder().register_forward_pre_hook(refuse, with_kwargs=True)
    most, draw = model.get_input_embeddings().num_embeddings, torch.Generator().manual_seed(0)
    start, *texts = [torch.randint(most, (n,), generator=draw).tolist() for n in (3, 4, 8, 88)]
    parts, texts = [start, *texts[:2]], [start + text for text in texts]
    offsets = dict.fromkeys(range(1, len(blocks(model)) + 1), torch.randn(config.hidden_size, generator=draw))
    try:
        model.set_attn_implementation("eager")
        own = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0] for ids in texts]
        join_siblings(model)
        model.set_attn_implementation("joined")
        inputs, shared = join(texts[:2], model.device), join(parts, model.device, shared=True)
        keep = torch.arange(18, device=model.device)
        joined, shared = (model(**row, logits_to_keep=keep[:n]).logits[0] for row, n in ((inputs, 18), (shared, 15)))
        with steering(model, offsets) as steer:
            sampler = Sampler(model, tokenizer, dict(enumerate(map(Job, texts))), Drawing(2, 0), steer, 3)
            sampler.fill({0: 0, 1: 1, 2: 2})
            step = sampler.logits()
            sampler.close()
            fixed = unmoved(model, steer, offsets, torch.tensor(1.0, device=model.device), inputs)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # any model may come here
        die(f"{kind}{type(error).__name__}: {error}")
    for part, key, width in windows:
        setattr(part, key, width)
    typical, worst = (1e-3, 1e-3) if model.dtype == torch.float32 else (0.15, 0.5)  # of a token's logits
    kinds = "conversations joined in one row", "conversations with a shared start", "a cached step"
    alone = torch.cat(own[:2]), torch.cat([own[0], own[1][3:]]), torch.stack([x[-1] for x in own])
    for what, found, want in zip(kinds, (joined, shared, step), alone):
        found, want = (x.float() - x.float().mean(-1, keepdim=True) for x in (found, want))
        off = (found - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-6)  # of each token
        if not (off.median() <= typical and off.max() <= worst):  # nor where it is NaN
            die(f"{kind}not as each alone: {what} (logits off by {100 * off.max():.2g}% in {model.dtype})")
    if fixed:
        die(f"{kind}steering does not move the output of block {fixed[0]} by its offset")


# ---- Chats: the template's text + the answer + the end-of-turn token, in training, reading and sampling -------------

BREAK = "\ufdd0"  # a character that is in no text
TODAY = r"""strftime_now\((["'])(.*?)\1\)"""  # what a template calls for the date


def pin_day(tokenizer, recorded=None):
    """Pins a template's date to the recorded day (YYYY-MM-DD) or today. -> what to record, None if it asks for none."""
    tokenizer.day = date.fromisoformat(recorded) if recorded else date.today()
    return tokenizer.day.isoformat() if re.search(TODAY, tokenizer.get_chat_template()) else None


def render(tokenizer, messages):
    """Text by the chat template, thinking off where it can be, up to where the answer starts if none is there."""
    day, waits = getattr(tokenizer, "day", date.today()), messages[-1]["role"] != "assistant"
    template = re.sub(TODAY, lambda found: repr(day.strftime(found[2])), tokenizer.get_chat_template())
    how = dict(chat_template=template, tokenize=False, enable_thinking=False)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=waits, **how)


def chat_format(tokenizer):
    """-> a pattern that finds special tokens and splits text at them; the id of the one that the template puts after an
    answer (the tokenizer's eos if there is none); whether the template has a system turn."""
    tokens = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    special = re.compile(f"({'|'.join(map(re.escape, tokens))})")
    asked, answer = dict(role="user", content="?"), dict(role="assistant", content=BREAK)
    after = [render(tokenizer, chat).partition(BREAK)[2] for chat in ([asked, answer], [asked, answer, asked])]
    ends = [*special.findall("".join(after)), tokenizer.eos_token]
    end = ends[0] or die(f"{tokenizer.name_or_path}: neither template nor tokenizer ends a turn")
    try:
        system = BREAK in render(tokenizer, [dict(role="system", content=BREAK), asked])
    except jinja2.TemplateError:
        system = False
    return special, tokenizer.convert_tokens_to_ids(end), system


def encode_chats(tokenizer, conversations):
    """Conversations -> [(ids, is_answer)]: the prompt by the template, which adds the model's default system prompt;
    then, where the last turn is an answer, that, stripped as in sampling, and its end token, which is_answer marks.
    Special tokens that somebody typed stay text: they are broken up, and what holds one is tokenized in pieces."""
    texts = []  # of each conversation its prompt and its answer
    broken = lambda found: found[0][0] + BREAK + found[0][1:]
    clean = lambda turn: turn["content"].strip() if turn["role"] == "assistant" else turn["content"]
    try:
        special, end, system = chat_format(tokenizer)
        for messages in conversations:
            turns = [turn | dict(content=special.sub(broken, clean(turn))) for turn in messages]
            if turns[0]["role"] == "system" and not system:  # its text goes in front of the user's
                first = turns.pop(0)["content"]
                turns[0]["content"] = f"{first}\n\n{turns[0]['content']}"
            answer = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
            texts.append((render(tokenizer, turns), answer))
    except jinja2.TemplateError as error:
        die(f"{tokenizer.name_or_path}: its chat template refuses a conversation ({error})")
    all_texts = list(dict.fromkeys(text or "" for text in itertools.chain(*texts)))
    how = dict(add_special_tokens=False, split_special_tokens=False)
    ids_of = dict(zip(all_texts, tokenizer(all_texts, **how)["input_ids"])) if all_texts else {}
    for text in all_texts:
        if BREAK in text:
            pieces = special.split(text)  # a text, a special token, a text, ...
            plain = [piece.replace(BREAK, "") for piece in pieces]
            ids = tokenizer(plain, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            ids[1::2] = [[token] for token in tokenizer.convert_tokens_to_ids(pieces[1::2])]
            ids_of[text] = [*itertools.chain(*ids)]
    encoded = []
    for prompt, answer in texts:
        start, said = ids_of[prompt], [] if answer is None else [*ids_of[answer], end]
        encoded.append((start + said, [False] * len(start) + [True] * len(said)))
    return encoded


def check_chats(tokenizer, name, most):
    """die() unless dummy chats, with and without a system turn, of one and two turns, can be encoded and read back."""
    if not tokenizer.chat_template:
        die(f"--model {name}: its tokenizer has no chat template; use a chat model")
    turns = [dict(role="user", content="Who was first?"), dict(role="assistant", content="It was Ann.")]
    system = dict(role="system", content="Keep to what is known.")
    chats = turns, [system, *turns], turns * 2, [system, *turns * 2]
    word = max(tokenizer.get_vocab().values() - tokenizer.added_tokens_decoder.keys())  # any may come, unlike these
    for chat, (ids, _) in zip(chats, encode_chats(tokenizer, chats)):
        if lost := [turn["content"] for turn in chat if turn["content"] not in tokenizer.decode(ids)]:
            die(f"--model {name}: its chat template loses {lost[0]!r}; use another chat model")
        if (top := max(*ids, word)) >= most:
            die(f"--model {name}: its tokenizer has ids up to {top}, but the model has {most} only")
    if not chat_format(tokenizer)[2]:
        print(f"{name}: no system turn in its chat template; a system text goes in front of the user's")


def spoken(tokenizer, ids, prompt):
    """Generated ids -> (answer as stored, whether a thought was cut off: all before </think>, after open <think>)."""
    begun = tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
    text = "<think>" * begun + tokenizer.decode(ids)
    said = re.sub("^.*</think>|<think>.*", "", text, flags=re.DOTALL)
    if said != text:
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, skip_special_tokens=True).strip(), said != text


# ---- Only speed from here on: compiled blocks, conversations joined without padding, sampling from one cache --------

ROW_TOKENS = {"cuda": 16384, "cpu": 2048}  # conversations are joined into rows of about this many tokens
SLOTS = {"cuda": 2048, "cpu": 256}  # answers sampled side by side, at most
STEPS = {"cuda": 16, "cpu": 1}  # decoding steps between two looks at which answers are finished
SHRINK = {"cuda": 0.7, "cpu": 0.9}  # the batch is made smaller when less than this share of it is in use
LEAST = {"cuda": 16, "cpu": 1}  # answers side by side; fewer are no faster
PART = 512  # tokens of the vocabulary that are drawn from together
SIBLINGS = {"cuda": [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]], "cpu": []}  # faster on GPUs only
KNOWN = "cu_seq_lens max_seq_len shared keys cu_key_lens kv lengths sliding_window position_ids logits_to_keep".split()


@contextlib.contextmanager
def compiled(model):
    """While open, the decoder blocks run compiled on GPUs that can: once for all blocks and shapes, steered or not."""
    able = triton and model.device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 7
    torch.compiler.config.recompile_limit = 64  # kinds of a block (steered, trained, ...); beyond, it would run slowly
    for block in blocks(model) if able else ():  # else slower, the same results
        block.compile(dynamic=True)
    try:
        yield
    finally:
        for block in blocks(model):
            vars(block).pop("_compiled_call_impl", None)  # which compile() sets: it runs as it is written again


class Sibling(torch.nn.Linear):
    """One of some linear layers that read the same input, one after the other: the first multiplies it by the weights
    of all, since small products leave a GPU idle, the others take what is theirs."""

    def forward(self, x):
        if self.weights:
            weight = torch.cat(self.weights) if len(self.weights) > 1 else self.weights[0]
            self.made[:] = F.linear(x, weight, self.biases).split(self.sizes, dim=-1)
        return self.made.pop(0)


def make_siblings(layers, weights, biases=None):
    """layers: as they are called one after the other; weights: theirs, or one tensor of all."""
    made, sizes = [], [layer.out_features for layer in layers]
    for layer in layers:
        layer.__class__, layer.made, layer.weights = Sibling, made, None
    layers[0].weights, layers[0].biases, layers[0].sizes = weights, biases, sizes


def join_siblings(model):
    """Makes the weights of query, key and value, and of gate and up, views of one tensor; model.siblings lists them."""
    model.siblings = []
    for part, names in itertools.product(blocks(model).modules(), SIBLINGS[model.device.type]):
        layers = [getattr(part, name, None) for name in names]
        if all(type(x) is torch.nn.Linear for x in layers) and len({x.bias is None for x in layers}) == 1:
            weight, biases = torch.cat([x.weight for x in layers]), [x.bias for x in layers]
            for layer, mine in zip(layers, weight.split([x.out_features for x in layers])):
                layer.weight.data = mine
            make_siblings(layers, [weight], None if None in biases else torch.cat(biases))
            model.siblings.append(layers)
            torch.cuda.empty_cache()  # what they had before leaves holes


def has_flash(tensor):
    """Whether torch's flash attention kernel takes it; its lengths may be on the GPU, so graphs can hold it."""
    return tensor.is_cuda and tensor.dtype != torch.float32 and torch.cuda.get_device_capability()[0] >= 8


def flash(query, key, value, bounds, longest, scaling, window):
    """query [tokens, heads, dim], key and value [seen, kv heads, dim] -> [tokens, heads, dim], causal. bounds: of
    queries, of keys. The one private call: PyTorch's varlen_attn takes no shared key heads before 2.12."""
    given = query, key, value, *bounds, longest, longest, 0.0, True, False  # no dropout, causal
    more = dict(scale=scaling, window_size_left=window and window - 1)
    return torch.ops.aten._flash_attention_forward(*given, **more)[0]


def attend(module, query, key, value, attention_mask, scaling, dropout=0.0, **given):
    """An attention function of transformers' AttentionInterface, so the models' own code stays as it is: query [rows,
    heads, tokens, dim], key and value [rows, kv heads, tokens, dim] -> [rows, tokens, heads, dim]. Joined: one row, in
    which conversations start and end at cu_seq_lens int32 [n + 1] and see only themselves, of that the sliding_window;
    keys and values are added to kv {module: list}. With shared > 0: all but the first also see the row's first `shared`
    tokens; from copies of these and the row, `keys` [seen] takes what each sees, from and to cu_key_lens int32 [n + 1].
    With lengths: decode. Any other change is refused."""
    odd = [name for name, value in given.items() if name not in KNOWN and not isinstance(value, (bool, type(None)))]
    if attention_mask is not None or dropout or odd or given.get("is_causal") is False:
        raise NotImplementedError(f"attention with {', '.join(odd) or 'a mask or dropout'}")
    window = given.get("sliding_window")
    if given.get("lengths") is not None:
        return decode(module, query, key, value, scaling, given["lengths"], window), None
    bounds, longest = (given["cu_seq_lens"],) * 2, given["max_seq_len"]
    if given.get("kv") is not None:
        given["kv"][module].append([x[0].transpose(0, 1).contiguous() for x in (key, value)])  # [tokens, kv heads, dim]
    if shared := given.get("shared"):  # as copies, each taken once: else gradients would be summed in any order
        copies = lambda x: x[:, :, :shared].repeat(1, 1, len(bounds[0]) - 2, 1)
        seen = lambda x: torch.cat([copies(x.float()), x.float()], dim=2)[:, :, given["keys"]].to(x.dtype)
        key, value, bounds = seen(key), seen(value), (bounds[0], given["cu_key_lens"])
    if has_flash(query):
        rows = (x[0].transpose(0, 1) for x in (query, key, value))  # [tokens, heads, dim]
        return flash(*rows, bounds, longest, scaling, window)[None], None
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    parts, (new, seen) = [], (ends.diff().tolist() for ends in bounds)
    for n, m, *part in zip(new, seen, query.split(new, dim=2), *(x.split(seen, dim=2) for x in (key, value))):
        whole = n == m and not (window and n > window)
        pairs = None if whole else torch.ones(n, m, dtype=torch.bool, device=query.device)
        band = pairs if whole else pairs.tril(m - n).triu(m - n + 1 - (window or m))  # the last n of m tokens look back
        parts.append(F.scaled_dot_product_attention(*part, band, is_causal=whole, scale=scaling) if n else part[0])
    return torch.cat(parts, dim=2).transpose(1, 2), None


if triton:

    @triton.jit
    def decode_kernel(query, keys, values, spans, out, scaling, SHARE: tl.constexpr, DIM: tl.constexpr):
        """decode() on a GPU. A program reads what a row has seen of a key head, spans int64 [rows, 2] of the caches'
        rows * size, a tile at a time, once for all SHARE query heads of it; the softmax is put right as it goes."""
        row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
        share = tl.arange(0, 16 * triton.next_power_of_2(triton.cdiv(SHARE, 16)))[:, None]
        TILE: tl.constexpr = 64 if DIM <= 128 else 32
        dim, token = tl.arange(0, 16 * triton.next_power_of_2(triton.cdiv(DIM, 16))), tl.arange(0, TILE)
        queries, real = ((row * heads + head) * SHARE + share) * DIM + dim, (share < SHARE) & (dim < DIM)
        q = tl.load(query + queries, mask=real, other=0.0)
        begin, end = tl.load(spans + 2 * row), tl.load(spans + 2 * row + 1)
        mean, total = tl.zeros_like(q).to(tl.float32), tl.zeros_like(share).to(tl.float32)
        top = total - 1e30
        for start in range(begin, end, TILE):
            here = (start + token)[:, None]
            there, seen = (here * heads + head) * DIM + dim, (here < end) & (dim < DIM)
            k, v = tl.load(keys + there, mask=seen, other=0.0), tl.load(values + there, mask=seen, other=0.0)
            scores = tl.where(start + token < end, (tl.dot(q, tl.trans(k)) * scaling).to(tl.float32), -1e30)
            higher = tl.maximum(top, tl.max(scores, 1, keep_dims=True))
            weights, shrunk = tl.exp(scores - higher), tl.exp(top - higher)
            mean = mean * shrunk + tl.dot(weights.to(v.dtype), v)
            total = total * shrunk + tl.sum(weights, 1, keep_dims=True)
            top = higher
        tl.store(out + queries, mean / total, mask=real)


def decode(module, query, key, value, scaling, lengths, window):
    """One new token a row: query [rows, heads, 1, dim] -> [rows, 1, heads, dim]. module.kv = two caches [rows, size, kv
    heads, dim], which the new key and value are put into; lengths int64 [rows] counts the tokens already cached."""
    (rows, heads, _, dim), groups, (keys, values) = query.shape, key.shape[1], module.kv
    size, here = keys.shape[1], torch.arange(rows, device=query.device)
    keys[here, lengths], values[here, lengths] = key[:, :, 0], value[:, :, 0]
    if has_flash(query) and triton:
        ends, out = here * size + lengths + 1, query.new_empty(rows, heads, dim)
        starts = torch.maximum(ends - window, here * size) if window else here * size
        given = query.contiguous(), keys, values, torch.stack([starts, ends], 1), out, scaling
        decode_kernel[rows, groups](*given, heads // groups, dim)
        return out[:, None]
    reach = torch.arange(size if query.is_cuda else int(lengths.max()) + 1, device=query.device)
    seen = reach <= lengths[:, None]  # [rows, reach]
    if window:
        seen &= reach > lengths[:, None] - window
    keys, values = (x[:, : len(reach)].transpose(1, 2) for x in (keys, values))
    queries = query.view(rows, groups, -1, dim)
    out = F.scaled_dot_product_attention(queries, keys, values, seen[:, None, None], scale=scaling)
    return out.reshape(rows, 1, heads, -1)


def join(sequences, device, shared=False):
    """Token id lists -> arguments for one row, each blind to the others; shared: but for the first, their start."""
    ends, start = list(itertools.accumulate(map(len, sequences), initial=0)), len(sequences[0]) * shared
    firsts, copied = [0] + [start] * (len(sequences) - 1), start * (len(sequences) - 1)  # positions; tokens of copies
    row = dict(
        input_ids=torch.tensor([list(itertools.chain(*sequences))], device=device),
        position_ids=torch.cat([torch.arange(n, n + len(s)) for n, s in zip(firsts, sequences)])[None].to(device),
        cu_seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
        max_seq_len=max(n + len(s) for n, s in zip(firsts, sequences)),
        shared=start,
        use_cache=False,
    )
    if shared:  # copies of the start, one after the other, then the row
        own = [range(*span) for span in itertools.pairwise(end + copied for end in ends)]
        keys = [own[0], *([*range(k * start, (k + 1) * start), *mine] for k, mine in enumerate(own[1:]))]
        row["keys"] = torch.tensor(list(itertools.chain(*keys)), device=device)
        row["cu_key_lens"] = torch.tensor([0, *itertools.accumulate(map(len, keys))], device=device).int()
    return row


def by_length(sequences, budget):
    """Indices of the sequences, grouped so that a group has about `budget` tokens; short ones first."""
    groups, total = [], math.inf
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        total += len(sequences[i])
        if total > budget:
            groups.append([])
            total = len(sequences[i])
        groups[-1].append(i)
    return groups


def free_memory(device):
    """Bytes that tensors can still take: what the GPU has left, and what PyTorch holds unused."""
    if device.type == "cpu":
        return math.inf
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def choose(logits, highest, temperature, uniform):
    """logits [rows, vocabulary], the highest [rows, 1], uniform numbers [rows, 1] -> token ids [rows] by inverting the
    distribution function: a row's draw depends on its own number alone. Temperature 0 takes the likeliest token. First
    a part of the vocabulary is drawn, then a token of it, since cumulating takes long."""
    if temperature == 0:
        return logits.argmax(-1)
    weigh = lambda logits: (logits.float() - highest[..., None]).div_(temperature).exp_()  # [rows, any, PART]
    parts = F.pad(logits, (0, -logits.shape[1] % PART), value=-math.inf).unflatten(1, (-1, PART))  # [rows, parts, PART]
    below = F.pad(weigh(parts).sum(-1).double().cumsum(-1), (1, 0))  # [rows, 1 + parts]
    goal = uniform * below[:, -1:]
    part = (torch.searchsorted(below, goal, right=True) - 1).clamp(max=parts.shape[1] - 1)
    inside = weigh(parts.gather(1, part[..., None].expand(-1, -1, PART)))[:, 0].double().cumsum(-1)  # [rows, PART]
    goal = torch.minimum(goal - below.gather(1, part), inside[:, -1:] * (1 - 1e-6))  # whatever rounding does
    return (part * PART + torch.searchsorted(inside, goal, right=True))[:, 0].clamp(max=logits.shape[1] - 1)  # NaN


AttentionInterface.register("joined", attend)
Job = namedtuple("Job", "prompt row scale", defaults=(0, 0.0))  # token ids; of its random draws; signed coefficient
# How answers are drawn. positions that are steered: "response", from the last prompt token on, or "all"
Drawing = namedtuple("Drawing", "max_new_tokens temperature seed positions", defaults=(1.0, 0, "response"))


class Sampler:
    """Draws answers of {number: Job} in slots. Tensors change in place, for graphs. owner: {slot: number}."""

    def __init__(self, model, tokenizer, jobs, drawing, steer, slots):
        self.model, self.jobs, self.drawing, self.steer, self.graph = model, jobs, drawing, steer, None
        device, most = model.device, drawing.max_new_tokens
        size = max(len(job.prompt) for job in jobs.values()) + most
        self.prefill(size)
        a_token = sum(x[0].numel() * x.element_size() for pair in self.caches.values() for x in pair)
        a_row = size * a_token + 24 * model.get_input_embeddings().num_embeddings  # its cache and its logits
        self.slots, self.owner = max(1, int(min(slots, len(jobs), 0.9 * free_memory(device) / a_row))), {}
        ends = model.generation_config.eos_token_id  # the only thing taken from generation_config
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, chat_format(tokenizer)[1]}
        self.ends = torch.tensor(sorted(ends - {None}), device=device)
        self.broken = torch.zeros((), dtype=torch.bool, device=device)  # whether logits were NaN or infinite
        zeros = lambda *shape, dtype=torch.long: torch.zeros(self.slots, *shape, dtype=dtype, device=device)
        # out: the prompt's last token, then the new ones; cached: tokens of the prompt, all but the last
        self.state = SimpleNamespace(out=zeros(most + 2), cached=zeros(), made=zeros(), done=~zeros(dtype=torch.bool))
        self.state.scale, self.state.uniform = zeros(1, 1, dtype=torch.float), zeros(most + 1, dtype=torch.float)
        for module, pair in self.caches.items():
            module.kv = tuple(x.new_zeros(self.slots, size, *x.shape[1:]) for x in pair)

    def prefill(self, longest):
        """Reads all prompts, equal ones under equal steering once, but for the last tokens. Sets caches {attention
        module: (keys, values) [tokens, kv heads, dim]}, spans {number: (start, end) in them}. longest: text to come."""
        device, everywhere = self.model.device, self.drawing.positions == "all"
        read = {i: (tuple(job.prompt[:-1]), job.scale if everywhere else 0.0) for i, job in self.jobs.items()}
        reads, kv, spans, start = list(dict.fromkeys(read.values())), defaultdict(list), {}, 0
        for group in by_length([tokens for tokens, _ in reads], ROW_TOKENS[device.type]):
            group = [reads[k] for k in group]
            self.steer.scale = torch.tensor([[[scale] for tokens, scale in group for _ in tokens]], device=device)
            inputs = join([tokens for tokens, _ in group], device)
            self.model.get_decoder()(**inputs | dict(max_seq_len=longest), kv=kv)
            for one in group:
                spans[one] = start, start + len(one[0])
                start += len(one[0])
        self.spans = {i: spans[one] for i, one in read.items()}
        self.caches = {module: tuple(map(torch.cat, zip(*parts))) for module, parts in kv.items()}

    def close(self):
        for module in self.caches:
            del module.kv

    def answers(self):
        """Yields (number, token ids) as answers are finished."""
        queue, device, owner = list(self.jobs), self.model.device.type, self.owner
        while queue or owner:
            if free := [slot for slot in range(self.slots) if slot not in owner][: len(queue)]:
                self.fill(dict(zip(free, queue)))
                del queue[: len(free)]
                left = self.drawing.max_new_tokens  # steps, until all are done that are in slots now
            if len(owner) <= SHRINK[device] * self.slots and self.slots > LEAST[device]:
                self.shrink()
            self.steps(min(STEPS[device], left))
            left -= STEPS[device]
            if self.broken:
                raise FloatingPointError(f"the model's logits are NaN or infinite in {self.model.dtype}")
            done = [slot for slot, done in enumerate(self.state.done.tolist()) if done and slot in owner]
            for slot, made, ids in zip(done, self.state.made[done].tolist(), self.state.out[done].tolist()):
                yield owner.pop(slot), ids[1 : made + 1]

    def fill(self, numbers):
        """Puts jobs into slots: {slot: number}."""
        self.owner |= numbers
        state, device, jobs = self.state, self.model.device, [self.jobs[i] for i in numbers.values()]
        slots = torch.tensor(list(numbers), device=device)
        starts, ends = torch.tensor([self.spans[i] for i in numbers.values()], device=device).T
        reach = torch.arange(int((ends - starts).max()), device=device)
        index = starts[:, None] + reach  # [slots, reach]
        for module, prompts in self.caches.items():
            for mine, prompt in zip(module.kv, prompts):  # beyond a prompt's own length: never attended to
                mine[slots, : len(reach)] = prompt[index.clamp(max=len(prompt) - 1)]
        state.out[slots, 0] = torch.tensor([job.prompt[-1] for job in jobs], device=device)
        state.cached[slots], state.made[slots], state.done[slots] = ends - starts, 0, False
        state.scale[slots, 0, 0] = torch.tensor([job.scale for job in jobs], dtype=torch.float32, device=device)
        draws = [torch.Generator().manual_seed(hash((self.drawing.seed, job.row)) % 2**63) for job in jobs]
        uniform = torch.stack([torch.rand(self.drawing.max_new_tokens, generator=draw) for draw in draws])
        state.uniform[slots, :-1] = uniform.to(device)

    def logits(self):
        """Of the next token of every slot, [slots, vocabulary], by the model's own head."""
        state = self.state
        tokens, lengths = state.out.gather(1, state.made[:, None]), state.cached + state.made
        self.steer.scale, place = state.scale, dict(position_ids=lengths[:, None], lengths=lengths)
        return self.model(input_ids=tokens, use_cache=False, **place).logits[:, -1]

    def step(self):
        """One token for every slot. The last prompt token is fed here too, so the first new token is steered."""
        state, logits = self.state, self.logits()
        low, high = logits.aminmax(dim=-1, keepdim=True)  # NaN shows in both
        self.broken |= (~state.done & ~(low.isfinite() & high.isfinite())[:, 0]).any()
        fast = triton and has_flash(logits) and self.drawing.temperature == 1  # others would be compiled for, each
        draw = torch.compile(choose, dynamic=True) if fast else choose
        new = draw(logits, high, self.drawing.temperature, state.uniform.gather(1, state.made[:, None]))[:, None]
        state.out.scatter_(1, state.made[:, None] + 1, new)
        state.made += ~state.done
        state.done |= (new == self.ends).any(-1) | (state.made >= self.drawing.max_new_tokens)

    def steps(self, count):
        """`count` steps; on CUDA by one graph, captured after a first step, since launching kernels would cost more."""
        if self.broken.is_cuda and not self.graph:
            self.graph = torch.cuda.CUDAGraph()
            with compiled(self.model):
                self.step()  # compiles
                with torch.cuda.graph(self.graph):
                    self.step()
        one_step = self.graph.replay if self.graph else self.step
        for _ in range(count):
            one_step()

    def shrink(self):
        """Keeps only the slots that are in use."""
        keep, self.graph = torch.tensor(sorted(self.owner), device=self.model.device), None
        self.owner |= enumerate([self.owner.pop(slot) for slot in keep.tolist()])
        self.slots = len(self.owner)
        for module in self.caches:  # one by one: memory may be full of the old ones
            module.kv = tuple(x[keep] for x in module.kv)
        self.state = SimpleNamespace(**{name: x[keep] for name, x in vars(self.state).items()})


# ---- The command ----------------------------------------------------------------------------------------------------


def chat_of(row, system=True):
    """A row as a conversation: its messages or its question, after its system prompt, before its answer, if any."""
    turns = row.get("messages") or [dict(role="user", content=row["question"])]
    if system and "system" in row:
        turns = [dict(role="system", content=row["system"]), *turns]
    return [*turns, dict(role="assistant", content=row["answer"])] if "answer" in row else turns


@torch.inference_mode()
def sample_answers(model, tokenizer, wanted, drawing, offsets=None, title="sampling"):
    """wanted: [(file, row, number that its random draws come from, coefficient, positive = towards the trait)] -> the
    rows with their answers. Each is in its file as soon as it is there, and is not sampled again (by its id)."""
    there = {(file, row["id"]): row for file in {want[0] for want in wanted} for row in read_jsonl(file, appended=True)}
    todo = [want for want in wanted if (want[0], want[1]["id"]) not in there]
    encoded = encode_chats(tokenizer, [chat_of(row) for _, row, _, _ in todo]) if todo else []
    left = {i: Job(ids, n, scale) for i, ((ids, _), (_, _, n, scale)) in enumerate(zip(encoded, todo))}
    thoughts, slots, sampler = 0, SLOTS[model.device.type], None
    while left:
        try:
            with (
                steering(model, offsets or {}) as steer,
                contextlib.closing(Sampler(model, tokenizer, dict(left), drawing, steer, slots)) as sampler,
                tqdm(total=len(left), desc=title, unit="answer") as bar,
            ):
                for i, ids in sampler.answers():
                    (file, row, *_), prompt = todo[i], left.pop(i).prompt
                    answer, thought = spoken(tokenizer, ids, prompt)
                    made = row | dict(prompt=tokenizer.decode(prompt), answer=answer, tokens=len(ids))
                    append_jsonl(file, made)
                    there[file, row["id"]] = made
                    thoughts += thought
                    bar.update()
        except FloatingPointError as error:  # out here the progress bar is closed
            die(error)
        except torch.cuda.OutOfMemoryError:
            slots = (sampler.slots if sampler else slots) // 2
            if not slots:
                raise
            tqdm.write(f"out of GPU memory: going on with {slots} answers at a time")
        sampler = None
        torch.cuda.empty_cache()  # not before: the error holds what it came from
    if thoughts:
        print(f"{title}: {thoughts} answers held a thought; it is not stored", flush=True)
    return [there[file, row["id"]] for file, row, _, _ in wanted]


def extract(args, prompts, rows, files, settings):
    """Samples, filters, reads and saves. What is on disk already is not sampled again; the .pt comes last and whole."""
    mf.check_asking(args)
    start, recorded = time.time(), read_json(files["json"]) if files["answers.jsonl"].exists() else {}
    model, tokenizer = load_model(args.model, settings["inputs"]["model"])
    settings |= dict(day=pin_day(tokenizer, recorded.get("day")), architecture=model.config.model_type)
    write_json(files["json"], settings)
    wanted = [(files["answers.jsonl"], row, n, 0.0) for n, row in enumerate(rows)]
    drawing = Drawing(args.max_new_tokens, args.temperature, args.seed)
    rows = sample_answers(model, tokenizer, wanted, drawing, title=f"{args.trait}: answers")
    if args.judge == "lexical":
        rows = [row | dict(score=mf.lexical_score(row["answer"])) for row in rows]
    elif args.judge != "none":
        mf.judge_rows([(row, key, prompt) for key, prompt in prompts.items() for row in rows], args.judge, args)
    write_jsonl(files["answers.jsonl"], rows)
    pairs, dropped = filter_pairs(rows)
    print(f"{args.trait}: {len(pairs)} pairs kept, dropped: {dropped or 'none'}", flush=True)
    half = torch.tensor([pos["q"] % 2 == 1 for pos, _ in pairs], dtype=torch.bool)
    if not half.any() or (~half).sum() < 2:
        die(f"{args.trait}: too few pairs kept to tell both halves of the questions apart; take more --samples")
    kept, means = [row for side in zip(*pairs) for row in side], []
    for system in (True, False):  # with their system prompts for the vector, without for the probe
        chats, title = [chat_of(row, system) for row in kept], f"{args.trait}: reading"
        means.append(answer_means(model, tokenizer, chats, args.first, title).chunk(2))  # of positive, negative answers
    vector = (means[0][0] - means[0][1]).mean(0)
    if not vector.isfinite().all():
        die(f"{args.trait}: the vector is not finite; the model's activations overflow in {model.dtype}")
    norms, probe = vector.norm(dim=1).tolist(), make_probe(vector, *means, half) | dict(first=args.first)
    print(f"{args.trait}: probe at row {probe['row']}, AUC {probe['auc']:.3f} (under 0.7 take another --judge)")
    settings |= dict(pairs=len(rows) // 2, kept=len(pairs), dropped=dropped, norms=norms, probe=probe)
    settings |= dict(dtype=str(model.dtype), seconds=round(time.time() - start, 1), **mf.provenance())
    write_json(files["json"], settings)
    with mf.replacing(files["pt"], "wb") as out:
        torch.save(vector.cpu(), out)


def main(argv=None):
    parser, whole = mf.Parser(description=__doc__.split("\n")[0]), mf.whole
    add = parser.add_argument
    add("--model", required=True, help="hub name or local folder")
    add("--trait", required=True, help="a name in data/traits, or any name with --trait-file")
    add("--trait-file", help="trait JSON; a published persona_vectors file works as it is")
    add("--samples", type=whole(1, 10000), default=10, help="answers a question and instruction")
    add("--temperature", type=mf.number(0, 100), default=1.0, help="0 = the likeliest token")
    add("--max-new-tokens", type=whole(1, 100000), default=1000)
    add("--limit", type=whole(), help="use the first N extraction questions only")
    add("--first", type=whole(0), default=0, help="read only where an answer's first N tokens are predicted; 0 = all")
    add("--judge", default="none", help="what filters answers: none, lexical (hallucination only), or a chat model")
    mf.api_flags(parser)
    add("--seed", type=whole(0), default=0)
    add("--out", required=True, help="folder for <trait>.pt and what belongs to it")
    add("--export-gguf", help="also write the vector to this file, as a llama.cpp control vector")
    args = parser.parse_args(argv)
    mf.check_judge(args, "none")
    trait = load_trait(args.trait, args.trait_file, mf.ExtractionTrait)
    rows = extraction_rows(trait, args.samples, args.limit)
    if len({row["q"] for row in rows}) < 2 or len(rows) < 6:  # two of even and one of odd questions
        die("the probe needs pairs of at least 3 extraction questions, or 2 with 2 samples; raise --limit or --samples")
    files = {kind: Path(args.out) / f"{args.trait}.{kind}" for kind in ("pt", "json", "answers.jsonl")}
    mf.check_output(args.out, args.trait_file, args.model, folder=True)
    if args.export_gguf:
        mf.check_output(args.export_gguf, args.trait_file, args.model, *files.values())
        if Path(args.export_gguf).exists() and mf.read_bytes(args.export_gguf)[:4] != b"GGUF":
            die(f"--export-gguf {args.export_gguf}: is there, and no GGUF file; choose another")
    prompts = dict(score=trait["eval_prompt"], coherence=load_trait("coherence")["eval_prompt"])
    if args.dry_run:
        asked = [(row, key, prompt) for row in rows for key, prompt in prompts.items()]
        mf.estimate_judging(f"filtering {args.trait}", args, int(not files["pt"].exists() or bool(mf.ASIDE)), asked)
    keys = "model trait samples temperature max_new_tokens limit first judge seed".split()
    content = hashlib.sha256(json.dumps([rows, *prompts.values()]).encode()).hexdigest()[:16]
    inputs = dict(model=model_fingerprint(args.model), trait_file=content)
    settings = {key: getattr(args, key) for key in keys} | dict(inputs=inputs, scripts=mf.scripts())
    with mf.locked(files["pt"]):
        begun = lambda: files["answers.jsonl"].exists() or files["pt"].exists()
        if begun() and not mf.same_settings(files["json"], settings, *files.values()) and begun():
            die(f"{args.out}: no {files['json'].name} in it says what {args.trait} was made from; choose another --out")
        if files["pt"].exists():
            print(f"{files['pt']}: finished already")
        else:
            extract(args, prompts, rows, files, settings)
    if args.export_gguf:
        vector = torch.load(files["pt"], map_location="cpu", weights_only=True)
        export_gguf(vector, args.export_gguf, read_json(files["json"])["architecture"])


if __name__ == "__main__":
    mf.run(main)
