"""A finished model, as others use it: the folder, ONNX, the model card, serving."""
