"""The loader that first finds everything that is wrong with a checkpoint folder, and the faster tokenizer."""
