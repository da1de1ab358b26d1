"""The maps over a text are those of the two passes that made the answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor
from transformers import AttentionInterface

import toast
from tests.generation.test_generate import by_hand
from tests.models import DEPTH, awaken, decoder, vit
from tests.visual.text.test_cells import END, HOSTILE, SENTENCES, TEMPLATE, decode, tiny_tokenizer
from toast.visual.text import attention
from toast.visual.text.looking import TextAttentionMaps, look_at_text

SIZES = {"vocab_size": 300, "max_position_embeddings": 1024}
PROMPT, ANSWER = "The soup is good", " with bread."


def plain_decoder(kind: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    return decoder(kind, dtype, **((SIZES if kind != "gpt2" else {}) | options))


def steer(bare: Any, **options: Any) -> Any:
    """A wrapped model whose signals are far from zero."""
    torch.manual_seed(1)
    model = awaken(toast.wrap(bare, **({"select_features": "unnormed"} | options))).eval()
    sample = torch.tensor([tiny_tokenizer()(SENTENCES[0])["input_ids"]])
    toast.calibrate(model, input_ids=sample % bare.config.vocab_size, use_cache=False)
    return model


def look(model: Any, prompt: str = PROMPT, **options: Any) -> TextAttentionMaps:
    return look_at_text(model, tiny_tokenizer(), prompt, **({"answer": ANSWER} | options))


def generate(model: Any, **options: Any) -> TextAttentionMaps:
    return look(model, answer=None, max_new_tokens=6, **options)


def assert_near(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# The eager attention of transformers computes its softmax in float32, whatever the model's type.
ROUNDED = 2e-5


@pytest.mark.parametrize("block", range(DEPTH))
@pytest.mark.parametrize("kind", ["llama", "llama-grouped", "mistral", "qwen3"])
def test_both_maps_are_those_that_transformers_returns_for_the_passes(kind: str, block: int) -> None:
    """The plain model's; and those of one to whose values the signals are added by hand."""
    model = steer(plain_decoder(kind))
    views = look(model, block=block)
    eager = plain_decoder(kind, attn_implementation="eager")
    ids = views.token_ids[None]
    assert_near(
        views.first_attention, eager(ids, output_attentions=True).attentions[block][0].mean(0), ROUNDED
    )
    by_hand(model, eager, ids)
    second = eager(ids, output_attentions=True).attentions[block][0].mean(0)
    assert_near(views.second_attention, second, ROUNDED)
    if block:
        assert (views.second_attention - views.first_attention).abs().max() > 1e-3
    for maps in (views.first_attention, views.second_attention):
        assert maps.shape == (len(views.tokens), len(views.tokens))
        assert_near(maps.sum(-1), torch.ones_like(maps[0]))
        assert maps.triu(1).abs().max() == 0


@pytest.mark.parametrize("select_from", [None, 0, 1])
@pytest.mark.parametrize("head", ["mean", 1])
def test_the_kernel_changes_no_map(select_from: int | None, head: Any) -> None:
    seen = [
        look(steer(plain_decoder(attn_implementation=kernel), select_from=select_from), head=head)
        for kernel in ("sdpa", "eager")
    ]
    for name in ("first_attention", "second_attention", "attention_change", "received_change"):
        assert_near(getattr(seen[0], name), getattr(seen[1], name).double(), ROUNDED)
    assert torch.equal(seen[0].token_ids, seen[1].token_ids)
    assert_near(seen[0].selection_weights, seen[1].selection_weights, ROUNDED)


@pytest.mark.parametrize("form", ["per_token", "composed"])
def test_where_the_first_pass_ends_early_the_attention_before_is_the_frozen_models(form: str) -> None:
    bare = plain_decoder()
    model = steer(copy.deepcopy(bare), select_from=1, feedback_form=form)
    views = look(model)
    assert (views.block, views.first_pass_ends, views.before) == (2, 1, "frozen model")
    assert "The first pass ended after block 1" in views.notes[-1]
    eager = plain_decoder(attn_implementation="eager")
    expected = eager(views.token_ids[None], output_attentions=True).attentions
    assert_near(views.first_attention, expected[2][0].mean(0), ROUNDED)
    below = look(model, block=1)
    assert (below.first_pass_ends, below.before, len(below.notes)) == (None, "first pass", 1)
    assert_near(below.first_attention, expected[1][0].mean(0), ROUNDED)


def test_the_passes_are_those_that_made_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[toast.Trace] = []
    monkeypatch.setattr(
        attention,
        "trace",
        lambda *args, **kwargs: traces.append(toast.trace(*args, **kwargs)) or traces[0],
    )
    model = steer(plain_decoder())
    views = generate(model, head=2)
    (traced,) = traces
    ids = views.token_ids[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(traced.output.logits, logits)
    asked = int(views.is_prompt.sum())
    assert logits[0, asked - 1 : -1].argmax(-1).tolist() == ids[0, asked:].tolist()  # the likeliest each time
    assert len(views.tokens) == asked + 6
    assert torch.equal(views.first_attention, traced.first_attention[2][0, 2])
    assert torch.equal(views.second_attention, traced.attention[2][0, 2])
    assert torch.equal(views.selection_weights, traced.selection_weights[0].float())


def test_the_changes_by_their_definitions() -> None:
    views = look(steer(plain_decoder()))
    first, second = views.first_attention.tolist(), views.second_attention.tolist()
    count = len(first)
    for i in range(count):
        moved = sum(
            max(second[i][k] - first[i][k], 0.0) for k in range(count)
        )  # what is won is lost elsewhere
        assert views.attention_change[i].item() == pytest.approx(moved, abs=1e-12)
        gained = [second[q][i] - first[q][i] for q in range(i, count)]
        assert views.received_change[i].item() == pytest.approx(sum(gained) / len(gained), abs=1e-12)
    assert views.attention_change[0] == 0  # the first token sees only itself
    assert views.attention_change.max() > 1e-2


def test_a_new_adapter_changes_nothing() -> None:
    views = look(toast.wrap(plain_decoder()))
    assert torch.equal(views.first_attention, views.second_attention)
    assert views.attention_change.abs().max() == views.received_change.abs().max() == 0


def test_the_mean_is_over_all_heads() -> None:
    model = steer(plain_decoder())
    heads = [look(model, head=head) for head in range(3)]
    mean = torch.stack([views.second_attention for views in heads]).mean(0)
    assert_near(look(model).second_attention, mean)
    assert not torch.equal(heads[0].second_attention, heads[1].second_attention)
    assert heads[1].notes[0] == "Attention of block 2, head 1."


# The text.


@pytest.mark.parametrize("answer", [" with bread.", HOSTILE, ""])
def test_a_given_answer_follows_the_prompt(answer: str) -> None:
    model, tokenizer = steer(plain_decoder()), tiny_tokenizer()
    views = look_at_text(model, tokenizer, PROMPT, answer=answer, max_new_tokens=0)
    assert views.text == PROMPT + answer == decode(tokenizer, views.token_ids.tolist())
    assert views.token_ids[views.is_prompt].tolist() == tokenizer(PROMPT)["input_ids"]
    assert views.token_ids[~views.is_prompt].tolist() == tokenizer(answer)["input_ids"]
    assert len(views.tokens) == len(views.token_ids) == len(views.selection_weights)


def test_parts_of_characters_have_the_tokenizers_names() -> None:
    views = look(steer(plain_decoder()), "the 日", answer="")
    *_, cell = views.cells
    assert cell.text.strip() == "日"
    assert "".join(views.tokens[: cell.start]) + cell.text == "the 日"
    assert views.tokens[cell.start : cell.stop] == tiny_tokenizer().convert_ids_to_tokens(
        views.token_ids[cell.start : cell.stop].tolist()
    )


def test_a_chat_prompt_goes_through_the_template() -> None:
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    views = look_at_text(steer(plain_decoder()), tokenizer, PROMPT, answer="Yes", chat=True)
    assert views.text == f"<|start|>user\n{PROMPT}<|end|>\n<|start|>assistant\nYes"
    assert [cell.text for cell in views.cells if cell.special] == ["<|start|>", "<|end|>", "<|start|>"]
    assert "".join(cell.text for cell in views.cells if not views.is_prompt[cell.start]) == "Yes"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str) -> None:
    model, padding = steer(plain_decoder()), tiny_tokenizer(padding_side=side)
    padding.backend_tokenizer.enable_padding(length=24, pad_id=0, pad_token="<|pad|>", direction=side)
    expected, views = look(model), look_at_text(model, padding, PROMPT, answer=ANSWER)
    assert views.text == expected.text
    assert torch.equal(views.second_attention, expected.second_attention)


def test_the_end_of_the_answer_is_shown() -> None:
    model = steer(plain_decoder())
    free = generate(model)
    token = int(free.token_ids[~free.is_prompt][1])
    model.generation_config.eos_token_id = token
    ended = generate(model)
    assert ended.token_ids.tolist()[-1] == token
    assert len(ended.tokens) <= len(free.tokens) - 4
    closed = look(model, answer=f" bread{END}")
    assert closed.cells[-1].special


@pytest.mark.parametrize("shown", [1, 7, 12, 500])
def test_of_a_long_text_the_last_tokens_are_shown_as_they_were_read(shown: int) -> None:
    model = steer(plain_decoder())
    whole = look(model, SENTENCES[0])
    count = len(whole.tokens)
    views = look(model, SENTENCES[0], max_tokens=shown)
    kept = min(shown, count)
    assert (views.left_out, len(views.tokens)) == (count - kept, kept)
    assert views.text == whole.text[-len(views.text) :]
    names = ("token_ids", "is_prompt", "selection_weights", "attention_change", "received_change")
    for name in names:
        assert torch.equal(getattr(views, name), getattr(whole, name)[-kept:])
    for name in ("first_attention", "second_attention"):
        assert torch.equal(getattr(views, name), getattr(whole, name)[-kept:, -kept:])
    assert views.tokens == whole.tokens[-kept:]
    assert views.cells[0].start == 0
    assert (f"left out here: {count - kept} tokens" in views.notes[-1]) is (kept < count)


def test_a_character_is_not_cut() -> None:
    model = steer(plain_decoder())
    views = look(model, "soup日", answer="", max_tokens=2)
    assert views.text.strip() == "日"
    assert look(model, "日 soup", answer="", max_tokens=5).text[0] != "\ufffd"


# What the model is left like, and what is refused.


def test_the_model_is_left_as_it_was() -> None:
    model = steer(plain_decoder(attention_dropout=0.5))
    calm = look(model)
    model.train()
    model.base_model.model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    views = look(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(views.second_attention, calm.second_attention)
    assert not views.second_attention.requires_grad
    assert not views.selection_weights.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_shown_in_single(dtype: torch.dtype) -> None:
    fine, views = (
        look(steer(plain_decoder()), answer=" and"),
        look(steer(plain_decoder(dtype=dtype)), answer=" and"),
    )
    assert views.first_attention.dtype == views.selection_weights.dtype == torch.float32
    assert_near(views.first_attention.double(), fine.first_attention, 1e-5 if dtype == torch.float32 else 0.1)


def test_a_gpt2() -> None:
    small = plain_decoder("gpt2")
    small.resize_token_embeddings(300, mean_resizing=False)
    views = look(steer(small))
    assert_near(views.second_attention.sum(-1), torch.ones(len(views.tokens), dtype=torch.float64))


@pytest.fixture
def hidden_kernel() -> Iterator[str]:
    """An attention of which PyTorch sees no softmax, as flash and flex attention are."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("hidden", attend)
    yield "hidden"
    AttentionInterface._global_mapping.pop("hidden")


def test_a_kernel_that_hides_its_attention_is_named(hidden_kernel: str) -> None:
    model = steer(plain_decoder(attn_implementation=hidden_kernel))
    with pytest.raises(ValueError, match=r"no attention was seen in block 2: .*'sdpa' or 'eager'"):
        look(model)
    assert not model.training


def test_what_cannot_be_shown_is_refused() -> None:
    model = steer(plain_decoder())
    with pytest.raises(ValueError, match="look_at_text needs a model with an active TOAST adapter"):
        look(plain_decoder())
    with model.disable_adapter(), pytest.raises(ValueError, match="active TOAST adapter"):
        look(model)
    with pytest.raises(ValueError, match=r"needs a causal language model.*got VisionTransformer"):
        look(toast.wrap(vit()))
    with pytest.raises(ValueError, match=r"steered blocks 0 to 2; got \[3\]"):
        look(model, block=3)
    for head in (3, -1, "max"):
        with pytest.raises(ValueError, match=f"block 2 has heads 0 to 2, or 'mean' for all; got {head!r}"):
            look(model, head=head)
    with pytest.raises(ValueError, match="chat=True needs a tokenizer with a chat template"):
        look(model, chat=True)
    with pytest.raises(ValueError, match="at least one token; '' has none"):
        look(model, "")
    with pytest.raises(ValueError, match="max_tokens must be 1 or more; got 0"):
        look(model, max_tokens=0)
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more; got 0"):
        look(model, answer=None, max_new_tokens=0)


def test_an_adapter_without_a_wrapper_is_looked_at() -> None:
    """As transformers' `load_adapter` puts it in."""
    model = inject_adapter_in_model(toast.ToastConfig(), plain_decoder())
    assert look(awaken(model).eval()).text == PROMPT + ANSWER
