"""Prompts without their images, as a runner of graphs makes them."""

from __future__ import annotations

import numpy as np

from guardbake.batch import Batch, alone, in_groups, without_images


def test_image_tokens_go_and_words_stay_in_their_order() -> None:
    ids = np.array([[0, 0, 5, 9, 9, 6, 7], [0, 4, 3, 2, 9, 9, 1], [8, 7, 6, 5, 4, 3, 2]])
    mask = np.array([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1], [1] * 7])
    whole = Batch(ids, mask, ids == 9, np.zeros((2, 3, 4, 4), np.float32), np.ones((2, 3), int))
    words = without_images(whole)
    kept = zip(words.input_ids, words.attention_mask, strict=True)
    said = [row[real == 1].tolist() for row, real in kept]
    assert said == [[5, 6, 7], [4, 3, 2, 1], [8, 7, 6, 5, 4, 3, 2]]
    assert words.attention_mask.tolist() == [[0] * 4 + [1] * 3, [0] * 3 + [1] * 4, [1] * 7]
    assert words.attention_mask.dtype == words.input_ids.dtype == np.int64
    assert not (
        words.input_ids == 9
    ).any()  # nor in the padding, where an image would be looked for
    assert not words.image_mask.any()
    assert words.pixel_values is None
    assert words.image_grid_thw is None


def test_a_batch_without_images_is_only_cut_to_its_longest() -> None:
    ids, mask = np.array([[0, 0, 5, 6], [0, 4, 3, 2]]), np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
    words = without_images(Batch(ids, mask, mask == 2, None, None))
    assert words.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert (words.input_ids * words.attention_mask).tolist() == [[0, 5, 6], [4, 3, 2]]


def test_a_request_alone_has_its_own_images_and_no_padding() -> None:
    """Images of 2 and 6 patches, three tokens a patch pair: rows end where images do."""
    ids = np.array([[0, 0, 5, 9, 6], [0, 4, 3, 2, 1], [9, 9, 9, 8, 7]])
    mask = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1] * 5])
    pixels, grid = np.arange(8.0)[:, None], np.array([[1, 1, 2], [1, 2, 3]])
    whole = Batch(ids, mask, ids == 9, pixels, grid)
    first, second, third = (alone(whole, row) for row in range(3))
    assert first.input_ids.tolist() == [[5, 9, 6]]
    assert first.attention_mask.tolist() == [[1, 1, 1]]
    assert first.pixel_values is not None
    assert first.pixel_values[:, 0].tolist() == [0, 1]
    assert first.image_grid_thw is not None
    assert first.image_grid_thw.tolist() == [[1, 1, 2]]
    assert second.input_ids.tolist() == [[4, 3, 2, 1]]
    assert second.pixel_values is None
    assert second.image_grid_thw is None
    assert third.pixel_values is not None
    assert third.pixel_values[:, 0].tolist() == [2, 3, 4, 5, 6, 7]


def test_square_images_are_told_apart_by_their_tokens() -> None:
    ids = np.array([[5, 9, 9, 6], [5, 6, 7, 8], [9, 9, 6, 7]])
    pixels = np.arange(2.0)[:, None, None, None]
    words = np.array([[3, 4, 5], [6, -1, -1]])
    whole = Batch(ids, np.ones_like(ids), ids == 9, pixels, None, instruction_ids=words)
    rows = [alone(whole, row) for row in range(3)]
    shown = [row.pixel_values for row in rows]
    assert [None if each is None else each.ravel().tolist() for each in shown] == [[0], None, [1]]
    read = [row.instruction_ids for row in rows]
    assert [None if each is None else each.tolist() for each in read] == [[[3, 4, 5]], None, [[6]]]


def test_what_is_answered_is_no_prompt() -> None:
    ids = np.array([[0, 5, 9, 6, 7, 8], [4, 3, 2, 1, 7, 8]])
    whole = Batch(ids, (ids > 0).astype(np.int64), ids == 9, None, None, answered=2)
    assert whole.prompt_lengths.tolist() == [3, 4]
    assert (without_images(whole).input_ids[:, -2:] == [[5, 6], [2, 1]]).all()


def test_groups_keep_order_padding_and_their_own_images() -> None:
    ids = np.array([[0, 0, 5, 9, 6], [0, 4, 3, 2, 1], [9, 9, 9, 8, 7]])
    mask = (ids > 0).astype(np.int64)
    pixels, grid = np.arange(8.0)[:, None], np.array([[1, 1, 2], [1, 2, 3]])
    whole = Batch(ids, mask, ids == 9, pixels, grid, answered=1)
    first, second = in_groups(whole, 2)
    assert [group.input_ids.tolist() for group in (first, second)] == [
        ids[:2].tolist(),
        [[*ids[2]]],
    ]
    assert first.pixel_values is not None
    assert first.pixel_values[:, 0].tolist() == [0, 1]
    assert second.pixel_values is not None
    assert second.pixel_values[:, 0].tolist() == [2, 3, 4, 5, 6, 7]
    assert second.answered == 1
    assert [len(group.input_ids) for group in in_groups(whole, None)] == [3]
    words = in_groups(whole, 1)[1]
    assert words.pixel_values is None
    assert words.image_grid_thw is None
