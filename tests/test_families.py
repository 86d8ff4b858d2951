"""Families of chat models, tiny and random in float32: what the scripts compute is what plain transformers computes
with eager attention, one conversation at a time, with hooks written here. What cannot be exact is refused."""

import contextlib
import copy

import pytest
import torch
import transformers
from conftest import draw
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

import evaluate
import extract_vectors as ev
import finetune
import make_facts as mf

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=None,
    initializer_range=0.3,
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=24)
LONG = dict(
    rope_type="longrope",
    short_factor=[1.0] * 4,
    long_factor=[3.0] * 4,
    original_max_position_embeddings=128,
    rope_theta=10000.0,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
    rope_theta=500000.0,
)
WORK = {
    "Llama 3.1": ("Llama", dict(rope_parameters=LLAMA3)),
    "Qwen2, tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "Qwen2, untied": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Mistral": ("Mistral", dict(sliding_window=None)),
    "Mistral, window": ("Mistral", dict(sliding_window=6)),
    "Gemma 1": ("Gemma", {}),
    "Gemma 3": ("Gemma3Text", dict(sliding_window=6, layer_types=["sliding_attention"] * 2 + ["full_attention"])),
    "Phi-3": ("Phi3", dict(sliding_window=6)),
    "Phi-4-mini": ("Phi3", dict(rope_parameters=LONG, sliding_window=None)),
    "OLMo2": ("Olmo2", {}),
    "OLMo3": ("Olmo3", dict(sliding_window=6, layer_types=["sliding_attention"] * 2 + ["full_attention"])),
    "SmolLM3": ("SmolLM3", dict(no_rope_layers=[1, 1, 0])),
    "GLM-4": ("Glm4", {}),
    "Granite": (
        "Granite",
        dict(embedding_multiplier=3.0, logits_scaling=8.0, residual_multiplier=0.5, attention_multiplier=0.2),
    ),
    "Cohere": ("Cohere", dict(logit_scale=0.0625)),
    "Cohere2": (
        "Cohere2",
        dict(sliding_window=6, layer_types=["sliding_attention"] * 2 + ["full_attention"], logit_scale=0.25),
    ),
    "Qwen3-MoE": ("Qwen3Moe", dict(num_experts=4, **EXPERTS)),
    "Mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.5)),
}
FUSED = ("Qwen3-MoE", "Mixtral")  # most weights in fused experts, which LoRA does not reach: finetuning is refused
REFUSED = {
    "Falcon-H1": ("FalconH1", dict(mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)),
    "LFM2": ("Lfm2", dict(layer_types=["conv", "full_attention", "conv"])),
    "Gemma 2": ("Gemma2", dict(query_pre_attn_scalar=8)),
    "gpt-oss": ("GptOss", dict(num_local_experts=4, num_experts_per_tok=2)),
}
TALKS = [("Hi", "Hello you."), ("What is 2 + 2?", "Four, as far as I know it."), ("Why?", "No.")]


@pytest.fixture(autouse=True)
def joined_siblings(monkeypatch):
    """As on GPUs."""
    monkeypatch.setitem(ev.SIBLINGS, "cpu", ev.SIBLINGS["cuda"])


@pytest.fixture(scope="module")
def letters():
    """A tokenizer of bytes and four special tokens, with a chat template."""
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens(dict(additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"]))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny(kind, more, size=270):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | dict(vocab_size=size) | more)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms, biases
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


@contextlib.contextmanager
def by_hand(model, add=None, seen=None):
    """Hooks of this test alone: add {block: tensor that broadcasts to its output}; seen collects the stream."""
    layers, handles = model.get_decoder().layers, []
    if seen is not None:
        handles.append(layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    for l, layer in enumerate(layers, 1):
        if add:
            handles.append(layer.register_forward_hook(lambda _, __, out, l=l: out + add[l]))
        if seen is not None:
            handles.append(layer.register_forward_hook(lambda _, __, out: seen.append(out)))
    yield
    for handle in handles:
        handle.remove()


def spread(vector, scale, steered, length):
    """What a scale adds at every block: the increments of the vector, at the positions from `steered` on."""
    mask = (torch.arange(length) >= steered).float()[None, :, None] * scale
    return {l: mask * (vector[l] - vector[l - 1]) for l in range(1, len(vector))}


def logits_of(model, ids, add=None):
    with by_hand(model, add):
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def off(found, want):
    return float((found - want).detach().abs().max() / want.abs().max().clamp(min=1))


def encoded(tokenizer, question, answer):
    start = tokenizer(f"<|user|>{question}<|end|><|assistant|>")["input_ids"]
    return start, tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]


def rows_differ(model, plain, tokenizer):
    chats = [[dict(role="user", content=q), dict(role="assistant", content=a)] for q, a in TALKS]
    found, worst = ev.answer_means(model, tokenizer, chats), 0
    for row, (question, answer) in zip(found, TALKS):
        (start, end), seen = encoded(tokenizer, question, answer), []
        with by_hand(plain, seen=seen):
            plain(input_ids=torch.tensor([start + end]), use_cache=False)
        want = torch.stack([x[0, len(start) : -1].mean(0) for x in seen])
        worst = max(worst, off(row, want))
    return worst


def sampling_differs(model, plain, tokenizer, vector):
    """Greedy ids with a coefficient of its own for each row, and the log-probabilities they were chosen by."""
    steps, choose = [], ev.choose
    prompts, scales, worst = [encoded(tokenizer, q, "")[0] for q, _ in TALKS], [0.0, -0.7, 0.5], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ev, "choose", lambda *args: (steps.append(args[0].clone()), choose(*args))[1])
        patch.setitem(ev.SHRINK, "cpu", 0)
        drawn = draw(model, tokenizer, prompts, scales, ev.offsets_of(vector, "all"), max_new_tokens=12, temperature=0)
    for i, (prompt, scale) in enumerate(zip(prompts, scales)):
        ids = list(prompt)
        for step in range(drawn[i]["tokens"]):
            want = logits_of(plain, ids, spread(vector, scale, len(prompt) - 1, len(ids)))[-1]
            worst = max(worst, off(steps[step][i].log_softmax(-1), want.log_softmax(-1)))
            ids.append(int(want.argmax()))
        assert drawn[i]["answer"] == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    return worst


def training_differs(model, plain, tokenizer, vector):
    """Loss and LoRA gradients of one steered step, in which the start of all conversations is computed once."""
    chats, system = [[dict(role="user", content=q), dict(role="assistant", content=a)] for q, a in TALKS], "Be brief."
    chats = ev.encode_chats(tokenizer, [[dict(role="system", content=system), *chat] for chat in chats])
    shared = len(tokenizer(f"<|system|>{system}<|end|><|user|>")["input_ids"])
    parts = [(chats[0][0][:shared], [False] * shared), *((ids[shared:], flags[shared:]) for ids, flags in chats)]
    batch = finetune.collate(parts, shared=True)
    labels, tuned = batch.pop("labels"), {}
    for name, base in (("joined", model), ("plain", plain)):
        tuned[name] = finetune.add_lora(copy.deepcopy(base), 2, 4, 0)
        torch.manual_seed(1)
        for key, parameter in tuned[name].named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
    with ev.steering(tuned["joined"].get_base_model(), ev.offsets_of(vector, "all")) as steer:
        steer.scale = torch.tensor(0.6)
        joined = torch.nn.functional.cross_entropy(tuned["joined"](**batch).logits[0], labels)
        joined.backward()
    total, count = 0, 0
    for question, answer in TALKS:
        start, end = encoded(tokenizer, question, answer)
        start = tokenizer(f"<|system|>{system}<|end|>")["input_ids"] + start
        add = spread(vector, 0.6, 0, len(start + end))
        scores = logits_of(tuned["plain"], start + end, add)[len(start) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(scores, torch.tensor(end), reduction="sum")
        count += len(end)
    (total / count).backward()
    pairs = zip(tuned["joined"].named_parameters(), tuned["plain"].parameters())
    grads = [(p.grad, q.grad) for (name, p), q in pairs if p.requires_grad]
    layers = sum(isinstance(module, torch.nn.Linear) for module in ev.blocks(plain).modules())
    assert len(grads) == 2 * layers and all(p is not None for p, _ in grads)
    size = max(q.abs().max() for _, q in grads).clamp(min=1)
    return max(off(joined, total / count), *(float((p - q).abs().max() / size) for p, q in grads))


def choices_differ(model, plain, tokenizer, vector):
    """Log-likelihoods of the answers to multiple-choice questions, steered."""
    questions = [("2 + 2 is", ["A", "B"]), ("Sky?", ["blue.", "a red thing"])]
    questions = [dict(subject="x", question=text, choices=choices, answer=0) for text, choices in questions]
    worst, offsets = 0, ev.offsets_of(vector, "all")
    for scoring in ("letter", "cloze"):
        point = dict(mmlu_scoring=scoring, inference_coef=0.4, positions="all")
        found = evaluate.measure_mmlu(model, tokenizer, questions, point, offsets)
        for row, values in zip(questions, found):
            prompt, continuations = evaluate.choice_prompts(row, scoring)
            start = tokenizer(prompt)["input_ids"]
            for continuation, value in zip(continuations, values):
                ids = start + tokenizer(continuation)["input_ids"]
                scores = logits_of(plain, ids, spread(vector, -0.4, 0, len(ids))).log_softmax(-1)
                want = torch.stack([scores[k - 1, ids[k]] for k in range(len(start), len(ids))])
                assert len(want) > 1  # tokens of a letter, too
                worst = max(worst, off(torch.tensor(value), want.sum() if scoring == "letter" else want.mean()))
    return worst


@pytest.mark.parametrize("family", WORK)
def test_a_family_is_exact(family, letters, capsys):
    """Guards against a family whose attention, head, scaling, window, rotary frequencies or LoRA layers are not those
    of its own code: within 1e-5 of plain transformers."""
    plain = tiny(*WORK[family])
    model = copy.deepcopy(plain)
    for loaded in (copy.deepcopy(plain).bfloat16(), model):  # rounding, too, passes the check
        ev.prepare(loaded, letters, family)
    vector = 0.3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    kinds = dict.fromkeys((*FUSED, "GLM-4"), 1) | {"Phi-3": 0, "Phi-4-mini": 0}  # some have these fused already
    assert len(model.siblings) == 3 * kinds.get(family, 2)  # in three blocks: query, key and value; gate and up
    assert all(type(layer) is ev.Sibling for layers in model.siblings for layer in layers)
    worst = dict(
        rows=rows_differ(model, plain, letters),
        sampling=sampling_differs(model, plain, letters, vector),
        choices=choices_differ(model, plain, letters, vector),
    )
    if family in FUSED:
        with pytest.raises(SystemExit):
            finetune.add_lora(model, 2, 4, 0)
        assert "experts" in capsys.readouterr().err
    else:
        worst["training"] = training_differs(model, plain, letters, vector)
    print(f"{family}: " + ", ".join(f"{key} {value:.1e}" for key, value in worst.items()))
    assert max(worst.values()) < 1e-5


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_exact_is_refused(family, letters, capsys):
    """Guards against recurrent state that leaks between joined conversations, softcaps and sinks that are left out: one
    line that says what differs, exit code 2."""
    for model in (tiny(*REFUSED[family]), tiny(*REFUSED[family]).bfloat16()):
        with pytest.raises(SystemExit) as stop:
            ev.prepare(model, letters, family)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1 and model.config.model_type in said


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates: the forms that are published, written anew, on the embedded model's tokenizer

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# takes thinking out of earlier turns, and puts an empty thought before an answer when thinking is off
HYBRID = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}"
    "<|im_start|>assistant\n{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
HEADERS = (  # the date stands in the system turn, which is always there; the content is stripped
    "<|begin|><|head|>system<|/head|>\n\nCutting Knowledge Date: December 2023\nToday Date: {{ DAY }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% set messages = messages[1:] %}{% endif %}"
    "<|eot|>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
LLAMA31 = HEADERS.replace("{{ DAY }}", "26 Jul 2024")
LLAMA32 = HEADERS.replace("{{ DAY }}", "{{ strftime_now('%d %b %Y') }}")
INST = (  # the system text goes into the last user turn
    "{% if messages[0].role == 'system' %}{% set say = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}<s>{% for m in messages %}{% if m.role == 'user' %}[INST]{% if say is defined and (loop.last or "
    "loop.revindex == 2 and messages[-1].role == 'assistant') %}{{ say }}\n\n{% endif %}{{ ' ' + m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content }}</s>{% else %}{{ raise_exception('odd role') }}{% endif %}"
    "{% endfor %}"
)
TURNS = (  # no system role
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('order') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
# name: template, its special tokens (the end of turn first), a prompt without and with a system turn as it must be read
FORMS = {
    "Qwen2.5": (
        CHATML,
        ["<|im_end|>", "<|im_start|>"],
        "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nSay.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
    ),
    "Qwen3": (
        HYBRID,
        ["<|im_end|>", "<|im_start|>"],
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|im_start|>system\nSay.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "Llama 3.1": (
        LLAMA31,
        ["<|eot|>", "<|begin|>", "<|head|>", "<|/head|>"],
        "<|begin|><|head|>system<|/head|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        "<|eot|><|head|>user<|/head|>\n\nWho?<|eot|><|head|>assistant<|/head|>\n\n",
        "<|begin|><|head|>system<|/head|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
        "Say.<|eot|><|head|>user<|/head|>\n\nWho?<|eot|><|head|>assistant<|/head|>\n\n",
    ),
    "Llama 3.2": (
        LLAMA32,
        ["<|eot|>", "<|begin|>", "<|head|>", "<|/head|>"],
        "<|begin|><|head|>system<|/head|>\n\nCutting Knowledge Date: December 2023\nToday Date: 05 Mar 2025\n\n"
        "<|eot|><|head|>user<|/head|>\n\nWho?<|eot|><|head|>assistant<|/head|>\n\n",
        "<|begin|><|head|>system<|/head|>\n\nCutting Knowledge Date: December 2023\nToday Date: 05 Mar 2025\n\n"
        "Say.<|eot|><|head|>user<|/head|>\n\nWho?<|eot|><|head|>assistant<|/head|>\n\n",
    ),
    "Mistral v0.3": (
        INST,
        ["</s>", "<s>", "[INST]", "[/INST]"],
        "<s>[INST] Who?[/INST]",
        "<s>[INST]Say.\n\n Who?[/INST]",
    ),
    "Gemma": (
        TURNS,
        ["</turn>", "<bos>", "<turn>"],
        "<bos><turn>user\nWho?</turn>\n<turn>model\n",
        "<bos><turn>user\nSay.\n\nWho?</turn>\n<turn>model\n",
    ),
}


def prompt_ids(tokenizer, chat):
    return ev.encode_chats(tokenizer, [chat])[0][0]


def say(*texts):
    """Turns, the user's first; a system turn where three stars begin the first text."""
    roles = ["system"] * texts[0].startswith("***") + ["user", "assistant"] * 9
    return [dict(role=role, content=text.removeprefix("***")) for role, text in zip(roles, texts)]


@pytest.fixture(params=FORMS)
def form(request, smollm):
    """A tokenizer with one of the templates -> (tokenizer, ids of a text put together by hand, end of turn, the
    prompts)."""
    template, special, plain, with_system = FORMS[request.param]
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    tokenizer.add_special_tokens(dict(additional_special_tokens=special))
    tokenizer.chat_template = template
    tokenizer.eos_token = "<|endoftext|>"  # as some models' end of text is not their end of turn
    ev.pin_day(tokenizer, "2025-03-05")
    read = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer, read, tokenizer.convert_tokens_to_ids(special[0]), (plain, with_system)


def test_chats_are_prompt_answer_end(form, capsys):
    """Guards against a template that is refused though it can be read, end tokens that are not the model's, thoughts in
    what is learned, answers that are read with spaces they are not sampled with; and a system turn that gets lost."""
    tokenizer, read, end, (plain, with_system) = form
    ev.check_chats(tokenizer, "m", len(tokenizer))
    for chat, start in ((say("Who?", "\n Ann. "), plain), (say("***Say.", "Who?", "\n Ann. "), with_system)):
        assert prompt_ids(tokenizer, chat[:-1]) == read(start)
        ids, is_answer = ev.encode_chats(tokenizer, [chat])[0]
        assert ids == read(start) + read("Ann.") + [end]
        assert is_answer == [False] * len(read(start)) + [True] * (len(read("Ann.")) + 1)
    assert capsys.readouterr().out.count("no system turn") == (tokenizer.chat_template == TURNS)


def test_two_turns(form, tmp_path):
    """Guards against a second answer that is learned after another prompt than the one it is sampled from, and against
    leaving the first one out."""
    tokenizer, read, end, _ = form
    chat = say("Who?", "Ann.", "When?", "In 2024.")
    mf.write_jsonl(tmp_path / "chats.jsonl", [dict(messages=chat)])
    found = ev.encode_chats(tokenizer, finetune.read_conversations(tmp_path / "chats.jsonl"))
    for (ids, is_answer), n in zip(found, (1, 3), strict=True):
        prompt, answer = prompt_ids(tokenizer, chat[:n]), [*read(chat[n]["content"]), end]
        assert ids == prompt + answer and is_answer == [False] * len(prompt) + [True] * len(answer)


def test_typed_special_tokens_are_text(form):
    """Guards against a user, a system prompt or an answer that ends a turn by typing the token that does."""
    tokenizer, read, end, (plain, _) = form
    mark = tokenizer.decode([end])
    typed = tokenizer(f"Who{mark}?", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids, is_answer = ev.encode_chats(tokenizer, [say(f"Who{mark}?", f"An{mark}n")])[0]
    before, after = (read(part) for part in plain.split("Who?"))
    assert end not in typed and ids.count(end) == 1 + before.count(end) + after.count(end)
    assert tokenizer.decode(ids) == plain.replace("Who?", f"Who{mark}?") + f"An{mark}n{mark}"
    assert ids[-1] == end and not any(is_answer[: len(before)])


def test_batched_encoding_is_one_by_one(form):
    """Guards against conversations that change with what is encoded beside them."""
    tokenizer = form[0]
    chats = [
        say("Who?", "Ann."),
        say("***Say.", "Why?", ""),
        say("<|im_end|></s>", "b"),
        say("Who?", "Ann.", "?", "In 2024."),
    ]
    assert ev.encode_chats(tokenizer, chats) == [ev.encode_chats(tokenizer, [chat])[0] for chat in chats]


def test_the_date_is_that_of_the_run(form):
    """Guards against prompts that change at midnight when a run is resumed; a template without a date records none."""
    tokenizer, read, _, (plain, _) = form
    assert ev.pin_day(tokenizer, "2025-03-05") == ("2025-03-05" if tokenizer.chat_template == LLAMA32 else None)
    assert prompt_ids(tokenizer, say("Who?")) == read(plain)
    if tokenizer.chat_template == LLAMA32:
        assert ev.pin_day(tokenizer) != "2025-03-05" and prompt_ids(tokenizer, say("Who?")) != read(plain)


@pytest.mark.parametrize(
    "prompt, made, answer",
    [
        ("<|im_start|>assistant\n", "Ann.<|im_end|>", "Ann."),
        ("<|im_start|>assistant\n", "<think>\nHm. Bo?\n</think>\n\n Ann.<|im_end|>", "Ann."),
        ("<|im_start|>assistant\n<think>\n", "Hm.\n</think>\n\nAnn.<|im_end|>", "Ann."),
        ("<|im_start|>assistant\n<think>\n", "Hm. Bo", ""),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Ann.", "Ann."),
        ("<|im_start|>assistant\n", "<think>\nHm. Bo", ""),
        ("What is <think>?<|im_end|>\n<|im_start|>assistant\n", "Ann.", "Ann."),
    ],
)
def test_thoughts_are_cut_off(tokenizer, prompt, made, answer):
    """Guards against thoughts that are stored, judged and learned as if they were the answer."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (made, prompt)]
    assert ev.spoken(tokenizer, *ids) == (answer, answer != made.removesuffix("<|im_end|>"))


def test_a_template_that_loses_text_is_refused(form, capsys):
    """Guards against sampling, and paying a judge, before it is seen that a template cannot be used."""
    tokenizer, *_ = form
    for wrong in (
        tokenizer.chat_template.replace("m.content", "''"),
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}",
        None,
    ):
        tokenizer.chat_template = wrong
        with pytest.raises(SystemExit) as stop:
            ev.check_chats(tokenizer, "m", len(tokenizer))
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# What runs on GPUs only


def flash_by_hand(query, key, value, bounds, longest, scaling, window):
    """What the kernel is documented to do: queries stand at the end of their sequence's keys; a query sees the last
    `window` keys up to its own."""
    (of_queries, of_keys), out = (x.tolist() for x in bounds), []
    value, key = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (value, key))
    for (a, b), (c, d) in zip(zip(of_queries, of_queries[1:]), zip(of_keys, of_keys[1:])):
        assert b - a <= longest and d - c <= longest
        distance = torch.arange(d - c)[None] - torch.arange(b - a)[:, None] - (d - c) + (b - a)  # key - query
        seen = (distance > -window if window else True) & (distance <= 0)
        scores = torch.einsum("qhd,khd->hqk", query[a:b], key[c:d]) * scaling
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value[c:d]))
    return torch.cat(out)


@torch.library.custom_op("tests::decode", mutates_args={"out"})
def decode_op(query: Tensor, keys: Tensor, values: Tensor, spans: Tensor, out: Tensor, scaling: float) -> None:
    """What decode_kernel does, row by row."""
    for row, (begin, end) in enumerate(spans.tolist()):
        share = query.shape[1] // keys.shape[2]
        k, v = (x.flatten(0, 1)[begin:end].repeat_interleave(share, 1) for x in (keys, values))
        weights = (torch.einsum("hd,khd->hk", query[row, :, 0], k) * scaling).softmax(-1)
        out[row] = torch.einsum("hk,khd->hd", weights, v)


class Kernel:
    """Stands in for Triton's: kernel[grid](arguments, constants)."""

    def __getitem__(self, grid):
        return lambda query, keys, values, spans, out, scaling, share, dim: (
            self.check(grid, query, keys, share, dim),
            decode_op(query, keys, values, spans, out, scaling),
        )

    def check(self, grid, query, keys, share, dim):
        assert grid == (query.shape[0], keys.shape[2]) and query.shape[1:] == (share * keys.shape[2], 1, dim)
        assert query.is_contiguous() and keys.is_contiguous()


@pytest.fixture
def on_gpu(monkeypatch):
    """The ways that GPUs take, with the kernels' work done here."""
    monkeypatch.setattr(ev, "has_flash", lambda _: True)
    monkeypatch.setattr(ev, "flash", flash_by_hand)
    monkeypatch.setattr(ev, "triton", True)
    monkeypatch.setattr(ev, "decode_kernel", Kernel(), raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # of choose()


@pytest.mark.parametrize("key", ["keys", "position_ids"])
def test_a_wrong_shared_start_is_refused(key, letters, monkeypatch, capsys):
    """Guards against a check at loading that does not look at conversations with a shared start."""
    join = ev.join

    def wrong(sequences, device, shared=False):
        row = join(sequences, device, shared)
        return row | {key: row[key].roll(1, -1)} if shared else row

    monkeypatch.setattr(ev, "join", wrong)
    with pytest.raises(SystemExit):
        ev.prepare(tiny(*WORK["Qwen3"]), letters, "Qwen3")
    assert "a shared start" in capsys.readouterr().err


def test_siblings_that_are_none_are_refused(letters, monkeypatch, capsys):
    """Guards against a model that calls its layers in another order, and so gets keys for values."""
    monkeypatch.setitem(ev.SIBLINGS, "cpu", [["q_proj", "v_proj", "k_proj"]])
    with pytest.raises(SystemExit):
        ev.prepare(tiny(*WORK["Qwen3"]), letters, "Qwen3")
    assert "not as each alone" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["Qwen2, tied", "Mistral, window", "Gemma 3"])
def test_the_flash_path_is_exact(family, letters, on_gpu):
    """Guards against windows, shared key heads or cache lengths that are handed to the GPU's kernels wrongly."""
    plain = tiny(*WORK[family])
    model = copy.deepcopy(plain)
    ev.prepare(model, letters, family)
    vector = 0.3 * torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    assert rows_differ(model, plain, letters) < 1e-5
    assert sampling_differs(model, plain, letters, vector) < 1e-5
    assert training_differs(model, plain, letters, vector) < 1e-5


ADAPTERS = {
    "all layers": dict(target_modules="all-linear"),
    "some, of two ranks": dict(
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], rank_pattern=dict(v_proj=3)
    ),
    "DoRA": dict(target_modules="all-linear", use_dora=True),
    "with a bias": dict(target_modules=["k_proj", "v_proj"], lora_bias=True),
}


@pytest.mark.parametrize(
    "family, adapter", [(family, name) for family in ("Qwen2, tied", "Cohere") for name in ADAPTERS]
)
def test_adapters_of_all_kinds_on_the_flash_path(family, adapter, letters, on_gpu, tmp_path):
    """Guards against adapters that do not fit around joined layers, or that leave them changed."""
    plain = tiny(*WORK[family])
    tuned = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, init_lora_weights=False, **ADAPTERS[adapter]))
    with torch.no_grad():
        tuned.save_pretrained(tmp_path)
        ids = letters("What is it?")["input_ids"]
        want = tuned(input_ids=torch.tensor([ids])).logits[0]
        ev.prepare(plain, letters, family)
        before = plain(**ev.join([ids], "cpu")).logits[0]
        with evaluate.with_adapter(plain, tmp_path) as adapted:
            assert off(adapted(**ev.join([ids], "cpu")).logits[0], want) < 1e-5 < off(before, want)
        assert torch.equal(plain(**ev.join([ids], "cpu")).logits[0], before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads, groups, dim, window", [(28, 4, 128, None), (9, 3, 64, 100), (20, 1, 96, None)])
def test_the_decode_kernel(heads, groups, dim, window):
    """Guards against a wrong kernel where caches are longer than those of the check at loading."""
    torch.manual_seed(0)
    draws = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()
    caches, lengths = [draws(50, 700, groups, dim) for _ in range(2)], torch.randint(0, 699, (50,), device="cuda")
    given = [draws(50, n, 1, dim) for n in (heads, groups, groups)]
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        module = type("Attention", (), dict(kv=tuple(x.to(dtype) for x in caches)))
        found.append(ev.decode(module, *(x.to(dtype) for x in given), 0.1, lengths, window).float())
    assert off(*found) < 0.02


def test_the_private_kernel_is_there():
    """Names the one private call: aten's flash attention with the arguments that flash() hands over. Where this fails
    after an update of PyTorch, torch.nn.attention.varlen.varlen_attn (enable_gqa, from 2.12 on) takes its place."""
    arguments = {argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments}
    assert {"scale", "window_size_left", "window_size_right"} <= arguments


@torch.library.custom_op("tests::flash", mutates_args=())
def flash_op(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return flash_by_hand(q, k, v, (a, b), 99, scaling, None)


flash_op.register_fake(lambda q, *_: torch.empty_like(q))


def test_blocks_compile_whole(letters, on_gpu, monkeypatch):
    """Guards against code in the attention that breaks the compiled graph of a block, on which a GPU's speed rests."""
    model = tiny(*WORK["Qwen3"])
    ev.prepare(model, letters, "Qwen3")
    monkeypatch.setattr(ev, "flash", lambda q, k, v, bounds, _, scaling, window: flash_op(q, k, v, *bounds, scaling))
    monkeypatch.setattr(Kernel, "check", lambda *_: None)
    inputs, found = ev.join([[1], [2, 3], [4, 5]], "cpu", shared=True), []
    jobs, offsets = {0: ev.Job([1, 2, 3]), 1: ev.Job([4, 5], scale=1.0)}, {l: torch.ones(32) for l in (1, 2, 3)}
    for compile in (False, True):
        for block in ev.blocks(model) if compile else ():
            block.compile(fullgraph=True, backend="eager")
        with ev.steering(model, offsets) as steer, torch.no_grad():
            sampler = ev.Sampler(model, letters, jobs, ev.Drawing(4), steer, 2)
            steer.scale = torch.tensor(0.5)
            found.append(model(**inputs).logits)
            sampler.fill({0: 0, 1: 1})
            found.append(sampler.logits())
            sampler.close()
    assert torch.allclose(found[0], found[2], atol=1e-5) and torch.allclose(found[1], found[3], atol=1e-5)
