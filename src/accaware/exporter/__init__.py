"""The way out: integer networks as ONNX files in the dialects that other people's tools read."""
