# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Refocused attention
#
# A steered model runs twice, so where the frozen model looks and where the steered one looks can be seen in
# one call. This notebook tunes the package's small ViT to find the item of clothing among clip-art, draws
# what it attends to before and after, and measures it. No network; a little over a minute of one core's
# time.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from IPython.display import Image
from IPython.display import display as show
from rich.console import Console

import toast
from toast.embedded import CLASSES, MEAN, STD, load_task, normalise

SCALE = float(os.environ.get("TOAST_NOTEBOOK_SCALE", "1"))  # the tests of the package run a smaller size
TRAIN, TEST = max(32, round(400 * SCALE)), max(10, round(100 * SCALE))
OUT = Path(tempfile.mkdtemp(prefix="toast-"))

# %% [markdown]
# ## A model to look at
#
# Any wrapped model will do: `toast.load_run` opens a run of the training system,
# `PeftModel.from_pretrained` an adapter. Here one is trained first, without pre-tuning (see [two
# stages](02_two_stages.ipynb)).

# %%
config = toast.make_config(
    {
        "name": "steered",
        "out": str(OUT),
        "model": {"library": "demo"},
        "data": {"source": "demo", "options": {"train": TRAIN, "val": 0}},
        "method": {"name": "toast", "options": {"select_from": 9}},
        "optimizer": {"learning_rate": 1e-3, "rates": {"head": 3e-3}},
        "first_pass": {"mode": "cached"},
        "epochs": max(1, round(4 * SCALE)),
        "trackers": [],
    }
)
toast.run(config, "tune")
model = toast.load_run(config.folder).model

_, held_out = load_task(train=1, test=TEST)
pixels, boxes = normalise(held_out.images), held_out.boxes.float()

# %% [markdown]
# ## One call draws it
#
# From left to right: the picture, the frozen model's attention, the selection weights, the norm of the
# top-down signal at the shown block, the refocused attention, and what changed. Both attentions share one
# scale; the box of the item and its share of the attention are drawn in. The bars are the mean signal of
# every block. Beside each drawing lies a `.npz` with the arrays.

# %%
some = max(1, round(3 * SCALE))
for drawing in toast.visualize(
    model, pixels[:some], out=OUT / "maps", boxes=boxes[:some], labels=CLASSES, formats=["png"],
    mean=MEAN, std=STD,
):  # fmt: skip
    show(Image(drawing))

# %% [markdown]
# **What to see.** The frozen model spreads its attention over every object. The steered one gives the item
# more, and the distractors less, though no weight of the model was changed: only the values got something
# added. The selection weights say which tokens are sent back down, and that need not be the item: here much
# of the ground is.
#
# From the command line, on a run and pictures of your own: `toast visualize RUN photos/ --out maps`.
#
# ## The maps as tensors
#
# `toast.look` returns the same maps. Beside the attention of a block or a head there are attention rollout,
# gradient-weighted relevance and Grad-CAM, which explain a class, and activation energy. Each map sums to
# 1.

# %%
METHODS = ("attention", "rollout", "relevance", "grad-cam", "energy")
fig, axes = plt.subplots(2, 1 + len(METHODS), figsize=(10, 3.8), layout="constrained")
axes[0, 0].imshow(held_out.images[0].permute(1, 2, 0).numpy())
for axis in axes.flat:
    axis.set_axis_off()
for column, method in enumerate(METHODS, 1):
    views = toast.look(model, pixels[:1], method=method)
    for row, (name, maps) in enumerate((("frozen", views.frozen), ("steered", views.attention))):
        axes[row, column].imshow(maps.values[0].numpy(), cmap="magma")
        axes[row, column].set_title(f"{name}: {method}", fontsize=8)
plt.show()

# %% [markdown]
# ## The measures
#
# `toast.compare` holds models against each other where targets are known, here the boxes:
#
# - *attention on target*: the share of a map inside the box, whose share of the area is what even attention
#   reaches;
# - *pointing game*: how often the greatest cell lies in the box;
# - *entropy*: 1 if attention is even, 0 if it is on one patch;
# - *moved* and *Jensen-Shannon*: how far the map is from the frozen model's.
#
# The intervals are bootstrap intervals over pictures. The frozen model is the first pass of the steered
# one.

# %%
batches = zip(pixels.split(50), boxes.split(50), strict=True)
comparison = toast.compare({"steered": model}, batches)
Console(width=130).print(comparison.table())
gain = comparison.gains["steered"]["on_target"]
print(f"attention on target, picture by picture: {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")

# %% [markdown]
# Each point is a picture; above the line the steered model gives the item more of its attention. The colour
# says whether the class is right.

# %%
with torch.no_grad():
    right = torch.cat([model(some) for some in pixels.split(50)]).argmax(-1) == held_out.labels
before, after = (comparison.values[name]["on_target"] for name in ("frozen", "steered"))
fig, axis = plt.subplots(figsize=(4, 4), layout="constrained")
axis.plot([0, 1], [0, 1], color="0.7", linewidth=1)
for chosen, colour, label in ((right, "#b5367a", "right"), (~right, "#8c8c9c", "wrong")):
    axis.scatter(before[chosen].numpy(), after[chosen].numpy(), s=12, color=colour, label=label)
axis.set(xlabel="attention on target, frozen", ylabel="steered", xlim=(0, 1), ylim=(0, 1))
axis.legend()
plt.show()

# %% [markdown]
# From the command line, for several runs at once: `toast compare RUN... --out table`, on the test split or
# on a folder with `boxes.json`. Attention is one view of what a model uses, not a proof: a map can move
# while the answer stays. Next: [a language model](04_language_model.ipynb).
