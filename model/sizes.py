"""How large a mixture-of-experts model is, counted from its config.json. Plain Python: no weights, no vLLM, no torch.

Counts follow the tensors of the released checkpoints (Transformers' modelling code of each family; xai-org/grok-1
model.py and SGLang srt/models/grok.py for Grok). Vision towers and multi-token-prediction heads are not counted.

Letters: D hidden size, F width of a feed-forward, H heads, K key-value heads, C head dimension, E experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import CheckpointError
from model.grok_spec import is_grok, parse_spec

Matrix = tuple[int, int]  # outputs, inputs

PRECISIONS = ("bf16", "int8", "int4")
INT4_GROUP = 128
# The rest of a worker's memory is for activations, the kernels' workspace and the process itself.
USABLE_SHARE = 0.9

_BF16_BYTES = 2


@dataclass(frozen=True)
class ModelSizes:
    """Counts of one model. Layers, experts and parameters are counts, not bytes.

    expert_matrices: the weights of one routed expert; expert_biases: its biases, in parameters.
    dense_params: everything that is no routed expert, embeddings included; embedding_params: the input table.
    kv_values: numbers in the KV cache for one token, over all layers, as if no layer had a window.
    kv_parts: among how many ranks of an engine the KV cache divides; more ranks hold copies.
    """

    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    expert_matrices: tuple[Matrix, ...]
    expert_biases: int
    dense_params: int
    embedding_params: int
    kv_values: int
    kv_parts: int

    @property
    def expert_params(self) -> int:
        """Of one routed expert of one layer."""
        return sum(rows * columns for rows, columns in self.expert_matrices) + self.expert_biases

    @property
    def total_params(self) -> int:
        return self.dense_params + self.num_moe_layers * self.num_experts * self.expert_params

    @property
    def active_params(self) -> int:
        """What one token is computed with: top_k experts per layer and everything dense, the embeddings included."""
        return self.dense_params + self.num_moe_layers * self.top_k * self.expert_params

    @property
    def dense_bytes(self) -> int:
        """What an engine holds, in bf16."""
        return self.dense_params * _BF16_BYTES

    @property
    def kv_bytes_per_token(self) -> int:
        """Of a bf16 KV cache."""
        return self.kv_values * _BF16_BYTES

    def expert_bytes(self, precision: str) -> int:
        """One expert of one layer. int8: a bf16 scale for each output; int4: one for each 128 inputs of an output."""
        weights = sum(_matrix_bytes(rows, columns, precision) for rows, columns in self.expert_matrices)
        return weights + self.expert_biases * _BF16_BYTES

    def layer_expert_bytes(self, precision: str) -> int:
        """All experts of one layer."""
        return self.num_experts * self.expert_bytes(precision)

    def all_expert_bytes(self, precision: str) -> int:
        """All experts of all layers: what the workers hold together, once."""
        return self.num_moe_layers * self.layer_expert_bytes(precision)

    def num_workers(self, memory_bytes: float, precision: str) -> int:
        """The fewest workers of so much memory that hold all experts once.

        Up to num_experts, each holds whole experts of every layer, as `workers` divides them; a larger answer means
        that shards would have to divide layers too. 0 where not even one expert of one layer fits.
        """
        room = memory_bytes * USABLE_SHARE
        of_every_layer = self.num_moe_layers * self.expert_bytes(precision)
        for count in range(1, self.num_experts + 1):
            if math.ceil(self.num_experts / count) * of_every_layer <= room:
                return count
        fitting = int(room // self.expert_bytes(precision))
        return math.ceil(self.num_moe_layers * self.num_experts / fitting) if fitting else 0


def sizes_of(config: Mapping[str, Any]) -> ModelSizes:
    """The sizes of a config.json. Raises CheckpointError for a family that is not known or a config without a size."""
    nested = config.get("text_config")
    text: Mapping[str, Any] = nested if isinstance(nested, dict) else config
    family = "grok" if is_grok(config) else str(text.get("model_type"))
    count = _FAMILIES.get(family)
    if count is None:
        known = ", ".join(sorted(_FAMILIES))
        raise CheckpointError(f"model_type {family} is not one whose sizes are known. Known are {known}.")
    try:
        return count(text)
    except KeyError as error:
        raise CheckpointError(f"the config of this {family} model lacks {error.args[0]}.") from None
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"the config of this {family} model cannot be read: {error}") from None


def _matrix_bytes(rows: int, columns: int, precision: str) -> int:
    if precision == "bf16":
        return rows * columns * _BF16_BYTES
    if precision == "int8":
        return rows * columns + rows * _BF16_BYTES
    if precision == "int4":
        return rows * math.ceil(columns / 2) + rows * math.ceil(columns / INT4_GROUP) * _BF16_BYTES
    raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")


def _gated(hidden: int, width: int) -> tuple[Matrix, ...]:
    """Gate, up and down."""
    return ((width, hidden), (width, hidden), (hidden, width))


def _count(matrices: tuple[Matrix, ...]) -> int:
    return sum(rows * columns for rows, columns in matrices)


def _attention(config: Mapping[str, Any], head_dim: int) -> int:
    """Grouped-query attention without norms: D*H*C twice, D*K*C twice."""
    return 2 * config["hidden_size"] * head_dim * (config["num_attention_heads"] + config["num_key_value_heads"])


def _num_experts(config: Mapping[str, Any]) -> int:
    """By any of the names in use: Transformers 5 writes other ones than the published configs have."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return config[next((name for name in names if config.get(name)), names[0])]


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _assemble(
    config: Mapping[str, Any],
    *,
    num_moe_layers: int,
    num_experts: int,
    layer_params: int,
    other_params: int = 0,
    expert_matrices: tuple[Matrix, ...],
    expert_biases: int = 0,
    kv_values: int,
    kv_parts: int,
) -> ModelSizes:
    """Adds embeddings, head and final norm. layer_params: in every layer; other_params: in some, already added up.

    The head is its own unless tie_word_embeddings says otherwise.
    """
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    tables = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
    return ModelSizes(
        num_layers=layers,
        num_moe_layers=num_moe_layers,
        num_experts=num_experts,
        top_k=config["num_experts_per_tok"],
        hidden_size=hidden,
        vocab_size=vocab,
        num_heads=config["num_attention_heads"],
        expert_matrices=expert_matrices,
        expert_biases=expert_biases,
        dense_params=layers * layer_params + other_params + tables + hidden,
        embedding_params=vocab * hidden,
        kv_values=kv_values,
        kv_parts=kv_parts,
    )


def _grok(config: Mapping[str, Any]) -> ModelSizes:
    """Four norms a layer; Grok-2 has a dense MLP beside the experts."""
    spec = parse_spec(config)
    hidden, heads, kv_heads = spec.hidden_size, spec.num_heads, spec.num_kv_heads
    attention = 2 * hidden * spec.head_dim * (heads + kv_heads)
    mlp = _count(_gated(hidden, spec.mlp_size))
    names = {
        "hidden_size": hidden,
        "vocab_size": spec.vocab_size,
        "num_hidden_layers": spec.num_layers,
        "num_experts_per_tok": spec.top_k,
        "num_attention_heads": heads,
        "tie_word_embeddings": spec.tied_embeddings,
    }
    return _assemble(
        names,
        num_moe_layers=spec.num_layers,
        num_experts=spec.num_experts,
        layer_params=attention + mlp + hidden * spec.num_experts + 4 * hidden,
        expert_matrices=_gated(hidden, spec.expert_size),
        kv_values=spec.num_layers * 2 * kv_heads * spec.head_dim,
        kv_parts=kv_heads,
    )


def _grouped_query_values(config: Mapping[str, Any]) -> int:
    return config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * _head_dim(config)


def _mixtral(config: Mapping[str, Any]) -> ModelSizes:
    hidden, experts = config["hidden_size"], _num_experts(config)
    return _assemble(
        config,
        num_moe_layers=config["num_hidden_layers"],
        num_experts=experts,
        layer_params=_attention(config, _head_dim(config)) + hidden * experts + 2 * hidden,
        expert_matrices=_gated(hidden, config["intermediate_size"]),
        kv_values=_grouped_query_values(config),
        kv_parts=config["num_key_value_heads"],
    )


def _qwen3_moe(config: Mapping[str, Any]) -> ModelSizes:
    """Norms over the heads of q and k; some layers may be dense (mlp_only_layers, decoder_sparse_step)."""
    hidden, experts, layers = config["hidden_size"], _num_experts(config), config["num_hidden_layers"]
    head_dim, step = _head_dim(config), config.get("decoder_sparse_step") or 1
    dense_only = set(config.get("mlp_only_layers") or ())
    num_moe = sum(layer not in dense_only and (layer + 1) % step == 0 for layer in range(layers))
    attention = _attention(config, head_dim) + 2 * head_dim
    if config.get("attention_bias"):
        attention += head_dim * (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) + hidden
    dense = (layers - num_moe) * _count(_gated(hidden, config["intermediate_size"])) if num_moe < layers else 0
    return _assemble(
        config,
        num_moe_layers=num_moe,
        num_experts=experts,
        layer_params=attention + 2 * hidden,
        other_params=num_moe * hidden * experts + dense,
        expert_matrices=_gated(hidden, config["moe_intermediate_size"]),
        kv_values=_grouped_query_values(config),
        kv_parts=config["num_key_value_heads"],
    )


def _gpt_oss(config: Mapping[str, Any]) -> ModelSizes:
    """Biases everywhere (attention, gate, experts) and one sink for each head."""
    hidden, experts, width = config["hidden_size"], _num_experts(config), config["intermediate_size"]
    heads, head_dim = config["num_attention_heads"], _head_dim(config)
    attention = _attention(config, head_dim) + heads
    if config.get("attention_bias", True):
        attention += head_dim * (heads + 2 * config["num_key_value_heads"]) + hidden
    return _assemble(
        config,
        num_moe_layers=config["num_hidden_layers"],
        num_experts=experts,
        layer_params=attention + hidden * experts + experts + 2 * hidden,
        expert_matrices=_gated(hidden, width),
        expert_biases=2 * width + hidden,
        kv_values=_grouped_query_values(config),
        kv_parts=config["num_key_value_heads"],
    )


def _deepseek(config: Mapping[str, Any]) -> ModelSizes:
    """Multi-head latent attention; the first layers dense, shared experts beside the routed ones in the others."""
    hidden, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    q_rank, kv_rank = config.get("q_lora_rank"), config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query = heads * (nope + rope)
    attention = hidden * q_rank + q_rank + q_rank * query if q_rank else hidden * query
    attention += hidden * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value) + heads * value * hidden
    experts, width = _num_experts(config), config["moe_intermediate_size"]
    num_moe = layers - config["first_k_dense_replace"]
    moe_params = hidden * experts + _count(_gated(hidden, width * (config.get("n_shared_experts") or 0)))
    if config.get("topk_method", "noaux_tc") == "noaux_tc":
        moe_params += experts  # the gate's correction bias
    dense = (layers - num_moe) * _count(_gated(hidden, config["intermediate_size"]))
    return _assemble(
        config,
        num_moe_layers=num_moe,
        num_experts=experts,
        layer_params=attention + 2 * hidden,
        other_params=num_moe * moe_params + dense,
        expert_matrices=_gated(hidden, width),
        kv_values=layers * (kv_rank + rope),
        kv_parts=1,  # every head needs the whole latent vector
    )


def _llama4(config: Mapping[str, Any]) -> ModelSizes:
    """Every n-th layer has experts and a shared expert of their width; the others a wider dense MLP."""
    hidden, experts, layers = config["hidden_size"], _num_experts(config), config["num_hidden_layers"]
    step = config.get("interleave_moe_layer_step") or 1
    moe_layers = config.get("moe_layers") or range(step - 1, layers, step)
    num_moe = len(moe_layers)
    shared = _count(_gated(hidden, config["intermediate_size"]))
    dense = (layers - num_moe) * _count(_gated(hidden, config["intermediate_size_mlp"])) if num_moe < layers else 0
    return _assemble(
        config,
        num_moe_layers=num_moe,
        num_experts=experts,
        layer_params=_attention(config, _head_dim(config)) + 2 * hidden,
        other_params=num_moe * (shared + hidden * experts) + dense,
        expert_matrices=_gated(hidden, config["intermediate_size"]),
        kv_values=_grouped_query_values(config),
        kv_parts=config["num_key_value_heads"],
    )


_FAMILIES: dict[str, Callable[[Mapping[str, Any]], ModelSizes]] = {
    "grok": _grok,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "llama4": _llama4,
    "llama4_text": _llama4,
}
