"""Examples show the text around a token and around what was retrieved for it."""

import pytest

from memorizing.analysis import explain_helped_tokens, trace_document
from memorizing.analysis.examples import _merge_entries
from memorizing.analysis.helped import HelpedToken
from tests.analysis.conftest import TEXT


def test_examples_show_the_text_around_the_token_and_around_what_it_found(
    model, tokenizer, make_document
):
    documents = [make_document("farm", "ant bee cow"), make_document("zoo", TEXT)]
    helped = [HelpedToken(1, 13, 0.5, 3.0), HelpedToken(0, 0, 1.0, 2.0)]
    traces = {
        index: trace_document(model, document, tokenizer.start_token, 17)
        for index, document in enumerate(documents)
    }
    example, first = explain_helped_tokens(
        traces,
        documents,
        tokenizer,
        helped,
        num_places=1,
        context_tokens=2,
        neighborhood=1,
    )
    assert (example.document, example.position) == ("zoo", 13)
    assert [part.split() for part in (example.before, example.token, example.after)] == [
        ["elk", "dog"],
        ["ibis"],
        ["bee", "ant"],
    ]
    # Token 13 follows "dog", which was token 3: its entry has position 4.
    (place,) = example.places
    assert (place.position, place.tokens_ago) == (4, 9)
    assert [part.split() for part in (place.before, place.entry, place.after)] == [
        ["bee", "cow"],
        ["dog"],
        ["elk", "fox"],
    ]
    assert 0.5 < place.share <= 1.0
    assert (first.before, first.token, first.places) == ("", "ant", ())
    assert first.to_dict()["document"] == "farm"


def test_entries_of_all_layers_and_of_one_neighborhood_are_one_place():
    entries = [(20, 0.3), (40, 0.2), (42, 0.15), (40, 0.05), (23, 0.01)]
    merged = _merge_entries(entries, neighborhood=3)
    assert [position for position, _ in merged] == [40, 20, 23]
    assert [weight for _, weight in merged] == pytest.approx([0.4, 0.3, 0.01])
