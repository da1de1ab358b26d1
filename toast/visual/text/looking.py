"""What a steered language model looks at in a prompt and its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from toast.steering import steering_of
from toast.visual.modes import evaluating
from toast.visual.text.attention import Reading, read
from toast.visual.text.cells import Cell, join_tokens


@dataclass(frozen=True)
class TextAttentionMaps:
    """Where a language model looks in a prompt and its answer: what `toast.look_at_text` returns.

    A value for each token that is shown; those that are left out stand before them. `notes` says what a
    reader of the values must know.

    Args:
        cells: The tokens as readable text; a cell has several where a character has.
        tokens: Text of each token; of the part of a character, the tokenizer's name for it.
        token_ids: `(tokens,)`.
        is_prompt: Whether a token belongs to the prompt, `(tokens,)`.
        selection_weights: `(tokens,)`, 0 to 1.
        attention_change: Total variation distance between the rows of both passes' attention,
            1/2 Σ_k |a₂(q, k) - a₁(q, k)|, over all tokens of the text; `(tokens,)`, 0 to 1.
        received_change: a₂(q, k) - a₁(q, k), averaged over the tokens q that can see token k: itself and what
            follows it, `(tokens,)`, -1 to 1.
        first_attention: Attention of the first pass, `(queries, keys)`; rows sum to 1 if nothing is left out.
        second_attention: Attention of the second pass.
        block: Which block's attention it is, from 0.
        head: Which head's, from 0, or "mean" over all.
        left_out: How many tokens stand before these.
        first_pass_ends: The block after which the first pass ended, if that is below `block`. The first
            attention is then that of a further call without steering, which the first pass begins.
    """

    cells: list[Cell]
    tokens: list[str]
    token_ids: Tensor
    is_prompt: Tensor
    selection_weights: Tensor
    attention_change: Tensor
    received_change: Tensor
    first_attention: Tensor
    second_attention: Tensor
    block: int
    head: int | Literal["mean"]
    left_out: int = 0
    first_pass_ends: int | None = None

    @property
    def text(self) -> str:
        """The decoded text of the tokens, special ones included."""
        return "".join(cell.text for cell in self.cells)

    @property
    def before(self) -> str:
        """What the attention of the first pass is called."""
        return "first pass" if self.first_pass_ends is None else "frozen model"

    @property
    def notes(self) -> list[str]:
        """What a reader of the maps must know."""
        heads = "mean of all heads" if self.head == "mean" else f"head {self.head}"
        notes = [f"Attention of block {self.block}, {heads}."]
        if self.left_out:
            before = f"{self.left_out:,} tokens" if self.left_out > 1 else "1 token"
            notes.append(f"Read by the model but left out here: {before} before these.")
        if self.first_pass_ends is not None:
            notes.append(
                f"The first pass ended after block {self.first_pass_ends}: "
                "the attention before is that of the frozen model."
            )
        return notes


def look_at_text(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    answer: str | None = None,
    max_new_tokens: int = 40,
    block: int = -1,
    head: int | Literal["mean"] = "mean",
    max_tokens: int = 512,
    chat: bool = False,
) -> TextAttentionMaps:
    """Looks at a steered language model while it reads a prompt and its answer; nothing is drawn.

    Prompt and answer are read in one call of `toast.trace`, whose two passes make the answer's logits.
    Memory grows with the square of their length, for all heads of one block.

    Args:
        model: A wrapped causal language model with an active adapter; in evaluation mode for the call.
        tokenizer: Its tokenizer.
        prompt: What it is given.
        answer: What follows; None lets the model continue, the likeliest token each time.
        max_new_tokens: How far it continues.
        block: The block whose attention is shown, from 0, or negative from the top.
        head: The head whose attention is shown, or the mean of all.
        max_tokens: How many tokens are shown; of a longer text the last.
        chat: Whether the prompt is a user's message, which the tokenizer's chat template is put around.

    Returns:
        Selection weights and attention of both passes; `toast.visualize_text` writes the same as files.

    Raises:
        ValueError: If the model has no active adapter or does not generate, its attention kernel shows no
            attention, the block, the head or the chat template is not there, or there is nothing to read.
    """
    _check(model, answer, max_new_tokens, max_tokens)
    asked = _prompt_tokens(tokenizer, prompt, chat).to(next(model.parameters()).device)
    with evaluating(model):
        if answer is None:
            ids = model.generate(  # type: ignore[operator]
                input_ids=asked,
                attention_mask=torch.ones_like(asked),
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        else:
            answer_ids = tokenizer(answer, add_special_tokens=False, padding=False)["input_ids"]
            ids = torch.cat([asked, asked.new_tensor([answer_ids])], dim=1)
        reading = read(model, ids, block)
    return _compared(tokenizer, ids[0].cpu(), asked.shape[1], reading, head, max_tokens)


def _compared(
    tokenizer: Any,
    ids: Tensor,
    prompt_length: int,
    reading: Reading,
    head: int | Literal["mean"],
    max_tokens: int,
) -> TextAttentionMaps:
    """Chooses the head and the tokens that are shown, and compares the passes."""
    first = _of_head(reading.first_attention, head, reading.block)
    second = _of_head(reading.second_attention, head, reading.block)
    change = second - first
    observers = torch.arange(len(ids), 0, -1)  # causal: a token is seen by itself and by what follows
    tokens = ids.tolist()
    cells = join_tokens(tokens, partial(_decode, tokenizer), _special_tokens(tokenizer))
    shown = [cell for cell in cells if cell.start >= len(tokens) - max_tokens] or cells[-1:]
    start = shown[0].start
    names = [str(tokenizer.convert_ids_to_tokens(token)) for token in tokens[start:]]
    shown = [Cell(cell.text, cell.start - start, cell.stop - start, cell.special) for cell in shown]
    for cell in shown:
        if cell.stop - cell.start == 1:
            names[cell.start] = cell.text
    return TextAttentionMaps(
        cells=shown,
        tokens=names,
        token_ids=ids[start:],
        is_prompt=torch.arange(start, len(ids)) < prompt_length,
        selection_weights=reading.selection_weights[start:].float().cpu(),
        attention_change=change.abs().sum(-1)[start:] / 2,
        received_change=(change.sum(0) / observers)[start:],
        first_attention=first[start:, start:].contiguous(),
        second_attention=second[start:, start:].contiguous(),
        block=reading.block,
        head=head,
        left_out=start,
        first_pass_ends=reading.first_pass_ends,
    )


def _of_head(attention: Tensor, head: int | Literal["mean"], block: int) -> Tensor:
    """Returns the attention of a head, or the mean of all, `(queries, keys)`."""
    if head == "mean":
        return attention.mean(0).cpu()
    if not isinstance(head, int) or not 0 <= head < len(attention):
        raise ValueError(
            f"head: block {block} has heads 0 to {len(attention) - 1}, or 'mean' for all; got {head!r}."
        )
    return attention[head].cpu()


def _check(model: nn.Module, answer: str | None, max_new_tokens: int, max_tokens: int) -> None:
    steering, _ = steering_of(model, "look_at_text")
    if not hasattr(model.get_base_model() if isinstance(model, PeftModel) else model, "generate"):
        raise ValueError(
            "look_at_text needs a causal language model, with `generate`; "
            f"got {type(steering.trunk).__name__}."
        )
    for name, value in (("max_tokens", max_tokens), ("max_new_tokens", max_new_tokens)):
        if value < 1 and (name == "max_tokens" or answer is None):
            raise ValueError(f"{name} must be 1 or more; got {value}.")


def _prompt_tokens(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Returns the tokens of a prompt, `(1, tokens)`."""
    if chat and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "chat=True needs a tokenizer with a chat template; this one has none: use chat=False."
        )
    if chat:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    # The template has put its special tokens in.
    ids = tokenizer(prompt, add_special_tokens=not chat, padding=False)["input_ids"]
    if not ids:
        raise ValueError(f"the prompt must have at least one token; {prompt!r} has none.")
    return torch.tensor([ids])


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _special_tokens(tokenizer: Any) -> frozenset[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}
