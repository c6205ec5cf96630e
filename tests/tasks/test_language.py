"""Language modelling: the loss of the tokens to predict, and models that fit the data."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from bigbatch.config.models import CausalLM, MaskedLM
from bigbatch.dropout import KeyedDropout, draws_freely
from bigbatch.spec import Spec
from bigbatch.tasks import build_task
from bigbatch.train.finetune import fitted

V, L = 23, 8
SPEC = Spec((L,), V, special={"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4})
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": L,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": L}


ESM = {"position_embedding_type": "rotary", "token_dropout": False}


def masked(model="bert", **options):
    options = {**(ESM if model == "esm" else {}), **options}
    return build_task(MaskedLM(name="masked_lm", model=f"transformers/{model}", options={**BERT, **options}), SPEC)


def causal(model="gpt2", **options):
    return build_task(CausalLM(name="causal_lm", model=f"transformers/{model}", options={**GPT2, **options}), SPEC)


def batch(rows=4, *, pad=0):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, V, (rows, L), generator=generator)
    chosen = torch.rand(rows, L, generator=generator) < 0.3
    made = {"input_ids": tokens.masked_fill(chosen, 4), "labels": tokens.masked_fill(~chosen, -100)}
    if pad:
        made["attention_mask"] = torch.ones_like(tokens)
        made["attention_mask"][:, -pad:] = 0
        made["labels"][:, -pad:] = -100
    return made


def built(task, *, seed=0):
    torch.manual_seed(seed)
    return task.build_model().double()


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize("model", ["bert", "esm", "distilbert"])
def test_masked_loss_is_that_of_all_logits_where_there_are_labels(model, pad):
    if model == "distilbert":  # whose head is in pieces, so that nothing is left out
        sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": L}
        config = MaskedLM(name="masked_lm", model="transformers/distilbert", options=sizes)
        task = build_task(config, SPEC)
    else:
        task = masked(model)
    net, rows = built(task).eval(), batch(pad=pad)
    logits = net(input_ids=rows["input_ids"], attention_mask=rows.get("attention_mask")).logits
    assert logits.shape == (4, L, V)
    loss, weight = task.loss(net, rows)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten(), reduction="sum"))
    n = int((rows["labels"] != -100).sum())
    assert loss.shape == weight.shape == () and int(weight) == n and weight.dtype == torch.float64
    sums = {name: float(value) for name, value in task.evaluate(net, rows).items()}
    right = int((logits.argmax(-1) == rows["labels"]).sum())
    assert task.metrics(sums) == pytest.approx(
        {"loss": loss.item() / n, "perplexity": math.exp(loss.item() / n), "accuracy": right / n}
    )
    assert tuple(sums) == task.sums and tuple(task.metrics(sums)) == task.metric_names


@pytest.mark.parametrize("pad", [0, 3])
def test_causal_loss_is_of_the_next_token(pad):
    task, rows = causal(), batch(pad=pad)
    net = built(task).eval()
    loss, weight = task.loss(net, rows)
    expected = 0.0
    for row in rows["input_ids"].tolist():
        for place in range(1, L - pad):
            expected -= net(input_ids=torch.tensor([row[:place]])).logits[0, -1].log_softmax(-1)[row[place]].item()
    assert (loss.item(), int(weight)) == (pytest.approx(expected), 4 * (L - pad - 1))


def test_a_batch_is_the_sum_of_its_pieces():
    task, rows = masked(), batch(rows=6)
    net = built(task).eval()
    pieces = [task.loss(net, {name: t[part] for name, t in rows.items()}) for part in (slice(1), slice(1, 6))]
    for whole, (one, other) in zip(task.loss(net, rows), zip(*pieces, strict=True), strict=True):
        torch.testing.assert_close(whole, one + other)
    nothing, weight = task.loss(net, {**rows, "labels": torch.full((6, L), -100)})
    nothing.backward()
    assert (nothing.item(), weight.item()) == (0, 0)


@pytest.mark.parametrize("model", ["bert", "esm"])
def test_keyed_dropout_reaches_all(model):
    task = masked(model, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    net, rows, keyed = built(task), batch(rows=3), KeyedDropout(0)

    def forward(samples=3):
        return task.loss(net, {name: t[:samples] for name, t in rows.items()})

    assert draws_freely(forward, torch.device("cpu"))
    keyed.learn(forward)
    with keyed.at(range(3), range(3)):
        assert not draws_freely(forward, torch.device("cpu"))


def test_half_precision_has_its_loss_in_float32():
    task = masked()
    loss, weight = task.loss(built(task).bfloat16(), batch())
    assert loss.dtype == weight.dtype == torch.float32


def test_the_model_has_the_vocabulary_and_special_tokens_of_the_data():
    config = built(masked()).config
    assert (config.vocab_size, config.pad_token_id) == (V, 0)
    assert built(causal()).config.eos_token_id == 3


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda: masked("nope"), r"task\.model = 'transformers/nope': unknown .* such as transformers/bert"),
        (lambda: masked(hidden=3), r"task\.options\.hidden = 3: no option of bert; remove it"),
        (lambda: masked(vocab_size=3), r"task\.options\.vocab_size = 3: follows from the data; remove it"),
        (lambda: masked(num_attention_heads=3), r"task\.options = .*hidden size .*; change the model or task\.options"),
        (lambda: masked(hidden_size="abc"), r"(?s)task\.options = .*hidden_size.*; change task\.options"),
        (lambda: masked(max_position_embeddings=4), r"does not take rows of data\.length = 8"),
        (
            lambda: build_task(CausalLM(name="causal_lm", model="transformers/bert", options=BERT), SPEC),
            "is_decoder: true",
        ),
        (
            lambda: build_task(MaskedLM(name="masked_lm", model="transformers/vit"), SPEC),
            r"transformers/vit.*Unrecognized configuration",
        ),
    ],
)
def test_what_does_not_fit_is_said(task, message):
    with pytest.raises(ValueError, match=message):
        task().build_model()


def test_bert_can_be_made_causal():
    options = {**BERT, "is_decoder": True}
    build_task(CausalLM(name="causal_lm", model="transformers/bert", options=options), SPEC).build_model()


def test_images_are_no_rows_of_tokens():
    with pytest.raises(
        ValueError, match=r"task\.name = 'masked_lm': the data is not rows of tokens; set data\.name=text"
    ):
        build_task(MaskedLM(name="masked_lm", model="transformers/bert"), Spec((1, 8, 8), 10))


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"transformers is missing .*pip install 'bigbatch\[text\]'"):
        masked().build_model()


def test_pretrained_weights_of_a_folder(tmp_path):
    model = masked().build_model()
    model.save_pretrained(tmp_path)
    settings = {"name": "masked_lm", "model": f"transformers/{tmp_path}", "weights": "pretrained"}
    task = build_task(MaskedLM(**settings), SPEC)
    weights = task.pretrained()
    taken = fitted(task.build_model(), weights, head="keep", norm="batch")
    assert taken.keys() == weights.keys()
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in taken.items())
    with pytest.raises(ValueError, match=r"vocabulary of 24 .*; set data.tokenizer.path to the model's own"):
        build_task(MaskedLM(**settings), replace(SPEC, classes=24)).pretrained()
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"(?s)cannot be had .* safetensors"):
        task.pretrained()
    with pytest.raises(ValueError, match=r"(?s)nowhere.*: unknown .*/NAME of the hub, or a folder's"):
        build_task(MaskedLM(**settings | {"model": "transformers/nowhere"}), SPEC).build_model()


def test_what_weights_lack_is_not_made_up(tmp_path):
    model = masked().build_model()
    model.bert.save_pretrained(tmp_path)
    settings = {"name": "masked_lm", "model": f"transformers/{tmp_path}", "weights": "pretrained"}
    task = build_task(MaskedLM(**settings), SPEC)
    with pytest.raises(ValueError, match=r"they lack cls\.predictions"):
        fitted(task.build_model(), task.pretrained(), head="keep", norm="batch")
