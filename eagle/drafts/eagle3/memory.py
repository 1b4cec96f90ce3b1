"""What EAGLE-3's network takes of memory; see `eagle.drafts.memory`."""

from __future__ import annotations

from eagle.drafts.memory import SINGLE, Setting, attention_mask_bytes, score_bytes


def saved_bytes(setting: Setting, step: int) -> int:
    """Activations that draft step `step` keeps for the backward pass; see `eagle.drafts.unroll`."""
    config, compute = setting.config, setting.compute
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    # What q, k and v read, the attention as EAGLE-1's, the feed-forward block, the state handed on.
    values = 2 * hidden + hidden + queries + queries + 2 * step * queries + 4 * config.intermediate_size
    # Four norms run in float32: of the token, of the state, behind the attention and before the head.
    norm = 3 * hidden * SINGLE if compute == SINGLE else hidden * SINGLE + 3 * hidden * compute
    output = hidden * (SINGLE if compute < SINGLE else compute)  # normed, in the stack of all steps' predictions
    per_position = values * compute + 4 * norm + output + config.num_attention_heads * SINGLE + SINGLE
    return setting.positions * per_position + attention_mask_bytes(setting, step) + score_bytes(setting, step, copies=2)


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
    layer = pairs + max(pairs + repeated + 2 * queries, 3 * config.intermediate_size) + 6 * hidden
    outputs = depth * hidden * (2 * setting.compute + (SINGLE if setting.compute < SINGLE else 0))
    return setting.positions * (layer * setting.compute + outputs) + attention_mask_bytes(setting, depth)
