"""Masking of tokens: as its textbook has it, in the shares that were asked for, whatever the batch."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from bigbatch.config.models import Mask
from bigbatch.data.mask import Vocabulary, mask_tokens
from bigbatch.keyed import hashed, uniform
from bigbatch.spec import Spec
from reference.mask import mask_row

V, SPECIAL = 40, {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{'##' * (i % 3 == 0)}t{i}" for i in range(5, V))]
CPU, SPEC = torch.device("cpu"), Spec((9,), V, special=SPECIAL)
MODEL = {"continuing_subword_prefix": "##", "vocab": {token: i for i, token in enumerate(TOKENS)}}
WORDS = Vocabulary.of(json.dumps({"model": MODEL}), SPEC, CPU)


def masked(tokens, *, config, seed=3, epoch=0, index=None):
    index = torch.arange(len(tokens)) if index is None else index
    return mask_tokens(
        tokens, config=config, vocabulary=WORDS, seed=seed, epoch=torch.full_like(index, epoch), index=index
    )


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(0, V - 1), min_size=9, max_size=9), min_size=1, max_size=5),
    st.floats(0.01, 0.99),
    st.booleans(),
)
def test_it_is_the_textbook(rows, probability, whole_word):
    config = Mask(probability=probability, replace=0.6, random=0.3, whole_word=whole_word)
    tokens, index = torch.tensor(rows), torch.arange(len(rows)) * 7
    got, labels = masked(tokens, config=config, index=index, epoch=2)
    keys = (3, torch.tensor(2), index[:, None], torch.arange(9))
    text = [i for i in range(V) if i not in SPECIAL.values()]
    drawn = (uniform(*keys, draw=1) * len(text)).long()
    for i, row in enumerate(rows):
        expected = mask_row(
            row,
            order=hashed(*keys)[i].tolist(),
            action=uniform(*keys, draw=0)[i].tolist(),
            drawn=[text[j] for j in drawn[i].tolist()],
            config=config,
            special=set(SPECIAL.values()),
            continues={i for i, token in enumerate(TOKENS) if token.startswith("##")},
            mask=4,
        )
        assert (got[i].tolist(), labels[i].tolist()) == expected


def test_a_row_does_not_depend_on_its_batch_but_on_seed_and_epoch():
    tokens = torch.randint(5, V, (8, 9), generator=torch.Generator().manual_seed(0))
    config = Mask()
    got, labels = masked(tokens, config=config)
    some = torch.tensor([6, 1])
    again, again_labels = masked(tokens[some], config=config, index=some)
    assert again.equal(got[some]) and again_labels.equal(labels[some])
    for other in ({"seed": 4}, {"epoch": 1}):
        assert not masked(tokens, config=config, **other)[1].equal(labels)


def test_shares_are_those_asked_for():
    """χ² of what becomes of a chosen token, of where it stands, and of what it is exchanged for."""
    rows, length = 4000, 40
    tokens = torch.full((rows, length), 7)
    got, labels = masked(tokens, config=Mask())
    chosen = labels != -100
    assert chosen.sum(1).unique().tolist() == [6]  # 15 % of 40, in every row
    n = int(chosen.sum())
    counts = [int((got[chosen] == 4).sum()), int((got[chosen] != 4).logical_and(got[chosen] != 7).sum())]
    drawn_same = 0.1 / (V - 5)  # a random token may be the one that was there
    shares = [0.8, 0.1 - drawn_same, 0.1 + drawn_same]
    assert stats.chisquare([*counts, n - sum(counts)], [n * share for share in shares]).pvalue > 1e-3
    assert stats.chisquare(chosen.sum(0).numpy()).pvalue > 1e-3
    drawn = torch.bincount(got[chosen], minlength=V)[5:]
    drawn = torch.cat([drawn[:2], drawn[3:]])  # all but the token itself
    assert stats.chisquare(drawn.numpy()).pvalue > 1e-3


def test_words_of_one_token_are_chosen_as_tokens_are():
    tokens = torch.full((50, 9), 7)
    assert not WORDS.continues[7]
    one, other = (masked(tokens, config=Mask(whole_word=whole)) for whole in (False, True))
    assert one[0].equal(other[0]) and one[1].equal(other[1])


def test_a_row_without_text_has_nothing_to_predict():
    tokens = torch.tensor([[2, 3, 0, 0, 0, 0, 0, 0, 0]])
    got, labels = masked(tokens, config=Mask())
    assert got.equal(tokens) and (labels == -100).all()


def test_where_words_go_on():
    vocab = [["<s>", 0.0], ["▁a", 0.0], ["b", 0.0], ["<mask>", 0.0]]
    for model in ({"vocab": vocab}, {"vocab": {token.replace("▁", "Ġ"): i for i, (token, _) in enumerate(vocab)}}):
        spec = Spec((9,), 4, special={"cls": 0, "mask": 3})
        found = Vocabulary.of(json.dumps({"model": model}), spec, CPU)
        assert (found.continues & ~found.special).tolist() == [False, False, True, False]
    also = {**MODEL, "vocab": {**MODEL["vocab"], "▁": V, "Ġ": V + 1}}
    found = Vocabulary.of(json.dumps({"model": also}), Spec((9,), V + 2, special=SPECIAL), CPU)
    assert found.continues.tolist() == [*WORDS.continues.tolist(), False, False]
    with pytest.raises(ValueError, match=r"data\.mask: the tokenizer has no \[MASK\]"):
        Vocabulary.of(json.dumps({"model": {"vocab": {}}}), Spec((9,), 4, special={"cls": 0}), CPU)
