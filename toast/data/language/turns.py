"""Which parts of a conversation, as its chat template writes it, are answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from toast.data.language.conversations import Message

ALPACA: Final = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
"""Prompt of Stanford Alpaca for an instruction without an input."""
ALPACA_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""The same for one with an input."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Segment(NamedTuple):
    """A stretch of text, and whether its tokens are predicted."""

    text: str
    counts: bool


def alpaca_segments(instruction: str, more: str, output: str) -> list[Segment]:
    """Returns prompt and answer; EOS, which ends the answer, has no text."""
    form = ALPACA_WITH_INPUT if more else ALPACA
    return [Segment(form.format(instruction=instruction, input=more), False), Segment(output, True)]


def alpaca_messages(instruction: str, more: str, output: str) -> list[Message]:
    """Returns question and answer of an instruction as turns of a conversation."""
    question = f"{instruction}\n\n{more}" if more else instruction
    return [{"role": "user", "content": question}, {"role": "assistant", "content": output}]


class ChatTemplate:
    """A tokenizer's chat template, or another for it.

    Args:
        tokenizer: A tokenizer of transformers.
        template: Text of a Jinja template in the place of the tokenizer's own.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if template is None and not tokenizer.chat_template:
            raise ValueError(
                f"conversations need a chat template; {type(tokenizer).__name__} of "
                f"{tokenizer.name_or_path!r} has none. Pass template=, the path of a .jinja file."
            )
        self.tokenizer = tokenizer
        self.template = template
        self.special = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())

    @property
    def marks_answers(self) -> bool:
        """Whether the template marks what the model generates with `{% generation %}`."""
        return bool(_GENERATION.search(self.template or self.tokenizer.get_chat_template()))

    def render(self, messages: Sequence[Message], ask: bool = False) -> str:
        """Returns the text of turns; with `ask`, up to where the model answers."""
        text: str = self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=ask
        )
        return text

    def marked(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Returns tokens of a conversation, and which the template marks as generated.

        An EOS right behind a marked stretch counts too: it is how the model ends its turn.
        """
        encoded = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        tokens: list[int] = encoded["input_ids"]
        counts = [bool(mark) for mark in encoded["assistant_masks"]]
        for at in range(1, len(tokens)):
            if counts[at - 1] and tokens[at] == self.tokenizer.eos_token_id:
                counts[at] = True
        return tokens, counts

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """Splits a conversation's text where answers begin and end, by rendering ever more of its turns.

        An answer begins where the template asks for it, and ends with the special token that closes the turn;
        line breaks behind that do not count.

        Raises:
            ValueError: If the text of the first turns changes when more follow, or an answer is not in it as
                it is, so that its place cannot be known.
        """
        whole = self.render(messages)
        segments: list[Segment] = []
        done = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:number], ask=True)
            through = self.render(messages[: number + 1])
            if not (through.startswith(before) and whole.startswith(through) and len(before) >= done):
                when = "more follow" if through.startswith(before) else "the last of them is asked for"
                raise ValueError(
                    f"the chat template is not prefix-stable: it writes turns 1 to {number + 1} in another "
                    f"way when {when}, so the place of that answer is not known. Mark the answers in the "
                    "template with {% generation %}, or leave all answers but the last out."
                )
            turn = through[len(before) :]
            answer = message["content"].strip()
            # A template may trim an answer, or ignore that it is to ask for one, and write the header here.
            header = 0 if turn.lstrip().startswith(answer) else turn.find(answer)
            if header < 0:
                raise ValueError(
                    f"the chat template changes the answer of turn {number + 1}: {answer[:40]!r} is written "
                    f"as {turn[:60]!r}."
                )
            closed = turn.rstrip()
            end = len(closed) if closed.endswith(self.special) else len(turn)
            segments.append(Segment(whole[done : len(before) + header], False))
            segments.append(Segment(turn[header:end], True))
            done = len(before) + end
        segments.append(Segment(whole[done:], False))
        return segments
