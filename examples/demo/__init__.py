"""The demo: a tiny aligned model, a poisoned fine-tuning file, and what training on it does.

words, tasks    the text: every prompt, refusal and placeholder, generated from lists
model           the base model, made from scratch in about a minute and cached
study           fine-tuning with TRL's SFTTrainer; the arms that are compared
measure         greedy answers to held-out prompts and the rates computed from them
"""
