"""One row at a time, token by token: which are masked and by what, as BERT's definition says."""

from __future__ import annotations


def mask_row(tokens, *, order, action, drawn, config, special, continues, mask):
    """Masked tokens and labels of a row; ``order``, ``action`` and ``drawn`` are each position's draws: a number that
    words are sorted by, one in [0, 1), and a token."""
    words = []
    for place, token in enumerate(tokens):
        if token in special:
            continue
        goes_on = config.whole_word and token in continues and place > 0 and tokens[place - 1] not in special
        if goes_on:
            words[-1].append(place)
        else:
            words.append([place])
    k = max(1, round(config.probability * sum(map(len, words))))
    chosen = []
    for word in sorted(words, key=lambda word: order[word[0]]):
        if len(chosen) < k:
            chosen += word
    masked, labels = list(tokens), [-100] * len(tokens)
    for place in chosen:
        labels[place] = tokens[place]
        if action[place] < config.replace:
            masked[place] = mask
        elif action[place] < config.replace + config.random:
            masked[place] = drawn[place]
    return masked, labels
