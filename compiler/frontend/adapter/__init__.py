"""LoRA adapters in PEFT's folders: what their config says, where their base is, and the base's weights with them."""
