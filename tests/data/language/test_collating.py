"""Rows become padded tensors."""

from __future__ import annotations

from torch import Tensor, tensor

from toast.data.language import collate


def listed(batch: dict[str, Tensor]) -> dict[str, list]:
    assert all(value.dtype == tensor(0).dtype for value in batch.values())
    return {name: value.tolist() for name, value in batch.items()}


def test_documents_alone_get_an_attention_mask() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8], "index": 4}]
    assert listed(collate(rows, 9)) == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


def test_packed_documents_get_none_and_padding_is_a_document_of_its_own() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 5], "labels": [-100, 6, -100, 8, 5], "position_ids": [0, 1, 0, 1, 2]},
        {"input_ids": [8, 8, 8], "labels": [-100, 8, 8], "position_ids": [0, 1, 2]},
    ]
    assert listed(collate([row | {"index": i + 3} for i, row in enumerate(rows)], 0)) == {
        "input_ids": [[5, 6, 7, 8, 5], [8, 8, 8, 0, 0]],
        "labels": [[-100, 6, -100, 8, 5], [-100, 8, 8, -100, -100]],
        "position_ids": [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1]],
        "index": [3, 4],
    }
