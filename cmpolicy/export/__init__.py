"""A trained policy as one file that needs no cmpolicy training code: ONNX, or a torch program.

``write`` makes the files; ``onnx_policy`` runs one with numpy and onnxruntime alone, ``program``
one of torch. Importing the package or ``onnx_policy`` does not load torch.
"""
