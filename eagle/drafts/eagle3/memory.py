"""What EAGLE-3's network takes of memory; see `eagle.drafts.memory`."""

from __future__ import annotations

from eagle.drafts.memory import SINGLE, Setting, attention_bytes, attention_mask_bytes, score_bytes


def saved_bytes(setting: Setting, step: int) -> int:
    """Activations that draft step `step` keeps for the backward pass; see `eagle.drafts.unroll`.

    In mixed precision what a norm gives is float32, and each of its readers
    (q, k and v; the two halves of the feed-forward block) keeps a narrow copy of its own.
    """
    config, compute = setting.config, setting.compute
    hidden = config.hidden_size
    attention, feed_forward = (3, 2) if compute < SINGLE else (1, 1)
    # Token and state side by side, the norm behind the attention, and all four norms before their weights.
    values = attention * 2 * hidden + feed_forward * hidden + 4 * hidden
    values += 4 * config.intermediate_size
    # What a norm reads, in float32, where a gradient goes through it: not to the token, nor past a detached state.
    wide = (3 if step == 1 else 2) * hidden
    output = hidden  # normed, in the stack of all steps' predictions
    numbers = 3  # a row, of the norms
    per_position = values * compute + (wide + output + numbers) * SINGLE
    return setting.positions * per_position + attention_bytes(setting, step)


def flowing_bytes(setting: Setting) -> int:
    """Gradients of activations at the widest place, the feed-forward block; and those of all steps' predictions."""
    predictions = 2 * setting.ttt_steps * setting.config.hidden_size * SINGLE
    return setting.positions * (3 * setting.config.intermediate_size * setting.compute + predictions)


def validation_bytes(setting: Setting, depth: int) -> int:
    """`depth` steps without a backward pass: keys and values of all steps, one step's layer, all predictions."""
    config = setting.config
    queries, hidden = config.num_attention_heads * config.head_dim, config.hidden_size
    pairs = 2 * depth * config.num_key_value_heads * config.head_dim
    repeated = 2 * depth * queries if queries > config.num_key_value_heads * config.head_dim else 0
    layer = pairs + max(pairs + repeated + 2 * queries, 3 * config.intermediate_size) + 6 * hidden
    outputs = 2 * depth * hidden * SINGLE  # a norm gives float32
    scores = attention_mask_bytes(setting, depth) + score_bytes(setting, depth, copies=1)
    return setting.positions * (layer * setting.compute + outputs) + scores
