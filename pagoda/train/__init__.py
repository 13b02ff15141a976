"""Training language models on the device: `pagoda train` and the benchmark of a training step.

Enters: text. Leaves: checkpoints, a curve of the loss, text from the trained model.
May import: everything below and `llm`.
"""
