"""What is printed fits 80 columns and says what it is about."""

from memorizing.analysis import (
    Example,
    Place,
    render_examples,
)
from tests.analysis.conftest import print_plainly


def test_an_example_shows_token_probabilities_and_places():
    place = Place(4001, 2999, 0.625, "word " * 60 + "\n    def ", "forward", "[bold](self):\n")
    start = Place(0, 7000, 0.001, "", "", "import os")
    example = Example(
        "transformers.models.t5", 7000, "self.", "forward", "(x)\r", 0.91, 0.0234, (place, start)
    )
    lonely = Example("b", 3, "", "ant", "", 0.5, 0.0001, ())
    text = print_plainly(render_examples([example, lonely], baseline_name="cache only"))
    assert "1. transformers.models.t5, token 7,000" in text
    assert "probability of «forward»: 2.3% cache only, 91% with memory" in text
    assert "self.«forward»(x) ⏎" in text
    assert "retrieved from 2,999 tokens before (62% of the weight)" in text
    assert "word ⏎ def «forward»[bold](self):" in " ".join(text.split())
    assert 20 < text.count("word") < 40
    assert "«start of document»import os" in text
    assert "under 0.1% cache only" in text
    assert "nothing retrieved" in text
