"""Our own model as a `PreTrainedModel`: loading, saving, calls and generation.

Importing this module makes it known to `AutoConfig`, `AutoModelForCausalLM` and `AutoTokenizer`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from memorizing.errors import CheckpointError, ConfigError, StateError
from memorizing.huggingface.generating import (
    check_generation,
    check_mode,
    refuse_batching,
    refuse_code,
)
from memorizing.huggingface.own_model.cache import MemorizingCache
from memorizing.huggingface.own_model.config import (
    MemorizingTokenizer,
    MemorizingTransformerConfig,
)
from memorizing.huggingface.own_model.inputs import (
    check_inputs,
    choose_cache,
    choose_columns,
    compute_loss,
    find_valid,
    read_columns,
    refuse_unknown,
)
from memorizing.huggingface.releases import CACHE_NAME
from memorizing.model import MemorizingTransformer
from memorizing.model.block import is_of_memory
from memorizing.model.pointer import Pointer

_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MANIFEST = "manifest.json"


class MemorizingTransformerForCausalLM(PreTrainedModel, GenerationMixin):
    """`MemorizingTransformer` with the interface of `transformers`.

    Weights are fp32; `dtype`, as in `from_pretrained(path, dtype="bfloat16")`, or autocast is the
    dtype of activations and matrix products. One matrix embeds tokens and gives logits.

    The history is a `MemorizingCache`. A call may be of any length: it is read segment by segment,
    and what was read enters the memory on its clock, generated tokens too. Where `attention_mask`
    is 0 a token is skipped: neither seen, nor counted, nor remembered.
    """

    config: MemorizingTransformerConfig
    config_class = MemorizingTransformerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _is_stateful = True
    _no_split_modules = ["MemorizingTransformer"]
    _keep_in_fp32_modules_strict = {"model"}

    def __init__(self, config: MemorizingTransformerConfig) -> None:
        """Make a model with random weights.

        Raises:
            ConfigError: settings that cannot work, or a dtype that nothing is computed in.
        """
        super().__init__(config)
        dtype = torch.float32 if config.dtype is None else config.dtype
        if dtype not in _COMPUTE_DTYPES:
            raise ConfigError(
                f"dtype is {dtype}; allowed: float32, bfloat16 or float16, which activations are "
                "computed in (weights stay float32)"
            )
        self._compute_dtype = dtype
        self.model = MemorizingTransformer(config.to_model_config()).float()
        if not self.model.embedding.weight.is_meta:
            for module in self.model.modules():  # They begin as they should.
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()

    @classmethod
    def from_model(cls, model: MemorizingTransformer) -> MemorizingTransformerForCausalLM:
        """Wrap a model that exists, such as `load_model(run).model`; weights are shared."""
        with torch.device("meta"):
            made = cls(MemorizingTransformerConfig.from_model_config(model.config))
        made.model = model
        made._compute_dtype = model.compute_dtype
        return made.train(model.training)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a folder that `save_pretrained` or our training wrote, or one on the hub.

        Args:
            args: as `PreTrainedModel.from_pretrained` takes them.
            kwargs: likewise, and settings: `from_pretrained(path, capacity=65_536)`.

        Raises:
            CheckpointError: a weight is missing, or is of another attention than the paper's.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        found: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = found
        # Gates may be left over: those of a model that is loaded to combine in another way.
        others = [name for name in info["unexpected_keys"] if not is_of_memory(name)]
        if others:
            raise CheckpointError(
                f"the checkpoint holds {min(others)!r}, which this model does not have: it was "
                "trained with another attention; load it by memorizing.load_model with the "
                "make_model that it was trained with, and wrap it by from_model"
            )
        for layer in () if model.config.memory_layer_bias else model.config.memory_layers:
            # What is loaded takes gradients; a bias that is not used stays 0.
            bias = model.get_submodule(f"model.blocks.{layer}.attention.position_bias")
            bias.requires_grad_(False)
        return (model, info) if wants_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start rows for new tokens, and what a checkpoint of a model without memory lacks.

        `transformers` calls it for modules with a weight that was not loaded.

        Raises:
            CheckpointError: anything else is missing.
        """
        if isinstance(module, nn.Embedding) and module is not self.model.embedding:
            nn.init.normal_(module.weight)
            return
        if isinstance(module, Pointer):
            module.start()
            return
        for name, parameter in module.named_parameters(recurse=False):
            if getattr(parameter, "_is_hf_initialized", False):
                continue
            if not is_of_memory(name):
                raise CheckpointError(
                    f"the checkpoint lacks {name!r} of {type(module).__name__}; use the "
                    "configuration in its config.json, or another checkpoint"
                )
            parameter.fill_(self.config.gate_bias_init if name == "gate_bias" else 0.0)

    def get_input_embeddings(self) -> nn.Module:
        """The matrix that embeds tokens and gives logits."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the matrix, as `resize_token_embeddings` does."""
        assert isinstance(value, nn.Embedding)
        self.model.embedding = value
        self.model.config = replace(self.model.config, vocab_size=value.num_embeddings)

    def get_output_embeddings(self) -> None:
        """None: there is no second matrix."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a folder that `from_pretrained` and our own `load_model` read.

        Weights have the names of our checkpoints, without a prefix. The manifest of a checkpoint
        that is overwritten is removed: it describes other files.

        Args:
            save_directory: made where it is missing.
            args: as `PreTrainedModel.save_pretrained` takes them.
            state_dict: weights by name; None takes the model's.
            kwargs: as `PreTrainedModel.save_pretrained` takes them.
        """
        tensors = self.state_dict() if state_dict is None else state_dict
        prefix = f"{self.base_model_prefix}."
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        super().save_pretrained(save_directory, *args, state_dict=tensors, **kwargs)
        (Path(save_directory) / _MANIFEST).unlink(missing_ok=True)

    def init_cache(
        self, num_rows: int, capacity: int | None = None, index: str | None = None
    ) -> MemorizingCache:
        """An empty history for `num_rows` documents side by side.

        Args:
            num_rows: rows of the batch.
            capacity: entries per row of each memory; None takes the configuration's, 0 turns the
                memory off.
            index: what searches the memories; None takes the configuration's.

        Raises:
            ConfigError: a capacity between 1 and num_neighbors - 1, or an index that is not known.
            IndexUnavailableError: the index needs a package that is not installed.
        """
        self._choose_compute_dtype()
        capacity = self.config.capacity if capacity is None else capacity
        index = self.config.index if index is None else index
        return MemorizingCache(self.model.init_state(num_rows, capacity, index=index))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MemorizingCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        cache: MemorizingCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Read tokens; without a history, as the first of their documents.

        Several segments may be read with gradient; as in our own training none flows into what a
        segment retrieves or has in its cache from before. The history that such a call returns may
        be passed on after `backward`.

        Args:
            input_ids: (B, T) int64. A document begins with the start token, which the tokenizer
                adds.
            attention_mask: (B, T), or over all columns since the documents began; 0 is padding,
                wherever it stands.
            past_key_values: what a call returned, or `init_cache` made. Changed in place.
            labels: (B, T) int64: targets, shifted here, so that they may be `input_ids`. The first
                column, padding and -100 do not count.
            use_cache: whether a new history is returned; None is `config.use_cache` without
                gradient, and False with it. One that is passed is returned in any case.
            logits_to_keep: logits of the last so many columns, 0 for all, or of these columns.
            num_items_in_batch: what the loss is divided by; None is the number of targets.
            return_dict: False returns a tuple.
            cache: what `transformers` calls `past_key_values` since 5.24; either name will do.
            others: other inputs that `transformers` has, which are refused.

        Returns:
            `loss` in nats per target, where there are labels; `logits` (B, K, vocab_size), 0 on
            padding; `past_key_values`, which is called `cache` since transformers 5.24.

        Raises:
            ConfigError: inputs that this model does not know, or that do not fit together.
            StateError: a history of another kind, number of rows or precision, or a void one.
        """
        refuse_unknown(others)
        tokens = _check_tokens(input_ids, labels)
        if torch.is_grad_enabled():
            self._check_layers()
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        given = choose_cache({"past_key_values": past_key_values, "cache": cache})
        is_returned = use_cache or given is not None
        cache = self._take_cache(given, *tokens.shape, is_returned=is_returned)
        valid = find_valid(attention_mask, tokens, cache.get_seq_length())
        is_kept, order = choose_columns(tokens.shape[1], logits_to_keep)
        needed = is_kept if labels is None else torch.ones_like(is_kept)
        loss = None
        with torch.autocast(tokens.device.type, enabled=False):
            logits, state = read_columns(self.model, tokens, valid, cache.state, needed)
            if labels is not None:
                loss = compute_loss(logits, labels, valid, num_items_in_batch)
        cache.advance(state, tokens)
        if not torch.equal(needed, is_kept):
            logits = logits[:, is_kept]
        if order is not None:
            logits = logits[:, order]
        history: dict[str, Any] = {CACHE_NAME: cache if is_returned else None}
        output = CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,  # type: ignore[arg-type]
            **history,
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, **kwargs: Any
    ) -> Any:
        """Continue prompts as `GenerationMixin.generate` does: greedy or sampling, streamed or not.

        Prompts may be longer than the window; a batch is padded on the left and needs its
        `attention_mask`. With `return_dict_in_generate=True` the history is in `past_key_values`
        (`cache` since transformers 5.24): pass it again with the whole conversation as `input_ids`,
        and only what is new is read.

        Raises:
            ConfigError: beam search and what else takes tokens back, a cache of another kind,
                `inputs_embeds`, padding on the right.
            StateError: a history that `input_ids` do not go on from.
        """
        cache = choose_cache(kwargs)
        settings, inputs_by_name = self._prepare_generation_config(  # type: ignore[attr-defined]
            generation_config, **kwargs
        )
        check_generation(settings, cache)
        check_mode(settings.get_generation_mode(kwargs.get("assistant_model")))
        flags = ("output_attentions", "output_hidden_states")
        refuse_unknown({name: getattr(settings, name) for name in flags})
        refuse_unknown({"inputs_embeds": kwargs.get("inputs_embeds")})
        tokens = inputs_by_name.get("input_ids") if inputs is None else inputs
        if tokens is not None:
            check_inputs(tokens, inputs_by_name.get("attention_mask"), cache, settings)
        if cache is None and settings.use_cache:
            num_prompts = 1 if tokens is None else len(tokens)
            num_rows = num_prompts * (settings.num_return_sequences or 1)
            cache = self.init_cache(num_rows)
        return super().generate(  # type: ignore[attr-defined]
            inputs, generation_config=generation_config, **kwargs, **{CACHE_NAME: cache}
        )

    def _prepare_attention_mask_for_generation(self, inputs_tensor: Tensor, *_: Any) -> Tensor:
        # The padding token is the start token, where no other is set: only a mask tells them apart.
        return torch.ones_like(inputs_tensor)

    load_custom_generate = staticmethod(refuse_code)  # type: ignore[assignment]
    init_continuous_batching = staticmethod(refuse_batching)

    def _choose_compute_dtype(self) -> None:
        device_type = self.model.embedding.weight.device.type
        self.model.compute_dtype = (
            torch.get_autocast_dtype(device_type)
            if torch.is_autocast_enabled(device_type)
            else self._compute_dtype
        )

    def _take_cache(
        self, cache: MemorizingCache | None, num_rows: int, num_columns: int, *, is_returned: bool
    ) -> MemorizingCache:
        if cache is None:
            capacity = self.config.capacity
            if not is_returned:  # Slots that this call cannot fill would only be copied.
                capacity = min(capacity, max(num_columns, self.config.num_neighbors))
            return self.init_cache(num_rows, capacity)
        if cache.batch_size != num_rows:
            raise StateError(
                f"{CACHE_NAME} has {cache.batch_size} rows and input_ids {num_rows}; choose or "
                "repeat rows with cache.batch_select_indices or batch_repeat_interleave"
            )
        self._choose_compute_dtype()
        dtype = cache.state.xl_caches[0].keys.dtype
        if dtype != self.model.compute_dtype:
            raise StateError(
                f"{CACHE_NAME} is of {dtype} and this call of {self.model.compute_dtype}; read "
                "a whole document in one precision, inside autocast or outside"
            )
        return cache

    def _check_layers(self) -> None:
        """Refuse adapters: weights are used without calling their layers, which would be ignored.

        Raises:
            ConfigError: a layer was replaced.
        """
        for name, module in self.model.named_modules():
            kind = nn.Embedding if name == "embedding" else nn.Linear
            if name.rpartition(".")[2] in _BARE_LAYERS and not isinstance(module, kind):
                raise ConfigError(
                    f"{name} was replaced by a {type(module).__module__}.{type(module).__name__}; "
                    "adapters on this model have no effect: train its own weights"
                )


_BARE_LAYERS = {"embedding", "query", "key", "value", "output", "expand", "contract"}


def _check_tokens(tokens: Tensor | None, labels: Tensor | None) -> Tensor:
    if tokens is None or tokens.dim() != 2 or not tokens.numel():
        seen = "None" if tokens is None else tuple(tokens.shape)
        raise ConfigError(f"input_ids is {seen}; give token ids (rows, columns), at least one")
    if labels is not None and labels.shape != tokens.shape:
        raise ConfigError(
            f"labels is {tuple(labels.shape)}; it must be as large as input_ids, "
            f"{tuple(tokens.shape)}"
        )
    return tokens


AutoConfig.register(MemorizingTransformerConfig.model_type, MemorizingTransformerConfig)
# The type that our first checkpoints have in their config.json.
CONFIG_MAPPING.register("memorizing", MemorizingTransformerConfig)
AutoModelForCausalLM.register(MemorizingTransformerConfig, MemorizingTransformerForCausalLM)
AutoTokenizer.register(MemorizingTransformerConfig, fast_tokenizer_class=MemorizingTokenizer)
