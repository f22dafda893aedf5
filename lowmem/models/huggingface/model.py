"""A decoder of transformers as a model of blocks: the library's own modules, on meta until weights come.

The model without its layers is run for the way in. In the place of each layer stands a recorder, which hands
the residual stream on and keeps what the layer would have been called with: masks and tables of positions.
The real layers are then run with that, one after the other or one at a time. The last norm and the head are
the library's as well.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.errors import ConfigError
from lowmem.models.base import BlockModel, GivenWeights, Packed
from lowmem.models.huggingface.families import Family
from lowmem.models.huggingface.quantised import SCALES, FrozenLinear, whole, with_bitsandbytes
from lowmem.models.huggingface.tables import Table, product
from lowmem.objectives.base import Batch
from lowmem.objectives.block_tokens import BlockTokens
from lowmem.objectives.next_tokens import Call, NextTokens
from lowmem.recipe import AdapterConfig, NoiseConfig, Quantised

LISTED = ("full_attention", "sliding_attention")  # the library's names for the kinds of layers


# Below it a row of the table is not stretched to length 1: its gradient would outgrow all others.
LEAST_LENGTH = 0.01
RESET, ADAPTER = "reset_lora_parameters", "default"  # peft's names


class Recorder(nn.Module):
    """Stands for a layer on the way in."""

    call: Call

    def forward(self, h: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        self.call = Call(arguments, keywords)
        return h

    def take(self) -> Call:
        call = self.call
        del self.call  # its tensors must not live on
        return call


class MadeAnew(nn.Module):
    """A module that holds tables alone. It is made at every call, on the device of its input.

    So the model has no buffers, which would neither stream nor be counted.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self._make = make

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Any:
        with torch.device(x.device):
            module = self._make()
        return module(x, *arguments, **keywords)


class Constant:
    """A number in the place of a buffer that holds one: the library asks it for a tensor of a dtype."""

    def __init__(self, value: float) -> None:
        self._value = value

    def to(self, dtype: torch.dtype) -> Tensor:
        return torch.tensor(self._value).to(dtype)


class HuggingfaceLm(BlockModel):
    given: GivenWeights | None = None  # that it begins with; None: drawn as the library draws them
    whole = True  # trained end to end, and not in blocks that are trained alone

    def __init__(self, family: Family, config: Any, seq_len: int, head_chunk: int, packs: bool) -> None:
        """`packs`: rows hold several documents."""
        super().__init__()
        self.family, self.config, self.seq_len, self.head_chunk = family, config, seq_len, head_chunk
        self.packs = packs
        self.quantised: dict[str, FrozenLinear] = {}  # by name
        with importlib.import_module("transformers.initialization").no_init_weights():
            whole = family.model_class()(config)
        self.body = getattr(whole, family.body)
        self.layers = getattr(self.body, family.layers)
        setattr(self.body, family.layers, nn.ModuleList(Recorder() for _ in self.layers))
        self.norm = getattr(self.body, family.norm)
        setattr(self.body, family.norm, nn.Identity())
        self.head = None if config.tie_word_embeddings else whole.lm_head
        self.layers_alike = family.windows != "listed" or len(set(config.layer_types)) == 1
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.peft_config: Any = None  # of an adapter
        self._trained: list[str] = []  # modules, where only some are trained
        self._frozen_layers = len(self.layers)
        self._place = {id(layer): index for index, layer in enumerate(self.layers)}
        self._without_buffers()
        self.body.set_input_embeddings(Table(self.body.get_input_embeddings()))

    def _without_buffers(self) -> None:
        config = self.config
        for module in list(self.body.modules()):
            for name, child in list(module.named_children()):
                tables, weights = len(list(child.buffers())), len(list(child.parameters()))
                if tables and not weights:
                    made: Any = type(child)
                    setattr(module, name, MadeAnew(partial(made, config=config)))
            if "embed_scale" in module._buffers:
                del module._buffers["embed_scale"]
                module.embed_scale = Constant(module.scalar_embed_scale)

    # --------------------------------------------------------------------------------------------------------
    # Adapters

    def adapt(self, config: AdapterConfig) -> None:
        """Puts peft's own modules in the place of those that the adapter's targets name.

        Raises ConfigError where they name none.
        """
        library = with_bitsandbytes("peft")
        wanted = config.targets
        if wanted == "auto":
            found = (name for name, module in self.layers.named_modules() if _is_linear(module))
            wanted = sorted({name.rpartition(".")[2] for name in found})
        self.peft_config = library.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            target_modules=wanted,
            lora_dropout=config.dropout,
            fan_in_fan_out=self.family.transposed,
            task_type="CAUSAL_LM",
        )
        try:
            library.inject_adapter_in_model(self.peft_config, self.layers)
        except ValueError:
            names = sorted({n.rpartition(".")[2] for n, m in self.layers.named_modules() if _is_linear(m)})
            raise ConfigError(
                f"adapter.targets: found {', '.join(wanted)}; allowed: ends of names of linear modules, "
                f"such as {', '.join(names)}; name some of these"
            ) from None
        self.adapted = True
        if config.base == "int8" or config.base == "nf4":
            self._quantise(config.base)

    def _quantise(self, kind: Quantised) -> None:
        """Puts layers that keep their weights in few bits in the place of all linear ones."""
        linear = [
            (name, m) for name, m in self.named_modules() if name.startswith("layers.") and _is_linear(m)
        ]
        for name, module in linear:
            if not self.is_adapter(f"{name}."):
                owner, _, leaf = name.rpartition(".")
                self.quantised[name] = FrozenLinear(kind, module)
                setattr(self.get_submodule(owner), leaf, self.quantised[name])

    def packed(self, name: str) -> Packed | None:
        owner, _, leaf = name.rpartition(".")
        return self.quantised[owner].packed.get(leaf) if owner in self.quantised else None

    def train_only(self, last_layers: int) -> None:
        """Freezes all but the last layers, the last norm and the head, with the table that is tied to it."""
        self.adapted, self.layers_alike = True, False
        self._frozen_layers = len(self.layers) - last_layers
        trained = [f"layers.{index}" for index in range(self._frozen_layers, len(self.layers))]
        if self.head is None:
            table = self.body.get_input_embeddings()
            self._trained = [next(name for name, module in self.named_modules() if module is table)]
        else:
            self._trained, self.first_trained = ["head"], self._frozen_layers
        self._trained += ["norm", *trained]

    def is_adapter(self, name: str) -> bool:
        if self.peft_config is not None:
            return ".lora_" in name
        return self.adapted and any(name.startswith(f"{owner}.") for owner in self._trained)

    def drawn_modules(self) -> list[tuple[str, nn.Module]]:
        if not self.adapted:
            return super().drawn_modules()
        if self.peft_config is None:
            return [(name, self.get_submodule(name)) for name in self._trained]
        return [(name, module) for name, module in self.named_modules() if hasattr(module, RESET)]

    @property
    def most_blocks(self) -> int:
        return self._frozen_layers

    def block_slices(self, num_blocks: int) -> list[range]:
        """Trained layers stand in the last block, which holds nothing of them, where others are frozen."""
        found = super().block_slices(num_blocks)
        return [*found[:-1], range(found[-1].start, len(self.layers))]

    # --------------------------------------------------------------------------------------------------------
    # First weights

    def has_first_weights(self, module: nn.Module) -> bool:
        return True

    def draw_weights(self, module: nn.Module) -> None:
        reset: Any = getattr(module, RESET, None)
        if reset is not None:
            reset(ADAPTER, True)  # of an adapter's two matrices the second one begins at zero
        else:
            self.body._init_weights(module)

    def given_weights(self) -> GivenWeights | None:
        return self.given

    def file_names(self) -> dict[str, str]:
        """The names that the library's own files have for the parameters, by the names of here."""
        family, names = self.family, {}
        starts = {
            "layers.": f"{family.body}.{family.layers}.",
            "norm.": f"{family.body}.{family.norm}.",
            "body.": f"{family.body}.",
            "head.": "lm_head.",
        }
        for name, _ in self.named_parameters():
            packed = self.packed(name)
            if ".lora_" in name or (packed is not None and not packed.numel):
                continue
            start = next(start for start in starts if name.startswith(start))
            names[name] = starts[start] + name[len(start) :].replace(".base_layer.", ".")
        return names

    def whole_weights(self, views: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Frozen parameters without scales: weights that are quantised are made whole again, in `dtype`."""
        out = {}
        for name, view in views.items():
            owner, _, leaf = name.rpartition(".")
            layer = self.quantised.get(owner)
            if layer is None or leaf not in layer.packed:
                out[name] = view
            elif layer.packed[leaf].numel:
                weight = whole(layer.kind, view, views[f"{owner}.{SCALES}"], layer.shape, dtype)
                out[name] = weight.T.contiguous() if layer.transposed else weight
        return out

    # --------------------------------------------------------------------------------------------------------
    # Passes

    def make_objective(self, noise: NoiseConfig) -> NextTokens:
        return (NextTokens if self.whole else BlockTokens)(self, noise, self.head_chunk)

    def target_table(self) -> Tensor:
        """[V, D] in fp32, rows of length 1. A row that begins at zero (padding) is short at first."""
        return F.normalize(self.body.get_input_embeddings().weight.float(), dim=-1, eps=LEAST_LENGTH)

    def example_batch(self, batch_size: int) -> Batch:
        tokens = torch.zeros(batch_size, self.seq_len, dtype=torch.long)
        batch = {"tokens": tokens, "labels": tokens.clone(), "share": torch.ones(batch_size)}
        if self.packs:
            batch.update(documents=tokens.clone(), positions=tokens.clone())
        return batch

    def make_cache(self) -> Any:
        """An empty cache of keys and values, of all layers."""
        return importlib.import_module("transformers.cache_utils").DynamicCache(config=self.config)

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        config = self.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * len(self.layers) * heads * dim * dtype.itemsize)

    def way_in(self, batch: Batch, cache: Any = None) -> tuple[Tensor, tuple[Call, ...]]:
        """A batch may hold `documents` and `positions` [B, T]: which document a token is of, and where in it.

        Attention stays within a document. `cache`: see `make_cache`; then the first call brings all tokens so
        far, and each later one the next token, and the layers keep what they need of it.
        """
        # The library's models take a mask of four dimensions as it is. These two stand for the masks, which
        # are made below: with none given, it would look at the positions for borders of documents.
        full, window = torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1, 1)
        mask: Any = dict(zip(LISTED, (full, window), strict=True))
        if self.family.windows != "listed":
            mask = window if self.family.windows == "all" and self.config.sliding_window else full
        out = self.body(
            input_ids=batch["tokens"],
            attention_mask=mask,
            position_ids=batch.get("positions"),
            use_cache=False,
            **({} if cache is None else {"cache": cache}),
        )
        h = out.last_hidden_state
        calls = [recorder.take() for recorder in getattr(self.body, self.family.layers)]
        alone = cache is not None and h.shape[1] == 1  # the next token sees all that the cache holds
        masks = {
            id(m): None if alone else self._mask(h, batch.get("documents"), m is window)
            for m in _used(calls, full, window)
        }

        def put(value: Any) -> Any:
            return masks.get(id(value), value)

        return h, tuple(
            Call(tuple(map(put, call.arguments)), {name: put(v) for name, v in call.keywords.items()})
            for call in calls
        )

    def _mask(self, h: Tensor, documents: Tensor | None, window: bool) -> Tensor | None:
        """What the library's attention takes: None where a kernel's own causal flag says all."""
        library = importlib.import_module("transformers.masking_utils")
        size = self.config.sliding_window if window else None
        mask_function = library.causal_mask_function
        if size is not None:
            mask_function = library.sliding_window_causal_mask_function(size)
        if documents is not None:
            within = library.packed_sequence_mask_function(documents)
            mask_function = library.and_masks(mask_function, within)
        made: Tensor | None = library.ALL_MASK_ATTENTION_FUNCTIONS[self.family.attention](
            batch_size=len(h),
            q_length=h.shape[1],
            kv_length=h.shape[1],
            q_offset=0,
            kv_offset=0,
            mask_function=mask_function,
            attention_mask=None,
            local_size=size,
            allow_is_causal_skip=documents is None,
            dtype=h.dtype,
            config=self.config,
            use_vmap=False,
            device=h.device,
        )
        return made

    def index_of(self, layer: nn.Module) -> int:
        return self._place[id(layer)]

    def input_part(self, batch: Batch, noisy: Tensor | None, c_noise: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("see way_in: a layer's call holds more than a condition")

    def output_part(self, h: Tensor, cond: Tensor) -> Tensor:
        """Features [B, T, D] before the head."""
        return torch.as_tensor(self.norm(h))

    def logits(self, features: Tensor) -> Tensor:
        if self.head is None or self.head.bias is None:
            logits = product(features, (self.head or self.body.get_input_embeddings()).weight)
        else:
            logits = self.head(features)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _used(calls: list[Call], *markers: Tensor) -> list[Tensor]:
    """Those of the markers that some layer was called with."""
    given = {id(value) for call in calls for value in (*call.arguments, *call.keywords.values())}
    return [marker for marker in markers if id(marker) in given]
