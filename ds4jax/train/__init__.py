"""Training of the tiny model, from a folder of text to a GGUF file."""
