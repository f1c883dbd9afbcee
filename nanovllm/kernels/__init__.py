"""The Triton kernels. Each has a twin in plain PyTorch, which the tests hold it against."""
