"""The names of a causal LM's interface; a layer's cache has its number and `.key` or `.value` behind."""

from __future__ import annotations

IDS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
PAST, PRESENT = "past_key_values.", "present."
