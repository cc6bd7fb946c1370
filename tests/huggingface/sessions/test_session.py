"""What a model has read: open for a while, in a folder or not, and by document."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from memorizing.data import Document
from memorizing.errors import ConfigError, CorpusError, MemoryFolderError, StateError
from memorizing.huggingface import MemorySession, add_memory, open_memory, remove_memory
from memorizing.huggingface.attaching.attachment import get_attachment
from memorizing.memory import FrozenMemory, MemoryFolder
from tests.memory.disk.examples import edit_manifest

from ..tools import (
    CACHE,
    LAYER,
    NUM_SINKS,
    SEGMENT_LEN,
    VOCAB_SIZE,
    call,
    find_model,
    give_memory,
    make_model,
    make_tokens,
    memory_open,
    one_thread,  # noqa: F401
    read,
)

QUESTION = make_tokens(2, 41, seed=11)


def make_tokenizer(first: int = 3) -> Any:
    """Words w<number> -> number; a start token before every text."""
    words = {f"w{number}": number for number in range(first, VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2} | words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


TOKENIZER = make_tokenizer()
DOCUMENTS = {
    name: " ".join(f"w{token}" for token in make_tokens(1, length, seed=length)[0].tolist())
    for name, length in (("first", 67), ("second", 30), ("third", 38))
}
"""68, 31 and 39 tokens with the start token; all but the first three of each are entries."""
NUM_ENTRIES = {"first": 65, "second": 28, "third": 36}


def ask(model: Any) -> Tensor:
    with torch.no_grad():
        return read(model, QUESTION, SEGMENT_LEN)


def read_all(memory: MemorySession, documents: Any = None) -> Any:
    return memory.read(TOKENIZER, DOCUMENTS if documents is None else documents, progress=False)


@pytest.fixture(params=["folder", "none"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "some.memory" if request.param == "folder" else None


def fetch_entries(model: Any, layer: int = LAYER) -> tuple[Tensor, Tensor]:
    """Keys and values (H, n, D) that are open now."""
    base = get_attachment(model).opened.base[layer]
    blocks = [block.load() for block in base.blocks]
    return (
        torch.cat([block.keys[0] for block in blocks], 1),
        torch.cat([block.values[0] for block in blocks], 1),
    )


def test_reading_makes_every_token_an_entry_but_the_first(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        report = read_all(memory)
        assert (report.num_documents, report.num_tokens) == (3, 68 + 31 + 39)
        assert report.num_entries == memory.num_entries == sum(NUM_ENTRIES.values())
        found = {document.name: document.num_entries for document in memory.documents}
    assert found == NUM_ENTRIES
    assert report.skipped == []


@pytest.mark.parametrize("layers", [[LAYER], [0, LAYER], [2]])
def test_entries_are_those_of_a_full_forward_pass(layers: list[int]):
    model = find_model()
    attachment = give_memory(model, layers=layers, capacity=89)
    tokens = torch.tensor([TOKENIZER(DOCUMENTS["first"])["input_ids"]])
    # Two segments more, so that all of the document is written.
    more = torch.cat([tokens, make_tokens(1, 2 * SEGMENT_LEN)], 1)
    with torch.no_grad(), memory_open(attachment):
        cache = attachment.make_cache()
        call(model, more, cache)
        memories = attachment.find_history(cache).memories
    with open_memory(model) as memory:
        read_all(memory, {"first": DOCUMENTS["first"]})
        for layer in layers:
            keys, values = fetch_entries(model, layer)
            expected = memories[layer]
            span = slice(NUM_SINKS, tokens.shape[1])
            torch.testing.assert_close(keys, expected.keys[0, :, span], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(values, expected.values[0, :, span], rtol=1e-4, atol=1e-5)


def test_a_documents_entries_do_not_depend_on_others(path: Path | None):
    model = find_model()
    give_memory(model)
    found = []
    for names in (["second"], ["first", "second"]):
        with open_memory(model) as memory:
            for name in names:
                read_all(memory, {name: DOCUMENTS[name]})
            found.append(fetch_entries(model)[0][:, -NUM_ENTRIES["second"] :])
    assert torch.equal(*found)


def test_nothing_is_trained_and_the_mode_of_the_model_stays():
    model = make_model().train()
    give_memory(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open_memory(model) as memory:
        read_all(memory)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_was_read_is_retrieved_from_the_first_token_on():
    model = find_model()
    give_memory(model)
    without = ask(model)
    with open_memory(model) as memory:
        only_own = ask(model)
        read_all(memory)
        found = ask(model)
    assert (found[:, 0] - without[:, 0]).abs().max() > 1e-3
    assert (found[:, -1] - only_own[:, -1]).abs().max() > 1e-3
    assert torch.equal(ask(model), without)


def test_what_was_read_and_a_texts_own_memory_are_searched_as_one():
    model = find_model()
    # Above the memory there is nothing that mixes tokens.
    attachment = give_memory(model, layers=[2], combine="gate")
    with open_memory(model) as memory:
        read_all(memory)
        keys, values = fetch_entries(model, 2)
        cache = attachment.make_cache()
        with torch.no_grad():
            found = read(model, QUESTION[:1, :27], SEGMENT_LEN, cache=cache)
        own = attachment.find_history(cache).memories[2]
        # The same entries, all of them read before; and no text of its own.
        span = slice(NUM_SINKS, 2 * SEGMENT_LEN)
        joined = FrozenMemory.from_tensors(
            torch.cat([keys, own.keys[0, :, span]], 1),
            torch.cat([values, own.values[0, :, span]], 1),
        )
        attachment.bind({2: joined})
        attachment.settings = replace(attachment.settings, capacity=0)
        with torch.no_grad():
            expected = model(QUESTION[:1, :27]).logits
    torch.testing.assert_close(found[:, -1], expected[:, -1], rtol=1e-4, atol=1e-5)
    assert (found[:, 5] - expected[:, 5]).abs().max() > 1e-3


def test_a_folder_and_no_folder_give_the_same_logits(tmp_path: Path):
    model = find_model()
    give_memory(model)
    found = []
    for path in (None, tmp_path / "a.memory"):
        with open_memory(model, path) as memory:
            read_all(memory)
            found.append(ask(model))
    with open_memory(model, tmp_path / "a.memory") as memory:
        found.append(ask(model))
        memory.save(tmp_path / "b.memory")
    with open_memory(model) as memory:
        read_all(memory)
        memory.save(tmp_path / "c.memory")
    for name in ("b", "c"):
        with open_memory(model, tmp_path / f"{name}.memory"):
            found.append(ask(model))
    assert all(torch.equal(one, found[0]) for one in found)


def test_reading_again_skips_what_is_there(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory, {"first": DOCUMENTS["first"]})
        report = read_all(memory)
        assert report.skipped == ["first"]
        assert report.num_documents == 2
        assert read_all(memory).skipped == ["first", "second", "third"]
        assert memory.num_entries == sum(NUM_ENTRIES.values())


def test_reading_goes_on_after_an_interrupt(path: Path | None):
    model = find_model()
    give_memory(model)

    def interrupted() -> Iterator[tuple[str, str]]:
        for count, pair in enumerate(DOCUMENTS.items()):
            if count == 2:
                raise KeyboardInterrupt
            yield pair

    with open_memory(model, path) as memory:
        with pytest.raises(KeyboardInterrupt):
            read_all(memory, interrupted())
        # What was read whole is there, and is read by the model.
        assert [document.name for document in memory.documents] == ["first", "second"]
        assert fetch_entries(model)[0].shape[1] == 65 + 28
        assert read_all(memory).skipped == ["first", "second"]
        stopped = ask(model)
    with open_memory(model) as memory:
        read_all(memory)
        assert torch.equal(ask(model), stopped)


def test_an_interrupt_within_a_document_leaves_it_out(path: Path | None):
    model = find_model()
    give_memory(model)
    calls = []

    def interrupt(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 8:  # in the second document
            raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_pre_hook(interrupt)
    with open_memory(model, path) as memory:
        with pytest.raises(KeyboardInterrupt):
            read_all(memory)
        hook.remove()
        assert [document.name for document in memory.documents] == ["first"]
        assert read_all(memory).num_documents == 2


def test_a_document_is_forgotten(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory, {name: DOCUMENTS[name] for name in ("first", "third")})
        expected = ask(model)
    if path is not None:
        shutil.rmtree(path)
    with open_memory(model, path) as memory:
        read_all(memory)
        assert not torch.equal(ask(model), expected)
        memory.forget("second")
        assert [document.name for document in memory.documents] == ["first", "third"]
        assert torch.equal(ask(model), expected)
        with pytest.raises(MemoryFolderError, match="no document 'second'"):
            memory.forget("second")


def test_a_document_that_is_updated_is_there_at_every_moment(path: Path | None):
    model = find_model()
    give_memory(model)
    changed = {"first": DOCUMENTS["first"], "second": DOCUMENTS["second"] + " w5 w7"}

    def interrupted() -> Iterator[tuple[str, str]]:
        yield "second", changed["second"]
        yield "third", "w5 w6 w7 w8 w9"
        assert {one.name for one in memory.documents} == set(DOCUMENTS)
        raise KeyboardInterrupt

    with open_memory(model, path) as memory:
        read_all(memory)
        before = memory.documents
        calls = []

        def interrupt(module: Any, args: Any) -> None:
            calls.append(1)
            raise KeyboardInterrupt

        hook = model.model.layers[0].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            memory.read(TOKENIZER, changed, update=True, progress=False)
        hook.remove()
        assert calls
        assert memory.documents == before
        assert memory.read(TOKENIZER, changed, update=True, progress=False).skipped == ["first"]
        assert [one.name for one in memory.documents] == ["first", "third", "second"]
        updated = ask(model)
        with pytest.raises(MemoryFolderError, match="'second' with another text"):
            read_all(memory)
    with open_memory(model) as memory:
        read_all(memory, {"first": "", "third": DOCUMENTS["third"]} | changed)
        assert torch.allclose(ask(model), updated, atol=1e-5)
        with pytest.raises(KeyboardInterrupt):
            memory.read(TOKENIZER, interrupted(), update=True, progress=False)
        assert [one.num_tokens for one in memory.documents] == [68, 33, 6]


def test_another_text_of_the_same_name_is_refused(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory, {"first": DOCUMENTS["first"]})
        with pytest.raises(MemoryFolderError, match="'first' with another text"):
            read_all(memory, {"first": DOCUMENTS["second"]})
        twice = [("third", DOCUMENTS["third"]), ("third", DOCUMENTS["third"])]
        assert read_all(memory, twice).skipped == ["third"]
        with pytest.raises(MemoryFolderError, match="'new' with another text"):
            read_all(memory, [("new", "w5 w6 w7 w8 w9"), ("new", "w9")])
        assert [document.name for document in memory.documents] == ["first", "third", "new"]


def test_another_tokenizer_is_refused(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
        with pytest.raises(MemoryFolderError, match="another tokenizer"):
            memory.read(make_tokenizer(first=4), DOCUMENTS, progress=False)


@pytest.mark.parametrize("text", ["", "w5", "w5 w6 w7"])
def test_documents_with_few_tokens_are_read(path: Path | None, text: str):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        report = read_all(memory, {"short": text})
        assert report.num_documents == 1
        assert report.num_entries == max(0, report.num_tokens - NUM_SINKS)
        ask(model)
        assert read_all(memory).skipped == []
        assert memory.num_entries == report.num_entries + sum(NUM_ENTRIES.values())


def test_documents_may_be_given_in_several_ways():
    model = find_model()
    give_memory(model)
    found = []
    for given in (
        DOCUMENTS,
        list(DOCUMENTS.items()),
        [Document(name, text) for name, text in DOCUMENTS.items()],
        (Document(name, text) for name, text in DOCUMENTS.items()),
    ):
        with open_memory(model) as memory:
            read_all(memory, given)
            found.append(fetch_entries(model)[0])
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("given", ["a text", ["a text"], [("", "text")], [("name", 3)], [4]])
def test_what_is_no_document_is_refused(given: Any):
    model = find_model()
    give_memory(model)
    with open_memory(model) as memory, pytest.raises(CorpusError):
        read_all(memory, given)


def test_another_model_or_another_memory_is_refused(tmp_path: Path):
    model, path = make_model(), tmp_path / "a.memory"
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
    remove_memory(model)
    for settings, words in (
        ({"layers": [2]}, r"layers \[1\], and this model's memory layers are \[2\]"),
        ({"num_sinks": 0}, "with num_sinks = 3, and here it is 0"),
        ({"search": "normalized"}, "with search = 'inner_product', and here it is 'normalized'"),
    ):
        give_memory(model, **settings)
        with pytest.raises(MemoryFolderError, match=words):
            open_memory(model, path)
        remove_memory(model)
    # Settings that do not change what is stored may differ, and so may the dtype of the weights.
    give_memory(model, num_neighbors=2, combine="gate", bias=1.0, capacity=31)
    open_memory(model, path)
    model.to(torch.bfloat16).to(torch.float32)
    open_memory(model, path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5
    with pytest.raises(MemoryFolderError, match="another model"):
        open_memory(model, path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] -= 0.5
        # Above the last memory layer nothing reaches the entries.
        model.model.layers[2].mlp.up_proj.weight[3, 5] += 0.5
    open_memory(model, path)


def test_a_model_without_memory_gets_that_of_the_folder(tmp_path: Path):
    model, path = find_model(), tmp_path / "a.memory"
    attachment = give_memory(model, layers=[0, LAYER], temperature=0.5, bias=0.3)
    with torch.no_grad():
        attachment.layers[0].bias += torch.arange(4) * 0.2
    with open_memory(model, path) as memory:
        read_all(memory)
        expected = ask(model)
    settings = attachment.settings
    remove_memory(model)
    with open_memory(model, path):
        assert get_attachment(model).settings == settings
        assert torch.equal(ask(model), expected)


def test_a_folder_that_is_refused_leaves_the_model_without_memory(tmp_path: Path):
    model, path = find_model(), tmp_path / "a.memory"
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
    remove_memory(model)
    other = make_model("qwen3")
    with pytest.raises(MemoryFolderError, match="another model"):
        open_memory(other, path)
    with pytest.raises(ConfigError, match="has no memory"):
        get_attachment(other)
    with pytest.raises(ConfigError, match="has no memory"):
        open_memory(model, tmp_path / "new.memory")
    (tmp_path / "file").write_text("no memory")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("no memory")
    for name in ("file", "full"):
        with pytest.raises(MemoryFolderError):
            open_memory(model, tmp_path / name)


def test_two_memories_at_once_are_refused():
    model = find_model()
    give_memory(model)
    with open_memory(model) as memory:
        with pytest.raises(StateError, match="open already"), open_memory(model):
            pass
        with pytest.raises(StateError, match="open already"), memory:
            pass
        # It is still open.
        assert get_attachment(model).is_bound
    with memory:
        pass


def test_a_memory_that_is_kept_only_as_long_as_it_lives_can_be_entered_again():
    model = find_model()
    give_memory(model)
    memory = open_memory(model)
    read_all(memory)
    with memory:
        first = ask(model)
    without = ask(model)
    with memory:
        assert torch.equal(ask(model), first)
    assert not torch.equal(first, without)


def test_a_cache_ends_with_the_memory_that_was_open():
    model = find_model()
    give_memory(model)
    with torch.no_grad():
        with open_memory(model) as memory:
            cache = memory.new_cache()
            call(model, QUESTION[:, :5], cache)
        with open_memory(model) as memory:
            with pytest.raises(StateError, match="no memory knows"):
                call(model, QUESTION[:, 5:9], cache)
            with pytest.raises(StateError, match="new_cache"):
                memory.commit(cache)
        cache = model(QUESTION[:, :5])[CACHE]
        with open_memory(model), pytest.raises(StateError, match="no memory knows"):
            call(model, QUESTION[:, 5:9], cache)


def test_saving_nothing_or_over_something_is_refused(path: Path | None, tmp_path: Path):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        with pytest.raises(MemoryFolderError, match="nothing was read"):
            memory.save(tmp_path / "saved.memory")
        read_all(memory)
        memory.save(tmp_path / "saved.memory")
        with pytest.raises(MemoryFolderError):
            memory.save(tmp_path / "saved.memory")


def test_a_memory_is_saved_in_other_dtypes(tmp_path: Path):
    model = find_model()
    give_memory(model)
    with open_memory(model) as memory:
        read_all(memory)
        exact = ask(model)
        errors = {}
        for dtype in ("float32", "bfloat16", "int8"):
            memory.save(tmp_path / dtype, dtype=dtype)
    for dtype in ("float32", "bfloat16", "int8"):
        with open_memory(model, tmp_path / dtype):
            errors[dtype] = float((ask(model) - exact).abs().mean())
    assert errors["float32"] == 0
    assert 0 < errors["bfloat16"] < errors["int8"] < 0.2
    with open_memory(model, tmp_path / "new", dtype="int8") as memory:
        read_all(memory)
        with pytest.raises(MemoryFolderError, match="cannot be in float32"):
            memory.save(tmp_path / "other", dtype="float32")
    assert MemoryFolder.open(tmp_path / "new").description.dtype == "int8"


def test_texts_are_kept_where_asked_for(tmp_path: Path):
    model = find_model()
    give_memory(model)
    for keep_text in (False, True):
        path = tmp_path / str(keep_text)
        with open_memory(model, path, keep_text=keep_text) as memory:
            read_all(memory)
        folder = MemoryFolder.open(path)
        assert all((document.text is not None) == keep_text for document in folder.documents)
    # Entry 0 is the token after the first three: the start token and two words.
    around = folder.contents.read_around(0, 0)
    assert around.token == DOCUMENTS["first"].split()[2]


@pytest.mark.parametrize("combine", ["joint", "gate"])
def test_sources_name_the_documents_that_were_retrieved(path: Path | None, combine: str):
    model = find_model()
    attachment = give_memory(model, combine=combine, num_neighbors=7)
    told = []
    with open_memory(model, path) as memory:
        read_all(memory)
        with memory.record() as sources, attachment.listen(lambda *args: told.append(args)):
            ask(model)
        assert not attachment.mode.listeners
    # All 41 tokens of 2 rows by 4 heads have memories to attend to.
    assert sum(sources.mass.values()) + sources.own_mass == pytest.approx(2 * 4 * 41, rel=1e-4)
    expected = dict.fromkeys(NUM_ENTRIES, 0.0)
    ends = torch.tensor(list(NUM_ENTRIES.values())).cumsum(0).tolist()
    for _, shares, entries in told:
        for share, entry in zip(shares, entries, strict=True):
            if entry is not None:
                for mass, number in zip(share.flatten(), entry.flatten().tolist(), strict=True):
                    name = list(NUM_ENTRIES)[sum(number >= end for end in ends)]
                    expected[name] += float(mass)
    assert sources.mass == pytest.approx(expected, rel=1e-4)
    assert sources.own_mass > 0
    listed = sources.list()
    assert [name for name, _ in listed] == sorted(expected, key=lambda name: -expected[name])


def test_padding_is_no_source():
    model = find_model()
    give_memory(model)
    tokens = torch.cat([torch.zeros(1, 6, dtype=torch.int64), QUESTION[:1]], 1)
    mask = (tokens != 0).long()
    masses = []
    with open_memory(model) as memory:
        read_all(memory)
        for given, given_mask in ((tokens, mask), (QUESTION[:1], None)):
            with memory.record() as sources, torch.no_grad():
                read(model, given, SEGMENT_LEN, given_mask)
            masses.append(sources.mass)
    assert masses[0] == pytest.approx(masses[1], rel=1e-3)


def test_add_memory_returns_the_model_and_defaults_to_its_window():
    model = find_model()
    assert add_memory(model, [LAYER], window=61) is model
    settings = get_attachment(model).settings
    assert (settings.window, settings.segment_len, settings.distance) == (61, 61, 61)


HOSTILE = {
    "layers that are a number": ("memory", {"layers": 5}),
    "a layer twice": ("memory", {"layers": [LAYER, LAYER]}),
    "no such layer": ("memory", {"layers": [2**60]}),
    "a capacity that fits no machine": ("memory", {"capacity": 2**31 - 1}),
    "a capacity beyond all numbers": ("memory", {"capacity": 10**300}),
    "a window that is a text": ("memory", {"window": "512"}),
    "a distance beyond all positions": ("memory", {"distance": 2**70}),
    "a bias beyond all logits": ("memory", {"bias": 1e308}),
    "an index that is none": ("memory", {"index": "nothing:x=1"}),
    "a setting that is none": ("memory", {"more": 1}),
    "settings that are a list": ("memory", []),
    "gates that are a list": ("heads", []),
    "gates of no layer": ("heads", {}),
    "gates that are texts": ("heads", {str(LAYER): {"bias": "high"}}),
    "gates that are nothing": ("heads", {str(LAYER): None}),
    "gates beyond all numbers": ("heads", {str(LAYER): {"bias": [10**400] * 4}}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_settings_that_somebody_wrote_into_a_folder_end_in_an_error_of_ours(
    case: str, tmp_path: Path
):
    model = make_model()
    give_memory(model)
    with open_memory(model, tmp_path / "m") as memory:
        read_all(memory, {"second": DOCUMENTS["second"]})
    key, values = HOSTILE[case]

    def edit(manifest: dict[str, Any]) -> None:
        settings = manifest["settings"]
        whole = key == "heads" or not isinstance(values, dict)
        settings[key] = values if whole else settings[key] | values

    edit_manifest(tmp_path / "m", edit)
    model = make_model()
    with pytest.raises((MemoryFolderError, ConfigError)):
        open_memory(model, tmp_path / "m")
    # Nothing is left of it.
    with pytest.raises(ConfigError, match="has no memory"):
        get_attachment(model)


@pytest.mark.parametrize(("text", "is_kept"), [("", False), ("w5 w6", False), ("w5 w6 w7", True)])
def test_documents_that_leave_nothing_in_memory_are_named(
    path: Path | None, text: str, is_kept: bool
):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        report = read_all(memory, {"short": text, **DOCUMENTS})
        assert report.without_entries == ([] if is_kept else ["short"])
        assert memory.num_entries == report.num_entries == sum(NUM_ENTRIES.values()) + is_kept


def test_reading_tells_every_segment_to_who_asks(path: Path | None):
    model = find_model()
    give_memory(model)
    told: dict[str, list[int]] = {}
    with open_memory(model, path) as memory:

        def tell(name: str, count: int) -> None:
            told.setdefault(name, []).append(count)

        memory.read(TOKENIZER, DOCUMENTS, progress=tell)
    assert {name: sum(counts) for name, counts in told.items()} == {
        "first": 68, "second": 31, "third": 39
    }  # fmt: skip
    assert told["second"] == [13, 13, 5]


def test_recordings_that_overlap_each_see_their_own_calls(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
        outer, inner = memory.record(), memory.record()
        first = outer.__enter__()
        ask(model)
        second = inner.__enter__()
        ask(model)
        outer.__exit__(None, None, None)
        ask(model)
        inner.__exit__(None, None, None)
        ask(model)
    assert first.mass == pytest.approx(second.mass, rel=1e-6)
    assert sum(first.mass.values()) + first.own_mass == pytest.approx(2 * 2 * 4 * 41, rel=1e-4)


def test_a_recording_goes_on_when_documents_are_forgotten_and_read(path: Path | None):
    model = find_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
        with memory.record() as one:
            ask(model)
        memory.forget("first")
        read_all(memory, {"new": "w5 w6 w7 w8 w9 w10 w11"})
        with memory.record() as two:
            ask(model)
    with open_memory(model) as memory:
        read_all(memory)
        with memory.record() as sources:
            ask(model)
            memory.forget("first")
            read_all(memory, {"new": "w5 w6 w7 w8 w9 w10 w11"})
            ask(model)
    names = one.mass.keys() | two.mass.keys()
    expected = {name: one.mass.get(name, 0) + two.mass.get(name, 0) for name in names}
    assert sources.mass == pytest.approx(expected, rel=1e-6)
    assert {"first", "new"} <= sources.mass.keys()


def test_a_model_that_was_moved_under_an_open_memory_is_refused(path: Path | None):
    model = make_model()
    give_memory(model)
    with open_memory(model, path) as memory:
        read_all(memory)
        expected = ask(model)
        layer = model.model.layers[LAYER]
        moved = copy.deepcopy(layer.self_attn.memory.state_dict())
        layer.self_attn.memory.to("meta")
        with pytest.raises(StateError, match="moved to meta while a memory was open on cpu"):
            ask(model)
        layer.self_attn.memory.load_state_dict(moved, assign=True)
        assert torch.equal(ask(model), expected)
