# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Wrap a ViT
#
# TOAST (top-down attention steering, [arXiv 2305.15542](https://arxiv.org/abs/2305.15542)) runs a frozen
# transformer twice. What the first pass found is compared with a task embedding, what matches is sent back
# down, and every self-attention of the second pass adds it to its values:
#
#     first pass    h = f(x)                                   frozen, no gradient
#     selection     w = clamp(cos(h, ξ), 0, 1),  z = (w · h) P
#     feedback      y_L = z;  y_l = A_l y_{l+1};  s_l = B_l y_l
#     second pass   V_l = W_V (x_l + s_l)
#
# This notebook wraps a small ViT of timm with random weights, looks at what the two passes compute, trains
# a few steps, and saves the adapter. It needs no network and takes less than a minute.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import timm
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

import toast
from toast.embedded import CLASSES, load_task, normalise

SCALE = float(os.environ.get("TOAST_NOTEBOOK_SCALE", "1"))  # the tests of the package run a smaller size
torch.manual_seed(0)


def make_vit() -> torch.nn.Module:
    """The same random ViT every time; `pretrained=True` and no seed give a real one."""
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=112, num_classes=len(CLASSES)).eval()


pictures, _ = load_task(train=16, test=1)  # clothes among clip-art, composed of what the package contains
images, labels = normalise(pictures.images), pictures.labels
print("pictures", tuple(images.shape))

# %% [markdown]
# ## One call
#
# `toast.wrap` finds the blocks, freezes the model and puts the top-down module in. With `lora_rank` it is
# TOAST-Lite: the feedback is frozen and carries low-rank factors. The result is an ordinary `PeftModel`.

# %%
vit = make_vit()
before = vit(images).detach()
model = toast.wrap(vit, lora_rank=4, modules_to_save=["head"])
model.print_trainable_parameters()
with torch.no_grad():
    print("largest change of the output:", float((model(images) - before).abs().max()))

# %% [markdown]
# A new adapter starts **exactly** at the frozen model, because `B_l` is zero: the change above is 0. Yet
# the second pass already runs. `toast.trace` shows both.

# %%
toast.calibrate(model, images)  # points the task embedding to what stands out
with torch.no_grad():
    seen = toast.trace(model, images, attention_blocks=[-1])
    strongest = max(float(signal.norm(dim=-1).max()) for signal in seen.signals)
weights, last = seen.selection_weights, seen.attention[11]
print("selection weights", tuple(weights.shape), f"up to {weights.max():.2f}")
print("attention        ", tuple(last.shape), "of the last block")
print("signals          ", tuple(seen.signals[0].shape), "in each of", len(seen.signals), "blocks")
print("strongest signal ", strongest)

# %% [markdown]
# ## A loop of your own
#
# A plain `nn.Module` with gradients in the adapter and the head alone. Nothing else has to be known.

# %%
steps = max(2, round(15 * SCALE))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
losses = []
for _ in range(steps):
    loss = cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
frozen = sum(p.grad is not None for p in model.parameters() if not p.requires_grad)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; frozen parameters with a gradient: {frozen}")

# %% [markdown]
# Left, the loss on these 16 pictures. Right, what the top-down module now sends to each block; it was zero
# when training began.

# %%
with torch.no_grad():
    seen = toast.trace(model, images)
    norms = [float(signal.norm(dim=-1).mean()) for signal in seen.signals]
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.plot(losses, color="#b5367a")
left.set(xlabel="step", ylabel="cross-entropy", title="training")
right.bar(range(len(norms)), norms, color="#b5367a")
right.set(xlabel="block", ylabel="mean norm", title="top-down signal after training")
plt.show()

# %% [markdown]
# ## Switch it off, save it, load it
#
# `disable_adapter` gives the frozen model back to the bit. What is saved is the adapter in PEFT's format,
# with a few weights of the backbone to recognise it by, and with the frozen feedback that its factors
# belong to.

# %%
folder = Path(tempfile.mkdtemp(prefix="toast-")) / "adapter"
with torch.no_grad():
    after = model(images)
    with model.disable_adapter():
        restored = model(images)
toast.save_adapter(model, folder)
loaded = PeftModel.from_pretrained(make_vit(), str(folder)).eval()
with torch.no_grad():
    print("without the adapter, the frozen output:", torch.equal(restored, before))
    print("loaded on a fresh backbone, the same:  ", torch.allclose(loaded(images), after, atol=1e-5))
size = (folder / "adapter_model.safetensors").stat().st_size
whole = sum(p.numel() * p.element_size() for p in make_vit().parameters())
print(f"adapter {size / 1e6:.2f} MB, model {whole / 1e6:.1f} MB")

# %% [markdown]
# Next: [two stages](02_two_stages.ipynb) with the training system, and [where a trained model
# looks](03_refocused_attention.ipynb).
