"""ONNX graphs of a model, and the model that runs them."""
