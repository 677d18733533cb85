"""Prompts without their images, as a runner of graphs makes them."""

from __future__ import annotations

import numpy as np

from guardbake.batch import Batch, without_images


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
