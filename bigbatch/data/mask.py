"""Masked language modelling: which tokens are to be predicted, and what stands in their place."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from bigbatch.config.models import Mask
from bigbatch.keyed import hashed, uniform
from bigbatch.spec import IGNORED, Spec

_ACTION, _TOKEN = range(2)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What masking has to know of V tokens.

    mask: id of [MASK]. special: which are no text, bool (V,). continues: which go on with the word before, bool (V,).
    """

    mask: int
    special: Tensor
    continues: Tensor

    @classmethod
    def of(cls, tokenizer: str, spec: Spec, device: torch.device) -> Vocabulary:
        """That of a tokenizer.json, whose text this is. ValueError if it has no token for masks."""
        if "mask" not in spec.special:
            raise ValueError("data.mask: the tokenizer has no [MASK]; add one to it, or set data.mask=null")
        model = json.loads(tokenizer)["model"]
        # Unigram models list their tokens with scores, the others number them.
        tokens = [token for token, _ in model["vocab"]] if isinstance(model["vocab"], list) else model["vocab"]
        # A mark where words go on, as WordPiece has it, or one where they begin; without either, tokens are words.
        inside = model.get("continuing_subword_prefix")
        begin = next((mark for mark in ("Ġ", "▁") if any(token.startswith(mark) for token in tokens)), "")
        ids = tokens.items() if isinstance(tokens, dict) else ((token, i) for i, token in enumerate(tokens))
        special, continues = torch.zeros(2, spec.classes, dtype=torch.bool)
        for token, i in ids:
            continues[i] = token.startswith(inside) if inside else not token.startswith(begin)
        special[list(spec.special.values())] = True
        return cls(spec.special["mask"], special.to(device), continues.to(device))


def mask_tokens(
    tokens: Tensor, *, config: Mask, vocabulary: Vocabulary, seed: int, epoch: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Masked tokens and labels, int64 (B, L); what happens to a row depends on (seed, epoch, index) alone.

    tokens: int64 (B, L); epoch, index: int64 (B,), all on one device. Of the n tokens of a row that are not special,
    the k = max(1, round(p·n)) whose hash of (seed, epoch, index, position) is lowest are chosen (BERT, Devlin et al.
    2018, arXiv:1810.04805); of those ``replace`` become [MASK], ``random`` a token drawn from all that are not special,
    the others stay. Their labels are what they were; all other labels are -100.

    A fixed k, as BERT has it, rather than n draws of probability p: no row is without a loss, and a step weighs what
    the next one does.

    ``whole_word``: words are chosen, with all their tokens, by the hash of the first one, until there are k tokens.
    Differs from BERT, which passes over a word that would bring more than k: long words are as likely as short ones.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    keys = (seed, epoch[:, None], index[:, None], place)
    text = ~vocabulary.special[tokens]
    first = place.expand_as(tokens)  # of the tokens of a word
    if config.whole_word:
        inside = vocabulary.continues[tokens] & text & text.roll(1, dims=1)
        inside[:, 0] = False
        first = first.masked_fill(inside, 0).cummax(1).values
    last = torch.iinfo(torch.int64).max
    order = hashed(*keys).masked_fill(~text, last).gather(1, first).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, place.expand_as(order)).gather(1, first)
    k = (config.probability * text.sum(1, keepdim=True).double()).round().clamp(min=1)
    chosen = text & (rank < k)

    u, ids = uniform(*keys, draw=_ACTION), (~vocabulary.special).nonzero().flatten()
    drawn = ids[(uniform(*keys, draw=_TOKEN) * len(ids)).long()]
    masked = tokens.masked_fill(chosen & (u < config.replace), vocabulary.mask)
    changed = chosen & (u >= config.replace) & (u < config.replace + config.random)
    return torch.where(changed, drawn, masked), tokens.masked_fill(~chosen, IGNORED)
