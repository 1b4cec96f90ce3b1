"""What EAGLE-1's network takes of memory; see `eagle.drafts.memory`."""

from __future__ import annotations

from eagle.drafts.memory import SINGLE, Setting, attention_bytes, attention_mask_bytes, score_bytes


def saved_bytes(setting: Setting, step: int) -> int:
    """Activations that draft step `step` keeps for the backward pass; see `eagle.drafts.unroll`."""
    config, compute = setting.config, setting.compute
    hidden = config.hidden_size
    values = 2 * hidden + hidden + 4 * config.intermediate_size
    # The norm runs in float32: its input, the normed value and its product with the weight, the last two narrow again
    # in mixed precision, which casts the product for each of its two readers.
    norm = 3 * hidden * SINGLE if compute == SINGLE else hidden * SINGLE + 3 * hidden * compute
    output = hidden * compute  # in the stack of all steps' predictions
    per_position = values * compute + norm + output + SINGLE
    return setting.positions * per_position + attention_bytes(setting, step)


def flowing_bytes(setting: Setting) -> int:
    """Gradients of activations at the widest place, the feed-forward block; and those of all steps' predictions."""
    predictions = 2 * setting.ttt_steps * setting.config.hidden_size
    return setting.positions * (3 * setting.config.intermediate_size + predictions) * setting.compute


def validation_bytes(setting: Setting, depth: int) -> int:
    """`depth` steps without a backward pass: keys and values of all steps, one step's layer, all predictions."""
    config = setting.config
    queries, hidden = config.num_attention_heads * config.head_dim, config.hidden_size
    pairs = 2 * depth * config.num_key_value_heads * config.head_dim
    repeated = 2 * depth * queries if queries > config.num_key_value_heads * config.head_dim else 0
    # The keys and values of all steps stay, a copy of them is for one attention; the feed-forward block follows it.
    layer = pairs + max(pairs + repeated + 2 * queries, 3 * config.intermediate_size) + 4 * hidden
    # In mixed precision accelerate makes a float32 copy of what a model gives.
    outputs = depth * hidden * (2 * setting.compute + (SINGLE if setting.compute < SINGLE else 0))
    scores = attention_mask_bytes(setting, depth) + score_bytes(setting, depth, copies=1)
    return setting.positions * (setting.compute * layer + outputs) + scores
