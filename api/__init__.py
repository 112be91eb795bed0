"""The HTTP door: inference for applications, administration for operators."""
