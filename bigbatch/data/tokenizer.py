"""Tokenizers, trained or loaded, and their special tokens. Without torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from bigbatch.config.models import Tokenizer as Settings

from .base import needs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMES = {
    "pad": ("[PAD]", "<pad>", "<|endoftext|>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>", "<|endoftext|>"),
    "sep": ("[SEP]", "</s>", "<|endoftext|>"),
    "mask": ("[MASK]", "<mask>"),
}
"""What tokenizers call their special tokens; the first is what ours do."""
SPECIAL = [names[0] for names in NAMES.values()]


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids by role; a role that the tokenizer has no token for is left out."""
    known = {role: [i for i in map(tokenizer.token_to_id, names) if i is not None] for role, names in NAMES.items()}
    return {role: ids[0] for role, ids in known.items() if ids}


def make_tokenizer(settings: Settings, documents: Callable[[], Iterable[str]]) -> Tokenizer:
    """The one that ``settings`` name, or one trained on ``documents()``, which may be called twice: WordPiece as
    BERT's, or byte pairs as GPT-2's. The same documents give the same tokenizer, token by token.

    Raises ValueError for a path that has no tokenizer.
    """
    with needs("text", "tokenizers"):
        if settings.path is not None:
            return _load(settings.path)
        return _wordpiece(settings, documents) if settings.kind == "wordpiece" else _bytes(settings, documents)


def _load(path: str) -> Tokenizer:
    from tokenizers import Tokenizer

    file = tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library knows no finer one
        raise ValueError(f"data.tokenizer.path = {path!r}: {file} cannot be used ({error})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _wordpiece(settings: Settings, documents: Callable[[], Iterable[str]]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def trained(size: int, first: list[str]) -> list[str]:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False)
        tokenizer.train_from_iterator(documents(), trainer)
        ids = tokenizer.get_vocab()
        return sorted(ids, key=ids.__getitem__)

    normalizer = normalizers.BertNormalizer(lowercase=settings.lowercase)
    # The trainer numbers letters as a hash table has them, and breaks ties by number: so they are numbered beforehand.
    letters = sorted(set(trained(0, SPECIAL)) - set(SPECIAL))
    tokens = trained(settings.vocabulary, SPECIAL + letters)
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def _bytes(settings: Settings, documents: Callable[[], Iterable[str]]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if settings.lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(), trainer)
    return tokenizer


def check_tokenizer(ours: str, kept: Path) -> None:
    """ValueError if the text's tokenizer, the content of a tokenizer.json, is not that in ``kept``, if there is one."""
    if ours and kept.is_file() and _load(str(kept)).to_str() != ours:  # as this version of the library writes both
        raise ValueError(
            f"data.tokenizer: ids of this text stand for other tokens than in {kept}; give the text that that one was "
            f"trained on, or data.tokenizer.path={kept}"
        )


def tokenizer_file(path: str) -> Path:
    """tokenizer.json, of a path to it or to its folder."""
    found = Path(os.path.expanduser(path))
    return found / "tokenizer.json" if found.is_dir() else found
