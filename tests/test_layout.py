"""Layouts of pairs: what each token sees, the segments of attention, and how a layout travels."""

import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from pairs import BATCH, CASES, collate, histories, oracle, random_batch
from torch.nn.attention import flex_attention
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dposhift_trl.columns import ROW_INDEX
from dposhift_trl.scoring import PairLayout
from dposhift_trl.training.collator import PairCollator


def check_segments(layout, histories):
    """Every token is a query of one segment, whose keys up to it, counted from the end, are its history."""
    queries, keys = layout.query_offsets.tolist(), layout.key_offsets.tolist()
    assert (queries[0], queries[-1], keys[0], keys[-1]) == (0, len(layout), 0, len(layout.key_index))
    tokens, longest = layout.input_ids[0, layout.key_index].tolist(), [0, 0]
    for begin, end, first, last in zip(queries, queries[1:], keys, keys[1:], strict=False):
        assert begin < end
        longest = [max(longest[0], end - begin), max(longest[1], last - first)]
        for query in range(begin, end):
            assert tuple(tokens[first : last - (end - 1 - query)]) == histories[query]
    assert longest == [layout.most_queries, layout.most_keys]
    assert layout.query_offsets.dtype == layout.key_offsets.dtype == torch.int32


def check_layout(batch):
    layout = PairLayout.from_batch(batch)
    wanted, needed = oracle(batch)
    seen = list(histories(layout))
    check_segments(layout, seen)
    assert layout.rows.tolist() == sorted(set(layout.rows.tolist()))
    cells = {}
    for cell, source in zip(layout.cells.tolist(), layout.sources.tolist(), strict=True):
        cells[divmod(cell, layout.shape[1])] = (seen[layout.rows[source]], layout.labels[0, source].item())
    assert cells == wanted
    assert sum(map(sum, layout.lengths)) == len(layout) == len(seen)
    if wanted:  # nothing is read twice but the last shared token of a pair whose answers part
        pairs = len(layout.lengths)
        owner = [pair for pair, lengths in enumerate(layout.lengths) for _ in range(sum(lengths))]
        copies = len(seen) - len(set(zip(owner, seen, strict=True)))
        assert set(zip(owner, seen, strict=True)) == needed
        assert copies <= sum(second > 0 for _, _, second in layout.lengths) <= pairs


@pytest.mark.parametrize("name", CASES)
def test_a_layout_hands_every_completion_token_its_own_history(name):
    check_layout(CASES[name])


def test_random_layouts_hand_every_completion_token_its_own_history():
    for seed in range(200):
        check_layout(random_batch(seed))


def test_a_layout_shares_the_prompt_and_the_tokens_on_which_answers_agree():
    layout = PairLayout.from_batch(collate(([3, 4, 5], [6, 7, 2], [6, 8, 9, 2])))
    assert layout.input_ids.tolist() == [[3, 4, 5, 6, 7, 6, 8, 9]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert layout.lengths == ((3, 2, 3),)
    assert layout.rows.tolist() == [2, 3, 4, 5, 6, 7]
    assert layout.labels.tolist() == [[6, 7, 2, 8, 9, 2]]
    assert layout.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert layout.key_places.tolist() == [[0, 1, 2, 3, 4, 8, 9, 10], [5, 6, 7, 3, 4, 8, 9, 10]]
    assert (layout.query_offsets.tolist(), layout.key_offsets.tolist()) == ([0, 5, 8], [0, 5, 11])
    assert (layout.most_queries, layout.most_keys) == (5, 6)


def test_a_layout_refuses_rows_that_are_not_pairs():
    with pytest.raises(ValueError, match="as many rejected rows, got 3 rows"):
        PairLayout.from_batch({key: value[:3] for key, value in BATCH.items()})


def test_a_layout_refuses_left_padding():
    with pytest.raises(ValueError, match="padded on the right"):
        PairLayout.from_batch({key: value.flip(1) for key, value in BATCH.items()})


def test_the_block_mask_lets_each_token_see_its_own_row():
    layout = PairLayout.from_batch(BATCH)
    for window in (None, 4):
        dense = flex_attention.create_mask(
            layout.block_mask(window).mask_mod, None, None, layout.padded_length, layout.padded_length, device="cpu"
        )[0, 0]
        padding = torch.arange(len(layout), layout.padded_length)
        assert torch.equal(dense[len(layout) :].nonzero(), torch.stack((padding - len(layout), padding), 1))
        for seen, row in zip(histories(layout), dense[: len(layout)], strict=True):
            assert tuple(layout.input_ids[0, row.nonzero()[:, 0]].tolist()) == (
                seen if window is None else seen[-window:]
            )
        assert layout.block_mask(window) is layout.block_mask(window)


def test_a_collator_adds_the_layout_and_leaves_the_rest():
    examples = [{"prompt_ids": [3, 4], "chosen_ids": [5, 6, 2], "rejected_ids": [5, 7, 2], "ref_chosen_logps": -1.0}]
    plain = DataCollatorForPreference(pad_token_id=0)
    batch = PairCollator(plain, shares_prompts=True)(examples)
    assert batch.pop(ROW_INDEX).tolist() == [-1]
    assert batch.pop("shared_prompt").lengths == ((2, 2, 2),)
    expected = plain(examples)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[key], expected[key]) for key in expected)


def test_a_layout_travels_through_workers_and_the_prepared_loader():
    examples = [{"prompt_ids": [3] * n, "chosen_ids": [5, 6], "rejected_ids": [5]} for n in range(1, 5)]
    collator = PairCollator(DataCollatorForPreference(pad_token_id=0), shares_prompts=True)
    loader = Accelerator(cpu=True).prepare(DataLoader(examples, batch_size=2, collate_fn=collator, num_workers=1))
    for batch, n in zip(loader, (1, 3), strict=True):
        assert batch["shared_prompt"].lengths == ((n, 1, 0), (n + 1, 1, 0))
    layout = send_to_device({"shared_prompt": PairLayout.from_batch(BATCH)}, torch.device("meta"))["shared_prompt"]
    assert layout.rows.device.type == "meta"
    assert layout.lengths == PairLayout.from_batch(BATCH).lengths
    assert torch.equal(
        pickle.loads(pickle.dumps(PairLayout.from_batch(BATCH))).rows, PairLayout.from_batch(BATCH).rows
    )
