"""The parts of examples/train_llama.py: the model, the text, the training loop and its checkpoints."""
