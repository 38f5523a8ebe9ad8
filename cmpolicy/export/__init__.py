"""A trained policy as one file that needs no cmpolicy training code: ONNX, or a torch program.

``write`` makes the files; ``onnx`` runs one with numpy and onnxruntime alone, ``pt2`` one of torch.
Importing the package, ``runtime`` or ``onnx`` does not load torch.
"""
