"""All settings as frozen dataclasses, and TOML in and out. Nothing here imports torch.

Every setting is validated where it is owned, at construction. `Config` is a whole run: a recipe is
a TOML file with the tables `[model]`, `[tokenizer]`, `[data]`, `[training]`, `[evaluation]`; what a
recipe leaves out has the default of the field.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from memorizing.errors import ConfigError
from memorizing.index_settings import parse_index
from memorizing.settings import (
    AboveZero,
    Count,
    NotNegative,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    build_dataclass,
    check_types,
    describe_unknown,
    format_value,
    list_keys,
    parse_value,
    require,
)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and kind of a decoder.

    Without `xl_cache` and `memory_layers` this is a vanilla transformer; with `window` shorter than
    `segment_len` it has a sliding window (Longformer's mask); `xl_cache` makes it a Transformer-XL;
    `memory_layers` with a `capacity` above 0 makes it a Memorizing Transformer.
    """

    vocab_size: Positive = 32_000
    num_layers: Positive = 12
    model_dim: Positive = 1024
    num_heads: Positive = 8
    head_dim: Positive = 128
    ffn_dim: Positive = 4096
    segment_len: Positive = 512
    """Tokens of one document per step, and the clock of the memory."""
    window: Positive = 512
    """Token t sees tokens j with t - window < j <= t."""
    xl_cache: bool = True
    """Whether local attention sees keys and values from before the segment (without gradient)."""
    memory_layers: tuple[int, ...] = ()
    """Layers that read the external memory, counted from 0."""
    capacity: int = 0
    """Entries per row and head that a memory holds at most; 0 is no memory."""
    num_neighbors: Positive = 32
    """Entries retrieved per query and head: the paper's k."""
    combine: Literal["gate", "joint"] = "gate"
    """How local and memory attention meet: a learned gate per head, or one softmax over both."""
    smear_keys: bool = False
    """Mix every key with the previous token's, by a learned share per head."""
    conv_len: int = 0
    """Mix queries and keys with those of the tokens before: a learned causal convolution over this
    many tokens, with coefficients per channel (Primer, So et al. 2021). 0 is none."""
    normalize_qk: bool = True
    """L2-normalize queries and keys (Henry et al. 2020); otherwise scores / sqrt(head_dim)."""
    scale_init: NotNegative = 0.0
    """Start of the learned scale of normalized scores; 0 means sqrt(head_dim)."""
    gate_bias_init: float = 0.0
    """Start of the gate's logit: 0 mixes memory and local attention half and half."""
    empty_value: bool = False
    """Where nothing is retrieved, at a document's start, a memory's heads give a value that is
    learned, behind the gate; otherwise their gate is closed there. Of no use with `joint`, nor with
    `capacity` 0."""
    pointer: bool = False
    """Retrieved entries also say which token comes next, by the tokens that they are of: their
    weights are mixed into the prediction by shares that are learned (pointer sentinel mixture,
    Merity et al. 2017). Of no use with `capacity` 0."""
    induction_init: bool = False
    """Memory layers start as induction heads: what they retrieve for a token is what followed the
    likes of it, before they have learned anything. Holds with `capacity` 0 too."""
    num_buckets: int = 32
    """T5 relative position bias: entries of a layer's table per head."""
    max_distance: int = 128
    """T5 relative position bias: distances from here on share the last bucket."""
    memory_layer_bias: bool = True
    """Whether memory layers have a position bias for their local attention, as the others have."""
    dropout: ShareBelowOne = 0.0
    memory_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    index: str = "exact"
    """What searches the memory: the name of an index and its options, as `memorizing info indexes`
    lists them."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_types(self, "model")
        check_capacity(self.capacity, self.num_neighbors, "model.capacity")
        layers = list(self.memory_layers)
        require(
            all(0 <= layer < self.num_layers for layer in layers),
            "model.memory_layers",
            layers,
            f"layers from 0 to {self.num_layers - 1}, counted from 0 "
            f"(this model has {self.num_layers})",
        )
        require(len(set(layers)) == len(layers), "model.memory_layers", layers, "each layer once")
        require(
            self.conv_len == 0 or self.conv_len >= 2,
            "model.conv_len",
            self.conv_len,
            "0 (no convolution), or 2 and more tokens, the present one included",
        )
        require(
            not (self.smear_keys and self.conv_len),
            "model.smear_keys",
            self.smear_keys,
            f"false with model.conv_len = {self.conv_len}, which mixes keys already",
        )
        require(
            self.smear_keys or self.conv_len > 0 or not self.induction_init,
            "model.induction_init",
            self.induction_init,
            "false, or true with model.smear_keys = true or model.conv_len: an induction head "
            "looks for a token by the key of the one after it",
        )
        require(self.num_buckets >= 2, "model.num_buckets", self.num_buckets, "2 or more")
        require(
            self.max_distance > self.num_buckets // 2,
            "model.max_distance",
            self.max_distance,
            f"more than num_buckets / 2 = {self.num_buckets // 2}",
        )
        parse_index(self.index)

    @property
    def has_memory(self) -> bool:
        """Whether the model reads an external memory."""
        return bool(self.memory_layers) and self.capacity > 0


Control = Literal["off", "other_document", "shuffled"]
"""Diagnostics of a model with memory: none at all; that of another document; values of random other
entries with the right keys."""

Use = Literal["validation", "test", "train", "all"]
"""Which documents of a corpus: those held out for choices, for claims, those trained on, or all."""


def check_control(control: Control | None, capacity: int, num_documents: int) -> None:
    """Refuse a control that has nothing to take otherwise.

    Raises:
        ConfigError: with what it needs.
    """
    if control in ("other_document", "shuffled") and not capacity:
        raise ConfigError(f"control {control!r} needs a memory; give a capacity above 0")
    if control == "other_document" and num_documents < 2:
        raise ConfigError(
            f"control 'other_document' needs at least two documents, and there is {num_documents}; "
            "give more, or leave the control out"
        )


def check_capacity(capacity: int, num_neighbors: int, name: str = "capacity") -> None:
    """Refuse a capacity that a query could never fill: from 1 to num_neighbors - 1.

    Raises:
        ConfigError: with the capacity seen, under the name given.
    """
    require(
        capacity == 0 or capacity >= num_neighbors,
        name,
        capacity,
        f"0 (no memory), or at least num_neighbors = {num_neighbors}",
    )


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: trained on the training documents, or an existing one."""

    kind: Literal["bpe", "unigram", "pretrained"] = "bpe"
    """Byte-level BPE, SentencePiece-style Unigram with byte fallback, or one that exists."""
    vocab_size: int = 32_000
    path: str = ""
    """For `pretrained`: a tokenizer.json, a folder that holds one, or a hub name."""
    sample_mib: Positive = 64
    """The tokenizer is trained on at most this much text, taken evenly from the documents."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_types(self, "tokenizer")
        allowed = "300 or more (256 bytes and specials)"
        require(self.vocab_size >= 300, "tokenizer.vocab_size", self.vocab_size, allowed)
        require(
            (self.kind == "pretrained") == bool(self.path),
            "tokenizer.path",
            self.path,
            "a name or path with kind = 'pretrained', empty otherwise",
        )


@dataclass(frozen=True)
class DataConfig:
    """Which documents are read, and which are held out."""

    corpus: str = "python:stdlib"
    """A corpus, as in `memorizing info corpora`: `python:stdlib,torch`,
    `subpackages:transformers.models`, `files:PATH`, `repositories:PATH`, `jsonl:PATH`,
    `parquet:PATH`, and the paper's: `pg19`, `c4`, `arxiv`, `github:PATH`, `isabelle:PATH`."""
    max_documents: Count = 0
    """Reading stops after this many documents of the corpus; 0 reads them all."""
    folders_per_document: Positive = 1
    """`subpackages:`, `repositories:`, `github:`: how many folders are joined into one document."""
    text_column: str = "text"
    max_document_tokens: Count = 0
    """Longer documents are cut into documents of at most this many tokens; 0 leaves them whole."""
    min_document_tokens: Count = 0
    """Shorter documents are left out."""
    validation: tuple[str, ...] = ()
    """Names (shell patterns) of held-out documents for every choice made while developing."""
    test: tuple[str, ...] = ()
    """Names (shell patterns) of held-out documents on which each claim is measured once."""
    exclude: tuple[str, ...] = ()
    """Names (shell patterns) of documents that are not read at all, such as those that repeat text
    that is held out."""
    held_out_share: ShareBelowOne = 0.0
    """Where no names are given: this share of documents, by a stable hash of the name, is held out,
    half for validation and half for test."""
    seed: Seed = 0
    """Order of files in repositories; documents in training follow `training.seed`."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_types(self, "data")
        allowed = "a corpus such as 'python:stdlib' or 'files:PATH'"
        require(bool(self.corpus), "data.corpus", self.corpus, allowed)


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained."""

    start_from: str = ""
    """A run, checkpoint or model folder: training begins with its weights and tokenizer, such as to
    finetune to a larger memory, or to give a memory to a model trained without."""
    steps: Positive = 1000
    rows: Positive = 8
    """Documents read side by side: the batch. A step reads rows x segment_len tokens."""
    accumulation: Positive = 1
    """A step's rows go through the model in this many parts, one after another, to save memory."""
    optimizer: Literal["adafactor", "adamw", "muon"] = "adamw"
    """`muon` is Muon for the matrices of the blocks and AdamW for the rest."""
    learning_rate: AboveZero = 1e-3
    embedding_learning_rate: NotNegative = 0.0
    """AdamW and Muon: rate of the embedding; 0 means learning_rate."""
    vector_learning_rate: NotNegative = 0.0
    """AdamW and Muon: rate of norms, position bias and smears; 0 means learning_rate."""
    gate_learning_rate: NotNegative = 1e-2
    """Rate of gates and scales: a group of their own, by AdamW, without weight decay."""
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant"] = "cosine"
    """After warm-up. `inverse_sqrt` is the paper's: lr * min(n / w, 1) / sqrt(max(n, w))."""
    warmup_steps: Count = 100
    final_share: Share = 0.1
    """`cosine` and `linear` end at this share of the rate."""
    weight_decay: NotNegative = 0.0
    clip_norm: NotNegative = 1.0
    """Gradient norm is clipped to this; 0 turns clipping off."""
    memory_start_step: Count = 0
    """Before this step the memory is closed: a cache-only phase."""
    memory_closed_share: Share = 0.0
    """Share of segments, drawn per row, whose memory is closed."""
    restart_share: Share = 0.0
    """Share of segments, drawn per row, that a model with memory reads as if a document began with
    them: it sees neither its memory nor what local attention saw before."""
    crossbatch_segments: Count = 0
    """Crossbatch (FoT): a step reads this many segments more, and the memory layer sees the keys
    and values of those before with gradient. 0 is the paper's objective."""
    crossbatch_rows: int = 2
    """Crossbatch: rows whose earlier segments a row sees: its own, and the others as negatives.
    With accumulation only its own."""
    crossbatch_share: Share = 0.9
    """Share of the steps, from the first, with crossbatch; those after have the paper's
    objective."""
    seed: Seed = 0
    """Initialization, order of documents, dropout."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` asks a short probe of this machine."""
    gradient_checkpointing: bool = False
    shard: bool = False
    """Of several processes each keeps a part of every matrix, its gradient and optimizer state
    (FSDP2), for models that do not fit into one; in one process nothing changes."""
    log_every: Positive = 10
    evaluate_every: Count = 0
    """Steps between evaluations on the validation documents; 0 is never."""
    evaluate_tokens: Positive = 65_536
    checkpoint_every: Count = 500
    """Steps between checkpoints; the last step always has one. 0 is only the last."""
    keep_checkpoints: Positive = 2
    """How many of the latest checkpoints are kept; the best by validation is kept besides."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_types(self, "training")
        require(
            self.rows % self.accumulation == 0,
            "training.accumulation",
            self.accumulation,
            f"a divisor of training.rows = {self.rows}",
        )
        part = self.rows // self.accumulation
        # Rows that are read one after the other cannot see one another: it would be other training.
        require(
            1 <= self.crossbatch_rows <= (part if self.accumulation == 1 else 1)
            or not self.crossbatch_segments,
            "training.crossbatch_rows",
            self.crossbatch_rows,
            f"from 1 to the rows that are read at once, {part}; 1 with training.accumulation > 1",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """What `memorizing evaluate` measures."""

    capacities: tuple[int, ...] = (0, 512, 2048, 8192, 65_536)
    rows: Positive = 8
    """Documents evaluated side by side. A document's loss does not depend on it."""
    max_tokens_per_document: Count = 0
    """Only the first tokens of every document are read; 0 reads them whole."""
    controls: tuple[Control, ...] = ()
    """Diagnostics at the largest capacity."""
    spread_memory: bool = False
    """Of several processes all read every document, and each holds a part of its memory, for
    memories that do not fit into one; otherwise documents are dealt among them."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        check_types(self, "evaluation")
        for capacity in self.capacities:
            require(capacity >= 0, "evaluation.capacities", capacity, "0 or more")


@dataclass(frozen=True)
class Config:
    """A whole run: what a recipe file holds."""

    name: str = "custom"
    description: str = ""
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        """Check what concerns two tables at once."""
        for capacity in self.evaluation.capacities:
            check_capacity(capacity, self.model.num_neighbors, "evaluation.capacities")
        require(
            self.model.has_memory or not self.training.crossbatch_segments,
            "training.crossbatch_segments",
            self.training.crossbatch_segments,
            "0 for a model without memory (model.capacity and model.memory_layers)",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries, tuples as lists: what TOML and JSON hold."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def to_toml(self) -> str:
        """The configuration as a complete TOML file.

        `Config.from_dict(tomllib.loads(text))` reads it back.
        """
        lines: list[str] = []
        tables: list[str] = []
        for key, value in self.to_dict().items():
            if isinstance(value, dict):
                tables.append(f"\n[{key}]")
                tables.extend(f"{k} = {format_value(v)}" for k, v in value.items())
            else:
                lines.append(f"{key} = {format_value(value)}")
        return "\n".join([*lines, *tables]) + "\n"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Build a configuration from nested dictionaries.

        Raises:
            ConfigError: unknown key (with the nearest known one), wrong type, or out of range.
        """
        return build_dataclass(cls, values)

    def replace(self, settings: Sequence[str]) -> Config:
        """A copy with `table.key=value` settings applied (`--set` on the command line).

        Values are written as in TOML; quotes around a string, and brackets around a list, may be
        left out.

        Raises:
            ConfigError: no `=`, an unknown key, or a value of the wrong type or out of range.
        """
        values = self.to_dict()
        for setting in settings:
            key, separator, text = setting.partition("=")
            key = key.strip()
            if not separator:
                example = "table.key=value, such as model.num_layers=4"
                raise ConfigError(f"setting {setting!r} has no '='; write it as {example}")
            if key not in known_keys():
                raise ConfigError(describe_unknown("key", key, known_keys()))
            table, _, last = key.rpartition(".")
            (values[table] if table else values)[last] = parse_value(text)
        return Config.from_dict(values)


def known_keys() -> list[str]:
    """Every setting as `table.key`."""
    return list(list_keys(Config))


def list_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    files = resources.files("memorizing.recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_config(recipe: str | Path) -> Config:
    """Read a recipe by its name, or a TOML file by its path.

    Raises:
        ConfigError: no such recipe (with the nearest name) or file, a file that is not TOML, or
            settings that are not allowed.
    """
    path = Path(recipe)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(
                f"cannot read recipe file {str(path)!r}: {reason}; give a TOML file or the name of "
                "a recipe: " + ", ".join(list_recipes())
            ) from error
    elif str(recipe) in list_recipes():
        file = resources.files("memorizing.recipes") / f"{recipe}.toml"
        text = file.read_text(encoding="utf-8")
    else:
        raise ConfigError(describe_unknown("recipe", str(recipe), list_recipes()))
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"recipe {str(recipe)!r} is not valid TOML: {error}") from error
    return Config.from_dict({"name": path.stem, **values})
