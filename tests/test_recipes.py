import pytest
import torch

from memorizing.config import load_config
from memorizing.model import MemorizingTransformer


@pytest.mark.parametrize(
    ("recipe", "num_weights"),
    [("paper_200m", 183_791_720), ("paper_1b", 870_885_664), ("paper_8b", 6_573_691_968)],
)
def test_the_papers_recipes_have_the_papers_numbers_of_parameters(recipe, num_weights):
    with torch.device("meta"):
        model = MemorizingTransformer(load_config(recipe).model)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_weights


def test_a_200m_model_with_the_papers_memory_takes_the_papers_bytes():
    from memorizing.memory import memory_bytes

    config = load_config("paper_200m").model
    assert memory_bytes(config, 1, 8192) == 32 * 2**20
    assert memory_bytes(config, 1, 65_536) == 256 * 2**20
