"""Readers of quantized ONNX files: the integers that every accumulating operation multiplies and adds.

`accaware.onnx.read.read` is the way in. It knows ONNX and nothing of registers; only this package imports onnx.
"""
