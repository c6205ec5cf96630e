"""Text as rows of tokens: which documents go where, how rows are cut, what is kept and when it is made again."""

from __future__ import annotations

import errno
import fcntl
import json
import pickle
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer

from bigbatch.config.models import Text
from bigbatch.data import load_data, size_of
from bigbatch.data.corpus import corpus
from bigbatch.data.documents import documents
from bigbatch.data.tokenizer import special_tokens

SENTENCES = [
    f"the {a} {b} and the {c} of it." for a in ["red", "old", "bad"] for b in ["cat", "dog"] for c in ["end", "way"]
] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("text")
    (where / "a.txt").write_text("\n".join(SENTENCES[:30]) + "\n\n", encoding="utf-8")
    (where / "b.txt").write_text("\n".join(SENTENCES[30:]), encoding="utf-8")
    return where


def text(folder, **options):
    tokenizer = {"vocabulary": 60, **options.pop("tokenizer", {})}
    options = {
        "train": f"{folder}/?.txt",
        "cache": f"{folder}/cache",
        "length": 8,
        "validation": 0.2,
        "test": 0.2,
    } | options
    return Text(name="text", tokenizer=tokenizer, **options)


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------ documents


def test_parts_are_disjoint_and_all_there(folder):
    config = text(folder)
    parts = {split: list(documents(config, split)) for split in ("train", "validation", "test")}
    found = [line for part in parts.values() for line in part]
    assert sorted(line.strip() for line in found) == sorted(SENTENCES)
    assert all(parts.values())
    # A part keeps its documents when another one is in files of its own.
    apart = text(folder, test=str(folder / "a.txt"))
    assert list(documents(apart, "validation")) == parts["validation"]
    assert len(list(documents(apart, "train"))) == len(parts["train"]) + len(parts["test"])


@pytest.mark.parametrize(("cut", "expected"), [("line", ["a\n", "b\n", "c\n", "d"]), ("paragraph", ["a\nb\n", "c\nd"])])
def test_what_a_document_is(tmp_path, cut, expected):
    path = write(tmp_path / "x.txt", "a\nb\n\n \nc\nd")
    config = Text(name="text", train=path, validation=path, test=path, document=cut)
    assert list(documents(config, "train")) == expected
    assert list(documents(config.model_copy(update={"document": "file"}), "test")) == ["a\nb\n\n \nc\nd"]


def test_tables_of_documents(tmp_path):
    import datasets

    rows = ["one", "", "two"]
    lines = write(tmp_path / "x.jsonl", "".join(json.dumps({"body": row}) + "\n" for row in rows) + "\n")
    table = datasets.Dataset.from_dict({"body": rows})
    table.to_parquet(str(tmp_path / "x.parquet"))
    datasets.DatasetDict(train=table, held=table).save_to_disk(str(tmp_path / "disk"))
    files = Text(name="text", train=lines, validation=str(tmp_path / "x.parquet"), field="body")
    saved = Text(name="text", hub=str(tmp_path / "disk"), validation="held", test=0.5, field="body")
    assert list(documents(files, "validation")) == list(documents(saved, "validation")) == ["one", "two"]
    with pytest.raises(ValueError, match=r"data\.field = 'text': .* no such column; it has \['body'\]"):
        list(documents(saved.model_copy(update={"field": "text"}), "validation"))
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: no JSON object with a text under data\.field = 'text'"):
        list(documents(files.model_copy(update={"field": "text"})))
    datasets.Dataset.from_dict({"body": [None, 0]}).to_parquet(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match=r"data\.field = 'body': row 1 of .*x\.parquet is no text but 0"):
        list(documents(files, "validation"))
    for kind in ("parquet", "arrow"):
        damaged = write(tmp_path / f"damaged.{kind}", "no table")
        with pytest.raises(ValueError, match=rf"damaged\.{kind}: cannot be read \(.*\); put a whole file there"):
            list(documents(files.model_copy(update={"validation": damaged}), "validation"))


# ------------------------------------------------------------------------------------------------ rows


def test_packed_rows_are_the_documents_end_to_end(folder):
    config = text(folder)
    data = load_data(config, seed=0)
    tokenizer, special = Tokenizer.from_str(data.tokenizer), data.spec.special
    stream = []
    for document in documents(config, "train"):
        stream += [*tokenizer.encode(document, add_special_tokens=False).ids, special["sep"]]
    rows = data.train.gather(torch.arange(len(data.train)))["input_ids"]
    assert rows.dtype == torch.int64 and (rows[:, 0] == special["cls"]).all()
    assert rows[:, 1:].flatten().tolist() == stream[: len(stream) // 7 * 7]
    assert data.spec.shape == (8,) and data.spec.classes == tokenizer.get_vocab_size() <= 60


def test_without_packing_a_row_is_a_document(folder):
    config = text(folder, packing=False, length=12)
    data = load_data(config, seed=0)
    tokenizer, special = Tokenizer.from_str(data.tokenizer), data.spec.special
    part = pickle.loads(pickle.dumps(data.train))
    batch = part.gather(torch.tensor([1, 0]))
    for row, attends, document in zip(*batch.values(), list(documents(config))[1::-1], strict=True):
        ids = [special["cls"], *tokenizer.encode(document, add_special_tokens=False).ids[:10], special["sep"]]
        assert row.tolist() == ids + [special["pad"]] * (12 - len(ids))
        assert attends.tolist() == [1] * len(ids) + [0] * (12 - len(ids))
    assert len(pickle.dumps(part)) < 500  # a path, not its rows


def test_padding_may_be_the_token_that_ends_a_text(folder, tmp_path):
    """As GPT-2 has it: one token for all, of which the first and the one behind the text are seen."""
    tree = json.loads(corpus(text(folder)).tokenizer)
    tree["added_tokens"] = []
    tree["model"]["vocab"] = {
        {"[PAD]": "<|endoftext|>"}.get(token, token.lower()): i for token, i in tree["model"]["vocab"].items()
    }
    tree["model"]["unk_token"] = "[unk]"
    config = text(
        folder,
        train=write(tmp_path / "x.txt", "the cat\nthe red dog and the old cat and the end\n☃\n"),
        validation=str(folder / "a.txt"),
        test=str(folder / "a.txt"),
        tokenizer={"path": write(tmp_path / "tokenizer.json", json.dumps(tree)), "vocabulary": 8192},
        packing=False,
    )
    data = load_data(config, seed=0)
    assert {data.spec.special[role] for role in ("pad", "cls", "sep")} == {0}
    tokens, attends = data.train.gather(torch.arange(3)).values()
    lengths = [len(Tokenizer.from_str(data.tokenizer).encode(line).ids) for line in documents(config)]
    assert attends.sum(1).tolist() == [min(8, n + 2) for n in lengths]
    assert (attends.diff(dim=1) <= 0).all() and tokens[attends == 0].eq(0).all()


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_tokenizer_comes_of_training_documents_alone_and_is_always_the_same(folder, tmp_path, kind):
    config = text(
        folder, validation=write(tmp_path / "v.txt", "zzz qqq\n" * 50), tokenizer={"kind": kind, "vocabulary": 300}
    )
    first = corpus(config)
    again = "from bigbatch.data.corpus import corpus\nfrom bigbatch.config.models import Text\nimport sys\n"
    again += "print(corpus(Text.model_validate_json(sys.argv[1])).digest, 'torch' in sys.modules)"
    other = config.model_copy(update={"cache": str(tmp_path)})
    done = subprocess.run([sys.executable, "-c", again, other.model_dump_json()], capture_output=True, text=True)
    assert done.stdout.split() == [first.digest, "False"], done.stderr
    tokens = Tokenizer.from_str(first.tokenizer)
    assert kind == "bpe" or tokens.token_to_id("z") is None
    assert [tokens.decode(tokens.encode(line).ids) for line in ("the cat", "old dog")] == ["the cat", "old dog"]


# ------------------------------------------------------------------------------------------------ what is kept


def test_what_is_kept_is_used_until_it_is_damaged_or_the_text_changes(folder, tmp_path, monkeypatch):
    config = text(folder, cache=str(tmp_path))
    first = corpus(config)
    meta = first.folder / "meta.json"
    made = meta.stat().st_mtime_ns
    assert corpus(config) == first and meta.stat().st_mtime_ns == made
    for damage in (lambda: first.file("train").write_bytes(b"12"), lambda: meta.write_text("{}"), meta.unlink):
        damage()
        assert corpus(config) == first and first.file("train").stat().st_size == first.rows["train"] * 16
    assert [path.name for path in (tmp_path / "text").iterdir() if path.is_dir()] == [first.folder.name]
    for other in ({"length": 9}, {"packing": False}, {"validation": 0.3}, {"train": str(folder / "a.txt")}):
        assert corpus(text(folder, **{"cache": str(tmp_path), **other})).folder != first.folder
    assert corpus(text(folder, cache=str(tmp_path), mask=None)).folder == first.folder


def test_who_ends_later_without_locks_takes_what_is_there(folder, tmp_path, monkeypatch):
    def nested(tokenizer):
        monkeypatch.setattr("bigbatch.data.corpus.special_tokens", special_tokens)
        found.append((first := corpus(config), first.file("train").stat().st_ino))
        return special_tokens(tokenizer)

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr("bigbatch.data.corpus.special_tokens", nested)
    config, found = text(folder, cache=str(tmp_path)), []
    last = corpus(config)
    assert found == [(last, last.file("train").stat().st_ino)]
    assert [path.name for path in (tmp_path / "text").iterdir() if path.is_dir()] == [last.folder.name]


def test_size_is_counted_or_given(folder, tmp_path):
    config = text(folder, cache=str(tmp_path), size=5)
    assert size_of(config) == 5  # nothing is tokenised for that
    assert not (tmp_path / "text").exists()
    assert size_of(text(tmp_path / "none", size=7)) == 7
    with pytest.raises(ValueError, match=r"data\.size = 5: the data has \d+ training samples"):
        load_data(config, seed=0)
    rows = size_of(text(folder, cache=str(tmp_path)))
    assert rows == len(load_data(text(folder, cache=str(tmp_path), size=rows), seed=0).train) != 5


def test_a_tokenizer_from_a_file(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text(corpus(text(folder)).tokenizer, encoding="utf-8")
    loaded = text(folder, tokenizer={"path": str(tmp_path), "vocabulary": 8192})
    assert corpus(loaded).digest == corpus(text(folder)).digest
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["added_tokens"] = [t for t in tree["added_tokens"] if t["content"] != "[SEP]"]
    tree["model"]["vocab"]["[END]"] = tree["model"]["vocab"].pop("[SEP]")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path = .*: has none of \[SEP\], </s>"):
        corpus(loaded)
    write(tmp_path / "tokenizer.json", "{}")
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path = .*tokenizer\.json cannot be used"):
        corpus(loaded)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "none-*.txt"}, r"data\.train = 'none-\*\.txt': no such file"),
        ({"length": 4096}, r"data\.train = .* does not fill one row of 4096 tokens; give more text"),
        ({"cache": "/proc/none"}, r"data\.cache = '/proc/none': .*; give a folder that can be written"),
        ({"hub": "/none/at/all", "train": None}, r"data\.hub = '/none/at/all': its train cannot be had"),
        ({"tokenizer": {"path": "none", "vocabulary": 8192}}, r"No such file or directory: 'none'"),
    ],
)
def test_what_is_wrong_is_said(folder, options, message):
    with pytest.raises(ValueError, match=message):
        corpus(text(folder, **options))


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"a\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"x\.txt: is not UTF-8"):
        corpus(text(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": None}, "train: give paths"),
        ({"validation": 0.6, "test": 0.4}, "leave nothing to train on"),
        ({"tokenizer": {"path": "x", "kind": "bpe"}}, "has its own"),
        ({"mask": {"replace": 0.9, "random": 0.2}}, "more than all"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        Text(name="text", **{"train": "x", **options})
