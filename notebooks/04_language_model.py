# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # A language model
#
# TOAST steers causal language models as it does ViTs: the prompt is read, what matters is selected and sent
# back down, and the second pass writes the next token. `generate` works as before: the two passes keep two
# caches in one `Cache` object, so a new token costs two passes over one token.
#
# Without anything else, this notebook makes a tiny Llama with letters for tokens and lets it learn a little
# on the spot: it shows the calls, not fluent text, in less than a minute. With `TOAST_ASSETS` set to a
# folder that holds `smollm2/` (SmolLM2-135M as `save_pretrained` writes it) it tunes that instead. That
# takes a minute and a half of one core's time; perplexity on the held-out dishes falls from 35 to 1.6, and
# the model writes the recipe.

# %%
import math
import os
import tempfile
from pathlib import Path

import torch
from IPython.display import Image
from IPython.display import display as show
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import toast
from toast.visual.text import as_terminal

SCALE = float(os.environ.get("TOAST_NOTEBOOK_SCALE", "1"))  # the tests of the package run a smaller size
torch.manual_seed(0)
OUT = Path(tempfile.mkdtemp(prefix="toast-"))


def tiny():
    """Returns a Llama of four narrow blocks with random weights, and a tokenizer of letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {"<s>": 0, "</s>": 1} | {letter: 2 + index for index, letter in enumerate(letters)}
    raw = Tokenizer(models.BPE(vocab=words, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=96, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    return LlamaForCausalLM(config), tokenizer


folder = Path(os.environ.get("TOAST_ASSETS", "no-such-folder")) / "smollm2"
is_real = folder.is_dir()
if is_real:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
else:
    base, tokenizer = tiny()
print("SmolLM2-135M" if is_real else "a tiny random Llama")

# %% [markdown]
# ## Text
#
# The task: recipes that all read alike, but for what is cooked. Some dishes are held out.

# %%
THINGS = ["leek", "carrot", "onion", "potato", "tomato", "turnip", "lentil", "bean", "cabbage", "spinach"]
DISHES = ["soup", "stew", "pie", "salad"]


def recipe(thing, dish):
    """Returns the recipe of a dish."""
    return (
        f"Recipe: {thing} {dish}\n- Take one {thing}.\n- Wash the {thing}.\n- Cut it, boil it, salt it.\n"
        f"Serve the {thing} {dish} warm.\n"
    )


def note(thing, dish):
    """Returns a shopping note for a dish, which the tiny model learns first."""
    return f"Note: {thing} {dish}\nBuy one {thing} for the {dish}.\nThe {thing} is in the bag.\n"


tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
train = [recipe(thing, dish) for thing in THINGS[:8] for dish in DISHES]
held_out = [recipe(thing, dish) for thing in THINGS[8:] for dish in DISHES]
print(train[0])


# %%
def inputs(texts):
    """Returns a batch."""
    return tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)


def loss_of(model, texts):
    """Returns the mean loss of a token."""
    batch = inputs(texts)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return model(**batch, labels=labels, use_cache=False).loss


def fit(model, texts, steps, rate):
    """Trains what requires a gradient."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    order = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        rows = torch.randperm(len(texts), generator=order)[:4].tolist()
        loss = loss_of(model, [texts[row] for row in rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        if step % max(1, steps // 5) == 0 or step == steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    model.eval()


@torch.no_grad()
def perplexity(model):
    """Returns the perplexity on the dishes that are held out."""
    return math.exp(loss_of(model.eval(), held_out).item())


if not is_real:
    fit(base, [note(thing, dish) for thing in THINGS for dish in DISHES], max(2, round(150 * SCALE)), 3e-3)

# %% [markdown]
# ## Wrap and tune
#
# From here on the model is frozen. The paper trains the task embedding and the `B_l` of a language model.
# Here both come from nothing, without pre-tuning; the task embedding starts at the mean feature of a few
# recipes.

# %%
model = toast.wrap(base, train=["task_embedding", "to_signal"])
model.print_trainable_parameters()
before = perplexity(model)
toast.calibrate(model, **inputs(train[:8]))
fit(model, train, max(2, round((16 if is_real else 150) * SCALE)), 5e-5 if is_real else 1e-2)
print(f"perplexity on held-out dishes: {before:.2f} -> {perplexity(model):.2f}")

# %% [markdown]
# ## Generate
#
# Greedy, beams, sampling, chunks and static caches work as for any model of transformers. The cache changes
# the time, not the text; without the adapter it is the frozen model that answers.

# %%
PROMPT = f"Recipe: {THINGS[-1]} soup\n"
new = max(4, round((32 if is_real else 60) * SCALE))


@torch.no_grad()
def answer(**options):
    """Returns what the model continues with."""
    out = model.generate(**inputs([PROMPT]), max_new_tokens=new, do_sample=False, **options)
    return tokenizer.decode(out[0], skip_special_tokens=True)


with model.disable_adapter():
    print("frozen: ", repr(answer()))
steered = answer()
print("steered:", repr(steered))
print("the same without a cache:", answer(use_cache=False) == steered)

# %% [markdown]
# ## See what was selected
#
# `toast.look_at_text` reads prompt and answer once more and returns the maps of every token: the selection
# weights, how far the attention of each token moved between the passes, and which tokens are looked at more
# or less. In colour here and in a terminal with colours; as a table elsewhere.

# %%
maps = toast.look_at_text(model, tokenizer, PROMPT, max_new_tokens=min(new, 24))
Console(width=100).print(as_terminal(maps))

# %% [markdown]
# `toast.visualize_text` writes the same as an HTML page, the attention matrices of both passes as PNG and
# SVG, and the arrays. Rows are tokens that look, columns tokens that are looked at; the line divides prompt
# and answer.

# %%
files = toast.visualize_text(model, tokenizer, PROMPT, OUT / "maps", max_new_tokens=min(new, 24))
print(*(file.name for file in files))
show(Image(next(file for file in files if file.suffix == ".png"), width=900))

# %% [markdown]
# **What to see.** In the last matrix, red is attention gained in the second pass, blue attention lost. The
# selection weights say which tokens are sent back down; where they are all alike, steering shifts every
# token by much the same.
#
# From the command line: `toast visualize ADAPTER "a prompt" --model FOLDER --out maps`, and `toast generate
# FOLDER "a prompt" --adapter ADAPTER`.
