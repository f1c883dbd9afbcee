"""The decoder, and the loader that fills it from safetensors."""
