"""Text, instructions and conversations as rows of tokens for causal language models of transformers.

read      files.py, hub.py      rows of a file or a data set, each with its place, for messages
parse     conversations.py      a row becomes a text, or turns of a conversation
encode    encoding.py, turns.py tokens, and which of them are predicted
pack      packing.py            which documents share a row of a block's length
serve     dataset.py            LanguageData: rows by number
batch     collating.py          tensors, padded
check     leaking.py            whether a live model keeps packed documents apart
"""

from toast.data.language.collating import collate
from toast.data.language.leaking import leaks
from toast.data.language.named_texts import open_language
from toast.data.language.packing import check_block
from toast.data.language.rows import LanguageData, Summary

__all__ = ["LanguageData", "Summary", "check_block", "collate", "leaks", "open_language"]
