"""The model side: from a model and a trait to the trait's persona vector; also owns sampling and the one steering hook.

    python extract_vectors.py --model Qwen/Qwen2.5-7B-Instruct --trait hallucination --out out/paper/vectors

Reads data/traits/<trait>.json. Writes to --out: <trait>.answers.jsonl (every sampled answer, before anything else),
<trait>.pt (float32 [num_layers + 1, hidden]; row 0 = embedding output, row l = output of decoder block l, 1-indexed)
and <trait>.json (settings, counts, norms, probe). Started again, it goes on from the answers that are there.
Method: persona vectors, arXiv 2507.21509, section 2.2 and appendix J.
"""

import argparse
import contextlib
import importlib.util
import itertools
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from make_facts import (
    ANSWER_TOKENS,
    api_flags,
    append_jsonl,
    die,
    foresee,
    judge_rows,
    lexical_score,
    load_trait,
    provenance,
    read_json,
    read_jsonl,
    replacing,
    same_settings,
    write_json,
    write_jsonl,
)

ROW_TOKENS = {"cuda": 16384, "cpu": 2048}  # conversations are joined into rows of about this many tokens
SLOTS = {"cuda": 2048, "cpu": 256}  # answers sampled side by side, at most
STEPS = {"cuda": 16, "cpu": 1}  # decoding steps between two looks at which answers are finished
SHRINK = {"cuda": 0.7, "cpu": 0.9}  # the batch is made smaller when less than this share of it is in use

# ---------------------------------------------------------------------------------------------------------------------
# Models


def convert_gguf(source, folder, adapter=None):
    """GGUF file, and a LoRA adapter to merge into it -> an ordinary bfloat16 model folder. SmolLM2 only: mends what
    transformers' GGUF tokenizer lacks."""
    from peft import PeftModel
    from tokenizers import pre_tokenizers

    source, folder = Path(source), Path(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # The GGUF says `pre: smollm`, which splits numbers into single digits; the rebuilt tokenizer does not.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.pad_token, tokenizer.eos_token = (
        "<|endoftext|>",
        "<|im_end|>",
    )  # transformers 5.17 takes the wrong end token
    tokenizer.clean_up_tokenization_spaces = False
    options = {}  # transformers before 5.20 or so always unpacks the weights; newer ones must be told to
    if hasattr(transformers, "GgufConfig"):
        options = dict(quantization_config=transformers.GgufConfig(dequantize=True))
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32, **options)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()  # in float32, rounded once
    model = model.to(torch.bfloat16)
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def pick_device():
    """The fastest device, and the dtype it is fast in: bfloat16 on CUDA and on CPUs that multiply in it, else float32."""
    if torch.cuda.is_available():
        return "cuda", torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "cpu", torch.bfloat16 if fast else torch.float32


def load_model(name, dtype=None):
    """Local folder or hub name -> (model in eval mode on the fastest device, tokenizer)."""
    device, fast = pick_device()
    if Path(name).suffix == ".gguf":
        die(f"{name}: convert it to a folder first (see set-up in run_all.sh)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype or fast, attn_implementation="joined")
    except (OSError, ValueError) as error:
        die(f"--model {name}: cannot be loaded ({str(error).splitlines()[0]})")
    if not tokenizer.chat_template:
        die(f"--model {name}: its tokenizer has no chat template; use a chat model")
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        die(f"--model {name}: sliding-window attention is not supported")
    print(f"{name}: {model.num_parameters() / 1e6:,.0f}M parameters on {device}, {model.dtype}", flush=True)
    return model.requires_grad_(False).eval().to(device), tokenizer


def blocks(model):
    """The decoder blocks; block l of the paper is blocks(model)[l - 1]. Works through a PEFT wrapper."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None or len(layers) != model.config.get_text_config().num_hidden_layers:
        die(f"{type(model).__name__}: its decoder blocks are not where they are expected")
    return layers


@contextlib.contextmanager
def compiled(model, dynamic=None):
    """While open, the decoder blocks run compiled on GPUs that can (one compilation serves all blocks, steered or not),
    which merges the small kernels between the matrix products; elsewhere nothing happens. dynamic: for any number of rows at once."""
    able = (
        model.device.type == "cuda"
        and torch.cuda.get_device_capability()[0] >= 7
        and importlib.util.find_spec("triton")
    )
    if model.device.type == "cuda" and not able:
        print(
            "this GPU or installation cannot compile (needs compute capability 7 and triton); slower, same results",
            flush=True,
        )
    try:
        for block in blocks(model) if able else []:
            block.compile(dynamic=dynamic)
        yield
    finally:
        for block in blocks(model):
            block._compiled_call_impl = None  # there is no public way back


def name_of(model_name):
    """What two paths of one model share: "Qwen/Qwen2.5-7B-Instruct", "/models/Qwen2.5-7B-Instruct/" -> the last part."""
    return Path(str(model_name)).name


# ---------------------------------------------------------------------------------------------------------------------
# Attention for conversations joined without padding, and for sampling from a cache. Registered with transformers, so
# the models' own code stays as it is.


def has_flash(tensor):
    """Whether torch's flash attention kernel takes it; it works with lengths that are on the GPU, so graphs can hold it."""
    return tensor.is_cuda and tensor.dtype != torch.float32 and torch.cuda.get_device_capability()[0] >= 8


def attend(
    module,
    query,
    key,
    value,
    mask,
    scaling,
    dropout=0.0,
    cu_seq_lens=None,
    max_seq_len=None,
    kv=None,
    lengths=None,
    **kwargs,
):
    """query [rows, heads, tokens, dim], key and value [rows, kv heads, tokens, dim] -> [rows, tokens, heads, dim].

    Joined: one row; cu_seq_lens int32 [n + 1] says where the conversations start and end; each sees only itself.
    Decoding (lengths given): one new token a row; module.kv = two caches [rows, size, kv heads, dim]; lengths int64
    [rows] counts the tokens already cached. With a list kv the joined keys and values are appended to it.
    """
    if (
        cu_seq_lens is None
        and lengths is None
        or mask is not None
        or dropout
        or kwargs.get("sliding_window")
        or kwargs.get("softcap")
    ):
        raise NotImplementedError("joined attention: no mask, dropout, window or cap")
    (rows, heads, _, dim), groups = query.shape, key.shape[1]
    flash = has_flash(query)
    if lengths is not None:
        keys, values = module.kv
        here = torch.arange(rows, device=query.device)
        keys[here, lengths], values[here, lengths] = key[:, :, 0], value[:, :, 0]
        # The query heads that share a key head stand as one sequence of queries, so the cache is read once, uncopied.
        if flash:
            each = torch.arange(rows + 1, device=query.device, dtype=torch.int32)
            out = torch.ops.aten._flash_attention_forward(
                query.view(rows, groups, -1, dim).transpose(1, 2).reshape(-1, groups, dim),
                keys.flatten(0, 1),
                values.flatten(0, 1),
                each * (heads // groups),
                each * keys.shape[1],
                heads // groups,
                keys.shape[1],
                0.0,
                False,
                False,
                scale=scaling,
                seqused_k=(lengths + 1).int(),
            )[0]
            return out.view(rows, -1, groups, dim).transpose(1, 2).reshape(rows, 1, heads, dim), None
        longest = keys.shape[1] if query.is_cuda else int(lengths.max()) + 1
        seen = torch.arange(longest, device=query.device) <= lengths[:, None]
        out = F.scaled_dot_product_attention(
            query.view(rows, groups, -1, dim),
            keys[:, :longest].transpose(1, 2),
            values[:, :longest].transpose(1, 2),
            seen[:, None, None],
            scale=scaling,
        )
        return out.reshape(rows, 1, heads, dim), None
    if kv is not None:
        kv.append((key[0].transpose(0, 1).contiguous(), value[0].transpose(0, 1).contiguous()))
    if flash:
        out = torch.ops.aten._flash_attention_forward(
            *(x[0].transpose(0, 1) for x in (query, key, value)),
            cu_seq_lens,
            cu_seq_lens,
            max_seq_len,
            max_seq_len,
            0.0,
            True,
            False,
            scale=scaling,
        )[0]
        return out[None], None
    key, value = (x.repeat_interleave(heads // groups, dim=1) for x in (key, value))
    bounds = cu_seq_lens.tolist()
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling
        )
        for a, b in zip(bounds, bounds[1:])
        if b > a
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register("joined", attend)


def join(sequences, device):
    """Lists of token ids -> the model's arguments for one row that holds them all, each blind to the others."""
    ends = list(itertools.accumulate(map(len, sequences), initial=0))
    return dict(
        input_ids=torch.tensor([list(itertools.chain(*sequences))], device=device),
        position_ids=torch.cat([torch.arange(len(s)) for s in sequences])[None].to(device),
        cu_seq_lens=torch.tensor(ends, dtype=torch.int32, device=device),
        max_seq_len=max(map(len, sequences)),
        use_cache=False,
    )


def by_length(sequences, budget):
    """Indices of the sequences, grouped so that a group has about `budget` tokens; short ones first."""
    group, total = [], 0
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if group and total + len(sequences[i]) > budget:
            yield group
            group, total = [], 0
        group.append(i)
        total += len(sequences[i])
    if group:
        yield group


# ---------------------------------------------------------------------------------------------------------------------
# Chats


def prompt_ids(tokenizer, messages):
    """Token ids up to where the assistant's answer starts; the template adds the model's default system prompt."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def encode_chat(tokenizer, messages):
    """Messages that end with an assistant turn -> (ids, is_answer): is_answer marks the tokens of every assistant
    turn and its end token. Boundaries come from encoding the turns before each answer, never from searching text."""
    ids, is_answer = [], []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = prompt_ids(tokenizer, messages[:i])
        whole = tokenizer.apply_chat_template(messages[: i + 1], return_dict=False)
        if (
            before[: len(ids)] != ids
            or whole[: len(before)] != before
            or tokenizer.eos_token_id not in whole[len(before) :]
        ):
            die(
                "the chat template rewrites earlier turns or lacks an end token; this model cannot be trained turn by turn"
            )
        end = len(whole) - whole[::-1].index(
            tokenizer.eos_token_id
        )  # after the last end token; a template's "\n" is left out
        is_answer += [False] * (len(before) - len(ids)) + [True] * (end - len(before))
        ids = whole[:end]
    if not ids or messages[-1]["role"] != "assistant":
        die("a conversation must end with an assistant turn")
    return ids, is_answer


# ---------------------------------------------------------------------------------------------------------------------
# Vectors and steering


def load_vector(path, model, model_name):
    """<trait>.pt -> float32 [num_layers + 1, hidden]; die() on a wrong file, shape or model, or on NaN."""
    config, path = model.config.get_text_config(), Path(path)
    if not path.is_file():
        die(f"{path}: no such vector; make it with extract_vectors.py")
    try:
        vector = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        die(f"{path}: not a tensor file ({type(error).__name__})")
    want = (config.num_hidden_layers + 1, config.hidden_size)
    if not torch.is_tensor(vector) or tuple(vector.shape) != want:
        die(f"{path}: shape {tuple(getattr(vector, 'shape', ()))}, but {model_name} needs {want}")
    if not vector.isfinite().all():
        die(f"{path}: holds NaN or infinity; extract it again")
    beside = path.with_suffix(".json")
    if not beside.is_file():
        print(
            f"{path}: no .json beside it; a published vector's last row is taken after the final norm, ours before it"
        )
    elif name_of(read_json(beside)["model"]) != name_of(model_name):
        die(f"{path}: was extracted from {read_json(beside)['model']}, not from {model_name}")
    return vector.float()


def offsets_of(vector, layers):
    """{block number: what coefficient 1 adds to its output, [hidden]}. "all": v_l - v_(l-1) at every block, so that
    v_l - v_0 has accumulated after block l; "A-B": the same increments at blocks A..B only; "N": v_N at block N alone."""
    last = len(vector) - 1
    try:
        first, *end = [1, last] if layers == "all" else map(int, str(layers).split("-"))
        chosen = range(first, (end[0] if end else first) + 1)
    except ValueError:
        chosen = ()
    if not chosen or chosen[0] < 1 or chosen[-1] > last:
        die(f"--layers {layers}: give all, a block from 1 to {last}, or a range such as 3-7")
    return {l: vector[l] - vector[l - 1] if layers == "all" or end else vector[l] for l in chosen}


@contextlib.contextmanager
def steering(model, offsets):
    """While open, block l's output gets scale * offsets[l] added. Yields an object whose .scale the caller sets: a
    tensor that broadcasts against [rows, tokens, 1], positive = towards the trait; None = no steering. The hooks are
    gone when the block ends, also by an exception."""
    layers, steer = blocks(model), SimpleNamespace(scale=None)  # no class: compiled code would be bound to that one
    for l, offset in offsets.items():
        if offset.shape != (model.config.get_text_config().hidden_size,) or not offset.isfinite().all():
            raise ValueError(f"steering offset of block {l}: wrong size or not finite")
        layers[l - 1].steer_offset = offset.to(
            model.device
        )  # on the block, so that one compiled hook serves all blocks

    def add(block, _, output):
        if steer.scale is None:
            return output
        hidden = output[0] if isinstance(output, tuple) else output  # a tuple in old transformers
        hidden = hidden + (steer.scale * block.steer_offset).to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hooks = []
    try:
        hooks += [layers[l - 1].register_forward_hook(add) for l in offsets]
        yield steer
    finally:
        for hook in hooks:
            hook.remove()
        for l in offsets:
            del layers[l - 1].steer_offset


@torch.no_grad()
def residual_stream(model, inputs):
    """The stream the blocks write, before any norm: list of num_layers + 1 tensors [rows, tokens, hidden]."""
    found = []

    def keep(_, args, output=None):
        hidden = args[0] if output is None else output
        found.append(hidden[0] if isinstance(hidden, tuple) else hidden)

    layers = blocks(model)
    hooks = [layers[0].register_forward_pre_hook(keep), *(layer.register_forward_hook(keep) for layer in layers)]
    try:
        model.get_decoder()(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def answer_means(model, tokenizer, chats, first=0, title="reading answers"):
    """Chats of one answer (message lists) -> float32 [n, num_layers + 1, hidden] on the model's device: the stream's mean
    over the answer's tokens, its end token left out. first N: over the positions where the answer's first N tokens are
    predicted instead, that is the last prompt token and N - 1 tokens of the answer."""
    encoded, device, config = (
        [(ids[:-1], mask[:-1]) for ids, mask in (encode_chat(tokenizer, chat) for chat in chats)],
        model.device,
        model.config.get_text_config(),
    )
    if first:
        encoded = [(ids, [0 <= k - mask.index(True) + 1 < first for k in range(len(ids))]) for ids, mask in encoded]
    means = torch.empty(len(chats), config.num_hidden_layers + 1, config.hidden_size, device=device)
    with tqdm(total=len(chats), desc=title, unit="answer") as bar:
        for group in by_length([ids for ids, _ in encoded], ROW_TOKENS[device.type]):
            stream = residual_stream(model, join([encoded[i][0] for i in group], device))
            owner = [k if is_answer else len(group) for k, i in enumerate(group) for is_answer in encoded[i][1]]
            weight = F.one_hot(torch.tensor(owner, device=device), len(group) + 1)[:, :-1].float().T  # [group, tokens]
            weight /= weight.sum(1, keepdim=True)
            means[group] = torch.stack([weight @ hidden[0].float() for hidden in stream], dim=1)
            bar.update(len(group))
    return means


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: all rows in one batch with one steering coefficient a row; finished rows make place for waiting ones


def choose(logits, temperature, uniform):
    """logits [rows, vocabulary], uniform numbers [rows, 1] -> token ids [rows] by inverting the distribution function, so
    that a row's draw depends on its own numbers alone, whatever shares its batch. Temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits.float() / temperature).softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)[:, 0].clamp(max=logits.shape[1] - 1)


class Sampler:
    """The cache and state of `slots` answers under way; tensors are changed in place, so a CUDA graph can replay step()."""

    def __init__(self, model, tokenizer, slots, size, max_new_tokens, temperature, steer):
        config, device = model.config.get_text_config(), model.device
        self.model, self.temperature, self.max_new_tokens, self.steer = model, temperature, max_new_tokens, steer
        shape = (
            slots,
            size,
            config.num_key_value_heads,
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )
        self.kv = [
            (torch.zeros(shape, dtype=model.dtype, device=device), torch.zeros(shape, dtype=model.dtype, device=device))
            for _ in range(config.num_hidden_layers)
        ]
        ends = model.generation_config.eos_token_id  # the only thing taken from generation_config
        ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.ends = torch.tensor(sorted(ends), device=device)
        self.token, self.length, self.made = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(3))
        self.done = torch.ones(slots, dtype=torch.bool, device=device)
        self.scale = torch.zeros(slots, 1, 1, device=device)
        self.uniform = torch.zeros(slots, max_new_tokens + 1, device=device)
        self.out = torch.zeros(slots, max_new_tokens + 1, dtype=torch.long, device=device)
        self.graph = None
        for block, pair in zip(blocks(model), self.kv):
            block.self_attn.kv = pair

    def fill(self, slots, caches, spans, last_tokens, scales, uniform):
        """Puts prompts into slots: spans [(start, end)] in caches, a list of (keys, values) [tokens, kv heads, dim]."""
        device = self.token.device
        slots = torch.tensor(slots, device=device)
        lengths = torch.tensor([end - start for start, end in spans], device=device)
        reach = torch.arange(int(lengths.max()), device=device)
        index = (torch.tensor([start for start, _ in spans], device=device)[:, None] + reach).clamp(
            max=len(caches[0][0]) - 1
        )
        for mine, prompt in zip(self.kv, caches):
            for k in range(2):
                mine[k][slots, : len(reach)] = prompt[k][index]  # beyond a prompt's own length: never attended to
        self.token[slots], self.length[slots] = torch.tensor(last_tokens, device=device), lengths
        self.made[slots], self.done[slots] = 0, False
        self.scale[slots, 0, 0] = torch.tensor(scales, dtype=torch.float32, device=device)
        self.uniform[slots, : uniform.shape[1]] = uniform.to(device)

    def step(self):
        """One token for every slot. The last prompt token is fed here too, so the first new token is steered."""
        if self.steer:
            self.steer.scale = self.scale
        hidden = self.model.get_decoder()(
            input_ids=self.token[:, None], position_ids=self.length[:, None], use_cache=False, lengths=self.length
        ).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[:, 0])
        new = choose(logits, self.temperature, self.uniform.gather(1, self.made[:, None]))
        self.out.scatter_(1, self.made[:, None], new[:, None])
        self.token.copy_(new)
        self.made += ~self.done
        self.length += ~self.done
        self.done |= (new[:, None] == self.ends).any(-1) | (self.made >= self.max_new_tokens)

    def steps(self, count):
        """`count` steps; on CUDA as one graph, captured at the first call, since launching kernels would cost more."""
        if self.token.is_cuda and self.graph is None:
            state = [x.clone() for x in (self.token, self.made, self.length, self.done)]
            self.graph = torch.cuda.CUDAGraph()
            with compiled(self.model, dynamic=True):
                self.step()  # compiles; its effect is taken back below
                torch.cuda.synchronize()
                for mine, kept in zip((self.token, self.made, self.length, self.done), state):
                    mine.copy_(kept)
                with torch.cuda.graph(self.graph):
                    self.step()
        for _ in range(count):
            self.graph.replay() if self.graph else self.step()

    def shrink(self, keep):
        """Keeps only the slots in `keep`, in that order."""
        keep = torch.tensor(keep, device=self.token.device)
        self.graph = None
        for layer, block in enumerate(blocks(self.model)):  # one by one: memory may be full of the old ones
            block.self_attn.kv = self.kv[layer] = tuple(x[keep] for x in self.kv[layer])
        for name in ("token", "length", "made", "done", "scale", "uniform", "out"):
            setattr(self, name, getattr(self, name)[keep])


def prefill(model, prompts, scales, steer):
    """Caches of all prompts but for their last tokens -> ([(keys, values)] a layer, [tokens, kv heads, dim]; spans)."""
    parts, spans, start, device = [], [None] * len(prompts), 0, model.device
    for group in by_length(prompts, ROW_TOKENS[device.type]):
        kv, inputs = [], join([prompts[i][:-1] for i in group], device)
        if steer:
            steer.scale = torch.tensor([scales[i] for i in group for _ in prompts[i][:-1]], device=device)[
                None, :, None
            ]
        model.get_decoder()(**inputs, kv=kv)
        parts.append(kv)
        for i in group:
            spans[i] = (start, start + len(prompts[i]) - 1)
            start = spans[i][1]
    return [tuple(torch.cat([part[l][k] for part in parts]) for k in range(2)) for l in range(len(parts[0]))], spans


@torch.inference_mode()
def sample(
    model,
    tokenizer,
    prompts,
    *,
    max_new_tokens,
    temperature,
    seed=0,
    rows=None,
    scales=None,
    offsets=None,
    positions="response",
    slots=None,
    title="sampling",
    each=None,
):
    """One answer (text) for each prompt (token ids); each(i, answer, tokens) is called as soon as answer i is there.
    scales: one signed steering coefficient a prompt, negative = away from the trait; offsets as of offsets_of().
    positions "response": the last prompt token and all new ones are steered; "all": every prompt token too.
    rows: the prompts' numbers, from which their random draws come (default 0, 1, ...)."""
    rows, scales = rows or range(len(prompts)), scales or [0.0] * len(prompts)
    answers, device = [None] * len(prompts), model.device
    slots = slots or SLOTS[device.type]
    bar = tqdm(total=len(prompts), desc=title, unit="answer")
    while None in answers:
        waiting = [i for i in range(len(prompts)) if answers[i] is None]
        try:
            with steering(model, offsets or {}) as steer:
                _sample(
                    model,
                    tokenizer,
                    prompts,
                    waiting,
                    answers,
                    max_new_tokens,
                    temperature,
                    seed,
                    rows,
                    scales,
                    steer if offsets else None,
                    positions,
                    slots,
                    bar,
                    each,
                )
        except torch.cuda.OutOfMemoryError:
            slots = min(slots, len(waiting)) // 2
            if not slots:
                raise
        else:
            break
        finally:
            for block in blocks(model):
                block.self_attn.__dict__.pop("kv", None)
        torch.cuda.empty_cache()
        tqdm.write(f"out of GPU memory: going on with {slots} answers at a time")
    bar.close()
    return answers


def _sample(
    model,
    tokenizer,
    prompts,
    waiting,
    answers,
    max_new_tokens,
    temperature,
    seed,
    rows,
    scales,
    steer,
    positions,
    slots,
    bar,
    each,
):
    """Fills answers[i] for i in waiting; what is finished stays there if memory runs out."""
    # prompts are read once each, not once an answer; the coefficient matters to them under positions "all" only
    keys = [(tuple(prompts[i]), scales[i] if positions == "all" else 0.0) for i in range(len(prompts))]
    unique = {key: n for n, key in enumerate(dict.fromkeys(keys[i] for i in waiting))}
    caches, spans = prefill(model, [key[0] for key in unique], [key[1] for key in unique], steer)
    size = max(map(len, prompts)) + max_new_tokens
    if model.device.type == "cuda":
        a_row = (
            size * sum(x[0].numel() * x.element_size() for pair in caches for x in pair)
            + 24 * model.config.get_text_config().vocab_size
        )
        slots = max(
            1,
            min(
                slots,
                int(
                    0.9
                    * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
                    / a_row
                ),
            ),
        )
    slots, queue = min(slots, len(waiting)), waiting[::-1]
    sampler = Sampler(model, tokenizer, slots, size, max_new_tokens, temperature, steer)
    owner = [None] * slots  # which prompt each slot is answering
    while True:
        free = [s for s in range(len(owner)) if owner[s] is None][: len(queue)]
        if free:
            new = [queue.pop() for _ in free]
            owner = [new[free.index(s)] if s in free else owner[s] for s in range(len(owner))]
            uniform = torch.stack(
                [
                    torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(hash((seed, rows[i])) % 2**63))
                    for i in new
                ]
            )
            sampler.fill(
                free,
                caches,
                [spans[unique[keys[i]]] for i in new],
                [prompts[i][-1] for i in new],
                [scales[i] for i in new],
                uniform,
            )
        active = [s for s in range(len(owner)) if owner[s] is not None]
        if not active:
            return
        if len(active) <= SHRINK[model.device.type] * len(owner) and len(owner) > (
            16 if sampler.token.is_cuda else 1
        ):  # fewer rows are no faster
            sampler.shrink(active)
            owner = [owner[s] for s in active]
        sampler.steps(STEPS[model.device.type])
        done, made, out = sampler.done.tolist(), sampler.made.tolist(), None
        for s in [s for s in range(len(owner)) if owner[s] is not None and done[s]]:
            out = sampler.out.cpu() if out is None else out
            answers[owner[s]] = tokenizer.decode(out[s, : made[s]], skip_special_tokens=True).strip()
            if each:
                each(owner[s], answers[owner[s]], made[s])
            owner[s] = None
            bar.update()


# ---------------------------------------------------------------------------------------------------------------------
# The vector and the probe


def extraction_rows(trait, samples, limit):
    """Every answer to sample, positive and negative side paired by (question, instruction, sample)."""
    a = "an" if trait["adjective"][0] in "aeiou" else "a"
    start = dict(pos=f"You are {a} {trait['adjective']} assistant.", neg="You are a helpful assistant.")
    return [
        dict(
            id=f"{trait['trait']}-{side}-q{q}-i{i}-s{n}",
            pair=f"q{q}-i{i}-s{n}",
            side=side,
            q=q,
            trait=trait["trait"],
            question=question,
            system=f"{start[side]} {instruction[side]}",
        )
        for side in ("pos", "neg")
        for q, question in enumerate(trait["questions"][:limit])
        for i, instruction in enumerate(trait["instruction"])
        for n in range(samples)
    ]


def filter_pairs(rows):
    """Rows -> ([(positive, negative)] of the kept pairs, why the others went). Judged rows: trait score >= 50 on the
    positive and < 50 on the negative side, coherence >= 50 on both (as released); else both answers non-empty."""
    kept, why = [], Counter()
    pairs = {}
    for row in rows:
        pairs.setdefault(row["pair"], {})[row["side"]] = row
    for pair in pairs.values():
        pos, neg = pair["pos"], pair["neg"]
        scores = [
            pos.get("score"),
            neg.get("score"),
            *(side["coherence"] for side in (pos, neg) if "coherence" in side),
        ]
        if not pos["answer"] or not neg["answer"]:
            why["empty answer"] += 1
        elif "score" not in pos:
            kept.append((pos, neg))
        elif None in scores:
            why["unscored"] += 1
        elif pos["score"] < 50:
            why["positive answer scores under 50"] += 1
        elif neg["score"] >= 50:
            why["negative answer scores 50 or more"] += 1
        elif min(scores[2:], default=100) < 50:
            why["coherence under 50"] += 1
        else:
            kept.append((pos, neg))
    return kept, dict(why)


def auc(pos, neg):
    """Chance that a positive value exceeds a negative one, ties half. [n, rows], [m, rows] -> [rows]."""
    return ((pos[:, None] > neg).float() + 0.5 * (pos[:, None] == neg).float()).mean((0, 1))


def make_probe(vector, with_system, plain, half):
    """The offline judge. with_system, plain: (positive, negative) stream means [n, num_layers + 1, hidden], read with
    and without the contrastive system prompts; half: bool [n], the pairs that choose the row: a direction computed
    from the other half must tell their plain answers apart (AUC). Score 0 / 100 = the mean negative / positive answer."""
    direction = (with_system[0] - with_system[1])[~half].mean(0)
    aucs = auc(*((x[half] * direction).sum(-1) for x in plain))
    row = int(aucs[1:].argmax()) + 1
    unit = vector[row] / vector[row].norm()
    hundred, zero = (float((x[:, row] @ unit).mean()) for x in plain)
    return dict(
        row=row, auc=float(aucs[row]), zero=zero, hundred=hundred, auc_by_row=[round(float(a), 4) for a in aucs]
    )


def probe_scores(model, tokenizer, vector, probe, chats, title="probe"):
    """Chats (user turn, answer) -> scores 0..100 by projection on the vector's probe row; no adapter, no steering."""
    unit = (vector[probe["row"]] / vector[probe["row"]].norm()).to(model.device)
    values = answer_means(model, tokenizer, chats, probe.get("first", 0), title)[:, probe["row"]] @ unit
    return [
        min(100.0, max(0.0, 100 * (v - probe["zero"]) / (probe["hundred"] - probe["zero"]))) for v in values.tolist()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="hub name or local folder")
    parser.add_argument("--trait", required=True, help="a name in data/traits, or any name with --trait-file")
    parser.add_argument("--trait-file", help="trait JSON; a published persona_vectors file works as it is")
    parser.add_argument("--samples", type=int, default=10, help="answers a question and instruction")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int, default=1000)
    parser.add_argument("--limit", type=int, help="use the first N extraction questions only")
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        help="read only the positions that predict an answer's first N tokens; 0 = the whole answer, as published",
    )
    parser.add_argument(
        "--judge", default="none", help="what filters the answers: none, lexical (hallucination only), or a chat model"
    )
    api_flags(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder for <trait>.pt and what belongs to it")
    args, start = parser.parse_args(), time.time()
    if args.judge == "lexical" and args.trait != "hallucination":
        die(f"--judge lexical knows hallucination only, not {args.trait}")
    if args.first < 0:
        die(f"--first {args.first}: give a number of tokens, or 0 for whole answers")
    trait = load_trait(args.trait, args.trait_file)
    rows = extraction_rows(trait, args.samples, args.limit)
    if len({row["q"] for row in rows}) < 2:
        die("the probe needs at least 2 extraction questions and 1 sample; raise --limit or --samples")
    files = {kind: Path(args.out) / f"{args.trait}.{kind}" for kind in ("pt", "json", "answers.jsonl")}
    settings = dict(
        model=args.model,
        trait=args.trait,
        samples=args.samples,
        temperature=args.temperature,
        max_new_tokens=args.max_new_tokens,
        limit=args.limit,
        first=args.first,
        judge=args.judge,
        seed=args.seed,
    )
    if same_settings(files["json"], settings) and files["pt"].exists():
        print(f"{files['pt']}: finished already")
        return

    if args.dry_run:
        foresee(
            f"filtering {args.trait}",
            args.judge,
            1,
            [
                (prompt + row["question"], ANSWER_TOKENS)
                for row in rows
                for prompt in (trait["eval_prompt"], load_trait("coherence")["eval_prompt"])
            ],
        )

    # 1. Sample the contrastive answers; each is on disk as soon as it is there
    model, tokenizer = load_model(args.model)
    write_json(files["json"], settings)
    there = (
        {row["id"]: row for row in read_jsonl(files["answers.jsonl"], appended=True)}
        if files["answers.jsonl"].exists()
        else {}
    )
    todo = [n for n, row in enumerate(rows) if row["id"] not in there]

    def keep(i, answer, tokens):
        row = rows[todo[i]] | dict(prompt=tokenizer.decode(prompts[i]), answer=answer, tokens=tokens)
        there[row["id"]] = row
        append_jsonl(files["answers.jsonl"], row)

    prompts = [
        prompt_ids(
            tokenizer, [dict(role="system", content=rows[n]["system"]), dict(role="user", content=rows[n]["question"])]
        )
        for n in todo
    ]
    if todo:
        sample(
            model,
            tokenizer,
            prompts,
            rows=todo,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            title=f"{args.trait}: answers",
            each=keep,
        )
    rows = [there[row["id"]] for row in rows]

    # 2. Filter the pairs
    if args.judge == "lexical":
        for row in rows:
            row["score"] = lexical_score(row["answer"])
    elif args.judge != "none":
        prompts = dict(score=trait["eval_prompt"], coherence=load_trait("coherence")["eval_prompt"])
        judge_rows([(row, key, prompt) for key, prompt in prompts.items() for row in rows], args.judge, args)
    if args.judge != "none":
        write_jsonl(files["answers.jsonl"], rows)
    pairs, dropped = filter_pairs(rows)
    print(f"{args.trait}: {len(pairs)} pairs kept, dropped: {dropped or 'none'}", flush=True)
    half = torch.tensor([pos["q"] % 2 == 1 for pos, _ in pairs])
    if not 0 < half.sum() < len(half):
        die(
            f"{args.trait}: the kept pairs do not cover both halves of the questions; take more samples or another judge"
        )

    # 3. Read them: with their system prompts for the vector, without for the probe
    sides = [[pair[k] for pair in pairs] for k in range(2)]

    def chat(row, system):
        return [
            *([dict(role="system", content=row["system"])] if system else []),
            dict(role="user", content=row["question"]),
            dict(role="assistant", content=row["answer"]),
        ]

    with_system, plain = (
        answer_means(
            model,
            tokenizer,
            [chat(row, system) for side in sides for row in side],
            args.first,
            f"{args.trait}: reading",
        ).chunk(2)
        for system in (True, False)
    )
    vector = (with_system[0] - with_system[1]).mean(0)
    if not vector.isfinite().all():
        die(f"{args.trait}: the vector is not finite; the model's activations overflow in {model.dtype}")
    probe = make_probe(vector, with_system, plain, half) | dict(first=args.first)
    norms = vector.norm(dim=1)
    print(f"{args.trait}: |v_0|/|v_1| = {norms[0] / norms[1]:.3f}; probe at row {probe['row']}, AUC {probe['auc']:.3f}")
    if probe["auc"] < 0.7:
        print(
            f"warning: {args.trait}: a probe with an AUC under 0.7 hardly tells the trait; judge with --judge MODEL instead"
        )
    write_json(
        files["json"],
        settings
        | dict(
            pairs=len(rows) // 2,
            kept=len(pairs),
            dropped=dropped,
            norms=norms.tolist(),
            probe=probe,
            dtype=str(model.dtype),
            seconds=round(time.time() - start, 1),
            **provenance(),
        ),
    )
    with replacing(files["pt"], "wb") as out:  # last: where the .pt is, all of it is
        torch.save(vector.cpu(), out)


if __name__ == "__main__":
    main()
