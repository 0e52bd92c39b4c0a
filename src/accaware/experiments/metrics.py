"""What networks are judged by, as results and people call it. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """metric: its key in `result.json`; name, unit: as people write it."""

    metric: str
    name: str
    unit: str

    def shown(self, value: float) -> str:
        """The value with name and unit."""
        return f"{self.name} {value:.2f} {self.unit}".rstrip()


TOP1 = Metric("top1", "top-1", "%")
PSNR = Metric("psnr", "PSNR", "dB")
SPEARMAN = Metric("spearman", "Spearman", "%")
PERPLEXITY = Metric("perplexity", "perplexity", "")
METRICS = {known.metric: known for known in (TOP1, PSNR, SPEARMAN, PERPLEXITY)}
