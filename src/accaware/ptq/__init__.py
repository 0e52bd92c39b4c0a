"""Post-training quantization from data: integers under a budget that keep a layer's output."""

#: Of `reconstruct`; here, so that whoever only names them imports no torch.
ALGORITHMS = ("budgeted", "axe-gptq", "axe-gpfq", "gptq", "gpfq")
