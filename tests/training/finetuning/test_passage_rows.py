"""Training with passages in sight: the loss, where it goes on, and what the adapter is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from memorizing.data import Document, TokenizedDocument
from memorizing.errors import CheckpointError, ConfigError, CorpusError
from memorizing.huggingface.attaching.attachment import add_memory, get_attachment
from memorizing.huggingface.learning.adapter import load_adapter
from memorizing.huggingface.sessions.opening import open_memory
from memorizing.training import read_metrics
from memorizing.training.finetuning import finetune
from memorizing.training.finetuning.examples import KINDS, Examples
from memorizing.training.finetuning.finetuner import Finetuner
from memorizing.training.finetuning.passage_rows import PassageLoader, draw_in_turn, score_examples
from memorizing.training.optimizer import compute_schedule
from tests.huggingface.tools import CACHE
from tests.training.finetuning.test_finetuner import make_settings
from tests.training.finetuning.tools import START, make_base, make_documents, make_tokenizer

MEMORY: dict[str, Any] = {
    "layers": [1], "read": "passages", "window": 83, "num_passages": 3, "passage_len": 31,
    "num_sinks": 2, "dtype": "float32",
}  # fmt: skip
DOCUMENTS = make_documents(389, 47, 211, 2)


def make_model(**memory: Any) -> Any:
    return add_memory(make_base(max_position_embeddings=401), **{**MEMORY, **memory})


def train_on(model: Any, documents: Any = DOCUMENTS, **changes: Any) -> list[float]:
    losses: list[float] = []
    settings = make_settings(**changes)
    Finetuner(
        model, documents, START, settings, on_step=lambda m: losses.append(m.nats / m.num_targets)
    ).run()
    return losses


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("capacity", [23, 0])
def test_the_loss_is_that_of_texts_behind_passages_by_hand(rows: int, capacity: int):
    settings = make_settings(
        train="all", rows=rows, steps=5, weight_decay=0.0, clip_norm=0.0, learning_rate=1e-2, seed=7
    )
    memory = {"capacity": capacity, "num_neighbors": 5}
    losses: list[float] = []
    Finetuner(
        make_model(**memory),
        DOCUMENTS,
        START,
        settings,
        on_step=lambda m: losses.append(m.nats / m.num_targets),
    ).run()

    model = make_base(max_position_embeddings=401)
    drawer = Examples(DOCUMENTS, get_attachment(make_model(**memory)).settings, START)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    expected: list[float] = []
    for step in range(5):
        logits, targets = [], []
        for row in range(rows):
            number = rows * step + row + 1
            kind = KINDS[number % 2] if capacity else "alone"
            example = drawer.draw(kind, f"7/{number}")
            ids = torch.cat([example.before, example.text])
            logits.append(model(ids.unsqueeze(0)).logits[0, -len(example.text) - 1 : -1])
            targets.append(example.text)
        loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets))
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * compute_schedule(settings.make_training_config(), step + 1)
        optimizer.step()
        expected.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert len(set(losses)) == 5


def test_what_is_trained_is_lora_and_nothing_of_the_memory():
    model = make_model()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    assert train_on(model, train="lora", steps=3)[0] > 0
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    kept = [name for name in before if ".memory." in name]
    assert kept
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in kept)
    with pytest.raises(ConfigError, match="train 'lora' or 'all', or read entries"):
        train_on(make_model(), train="gates")


def test_an_epoch_is_as_many_tokens_as_the_documents_have():
    settings = get_attachment(make_model()).settings
    loader = PassageLoader(make_documents(97), settings, 2, START, 0)
    seen = 0
    for _ in range(5):
        seen += next(loader).num_targets
        assert loader.epoch == seen // 97
    assert loader.epoch > 0


def test_where_the_drawing_is_is_checked_when_it_is_put_back():
    settings = get_attachment(make_model()).settings
    loader = PassageLoader(DOCUMENTS, settings, 3, START, 0)
    first, second = next(loader), next(loader)
    state = loader.state_dict()
    again = PassageLoader(DOCUMENTS, settings, 3, START, 0)
    assert torch.equal(next(again).tokens, first.tokens)
    again.load_state_dict(state)
    assert torch.equal(next(again).tokens, next(loader).tokens)
    assert not torch.equal(first.tokens[:, :61], second.tokens[:, :61])
    for wrong in ({"drawn": -3}, {"drawn": 5}, {"tokens": -1}, {"drawn": "6"}, {"tokens": 1.5}):
        with pytest.raises(CheckpointError, match="altered"):
            again.load_state_dict({**state, **wrong})
    with pytest.raises(CheckpointError, match="seed = 0, this loader 1"):
        PassageLoader(DOCUMENTS, settings, 3, START, 1).load_state_dict(state)
    with pytest.raises(CorpusError, match="other documents"):
        PassageLoader(DOCUMENTS[1:], settings, 3, START, 0).load_state_dict(state)


def make_texts(number: int) -> list[Document]:
    """Files that call what others define, of words that are drawn."""
    rng = np.random.default_rng(number)
    words = ["".join(map(chr, rng.integers(97, 123, 5))) for _ in range(29)]
    return [Document(f"t{n}", " ".join(rng.choice(words, 53)) + "\n") for n in range(3)]


def test_an_adapter_makes_of_a_memory_of_passages_what_the_trained_model_does(tmp_path: Path):
    texts, tokenizer = make_texts(0), make_tokenizer()
    trained = make_model()
    finetune(
        trained,
        tokenizer,
        texts[:2],
        make_settings(train="lora", steps=3, learning_rate=3e-2, evaluate_every=3),
        tmp_path / "run",
        validation=texts[2:],
        progress=False,
    )
    loaded = load_adapter(make_base(max_position_embeddings=401), tmp_path / "run" / "adapter")
    assert get_attachment(loaded).settings.read == "passages"
    prompt = tokenizer(texts[1].text[101:149], return_tensors="pt")["input_ids"]
    found = []
    for model in (trained, loaded, make_model()):
        logits = []
        for documents in (texts, []):
            with open_memory(model, tokenizer=tokenizer) as memory, torch.no_grad():
                memory.read(tokenizer, [(one.name, one.text) for one in documents])
                cache = {CACHE: memory.new_cache()}
                logits.append(model(input_ids=prompt, **cache).logits)
        assert not torch.equal(*logits)  # passages are in sight
        found.append(torch.stack(logits))
    assert torch.equal(found[0], found[1])
    assert (found[0] - found[2]).abs().amax((1, 2, 3)).min() > 1e-3


def test_what_is_held_out_is_told_in_every_kind(tmp_path: Path):
    texts, tokenizer = make_texts(1), make_tokenizer()
    model = make_model()
    settings = make_settings(train="lora", steps=2, evaluate_every=2, evaluate_tokens=1301)
    result = finetune(
        model, tokenizer, texts[:2], settings, tmp_path, validation=texts[2:], progress=False
    )
    (line,) = [
        one["validation"] for one in read_metrics(tmp_path / "metrics.jsonl") if "validation" in one
    ]
    held_out = TokenizedDocument(
        "t2", np.array(tokenizer(texts[2].text)["input_ids"], dtype=np.int32), 0
    )
    drawn = draw_in_turn(
        Examples([held_out], get_attachment(model).settings, START), 1301, "held out"
    )
    assert len(drawn) > 3
    with get_attachment(model).change_mode(is_plain=True):
        nats = [one.sum() for one in score_examples(model, drawn)]
    lengths = [len(one.text) for one in drawn]
    means = {kind: sum(nats[n::3]) / sum(lengths[n::3]) for n, kind in enumerate(KINDS)}
    assert {kind: line[kind]["nats_per_token"] for kind in KINDS} == pytest.approx(means)
    assert len(set(means.values())) == 3
    assert line["off"] == line["alone"]
    assert line["nats_per_token"] == pytest.approx((means["quoted"] + means["other"]) / 2)
    assert result.validation_nats == line["nats_per_token"]


def test_without_capacity_the_same_texts_stand_alone():
    settings = get_attachment(make_model()).settings
    control = get_attachment(make_model(capacity=0)).settings
    for _ in range(3):
        loaders = (PassageLoader(DOCUMENTS, one, 2, START, 0) for one in (settings, control))
        batches = [next(loader) for loader in loaders]
        for row in range(2):
            texts = [one.targets[row][one.valid[row]] for one in batches]
            assert torch.equal(*texts)
            length = len(texts[0])
            assert batches[1].tokens[row, :length].tolist() == [START, *texts[1][:-1].tolist()]


@pytest.mark.parametrize("lengths", [(1,), (2, 1), (29,)])
def test_documents_may_be_shorter_than_any_text(lengths: tuple[int, ...]):
    losses = train_on(make_model(), make_documents(*lengths), train="lora", steps=3)
    assert all(np.isfinite(losses))


def test_a_start_token_is_that_of_the_model_or_else_of_the_tokenizer(tmp_path: Path):
    for model_start, given, expected in ((3, 7, 3), (None, 7, 7)):
        base = make_base(max_position_embeddings=401, bos_token_id=model_start, eos_token_id=None)
        tuner = Finetuner(add_memory(base, **MEMORY), DOCUMENTS, given, make_settings())
        assert next(tuner.loader).tokens[:, 0].tolist() == [expected] * 2
        assert tuner.loader.start_token == expected
    base = make_base(max_position_embeddings=401, bos_token_id=None, eos_token_id=None)
    tokenizer = make_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    arguments = (tokenizer, make_texts(0), make_settings(), tmp_path / "run")
    with pytest.raises(ConfigError, match="bos_token_id or eos_token_id"):
        finetune(add_memory(base, **MEMORY), *arguments, progress=False)
    with pytest.raises(CorpusError, match="no documents to read"):
        finetune(make_model(), make_tokenizer(), [], *arguments[2:], progress=False)
    with pytest.raises(CorpusError, match="has no tokens"):
        train_on(make_model(), [*DOCUMENTS, TokenizedDocument("empty", DOCUMENTS[0].tokens[:0], 0)])


def test_a_memory_of_too_many_entries_for_the_machine_is_none_that_texts_need(tmp_path: Path):
    model = make_model(capacity=2**31 - 1)
    finetune(
        model, make_tokenizer(), make_texts(0), make_settings(steps=1), tmp_path, progress=False
    )
