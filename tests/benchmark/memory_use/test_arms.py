"""Arms: what the model has in sight in each, and what it makes of the answer then."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from memorizing.benchmark.memory_use.arms import ARMS
from memorizing.benchmark.memory_use.asking import ask, find_rank, is_in_sight
from memorizing.benchmark.memory_use.places import Place, Source, draw_quotes, encode_package
from memorizing.benchmark.memory_use.readers import Setup, choose_whole
from memorizing.benchmark.memory_use.retrievers import Found
from memorizing.benchmark.memory_use.running import check_kept
from memorizing.errors import ConfigError
from memorizing.huggingface.attaching.attachment import find_attachment
from memorizing.huggingface.attaching.window_cache import find_text
from memorizing.memory.disk import MemoryFolder
from tests.benchmark.memory_use.tools import (
    NUM_PASSAGES,
    PASSAGE_LEN,
    START,
    make_package,
    make_setup,
    read_plainly,
    spell,
)
from tests.huggingface.sessions.tools import TOKENIZER
from tests.huggingface.tools import LAYER, NUM_SINKS, find_model

LENGTHS = {"prompt_len": 19, "answer_len": 5}


@pytest.fixture(scope="module")
def package():
    return make_package(241, 227, 61)


@pytest.fixture
def setup(tmp_path):
    return make_setup(tmp_path)


def judge(setup, before, place):
    """Right tokens and nats of the answer behind tokens, from one plain pass."""
    tokens = [*before, *place.prompt, *place.answer]
    logits = read_plainly(setup.model, tokens)[-len(place.answer) - 1 : -1]
    answer = torch.tensor(place.answer)
    nats = torch.nn.functional.cross_entropy(logits, answer, reduction="sum")
    right = (logits.argmax(-1) == answer).tolist()
    return (right.index(False) if False in right else len(right)), float(nats)


def write_greedily(setup, before, count):
    tokens = list(before)
    for _ in range(count):
        tokens.append(int(read_plainly(setup.model, tokens)[-1].argmax()))
    return tuple(tokens[len(before) :])


def test_nothing_is_the_prompt_alone(setup, package):
    (place,) = draw_quotes(package, 1, seed=0, **LENGTHS)
    with ARMS["nothing"].open(setup, package) as reader:
        found = ask(reader, 3, place, is_ranked=True)
    right, nats = judge(setup, [START], place)
    assert (found.place, found.num_tokens, found.num_given) == (3, 5, 0)
    assert found.num_right == right
    assert found.nats == pytest.approx(nats, abs=1e-4)
    assert (found.rank, found.score, found.is_in_sight) == (None, None, None)
    assert reader.num_bytes == 0


def test_what_the_model_would_write_is_right_up_to_the_token_that_is_changed(setup, package):
    (place,) = draw_quotes(package, 1, seed=0, **LENGTHS)
    written = write_greedily(setup, [START, *place.prompt], 40)
    with ARMS["nothing"].open(setup, package) as reader:
        for wrong in (0, 1, 33, 39, None):
            answer = list(written)
            if wrong is not None:
                answer[wrong] = 3 + (answer[wrong] + 1) % 90
            found = ask(reader, 0, replace(place, answer=tuple(answer)))
            assert found.num_right == (40 if wrong is None else wrong)
        assert ask(reader, 0, replace(place, answer=written[:1])).num_right == 1


@pytest.mark.parametrize("name", ["bm25", "bm25-1"])
def test_what_is_pasted_stands_behind_a_start_token_the_best_one_last(setup, package, name):
    place = draw_quotes(package, 3, seed=0, **LENGTHS)[1]
    with ARMS[name].open(setup, package) as reader:
        begun = reader.begin(place)
        found = ask(reader, 0, place, is_ranked=True)
        best = reader.find(place, 8)
    num_passages = {"bm25": NUM_PASSAGES, "bm25-1": 1}[name]
    assert list(begun.found) == list(found.found) == best[:num_passages]
    pasted = [package.find(one.document).tokens[one.start : one.end] for one in best]
    standing = [*reversed(pasted[:num_passages]), pasted[0]]
    before = [START, *(token for one in standing for token in one)]
    assert found.num_given == len(before) - 1 == (num_passages + 1) * PASSAGE_LEN
    assert found.nats == pytest.approx(judge(setup, before, place)[1], abs=1e-4)
    # A prompt of 19 words that stand there is found first.
    assert found.rank == 1
    assert found.score == best[0].score


@pytest.mark.parametrize(("name", "count"), [("passages", NUM_PASSAGES), ("passages-1", 1)])
def test_passages_of_a_memory_are_worth_what_they_are_pasted(setup, package, name, count):
    for place in draw_quotes(package, 2, seed=0, **LENGTHS):
        with ARMS[name].open(setup, package) as reader:
            begun = reader.begin(place)
            found = ask(reader, 0, place, is_ranked=True)
            best = reader.find(place, 8)
        assert find_attachment(setup.model) is None
        assert len(begun.found) == count
        assert [replace(one, score=0) for one in begun.found] == [
            replace(one, score=0) for one in best[:count]
        ]
        scores = [one.score for one in best[:count]]
        assert [one.score for one in begun.found] == pytest.approx(scores)
        pasted = [package.find(one.document).tokens[one.start : one.end] for one in begun.found]
        standing = [*reversed(pasted), pasted[0]]
        before = [START, *(token for one in standing for token in one), START]
        assert found.num_given == sum(map(len, standing))
        right, nats = judge(setup, before, place)
        assert found.nats == pytest.approx(nats, abs=1e-3)
        assert found.num_right == right
        assert found.rank == find_rank(best, place.sources[0])
        assert reader.num_bytes > 1000


@pytest.mark.parametrize("name", ["passages-entries", "bm25-entries"])
def test_entries_of_a_whole_document_are_worth_what_it_is_pasted(setup, name):
    package = make_package(13)
    setup = Setup(setup.model, TOKENIZER, setup.folder, {**setup.given, "num_sinks": 1})
    tokens = package.documents[0].tokens
    place = Place("package", "a.txt", tokens[:7], tokens[7:12], (Source("a.txt", 7),))
    with ARMS[name].open(setup, package) as reader:
        found = ask(reader, 0, place, is_ranked=True)
    right, nats = judge(setup, [START, *tokens, START], place)
    assert found.nats == pytest.approx(nats, abs=1e-3)
    assert (found.num_right, found.num_given) == (right, 13)
    assert [(one.document, one.start, one.end) for one in found.found] == [("a.txt", 0, 13)]
    assert (found.rank, found.is_in_sight) == (1, True)


def test_what_bm25_finds_stands_as_entries_and_stays_while_the_model_goes_on(setup, package):
    place = draw_quotes(package, 3, seed=0, **LENGTHS)[1]
    with ARMS["bm25"].open(setup, package) as reader:
        wanted, pasting = reader.begin(place).found, reader
    with ARMS["passages-entries"].open(setup, package) as reader:
        memory_bytes = reader.num_bytes
    with ARMS["bm25-entries"].open(setup, package) as reader:
        assert reader.find(place, 8) == pasting.find(place, 8)
        begun = reader.begin(place)
        room = find_text(begun.cache).room
        reader.go_on(begun, package.documents[1].tokens[:37])
        reader.go_on(begun, package.documents[2].tokens[:2])
        assert find_text(begun.cache).room.passages == room.passages
    assert begun.found == wanted
    assert begun.num_given == NUM_PASSAGES * PASSAGE_LEN
    assert room.ids.tolist() == [[START] + [-1] * begun.num_given]
    texts = sum(len(one.text.encode()) for one in package.documents)
    assert reader.num_bytes == memory_bytes + pasting.num_bytes - texts


def test_of_a_passage_at_the_beginning_of_a_document_first_tokens_have_no_entries(setup):
    tokens = (package := make_package(31)).documents[0].tokens
    place = Place("package", "a.txt", tokens[:9], tokens[9:12], (Source("a.txt", 9),))
    with ARMS["bm25-entries"].open(setup, package) as reader:
        begun = reader.begin(place)
    # The start token is one of them.
    assert begun.found[0].start == NUM_SINKS - 1
    assert begun.found[0].end == PASSAGE_LEN
    assert begun.num_given == sum(one.end - one.start for one in begun.found)
    short = make_package(NUM_SINKS - 1, name="short")
    place = replace(place, prompt=short.documents[0].tokens)
    with ARMS["bm25-entries"].open(setup, short) as reader:
        assert len(reader.find(place, 8)) == 1
        assert ask(reader, 0, place).num_given == 0


def test_arms_that_a_model_cannot_have_are_refused(tmp_path):
    given = {"layers": [LAYER], "window": 37, "num_passages": 1, "passage_len": 16}
    check_kept(Setup(find_model(), TOKENIZER, tmp_path, given), ["bm25", "bm25-entries"])
    setup = Setup(find_model("gpt2"), TOKENIZER, tmp_path, given)
    check_kept(setup, ["nothing", "entries", "bm25"])
    with pytest.raises(ConfigError, match="the arm bm25-entries cannot be had.* positions"):
        check_kept(setup, ["bm25", "bm25-entries"])


def test_entries_change_what_the_model_says_and_find_no_passages(setup, package):
    (place,) = draw_quotes(package, 1, seed=0, **LENGTHS)
    with ARMS["entries"].open(setup, package) as reader:
        found = ask(reader, 0, place, is_ranked=True, is_timed=True)
    assert abs(found.nats - judge(setup, [START], place)[1]) > 1e-3
    assert (found.num_given, found.rank) == (0, None)
    assert found.token_s > 0
    assert found.first_s > 0


@pytest.mark.parametrize(
    "name", ["passages", "bm25", "entries", "whole", "passages-entries", "bm25-entries"]
)
def test_a_document_that_is_left_out_is_not_seen_and_then_is_again(setup, package, name):
    place = draw_quotes(package, 3, seed=0, **LENGTHS)[1]
    with ARMS[name].open(setup, package) as reader:
        before = ask(reader, 0, place, is_ranked=True)
        reader.leave_out(place.document)
        reader.leave_out(place.document)
        without = ask(reader, 0, place, is_ranked=True)
        found = reader.find(place, 8)
        reader.leave_out("c.txt")
        reader.leave_out(None)
        after = ask(reader, 0, place, is_ranked=True)
    assert abs(without.nats - before.nats) > 1e-3
    assert without.rank in (0, None)
    assert all(one.document != place.document for one in found or ())
    assert after.nats == pytest.approx(before.nats, abs=1e-4)
    assert after.num_given == before.num_given


def test_a_memory_that_is_there_is_not_read_again_nor_changed(setup, package, tmp_path):
    read: list[str] = []
    setup.on_read = read.append
    setup.memories = {"package": tmp_path / "kept.memory"}
    place = draw_quotes(package, 1, seed=0, **LENGTHS)[0]
    for documents in ({"a.txt", "b.txt", "c.txt"}, set()):
        read.clear()
        for name in ("passages", "passages-1"):
            with ARMS[name].open(setup, package) as reader:
                reader.leave_out("b.txt")
                ask(reader, 0, place)
        assert set(read) == documents
    assert len(MemoryFolder.open(tmp_path / "kept.memory").documents) == 3


def test_without_its_only_document_nothing_is_found(setup):
    package = make_package(241, name="[ab]?*")
    place = draw_quotes(package, 1, seed=0, **LENGTHS)[0]
    with ARMS["passages"].open(setup, package) as reader:
        reader.leave_out("a.txt")
        assert reader.find(place, 8) == []
        assert ask(reader, 0, place).num_given == 0


def test_names_that_look_like_patterns_are_names(setup):
    texts = [(f"{name}.txt", spell([3 + 7 * n] * 50)) for n, name in enumerate(("a", "[ab]", "*"))]
    package = encode_package(TOKENIZER, "package", texts)
    place = Place("package", "a.txt", tuple([3] * 19), (3,), (Source("a.txt", 30),))
    with ARMS["passages"].open(setup, package) as reader:
        reader.leave_out("a.txt")
        assert {one.document for one in reader.find(place, 8)} == {"[ab].txt", "*.txt"}


def test_the_same_whole_file_is_read_once_and_counted_for_each_prompt(setup, package):
    places = draw_quotes(package, 4, seed=0, **LENGTHS)
    first, second = [place for place in places if place.document == "a.txt"][:2]
    with ARMS["whole"].open(setup, package) as reader:
        begun, again = reader.begin(first), reader.begin(second)
        found = ask(reader, 0, second)
    assert (begun.shared_s, begun.num_given) == (0.0, 241)
    assert again.shared_s > 0
    file = package.find("a.txt").tokens
    # Positions of this model end at 211, and rotate on.
    assert found.nats == pytest.approx(judge(setup, [START, *file], second)[1], abs=1e-3)


def test_of_a_long_file_the_part_around_the_place_is_read():
    package = make_package(241, 227)
    for token in (0, 24, 25, 99, 100, 200, 240):
        place = Place("package", "a.txt", (3,), (4,), (Source("a.txt", token),))
        tokens = choose_whole(package, place, 100)
        file = package.find("a.txt").tokens
        start = next(n for n in range(0, 241, 50) if file[n : n + len(tokens)] == tokens)
        assert start <= token < start + len(tokens)
        assert len(tokens) <= 100
        assert token - start >= 25 or start == 0


def test_the_most_important_file_stands_last_and_others_have_what_is_left():
    package = make_package(31, 23, 11)
    sources = (Source("b.txt", 0), Source("c.txt", 3), Source("a.txt", 30))
    place = Place("package", "d.txt", (3,), (4,), sources)
    a, b, c = (package.find(name).tokens for name in ("a.txt", "b.txt", "c.txt"))
    assert choose_whole(package, place, 99) == (*a, *c, *b)
    assert choose_whole(package, place, 99, "c.txt") == (*a, *b)
    assert choose_whole(package, place, 34) == (*c, *b)
    assert choose_whole(package, place, 35) == (a[30], *c, *b)


@pytest.mark.parametrize(
    ("start", "end", "is_near"),
    [(100, 116, True), (17, 68, False), (17, 69, True), (132, 148, True), (133, 149, False)],
)
def test_a_passage_near_the_right_place_counts(start, end, is_near):
    source = Source("a.txt", 100)
    found = [Found("b.txt", 100, 116, 2.0), Found("a.txt", start, end, 1.0)]
    assert find_rank(found, source) == (2 if is_near else 0)
    assert find_rank([], source) == 0


def test_an_answer_is_in_sight_where_one_passage_has_all_of_it():
    place = Place("p", "a.txt", (3,), (4, 5, 6), (Source("a.txt", 100),))
    for start, end, expected in ((100, 103, True), (101, 120, False), (90, 102, False)):
        assert is_in_sight([Found("a.txt", start, end, 1.0)], place) is expected
    assert not is_in_sight([Found("b.txt", 0, 200, 1.0)], place)


def test_a_quote_is_written_as_long_as_the_answer_and_a_call_up_to_its_parenthesis(
    setup, package, monkeypatch
):
    (place,) = draw_quotes(package, 1, seed=0, **LENGTHS)
    written = write_greedily(setup, [START, *place.prompt], 32)
    with ARMS["nothing"].open(setup, package) as reader:
        as_long = ask(reader, 0, place, tokenizer=TOKENIZER)
        assert as_long.written == TOKENIZER.decode(written[:5], skip_special_tokens=True)
        found = ask(reader, 0, place, tokenizer=TOKENIZER, is_call=True)
        # Nothing that the model writes closes a parenthesis: it ends at twice the answer, or 32.
        assert found.written == TOKENIZER.decode(written, skip_special_tokens=True)
        assert ask(reader, 0, place).nats == pytest.approx(found.nats, abs=1e-4)

        class Closing:
            eos_token_id = None

            def decode(self, tokens, **options):
                return " ".join("()"[token == written[3]] for token in tokens).replace("(", "x")

        expected = Closing().decode(written[: written.index(written[3]) + 1])
        assert ask(reader, 0, place, tokenizer=Closing(), is_call=True).written == expected
