"""Post-training quantization from data: integers under a budget that keep a layer's output."""
