import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in the same order, whatever the machine
SMOLLM = ROOT / "out" / "models" / "SmolLM2-135M-Instruct"


def pytest_configure(config):
    """The embedded chat model's folder is made once, before pytest-xdist starts its workers, which would race."""
    if not hasattr(config, "workerinput") and not SMOLLM.exists():
        subprocess.run([sys.executable, ROOT / "data" / "small_model" / "convert.py", SMOLLM], check=True)


@pytest.fixture(autouse=True)
def no_model_from_before():
    """A test loads its own model."""
    if "extract_vectors" in sys.modules:
        sys.modules["extract_vectors"].load_model.cache_clear()


@pytest.fixture(scope="session")
def smollm():
    """The embedded chat model's folder."""
    return SMOLLM


@pytest.fixture(scope="session")
def tokenizer(smollm):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm)


def toy_model(tokenizer):
    """A 3-block random Qwen2 in float32 with the embedded model's tokenizer, grouped-query attention included."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "joined"
    model = Qwen2ForCausalLM(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    for parameter in model.parameters():
        parameter.mul_(3)  # so that attention and answers are not all but uniform
    return model


@pytest.fixture
def toy(tokenizer):
    return toy_model(tokenizer)


@pytest.fixture
def script():
    """Runs a script of the project; returns (exit code, stdout, stderr)."""

    def run(name, *args, **env):
        done = subprocess.run(
            [sys.executable, ROOT / name, *map(str, args)],
            cwd=ROOT,
            env=os.environ | env,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return run


def draw(model, tokenizer, prompts, scales=None, offsets=None, rows=None, slots=256, **how):
    """sample_answers() for prompts that are token ids -> rows with answer and tokens. how: of Drawing."""
    import extract_vectors as ev

    numbers, scales = rows or range(len(prompts)), scales or [0.0] * len(prompts)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(ev, "encode_chats", lambda *_: [(ids, []) for ids in prompts])
        patch.setitem(ev.SLOTS, model.device.type, slots)
        asked = [dict(id=str(n), question="") for n in range(len(prompts))]
        wanted = list(zip([Path(folder) / "answers.jsonl"] * len(prompts), asked, numbers, scales))
        return ev.sample_answers(model, tokenizer, wanted, ev.Drawing(**how), offsets)
