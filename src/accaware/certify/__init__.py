"""Certificates: proofs and refutations that integer layers fit their accumulators."""
