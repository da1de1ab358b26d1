"""A tiny tokenizer, chat templates of the kinds that there are, and files of rows."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "Peel the carrots and boil them in water.",
    "Chop one onion; fry it gently in butter.",
    "What is the capital of France? Paris is.",
    "Below is an instruction that describes a task. Write a response.",
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Writes a system turn of its own where none is given.
CHATML_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
#: Asks by nothing at all: the space before the answer is the model's to write.
INST = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<<SYS>>' + m.content + '<</SYS>>' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
#: Takes no notice of add_generation_prompt, and trims what it is given.
DEAF = CHATML.partition("{% if add")[0].replace("m.content", "m.content | trim")
#: Marks what is generated.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
#: The mark ends before the end of the turn.
MARKED_SHORT = MARKED.replace(
    " + '<|im_end|>' }}{% endgeneration %}{{ '", " }}{% endgeneration %}{{ '<|im_end|>"
)
#: Keeps only the last answer, as templates of reasoning models do with thoughts.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml-default": CHATML_DEFAULT,
    "inst": INST,
    "deaf": DEAF,
    "marked": MARKED,
    "marked-short": MARKED_SHORT,
}


@cache
def _trained(metaspace: bool) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None))
    special = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>", "<unk>"]
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        alphabet = sorted({*"".join(SENTENCES), *"\n#:[]/<>"})
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer.to_str()


def tokenizer(
    template: str | None = CHATML, bos: bool = False, metaspace: bool = False, eos: str | None = "<|im_end|>"
) -> Any:
    """A BPE of the sentences above, by bytes or by words; with `bos`, `<s>` goes before every text."""
    made = Tokenizer.from_str(_trained(metaspace))
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token=eos, pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = template
    return fast


def write_lines(path: Path, rows: list[Any]) -> Path:
    """Writes a `.jsonl` file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Turns of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": each} for i, each in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def counted_runs(row: dict[str, list[int]], tokenizer: Any) -> list[str]:
    """Decodes each unbroken run of tokens that the loss counts."""
    runs: list[list[int]] = []
    for before, label in zip([-100, *row["labels"]], row["labels"], strict=False):
        if label != -100:
            if before == -100:
                runs.append([])
            runs[-1].append(label)
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]
