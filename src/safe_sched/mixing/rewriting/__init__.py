"""Safety prompts in the words of a task, written by a language model."""
