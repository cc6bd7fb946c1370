import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TokenizerConfig,
    TrainingConfig,
    check_capacity,
    known_keys,
    list_recipes,
    load_config,
)
from memorizing.errors import ConfigError

sizes = st.integers(1, 10**6)
shares = st.floats(0, 1, exclude_max=True)
rates = st.floats(0, 10)
names = st.lists(st.text(), max_size=3).map(tuple)


@st.composite
def configs(draw: st.DrawFn) -> Config:
    num_layers = draw(st.integers(1, 50))
    num_neighbors = draw(st.integers(1, 64))
    capacities = st.just(0) | st.integers(num_neighbors, 10**6)
    num_buckets = draw(st.integers(2, 64))
    model = ModelConfig(
        vocab_size=draw(sizes),
        num_layers=num_layers,
        xl_cache=draw(st.booleans()),
        memory_layers=tuple(draw(st.sets(st.integers(0, num_layers - 1), max_size=3))),
        capacity=draw(capacities),
        num_neighbors=num_neighbors,
        combine=draw(st.sampled_from(["gate", "joint"])),
        scale_init=draw(rates),
        gate_bias_init=draw(st.floats(-9, 9)),
        num_buckets=num_buckets,
        max_distance=draw(st.integers(num_buckets // 2 + 1, 999)),
        dropout=draw(shares),
        memory_dtype=draw(st.sampled_from(["bfloat16", "float16", "float32"])),
    )
    rows = draw(st.integers(1, 99))
    return Config(
        name=draw(st.text()),
        description=draw(st.text()),
        model=model,
        tokenizer=TokenizerConfig(kind="pretrained", path=draw(st.text(min_size=1))),
        data=DataConfig(corpus=draw(st.text(min_size=1)), validation=draw(names), test=draw(names)),
        training=TrainingConfig(rows=rows, accumulation=rows, weight_decay=draw(rates)),
        evaluation=EvaluationConfig(capacities=tuple(draw(st.lists(capacities, max_size=3)))),
    )


@given(configs())
@settings(max_examples=50, deadline=None)
def test_any_configuration_is_read_back_from_its_toml(config: Config):
    assert Config.from_dict(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize("recipe", list_recipes())
def test_every_recipe_is_valid_and_described(recipe: str):
    config = load_config(recipe)
    assert config.name == recipe
    assert config.description
    assert config.model.vocab_size == config.tokenizer.vocab_size
    assert config.model.has_memory


@pytest.mark.parametrize(
    ("recipe", "num_layers", "memory_layer", "shape"),
    [
        ("paper_200m", 12, 8, (1024, 8, 4096)),
        ("paper_1b", 8, 5, (2048, 32, 16_384)),
        ("paper_8b", 16, 11, (4096, 64, 32_768)),
    ],
)
def test_the_papers_recipes_are_the_papers(recipe, num_layers, memory_layer, shape):
    config = load_config(recipe)
    model, training = config.model, config.training
    assert (model.model_dim, model.num_heads, model.ffn_dim) == shape
    assert (model.head_dim, model.vocab_size, model.num_layers) == (128, 32_000, num_layers)
    assert (model.segment_len, model.window, model.xl_cache) == (512, 512, True)
    assert (model.memory_layers, model.capacity, model.num_neighbors) == ((memory_layer,), 8192, 32)
    assert (model.combine, model.smear_keys, model.normalize_qk) == ("gate", False, True)
    assert not model.induction_init
    assert (model.gate_bias_init, model.num_buckets, model.max_distance) == (0.0, 32, 128)
    assert (model.dropout, model.memory_dtype) == (0.05, "bfloat16")
    assert (training.optimizer, training.learning_rate) == ("adafactor", 1.0)
    assert (training.schedule, training.warmup_steps) == ("inverse_sqrt", 1000)
    assert (training.steps, training.rows * model.segment_len) == (500_000, 2**17)
    assert (config.tokenizer.kind, config.tokenizer.vocab_size) == ("unigram", 32_000)


@pytest.mark.parametrize("capacity", [0, 7, 8])
def test_a_capacity_of_zero_or_at_least_k_is_allowed(capacity):
    check_capacity(capacity, 7)
    assert ModelConfig(capacity=capacity, num_neighbors=7).capacity == capacity


@pytest.mark.parametrize("capacity", [-1, 1, 6])
def test_a_capacity_below_k_is_refused(capacity):
    allowed = r"0 \(no memory\), or at least num_neighbors = 7"
    with pytest.raises(ConfigError, match=f"capacity is {capacity}; allowed: {allowed}"):
        check_capacity(capacity, 7)
    with pytest.raises(ConfigError, match="model.capacity"):
        ModelConfig(capacity=capacity, num_neighbors=7)
    with pytest.raises(ConfigError, match="evaluation.capacities"):
        Config(
            model=ModelConfig(num_neighbors=7), evaluation=EvaluationConfig(capacities=(capacity,))
        )


@pytest.mark.parametrize("layer", [-1, 5])
def test_a_memory_layer_out_of_range_is_refused_with_the_range(layer):
    with pytest.raises(ConfigError, match="layers from 0 to 4, counted from 0"):
        ModelConfig(num_layers=5, memory_layers=(layer,))


@pytest.mark.parametrize("layer", [0, 4])
def test_the_first_and_the_last_layer_may_have_memory(layer):
    assert ModelConfig(num_layers=5, memory_layers=(layer,), capacity=37).has_memory


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.memory_layers=2,2", "each layer once"),
        ("model.num_layers=0", "model.num_layers is 0; allowed: 1 or more"),
        ("model.dropout=1", "from 0 up to, not including, 1"),
        ("model.max_distance=16", "more than num_buckets / 2 = 16"),
        ("model.combine=gat", "'gate' or 'joint'"),
        ("model.induction_init=true", "or true with model.smear_keys = true"),
        ("tokenizer.vocab_size=299", "300 or more"),
        ("tokenizer.kind=pretrained", "a name or path with kind = 'pretrained'"),
        ("tokenizer.path=gpt2", "empty otherwise"),
        ("data.corpus=", "a corpus such as"),
        ("data.held_out_share=1.0", "not including, 1"),
        ("training.learning_rate=0", "above 0"),
        ("training.accumulation=3", "a divisor of training.rows = 8"),
        ("training.seed=-1", r"from 0 to 2\^63 - 1"),
        (f"training.seed={2**63}", r"from 0 to 2\^63 - 1"),
        (f"data.seed={2**63}", r"from 0 to 2\^63 - 1"),
        ("training.memory_closed_share=1.5", "from 0 to 1"),
        ("evaluation.controls=other", "'off' or 'other_document' or 'shuffled'"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(setting, message):
    with pytest.raises(ConfigError, match=message):
        Config().replace([setting])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.num_layer=4", "unknown key 'model.num_layer'; did you mean 'model.num_layers'"),
        ("num_layers=4", "did you mean 'model.num_layers'"),
        ("modle.num_layers=4", "did you mean 'model.num_layers'"),
        ("model=4", "unknown key 'model'"),
        ("model.num_layers", "has no '='"),
        ("zzzz=4", "unknown key 'zzzz'; known: name, "),
    ],
)
def test_a_setting_that_is_not_one_gets_the_nearest(setting, message):
    with pytest.raises(ConfigError, match=message):
        Config().replace([setting])


def test_settings_are_applied_in_order_and_leave_the_original():
    config = Config()
    changed = config.replace(
        ["model.memory_layers=2,3", "model.capacity=37", "data.test=a*,b", "model.capacity=41"]
    )
    assert changed.model.memory_layers == (2, 3)
    assert changed.model.capacity == 41
    assert changed.data.test == ("a*", "b")
    assert config == Config()


def test_every_known_key_can_be_set_to_its_own_value():
    config = load_config("tiny")
    tables = config.to_dict()
    for key in known_keys():
        table, _, last = key.rpartition(".")
        value = (tables[table] if table else tables)[last]
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        assert (
            config.replace([f"{key}={text.lower() if value in (True, False) else text}"]) == config
        )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("paper_200", "unknown recipe 'paper_200'; did you mean 'paper_200m'"),
        ("missing.toml", "cannot read recipe file 'missing.toml': No such file"),
    ],
)
def test_an_unknown_recipe_gets_the_nearest_name(recipe, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_config(recipe)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[model\n", "is not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"model = 3\n", "model is 3; it is a table"),
        (b"[modle]\n", "unknown key 'modle'; did you mean 'model'"),
        (b"[model]\nnum_layer = 3\n", "did you mean 'model.num_layers'"),
    ],
)
def test_a_recipe_file_that_cannot_be_used_says_why(content, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_recipe_file_is_named_after_itself_and_takes_defaults(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("[model]\nnum_layers = 3\n", encoding="utf-8")
    assert load_config(path) == Config(name="mine", model=ModelConfig(num_layers=3))
