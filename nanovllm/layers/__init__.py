"""The pieces that a decoder is made of. They know tensors, not requests."""
